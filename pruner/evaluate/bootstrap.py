"""Percentile bootstrap confidence intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

What is drawn again is always the pair, original and pruned on the same text or in the same repeat, so that what both
share (a hard passage, a busy moment) does not widen the interval of their difference. Tokens of one passage depend on
each other, so whole blocks of text are drawn, not tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
BLOCK = 128  # tokens; neighbours further apart than that tell little about each other


def estimate(
    statistic: Callable[[np.ndarray], np.ndarray], units: int, seed: int = 0, resamples: int | None = None
) -> dict[str, float]:
    """``{"value", "low", "high"}`` of a statistic of ``units`` units.

    ``statistic`` takes how often each unit is drawn, (R, units) whole numbers, and gives R values; the value itself is
    the one with every unit drawn once. A draw that it gives NaN for (nothing to count) is left out.
    """
    value = float(statistic(np.ones((1, units), dtype=np.int64))[0])
    counts = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples or RESAMPLES)
    low, high = np.nanquantile(statistic(counts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def median_ratio(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> dict[str, float]:
    """Median of the first over median of the second, both (N,) and drawn together; of several pairs, the geometric
    mean of their ratios."""
    rng, logs, value = np.random.default_rng(seed), np.zeros(RESAMPLES), 0.0
    for a, b in (map(np.asarray, pair) for pair in pairs):
        drawn = rng.integers(len(a), size=(RESAMPLES, len(a)))
        logs += np.log(np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)) / len(pairs)
        value += float(np.log(np.median(a) / np.median(b))) / len(pairs)
    low, high = np.exp(np.quantile(logs, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return {"value": float(np.exp(value)), "low": float(low), "high": float(high)}


def quantile(values: np.ndarray, block: np.ndarray, q: float, counts: np.ndarray) -> np.ndarray:
    """The ``q`` quantile of (N,) values, each of whose blocks, (N,) numbers, is drawn ``counts`` (R, blocks) times."""
    order = np.argsort(values, kind="stable")
    sorted_values, sorted_block = values[order], block[order]
    out = np.empty(len(counts))
    for i, row in enumerate(counts):
        below = np.cumsum(row[sorted_block])
        out[i] = sorted_values[np.searchsorted(below, q * below[-1])]
    return out


def blocks(tokens: int) -> np.ndarray:
    """(tokens,) block numbers from 0: runs of at least ``BLOCK`` neighbours."""
    return np.minimum(np.arange(tokens) // BLOCK, max(tokens // BLOCK, 1) - 1)


def sums(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    """(blocks,) sums of (N,) values."""
    return np.bincount(block, weights=values.astype(np.float64))
