"""Llama with sublayers physically removed: transformers' own Llama, without the modules that ``block_configs`` drops.

Written by prune-attn; self-contained, so that transformers (4.57 and later) loads the directory that it lies in.
"""

from pathlib import Path

from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from .configuration_pruned_llama import PrunedLlamaConfig


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx, cache_idx):
        super().__init__(config, cache_idx)  # layer_idx is what the attention indexes the KV cache with
        block = config.block_configs[layer_idx]
        if block.attention.no_op:
            self.self_attn = self.input_layernorm = None
        if block.ffn.no_op:
            self.mlp = self.post_attention_layernorm = None

    def forward(self, hidden_states, **kwargs):  # (B, T, C) -> (B, T, C)
        if self.self_attn is not None:
            attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attention
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class WithoutStaleGraph:
    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        # a graph over the shards that were there before would compute garbage over the new ones
        Path(save_directory, "model.onnx").unlink(missing_ok=True)


class PrunedLlamaModel(WithoutStaleGraph, LlamaModel):
    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        layers, cache_idx = [], 0
        for layer_idx, block in enumerate(config.block_configs):
            layers.append(PrunedLlamaDecoderLayer(config, layer_idx, cache_idx))
            # Cache slots are counted over the kept attentions: a dropped one owns none, and slot 0, which the cache's
            # length is read from, is always in use.
            cache_idx += not block.attention.no_op
        self.layers = nn.ModuleList(layers)
        self.post_init()


class DeciLMForCausalLM(WithoutStaleGraph, LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.model = PrunedLlamaModel(config)
        self.post_init()


__all__ = ["DeciLMForCausalLM", "PrunedLlamaModel"]
