"""Paths as people write them; files of others, read with bounds: regular files only, so many bytes, strict JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from pruner.errors import MachineError, PruneAttnError, one_line, printable

JSON_BYTES = 16 << 20  # a model of 10,000 layers needs 12 MB of index or header; the 405B has 0.1 MB
NESTING = 100
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_LARGEST = 10**300  # what is beyond it is no number of a model's and overflows where it is computed with


def expand(path: str | os.PathLike[str]) -> Path:
    """The path, with the home directory for a leading ``~``: a shell leaves it where it stands in quotes."""
    return Path(os.path.expanduser(path))


class Stamp(NamedTuple):
    """By what a file is known to be still the one that was read."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """From what ``os.stat`` says."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def stamp(path: Path) -> Stamp | None:
    """The stamp of what lies at ``path`` now, links followed; ``None`` where nothing does."""
    try:
        return Stamp.of(os.stat(path))
    except OSError:
        return None


def check_unchanged(seen: Mapping[Path, Stamp | None]) -> None:
    """Raise ``PruneAttnError`` for a file that is another one, or gone, since it was ``seen``."""
    for path, before in seen.items():
        if (now := stamp(path)) != before:
            raise changed(path, "vanished" if now is None else "changed")


def changed(path: Path, how: str = "changed") -> PruneAttnError:
    """What is said of a source's file that is not the one any more whose header was read."""
    return PruneAttnError(f"{path}: {how} while it was read; convert again when it is complete")


class read_errors:  # noqa: N801, reads as a statement
    """Turn an ``OSError`` of reading ``path`` into a ``MachineError`` that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise MachineError(f"{self.path}: cannot be read: {error.strerror or error}; check the disk") from error


def in_hub_cache(directory: Path) -> bool:
    """Whether this (a path without links) is a snapshot in the Hub's cache."""
    return directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")


def check_inside(path: Path, directory: Path) -> None:
    """``PruneAttnError`` where a link at ``path`` leads out of ``directory`` (or, in the Hub's cache, of its blobs)."""
    if not leads_out(path, directory):
        return
    raise PruneAttnError(f"{path}: leads out of the directory ({os.path.realpath(path)}); put the file itself there")


def leads_out(path: Path, directory: Path) -> bool:
    """Whether a link at ``path`` leads out of ``directory`` and, in the Hub's cache, of its repository's blobs."""
    home = Path(os.path.realpath(directory))
    places = {home, home.parent.parent / "blobs"} if in_hub_cache(home) else {home}
    return places.isdisjoint(Path(os.path.realpath(path)).parents)


def open_regular(path: Path, cure: str = "download this file again") -> BufferedReader:
    """A regular file, open for reading; links are followed. ``PruneAttnError`` for what is missing or anything else.

    A FIFO is not waited for, and nothing of a device is read.
    """
    odd = PruneAttnError(f"{path}: is not a regular file; put a file there")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise odd from None
        if error.errno not in _MISSING:
            raise
        what = "is a link to a file that is gone" if path.is_symlink() else "is missing"
        raise PruneAttnError(f"{path}: {what}; {cure}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise odd
    return os.fdopen(fd, "rb")


def read_bounded(path: Path, most: int) -> bytes:
    """A regular file's bytes. Raises ``PruneAttnError`` as ``open_regular``, and where there are more than ``most``."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise PruneAttnError(f"{path}: is larger than {most:,} bytes, which no such file needs; download it again")
    return data


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most ``most`` bytes. Raises ``PruneAttnError`` as ``parse_json``."""
    return parse_json(read_bounded(path, most), path)


def parse_json(data: bytes | str, path: Path | str) -> dict[str, Any]:
    """The object that strict JSON describes; ``path`` is what errors begin with.

    Raises ``PruneAttnError`` for what is no JSON object in UTF-8, for a name that stands twice, for NaN, infinities and
    numbers beyond 1e300, for half a surrogate pair, and for more than ``NESTING`` levels.
    """
    if data[:100].strip()[:8] in (b"version ", "version "):
        raise PruneAttnError(f"{path}: is a Git LFS pointer; run `git lfs pull` in that repository")
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise PruneAttnError(f"{path}: is JSON nested too deeply; download or write it again") from None
    except UnicodeDecodeError:
        raise PruneAttnError(f"{path}: is not JSON (it is not UTF-8 text); download or write it again") from None
    except ValueError as error:
        why = "it is empty" if not data.strip() else one_line(error, 120)
        raise PruneAttnError(f"{path}: is not JSON ({why}); download or write it again") from None
    if not isinstance(value, dict):
        raise PruneAttnError(f"{path}: is not a JSON object; download or write it again")
    if flaw := _flaw(value):
        raise PruneAttnError(f"{path}: {flaw}; download or write it again")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {printable(twice, 60)!r} stands twice in it")
    return out


def _flaw(value: Any, field: str = "", depth: int = 0) -> str | None:
    """What a parsed value holds that is no JSON, or that nothing can work with, and in which field."""
    if isinstance(value, str):
        return None if value.isascii() or _is_text(value) else f"{field} holds half a surrogate pair, which is no text"
    if isinstance(value, (int, float)):
        sound = abs(value) < _LARGEST if isinstance(value, int) else math.isfinite(value)
        return None if sound else f"{field} is NaN, infinite or beyond 1e300, which is not JSON"
    if not isinstance(value, (dict, list)) or not value:
        return None
    if depth == NESTING:
        return f"is JSON nested more than {NESTING} levels deep"
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        name = f"{field}.{key}".lstrip(".") if depth < 4 else field
        if flaw := (isinstance(key, str) and _flaw(key, name)) or _flaw(item, name, depth + 1):
            return printable(flaw)
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_file(path: Path, data: bytes, named: Path | None = None) -> Path:
    """Write a small file and sync it to disk. Errors name ``named``, if given: what the file will be called."""
    with disk_errors(named or path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def replace_file(path: Path, data: bytes) -> Path:
    """Write a small file in one step: a reader, or who comes after a kill, finds the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    write_file(new, data, path)
    os.replace(new, path)
    return path


class disk_errors:  # noqa: N801, reads as a statement
    """Turn an ``OSError`` of writing ``path`` into a ``MachineError`` that says what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cure = "the disk is full; free some space or choose another disk" if full else error.strerror or error
            raise MachineError(f"{self.path}: cannot be written: {cure}") from error
