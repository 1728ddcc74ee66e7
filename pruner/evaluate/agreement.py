"""One model against another on the same text: likelihood, agreement, divergence, calibration, and greedy text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruner.errors import PruneAttnError
from pruner.evaluate import bootstrap
from pruner.evaluate.perplexity import TokenScores, Window, batches, default_batch, places
from pruner.model import LanguageModel
from pruner.progress import Progress, Step

BINS = 15  # of the calibration error, as in Guo et al., 2017 (arXiv 1706.04599)
_ROWS = 512  # positions whose distributions are made at a time
_MOST_KL_RESAMPLES = 500  # each sorts through every token


@dataclass(frozen=True)
class Comparison:
    """Two models on the same windows; arrays (N,) as in ``TokenScores``, or (2, N): original, then pruned.

    ``agree``: the most likely token is the same. ``kl``: KL(original || pruned) over the vocabulary, nats.
    ``confidence``: probability of the most likely token; ``correct``: it is the text's.
    """

    original: TokenScores
    pruned: TokenScores
    window: np.ndarray
    agree: np.ndarray
    kl: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


def compare(
    original: LanguageModel,
    pruned: LanguageModel,
    windows: Sequence[Window],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run both on every window. Memory: the logits of one call of each. ``progress`` counts windows."""
    if original.vocab_size != pruned.vocab_size:
        raise PruneAttnError(
            f"the vocabularies have {original.vocab_size} and {pruned.vocab_size} tokens; "
            "give a model and what was made of it"
        )
    batch = batch or default_batch(original, max(len(w.ids) for w in windows))
    columns: list[list[np.ndarray]] = [[] for _ in range(5)]
    done = 0
    for group in batches(windows, batch):
        ids = np.stack([window.ids for window in group])
        pair = original.logits(ids), pruned.logits(ids)
        for row in range(len(ids)):
            for column, part in zip(columns, _distances(pair[0][row], pair[1][row], ids[row]), strict=True):
                column.append(part)
        done += len(group)
        if progress is not None:
            progress(Step("reading the text", done, len(windows), "windows"))
    nll, agree, kl, confidence, correct = (np.concatenate(c, axis=-1) for c in columns)
    position, scored = places(windows)
    number = np.repeat(np.arange(len(windows)), [len(w.ids) - 1 for w in windows])
    a, b = (TokenScores(part, position, scored) for part in nll)
    return Comparison(a, b, number, agree, kl, confidence, correct)


def _distances(a: np.ndarray, b: np.ndarray, ids: np.ndarray) -> list[np.ndarray]:
    """Two (T, V) logits and the (T,) ids to nll (2, T - 1), agree, kl, confidence (2, T - 1), correct (2, T - 1)."""
    import torch

    targets, parts = torch.from_numpy(ids[1:]), []
    for start in range(0, len(targets), _ROWS):
        want = targets[start : start + _ROWS, None]
        p, q = (torch.from_numpy(x[start : start + len(want)]).log_softmax(dim=1) for x in (a, b))
        best = [x.max(dim=1) for x in (p, q)]
        parts.append(
            [
                torch.stack([-x.gather(1, want)[:, 0] for x in (p, q)]),
                best[0].indices == best[1].indices,
                (p.exp() * (p - q)).sum(dim=1).clamp(min=0),  # rounding makes it -1e-8 where both are the same
                torch.stack([x.values.exp() for x in best]),
                torch.stack([x.indices == want[:, 0] for x in best]),
            ]
        )
    return [torch.cat(part, dim=-1).numpy() for part in zip(*parts, strict=True)]


