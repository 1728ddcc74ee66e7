"""What a checkpoint's configuration and tensors must be, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruner.checkpoint.fields import check_fields
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.llama import EMBEDDING, HEAD, Decoder
from pruner.nemotron_nas import dialect

if TYPE_CHECKING:
    from pruner.checkpoint.tensor import Shard


UNQUANTISED = "convert from the unquantised checkpoint that it was made from (safetensors, PyTorch's .bin, Meta's .pth)"


QUANTISATION = ("quantization_config", "compression_config", "quantization")  # the last is MLX's

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

    pruned = config.get("model_type") == dialect.MODEL_TYPE
    _check_architecture(config, bad)

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
    if hidden % heads:
        raise bad(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = count("head_dim", hidden // heads)
    if head_dim % 2:
        raise bad(f"head_dim is {head_dim}; rotary embeddings want an even one")
    check_fields(config, path)
    decoder = Decoder(
        vocab_size=count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context=config.get("max_position_embeddings", 2048),  # transformers' defaults
        epsilon=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        attention=(True,) * layers,
        mlp=(True,) * layers,
    )
    if pruned:
        attention, mlp = dialect.read_blocks(config, path)
        decoder = replace(decoder, attention=attention, mlp=mlp)
    return decoder


def _check_architecture(config: dict[str, Any], bad: Callable[[str], PruneAttnError]) -> None:
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise bad('architectures must be a list of names, such as ["LlamaForCausalLM"]')
    name = dialect.ARCHITECTURE if model_type == dialect.MODEL_TYPE else "LlamaForCausalLM"
    others = [found for found in architectures if found.lower() != name.lower()]  # once it was LLaMAForCausalLM
    if others:
        what = others[0] if len(architectures) == 1 else " and ".join(architectures)
        raise bad(f"is a {what}; only LlamaForCausalLM can be pruned")
    if model_type is None and architectures:
        raise bad(f'is a {architectures[0]} without a model_type; put "model_type": "llama" into it if it is a Llama')
    if model_type not in ("llama", dialect.MODEL_TYPE):
        raise bad(f"its model_type is {model_type!r}; only Llama models, of model_type 'llama', can be pruned")


def quantisation(config: dict[str, Any]) -> tuple[str, str] | None:
    """The field that says that weights are quantised, and the method; ``None`` where none does."""
    for field in QUANTISATION:
        found = config.get(field)
        if not found:
            continue
        if not isinstance(found, dict):
            return field, "unknown method"
        flags = {key: value for key, value in found.items() if key.strip("_").startswith("load_in_")}
        if flags and not any(flags.values()):  # what bitsandbytes leaves behind where weights were merged
            continue
        return field, str(found.get("quant_method") or ("bitsandbytes" if flags else "unknown method"))
    return None


def quantised(config: dict[str, Any], path: Path, field: str, method: str, dtype: str | None) -> PruneAttnError:
    """The refusal of a configuration that says so; ``dtype`` (float16 ...) where the weights are not quantised."""
    if dtype is not None:
        return PruneAttnError(
            f"{path}: says that the weights are quantised ({method}), but they are {dtype}, as merging leaves them; "
            f"remove {field} from it"
        )
    base = config.get("_name_or_path")
    named = f"; its _name_or_path is {base[:100]!r}" if isinstance(base, str) and base else ""
    return PruneAttnError(f"{path}: is quantised ({method}); {UNQUANTISED}{named}")


def is_buffer(name: str) -> bool:
    """Whether it is a buffer that old conversions stored and that is recomputed."""
    return name.endswith(".rotary_emb.inv_freq")


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
                if is_buffer(name):
                    continue
                raise PruneAttnError(
                    f"{shard.path}: tensor {name!r} does not belong to the model that {directory}/config.json "
                    f"describes; {_cure(name, expected)}"
                )
            missing.pop(name)
            if tensor.shape != expected[name]:
                raise PruneAttnError(
                    f"{shard.path}: {name!r} has shape {list(tensor.shape)} but config.json says "
                    f"{list(expected[name])}; check that both are of the same model"
                )
    if decoder.tied and len(missing.keys() & {HEAD, EMBEDDING}) == 1:  # either is both
        missing = {name: shape for name, shape in missing.items() if name not in (HEAD, EMBEDDING)}
    if missing:
        name = next(iter(missing))
        raise PruneAttnError(
            f"{directory}: tensor {name!r} is in no shard ({len(missing)} missing); download the checkpoint again"
        )


def _cure(name: str, expected: dict[str, tuple[int, ...]]) -> str:
    """What to do about a tensor that a model has not."""
    parts = name.split(".")
    if any(part.startswith("lora_") or part in ("base_layer", "modules_to_save") for part in parts):
        return "it is an adapter's (LoRA): merge it with PEFT's merge_and_unload(), then save_pretrained()"
    if f"model.{name}" in expected:
        return "it was saved from LlamaModel, without its head; save the LlamaForCausalLM"
    for key in expected:
        if name.endswith(f".{key}"):
            return f"save it as {key!r}"
    return "check that both are of the same model"
