"""The paper's own choices (arXiv 2407.15516, section 3): the deepest sublayers go first, with or without the last."""

from __future__ import annotations

from pruner.errors import PruneAttnError

POSITIONAL = ("last", "keep-last")


def positional_order(strategy: str, candidates: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Layers in the order in which they go: deepest first; ``keep-last`` never drops the model's last layer's."""
    if strategy not in POSITIONAL:
        raise PruneAttnError(f"unknown strategy {strategy!r}; choose one of {', '.join(POSITIONAL)}")
    keep = num_layers - 1 if strategy == "keep-last" else None
    return tuple(sorted((layer for layer in candidates if layer != keep), reverse=True))
