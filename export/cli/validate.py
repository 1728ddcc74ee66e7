"""``prune-attn validate``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from cloup import argument, command, option, option_group

from export.cli.bars import show_progress
from export.cli.options import JSON, PATH, QUIET, TEXT_FIELD, TEXTS, THREADS, examples, given
from export.cli.show import echo, make_table, print_json, say
from pruner.errors import PruneAttnError

if TYPE_CHECKING:
    from export.validate.run import Validation

# the fields of ``export.validate.options`` in their order, as options are called here
_OF_PART = {
    "accuracy": ("text", "text_field", "window", "stride", "bos", "max_tokens"),
    "tasks": ("tasks", "limit"),
    "latency": ("batch", "prompt", "new_tokens", "repeats", "seconds", "compiled"),
}
_OF_COMPUTE = ("backend", "device", "dtype", "seed", "threads", "work")
_LIMITS = ("max_perplexity_increase", "min_agreement", "min_task_average_ratio", "min_decode_speedup")


@command(
    epilog=examples(
        "validate Llama-2-13b-hf pruned --text test.txt",
        "validate Llama-2-13b-hf pruned --tasks openllm --device cuda --min-decode-speedup 1.05",
    )
)
@argument("original", type=PATH, help="What PRUNED was made from: a directory, or a Hub id.")
@argument("pruned", type=PATH, help="What convert wrote: a directory, or a Hub id.")
@option("-o", "--output", type=PATH, help="Where the report goes.  [default: PRUNED/report]")
@option("--only", metavar="P,P", help="same-function, accuracy, tasks, latency.  [default: all]")
@option_group(
    "Accuracy",
    option("--text", **TEXTS, help="Text that neither model has seen, UTF-8 or JSON lines. Without it: no accuracy."),
    TEXT_FIELD,
    option(
        "--window", type=click.IntRange(2), metavar="N", help="Tokens of context.  [default: the model's, at most 4096]"
    ),
    option("--stride", type=click.IntRange(1), metavar="N", help="Tokens between windows.  [default: half a window]"),
    option(
        "--bos",
        type=click.Choice(["once", "every", "none"]),
        default="once",
        show_default=True,
        help="BOS before the text, before every window, or not at all.",
    ),
    option("--max-tokens", type=click.IntRange(1), metavar="N", help="Take only the text's first N tokens."),
)
@option_group(
    "Tasks",
    option("--tasks", metavar="T,T", help="openllm, any task of lm-evaluation-harness, or a task's YAML file."),
    option("--limit", type=click.IntRange(1), metavar="N", help="At most N examples of each task."),
)
@option_group(
    "Latency",
    option("--batch", metavar="N,N", default="1,8", show_default=True, help="Rows that are timed together."),
    option("--prompt", metavar="N,N", help="Prompt lengths that are timed.  [default: 128,512,2048, what fits]"),
    option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Timed after each prompt."),
    option("--repeats", type=click.IntRange(3), default=20, show_default=True, help="Times that each model is run."),
    option("--seconds", type=float, default=60, show_default=True, help="After that long, 3 repeats are enough."),
    option("--compiled/--no-compiled", default=None, help="Time transformers compiled too.  [default: on CUDA]"),
)
@option_group(
    "Limits (exit code 3 where one is broken)",
    option("--max-perplexity-increase", metavar="P%", help="In percent of the original's."),
    option("--min-agreement", metavar="X", help="Share of tokens with the same most likely one."),
    option("--min-task-average-ratio", metavar="X", help="Pruned over original."),
    option("--min-decode-speedup", metavar="X", help="Of each backend, over all batches and prompts."),
)
@option_group(
    "The machine",
    option("--backend", metavar="B,B", help="torch, onnx.  [default: both, where PRUNED has a model.onnx]"),
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    option("--dtype", help="What PyTorch computes in.  [default: float32 on the CPU, as stored on CUDA]"),
    THREADS,
    option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same accuracy."),
    option("--work", type=PATH, metavar="DIR", help="Place for temporary graphs and weights.  [default: OUTPUT]"),
)
@QUIET
@JSON
def validate(original: str, pruned: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure PRUNED against ORIGINAL and write a report. Exits with 3 where a limit is broken.

    A run that was stopped goes on where it was when it is started again. Exits with 1 where PRUNED is not ORIGINAL
    without those sublayers.
    """
    from export.validate.run import validate

    wanted = _wanted(options.pop("only"), options)
    measure = partial(validate, original, pruned, options.pop("output"), **_parts(wanted, options))
    run_validation(measure, as_json, quiet)


def _wanted(only: str | None, options: dict[str, Any]) -> list[str]:
    """The parts that are asked for; options of another part are refused."""
    from export.validate.options import PARTS
    from export.validate.setting import choices

    wanted = [p for p in PARTS if (p != "accuracy" or options["text"]) and (p != "tasks" or options["tasks"])]
    if only is not None:
        wanted = choices(only, PARTS, "--only")
    for part, names in _OF_PART.items():
        for name in () if part in wanted else filter(given, names):
            raise PruneAttnError(f"--{name.replace('_', '-')} is for {part}, which is not asked for; leave it out")
    if "accuracy" in wanted and options["text"] is None:
        raise PruneAttnError("accuracy needs a text that neither model has seen; add --text FILE")
    if "tasks" in wanted and not options["tasks"]:
        raise PruneAttnError("--only tasks: say which, for example --tasks openllm")
    return wanted


def _parts(wanted: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``validate`` that these options stand for."""
    from export.validate.limits import Limits
    from export.validate.options import Accuracy, Compute, Latency, Tasks

    asked = {
        part: kind(*(options[name] for name in _OF_PART[part])) if part in wanted else None
        for part, kind in (("accuracy", Accuracy), ("tasks", Tasks), ("latency", Latency))
    }
    return asked | {
        "same_function": "same-function" in wanted,
        "compute": Compute(*(options[name] for name in _OF_COMPUTE)),
        "limits": Limits.parse(*(options[name] for name in _LIMITS)),
    }


def run_validation(measure: Callable[..., Validation], as_json: bool, quiet: bool) -> None:
    """Run it with a progress, and show what it found. Exits where the function or a limit is broken."""
    with show_progress(quiet) as progress:
        done = measure(progress=progress)
    if as_json:
        print_json(done.results)
    elif done.exit_code != 1:
        from export.report.content import glance_rows

        table = make_table("", "original", "pruned", "change")
        for column in table.columns:
            column.no_wrap = False
        table.columns[1].no_wrap = True
        for row in glance_rows(done.results):
            table.add_row(*row)
        notes = (f"note: {note}" for note in done.results["notes"])
        echo(table, "in brackets: 95% intervals", *notes, f"the report lies in {done.output}/report.html")
    for problem in done.problems:
        say(problem, err=True)
    if done.exit_code:
        sys.exit(done.exit_code)
