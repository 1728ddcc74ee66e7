"""Latency in turn with the original, and load time and peak memory of each model alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.validate.footprint import footprint
from export.validate.models import Bench
from export.validate.options import MODELS, Latency
from pruner.errors import MachineError, one_line
from pruner.evaluate import latency
from pruner.progress import Progress

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def measure_memory(bench: Bench, asked: Latency, backend: str) -> dict[str, Any]:
    """Load time and peak memory of each model, at the largest case."""
    setting = bench.setting
    batch, prompt = max(setting.cases, key=lambda case: case[0] * case[1])
    context = min(setting.context, prompt + asked.new_tokens)
    out = {}
    for name in MODELS:

        def measure(_: Progress, name: str = name) -> dict[str, Any]:
            bench.models.close()
            directory = bench.models.directory(backend, name, "serve")
            return footprint(backend, directory, setting.device, setting.dtypes[backend], batch, prompt, context)

        status = f"loading and memory, {backend}"
        out[name] = bench.parts.part(f"memory-{backend}-{name}", [batch, prompt, context], status, measure)
        if "failed" in out[name]:
            bench.notes.append(f"memory of the {name}, {backend}: {out[name]['failed']}")
        elif out[name]["batch"] < batch:
            bench.notes.append(f"memory of the {name}, {backend}: measured at batch {out[name]['batch']}, not {batch}")
    return out


def measure_latency(bench: Bench, asked: Latency, backend: str, memory: dict[str, Any] | None) -> dict[str, Any]:
    """What ``results.json`` holds of one backend's. ``memory`` is what ``measure_memory`` gave."""
    setting = bench.setting
    cases = [case for case in (_case(bench, asked, backend, *case) for case in setting.cases) if case is not None]
    if not cases:
        raise MachineError(f"{setting.device} has no memory for one row of the shortest --prompt; give shorter ones")
    speedup = latency.speedup([(case["original"], case["pruned"]) for case in cases], setting.seed)
    return {"cases": cases, "speedup": speedup, "memory": memory}


def measure_beside(bench: Bench, asked: Latency) -> dict[str, Any]:
    """transformers compiled: what a person would take instead. Where it does not work, a note says so."""
    try:
        return {"torch-compiled": measure_latency(bench, asked, "torch-compiled", None)}
    except Exception as error:
        bench.notes.append(f"transformers compiled could not be measured: {one_line(error, 160)}")
        return {}


def _case(bench: Bench, asked: Latency, backend: str, batch: int, prompt: int) -> dict[str, Any] | None:
    """One batch and prompt; ``None`` where there is no memory for a single row."""
    setting = bench.setting
    room = max(prompt for _, prompt in setting.cases)  # what the KV buffer is allocated for
    text = setting.corpus and setting.corpus.text.sha256
    options = [asked.new_tokens, asked.repeats, asked.seconds, text, room]
    case = bench.parts.part(
        f"latency-{backend}-{batch}x{prompt}", options, f"timing, {backend}, {batch} x {prompt}",
        lambda progress: _time(bench, asked, backend, batch, prompt, progress),
    )  # fmt: skip
    bench.notes.extend(case.pop("notes"))
    return case or None


def _time(bench: Bench, asked: Latency, backend: str, batch: int, prompt: int, progress: Progress) -> dict[str, Any]:
    """Out of memory, the batch is halved and a note says so."""
    setting, rows = bench.setting, batch
    while True:
        ids = np.resize(np.asarray(setting.ids, dtype=np.int64), (rows, prompt))
        try:
            times = latency.run_in_turn(
                bench.models.both(backend, "serve"), ids, asked.new_tokens, repeats=asked.repeats,
                seconds=asked.seconds, progress=progress,
            )  # fmt: skip
            break
        except Exception as error:
            if not latency.out_of_memory(error) or (isinstance(error, MachineError) and not bench.models.held):
                raise
            bench.models.close()  # what it had taken
            if rows == 1:
                return {"notes": [f"{backend}, prompt {prompt}: not measured, {setting.device} has no memory for it"]}
            rows //= 2
    summaries = {model: latency.summary(t, rows) for model, t in times.items()}
    small = f"{backend}, prompt {prompt}: batch {rows} instead of {batch}, for want of memory"
    return {
        "batch": rows, "prompt": prompt, "new_tokens": asked.new_tokens, "repeats": len(times["original"].whole),
        **summaries, "speedup": latency.speedup([(summaries["original"], summaries["pruned"])], setting.seed),
        "notes": [small] if rows < batch else [],
    }  # fmt: skip


def add_floors(bench: Bench, results: dict[str, Any]) -> None:
    """To each case of ``results``: what a decode step takes at least, at the bandwidth that was measured."""
    for backend, measured in results["latency"].items():
        scale = _BYTES[bench.setting.dtypes[backend]] / _BYTES[bench.setting.stored]  # as computed over as stored
        for case in measured["cases"]:
            for model in MODELS:
                facts = results["models"][model]
                floor = latency.floor_ms(
                    scale * (facts["bytes"] - facts["embedding_bytes"]), scale * facts["kv_cache_bytes_per_token"],
                    case["prompt"] + case["new_tokens"] / 2, case["batch"], results["bandwidth"],
                )  # fmt: skip
                case[model] |= {"floor_ms": floor, "floor_ratio": case[model]["decode_ms"]["median"] / floor}
