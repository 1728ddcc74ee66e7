"""A checkpoint directory: Hugging Face's (``config.json`` with safetensors or PyTorch files), or Meta's own."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pruner.checkpoint.companions import companion_files
from pruner.checkpoint.config import (
    QUANTISATION,
    UNQUANTISED,
    check_tensors,
    is_buffer,
    quantisation,
    quantised,
    read_decoder,
)
from pruner.checkpoint.header import GGML, read_shard
from pruner.checkpoint.meta import PARAMS, meta_parts, read_meta
from pruner.checkpoint.meta_files import tokenizer_file
from pruner.checkpoint.pickled import read_pickled
from pruner.checkpoint.tensor import OpenFiles, Shard, Tensor, read_blocks
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.files import Stamp, check_unchanged, expand, in_hub_cache, parse_json, read_bounded, read_json, stamp
from pruner.llama import EMBEDDING, HEAD, Decoder
from pruner.names import ADAPTER, CONFIG, INDEX, PLAN_FILE, PYTORCH, PYTORCH_INDEX, WEIGHTS

READ = (CONFIG, INDEX, PYTORCH_INDEX, PARAMS, PLAN_FILE)  # small files that say what a checkpoint is
_MERGE = "it holds an adapter (LoRA); merge it into its base model with PEFT's merge_and_unload() and give that"
_CONFIG_BYTES = 4 << 20  # a pruned model of 10,000 layers has 3 MB


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing but ``config.json``, the index and the shards' headers has been read.

    ``tensors`` are the decoder's by Hugging Face's names, stored buffers such as ``rotary_emb.inv_freq`` left out.
    Where ``meta`` is true it is Meta's distribution: ``config`` is made from ``params.json``, whose hash
    ``config_sha256`` then is, and ``shards`` have Meta's names. ``notes`` tell where ``config`` and ``tensors`` say
    otherwise than the files, since the files contradict each other. ``companions`` are the files that come along, by
    relative name. ``seen``: what all these files were, by path, when this was opened.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    config_sha256: str
    shards: tuple[Shard, ...] = field(repr=False)
    decoder: Decoder
    tensors: dict[str, Tensor] = field(repr=False)
    meta: bool = False
    notes: tuple[str, ...] = ()
    companions: Mapping[str, Path] = field(default_factory=dict, repr=False)
    seen: Mapping[Path, Stamp | None] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """What people call it: ``owner/name`` in the Hub's cache, elsewhere the directory's name."""
        path = self.path.resolve()
        if in_hub_cache(path):
            return path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return os.fsencode(path.name).decode("utf-8", "replace")

    def check_unchanged(self) -> None:
        """Raise ``PruneAttnError`` where a file that this was read from, or one that comes along, changed since."""
        check_unchanged(self.seen)

    @property
    def parameters(self) -> int:
        """Number of stored parameters (tied embeddings count once)."""
        return sum(t.parameters for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of weights, headers not counted."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def head(self) -> str:
        """The name of the output head: its own, also where the model is tied and has one, or the embedding's."""
        return HEAD if HEAD in self.tensors else EMBEDDING

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The safetensors dtypes in it, the one with the most bytes first."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return tuple(sorted(sizes, key=lambda d: (-sizes[d], d)))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this checkpoint in a plan: SHA-256 of the config and of each ``Shard``'s header.

        In the Hub's cache also the repository and its commit (``hub``).
        """
        path = self.path.resolve()
        hub = {"repo_id": self.name, "commit": path.name} if in_hub_cache(path) else None
        return {
            "name": self.name,
            **({"hub": hub} if hub else {}),
            "config_sha256": self.config_sha256,
            "shards": {s.path.name: {"size": s.size, "header_sha256": s.header_sha256} for s in self.shards},
        }


def read_config(directory: Path) -> tuple[dict[str, Any], str]:
    """``config.json`` of a checkpoint directory and its SHA-256; ``PruneAttnError`` where there is no such thing."""
    path = directory / CONFIG
    if not os.path.lexists(path):
        raise PruneAttnError(f"{directory}: is not a checkpoint, there is no {CONFIG} in it; {_instead(directory)}")
    return _read_with_digest(path)


def _read_with_digest(path: Path) -> tuple[dict[str, Any], str]:
    raw = read_bounded(path, _CONFIG_BYTES)
    return parse_json(raw, path), hashlib.sha256(raw).hexdigest()


def _check_directory(directory: Path) -> None:
    try:
        exists = directory.exists()
    except OSError:  # a name that no file system can have
        exists = False
    if not exists:
        raise PruneAttnError(f"{directory}: no such directory; give the path of a Llama checkpoint")
    if not directory.is_dir():
        if _is_ggml(directory):
            raise PruneAttnError(f"{directory}: is GGUF (llama.cpp); {UNQUANTISED}")
        raise PruneAttnError(f"{directory}: is a file; give the checkpoint's directory, which holds {CONFIG}")


def _is_ggml(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file() or path.stat().st_size < 4:
        return False
    with open(path, "rb") as file:
        return file.read(4) in GGML


def _instead(directory: Path) -> str:
    """What a directory without weights that can be read holds instead, and what to do."""
    names = [path.name for path in directory.iterdir()]
    if any(_is_ggml(directory / name) for name in names):
        return f"it holds GGUF (llama.cpp); {UNQUANTISED}"
    for file, method in (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")):
        if file in names:
            return f"it is quantised ({method}, says {file}); {UNQUANTISED}"
    if ADAPTER in names:
        return _MERGE
    if _weights(directory) is not None:
        return f"download {CONFIG} too"
    for suffix, index in ((".safetensors", INDEX), (".bin", PYTORCH_INDEX)):
        if any(re.search(rf"-\d+-of-\d+{suffix}$", name) for name in names):
            return f"it holds shards without their index; download {index} too"
    if any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        return f"its PyTorch files must be called {PYTORCH}, or consolidated.00.pth and so on if it is Meta's"
    if any(name.endswith(".safetensors") for name in names):
        return f"its safetensors must be called {WEIGHTS}; if they are quantised, {UNQUANTISED}"
    return "give the directory that transformers' save_pretrained, a Hub download or Meta's download made"


def _weights(directory: Path) -> tuple[str, str, Callable[[Path], Shard]] | None:
    """The single file's name, the index's, and the reader; ``None`` where there are no weights of Hugging Face's."""
    for single, index, read in ((WEIGHTS, INDEX, read_shard), (PYTORCH, PYTORCH_INDEX, read_pickled)):
        if os.path.lexists(directory / single) or os.path.lexists(directory / index):
            return single, index, read
    return None


