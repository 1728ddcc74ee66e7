"""The streaming shard writer: the kernel copies the source's bytes to the output, without Python objects.

Layout: ``Decoder.layout()``'s order, header padded with spaces so that data starts on a 4,096-byte boundary, no gaps
(the format forbids them, https://github.com/huggingface/safetensors#format). Peak memory does not depend on sizes.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from export._system import reserve, start_writeback
from pruner.checkpoint import INDEX, OpenFiles, Tensor, read_blocks
from pruner.dtypes import WEIGHT_DTYPES, itemsize
from pruner.errors import PruneAttnError
from pruner.files import changed, disk_errors, read_errors, write_file
from pruner.names import WEIGHTS
from pruner.nemotron_nas import dialect

DATA_ALIGNMENT = 4096
SHARD_NAME = re.compile(r"model((\.packed)?-\d+-of-\d+)?\.safetensors")  # as plan_shards, and transformers, name them
_CHUNK = 16 << 20  # bytes the kernel copies a call; small enough that the disk and signals are not kept waiting

Advance = Callable[[int], None]  # so many bytes more


@dataclass(frozen=True)
class Entry:
    """One tensor of the output: its name there, where its bytes come from, and its dtype there."""

    name: str
    source: Tensor
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.source.parameters * itemsize(self.dtype)


@dataclass(frozen=True)
class OutputShard:
    """One file to be written: its name, its header (length prefix and padding included), its tensors in order."""

    file: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


def plan_shards(
    sections: Iterable[Iterable[Iterable[Entry]]], max_bytes: int, config: dict[str, Any]
) -> list[OutputShard]:
    """Pack sections (of groups of tensors) into shards of at most ``max_bytes`` of data.

    A section starts a new shard rather than straddle one, unless it alone is larger than a shard; a group (q|k|v)
    never straddles, so a shard is larger than ``max_bytes`` only where one group is.

    Where ``config`` is a plain Llama's, no class of ours takes ``model.onnx`` away when somebody's ``save_pretrained``
    writes over the output. The shards then have names that it never writes and removes as those of an earlier save
    (``transformers/modeling_utils.py``), so that a runtime misses them instead of computing with others.
    """
    shards: list[list[Entry]] = [[]]
    used = 0

    def place(entries: list[Entry]) -> None:
        nonlocal used
        size = sum(entry.nbytes for entry in entries)
        if used and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1] += entries
        used += size

    for section in sections:
        groups = [list(group) for group in section]
        whole = [entry for group in groups for entry in group]
        if sum(entry.nbytes for entry in whole) <= max_bytes:
            place(whole)
        else:
            for group in groups:
                place(group)
    n, plain = len(shards), config["model_type"] != dialect.MODEL_TYPE
    stem = "model.packed" if plain else "model"
    names = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)] if plain or n > 1 else [WEIGHTS]
    return [_shard(file, entries) for file, entries in zip(names, shards, strict=True)]


def _shard(file: str, entries: list[Entry]) -> OutputShard:
    # Mixed dtypes could put a 4-byte tensor on an odd boundary, which readers that map the file cannot view.
    offset = 0
    for entry in entries:
        if offset % itemsize(entry.dtype):
            entries = sorted(entries, key=lambda e: -itemsize(e.dtype))
            break
        offset += entry.nbytes
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.source.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return OutputShard(file, len(text).to_bytes(8, "little") + text, tuple(entries))


def index_json(shards: list[OutputShard]) -> bytes:
    """``model.safetensors.index.json``."""
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    parameters = sum(entry.source.parameters for shard in shards for entry in shard.entries)
    metadata = {"total_parameters": parameters, "total_size": total}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()


def write_shards(
    directory: Path, shards: list[OutputShard], sources: OpenFiles, advance: Advance | None = None
) -> list[Path]:
    """Write shards (and the index where one is needed) into ``directory``, synced to disk; returns the files.

    ``advance`` is called with numbers of bytes written. Raises ``MachineError`` for a full disk, and
    ``PruneAttnError`` where the source changes meanwhile or a value does not fit the dtype asked for.
    """
    done = advance or (lambda nbytes: None)
    written = []
    for shard in shards:
        path = directory / shard.file
        with disk_errors(path):
            _write_shard(path, shard, sources, done)
        written.append(path)
    sources.check_unchanged()
    if shards[0].file != WEIGHTS:
        written.append(write_file(directory / INDEX, index_json(shards)))
    return written


def _steps(entries: Iterable[Entry]) -> Iterator[tuple[Path, int, int] | Entry]:
    """What to write, in order: runs (source file, offset, bytes) for the kernel to copy, joined where the source has
    them adjacent too, and entries whose bytes have to be gathered or converted."""
    current: tuple[Path, int, int] | None = None
    for entry in entries:
        runs = entry.source.runs if entry.dtype == entry.source.dtype else None
        for path, start, nbytes in runs or []:
            if current and current[0] == path and current[1] + current[2] == start:
                current = (path, current[1], current[2] + nbytes)
            else:
                if current:
                    yield current
                current = (path, start, nbytes)
        if runs is None:
            if current:
                yield current
            current = None
            yield entry
    if current:
        yield current


def _write_shard(path: Path, shard: OutputShard, sources: OpenFiles, advance: Advance) -> None:
    out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        reserve(out, shard.size, str(path))
        position = os.pwrite(out, shard.header, 0)
        for step in _steps(shard.entries):
            if isinstance(step, Entry):
                for data in read_as(step.source, sources, step.dtype):
                    _pwrite_all(out, data, position)
                    start_writeback(out, position, len(data))
                    position += len(data)
                    advance(len(data))
            else:
                source, start, nbytes = step
                copy_range(sources.fd(source), start, out, position, nbytes, source, advance)
                position += nbytes
        os.fsync(out)
    finally:
        os.close(out)


def copy_file(source: Path, target: Path, sources: OpenFiles) -> Path:
    """Copy a small file with its times, synced to disk; returns ``target``. Raises as ``write_shards``."""
    with disk_errors(target):
        out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            found = os.fstat(fd := sources.fd(source))
            copy_range(fd, 0, out, 0, found.st_size, source)
            os.utime(out, ns=(found.st_atime_ns, found.st_mtime_ns))
            os.fsync(out)
        finally:
            os.close(out)
    return target


def copy_range(
    source: int, start: int, out: int, position: int, nbytes: int, path: Path, advance: Advance | None = None
) -> None:
    """Copy ``nbytes`` from one open file to another: by the kernel where it can, else through a small buffer.

    Raises ``PruneAttnError`` naming ``path`` where the source ends early.
    """
    by_kernel = hasattr(os, "copy_file_range")
    while nbytes:
        if by_kernel:
            try:
                count = os.copy_file_range(source, out, min(nbytes, _CHUNK), start, position)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                    raise
                by_kernel = False
                continue
            if count == 0:  # some file systems answer so instead of saying that they cannot
                by_kernel = False
                continue
        else:
            with read_errors(path):
                data = os.pread(source, min(nbytes, 1 << 20), start)
            count = len(data)
            if count == 0:
                raise changed(path, "ended")
            _pwrite_all(out, data, position)
        start_writeback(out, position, count)
        start, position, nbytes = start + count, position + count, nbytes - count
        if advance:
            advance(count)


def _pwrite_all(out: int, data: bytes | bytearray, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(out, view, position)
        view, position = view[count:], position + count


def read_as(source: Tensor, files: OpenFiles, *dtypes: str) -> Iterator[bytes | bytearray]:
    """The tensor's bytes in ``dtypes``, one after the other (round to nearest even), some elements at a time.

    Imports torch to convert. Raises ``PruneAttnError`` where a finite value overflows, which only float16 does with
    real weights.
    """
    blocks: Iterator[bytes | bytearray] = read_blocks(source, files)
    for before, after in pairwise((source.dtype, *dtypes)):
        if before != after:
            blocks = _converted(blocks, before, after, source)
    yield from blocks


def _converted(
    blocks: Iterator[bytes | bytearray], before: str, dtype: str, source: Tensor
) -> Iterator[bytes | bytearray]:
    import torch

    was, after = (getattr(torch, WEIGHT_DTYPES[name]) for name in (before, dtype))
    for data in blocks:
        values = torch.frombuffer(bytearray(data), dtype=was)
        converted = values.to(after)
        if bool((converted.isinf() & values.isfinite()).any()):
            largest = float(values[values.isfinite()].abs().max())
            raise PruneAttnError(
                f"{source.path}: {source.name!r} holds {largest:g}, too large for {WEIGHT_DTYPES[dtype]}; "
                "use --dtype bfloat16"
            )
        yield converted.view(torch.uint8).numpy().tobytes()
