"""A pruning plan: which sublayers go, in what order, how they were chosen and from which model. JSON in and out.

Two foreign formats are read too: EvoPress's ``layer_drop_config.txt`` (one of none|attn|mlp|attn+mlp a line) and
LLM-Drop's ``drop_attn_list`` / ``drop_mlp_list`` (a ``config.json`` that has them).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError
from pruner.llama import SUBLAYERS, Decoder
from pruner.record import FORMAT, LONGEST_REQUEST, MOST_LAYERS, read_record

VERSION = 1
NOTHING = "none"  # the strategy of a plan that drops nothing


@dataclass(frozen=True)
class PruningPlan:
    """Sublayers to drop, in the source's present numbers (from 0).

    ``order`` lists layers in the order in which their ``sublayer`` goes; the first ``drop`` of it are dropped. Plans
    without an order (``sublayer`` "mixed") name both sets. ``requested`` is what was asked for, as it was written;
    ``source`` is ``Checkpoint.fingerprint()`` of the model the plan was made for (``None``: it came without one).
    ``sets`` has, for counts at which the best set is not the beginning of the order, that set. ``selection`` says how a
    calibrated plan came about: objective, scores in the order's order, calibration text.
    """

    sublayer: str
    strategy: str
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    order: tuple[int, ...] | None = None
    requested: str | None = None
    source: dict[str, Any] | None = field(default=None, repr=False)
    sets: dict[int, tuple[int, ...]] | None = None
    selection: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, sublayer: str, strategy: str, order: Iterable[int], drop: int, requested: str) -> PruningPlan:
        """The plan that drops the first ``drop`` layers' ``sublayer`` of ``order``."""
        order = tuple(order)
        dropped = tuple(sorted(order[:drop]))
        attention = dropped if sublayer in ("attention", "block") else ()
        mlp = dropped if sublayer in ("mlp", "block") else ()
        return cls(sublayer, strategy, attention, mlp, order, requested)

    @classmethod
    def nothing(cls) -> PruningPlan:
        """The plan that drops nothing: the same model, laid out anew."""
        return cls("mixed", NOTHING, (), ())

    def cut(self, drop: str, checkpoint: Checkpoint) -> PruningPlan:
        """This plan with another number of ``checkpoint``'s sublayers, taken from the beginning of its order."""
        if self.order is None:
            raise PruneAttnError(
                "the plan names a set of sublayers without an order, so --drop cannot cut it; leave --drop out"
            )
        count = parse_drop(drop, original_counts(checkpoint)[self.sublayer])
        if count > len(self.order):
            hint = percentage_meant(drop, original_counts(checkpoint)[self.sublayer])
            raise PruneAttnError(f"--drop {drop}: the plan's order has only {len(self.order)} layers; drop fewer{hint}")
        first = set((self.sets or {}).get(count, self.order[:count]))
        order = tuple(sorted(self.order, key=lambda layer: layer not in first))  # stable: otherwise as it was
        plan = PruningPlan.of(self.sublayer, self.strategy, order, count, drop)
        plan = replace(plan, source=self.source, sets=self.sets, selection=self.selection)
        return only_present(plan, checkpoint.decoder)

    def to_json(self) -> dict[str, Any]:
        """The plan as the JSON object that ``read_plan`` reads."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "sublayer": self.sublayer,
            "strategy": self.strategy,
            "requested": self.requested,
            "order": None if self.order is None else list(self.order),
            "attention": list(self.attention),
            "mlp": list(self.mlp),
            "source": self.source,
        } | {
            name: value
            for name, value in (
                ("sets", None if self.sets is None else {str(n): list(layers) for n, layers in self.sets.items()}),
                ("selection", self.selection),
            )
            if value is not None
        }

    def check(self, decoder: Decoder, *, allow_first_layer: bool = False, allow_all: bool = False) -> Decoder:
        """The decoder that is left. Raises ``PruneAttnError`` for a plan that this decoder must not or cannot get."""
        for kind, layers in (("attention", self.attention), ("mlp", self.mlp)):
            if len(set(layers)) != len(layers):
                twice = Counter(layers).most_common(1)[0][0]
                raise PruneAttnError(f"layer {twice} is given twice; name each layer once")
            present = set(decoder.present(kind))
            for layer in layers:
                if not 0 <= layer < decoder.num_layers:
                    raise PruneAttnError(
                        f"layer {layer} is out of range; the model has layers 0 to {decoder.num_layers - 1}"
                    )
                if layer not in present:
                    name = "attention" if kind == "attention" else "MLP"
                    raise PruneAttnError(f"layer {layer} has no {name} left: it was dropped before; leave it out")
        if not self.attention and not self.mlp:
            raise PruneAttnError("nothing to drop; name at least one sublayer")
        left = decoder.without(self.attention, self.mlp)
        if not left.present("block"):
            raise PruneAttnError("every block would be dropped and no model be left; drop fewer")
        for kind, dropped in (("attention", self.attention), ("mlp", self.mlp)):
            if dropped and not left.present(kind) and not allow_all:
                name = "attention" if kind == "attention" else "MLP"
                raise PruneAttnError(f"every {name} sublayer would be dropped; add --allow-all if you mean it")
        if 0 in self.attention and not (allow_first_layer or allow_all):
            raise PruneAttnError(
                "dropping layer 0's attention breaks vLLM and llama.cpp's own converter and costs most accuracy; "
                "leave layer 0 out, or add --allow-first-layer"
            )
        return left


def parse_drop(text: str, original: int) -> int:
    """``4`` is a count; ``33%`` is of the ``original`` number of sublayers, rounded half up, at least one."""
    text = text.strip()
    if re.fullmatch(r"\d{1,9}", text):
        count = int(text)
    elif re.fullmatch(r"\d{1,9}(\.\d{1,9})?\s*%", text):
        fraction = Fraction(text.rstrip("% ")) / 100
        if fraction > 1:
            raise PruneAttnError(f"--drop {text}: more than 100% cannot be dropped")
        count = max(1, int(fraction * original + Fraction(1, 2))) if fraction else 0
    else:
        raise PruneAttnError(f"--drop {text!r} is neither a count such as 4 nor a percentage such as 33%")
    if count == 0:
        raise PruneAttnError(f"--drop {text} drops nothing; ask for at least one sublayer")
    return count


def percentage_meant(text: str, original: int) -> str:
    """What to add to a refusal of ``text``, where it is a count above the model's and was likely a percentage."""
    text = text.strip()
    return f", or did you mean {text}%?" if text.isdecimal() and original < int(text) <= 100 else ""


