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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pruner.checkpoint.companions import is_companion
from pruner.checkpoint.directory import Checkpoint, open_checkpoint
from pruner.checkpoint.header import MAX_HEADER_BYTES
from pruner.checkpoint.meta import PARAMS, PART
from pruner.errors import PruneAttnError
from pruner.files import expand, read_json
from pruner.hub.client import _range, _status, _unreachable, _why_not, ask, beside, quiet
from pruner.names import ADAPTER, CARD, CONFIG, GENAI_CONFIG, GRAPH, INDEX, PLAN_FILE, PYTORCH, PYTORCH_INDEX, WEIGHTS
from pruner.progress import Progress, Step

_ID = re.compile(r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_BESIDES = (PLAN_FILE, CARD)  # what was pruned before; licence and language
_FIRST = 100_000  # bytes: most headers are shorter, so that one request does


def is_hub_id(text: str) -> bool:
    """Whether this has the form of a Hub id, ``owner/name`` or ``name``."""
    return _ID.fullmatch(text) is not None


def names_repository(source: str | os.PathLike[str]) -> bool:
    """Whether ``find`` looks for it on the Hub: no path, and of the form of a Hub id."""
    return is_hub_id(os.fspath(source)) and not os.path.lexists(source)


@dataclass(frozen=True)
class Revision:
    """Where a Hub id is looked up: at which branch, tag or commit (default: main), through which cache."""

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None


def open_source(source: str | os.PathLike[str], hub: Revision = Revision()) -> Checkpoint:
    """Open a directory, or a Hub repository of safetensors of which only ``config.json`` and headers are read.

    What exists as a path is a path. The shards of a Hub checkpoint are not there yet: ``fetch`` brings them to where
    it says that they are. Raises ``PruneAttnError``, or ``MachineError`` where the Hub cannot be reached.
    """
    model = find(source, hub)
    return open_checkpoint(source) if model is None else model.headers


def fetch(
    source: str | os.PathLike[str],
    hub: Revision = Revision(),
    *,
    runtime: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The directory of a source: itself, or for a Hub id the snapshot in the cache, fetched as far as it is missing.

    Fetched are the configuration, the weights in one format (safetensors if there are any), the tokenizer, licence and
    so on; with ``runtime`` also ``model.onnx`` and ``genai_config.json``. Headers are checked before any weights are
    fetched. ``progress`` counts bytes. Raises as ``open_source`` does.
    """
    model = find(source, hub)
    return expand(source) if model is None else model.fetch(runtime, progress)


def find(source: str | os.PathLike[str], hub: Revision = Revision()) -> HubModel | None:
    """The Hub repository that ``source`` names, its revision made a commit; ``None`` where it names a path."""
    text, revision, cache_dir = os.path.expanduser(os.fspath(source)), hub.revision, hub.cache_dir
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
        names = [CONFIG, PLAN_FILE, ADAPTER] + ([] if WEIGHTS in self.sizes else [INDEX])
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
        return replace(checkpoint, path=directory, seen={}, companions={})

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
        extra = (GRAPH, GENAI_CONFIG) if runtime else ()
        others = [n for n in self.sizes if is_companion(n) or n in (CONFIG, PARAMS, ADAPTER, *_BESIDES, *extra)]
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
        begun = Step("fetching", 0, total, "bytes", self.repo_id, total / 5e7)
        bar = _bar(stop, begun, progress if total else None)
        if progress is not None and total:
            progress(begun)

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


def _bar(stop: threading.Event, begun: Step, progress: Progress | None) -> type:
    """What ``huggingface_hub`` counts its bytes with: shows nothing, tells ``progress``, ends at ``stop``."""
    from tqdm import tqdm

    counts: dict[int, float] = {}  # it may keep two bars, of bytes received and of bytes written

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": True}))
            self.bytes = kwargs.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise InterruptedError("stopped")
            self.n += n or 0
            if self.bytes and progress is not None:
                counts[id(self)] = self.n
                done = int(min(max(counts.values()), begun.total))
                progress(replace(begun, done=done))

    return Bar
