"""The console script: the verbs, and what becomes of an exception. Nothing heavy is imported before work starts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

import click

from export.cli.adopt import adopt
from export.cli.convert import convert
from export.cli.export import export
from export.cli.generate import generate
from export.cli.inspect import inspect
from export.cli.push import push
from export.cli.report import report
from export.cli.select import select
from export.cli.show import say
from export.cli.signals import SIGNALS, Stopped, stop
from export.cli.sweep import sweep
from export.cli.validate import validate
from export.cli.verify import verify
from pruner import __version__
from pruner.errors import PruneAttnError, one_line


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="prune-attn")
@click.pass_context
def cli(context: click.Context) -> None:
    """Prune attention out of Llama checkpoints: physically, provably, and for every runtime."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (inspect, convert, select, verify, export, generate, sweep, adopt, push, validate, report):
    cli.add_command(command)


def main() -> NoReturn:
    """The console script: every failure is one line on standard error, and an exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as the process lives
    try:
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
                signal.signal(signum, stop)
        code = cli.main(prog_name="prune-attn", standalone_mode=False)
        sys.stdout.flush()
        code, text = code if isinstance(code, int) else 0, ""
    except SystemExit as error:
        code, text = error.code, ""
    except (Exception, Stopped) as error:
        if os.environ.get("PRUNE_ATTN_DEBUG") == "1":
            raise
        code, text = _explain(error)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # all is done; an interrupt now would only print a traceback
    if text:
        say(f"prune-attn: {text}", err=True)
    if isinstance(code, int) and code > 128 and threading.active_count() > 1:  # transfers, whose end nobody waits for
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for what went wrong."""
    if isinstance(error, PruneAttnError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "prune-attn"
        return 2, f"{' '.join(error.format_message().split())} (see `{where} --help`)"
    if isinstance(error, Stopped):
        return 128 + error.signum, str(error)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, "the reader of the output went away"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return 1, f"{name}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return 1, "out of memory"
    return (
        1,
        f"unexpected {type(error).__name__}: {one_line(error, 300)} (PRUNE_ATTN_DEBUG=1 shows where)",
    )
