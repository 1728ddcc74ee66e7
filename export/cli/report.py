"""``prune-attn report``."""

from __future__ import annotations

from cloup import argument, command, option

from export.cli.options import PATH, examples
from export.cli.show import say


@command(
    epilog=examples("report pruned/report/results.json -o again", "report a/results.json b/results.json -o compared")
)
@argument("results", type=PATH, nargs=-1, required=True, help="One results.json of validate, or several.")
@option("-o", "--output", type=PATH, required=True, help="Where the files go.")
def report(results: tuple[str, ...], output: str) -> None:
    """Render a results.json again, or several side by side."""
    from export.report.compare import report

    for path in report(results, output):
        say(str(path))
