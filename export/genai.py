"""``genai_config.json``: onnxruntime-genai loads the directory with it.

Fields: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.errors import PruneAttnError
from pruner.files import read_json
from pruner.names import GRAPH

# The KV cache is allocated for search.max_length tokens at once, so it is not the context of a 128k model.
_MAX_LENGTH = 4096


def genai_config(checkpoint: Checkpoint, context: int) -> bytes:
    """The file's bytes; ``context`` is the graph's, in tokens.

    No provider is named, which means the CPU, except for bfloat16, which runs on CUDA alone, there with the attention
    kernels that need no plan for each new prompt length (see docs/guide/onnx.md).
    """
    d, generation = checkpoint.decoder, _generation_config(checkpoint.path)
    eos = generation_value(checkpoint, "eos_token_id", 2)
    providers = [{"cuda": {"enable_cuda_graph": "1", "sdpa_kernel": "3"}}] if checkpoint.dtypes[0] == "BF16" else []
    config = {
        "model": {
            "type": "llama",
            "vocab_size": d.vocab_size,
            "context_length": context,
            "bos_token_id": generation_value(checkpoint, "bos_token_id", 1),
            "eos_token_id": eos,
            "pad_token_id": generation_value(checkpoint, "pad_token_id", eos[0] if isinstance(eos, list) else eos),
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
            "do_sample": bool(generation.get("do_sample", False)),
            "num_beams": 1,
            "num_return_sequences": 1,
            "temperature": generation.get("temperature", 1.0),
            "top_k": generation.get("top_k", 50),
            "top_p": generation.get("top_p", 1.0),
            "repetition_penalty": generation.get("repetition_penalty", 1.0),
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
            "early_stopping": True,
            "past_present_share_buffer": True,
        },
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def generation_value(checkpoint: Checkpoint, name: str, default: Any) -> Any:
    """What ``generation_config.json``, or else ``config.json``, says of ``name``; ``default`` where neither does."""
    for found in (_generation_config(checkpoint.path), checkpoint.config):
        if found.get(name) is not None:
            return found[name]
    return default


def _generation_config(directory: Path) -> dict[str, Any]:
    try:
        found = read_json(directory / "generation_config.json")
    except (OSError, PruneAttnError):
        return {}
    return {k: v for k, v in found.items() if v is not None}
