"""Where the tensors of a PyTorch file (``torch.save`` of a state dict) lie, told without running its pickle.

A pickle is a program, and running one that a stranger wrote runs the stranger's code. So there is no unpickler here:
``_Reader`` follows the few instructions that ``torch.save`` writes for tensors, calls nothing, and refuses all others
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
from typing import Any, BinaryIO, NamedTuple, NoReturn

from pruner.checkpoint.config import UNQUANTISED
from pruner.checkpoint.header import GGML, LONGEST_NAME, open_shard
from pruner.checkpoint.tensor import Piece, Shard, Tensor, gathered
from pruner.dtypes import DTYPE_BYTES
from pruner.errors import PruneAttnError

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_GLOBALS = {
    "collections.OrderedDict": "dict",
    "torch._utils._rebuild_tensor": "tensor",  # before PyTorch 0.4
    "torch._utils._rebuild_tensor_v2": "tensor",
    "torch._utils._rebuild_parameter": "parameter",
    "torch._utils._rebuild_parameter_with_state": "parameter",  # the state is attributes of a Python object
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
}
_MOST = 4 << 20  # bytes of pickle or zip directory; a 70B needs 0.1 MB
_MOST_STEPS = 1 << 20  # instructions of a pickle; a 70B needs 30,000
_MOST_ENTRIES = 1 << 20  # of all dictionaries in a pickle together, which a small one can repeat without end
_MAGIC = 0x1950A86A20F9469CFC6C


class _Global(NamedTuple):
    """What a pickle names: a function or class that is known, and that nobody calls. ``kind`` is from _GLOBALS."""

    kind: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class _Place(NamedTuple):
    """A tensor: a view of a storage; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """What a pickle holds or asks for that no file of weights does."""


_MARK = object()


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
                raise _RefusedError(f"is GGUF or GGML (llama.cpp); {UNQUANTISED}")
            elif head.startswith(b"\x80"):
                root, place, digest = _read_legacy(file, size)
            elif file.read(9).endswith(b"{"):
                raise _RefusedError("is a safetensors file; call it model.safetensors")
            else:
                raise _RefusedError("is no PyTorch file; download it again")
            tensors = {name: _tensor(path, size, name, found, place) for name, found in _state_dict(root).items()}
        except _RefusedError as error:
            raise PruneAttnError(f"{path}: {error}") from None
    return Shard(path, size, digest, tensors)


def _damaged(what: str) -> NoReturn:
    raise _RefusedError(f"is truncated or damaged ({what}); download it again")


# -- the two layouts ---------------------------------------------------------------------------------------------------

_Records = Callable[
    [_Storage], int
]  # where a storage's bytes start in the file; _RefusedError where they are not all there


