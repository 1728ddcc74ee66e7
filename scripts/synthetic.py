"""Make a synthetic checkpoint of a Llama shape: random fp16 weights (std 0.02), several shards, as a Hub repository.

Speed does not depend on what the weights are. Used by the benchmarks; ``python scripts/synthetic.py 2gb DIR`` by hand.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from pruner.checkpoint.config import read_decoder

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads
    "small": (1024, 2816, 12, 16, 16),
    "500mb": (1024, 2816, 16, 16, 16),
    "2gb": (2048, 5632, 20, 16, 16),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
THIRD = {"7b": 10, "13b": 13}  # the paper's 33% of the attentions, as whole numbers


def make(
    directory: Path,
    shape: str,
    shard_bytes: int = 5_000_000_000,
    laid_out: bool = False,
    sparse: bool = False,
    dtype: str = "float16",
) -> int:
    """Write the checkpoint into a new directory; returns the bytes of weights.

    ``laid_out``: in the order that a graph over the files wants, so that nobody has to copy it for that. ``sparse``:
    zeros that take no room on the disk. ``dtype``: float16 or bfloat16.
    """
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    names = read_decoder(config, directory / "config.json").tensors()
    # else alphabetically, as the safetensors library writes
    for name in names if laid_out else sorted(names):
        nbytes = 2 * int(np.prod(names[name]))
        if used and used + nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = names[name]
        used += nbytes
    # one block of noise, written again and again: normal numbers are slow to make, and no reader can tell
    normal = np.random.default_rng(0).standard_normal(8 << 20, dtype=np.float32) * np.float32(0.02)
    half = normal.astype(np.float16) if dtype == "float16" else (normal.view(np.uint32) >> 16).astype(np.uint16)
    noise = half.tobytes()
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, dims in shard.items():
            nbytes = 2 * int(np.prod(dims))
            header[name] = {
                "dtype": "F16" if dtype == "float16" else "BF16",
                "shape": list(dims),
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                out.truncate(out.tell() + offset)
                out.seek(0, os.SEEK_END)
                offset = 0
            while offset:
                offset -= out.write(noise[: min(offset, len(noise))])
            total += out.tell()
            os.fsync(out.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


if __name__ == "__main__":
    print(f"{make(Path(sys.argv[2]), sys.argv[1]):,} bytes")
