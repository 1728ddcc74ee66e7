"""A pruning plan: which sublayers go, in what order, how they were chosen and from which model. JSON in and out.

Two foreign formats are read too: EvoPress's ``layer_drop_config.txt`` (one of none|attn|mlp|attn+mlp a line) and
LLM-Drop's ``drop_attn_list`` / ``drop_mlp_list`` (a ``config.json`` that has them).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError
from pruner.files import JSON_BYTES, expand, parse_json, read_bounded, read_json
from pruner.llama import SUBLAYERS, Decoder
from pruner.select import POSITIONAL, STRATEGIES, positional_order

FORMAT = "prune-attn plan"
VERSION = 1
PLAN_FILE = "pruning_plan.json"


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
        first = (self.sets or {}).get(count, self.order[:count])
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
                ("sets", self.sets and {str(n): list(layers) for n, layers in self.sets.items()}),
                ("selection", self.selection),
            )
            if value is not None
        }

    def check(self, decoder: Decoder, *, allow_first_layer: bool = False, allow_all: bool = False) -> Decoder:
        """The decoder that is left. Raises ``PruneAttnError`` for a plan that this decoder must not or cannot get."""
        for kind, layers in (("attention", self.attention), ("mlp", self.mlp)):
            if len(set(layers)) != len(layers):
                twice = next(i for i in layers if layers.count(i) > 1)
                raise PruneAttnError(f"layer {twice} is given twice; name each layer once")
            present = decoder.present(kind)
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
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(layers)


def original_counts(checkpoint: Checkpoint) -> dict[str, int]:
    """How many sublayers of each kind the never-pruned model had; percentages are of these.

    Numbering stays when sublayers go, so it is the number of layers, except where whole blocks went and the rest was
    renumbered: then the ``pruning_plan.json`` beside the weights knows.
    """
    layers, file = checkpoint.decoder.num_layers, checkpoint.path / PLAN_FILE
    try:
        recorded = read_json(file) if file.is_file() else {}
        original = recorded["original"]["num_hidden_layers"]
        if recorded["format"] == FORMAT and isinstance(original, int):
            layers = max(layers, original)
    except (OSError, PruneAttnError, KeyError, TypeError):
        pass  # never pruned by us, or somebody's own file
    return dict.fromkeys(SUBLAYERS, layers)


def plan_drop(
    checkpoint: Checkpoint,
    drop: str,
    sublayer: str = "attention",
    strategy: str = "last",
    *,
    allow_first_layer: bool = False,
    allow_all: bool = False,
) -> PruningPlan:
    """Choose ``drop`` (a count or a percentage) sublayers by their position. Layer 0 is never chosen unless allowed.

    Raises ``PruneAttnError`` where fewer can be dropped than are asked for, and for a strategy that needs a text.
    """
    count, candidates = candidates_for(
        checkpoint, drop, sublayer, strategy, allow_first_layer=allow_first_layer, allow_all=allow_all
    )
    if strategy not in POSITIONAL:
        raise PruneAttnError(f"--strategy {strategy} chooses by what a text costs; give one with --text")
    order = positional_order(strategy, candidates, checkpoint.decoder.num_layers)
    if count > len(order):
        hint = "drop fewer" if allow_first_layer or allow_all else "drop fewer, or add --allow-first-layer"
        raise PruneAttnError(
            f"--drop {drop}: strategy {strategy} can drop only {len(order)} {_NAMES[sublayer]} here; {hint}"
        )
    return only_present(PruningPlan.of(sublayer, strategy, order, count, drop), checkpoint.decoder)


_NAMES = {"attention": "attention sublayers", "mlp": "MLP sublayers", "block": "blocks"}


def candidates_for(
    checkpoint: Checkpoint, drop: str, sublayer: str, strategy: str, *, allow_first_layer: bool, allow_all: bool
) -> tuple[int, tuple[int, ...]]:
    """How many sublayers ``drop`` means, and the layers to choose from. Raises ``PruneAttnError`` as ``plan_drop``."""
    if strategy not in STRATEGIES:
        raise PruneAttnError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if sublayer not in SUBLAYERS:
        raise PruneAttnError(f"unknown sublayer {sublayer!r}; choose one of {', '.join(SUBLAYERS)}")
    decoder = checkpoint.decoder
    count = parse_drop(drop, original_counts(checkpoint)[sublayer])
    candidates = decoder.present(sublayer)
    name = _NAMES[sublayer]
    if count > len(candidates):
        hint = percentage_meant(drop, original_counts(checkpoint)[sublayer])
        raise PruneAttnError(f"--drop {drop}: the model has only {len(candidates)} {name} left; drop fewer{hint}")
    if count == len(candidates) and sublayer == "block":
        raise PruneAttnError("every block would be dropped and no model be left; drop fewer")
    if count == len(candidates) and not allow_all:
        raise PruneAttnError(f"all {count} {name} would be dropped; drop fewer, or add --allow-all if you mean it")
    if not allow_first_layer and count < len(candidates):
        candidates = tuple(layer for layer in candidates if layer != 0)
    return count, candidates


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


def read_plan(path: str | os.PathLike[str] | PruningPlan, checkpoint: Checkpoint) -> PruningPlan:
    """Read a plan for ``checkpoint``: ours, EvoPress's or LLM-Drop's (told apart by their content), or take a made one.

    Raises ``PruneAttnError`` for a file that is none of them, or a plan that was made for another model.
    """
    if isinstance(path, PruningPlan):
        if path.source is not None:
            _check_made_for("the plan", path.source, checkpoint)
        return path
    path = expand(path)
    if not os.path.lexists(path):
        raise PruneAttnError(f"{path}: no such plan; make one, or use --drop")
    if path.is_dir():
        raise PruneAttnError(f"{path}: is a directory; give the plan file, such as {path / PLAN_FILE}")
    try:
        text = read_bounded(path, JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise PruneAttnError(f"{path}: is not a plan (not UTF-8 text)") from None
    lines = text.split()
    if lines and all(line in _EVOPRESS for line in lines):
        return _read_evopress(path, lines, checkpoint)
    if not text.lstrip().startswith("{"):
        raise PruneAttnError(f"{path}: is not a plan; expected JSON, or one of none|attn|mlp|attn+mlp a line")
    data = parse_json(text, path)
    if data.get("format") == FORMAT:
        return _read_ours(path, data, checkpoint)
    if "drop_attn_list" in data or "drop_mlp_list" in data:
        return _read_llm_drop(path, data, checkpoint)
    raise PruneAttnError(f"{path}: is not a plan; expected prune-attn's, EvoPress's or LLM-Drop's")


def _ints(path: Path, data: dict[str, Any], key: str) -> tuple[int, ...]:
    value = data.get(key) or []
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise PruneAttnError(f"{path}: {key!r} must be a list of layer numbers; make the plan again")
    return tuple(value)


def _read_ours(path: Path, data: dict[str, Any], checkpoint: Checkpoint) -> PruningPlan:
    if data.get("version") != VERSION:
        raise PruneAttnError(f"{path}: has plan version {data.get('version')!r}; this prune-attn reads {VERSION}")
    source = data.get("source")
    if source is not None:
        _check_made_for(path, source, checkpoint)
    sublayer, order = data.get("sublayer"), None
    attention, mlp = _ints(path, data, "attention"), _ints(path, data, "mlp")
    if sublayer in SUBLAYERS:
        order = _ints(path, data, "order")
        named = set(attention) | set(mlp)
        meant = only_present(PruningPlan.of(sublayer, "", order, len(named), ""), checkpoint.decoder)
        if (set(meant.attention), set(meant.mlp)) != (set(attention), set(mlp)):
            raise PruneAttnError(f"{path}: its order does not begin with the layers that it drops; make the plan again")
    elif sublayer != "mixed":
        raise PruneAttnError(f"{path}: unknown sublayer {sublayer!r}; make the plan again")
    requested, selection = data.get("requested"), data.get("selection")
    return PruningPlan(
        sublayer,
        str(data.get("strategy")),
        attention,
        mlp,
        order,
        requested if isinstance(requested, str) else None,
        source,
        _read_sets(path, data, order),
        selection if isinstance(selection, dict) else None,
    )


def _read_sets(path: Path, data: dict[str, Any], order: tuple[int, ...] | None) -> dict[int, tuple[int, ...]] | None:
    sets = data.get("sets")
    if sets is None:
        return None
    if not isinstance(sets, dict) or order is None:
        raise PruneAttnError(f"{path}: its sets do not fit its order; make the plan again")
    read = {int(n): _ints(path, sets, n) for n in sets if re.fullmatch(r"[1-9]\d{0,5}", n)}
    for n, layers in read.items():
        if len(layers) != n or len(set(layers)) != n or not set(layers) <= set(order):
            raise PruneAttnError(f"{path}: its set of {n} layers does not fit its order; make the plan again")
    return read


def _check_made_for(path: Path | str, source: Any, checkpoint: Checkpoint) -> None:
    present = checkpoint.fingerprint()
    try:
        differs = []
        if source["config_sha256"] != present["config_sha256"]:
            differs.append("config.json")
        theirs = {name: shard["header_sha256"] for name, shard in source["shards"].items()}
        ours = {name: shard["header_sha256"] for name, shard in present["shards"].items()}
        differs += sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    except (KeyError, TypeError, AttributeError):
        raise PruneAttnError(f"{path}: does not say which model it was made for; make the plan again") from None
    if differs:
        more = f" and {len(differs) - 1} more" if len(differs) > 1 else ""
        raise PruneAttnError(
            f"{path}: was made for another model ({source.get('name', '?')}): {differs[0]}{more} differs from "
            f"{checkpoint.path}; to drop the same layers all the same, name them with --layers"
        )


_EVOPRESS = ("none", "attn", "mlp", "attn+mlp")


def _read_evopress(path: Path, lines: list[str], checkpoint: Checkpoint) -> PruningPlan:
    layers = checkpoint.decoder.num_layers
    if len(lines) != layers:
        raise PruneAttnError(
            f"{path}: was made for another model: it has {len(lines)} lines, the model {layers} layers"
        )
    attention = tuple(i for i, line in enumerate(lines) if "attn" in line)
    mlp = tuple(i for i, line in enumerate(lines) if "mlp" in line)
    return PruningPlan("mixed", "evopress", attention, mlp)


def _read_llm_drop(path: Path, data: dict[str, Any], checkpoint: Checkpoint) -> PruningPlan:
    layers = checkpoint.decoder.num_layers
    if data.get("num_hidden_layers", layers) != layers:
        raise PruneAttnError(
            f"{path}: was made for another model: it has {data['num_hidden_layers']} layers, this one {layers}"
        )

    def indices(key: str) -> tuple[int, ...]:
        value = data.get(key) or []
        if isinstance(value, list) and len(value) == layers and all(isinstance(v, bool) for v in value):
            return tuple(i for i, dropped in enumerate(value) if dropped)  # LLM-Drop writes either form
        return _ints(path, data, key)

    attention, mlp = indices("drop_attn_list"), indices("drop_mlp_list")
    if attention and not mlp:
        return PruningPlan.of("attention", "llm-drop", attention, len(attention), str(len(attention)))
    if mlp and not attention:
        return PruningPlan.of("mlp", "llm-drop", mlp, len(mlp), str(len(mlp)))
    if attention == mlp and attention:
        return PruningPlan.of("block", "llm-drop", attention, len(attention), str(len(attention)))
    return PruningPlan("mixed", "llm-drop", attention, mlp)
