"""The two ONNX graphs that a measurement needs and that nobody ships: the original's, and last-token ones.

A service's graph gives the last token's logits only; scoring text needs all. Either is a file of some 100 KB over
shards, which are hard-linked where they can be. Only an original whose q, k and v do not lie together is copied (as
``export`` does), since its graph would have more nodes than the pruned one's and lose time to that.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from export.deliver import export
from export.layout import WriteOptions
from export.onnx import GraphOptions
from export.onnx.initializers import adjacent
from export.onnx.runtime_files import runtime_files
from export.shards import copy_range
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.files import write_file
from pruner.names import CONFIG, INDEX

_SUFFIX = ".safetensors"


class Graphs:
    """Directories in ``work`` that ``OnnxSession`` runs; ``copied`` counts the bytes of weights that it took."""

    def __init__(self, work: Path) -> None:
        self._work, self._laid_out = work, {}  # type: Path, dict[str, Path]
        self.copied = 0

    def directory(self, name: str, checkpoint: Checkpoint, dtype: str | None, last_token_logits: bool) -> Path:
        """A graph of ``checkpoint``; ``dtype``: what its weights have to be converted to, if anything."""
        path = self._work / f"{name}-{'serve' if last_token_logits else 'score'}"
        if path.exists():
            return path
        self._work.mkdir(parents=True, exist_ok=True)
        if dtype is not None or not _lies_well(checkpoint):
            if name not in self._laid_out:
                self._laid_out[name] = self._work / f"{name}-laid-out"
                export(checkpoint.path, self._laid_out[name], options=WriteOptions(dtype=dtype))
                self.copied += open_checkpoint(self._laid_out[name]).nbytes
            checkpoint = open_checkpoint(self._laid_out[name])
        path.mkdir()
        for shard in checkpoint.shards:
            self._link(shard.path, path / shard.path.name)
        for file in (CONFIG, INDEX):
            if (checkpoint.path / file).is_file():
                shutil.copyfile(checkpoint.path / file, path / file)
        files = runtime_files(open_checkpoint(path), None, GraphOptions(None, last_token_logits))
        for file, data in files.items():
            write_file(path / file, data)
        return path

    def _link(self, source: Path, target: Path) -> None:
        source = Path(os.path.realpath(source))
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            size = source.stat().st_size
            with open(source, "rb") as a, open(target, "xb") as b:
                copy_range(a.fileno(), 0, b.fileno(), 0, size, source)
            self.copied += size

    def remove(self) -> None:
        """Give the disk space back."""
        shutil.rmtree(self._work, ignore_errors=True)


def _lies_well(checkpoint: Checkpoint) -> bool:
    """Whether a graph over these very files has q, k and v of every attention in one piece."""
    have = checkpoint.tensors
    if any(shard.path.suffix != _SUFFIX for shard in checkpoint.shards):
        return False
    for layer in checkpoint.decoder.present("attention"):
        names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
        if not adjacent([have[name] for name in names]):
            return False
    return True
