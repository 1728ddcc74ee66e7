"""Checkpoints opened lazily: configuration, tensor names, dtypes, shapes and byte ranges; no weights are read."""

from pruner.checkpoint.directory import CONFIG, INDEX, Checkpoint, open_checkpoint
from pruner.checkpoint.header import DTYPE_BYTES, Shard, Tensor, read_shard

__all__ = ["CONFIG", "DTYPE_BYTES", "INDEX", "Checkpoint", "Shard", "Tensor", "open_checkpoint", "read_shard"]
