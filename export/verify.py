"""Is a pruned directory what its record says, and are its tensors the source's, byte for byte?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from export import record
from export.companions import Companions, check_delivered, companions, digest
from export.layout import as_output, source_names
from export.shards import read_as
from pruner.checkpoint import CONFIG, Checkpoint, OpenFiles, open_checkpoint
from pruner.dtypes import safetensors_dtype
from pruner.errors import MachineError, PruneAttnError
from pruner.files import expand
from pruner.hub.source import HubModel, Revision, find, names_repository
from pruner.llama import Decoder
from pruner.names import GENAI_CONFIG, GRAPH, PLAN_FILE
from pruner.nemotron_nas import dialect
from pruner.plan import NOTHING
from pruner.plan_files import recorded_plan
from pruner.progress import Progress, Step
from pruner.record import read_record

_MOST_FILES_NAMED = 100  # that are missing, changed or strangers; more of them say nothing new


@dataclass
class Verification:
    """``problems`` is empty where everything holds; each is one line. ``compared`` counts tensors compared by bytes,
    with the source's as converted to ``converted_to`` where that is not None."""

    path: Path
    against: Path | None
    converted_to: str | None = None
    through: list[str] = field(default_factory=list)  # dtypes that they were converted to before that
    problems: list[str] = field(default_factory=list)
    compared: int = 0
    changed: bool = False  # trained after it was pruned, says its plan: its tensors need not be the source's
    differ: list[str] = field(default_factory=list)  # names of the tensors that are not, where it was changed

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; so says ``bool(...)`` of this."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "path": str(self.path),
            "against": None if self.against is None else str(self.against),
            "ok": self.ok,
            "problems": self.problems,
            "tensors_compared": self.compared,
            "converted_to": self.converted_to,
            "through": self.through,
            "changed": self.changed,
            "differ": self.differ,
        }


