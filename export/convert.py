"""``convert``: source, checkpoint, plan, layout, output, one step after another."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export import record
from export.companions import left_behind
from export.engines import notes_for, runs_on
from export.layout import Layout, WriteOptions, lay_out
from export.push import Push, check_can_push
from export.push import push as push_directory
from export.select import partial_path
from export.staging import check_space, check_target
from export.write import write
from pruner.checkpoint import open_checkpoint
from pruner.errors import PruneAttnError
from pruner.files import expand
from pruner.hub.source import Revision, find
from pruner.plan import PruningPlan
from pruner.progress import Progress, keeping
from pruner.record import read_record
from pruner.select.calibrated import told_of
from pruner.select.choose import choose
from pruner.select.request import DEPTH_NOTE, Calibration, Drop, Request, as_request


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


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    drop: Request | PruningPlan | str | int,
    *,
    calibration: Calibration | None = None,
    options: WriteOptions = WriteOptions(),  # noqa: B008, frozen
    hub: Revision = Revision(),  # noqa: B008, frozen
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write ``source`` to ``output`` with sublayers physically removed: ``convert("Llama-2-13b-hf", "pruned", "33%")``.

    ``source`` is a directory, or a Hub id (at ``hub``) of which only headers are read until all is known to be well.
    ``drop`` says what goes: a count, a percentage, ``Drop``, ``Layers``, ``SavedPlan`` or a plan. With a
    ``calibration`` text it is chosen by what that text costs; ``OUTPUT.plan.partial.json`` then keeps what has been
    computed until ``output`` is there (a ``dry_run`` keeps nothing). ``options`` say how the output is written. A
    model that ``model.onnx`` cannot express is converted without it, and a note says why.

    ``output`` appears whole or not at all. A ``dry_run`` checks everything and writes nothing. Raises
    ``PruneAttnError`` for bad input, with nothing written, and ``MachineError`` or ``OSError`` where the machine fails.
    """
    if not os.fspath(output):
        raise PruneAttnError("OUTPUT is empty; give a directory")
    output, request = expand(output), as_request(drop)
    _check(options, calibration, dry_run)
    model = find(source, hub)
    # what is refused is refused before gigabytes are fetched, unless they are needed to choose
    afar = model is not None and model.has_headers and calibration is None
    if model is None:
        checkpoint = open_checkpoint(source)
    else:
        checkpoint = model.headers if afar else open_checkpoint(model.fetch(progress=progress))
    read_record(checkpoint.path)  # a damaged one is refused before any work
    check_target(output, checkpoint.path, [s.path for s in checkpoint.shards], record.not_ours, options.overwrite)
    partial = partial_path(output.with_name(f"{output.name}.plan"))
    with keeping(lambda: told_of(partial)) if calibration else nullcontext():
        kept = None if dry_run else partial
        plan = choose(checkpoint, request, calibration, partial=kept, progress=progress).plan
    left = plan.check(checkpoint.decoder, allow_first_layer=request.allow_first_layer, allow_all=request.allow_all)
    layout = lay_out(checkpoint, plan, left, options)
    check_space(output, layout.nbytes)
    chosen_blindly = [DEPTH_NOTE] if isinstance(request, Drop) and calibration is None else []
    if dry_run:
        return _conversion(layout, output, dry_run, _expected_notes(layout) + chosen_blindly)
    if model is not None and afar:
        layout = lay_out(open_checkpoint(model.fetch(progress=progress)), plan, left, options)
    with keeping(lambda: told_of(partial)) if calibration else nullcontext():
        written = write(layout, output, progress)
    if calibration is not None:
        partial.unlink(missing_ok=True)
    pushed = [] if options.push is None else [_push(output, options.push, progress)]
    return _conversion(layout, output, dry_run, [*written.notes, *chosen_blindly], pushed)


def _check(options: WriteOptions, calibration: Calibration | None, dry_run: bool) -> None:
    """Refuse what is wrong by itself, before anything is opened."""
    _ = options.max_bytes, options.stored_as
    if dry_run and calibration is not None and calibration.resume:
        raise PruneAttnError("--resume writes on what a stopped run kept, and --dry-run writes nothing; leave one out")
    if options.push is not None:
        check_can_push(options.push)


def _conversion(
    layout: Layout, output: Path, dry_run: bool, notes: list[str], pushed: list[Push] | None = None
) -> Conversion:
    return Conversion(
        layout.checkpoint.path,
        output,
        layout.plan,
        layout.before,
        layout.after,
        {shard.file: shard.size for shard in layout.shards},
        layout.options.dtype,
        dry_run,
        notes,
        pushed or [],
    )


def _expected_notes(layout: Layout) -> list[str]:
    """What a dry run can say of the output."""
    graph = [] if layout.options.graph is None else runs_on(layout.checkpoint, layout.options.dtype)
    own_code = left_behind(layout.checkpoint, layout.along)
    return [*layout.notes, *notes_for(layout.left, layout.config, True), *graph, *own_code]


def _push(output: Path, repository: str, progress: Progress | None) -> Push:
    try:
        with keeping(lambda: f"{output} is whole"):
            return push_directory(output, repository, progress=progress)
    except PruneAttnError as error:
        again = f"{output} is whole, push it again with `prune-attn push {output} {repository}`"
        raise type(error)(f"{error}; {again}") from None
