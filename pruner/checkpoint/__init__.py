"""Checkpoints opened lazily: configuration, tensor names, dtypes, shapes and byte ranges; no weights are read."""

from pruner.checkpoint.directory import Checkpoint, open_checkpoint
from pruner.checkpoint.header import read_shard
from pruner.checkpoint.tensor import OpenFiles, Shard, Tensor, read_blocks
from pruner.dtypes import DTYPE_BYTES
from pruner.names import CONFIG, INDEX

__all__ = [
    "CONFIG", "DTYPE_BYTES", "INDEX", "Checkpoint", "OpenFiles", "Shard", "Tensor", "open_checkpoint", "read_blocks",
    "read_shard",
]  # fmt: skip
