"""``prune-attn report``."""

from __future__ import annotations

import click

from export.cli.options import PATH
from export.cli.show import say


@click.command()
@click.argument("results", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="Where the files go.")
def report(results: tuple[str, ...], output: str) -> None:
    """Render a results.json again, or several side by side."""
    from export.report.compare import report

    for path in report(results, output):
        say(str(path))
