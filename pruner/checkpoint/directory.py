"""A Hugging Face checkpoint directory: ``config.json`` and one safetensors file, or many with an index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pruner.checkpoint.header import Shard, Tensor, no_duplicates, read_shard
from pruner.errors import PruneAttnError
from pruner.llama import Decoder, check_not_quantised, check_tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing but ``config.json``, the index and the shards' headers has been read."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    config_sha256: str
    shards: tuple[Shard, ...] = field(repr=False)
    decoder: Decoder

    @property
    def name(self) -> str:
        """What people call it: ``owner/name`` in the Hub's cache, elsewhere the directory's name."""
        path = self.path.resolve()
        if _in_hub_cache(path):
            return path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return os.fsencode(path.name).decode("utf-8", "replace")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the decoder by name, stored buffers such as ``rotary_emb.inv_freq`` left out."""
        expected = self.decoder.tensors()
        found = {t.name: t for shard in self.shards for t in shard.tensors.values()}
        return {name: tensor for name, tensor in found.items() if name in expected}

    @property
    def parameters(self) -> int:
        """Number of stored parameters (tied embeddings count once)."""
        return sum(t.parameters for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of weights, headers not counted."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The safetensors dtypes in it, the one with the most bytes first."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return tuple(sorted(sizes, key=lambda d: (-sizes[d], d)))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this checkpoint in a plan: SHA-256 of the config and of every shard's header.

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


def read_json(path: Path) -> tuple[Any, str]:
    """A JSON file's value and the SHA-256 of its bytes. Raises ``PruneAttnError`` when it is not JSON."""
    raw = path.read_bytes()

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=refuse)
        return value, hashlib.sha256(raw).hexdigest()
    except (ValueError, RecursionError) as error:
        raise PruneAttnError(f"{path}: is not JSON ({str(error)[:120]}); download or write it again") from None


def read_config(directory: Path) -> tuple[dict[str, Any], str]:
    """``config.json`` of a checkpoint directory and its SHA-256; ``PruneAttnError`` where there is no such thing."""
    try:
        exists = directory.exists()
    except OSError:  # a name that no file system can have
        exists = False
    if not exists:
        raise PruneAttnError(f"{directory}: no such directory; give the path of a Llama checkpoint")
    if not directory.is_dir():
        raise PruneAttnError(f"{directory}: is a file; give the checkpoint's directory, which holds {CONFIG}")
    path = directory / CONFIG
    if not path.is_file():
        if any(directory.glob("*.gguf")):
            hint = "it holds GGUF; convert from the Hugging Face safetensors checkpoint it was made from"
        elif any(directory.glob("consolidated.*.pth")):
            hint = "it holds Meta's own .pth files; give the Hugging Face form (the repository whose name ends in -hf)"
        else:
            hint = "give the directory that transformers' save_pretrained or a Hub download made"
        raise PruneAttnError(f"{directory}: is not a checkpoint, there is no {CONFIG} in it; {hint}")
    config, digest = read_json(path)
    if not isinstance(config, dict):
        raise PruneAttnError(f"{path}: is not a JSON object; download it again")
    return config, digest


def _shard_names(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The shards' file names, and the index's weight map where an index says so."""
    if os.path.lexists(directory / WEIGHTS):  # transformers, too, takes the single file where both exist
        return [WEIGHTS], None
    index_path = directory / INDEX
    if not index_path.is_file():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
            raise PruneAttnError(
                f"{directory}: holds PyTorch weights (.bin or .pth) and no safetensors; convert them first: "
                "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW)"
            )
        if any(directory.glob("*.gguf")):
            raise PruneAttnError(f"{directory}: holds GGUF; convert from the safetensors checkpoint it was made from")
        raise PruneAttnError(f"{directory}: is not a checkpoint, there is no {WEIGHTS} and no {INDEX} in it")
    index, _ = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
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
    """Open a Llama checkpoint directory (safetensors, sharded or not, links followed), plain or pruned by this tool.

    Cost: ``config.json``, the index and the shards' headers; no weights are read. Every name and shape is checked
    against the configuration. Raises ``PruneAttnError`` with one line that names the file.
    """
    directory = Path(path)
    config, digest = read_config(directory)
    check_not_quantised(config, directory / CONFIG)
    decoder = Decoder.from_config(config, directory / CONFIG)
    names, weight_map = _shard_names(directory)
    shards = tuple(read_shard(directory / name) for name in names)
    if weight_map is not None:
        _check_index(directory / INDEX, weight_map, shards)
    check_tensors(decoder, shards, directory)
    return Checkpoint(directory, config, digest, shards, decoder)
