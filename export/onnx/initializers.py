"""Byte ranges of ``.safetensors`` files as ONNX initializers: (file, offset, length), nothing copied, nothing read.

Source: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from onnx import StringStringEntryProto, TensorProto

from pruner.checkpoint import Tensor

ELEMENT_TYPES = {"F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "F32": TensorProto.FLOAT}


def adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether these tensors lie in one file, one right after the other, so that one initializer can span them."""
    return all(
        a.path == b.path and a.dtype == b.dtype and a.start + a.nbytes == b.start and a.shape[1:] == b.shape[1:]
        for a, b in pairwise(tensors)
    )


def initializer(name: str, tensors: Sequence[Tensor]) -> TensorProto:
    """One initializer over ``adjacent`` tensors, stacked along their first axis: q|k|v is [q + k + v rows, in]."""
    first = tensors[0]
    proto = TensorProto(name=name, data_type=ELEMENT_TYPES[first.dtype], data_location=TensorProto.EXTERNAL)
    proto.dims.extend((sum(t.shape[0] for t in tensors), *first.shape[1:]))
    # the bare name: a runtime looks beside model.onnx and refuses to look anywhere else
    place = {"location": first.path.name, "offset": first.start, "length": sum(t.nbytes for t in tensors)}
    proto.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
    return proto
