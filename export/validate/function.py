"""Is the pruned directory the original without those sublayers, and nothing else? If not, no loss is the method's."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.verify import Verification, compare_tensors
from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError
from pruner.model import LanguageModel, TorchLanguageModel
from pruner.progress import Progress
from pruner.record import read_record

# Relative error of logits that rounding explains. Bit-equality is expected in PyTorch; another order of summation (a
# tensor aligned differently) is forgiven only where every tensor was compared byte for byte.
ROUNDING = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_STEPS = 8


class NotFiniteError(PruneAttnError):
    """The original's own logits hold what is no number."""


def dropped_layers(original: Checkpoint, pruned: Checkpoint) -> tuple[list[int], list[int]]:
    """Attention and MLP layers, in the original's numbers, that the pruned directory lacks.

    Raises ``PruneAttnError`` where it cannot be what is left of the original, or all is left.
    """
    why = f"{pruned.path}: is not made from {original.path}"
    a, b = original.decoder, pruned.decoder
    record = read_record(pruned.path)
    source = record["source"] if record else {}
    ours = original.fingerprint()
    if record and all(source.get(key) == ours[key] for key in ("config_sha256", "shards")):
        gone = {"attention": record["attention"], "mlp": record["mlp"]}
    elif a.num_layers == b.num_layers:  # pruned more than once, or by another tool
        gone = {kind: sorted(set(a.present(kind)) - set(b.present(kind))) for kind in ("attention", "mlp")}
    else:
        raise PruneAttnError(
            f"{why} ({b.num_layers} layers of {a.num_layers}, and no record says which); name its source"
        )
    if not any(gone.values()):
        raise PruneAttnError(f"{pruned.path}: lacks no sublayer of {original.path}; give what convert wrote of it")
    left = a.without(gone["attention"], gone["mlp"])
    expected = (left.renumbered() if b.num_layers != a.num_layers and left.whole_blocks_only else left).tensors()
    if expected.keys() - {"lm_head.weight"} != pruned.decoder.tensors().keys() - {"lm_head.weight"}:
        raise PruneAttnError(f"{why}: its layers are not what is left of it; name its source")
    for name, shape in pruned.decoder.tensors().items():
        if expected.get(name, shape) != shape:
            raise PruneAttnError(f"{why}: {name!r} has shape {list(shape)} and not {list(expected[name])}")
    return list(gone["attention"]), list(gone["mlp"])


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
