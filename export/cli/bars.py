"""Progress on a terminal's standard error; nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from export.cli.signals import Stopped
from pruner.errors import LONGEST_LINE, printable


@contextmanager
def bytes_bar(verb: str) -> Iterator[Callable[..., None] | None]:
    """A progress bar on a terminal's standard error; nothing in a pipe. A third argument is what is done instead."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    label = TextColumn("{task.description}")
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None, visible=False)  # until there is something to show

        def show(done: int, total: int, what: str = verb) -> None:
            bar.update(task, completed=done, total=total, description=what, visible=True)

        yield show


@contextmanager
def steps_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each part of a long job on a terminal's standard error; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                for old in tasks.values():
                    bar.remove_task(old)
                tasks.clear()
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done, total=total)

        yield update


@contextmanager
def choosing_bar(
    text: str | None,
) -> Iterator[tuple[Callable[[float, float, str], None] | None, Callable[[str], None] | None]]:
    """Progress of a selection, and lines about it, on a terminal's standard error; nothing in a pipe."""
    try:
        with _choosing_shown() if sys.stderr.isatty() else nullcontext((None, None)) as shown:
            yield shown
    except Stopped as stop:
        if text is not None:
            stop.hint += "; steps that were finished are kept: --resume goes on from there"
        raise


@contextmanager
def _choosing_shown() -> Iterator[tuple[Callable[[float, float, str], None], Callable[[str], None]]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("choosing"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("choosing", total=None, status="")

    def progress(done: float, total: float, status: str) -> None:
        if not bar.finished:
            bar.start()
        bar.update(task, completed=done, total=total, status=status)
        if done >= total:
            bar.stop()

    try:
        yield progress, lambda line: console.print(printable(line, LONGEST_LINE), markup=False)
    finally:
        bar.stop()
