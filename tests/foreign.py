"""Checkpoints as others write them, made from a Hugging Face one: PyTorch's files, and Meta's distribution."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def write_bin(source: Path, output: Path, *, shards: int = 1, legacy: bool = False) -> Path:
    """``pytorch_model.bin``, or shards with an index; with the buffers that old conversions stored."""
    shutil.copytree(source, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = tensors(source)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    names = list(state)
    files = ["pytorch_model.bin"]
    if shards > 1:
        files = [f"pytorch_model-{i:05d}-of-{shards:05d}.bin" for i in range(1, shards + 1)]
        index = {"metadata": {}, "weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
        (output / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for i, file in enumerate(files):
        part = {name: state[name] for name in names[i::shards]}
        torch.save(part, output / file, _use_new_zipfile_serialization=not legacy)
    return output


def write_meta(source: Path, output: Path, parts: int = 1, **params: object) -> Path:
    """``consolidated.NN.pth``, ``params.json`` and ``tokenizer.model``; whatever else is in ``source`` stays there."""
    output.mkdir()
    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    fields = {
        "dim": config["hidden_size"], "n_heads": heads, "n_kv_heads": kv_heads, "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"], "multiple_of": config["intermediate_size"], "vocab_size": -1,
    } | params  # fmt: skip
    (output / "params.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    if (source / "tokenizer.model").exists():
        shutil.copy(source / "tokenizer.model", output)

    def rotate(w: torch.Tensor, n: int) -> torch.Tensor:  # (halves, pairs) of a head's rows to (pairs, halves)
        rows, columns = w.shape
        return w.view(n, 2, rows // n // 2, columns).transpose(1, 2).reshape(rows, columns)

    theirs = {
        "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
        "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
        "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
        "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None), "model.embed_tokens": ("tok_embeddings", 1),
        "model.norm": ("norm", None), "lm_head": ("output", 0),
    }  # fmt: skip
    states: list[dict[str, torch.Tensor]] = [{"rope.freqs": torch.ones(4)} for _ in range(parts)]
    for name, tensor in tensors(source).items():
        ours = name.removesuffix(".weight")
        layer = ""
        if ours.startswith("model.layers."):
            number, ours = ours.removeprefix("model.layers.").split(".", 1)
            layer = f"layers.{number}."
        meta, axis = theirs[ours]
        if meta in ("attention.wq", "attention.wk"):
            tensor = rotate(tensor, heads if meta == "attention.wq" else kv_heads)
        for i, state in enumerate(states):
            state[f"{layer}{meta}.weight"] = tensor if axis is None else tensor.chunk(parts, axis)[i].clone()
    for i, state in enumerate(states):
        torch.save(state, output / f"consolidated.{i:02d}.pth")
    return output
