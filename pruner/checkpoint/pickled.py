"""Where the tensors of a PyTorch file (``torch.save`` of a state dict) lie, told without running its pickle.

A pickle is a program, and running one that a stranger wrote runs the stranger's code. So there is no unpickler here:
``Reader`` follows the few instructions that ``torch.save`` writes for tensors, calls nothing, and refuses all others
(stricter than ``torch.load(weights_only=True)``, whose source, ``torch/_weights_only_unpickler.py``, lists them).

Two layouts, both read in place. Since PyTorch 1.6 a zip: ``NAME/data.pkl``, and each storage's bytes, not compressed,
in ``NAME/data/KEY``. Before: pickles (a magic number, a version, the machine, the object, the storages' keys), then
each storage's number of elements in 8 bytes and its bytes (``_legacy_load`` in ``torch/serialization.py``).
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pruner.checkpoint.config import UNQUANTISED
from pruner.checkpoint.header import GGML, open_shard
from pruner.checkpoint.tensor import Piece, Shard, Tensor, gathered
from pruner.checkpoint.unpickle import (
    MOST,
    Place,
    Reader,
    Reads,
    RefusedError,
    Storage,
    damaged,
    quoted,
    state_dict,
)
from pruner.dtypes import DTYPE_BYTES
from pruner.errors import PruneAttnError

_MAGIC = 0x1950A86A20F9469CFC6C


def read_pickled(path: Path) -> Shard:
    """Read where the tensors of a PyTorch file lie. No weights are read, and nothing that the file says is run.

    ``header_sha256`` is of ``data.pkl`` and the zip's central directory after it (which has every record's CRC-32),
    or, of a file without a zip, of all that comes before the storages. Raises ``PruneAttnError`` for a file that is
    missing, truncated or compressed, and for one that holds, or asks for, anything but tensors.
    """
    file, size = open_shard(path)
    with file:
        head = file.read(8)
        file.seek(0)
        try:
            if head.startswith(b"PK\3\4"):
                root, place, digest = _read_zip(file, size)
            elif head.startswith(GGML):
                raise RefusedError(f"is GGUF or GGML (llama.cpp); {UNQUANTISED}")
            elif head.startswith(b"\x80"):
                root, place, digest = _read_legacy(file, size)
            elif file.read(9).endswith(b"{"):
                raise RefusedError("is a safetensors file; call it model.safetensors")
            else:
                raise RefusedError("is no PyTorch file; download it again")
            tensors = {name: _tensor(path, size, name, found, place) for name, found in state_dict(root).items()}
        except RefusedError as error:
            raise PruneAttnError(f"{path}: {error}") from None
    return Shard(path, size, digest, tensors)


# -- the two layouts ---------------------------------------------------------------------------------------------------

_Records = Callable[
    [Storage], int
]  # where a storage's bytes start in the file; RefusedError where they are not all there


class _Zip:
    """A zip file's entries, where they lie; none is unpacked."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        import zipfile

        self._file, self._size = file, size
        try:
            archive = zipfile.ZipFile(Reads(file))
            listed = archive.infolist()
        except (
            zipfile.BadZipFile,
            ValueError,
            NotImplementedError,
            struct.error,
            EOFError,
            OSError,
            OverflowError,
        ) as error:
            damaged(f"its zip directory cannot be read: {error}")
        self.entries = {entry.filename: entry for entry in listed}
        self.directory = archive.start_dir
        self.repeated = len(self.entries) != len(listed)

    def start(self, name: str, nbytes: int | None = None) -> tuple[int, int]:
        """Where an entry's bytes begin, and how many they are (``nbytes``, where that is given)."""
        entry, told = self.entries.get(name), quoted(name)
        if entry is None:
            damaged(f"{told} is missing")
        if entry.compress_type != 0 or entry.flag_bits & 1:
            raise RefusedError(
                f"{told} in it is compressed or encrypted, which torch.save never does; write it again with torch.save"
            )
        self._file.seek(entry.header_offset if 0 <= entry.header_offset < self._size else self._size)
        local = self._file.read(30)
        if len(local) < 30 or not local.startswith(b"PK\3\4"):
            damaged(f"{told} is not where its zip directory says")
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:]))
        if nbytes is not None and entry.file_size != nbytes:
            damaged(f"{told} has {entry.file_size} bytes and {nbytes} are needed")
        if entry.compress_size != entry.file_size or begin + entry.file_size > self.directory:
            damaged(f"{told} does not fit into it")
        return begin, entry.file_size

    def content(self, name: str) -> bytes:
        """The bytes of a small entry."""
        begin, nbytes = self.start(name)
        if nbytes > MOST:
            raise RefusedError(f"its {quoted(name)} has an absurd length of {nbytes} bytes; download it again")
        self._file.seek(begin)
        return self._file.read(nbytes)


