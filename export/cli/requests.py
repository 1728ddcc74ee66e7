"""From the options of ``select`` and ``convert`` to what is asked for; options of no effect are refused."""

from __future__ import annotations

from typing import Any

from export.cli.options import given
from pruner.errors import PruneAttnError
from pruner.hub.source import Revision
from pruner.select.request import CALIBRATED, POSITIONAL, Calibration, Drop, Layers, Request, SavedPlan

_OF_CALIBRATION = ("text_field", "samples", "length", "seed", "device", "objective", "resume", "threads")
_OF_DROP = ("drop", "sublayer", "strategy", "allow_first_layer", "allow_all")


def take(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """These options, taken out."""
    return {name: options.pop(name) for name in names if name in options}


def take_revision(options: dict[str, Any]) -> Revision:
    """``--revision`` and ``--cache-dir``."""
    return Revision(**take(options, ("revision", "cache_dir")))


def take_calibration(options: dict[str, Any], strategy: str | None) -> Calibration | None:
    """``--text`` and what belongs to it."""
    text, settings = options.pop("text"), take(options, _OF_CALIBRATION)
    if text is None:
        for name in filter(given, settings):
            name = name.replace("_", "-")
            raise PruneAttnError(f"--{name} is for choosing by a text, and none is; add --text, or leave it out")
        return None
    if strategy in POSITIONAL:
        raise PruneAttnError(f"--strategy {strategy} looks at no text; leave --text out, or choose another")
    return Calibration(text, strategy or "search", **settings | {"objective": settings["objective"] or "kl"})


def take_request(options: dict[str, Any], calibrated: bool) -> Request:
    """``--drop``, ``--layers`` or ``--plan``, and what belongs to it."""
    layers, plan = options.pop("layers"), options.pop("plan")
    if layers is None and plan is None:
        return take_drop(options, calibrated)
    if calibrated:
        raise PruneAttnError(
            "--text is for choosing by it; leave it out, or leave out --plan and --layers (--validation-text is for "
            "measuring)"
        )
    asked = take(options, _OF_DROP)
    drop, sublayer, strategy = (asked.pop(name) for name in ("drop", "sublayer", "strategy"))
    if plan is not None:
        for option, value in (("--layers", layers), ("--sublayer", sublayer), ("--strategy", strategy)):
            if value is not None:
                raise PruneAttnError(f"{option} cannot go with --plan, which says it already; leave one of them out")
        return SavedPlan(plan, drop, **asked)
    if drop is not None or strategy is not None:
        raise PruneAttnError("--layers names the layers itself; leave out --drop and --strategy")
    return Layers(layers, sublayer or "attention", **asked)


def take_drop(options: dict[str, Any], calibrated: bool) -> Drop:
    """``--drop``, and what belongs to it."""
    asked = take(options, _OF_DROP)
    drop, sublayer, strategy = (asked.pop(name) for name in ("drop", "sublayer", "strategy"))
    if drop is None:
        raise PruneAttnError("nothing to drop; say --drop 33%, --layers 22-29,31 or --plan plan.json")
    own = None if calibrated and strategy in CALIBRATED else strategy
    return Drop(drop, sublayer or "attention", own, **asked)
