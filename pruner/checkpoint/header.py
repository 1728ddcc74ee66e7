"""The header of a safetensors file, read strictly and without the data.

Format: https://github.com/huggingface/safetensors#format. A file is N (8 bytes, little endian), a JSON
header of N bytes, then the tensors' data without gaps or overlaps, in any order.
"""

from __future__ import annotations

import hashlib
import os
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pruner.checkpoint.config import UNQUANTISED
from pruner.checkpoint.tensor import Shard, Tensor
from pruner.dtypes import DTYPE_BYTES
from pruner.errors import PruneAttnError
from pruner.files import JSON_BYTES, open_regular, parse_json

GGML = (b"GGUF", b"lmgg", b"tjgg", b"fmgg")
LONGEST_NAME = 500
MAX_HEADER_BYTES = JSON_BYTES  # the safetensors library takes 100 MB, which make 2 GB of Python objects


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def open_shard(path: Path) -> tuple[BinaryIO, int]:
    """Open a file of weights for reading; the file and its size in bytes. ``PruneAttnError`` where it is none."""
    file = open_regular(path)
    if file.read(8) == b"version ":
        file.close()
        raise PruneAttnError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in that repository")
    file.seek(0)
    return file, os.fstat(file.fileno()).st_size


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Cost: two small reads. Raises ``PruneAttnError`` for a file that is missing, truncated, or whose header lies
    (absurd length, not JSON, duplicate names, sizes that disagree with shapes, overlaps, gaps, data beyond the end).
    """

    def bad(what: str, cure: str = "download this file again") -> PruneAttnError:
        return PruneAttnError(f"{path}: {what}; {cure}")

    file, size = open_shard(path)
    with file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise bad(f"is no safetensors file: it is {size} bytes long")
        if prefix.startswith(GGML):
            raise bad("is GGUF or GGML (llama.cpp)", UNQUANTISED)
        if prefix.startswith(b"PK\3\4"):
            raise bad("is a PyTorch file", "call it pytorch_model.bin")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise bad(f"its header claims an absurd length of {length} bytes")
        if 8 + length > size:
            raise bad(f"is truncated: its header alone needs {8 + length} bytes and the file has {size}")
        raw = file.read(length)
    header = parse_json(raw, f"{path}: its header cannot be read")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise bad("its header's __metadata__ is not a map of strings")

    data_start = 8 + length
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        if len(name) > LONGEST_NAME:
            raise bad(f"has a name of {len(name)} characters where a tensor's belongs")
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
    return Shard(path, size, hashlib.sha256(raw).hexdigest(), tensors)
