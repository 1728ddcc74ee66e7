"""What can be asked of a selection: strategies and objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pruner.errors import PruneAttnError

POSITIONAL = ("last", "keep-last")
DEPTH_NOTE = (  # 6 of SmolLM2-135M's 30 attentions: perplexity x 5.7 by depth, x 1.2 by search
    "chosen by depth alone, which can ruin a model; --text general chooses by what a shipped text costs, and "
    "--text FILE by one of your own kind"
)


OBJECTIVES = ("kl", "ce")


def check_objective(objective: str) -> None:
    """``PruneAttnError`` for one that there is not."""
    if objective not in OBJECTIVES:
        raise PruneAttnError(f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")


CALIBRATED = ("similarity", "search", "exhaustive")


def check_useful(options: Mapping[str, Any], given: Callable[[str], bool] | None = None) -> None:
    """``PruneAttnError`` for what would have no effect, as nothing is chosen by a text; options of ``selection``.

    ``given``: whether a name was said, where its value cannot tell (a default on the command line).
    """
    given = given or (lambda name: options.get(name) not in (None, 0, "cpu"))
    strategy, text = options.get("strategy"), options.get("text")
    if strategy in POSITIONAL and text is not None:
        raise PruneAttnError(f"--strategy {strategy} looks at no text; leave --text out, or choose another")
    for name in ("text_field", "samples", "length", "seed", "device", "objective", "resume", "threads"):
        if text is None and given(name):
            name = name.replace("_", "-")
            raise PruneAttnError(f"--{name} is for choosing by a text, and none is; add --text, or leave it out")


STRATEGIES = (*POSITIONAL, *CALIBRATED)
