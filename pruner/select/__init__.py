"""Strategies: each gives the order in which a model's sublayers would go."""

from pruner.select.job import CALIBRATED, Selection, check_useful, select, selection
from pruner.select.positional import POSITIONAL, positional_order
from pruner.select.search import OBJECTIVES

STRATEGIES = (*POSITIONAL, *CALIBRATED)

__all__ = [
    "CALIBRATED", "OBJECTIVES", "POSITIONAL", "STRATEGIES", "Selection", "check_useful", "positional_order", "select",
    "selection",
]  # fmt: skip
