"""Which windows of a calibration text are run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pruner.errors import PruneAttnError

if TYPE_CHECKING:
    import numpy as np

    from pruner.text import Text


SAMPLES, LENGTH = 64, 2048  # by the study in docs/notes/selection.md


def how_many(
    text: Text, context: int, samples: int | None, length: int | None, say: Callable[[str], None]
) -> tuple[int, int]:
    """Samples and length: those asked for where the text has them, else the defaults, or as many as there are."""
    have = len(text.ids)
    if length is None:
        length = min(LENGTH, max(context // 2, 2))
    elif not 2 <= length <= context:
        raise PruneAttnError(f"--length {length}: must be 2 to {context}, the model's context")
    if samples is None:
        samples = min(SAMPLES, have // length)
        if 0 < samples < SAMPLES:
            say(f"{text.path} has room for {samples} samples only; {SAMPLES} choose better")
    elif samples < 1:
        raise PruneAttnError(f"--samples {samples}: must be at least 1")
    if samples * length > have or samples == 0:
        raise PruneAttnError(
            f"{text.path}: is too short: {max(samples, 1)} samples of {length} tokens were wanted, and it has {have:,} "
            "tokens in all; give a longer text, or fewer --samples or a smaller --length"
        )
    return samples, length


def windows(ids: np.ndarray, samples: int, length: int, seed: int) -> np.ndarray:
    """(samples, length): one window at a random place in each of as many equal parts of the text, without overlap.

    Their order is such that the first few, too, are spread over the whole text.
    """
    import numpy as np

    room = len(ids) / samples
    places = np.random.default_rng(seed).random(samples)
    starts = [int(i * room + places[i] * (room - length)) for i in range(samples)]
    stride = max(1, math.isqrt(samples))
    spread = [i for first in range(stride) for i in range(first, samples, stride)]
    return np.stack([ids[starts[i] : starts[i] + length] for i in spread])
