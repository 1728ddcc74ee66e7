"""Export a synthetic Llama to ONNX: ours beside the onnxruntime-genai model builder, each in a process of its own.

    scripts/bench_export [--shape SHAPE] [--json] [--ours-only]     # SHAPE: of scripts/synthetic.py

Time is the whole process with its imports, memory the peak resident set of that process, bytes what was written.
Weights are zeros in a sparse file: neither way's cost depends on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import SHAPES, make

ROOT = Path(__file__).parents[1]


def measured(command: list[str], written: Path, before: set[str]) -> dict[str, float]:
    wrapper = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=2).returncode;"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", wrapper, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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
        theirs.mkdir()
        make(source, arguments.shape, shard_bytes=1 << 60, laid_out=True, sparse=True)
        record = {"format": "prune-attn plan", "files": {}, "source": {}, "attention": [], "mlp": []}
        (source / "pruning_plan.json").write_text(json.dumps(record))  # so that export takes it as its own, in place
        for file in (ROOT / "tests/data/gutenberg-llama-5m").glob("tokenizer*"):
            shutil.copy(file, source)  # the builder wants one
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
