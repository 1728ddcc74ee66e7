"""The Llama decoder as this tool sees it: the configuration fields, and which tensors belong to which sublayer.

A decoder layer is two sublayers, each with the norm that feeds it (arXiv 2302.13971, section 2.2):
attention = ``input_layernorm`` + ``self_attn``, MLP = ``post_attention_layernorm`` + ``mlp``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruner.errors import PruneAttnError
from pruner.nemotron_nas import dialect

if TYPE_CHECKING:
    from pruner.checkpoint.tensor import Shard

WEIGHT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_DTYPE_NAMES = {name: dtype for dtype, name in WEIGHT_DTYPES.items()}

SUBLAYERS = ("attention", "mlp", "block")

UNQUANTISED = "convert from the unquantised checkpoint that it was made from (safetensors, PyTorch's .bin, Meta's .pth)"
_QUANTISED = {  # the last part of a tensor's name, and who writes such tensors
    "g_idx": "GPTQ", "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "scales": "GPTQ or AWQ",
    "SCB": "bitsandbytes", "weight_format": "bitsandbytes", "absmax": "bitsandbytes", "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes", "nested_quant_map": "bitsandbytes", "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes", "weight_scale": "compressed-tensors or FP8", "weight_scale_inv": "FP8",
    "input_scale": "compressed-tensors or FP8", "weight_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
}  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """A Llama decoder's shape. ``attention[i]`` and ``mlp[i]`` say whether layer i still has that sublayer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    attention: tuple[bool, ...]
    mlp: tuple[bool, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> Decoder:
        """Read ``config.json`` (plain Llama, or pruned in the Nemotron-NAS dialect).

        Raises ``PruneAttnError`` for another architecture, or for fields that are missing or disagree; ``path``
        is what the error names.
        """

        def bad(what: str) -> PruneAttnError:
            return PruneAttnError(f"{path}: {what}")

        model_type, architectures = config.get("model_type"), config.get("architectures") or []
        pruned = model_type == dialect.MODEL_TYPE
        accepted = [dialect.ARCHITECTURE] if pruned else ["LlamaForCausalLM"]
        if (model_type != "llama" and not pruned) or (architectures and architectures != accepted):
            found = architectures[0] if isinstance(architectures, list) and architectures else model_type
            raise bad(f"is a {found or 'model of unknown architecture'}; only LlamaForCausalLM can be pruned")

        def count(key: str, default: int | None = None, most: int = 2**31) -> int:
            value = config.get(key)
            if value is None and default is not None:
                return default
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise bad(f"{key} is {str(value)[:40]!r}; it must be a whole number from 1 to {most}")
            return value

        layers = count("num_hidden_layers", most=10_000)
        hidden, heads = count("hidden_size"), count("num_attention_heads")
        kv_heads = count("num_key_value_heads", heads)
        if heads % kv_heads:
            raise bad(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if config.get("head_dim") is None and hidden % heads:
            raise bad(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        epsilon = config.get("rms_norm_eps", 1e-6)  # transformers' default
        if not isinstance(epsilon, (int, float)) or isinstance(epsilon, bool) or not 0 <= epsilon < 1:
            raise bad(f"rms_norm_eps is {str(epsilon)[:40]!r}; it must be a small number")
        dialect.rope_fields(config, path)  # refuses fields that contradict each other
        decoder = cls(
            vocab_size=count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=count("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=count("head_dim", hidden // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            attention=(True,) * layers,
            mlp=(True,) * layers,
        )
        if pruned:
            attention, mlp = dialect.read_blocks(config, path)
            decoder = replace(decoder, attention=attention, mlp=mlp)
        return decoder

    @property
    def num_layers(self) -> int:
        """Decoder layers, those with both sublayers dropped included."""
        return len(self.attention)

    def present(self, sublayer: str) -> tuple[int, ...]:
        """Layers that still have this sublayer; for ``block``, layers that still have anything."""
        has = {
            "attention": self.attention,
            "mlp": self.mlp,
            "block": tuple(a or m for a, m in zip(self.attention, self.mlp, strict=True)),
        }[sublayer]
        return tuple(i for i, kept in enumerate(has) if kept)

    @property
    def whole_blocks_only(self) -> bool:
        """Whether every layer is either whole or gone, so that renumbering gives a plain Llama."""
        return self.attention == self.mlp and any(self.attention)

    def without(self, attention: Iterable[int], mlp: Iterable[int]) -> Decoder:
        """This decoder with more sublayers dropped; numbering stays."""
        gone_attention, gone_mlp = set(attention), set(mlp)
        return replace(
            self,
            attention=tuple(kept and i not in gone_attention for i, kept in enumerate(self.attention)),
            mlp=tuple(kept and i not in gone_mlp for i, kept in enumerate(self.mlp)),
        )

    def renumbered(self) -> Decoder:
        """The plain decoder that is left when empty layers are taken out (see ``whole_blocks_only``)."""
        kept = sum(self.attention)
        return replace(self, attention=(True,) * kept, mlp=(True,) * kept)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of KV cache one token takes: K and V of every kept attention, ``itemsize`` bytes an element."""
        return 2 * self.num_kv_heads * self.head_dim * itemsize * sum(self.attention)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _attention_groups(self, layer: int) -> Iterator[dict[str, tuple[int, ...]]]:
        p, h = f"model.layers.{layer}.self_attn", self.hidden_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        yield {f"{p}.{name}.weight": (n, h) for name, n in rows.items()}
        if self.attention_bias:
            yield {f"{p}.{name}.bias": (n,) for name, n in rows.items()}
        yield {f"{p}.o_proj.weight": (h, q)} | ({f"{p}.o_proj.bias": (h,)} if self.attention_bias else {})

    def _mlp_groups(self, layer: int) -> Iterator[dict[str, tuple[int, ...]]]:
        p, h, i = f"model.layers.{layer}.mlp", self.hidden_size, self.intermediate_size
        yield {f"{p}.{name}.weight": (i, h) for name in ("gate_proj", "up_proj")}
        if self.mlp_bias:
            yield {f"{p}.{name}.bias": (i,) for name in ("gate_proj", "up_proj")}
        yield {f"{p}.down_proj.weight": (h, i)} | ({f"{p}.down_proj.bias": (h,)} if self.mlp_bias else {})

    def layout(self) -> list[list[dict[str, tuple[int, ...]]]]:
        """All tensors with their shapes, in the order in which they lie on disk.

        Sections (embeddings, one a layer, head) of groups: a group is adjacent and never crosses shards, so that an
        ONNX initializer can span q|k|v (or gate|up) as one [rows, in] matrix.
        """
        h = self.hidden_size
        sections = [[{"model.embed_tokens.weight": (self.vocab_size, h)}]]
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            groups: list[dict[str, tuple[int, ...]]] = []
            norms: dict[str, tuple[int, ...]] = {}
            if attention:
                groups += self._attention_groups(layer)
                norms[f"model.layers.{layer}.input_layernorm.weight"] = (h,)
            if mlp:
                groups += self._mlp_groups(layer)
                norms[f"model.layers.{layer}.post_attention_layernorm.weight"] = (h,)
            if groups:
                sections.append([*groups, norms])
        sections.append([{"model.norm.weight": (h,)}, {"lm_head.weight": (self.vocab_size, h)}])
        return sections

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor, in layout order. A tied ``lm_head.weight`` may be absent from the files."""
        return {name: shape for section in self.layout() for group in section for name, shape in group.items()}

    def sublayer_parameters(self, sublayer: str) -> int:
        """Parameters that dropping one such sublayer (norm included) removes."""
        attention = [*self._attention_groups(0), {"norm": (self.hidden_size,)}]
        mlp = [*self._mlp_groups(0), {"norm": (self.hidden_size,)}]
        groups = {"attention": attention, "mlp": mlp, "block": attention + mlp}[sublayer]
        return sum(prod(shape) for group in groups for shape in group.values())


def itemsize(dtype: str) -> int:
    """Bytes an element of a safetensors dtype that weights can have."""
    return {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[dtype]


def safetensors_dtype(name: str) -> str:
    """``float16`` to ``F16`` and so on; ``PruneAttnError`` for another name."""
    try:
        return _DTYPE_NAMES[name]
    except KeyError:
        raise PruneAttnError(f"unknown dtype {name!r}; choose float16, bfloat16 or float32") from None


def check_not_quantised(config: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint whose configuration says that its weights are quantised (GPTQ, AWQ, bitsandbytes ...)."""
    quantisation = config.get("quantization_config")
    if not quantisation:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method is None and isinstance(quantisation, dict):
        method = "bitsandbytes" if any("load_in_" in key for key in quantisation) else None
    base = config.get("_name_or_path")
    named = f"; its _name_or_path is {base[:100]!r}" if isinstance(base, str) and base else ""
    raise PruneAttnError(f"{path}: is quantised ({method or 'unknown method'}); {UNQUANTISED}{named}")


def check_tensors(decoder: Decoder, shards: Iterable[Shard], directory: Path) -> None:
    """Refuse shards that do not hold what the configuration promises; the error names the first difference."""
    expected = decoder.tensors()
    missing = dict(expected)
    for shard in shards:
        for name, tensor in shard.tensors.items():
            method = _QUANTISED.get(name.rpartition(".")[2])
            if method or (name in expected and tensor.dtype not in WEIGHT_DTYPES):
                how = f" ({method})" if method else ""
                raise PruneAttnError(f"{shard.path}: is quantised{how}: {name!r} is {tensor.dtype}; {UNQUANTISED}")
            if name not in expected:
                if name.endswith(".rotary_emb.inv_freq"):  # a buffer that old conversions stored; it is recomputed
                    continue
                wrapped = next((key for key in expected if name.endswith(f".{key}")), None)
                raise PruneAttnError(
                    f"{shard.path}: tensor {name!r} does not belong to the model that {directory}/config.json "
                    "describes; " + (f"save it as {wrapped!r}" if wrapped else "check that both are of the same model")
                )
            missing.pop(name)
            if tensor.shape != expected[name]:
                raise PruneAttnError(
                    f"{shard.path}: {name!r} has shape {list(tensor.shape)} but config.json says "
                    f"{list(expected[name])}; check that both are of the same model"
                )
    if decoder.tied:
        missing.pop("lm_head.weight", None)
    if missing:
        name = next(iter(missing))
        raise PruneAttnError(
            f"{directory}: tensor {name!r} is in no shard ({len(missing)} missing); download the checkpoint again"
        )
