"""The whole job: choose, measure, keep what is finished, and write the table and the plots at the end."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from export.staging import check_target, staged
from export.sweep.measure import expected_seconds, key, measure_perplexity, measure_speed, speed_columns
from export.sweep.options import Machine, Measure, Points
from export.sweep.plots import draw
from export.sweep.progress import Kept, kept, write_whole
from export.sweep.setting import Inputs, Orders, also_equal, pick_machine, read_inputs, read_points, recorded
from export.sweep.table import to_csv, to_markdown
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.errors import PruneAttnError
from pruner.files import expand, read_json
from pruner.hub.source import fetch
from pruner.machine import busy as busy_machine
from pruner.machine import computing
from pruner.plan import PruningPlan, original_counts, parse_drop
from pruner.plan_files import read_plan
from pruner.progress import Progress, Stages, Step, keeping
from pruner.select.choose import choose
from pruner.select.request import POSITIONAL, Calibration, Drop
from pruner.summary import totals

FORMAT = "prune-attn sweep"
RESULTS, PLANS = "sweep.json", "plans"
FILES = (RESULTS, "sweep.csv", "sweep.md", "perplexity.png", "speed.png", PLANS)


@dataclass(frozen=True)
class Sweep:
    """``original`` and each of ``points`` are rows of the table: the columns of ``sweep.csv`` by name.

    ``setting`` says what was measured, on what and with what.
    """

    path: Path
    setting: dict[str, Any] = field(repr=False)
    original: dict[str, Any]
    points: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """What ``sweep.json`` holds."""
        measured = {"setting": self.setting, "original": self.original, "points": self.points}
        return {"format": FORMAT, "version": 1, **measured}


def sweep(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    measure: Measure,
    *,
    points: Points = Points(),  # noqa: B008, frozen
    calibration: Calibration | None = None,
    machine: Machine = Machine(),  # noqa: B008, frozen
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Perplexity and speed at each of ``points``: what each costs and gains.

    ``source`` is a directory or a Hub id. An order is chosen once for each sublayer kind and strategy, for the largest
    fraction, and cut for the smaller ones. ``calibration`` is what similarity, search and exhaustive choose by; its
    ``strategy``, ``device``, ``threads`` and ``resume`` are the sweep's own.

    Whatever is finished is kept in ``OUTPUT.partial``, from which the same call goes on. ``output`` appears whole:
    ``sweep.json``, ``sweep.csv``, ``sweep.md``, two plots, and each order as a plan that ``convert --plan`` takes.
    Raises ``PruneAttnError`` for bad input, before anything is computed.
    """
    if not os.fspath(output):
        raise PruneAttnError("OUTPUT is empty; give a directory")
    output = expand(output)
    checkpoint = open_checkpoint(fetch(source, progress=progress))
    orders = read_points(checkpoint, points, calibration)
    if 0 < measure.rounds < 5:
        raise PruneAttnError(f"--rounds {measure.rounds}: too few for an interval; give 5 or more, or 0 for no timing")
    check_target(output, checkpoint.path, [shard.path for shard in checkpoint.shards], _not_ours, overwrite)
    inputs = read_inputs(checkpoint, measure, orders)
    with computing(machine.threads):
        machine, runs_on = pick_machine(machine)
        setting = recorded(checkpoint, orders, inputs, runs_on)
        if progress is not None and (busy := busy_machine()):
            progress(Step(busy))
        with kept(output, setting, also_equal(checkpoint, inputs, machine.device)) as work, keeping(work.told):
            plans = {
                (kind, name): _order(work, checkpoint, kind, name, orders, machine.device, progress)
                for kind in orders.sublayers
                for name in orders.strategies
            }
            rows = [
                (*names, part, plan.cut(part, checkpoint)) for names, plan in plans.items() for part in orders.fractions
            ]
            _measure(work, checkpoint, [plan for *_, plan in rows], inputs, machine, progress)
            setting["finished"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            original = _row(checkpoint, work, None, "original", None, None)
            result = Sweep(output, setting, original, [_row(checkpoint, work, *row) for row in rows])
            _deliver(result, work, overwrite)
            work.discard()
    return result


def _measure(
    work: Kept,
    checkpoint: Checkpoint,
    plans: list[PruningPlan],
    inputs: Inputs,
    machine: Machine,
    progress: Progress | None,
) -> None:
    """Each set of sublayers and each count of them once."""
    from pruner.model import TorchLanguageModel

    model = cache(lambda: TorchLanguageModel(checkpoint.path, device=machine.device, dtype=machine.dtype))
    stages = Stages("measuring", expected_seconds(checkpoint, plans, inputs, machine.device), progress)
    measure_perplexity(work, checkpoint, model, plans, inputs.windows, stages)
    if inputs.rounds:
        measure_speed(work, model, plans, inputs, stages)


def _deliver(result: Sweep, work: Kept, overwrite: bool) -> None:
    """Write the folder, whole or not at all."""
    measured = (result.setting, result.original, result.points)
    with staged(result.path, _not_ours if overwrite else lambda path: "exists") as directory:
        shutil.copytree(work.plans, directory / PLANS)
        (directory / RESULTS).write_text(json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        (directory / "sweep.csv").write_text(to_csv(result.original, result.points), "utf-8")
        (directory / "sweep.md").write_text(to_markdown(*measured), "utf-8")
        draw(directory, *measured)


def _order(
    work: Kept,
    checkpoint: Checkpoint,
    sublayer: str,
    strategy: str,
    orders: Orders,
    device: str,
    progress: Progress | None,
) -> PruningPlan:
    """The plan for the largest of the fractions, chosen once; a search that was interrupted goes on."""
    file = work.plans / f"{sublayer}-{strategy}.json"

    def inside(step: Step) -> None:
        if progress is not None:  # there are several of them
            progress(replace(step, what=f"{step.what}, {sublayer} by {strategy}") if step.total else step)

    if not file.exists():
        most = max(orders.fractions, key=lambda part: parse_drop(part, original_counts(checkpoint)[sublayer]))
        partial = work.path / f"{file.stem}.partial.json"
        if strategy in POSITIONAL:
            plan = choose(checkpoint, Drop(most, sublayer, strategy)).plan
        else:
            assert orders.calibration is not None
            by = replace(orders.calibration, strategy=strategy, device=device, threads=None, resume=True)
            plan = choose(checkpoint, Drop(most, sublayer), by, partial=partial, progress=inside).plan
        write_whole(file, replace(plan, source=checkpoint.fingerprint()).to_json())
    return read_plan(file, checkpoint)


def _row(
    checkpoint: Checkpoint,
    work: Kept,
    sublayer: str | None,
    strategy: str,
    fraction: str | None,
    plan: PruningPlan | None,
) -> dict[str, Any]:
    """One line of the table; ``None`` where something was not measured or is not a number."""
    attention, mlp = (plan.attention, plan.mlp) if plan else ((), ())
    left = totals(checkpoint.decoder.without(attention, mlp), checkpoint.tensors)
    perplexity, whole = work.perplexity[key(plan)], work.perplexity[key(None)]
    row = {
        "sublayer": sublayer,
        "strategy": strategy,
        "fraction": fraction,
        "dropped": max(len(attention), len(mlp)),
        "of": original_counts(checkpoint)["block"],
        "attention": list(attention),
        "mlp": list(mlp),
        "parameters": left["parameters"],
        "bytes": left["bytes"],
        "kv_cache_bytes_per_token": left["kv_cache_bytes_per_token"],
        "perplexity": perplexity,
        "perplexity_ratio": perplexity / whole if perplexity and whole else None,
    }
    return row | speed_columns(work.speed, plan)


def _not_ours(directory: Path) -> str | None:
    """Why a directory is not wholly a finished sweep; ``None`` where it is, so that replacing it loses nothing."""
    try:
        if read_json(directory / RESULTS).get("format") != FORMAT:
            return "was not written by prune-attn sweep"
    except (OSError, PruneAttnError):
        return "was not written by prune-attn sweep"
    extra = sorted({path.name for path in directory.iterdir()} - set(FILES))
    return f"holds {extra[0]}, which prune-attn did not write" if extra else None
