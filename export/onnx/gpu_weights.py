"""A checkpoint's tensors in the GPU's memory, once, for several ONNX Runtime sessions.

ONNX Runtime takes initializers that its caller owns (``SessionOptions.add_initializer``), and memory of the caller's
by DLPack (https://dmlc.github.io/dlpack/latest/).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, TensorProto

from export.onnx.cuda_driver import GpuMemory, pinned
from pruner.errors import MachineError, PruneAttnError

_CUDA, _FLOAT, _BFLOAT = 2, 2, 4  # kDLCUDA, kDLFloat, kDLBfloat
_CHUNK = 16 << 20  # bytes that one thread reads and copies at a time
_THREADS = 8


class GpuWeights:
    """The external initializers of these graphs; copied by threads while sessions open, and there after ``with``.

    ``values``: an ``OrtValue`` by name. Each has memory of its own, as ONNX Runtime would allocate it, or a part of
    that of a range around it. Raises ``MachineError`` where it does not fit, or a shard cannot be read.
    """

    def __init__(self, directory: Path, graphs: Sequence[ModelProto]) -> None:
        ranges: dict[str, tuple[str, int, int, TensorProto]] = {}
        for tensor in (tensor for graph in graphs for tensor in graph.graph.initializer if tensor.external_data):
            place = {entry.key: entry.value for entry in tensor.external_data}
            ranges[tensor.name] = (place["location"], int(place["offset"]), int(place["length"]), tensor)
        self.values: dict[str, Any] = {}
        copies: list[_Range] = []
        for name, (file, start, length, tensor) in sorted(ranges.items(), key=lambda item: (*item[1][:2], -item[1][2])):
            path = directory / file
            if not copies or copies[-1].path != path or start + length > copies[-1].start + copies[-1].memory.size:
                with _naming(path):
                    copies.append(_Range(path, start, GpuMemory(length)))
            self.values[name] = _value(copies[-1].memory, start - copies[-1].start, tensor)
        self._chunks = deque((copy, done) for copy in copies for done in range(0, copy.memory.size, _CHUNK))

    def __enter__(self) -> GpuWeights:
        self._pool = ThreadPoolExecutor(_THREADS)
        self._copying = [self._pool.submit(self._copy) for _ in range(min(_THREADS, len(self._chunks)))]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self._chunks.clear()
        self._pool.shutdown()
        for copying in () if kind else self._copying:
            copying.result()

    def _copy(self) -> None:
        """By way of page-locked memory, which is quicker than mapping the file: a driver copies mapped pages itself."""
        buffer = None
        while True:
            try:
                (path, start, memory), done = self._chunks.popleft()
            except IndexError:
                return
            length = min(_CHUNK, memory.size - done)
            try:
                with _naming(path), open(path, "rb") as file:
                    buffer = pinned((_CHUNK,), np.uint8) if buffer is None else buffer
                    file.seek(start + done)
                    if file.readinto(memoryview(buffer)[:length]) < length:
                        raise PruneAttnError(f"it ended while it was read; see prune-attn verify {path.parent}")
                    memory.write(done, buffer[:length])
            except BaseException:
                self._chunks.clear()
                raise


class _Range(NamedTuple):
    path: Path
    start: int  # byte in the file
    memory: GpuMemory


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror or error}") from None
    except PruneAttnError as error:
        raise type(error)(f"{path}: {error}") from None


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """DLManagedTensor"""

    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _Deleter))


_live: dict[int, tuple[_Managed, Any, GpuMemory]] = {}  # what ONNX Runtime still refers to


@_Deleter
def _dropped(managed: int, live: dict[int, Any] = _live) -> None:
    live.pop(managed, None)


ctypes.pythonapi.Py_IncRef(ctypes.py_object(_dropped))  # ONNX Runtime calls it at exit too, after the last collection


def _value(memory: GpuMemory, offset: int, tensor: TensorProto) -> Any:
    import onnxruntime

    shape = (ctypes.c_int64 * len(tensor.dims))(*tensor.dims)
    code = _BFLOAT if tensor.data_type == TensorProto.BFLOAT16 else _FLOAT
    view = _Tensor(memory.address + offset, _CUDA, 0, len(shape), code, 16, 1, shape, None, 0)
    managed = _Managed(view, None, _dropped)
    address = ctypes.addressof(managed)
    _live[address] = (managed, shape, memory)
    return onnxruntime.OrtValue.from_dlpack(_new_capsule(address, b"dltensor", None))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
