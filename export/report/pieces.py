"""What sections of a report are made of, and how figures are written in them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pruner.errors import printable


@dataclass
class Table:
    """The first column is a label, the others are numbers, or ``words``.

    ``stacked``: too many columns for a narrow screen, on which each row becomes a list of its own.
    """

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    words: bool = False
    stacked: bool = False


@dataclass
class Section:
    """``plots`` are names of ``plots.FIGURES``; their order is that of the page."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)


def short_name(name: str, most: int = 80) -> str:
    """A model's name without its owner, for people to read."""
    return printable(name.rstrip("/").rsplit("/", 1)[-1], most)


def interval(estimate: dict[str, float], form: str = "{:.2f}", shift: float = 0) -> str:
    """``1.21 [1.18, 1.24]``."""
    value, low, high = (form.format(estimate[key] + shift) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def size(nbytes: float) -> str:
    """In KB, MB, GB of powers of 10."""
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
