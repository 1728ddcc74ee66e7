"""``model.onnx``: the decoder as ONNX Runtime's fused operators, over the ``.safetensors`` bytes as they lie.

Operators: ONNX opset 23 and com.microsoft (onnxruntime's ``docs/ContribOperators.md``). Inputs and outputs are those of
onnxruntime-genai: ``input_ids`` (B, T) and ``attention_mask`` (B, past + T), both int64 and padded on the right (a row
whose mask does not begin with 1 has NaN for logits),
``past_key_values.{j}.key|value`` and ``present.{j}.key|value`` (B, KV heads, tokens, head size), ``logits``
(B, T, V) float32; j counts kept attentions from 0. The graph is built as protobufs, since importing onnx-ir alone takes
0.6 s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.onnx import GraphOptions, initializers
from export.onnx.rope import inverse_frequencies
from pruner import __version__
from pruner.checkpoint import CONFIG, Checkpoint, Tensor
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError

_MICROSOFT = "com.microsoft"
_OPSETS = (("", 23), (_MICROSOFT, 1))
_IR_VERSION = 11  # the first with opset 23

VERSION, SOURCE, PLAN, SHARDS, OPTIONS = (
    f"prune_attn.{key}" for key in ("version", "source", "plan", "shards", "options")
)


def build_graph(
    checkpoint: Checkpoint,
    record: dict[str, Any] | None = None,
    options: GraphOptions = GraphOptions(),  # noqa: B008, it is frozen
) -> ModelProto:
    """The graph of an opened checkpoint; ``record`` (``pruning_plan.json``) goes into its metadata.

    Cost: no weights are read. Raises ``PruneAttnError`` for what ONNX Runtime's operators cannot do (mixed dtypes,
    float64, another activation, head sizes no multiple of 16, some rope scaling).
    """
    path, decoder = checkpoint.path / CONFIG, checkpoint.decoder
    if len(checkpoint.dtypes) > 1:
        names = [WEIGHT_DTYPES[d] for d in checkpoint.dtypes]
        raise PruneAttnError(
            f"{checkpoint.path}: its weights are {' and '.join(names)}, and ONNX Runtime wants one dtype; "
            f"convert it with --dtype {names[0] if names[0] != 'float64' else 'float32'}"
        )
    if checkpoint.dtypes[0] not in initializers.ELEMENT_TYPES:
        raise PruneAttnError(f"{checkpoint.path}: its weights are float64; convert it with --dtype float32")
    if (activation := checkpoint.config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise PruneAttnError(f"{path}: hidden_act {activation!r} has no ONNX graph; only silu has")
    if any(decoder.attention) and decoder.head_dim % 16:
        raise PruneAttnError(f"{path}: head size {decoder.head_dim}: ONNX Runtime's attention wants a multiple of 16")
    builder = _Builder(checkpoint, model_context(checkpoint, options.context))
    return builder.model(
        options.last_token_logits,
        {
            VERSION: __version__,
            SOURCE: json.dumps((record or {}).get("source")),
            PLAN: json.dumps({key: (record or {}).get(key) for key in ("attention", "mlp", "strategy", "requested")}),
            SHARDS: json.dumps(checkpoint.fingerprint()["shards"]),
            OPTIONS: json.dumps({"context": builder.context, "last_token_logits": options.last_token_logits}),
        },
    )


def model_context(checkpoint: Checkpoint, context: int | None = None) -> int:
    """Tokens that the model can attend to, or the smaller ``context`` asked for; ``PruneAttnError`` for a larger."""
    most = checkpoint.decoder.context
    if context is None:
        return most
    if not 1 <= context <= most:
        raise PruneAttnError(f"--context {context}: {checkpoint.path} was made for 1 to {most} tokens")
    return context


class _Builder:
    """Nodes and initializers under construction. Methods take and return names of values."""

    def __init__(self, checkpoint: Checkpoint, context: int) -> None:
        self.checkpoint, self.decoder, self.context = checkpoint, checkpoint.decoder, context
        self.element = initializers.ELEMENT_TYPES[checkpoint.dtypes[0]]
        self.epsilon = checkpoint.decoder.epsilon
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def node(
        self, op: str, inputs: Sequence[str], name: str, outputs: Sequence[str] | None = None, **attributes: Any
    ) -> str:
        domain, _, op_type = op.rpartition(":")
        outputs = [name] if outputs is None else list(outputs)
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def weight(self, name: str, tensors: Sequence[Tensor]) -> str:
        self.initializers.setdefault(name, initializers.initializer(name, tensors))
        return name

    def tensor(self, name: str) -> str:
        return self.weight(name, [self.checkpoint.tensors[name]])

    def linear(self, x: str, name: str, parts: Sequence[str] | None = None) -> str:
        """x @ W.T (+ bias); ``parts`` are the adjacent projections that together are W."""
        have, parts = self.checkpoint.tensors, parts or [name]
        matrix = self.weight(f"{name}.weight", [have[f"{part}.weight"] for part in parts])
        biased = f"{parts[0]}.bias" in have
        y = self.node(f"{_MICROSOFT}:FusedMatMul", [x, matrix], f"{name}.matmul" if biased else name, transB=1)
        if biased:
            y = self.node("Add", [y, self.weight(f"{name}.bias", [have[f"{part}.bias"] for part in parts])], name)
        return y

    def norm(self, residual: str, update: str | None, name: str) -> tuple[str, str]:
        """(normed, residual + update). One fused node, except where there is nothing to add yet."""
        weight = self.tensor(f"{name}.weight")
        if update is None:
            return self.node("RMSNormalization", [residual, weight], name, epsilon=self.epsilon, axis=-1), residual
        # outputs 1 and 2 stay empty: they are for training, and fp16 kernels do not have them
        outputs = [name, "", "", f"{name}.residual"]
        self.node(
            f"{_MICROSOFT}:SkipSimplifiedLayerNormalization", [residual, update, weight], name, outputs,
            epsilon=self.epsilon,
        )  # fmt: skip
        return name, outputs[3]

    def attention(self, x: str, layer: int, slot: int) -> str:
        d, p, have = self.decoder, f"model.layers.{layer}.self_attn", self.checkpoint.tensors
        parts = [f"{p}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        kinds = ("weight", "bias") if d.attention_bias else ("weight",)
        if all(initializers.adjacent([have[f"{part}.{kind}"] for part in parts]) for kind in kinds):
            qkv = [self.linear(x, f"{p}.qkv_proj", parts), "", ""]
        else:  # somebody's save_pretrained laid them apart
            qkv = [self.linear(x, part) for part in parts]
        past, present = (
            [f"{kind}.{slot}.{name}" for name in ("key", "value")] for kind in ("past_key_values", "present")
        )
        inputs = [*qkv, *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"]
        self.node(
            f"{_MICROSOFT}:GroupQueryAttention", inputs, p, [p, *present], num_heads=d.num_heads,
            kv_num_heads=d.num_kv_heads, scale=d.head_dim**-0.5, do_rotary=1, rotary_interleaved=0,
        )  # fmt: skip
        return self.linear(p, f"{p}.o_proj")

    def mlp(self, x: str, layer: int) -> str:
        p = f"model.layers.{layer}.mlp"
        gate = self.linear(x, f"{p}.gate_proj")
        # SiLU; ONNX Runtime fuses the two nodes
        gate = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{p}.act_fn.sigmoid")], f"{p}.act_fn")
        return self.linear(self.node("Mul", [gate, self.linear(x, f"{p}.up_proj")], f"{p}.gated"), f"{p}.down_proj")

    def lengths(self) -> None:
        """``seqlens_k`` (B,) last position of each row, ``total_sequence_length`` (): width of the mask.

        By the mask's sums, since that lets a mask of fixed length stand under a CUDA graph. They are taken in float32
        (exact up to 2**24 tokens): Cast reads the mask with many threads at once, while ONNX Runtime's sum of integers
        reads a row in one thread block, 27 us of a decode step where the mask lies in the host's memory.
        """
        ones = self.node("Cast", ["attention_mask"], "mask.float", to=TensorProto.FLOAT)
        tokens = self.node("ReduceSum", [ones, self.constant("axis_1", np.array([1]))], "mask.sum", keepdims=0)
        last = self.node("Sub", [tokens, self.constant("one.float", np.array(1, np.float32))], "mask.last")
        self.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        shape = self.node("Shape", ["attention_mask"], "mask.shape")
        width = self.node("Gather", [shape, self.constant("one", np.array(1))], "mask.width", axis=0)
        self.node("Cast", [width], "total_sequence_length", to=TensorProto.INT32)

    def positions(self) -> str:
        """0 to context - 1."""
        ends = [
            self.constant(f"rotary.{k}", np.array(v)) for k, v in (("start", 0), ("end", self.context), ("step", 1))
        ]
        return self.node("Range", ends, "rotary.range")

    def rotary(self) -> None:
        """``cos_cache`` and ``sin_cache`` (context, head_dim / 2). Runtimes fold them when they load the graph."""
        path = self.checkpoint.path / CONFIG
        frequencies, factor = inverse_frequencies(self.checkpoint.config, self.decoder.head_dim, path)
        positions = self.node("Cast", [self.positions()], "rotary.positions", to=TensorProto.FLOAT)
        column = self.node("Unsqueeze", [positions, self.constant("axis_1", np.array([1]))], "rotary.column")
        angles = self.node("Mul", [column, self.constant("rotary.inv_freq", frequencies)], "rotary.angles")
        for op, name in (("Cos", "cos_cache"), ("Sin", "sin_cache")):
            value = self.node(op, [angles], f"{name}.float")
            if factor != 1.0:
                scale = self.constant("rotary.attention_factor", np.array(factor, np.float32))
                value = self.node("Mul", [value, scale], f"{name}.scaled")
            self.node("Cast", [value], name, to=self.element)

    def last_columns(self) -> str:
        """(B, 1, 1): the column of each row's own last token, which padding on the right follows.

        min(seqlens_k, T - 1): the first prefill's rows end at ``seqlens_k``; later calls have one row or one column.
        """
        # shapes lie on the host, and so does what Slice reads as its bounds; a copy would forbid a CUDA graph
        positions = "rotary.range" if self.decoder.present("attention") else self.positions()
        width = self.node("Shape", ["input_ids"], "ids.width", start=1, end=2)
        before = self.node("Sub", [width, self.constant("axis_1", np.array([1]))], "ids.end")
        end = self.node("Slice", [positions, before, width], "last_column.slice")
        # fails where there is none, beyond the context
        end = self.node("Squeeze", [end, self.constant("axis_0", np.array([0]))], "last_column")
        last = self.node("Cast", ["seqlens_k"], "last_token.position", to=TensorProto.INT64)
        index = self.node("Min", [last, end], "last_token.index")
        return self.node("Unsqueeze", [index, self.constant("axes_12", np.array([1, 2]))], "last_token.column")

    def begins(self) -> str:
        """(B, 1, 1) bool: whether each row's mask begins with 1, so that it is not padded on the left."""
        column = self.node(
            "Gather", ["attention_mask", self.constant("mask.first", np.array([[0]]))], "mask.begin", axis=1
        )
        return self.node("Cast", [column], "guard.begins", to=TensorProto.BOOL)

    def guarded(self, x: str, begins: str) -> str:
        """(B, T, C) ``x``, and NaN in rows that are padded on the left, whose attention takes pads for tokens.

        After the layers, since a NaN in a cache buffer would outlive the request.
        """
        self.initializers["guard.nan"] = helper.make_tensor("guard.nan", self.element, [], [math.nan])
        return self.node("Where", [begins, x, "guard.nan"], "guard")

    def model(self, last_token_logits: bool, metadata: dict[str, str]) -> ModelProto:
        d, slots = self.decoder, self.decoder.present("attention")
        if slots or last_token_logits:
            self.lengths()
        if slots:
            self.rotary()
        # Of a node's inputs ONNX Runtime runs first what stands last in the file. So these columns, which stand before
        # the layers, wait until they are wanted, instead of keeping the GPU waiting for its first product.
        columns, begins = self.last_columns() if last_token_logits else None, self.begins()
        residual = self.node("Gather", [self.tensor("model.embed_tokens.weight"), "input_ids"], "model.embed_tokens")
        update: str | None = None
        for layer in range(d.num_layers):
            p = f"model.layers.{layer}"
            if d.attention[layer]:
                x, residual = self.norm(residual, update, f"{p}.input_layernorm")
                update = self.attention(x, layer, slots.index(layer))
            if d.mlp[layer]:
                x, residual = self.norm(residual, update, f"{p}.post_attention_layernorm")
                update = self.mlp(x, layer)
        x, _ = self.norm(residual, update, "model.norm")
        if columns:  # (B, T, C) to (B, 1, C)
            x = self.node("GatherND", [x, columns], "last_token", batch_dims=1)
        x = self.guarded(x, begins)
        head = self.tensor(self.checkpoint.head)
        wide = self.element != TensorProto.FLOAT  # widened on the device: hosts do it slowly, or cannot (bfloat16)
        logits = self.node(f"{_MICROSOFT}:FusedMatMul", [x, head], "lm_head" if wide else "logits", transB=1)
        if wide:
            self.node("Cast", [logits], "logits", to=TensorProto.FLOAT)

        def info(name: str, element: int, shape: Sequence[str | int]) -> Any:
            return helper.make_tensor_value_info(name, element, shape)

        def cache(kind: str, tokens: str) -> list[Any]:
            shape: list[str | int] = ["batch_size", d.num_kv_heads, tokens, d.head_dim]
            return [info(f"{kind}.{j}.{n}", self.element, shape) for j in range(len(slots)) for n in ("key", "value")]

        int64, time = TensorProto.INT64, 1 if last_token_logits else "sequence_length"
        inputs = [
            info("input_ids", int64, ["batch_size", "sequence_length"]),
            info("attention_mask", int64, ["batch_size", "total_sequence_length"]),
            *cache("past_key_values", "past_sequence_length"),
        ]
        outputs = [
            info("logits", TensorProto.FLOAT, ["batch_size", time, d.vocab_size]),
            *cache("present", "total_sequence_length"),
        ]
        graph = helper.make_graph(self.nodes, "llama", inputs, outputs, list(self.initializers.values()))
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*opset) for opset in _OPSETS],
            ir_version=_IR_VERSION,
            producer_name="prune-attn",
            producer_version=__version__,
        )
        helper.set_model_props(model, metadata)
        return model
