"""A checkpoint directory: Hugging Face's (``config.json`` with safetensors or PyTorch files), or Meta's own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pruner.checkpoint.config import UNQUANTISED, check_not_quantised, check_tensors, read_decoder
from pruner.checkpoint.header import GGML, read_shard
from pruner.checkpoint.meta import PARAMS, meta_parts, read_meta
from pruner.checkpoint.pickled import read_pickled
from pruner.checkpoint.tensor import Shard, Tensor
from pruner.errors import PruneAttnError
from pruner.files import expand, parse_json, read_bounded, read_json
from pruner.llama import Decoder
from pruner.names import CONFIG, INDEX, PYTORCH, PYTORCH_INDEX, WEIGHTS

_CONFIG_BYTES = 4 << 20  # a pruned model of 10,000 layers has 3 MB


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing but ``config.json``, the index and the shards' headers has been read.

    ``tensors`` are the decoder's by Hugging Face's names, stored buffers such as ``rotary_emb.inv_freq`` left out.
    Where ``meta`` is true it is Meta's distribution: ``config`` is made from ``params.json``, whose hash
    ``config_sha256`` then is, and ``shards`` have Meta's names.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    config_sha256: str
    shards: tuple[Shard, ...] = field(repr=False)
    decoder: Decoder
    tensors: dict[str, Tensor] = field(repr=False)
    meta: bool = False

    @property
    def name(self) -> str:
        """What people call it: ``owner/name`` in the Hub's cache, elsewhere the directory's name."""
        path = self.path.resolve()
        if _in_hub_cache(path):
            return path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return os.fsencode(path.name).decode("utf-8", "replace")

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
        return "lm_head.weight" if "lm_head.weight" in self.tensors else "model.embed_tokens.weight"

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
        hub = {"repo_id": self.name, "commit": path.name} if _in_hub_cache(path) else None
        return {
            "name": self.name,
            **({"hub": hub} if hub else {}),
            "config_sha256": self.config_sha256,
            "shards": {s.path.name: {"size": s.size, "header_sha256": s.header_sha256} for s in self.shards},
        }


def _in_hub_cache(path: Path) -> bool:
    return path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")


def read_config(directory: Path) -> tuple[dict[str, Any], str]:
    """``config.json`` of a checkpoint directory and its SHA-256; ``PruneAttnError`` where there is no such thing."""
    path = directory / CONFIG
    if not path.is_file():
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
    if "adapter_config.json" in names:
        return "it holds an adapter (LoRA); merge it into its base model with PEFT's merge_and_unload() and give that"
    if _weights(directory) is None and any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        return f"its PyTorch files must be called {PYTORCH}, as its index says, or consolidated.00.pth and so on"
    if _weights(directory) is None and any(name.endswith(".safetensors") for name in names):
        return f"its safetensors must be called {WEIGHTS}, as its index says; if they are quantised, {UNQUANTISED}"
    return "give the directory that transformers' save_pretrained, a Hub download or Meta's download made"


def _weights(directory: Path) -> tuple[str, str, Callable[[Path], Shard]] | None:
    """The single file's name, the index's, and the reader; ``None`` where there are no weights of Hugging Face's."""
    for single, index, read in ((WEIGHTS, INDEX, read_shard), (PYTORCH, PYTORCH_INDEX, read_pickled)):
        if os.path.lexists(directory / single) or (directory / index).is_file():
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


def _check_index(index: Path, weight_map: dict[str, str], shards: Iterable[Shard]) -> None:
    owner: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in owner:
                raise PruneAttnError(
                    f"{shard.path}: tensor {name!r} is in {owner[name]} too; download the checkpoint again"
                )
            owner[name] = shard.path.name
    for name, file in weight_map.items():
        if owner.get(name) != file:
            where = f"it is in {owner[name]}" if name in owner else "it is not there"
            raise PruneAttnError(
                f"{index}: says that {name!r} is in {file}, but {where}; download the checkpoint again"
            )
    for name, file in owner.items():
        if name not in weight_map:
            raise PruneAttnError(f"{index}: tensor {name!r} of {file} is missing from it; download the index again")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Llama checkpoint directory, links followed: Hugging Face's, plain or pruned by this tool, or Meta's.

    Weights are taken from safetensors, else from PyTorch's files, whose pickles are never run, else from Meta's parts.
    Cost: ``config.json``, the index and the shards' headers; no weights are read. Every name and shape is checked
    against the configuration. Raises ``PruneAttnError`` with one line that names the file.
    """
    directory = expand(path)
    _check_directory(directory)
    weights = _weights(directory)
    if weights is None and meta_parts(directory):
        if not (directory / PARAMS).is_file():
            raise PruneAttnError(f"{directory / PARAMS}: is missing; it lies beside the parts in Meta's distribution")
        params, digest = _read_with_digest(directory / PARAMS)
        config, shards, decoder, tensors = read_meta(directory, params)
        return Checkpoint(directory, config, digest, shards, decoder, tensors, meta=True)
    config, digest = read_config(directory)
    check_not_quantised(config, directory / CONFIG)
    decoder = read_decoder(config, directory / CONFIG)
    if weights is None:
        raise PruneAttnError(
            f"{directory}: is not a checkpoint, it has no {WEIGHTS}, {INDEX} or {PYTORCH}; {_instead(directory)}"
        )
    single, index, read = weights
    names, weight_map = _shard_names(directory, single, index)
    shards = tuple(read(directory / name) for name in names)
    if weight_map is not None:
        _check_index(directory / index, weight_map, shards)
    check_tensors(decoder, shards, directory)
    expected = decoder.tensors()
    tensors = {t.name: t for shard in shards for t in shard.tensors.values() if t.name in expected}
    if decoder.tied and _same_place(tensors, "lm_head.weight", "model.embed_tokens.weight"):
        del tensors["lm_head.weight"]  # a PyTorch file names the one matrix twice
    return Checkpoint(directory, config, digest, shards, decoder, tensors)


def _same_place(tensors: dict[str, Tensor], a: str, b: str) -> bool:
    return a in tensors and b in tensors and replace(tensors[a], name=b) == tensors[b]
