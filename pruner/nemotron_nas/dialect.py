"""What ``config.json`` says of a pruned model: NVIDIA's Nemotron-NAS dialect, read and written.

vLLM, SGLang, TensorRT-LLM, llama.cpp and mlx-lm read it natively as ``DeciLMForCausalLM``. A directory with tensors
missing must never open as a plain ``llama``: transformers would fill the holes with random numbers and only warn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruner.errors import PruneAttnError

if TYPE_CHECKING:
    from pruner.llama import Decoder
from pruner.own_code import without_code

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"
CODE_FILES = ("configuration_pruned_llama.py", "modeling_pruned_llama.py")
AUTO_MAP = {
    "AutoConfig": "configuration_pruned_llama.PrunedLlamaConfig",
    "AutoModel": "modeling_pruned_llama.PrunedLlamaModel",
    "AutoModelForCausalLM": "modeling_pruned_llama.DeciLMForCausalLM",
}


def code_files() -> dict[str, bytes]:
    """The two self-contained files that make the directory load in transformers, by name."""
    here = Path(__file__).parent
    return {name: (here / name).read_bytes() for name in CODE_FILES}


def _block(decoder: Decoder, attention: bool, mlp: bool) -> dict[str, Any]:
    # Exactly these keys: mlx-lm is strict and llama.cpp's converter indexes them all.
    group = decoder.num_heads // decoder.num_kv_heads if attention else None
    ffn_mult = 3 * decoder.intermediate_size / (2 * decoder.hidden_size) if mlp else None
    return {
        "attention": {"no_op": not attention, "n_heads_in_group": group, "replace_with_linear": False},
        "ffn": {"no_op": not mlp, "ffn_mult": ffn_mult, "replace_with_linear": False},
    }


def block_configs(decoder: Decoder) -> list[dict[str, Any]]:
    """One entry per layer."""
    return [_block(decoder, a, m) for a, m in zip(decoder.attention, decoder.mlp, strict=True)]


def engine_intermediate_size(decoder: Decoder) -> int:
    """The MLP width that SGLang, mlx-lm and llama.cpp's converter compute back from ``ffn_mult``.

    They round up to a multiple of 256, so a model whose ``intermediate_size`` is none does not load there. vLLM does so
    too, but takes the ``intermediate_size`` that the shipped configuration offers instead. Source:
    ``_ffn_mult_to_intermediate_size`` in vLLM's ``nemotron_nas.py``.
    """
    ffn_mult = _block(decoder, True, True)["ffn"]["ffn_mult"]
    return -(-int(2 * ffn_mult * decoder.hidden_size / 3) // 256) * 256


def rope_fields(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and ``rope_parameters`` from whichever of them a configuration has.

    transformers 5 reads ``rope_parameters``; transformers 4, vLLM and mlx-lm read the other two, and 4.57 silently
    takes the default when it finds ``rope_parameters`` alone. Raises ``PruneAttnError`` where they contradict.
    """
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise PruneAttnError(f"{path}: rope_parameters and rope_scaling must be objects or null")
    thetas = [v for v in (parameters.get("rope_theta"), config.get("rope_theta")) if v is not None]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 1e30 for v in thetas):
        raise PruneAttnError(f"{path}: rope_theta is {str(thetas[0])[:40]!r}; it must be a positive number")
    kinds = {_rope_kind(fields) for fields in (parameters, scaling) if fields}
    differing = parameters and scaling and any(scaling[k] != parameters[k] for k in scaling.keys() & parameters.keys())
    if len(set(map(float, thetas))) > 1 or len(kinds) > 1 or differing:
        raise PruneAttnError(
            f"{path}: rope_parameters contradicts rope_theta or rope_scaling, and each reader would take another; "
            "remove the wrong ones"
        )
    theta = thetas[0] if thetas else 10000.0
    merged = {k: v for k, v in {**parameters, **scaling}.items() if k not in ("type", "rope_type", "rope_theta")}
    kind = kinds.pop() if kinds else "default"
    out: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
    if kind != "default":
        out["rope_scaling"] = scaling or {"rope_type": kind, **merged}
    out["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **merged}
    return out


def _rope_kind(fields: dict[str, Any]) -> str:
    return str(fields.get("rope_type", fields.get("type", "default")))


def read_blocks(config: dict[str, Any], path: Path) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Which layers keep their attention and which their MLP.

    Raises ``PruneAttnError`` where ``block_configs`` is malformed or describes what this tool does not write (heads or
    widths that vary, linear replacements): NVIDIA's own Nemotron-NAS models are not pruned Llamas.
    """
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != config.get("num_hidden_layers"):
        raise PruneAttnError(f"{path}: block_configs must list each of the num_hidden_layers layers once")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    group = heads // (config.get("num_key_value_heads") or heads)
    attention, mlp = [], []
    for i, block in enumerate(blocks):
        try:
            a, f = block["attention"], block["ffn"]
            attention.append(not a["no_op"])
            mlp.append(not f["no_op"])
            fits = not (a["replace_with_linear"] or f["replace_with_linear"])
            if attention[-1]:
                fits &= a["n_heads_in_group"] == group
            if mlp[-1]:
                fits &= abs(2 * f["ffn_mult"] * hidden / 3 - config["intermediate_size"]) < 0.5
        except (KeyError, TypeError, OverflowError):
            raise PruneAttnError(f"{path}: block_configs[{i}] is malformed; convert again") from None
        if not fits:
            raise PruneAttnError(
                f"{path}: layer {i} of block_configs is not what prune-attn writes; only pruned Llamas can be read"
            )
    return tuple(attention), tuple(mlp)


def write_config(source: dict[str, Any], decoder: Decoder, path: Path) -> dict[str, Any]:
    """The configuration of a pruned model, from its source's: all other fields stay as they are.

    A decoder of which whole blocks are missing becomes a plain renumbered Llama; any other is written in the dialect.
    """
    config = {k: v for k, v in without_code(source).items() if k != "block_configs"} | rope_fields(source, path)
    if decoder.whole_blocks_only:
        if config.get("layer_types"):  # one entry per layer, which transformers counts
            config["layer_types"] = [
                kind for kind, kept in zip(config["layer_types"], decoder.attention, strict=True) if kept
            ]
        decoder = decoder.renumbered()
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": decoder.num_layers,
        }
    return config | {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": dict(AUTO_MAP),
        "num_hidden_layers": decoder.num_layers,
        # vLLM and llama.cpp do not default these as transformers does
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "block_configs": block_configs(decoder),
    }


def dump(config: dict[str, Any]) -> bytes:
    """``config.json``'s bytes."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
