"""``prune-attn verify``."""

from __future__ import annotations

import sys
from typing import Any

from cloup import argument, command, option, option_group

from export.cli.bars import show_progress
from export.cli.options import CACHE, JSON, PATH, QUIET, examples
from export.cli.show import print_json, say

_NAMED = 5  # of the tensors that differ; --json has them all


@command(epilog=examples("verify pruned", "verify pruned --against meta-llama/Llama-2-13b-hf"))
@argument("output", type=PATH, help="What convert wrote: a directory, or a Hub id.")
@option("--against", type=PATH, metavar="SOURCE", help="Compare every kept tensor with SOURCE, byte for byte.")
@option_group(
    "The Hub",
    option("--revision", metavar="REV", help="SOURCE's branch, tag or commit, on the Hub.  [default: main]"),
    option("--output-revision", metavar="REV", help="OUTPUT's, where it is on the Hub.  [default: main]"),
    CACHE,
)
@QUIET
@JSON
def verify(output: str, against: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check a directory that convert wrote. Exits with 1 where something is wrong."""
    from export.verify import verify

    with show_progress(quiet) as progress:
        result = verify(output, against, progress=progress, **options)
    if as_json:
        print_json(result.to_json())
    elif result.ok:
        dtypes = [*result.through, *filter(None, [result.converted_to])]
        after = f" converted to {', then to '.join(dtypes)}" if dtypes else ""
        compared = f"; {result.compared} tensors equal {against}'s{after}, byte for byte" if against else ""
        if result.changed:
            compared = "; its structure was checked, and its weights were changed after it was pruned"
            if against:
                names = ", ".join(result.differ[:_NAMED]) or "none"
                more = f" and {len(result.differ) - _NAMED} more" if len(result.differ) > _NAMED else ""
                compared += f"; {len(result.differ)} tensors differ from {against}'s: {names}{more}"
        say(f"{output}: ok{compared}")
    else:
        for problem in result.problems:
            say(problem, err=True)
    if not result.ok:
        sys.exit(1)
