"""``model.onnx`` and ``genai_config.json`` beside shards that exist, or in an output that is laid out for them."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export import record
from export.engines import RUNS_ON
from export.layout import WriteOptions, lay_out, stored_in
from export.onnx import GraphOptions
from export.onnx.runtime_files import runtime_files
from export.staging import check_space, check_target, replace_files
from export.write import write
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.files import expand
from pruner.hub.source import Revision, fetch, find
from pruner.names import GRAPH
from pruner.nemotron_nas import dialect
from pruner.plan import PruningPlan
from pruner.progress import Progress
from pruner.record import read_record


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
    options: WriteOptions | None = None,
    hub: Revision = Revision(),  # noqa: B008
    progress: Progress | None = None,
) -> Export:
    """Write ``model.onnx`` and ``genai_config.json`` for a directory.

    In place (no ``output``) for what prune-attn wrote, or what ``save_pretrained`` made of it: each file is replaced in
    one step and no weights are read. Shards that changed since the last export are refused unless ``accept_changes``.
    ``context`` (tokens) and ``last_token_logits`` are those of the graph that is there, where they are ``None``.
    With ``output``, for any Llama, also by its Hub id (at ``hub``): its weights are copied there, laid out so that
    q|k|v is one piece, as ``options`` say (all but ``graph`` and ``push``), by ``convert``'s rules. Raises
    ``PruneAttnError``, or ``MachineError`` where the disk fails.
    """
    if output is None and options is not None:
        raise PruneAttnError("how to write is for an export into an output; name one, or leave the options out")
    if output is None and find(directory, hub) is not None:
        raise PruneAttnError(f"{directory}: is on the Hub; name an output: prune-attn export {directory} OUTPUT")
    checkpoint = open_checkpoint(fetch(directory, hub, progress=progress))
    if output is not None:
        graph = GraphOptions(context, bool(last_token_logits))
        return _into(checkpoint, expand(output), replace(options or WriteOptions(), graph=graph), progress)
    facts = read_record(checkpoint.path)
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
    graph = _as_before(checkpoint, context, last_token_logits)
    replace_files(checkpoint.path, runtime_files(checkpoint, facts, graph))
    return _describe(checkpoint, graph, [])


def _into(checkpoint: Checkpoint, output: Path, options: WriteOptions, progress: Progress | None) -> Export:
    """The flow of ``convert`` with an empty plan. Raises ``PruneAttnError`` where no graph can be written."""
    assert options.graph is not None
    read_record(checkpoint.path)  # a damaged one is refused before any work
    layout = lay_out(checkpoint, PruningPlan.nothing(), checkpoint.decoder, options)
    check_target(output, checkpoint.path, [s.path for s in checkpoint.shards], record.not_ours, options.overwrite)
    # what it refuses, it refuses before anything is copied
    runtime_files(stored_in(checkpoint, options.stored_as), None, options.graph)
    check_space(output, layout.nbytes)
    written = write(layout, output, progress)
    return _describe(open_checkpoint(output), options.graph, list(written.notes))


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
