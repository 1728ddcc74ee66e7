"""Meta's own distribution: ``consolidated.00.pth`` ..., ``params.json`` and ``tokenizer.model``.

Each part has a share of every matrix, as tensor parallelism cuts it (``fairscale``'s column- and row-parallel layers in
github.com/meta-llama/llama, ``model.py``), and the norms whole. q and k turn pairs of neighbouring rows where
transformers turns the first half of a head against the second, so their rows are interleaved anew. The same as
``convert_llama_weights_to_hf.py`` of transformers 4.46.3, without loading anything: ``scripts/check_meta`` compares.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pruner.checkpoint.config import read_decoder
from pruner.checkpoint.meta_files import check_tokenizer
from pruner.checkpoint.pickled import read_pickled
from pruner.checkpoint.tensor import Piece, Shard, Tensor, gathered
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import PruneAttnError
from pruner.llama import Decoder

PARAMS = "params.json"
PART = re.compile(r"consolidated\.(\d{2})\.pth")
_BUFFERS = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")  # recomputed by who runs it
_THETAS = {10000.0: 4096, 1000000.0: 16384}  # params.json does not say the context: Llama 2's and CodeLlama's

# Meta's name, ours, and the dimension that is cut into parts (None: whole in each); the embedding's depends
_NAMES = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}


def meta_parts(directory: Path) -> list[Path]:
    """The parts in a directory, in order; empty where it is not Meta's distribution."""
    return sorted(path for path in directory.glob("consolidated.*.pth") if PART.fullmatch(path.name))


def read_meta(directory: Path, params: Any) -> tuple[dict[str, Any], tuple[Shard, ...], Decoder, dict[str, Tensor]]:
    """Configuration (as Hugging Face writes it), parts, decoder and tensors (by Hugging Face's names).

    Cost: the parts' headers. Raises ``PruneAttnError`` for parts that are missing, or that are not of the model that
    ``params`` (the content of ``params.json``) describes.
    """
    path = directory / PARAMS
    params = _checked(params, path)
    parts = meta_parts(directory)
    for i, part in enumerate(parts):
        if part.name != (expected := f"consolidated.{i:02d}.pth"):
            raise PruneAttnError(f"{directory / expected}: is missing; download it again")
    shards = tuple(read_pickled(part) for part in parts)
    for shard in shards:
        head = shard.tensors.get("output.weight")
        if head is None or len(head.shape) != 2:
            raise PruneAttnError(f"{shard.path}: has no output.weight; this is not a Llama 2 as Meta distributes it")
    vocabulary = sum(shard.tensors["output.weight"].shape[0] for shard in shards)
    if params["vocab_size"] not in (-1, vocabulary):
        raise PruneAttnError(
            f"{path}: vocab_size is {params['vocab_size']}, but the {len(parts)} parts have {vocabulary} tokens; "
            "is a part missing, or of another model?"
        )
    check_tokenizer(directory, vocabulary)
    config = _config(params, vocabulary, shards[0].tensors["output.weight"].dtype)
    decoder = read_decoder(config, path)
    return config, shards, decoder, _join(decoder, shards, path)


def _checked(params: Any, path: Path) -> dict[str, Any]:
    """The fields that are read of ``params.json``, each of its type."""
    params = params.get("model", params) if isinstance(params, dict) else None
    if not isinstance(params, dict):
        raise PruneAttnError(f"{path}: is not a JSON object; download it again")
    if params.get("quantization_args"):
        raise PruneAttnError(f"{path}: is quantised; convert from the unquantised checkpoint")
    if params.get("use_scaled_rope"):
        raise PruneAttnError(f"{path}: is Llama 3.1 or later; give its Hugging Face form")
    given = {key: value for key, value in params.items() if value is not None}
    out: dict[str, Any] = {}
    for key, default in (
        ("dim", None), ("n_layers", None), ("n_heads", None), ("n_kv_heads", given.get("n_heads")),
        ("multiple_of", 256), ("vocab_size", -1),
    ):  # fmt: skip
        value = out[key] = given.get(key, default)
        whole = (
            isinstance(value, int)
            and not isinstance(value, bool)
            and (1 <= value <= 2**31 or (key, value) == ("vocab_size", -1))
        )
        if not whole:
            raise PruneAttnError(f"{path}: {key} is {str(value)[:40]!r}; it must be a whole number; download it again")
    for key, default in (("norm_eps", None), ("rope_theta", 10000.0), ("ffn_dim_multiplier", 1)):
        value = out[key] = given.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise PruneAttnError(
                f"{path}: {key} is {str(value)[:40]!r}; it must be a positive number; download it again"
            )
    if out["rope_theta"] not in _THETAS or out["vocab_size"] > 100_000:
        raise PruneAttnError(
            f"{path}: rope_theta {out['rope_theta']:g} and vocab_size {out['vocab_size']} are neither Llama 2's nor "
            "CodeLlama's (Llama 3's?); give its Hugging Face form"
        )
    return out


