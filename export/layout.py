"""What an output will hold and where each of its bytes comes from; nothing is written here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from export.companions import Companions, check_links, companions, tokenizer_class
from export.onnx import GraphOptions
from export.shards import Entry, OutputShard, plan_shards
from pruner.checkpoint import CONFIG, Checkpoint, Tensor
from pruner.checkpoint.config import read_decoder
from pruner.checkpoint.generation import token_notes
from pruner.dtypes import WEIGHT_DTYPES, safetensors_dtype
from pruner.errors import PruneAttnError
from pruner.llama import Decoder
from pruner.nemotron_nas import dialect
from pruner.plan import PruningPlan
from pruner.summary import totals


@dataclass(frozen=True)
class WriteOptions:
    """How an output is written.

    ``dtype`` (float16, bfloat16 or float32) converts the weights; without it they are the source's bytes, and torch
    is not needed. ``max_shard_size``: "5GB" (10^9), "2GiB" (2^30) or bytes. ``overwrite`` replaces a directory that
    this tool wrote, and no other. ``graph``: how ``model.onnx`` is written beside ``genai_config.json``; ``None``:
    neither is written. ``push`` names the Hub repository that the output is then pushed to.
    """

    dtype: str | None = None
    max_shard_size: str | int = "5GB"
    overwrite: bool = False
    graph: GraphOptions | None = field(default_factory=GraphOptions)
    push: str | None = None

    @property
    def stored_as(self) -> str | None:
        """``dtype`` by safetensors' name. Raises ``PruneAttnError`` for another one."""
        return None if self.dtype is None else safetensors_dtype(self.dtype)

    @property
    def max_bytes(self) -> int:
        """``max_shard_size`` in bytes. Raises ``PruneAttnError`` where it is no size."""
        return parse_size(str(self.max_shard_size))


@dataclass(frozen=True)
class Layout:
    """An output before it is written: ``left`` is what ``plan`` leaves of the checkpoint's decoder."""

    checkpoint: Checkpoint
    plan: PruningPlan
    left: Decoder
    options: WriteOptions
    config: dict[str, Any] = field(repr=False)
    shards: tuple[OutputShard, ...] = field(repr=False)
    along: Companions = field(repr=False)
    notes: tuple[str, ...] = ()  # where the source contradicts itself

    @property
    def nbytes(self) -> int:
        """Bytes of the weights' files, headers included."""
        return sum(shard.size for shard in self.shards)

    @property
    def before(self) -> dict[str, Any]:
        """The source in numbers (``pruner.summary.totals``)."""
        return totals(self.checkpoint.decoder, self.checkpoint.tensors)

    @property
    def after(self) -> dict[str, Any]:
        """The output in numbers."""
        return totals(self.left, self.checkpoint.tensors, self.options.stored_as)


def lay_out(checkpoint: Checkpoint, plan: PruningPlan, left: Decoder, options: WriteOptions) -> Layout:
    """Every tensor of the output with its place, in memory alone. No weights are read.

    Raises ``PruneAttnError`` for files that cannot come along, and where generation_config.json cannot be used.
    """
    dtype, left = options.stored_as, replace(left, tied=checkpoint.decoder.tied)  # from afar a head looks equal
    check_links(checkpoint)
    along = companions(checkpoint)
    config = output_config(checkpoint, left, dtype, along)
    shards = plan_shards(output_entries(checkpoint, left, dtype), options.max_bytes, config)
    notes = (*checkpoint.notes, *token_notes(checkpoint))
    return Layout(checkpoint, plan, left, options, config, tuple(shards), along, notes)


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


def output_config(checkpoint: Checkpoint, result: Decoder, dtype: str | None, along: Companions) -> dict[str, Any]:
    """``config.json`` of the output; ``dtype`` is a safetensors name or ``None``; ``along`` comes along."""
    config = dialect.write_config(checkpoint.config, result, checkpoint.path / CONFIG)
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = WEIGHT_DTYPES[dtype]  # transformers before 4.56 reads the second
    if config["model_type"] == dialect.MODEL_TYPE:
        name = tokenizer_class(along, config)
        if name:
            config["tokenizer_class"] = name
    return config


def as_output(checkpoint: Checkpoint, result: Decoder, dtype: str | None, along: Companions) -> Checkpoint:
    """The checkpoint that this output opens as, its tensors still where and as they lie in ``checkpoint``."""
    config = output_config(checkpoint, result, dtype, along)
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


def stored_in(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """A checkpoint as if its weights were in another dtype, for what asks only that."""
    if dtype is None:
        return checkpoint
    tensors = {name: replace(tensor, dtype=dtype) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)
