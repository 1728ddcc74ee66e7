"""A GGUF file of a pruned directory, for llama.cpp: what its own converter gets wrong for these models, done right.

llama.cpp reads the Nemotron-NAS dialect as architecture ``deci`` (its ``conversion/deci.py``, ``src/models/deci.cpp``).
As of the copy in llama-cpp-python 0.3.36, its converter writes no token scores for them, so that text is cut into other
tokens, and rounds the MLP width up to a multiple of 256; its runtime cannot start with a layer without attention, and
forgets the attention of a layer without MLP. Hence the vocabulary from ``tokenizer.model``, the width as it is, and in
those two places alone a sublayer of zeros. Format: the ``gguf`` package, llama.cpp's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.companions import companions
from export.staging import beside, check_space
from pruner.checkpoint import CONFIG, Checkpoint, Tensor, open_checkpoint
from pruner.checkpoint.generation import read_generation
from pruner.checkpoint.load import load_tensor
from pruner.dtypes import itemsize
from pruner.errors import PruneAttnError
from pruner.files import disk_errors, expand, read_bounded, read_json
from pruner.llama import Decoder
from pruner.nemotron_nas.dialect import rope_fields
from pruner.progress import Progress, Step

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's token types
_MOST_TEMPLATE = 1 << 20  # bytes
_ZERO_WIDTH = 256  # of an MLP of zeros; quantisers want blocks of up to 256


def write_gguf(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``directory`` (any Llama that this tool reads) as the GGUF file ``output``; returns what was written.

    Weights keep their dtype, norms become float32 as llama.cpp wants them; ``llama-quantize`` makes it smaller. Memory:
    one tensor. The file appears whole or not at all. ``progress`` counts bytes.
    Raises ``PruneAttnError`` for what llama.cpp or this writer cannot express.
    """
    try:
        import gguf
    except ImportError:
        raise PruneAttnError("the package gguf is missing; pip install '.[gguf]' in the clone of prune-attn") from None
    checkpoint, target = open_checkpoint(directory), expand(output)
    if target.exists() and not (overwrite and target.is_file()):
        raise PruneAttnError(f"{target}: exists already; choose another file, or add --overwrite")
    if not target.parent.is_dir():
        raise PruneAttnError(f"{target.parent}: no such directory; make it, or choose another file")
    why = why_no_gguf(checkpoint)
    if why:
        raise PruneAttnError(why)
    companions(checkpoint)  # which checks what the vocabulary is made of
    writer = gguf.GGUFWriter(None, "deci")
    _describe(writer, checkpoint)
    _vocabulary(writer, checkpoint)
    tensors, total, done = list(_tensors(checkpoint)), 0, 0
    for name, dtype, shape, _ in tensors:
        kind = gguf.GGMLQuantizationType[dtype]
        nbytes = prod(shape) * itemsize(dtype)
        writer.add_tensor_info(name, shape, np.dtype(np.int8), nbytes, raw_dtype=kind)
        total += nbytes
    check_space(target, total)
    with disk_errors(target), beside(target) as directory:
        temporary = directory / "new.gguf"
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, _, _, make in tensors:
                data = make()
                writer.write_tensor_data(data.view(_Writes))
                done += data.nbytes
                if progress is not None:
                    progress(Step("writing", done, total, "bytes", seconds=total / 5e8))
            for file in writer.fout or ():
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(OSError):
                writer.close()
        checkpoint.check_unchanged()
        os.replace(temporary, target)
    return {"path": str(target), "bytes": target.stat().st_size, "tensors": len(tensors)}


class _Writes(np.ndarray):
    """An array whose ``tofile`` says what went wrong, which numpy's does not."""

    def tofile(self, file: Any, /, sep: str = "", format: str = "%s") -> None:
        file.write(self.data.cast("B"))


def why_no_gguf(checkpoint: Checkpoint) -> str | None:
    """What llama.cpp's ``deci``, or this writer, cannot express of a model; None where it can."""
    d = checkpoint.decoder
    if not any(d.attention):
        return f"{checkpoint.path}: no attention is left, and llama.cpp wants a KV cache; keep one"
    if d.head_dim * d.num_heads != d.hidden_size or d.attention_bias or d.mlp_bias:
        return f"{checkpoint.path}: has biases or a head_dim of its own, which llama.cpp's deci lacks"
    tokenizer = checkpoint.path / "tokenizer.model"
    if not tokenizer.is_file():
        return f"{tokenizer}: is missing; a GGUF is written for Llama-2's SentencePiece tokenizer only"
    return None


