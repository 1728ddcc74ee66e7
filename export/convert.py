"""The whole job as one function: open, plan, check, write, check again, and put in place."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export import record
from export.card import model_card, read_card
from export.companions import companions
from export.deliver import RUNS_ON, runtime_files
from export.hub import Push, check_can_push
from export.hub import push as push_directory
from export.licence import NOTICE, licence_notes, llama_licence
from export.onnx import GRAPH, GraphOptions
from export.safetensors import OutputShard, plan_shards, write_file, write_shards
from export.select import partial_path
from export.staging import check_space, check_target, staged
from export.target import output_config, output_entries
from export.verify import verify
from pruner.checkpoint import CONFIG, Checkpoint, open_checkpoint
from pruner.checkpoint.hub import find
from pruner.errors import PruneAttnError
from pruner.files import expand
from pruner.llama import WEIGHT_DTYPES, Decoder, safetensors_dtype
from pruner.nemotron_nas import dialect
from pruner.plan import PLAN_FILE, PruningPlan, plan_layers, read_plan
from pruner.select import POSITIONAL, check_useful, select
from pruner.summary import totals


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did, or would do (``dry_run``). ``before`` and ``after`` are ``pruner.summary.totals``."""

    source: Path
    output: Path
    plan: PruningPlan
    before: dict[str, Any]
    after: dict[str, Any]
    shards: dict[str, int]  # file to bytes
    dtype: str | None  # float16 and so on where a conversion was asked for
    dry_run: bool
    notes: list[str] = field(default_factory=list)
    pushed: list[Push] = field(default_factory=list)  # one, where it was pushed

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "source": str(self.source),
            "output": str(self.output),
            "dry_run": self.dry_run,
            "plan": {k: v for k, v in self.plan.to_json().items() if k not in ("format", "version", "source")},
            "before": self.before,
            "after": self.after,
            "shards": self.shards,
            "notes": self.notes,
            "pushed": [push.to_json() for push in self.pushed],
        }


