"""Dtypes: safetensors' names, PyTorch's names, bytes per element."""

from __future__ import annotations

from pruner.errors import PruneAttnError

# Whole-byte dtypes of safetensors. The ones that a Llama's weights can have are in pruner.llama.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


WEIGHT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


_DTYPE_NAMES = {name: dtype for dtype, name in WEIGHT_DTYPES.items()}


def itemsize(dtype: str) -> int:
    """Bytes an element of a safetensors dtype that weights can have."""
    return {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[dtype]


def safetensors_dtype(name: str) -> str:
    """``float16`` to ``F16`` and so on; ``PruneAttnError`` for another name."""
    try:
        return _DTYPE_NAMES[name]
    except KeyError:
        raise PruneAttnError(f"unknown dtype {name!r}; choose float16, bfloat16 or float32") from None
