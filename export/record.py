"""``pruning_plan.json`` as it lies in an output: the plan, the model it was made for, and what was written."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from export.target import output_decoder
from pruner import __version__
from pruner.checkpoint import Checkpoint
from pruner.llama import Decoder
from pruner.plan import FORMAT, PLAN_FILE, PruningPlan, original_counts

CARD = "README.md"

# What this tool, and programs that merely load a directory, put beside the files that the record lists.
_KNOWN = {PLAN_FILE, CARD, "model.onnx", "genai_config.json", "report", "__pycache__", ".cache"}


def make_record(plan: PruningPlan, checkpoint: Checkpoint, result: Decoder, dtype: str | None) -> dict[str, Any]:
    """The record without the list of files: plan, tool, the never-pruned model's size, the model that is left.

    ``dtype`` is what the weights were converted to, ``None`` where they are the source's bytes.
    """
    previous = read_record(checkpoint.path)
    return plan.to_json() | {
        "source": checkpoint.fingerprint(),
        "tool": {"name": "prune-attn", "version": __version__},
        "original": {"num_hidden_layers": original_counts(checkpoint)["block"]},
        "model": {"numbered_layers": checkpoint.decoder.num_layers},
        "result": describe(output_decoder(result)),
        "converted_to": dtype,
        "previous": None if previous is None else {k: v for k, v in previous.items() if k != "files"},
    }


def describe(decoder: Decoder) -> dict[str, Any]:
    """Which layers keep what, as the record states it."""
    return {
        "num_hidden_layers": decoder.num_layers,
        "attention": list(decoder.present("attention")),
        "mlp": list(decoder.present("mlp")),
    }


def file_facts(path: Path, header_sha256: str | None = None) -> dict[str, Any]:
    """Size, and the SHA-256 of a shard's header or of a small file's bytes."""
    size = path.stat().st_size
    if header_sha256 is not None:
        return {"size": size, "header_sha256": header_sha256}
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def dump(record: dict[str, Any]) -> bytes:
    """The record's bytes."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record in a directory that this tool wrote; ``None`` where there is none, or somebody else's file."""
    try:
        record = json.loads((directory / PLAN_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(record, dict) and record.get("format") == FORMAT and isinstance(record.get("files"), dict)
    return record if ours else None


def not_ours(directory: Path) -> str | None:
    """Why a directory is not wholly this tool's work; ``None`` where it is, so that replacing it loses nothing."""
    record = read_record(directory)
    if record is None:
        return "was not written by prune-attn"
    written = {Path(name) for name in record["files"]}
    folders = {parent for name in written for parent in name.parents}
    for root, names, files in os.walk(directory):
        here = Path(root).relative_to(directory)
        for name in [*names, *files]:
            path = here / name
            if path.parts[0] not in _KNOWN and path not in written and path not in folders:
                return f"holds {path}, which prune-attn did not write"
    return None