def parse_size(text: str) -> int:
    """``5GB`` (10^9 bytes), ``500MB``, ``2GiB`` (2^30) or a number of bytes, to bytes."""
    match = re.fullmatch(r"\s*(\d{1,15})(?:\.(\d{1,9}))?\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match:
        base = 1024 if match[4] else 1000
        size = int(float(f"{match[1]}.{match[2] or 0}") * base ** " KMGT".index(match[3].upper() or " "))
        if size > 0:
            return size
    raise PruneAttnError(f"--max-shard-size {text!r} is not a size; write for example 5GB or 500MB")


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
        raise PruneAttnError("--text is for choosing by it; leave it out, or leave out --plan and --layers")
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
    text: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    objective: str | None = None,
    resume: bool = False,
    choosing: Callable[[float, float, str], None] | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[..., None] | None = None,
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

    ``text`` to ``resume`` are for the strategies that choose by a text, ``choosing`` and ``say`` report on them: see
    ``pruner.select.selection``. ``OUTPUT.plan.partial.json`` keeps what they have computed until ``output`` is there
    (a ``dry_run`` keeps nothing).

    ``output`` appears whole or not at all; ``overwrite`` replaces only a directory that this tool wrote. ``progress``
    is called with (bytes written, bytes in all), while fetching with "fetching" as a third argument. Raises
    ``PruneAttnError`` for bad input, with nothing written, and ``MachineError`` or ``OSError`` where the machine fails.
    """
    if not os.fspath(output):
        raise PruneAttnError("OUTPUT is empty; give a directory")
    output = expand(output)
    max_bytes = parse_size(str(max_shard_size))
    target_dtype = None if dtype is None else safetensors_dtype(dtype)
    check_useful(
        {
            "strategy": strategy, "text": text, "samples": samples, "length": length, "seed": seed, "device": device,
            "objective": objective, "resume": resume,
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
    check_target(output, source, [shard.path for shard in checkpoint.shards], record.not_ours, overwrite)
    partial = partial_path(output.with_name(f"{output.name}.plan"))
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
        samples=samples,
        length=length,
        seed=seed,
        device=device,
        objective=objective,
        partial=None if dry_run else partial,
        resume=resume,
        progress=choosing,
        say=say,
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
        notes=_notes(result, config) + (_runs_on(checkpoint, dtype) if onnx else []),
    )
    total = sum(conversion.shards.values())
    check_space(output, total)
    if not dry_run:
        if model and afar:
            checkpoint = open_checkpoint(model.fetch(progress=progress))
            config = output_config(checkpoint, result, target_dtype)  # the tokenizer, too, is there only now
            shards = plan_shards(output_entries(checkpoint, result, target_dtype), max_bytes, config)
        with staged(output, record.not_ours if overwrite else lambda path: "exists") as directory:
            options = GraphOptions() if onnx else None
            _write(directory, checkpoint, chosen, result, config, shards, conversion, options, progress)
        if text is not None and strategy not in POSITIONAL:
            partial.unlink(missing_ok=True)
        if push is not None:
            try:
                conversion.pushed.append(push_directory(output, push, show_progress=progress is not None))
            except PruneAttnError as error:
                again = f"{output} is whole, push it again with `prune-attn push {output} {push}`"
                raise type(error)(f"{error}; {again}") from None
    return conversion


def lay_out(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: GraphOptions,
    dtype: str | None,
    max_shard_size: str | int,
    overwrite: bool,
    progress: Callable[..., None] | None,
) -> Conversion:
    """``convert`` that drops nothing: the same weights, laid out for ONNX. Raises where no graph can be written."""
    source, output = expand(source), expand(output)
    max_bytes = parse_size(str(max_shard_size))
    target_dtype = None if dtype is None else safetensors_dtype(dtype)
    checkpoint = open_checkpoint(source)
    decoder = checkpoint.decoder
    check_target(output, source, [shard.path for shard in checkpoint.shards], record.not_ours, overwrite)
    config = output_config(checkpoint, decoder, target_dtype)
    shards = plan_shards(output_entries(checkpoint, decoder, target_dtype), max_bytes, config)
    # what it refuses, it refuses before anything is copied
    runtime_files(checkpoint if target_dtype is None else _as(checkpoint, target_dtype), None, options)
    conversion = Conversion(
        source,
        output,
        PruningPlan("mixed", "none", (), ()),
        before=totals(decoder, checkpoint.tensors),
        after=totals(decoder, checkpoint.tensors, target_dtype),
        shards={shard.file: shard.size for shard in shards},
        dtype=dtype,
        dry_run=False,
    )
    check_space(output, sum(conversion.shards.values()))
    with staged(output, record.not_ours if overwrite else lambda path: "exists") as directory:
        _write(directory, checkpoint, conversion.plan, decoder, config, shards, conversion, options, progress)
        if not (directory / GRAPH).exists():
            raise PruneAttnError(next(note for note in conversion.notes if GRAPH in note))
    return conversion


def _as(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """A checkpoint as if its weights were in another dtype, for what asks only that."""
    tensors = {name: replace(tensor, dtype=dtype) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def _runs_on(checkpoint: Checkpoint, dtype: str | None) -> list[str]:
    names = {dtype} if dtype else {WEIGHT_DTYPES[d] for d in checkpoint.dtypes}
    return [RUNS_ON[name] for name in names if len(names) == 1 and name in RUNS_ON]


def _notes(result: Decoder, config: dict[str, Any]) -> list[str]:
    notes = []
    if config["model_type"] != dialect.MODEL_TYPE:
        notes.append("whole blocks removed and the rest renumbered: the output is a plain Llama, without custom code")
        return notes
    if dialect.engine_intermediate_size(result) != result.intermediate_size:
        notes.append(
            f"intermediate_size {result.intermediate_size} is no multiple of 256: mlx-lm and llama.cpp's own converter "
            "(and SGLang, by its source) will not load this; transformers, vLLM, ONNX Runtime and export --gguf will"
        )
    if not any(result.attention):
        notes.append(
            "no attention is left, hence no KV cache: vLLM, llama.cpp, mlx-lm and onnxruntime-genai 0.11 will not run "
            "this; transformers, ONNX Runtime and onnxruntime-genai 0.18 will"
        )
    elif not result.attention[0]:
        notes.append(
            "layer 0 has no attention: vLLM and llama.cpp's own converter will not run this; "
            "transformers, ONNX Runtime and export --gguf will"
        )
    if any(a and not m for a, m in zip(result.attention, result.mlp, strict=True)):
        notes.append("attention without its MLP: llama.cpp's own converter gets this wrong; export --gguf does not")
    return notes


def _does_not_load(output: Checkpoint, onnx: bool) -> set[str]:
    """The engines of ``export.card.SNIPPETS`` with nothing to load, or that cannot, as ``scripts/compat`` finds."""
    engines = set() if onnx else {"onnxruntime-genai", "ONNX Runtime"}
    if not output.decoder.attention[0]:
        engines.add("vLLM")
    from export.gguf import why_no_gguf  # it brings numpy

    if why_no_gguf(output):
        engines.add("llama.cpp")
    return engines


def _write(
    directory: Path,
    checkpoint: Checkpoint,
    plan: PruningPlan,
    result: Decoder,
    config: dict[str, Any],
    shards: list[OutputShard],
    conversion: Conversion,
    options: GraphOptions | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done = sum(entry.nbytes for shard in shards for entry in shard.entries), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    written = write_shards(directory, shards, advance)
    written.append(write_file(directory / CONFIG, dialect.dump(config)))
    if config["model_type"] == dialect.MODEL_TYPE:
        written += [write_file(directory / name, data) for name, data in dialect.code_files().items()]
    along = companions(checkpoint)
    for name, data in along.items():
        (directory / name).parent.mkdir(exist_ok=True)
        written.append(write_file(directory / name, data))
    facts = record.make_record(plan, checkpoint, result, conversion.dtype)
    output = open_checkpoint(directory)
    runtime = [] if options is None else _write_runtime_files(output, facts, options, conversion.notes)
    engine_notes = _notes(result, config) if config["model_type"] == dialect.MODEL_TYPE else []
    card = model_card(
        facts,
        config,
        conversion.before,
        conversion.after,
        checkpoint.path,
        onnx=bool(runtime),
        without=_does_not_load(output, bool(runtime)),
        engine_notes=engine_notes,
    )
    written.append(write_file(directory / record.CARD, card))
    licence = llama_licence(checkpoint.path, read_card(checkpoint.path))
    if licence is not None:
        conversion.notes.extend(licence_notes(licence, directory))
        if not any(file.name.lower().startswith("notice") for file in written):
            written.append(write_file(directory / NOTICE, f"{licence.notice}\n".encode()))
    headers = {shard.path.name: shard.header_sha256 for shard in output.shards}
    facts["files"] = {
        file.relative_to(directory).as_posix(): record.file_facts(file, headers.get(file.name)) for file in written
    }
    # ``export`` may write these again, so the graph itself says what it was made over
    facts["files"] |= {file.name: {} for file in runtime}
    write_file(directory / PLAN_FILE, record.dump(facts))
    problems = verify(directory).problems
    if problems:  # cannot happen with a sound disk; better found here than by whoever loads it
        raise PruneAttnError(f"{conversion.output}: what was written does not verify ({problems[0]}); report this")
    for name in along:
        if (checkpoint.path / name).is_file():
            shutil.copystat(checkpoint.path / name, directory / name)


def _write_runtime_files(
    output: Checkpoint, facts: dict[str, Any], options: GraphOptions, notes: list[str]
) -> list[Path]:
    """``model.onnx`` and ``genai_config.json``; none, and a note, for a model that the graph cannot express."""
    try:
        files = runtime_files(output, facts, options)
    except PruneAttnError as error:
        why = str(error).replace(f"{output.path}/", "").replace(str(output.path), "the output")
        notes[:] = [note for note in notes if note not in RUNS_ON.values()]
        notes.append(f"no model.onnx and no genai_config.json were written: {why}")
        return []
    return [write_file(output.path / name, data) for name, data in files.items()]