def _config(params: dict[str, Any], vocabulary: int, dtype: str) -> dict[str, Any]:
    """``config.json`` as Llama 2's on the Hub has it."""
    dim, multiple = params["dim"], params["multiple_of"]
    width = int(params["ffn_dim_multiplier"] * int(8 * dim / 3))
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": WEIGHT_DTYPES.get(dtype, dtype),
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": multiple * -(-width // multiple),
        "max_position_embeddings": _THETAS[params["rope_theta"]],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": params["n_heads"],
        "num_hidden_layers": params["n_layers"],
        "num_key_value_heads": params["n_kv_heads"],
        "pretraining_tp": 1,
        "rms_norm_eps": params["norm_eps"],
        "rope_scaling": None,
        "rope_theta": float(params["rope_theta"]),
        "tie_word_embeddings": False,
        "torch_dtype": WEIGHT_DTYPES.get(dtype, dtype),
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def _join(decoder: Decoder, shards: tuple[Shard, ...], params: Path) -> dict[str, Tensor]:
    """The decoder's tensors, made of the parts'."""
    shapes = decoder.tensors()
    embedding = shards[0].tensors.get("tok_embeddings.weight")
    # Llama 2 cuts the embedding's columns; its successors, whose parts are whole rows, cut the vocabulary
    columns = embedding is None or embedding.shape[:1] == (decoder.vocab_size,)
    plan = {
        "tok_embeddings.weight": ("model.embed_tokens.weight", 1 if columns else 0),
        "norm.weight": ("model.norm.weight", None),
        "output.weight": ("lm_head.weight", 0),
    }
    for i in range(decoder.num_layers):
        for theirs, (ours, axis) in _NAMES.items():
            plan[f"layers.{i}.{theirs}.weight"] = (f"model.layers.{i}.{ours}.weight", axis)
    for shard in shards:
        for name in shard.tensors:
            if name not in plan and not _BUFFERS.fullmatch(name):
                raise PruneAttnError(
                    f"{shard.path}: tensor {name!r} does not belong to the model that {params} describes; "
                    "check that both are of the same model"
                )
    return {ours: _joined(theirs, ours, shapes[ours], axis, shards, decoder) for theirs, (ours, axis) in plan.items()}


def _joined(
    theirs: str, ours: str, shape: tuple[int, ...], axis: int | None, shards: tuple[Shard, ...], decoder: Decoder
) -> Tensor:
    pieces: list[Piece] = []
    dtype, joined = None, 0
    for shard in shards:
        tensor = shard.tensors.get(theirs)
        if tensor is None:
            raise PruneAttnError(f"{shard.path}: has no {theirs!r}; download it again")
        if 0 in tensor.shape:
            raise _misfit(shard, theirs, shape, len(shards))
        same = [size for i, size in enumerate(tensor.shape) if i != axis]
        if len(tensor.shape) != len(shape) or same != [size for i, size in enumerate(shape) if i != axis]:
            raise _misfit(shard, theirs, shape, len(shards))
        joined += 0 if axis is None else tensor.shape[axis]
        if tensor.dtype not in WEIGHT_DTYPES or tensor.dtype != (dtype or tensor.dtype):
            raise PruneAttnError(
                f"{shard.path}: {theirs!r} is {tensor.dtype}, which "
                + ("is no dtype of weights" if dtype is None else f"another part has in {dtype}")
                + "; convert from the checkpoint as Meta distributes it"
            )
        dtype = tensor.dtype
        pieces += tensor.as_pieces()
    assert dtype is not None
    if axis is None:
        pieces, axis = pieces[:1], 0
    elif joined != shape[axis]:
        shapes = [shard.tensors[theirs].shape for shard in shards]
        odd = next((shard for shard, its in zip(shards, shapes, strict=True) if its != shapes[0]), shards[0])
        raise _misfit(odd, theirs, shape, len(shards))
    if ours.endswith(("q_proj.weight", "k_proj.weight")):
        for piece in pieces:
            if piece.shape[0] % decoder.head_dim or decoder.head_dim % 2:
                raise PruneAttnError(f"{piece.path}: its part of {theirs!r} is no whole number of heads")
        pieces = [_unpermuted(piece, decoder.head_dim) for piece in pieces]
    return gathered(ours, dtype, shape, tuple(pieces), axis)


def _misfit(shard: Shard, name: str, shape: tuple[int, ...], parts: int) -> PruneAttnError:
    return PruneAttnError(
        f"{shard.path}: {name!r} has shape {list(shard.tensors[name].shape)}, of which {parts} "
        f"part{'s do' if parts > 1 else ' does'} not make the {list(shape)} that params.json says; is a part missing, "
        "or of another model?"
    )


def _unpermuted(piece: Piece, head: int) -> Piece:
    """Rows (head, pair, 2) read as rows (head, 2, pair)."""
    rows, columns = piece.shape
    row, column = piece.strides
    return Piece(piece.path, piece.start, (rows // head, 2, head // 2, columns), (head * row, row, 2 * row, column))
