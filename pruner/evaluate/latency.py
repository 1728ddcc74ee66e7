"""Prefill and decode times of models in turn, in one process, with the KV history that the prefill left.

Every repeat runs each model once, A B A B, so that what the machine does besides falls on all of them. A model's times
within a repeat depend on each other; repeats are what the confidence intervals draw again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pruner.errors import MachineError, PruneAttnError
from pruner.evaluate import bootstrap
from pruner.model import LanguageModel
from pruner.progress import Progress, Step

LEAST_REPEATS = 3
_WARM_UP_STEPS = 8
_COPY_BYTES = 4 << 30


@dataclass
class Times:
    """Seconds. ``prefill``: prompts to logits on the host; ``first``: to the first token chosen; ``whole``: to the
    last of ``new_tokens``. One entry a repeat; ``steps`` has a list a repeat, one entry a decode step."""

    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)


def run_in_turn(
    models: Mapping[str, LanguageModel],
    prompts: np.ndarray,
    new_tokens: int,
    *,
    repeats: int,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Times]:
    """Times of each model on (B, T) prompts and ``new_tokens`` greedy tokens, the first of them the prefill's.

    After ``seconds`` it stops early, but never before ``LEAST_REPEATS``. Each model is warmed up first with the same
    prompts. Raises what the models raise; ``out_of_memory`` tells whether that was the device's memory.
    """
    if new_tokens < 2:
        raise PruneAttnError("--new-tokens: at least 2 are needed to time a decode step")
    rows = prompts.tolist()
    for model in models.values():
        _once(model, rows, min(new_tokens, _WARM_UP_STEPS), Times())
    out = {name: Times() for name in models}
    started = time.perf_counter()
    for done in range(repeats):
        if done >= LEAST_REPEATS and seconds is not None and time.perf_counter() - started > seconds:
            break
        for name, model in models.items():
            _once(model, rows, new_tokens, out[name])
        if progress is not None:
            progress(Step("timing", done + 1, repeats, "times"))
    return out


def _once(model: LanguageModel, prompts: list[list[int]], new_tokens: int, times: Times) -> None:
    model.reset()
    steps, clock = [], time.perf_counter
    start = clock()
    logits = model.prefill(prompts)
    prefilled = clock()
    tokens = logits.argmax(axis=-1).tolist()
    first = clock()
    for _ in range(new_tokens - 1):
        begin = clock()
        logits = model.decode(tokens)
        steps.append(clock() - begin)
        tokens = logits.argmax(axis=-1).tolist()
    times.whole.append(clock() - start)
    times.prefill.append(prefilled - start)
    times.first.append(first - start)
    times.steps.append(steps)
    model.reset()  # its cache makes room for the next one's


def summary(times: Times, batch: int) -> dict[str, Any]:
    """Milliseconds and tokens a second of one model; ``repeats_ms`` has what the intervals are made of."""
    steps = np.array(times.steps)
    spread = {"median": 50, "p10": 10, "p90": 90}
    return {
        "prefill_ms": _quantiles(times.prefill, spread),
        "first_token_ms": _quantiles(times.first, spread),
        "decode_ms": _quantiles(steps.ravel(), {"median": 50, "p90": 90, "p99": 99}),
        "tokens_per_second": round(batch * (steps.shape[1] + 1) / float(np.median(times.whole)), 2),
        "repeats_ms": {
            "prefill": _milliseconds(times.prefill),
            "first_token": _milliseconds(times.first),
            "decode": _milliseconds(np.median(steps, axis=1)),  # a repeat's median step
            "end_to_end": _milliseconds(times.whole),
        },
    }


def _milliseconds(seconds: Iterable[float]) -> list[float]:
    return [round(1e3 * float(s), 4) for s in seconds]


def _quantiles(seconds: Any, which: dict[str, int]) -> dict[str, float]:
    return dict(zip(which, _milliseconds(np.percentile(seconds, list(which.values()))), strict=True))


def speedup(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], seed: int = 0) -> dict[str, dict[str, float]]:
    """How many times as fast the second of each pair of summaries is than the first: the ratio of the medians over
    repeats, with its 95% interval; of several pairs the geometric mean."""
    return {
        what: bootstrap.median_ratio([(a["repeats_ms"][what], b["repeats_ms"][what]) for a, b in pairs], seed)
        for what in ("prefill", "first_token", "decode", "end_to_end")
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no memory for it."""
    if isinstance(error, MachineError):
        return "memory" in str(error)
    text = f"{type(error).__name__} {error}"
    known = ("OutOfMemoryError", "MemoryError", "out of memory", "bad_alloc", "Failed to allocate", "can't allocate")
    return any(part in text for part in known)


# -- the device --------------------------------------------------------------------------------------------------------


def gpu_bytes() -> int:
    """Bytes in use on the first CUDA device, by whatever process."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 4 GB (or a tenth of what is free), median of 10."""
    import torch

    size = min(_COPY_BYTES, torch.cuda.mem_get_info()[0] // 10)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    rates = []
    for _ in range(12):
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        rates.append(2 * source.numel() / (start.elapsed_time(end) / 1e3))
    return float(np.median(rates[2:]))


def floor_ms(weight_bytes: int, kv_bytes_per_token: int, history: float, batch: int, bandwidth: float) -> float:
    """The least that a decode step can take: its weights and KV history read once at ``bandwidth`` bytes a second.

    ``weight_bytes``: without an embedding table of its own, of which a step reads one row.
    """
    return 1e3 * (weight_bytes + batch * history * kv_bytes_per_token) / bandwidth
