"""What an output holds, given its source and the decoder that is left: tensors, names and configuration."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from export.companions import companions, tokenizer_class
from export.shards import Entry
from pruner.checkpoint import CONFIG, Checkpoint, Tensor
from pruner.checkpoint.config import read_decoder
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.llama import Decoder
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


def as_output(checkpoint: Checkpoint, result: Decoder, dtype: str | None) -> Checkpoint:
    """The checkpoint that this output opens as, its tensors still where and as they lie in ``checkpoint``."""
    config = output_config(checkpoint, result, dtype)
    have, names = checkpoint.tensors, source_names(result)
    tensors = {new: replace(have[old], name=new) for new, old in names.items() if old in have}
    decoder = read_decoder(config, checkpoint.path / CONFIG)
    return replace(checkpoint, config=config, decoder=decoder, tensors=tensors)


def parse_size(text: str) -> int:
    """``5GB`` (10^9 bytes), ``500MB``, ``2GiB`` (2^30) or a number of bytes, to bytes."""
    match = re.fullmatch(r"\s*(\d{1,15})(?:\.(\d{1,9}))?\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match:
        base = 1024 if match[4] else 1000
        size = int(float(f"{match[1]}.{match[2] or 0}") * base ** " KMGT".index(match[3].upper() or " "))
        if size > 0:
            return size
    raise PruneAttnError(f"--max-shard-size {text!r} is not a size; write for example 5GB or 500MB")


def _as(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """A checkpoint as if its weights were in another dtype, for what asks only that."""
    tensors = {name: replace(tensor, dtype=dtype) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)
