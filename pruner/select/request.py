"""What can be asked for: which sublayers go (``Drop``, ``Layers``, ``SavedPlan``) and what they are chosen by."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruner.errors import PruneAttnError

if TYPE_CHECKING:
    from pruner.plan import PruningPlan
    from pruner.text import Texts

POSITIONAL = ("last", "keep-last")
CALIBRATED = ("similarity", "search", "exhaustive")
STRATEGIES = (*POSITIONAL, *CALIBRATED)
DEPTH_NOTE = (  # 6 of SmolLM2-135M's 30 attentions: perplexity x 6.0 by depth, x 1.2 by search
    "chosen by depth alone, which can ruin a model; --text general chooses by what a shipped text costs, and "
    "--text FILE by one of your own kind"
)
OBJECTIVES = ("kl", "ce")


@dataclass(frozen=True, kw_only=True)
class _Allowed:
    """``allow_first_layer``: layer 0's attention may go. ``allow_all``: every attention, or every MLP, may."""

    allow_first_layer: bool = False
    allow_all: bool = False


@dataclass(frozen=True)
class Drop(_Allowed):
    """So many sublayers of one kind: ``amount`` is a count, or a percentage of the never-pruned model's ("33%").

    ``sublayer`` is attention, mlp or block. ``strategy`` is last or keep-last (the deepest go first; default last);
    with a ``Calibration`` its strategy decides.
    """

    amount: str | int
    sublayer: str = "attention"
    strategy: str | None = None


@dataclass(frozen=True)
class Layers(_Allowed):
    """These layers, numbered from 0 as they are in the source: "22-29,31", or the numbers."""

    layers: str | Iterable[int]
    sublayer: str = "attention"


@dataclass(frozen=True)
class SavedPlan(_Allowed):
    """A saved plan: a file (ours, EvoPress's or LLM-Drop's) or a ``PruningPlan``; ``amount`` cuts its order."""

    plan: str | os.PathLike[str] | PruningPlan
    amount: str | int | None = None


Request = Drop | Layers | SavedPlan


@dataclass(frozen=True)
class Calibration:
    """The text that sublayers are chosen by, and how.

    ``strategy`` is similarity, search or exhaustive; the last two minimise ``objective``: kl (default: on unseen text
    it chose better than ce with up to 2,048 calibration tokens: docs/notes/selection.md), or ce. The model is run on
    ``samples`` windows of ``length`` tokens spread over ``text`` (default: 64 of half the context, at most 2,048). The
    text is a file or several, or ``general``, which comes along; ``text_field`` is JSON lines' (see
    ``pruner.text.read_contents``). ``seed`` says where in its part of the text each window lies. ``device`` is cpu or
    cuda; ``threads`` as in ``pruner.machine.computing``. ``resume`` goes on from what a stopped run has
    computed, to the same plan.
    """

    text: Texts
    strategy: str = "search"
    text_field: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    device: str = "cpu"
    objective: str = "kl"
    threads: int | None = None
    resume: bool = False


def as_request(drop: Request | PruningPlan | str | int) -> Request:
    """``"33%"`` and ``4`` are short for ``Drop("33%")`` and ``Drop(4)``, a plan for ``SavedPlan`` of it."""
    if isinstance(drop, str | int):
        return Drop(drop)
    return drop if isinstance(drop, Request) else SavedPlan(drop)


def check_objective(objective: str) -> None:
    """``PruneAttnError`` for one that there is not."""
    if objective not in OBJECTIVES:
        raise PruneAttnError(f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
