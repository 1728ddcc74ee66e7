"""An output directory that appears whole or not at all: written beside its place, then renamed or exchanged."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export import record
from export._system import exchange
from pruner.errors import MachineError, PruneAttnError
from pruner.files import write_file

# A staging directory is flocked while its process lives; one that is not is what a killed process left behind.
_STAGING = re.compile(r"\.(?P<name>.+)\.prune-attn-(?P<kind>new|old)-[0-9a-f]{12}")


Refusal = Callable[[Path], str | None]  # why a directory may not be replaced; None where this tool wrote all of it


def check_target(output: Path, source: Path, files: Iterable[Path], refusal: Refusal, overwrite: bool) -> None:
    """Refuse an OUTPUT that must not be written to. Touches nothing.

    ``files`` are the source's (their links may lead into OUTPUT). Raises ``PruneAttnError``.
    """
    target, origin = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if target == origin:
        raise PruneAttnError(f"{output}: is the source itself; choose another output directory")
    if origin in target.parents:
        raise PruneAttnError(f"{output}: lies inside the source; choose a directory outside {source}")
    if target in origin.parents:
        raise PruneAttnError(f"{output}: contains the source; choose another output directory")
    if target.is_symlink():
        raise PruneAttnError(f"{output}: is a link that leads nowhere; choose another output directory")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise PruneAttnError(f"{output}: is or contains the directory you are in; choose another output directory")
    if os.path.ismount(target):
        raise PruneAttnError(f"{output}: is a mount point; choose a directory inside it")
    if any(target in Path(os.path.realpath(file)).parents for file in files):
        raise PruneAttnError(f"{output}: holds files that the source links to; choose another output directory")
    ancestor = next(p for p in target.parents if p.exists())
    if not ancestor.is_dir():
        raise PruneAttnError(f"{output}: {ancestor} is not a directory; choose another output directory")
    if not target.exists():
        return
    if not target.is_dir():
        raise PruneAttnError(f"{output}: exists and is not a directory; choose another output directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise PruneAttnError(f"{output}: exists and is not empty; choose another directory, or add --overwrite")
    if reason := refusal(target):
        raise PruneAttnError(f"{output}: {reason}, so --overwrite will not replace it; move it away yourself")


@contextmanager
def staged(output: Path, replaceable: Refusal) -> Iterator[Path]:
    """Yield an empty directory beside ``output``; when the block ends well it takes ``output``'s place, in one step.

    A previous ``output`` is exchanged and then removed, unless ``replaceable`` says why it must not be (it may have
    appeared meanwhile: then ``PruneAttnError``). When the block fails, ``output`` is as it was. What killed runs left
    in the same parent is removed first.
    """
    target = Path(os.path.realpath(output))
    made = [p for p in [target.parent, *target.parent.parents] if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside(target) as staging:
            yield staging
            _sync(staging)
            _publish(staging, target, replaceable)
            _sync(target.parent)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """An empty directory beside ``target``, removed in the end where it is still there; killed runs' are first."""
    _clean(target.parent)
    staging = _name(target, "new")
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: a leftover is then never taken for a stale one
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _name(target: Path, kind: str) -> Path:
    # "old" must carry the whole name, by which _clean puts it back; "new" need not, and names have a longest length
    name = target.name if kind == "old" else target.name[:40]
    return target.parent / f".{name}.prune-attn-{kind}-{secrets.token_hex(6)}"


def _publish(staging: Path, target: Path, replaceable: Refusal) -> None:
    try:
        os.rename(staging, target)  # also over an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if reason := replaceable(target):
        raise PruneAttnError(f"{target}: {reason}, and appeared while this ran; choose another output directory")
    if exchange(str(staging), str(target)):
        if reason := replaceable(staging):  # what was exchanged is no longer what was looked at
            exchange(str(staging), str(target))
            raise PruneAttnError(f"{target}: {reason}, and appeared while this ran; choose another output directory")
        shutil.rmtree(staging, ignore_errors=True)
        return
    # No exchange on this file system: two renames. A kill between them leaves "old", which _clean puts back.
    old = _name(target, "old")
    os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clean(parent: Path) -> None:
    """Remove what killed runs left in ``parent``, and put an old output back whose exchange was cut short."""
    for path in sorted(parent.iterdir()):
        match = _STAGING.fullmatch(path.name)
        if not match or path.is_symlink() or not path.is_dir():
            continue
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if match["kind"] == "old" and not (parent / match["name"]).exists():
                os.rename(path, parent / match["name"])
            else:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # its process is alive, or locks do not work here
        finally:
            os.close(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
            raise
    finally:
        os.close(fd)


def check_space(output: Path, needed: int) -> None:
    """Raise ``MachineError`` where the file system of ``output`` has fewer than ``needed`` bytes free."""
    ancestor = next(p for p in Path(os.path.realpath(output)).parents if p.exists())
    free = shutil.disk_usage(ancestor).free
    if free < needed:
        raise MachineError(
            f"{output}: needs {needed:,} bytes and {ancestor} has {free:,} free; free some space or choose another disk"
        )


def replace_files(directory: Path, files: dict[str, bytes]) -> None:
    """Each file whole or as it was: written beside its place, then renamed. Others that do so meanwhile wait.

    What a killed one left is removed first.
    """
    with _locked(directory):
        _replace_files(directory, files)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    import fcntl

    fd = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace_files(directory: Path, files: dict[str, bytes]) -> None:
    for name in files:
        if (directory / name).is_dir():
            raise PruneAttnError(f"{directory / name}: is a directory where a file belongs; move it away")
    for path in directory.iterdir():
        if record.LEFTOVER.fullmatch(path.name) and not path.is_dir():  # a killed run's
            path.unlink(missing_ok=True)
    temporary = {name: directory / f".{name}.prune-attn-new-{secrets.token_hex(6)}" for name in files}
    try:
        for name, data in files.items():
            write_file(temporary[name], data, directory / name)
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
