"""Which set of layers costs least on the calibration text: a floating search.

Sequential floating forward selection (Pudil, Novovicova and Kittler, 1994): greedy steps, each screened on a part of
the samples and confirmed on all, and after each one a look at whether some set one smaller has become better than the
best known. The sets that other strategies would choose are looked at too, so that the result is never worse than
theirs on the calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Dropped = frozenset[int]
Losses = Callable[[Sequence[Dropped], int], "np.ndarray"]  # each set's loss on each of the first so many samples


@dataclass
class Found:
    """The best set of each size with its loss on all samples; beyond ``confirmed`` sizes, on the screening samples."""

    sets: dict[int, tuple[float, Dropped]] = field(default_factory=dict)
    confirmed: int = 0


def rank(sets: Iterable[Dropped], losses: Iterable[float]) -> list[tuple[float, Dropped]]:
    """Least loss first; of equal ones the deeper layers first. A loss that is no number comes last, as infinity."""
    pairs = ((math.inf if math.isnan(loss) else loss, s) for loss, s in zip(losses, sets, strict=True))
    return sorted(pairs, key=lambda pair: (pair[0], sorted(-layer for layer in pair[1])))


def _worse(differences: np.ndarray) -> bool:
    """Whether the mean of these is above 0 by more than three times its standard error."""
    n = len(differences)
    return n > 1 and bool(differences.mean() > 3 * differences.std(ddof=1) / n**0.5)


def search(
    losses: Losses,
    candidates: Sequence[int],
    count: int,
    *,
    samples: int,
    screen: int,
    confirm: int,
    others: Sequence[Sequence[int]] = (),
    step: Callable[[int, Found], None] | None = None,
) -> Found:
    """The best sets of 1 to ``count`` of ``candidates``, and of one more, which is needed to improve the last.

    All sets of a step are run on the first ``screen`` of ``samples``, the best of them on all (``confirm`` at most).
    ``others`` are orders whose beginnings are looked at as well. ``step`` is called with each size that is done.
    """
    found = Found({0: (float(losses([frozenset()], samples).mean()), frozenset())})

    def best(sets: Iterable[Dropped], keep: int, below: float = float("inf")) -> tuple[float, Dropped] | None:
        sets = list(dict.fromkeys(sets))
        table = dict(zip(sets, losses(sets, screen), strict=True))
        ranked = [(loss, s) for loss, s in rank(sets, [row.mean() for row in table.values()]) if loss < below][:keep]
        # those that are worse than the first by more than chance, sample by sample, need no second look
        short = [s for _, s in ranked if not _worse(table[s] - table[ranked[0][1]])]
        return rank(short, losses(short, samples).mean(1))[0] if short else None

    size = 0
    while size < min(count + 1, len(candidates)):
        base = found.sets[size][1]
        size += 1
        sets = [base | {i} for i in candidates if i not in base] + [frozenset(order[:size]) for order in others]
        sets = [s for s in sets if len(s) == size]
        grown = best(sets, confirm) or (float("inf"), sets[0])  # where no loss is a number
        if size not in found.sets or grown[0] < found.sets[size][0]:
            found.sets[size] = grown
        while size > 2:
            known, here = found.sets[size - 1], found.sets[size][1]
            less = best((here - {i} for i in here), (confirm + 1) // 2, float(losses([known[1]], screen).mean()))
            if less is None or less[0] >= known[0]:
                break
            size -= 1
            found.sets[size] = less
        found.confirmed = max(found.confirmed, size)
        if step:
            step(size, found)
    return found


def extend(
    losses: Losses,
    candidates: Sequence[int],
    found: Found,
    screen: int,
    step: Callable[[int, Found], None] | None = None,
) -> None:
    """Go on from the largest set, greedily and on the first ``screen`` samples alone, until every candidate is in."""
    base = found.sets[max(found.sets)][1]
    for size in range(max(found.sets) + 1, len(candidates) + 1):
        sets = [base | {i} for i in candidates if i not in base]
        found.sets[size] = rank(sets, losses(sets, screen).mean(1))[0]
        base = found.sets[size][1]
        if step:
            step(size, found)


def order_of(found: Found, count: int) -> tuple[int, ...]:
    """An order that begins with the best set of ``count`` layers, and with the others where they are nested."""
    sizes = sorted(found.sets)
    place: dict[int, int] = {}
    for layer in found.sets[sizes[-1]][1] | found.sets[count][1]:
        # the smallest size from which on, up to `count` or beyond it, every best set has this layer
        inside = layer in found.sets[count][1]
        run = [n for n in sizes if (n <= count) == inside]
        place[layer] = min(n for n in run if all(layer in found.sets[m][1] for m in run if m >= n))
    return tuple(sorted(place, key=lambda layer: (place[layer], -layer)))


def expected_work(
    candidates: int, count: int, sizes: int, *, layers: int, samples: int, screen: int, confirm: int
) -> float:
    """About how many layers times samples remain when ``sizes`` sizes are done; a candidate runs half the layers."""
    work = 0.0
    for size in range(sizes + 1, candidates + 1):
        sets = candidates - size + 1
        work += screen * layers * (1 + sets / 2)
        if size <= count + 1:
            work += (samples - screen) * layers * (1 + min(confirm, sets) / 4)  # half are ruled out
            work += screen * layers * (1 + size / 2) * (size > 2)
    return work
