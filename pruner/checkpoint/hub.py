"""Checkpoints by their Hub id: which files of a repository are needed, fetched into the Hub's own cache.

Everything over HTTP is ``huggingface_hub``'s, with the endpoint, token, cache and timeouts that its environment
variables and ``hf auth login`` set. Tokens are never read here but to keep them out of messages.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pruner.checkpoint.companions import is_companion
from pruner.checkpoint.directory import (
    CONFIG,
    INDEX,
    PYTORCH,
    PYTORCH_INDEX,
    WEIGHTS,
    Checkpoint,
    open_checkpoint,
)  # fmt: skip
from pruner.checkpoint.header import MAX_HEADER_BYTES
from pruner.checkpoint.meta import PARAMS, PART
from pruner.errors import MachineError, PruneAttnError
from pruner.files import expand, read_json

T = TypeVar("T")
Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, "fetching")

_ID = re.compile(r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_PLAN = "pruning_plan.json"  # of what was pruned before; percentages are of the never-pruned model
_BESIDES = (_PLAN, "README.md")  # the latter says licence and language
_TRIES = 4  # waiting 1, 2 and 4 seconds, or as long as the Hub says
_PATIENCE = 120  # the longest wait, in seconds, that the Hub may ask for
_FIRST = 100_000  # bytes: most headers are shorter, so that one request does


def is_hub_id(text: str) -> bool:
    """Whether this has the form of a Hub id, ``owner/name`` or ``name``."""
    return _ID.fullmatch(text) is not None


def names_repository(source: str | os.PathLike[str]) -> bool:
    """Whether ``find`` looks for it on the Hub: no path, and of the form of a Hub id."""
    return is_hub_id(os.fspath(source)) and not os.path.lexists(source)


def open_source(
    source: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Open a directory, or a Hub repository of safetensors of which only ``config.json`` and headers are read.

    What exists as a path is a path. The shards of a Hub checkpoint are not there yet: ``fetch`` brings them to where
    it says that they are. Raises ``PruneAttnError``, or ``MachineError`` where the Hub cannot be reached.
    """
    model = find(source, revision=revision, cache_dir=cache_dir)
    return open_checkpoint(source) if model is None else model.headers