def verify(
    output: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    output_revision: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a directory that ``convert`` wrote: structure, sizes, header hashes, dialect, and that
    ``model.onnx``, where there is one, belongs to these shards. No weights are read.

    With ``against`` (the source it was made from): every kept tensor byte for byte (after the same conversion, where
    ``--dtype`` was used), every dropped one gone, and the same configuration again. Both may be Hub ids (``output`` at
    ``output_revision``, ``against`` at ``revision``, through ``cache_dir``), which are fetched. ``progress`` is called
    with (bytes compared, bytes in all), while fetching with "fetching" as a third argument. Raises ``PruneAttnError``
    only where ``output`` is no directory and no repository, or ``against`` no checkpoint; all else is reported as
    problems.
    """
    if against is None and revision is not None:
        raise PruneAttnError("--revision belongs to a Hub id given with --against; the output's is --output-revision")
    on_hub = [place for place in (output, against) if place is not None and names_repository(place)]
    if cache_dir is not None and not on_hub:
        raise PruneAttnError("--cache-dir belongs to a Hub id, and none is given; leave it out")

    def find_at(place: str | os.PathLike[str], revision: str | None) -> HubModel | None:
        return find(place, Revision(revision, cache_dir if place in on_hub else None))

    model = find_at(output, output_revision)
    if model is None and not expand(output).is_dir():
        raise PruneAttnError(f"{output}: no such directory; give one that prune-attn convert wrote")
    source = None
    if against is not None:
        original = find_at(against, revision)
        source = open_checkpoint(against if original is None else original.fetch(progress=progress))
    result = Verification(expand(output), None if source is None else source.path)
    if model is None:
        _verify(result, source, progress)
        return result
    try:
        result.path, strange = _fetched(model, progress)
        result.problems += (f"{output}: {name} on the Hub was not written by prune-attn" for name in strange)
        _verify(result, source, progress)
    except MachineError:
        raise
    except PruneAttnError as error:
        result.problems.append(str(error))
    return result


def _fetched(model: HubModel, progress: Progress | None) -> tuple[Path, list[Path]]:
    """A pruned repository's snapshot in the cache, and what else lies there, which is not fetched."""
    if model.sizes is None:
        return model.fetch(), []
    facts = read_record(model.download([CONFIG, PLAN_FILE]))
    place = model.fetch(runtime=True, progress=progress, also=facts["files"] if facts else ())
    return place, [] if facts is None else record.unknown(map(Path, model.sizes), facts)


def _verify(result: Verification, source: Checkpoint | None, progress: Progress | None) -> None:
    """Find the problems of ``result.path``, a directory."""
    output, damaged = result.path, False
    try:
        facts = read_record(output)
        if facts is None:
            result.problems.append(f"{output / PLAN_FILE}: missing or not prune-attn's; was this directory converted?")
    except PruneAttnError as error:
        facts, damaged = None, True
        result.problems.append(str(error))
    try:
        checkpoint = open_checkpoint(output)
    except PruneAttnError as error:
        result.problems.append(str(error))
        return
    if facts is not None:
        result.converted_to = facts.get("converted_to")
        result.changed = any(step.get("changed") for step in record.steps(facts))
        result.problems += _structure(output, facts, checkpoint)
        result.problems += islice(_files(output, facts, checkpoint), _MOST_FILES_NAMED)
    if (output / GRAPH).exists() and not damaged:  # a graph holds what the record says
        from export.onnx.staleness import graph_problems

        result.problems += graph_problems(checkpoint, facts)
    if not result.problems:
        try:
            check_delivered(checkpoint)
        except PruneAttnError as error:
            result.problems.append(str(error))
    if source is not None and not result.problems:
        assert facts is not None
        steps = _since(facts, source)
        if not steps:
            result.problems.append(
                f"{output / PLAN_FILE}: says that this was made from another model than {source.path}"
            )
            return
        result.changed = any(step.get("changed") for step in steps)
        try:
            along = companions(source)
            made = _again(output, steps, source, along, result.problems)
            if not result.changed:
                result.problems += _source(output, checkpoint, made, along)
        except PruneAttnError as error:
            result.problems.append(str(error))
        if not result.problems:
            dtypes = [dtype for step in steps if (dtype := step.get("converted_to"))]
            result.converted_to = dtypes[-1] if dtypes else None
            result.through = dtypes[:-1]
            through = [safetensors_dtype(dtype) for dtype in result.through]
            try:
                compare_tensors(checkpoint, made, made.decoder, result, progress, through)
            except MachineError:
                raise
            except PruneAttnError as error:  # one of the two changes meanwhile
                result.problems.append(str(error))


def _files(output: Path, facts: dict[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    headers, export = {shard.path.name: shard for shard in checkpoint.shards}, f"prune-attn export {output}"
    for name, fact in facts["files"].items():
        path, shard = output / name, headers.pop(name, None)
        if not path.is_file():
            yield f"{path}: is missing; {export if name in (GRAPH, GENAI_CONFIG) else 'convert again'}"
        elif shard is not None and shard.size != fact.get("size"):
            yield f"{path}: has {shard.size} bytes, {fact.get('size')} were written; convert again"
        elif shard is not None and shard.header_sha256 != fact.get("header_sha256"):
            yield f"{path}: its header is not the one that was written; it was rewritten since, convert again"
        elif shard is None and name not in record.REWRITABLE and not _is_as_written(path, fact):
            trust = "do not trust it, " if name in dialect.CODE_FILES else ""
            yield f"{path}: is not what was written; {trust}convert again"
        elif name.endswith(".py") and name not in dialect.CODE_FILES:
            yield f"{path}: is code that is not prune-attn's; do not trust it, convert again"
    for path in record.strangers(output, facts):
        yield f"{output / path}: was not written by prune-attn; move it away"


def _is_as_written(path: Path, fact: dict[str, Any]) -> bool:
    same_size = path.stat().st_size == fact.get("size")  # what is far larger is not read
    return same_size and digest(path) == fact.get("sha256")


def _structure(output: Path, facts: dict[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    path = output / CONFIG
    if record.describe(checkpoint.decoder) != facts.get("result"):
        yield f"{path}: its layers are not those that {PLAN_FILE} says are left; convert again"
    written = dialect.write_config(checkpoint.config, checkpoint.decoder, path)
    for key in written:
        if checkpoint.config.get(key, ...) != written[key]:
            yield f"{path}: {key!r} is not what the dialect wants; convert again"
    if checkpoint.config.keys() - written.keys():
        yield f"{path}: {sorted(checkpoint.config.keys() - written.keys())[0]!r} does not belong there; convert again"


def _since(facts: dict[str, Any], source: Checkpoint) -> list[dict[str, Any]]:
    """The steps in which the output was made from ``source``, wherever that lies; empty where it was not."""
    found, steps = source.fingerprint(), record.steps(facts)
    starts = [
        start
        for start, step in enumerate(steps)
        if all(step["source"].get(key) == found[key] for key in ("config_sha256", "shards"))
    ]
    # what was only laid out anew has the very files of its source: which of the two it is, its record says
    before = record.without_files(read_record(source.path))
    own = [start for start in starts if steps[start].get("previous") == before]
    return steps[max(own or starts) :] if starts else []


def _again(
    output: Path, steps: list[dict[str, Any]], source: Checkpoint, along: Companions, problems: list[str]
) -> Checkpoint:
    """What these steps make of ``source``, where its tensors still lie; adds what the record says otherwise.

    Raises ``PruneAttnError`` where a step cannot be taken.
    """
    path, made = output / PLAN_FILE, source
    for number, step in enumerate(steps):
        plan = recorded_plan(step, path, made)
        nothing = plan.strategy == NOTHING  # an export of an unpruned model
        left = made.decoder if nothing else plan.check(made.decoder, allow_first_layer=True, allow_all=True)
        dtype = step.get("converted_to")
        facts = record.make_record(plan, made, left, dtype) | {"tool": step.get("tool")}
        if number:  # what went before was not read from the directory in between, which is not there
            facts |= {"previous": step.get("previous"), "original": steps[0].get("original")}
        for key in facts.keys() - {"source"}:  # compared already; its name may differ
            if step.get(key) != facts[key]:
                problems.append(f"{path}: {key!r} is not what converting {source.path} gives; convert again")
        made = as_output(made, left, dtype and safetensors_dtype(dtype), along)
    return made


def _source(output: Path, checkpoint: Checkpoint, made: Checkpoint, along: Companions) -> Iterator[str]:
    """Where the output is not what was ``made`` of its source again."""
    if checkpoint.config != made.config:
        yield f"{output / CONFIG}: is not what converting {made.path} gives; convert again"
    for name in sorted(made.tensors.keys() ^ checkpoint.tensors.keys()):
        yield f"{output}: tensor {name!r} should {'' if name in made.tensors else 'not '}be there; convert again"
    for name, what in along.items():
        if not (output / name).is_file() or digest(output / name) != digest(what):
            yield f"{output / name}: is not {made.path}'s; convert again"


def compare_tensors(
    checkpoint: Checkpoint,
    source: Checkpoint,
    left: Decoder,
    result: Verification,
    progress: Progress | None,
    through: Iterable[str] = (),
) -> None:
    """Compare every tensor's bytes, in the order in which they lie on disk; memory is two chunks.

    ``through``: dtypes (safetensors names) that the source's were converted to in between.
    """
    names = source_names(left)
    tensors = sorted(checkpoint.tensors.values(), key=lambda t: (str(t.path), t.start))
    total, done = checkpoint.nbytes, 0
    with OpenFiles({**source.seen, **checkpoint.seen}) as files:
        for tensor in tensors:
            original = source.tensors.get(names.get(tensor.name, ""))
            position = tensor.start
            if original is None or (result.changed and original.shape != tensor.shape):
                if result.changed:
                    result.differ.append(tensor.name)
                else:
                    result.problems.append(f"{tensor.path}: {tensor.name!r} is not in {source.path}; convert again")
                continue
            for chunk in read_as(original, files, *through, tensor.dtype):
                if os.pread(files.fd(tensor.path), len(chunk), position) != chunk:
                    if result.changed:
                        result.differ.append(tensor.name)
                        break
                    result.problems.append(
                        f"{tensor.path}: {tensor.name!r} is not the source's (first difference after byte "
                        f"{position - tensor.start} of {tensor.nbytes}); convert again"
                    )
                    break
                position += len(chunk)
            done += tensor.nbytes
            result.compared += 1
            if progress is not None:
                progress(Step("comparing", done, total, "bytes", seconds=total / 1e9))
        files.check_unchanged()