def parse_layers(text: str) -> tuple[int, ...]:
    """``22-29,31`` to layer numbers, in the order given; a range includes both its ends."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise PruneAttnError(f"--layers {text!r} is written wrongly; write for example 22-29,31")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(layers) + last - first >= MOST_LAYERS or len(text) > LONGEST_REQUEST:
            raise PruneAttnError(f"--layers {text!r} names more than {MOST_LAYERS:,} layers, which no model has")
        layers += range(first, last + 1)
    return tuple(layers)


def original_counts(checkpoint: Checkpoint) -> dict[str, int]:
    """How many sublayers of each kind the never-pruned model had; percentages are of these.

    Numbering stays when sublayers go, so it is the number of layers, except where whole blocks went and the rest was
    renumbered: then the ``pruning_plan.json`` beside the weights knows.
    """
    layers, record = checkpoint.decoder.num_layers, read_record(checkpoint.path)
    if record and record.get("original"):
        layers = max(layers, record["original"]["num_hidden_layers"])
    return dict.fromkeys(SUBLAYERS, layers)


def plan_layers(checkpoint: Checkpoint, layers: str, sublayer: str = "attention") -> PruningPlan:
    """Drop the named layers' ``sublayer``, in the order given."""
    if sublayer not in SUBLAYERS:
        raise PruneAttnError(f"unknown sublayer {sublayer!r}; choose one of {', '.join(SUBLAYERS)}")
    order = parse_layers(layers)
    plan = PruningPlan.of(sublayer, "layers", order, len(order), layers)
    return only_present(plan, checkpoint.decoder)


def only_present(plan: PruningPlan, decoder: Decoder) -> PruningPlan:
    """A block that has lost one sublayer before is dropped by dropping the other one."""
    if plan.sublayer != "block":
        return plan
    some = set(decoder.present("block"))
    keep_attention, keep_mlp = set(decoder.present("attention")), set(decoder.present("mlp"))
    return replace(
        plan,
        attention=tuple(i for i in plan.attention if i in keep_attention or i not in some),
        mlp=tuple(i for i in plan.mlp if i in keep_mlp or i not in some),
    )
