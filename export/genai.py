"""``genai_config.json``: onnxruntime-genai loads the directory with it.

Fields: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.checkpoint.generation import Generation, read_generation
from pruner.names import GRAPH

# The KV cache is allocated for search.max_length tokens at once, so it is not the context of a 128k model.
_MAX_LENGTH = 4096


def genai_config(checkpoint: Checkpoint, context: int) -> bytes:
    """The file's bytes; ``context`` is the graph's, in tokens.

    No provider is named, which means the CPU, except for bfloat16, which runs on CUDA alone, there with the attention
    kernels that need no plan for each new prompt length (see docs/guide/onnx.md).
    """
    d, generation = checkpoint.decoder, read_generation(checkpoint)
    fields = generation.fields
    providers = [{"cuda": {"enable_cuda_graph": "1", "sdpa_kernel": "3"}}] if checkpoint.dtypes[0] == "BF16" else []
    config = {
        "model": {
            "type": "llama",
            "vocab_size": d.vocab_size,
            "context_length": context,
            **_special_tokens(generation),
            "decoder": {
                "filename": GRAPH,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
                "hidden_size": d.hidden_size,
                "head_size": d.head_dim,
                "num_attention_heads": d.num_heads,
                "num_key_value_heads": d.num_kv_heads,
                "num_hidden_layers": len(d.present("attention")),  # caches, which dropped attentions do not have
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": min(context, _MAX_LENGTH),
            "min_length": 0,
            "do_sample": fields.get("do_sample", False),
            "num_beams": 1,
            "num_return_sequences": 1,
            "temperature": fields.get("temperature", 1.0),
            "top_k": min(fields.get("top_k", 50), d.vocab_size),
            "top_p": fields.get("top_p", 1.0),
            "repetition_penalty": fields.get("repetition_penalty", 1.0),
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
            "early_stopping": True,
            "past_present_share_buffer": True,
        },
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def _special_tokens(generation: Generation) -> dict[str, Any]:
    """What there is of them: the engine takes no null, and no token beyond the vocabulary."""
    eos = generation.eos
    pad = generation.pad if generation.pad is not None or not eos else eos[0]
    found = {
        "bos_token_id": generation.bos,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": pad,
    }
    return {name: value for name, value in found.items() if value is not None}
