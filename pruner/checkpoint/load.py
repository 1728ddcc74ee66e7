"""One tensor of an opened checkpoint as PyTorch sees it, mapped and not copied where it is one run of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pruner.checkpoint.tensor import OpenFiles, Tensor, read_blocks
from pruner.dtypes import WEIGHT_DTYPES

if TYPE_CHECKING:
    import torch


def load_tensor(tensor: Tensor) -> torch.Tensor:
    """The tensor, in its own dtype and shape, on the CPU, mapped copy-on-write: pages are read when they are used.

    One that lies in pieces, or not on a boundary of its elements, is read into memory.
    """
    import torch

    dtype = getattr(torch, WEIGHT_DTYPES[tensor.dtype])
    if tensor.pieces or tensor.start % dtype.itemsize:
        data, position = np.empty(tensor.nbytes, np.uint8), 0
        with OpenFiles() as files:
            for block in read_blocks(tensor, files):
                data[position : position + len(block)] = np.frombuffer(block, np.uint8)
                position += len(block)
    else:
        data = np.memmap(tensor.path, np.uint8, "c", offset=tensor.start, shape=(tensor.nbytes,))
    return torch.from_numpy(data).view(dtype).reshape(tensor.shape)
