"""What was asked for, checked against the model and the machine before anything is computed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from export.sweep.options import Machine, Measure, Points
from pruner import __version__, machine
from pruner.checkpoint import Checkpoint
from pruner.checkpoint.generation import check_ids
from pruner.errors import PruneAttnError
from pruner.lists import listed
from pruner.llama import SUBLAYERS
from pruner.plan import original_counts, parse_drop, percentage_meant
from pruner.select.request import POSITIONAL, STRATEGIES, Calibration
from pruner.summary import identity

if TYPE_CHECKING:
    import numpy as np

    from pruner.evaluate.perplexity import Window
    from pruner.text import Text

PROMPT, NEW_TOKENS = 512, 32


@dataclass(frozen=True)
class Orders:
    """An order is chosen for each of ``sublayers`` and ``strategies``, and cut at each of ``fractions``."""

    sublayers: list[str]
    strategies: list[str]
    fractions: list[str]
    calibration: Calibration | None

    @property
    def guided(self) -> list[str]:
        """Strategies that choose by a text."""
        return [name for name in self.strategies if name not in POSITIONAL]


@dataclass(frozen=True)
class Inputs:
    """What is run: ``test`` in ``windows``, and ``prompts`` (1, T) with ``new_tokens`` after them, ``rounds`` times."""

    test: Text
    calibration: Text | None
    window: int
    windows: list[Window]
    prompts: np.ndarray
    new_tokens: int
    rounds: int


def read_points(checkpoint: Checkpoint, points: Points, calibration: Calibration | None) -> Orders:
    """``PruneAttnError`` for names that there are not, and where a strategy could not drop so many."""
    usual = (*POSITIONAL, "similarity", "search") if calibration is not None else POSITIONAL
    strategies = _choices("--strategy", points.strategies or usual, STRATEGIES)
    sublayers = _choices("--sublayer", points.sublayers, SUBLAYERS)
    orders = Orders(sublayers, strategies, _parts(points.fractions), calibration)
    _check_fractions(checkpoint, orders)
    if orders.guided and calibration is None:
        raise PruneAttnError(f"strategy {orders.guided[0]} chooses by a text; give one with --calibration")
    return orders


def read_inputs(checkpoint: Checkpoint, measure: Measure, orders: Orders) -> Inputs:
    """The texts, tokenized. ``PruneAttnError`` where they are the same, or do not fit the model."""
    from pruner.evaluate.perplexity import sliding_windows
    from pruner.text import check_apart, load_tokenizer, read_text

    tokenizer = load_tokenizer(checkpoint.path)
    test, given = read_text(measure.text, tokenizer, measure.text_field), None
    if orders.guided and (by := orders.calibration) is not None:
        check_apart(measure.text, by.text, measure.text_field, by.text_field)
        given = read_text(by.text, tokenizer, by.text_field)
    for part in filter(None, (test, given)):
        check_ids(part.ids, checkpoint, part.path)
    context = checkpoint.decoder.context
    window = min(context, 2048) if measure.window is None else measure.window
    if window > context:
        raise PruneAttnError(f"--window {window}: the model's context is {context} tokens; give no more")
    windows = sliding_windows(test.ids, length=window, bos_id=tokenizer.bos_token_id)[: measure.limit]
    prompts = test.ids[None, : min(PROMPT, context // 2)]  # (1, T)
    new_tokens = min(NEW_TOKENS, context - prompts.size)
    return Inputs(test, given, window, windows, prompts, new_tokens, measure.rounds)


def pick_machine(asked: Machine) -> tuple[Machine, dict[str, Any]]:
    """The device and the dtype that are taken, and what the record says of them."""
    import torch

    from pruner.device import check_cuda

    device, dtype = asked.device, asked.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        hardware, dtype = f"{os.cpu_count()} cores, {machine.threads()} threads", dtype or "float32"
    else:
        check_cuda()
        hardware = torch.cuda.get_device_name(device)
    tools = {"prune-attn": __version__, "torch": torch.__version__, "transformers": version("transformers")}
    facts = {"device": device, "hardware": hardware, "threads": machine.threads(), "versions": tools}
    return replace(asked, device=device, dtype=dtype), {"dtype": dtype or "as stored", **facts}


def recorded(checkpoint: Checkpoint, orders: Orders, inputs: Inputs, runs_on: dict[str, Any]) -> dict[str, Any]:
    """What ``sweep.json`` says of what was measured, on what and with what."""
    test, given, by = inputs.test, inputs.calibration, orders.calibration
    chosen_by = None
    if given is not None and by is not None:
        chosen_by = {"name": given.name, "sha256": given.sha256, "bytes": given.bytes, "samples": by.samples,
                     "length": by.length, "seed": by.seed, "objective": by.objective}  # fmt: skip
    speed = {"batch": 1, "prompt": inputs.prompts.size, "new_tokens": inputs.new_tokens, "rounds": inputs.rounds}
    return {
        "source": checkpoint.fingerprint(),
        "sublayers": orders.sublayers,
        "strategies": orders.strategies,
        "fractions": orders.fractions,
        "text": {"name": test.name, "sha256": test.sha256, "bytes": test.bytes, "window": inputs.window,
                 "windows": len(inputs.windows), "tokens": sum(w.scored for w in inputs.windows)},
        "calibration": chosen_by,
        "speed": speed if inputs.rounds else None,
        **runs_on,
    }  # fmt: skip


def also_equal(checkpoint: Checkpoint, inputs: Inputs, device: str) -> dict[str, Any]:
    """What else must be equal for figures of two calls to belong together."""
    tokens = hashlib.sha256(inputs.test.ids.tobytes()).hexdigest()  # the same text is others with another tokenizer
    return {"source": identity(checkpoint), "tokenizer": tokens, **machine.setting(device)}


def _choices(option: str, given: str | Sequence[str], known: tuple[str, ...]) -> list[str]:
    chosen = _parts(given)
    for name in chosen:
        if name not in known:
            raise PruneAttnError(f"{option}: unknown {name!r}; choose of {', '.join(known)}, separated by commas")
    return chosen


def _parts(given: str | Sequence[Any]) -> list[str]:
    """In the order given, each once."""
    return list(dict.fromkeys(listed(given)))


def _check_fractions(checkpoint: Checkpoint, orders: Orders) -> None:
    """Refuse what some strategy could not drop of some sublayer."""
    last = checkpoint.decoder.num_layers - 1
    for sublayer in orders.sublayers:
        # no strategy takes layer 0, and keep-last not the last one either
        never = {0, last} if "keep-last" in orders.strategies else {0}
        able = set(checkpoint.decoder.present(sublayer)) - never
        whole = original_counts(checkpoint)[sublayer]
        for part in orders.fractions:
            try:
                count = parse_drop(part, whole)
            except PruneAttnError as error:
                raise PruneAttnError(str(error).replace("--drop", "--fractions")) from None
            if count > len(able):
                raise PruneAttnError(
                    f"--fractions {part}: that is {count} {sublayer} sublayers, and the strategies can drop only "
                    f"{len(able)} of this model's; ask for less{percentage_meant(part, whole)}"
                )
