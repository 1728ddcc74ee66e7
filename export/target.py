"""What an output holds, given its source and the decoder that is left: tensors, names and configuration."""

from __future__ import annotations

from typing import Any

from export.companions import companions, tokenizer_class
from export.safetensors import Entry
from pruner.checkpoint import CONFIG, Checkpoint, Tensor
from pruner.llama import WEIGHT_DTYPES, Decoder
from pruner.nemotron_nas import dialect


def output_decoder(result: Decoder) -> Decoder:
    """The decoder as the output numbers it: renumbered where whole blocks went and nothing else."""
    return result.renumbered() if result.whole_blocks_only else result


def source_names(result: Decoder) -> dict[str, str]:
    """Name in the output to name in the source, in layout order. They differ where layers are renumbered."""
    return dict(zip(output_decoder(result).tensors(), result.tensors(), strict=True))


def output_entries(checkpoint: Checkpoint, result: Decoder, dtype: str | None) -> list[list[list[Entry]]]:
    """The output's tensors in sections of groups (``Decoder.layout``); ``dtype`` is a safetensors name or ``None``."""
    new_name = {old: new for new, old in source_names(result).items()}
    have = checkpoint.tensors

    def entry(tensor: Tensor) -> Entry:
        return Entry(new_name[tensor.name], tensor, dtype or tensor.dtype)

    return [[[entry(have[name]) for name in group if name in have] for group in section] for section in result.layout()]


def output_config(checkpoint: Checkpoint, result: Decoder, dtype: str | None) -> dict[str, Any]:
    """``config.json`` of the output; ``dtype`` is a safetensors name or ``None``."""
    config = dialect.write_config(checkpoint.config, result, checkpoint.path / CONFIG)
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = WEIGHT_DTYPES[dtype]  # transformers before 4.56 reads the second
    if config["model_type"] == dialect.MODEL_TYPE:
        name = tokenizer_class(companions(checkpoint), config)
        if name:
            config["tokenizer_class"] = name
    return config
