"""The Llama decoder as this tool sees it: the configuration fields, and which tensors belong to which sublayer.

A decoder layer is two sublayers, each with the norm that feeds it (arXiv 2302.13971, section 2.2):
attention = ``input_layernorm`` + ``self_attn``, MLP = ``post_attention_layernorm`` + ``mlp``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

SUBLAYERS = ("attention", "mlp", "block")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]  # by the tensor's name


@dataclass(frozen=True)
class Decoder:
    """A Llama decoder's shape. ``attention[i]`` and ``mlp[i]`` say whether layer i still has that sublayer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int  # tokens
    epsilon: float  # of the norms
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    attention: tuple[bool, ...]
    mlp: tuple[bool, ...]

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
        """Bytes of KV cache one token takes: K and V of every kept attention, ``itemsize`` bytes per element."""
        return 2 * self.num_kv_heads * self.head_dim * itemsize * sum(self.attention)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _attention_groups(self, layer: int) -> Iterator[Shapes]:
        p, h = f"model.layers.{layer}.self_attn", self.hidden_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        yield {f"{p}.{name}.weight": (n, h) for name, n in rows.items()}
        if self.attention_bias:
            yield {f"{p}.{name}.bias": (n,) for name, n in rows.items()}
        yield {f"{p}.o_proj.weight": (h, q)} | ({f"{p}.o_proj.bias": (h,)} if self.attention_bias else {})

    def _mlp_groups(self, layer: int) -> Iterator[Shapes]:
        p, h, i = f"model.layers.{layer}.mlp", self.hidden_size, self.intermediate_size
        yield {f"{p}.{name}.weight": (i, h) for name in ("gate_proj", "up_proj")}
        if self.mlp_bias:
            yield {f"{p}.{name}.bias": (i,) for name in ("gate_proj", "up_proj")}
        yield {f"{p}.down_proj.weight": (h, i)} | ({f"{p}.down_proj.bias": (h,)} if self.mlp_bias else {})

    def layout(self) -> list[list[Shapes]]:
        """All tensors with their shapes, in the order in which they lie on disk.

        Sections (embeddings, one per layer, head) of groups: a group is adjacent and never crosses shards, so that an
        ONNX initializer can span q|k|v (or gate|up) as one [rows, in] matrix.
        """
        h = self.hidden_size
        sections: list[list[Shapes]] = [[{EMBEDDING: (self.vocab_size, h)}]]
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            groups: list[Shapes] = []
            norms: Shapes = {}
            if attention:
                groups += self._attention_groups(layer)
                norms[f"model.layers.{layer}.input_layernorm.weight"] = (h,)
            if mlp:
                groups += self._mlp_groups(layer)
                norms[f"model.layers.{layer}.post_attention_layernorm.weight"] = (h,)
            if groups:
                sections.append([*groups, norms])
        sections.append([{"model.norm.weight": (h,)}, {HEAD: (self.vocab_size, h)}])
        return sections

    def tensors(self) -> Shapes:
        """Name to shape of every tensor, in layout order. A tied model's files may lack the head, or the embedding."""
        return {name: shape for section in self.layout() for group in section for name, shape in group.items()}

    def sublayer_parameters(self, sublayer: str) -> int:
        """Parameters that dropping one such sublayer (norm included) removes."""
        norm: Shapes = {"norm": (self.hidden_size,)}
        attention, mlp = [*self._attention_groups(0), norm], [*self._mlp_groups(0), norm]
        groups = {"attention": attention, "mlp": mlp, "block": attention + mlp}[sublayer]
        return sum(prod(shape) for group in groups for shape in group.values())
