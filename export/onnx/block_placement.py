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
_LEAST, _MOST = 4, 10  # rounds of trying each
_DIFFERENCE = 1.015  # by which one must be slower than another, else nothing hangs on it


class BlockPlacement:
    """Of one batch's decode steps. ``launch``: so many clusters, on their stream; whether it could.

    Where one number makes the step quick and none makes it slow, all are quick while they are tried, and no kernel is
    launched.
    """

    def __init__(self, launch: Callable[[int], bool]) -> None:
        self._launch = launch
        self._random = np.random.default_rng(0)
        self._order: list[int] = []  # what is left of this round
        self._round: dict[int, float] = {}  # seconds by clusters
        self._rounds: list[dict[int, float]] = []  # the whole ones, without a step that failed
        self.clusters: int | None = None  # before every step, 0 for no kernel; None while they are tried

    @contextlib.contextmanager
    def step(self, first: bool = False) -> Iterator[None]:
        """Around a decode step that is waited for. The ``first`` one over new buffers captures, and is not counted."""
        trying = self.clusters is None and not first
        if trying and not self._order:
            # in random order: what decides nothing is as quick as the one before, and must not always follow the same
            self._order = self._random.permutation(_CLUSTERS).tolist()
            self._round = {}
        clusters = self._order.pop() if trying else self.clusters
        start = time.perf_counter()
        if clusters and not self._launch(clusters):
            self.clusters, trying = 0, False
        yield
        if trying and clusters:
            self._round[clusters] = time.perf_counter() - start
            if len(self._round) == len(_CLUSTERS):
                self._rounds.append(self._round)
                self.clusters = _decided(self._rounds)


def _decided(rounds: list[dict[int, float]]) -> int | None:
    """The fastest, if another is slower, by quartiles of times over their round's: prompts differ in length."""
    if len(rounds) < _LEAST:
        return None
    times = np.array([[seconds[clusters] for clusters in _CLUSTERS] for seconds in rounds])
    low, high = np.percentile(times / np.median(times, axis=1, keepdims=True), (25, 75), axis=0)
    best = int(high.argmin())
    if low.max() > high[best] * _DIFFERENCE:
        return _CLUSTERS[best]
    return 0 if len(rounds) == _MOST else None
