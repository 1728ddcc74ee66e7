"""Tasks of lm-evaluation-harness for any ``LanguageModel``: names, data, shots, and what the field reports of each."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pruner.errors import MachineError, PruneAttnError, one_line
from pruner.evaluate.task_files import OPENLLM, Task, check_apart, load, resolve
from pruner.model import LanguageModel
from pruner.progress import Progress, Step

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedTokenizerBase

_METRICS = ("acc_norm", "exact_match", "acc", "f1")  # of several, the first of these is the one that people quote
_FILTERS = ("strict-match", "none")


def run_tasks(
    make_model: Callable[[], LanguageModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 8,
    seed: int | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
    done: dict[str, Any] | None = None,
    save: Callable[[str, Any], None] | None = None,
) -> dict[str, Any]:
    """Run tasks on one model; values as fractions, in JSON types.

    A ``TorchLanguageModel`` is run by the harness's own Hugging Face model, anything else by ``LanguageModelLM``.
    ``make_model`` is called once, after all the data is there. ``limit``: the first so many items of each task.
    ``seed``: of the few-shot examples; ``None`` takes the harness's own seeds, with which others publish.
    ``max_length``: tokens of context, by default the model's. ``save`` gets each finished task; given back as ``done``
    it is not run again. Out of memory, the batch is halved and a note says so.

    Raises ``PruneAttnError`` for names (see ``resolve_tasks``), for data that cannot be fetched, and for what a task
    asks that the model cannot do.
    """
    wanted, done = resolve(tasks), dict(done or {})
    todo = [task for task in wanted if str(task) not in done]
    from lm_eval import __version__
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    first, other = (DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED) if seed is None else (seed, seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="prune-attn-", ignore_cleanup_errors=True))
        loaded = {task: load(task, cache, other) for task in todo}
        check_apart(loaded)
        if todo:
            model = make_model()
        for task in todo:
            entries = _evaluate(
                task, loaded[task], model, tokenizer, limit, batch, max_length, (first, other), progress
            )
            done[str(task)] = entries
            if save:
                save(str(task), entries)
    found = {name: entry for task in wanted for name, entry in done[str(task)].items()}
    averaged = [name for name, entry in found.items() if _is_share(entry)]
    return {
        "harness": __version__,
        "limit": limit,
        "batch": batch,
        "seeds": {"python": first, "numpy": other, "torch": other, "fewshot": other},
        "tasks": found,
        "averaged": averaged,
        "average": statistics.fmean(found[name]["value"] for name in averaged) if averaged else None,
    }


def compare_tasks(original: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """Two results of ``run_tasks`` side by side: differences, ratios, and standard errors of the paired differences.

    Both models answered the same items, so the error of the difference is that of the items' differences, which is
    much smaller than the two models' own errors suggest. ``None`` where a task has no value an item.
    """
    rows: dict[str, Any] = {}
    for name in original["tasks"]:
        if name not in pruned["tasks"]:
            continue
        a, b = original["tasks"][name], pruned["tasks"][name]
        rows[name] = {
            "metric": a["metric"],
            "original": a["value"],
            "pruned": b["value"],
            "difference": b["value"] - a["value"],
            "stderr": _paired_stderr(a["items"], b["items"]) if a["hash"] == b["hash"] else None,
            "ratio": b["value"] / a["value"] if a["value"] else None,
        }
    names = [name for name in original["averaged"] if name in rows and name in pruned["averaged"]]
    average = None
    if names:
        before, after = (statistics.fmean(rows[n][key] for n in names) for key in ("original", "pruned"))
        errors = [rows[name]["stderr"] for name in names]
        average = {
            "original": before,
            "pruned": after,
            "difference": after - before,
            "stderr": None if None in errors else math.hypot(*errors) / len(errors),
            "ratio": after / before if before else None,
        }
    return {"tasks": rows, "average": average}


# -- names and data ----------------------------------------------------------------------------------------------------


# -- running -----------------------------------------------------------------------------------------------------------


def _evaluate(
    task: Task,
    loaded: TaskDict,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    batch: int,
    max_length: int | None,
    seeds: tuple[int, int],
    progress: Progress | None,
) -> dict[str, Any]:
    """{task: entry}: one for a task or a group that has a total, one for each task of any other group or tag."""
    import copy

    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    from pruner.evaluate.harness import LanguageModelLM, QuietHFLM
    from pruner.model import TorchLanguageModel, inference

    report = (
        (lambda so_far, total: progress(Step(str(task), so_far, total, "requests"))) if progress is not None else None
    )
    length = max_length or model.max_length
    tokenizer = copy.deepcopy(tokenizer)  # the harness gives it a pad token
    if isinstance(model, TorchLanguageModel):
        lm = QuietHFLM(model.model, tokenizer, batch=batch, max_length=length, report=report)
    else:
        lm = LanguageModelLM(model, tokenizer, batch=batch, max_length=length, report=report)
    while True:
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.manual_seed(seeds[1])
        lm.truncated = 0
        full = None
        try:
            with inference(), contextlib.redirect_stdout(io.StringIO()):
                results = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=True)
            break
        except (MachineError, MemoryError, torch.OutOfMemoryError) as error:
            full = error
        except (AssertionError, ValueError, NotImplementedError) as error:
            raise PruneAttnError(f"task {task.name}: {one_line(error)}") from error
        # out of the handler, whose traceback would keep the memory
        if lm.batch_size == 1:
            raise MachineError(f"task {task.name}: out of memory with a batch of 1 ({one_line(full)})") from None
        lm.batch_size_per_gpu = max(1, lm.batch_size // 2)
        torch.cuda.empty_cache()
    notes = []
    if lm.batch_size != batch:
        notes.append(f"batch {lm.batch_size}: {batch} ran out of memory")
    if lm.truncated:
        notes.append(f"{lm.truncated} requests were longer than {lm.max_length} tokens and lost their beginning")
    groups = results.get("groups", {})
    own = {task.name: list(loaded["tasks"])} if task.name in groups else {name: [name] for name in loaded["tasks"]}
    entries = {name: _entry(name, leaves, results) for name, leaves in own.items()}
    return {name: entry | {"notes": notes} for name, entry in entries.items() if entry}


def _entry(name: str, leaves: list[str], results: dict[str, Any]) -> dict[str, Any] | None:
    row = (results.get("groups", {}) if name not in leaves else results["results"])[name]
    metrics = {
        key: {"value": float(value), "stderr": _number(row.get("{}_stderr,{}".format(*key.split(",", 1))))}
        for key, value in row.items()
        if "," in key and "_stderr," not in key and _number(value) is not None
    }
    if not metrics:
        return None
    primary = OPENLLM[name][1] if name in OPENLLM and OPENLLM[name][1] in metrics else _primary(metrics)
    metric, filtered = primary.split(",", 1)
    samples = [s for leaf in leaves for s in results["samples"][leaf] if s["filter"] == filtered]
    items = [_number(sample.get(metric)) for sample in samples]
    shots = sorted({results["n-shot"][leaf] for leaf in leaves})
    better = {results["higher_is_better"][leaf].get(metric) for leaf in leaves}
    # as the harness's own task_hashes: every item, prompt and target
    hashed = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    return {
        "metric": metric,
        "filter": filtered,
        **metrics[primary],
        "higher_is_better": better.pop() if len(better) == 1 else None,
        "shots": shots[0] if len(shots) == 1 else shots,
        "n": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
        "version": results["versions"].get(name),
        "hash": hashlib.sha256(hashed.encode()).hexdigest(),
        "metrics": metrics,
        "items": None if None in items else items,
    }


def _primary(metrics: dict[str, Any]) -> str:
    def rank(key: str) -> tuple[int, int]:
        metric, filtered = key.split(",", 1)
        return (
            _METRICS.index(metric) if metric in _METRICS else len(_METRICS),
            _FILTERS.index(filtered) if filtered in _FILTERS else len(_FILTERS),
        )

    return min(metrics, key=rank)  # the first of equals: tasks list their metrics in order


def _is_share(entry: dict[str, Any]) -> bool:
    return entry["higher_is_better"] is True and 0 <= entry["value"] <= 1


def _paired_stderr(a: list[float] | None, b: list[float] | None) -> float | None:
    if a is None or b is None or len(a) != len(b) or len(a) < 2:
        return None
    return statistics.stdev(y - x for x, y in zip(a, b, strict=True)) / math.sqrt(len(a))


def _number(value: Any) -> float | int | None:
    """A finite number, whole where it is one; ``None`` for anything else: "N/A", and the error of one item."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and chatter of the harness, datasets and transformers: errors alone. Put back afterwards."""
    import logging

    import datasets
    import lm_eval.api.task
    import transformers

    verbosity, bar = transformers.logging.get_verbosity(), lm_eval.api.task.tqdm
    bars = datasets.utils.are_progress_bars_disabled()
    level = logging.getLogger("lm_eval").level
    processes = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # it would bootstrap in forks of a process that has threads
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        transformers.logging.set_verbosity(verbosity)
        logging.getLogger("lm_eval").setLevel(level)
        if processes is None:
            del os.environ["DISABLE_MULTIPROC"]
