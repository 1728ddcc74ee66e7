"""ONNX: a graph whose weights are the ``.safetensors`` bytes beside it, and a session that runs it.

graph.py builds ``model.onnx``; initializers.py turns byte ranges of shards into initializers; rope.py has the rotary
frequencies; staleness.py says whether graph and shards still belong together; runtime.py opens it on a device and
session.py runs it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GraphOptions:
    """``context`` in tokens (``None``: the model's own); ``last_token_logits``: logits (B, 1, V) only."""

    context: int | None = None
    last_token_logits: bool = False
