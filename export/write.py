"""An output written: staged, filled, verified and renamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import record
from export.card import model_card, read_card
from export.companions import left_behind
from export.engines import NO_TOKENIZER, TOKENIZER_JSON, does_not_load, notes_for, runs_on
from export.layout import Layout
from export.licence import NOTICE, licence_notes, llama_licence
from export.markdown import plain
from export.onnx.runtime_files import runtime_files
from export.shards import copy_file, write_shards
from export.staging import staged
from export.verify import verify
from pruner.checkpoint import CONFIG, Checkpoint, OpenFiles, open_checkpoint
from pruner.errors import PruneAttnError
from pruner.files import write_file
from pruner.names import CARD, PLAN_FILE
from pruner.nemotron_nas import dialect
from pruner.plan import NOTHING
from pruner.progress import Progress, Step


@dataclass(frozen=True)
class Written:
    """What ``write`` put in place. ``notes``: what whoever loads it has to know, a line each."""

    path: Path
    graph: bool
    notes: tuple[str, ...]


def write(layout: Layout, output: Path, progress: Progress | None = None) -> Written:
    """The output, whole or not at all: staged beside its place, synced, verified, and renamed.

    Raises ``PruneAttnError`` where the source has changed or the output may not be replaced, and ``MachineError`` or
    ``OSError`` where the machine fails.
    """
    with staged(output, record.not_ours if layout.options.overwrite else lambda path: "exists") as directory:
        graph, notes = _fill(directory, layout, progress)
        problems = verify(directory).problems
        if problems:  # cannot happen with a sound disk; better found here than by whoever loads it
            raise PruneAttnError(f"{output}: what was written does not verify ({problems[0]}); report this")
        layout.checkpoint.check_unchanged()
    return Written(output, graph, notes)


def _fill(directory: Path, layout: Layout, progress: Progress | None) -> tuple[bool, tuple[str, ...]]:
    """Every file of the output; whether ``model.onnx`` is one of them, and notes."""
    checkpoint, config = layout.checkpoint, layout.config
    custom = config["model_type"] == dialect.MODEL_TYPE
    with OpenFiles(checkpoint.seen) as sources:
        written = write_shards(directory, list(layout.shards), sources, _counted(layout, progress))
        for name, what in layout.along.items():
            (directory / name).parent.mkdir(exist_ok=True)
            file = directory / name
            written.append(copy_file(what, file, sources) if isinstance(what, Path) else write_file(file, what))
    written.append(write_file(directory / CONFIG, dialect.dump(config)))
    if custom:
        written += [write_file(directory / name, data) for name, data in dialect.code_files().items()]
    facts = record.make_record(layout.plan, checkpoint, layout.left, layout.options.dtype)
    output = open_checkpoint(directory)
    engine_notes = notes_for(layout.left, config, layout.plan.strategy != NOTHING)
    runtime, notes = _runtime_files(output, facts, layout)
    card_notes = engine_notes if custom else []
    if runtime and TOKENIZER_JSON not in layout.along:
        notes.append(NO_TOKENIZER)
        card_notes = [*card_notes, NO_TOKENIZER]
    own_code = left_behind(checkpoint, layout.along)
    notes = [*layout.notes, *engine_notes, *notes, *own_code]
    card = model_card(
        facts,
        config,
        layout.before,
        layout.after,
        checkpoint.path,
        onnx=bool(runtime),
        without=does_not_load(output, bool(runtime)),
        engine_notes=[*card_notes, *(plain(note, 400) for note in own_code)],
    )
    written.append(write_file(directory / CARD, card))
    licence = llama_licence(checkpoint.path, read_card(checkpoint.path))
    if licence is not None:
        notes += licence_notes(licence, directory)
        if not any(file.name.lower().startswith("notice") for file in written):
            written.append(write_file(directory / NOTICE, f"{licence.notice}\n".encode()))
    headers = {shard.path.name: shard.header_sha256 for shard in output.shards}
    facts["files"] = {
        file.relative_to(directory).as_posix(): record.file_facts(file, headers.get(file.name)) for file in written
    }
    # ``export`` may write these again, so the graph itself says what it was made over
    facts["files"] |= {file.name: {} for file in runtime}
    write_file(directory / PLAN_FILE, record.dump(facts))
    return bool(runtime), tuple(notes)


def _counted(layout: Layout, progress: Progress | None) -> Callable[[int], None]:
    total, done = sum(entry.nbytes for shard in layout.shards for entry in shard.entries), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(Step("writing", done, total, "bytes", seconds=total / 5e8))

    return advance


def _runtime_files(output: Checkpoint, facts: dict[str, Any], layout: Layout) -> tuple[list[Path], list[str]]:
    """``model.onnx`` and ``genai_config.json``; none, and a note, for a model that the graph cannot express."""
    if layout.options.graph is None:
        return [], []
    try:
        files = runtime_files(output, facts, layout.options.graph)
    except PruneAttnError as error:
        why = str(error).replace(f"{output.path}/", "").replace(str(output.path), "the output")
        return [], [f"no model.onnx and no genai_config.json were written: {why}"]
    return [write_file(output.path / name, data) for name, data in files.items()], runs_on(output, None)
