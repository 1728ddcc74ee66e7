"""Perplexity and speed of the models that a sweep compares, each measured once and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from export.sweep.progress import Kept
from export.sweep.setting import Inputs
from pruner.checkpoint.load import check_finite
from pruner.errors import PruneAttnError
from pruner.machine import decoding_seconds, reading_seconds
from pruner.plan import PruningPlan
from pruner.progress import Stages

if TYPE_CHECKING:
    from pruner.checkpoint import Checkpoint
    from pruner.evaluate.perplexity import Window
    from pruner.model import TorchLanguageModel

TIMED = ("decode", "prefill")


def key(plan: PruningPlan | None) -> str:
    """What is dropped, in words that sort; ``None`` is the original."""
    names = (("attention", plan.attention), ("mlp", plan.mlp)) if plan else ()
    return "; ".join(f"{name} {','.join(map(str, layers))}" for name, layers in names if layers) or "nothing"


def measure_perplexity(
    work: Kept,
    checkpoint: Checkpoint,
    model: Callable[[], TorchLanguageModel],
    plans: Sequence[PruningPlan],
    windows: Sequence[Window],
    stages: Stages,
) -> None:
    """Perplexity of the original and of every set of sublayers that some plan drops, kept as each is done.

    Raises ``PruneAttnError`` where the original's is no number.
    """
    from pruner.evaluate.perplexity import score

    wanted = {key(plan): plan for plan in (None, *plans)}
    for i, (name, plan) in enumerate(wanted.items()):
        if name in work.perplexity:
            stages.skip(f"perplexity {i}")
            continue
        with stages.stage(f"perplexity {i}", f"perplexity, {i + 1} of {len(wanted)}") as progress:
            pruned = model().without(plan.attention, plan.mlp) if plan else model()
            scores = score(pruned, windows, progress=progress)
        mean = scores.total / scores.tokens
        if plan is None and not mean < 700:
            check_finite(checkpoint)
            raise PruneAttnError(
                f"{checkpoint.path}: its loss is not a number in {model().model.dtype}; give another --dtype"
            )
        work.perplexity[name] = math.exp(mean) if mean < 700 else None  # not so where half precision gave no number
        work.save()


def measure_speed(
    work: Kept,
    model: Callable[[], TorchLanguageModel],
    plans: Sequence[PruningPlan],
    inputs: Inputs,
    stages: Stages,
) -> None:
    """Times of one model for each number of sublayers dropped, in turn with the original, kept as each is done.

    One of them has nothing dropped: how far apart equal models come out is the noise.
    """
    from pruner.evaluate.latency import run_in_turn, speedup, summary

    wanted = {_counts(plan): plan for plan in (None, *plans)}
    for i, (counts, plan) in enumerate(wanted.items()):
        if counts in work.speed:
            stages.skip(f"speed {i}")
            continue
        with stages.stage(f"speed {i}", f"speed, {i + 1} of {len(wanted)}") as progress:
            pruned = model().without(plan.attention, plan.mlp) if plan else model().without()
            models = {"original": model(), "pruned": pruned}
            times = run_in_turn(models, inputs.prompts, inputs.new_tokens, repeats=inputs.rounds, progress=progress)
        original, other = (summary(times[name], len(inputs.prompts)) for name in ("original", "pruned"))
        ratio = speedup([(original, other)])
        work.speed[counts] = {
            kind: {
                "ms": other[f"{kind}_ms"]["median"],
                "speedup": ratio[kind]["value"],
                "speedup_low": ratio[kind]["low"],
                "speedup_high": ratio[kind]["high"],
            }
            for kind in TIMED
        }
        work.save()


def expected_seconds(
    checkpoint: Checkpoint,
    plans: Sequence[PruningPlan],
    inputs: Inputs,
    device: str,
) -> dict[str, float]:
    """About how long each stage of measuring takes, by the names that ``Stages`` has here."""
    read = reading_seconds(checkpoint.parameters, sum(len(window.ids) for window in inputs.windows), device)
    once = reading_seconds(checkpoint.parameters, inputs.prompts.size, device)
    once += decoding_seconds(checkpoint.nbytes, inputs.new_tokens, device)
    sets, counts = {key(plan) for plan in (None, *plans)}, {_counts(plan) for plan in (None, *plans)}
    speed = {f"speed {i}": 2 * (inputs.rounds + 1) * once for i in range(len(counts))} if inputs.rounds else {}
    return {f"perplexity {i}": read for i in range(len(sets))} | speed


def _counts(plan: PruningPlan | None) -> str:
    return f"{len(plan.attention)} attention, {len(plan.mlp)} mlp" if plan else "nothing"


def speed_columns(speed: dict[str, dict[str, Any]], plan: PruningPlan | None) -> dict[str, float | None]:
    """Median milliseconds, and how many times as fast as the original with the 95% interval; ``None``: not timed."""
    unknown = dict.fromkeys(("ms", "speedup", "speedup_low", "speedup_high"))
    figures = speed.get(_counts(plan)) or dict.fromkeys(TIMED, unknown)
    return {f"{kind}_{name}": value for kind in TIMED for name, value in figures[kind].items()}
