"""Accuracy on a text: perplexity, agreement, and how long greedy continuations stay the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.validate.corpus import Corpus
from export.validate.models import GREEDY_NEW_TOKENS, GREEDY_PROMPT_TOKENS, GREEDY_PROMPTS, Bench
from pruner.errors import MachineError, PruneAttnError
from pruner.evaluate import agreement
from pruner.evaluate.latency import out_of_memory
from pruner.evaluate.perplexity import default_batch
from pruner.progress import Progress


def measure_accuracy(bench: Bench, corpus: Corpus, backend: str) -> dict[str, Any]:
    """What ``results.json`` holds of one backend's."""
    what = {
        "text": {"name": corpus.text.name, "sha256": corpus.text.sha256, "tokens": len(corpus.ids)},
        "window": corpus.window,
        "stride": corpus.stride,
        "bos": corpus.bos,
    }
    measured = bench.parts.part(
        f"accuracy-{backend}", what, f"reading the text, {backend}", lambda p: _scores(bench, corpus, backend, p)
    )
    greedy = bench.parts.part(
        f"greedy-{backend}", what, f"greedy text, {backend}", lambda p: _greedy(bench, corpus, backend, p)
    )
    return {**what, **measured, "greedy": greedy}


def _scores(bench: Bench, corpus: Corpus, backend: str, progress: Progress) -> dict[str, Any]:
    setting, models = bench.setting, bench.models.both(backend)
    batch = default_batch(models["original"], corpus.window)
    while True:
        try:
            result = agreement.compare(
                models["original"], models["pruned"], corpus.windows, batch=batch, progress=progress
            )
            break
        except Exception as error:
            if not out_of_memory(error):
                raise
            if batch == 1:
                raise MachineError(
                    f"{setting.device} has no memory for a window of {corpus.window} tokens; give a smaller --window"
                ) from None
            batch //= 2
    for name, scores in (("original", result.original), ("pruned", result.pruned)):
        if not scores.nll.mean() < 700:  # NaN too
            raise PruneAttnError(
                f"{setting.checkpoints[name].path}: its perplexity is not a number in {setting.dtypes[backend]}; "
                f"give another --dtype, or another --backend than {backend}"
            )
    share = result.original.tokens / len(corpus.ids)  # under 1 where windows do not overlap
    return agreement.summary(result, round(corpus.bytes * share), setting.seed)


def _greedy(bench: Bench, corpus: Corpus, backend: str, progress: Progress) -> dict[str, Any]:
    models, context = bench.models.both(backend), bench.setting.context
    length = min(GREEDY_PROMPT_TOKENS, context // 4)
    starts = np.linspace(0, len(corpus.ids) - length, GREEDY_PROMPTS).astype(int)
    prompts = np.stack([corpus.ids[start : start + length] for start in starts])
    if corpus.bos != "none":
        prompts[:, 0] = corpus.bos_id
    new = min(GREEDY_NEW_TOKENS, context - length)
    return agreement.greedy_match(
        models["original"], models["pruned"], prompts, new, seed=bench.setting.seed, progress=progress
    )
