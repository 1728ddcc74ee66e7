"""A pruned directory to the Hub: only what verifies, only what prune-attn wrote, again where it was interrupted."""

from __future__ import annotations

import glob
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.card import load_card, name_repository, read_card
from export.licence import licence_notes, llama_licence
from export.shards import SHARD_NAME
from export.verify import verify
from pruner import __version__
from pruner.errors import PruneAttnError
from pruner.files import expand
from pruner.hub.client import ask, beside, quiet
from pruner.hub.source import is_hub_id
from pruner.names import CARD, PLAN_FILE
from pruner.nemotron_nas.dialect import CODE_FILES
from pruner.progress import Progress, Step
from pruner.record import read_record

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

# What an earlier push may have left that this one does not replace: a loader would take it for part of this model.
_OURS = re.compile(
    SHARD_NAME.pattern
    + r"|model\.safetensors\.index\.json|model\.onnx|genai_config\.json|report/.+|"
    + "|".join(map(re.escape, CODE_FILES))
)


@dataclass(frozen=True)
class Push:
    """What ``push`` did, or would do (``dry_run``). ``files`` have sizes in bytes; ``removed`` are stale ones there."""

    repo_id: str
    files: dict[str, int]
    dry_run: bool
    url: str | None = None  # the commit's address
    commit: str | None = None
    pull_request: str | None = None
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))


def check_can_push(repo_id: str, *, dry_run: bool = False) -> None:
    """Refuse, before any work, a name that the Hub will not take, or a push without a token or network."""
    if not is_hub_id(repo_id):
        raise PruneAttnError(f"{repo_id!r} is no name for a repository; write owner/name, of letters, digits and -_.")
    if dry_run:
        return
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise PruneAttnError(f"{repo_id}: HF_HUB_OFFLINE keeps from pushing to it; unset it")
    if get_token() is None:
        raise PruneAttnError(f"{repo_id}: pushing needs a token; log in with `hf auth login`, or set HF_TOKEN")


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Push:
    """Push a directory that ``convert`` wrote to the Hub as one commit, by ``upload_folder``; makes the repository.

    What does not ``verify`` is refused, and so are links that lead out of the directory. Uploaded are the files that
    the record lists, the record itself, the card (its snippets then name ``repo_id``) and ``report/``. After an
    interruption the same call goes on: what is there already is not sent again. ``revision`` is a branch (made where
    there is none) or ``refs/pr/N``; ``create_pr`` opens a pull request instead. ``repo_id`` without an owner is the
    token's. ``progress`` counts bytes, in a pipe only where it begins and ends. Raises ``PruneAttnError``, or
    ``MachineError`` where the Hub or the network fails.
    """
    directory = expand(directory)
    if create_pr and revision is not None:
        raise PruneAttnError(
            "--create-pr opens a pull request against the main branch; leave --revision out (or, to go on with a pull "
            "request that is open, give --revision refs/pr/N alone)"
        )
    check_can_push(repo_id, dry_run=dry_run)
    files = _checked_files(directory)
    notes = licence_notes(llama_licence(directory, read_card(directory)), directory, repo_id)
    if dry_run:
        return Push(repo_id, files, True, notes=notes)

    from huggingface_hub import HfApi

    api = HfApi(library_name="prune-attn", library_version=__version__)
    terminal = progress is not None and sys.stderr.isatty()
    with quiet(), _bars(terminal), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if "/" not in repo_id:
            repo_id = f"{ask(api.whoami, repo_id, write=True)['name']}/{repo_id}"

        there = ask(lambda: _prepare(api, repo_id, private, revision), repo_id, revision=revision, write=True)
        stale = [name for name in there if _OURS.fullmatch(name) and name not in files]
        name_repository(directory, repo_id)
        files = _files(directory)
        total = sum(files.values())
        if progress is not None and not terminal:
            progress(Step("pushing", 0, total, "bytes", repo_id, total / 2e7))
        what = {
            "revision": revision,
            "create_pr": create_pr,
            "commit_message": commit_message or f"Upload a model pruned by prune-attn {__version__}",
            "delete_patterns": [glob.escape(name) for name in stale] or None,
        }
        done = beside(lambda: _upload(api, directory, repo_id, files, what))
    if progress is not None and not terminal:
        progress(Step("pushing", total, total, "bytes", repo_id, total / 2e7))
    notes += [" ".join(str(w.message).split()) for w in said if CARD in str(w.message)]
    return Push(repo_id, files, False, done.commit_url, done.oid, done.pr_url, stale, notes)


def _checked_files(directory: Path) -> dict[str, int]:
    """What is pushed, by name, with sizes. ``PruneAttnError`` for a directory that does not verify."""
    if not directory.is_dir():
        raise PruneAttnError(f"{directory}: no such directory; give one that prune-attn convert wrote")
    problems = verify(directory).problems
    if problems:
        raise PruneAttnError(f"{directory}: is not pushed, for it does not verify: {problems[0]}")
    load_card(directory)  # which checks it
    return _files(directory)


def _upload(api: HfApi, directory: Path, repo_id: str, files: Iterable[str], what: dict[str, Any]) -> CommitInfo:
    """One commit; tried again after what passes by itself, but for a pull request, of which it might open a second."""
    wanted = [glob.escape(name) for name in files]
    return ask(
        lambda: api.upload_folder(repo_id=repo_id, folder_path=directory, allow_patterns=wanted, **what),
        repo_id,
        revision=what["revision"],
        write=True,
        again=not what["create_pr"],
    )


def _prepare(api: HfApi, repo_id: str, private: bool, revision: str | None) -> list[str]:
    """Make repository and branch where there are none; the names of the files that are there."""
    if not api.repo_exists(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise PruneAttnError(
            f"{repo_id}: exists already and is public, so --private cannot be kept; make it private in its settings, "
            "or choose another name"
        )
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return _present(api, repo_id, revision)


def _files(directory: Path) -> dict[str, int]:
    """What is pushed, by name, with sizes. ``PruneAttnError`` for what leads out of the directory."""
    facts = read_record(directory)
    assert facts is not None  # verified
    names = {*facts["files"], PLAN_FILE, CARD}
    for root, folders, found in os.walk(directory / "report"):
        folders[:] = [name for name in folders if not _temporary(name)]
        here = Path(root).relative_to(directory)
        links = [name for name in folders if Path(root, name).is_symlink()]  # not walked into, but not passed over
        names |= {(here / name).as_posix() for name in [*found, *links] if not _temporary(name)}
    inside = Path(os.path.realpath(directory))
    sizes = {}
    for name in sorted(names):
        path = directory / name
        if inside not in Path(os.path.realpath(path)).parents:
            raise PruneAttnError(
                f"{path}: leads out of the directory and is not pushed; put the file itself there "
                f"(`cp -rL {directory} COPY` makes files of all links)"
            )
        if not path.is_file():
            raise PruneAttnError(f"{path}: is missing or is no file; convert again")
        sizes[name] = path.stat().st_size
    return sizes


def _temporary(name: str) -> bool:
    return name.startswith((".", "__")) or name.endswith(("~", ".tmp", ".swp", ".part", ".incomplete"))


def _present(api: Any, repo_id: str, revision: str | None) -> list[str]:
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        return api.list_repo_files(repo_id, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):  # nothing was committed yet
        return []


@contextmanager
def _bars(show: bool) -> Iterator[None]:
    """``huggingface_hub``'s own display of an upload, which alone knows the bytes sent; on a terminal only."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