def summary(result: Comparison, nbytes: int, seed: int = 0) -> dict[str, Any]:
    """What the report states, each with its 95% interval. ``nbytes``: of the text whose tokens count."""
    scored = result.original.scored
    tokens = int(scored.sum())
    block = bootstrap.blocks(tokens)
    units = int(block[-1]) + 1

    def over(statistic: Callable[[np.ndarray], np.ndarray], resamples: int | None = None) -> dict[str, float]:
        return bootstrap.estimate(statistic, units, seed, resamples)

    size = bootstrap.sums(np.ones(tokens), block)
    nll = [bootstrap.sums(scores.nll[scored], block) for scores in (result.original, result.pruned)]
    agree, kl = bootstrap.sums(result.agree[scored], block), result.kl[scored]
    kl_sums = bootstrap.sums(kl, block)
    bits = [scores.bits_per_byte(nbytes) for scores in (result.original, result.pruned)]
    bins = [_bins(result.confidence[m, scored], result.correct[m, scored], block, units) for m in (0, 1)]
    return {
        "tokens": tokens,
        "bytes": nbytes,
        "perplexity": {
            "original": over(lambda c: np.exp(c @ nll[0] / (c @ size))),
            "pruned": over(lambda c: np.exp(c @ nll[1] / (c @ size))),
            "ratio": over(lambda c: np.exp(c @ (nll[1] - nll[0]) / (c @ size))),
        },
        "bits_per_byte": {"original": bits[0], "pruned": bits[1]},
        "agreement": over(lambda c: c @ agree / (c @ size)),
        "kl": {
            "mean": over(lambda c: c @ kl_sums / (c @ size)),
            "p99": over(lambda c: bootstrap.quantile(kl, block, 0.99, c), _MOST_KL_RESAMPLES),
        },
        "accuracy": {name: float(result.correct[m, scored].mean()) for m, name in enumerate(("original", "pruned"))},
        "calibration_error": {
            "original": over(lambda c: _calibration_error(bins[0], c)),
            "pruned": over(lambda c: _calibration_error(bins[1], c)),
            "bins": BINS,
        },
        "position": by_position(result, seed),
    }


def _bins(confidence: np.ndarray, correct: np.ndarray, block: np.ndarray, units: int) -> np.ndarray:
    """(blocks, BINS): sum of confidence less correctness of the tokens of each block in each bin."""
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    flat = np.bincount(block * BINS + which, weights=confidence.astype(np.float64) - correct, minlength=units * BINS)
    count = np.bincount(block * BINS + which, minlength=units * BINS)
    return np.stack([flat, count]).reshape(2, units, BINS)


def _calibration_error(bins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Expected calibration error: mean over tokens of |mean confidence - accuracy| of the bin each one is in."""
    return np.abs(counts @ bins[0]).sum(axis=1) / (counts @ bins[1]).sum(axis=1)


def _ratio(difference: np.ndarray, size: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ratio of perplexities where units count so often; NaN where none of them has a token."""
    return lambda counts: np.exp(counts @ difference / np.where(counts @ size, counts @ size, np.nan))


def by_position(result: Comparison, seed: int = 0) -> list[dict[str, Any]]:
    """Perplexity of both against the tokens of context before: 1 to 15, 16 to 31, 32 to 63, and so on doubling.

    Every window's every token counts here, so that short contexts are seen as often as long ones; windows are what
    is drawn again.
    """
    position, rows, low = result.original.position, [], 1
    units = int(result.window[-1]) + 1
    while low <= position.max():
        high = 15 if low == 1 else 2 * low - 1
        here = (position >= low) & (position <= high)
        nll = [
            np.bincount(result.window[here], weights=s.nll[here].astype(np.float64), minlength=units)
            for s in (result.original, result.pruned)
        ]
        size = np.bincount(result.window[here], minlength=units)
        rows.append(
            {
                "from": low,
                "to": int(min(high, position.max())),
                "tokens": int(size.sum()),
                "original": float(np.exp(nll[0].sum() / size.sum())),
                "pruned": float(np.exp(nll[1].sum() / size.sum())),
                "ratio": bootstrap.estimate(_ratio(nll[1] - nll[0], size), units, seed),
            }
        )
        low = high + 1
    return rows


def greedy_match(
    original: LanguageModel,
    pruned: LanguageModel,
    prompts: np.ndarray,
    new_tokens: int,
    *,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How many tokens both go on with alike, greedily, from (P, T) prompts, until the first that differs.

    The end of text does not stop it.
    """
    lengths: list[int] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch].tolist()
        texts = [_greedy(model, part, new_tokens) for model in (original, pruned)]
        same = np.cumprod(texts[0] == texts[1], axis=1).sum(axis=1)
        lengths += same.tolist()
        if progress is not None:
            progress(Step("going on from prompts", len(lengths), len(prompts), "prompts"))
    values = np.array(lengths)
    return {
        "prompts": len(prompts),
        "prompt_tokens": prompts.shape[1],
        "new_tokens": new_tokens,
        "mean": bootstrap.estimate(lambda c: c @ values / c.sum(axis=1), len(values), seed),
        "median": float(np.median(values)),
        "whole": float((values == new_tokens).mean()),
        "lengths": lengths,
    }


def _greedy(model: LanguageModel, prompts: list[list[int]], new_tokens: int) -> np.ndarray:
    """(P, new_tokens) ids."""
    model.reset()
    out = [model.prefill(prompts).argmax(axis=-1)]
    while len(out) < new_tokens:
        out.append(model.decode(out[-1].tolist()).argmax(axis=-1))
    model.reset()
    return np.stack(out, axis=1)
