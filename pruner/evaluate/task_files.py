"""Tasks by their names or YAML files, loaded by lm-evaluation-harness."""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruner.errors import PruneAttnError, one_line
from pruner.files import expand

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

# The Open LLM Leaderboard's first version: shots and metric of each
# (https://huggingface.co/docs/leaderboards/open_llm_leaderboard/archive)
OPENLLM = {
    "arc_challenge": (25, "acc_norm,none"),
    "hellaswag": (10, "acc_norm,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "mmlu": (5, "acc,none"),
    "winogrande": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
}


SHIPPED = {"cloze": Path(__file__).parent / "cloze" / "cloze.yaml"}


@dataclass(frozen=True)
class Task:
    """What was asked for: a name of the harness or a task file, and how many shots (``None``: its own number)."""

    name: str
    shots: int | None = None

    def __str__(self) -> str:
        return self.name if self.shots is None else f"{self.name}@{self.shots}"

    @property
    def path(self) -> Path | None:
        """Its task file; ``None`` for one of the harness."""
        return SHIPPED.get(self.name) or (Path(self.name) if self.name.endswith((".yaml", ".yml")) else None)


def resolve_tasks(tasks: str | Sequence[str]) -> list[str]:
    """The tasks that a request stands for; nothing is fetched.

    ``openllm`` (six tasks with their shots), ``cloze`` (shipped), a YAML file, or a task, group, tag or pattern of the
    harness; ``@N`` after any of them gives it N shots. Raises ``PruneAttnError`` for a name that nobody knows, with
    those like it, for a file that is no task file, and where the harness is not installed.
    """
    return [str(task) for task in resolve(tasks)]


def resolve(tasks: str | Sequence[str]) -> list[Task]:
    for module in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise PruneAttnError(
                "tasks are run by lm-evaluation-harness; pip install '.[eval]' in the clone of prune-attn"
            )
    texts = [t.strip() for text in ([tasks] if isinstance(tasks, str) else tasks) for t in text.split(",")]
    out: dict[str, Task] = {}
    for text in filter(None, texts):
        for task in _resolve_one(text):
            out.setdefault(str(task), task)
    if not out:
        raise PruneAttnError("no task is named; give --tasks openllm, a task of the harness, or a task file")
    return list(out.values())


def _resolve_one(text: str) -> list[Task]:
    name, at, number = text.rpartition("@")
    if not at or not number.isdigit():
        name, at, number = text, "", ""
    shots = int(number) if number else None
    if name == "openllm":
        return [Task(task, own if shots is None else shots) for task, (own, _) in OPENLLM.items()]
    if name in SHIPPED:
        return [Task(name, shots)]
    if name.endswith((".yaml", ".yml")):
        file = expand(name)
        task_file(file)
        return [Task(str(file.absolute()), shots)]
    found = task_manager().match_tasks([name])
    if not found:
        like = difflib.get_close_matches(
            name, [*OPENLLM, "openllm", *SHIPPED, *task_manager().all_tasks], n=4, cutoff=0.6
        )
        hint = f"did you mean {', '.join(dict.fromkeys(like))}?" if like else "`lm_eval ls tasks` lists them"
        raise PruneAttnError(f"unknown task {name!r}; {hint}")
    return [Task(task, shots) for task in found]


@functools.cache
def task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads 14,000 names, some seconds


def task_file(path: Path, functions: bool = False) -> dict[str, Any]:
    """The fields of a task file, what it includes merged in. Raises ``PruneAttnError`` where it is none."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise PruneAttnError(f"{path}: no such task file; see docs/guide/tasks.md")
    try:
        fields = load_yaml(path, resolve_func=functions)
    except (OSError, ValueError, ImportError, AttributeError, yaml.YAMLError) as error:
        raise PruneAttnError(f"{path}: is not a task file ({one_line(error)}); see docs/guide/tasks.md") from None
    if not isinstance(fields.get("task"), str):
        raise PruneAttnError(f"{path}: names no task; it needs a line `task: NAME`, see docs/guide/tasks.md")
    return fields


def load(task: Task, cache: str, seed: int) -> TaskDict:
    """The harness's task objects with their data. Raises ``PruneAttnError`` where the data cannot be had."""
    from lm_eval.tasks import TaskManager

    path = task.path
    try:
        if path:
            fields = task_file(path, functions=True)
            own = dict(fields.get("dataset_kwargs") or {})
            if "data_files" in own:  # beside the task file, wherever the command is run; its Arrow copy is temporary
                own = {"cache_dir": cache} | own | {"data_files": _beside(own["data_files"], path.absolute().parent)}
                fields["dataset_kwargs"] = own
            loaded = TaskManager(include_defaults=False).load([fields])
        else:
            loaded = task_manager().load([task.name])
    except PruneAttnError:
        raise
    except Exception as error:  # datasets, the Hub's client and the tasks' own code raise what they like
        raise PruneAttnError(
            f"task {task.name}: its data cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            + (
                "see docs/guide/tasks.md"
                if path
                else "run it once online (without HF_HUB_OFFLINE), then the cache in HF_HOME has it"
            )
        ) from error
    for one in loaded["tasks"].values():
        own_shots = one.get_config("num_fewshot")
        # the harness's rule: a task that says 0 has its examples in its text
        one.set_config(key="num_fewshot", value=own_shots or 0 if task.shots is None or own_shots == 0 else task.shots)
        one.set_fewshot_seed(seed=seed)
    return loaded


def check_apart(loaded: dict[Task, TaskDict]) -> None:
    """Raise ``PruneAttnError`` where one name would stand for two things in the results."""
    taken: dict[str, Any] = {}
    for task, data in loaded.items():
        for name, one in data["tasks"].items():
            what = (task.path, one.get_config("num_fewshot"))
            if taken.setdefault(name, what) != what:
                raise PruneAttnError(f"task {name}: asked for twice, from two files or with two numbers of shots")


def _beside(files: Any, folder: Path) -> Any:
    """Relative file names made absolute where such a file lies in the folder."""
    if isinstance(files, dict):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    return str(folder / files) if (folder / str(files)).exists() else files
