"""Tasks of lm-evaluation-harness on both models, each kept when it is done."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from export.validate.models import Bench
from export.validate.options import MODELS
from pruner.files import expand
from pruner.progress import Progress, Step
from pruner.text import load_tokenizer


def measure_tasks(bench: Bench, backend: str) -> dict[str, Any]:
    """What ``results.json`` holds of one backend's."""
    from pruner.evaluate.tasks import compare_tasks

    out = {name: _run(bench, backend, name) for name in MODELS}
    compared = compare_tasks(out["original"], out["pruned"])
    for name, facts in out.items():
        for task, entry in facts["tasks"].items():
            for note in entry.get("notes", ()):  # truncated requests, a smaller batch
                if (line := f"{task}, {backend}, {name}: {note}") not in bench.notes:
                    bench.notes.append(line)
            entry.pop("items", None)  # compared above, and long
    return {**out, "compared": compared, "average_ratio": (compared["average"] or {}).get("ratio")}


def _run(bench: Bench, backend: str, name: str) -> dict[str, Any]:
    from pruner.evaluate.tasks import run_tasks

    setting, parts = bench.setting, bench.parts
    options = {task: [name, setting.limit, setting.seed, file_hash(task)] for task in setting.tasks}

    def part(task: str) -> str:
        return f"task-{backend}-{name}-{task}"

    saved = {task: parts.saved(part(task), options[task]) for task in setting.tasks}
    done = {task: value for task, value in saved.items() if value is not None}
    left = [task for task in setting.tasks if task not in done]
    with parts.stages.stage(f"tasks-{backend}-{name}", f"tasks, {backend}, {name}") as progress:
        result = run_tasks(
            lambda: bench.models.open(backend, name, "score"),
            load_tokenizer(setting.checkpoints["original"].path),
            setting.tasks,
            limit=setting.limit,
            max_length=setting.context,
            done=done,
            save=lambda task, value: parts.save(part(task), options[task], value),
            progress=_of_several(left, progress),
        )
    bench.models.close()
    return result


def _of_several(tasks: Sequence[str], progress: Progress) -> Progress:
    """Each task alike, as nobody knows how long each takes."""

    def inside(step: Step) -> None:
        place = tasks.index(step.what) if step.what in tasks else 0
        progress(Step("tasks", place + step.done / step.total, len(tasks), status=step.what))

    return inside


def file_hash(task: str) -> str | None:
    """Of a task's own YAML file, which may be changed between two runs."""
    file = expand(task.rpartition("@")[0] or task)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
