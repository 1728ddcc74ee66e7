"""Finished parts of a run, saved one by one, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.safetensors import write_file

FOLDER = "unfinished"


class Parts:
    """JSON values by name in ``OUTPUT/unfinished``; one counts only with the same ``key``: models and options."""

    def __init__(self, output: Path, key: Any) -> None:
        self._folder, self._key = output / FOLDER, _digest(key)
        self.reused: list[str] = []

    def get(self, name: str, options: Any, make: Callable[[], Any]) -> Any:
        """The saved value of this part, or ``make()``'s, which is saved."""
        path, key = self._folder / f"{name}.json", _digest([self._key, options])
        try:
            saved = json.loads(path.read_bytes())
            if saved["key"] == key:
                self.reused.append(name)
                return saved["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        value = json.loads(json.dumps(make(), allow_nan=False))  # as it will be read again, so that both runs agree
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        write_file(temporary, json.dumps({"key": key, "value": value}).encode())
        os.replace(temporary, path)
        return value

    def has(self, name: str, options: Any) -> bool:
        """Whether ``get`` would not have to make it."""
        try:
            return json.loads((self._folder / f"{name}.json").read_bytes())["key"] == _digest([self._key, options])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def remove(self) -> None:
        """All is written where it belongs."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
