"""Do ``model.onnx`` and the shards beside it still belong together? A graph over other bytes computes garbage silently.

The graph's metadata carries every shard's size and the SHA-256 of its header, which says where each tensor lies.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from export.genai import genai_config
from export.onnx import GraphOptions
from export.onnx.graph import OPTIONS, SHARDS, VERSION, build_graph
from export.onnx.rope import inverse_frequencies
from pruner.checkpoint import CONFIG, Checkpoint
from pruner.checkpoint.generation import read_generation
from pruner.errors import PruneAttnError
from pruner.files import parse_json, read_bounded, read_json
from pruner.names import GENAI_CONFIG, GRAPH, PLAN_FILE

_GRAPH_BYTES = 64 << 20  # without its weights a 7B's has 1 MB


class DamagedGraphError(PruneAttnError):
    """``model.onnx`` cannot be read, or holds nothing."""


def _damaged(path: Path) -> DamagedGraphError:
    return DamagedGraphError(f"{path}: is damaged; write it again with prune-attn export {path.parent}")


def read_graph(path: Path) -> onnx.ModelProto:
    """``model.onnx`` without its weights. Raises ``PruneAttnError`` where it is missing, damaged or not ours."""
    if not os.path.lexists(path):
        output = "" if (path.parent / PLAN_FILE).is_file() else " OUTPUT"
        raise PruneAttnError(f"{path}: is missing; write it with prune-attn export {path.parent}{output}")
    try:
        model = onnx.load_model_from_string(read_bounded(path, _GRAPH_BYTES))
    except (DecodeError, PruneAttnError):
        model = None
    if model is None or not model.graph.node:
        raise _damaged(path)
    if SHARDS not in metadata(model):
        raise PruneAttnError(f"{path}: was not written by prune-attn; move it away, then prune-attn export")
    return model


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The graph's metadata, keys as in graph.py."""
    return {prop.key: prop.value for prop in model.metadata_props}


def graph_options(model: onnx.ModelProto) -> GraphOptions:
    """What the graph was built with; the model's own where its metadata does not say."""
    try:
        options = GraphOptions(**parse_json(metadata(model)[OPTIONS], GRAPH))
    except (KeyError, TypeError, PruneAttnError):
        return GraphOptions()
    whole = options.context is None or (type(options.context) is int and options.context > 0)
    return options if whole and isinstance(options.last_token_logits, bool) else GraphOptions()


