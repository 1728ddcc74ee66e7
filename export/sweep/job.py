"""The whole job: choose, measure, keep what is finished, and write the table and the plots at the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.staging import check_target, staged
from export.sweep.measure import expected_seconds, key, measure_perplexity, measure_speed, speed_columns
from export.sweep.plots import draw
from export.sweep.progress import Kept, kept, write_whole
from export.sweep.table import to_csv, to_markdown
from pruner import __version__, machine
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.checkpoint.generation import check_ids
from pruner.errors import PruneAttnError
from pruner.files import expand, read_json
from pruner.hub.source import fetch
from pruner.llama import SUBLAYERS
from pruner.machine import computing
from pruner.plan import PruningPlan, original_counts, parse_drop, percentage_meant
from pruner.plan_files import read_plan
from pruner.progress import Progress, Stages, Step, keeping
from pruner.select.choose import choose
from pruner.select.request import POSITIONAL, STRATEGIES, Calibration, Drop
from pruner.summary import identity, totals

if TYPE_CHECKING:
    from pruner.text import Texts

FORMAT = "prune-attn sweep"
RESULTS, PLANS = "sweep.json", "plans"
FILES = (RESULTS, "sweep.csv", "sweep.md", "perplexity.png", "speed.png", PLANS)
PROMPT, NEW_TOKENS = 512, 32


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
    *,
    text: Texts,
    calibration: Texts | None = None,
    text_field: str | None = None,
    sublayer: str = "attention",
    fractions: str = "10%,25%,33%,50%",
    strategy: str | None = None,
    window: int | None = None,
    limit: int | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    rounds: int = 10,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Perplexity on ``text`` and speed for each of ``sublayer``, ``strategy`` and ``fractions`` (comma-separated).

    ``source`` is a directory or a Hub id. An order is chosen once for each sublayer kind and strategy, for the largest
    fraction, on ``calibration`` (``samples`` of ``length`` tokens, ``seed``), and cut for the smaller ones. Perplexity:
    windows of ``window`` tokens (default: the model's context, at most 2,048) without overlap, the first ``limit`` of
    them. Speed: decode and prefill at batch 1, the sublayers really absent, timed in turn with the original ``rounds``
    times (0: not at all). It depends on how many sublayers are gone and not on which, so it is measured once for each
    kind and count.
    ``dtype``: by default the checkpoint's own on CUDA and float32 on the CPU.

    Whatever is finished is kept in ``OUTPUT.partial``, from which the same call goes on. ``output`` appears whole:
    ``sweep.json``, ``sweep.csv``, ``sweep.md``, two plots, and each order as a plan that ``convert --plan`` takes.
    ``threads``: see ``pruner.machine.computing``. Raises ``PruneAttnError`` for bad input, before anything is computed.
    """
    from pruner.evaluate.perplexity import sliding_windows
    from pruner.model import TorchLanguageModel
    from pruner.text import check_apart, load_tokenizer, read_text

    if not os.fspath(output):
        raise PruneAttnError("OUTPUT is empty; give a directory")
    output = expand(output)
    source = fetch(source, progress=progress)
    checkpoint = open_checkpoint(source)
    usual = (*POSITIONAL, "similarity", "search") if calibration is not None else POSITIONAL
    strategies = _choices("--strategy", strategy or ",".join(usual), STRATEGIES)
    sublayers = _choices("--sublayer", sublayer, SUBLAYERS)
    parts = _fractions(checkpoint, fractions, sublayers, strategies)
    guided = [name for name in strategies if name not in POSITIONAL]
    if guided and calibration is None:
        raise PruneAttnError(f"strategy {guided[0]} chooses by a text; give one with --calibration")
    if 0 < rounds < 5:
        raise PruneAttnError(f"--rounds {rounds}: too few for an interval; give 5 or more, or 0 for no timing")
    check_target(output, source, [shard.path for shard in checkpoint.shards], _not_ours, overwrite)

    tokenizer = load_tokenizer(source)
    test, given = read_text(text, tokenizer, text_field), None
    if guided:
        check_apart(text, calibration, text_field)
        given = read_text(calibration, tokenizer, text_field)
    for part in filter(None, (test, given)):
        check_ids(part.ids, checkpoint, part.path)
    context = checkpoint.decoder.context
    window = min(context, 2048) if window is None else window
    if window > context:
        raise PruneAttnError(f"--window {window}: the model's context is {context} tokens; give no more")
    windows = sliding_windows(test.ids, length=window, bos_id=tokenizer.bos_token_id)[:limit]
    prompts = test.ids[None, : min(PROMPT, context // 2)]  # (1, T)
    new_tokens = min(NEW_TOKENS, context - prompts.size)
    with computing(threads):
        device, dtype, runs_on = _machine(device, dtype)
        setting = {
            "source": checkpoint.fingerprint(),
            "sublayers": sublayers,
            "strategies": strategies,
            "fractions": parts,
            "text": {"name": test.name, "sha256": test.sha256, "bytes": test.bytes, "window": window,
                     "windows": len(windows), "tokens": sum(w.scored for w in windows)},
            "calibration": given and {"name": given.name, "sha256": given.sha256, "bytes": given.bytes,
                                      "samples": samples, "length": length, "seed": seed},
            "speed": {"batch": 1, "prompt": prompts.size, "new_tokens": new_tokens, "rounds": rounds}
                     if rounds else None,
            "dtype": dtype or "as stored",
            **runs_on,
        }  # fmt: skip

        tokens = hashlib.sha256(test.ids.tobytes()).hexdigest()  # the same text is others with another tokenizer
        also_equal = {"source": identity(checkpoint), "tokenizer": tokens, **machine.setting(device)}
        if progress is not None and (busy := machine.busy()):
            progress(Step(busy))
        with kept(output, setting, also_equal) as work, keeping(work.told):
            asked = None
            if calibration is not None:
                asked = Calibration(
                    calibration, text_field=text_field, samples=samples, length=length, seed=seed, device=device
                )
            plans: dict[tuple[str, str], PruningPlan] = {}
            for kind in sublayers:
                for name in strategies:
                    plans[kind, name] = _order(work, checkpoint, kind, name, parts, asked, progress)
            rows = [(*key, part, plan.cut(part, checkpoint)) for key, plan in plans.items() for part in parts]
            model = cache(lambda: TorchLanguageModel(source, device=device, dtype=dtype))
            chosen = [plan for *_, plan in rows]
            seconds = expected_seconds(checkpoint, chosen, windows, prompts.size, new_tokens, rounds, device)
            stages = Stages("measuring", seconds, progress)
            measure_perplexity(work, checkpoint, model, chosen, windows, stages)
            if rounds:
                measure_speed(work, model, chosen, prompts, new_tokens, rounds, stages)
            setting["finished"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            original = _row(checkpoint, work, None, "original", None, None)
            result = Sweep(output, setting, original, [_row(checkpoint, work, *row) for row in rows])
            _deliver(result, work, overwrite)
            work.discard()
    return result


def _deliver(result: Sweep, work: Kept, overwrite: bool) -> None:
    """Write the folder, whole or not at all."""
    measured = (result.setting, result.original, result.points)
    with staged(result.path, _not_ours if overwrite else lambda path: "exists") as directory:
        shutil.copytree(work.plans, directory / PLANS)
        (directory / RESULTS).write_text(json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        (directory / "sweep.csv").write_text(to_csv(result.original, result.points), "utf-8")
        (directory / "sweep.md").write_text(to_markdown(*measured), "utf-8")
        draw(directory, *measured)


def _choices(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in chosen:
        if name not in known:
            raise PruneAttnError(f"{option}: unknown {name!r}; choose of {', '.join(known)}, separated by commas")
    return chosen


def _fractions(checkpoint: Checkpoint, text: str, sublayers: list[str], strategies: list[str]) -> list[str]:
    """The fractions in the order given; refused where some strategy could not drop so many of some sublayer."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",")))
    last = checkpoint.decoder.num_layers - 1
    for sublayer in sublayers:
        # no strategy takes layer 0, and keep-last not the last one either
        able = set(checkpoint.decoder.present(sublayer)) - {0} - ({last} if "keep-last" in strategies else set())
        for part in parts:
            try:
                count = parse_drop(part, original_counts(checkpoint)[sublayer])
            except PruneAttnError as error:
                raise PruneAttnError(str(error).replace("--drop", "--fractions")) from None
            hint = percentage_meant(part, original_counts(checkpoint)[sublayer])
            if count > len(able):
                raise PruneAttnError(
                    f"--fractions {part}: that is {count} {sublayer} sublayers, and the strategies can drop only "
                    f"{len(able)} of this model's; ask for less{hint}"
                )
    return parts


def _machine(device: str, dtype: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """What it runs on: the device and the dtype that are taken, and what the record says of both."""
    import torch

    from pruner.device import check_cuda

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        hardware, dtype = f"{os.cpu_count()} cores, {machine.threads()} threads", dtype or "float32"
    else:
        check_cuda()
        hardware = torch.cuda.get_device_name(device)
    tools = {"prune-attn": __version__, "torch": torch.__version__, "transformers": version("transformers")}
    return device, dtype, {"device": device, "hardware": hardware, "threads": machine.threads(), "versions": tools}


def _order(
    work: Kept,
    checkpoint: Checkpoint,
    sublayer: str,
    strategy: str,
    parts: list[str],
    calibration: Calibration | None,
    progress: Progress | None,
) -> PruningPlan:
    """The plan for the largest of the fractions, chosen once; a search that was interrupted goes on."""
    file = work.plans / f"{sublayer}-{strategy}.json"

    def inside(step: Step) -> None:
        if progress is not None:  # there are several of them
            progress(replace(step, what=f"{step.what}, {sublayer} by {strategy}") if step.total else step)

    if not file.exists():
        most = max(parts, key=lambda part: parse_drop(part, original_counts(checkpoint)[sublayer]))
        partial = work.path / f"{file.stem}.partial.json"
        if strategy in POSITIONAL:
            plan = choose(checkpoint, Drop(most, sublayer, strategy)).plan
        else:
            assert calibration is not None
            calibration = replace(calibration, strategy=strategy, resume=True)
            plan = choose(checkpoint, Drop(most, sublayer), calibration, partial=partial, progress=inside).plan
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
