"""Page-locked host memory that a GPU reads and writes in place, so that a decode step needs no copies.

Source: CUDA driver API, Memory Management and Unified Addressing (with it, host and GPU use the same address).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike

from pruner.errors import MachineError

_PORTABLE_AND_MAPPED = 1 | 2  # CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP
_DEVICE = 0


def pinned(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """A new array of zeros, given back when nothing refers to it. ``MachineError`` where there is no memory for it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    driver = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_void_p()
    with _context(driver):
        failed = driver.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(size), _PORTABLE_AND_MAPPED)
    if failed or address.value is None:
        raise MachineError(f"no page-locked memory for {size:,} bytes (CUDA error {failed}); lower the batch")
    memory = (ctypes.c_char * size).from_address(address.value)
    weakref.finalize(memory, _free, driver, address.value).atexit = False  # CUDA may be gone by then
    array = np.frombuffer(memory, dtype).reshape(shape)
    array[...] = 0
    return array


def _free(driver: ctypes.CDLL, address: int) -> None:
    with _context(driver):
        driver.cuMemFreeHost(ctypes.c_void_p(address))


@contextlib.contextmanager
def _context(driver: ctypes.CDLL) -> Iterator[None]:
    """The context that ONNX Runtime and PyTorch use, current in this thread."""
    context = ctypes.c_void_p()
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), _DEVICE)
    driver.cuCtxPushCurrent_v2(context)
    try:
        yield
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        driver.cuDevicePrimaryCtxRelease_v2(_DEVICE)
