"""Configuration of a Llama with sublayers removed, in the Nemotron-NAS dialect (``block_configs``).

Written by prune-attn; self-contained, so that transformers (4.57 and later) loads the directory that it lies in.
"""

from transformers.models.llama.configuration_llama import LlamaConfig

_ROPE_PARAMETERS = hasattr(LlamaConfig, "rope_parameters")  # transformers 5; 4 has rope_theta and rope_scaling


class _Fields(dict):
    """A dict that is read by attribute as well: ``block.attention.no_op``. Being a dict, it serialises as it is."""

    intermediate_size = None

    def __getattr__(self, name):
        if name not in self or (name == "ffn_mult" and self.intermediate_size):
            raise AttributeError(name)
        return self[name]

    @classmethod
    def of(cls, value):
        return cls({k: cls.of(v) for k, v in value.items()}) if isinstance(value, dict) else value


class PrunedLlamaConfig(LlamaConfig):
    """``LlamaConfig`` and ``block_configs``: one entry per layer, ``no_op`` where attention or ffn is removed."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, rope_theta=None, rope_scaling=None, rope_parameters=None, **kwargs):
        # Which of the three a reader looks at depends on its version, so each is made from whichever is there.
        rope = {"rope_theta": rope_theta or 10000.0, **(rope_parameters or {}), **(rope_scaling or {})}
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        if _ROPE_PARAMETERS:
            kwargs["rope_parameters"] = rope
        else:
            kwargs["rope_theta"] = rope.pop("rope_theta")
            kwargs["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        super().__init__(**kwargs)
        if block_configs is None:  # transformers builds a default instance when it writes a config
            group = self.num_attention_heads // self.num_key_value_heads
            block_configs = [
                {
                    "attention": {"no_op": False, "n_heads_in_group": group, "replace_with_linear": False},
                    "ffn": {
                        "no_op": False,
                        "ffn_mult": 3 * self.intermediate_size / (2 * self.hidden_size),
                        "replace_with_linear": False,
                    },
                }
                for _ in range(self.num_hidden_layers)
            ]
        if len(block_configs) != self.num_hidden_layers:
            raise ValueError(f"block_configs has {len(block_configs)} entries for {self.num_hidden_layers} layers")
        self.block_configs = [_Fields.of(block) for block in block_configs]
        for block in self.block_configs:
            # vLLM rounds ffn_mult up to a multiple of 256, but where a block has no such attribute it takes
            # intermediate_size as it is. What is written to config.json stays: other engines want ffn_mult.
            if not block.ffn.no_op and self.intermediate_size % 256:
                block.ffn.intermediate_size = self.intermediate_size

    def _write_rope(self, output):
        rope = dict((self.rope_parameters if _ROPE_PARAMETERS else self.rope_scaling) or {})
        theta = rope.pop("rope_theta", None) or getattr(self, "rope_theta", None) or 10000.0
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        output["rope_theta"] = theta
        output["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        output["rope_parameters"] = {**rope, "rope_theta": theta}
        return output

    def to_dict(self):
        return self._write_rope(super().to_dict())

    def to_diff_dict(self):
        return self._write_rope(super().to_diff_dict())


__all__ = ["PrunedLlamaConfig"]
