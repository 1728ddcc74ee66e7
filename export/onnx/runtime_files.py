"""``model.onnx`` and ``genai_config.json`` as bytes, for shards that exist."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from export.genai import genai_config
from export.onnx import GraphOptions
from pruner.checkpoint import Checkpoint
from pruner.names import GENAI_CONFIG, GRAPH


def runtime_files(checkpoint: Checkpoint, facts: dict[str, Any] | None, options: GraphOptions) -> dict[str, bytes]:
    """The two files' bytes by name. ``PruneAttnError`` for what ``build_graph`` refuses; no weights are read."""
    with _undisturbed():
        from export.onnx.graph import build_graph, model_context

        graph = build_graph(checkpoint, facts, options).SerializeToString(deterministic=True)
        return {GRAPH: graph, GENAI_CONFIG: genai_config(checkpoint, model_context(checkpoint, options.context))}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold signals back for the fraction of a second that this takes: onnx's native code crashes when interrupted.

    Not by a mask, which would hold for this thread alone: a signal that another thread takes is handled here too.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers never run here
        yield
        return
    came: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)
