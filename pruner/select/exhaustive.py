"""The true optimum, where the subsets are few: all of them, sharing what they share (see ``evaluator``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb

from pruner.errors import PruneAttnError
from pruner.select.search import Dropped, Found, Losses, rank

MOST_SUBSETS = 20_000


def subsets(candidates: Sequence[int], count: int) -> Iterator[Dropped]:
    """Every set of 1 to ``count`` candidates."""
    for size in range(1, count + 1):
        yield from map(frozenset, combinations(sorted(candidates), size))


def layer_evaluations(sets: Sequence[Dropped], layers: int) -> int:
    """How many layers running all these sets takes: one for each distinct beginning."""
    return sum(len({s & frozenset(range(layer + 1)) for s in sets}) for layer in range(layers))


def check_few(candidates: int, count: int) -> int:
    """The number of subsets; ``PruneAttnError`` where they are too many to try."""
    many = sum(comb(candidates, size) for size in range(1, count + 1))
    if many > MOST_SUBSETS:
        raise PruneAttnError(
            f"--strategy exhaustive: {many:,} sets of up to {count} of {candidates} are too many to try (at most "
            f"{MOST_SUBSETS:,}); use --strategy search"
        )
    return many


def exhaustive(losses: Losses, candidates: Sequence[int], count: int, samples: int) -> Found:
    """The best set of each size up to ``count`` on all samples."""
    sets = list(subsets(candidates, count))
    ranked = rank(sets, losses(sets, samples))
    found = Found({0: (float(losses([frozenset()], samples)[0]), frozenset())}, count)
    for loss, dropped in ranked:
        found.sets.setdefault(len(dropped), (loss, dropped))
    return found