class _Reads:
    """A file for ``zipfile`` that does not hand out a directory of millions of names, which take a minute to list."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, nbytes: int = -1) -> bytes:
        data = self._file.read(_MOST + 1 if nbytes < 0 else min(nbytes, _MOST + 1))
        if len(data) > _MOST:
            raise ValueError(f"it is larger than {_MOST:,} bytes")
        return data


def _read_zip(file: BinaryIO, size: int) -> tuple[Any, _Records, str]:
    import zipfile

    try:
        archive = zipfile.ZipFile(_Reads(file))
        entries = {entry.filename: entry for entry in archive.infolist()}
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        struct.error,
        EOFError,
        OSError,
        OverflowError,
    ) as error:
        _damaged(f"its zip directory cannot be read: {error}")
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _RefusedError(f"is a zip file with {len(pickles) or 'no'} data.pkl, so no PyTorch checkpoint")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise _RefusedError("is a TorchScript program and not weights alone; give the checkpoint that it was made from")
    if len(entries) != len(archive.infolist()):
        _damaged("a name stands twice in its zip directory")

    def start(name: str, nbytes: int | None = None) -> tuple[int, int]:
        entry, shown = entries.get(name), _shown(name)
        if entry is None:
            _damaged(f"{shown} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _RefusedError(
                f"{shown} in it is compressed or encrypted, which torch.save never does; write it again with torch.save"
            )
        file.seek(entry.header_offset if 0 <= entry.header_offset < size else size)
        local = file.read(30)
        if len(local) < 30 or not local.startswith(b"PK\3\4"):
            _damaged(f"{shown} is not where its zip directory says")
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:]))
        if nbytes is not None and entry.file_size != nbytes:
            _damaged(f"{shown} has {entry.file_size} bytes and {nbytes} are needed")
        if entry.compress_size != entry.file_size or begin + entry.file_size > archive.start_dir:
            _damaged(f"{shown} does not fit into it")
        return begin, entry.file_size

    def content(name: str) -> bytes:
        begin, nbytes = start(name)
        if nbytes > _MOST:
            raise _RefusedError(f"its {_shown(name)} has an absurd length of {nbytes} bytes; download it again")
        file.seek(begin)
        return file.read(nbytes)

    if f"{prefix}byteorder" in entries and content(f"{prefix}byteorder") != b"little":
        raise _RefusedError("was written on a big-endian machine; write it again on another")
    pickle = content(pickles[0])
    file.seek(archive.start_dir)
    digest = hashlib.sha256(pickle)
    digest.update(file.read(min(size - archive.start_dir, _MOST)))

    def place(storage: _Storage) -> int:
        return start(f"{prefix}data/{storage.key}", storage.elements * DTYPE_BYTES[storage.dtype])[0]

    return _Reader().run(pickle), place, digest.hexdigest()


def _read_legacy(file: BinaryIO, size: int) -> tuple[Any, _Records, str]:
    head, reader = io.BytesIO(file.read(_MOST)), _Reader(legacy=True)
    if reader.run(head) != _MAGIC:
        raise _RefusedError("is a pickle and no PyTorch checkpoint; it was not run")
    version, machine, root, keys = (reader.run(head) for _ in range(4))
    if version != 1001 or not isinstance(machine, dict) or not isinstance(keys, list):
        raise _RefusedError("has a layout of an unknown version; load and save it with a recent PyTorch")
    if machine.get("little_endian") is not True:
        raise _RefusedError("was written on a big-endian machine; write it again on another")
    end = position = head.tell()
    elements: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = reader.storages.get(key) if isinstance(key, str) else None
        file.seek(position)
        prefix = file.read(8)
        if storage is None or len(prefix) < 8:
            _damaged(f"storage {_shown(key) if storage else '?'} is missing")
        count = int.from_bytes(prefix, "little", signed=True)
        nbytes = count * DTYPE_BYTES[storage.dtype]
        if count < 0 or position + 8 + nbytes > size:
            _damaged(f"it has {size} bytes and storage {_shown(key)} alone ends after that")
        elements[key] = position + 8, count
        position += 8 + nbytes
    if position != size:
        _damaged(f"{size - position} bytes at its end belong to nothing")
    digest = hashlib.sha256(head.getvalue()[:end]).hexdigest()

    def place(storage: _Storage) -> int:
        if storage.key not in elements:
            _damaged(f"storage {_shown(storage.key)} is missing")
        begin, count = elements[storage.key]
        if count != storage.elements:
            _damaged(f"storage {_shown(storage.key)} has {count} elements and {storage.elements} are needed")
        return begin

    return root, place, digest


def _state_dict(root: Any) -> dict[str, _Place]:
    """What the pickle says, where that is a dictionary of tensors by name."""
    if not isinstance(root, dict):
        raise _RefusedError(
            f"holds {_kind(root)} and not a dictionary of tensors; give the file with the weights alone"
        )
    for name, value in root.items():
        if len(name) > LONGEST_NAME:
            raise _RefusedError(f"has a name of {len(name)} characters where a tensor's belongs; download it again")
        if not isinstance(value, _Place):
            what = f"holds {name!r}, which is {_kind(value)} and no tensor"
            raise _RefusedError(f"{what}; give the file with the weights alone")
    return root


def _kind(value: Any) -> str:
    if isinstance(value, (_Place, _Storage)):
        return "a tensor" if isinstance(value, _Place) else "a storage"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _shown(name: str) -> str:
    """A name out of the file, for a message: printable, and not too long."""
    return name if len(name) <= 100 and name.isprintable() else f"{name[:100]!r}..."


def _tensor(path: Path, file_size: int, name: str, found: _Place, place: _Records) -> Tensor:
    storage, size = found.storage, DTYPE_BYTES[found.storage.dtype]
    last = found.offset + sum((n - 1) * stride for n, stride in zip(found.shape, found.strides, strict=True))
    if prod(found.shape) and last >= storage.elements:
        _damaged(f"{name!r} reaches beyond its storage of {storage.elements} elements")
    if prod(found.shape) * size > file_size:  # one element, repeated
        raise _RefusedError(f"claims more bytes for {name!r} than the whole file has; download it again")
    start = place(storage) + found.offset * size
    # the stride of a dimension of 1 says nothing and may be anything
    strides = tuple(stride * size if n > 1 else 0 for n, stride in zip(found.shape, found.strides, strict=True))
    return gathered(name, storage.dtype, found.shape, (Piece(path, start, found.shape, strides),))


# -- the pickle --------------------------------------------------------------------------------------------------------

_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Reader:
    """Follows pickles that describe tensors. ``storages`` are those that were named, by key."""

    def __init__(self, legacy: bool = False) -> None:
        self.storages: dict[str, _Storage] = {}
        self._legacy, self._entries = legacy, 0

    def run(self, pickle: bytes | BinaryIO) -> Any:
        """What one pickle describes; a file is left after its end. Raises ``_RefusedError``."""
        import pickletools

        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        try:
            for step, (opcode, arg, _) in enumerate(pickletools.genops(pickle)):
                if step == _MOST_STEPS:
                    raise _RefusedError(f"its pickle has more than {_MOST_STEPS:,} instructions, which no model needs")
                self._step(opcode.name, arg)
            return self._stack.pop()
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
            _damaged(f"its pickle makes no sense: {' '.join(str(error).split())[:80]}")

    def _step(self, name: str, arg: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self._put_tuple(len(stack) - _TUPLES[name])
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[arg])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "LIST":
            stack.append(self._since_mark())
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else self._since_mark()
            _of(stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = self._since_mark() if name != "SETITEM" else [stack.pop(-2), stack.pop()]
            if name == "DICT":
                stack.append({})
            self._set(_of(stack[-1], dict), list(zip(items[::2], items[1::2], strict=True)))
        elif name == "GLOBAL":
            stack.append(_named(arg.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(f"{_of(module, str)}.{_of(attribute, str)}"))
        elif name == "BINPERSID":
            stack.append(self._storage(*_of(stack.pop(), tuple)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = _of(stack.pop(), tuple)
            stack.append(self._made(_of(stack.pop(), _Global).kind, arguments))
        elif name == "BUILD":  # a state dict's _metadata
            stack.pop()
            _of(stack[-1], dict)
        else:
            raise _RefusedError(f"its pickle uses {name}, which no file of tensors needs; it was not run")

    def _since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _put_tuple(self, at: int) -> None:
        if at < 0:
            raise IndexError("nothing to make a tuple of")
        self._stack[at:] = [tuple(self._stack[at:])]

    def _storage(self, tag: Any, kind: Any, key: Any, location: Any, elements: Any, *view: Any) -> _Storage:
        """A storage by its persistent id. ``location`` is the device that it was on, and no concern of ours."""
        dtype = _of(kind, _Global).kind
        if tag != "storage" or dtype not in DTYPE_BYTES or not isinstance(key, str) or len(view) != self._legacy:
            raise ValueError("a storage that is none")
        if any(v is not None for v in view):
            raise _RefusedError(
                "has storages that are views of others (PyTorch before 0.4); load and save it with PyTorch"
            )
        storage = _Storage(dtype, key, _count(elements))
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key!r} is described in two ways")
        return storage

    def _made(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        """What calling a known global with these arguments stands for."""
        if kind == "dict":
            out: dict[str, Any] = {}
            if arguments:  # as Python 2 wrote it: a list of [key, value]
                (pairs,) = arguments
                self._set(out, _of(pairs, list))
            return out
        if kind == "parameter":
            return _of(arguments[0], _Place)
        if kind != "tensor":
            raise ValueError("a storage is called")
        storage, offset, shape, strides, *more = arguments
        if more[2:] and more[2]:
            raise _RefusedError("has a tensor marked as conjugate or negative; write it again after resolve_neg()")
        place = _Place(_of(storage, _Storage), _count(offset), _counts(shape), _counts(strides))
        if len(place.shape) != len(place.strides):
            raise ValueError("a shape without its strides")
        return place

    def _set(self, target: dict[str, Any], items: list[Any]) -> None:
        """Put pairs into a dictionary; what is no pair is refused as it is met."""
        self._entries += len(items)
        if self._entries > _MOST_ENTRIES:
            raise _RefusedError(f"has more than {_MOST_ENTRIES:,} entries, which no model has; it was not read further")
        for key, value in items:
            if not isinstance(key, str):
                raise _RefusedError(
                    f"has {_kind(key)} where a tensor's name belongs; give the file with the weights alone"
                )
            if key in target:
                raise ValueError(f"{_shown(key)} stands twice in it")
            target[key] = value


def _named(name: str) -> _Global:
    if name not in _GLOBALS:
        raise _RefusedError(
            f"its pickle asks for {name[:100]!r}, which no file of plain tensors needs; it was not run. "
            "Get the weights as safetensors or as a plain state dict from someone you trust"
        )
    return _Global(_GLOBALS[name])


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{_kind(value)} where a {kind.__name__.strip('_')} belongs")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
        raise ValueError("a size that is none")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if len(_of(values, tuple)) > 8:
        raise ValueError("a tensor of more than 8 dimensions")
    return tuple(map(_count, values))
