"""Where a tensor's bytes lie: one run of a file, or strided pieces of files that are gathered as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pruner.dtypes import DTYPE_BYTES
from pruner.files import Stamp, changed, check_unchanged, open_regular, read_errors

if TYPE_CHECKING:
    import numpy as np

_BLOCK = 8 << 20  # bytes read at a time

Run = tuple[Path, int, int]  # file, offset, bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """A strided view of a file: element [i, j, ...] is ``i * strides[0] + j * strides[1] + ...`` bytes after ``start``.

    Strides are in bytes and not negative.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: ``nbytes`` bytes from ``start`` (absolute, in bytes) of the file ``path``.

    Unless it has ``pieces``: then its elements are theirs, joined along ``axis``, in C order; ``path`` and ``start``
    are the first one's, and ``nbytes`` is still the tensor's own size. ``gathered`` makes such a tensor.
    """

    name: str
    dtype: str  # the safetensors name: F16, BF16, F32 ...
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int
    pieces: tuple[Piece, ...] = ()
    axis: int = 0

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def runs(self) -> list[Run] | None:
        """The bytes as runs, in order, which the kernel can copy; ``None`` where elements have to be gathered."""
        if not self.pieces:
            return [(self.path, self.start, self.nbytes)]
        size = DTYPE_BYTES[self.dtype]
        if self.axis or not all(is_contiguous(piece, size) for piece in self.pieces):
            return None
        return [(piece.path, piece.start, prod(piece.shape) * size) for piece in self.pieces]

    def as_pieces(self) -> tuple[Piece, ...]:
        """Its pieces; one of the tensor's own shape where it is one run."""
        strides = c_strides(self.shape, DTYPE_BYTES[self.dtype])
        return self.pieces or (Piece(self.path, self.start, self.shape, strides),)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights: its size in bytes, its tensors, and the SHA-256 of what says where they lie in it.

    That is a safetensors file's N header bytes (padding included); ``pruner.checkpoint.pickled`` says what it is
    in a PyTorch file.
    """

    path: Path
    size: int
    header_sha256: str
    tensors: dict[str, Tensor] = field(repr=False)


def c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides in bytes of elements that lie in C order without gaps."""
    return tuple(itemsize * prod(shape[i + 1 :]) for i in range(len(shape)))


def is_contiguous(piece: Piece, itemsize: int) -> bool:
    """Whether the piece's elements are one run of the file (the stride of a dimension of 1 does not matter)."""
    strides = zip(piece.shape, piece.strides, c_strides(piece.shape, itemsize), strict=True)
    return prod(piece.shape) == 0 or all(n == 1 or ours == gapless for n, ours, gapless in strides)


def gathered(name: str, dtype: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], axis: int = 0) -> Tensor:
    """A tensor of ``shape`` that is made of pieces joined along ``axis``; one run where that is what it comes to."""
    first, size = pieces[0], DTYPE_BYTES[dtype]
    if len(pieces) == 1 and is_contiguous(first, size):
        pieces = ()
    return Tensor(name, dtype, shape, first.path, first.start, prod(shape) * size, pieces, axis)


class OpenFiles:
    """Files, each opened once for reading, and a check that none is another one than was ``seen`` before."""

    def __init__(self, seen: Mapping[Path, Stamp | None] | None = None) -> None:
        self._seen = dict(seen or {})
        self._open: dict[Path, BufferedReader] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            file.close()

    def fd(self, path: Path) -> int:
        """The file, open. ``PruneAttnError`` where it is not the one that was seen, or is gone."""
        if path not in self._open:
            with read_errors(path):
                file = self._open[path] = open_regular(path, "convert again when it is complete")
            now = Stamp.of(os.fstat(file.fileno()))
            if self._seen.setdefault(path, now) != now:
                raise changed(path)
        return self._open[path].fileno()

    def check_unchanged(self) -> None:
        """Raise ``PruneAttnError`` where, by its path, a file is not the one any more that was opened."""
        check_unchanged({path: self._seen[path] for path in self._open})


def read_blocks(tensor: Tensor, files: OpenFiles, most: int = _BLOCK) -> Iterator[bytearray | bytes]:
    """The tensor's bytes in C order, whole elements, about ``most`` of them at a time.

    Memory is a few blocks, except for a transposed tensor, of which a piece is read whole. Raises ``PruneAttnError``
    where a file ends early.
    """
    runs = tensor.runs
    if runs is not None:
        for path, start, nbytes in runs:
            for offset in range(start, start + nbytes, most):
                yield _read(files, path, offset, min(most, start + nbytes - offset))
        return
    import numpy as np

    groups = [tensor.pieces] if tensor.axis else [(piece,) for piece in tensor.pieces]
    for group in groups:
        rows = group[0].shape[0]
        step = min(max(1, most // sum(_row_bytes(piece) for piece in group)), rows)
        for i in range(0, rows, step):
            parts = [_view(piece, i, min(i + step, rows), DTYPE_BYTES[tensor.dtype], files) for piece in group]
            yield np.concatenate(parts, tensor.axis).tobytes()


def _row_bytes(piece: Piece) -> int:
    """Bytes that one more index of the first dimension costs to read; next to none where that is not the outermost."""
    first, *others = piece.strides
    return max(first, 1) if first >= max(others, default=0) else 1


def _view(piece: Piece, begin: int, end: int, itemsize: int, files: OpenFiles) -> np.ndarray:
    """[begin:end] of a piece as unsigned integers: the span of the file that it covers is read in one go."""
    import numpy as np

    shape = (end - begin, *piece.shape[1:])
    span = sum((n - 1) * stride for n, stride in zip(shape, piece.strides, strict=True)) + itemsize
    data = _read(files, piece.path, piece.start + begin * piece.strides[0], span)
    return np.ndarray(shape, f"u{itemsize}", data, strides=piece.strides)


def _read(files: OpenFiles, path: Path, start: int, nbytes: int) -> bytearray:
    data, done = bytearray(nbytes), 0
    while done < nbytes:  # Linux reads at most 2 GiB a call
        with read_errors(path):
            count = os.preadv(files.fd(path), [memoryview(data)[done:]], start + done)
        if count == 0:
            raise changed(path, "ended")
        done += count
    return data
