"""Strategies: each gives the order in which a model's sublayers would go."""

from pruner.select.job import CALIBRATED, OBJECTIVES, Selection, select, selection
from pruner.select.positional import POSITIONAL, positional_order

STRATEGIES = (*POSITIONAL, *CALIBRATED)

__all__ = [
    "CALIBRATED", "OBJECTIVES", "POSITIONAL", "STRATEGIES", "Selection", "positional_order", "select", "selection",
]  # fmt: skip
