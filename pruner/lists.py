"""Several values in one option: ``"a,b"`` at the command line, a list in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def listed(given: str | Sequence[Any]) -> list[str]:
    """Each as a text, without spaces around it; a text is split at its commas."""
    return [str(part).strip() for part in (given.split(",") if isinstance(given, str) else given)]