def _shard_names(directory: Path, single: str, index: str) -> tuple[list[str], dict[str, str] | None]:
    """The shards' file names, and the index's weight map where an index says so."""
    if os.path.lexists(directory / single):  # transformers, too, takes the single file where both exist
        return [single], None
    index_path = directory / index
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise PruneAttnError(f"{index_path}: has no weight_map; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or not name.isprintable() or len(name) > 200:
            raise PruneAttnError(f"{index_path}: names the shard {name!r}, which is not a file beside it")
    return names, weight_map


def _check_index(index: Path, weight_map: dict[str, str], shards: Iterable[Shard], may_differ: Iterable[str]) -> None:
    """Refuse an index that contradicts the shards, but for what is recomputed or ``may_differ``."""
    owner: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in owner:
                raise PruneAttnError(
                    f"{shard.path}: tensor {name!r} is in {owner[name]} too; download the checkpoint again"
                )
            owner[name] = shard.path.name
    for name, file in weight_map.items():
        if owner.get(name) != file and not (is_buffer(name) or name in may_differ):
            where = f"it is in {owner[name]}" if name in owner else "it is not there"
            raise PruneAttnError(
                f"{index}: says that {name!r} is in {file}, but {where}; download the checkpoint again"
            )
    for name, file in owner.items():
        if name not in weight_map and not (is_buffer(name) or name in may_differ):
            raise PruneAttnError(f"{index}: tensor {name!r} of {file} is missing from it; download the index again")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Llama checkpoint directory, links followed: Hugging Face's, plain or pruned by this tool, or Meta's.

    Weights are taken from safetensors, else from PyTorch's files, whose pickles are never run, else from Meta's parts.
    Cost: ``config.json``, the index and the shards' headers; of the weights only the head of a tied model that has
    one. Every name and shape is checked against the configuration. Raises ``PruneAttnError`` with one line that names
    the file.
    """
    directory = expand(path)
    _check_directory(directory)
    found = {file: stamp(file) for file in directory.iterdir()}  # before anything is read
    checkpoint = _open(directory)
    along = companion_files(directory, meta=checkpoint.meta)
    files = [*(shard.path for shard in checkpoint.shards), *along.values()]
    files += [directory / name for name in READ if directory / name in found]
    if checkpoint.meta and (tokenizer := tokenizer_file(directory)):
        files.append(tokenizer)
    seen = {file: found[file] if file in found else stamp(file) for file in files}
    return replace(checkpoint, companions=along, seen=seen)


def _open(directory: Path) -> Checkpoint:
    weights = _weights(directory)
    if weights is None and meta_parts(directory):
        if not (directory / PARAMS).is_file():
            raise PruneAttnError(f"{directory / PARAMS}: is missing; it lies beside the parts in Meta's distribution")
        params, digest = _read_with_digest(directory / PARAMS)
        config, shards, decoder, tensors = read_meta(directory, params)
        return Checkpoint(directory, config, digest, shards, decoder, tensors, meta=True)
    config, digest = read_config(directory)
    if weights is None and quantisation(config) is None:
        raise PruneAttnError(
            f"{directory}: is not a checkpoint, it has no {WEIGHTS}, {INDEX} or {PYTORCH}; {_instead(directory)}"
        )
    if (directory / ADAPTER).is_file():  # transformers applies it where PEFT is installed
        raise PruneAttnError(f"{directory}: {_MERGE}; if the weights beside it are merged already, remove {ADAPTER}")
    claim = quantisation(config)
    if claim is not None:
        raise quantised(config, directory / CONFIG, *claim, _plain_dtype(directory, config))
    assert weights is not None
    checkpoint = Checkpoint(directory, config, digest, *_read(directory, config, *weights))
    return _untied(_without_flags(checkpoint))


def _read(
    directory: Path, config: dict[str, Any], single: str, index: str, read: Callable[[Path], Shard]
) -> tuple[tuple[Shard, ...], Decoder, dict[str, Tensor]]:
    """Shards, decoder and the decoder's tensors, each checked against the others."""
    decoder = read_decoder(config, directory / CONFIG)
    names, weight_map = _shard_names(directory, single, index)
    shards = tuple(read(directory / name) for name in names)
    if weight_map is not None:
        _check_index(directory / index, weight_map, shards, (HEAD, EMBEDDING) if decoder.tied else ())
    check_tensors(decoder, shards, directory)
    expected = decoder.tensors()
    tensors = {t.name: t for shard in shards for t in shard.tensors.values() if t.name in expected}
    if decoder.tied and EMBEDDING not in tensors:  # of two names of one matrix safetensors' save_model keeps the other
        tensors[EMBEDDING] = replace(tensors.pop(HEAD), name=EMBEDDING)
    elif decoder.tied and _same_place(tensors, HEAD, EMBEDDING):
        del tensors[HEAD]  # a PyTorch file names the one matrix twice
    return shards, decoder, tensors


def _plain_dtype(directory: Path, config: dict[str, Any]) -> str | None:
    """float16 and so on where the weights are whole and not quantised, whatever ``config`` says of it."""
    try:
        weights = _weights(directory)
        assert weights is not None
        _, _, tensors = _read(directory, config, *weights)
    except (PruneAttnError, AssertionError):
        return None
    return WEIGHT_DTYPES[next(iter(tensors.values())).dtype]


def _without_flags(checkpoint: Checkpoint) -> Checkpoint:
    """Without fields that say of quantisation that there is none: engines ask for bitsandbytes all the same."""
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANTISATION}
    return replace(checkpoint, config=config)


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """Where a tied model has a head of its own that differs, ``config`` says so: else readers take one or the other.

    Cost: both matrices are read, only where there are both.
    """
    tensors = checkpoint.tensors
    if not checkpoint.decoder.tied or HEAD not in tensors or _equal(tensors[HEAD], tensors[EMBEDDING]):
        return checkpoint
    note = (
        f"{CONFIG} of the source says tie_word_embeddings: true, but its {HEAD} is not its embedding, and some engines "
        "would take one, some the other; the output says false and uses the head, as transformers 5 does"
    )
    config, decoder = checkpoint.config | {"tie_word_embeddings": False}, replace(checkpoint.decoder, tied=False)
    return replace(checkpoint, config=config, decoder=decoder, notes=(*checkpoint.notes, note))


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and _digest(a) == _digest(b)


def _digest(tensor: Tensor) -> bytes:
    found = hashlib.sha256()
    with OpenFiles() as files:
        for block in read_blocks(tensor, files):
            found.update(block)
    return found.digest()


def _same_place(tensors: dict[str, Tensor], a: str, b: str) -> bool:
    return a in tensors and b in tensors and replace(tensors[a], name=b) == tensors[b]
