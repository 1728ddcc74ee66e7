"""Finished parts of a run, saved one by one, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.report import UNFINISHED
from pruner.errors import PruneAttnError
from pruner.files import read_json, replace_file
from pruner.progress import Progress, Stages


class Parts:
    """JSON values by name in ``OUTPUT/unfinished``; one counts only with the same ``key``: models and options.

    ``stages`` is told of each.
    """

    def __init__(self, output: Path, key: Any, stages: Stages) -> None:
        self._folder, self._key, self.stages = output / UNFINISHED, _digest(key), stages
        self.reused: list[str] = []

    def part(self, name: str, options: Any, status: str, make: Callable[[Progress], Any]) -> Any:
        """A part of the results: taken from an earlier run, or made and saved."""
        value = self.saved(name, options)
        if value is not None:
            self.stages.skip(name)
            return value
        with self.stages.stage(name, status) as progress:
            return self.save(name, options, make(progress))

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

    def told(self) -> str:
        """What a run that is stopped leaves."""
        count = len(list(self._folder.glob("*.json")))
        if not count:
            return "nothing was finished that could be kept"
        return f"{count} finished parts are kept in {self._folder}; the same command goes on from there"

    def remove(self) -> None:
        """All is written where it belongs."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def remove_empty(self) -> None:
        """Where nothing was finished: the folder, and the output's if nothing else lies in it."""
        output = self._folder.parent
        if output.is_dir() and not any(self._folder.glob("*.json")):
            self.remove()
            if not any(output.iterdir()):
                output.rmdir()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
