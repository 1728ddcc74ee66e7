"""An output written: staged, filled, verified and renamed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export import record
from export.card import model_card, read_card
from export.companions import companions
from export.engines import NO_TOKENIZER, RUNS_ON, TOKENIZER_JSON, does_not_load, engine_notes_for
from export.layout import _as, output_config, output_entries, parse_size
from export.licence import NOTICE, licence_notes, llama_licence
from export.onnx import GraphOptions
from export.onnx.runtime_files import runtime_files
from export.push import Push
from export.shards import OutputShard, plan_shards, write_shards
from export.staging import check_space, check_target, staged
from export.verify import verify
from pruner.checkpoint import CONFIG, Checkpoint, open_checkpoint
from pruner.dtypes import safetensors_dtype
from pruner.errors import PruneAttnError
from pruner.files import expand, write_file
from pruner.llama import Decoder
from pruner.names import GRAPH, PLAN_FILE
from pruner.nemotron_nas import dialect
from pruner.plan import PruningPlan
from pruner.progress import Progress, Step
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


def lay_out(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: GraphOptions,
    dtype: str | None,
    max_shard_size: str | int,
    overwrite: bool,
    progress: Progress | None,
) -> Conversion:
    """``convert`` that drops nothing: the same weights, laid out for ONNX. Raises where no graph can be written."""
    source, output = expand(source), expand(output)
    max_bytes = parse_size(str(max_shard_size))
    target_dtype = None if dtype is None else safetensors_dtype(dtype)
    checkpoint = open_checkpoint(source)
    decoder = checkpoint.decoder
    record.read_record(checkpoint.path)  # a damaged one is refused before any work
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


def _write(
    directory: Path,
    checkpoint: Checkpoint,
    plan: PruningPlan,
    result: Decoder,
    config: dict[str, Any],
    shards: list[OutputShard],
    conversion: Conversion,
    options: GraphOptions | None,
    progress: Progress | None,
) -> None:
    total, done = sum(entry.nbytes for shard in shards for entry in shard.entries), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(Step("writing", done, total, "bytes", seconds=total / 5e8))

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
    engine_notes = engine_notes_for(result, config) if config["model_type"] == dialect.MODEL_TYPE else []
    if runtime and TOKENIZER_JSON not in along:
        conversion.notes.append(NO_TOKENIZER)
        engine_notes.append(NO_TOKENIZER)
    card = model_card(
        facts,
        config,
        conversion.before,
        conversion.after,
        checkpoint.path,
        onnx=bool(runtime),
        without=does_not_load(output, bool(runtime)),
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
