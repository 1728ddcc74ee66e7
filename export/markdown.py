"""Foreign text in Markdown: one short line that shows as it is written, whatever stands in it."""

from __future__ import annotations

import re

from pruner.errors import printable

# what begins code, emphasis, strikes, mathematics, HTML, entities or the cells of a table; links and images
_MARKS = re.compile(r"[\\`*<|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|\](?=[(\[:])|!(?=\[)")


def plain(text: str, most: int = 100) -> str:
    """Text among other text or in a cell, of at most ``most`` characters before its marks are escaped."""
    return _MARKS.sub(r"\\\g<0>", printable(text, most))


def code(text: str, most: int = 100) -> str:
    """Text in backticks, between which nothing else is a mark."""
    return f"`{printable(text, most).replace('`', chr(39)) or ' '}`"
