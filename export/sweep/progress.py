"""What an interrupted sweep keeps: ``OUTPUT.partial`` with one file of figures and one of each order chosen."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruner.errors import PruneAttnError
from pruner.files import read_json, replace_file
from pruner.select.request import POSITIONAL

STATE = "progress.json"


@dataclass
class Kept:
    """Figures by what is dropped. Each change is saved at once, whole."""

    path: Path
    setting: dict[str, Any]
    key: dict[str, Any]  # what must be equal too, but is no part of the result
    perplexity: dict[str, float | None] = field(default_factory=dict)
    speed: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def plans(self) -> Path:
        """The folder of the orders."""
        return self.path / "plans"

    @property
    def worth_keeping(self) -> bool:
        """Whether anything is finished that took time; orders by position take none."""
        orders = [file.stem.partition("-")[2] for file in self.plans.iterdir()]
        kept = self.perplexity or self.speed or set(orders) - set(POSITIONAL) or any(self.path.glob("*.partial.json"))
        return bool(kept)

    def save(self) -> None:
        """Write what there is."""
        write_whole(self.path / STATE, {k: v for k, v in vars(self).items() if k != "path"})

    def told(self) -> str:
        """What a sweep that is stopped has kept."""
        if not self.worth_keeping:
            return "nothing was finished that could be kept"
        return f"what is finished is kept in {self.path}; the same command goes on from there"

    def discard(self) -> None:
        """All of it lies in the output now."""
        shutil.rmtree(self.path)


@contextmanager
def kept(output: Path, setting: dict[str, Any], key: dict[str, Any]) -> Iterator[Kept]:
    """What an earlier call with this ``setting`` and ``key`` finished, or nothing yet.

    Raises ``PruneAttnError`` where it is another sweep's, or another process is at it.
    """
    target = Path(os.path.realpath(output))
    work = Kept(target.with_name(f"{target.name}.partial"), setting, key)
    file = work.path / STATE
    if work.path.exists() and not file.is_file():
        raise PruneAttnError(f"{work.path}: is in the way and no interrupted sweep; move it away")
    work.plans.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        work.save()
    lock = os.open(work.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PruneAttnError(f"{work.path}: another sweep is writing it; wait for it to end") from None
        try:
            before = read_json(file)
            work.perplexity, work.speed = before["perplexity"], before["speed"]
            differs = [name for name, value in key.items() if before["key"].get(name) != value]
            differs += [name for name, value in setting.items() if before["setting"].get(name) != value]
        except (PruneAttnError, KeyError, TypeError, AttributeError):
            raise PruneAttnError(f"{file}: is damaged; remove {work.path} to begin again") from None
        if differs:
            raise PruneAttnError(
                f"{work.path}: holds an interrupted sweep with another {differs[0]}; "
                "give the options it had to go on with it, or remove it to begin again"
            )
        try:
            yield work
        except BaseException:
            if not work.worth_keeping:  # it would only be in the way of the next one
                work.discard()
            raise
    finally:
        os.close(lock)


def write_whole(file: Path, value: Any) -> None:
    """Write JSON in one step."""
    replace_file(file, (json.dumps(value, indent=2) + "\n").encode())
