"""What a checkpoint's configuration and tensors must be, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.llama import Decoder
from pruner.nemotron_nas import dialect

if TYPE_CHECKING:
    from pruner.checkpoint.tensor import Shard


UNQUANTISED = "convert from the unquantised checkpoint that it was made from (safetensors, PyTorch's .bin, Meta's .pth)"


_QUANTISED = {  # the last part of a tensor's name, and who writes such tensors
    "g_idx": "GPTQ", "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "scales": "GPTQ or AWQ",
    "SCB": "bitsandbytes", "weight_format": "bitsandbytes", "absmax": "bitsandbytes", "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes", "nested_quant_map": "bitsandbytes", "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes", "weight_scale": "compressed-tensors or FP8", "weight_scale_inv": "FP8",
    "input_scale": "compressed-tensors or FP8", "weight_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
}  # fmt: skip


def read_decoder(config: dict[str, Any], path: Path) -> Decoder:
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
    decoder = Decoder(
        vocab_size=count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=count("head_dim", hidden // heads),
        context=count("max_position_embeddings", 2048),  # transformers' default
        epsilon=float(epsilon),
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
