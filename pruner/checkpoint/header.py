"""The header of a safetensors file, read strictly and without the data.

Format: https://github.com/huggingface/safetensors#format. A file is N (8 bytes, little endian), a JSON
header of N bytes, then the tensors' data without gaps or overlaps, in any order.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pruner.errors import PruneAttnError

# Whole-byte dtypes of the format. The ones that a Llama's weights can have are in pruner.llama.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: ``nbytes`` bytes from ``start`` (absolute, in bytes) of the file ``path``."""

    name: str
    dtype: str  # the format's name: F16, BF16, F32 ...
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its size in bytes, the SHA-256 of its N header bytes (padding included), its tensors."""

    path: Path
    size: int
    header_sha256: str
    data_start: int
    metadata: dict[str, str] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` for JSON in which a name given twice is an error, not a choice."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the name {key!r} stands twice in it")
        out[key] = value
    return out


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Cost: two small reads. Raises ``PruneAttnError`` for a file that is missing, truncated, or whose header lies
    (absurd length, not JSON, duplicate names, sizes that disagree with shapes, overlaps, gaps, data beyond the end).
    """

    def bad(what: str, cure: str = "download this file again") -> PruneAttnError:
        return PruneAttnError(f"{path}: {what}; {cure}")

    try:
        info = path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise bad("is a link to a file that is gone" if path.is_symlink() else "is missing") from None
    if not stat.S_ISREG(info.st_mode):
        raise bad("is not a regular file", "a shard must be a file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise bad(f"is no safetensors file: it is {size} bytes long")
        if prefix == b"version ":
            raise bad("is a Git LFS pointer, not the weights", "run `git lfs pull` in that repository")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise bad(f"its header claims an absurd length of {length} bytes")
        if 8 + length > size:
            raise bad(f"is truncated: its header alone needs {8 + length} bytes and the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header cannot be read ({_one_line(error)})") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("its header's __metadata__ is not a map of strings")

    data_start = 8 + length
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise bad(f"its header's entry for {name!r} lacks dtype, shape or data_offsets") from None
        fits = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= 8
        if not fits or not all(map(_is_count, [*shape, begin, end])):
            raise bad(f"its header's entry for {name!r} is malformed")
        if dtype not in DTYPE_BYTES:
            raise bad(f"tensor {name!r} has dtype {dtype}", "convert from the unquantised checkpoint")
        if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
            raise bad(f"its header lies: {name!r} is {dtype} {shape} but spans {end - begin} bytes")
        tensors[name] = Tensor(name, dtype, tuple(shape), path, data_start + begin, end - begin)

    position = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.start + t.nbytes)):
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a gap before it"
            raise bad(f"its header lies: {tensor.name!r} {what}")
        position += tensor.nbytes
    if position > size:
        raise bad(f"is truncated: it has {size} bytes and its header promises {position}")
    if position < size:
        raise bad(f"has {size - position} bytes that its header does not mention")
    return Shard(path, size, hashlib.sha256(raw).hexdigest(), data_start, metadata, tensors)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
