"""``select``: a plan chosen and saved, and nothing converted."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruner.checkpoint import open_checkpoint
from pruner.errors import PruneAttnError
from pruner.files import expand, read_json
from pruner.hub.source import Revision, fetch
from pruner.plan import PruningPlan
from pruner.progress import Progress, keeping
from pruner.record import FORMAT
from pruner.select.calibrated import told_of
from pruner.select.choose import choose
from pruner.select.request import DEPTH_NOTE, POSITIONAL, Calibration, Drop


@dataclass(frozen=True)
class Selected:
    """The plan, the file it lies in, and what making it took (see ``pruner.select.Selection``)."""

    plan: PruningPlan
    path: Path
    cost: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"output": str(self.path), "plan": self.plan.to_json(), "cost": self.cost, "notes": self.notes}


def partial_path(output: Path) -> Path:
    """Where an unfinished selection for ``output`` is kept: ``plan.partial.json`` beside ``plan.json``."""
    return output.with_name(f"{output.stem if output.suffix == '.json' else output.name}.partial.json")


def select(
    source: str | os.PathLike[str],
    drop: Drop | str | int,
    *,
    calibration: Calibration | None = None,
    output: str | os.PathLike[str] = "plan.json",
    overwrite: bool = False,
    hub: Revision = Revision(),  # noqa: B008
    progress: Progress | None = None,
) -> Selected:
    """Choose what to drop and save the plan as ``output``, whole or not at all; ``drop`` as for ``convert``.

    ``source`` is a directory, or a Hub id (at ``hub``) that is fetched first. ``overwrite`` replaces only a plan. What
    has been computed is kept beside ``output`` until the plan is there.
    """
    output = expand(output)
    _check_output(output, overwrite)
    partial = partial_path(output)
    checkpoint = open_checkpoint(fetch(source, hub, progress=progress))
    with keeping(lambda: told_of(partial)):
        made = choose(checkpoint, drop, calibration, partial=partial, progress=progress)
        if calibration is not None:
            checkpoint.check_unchanged()
    staging = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        staging.write_text(json.dumps(made.plan.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _check_output(output, overwrite)
        os.replace(staging, output)
    finally:
        staging.unlink(missing_ok=True)
    partial.unlink(missing_ok=True)
    return Selected(made.plan, output, made.cost, [DEPTH_NOTE] if made.plan.strategy in POSITIONAL else [])


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse, before any work, what could not be written or must not be replaced."""
    if not output.parent.is_dir():
        raise PruneAttnError(f"{output}: {output.parent} is no directory; make it, or choose another place")
    if not os.path.lexists(output):
        return
    if output.is_dir():
        raise PruneAttnError(f"{output}: is a directory; give a file for the plan")
    if not overwrite:
        raise PruneAttnError(f"{output}: exists; choose another file, or add --overwrite")
    try:
        ours = read_json(output).get("format") == FORMAT
    except (OSError, PruneAttnError):
        ours = False
    if not ours:
        raise PruneAttnError(f"{output}: is not a plan, so --overwrite will not replace it; choose another file")
