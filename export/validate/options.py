"""What ``validate`` can be asked for. Each part has a dataclass of its own: without it, the part is left out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruner.text import Texts

PARTS = ("same-function", "accuracy", "tasks", "latency")
BACKENDS = ("torch", "onnx")
MODELS = ("original", "pruned")


@dataclass(frozen=True)
class Accuracy:
    """Perplexity and agreement on ``text``, which neither model has seen: a file or several.

    ``text_field`` is JSON lines' (see ``pruner.text.read_contents``). ``window`` counts tokens of context (default: the
    model's, at most 4,096), ``stride`` tokens from one window to the next (default: half a window). ``bos`` puts the
    BOS before the text (once), before every window (every) or nowhere (none). ``max_tokens``: only the first of them.
    """

    text: Texts
    text_field: str | None = None
    window: int | None = None
    stride: int | None = None
    bos: str = "once"
    max_tokens: int | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks as ``pruner.evaluate.task_files.resolve_tasks`` takes them; ``limit``: the first so many items of each."""

    names: str | Sequence[str]
    limit: int | None = None


@dataclass(frozen=True)
class Latency:
    """Times of each of ``batches`` (rows) with each of ``prompts`` (tokens; default: 128, 512 and 2,048, what fits).

    Each model is run ``repeats`` times, with ``new_tokens`` timed after each prompt; after ``seconds`` 3 repeats are
    enough. ``compiled`` times transformers compiled too (default: on CUDA).
    """

    batches: str | Sequence[int] = (1, 8)
    prompts: str | Sequence[int] | None = None
    new_tokens: int = 128
    repeats: int = 20
    seconds: float = 60
    compiled: bool | None = None


@dataclass(frozen=True)
class Compute:
    """What it is computed with.

    ``backends``: torch, onnx (default: both, where the pruned directory has a model.onnx that runs here). ``device`` is
    auto, cpu or cuda. ``dtype`` is PyTorch's (default: float32 on the CPU, as stored on CUDA); ONNX Runtime computes in
    what is stored. The same ``seed`` gives the same accuracy. ``threads``: see ``pruner.machine.computing``. ``work``
    is a directory for temporary graphs and weights (default: in the output).
    """

    backends: str | Sequence[str] | None = None
    device: str = "auto"
    dtype: str | None = None
    seed: int = 0
    threads: int | None = None
    work: str | os.PathLike[str] | None = None
