"""``pruning_plan.json`` as it lies in an output: the plan, the model it was made for, and what was written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from export.companions import digest
from export.layout import output_decoder
from pruner import __version__
from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError
from pruner.llama import Decoder
from pruner.names import CARD, GENAI_CONFIG, GRAPH, PLAN_FILE
from pruner.plan import PruningPlan, original_counts
from pruner.record import read_record

# A person may edit the card, and export may write these two again; verify holds the graph against the shards instead.
REWRITABLE = (CARD, GRAPH, GENAI_CONFIG)

# What this tool, programs that merely load a directory, and the Hub put beside the files that the record lists.
_KNOWN = {PLAN_FILE, *REWRITABLE, "report", "__pycache__", ".gitattributes", ".cache/huggingface", ".git"}

# What a killed ``deliver.replace_files`` leaves beside these; the next one removes it.
LEFTOVER = re.compile(r"\.[^/]+\.prune-attn-new-[0-9a-f]{12}")


def make_record(plan: PruningPlan, checkpoint: Checkpoint, result: Decoder, dtype: str | None) -> dict[str, Any]:
    """The record without the list of files: plan, tool, the never-pruned model's size, the model that is left.

    ``dtype`` is what the weights were converted to, ``None`` where they are the source's bytes.
    """
    return plan.to_json() | {
        "source": checkpoint.fingerprint(),
        "tool": {"name": "prune-attn", "version": __version__},
        "original": {"num_hidden_layers": original_counts(checkpoint)["block"]},
        "model": {"numbered_layers": checkpoint.decoder.num_layers},
        "result": describe(output_decoder(result)),
        "converted_to": dtype,
        "previous": without_files(read_record(checkpoint.path)),
    }


def without_files(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the record of the next pruning keeps of this one."""
    return None if record is None else {k: v for k, v in record.items() if k != "files"}


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
    return {"size": size, "sha256": digest(path)}


def dump(record: dict[str, Any]) -> bytes:
    """The record's bytes."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def steps(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record and those, without files, of the prunings that went before it; the first one first."""
    found = [record]
    while found[0].get("previous") is not None:
        found.insert(0, found[0]["previous"])
    return found


def not_ours(directory: Path) -> str | None:
    """Why a directory is not wholly this tool's work; ``None`` where it is, so that replacing it loses nothing."""
    try:
        record = read_record(directory)
    except PruneAttnError:
        record = None
    if record is None:
        return "was not written by prune-attn"
    if (directory / ".git").exists():
        return "is a git clone, whose history would go"
    extra = strangers(directory, record)
    return f"holds {extra[0]}, which prune-attn did not write" if extra else None


def strangers(directory: Path, record: dict[str, Any]) -> list[Path]:
    """What lies in a directory that neither the record lists nor this tool's other commands write, relative names."""
    there = []
    for root, names, files in os.walk(directory):
        here = Path(root).relative_to(directory)
        there += [here / name for name in [*names, *files]]
    return unknown(there, record)


def unknown(there: Iterable[Path], record: dict[str, Any]) -> list[Path]:
    """Which of these relative names neither the record, nor this tool's other commands, nor the Hub account for."""
    known = {Path(name) for name in _KNOWN}
    ours = known | {Path(name) for name in record["files"]}
    ours |= {parent for name in ours for parent in name.parents}
    return sorted(
        path
        for path in there
        if path not in ours and known.isdisjoint(path.parents) and not LEFTOVER.fullmatch(path.as_posix())
    )
