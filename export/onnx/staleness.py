"""Do ``model.onnx`` and the shards beside it still belong together? A graph over other bytes computes garbage silently.

The graph's metadata carries every shard's size and the SHA-256 of its header, which says where each tensor lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from export.onnx import GRAPH, GraphOptions
from export.onnx.graph import OPTIONS, SHARDS, VERSION, build_graph
from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError


def read_graph(path: Path) -> onnx.ModelProto:
    """``model.onnx`` without its weights. Raises ``PruneAttnError`` where it is missing, damaged or not ours."""
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (FileNotFoundError, NotADirectoryError):
        raise PruneAttnError(f"{path}: is missing; write it with prune-attn export {path.parent}") from None
    except DecodeError:
        raise PruneAttnError(f"{path}: is damaged; write it again with prune-attn export {path.parent}") from None
    if SHARDS not in metadata(model):
        raise PruneAttnError(f"{path}: was not written by prune-attn; move it away, then prune-attn export")
    return model


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The graph's metadata, keys as in graph.py."""
    return {prop.key: prop.value for prop in model.metadata_props}


def graph_options(model: onnx.ModelProto) -> GraphOptions:
    """What the graph was built with; the model's own where its metadata does not say."""
    try:
        return GraphOptions(**json.loads(metadata(model)[OPTIONS]))
    except (KeyError, TypeError, ValueError):
        return GraphOptions()


def changed_shards(model: onnx.ModelProto, checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each shard that is not the one that the graph was made over."""
    cure = f"write model.onnx again with prune-attn export {checkpoint.path} --accept-changes if that was meant"
    try:
        made_over = json.loads(metadata(model)[SHARDS])
        expected = {name: (fact["size"], fact["header_sha256"]) for name, fact in made_over.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
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


def check_fresh(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The graph beside a checkpoint's shards; ``PruneAttnError`` naming the shard where it is stale."""
    model = read_graph(checkpoint.path / GRAPH)
    for problem in changed_shards(model, checkpoint):
        raise PruneAttnError(problem)
    return model


def graph_problems(checkpoint: Checkpoint, record: dict[str, Any] | None) -> Iterator[str]:
    """For ``verify``: stale shards, or a graph that is not what exporting with the same options would write."""
    path = checkpoint.path / GRAPH
    try:
        model = read_graph(path)
        stale = list(changed_shards(model, checkpoint))
        yield from stale
        if stale:
            return
        again = build_graph(checkpoint, record, graph_options(model))
    except PruneAttnError as error:
        yield str(error)
        return
    if _comparable(model) != _comparable(again):
        yield f"{path}: is not what prune-attn writes for these weights; write it again with prune-attn export"


def _comparable(model: onnx.ModelProto) -> bytes:
    # what another version of this tool may write differently although the graph is the same
    model.producer_version = ""
    for prop in model.metadata_props:
        if prop.key == VERSION:
            prop.value = ""
    return model.SerializeToString(deterministic=True)
