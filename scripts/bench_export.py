"""Export a synthetic Llama to ONNX: ours beside the onnxruntime-genai model builder, each in a process of its own.

    scripts/bench_export [--shape small|7b] [--json] [--ours-only]

Time is the whole process with its imports, memory the peak resident set of that process, bytes what was written.
Weights are zeros in a sparse file: neither way's cost depends on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

SHAPES = {  # hidden, intermediate, layers, heads, vocabulary
    "small": (1024, 2816, 12, 16, 32000),
    "7b": (4096, 11008, 32, 32, 32000),
}


def synthetic(directory: Path, shape: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from pruner.llama import Decoder

    hidden, intermediate, layers, heads, vocab = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocab,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    record = {"format": "prune-attn plan", "files": {}, "source": {}, "attention": [], "mlp": []}
    (directory / "pruning_plan.json").write_text(json.dumps(record))  # so that export takes it as its own, in place
    for file in (Path(__file__).parents[1] / "tests/data/gutenberg-llama-5m").glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())  # the builder wants one
    header, offset = {}, 0
    for name, dims in Decoder.from_config(config, directory).tensors().items():
        end = offset + 2 * prod(dims)
        header[name] = {"dtype": "F16", "shape": dims, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    path = directory / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)


def measured(command: list[str], written: Path, before: set[str]) -> dict[str, float]:
    root = Path(__file__).parents[1]
    wrapper = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=2).returncode;"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", wrapper, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    new = sum(f.stat().st_size for f in written.rglob("*") if f.is_file() and f.name not in before)
    return {"seconds": round(seconds, 2), "peak_mb": round(int(done.stdout) / 1024), "bytes": new}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ours-only", action="store_true", help="leave the model builder out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, theirs = Path(temporary, "source"), Path(temporary, "builder")
        source.mkdir(), theirs.mkdir()
        synthetic(source, arguments.shape)
        before = {file.name for file in source.iterdir()}
        rows = {
            "prune-attn export": measured([sys.executable, "-m", "export.cli", "export", str(source)], source, before)
        }
        if not arguments.ours_only:
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(theirs)]
            options = ["-p", "fp16", "-e", "cuda", "-c", str(Path(temporary, "cache"))]
            rows["genai builder"] = measured([*builder, *options], theirs, set())
    if arguments.json:
        print(json.dumps({"shape": arguments.shape, "rows": rows}, indent=2))
        return
    for name, row in rows.items():
        print(f"{name:18} {row['seconds']:8.2f} s {row['peak_mb']:8,} MB {row['bytes']:16,} bytes written")


if __name__ == "__main__":
    main()
