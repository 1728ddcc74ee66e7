"""Linux calls that Python does not wrap. Each says False where the system lacks it, and the caller does without."""

from __future__ import annotations

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 2, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)


def _done(result: int, path: str) -> bool:
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), path)


def exchange(a: str, b: str) -> bool:
    """Swap two directories in one step (renameat2 with RENAME_EXCHANGE)."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        return False
    return _done(call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE), b)


def reserve(fd: int, nbytes: int, path: str) -> bool:
    """Take the disk space for a file now, so that a full disk is known before the copying starts.

    Not ``os.posix_fallocate``: where the file system cannot reserve, that one writes every block instead.
    """
    call = getattr(_libc, "fallocate", None)
    if call is None or nbytes == 0:
        return False
    return _done(call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)), path)


def start_writeback(fd: int, start: int, nbytes: int) -> None:
    """Have the disk begin with these bytes now, while more are copied, so that the sync at the end waits for little."""
    call = getattr(_libc, "sync_file_range", None)
    if call is not None:  # a hint: whether it works changes nothing but the time
        call(fd, ctypes.c_int64(start), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)
