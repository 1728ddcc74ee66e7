"""Which device to compute on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruner.errors import PruneAttnError

if TYPE_CHECKING:
    pass


def pick_device(asked: str) -> str:
    if asked not in ("auto", "cpu", "cuda"):
        raise PruneAttnError(f"unknown device {asked!r}; choose auto, cpu or cuda")
    import torch

    if asked == "cuda":
        check_cuda()
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def check_cuda() -> None:
    """``PruneAttnError`` where PyTorch cannot run on CUDA."""
    import torch

    if not torch.cuda.is_available():
        raise PruneAttnError("PyTorch finds no CUDA device here; use --device cpu")
