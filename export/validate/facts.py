"""What a report says of the machine and of the two models, so that a figure can be measured again."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pruner
from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError
from pruner.machine import PACKAGES, cpu_name, package_version, threads
from pruner.record import read_record
from pruner.summary import totals


def environment(device: str) -> dict[str, Any]:
    """Device, driver, versions, threads, and the commit or version of this tool."""
    import torch

    facts: dict[str, Any] = {
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "prune_attn": {"version": pruner.__version__, "commit": _commit()},
        "gpu": None,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return facts


def model_facts(checkpoint: Checkpoint, weights_sha256: bool) -> dict[str, Any]:
    """Name, sizes and hashes of one model. ``weights_sha256`` reads every byte of it."""
    facts = {
        "path": str(checkpoint.path),
        **checkpoint.fingerprint(),
        **totals(checkpoint.decoder, checkpoint.tensors),
        "embedding_bytes": _read_by_row(checkpoint),
        "weights_sha256": None,
    }
    if weights_sha256:
        facts["weights_sha256"] = {shard.path.name: _file_sha256(shard.path) for shard in checkpoint.shards}
    return facts


def pruning_facts(original: Checkpoint, pruned: Checkpoint, attention: list[int], mlp: list[int]) -> dict[str, Any]:
    """Which layers are gone, in the original's numbers, and how they were chosen."""
    record = read_record(pruned.path) or {}
    return {
        "layers": original.decoder.num_layers,
        "attention": attention,
        "mlp": mlp,
        "absent_before": {
            kind: sorted(set(range(original.decoder.num_layers)) - set(original.decoder.present(kind)))
            for kind in ("attention", "mlp")
        },
        "strategy": record.get("strategy"),
        "requested": record.get("requested"),
        "converted_to": record.get("converted_to"),
    }


def dropped_layers(original: Checkpoint, pruned: Checkpoint) -> tuple[list[int], list[int]]:
    """Attention and MLP layers, in the original's numbers, that the pruned directory lacks.

    Raises ``PruneAttnError`` where it cannot be what is left of the original, or all is left.
    """
    why = f"{pruned.path}: is not made from {original.path}"
    a, b = original.decoder, pruned.decoder
    record = read_record(pruned.path)
    source = record["source"] if record else {}
    ours = original.fingerprint()
    if record and all(source.get(key) == ours[key] for key in ("config_sha256", "shards")):
        gone = {"attention": record["attention"], "mlp": record["mlp"]}
    elif a.num_layers == b.num_layers:  # pruned more than once, or by another tool
        gone = {kind: sorted(set(a.present(kind)) - set(b.present(kind))) for kind in ("attention", "mlp")}
    else:
        raise PruneAttnError(
            f"{why} ({b.num_layers} layers of {a.num_layers}, and no record says which); name its source"
        )
    if not any(gone.values()):
        raise PruneAttnError(f"{pruned.path}: lacks no sublayer of {original.path}; give what convert wrote of it")
    left = a.without(gone["attention"], gone["mlp"])
    expected = (left.renumbered() if b.num_layers != a.num_layers and left.whole_blocks_only else left).tensors()
    if expected.keys() - {"lm_head.weight"} != pruned.decoder.tensors().keys() - {"lm_head.weight"}:
        raise PruneAttnError(f"{why}: its layers are not what is left of it; name its source")
    for name, shape in pruned.decoder.tensors().items():
        if expected.get(name, shape) != shape:
            raise PruneAttnError(f"{why}: {name!r} has shape {list(shape)} and not {list(expected[name])}")
    return list(gone["attention"]), list(gone["mlp"])


def _read_by_row(checkpoint: Checkpoint) -> int:
    """Bytes of an embedding table that is not the head too: one row of it is read a token."""
    name = "model.embed_tokens.weight"
    return 0 if checkpoint.head == name else checkpoint.tensors[name].nbytes


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit() -> str | None:
    root = Path(pruner.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, so that the version says it all
        return None
    commit = _first_line("git", "-C", str(root), "rev-parse", "HEAD")
    return commit and commit + ("+changes" if _first_line("git", "-C", str(root), "status", "--porcelain") else "")


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    return lines[0].strip() or None if lines else None
