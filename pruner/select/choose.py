"""``select``: one selection, by position or by a calibration text."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruner.errors import PruneAttnError
from pruner.machine import computing
from pruner.progress import Progress
from pruner.select.calibrated import _Job
from pruner.select.exhaustive import check_few
from pruner.select.request import POSITIONAL
from pruner.select.search import order_of

if TYPE_CHECKING:
    from pruner.checkpoint import Checkpoint
    from pruner.plan import PruningPlan
    from pruner.text import Texts


@dataclass(frozen=True)
class Selection:
    """A plan, and what making it took: seconds, layer evaluations, tokens a second, peak memory (GPU, bytes)."""

    plan: PruningPlan
    cost: dict[str, Any]


def select(source: str | os.PathLike[str] | Checkpoint, **options: Any) -> PruningPlan:
    """The plan of ``selection``, which see for the options."""
    return selection(source, **options).plan


def selection(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    drop: str | int,
    sublayer: str = "attention",
    strategy: str | None = None,
    text: Texts | None = None,
    text_field: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    objective: str | None = None,
    allow_first_layer: bool = False,
    allow_all: bool = False,
    partial: str | os.PathLike[str] | None = None,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose ``drop`` (a count, or a percentage of the original's) of ``sublayer``; the plan's order names them all.

    ``strategy`` is last, keep-last, similarity, search or exhaustive (default: search with a ``text``, last without).
    The last two minimise ``objective``: kl (default: on unseen text it chose better than ce with up to 2,048
    calibration tokens, 1.0% above the best set at 1,024 tokens against 1.5%: docs/notes/selection.md), or ce.
    The last three run the model on ``samples`` windows of ``length`` tokens spread over ``text``: a file or several,
    or ``general``, which comes along; ``text_field`` is JSON lines' (see ``pruner.text.read_contents``). ``seed`` says
    where in its part of the text each window lies; ``threads`` as in ``pruner.machine.computing``. ``partial`` is a
    file that keeps what has been computed; with ``resume`` an interrupted run goes on from it to the same plan (remove
    it when the plan is safe). Raises
    ``PruneAttnError`` for bad input and ``MachineError``.
    """
    from pruner.checkpoint import Checkpoint, open_checkpoint
    from pruner.select.positional import candidates_for, plan_drop

    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    strategy = strategy or ("last" if text is None else "search")
    allowed = {"allow_first_layer": allow_first_layer, "allow_all": allow_all}
    if strategy in POSITIONAL:
        return Selection(plan_drop(checkpoint, str(drop), sublayer, strategy, **allowed), {})
    count, candidates = candidates_for(checkpoint, str(drop), sublayer, strategy, **allowed)
    if text is None:
        raise PruneAttnError(f"--strategy {strategy} chooses by what a text costs; give one with --text")
    if strategy == "exhaustive":
        check_few(len(candidates), count)
    started = time.monotonic()
    with computing(threads):
        job = _Job(
            checkpoint,
            sublayer,
            strategy,
            objective or "kl",
            device,
            seed,
            partial,
            resume,
            progress,
        )
        job.prepare(text, text_field, samples, length)
        if strategy == "similarity":
            order, found = job.by_similarity(candidates), None
        else:
            with job.saved_when_stopped():
                found = job.by_loss(candidates, count)
            order = order_of(found, count)
        plan = job.plan(order, found, count, str(drop))
        return Selection(plan, job.cost(time.monotonic() - started))
