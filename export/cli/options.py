"""Options that several verbs share."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource
from cloup import option, option_group

from pruner.errors import PruneAttnError
from pruner.machine import MOST_THREADS
from pruner.select.request import OBJECTIVES, STRATEGIES

PATH = click.Path()


THREADS = option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    metavar="N",
    help="Threads to compute with.  [default: the cores that this process may use]",
)


def _several(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    return list(value) or None


# an option that may be given several times: a list, or None
TEXTS: dict[str, Any] = {"type": PATH, "multiple": True, "callback": _several}
TEXT_FIELD = option(
    "--text-field", metavar="NAME", help="The field of JSON lines that holds the text.  [default: text]"
)


REVISION = option("--revision", metavar="REV", help="A Hub id's branch, tag or commit.  [default: main]")
CACHE = option("--cache-dir", type=PATH, help="Where a Hub id is fetched to.  [default: the Hub's cache]")
HUB = option_group("The Hub", REVISION, CACHE)


CHOOSING = option_group(
    "What to choose by",
    option("--strategy", type=click.Choice(STRATEGIES), help="Which go first.  [default: last; search with --text]"),
    option("--text", **TEXTS, help="Choose by this: UTF-8 or JSON lines (once for each file), or general."),
    TEXT_FIELD,
    option("--samples", type=int, metavar="N", help="Windows of the text to run.  [default: 64]"),
    option("--length", type=int, metavar="N", help="Tokens each.  [default: half the context, at most 2048]"),
    THREADS,
    option("--seed", type=click.IntRange(0), default=0, help="Where the windows lie.  [default: 0]"),
    option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where they are run.  [default: cpu]"),
    option("--objective", type=click.Choice(OBJECTIVES), help="Divergence from the original, or loss.  [default: kl]"),
    option("--resume", is_flag=True, help="Go on from where a stopped run got to, to the same plan."),
)
ALLOW = (
    option("--allow-first-layer", is_flag=True, help="Let layer 0's attention go (vLLM will not load it)."),
    option("--allow-all", is_flag=True, help="Let every attention, or every MLP, go."),
)
DTYPE = click.Choice(["float16", "bfloat16", "float32"])
SUBLAYER = click.Choice(["attention", "mlp", "block"])


def examples(*lines: str) -> str:
    """The end of a verb's help."""
    return "\b\nExamples:\n" + "\n".join(f"  prune-attn {line}" for line in lines)


QUIET = option("-q", "--quiet", is_flag=True, help="Show no progress.")
JSON = option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


def given(name: str) -> bool:
    """Whether the option stood on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def takes_only(option: str, *names: str) -> None:
    """Refuse whatever else was given to this command."""
    for parameter in click.get_current_context().command.params:
        if parameter.name not in names and given(parameter.name):
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
            raise PruneAttnError(f"{option} has no use for {name}; leave it out")
