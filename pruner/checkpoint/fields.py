"""Fields of ``config.json`` as transformers' ``LlamaConfig`` wants them; what it refuses, no output may hold.

Held against ``LlamaConfig`` and ``RotaryEmbeddingConfigMixin`` of transformers 5.23, which check types strictly: ``0``
is no float, ``null`` is no bool.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from pruner.errors import PruneAttnError, printable
from pruner.nemotron_nas import dialect

MOST_TOKENS = 2**24  # of context; the largest that people give a Llama is 10 million
_DTYPES = ("float16", "half", "bfloat16", "float32", "float", "float64", "double")
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; ``True`` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number; ``True`` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_WHOLE_OR_NULL = ("a whole number or null", lambda v: v is None or is_whole(v))
_NAME_OF_DTYPE = (f"null or one of {', '.join(_DTYPES)}", lambda v: v is None or v in _DTYPES)
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"), ("true or false", _is_flag)
    ),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "pretraining_tp"), _WHOLE_OR_NULL),
    **dict.fromkeys(("dtype", "torch_dtype"), _NAME_OF_DTYPE),
    "eos_token_id": (
        "a whole number, a list of them or null",
        lambda v: v is None or is_whole(v) or (isinstance(v, list) and all(map(is_whole, v))),
    ),
    "hidden_act": ("the name of an activation", lambda v: isinstance(v, str)),
    "max_position_embeddings": (
        f"a whole number from 1 to {MOST_TOKENS}", lambda v: is_whole(v) and 1 <= v <= MOST_TOKENS,
    ),
    "rms_norm_eps": ("a small number with a point, such as 1e-06", lambda v: isinstance(v, float) and 0 <= v < 1),
    "initializer_range": (
        "a number with a point from 0.0 to 1.0", lambda v: isinstance(v, float) and 0 <= v <= 1,
    ),
    "attention_dropout": ("a number or null", lambda v: v is None or is_number(v)),
    "partial_rotary_factor": ("1.0, as every Llama's", lambda v: v is None or v == 1),
    "per_layer_config": ("left out: prune-attn wants layers of one shape", lambda v: not v),
    **dict.fromkeys(("attribute_map", "ignore_keys_at_rope_validation"), ("left out", lambda v: v in ({}, []))),
    "num_labels": ("a whole number", is_whole),
    "id2label": (
        "an object of numbers and names",
        lambda v: v is None or (isinstance(v, dict) and all(key.strip().isdecimal() for key in v)),
    ),
}  # fmt: skip


def check_fields(config: dict[str, Any], path: Path) -> None:
    """Raise ``PruneAttnError`` for the first field that transformers refuses; ``path`` is what it names."""
    for key, (what, fits) in _FIELDS.items():
        if key in config and not fits(config[key]):
            raise PruneAttnError(f"{path}: {key} is {_shown(config[key])}; it must be {what}")
    kinds = config.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list) and len(kinds) == config["num_hidden_layers"] and all(k in _LAYER_TYPES for k in kinds)
    ):
        raise PruneAttnError(f"{path}: layer_types must list the kind of each of the num_hidden_layers layers")
    _check_rope(config, path)


# what each kind of rope scaling cannot do without, and what it may have
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}  # fmt: skip


def _check_rope(config: dict[str, Any], path: Path) -> None:
    rope = dialect.rope_fields(config, path)["rope_parameters"]
    kind = rope["rope_type"]
    if kind not in _ROPE_NEEDS:
        raise PruneAttnError(f"{path}: rope scaling {_shown(kind)} is none that transformers has; give the original's")
    for key in _ROPE_NEEDS[kind]:
        value = rope.get(key)
        if value is None and kind == "yarn" and key in rope:  # it is computed from the two contexts then
            continue
        values = value if kind == "longrope" and isinstance(value, list) else [value]
        if not all(is_number(v) and v > 0 for v in values):
            found = f"{key} is {_shown(value)}" if key in rope else f"has no {key}"
            raise PruneAttnError(f"{path}: rope scaling {kind!r}: {found}; take it from the original's config.json")
    original = rope.get("original_max_position_embeddings", 1)
    if not is_whole(original) or original < 1:
        raise PruneAttnError(
            f"{path}: original_max_position_embeddings is {_shown(original)}; it must be a number of tokens"
        )


def _shown(value: Any) -> str:
    return printable(repr(value), 60)
