"""About how long each part takes: what the progress of the whole is made of."""

from __future__ import annotations

from export.validate.models import CHECKED, GREEDY_NEW_TOKENS, GREEDY_PROMPT_TOKENS, GREEDY_PROMPTS
from export.validate.options import MODELS, Latency
from export.validate.setting import Setting
from pruner.evaluate.latency import LEAST_REPEATS
from pruner.machine import decoding_seconds, reading_seconds


def expected_seconds(setting: Setting) -> dict[str, float]:
    """By the names that the parts are saved under."""
    stored = {name: checkpoint.nbytes for name, checkpoint in setting.checkpoints.items()}
    weights, parameters = max(stored.values()), setting.checkpoints["original"].parameters

    def run(rows: int, prompt: int, steps: int) -> float:
        reading = reading_seconds(parameters, rows * prompt, setting.device)
        return reading + decoding_seconds(weights, steps, setting.device)

    def timed(latency: Latency, batch: int, prompt: int) -> float:
        once = 2 * run(batch, prompt, latency.new_tokens)
        return once + max(LEAST_REPEATS * once, min(latency.repeats * once, latency.seconds))

    load, whole = 1 + weights / 1e9, setting.same_function
    out: dict[str, float] = {f"facts-{name}": nbytes / 1e9 if whole else 0.01 for name, nbytes in stored.items()}
    if whole:
        out |= {"same-bytes": weights / 5e8, "same-torch": 2 * load + 2 * run(*CHECKED, 8)}
        out |= {"same-onnx": load} if "onnx" in setting.backends else {}
    for backend in setting.backends:
        if setting.corpus is not None:
            tokens = sum(len(window.ids) for window in setting.corpus.windows)
            out[f"accuracy-{backend}"] = 2 * load + 2 * run(1, tokens, 0)
            out[f"greedy-{backend}"] = 2 * run(GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, 2 * GREEDY_NEW_TOKENS)
        if setting.tasks:
            items = 4 * 300 * (setting.limit or 1500) * len(setting.tasks)  # tokens, roughly
            out |= {f"tasks-{backend}-{name}": load + run(1, items, 0) for name in MODELS}
    if setting.latency is not None:
        for backend in [*setting.backends, *(["torch-compiled"] if setting.compiled else [])]:
            for case in setting.cases:
                out[f"latency-{backend}-{case[0]}x{case[1]}"] = timed(setting.latency, *case)
        out |= {f"memory-{backend}-{name}": 5 + load for backend in setting.backends for name in MODELS}
    return out
