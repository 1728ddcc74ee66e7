"""What ONNX Runtime's Python gives no way to: the host's and the GPU's memory, streams and kernels, by CUDA's driver.

Source: CUDA driver API, Memory Management, Stream Management, Execution Control and Unified Addressing (with it, host
and GPU use the same address).
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from pruner.errors import MachineError

_PORTABLE_AND_MAPPED = 1 | 2  # CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, as ONNX Runtime's own
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_DEVICE = 0
_CLUSTER = 4  # thread blocks, as in most of cuBLAS's products of one row on Hopper
_EMPTY = b"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry empty() .explicitcluster .reqnctapercluster 4, 1, 1
{
 ret;
}
"""


def pinned(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """A new array of zeros in page-locked host memory, which a GPU reads and writes in place, so that a decode step
    needs no copies. Given back when nothing refers to it. ``MachineError`` where there is no memory for it.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    address = ctypes.c_void_p()
    failed = _call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), _PORTABLE_AND_MAPPED)
    if failed or address.value is None:
        raise MachineError(f"no page-locked memory for {size:,} bytes (CUDA error {failed})")
    memory = (ctypes.c_char * size).from_address(address.value)
    weakref.finalize(memory, _call, "cuMemFreeHost", ctypes.c_void_p(address.value)).atexit = False  # CUDA may be gone
    array = np.frombuffer(memory, dtype).reshape(shape)
    array[...] = 0
    return array


class GpuMemory:
    """``size`` bytes at ``address`` on the GPU, given back when nothing refers to them."""

    def __init__(self, size: int) -> None:
        address = ctypes.c_uint64()
        if failed := _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size)):
            why = "the GPU's memory is too small" if failed == _OUT_OF_MEMORY else "the GPU gives no memory"
            raise MachineError(f"{why}: {size:,} bytes were refused (CUDA error {failed})")
        self.address, self.size = address.value, size
        weakref.finalize(self, _call, "cuMemFree_v2", address).atexit = False

    def write(self, offset: int, data: np.ndarray) -> None:
        """Bytes, to ``offset``."""
        to, source = ctypes.c_uint64(self.address + offset), ctypes.c_void_p(data.ctypes.data)
        if failed := _call("cuMemcpyHtoD_v2", to, source, ctypes.c_size_t(data.nbytes)):
            raise MachineError(f"{data.nbytes:,} bytes could not be copied to the GPU (CUDA error {failed})")


def borrow_stream(owner: object) -> int:
    """A stream for ``owner`` alone, until it is gone; never destroyed, since what ran on it may outlive its owner."""
    try:
        address = _idle.pop()
    except IndexError:
        stream = ctypes.c_uint64()
        if failed := _call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING)):
            raise MachineError(f"the GPU gives no stream (CUDA error {failed})") from None
        address = stream.value
    weakref.finalize(owner, _idle.append, address).atexit = False
    return address


_idle: list[int] = []  # streams


def launch_empty(stream: int, clusters: int) -> bool:
    """A kernel of so many thread block clusters that does nothing; whether it was launched."""
    try:
        function = _empty()
    except MachineError:
        return False
    one, nothing = ctypes.c_uint(1), ctypes.c_void_p()
    blocks, threads = ctypes.c_uint(clusters * _CLUSTER), ctypes.c_uint(32)
    return not _call(
        "cuLaunchKernel", function, blocks, one, one, threads, one, one, ctypes.c_uint(0), ctypes.c_void_p(stream),
        nothing, nothing,
    )  # fmt: skip


@functools.cache
def _empty() -> ctypes.c_void_p:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    failed = _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(_EMPTY))
    if failed := failed or _call("cuModuleGetFunction", ctypes.byref(function), module, b"empty"):
        raise MachineError(f"the GPU takes no kernel of ours (CUDA error {failed})")
    return function


def _call(function: str, *arguments: object) -> int:
    """CUDA's error, 0 for none; in the context that ONNX Runtime and PyTorch use."""
    driver = _driver()
    driver.cuCtxPushCurrent_v2(_context())
    try:
        return getattr(driver, function)(*arguments)
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _context() -> ctypes.c_void_p:
    """Held as long as the process lives, as CUDA's runtime does: with its last holder goes all that was allocated."""
    context = ctypes.c_void_p()
    if failed := _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), _DEVICE):
        raise MachineError(f"the GPU cannot be used (CUDA error {failed}); check nvidia-smi")
    return context
