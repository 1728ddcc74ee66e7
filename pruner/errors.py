"""Errors that a person can act on: one line, what is wrong and what to do about it."""

from __future__ import annotations

import re

LONGEST_LINE = 2000  # characters; one that names 126 layers has 500


def printable(text: str, most: int = 200) -> str:
    """Foreign text for people to read: one line of at most ``most`` characters, nothing in it that moves a cursor.

    Control characters, half surrogate pairs and the like are written as Python writes them; of what is too long the
    middle goes, for a message begins with the file and ends with the cure.
    """
    text = re.sub(r"\s*[^\S ]\s*", " ", _shortened(text, most).strip())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return _shortened(text, most)


def _shortened(text: str, most: int) -> str:
    tail = most // 3
    return text if len(text) <= most else f"{text[: most - tail - 5]} ... {text[-tail:]}"


def one_line(error: BaseException, most: int = 200) -> str:
    """What somebody else's exception says, for a message of ours: ``printable``."""
    return printable(str(error), most)


class PruneAttnError(Exception):
    """Bad input: the message is one line that names the file and the cure. The command exits with 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, LONGEST_LINE))  # it may quote what others wrote


class MachineError(PruneAttnError):
    """The machine failed, not the input (disk full, no permission). The command exits with 1."""

    exit_code = 1
