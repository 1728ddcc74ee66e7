"""``model.onnx`` and ``genai_config.json`` beside shards that exist, or in an output that is laid out for them."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export import record
from export.engines import RUNS_ON
from export.onnx import GraphOptions
from export.onnx.runtime_files import runtime_files
from export.staging import replace_files
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.hub.source import fetch, find
from pruner.names import GRAPH
from pruner.nemotron_nas import dialect
from pruner.progress import Progress


@dataclass(frozen=True)
class Export:
    """What ``export`` wrote. ``packed``: of the attentions, how many have q, k and v in one piece."""

    path: Path
    dtype: str
    context: int
    last_token_logits: bool
    graph_bytes: int
    attention: int
    packed: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**vars(self), "path": str(self.path)}


def export(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    last_token_logits: bool | None = None,
    accept_changes: bool = False,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write ``model.onnx`` and ``genai_config.json`` for a directory.

    In place (no ``output``) for what prune-attn wrote, or what ``save_pretrained`` made of it: each file is replaced in
    one step and no weights are read. Shards that changed since the last export are refused unless ``accept_changes``.
    ``context`` (tokens) and ``last_token_logits`` are those of the graph that is there, where they are ``None``.
    With ``output``, for any Llama, also by its Hub id (at ``revision``, through ``cache_dir``): its weights are copied
    there, laid out so that q|k|v is one piece, under ``convert``'s rules; ``dtype`` converts them. Raises
    ``PruneAttnError``, or ``MachineError`` where the disk fails.
    """
    options = GraphOptions(context, bool(last_token_logits))
    if output is None and find(directory, revision=revision, cache_dir=cache_dir) is not None:
        raise PruneAttnError(f"{directory}: is on the Hub; name an output: prune-attn export {directory} OUTPUT")
    directory = fetch(directory, revision=revision, cache_dir=cache_dir, progress=progress)
    if output is not None:
        from export.write import lay_out

        conversion = lay_out(directory, output, options, dtype, max_shard_size, overwrite, progress)
        return _describe(open_checkpoint(output), options, conversion.notes)
    if dtype is not None or overwrite:
        raise PruneAttnError("--dtype and --overwrite belong to an export into an OUTPUT; name one, or leave them out")
    checkpoint = open_checkpoint(directory)
    facts = record.read_record(checkpoint.path)
    if facts is None and checkpoint.config["model_type"] != dialect.MODEL_TYPE:
        raise PruneAttnError(
            f"{checkpoint.path}: was not written by prune-attn and is left alone; "
            f"name an output: prune-attn export {checkpoint.path} OUTPUT"
        )
    for shard in checkpoint.shards:
        if shard.path.is_symlink():
            raise PruneAttnError(
                f"{shard.path}: is a link, and ONNX Runtime refuses a model.onnx that lies elsewhere than the real "
                f"files; name an output: prune-attn export {checkpoint.path} OUTPUT"
            )
    if os.path.lexists(checkpoint.path / GRAPH) and not accept_changes:
        from export.onnx.staleness import DamagedGraphError, check_fresh

        with suppress(DamagedGraphError):  # this is the cure
            check_fresh(checkpoint)
    options = _as_before(checkpoint, context, last_token_logits)
    replace_files(checkpoint.path, runtime_files(checkpoint, facts, options))
    return _describe(checkpoint, options, [])


def _as_before(checkpoint: Checkpoint, context: int | None, last_token_logits: bool | None) -> GraphOptions:
    """The options of the graph that is there, if one is, but for those that are given."""
    from export.onnx.graph import model_context
    from export.onnx.staleness import graph_options, read_graph

    before = GraphOptions()
    with suppress(PruneAttnError):  # there is none, or nothing that can be read
        before = graph_options(read_graph(checkpoint.path / GRAPH))
    if context is None and before.context is not None:
        context = min(before.context, model_context(checkpoint))  # the model's may be another now
    return GraphOptions(context, before.last_token_logits if last_token_logits is None else last_token_logits)


def _describe(checkpoint: Checkpoint, options: GraphOptions, notes: list[str]) -> Export:
    from export.onnx.staleness import graph_options, read_graph

    graph = read_graph(checkpoint.path / GRAPH)
    names = [proto.name for proto in graph.graph.initializer]
    dtype = WEIGHT_DTYPES[checkpoint.dtypes[0]]
    attention = len(checkpoint.decoder.present("attention"))
    own = [RUNS_ON[dtype]]
    if not attention:
        own.append("no attention is left, hence no KV cache: onnxruntime-genai 0.11 crashes on this, 0.18 runs it")
    return Export(
        checkpoint.path,
        dtype,
        graph_options(graph).context or 0,
        options.last_token_logits,
        (checkpoint.path / GRAPH).stat().st_size,
        attention,
        sum(name.endswith("qkv_proj.weight") for name in names),
        [*notes, *(note for note in own if note not in notes)],
    )
