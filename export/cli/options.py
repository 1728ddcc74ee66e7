"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from pruner.errors import PruneAttnError
from pruner.machine import MOST_THREADS
from pruner.select.request import OBJECTIVES, STRATEGIES

PATH = click.Path()


_THREADS = {
    "type": click.IntRange(1, MOST_THREADS), "metavar": "N",
    "help": "Threads to compute with.  [default: the cores that this process may use]",
}  # fmt: skip
THREADS = click.option("--threads", **_THREADS)


def _several(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    return list(value) or None


# an option that may be given several times: a list, or None
TEXTS: dict[str, Any] = {"type": PATH, "multiple": True, "callback": _several}
_TEXT_FIELD = {"metavar": "NAME", "help": "The field of JSON lines that holds the text.  [default: text]"}
TEXT_FIELD = click.option("--text-field", **_TEXT_FIELD)


REVISION = click.option("--revision", metavar="REV", help="A Hub id's branch, tag or commit.  [default: main]")


CACHE = click.option("--cache-dir", type=PATH, help="Where a Hub id is fetched to.  [default: the Hub's cache]")


def CHOOSING(command: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802, used as the options beside it are
    """What ``select`` and ``convert`` have in common."""
    kinds, devices, strategies = (click.Choice(c) for c in (OBJECTIVES, ("cpu", "cuda"), STRATEGIES))
    for name, settings in (
        ("--resume", {"is_flag": True, "help": "Go on from where a stopped run got to, to the same plan."}),
        ("--objective", {"type": kinds, "help": "Divergence from the original, or loss.  [default: kl]"}),
        ("--device", {"type": devices, "default": "cpu", "help": "Where they are run.  [default: cpu]"}),
        ("--seed", {"type": click.IntRange(0), "default": 0, "help": "Where the windows lie.  [default: 0]"}),
        ("--threads", _THREADS),
        ("--length", {"type": int, "metavar": "N", "help": "Tokens each.  [default: half the context, at most 2048]"}),
        ("--samples", {"type": int, "metavar": "N", "help": "Windows of the text to run.  [default: 64]"}),
        ("--text-field", _TEXT_FIELD),
        ("--text", {**TEXTS, "help": "Choose by this: UTF-8 or JSON lines (once for each file), or general."}),
        ("--strategy", {"type": strategies, "help": "Which go first.  [default: last; search with --text]"}),
    ):  # fmt: skip
        command = click.option(name, **settings)(command)
    return command


QUIET = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


def given(name: str) -> bool:
    """Whether the option stood on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def takes_only(option: str, *names: str) -> None:
    """Refuse whatever else was given to this command."""
    for parameter in click.get_current_context().command.params:
        if parameter.name not in names and given(parameter.name):
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
            raise PruneAttnError(f"{option} has no use for {name}; leave it out")
