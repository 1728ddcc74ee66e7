"""The two models of a run, opened together and let go; and what every part of it is measured with."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.report import UNFINISHED
from export.validate.footprint import open_model
from export.validate.graphs import Graphs
from export.validate.options import MODELS
from export.validate.parts import Parts
from export.validate.setting import Setting
from pruner.errors import MachineError, PruneAttnError
from pruner.evaluate.latency import out_of_memory
from pruner.files import expand
from pruner.progress import keeping

CHECKED = (2, 128)  # rows and tokens that the same-function check runs
GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_NEW_TOKENS = 16, 128, 64


class Models:
    """They stay open while parts share them. ``purpose``: score a text, or serve; they differ in ONNX's graph."""

    def __init__(self, setting: Setting, graphs: Graphs) -> None:
        self._setting, self._graphs = setting, graphs
        self._open_as: tuple[str, str] | None = None
        self.held: dict[str, Any] = {}

    def both(self, backend: str, purpose: str = "score") -> dict[str, Any]:
        """Both models of a backend, by name."""
        key = (backend, purpose if backend == "onnx" else "")
        if self._open_as != key:
            self.close()
            for name in MODELS:
                self.held[name] = self.open(backend, name, purpose)
            self._open_as = key
        return self.held

    def open(self, backend: str, name: str, purpose: str) -> Any:
        """One model alone. ``MachineError`` where the device's memory is too small."""
        setting = self._setting
        try:
            directory = self.directory(backend, name, purpose)
            return open_model(backend, directory, setting.device, setting.dtypes[backend], self._context(purpose))
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.close()
            raise MachineError(
                f"{setting.checkpoints[name].path}: the memory of {setting.device} is too small for both models at "
                "once; use --device cpu, or a larger one"
            ) from None

    def _context(self, purpose: str) -> int:
        """Tokens that there must be room for."""
        setting = self._setting
        context = max(p for _, p in setting.cases) + setting.latency.new_tokens if setting.latency else 1
        if purpose == "score":
            greedy = GREEDY_PROMPT_TOKENS + GREEDY_NEW_TOKENS
            read = max(setting.corpus.window, greedy) if setting.corpus else CHECKED[1]
            context = setting.context if setting.tasks else max(context, read)
        return min(context, setting.context)

    def directory(self, backend: str, name: str, purpose: str) -> Path:
        """What is opened: the model's own directory, or one with a graph for the purpose."""
        checkpoint = self._setting.checkpoints[name]
        if backend != "onnx":
            return checkpoint.path
        dtype = self._setting.converted if name == "original" else None
        return self._graphs.directory(name, checkpoint, dtype, purpose == "serve")

    def close(self) -> None:
        """Let the open models go, and their memory."""
        self.held, self._open_as = {}, None
        gc.collect()
        if self._setting.device == "cuda":
            import torch

            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Bench:
    """What each part is measured with. ``notes`` grows."""

    setting: Setting
    parts: Parts
    graphs: Graphs
    models: Models
    notes: list[str]


@contextmanager
def set_up(setting: Setting, parts: Parts, work: str | os.PathLike[str] | None) -> Iterator[Bench]:
    """With a place for graphs (and for the original's weights, where they have to be laid out), removed at the end."""
    made = setting.output.exists()
    if work is None:
        folder = setting.output / UNFINISHED / "graphs"
    else:
        work = expand(work)
        if not work.is_dir():
            raise PruneAttnError(f"{work}: is no directory; make it, or choose another place for --work")
        folder = Path(tempfile.mkdtemp(dir=work, prefix="prune-attn-"))
    graphs = Graphs(folder)
    graphs.remove()  # a killed run's
    models = Models(setting, graphs)
    try:
        with keeping(parts.told):
            yield Bench(setting, parts, graphs, models, [*setting.notes])
    finally:
        models.close()
        graphs.remove()
        if not made:
            parts.remove_empty()
