"""What a checkpoint holds, in numbers: for ``inspect``, and for the table that ``convert`` ends with."""

from __future__ import annotations

from typing import Any

from pruner.checkpoint import Checkpoint, Tensor
from pruner.dtypes import WEIGHT_DTYPES, itemsize
from pruner.llama import SUBLAYERS, Decoder
from pruner.plan import original_counts


def totals(decoder: Decoder, tensors: dict[str, Tensor], dtype: str | None = None) -> dict[str, Any]:
    """Counts of one model: sublayers, parameters, bytes of weights, KV-cache bytes per token.

    ``dtype`` (safetensors name) is what the weights will be converted to; ``None`` leaves each as it is. The KV cache
    is counted in the dtype that most of the weights have.
    """
    names = decoder.tensors()
    kept = [tensor for name, tensor in tensors.items() if name in names]
    if dtype is None:
        sizes: dict[str, int] = {}
        for tensor in kept:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        nbytes, main = sum(sizes.values()), max(sizes, key=lambda d: sizes[d])
    else:
        nbytes, main = sum(t.parameters for t in kept) * itemsize(dtype), dtype
    return {
        "layers": len(decoder.present("block")),
        "attention_sublayers": len(decoder.present("attention")),
        "mlp_sublayers": len(decoder.present("mlp")),
        "parameters": sum(tensor.parameters for tensor in kept),
        "bytes": nbytes,
        "dtype": WEIGHT_DTYPES[main],
        "kv_cache_bytes_per_token": decoder.kv_bytes_per_token(itemsize(main)),
    }


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that ``prune-attn inspect --json`` prints. Cost: headers only, no weights are read.

    ``savings[kind]`` lists what dropping k = 1, 2, ... of the sublayers that are left would save: parameters, bytes of
    weights, and KV-cache bytes per token.
    """
    decoder, tensors = checkpoint.decoder, checkpoint.tensors
    before = totals(decoder, tensors)
    savings: dict[str, list[dict[str, int]]] = {}
    for kind in SUBLAYERS:
        rows = []
        present = decoder.present(kind)
        most = len(present) - (kind == "block")
        for k in range(1, most + 1):
            gone = present[-k:]
            left = decoder.without(
                gone if kind in ("attention", "block") else (), gone if kind in ("mlp", "block") else ()
            )
            after = totals(left, tensors)
            keys = ("parameters", "bytes", "kv_cache_bytes_per_token")
            rows.append({"drop": k, **{key: before[key] - after[key] for key in keys}})
        savings[kind] = rows
    return {
        "path": str(checkpoint.path),
        "original_layers": original_counts(checkpoint)["block"],
        "pruned": decoder.present("attention") != decoder.present("mlp")
        or len(decoder.present("block")) != decoder.num_layers,
        **before,
        "dtypes": [WEIGHT_DTYPES[d] for d in checkpoint.dtypes],
        "numbered_layers": decoder.num_layers,
        "attention_layers": list(decoder.present("attention")),
        "mlp_layers": list(decoder.present("mlp")),
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "vocab_size": decoder.vocab_size,
        "tied_embeddings": decoder.tied,
        "shards": [{"file": s.path.name, "bytes": s.size, "tensors": len(s.tensors)} for s in checkpoint.shards],
        "savings": savings,
    }


def identity(checkpoint: Checkpoint) -> list[Any]:
    """What tells whether a checkpoint is the one that a saved part was measured on; no weights are read."""
    stats = [(shard.path.name, shard.path.stat()) for shard in checkpoint.shards]
    return [checkpoint.fingerprint(), [[name, s.st_size, s.st_mtime_ns] for name, s in stats]]
