"""What was asked for, checked against the two models and the machine before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.onnx.runtime import why_not_installed
from export.report import RESULTS, VERSION
from export.report.write import is_ours
from export.validate.corpus import Corpus, read_corpus
from export.validate.facts import dropped_layers
from export.validate.limits import Limits
from export.validate.options import BACKENDS, Accuracy, Compute, Latency, Tasks
from pruner import __version__
from pruner.checkpoint import Checkpoint
from pruner.device import pick_device
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.evaluate.latency import LEAST_REPEATS
from pruner.files import expand
from pruner.lists import listed
from pruner.machine import setting as machine_setting
from pruner.names import GRAPH
from pruner.summary import identity

_PROMPTS = (128, 512, 2048)


@dataclass(frozen=True)
class Setting:
    """One validation. ``options`` is what ``results.json`` says of what was asked for.

    ``dtypes`` are by backend; ``stored`` is the pruned model's, ``converted`` the same where the original's is another.
    ``cases`` are (batch, prompt) pairs; ``ids`` (N,) what is run where no text is.
    """

    checkpoints: dict[str, Checkpoint]
    attention: list[int]
    mlp: list[int]
    output: Path
    device: str
    stored: str
    converted: str | None
    dtypes: dict[str, str]
    backends: list[str]
    context: int
    seed: int
    same_function: bool
    corpus: Corpus | None
    ids: np.ndarray
    latency: Latency | None
    cases: list[tuple[int, int]]
    compiled: bool
    tasks: list[str]
    limit: int | None
    limits: Limits
    options: dict[str, Any]
    notes: list[str]

    def key(self) -> list[Any]:
        """What must be equal for parts of two runs to belong together."""
        models = map(identity, self.checkpoints.values())
        return [VERSION, __version__, *models, self.device, self.dtypes, machine_setting(self.device), self.seed]


def settle(
    original: Checkpoint,
    pruned: Checkpoint,
    output: str | os.PathLike[str] | None,
    accuracy: Accuracy | None,
    tasks: Tasks | None,
    latency: Latency | None,
    same_function: bool,
    compute: Compute,
    limits: Limits,
) -> Setting:
    """``PruneAttnError`` for what cannot be measured."""
    if not (accuracy or tasks or latency or same_function):
        raise PruneAttnError("nothing is to be measured; ask for a part at least")
    notes = []
    same_function = same_function or bool(accuracy or tasks)  # without it no loss can be called the method's
    if accuracy is None:
        notes.append(
            "accuracy was not measured: no text to measure on was given (--text, or --validation-text of convert)"
        )
    if not same_function:
        notes.append("whether the pruned model is the original without those sublayers was not checked here")
    attention, mlp = dropped_layers(original, pruned)
    place = pruned.path / "report" if output is None else expand(output)
    _check_output(place, original.path)
    device = pick_device(compute.device)
    stored, converted, dtype = _dtypes(original, pruned, compute.dtype, device)
    backends = _backends(compute.backends, pruned.path, device, stored, dtype, notes)
    context = min(original.decoder.context, pruned.decoder.context)
    vocabulary = original.decoder.vocab_size
    if vocabulary != pruned.decoder.vocab_size:
        raise PruneAttnError(f"{pruned.path}: its vocabulary is not the original's")
    corpus = read_corpus(accuracy, original, pruned, context) if accuracy else None
    notes += corpus.notes if corpus else []
    setting = Setting(
        checkpoints={"original": original, "pruned": pruned},
        attention=attention,
        mlp=mlp,
        output=place,
        device=device,
        stored=stored,
        converted=converted,
        dtypes={"torch": dtype, "torch-compiled": dtype, "onnx": stored},
        backends=backends,
        context=context,
        seed=compute.seed,
        same_function=same_function,
        corpus=corpus,
        ids=corpus.text.ids if corpus else _random_ids(vocabulary, compute.seed),
        latency=latency,
        cases=_cases(latency, context) if latency else [],
        compiled=latency is not None and "torch" in backends and _wants_compiled(latency, device),
        tasks=_task_names(tasks) if tasks else [],
        limit=tasks.limit if tasks else None,
        limits=limits,
        options=_recorded(accuracy, tasks, latency, compute),
        notes=notes,
    )
    limits.need(corpus is not None, bool(setting.tasks), latency is not None)
    return setting


def _random_ids(vocabulary: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3 % vocabulary, vocabulary, 1 << 16)


def _recorded(
    accuracy: Accuracy | None, tasks: Tasks | None, latency: Latency | None, compute: Compute
) -> dict[str, Any]:
    """For ``results.json``, which says elsewhere which text, threads and models these are."""
    groups = [vars(group) for group in (accuracy, tasks, latency, compute) if group is not None]
    found = {"limit": None} | {name: value for group in groups for name, value in group.items()}
    return {name: value for name, value in found.items() if name not in ("text", "threads", "work")}


def _dtypes(original: Checkpoint, pruned: Checkpoint, asked: str | None, device: str) -> tuple[str, str | None, str]:
    """What the pruned model is stored in, the same where it was converted to it, and what PyTorch computes in."""
    stored = WEIGHT_DTYPES[pruned.dtypes[0]]
    converted = stored if WEIGHT_DTYPES[original.dtypes[0]] != stored else None
    if asked is None:
        asked = "float32" if device == "cpu" and converted is None else stored
    elif converted and asked != converted:
        raise PruneAttnError(
            f"{pruned.path}: was converted to {converted}, so that only --dtype "
            f"{converted} gives both models the same weights; leave --dtype out"
        )
    if asked not in ("float32", "float16", "bfloat16"):
        raise PruneAttnError(f"unknown dtype {asked!r}; choose float16, bfloat16 or float32")
    return stored, converted, asked


def _backends(
    asked: str | Sequence[str] | None, pruned: Path, device: str, stored: str, dtype: str, notes: list[str]
) -> list[str]:
    why = _why_no_onnx(pruned, device, stored)
    if asked is None:
        if why:
            notes.append(f"ONNX Runtime was not measured: {why}")
        return ["torch"] if why else list(BACKENDS)
    backends = choices(asked, BACKENDS, "--backend")
    if "onnx" in backends and why:
        raise PruneAttnError(f"{why}; or leave onnx out of --backend")
    if stored != dtype and len(backends) == len(BACKENDS):
        notes.append(f"PyTorch computes in {dtype} here, ONNX Runtime in {stored}")
    return backends


def _why_no_onnx(pruned: Path, device: str, stored: str) -> str | None:
    if not (pruned / GRAPH).is_file():
        return f"{pruned / GRAPH}: missing; prune-attn export {pruned} writes it, or says why it cannot"
    if device == "cpu" and stored == "bfloat16":
        return f"{pruned}: bfloat16 does not run on the CPU in ONNX Runtime"
    if device == "cuda" and stored == "float32":
        return f"{pruned}: float32 does not run on CUDA in ONNX Runtime"
    return why_not_installed()


def _cases(asked: Latency, context: int) -> list[tuple[int, int]]:
    new, batches = asked.new_tokens, _numbers(asked.batches, "--batch")
    if not asked.seconds >= 0:  # nan too
        raise PruneAttnError(f"--seconds {asked.seconds}: must be 0 or more")
    if asked.repeats < LEAST_REPEATS:
        raise PruneAttnError(f"--repeats: at least {LEAST_REPEATS} are needed for an interval")
    if new < 2:
        raise PruneAttnError("--new-tokens: at least 2 are needed to time a decode step")
    if asked.prompts is not None:
        prompts = _numbers(asked.prompts, "--prompt")
        for prompt in prompts:
            if prompt + new > context:
                raise PruneAttnError(
                    f"--prompt {prompt} and --new-tokens {new} do not fit the context of {context} tokens"
                )
    else:
        room = context - new
        if room < 1:
            raise PruneAttnError(f"--new-tokens {new} leaves no prompt in the context of {context} tokens")
        prompts = [prompt for prompt in _PROMPTS if prompt <= room]
        if len(prompts) < len(_PROMPTS) and room not in prompts:
            prompts.append(room)
    return [(batch, prompt) for batch in batches for prompt in prompts]


def _wants_compiled(asked: Latency, device: str) -> bool:
    return device == "cuda" if asked.compiled is None else asked.compiled


def _task_names(asked: Tasks) -> list[str]:
    from pruner.evaluate.task_files import resolve_tasks

    return resolve_tasks(asked.names)


def choices(given: str | Sequence[str], known: Sequence[str], option: str) -> list[str]:
    """Those of ``known`` that are given, separated by commas in a text."""
    chosen = [part for part in listed(given) if part]
    for part in chosen:
        if part not in known:
            raise PruneAttnError(f"{option} {part!r}: choose of {', '.join(known)}")
    if not chosen:
        raise PruneAttnError(f"{option} names nothing; choose of {', '.join(known)}")
    return [part for part in known if part in chosen]


def _numbers(given: str | Sequence[int], option: str) -> list[int]:
    parts = listed(given)
    if not parts or not all(part.isdecimal() and 0 < int(part) < 1 << 20 for part in parts):
        text = given if isinstance(given, str) else ",".join(parts)
        raise PruneAttnError(f"{option} {text!r}: write whole numbers over 0, for example 1,8")
    return sorted({int(part) for part in parts})


def _check_output(output: Path, original: Path) -> None:
    """Refuse a directory that holds something else than a report, or lies in the original, which is never touched."""
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(original)):
        raise PruneAttnError(f"{output}: lies in the original; choose another directory with --output")
    if output.is_dir():
        strange = [p for p in output.iterdir() if not is_ours(p.name)]
        if strange and not (output / RESULTS).is_file():
            raise PruneAttnError(f"{output}: holds {strange[0].name} and no report; choose another directory")
    elif output.exists() or output.is_symlink():
        raise PruneAttnError(f"{output}: is not a directory; choose another one")
