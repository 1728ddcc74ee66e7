"""Strategies: each gives the order in which a model's sublayers would go."""

from pruner.select.positional import POSITIONAL, positional_order

STRATEGIES = POSITIONAL

__all__ = ["POSITIONAL", "STRATEGIES", "positional_order"]
