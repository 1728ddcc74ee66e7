"""The paper's own choices (arXiv 2407.15516, section 3): the deepest sublayers go first, with or without the last."""

from __future__ import annotations

from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError
from pruner.llama import SUBLAYERS
from pruner.plan import PruningPlan, only_present, original_counts, parse_drop, percentage_meant
from pruner.select.request import CALIBRATED, POSITIONAL, STRATEGIES, Drop


def positional_order(strategy: str, candidates: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Layers in the order in which they go: deepest first; ``keep-last`` never drops the model's last layer's."""
    if strategy not in POSITIONAL:
        raise PruneAttnError(f"unknown strategy {strategy!r}; choose one of {', '.join(POSITIONAL)}")
    keep = num_layers - 1 if strategy == "keep-last" else None
    return tuple(sorted((layer for layer in candidates if layer != keep), reverse=True))


def plan_drop(checkpoint: Checkpoint, request: Drop) -> PruningPlan:
    """Choose sublayers by their position. Layer 0 is never chosen unless allowed.

    Raises ``PruneAttnError`` where fewer can be dropped than are asked for, and for a strategy that needs a text.
    """
    strategy = request.strategy or "last"
    if strategy in CALIBRATED:
        raise PruneAttnError(f"--strategy {strategy} chooses by what a text costs; give one with --text")
    if strategy not in POSITIONAL:
        raise PruneAttnError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    count, candidates = candidates_for(checkpoint, request)
    order = positional_order(strategy, candidates, checkpoint.decoder.num_layers)
    if count > len(order):
        hint = "" if request.allow_first_layer or request.allow_all else ", or add --allow-first-layer"
        raise PruneAttnError(
            f"--drop {request.amount}: strategy {strategy} can drop only {len(order)} {_NAMES[request.sublayer]} here; "
            f"drop fewer{hint}"
        )
    plan = PruningPlan.of(request.sublayer, strategy, order, count, str(request.amount))
    return only_present(plan, checkpoint.decoder)


_NAMES = {"attention": "attention sublayers", "mlp": "MLP sublayers", "block": "blocks"}


def candidates_for(checkpoint: Checkpoint, request: Drop) -> tuple[int, tuple[int, ...]]:
    """How many sublayers are asked for, and the layers to choose from. Raises ``PruneAttnError`` as ``plan_drop``."""
    drop, sublayer = str(request.amount), request.sublayer
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
    if count == len(candidates) and not request.allow_all:
        raise PruneAttnError(f"all {count} {name} would be dropped; drop fewer, or add --allow-all if you mean it")
    if not request.allow_first_layer and count < len(candidates):
        candidates = tuple(layer for layer in candidates if layer != 0)
    return count, candidates
