"""One row's decode step as a graph of its own, which our session on CUDA runs over the weights that ``model.onnx`` has.

One token lets it do with fewer kernels: the row's length comes as an input and no mask is summed, no last token is
looked for, gate and up are one product, and silu and what it multiplies are one kernel. It is built in memory and never
written.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from export.onnx import weights
from export.onnx.graph import MICROSOFT, Builder, model_context
from pruner.checkpoint import Checkpoint

PAST_LENGTHS, GATE, UP, GATE_UP = "past_lengths", "gate", "up", "gate_up_proj"
_ALIGNMENT = 256  # bytes, of what CUDA allocates, and so of up too, which has its memory within that of both
_EPSILON = 2.0**30
_SCALE = math.sqrt(_EPSILON)  # the norm of anything small beside it is the thing itself


def decode_step(checkpoint: Checkpoint, context: int | None, max_length: int) -> ModelProto:
    """(1, 1) ``input_ids`` and (1,) ``past_lengths`` (int64, tokens in the cache) to (1, 1, V) logits.

    Key and value buffers are inputs and outputs as in ``model.onnx``, of ``max_length`` tokens, past and present in
    one. ``context`` as in ``GraphOptions``. Weights: ranges of the shards, as there. Outputs named ``gate_up_proj``
    (1, 1, 2 * F) are one buffer too, and the inputs ``gate`` and ``up`` (1, 1, F) its halves.
    """
    builder = _Step(checkpoint, model_context(checkpoint, context), max_length)
    model = builder.model(False, {})
    width = checkpoint.decoder.intermediate_size
    if builder.products:
        model.graph.input.extend(builder.value(name, width) for name in (GATE, UP))
        model.graph.output.extend(builder.value(name, 2 * width) for name in builder.products)
    return model


class _Step(Builder):
    lengths_input = (PAST_LENGTHS, ("batch_size",))

    def __init__(self, checkpoint: Checkpoint, context: int, max_length: int) -> None:
        super().__init__(checkpoint, context)
        self.max_length = max_length
        self.products: list[str] = []

    def lengths(self) -> None:
        self.node("Cast", [PAST_LENGTHS], "seqlens_k", to=TensorProto.INT32)
        self.constant("total_sequence_length", np.array(self.max_length, np.int32))

    def value(self, name: str, width: int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, self.element, ["batch_size", 1, width])

    def mlp(self, x: str, layer: int) -> str:
        """silu(gate) * up by way of an operator that also norms ``up``, by an epsilon beside which nothing counts.

        It is up * scale / sqrt(mean(up**2) + scale**2), in float32: off by mean(up**2) / 2**31, 1e-5 for values of 150.
        """
        d, p = self.decoder, f"model.layers.{layer}.mlp"
        group = math.gcd(d.intermediate_size, 128)  # what one thread block does
        if group < 64:
            return super().mlp(x, layer)
        parts = [f"{p}.gate_proj", f"{p}.up_proj"]
        matrices = [self.checkpoint.tensors[f"{part}.weight"] for part in parts]
        aligned = weights.adjacent(matrices) and matrices[0].nbytes % _ALIGNMENT == 0
        if aligned and not d.mlp_bias:
            gate, up = self.halves(self.linear(x, f"{p}.{GATE_UP}", parts))
        else:
            gate, up = (self.linear(x, part) for part in parts)
        scale = helper.make_tensor("gated.scale", self.element, [group], [_SCALE] * group)
        self.initializers.setdefault("gated.scale", scale)
        y = self.node(f"{MICROSOFT}:GatedRMSNorm", [up, "gated.scale", gate], f"{p}.gated", epsilon=_EPSILON)
        return self.linear(y, f"{p}.down_proj")

    def halves(self, both: str) -> tuple[str, str]:
        """Its gate and its up, with no kernel: Split would copy them. The caller gives the buffer's halves as inputs.

        That ``up`` is the input only once the product is there, the shape sees to, which is taken from the product.
        """
        self.products.append(both)
        pair = self.constant("gate_up.pair", np.array([2, -1, 1, self.decoder.intermediate_size]))
        view = self.node("Reshape", [both, pair], f"{both}.pair")
        shape = self.node("Shape", [view], f"{both}.shape", start=1)
        return GATE, self.node("Reshape", [UP, shape], f"{both}.up")
