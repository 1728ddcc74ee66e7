"""The whole job: choose, measure, keep what is finished, and write the table and the plots at the end."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.staging import check_target, staged
from export.sweep.table import to_csv, to_markdown
from pruner import __version__
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.errors import PruneAttnError
from pruner.llama import SUBLAYERS
from pruner.plan import PruningPlan, original_counts, parse_drop, plan_drop, read_plan
from pruner.select import POSITIONAL, STRATEGIES
from pruner.summary import totals

if TYPE_CHECKING:
    from pruner.evaluate.perplexity import Window
    from pruner.model import TorchLanguageModel

FORMAT = "prune-attn sweep"
RESULTS, PLANS = "sweep.json", "plans"
FILES = (RESULTS, "sweep.csv", "sweep.md", "perplexity.png", "speed.png", PLANS)
PROMPT, NEW_TOKENS = 512, 64

Progress = Callable[[str, int, int], None]  # stage, done, total


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
    text: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | None = None,
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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Perplexity on ``text`` and speed for each of ``sublayer``, ``strategy`` and ``fractions`` (comma-separated).

    An order is chosen once for each sublayer kind and strategy, for the largest fraction, on ``calibration``
    (``samples`` of ``length`` tokens, ``seed``), and cut for the smaller ones. Perplexity: windows of ``window`` tokens
    (default: the model's context, at most 2,048) without overlap, the first ``limit`` of them. Speed: decode and
    prefill at batch 1, the sublayers really absent, timed in turn with the original ``rounds`` times (0: not at all).
    It depends on how many sublayers are gone and not on which, so it is measured once for each kind and count.
    ``dtype``: by default the checkpoint's own on CUDA and float32 on the CPU.

    Whatever is finished is kept in ``OUTPUT.partial``, from which the same call goes on. ``output`` appears whole:
    ``sweep.json``, ``sweep.csv``, ``sweep.md``, two plots, and each order as a plan that ``convert --plan`` takes.
    Raises ``PruneAttnError`` for bad input, before anything is computed.
    """
    from pruner.evaluate.perplexity import sliding_windows
    from pruner.text import load_tokenizer, read_text

    if not os.fspath(output):
        raise PruneAttnError("OUTPUT is empty; give a directory")
    source, output = Path(source), Path(output)
    checkpoint = open_checkpoint(source)
    usual = (*POSITIONAL, "similarity", "search") if calibration is not None else POSITIONAL
    strategies = _choices("--strategy", strategy or ",".join(usual), STRATEGIES)
    sublayers = _choices("--sublayer", sublayer, SUBLAYERS)
    parts = _fractions(checkpoint, fractions, sublayers, strategies)
    guided = [name for name in strategies if name not in POSITIONAL]
    if guided and calibration is None:
        raise PruneAttnError(f"strategy {guided[0]} chooses by a text; give one with --calibration")
    if 0 < rounds < 6:
        raise PruneAttnError(f"--rounds {rounds}: a 95% interval takes at least 6; give more, or 0 for no timing")
    check_target(output, source, [shard.path for shard in checkpoint.shards], _not_ours, overwrite)

    tokenizer = load_tokenizer(source)
    test, given = read_text(text, tokenizer), read_text(calibration, tokenizer) if guided else None
    if given and given.sha256 == test.sha256:
        raise PruneAttnError(f"{text}: is the calibration text too; test the choice on text that it was not made on")
    context = int(checkpoint.config.get("max_position_embeddings", 2048))
    window = min(context, 2048) if window is None else window
    if window > context:
        raise PruneAttnError(f"--window {window}: the model's context is {context} tokens; give no more")
    windows = sliding_windows(test.ids, length=window, bos_id=tokenizer.bos_token_id)[:limit]
    prompt = [int(i) for i in test.ids[: min(PROMPT, context // 2)]]
    new_tokens = min(NEW_TOKENS, context - len(prompt))
    device, dtype, machine = _machine(device, dtype)
    setting = {
        "source": checkpoint.fingerprint(),
        "sublayers": sublayers,
        "strategies": strategies,
        "fractions": parts,
        "text": {"name": test.path.name, "sha256": test.sha256, "bytes": test.bytes, "window": window,
                 "windows": len(windows), "tokens": sum(w.scored for w in windows)},
        "calibration": given and {"name": given.path.name, "sha256": given.sha256, "bytes": given.bytes,
                                  "samples": samples, "length": length, "seed": seed},
        "speed": {"batch": 1, "prompt": len(prompt), "new_tokens": new_tokens, "rounds": rounds} if rounds else None,
        "dtype": dtype or "as stored",
        **machine,
    }  # fmt: skip

    with _kept(output, setting) as kept:
        show = progress or (lambda stage, done, total: None)
        calibrated = {"text": calibration, "samples": samples, "length": length, "seed": seed, "device": device}
        plans: dict[tuple[str, str], PruningPlan] = {}
        for kind in sublayers:
            for name in strategies:
                show(f"choosing {kind} by {name}", len(plans), len(sublayers) * len(strategies))
                plans[kind, name] = _order(kept, checkpoint, kind, name, parts, calibrated)
        rows = [(*key, part, plan.cut(part, checkpoint)) for key, plan in plans.items() for part in parts]
        open_model = cache(lambda: _Models(source, device, dtype))
        _measure_perplexity(kept, open_model, [plan for *_, plan in rows], windows, show)
        if rounds:
            _measure_speed(kept, open_model, [plan for *_, plan in rows], prompt, new_tokens, rounds, show)
        setting["finished"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        original = _row(checkpoint, kept, None, "original", "0%", PruningPlan("mixed", "original", (), ()))
        result = Sweep(output, setting, original, [_row(checkpoint, kept, *row) for row in rows])
        _write(result, kept, overwrite)
    return result
