"""What the command line prints: tables, sizes, JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from pruner.errors import LONGEST_LINE, printable
from pruner.progress import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from export.push import Push


def show_push(result: Push) -> None:
    if result.dry_run:
        table = make_table("would push", "size")
        for name, size in result.files.items():
            table.add_row(name, format_bytes(size))
        table.add_row(f"{len(result.files)} files", format_bytes(sum(result.files.values())))
        echo(table)
    for note in result.notes:
        echo(f"note: {note}")
    for name in result.removed:
        echo(f"note: {name}, of an earlier push, was removed there")
    if not result.dry_run:
        echo(f"pushed: {result.pull_request or result.url}")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def say(text: str, err: bool = False) -> None:
    """One line; whatever it quotes of others' files can neither move the cursor nor fill the screen."""
    click.echo(printable(text, LONGEST_LINE), err=err)


def write_text(text: str) -> None:
    """What a model says: as it is, but to a terminal without control characters."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" or c >= "\xa0" else repr(c)[1:-1] for c in text)
    click.echo(text, nl=False)


def echo(*parts: str | Table) -> None:
    import shutil

    from rich.console import Console

    # rendered first, so that a broken pipe is ours to handle; a narrow window wraps lines but keeps the numbers
    width = max(80, shutil.get_terminal_size().columns)
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True, width=width)
    with console.capture() as text:
        for part in parts:
            console.print(printable(part, LONGEST_LINE) if isinstance(part, str) else part)
    click.echo(text.get(), nl=False)


def make_table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    class Printable(Table):
        def add_row(self, *cells: str) -> None:  # type: ignore[override]  # text alone, which is all that we show
            super().add_row(*(printable(cell, 100) for cell in cells))

    table = Printable(box=box.SIMPLE, show_header=any(columns), pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def describe_sublayers(kept: list[int], numbered: int) -> str:
    gone = sorted(set(range(numbered)) - set(kept))
    return f"{len(kept)} of {numbered}" + (f", none at {', '.join(map(str, gone))}" if gone else "")


def sample_rows(rows: list[dict[str, int]], original: int) -> list[dict[str, int]]:
    """What ``convert`` takes for --drop 1, 10%, 25%, 33% and 50%, as far as there is so much left."""
    from pruner.plan import parse_drop

    counts = {parse_drop(share, original) for share in ("1", "10%", "25%", "33%", "50%")}
    return [row for row in rows if row["drop"] in counts]