def _widths(d: Decoder) -> tuple[list[int], list[int], list[int]]:
    """Query heads, key/value heads and MLP width of every layer, the two sublayers of zeros counted in."""
    heads = [d.num_heads if kept or not i else 0 for i, kept in enumerate(d.attention)]  # of layer 0 all is computed
    kv_heads = [d.num_kv_heads if kept else 0 for kept in d.attention]
    last = d.num_layers - 1
    width = [
        d.intermediate_size if kept else _ZERO_WIDTH if heads[i] or i == last else 0 for i, kept in enumerate(d.mlp)
    ]
    return heads, kv_heads, width


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Name, dtype, shape and the bytes (made when asked for) of every tensor of the file, in order."""
    d = checkpoint.decoder

    def stored(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]:
        dtype = "F32" if len(tensor.shape) == 1 or tensor.dtype == "F64" else tensor.dtype
        heads = {"attn_q": d.num_heads, "attn_k": d.num_kv_heads}.get(name.split(".")[-2], 0)

        def make() -> np.ndarray:
            import torch

            data = load_tensor(tensor, checkpoint.seen)
            if dtype == "F32":
                data = data.float()
            if heads:  # transformers rotates halves of a head, llama.cpp neighbours
                data = data.view(heads, 2, d.head_dim // 2, -1).transpose(1, 2)
            return data.contiguous().view(torch.uint8).numpy()

        return name, dtype, tensor.shape, make

    def constant(name: str, value: float, *shape: int) -> tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]:
        dtype = "F32" if len(shape) == 1 else "F16"
        return name, dtype, shape, lambda: np.full(shape, value, np.float32 if len(shape) == 1 else np.float16)

    for name, tensor in checkpoint.tensors.items():
        stem = name.removesuffix(".weight")
        if stem in _TOP:
            yield stored(f"{_TOP[stem]}.weight", tensor)
        else:
            _, _, layer, part = stem.split(".", 3)
            yield stored(f"blk.{layer}.{_NAMES[part]}.weight", tensor)
    heads, kv_heads, widths = _widths(d)
    for i, (kept, width) in enumerate(zip(d.mlp, widths, strict=True)):
        if heads[i] and not kv_heads[i]:
            yield constant(f"blk.{i}.attn_norm.weight", 1, d.hidden_size)
            yield constant(f"blk.{i}.attn_output.weight", 0, d.hidden_size, d.hidden_size)
        if width and not kept:
            yield constant(f"blk.{i}.ffn_norm.weight", 1, d.hidden_size)
            for part in ("ffn_gate", "ffn_up"):
                yield constant(f"blk.{i}.{part}.weight", 0, width, d.hidden_size)
            yield constant(f"blk.{i}.ffn_down.weight", 0, d.hidden_size, width)


def _describe(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    d, config = checkpoint.decoder, checkpoint.config
    rope = rope_fields(config, checkpoint.path / CONFIG)["rope_parameters"]
    heads, kv_heads, widths = _widths(d)
    writer.add_name(checkpoint.name)
    writer.add_block_count(d.num_layers)
    writer.add_context_length(d.context)
    writer.add_embedding_length(d.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(widths)
    writer.add_key_length(d.head_dim)
    writer.add_value_length(d.head_dim)
    writer.add_layer_norm_rms_eps(d.epsilon)
    writer.add_vocab_size(d.vocab_size)
    writer.add_file_type({"F16": 1, "BF16": 32}.get(checkpoint.dtypes[0], 0))
    writer.add_rope_dimension_count(d.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_string("deci.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] != "default":
        raise PruneAttnError(f"{checkpoint.path}: rope scaling {rope['rope_type']!r} has no GGUF here yet")


def _vocabulary(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """The SentencePiece vocabulary with its scores; tokens that the tokenizer adds take their places."""
    from sentencepiece import SentencePieceProcessor

    path, size = checkpoint.path / "tokenizer.model", checkpoint.decoder.vocab_size
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise PruneAttnError(
            f"{path}: is no SentencePiece model; a GGUF is written for Llama-2's tokenizer only"
        ) from None
    tokens, scores, types = [f"[PAD{i}]" for i in range(size)], [-10000.0] * size, [_UNUSED] * size
    for i in range(min(size, pieces.vocab_size())):
        tokens[i], scores[i] = pieces.id_to_piece(i), pieces.get_score(i)
        control, byte, unknown = pieces.is_control(i), pieces.is_byte(i), pieces.is_unknown(i)
        types[i] = _CONTROL if control else _BYTE if byte else _UNKNOWN if unknown else _NORMAL
    settings = _json(checkpoint.path / "tokenizer_config.json")
    added = {token["id"]: token for token in _json(checkpoint.path / "tokenizer.json").get("added_tokens", [])}
    added |= {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    for i, token in added.items():
        if i < size and types[i] in (_UNUSED, _NORMAL):
            tokens[i], scores[i] = token["content"], -1000.0
            types[i] = _CONTROL if token.get("special") else _USER_DEFINED
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(pieces.unk_id())
    generation = read_generation(checkpoint)
    if generation.bos is not None:
        writer.add_bos_token_id(generation.bos)
    if generation.eos:
        writer.add_eos_token_id(generation.eos[0])
    writer.add_add_bos_token(bool(settings.get("add_bos_token", True)))
    writer.add_add_eos_token(bool(settings.get("add_eos_token", False)))
    if (prefix := settings.get("add_prefix_space")) is not None:
        writer.add_add_space_prefix(bool(prefix))
    template = checkpoint.path / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(read_bounded(template, _MOST_TEMPLATE).decode("utf-8", "replace"))
    elif isinstance(settings.get("chat_template"), str):
        writer.add_chat_template(settings["chat_template"])


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, PruneAttnError):
        return {}
