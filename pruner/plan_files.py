"""Readers of plans: ours, EvoPress's and LLM-Drop's, told apart by their content."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError, printable
from pruner.files import JSON_BYTES, expand, parse_json, read_bounded
from pruner.llama import SUBLAYERS
from pruner.names import CONFIG, PLAN_FILE
from pruner.plan import VERSION, PruningPlan, only_present
from pruner.record import FORMAT, LONGEST_REQUEST, SOURCE, is_layers, misfit


def read_plan(path: str | os.PathLike[str] | PruningPlan, checkpoint: Checkpoint) -> PruningPlan:
    """Read a plan for ``checkpoint``: ours, EvoPress's or LLM-Drop's (told apart by their content), or take a made one.

    Raises ``PruneAttnError`` for a file that is none of them, or a plan that was made for another model.
    """
    if isinstance(path, PruningPlan):
        if path.source is not None:
            _check_made_for("the plan", path.source, checkpoint)
        return path
    path = expand(path)
    if not os.path.lexists(path):
        raise PruneAttnError(f"{path}: no such plan; make one, or use --drop")
    if path.is_dir():
        raise PruneAttnError(f"{path}: is a directory; give the plan file, such as {path / PLAN_FILE}")
    try:
        text = read_bounded(path, JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise PruneAttnError(f"{path}: is not a plan (not UTF-8 text)") from None
    lines = text.split()
    if lines and all(line in _EVOPRESS for line in lines):
        return _read_evopress(path, lines, checkpoint)
    if not text.lstrip().startswith("{"):
        raise PruneAttnError(f"{path}: is not a plan; expected JSON, or one of none|attn|mlp|attn+mlp a line")
    data = parse_json(text, path)
    if data.get("format") == FORMAT:
        return _read_ours(path, data, checkpoint)
    if "drop_attn_list" in data or "drop_mlp_list" in data:
        return _read_llm_drop(path, data, checkpoint)
    raise PruneAttnError(f"{path}: is not a plan; expected prune-attn's, EvoPress's or LLM-Drop's")


def recorded_plan(record: dict[str, Any], path: Path, checkpoint: Checkpoint) -> PruningPlan:
    """The plan of a record, or of one that went before it, for a ``checkpoint`` known to be its source."""
    return _read_ours(path, record | {"source": None}, checkpoint)


def _ints(path: Path, data: dict[str, Any], key: str) -> tuple[int, ...]:
    value = data.get(key) or []
    if not is_layers(value):
        raise PruneAttnError(f"{path}: {key!r} must be a list of layer numbers, each once; make the plan again")
    return tuple(value)


def _read_ours(path: Path, data: dict[str, Any], checkpoint: Checkpoint) -> PruningPlan:
    if data.get("version") != VERSION:
        raise PruneAttnError(f"{path}: has plan version {data.get('version')!r}; this prune-attn reads {VERSION}")
    source = data.get("source")
    if source is not None:
        _check_made_for(path, source, checkpoint)
    sublayer, order = data.get("sublayer"), None
    attention, mlp = _ints(path, data, "attention"), _ints(path, data, "mlp")
    if sublayer in SUBLAYERS:
        order = _ints(path, data, "order")
        named = set(attention) | set(mlp)
        meant = only_present(PruningPlan.of(sublayer, "", order, len(named), ""), checkpoint.decoder)
        if (set(meant.attention), set(meant.mlp)) != (set(attention), set(mlp)):
            raise PruneAttnError(f"{path}: its order does not begin with the layers that it drops; make the plan again")
    elif sublayer != "mixed":
        raise PruneAttnError(f"{path}: unknown sublayer {sublayer!r}; make the plan again")
    requested, selection = data.get("requested"), data.get("selection")
    return PruningPlan(
        sublayer,
        printable(str(data.get("strategy")), 100),
        attention,
        mlp,
        order,
        requested[:LONGEST_REQUEST] if isinstance(requested, str) else None,
        source,
        _read_sets(path, data, order),
        selection if isinstance(selection, dict) else None,
    )


def _read_sets(path: Path, data: dict[str, Any], order: tuple[int, ...] | None) -> dict[int, tuple[int, ...]] | None:
    sets = data.get("sets")
    if sets is None:
        return None
    if not isinstance(sets, dict) or order is None:
        raise PruneAttnError(f"{path}: its sets do not fit its order; make the plan again")
    read = {int(n): _ints(path, sets, n) for n in sets if re.fullmatch(r"[1-9]\d{0,5}", n)}
    for n, layers in read.items():
        if len(layers) != n or len(set(layers)) != n or not set(layers) <= set(order):
            raise PruneAttnError(f"{path}: its set of {n} layers does not fit its order; make the plan again")
    return read


def _check_made_for(path: Path | str, source: Any, checkpoint: Checkpoint) -> None:
    if misfit(source, SOURCE, "source"):
        raise PruneAttnError(f"{path}: does not say which model it was made for; make the plan again")
    present = checkpoint.fingerprint()
    differs = [] if source["config_sha256"] == present["config_sha256"] else [CONFIG]
    theirs = {name: shard["header_sha256"] for name, shard in source["shards"].items()}
    ours = {name: shard["header_sha256"] for name, shard in present["shards"].items()}
    differs += sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if differs:
        more = f" and {len(differs) - 1} more" if len(differs) > 1 else ""
        raise PruneAttnError(
            f"{path}: was made for another model ({source['name']}): {differs[0]}{more} differs from "
            f"{checkpoint.path}; to drop the same layers all the same, name them with --layers"
        )


_EVOPRESS = ("none", "attn", "mlp", "attn+mlp")


def _read_evopress(path: Path, lines: list[str], checkpoint: Checkpoint) -> PruningPlan:
    layers = checkpoint.decoder.num_layers
    if len(lines) != layers:
        raise PruneAttnError(
            f"{path}: was made for another model: it has {len(lines)} lines, the model {layers} layers"
        )
    attention = tuple(i for i, line in enumerate(lines) if "attn" in line)
    mlp = tuple(i for i, line in enumerate(lines) if "mlp" in line)
    return PruningPlan("mixed", "evopress", attention, mlp)


def _read_llm_drop(path: Path, data: dict[str, Any], checkpoint: Checkpoint) -> PruningPlan:
    layers = checkpoint.decoder.num_layers
    if data.get("num_hidden_layers", layers) != layers:
        raise PruneAttnError(
            f"{path}: was made for another model: it has {data['num_hidden_layers']} layers, this one {layers}"
        )

    def indices(key: str) -> tuple[int, ...]:
        value = data.get(key) or []
        if isinstance(value, list) and len(value) == layers and all(isinstance(v, bool) for v in value):
            return tuple(i for i, dropped in enumerate(value) if dropped)  # LLM-Drop writes either form
        return _ints(path, data, key)

    attention, mlp = indices("drop_attn_list"), indices("drop_mlp_list")
    if attention and not mlp:
        return PruningPlan.of("attention", "llm-drop", attention, len(attention), str(len(attention)))
    if mlp and not attention:
        return PruningPlan.of("mlp", "llm-drop", mlp, len(mlp), str(len(mlp)))
    if attention == mlp and attention:
        return PruningPlan.of("block", "llm-drop", attention, len(attention), str(len(attention)))
    return PruningPlan("mixed", "llm-drop", attention, mlp)
