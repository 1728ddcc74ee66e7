"""Where long work stands: one shape for all of it, whoever shows it. ``progress=print`` shows it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Step:
    """``done`` of ``total`` of ``what`` is done, counted in ``unit``; without a total it is a line of news.

    ``status`` says what is being looked at, or what is known by now. ``seconds`` is about how long all of ``what``
    takes: a guess, made before it begins.
    """

    what: str
    done: float = 0
    total: float = 0
    unit: str = ""
    status: str = ""
    seconds: float | None = None

    @property
    def amount(self) -> str:
        """All of it, where it is counted in something."""
        if self.unit == "bytes":
            return format_bytes(self.total)
        return f"{self.total:,.0f} {self.unit}" if self.unit else ""

    def __str__(self) -> str:
        if not self.total:
            return self.what
        of = f" of {self.amount}" if self.unit else ""
        return f"{self.what}: {100 * self.done / self.total:.0f}%{of}" + (f"; {self.status}" if self.status else "")


Progress = Callable[[Step], None]


class Stages:
    """One progress for work of several stages. ``seconds``: about how long each takes, by its name."""

    def __init__(self, what: str, seconds: Mapping[str, float], progress: Progress | None) -> None:
        self._left, self._progress = dict(seconds), progress
        self._now = Step(what, 0, sum(seconds.values()), seconds=sum(seconds.values()))
        self._tell(0, f"{len(seconds)} parts")

    def skip(self, name: str) -> None:
        """It need not be done."""
        self._now = replace(self._now, total=max(self._now.total - self._left.pop(name, 0), 1e-9))

    @contextmanager
    def stage(self, name: str, status: str) -> Iterator[Progress]:
        """While it lasts, the progress that is yielded is that of this stage within the whole."""
        share, before = self._left.pop(name, 0.0), self._now.done
        self._tell(before, status)

        def inside(step: Step) -> None:
            if step.total:
                more = f", {step.status}" if step.status else ""
                self._tell(before + share * min(step.done / step.total, 1), status + more)
            elif self._progress is not None:
                self._progress(step)

        yield inside
        self._tell(before + share, status)

    def _tell(self, done: float, status: str) -> None:
        self._now = replace(self._now, done=done, status=status)
        if self._progress is not None:
            self._progress(self._now)


@contextmanager
def keeping(told: Callable[[], str]) -> Iterator[None]:
    """Where this is stopped (by Ctrl-C, say), the exception gets a note (PEP 678): what was kept."""
    try:
        yield
    except BaseException as stop:
        if not isinstance(stop, Exception):
            stop.add_note(told())
        raise


def format_bytes(n: float) -> str:
    """``13.48 GB``: powers of 1,000."""
    value = float(n)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def format_seconds(seconds: float) -> str:
    """``51 s``, ``18 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