def _read_zip(file: BinaryIO, size: int) -> tuple[Any, _Records, str]:
    archive = _Zip(file, size)
    pickles = [name for name in archive.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise RefusedError(f"is a zip file with {len(pickles) or 'no'} data.pkl, so no PyTorch checkpoint")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in archive.entries:
        raise RefusedError("is a TorchScript program and not weights alone; give the checkpoint that it was made from")
    if archive.repeated:
        damaged("a name stands twice in its zip directory")
    if f"{prefix}byteorder" in archive.entries and archive.content(f"{prefix}byteorder") != b"little":
        raise RefusedError("was written on a big-endian machine; write it again on another")
    pickle = archive.content(pickles[0])
    file.seek(archive.directory)
    digest = hashlib.sha256(pickle)
    digest.update(file.read(min(size - archive.directory, MOST)))

    def place(storage: Storage) -> int:
        return archive.start(f"{prefix}data/{storage.key}", storage.elements * DTYPE_BYTES[storage.dtype])[0]

    return Reader().run(pickle), place, digest.hexdigest()


def _read_legacy(file: BinaryIO, size: int) -> tuple[Any, _Records, str]:
    head, reader = io.BytesIO(file.read(MOST)), Reader(legacy=True)
    if reader.run(head) != _MAGIC:
        raise RefusedError("is a pickle and no PyTorch checkpoint; it was not run")
    version, machine, root, keys = (reader.run(head) for _ in range(4))
    if version != 1001 or not isinstance(machine, dict) or not isinstance(keys, list):
        raise RefusedError("has a layout of an unknown version; load and save it with a recent PyTorch")
    if machine.get("little_endian") is not True:
        raise RefusedError("was written on a big-endian machine; write it again on another")
    end = position = head.tell()
    elements: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = reader.storages.get(key) if isinstance(key, str) else None
        file.seek(position)
        prefix = file.read(8)
        if storage is None or len(prefix) < 8:
            damaged(f"storage {quoted(key) if storage else '?'} is missing")
        count = int.from_bytes(prefix, "little", signed=True)
        nbytes = count * DTYPE_BYTES[storage.dtype]
        if count < 0 or position + 8 + nbytes > size:
            damaged(f"it has {size} bytes and storage {quoted(key)} alone ends after that")
        elements[key] = position + 8, count
        position += 8 + nbytes
    if position != size:
        damaged(f"{size - position} bytes at its end belong to nothing")
    digest = hashlib.sha256(head.getvalue()[:end]).hexdigest()

    def place(storage: Storage) -> int:
        if storage.key not in elements:
            damaged(f"storage {quoted(storage.key)} is missing")
        begin, count = elements[storage.key]
        if count != storage.elements:
            damaged(f"storage {quoted(storage.key)} has {count} elements and {storage.elements} are needed")
        return begin

    return root, place, digest


def _tensor(path: Path, file_size: int, name: str, found: Place, place: _Records) -> Tensor:
    storage, size = found.storage, DTYPE_BYTES[found.storage.dtype]
    last = found.offset + sum((n - 1) * stride for n, stride in zip(found.shape, found.strides, strict=True))
    if prod(found.shape) and last >= storage.elements:
        damaged(f"{name!r} reaches beyond its storage of {storage.elements} elements")
    if prod(found.shape) * size > file_size:  # one element, repeated
        raise RefusedError(f"claims more bytes for {name!r} than the whole file has; download it again")
    start = place(storage) + found.offset * size
    # the stride of a dimension of 1 says nothing and may be anything
    strides = tuple(stride * size if n > 1 else 0 for n, stride in zip(found.shape, found.strides, strict=True))
    return gathered(name, storage.dtype, found.shape, (Piece(path, start, found.shape, strides),))


# -- the pickle --------------------------------------------------------------------------------------------------------
