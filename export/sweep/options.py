"""What ``sweep`` can be asked for: which points, what to measure at each, and on what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruner.text import Texts


@dataclass(frozen=True)
class Points:
    """Each of ``sublayers`` (attention, mlp, block), ``strategies`` and ``fractions`` (percentages or counts).

    Several are separated by commas, or a list. ``strategies``: last, keep-last, similarity, search, exhaustive
    (default: the first four; without a calibration the first two).
    """

    fractions: str | Sequence[str | int] = "10%,25%,33%,50%"
    sublayers: str | Sequence[str] = "attention"
    strategies: str | Sequence[str] | None = None


@dataclass(frozen=True)
class Measure:
    """Perplexity on ``text`` (``text_field``: see ``pruner.text.read_contents``), and speed.

    Perplexity: windows of ``window`` tokens (default: the model's context, at most 2,048) without overlap, the first
    ``limit`` of them. Speed: decode and prefill at batch 1, the sublayers really absent, timed in turn with the
    original ``rounds`` times (0: not at all). It depends on how many sublayers are gone and not on which, so it is
    measured once for each kind and count.
    """

    text: Texts
    text_field: str | None = None
    window: int | None = None
    limit: int | None = None
    rounds: int = 10


@dataclass(frozen=True)
class Machine:
    """``device``: auto, cpu or cuda. ``dtype``: by default the checkpoint's own on CUDA and float32 on the CPU.

    ``threads``: see ``pruner.machine.computing``.
    """

    device: str = "auto"
    dtype: str | None = None
    threads: int | None = None
