"""``choose``: from a request and a checkpoint to a plan, by position or by a calibration text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError
from pruner.machine import computing
from pruner.plan import PruningPlan, plan_layers
from pruner.plan_files import read_plan
from pruner.progress import Progress
from pruner.select.calibrated import Job
from pruner.select.exhaustive import check_few
from pruner.select.positional import candidates_for, plan_drop
from pruner.select.request import CALIBRATED, STRATEGIES, Calibration, Drop, Layers, Request, SavedPlan, as_request
from pruner.select.search import order_of


@dataclass(frozen=True)
class Selection:
    """A plan, and what making it took: seconds, layer evaluations, tokens per second, peak memory (GPU, bytes)."""

    plan: PruningPlan
    cost: dict[str, Any]


def choose(
    checkpoint: Checkpoint,
    drop: Request | PruningPlan | str | int,
    calibration: Calibration | None = None,
    *,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Which sublayers of ``checkpoint`` go; no weights are read without a ``calibration``.

    ``partial`` is a file that keeps what has been computed; ``Calibration.resume`` goes on from it (remove it when the
    plan is safe). Raises ``PruneAttnError`` for what cannot be dropped or does not fit together, and ``MachineError``.
    """
    request = as_request(drop)
    if calibration is not None and not isinstance(request, Drop):
        raise PruneAttnError("a Calibration is for choosing by its text; leave it out, or ask for Drop(...)")
    if isinstance(request, SavedPlan):
        plan = read_plan(request.plan, checkpoint)
        return Selection(plan if request.amount is None else plan.cut(str(request.amount), checkpoint), {})
    if isinstance(request, Layers):
        layers = request.layers if isinstance(request.layers, str) else ",".join(map(str, request.layers))
        return Selection(plan_layers(checkpoint, layers, request.sublayer), {})
    if calibration is None:
        return Selection(plan_drop(checkpoint, request), {})
    if request.strategy is not None:
        if request.strategy not in STRATEGIES:
            raise PruneAttnError(f"unknown strategy {request.strategy!r}; choose one of {', '.join(STRATEGIES)}")
        raise PruneAttnError(f"--strategy {request.strategy} looks at no text; leave --text out, or choose another")
    return _by_text(checkpoint, request, calibration, partial, progress)


def _by_text(
    checkpoint: Checkpoint,
    request: Drop,
    calibration: Calibration,
    partial: Path | None,
    progress: Progress | None,
) -> Selection:
    strategy = calibration.strategy
    if strategy not in CALIBRATED:
        raise PruneAttnError(f"unknown strategy {strategy!r}; by a text choose one of {', '.join(CALIBRATED)}")
    count, candidates = candidates_for(checkpoint, request)
    if strategy == "exhaustive":
        check_few(len(candidates), count)
    started = time.monotonic()
    with computing(calibration.threads):
        job = Job(checkpoint, request.sublayer, calibration, partial, progress)
        job.prepare()
        if strategy == "similarity":
            order, found = job.by_similarity(candidates), None
        else:
            with job.saved_when_stopped():
                found = job.by_loss(candidates, count)
            order = order_of(found, count)
        plan = job.plan(order, found, count, str(request.amount))
        return Selection(plan, job.cost(time.monotonic() - started))