def changes(model: onnx.ModelProto, checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each shard that is not the one that the graph was made over, and for another configuration."""
    cure = f"write model.onnx again with prune-attn export {checkpoint.path} --accept-changes if that was meant"
    try:
        made_over = parse_json(metadata(model)[SHARDS], GRAPH)
        expected = {name: (fact["size"], fact["header_sha256"]) for name, fact in made_over.items()}
    except (KeyError, TypeError, PruneAttnError):
        expected = None
    if expected is None or len(expected) > 2 * len(checkpoint.shards) + 100:
        yield f"{checkpoint.path / GRAPH}: its list of shards is damaged; {cure}"
        return
    for shard in checkpoint.shards:
        size, header = expected.pop(shard.path.name, (None, None))
        if size is None:
            yield f"{shard.path}: is not a shard that model.onnx was made over; {cure}"
        elif size != shard.size:
            yield f"{shard.path}: has {shard.size} bytes, model.onnx was made over {size}; {cure}"
        elif header != shard.header_sha256:
            yield f"{shard.path}: was rewritten after model.onnx was made; {cure}"
    for name in expected:
        yield f"{checkpoint.path / name}: model.onnx was made over it and it is no part of the model now; {cure}"
    if what := _other_configuration(model, checkpoint):
        yield f"{checkpoint.path / CONFIG}: {what} is not what model.onnx was made for; {cure}"


def _other_configuration(model: onnx.ModelProto, checkpoint: Checkpoint) -> str | None:
    """What the graph holds of the configuration and the shards do not show, where it differs."""
    decoder = checkpoint.decoder
    attributes: dict[str, float] = {}
    for node in model.graph.node:
        for a in node.attribute:
            if a.type in (onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT):
                attributes.setdefault(a.name, a.f if a.type == onnx.AttributeProto.FLOAT else a.i)
    constants = {t.name: t for t in model.graph.initializer if t.name.startswith("rotary.")}

    def constant(name: str, default: float) -> np.ndarray | np.float32:
        tensor = constants.get(name)
        if tensor is None:
            return np.float32(default)
        sound = tensor.data_type == onnx.TensorProto.FLOAT and tensor.data_location != onnx.TensorProto.EXTERNAL
        sound = sound and len(tensor.raw_data) == 4 * math.prod(tensor.dims)
        return onnx.numpy_helper.to_array(tensor) if sound else np.float32("nan")

    expected: dict[str, tuple[Any, Any]] = {"rms_norm_eps": (attributes.get("epsilon"), checkpoint.decoder.epsilon)}
    if any(decoder.attention):
        frequencies, factor = inverse_frequencies(checkpoint.config, decoder.head_dim, checkpoint.path / CONFIG)
        expected |= {
            "num_attention_heads": (attributes.get("num_heads"), decoder.num_heads),
            "num_key_value_heads": (attributes.get("kv_num_heads"), decoder.num_kv_heads),
            "rope_theta or rope scaling": (constant("rotary.inv_freq", 0), frequencies),
            "rope scaling": (constant("rotary.attention_factor", 1), factor),
        }
    return next(
        (name for name, (has, wants) in expected.items() if not np.array_equal(has, np.asarray(wants, np.float32))),
        None,
    )


def check_fresh(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The graph beside a checkpoint's shards; ``PruneAttnError`` naming the shard where it is stale."""
    model = read_graph(checkpoint.path / GRAPH)
    for problem in changes(model, checkpoint):
        raise PruneAttnError(problem)
    caches = [
        f"{side}.{j}.{part}"
        for j in range(len(checkpoint.decoder.present("attention")))
        for side in ("past_key_values", "present")
        for part in ("key", "value")
    ]
    if not {"input_ids", "logits", *caches} <= {value.name for value in (*model.graph.input, *model.graph.output)}:
        raise _damaged(checkpoint.path / GRAPH)
    return model


def graph_problems(checkpoint: Checkpoint, record: dict[str, Any] | None) -> Iterator[str]:
    """For ``verify``: stale shards, or a graph that is not what exporting with the same options would write."""
    path = checkpoint.path / GRAPH
    linked = next((shard.path for shard in checkpoint.shards if shard.path.is_symlink()), None)
    if linked is not None and not path.is_symlink():
        yield f"{path}: is no link and {linked.name} is one, which ONNX Runtime refuses; link both, or neither"
    try:
        model = read_graph(path)
    except PruneAttnError as error:
        yield str(error)
        yield from _genai_problems(checkpoint, None)
        return
    yield from _genai_problems(checkpoint, graph_options(model).context)
    try:
        stale = list(changes(model, checkpoint))
        yield from stale
        if stale:
            return
        again = build_graph(checkpoint, record, graph_options(model))
    except PruneAttnError as error:
        yield str(error)
        return
    if _comparable(model) != _comparable(again):
        yield f"{path}: is not what prune-attn writes for these weights; write it again with prune-attn export"


# what a person must not change in genai_config.json
_OF_THE_GRAPH = (
    "filename", "hidden_size", "head_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "inputs",
    "outputs",
)  # fmt: skip


def _genai_problems(checkpoint: Checkpoint, context: int | None) -> Iterator[str]:
    """Where ``genai_config.json`` is not for this graph, of ``context`` tokens (``None``: it cannot be read)."""
    path = checkpoint.path / GENAI_CONFIG
    if not path.is_file():
        return
    again = f"write both again with prune-attn export {checkpoint.path}"
    try:
        read_generation(checkpoint)
    except PruneAttnError as error:
        yield str(error)
        return
    try:
        found = read_json(path)
        has, most = found["model"], context or found["model"]["context_length"]
        wanted = json.loads(genai_config(checkpoint, most))["model"]
        pairs = [(key, has[key], wanted[key]) for key in ("vocab_size", "context_length")]
        pairs += [(key, has["decoder"][key], wanted["decoder"][key]) for key in _OF_THE_GRAPH]
        wrong = next((pair for pair in pairs if pair[1] != pair[2]), None)
        too_long = found["search"].get("max_length", 0) > most
    except (PruneAttnError, LookupError, TypeError, AttributeError):
        yield f"{path}: is damaged; {again}"
        return
    if wrong is not None:
        yield f"{path}: {wrong[0]} is {str(wrong[1])[:60]!r} and {GRAPH} has {wrong[2]!r}; {again}"
    elif too_long:
        yield f"{path}: its max_length is more than the {most} tokens of {GRAPH}; {again}"


def _comparable(model: onnx.ModelProto) -> bytes:
    # what another version of this tool may write differently although the graph is the same
    model.producer_version = ""
    for prop in model.metadata_props:
        if prop.key == VERSION:
            prop.value = ""
    return model.SerializeToString(deterministic=True)
