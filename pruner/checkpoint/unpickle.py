"""A pickle of tensors followed instruction by instruction, never run: what is not on its short list is refused."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO, NamedTuple, NoReturn

from pruner.checkpoint.header import LONGEST_NAME
from pruner.dtypes import DTYPE_BYTES

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


MOST = 4 << 20  # bytes of pickle or zip directory; a 70B needs 0.1 MB


_MOST_STEPS = 1 << 20  # instructions of a pickle; a 70B needs 30,000


_MOST_ENTRIES = 1 << 20  # of all dictionaries in a pickle together, which a small one can repeat without end


class _Global(NamedTuple):
    """What a pickle names: a function or class that is known, and that nobody calls. ``kind`` is from _GLOBALS."""

    kind: str


class Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class Place(NamedTuple):
    """A tensor: a view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class RefusedError(Exception):
    """What a pickle holds or asks for that no file of weights does."""


_MARK = object()


def damaged(what: str) -> NoReturn:
    raise RefusedError(f"is truncated or damaged ({what}); download it again")


class Reads:
    """A file for ``zipfile`` that does not hand out a directory of millions of names, which take a minute to list."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, nbytes: int = -1) -> bytes:
        data = self._file.read(MOST + 1 if nbytes < 0 else min(nbytes, MOST + 1))
        if len(data) > MOST:
            raise ValueError(f"it is larger than {MOST:,} bytes")
        return data


def state_dict(root: Any) -> dict[str, Place]:
    """What the pickle says, where that is a dictionary of tensors by name."""
    if not isinstance(root, dict):
        raise RefusedError(f"holds {_kind(root)} and not a dictionary of tensors; give the file with the weights alone")
    for name, value in root.items():
        if len(name) > LONGEST_NAME:
            raise RefusedError(f"has a name of {len(name)} characters where a tensor's belongs; download it again")
        if not isinstance(value, Place):
            what = f"holds {name!r}, which is {_kind(value)} and no tensor"
            raise RefusedError(f"{what}; give the file with the weights alone")
    return root


def _kind(value: Any) -> str:
    if isinstance(value, (Place, Storage)):
        return "a tensor" if isinstance(value, Place) else "a storage"
    return "nothing" if value is None else f"a {type(value).__name__}"


def quoted(name: str) -> str:
    """A name out of the file, for a message: printable, and not too long."""
    return name if len(name) <= 100 and name.isprintable() else f"{name[:100]!r}..."


_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Reader:
    """Follows pickles that describe tensors. ``storages`` are those that were named, by key."""

    def __init__(self, legacy: bool = False) -> None:
        self.storages: dict[str, Storage] = {}
        self._legacy, self._entries = legacy, 0

    def run(self, pickle: bytes | BinaryIO) -> Any:
        """What one pickle describes; a file is left after its end. Raises ``RefusedError``."""
        import pickletools

        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        try:
            for step, (opcode, arg, _) in enumerate(pickletools.genops(pickle)):
                if step == _MOST_STEPS:
                    raise RefusedError(f"its pickle has more than {_MOST_STEPS:,} instructions, which no model needs")
                self._step(opcode.name, arg)
            return self._stack.pop()
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
            damaged(f"its pickle makes no sense: {' '.join(str(error).split())[:80]}")

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
            raise RefusedError(f"its pickle uses {name}, which no file of tensors needs; it was not run")

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

    def _storage(self, tag: Any, kind: Any, key: Any, location: Any, elements: Any, *view: Any) -> Storage:
        """A storage by its persistent id. ``location`` is the device that it was on, and no concern of ours."""
        dtype = _of(kind, _Global).kind
        if tag != "storage" or dtype not in DTYPE_BYTES or not isinstance(key, str) or len(view) != self._legacy:
            raise ValueError("a storage that is none")
        if any(v is not None for v in view):
            raise RefusedError(
                "has storages that are views of others (PyTorch before 0.4); load and save it with PyTorch"
            )
        storage = Storage(dtype, key, _count(elements))
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
            return _of(arguments[0], Place)
        if kind != "tensor":
            raise ValueError("a storage is called")
        storage, offset, shape, strides, *more = arguments
        if more[2:] and more[2]:
            raise RefusedError("has a tensor marked as conjugate or negative; write it again after resolve_neg()")
        place = Place(_of(storage, Storage), _count(offset), _counts(shape), _counts(strides))
        if len(place.shape) != len(place.strides):
            raise ValueError("a shape without its strides")
        return place

    def _set(self, target: dict[str, Any], items: list[Any]) -> None:
        """Put pairs into a dictionary; what is no pair is refused as it is met."""
        self._entries += len(items)
        if self._entries > _MOST_ENTRIES:
            raise RefusedError(f"has more than {_MOST_ENTRIES:,} entries, which no model has; it was not read further")
        for key, value in items:
            if not isinstance(key, str):
                raise RefusedError(
                    f"has {_kind(key)} where a tensor's name belongs; give the file with the weights alone"
                )
            if key in target:
                raise ValueError(f"{quoted(key)} stands twice in it")
            target[key] = value


def _named(name: str) -> _Global:
    if name not in _GLOBALS:
        raise RefusedError(
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
