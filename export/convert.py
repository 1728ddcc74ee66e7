"""The whole job as one function: open, plan, check, write, check again, and put in place."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from export import record
from export.engines import engine_notes_for, runs_on
from export.layout import output_config, output_entries, parse_size
from export.onnx import GraphOptions
from export.push import check_can_push
from export.push import push as push_directory
from export.select import partial_path
from export.shards import plan_shards
from export.staging import check_space, check_target, staged
from export.write import Conversion, _write
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.dtypes import safetensors_dtype
from pruner.errors import PruneAttnError
from pruner.files import expand
from pruner.hub.source import find
from pruner.plan import PruningPlan, plan_layers
from pruner.plan_files import read_plan
from pruner.progress import Progress, keeping
from pruner.select.calibrated import told_of
from pruner.select.choose import select
from pruner.select.request import DEPTH_NOTE, POSITIONAL, check_useful
from pruner.summary import totals

if TYPE_CHECKING:
    from pruner.text import Texts


def choose(
    checkpoint: Checkpoint,
    *,
    drop: str | None,
    layers: str | None,
    plan: str | os.PathLike[str] | PruningPlan | None,
    sublayer: str | None,
    strategy: str | None,
    allow_first_layer: bool,
    allow_all: bool,
    **calibration: Any,
) -> PruningPlan:
    """The plan that the options ask for; ``PruneAttnError`` where they contradict each other or ask for nothing.

    ``calibration`` is what ``pruner.select.select`` takes besides.
    """
    if calibration.get("text") is not None and (plan is not None or layers is not None):
        raise PruneAttnError(
            "--text is for choosing by it; leave it out, or leave out --plan and --layers (--validation-text is for "
            "measuring)"
        )
    if plan is not None:
        for option, value in (("--layers", layers), ("--sublayer", sublayer), ("--strategy", strategy)):
            if value is not None:
                raise PruneAttnError(f"{option} cannot go with --plan, which says it already; leave one of them out")
        made = read_plan(plan, checkpoint)
        return made if drop is None else made.cut(drop, checkpoint)
    if layers is not None:
        if drop is not None or strategy is not None:
            raise PruneAttnError("--layers names the layers itself; leave out --drop and --strategy")
        return plan_layers(checkpoint, layers, sublayer or "attention")
    if drop is None:
        raise PruneAttnError("nothing to drop; say --drop 33%, --layers 22-29,31 or --plan plan.json")
    return select(
        checkpoint,
        drop=drop,
        sublayer=sublayer or "attention",
        strategy=strategy,
        allow_first_layer=allow_first_layer,
        allow_all=allow_all,
        **calibration,
    )


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    drop: str | int | None = None,
    layers: str | Iterable[int] | None = None,
    plan: str | os.PathLike[str] | PruningPlan | None = None,
    sublayer: str | None = None,
    strategy: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_first_layer: bool = False,
    allow_all: bool = False,
    onnx: bool = True,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    push: str | None = None,
    text: Texts | None = None,
    text_field: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    objective: str | None = None,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write ``source`` to ``output`` with sublayers physically removed.

    ``source`` is a directory, or a Hub id (at ``revision``, through ``cache_dir``) of which only headers are read until
    all is known to be well. ``push`` names the Hub repository that the output is then pushed to.

    What goes is said by ``drop`` (a count, or a percentage of the never-pruned model's sublayers) with ``strategy``
    (default ``search`` with a ``text``, ``last`` without), by ``layers`` ("22-29,31" or numbers; the source's), or by
    ``plan`` (a file, or a ``PruningPlan``; ``drop`` then cuts its order); ``sublayer`` is attention (default), mlp or
    block. Kept tensors are the source's bytes unless ``dtype`` (float16, bfloat16, float32) asks for a conversion,
    the only case besides a ``text`` that imports torch. ``onnx`` writes ``model.onnx`` and ``genai_config.json`` too;
    a model that they cannot express is converted all the same, without them and with a note that says why.

    ``text`` to ``threads`` are for the strategies that choose by a text: see ``pruner.select.selection``.
    ``OUTPUT.plan.partial.json`` keeps what they have computed until ``output`` is there (a ``dry_run`` keeps
    nothing).

    ``output`` appears whole or not at all; ``overwrite`` replaces only a directory that this tool wrote. Raises
    ``PruneAttnError`` for bad input, with nothing written, and ``MachineError`` or ``OSError`` where the machine fails.
    """
    if not os.fspath(output):
        raise PruneAttnError("OUTPUT is empty; give a directory")
    output = expand(output)
    max_bytes = parse_size(str(max_shard_size))
    target_dtype = None if dtype is None else safetensors_dtype(dtype)
    check_useful(
        {
            "strategy": strategy, "text": text, "text_field": text_field, "samples": samples, "length": length,
            "seed": seed, "device": device,
            "objective": objective, "resume": resume, "threads": threads,
        }
    )  # fmt: skip
    if dry_run and resume:
        raise PruneAttnError("--resume writes on what a stopped run kept, and --dry-run writes nothing; leave one out")
    if push is not None:
        check_can_push(push)
    model = find(source, revision=revision, cache_dir=cache_dir)
    # what is refused is refused before gigabytes are fetched, unless they are needed to choose
    afar = model is not None and model.has_headers and text is None and strategy in (None, *POSITIONAL)
    if model is None:
        checkpoint = open_checkpoint(source)
    else:
        checkpoint = model.headers if afar else open_checkpoint(model.fetch(progress=progress))
    source = checkpoint.path
    record.read_record(checkpoint.path)  # a damaged one is refused before any work
    check_target(output, source, [shard.path for shard in checkpoint.shards], record.not_ours, overwrite)
    by_text = text is not None and strategy not in POSITIONAL
    partial = partial_path(output.with_name(f"{output.name}.plan"))
    with keeping(lambda: told_of(partial)) if by_text else nullcontext():
        chosen = choose(
            checkpoint,
            drop=None if drop is None else str(drop),
            layers=layers if layers is None or isinstance(layers, str) else ",".join(map(str, layers)),
            plan=plan,
            sublayer=sublayer,
            strategy=strategy,
            allow_first_layer=allow_first_layer,
            allow_all=allow_all,
            text=text,
            text_field=text_field,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            objective=objective,
            partial=None if dry_run else partial,
            resume=resume,
            threads=threads,
            progress=progress,
        )
    result = chosen.check(checkpoint.decoder, allow_first_layer=allow_first_layer, allow_all=allow_all)

    config = output_config(checkpoint, result, target_dtype)
    shards = plan_shards(output_entries(checkpoint, result, target_dtype), max_bytes, config)
    conversion = Conversion(
        source,
        output,
        chosen,
        before=totals(checkpoint.decoder, checkpoint.tensors),
        after=totals(result, checkpoint.tensors, target_dtype),
        shards={shard.file: shard.size for shard in shards},
        dtype=dtype,
        dry_run=dry_run,
        notes=engine_notes_for(result, config)
        + (runs_on(checkpoint, dtype) if onnx else [])
        + ([DEPTH_NOTE] if plan is None and chosen.strategy in POSITIONAL else []),
    )
    total = sum(conversion.shards.values())
    check_space(output, total)
    if not dry_run:
        if model and afar:
            checkpoint = open_checkpoint(model.fetch(progress=progress))
            config = output_config(checkpoint, result, target_dtype)  # the tokenizer, too, is there only now
            shards = plan_shards(output_entries(checkpoint, result, target_dtype), max_bytes, config)
        kept = keeping(lambda: told_of(partial)) if by_text else nullcontext()
        with kept, staged(output, record.not_ours if overwrite else lambda path: "exists") as directory:
            options = GraphOptions() if onnx else None
            _write(directory, checkpoint, chosen, result, config, shards, conversion, options, progress)
        if by_text:
            partial.unlink(missing_ok=True)
        if push is not None:
            try:
                with keeping(lambda: f"{output} is whole"):
                    conversion.pushed.append(push_directory(output, push, progress=progress))
            except PruneAttnError as error:
                again = f"{output} is whole, push it again with `prune-attn push {output} {push}`"
                raise type(error)(f"{error}; {again}") from None
    return conversion
