"""Where a GPU puts a decode step's thread blocks, which on Hopper depends on what ran before.

At the 13B's shape gate and up take 65 us a layer after one prompt and 70 after the next, and so for every token that
follows it (docs/cuda.md): they have more tiles than thread blocks, and the second round of them seems to be quick or
slow by where its blocks lie. An empty kernel of a few thread block clusters right before the step decides it for the
step; of how many, the first steps try.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np

_CLUSTERS = (1, 2, 3, 4, 8)
_ROUNDS = 10
_DIFFERENCE = 1.01  # between the slowest and the fastest, below which it makes none


class BlockPlacement:
    """Of one bound decode step. ``launch``: so many clusters, on its stream; gives CUDA's error, 0 for none."""

    def __init__(self, launch: Callable[[int], int]) -> None:
        self._launch = launch
        self._seconds: dict[int, list[float]] = {clusters: [] for clusters in _CLUSTERS}
        # in random order: what decides nothing leaves it as the one before did, and must not always follow the same
        random = np.random.default_rng(0)
        self._order = [clusters for _ in range(_ROUNDS) for clusters in random.permutation(_CLUSTERS).tolist()]
        self.clusters: int | None = None  # before every step, 0 for no kernel; None while they are tried

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a decode step that is waited for."""
        trying = self.clusters is None
        clusters = self._order.pop() if self.clusters is None else self.clusters
        start = time.perf_counter()
        if clusters and self._launch(clusters):
            self.clusters, trying = 0, False
        try:
            yield
        finally:
            if trying:
                self._seconds[clusters].append(time.perf_counter() - start)
                if not self._order:
                    self.clusters = _steadiest(self._seconds)


def _steadiest(seconds: dict[int, list[float]]) -> int:
    """By the upper quartile: one that is quick only after some others does not decide it."""
    upper = {clusters: float(np.percentile(times, 75)) for clusters, times in seconds.items()}
    best = min(upper, key=lambda clusters: upper[clusters])
    return best if max(upper.values()) > upper[best] * _DIFFERENCE else 0
