"""Is the pruned directory the original without those sublayers, and nothing else? If not, no loss is the method's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from export.validate.footprint import open_model
from export.validate.models import CHECKED, Bench
from export.verify import Verification, compare_tensors
from pruner.checkpoint import Checkpoint
from pruner.checkpoint.load import check_finite
from pruner.errors import PruneAttnError
from pruner.model import LanguageModel, TorchLanguageModel
from pruner.progress import Progress

# Relative error of logits that rounding explains. Bit-equality is expected in PyTorch; another order of summation (a
# tensor aligned differently) is forgiven only where every tensor was compared byte for byte.
ROUNDING = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_STEPS = 8


class NotFiniteError(PruneAttnError):
    """The original's own logits hold what is no number."""


def check_same_function(bench: Bench) -> dict[str, Any]:
    """Bytes, then PyTorch's logits, then model.onnx's: each only where what comes before it is right."""
    setting, part = bench.setting, bench.parts.part
    original, pruned = setting.checkpoints.values()
    rows, tokens = CHECKED[0], min(CHECKED[1], setting.context)
    ids = np.asarray(setting.ids[: rows * tokens], dtype=np.int64).reshape(rows, tokens)

    def bytes_alike(progress: Progress) -> dict[str, Any]:
        return compare_bytes(original, pruned, setting.attention, setting.mlp, progress)

    def torch_alike(_: Progress) -> dict[str, Any]:
        models = bench.models.both("torch")
        try:
            return compare_torch(
                models["original"], models["pruned"], ids, setting.attention, setting.mlp, setting.dtypes["torch"]
            )
        except NotFiniteError:
            check_finite(original)  # another dtype is no cure for a weight that is NaN
            raise

    def onnx_alike(_: Progress) -> dict[str, Any]:
        model = bench.models.both("torch")["pruned"]
        session = open_model("onnx", pruned.path, setting.device, None, tokens)  # the very file that is shipped
        return compare_onnx(model, session, ids, setting.stored)

    facts = {"bytes": part("same-bytes", None, "comparing the tensors", bytes_alike), "torch": None, "onnx": None}
    if facts["bytes"]["ok"]:
        facts["torch"] = part("same-torch", ids.tolist(), "comparing logits, torch", torch_alike)
        if facts["torch"]["ok"] and "onnx" in setting.backends:
            facts["onnx"] = part("same-onnx", ids.tolist(), "comparing logits, onnx", onnx_alike)
    return facts | {"ok": all(found["ok"] for found in facts.values() if found is not None)}


def differences(function: dict[str, Any]) -> Iterator[str]:
    """A line for each thing that keeps it from being the same function."""
    yield from function["bytes"]["problems"]
    for part, what in (("torch", "the original with those sublayers switched off"), ("onnx", "PyTorch")):
        facts = function[part]
        if facts is not None and not facts["ok"]:
            size = "are not finite" if facts["relative_error"] is None else f"are off by {facts['relative_error']:.1e}"
            who = "the pruned model's" if part == "torch" else "model.onnx's"
            yield f"{who} logits {size} against {what}; convert again"


def compare_bytes(
    original: Checkpoint,
    pruned: Checkpoint,
    attention: list[int],
    mlp: list[int],
    progress: Progress | None,
) -> dict[str, Any]:
    """Every kept tensor against the original's, byte for byte (after the same conversion, where one was asked for)."""
    result = Verification(pruned.path, original.path)
    compare_tensors(pruned, original, original.decoder.without(attention, mlp), result, progress)
    return {"ok": result.ok, "tensors": result.compared, "problems": result.problems}


def compare_torch(
    original: TorchLanguageModel,
    pruned: TorchLanguageModel,
    ids: np.ndarray,
    attention: list[int],
    mlp: list[int],
    dtype: str,
) -> dict[str, Any]:
    """Logits of (B, T) ids, and of a cached continuation, against the original with the sublayers switched off."""
    original.switch_off(attention, mlp)
    try:
        want = _outputs(original, ids)
        if not all(np.isfinite(part).all() for part in want):
            raise NotFiniteError(
                f"the original's logits, with those sublayers switched off, are not finite in {dtype}; "
                "give another --dtype"
            )
        facts = _distance(want, _outputs(pruned, ids))
    finally:
        original.switch_off()
    return _judge(facts, dtype)


def compare_onnx(torch_model: LanguageModel, session: LanguageModel, ids: np.ndarray, dtype: str) -> dict[str, Any]:
    """The same of ``model.onnx`` against PyTorch, both of the pruned directory."""
    whole = not getattr(session, "last_token_logits", False)
    return _judge(_distance(_outputs(torch_model, ids, whole), _outputs(session, ids, whole)), dtype)


def _judge(facts: dict[str, Any], dtype: str) -> dict[str, Any]:
    error = facts["relative_error"]
    return facts | {"ok": error is not None and error <= ROUNDING[dtype], "limit": ROUNDING[dtype]}


def _outputs(model: LanguageModel, ids: np.ndarray, whole: bool = True) -> list[np.ndarray]:
    model.reset()
    out = [model.logits(ids).reshape(-1, model.vocab_size)] if whole else []
    out.append(model.prefill(ids[:, :-_STEPS].tolist()))
    # the given tokens, so that both see the same; copied, since a session may write the next step over the last
    out += [model.decode(column.tolist()).copy() for column in ids[:, -_STEPS:].T]
    model.reset()
    return out


def _distance(want: list[np.ndarray], got: list[np.ndarray]) -> dict[str, Any]:
    a, b = np.concatenate(want), np.concatenate(got)
    finite = bool(np.isfinite(a).all() and np.isfinite(b).all())
    return {
        "positions": len(a),
        "equal": bool(np.array_equal(a, b)),
        "largest_difference": float(np.abs(a - b).max()) if finite else None,
        "relative_error": float(np.linalg.norm(a - b) / np.linalg.norm(a)) if finite else None,
        "agreement": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }
