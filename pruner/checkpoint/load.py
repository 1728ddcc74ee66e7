"""One tensor of an opened checkpoint as PyTorch sees it, mapped and not copied where it is one run of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pruner.checkpoint.tensor import OpenFiles, Tensor, read_blocks
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.files import Stamp

if TYPE_CHECKING:
    import torch

    from pruner.checkpoint.directory import Checkpoint


def load_tensor(tensor: Tensor, seen: Mapping[Path, Stamp | None] | None = None) -> torch.Tensor:
    """The tensor, in its own dtype and shape, on the CPU, mapped copy-on-write: pages are read when they are used.

    One that lies in pieces, or not on a boundary of its elements, is read into memory. ``seen`` is the checkpoint's:
    ``PruneAttnError`` where the file is another one by now.
    """
    import torch

    dtype = getattr(torch, WEIGHT_DTYPES[tensor.dtype])
    with OpenFiles(seen) as files:
        if tensor.pieces or tensor.start % dtype.itemsize:
            data, position = np.empty(tensor.nbytes, np.uint8), 0
            for block in read_blocks(tensor, files):
                data[position : position + len(block)] = np.frombuffer(block, np.uint8)
                position += len(block)
        else:
            with open(files.fd(tensor.path), "rb", closefd=False) as file:
                data = np.memmap(file, np.uint8, "c", offset=tensor.start, shape=(tensor.nbytes,))
    return torch.from_numpy(data).view(dtype).reshape(tensor.shape)


def check_finite(checkpoint: Checkpoint) -> None:
    """``PruneAttnError`` that names the first tensor with a value that is no finite number. Reads all weights.

    For when a loss came out as NaN: whether the weights are at fault, or the dtype they were computed in.
    """
    for tensor in checkpoint.tensors.values():
        values = load_tensor(tensor, checkpoint.seen)
        if not bool(values.isfinite().all()):
            what = "NaN" if bool(values.isnan().any()) else "infinity"
            raise PruneAttnError(f"{tensor.path}: {tensor.name} holds {what}; get the checkpoint again, or mend it")
