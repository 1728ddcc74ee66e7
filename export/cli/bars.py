"""Progress on standard error: a bar on a terminal, plain lines elsewhere. Never on standard output."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from export.cli.show import say
from pruner.errors import LONGEST_LINE, printable
from pruner.progress import Progress, Step, format_seconds

SOON, EVERY = 10, 30  # seconds: bytes expected in less than SOON get no line at the start; all get one each EVERY
_APART = 2  # seconds between lines about steps


@contextmanager
def show_progress(quiet: bool = False) -> Iterator[Progress | None]:
    """What shows progress while this lasts; ``None`` where nobody wants to see it."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as progress:
            yield progress
    else:
        lines = Lines()
        end = threading.Event()
        ticking = threading.Thread(target=lines.tick_until, args=(end,), daemon=True)
        ticking.start()
        try:
            yield lines
        finally:
            end.set()
            ticking.join(1)


class Lines:
    """A line when something begins (what, how much, about how long), then at each step or every 30 s."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step: Step | None = None
        self._began = self._told = 0.0
        self._silent = True  # nothing has been said of this one yet
        self._broken = False  # nobody reads

    def __call__(self, step: Step) -> None:
        with self._lock:
            now = time.monotonic()
            before, same = self._step, self._step is not None and self._step.what == step.what
            if not step.total:
                self._say(step.what)
                return
            self._step = step
            if not same:
                self._began, self._from, self._silent = now, step.done, True
                if step.unit != "bytes" or step.seconds is None or step.seconds >= SOON:
                    self._begin(now)
            elif before and before.status != step.status and not self._silent and now - self._told >= _APART:
                self._tell(now)
            else:
                self._tick(now)

    def tick_until(self, end: threading.Event) -> None:
        """Say now and then where it stands, though nothing may be heard of it for long."""
        while not end.wait(1):
            with self._lock:
                self._tick(time.monotonic())

    def _tick(self, now: float) -> None:
        if self._step is None or self._step.done >= self._step.total:
            return
        if self._silent and now - self._began >= EVERY:
            self._begin(now)
        elif not self._silent and now - self._told >= EVERY:
            self._tell(now)

    def _begin(self, now: float) -> None:
        step = self._step
        assert step is not None
        parts = [step.amount, step.status, _about(step.seconds)]
        self._silent, self._told = False, now
        self._say(f"{step.what}: {', '.join(part for part in parts if part)}")

    def _tell(self, now: float) -> None:
        step = self._step
        assert step is not None
        self._told = now
        line, gone = str(step), step.done - self._from
        if gone > 0:
            left = (now - self._began) * (step.total - step.done) / gone
            line += f"; {_about(left)} left"
        self._say(line)

    def _say(self, line: str) -> None:
        if not self._broken:
            try:
                say(line, err=True)
            except (OSError, ValueError):  # no reason to stop the work
                self._broken = True


def _about(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"about {format_seconds(seconds)}" if seconds >= 1 else "under 1 s"


@contextmanager
def _bar() -> Iterator[Progress]:
    """One bar, of whatever is being done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[about]}", markup=False),
    )  # fmt: skip
    console = Console(stderr=True, highlight=False)
    bars = Bars(*columns, console=console, transient=True)
    task, what = bars.add_task("", total=None, about=""), ""

    def progress(step: Step) -> None:
        nonlocal what
        if not step.total:
            console.print(printable(step.what, LONGEST_LINE), markup=False)
            return
        bars.start()
        if step.what != what:
            what = step.what
            bars.reset(task, description=printable(what, 60))
        about = step.status or step.amount
        bars.update(task, completed=step.done, total=step.total, about=printable(about, 100))

    try:
        yield progress
    finally:
        bars.stop()
