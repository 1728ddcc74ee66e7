"""Errors that a person can act on: one line, what is wrong and what to do about it."""

from __future__ import annotations


def one_line(error: BaseException, most: int = 200) -> str:
    """What somebody else's exception says, for a message of ours: in one line, of at most so many characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


class PruneAttnError(Exception):
    """Bad input: the message is one line that names the file and the cure. The command exits with 2."""

    exit_code = 2


class MachineError(PruneAttnError):
    """The machine failed, not the input (disk full, no permission). The command exits with 1."""

    exit_code = 1