def fetch(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    runtime: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The directory of a source: itself, or for a Hub id the snapshot in the cache, fetched as far as it is missing.

    Fetched are the configuration, the weights in one format (safetensors if there are any), the tokenizer, licence and
    so on; with ``runtime`` also ``model.onnx`` and ``genai_config.json``. Headers are checked before any weights are
    fetched. ``progress`` is called with (bytes, bytes in all, "fetching"). Raises as ``open_source`` does.
    """
    model = find(source, revision=revision, cache_dir=cache_dir)
    return expand(source) if model is None else model.fetch(runtime, progress)


def find(
    source: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> HubModel | None:
    """The Hub repository that ``source`` names, its revision made a commit; ``None`` where it names a path."""
    text = os.path.expanduser(os.fspath(source))
    if not names_repository(text):
        if revision is not None or cache_dir is not None:
            option = "--cache-dir" if revision is None else "--revision"
            raise PruneAttnError(f"{text}: is no Hub id, to which alone {option} belongs; leave it out")
        return None
    if revision == "" or (cache_dir is not None and not os.fspath(cache_dir)):
        raise PruneAttnError("--revision or --cache-dir is empty; give one, or leave it out")
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cache, api = None if cache_dir is None else str(expand(cache_dir)), HfApi()

    def look() -> HubModel:
        try:
            commit = str(api.model_info(text, revision=revision).sha)
            tree = list(api.list_repo_tree(text, recursive=True, revision=commit))
        except Exception as error:
            cached = try_to_load_from_cache(text, CONFIG, cache_dir=cache, revision=revision)
            if _status(error) or not _unreachable(error) or not isinstance(cached, str):
                raise
            return HubModel(text, Path(cached).parent.name, cache, None)
        sizes = {file.path: file.size for file in tree if hasattr(file, "size")}
        if CONFIG in sizes:  # by its revision, so that the cache knows later, offline, which commit that was
            hf_hub_download(text, CONFIG, revision=revision, cache_dir=cache)
        return HubModel(text, commit, cache, sizes)

    with quiet():
        return ask(look, text, revision=revision)


@dataclass(frozen=True)
class HubModel:
    """A repository at a commit. ``sizes`` has its files in bytes; ``None``: offline, what is cached has to do."""

    repo_id: str
    commit: str
    cache_dir: str | None
    sizes: dict[str, int] | None = field(repr=False)

    @property
    def has_headers(self) -> bool:
        """Whether it has safetensors, which can be opened from afar; PyTorch's files have to be fetched first."""
        return self.sizes is None or any(name in self.sizes for name in (WEIGHTS, INDEX))

    @cached_property
    def headers(self) -> Checkpoint:
        """It opened by its configuration and its headers, read by range requests where they are not in the cache."""
        if self.sizes is None:
            return self._cached()
        if not self.has_headers:
            what = "holds PyTorch weights" if self._pytorch() else "holds no weights"
            raise PruneAttnError(
                f"{self.repo_id}: {what} and no safetensors, whose headers alone can be read from afar; fetch it with "
                f"`hf download {self.repo_id} --local-dir DIR` and give DIR"
            )
        names = [CONFIG, _PLAN] + ([] if WEIGHTS in self.sizes else [INDEX])
        directory = self.download(names)
        with quiet(), tempfile.TemporaryDirectory(prefix="prune-attn-") as place, ThreadPoolExecutor(8) as pool:
            for name in names:
                if (directory / name).exists():
                    shutil.copyfile(directory / name, Path(place, name))
            list(
                pool.map(lambda name: self._stand_in(directory / name, Path(place, name)), self._safetensors(directory))
            )
            try:
                checkpoint = open_checkpoint(place)
            except PruneAttnError as error:
                raise type(error)(str(error).replace(place, self.repo_id)) from None
        return replace(checkpoint, path=directory)

    def fetch(self, runtime: bool = False, progress: Progress | None = None, also: Iterable[str] = ()) -> Path:
        """Fetch what is missing of it, ``also`` these files, into the cache; returns the snapshot's directory."""
        if self.sizes is None:
            return self._cached().path
        if self.has_headers:
            shards = [shard.path.name for shard in self.headers.shards]
            weights = [*shards, *([] if WEIGHTS in self.sizes else [INDEX])]
        else:
            weights = self._pytorch()
        if not weights:
            gguf = "GGUF and no" if any(name.endswith(".gguf") for name in self.sizes) else "no"
            raise PruneAttnError(
                f"{self.repo_id}: has {gguf} weights that can be read; give a repository with safetensors"
            )
        extra = ("model.onnx", "genai_config.json") if runtime else ()
        others = [n for n in self.sizes if is_companion(n) or n in (CONFIG, PARAMS, *_BESIDES, *extra)]
        return self.download([*others, *weights, *also], progress)

    def _safetensors(self, directory: Path) -> list[str]:
        """The weights' names; of a malformed index what can be had, for ``open_checkpoint`` says it better."""
        assert self.sizes is not None
        return [WEIGHTS] if WEIGHTS in self.sizes else self._indexed(directory / INDEX)

    def _indexed(self, index: Path) -> list[str]:
        assert self.sizes is not None
        try:
            named = set(read_json(index)["weight_map"].values())
        except (PruneAttnError, LookupError, TypeError, AttributeError):
            return []
        return [name for name in self.sizes if name in named and "/" not in name]

    def _pytorch(self) -> list[str]:
        """PyTorch's files, where there are no safetensors: the Hugging Face form, or else Meta's own."""
        assert self.sizes is not None
        if PYTORCH in self.sizes:
            return [PYTORCH]
        if PYTORCH_INDEX in self.sizes:
            return [PYTORCH_INDEX, *self._indexed(self.download([PYTORCH_INDEX]) / PYTORCH_INDEX)]
        return [name for name in self.sizes if PART.fullmatch(name)]

    def _stand_in(self, shard: Path, place: Path) -> None:
        """Make ``place`` look like ``shard`` to who reads headers: the header, and a hole as long as the data."""
        from huggingface_hub import hf_hub_url

        assert self.sizes is not None
        size, url = self.sizes[shard.name], hf_hub_url(self.repo_id, shard.name, revision=self.commit)

        def get(start: int, end: int) -> bytes:
            if shard.exists():  # in the cache already
                with open(shard, "rb") as file:
                    return os.pread(file.fileno(), end - start, start)
            return ask(lambda: _range(url, start, end), self.repo_id)

        raw = get(0, min(size, _FIRST))
        end = min(8 + int.from_bytes(raw[:8], "little"), size)
        if len(raw) < end <= 8 + MAX_HEADER_BYTES:
            raw += get(len(raw), end)
        with open(place, "wb") as file:
            file.write(raw[:end])
            file.truncate(size)

    def _cached(self) -> Checkpoint:
        from huggingface_hub import hf_hub_download

        with quiet():
            config = hf_hub_download(
                self.repo_id, CONFIG, revision=self.commit, cache_dir=self.cache_dir, local_files_only=True
            )
        try:
            return open_checkpoint(Path(config).parent)
        except PruneAttnError as error:
            raise PruneAttnError(
                f"{self.repo_id}: the Hub cannot be asked ({_why_not()}) and what is in the cache is not whole: {error}"
            ) from None

    def download(self, names: list[str], progress: Progress | None = None) -> Path:
        """Those of these files that it has, into the cache; an interrupt does not wait for a transfer of gigabytes."""
        from huggingface_hub import snapshot_download, try_to_load_from_cache

        assert self.sizes is not None

        def missing(name: str) -> bool:
            found = try_to_load_from_cache(self.repo_id, name, cache_dir=self.cache_dir, revision=self.commit)
            return not isinstance(found, str)

        names = [name for name in dict.fromkeys(names) if name in self.sizes]
        total, stop = sum(self.sizes[name] for name in names if missing(name)), threading.Event()
        bar = _bar(stop, total, progress if total else None)

        def get() -> Path:
            wanted = [glob.escape(name) for name in names]
            directory = Path(
                snapshot_download(
                    self.repo_id,
                    revision=self.commit,
                    cache_dir=self.cache_dir,
                    allow_patterns=wanted,
                    tqdm_class=bar,
                )
            )
            for name in names:  # where the Hub fails, the library may be content with what is there
                if not (directory / name).exists():
                    raise ConnectionError(f"{name} did not come")
            return directory

        with quiet():
            return beside(lambda: ask(get, self.repo_id), stop)


# -- asking the Hub ----------------------------------------------------------------------------------------------------


def ask(
    question: Callable[[], T], repo_id: str, *, revision: str | None = None, write: bool = False, again: bool = True
) -> T:
    """Call ``huggingface_hub``, once more after what passes by itself (429, 5xx, a lost connection).

    What it raises becomes one line that says what to do, without a token in it: ``PruneAttnError``, or
    ``MachineError`` where the Hub or the network failed. ``again=False``: what must not be done twice is not.
    """
    wait = 1.0
    for left in reversed(range(_TRIES)):
        try:
            return question()
        except PruneAttnError:
            raise
        except Exception as error:
            passes, seconds = _passes(error)
            if left and again and passes and (seconds or 0) <= _PATIENCE:
                time.sleep(wait if seconds is None else seconds)
                wait *= 2
                continue
            if isinstance(error, OSError) and error.errno and not _unreachable(error):
                raise  # the disk
            problem = explain(error, repo_id, revision, write)
        raise problem from None  # the library's own exceptions may carry headers
    raise AssertionError


def explain(error: BaseException, repo_id: str, revision: str | None = None, write: bool = False) -> PruneAttnError:
    """What went wrong at the Hub, in one line that says what to do about it."""
    from huggingface_hub import constants, errors, get_token

    page, status, chain = f"https://huggingface.co/{repo_id}", _status(error), list(_chain(error))

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if is_a(errors.GatedRepoError):
        then = f"then {log_in}" if get_token() is None else "with the account that your token belongs to"
        return PruneAttnError(f"{repo_id}: is gated; accept its licence at {page}, {then}")
    if is_a(errors.RevisionNotFoundError):
        return PruneAttnError(
            f"{repo_id}: has no revision {revision or 'main'!r}; give a branch, a tag or a commit of it with --revision"
        )
    if is_a(errors.LocalTokenNotFoundError):
        return PruneAttnError(f"{repo_id}: no token is set; {log_in}")
    if is_a(errors.RepositoryNotFoundError) or (status == 404 and not is_a(errors.EntryNotFoundError)):
        hint = log_in if get_token() is None else "use a token that may see it"
        no_path = "" if write else "there is no such directory, and "
        return PruneAttnError(
            f"{repo_id}: {no_path}on the Hub it is missing or private ({status or 404}); check the name, or {hint}"
        )
    if status == 401:
        return PruneAttnError(f"{repo_id}: the Hub does not accept your token (401); log in again with `hf auth login`")
    if status == 403:
        need = "that may write to it" if write else "that may read it"
        return PruneAttnError(f"{repo_id}: the Hub forbids it (403{_said(error)}); use a token {need}: {log_in}")
    if status in (409, 412):
        return PruneAttnError(f"{repo_id}: was changed by somebody else meanwhile ({status}{_said(error)}); try again")
    if status == 429:
        after = _retry_after(error)
        when = f"after {after} seconds" if after else "later"
        return MachineError(f"{repo_id}: the Hub has had too many requests from you (429); try again {when}")
    if status and status >= 500:
        return MachineError(f"{repo_id}: the Hub fails ({status}); try again later, what is done stays done")
    if status:
        return PruneAttnError(f"{repo_id}: the Hub refuses ({status}{_said(error)})")
    if constants.HF_HUB_OFFLINE:
        return PruneAttnError(
            f"{repo_id}: there is no such directory, and it is not in the Hub's cache; HF_HUB_OFFLINE keeps from "
            "fetching it, unset it"
        )
    if is_a(UnicodeEncodeError) or "Illegal header value" in str(chain[-1]):
        return PruneAttnError(f"{repo_id}: your token has characters in it that no token has; {log_in}")
    text = _without_token(" ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split()))[:200]
    if _unreachable(error):
        return MachineError(
            f"{repo_id}: {'' if write else 'is no directory here, and '}{constants.ENDPOINT} cannot be reached, or the "
            f"connection was lost ({text}); check the network and run it again, what is done stays done"
        )
    return MachineError(f"{repo_id}: the Hub's answer could not be used ({text})")


def _chain(error: BaseException) -> Iterable[BaseException]:
    """The error and what caused it, the outermost first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return seen


def _response(error: BaseException) -> Any:
    return next((r for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None)


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)


def _retry_after(error: BaseException) -> int | None:
    value = str(getattr(_response(error), "headers", {}).get("Retry-After", ""))
    return int(value) if value.isdigit() else None


def _said(error: BaseException) -> str:
    """The Hub's own words, where it has any."""
    words = next((w for e in _chain(error) if (w := getattr(e, "server_message", None))), None)
    return f": {_without_token(' '.join(str(words).split()))[:160]}" if words else ""


def _unreachable(error: BaseException) -> bool:
    """Whether no answer came: the HTTP library's own errors, by whichever library it is, and what wraps them."""
    from huggingface_hub import errors

    libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    return any(
        type(e).__module__.split(".")[0] in libraries
        or isinstance(e, (ConnectionError, TimeoutError, errors.OfflineModeIsEnabled))
        or "Consistency check failed" in str(e)  # the connection ended early
        for e in _chain(error)
    )


def _passes(error: BaseException) -> tuple[bool, int | None]:
    """Whether it may be gone the next time, and the seconds that the Hub asks to wait."""
    from huggingface_hub import constants

    status = _status(error)
    if status is None:
        return _unreachable(error) and not constants.HF_HUB_OFFLINE, None
    return status in (408, 429, 500, 502, 503, 504), _retry_after(error)


def _why_not() -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "<token>") if token else text
    return re.sub(r"hf_\w{6,}|(?<=Bearer )[^\s'\"]+", "<token>", text)


def _range(url: str, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end``, the latter not included."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    response = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    return response.content[: end - start] if response.status_code == 206 else response.content[start:end]


class quiet:  # noqa: N801, a context manager
    """The library's warnings about retries would be lines of their own beside the one that counts."""

    def __enter__(self) -> None:
        from huggingface_hub.utils import logging

        self.before = logging.get_verbosity()
        if not os.environ.get("HF_HUB_VERBOSITY") and not os.environ.get("HF_DEBUG"):
            logging.set_verbosity(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils import logging

        logging.set_verbosity(self.before)


def beside(work: Callable[[], T], stop: threading.Event | None = None) -> T:
    """Run ``work`` in a thread of its own: an interrupt of the main thread then need not wait for its end.

    ``stop`` is set at an interrupt, and the thread given a moment to end by itself; what it was fetching is removed.
    """
    out: list[Any] = []

    def run() -> None:
        try:
            out.append((work(), None))
        except BaseException as error:
            out.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():  # by turns: a signal that another thread takes does not wake a join without an end
            thread.join(0.2)
    except BaseException:
        if stop is not None:
            stop.set()
            thread.join(1)
            _remove_incomplete()
        raise
    value, error = out[0]
    if error is not None:
        raise error
    return value


def _remove_incomplete() -> None:
    """Remove the half-fetched files that this process has open (and no other's), where the system can tell."""
    for link in Path("/proc/self/fd").glob("*"):
        try:
            file = os.readlink(link)
        except OSError:
            continue
        if file.endswith(".incomplete"):
            Path(file).unlink(missing_ok=True)


def _bar(stop: threading.Event, total: int, progress: Progress | None) -> type:
    """What ``huggingface_hub`` counts its bytes with: shows nothing, tells ``progress``, ends at ``stop``."""
    from tqdm import tqdm

    counts: dict[int, float] = {}  # it may keep two bars, of bytes received and of bytes written

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": True}))
            self.bytes = kwargs.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise InterruptedError("stopped")
            self.n += n or 0
            if self.bytes and progress:
                counts[id(self)] = self.n
                progress(int(min(max(counts.values()), total)), total, "fetching")

    return Bar
