"""A pruned directory that was trained further: a plan and a card for it, marked as changed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export import record
from export.card import retrained_card
from export.companions import check_delivered, companions, content
from export.onnx import GraphOptions
from export.staging import replace_files
from pruner import __version__
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.checkpoint.companions import LICENCE, is_companion
from pruner.errors import PruneAttnError
from pruner.files import expand
from pruner.names import CARD, CONFIG, INDEX, PLAN_FILE
from pruner.nemotron_nas import dialect
from pruner.record import read_record
from pruner.text import has_tokenizer


@dataclass(frozen=True)
class Adoption:
    """What ``adopt`` wrote into ``path``: names of ``files``, and ``notes``."""

    path: Path
    files: list[str]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**vars(self), "path": str(self.path)}


def adopt(directory: str | os.PathLike[str], like: str | os.PathLike[str]) -> Adoption:
    """Write plan, card, code and graph for a directory that was trained from ``like``, which ``convert`` wrote.

    Its structure must be that of ``like`` (the vocabulary may have grown). The plan is ``like``'s, marked as changed:
    ``verify`` then checks the structure and does not claim that the weights are the source's. The weights are not
    touched. Raises ``PruneAttnError`` for another structure, or for files that are no part of a model.
    """
    directory, like = expand(directory), expand(like)
    pruned, checkpoint = open_checkpoint(like), open_checkpoint(directory)
    facts = read_record(like)
    if facts is None:
        raise PruneAttnError(f"{like}: was not written by prune-attn; give --like the directory that was trained")
    if directory.resolve() == like.resolve():
        raise PruneAttnError(f"{directory}: is the pruned directory itself; give the one that was trained")
    checkpoint = _check(checkpoint, pruned)
    check_delivered(checkpoint)
    config = dialect.write_config(checkpoint.config, checkpoint.decoder, directory / CONFIG)
    checkpoint = replace(checkpoint, config=config)
    files = {CONFIG: dialect.dump(config)} | _licences(pruned, directory)
    if config["model_type"] == dialect.MODEL_TYPE:
        files |= dialect.code_files()
    facts = {key: value for key, value in facts.items() if key != "files"}
    facts |= {"tool": {"name": "prune-attn", "version": __version__}, "changed": pruned.fingerprint()}
    runtime, notes = _runtime(checkpoint, facts)
    if not (directory / CARD).exists():
        files[CARD] = retrained_card(like).encode()
    else:
        notes.append(f"{CARD} was there and is kept; say in it that the model was pruned, and how")
    if not has_tokenizer(directory):
        notes.append(f"there is no tokenizer; copy the tokenizer files from {like} and adopt again")
    facts["files"] = _listed(checkpoint, files) | {name: {} for name in runtime}
    replace_files(directory, files | runtime | {PLAN_FILE: record.dump(facts)})
    return Adoption(directory, [*files, *runtime, PLAN_FILE], notes)


def _check(checkpoint: Checkpoint, pruned: Checkpoint) -> Checkpoint:
    """The checkpoint, where it can be adopted; ``PruneAttnError`` otherwise."""
    same = replace(checkpoint.decoder, vocab_size=pruned.decoder.vocab_size, tied=pruned.decoder.tied)
    if same != pruned.decoder:
        raise PruneAttnError(
            f"{checkpoint.path}: has other layers or sizes than {pruned.path}; give --like the directory that it was "
            "trained from"
        )
    for shard in checkpoint.shards:
        if shard.path.suffix != ".safetensors" or shard.path.is_symlink():
            raise PruneAttnError(f"{shard.path}: is no safetensors file; save the model with save_pretrained")
    model = {shard.path.name for shard in checkpoint.shards} | {CONFIG, INDEX, *dialect.CODE_FILES}
    there = [path.relative_to(checkpoint.path) for path in checkpoint.path.rglob("*")]
    model |= {name for name in map(Path.as_posix, there) if is_companion(name)}
    if foreign := record.unknown(there, {"files": model}):
        raise PruneAttnError(f"{checkpoint.path / foreign[0]}: is no part of a model; move it away and adopt again")
    return checkpoint


def _licences(pruned: Checkpoint, directory: Path) -> dict[str, bytes]:
    """The licence texts of ``pruned`` that training did not save; its card says that they come along."""
    along = {name: what for name, what in companions(pruned).items() if is_companion(name, LICENCE)}
    return {name: content(what) for name, what in along.items() if not (directory / name).exists()}


def _runtime(checkpoint: Checkpoint, facts: dict[str, Any]) -> tuple[dict[str, bytes], list[str]]:
    from export.onnx.runtime_files import runtime_files

    try:
        return runtime_files(checkpoint, facts, GraphOptions()), []
    except PruneAttnError as error:
        return {}, [f"no model.onnx and no genai_config.json were written: {error}"]


def _listed(checkpoint: Checkpoint, files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """What the record lists: hashes of what is written now, of the headers, and of all small files that were there."""
    import hashlib

    headers = {shard.path.name: shard.header_sha256 for shard in checkpoint.shards}
    there = sorted(path for path in checkpoint.path.rglob("*") if path.is_file())
    names = {path.relative_to(checkpoint.path).as_posix(): path for path in there}
    listed = {
        name: record.file_facts(path, headers.get(name))
        for name, path in names.items()
        if name in headers or name == INDEX or is_companion(name)
    }
    written = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    if (checkpoint.path / CARD).is_file() and CARD not in written:
        written[CARD] = record.file_facts(checkpoint.path / CARD)
    return listed | written
