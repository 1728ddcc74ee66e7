"""Finished parts of a run, saved one by one, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from pruner.errors import PruneAttnError
from pruner.files import read_json, replace_file

FOLDER = "unfinished"


class Parts:
    """JSON values by name in ``OUTPUT/unfinished``; one counts only with the same ``key``: models and options."""

    def __init__(self, output: Path, key: Any) -> None:
        self._folder, self._key = output / FOLDER, _digest(key)
        self.reused: list[str] = []

    def saved(self, name: str, options: Any) -> Any:
        """``None`` where this part was not finished, with these options."""
        try:
            found = read_json(self._path(name), 1 << 30)
            if found["key"] == _digest([self._key, options]):
                self.reused.append(name)
                return found["value"]
        except (OSError, PruneAttnError, KeyError):
            pass
        return None

    def save(self, name: str, options: Any, value: Any) -> Any:
        """The value as it will be read again, so that a run that was stopped and one that was not agree."""
        value = json.loads(json.dumps(value, allow_nan=False))
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._path(name), json.dumps({"key": _digest([self._key, options]), "value": value}).encode())
        return value

    def _path(self, name: str) -> Path:
        return self._folder / f"{re.sub('[^A-Za-z0-9._@-]', '_', name)[:150]}-{_digest(name)[:8]}.json"

    def remove(self) -> None:
        """All is written where it belongs."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
