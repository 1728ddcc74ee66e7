"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str | os.PathLike[str]) -> Path:
    """The path, with the home directory for a leading ``~``: a shell leaves it where it stands in quotes."""
    return Path(os.path.expanduser(path))
