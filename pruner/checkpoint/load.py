"""One tensor of an opened checkpoint as PyTorch sees it, mapped and not copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pruner.checkpoint.header import Tensor
from pruner.llama import WEIGHT_DTYPES

if TYPE_CHECKING:
    import torch


def load_tensor(tensor: Tensor) -> torch.Tensor:
    """The tensor, in its own dtype and shape, on the CPU, mapped copy-on-write: pages are read when they are used."""
    import torch

    data = np.memmap(tensor.path, np.uint8, "c", offset=tensor.start, shape=(tensor.nbytes,))
    dtype = getattr(torch, WEIGHT_DTYPES[tensor.dtype])
    flat = torch.from_numpy(data if tensor.start % dtype.itemsize == 0 else data.copy())
    return flat.view(dtype).reshape(tensor.shape)
