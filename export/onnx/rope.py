"""Rotary frequencies, as transformers' Llama computes them (``transformers/modeling_rope_utils.py``), in numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pruner.errors import PruneAttnError
from pruner.nemotron_nas import dialect

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def inverse_frequencies(config: dict[str, Any], head_dim: int, path: Path) -> tuple[np.ndarray, float]:
    """(head_dim / 2,) float32 inverse frequencies, and the factor that cos and sin are multiplied by.

    ``dynamic`` grows only beyond ``max_position_embeddings``, where a graph's context never reaches, so it equals
    ``default``. Raises ``PruneAttnError`` (``path`` is what it names) for a kind or a value that is not handled.
    """
    rope = dialect.rope_fields(config, path)["rope_parameters"]
    kind = rope["rope_type"]
    if kind not in KINDS:
        raise PruneAttnError(f"{path}: rope scaling {kind!r} has no ONNX graph yet; only {', '.join(KINDS)} have")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PruneAttnError(f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not Llama's")
    try:
        with np.errstate(all="raise"):
            frequencies, factor = _frequencies(kind, rope, config, head_dim)
    except KeyError as error:
        raise PruneAttnError(f"{path}: rope scaling {kind!r} lacks {error}; take it from the original") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise PruneAttnError(f"{path}: rope scaling {kind!r} has a value that does not work ({error})") from None
    return frequencies.astype(np.float32), factor


def _frequencies(kind: str, rope: dict[str, Any], config: dict[str, Any], head_dim: int) -> tuple[np.ndarray, float]:
    f32, base = np.float32, float(rope["rope_theta"])
    # powers in float64, rounded once: within one float32 step of PyTorch's
    powers = (base ** (np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim)).astype(np.float64)).astype(f32)
    plain = f32(1.0) / powers
    if kind in ("default", "dynamic"):
        return plain, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return plain / f32(factor), 1.0
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = original or config["max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = f32(2 * math.pi) / plain
        smooth = (f32(original) / wavelength - f32(low)) / f32(high - low)
        between = (f32(1) - smooth) * plain / f32(factor) + smooth * plain
        long, short = wavelength > original / low, wavelength < original / high
        return np.where(long, plain / f32(factor), np.where(short, plain, between)), 1.0
    # yarn
    if factor is None:
        factor = config["max_position_embeddings"] / original
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, every = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = _mscale(factor, mscale) / _mscale(factor, every) if mscale and every else _mscale(factor)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    keep = f32(1) - np.clip((np.arange(head_dim // 2, dtype=f32) - f32(low)) / f32(high - low), 0, 1)
    return f32(1.0) / (f32(factor) * powers) * (f32(1) - keep) + plain * keep, float(attention_factor)


def _mscale(scale: float, mscale: float = 1) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0
