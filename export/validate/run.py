"""``validate``: the pruned directory measured against the original on one machine in one run, part by part."""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.card import update_card
from export.report import FORMAT, VERSION
from export.report.write import write_report
from export.validate.accuracy import measure_accuracy
from export.validate.facts import environment, model_facts, pruning_facts
from export.validate.function import check_same_function, differences
from export.validate.guess import expected_seconds
from export.validate.limits import Limits, check
from export.validate.models import Bench, set_up
from export.validate.options import Accuracy, Compute, Latency, Tasks
from export.validate.parts import Parts
from export.validate.setting import Setting, settle
from export.validate.tasks import measure_tasks
from export.validate.timing import add_floors, measure_beside, measure_latency, measure_memory
from pruner import machine
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.device import pick_device
from pruner.evaluate.latency import copy_bandwidth
from pruner.hub.source import fetch
from pruner.machine import computing
from pruner.progress import Progress, Stages, Step
from pruner.record import read_record
from pruner.text import Texts


@dataclass(frozen=True)
class Validation:
    """``results`` is what ``results.json`` holds. ``exit_code``: 0; 1 where it is not the same function; 3 where a
    limit is broken. ``problems`` has a line for each."""

    results: dict[str, Any]
    output: Path
    exit_code: int
    problems: list[str] = field(default_factory=list)


def validate(
    original: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    accuracy: Accuracy | None = None,
    tasks: Tasks | None = None,
    latency: Latency | None = Latency(),  # noqa: B008, frozen
    same_function: bool = True,
    compute: Compute = Compute(),  # noqa: B008, frozen
    limits: Limits = Limits(),  # noqa: B008, frozen
    progress: Progress | None = None,
) -> Validation:
    """Measure ``pruned`` against ``original`` and write ``results.json``, ``report.md``, ``report.html`` and plots.

    ``output`` defaults to ``pruned/report``. ``same_function`` checks that the pruned model is the original without
    those sublayers; with ``accuracy`` or ``tasks`` it is always checked. docs/guide/validating.md says what each part
    measures. A run that was stopped goes on where it was when it is started again with the same options, and as many
    threads.

    Raises ``PruneAttnError`` for what cannot be measured, before anything is, and ``MachineError`` for a device whose
    memory is too small for one row.
    """
    with computing(compute.threads):
        setting = settle(
            open_checkpoint(fetch(original, progress=progress)),
            open_checkpoint(fetch(pruned, runtime=True, progress=progress)),
            output, accuracy, tasks, latency, same_function, compute, limits,
        )  # fmt: skip
        parts = Parts(setting.output, setting.key(), Stages("validating", expected_seconds(setting), progress))
        if progress is not None and (busy := machine.busy()):
            progress(Step(busy))
        with set_up(setting, parts, compute.work) as bench:
            results = _measure(bench)
        done = _judge(setting, results)
        write_report(results, setting.output)
        parts.remove()
        pruned_path = setting.checkpoints["pruned"].path
        inside = setting.output.resolve().is_relative_to(pruned_path.resolve())
        if done.exit_code != 1 and inside and read_record(pruned_path):
            update_card(pruned_path, results)
        return done


def brief(text: Texts | None, text_field: str | None = None) -> tuple[Accuracy | None, Latency]:
    """What ``convert --validate`` measures: on a CPU a few minutes' worth for a small model, else the defaults."""
    short = pick_device("auto") == "cpu"
    latency = Latency(batches=(1,), new_tokens=16, repeats=5, seconds=3) if short else Latency()
    accuracy = Accuracy(text, text_field, max_tokens=4096 if short else None) if text is not None else None
    return accuracy, latency


def _measure(bench: Bench) -> dict[str, Any]:
    """Every part that was asked for; what an earlier run finished is taken from it."""
    started, notes = time.time(), bench.notes
    results = _heading(bench)
    if bench.setting.same_function:
        results["same_function"] = check_same_function(bench)
    if results["same_function"] is None or results["same_function"]["ok"]:
        _measure_models(bench, results)
    if bench.parts.reused:
        notes.append(f"{len(bench.parts.reused)} parts were finished by an earlier run that was stopped")
    if bench.graphs.copied:
        notes.append(
            f"{bench.graphs.copied / 1e9:.2f} GB of weights were laid out anew for ONNX Runtime while this ran"
        )
    results["seconds"] = round(time.time() - started, 1)
    return results


def _heading(bench: Bench) -> dict[str, Any]:
    """The results with nothing measured but what they are measured on."""
    setting, parts, whole = bench.setting, bench.parts, bench.setting.same_function
    original, pruned = setting.checkpoints.values()

    def facts(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
        return parts.part(f"facts-{name}", whole, f"hashing the {name}", lambda _: model_facts(checkpoint, whole))

    results: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": None,
        "options": setting.options,
        "environment": environment(setting.device),
        "models": {"original": facts("original", original), "pruned": facts("pruned", pruned)},
        "pruning": pruning_facts(original, pruned, setting.attention, setting.mlp),
        "dtypes": {backend: setting.dtypes[backend] for backend in setting.backends},
        "same_function": None,
        "accuracy": {},
        "tasks": {},
        "latency": {},
        "bandwidth": None,
        "gates": [],
        "notes": bench.notes,
    }
    if setting.device == "cuda" and setting.latency is not None:
        results["bandwidth"] = parts.part("bandwidth", None, "memory bandwidth", lambda _: copy_bandwidth())
    return results


def _measure_models(bench: Bench, results: dict[str, Any]) -> None:
    setting, asked = bench.setting, bench.setting.latency
    memory = {}
    if asked is not None:  # the processes that it starts want the memory that models here would take
        memory = {backend: measure_memory(bench, asked, backend) for backend in setting.backends}
    for backend in setting.backends:
        if setting.corpus is not None:
            results["accuracy"][backend] = measure_accuracy(bench, setting.corpus, backend)
        if asked is not None:
            results["latency"][backend] = measure_latency(bench, asked, backend, memory[backend])
    if asked is not None and setting.compiled:
        results["latency"] |= measure_beside(bench, asked)
    if results["bandwidth"]:
        add_floors(bench, results)
    bench.models.close()
    for backend in setting.backends if setting.tasks else ():
        results["tasks"][backend] = measure_tasks(bench, backend)


def _judge(setting: Setting, results: dict[str, Any]) -> Validation:
    """Whether it is the same function, and if so whether it keeps the limits."""
    function = results["same_function"]
    if function is not None and not function["ok"]:
        problems = [f"not the same function: {line}" for line in differences(function)]
        return Validation(results, setting.output, 1, problems)
    results["gates"] = check(setting.limits, results)
    problems = [gate["line"] for gate in results["gates"] if not gate["ok"]]
    return Validation(results, setting.output, 3 if problems else 0, problems)
