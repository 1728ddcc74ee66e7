"""prune-attn from Python: each verb of the command line is a function, imported when it is first asked for.

>>> from prune_attn import convert, verify
>>> convert("Llama-2-13b-hf", "pruned", "33%")
>>> assert verify("pruned", "Llama-2-13b-hf")
"""

from __future__ import annotations

import signal
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what an editor shows; ``__getattr__`` imports the same
    from export.adopt import Adoption, adopt
    from export.convert import Conversion, convert
    from export.deliver import Export, export
    from export.generate import generate
    from export.layout import WriteOptions
    from export.onnx import GraphOptions
    from export.onnx.session import OnnxSession
    from export.push import Push, push
    from export.report.compare import report
    from export.select import Selected, select
    from export.sweep.job import Sweep, sweep
    from export.sweep.options import Machine, Measure, Points
    from export.validate.limits import Limits
    from export.validate.options import Accuracy, Compute, Latency, Tasks
    from export.validate.run import Validation, validate
    from export.verify import Verification, verify
    from pruner import register
    from pruner.checkpoint.directory import Checkpoint, open_checkpoint
    from pruner.errors import MachineError, PruneAttnError
    from pruner.hub.source import Revision
    from pruner.model import LanguageModel, TorchLanguageModel
    from pruner.plan import PruningPlan
    from pruner.select.request import Calibration, Drop, Layers, SavedPlan

_PLACES = {
    "export.adopt": ("Adoption", "adopt"),
    "export.convert": ("Conversion", "convert"),
    "export.deliver": ("Export", "export"),
    "export.generate": ("generate",),
    "export.layout": ("WriteOptions",),
    "export.onnx": ("GraphOptions",),
    "export.onnx.session": ("OnnxSession",),
    "export.push": ("Push", "push"),
    "export.report.compare": ("report",),
    "export.select": ("Selected", "select"),
    "export.sweep.job": ("Sweep", "sweep"),
    "export.sweep.options": ("Machine", "Measure", "Points"),
    "export.validate.limits": ("Limits",),
    "export.validate.options": ("Accuracy", "Compute", "Latency", "Tasks"),
    "export.validate.run": ("Validation", "validate"),
    "export.verify": ("Verification", "verify"),
    "pruner": ("register",),
    "pruner.checkpoint.directory": ("Checkpoint", "open_checkpoint"),
    "pruner.errors": ("MachineError", "PruneAttnError"),
    "pruner.hub.source": ("Revision",),
    "pruner.model": ("LanguageModel", "TorchLanguageModel"),
    "pruner.plan": ("PruningPlan",),
    "pruner.select.request": ("Calibration", "Drop", "Layers", "SavedPlan"),
}
_WHERE = {name: module for module, names in _PLACES.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def main() -> None:
    """The console script. It is quiet about an interrupt that comes before there is anything to clean up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C simply ends the process
    from export.cli.main import main

    main()


if __name__ == "__main__":
    main()
