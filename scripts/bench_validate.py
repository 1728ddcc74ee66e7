"""``prune-attn validate --only same-function,latency`` on shapes of random fp16 weights, 33% of the attention dropped.

    scripts/bench_validate [--shapes 7b,13b] [--output DIR] [--work DIR] [--device auto] [--batch 1,8] ...

Speed does not depend on what the weights are. A report a shape in OUTPUT/SHAPE, written when the shape is done. Needs
twice the checkpoint on disk (13B: 48 GB), and both models and one KV cache each in GPU memory (13B at batch 8: about
95 GB; with less, smaller batches are timed and the report says so).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="7b,13b", help="of scripts/synthetic.py")
    parser.add_argument("--output", type=Path, default=Path("out/bench_validate"))
    parser.add_argument("--work", type=Path, default=Path("out/bench_validate-work"), help="where the models are made")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", default="512,2048,4000")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=6, help="a case; 3 repeats at least")
    parser.add_argument("--only", default="latency", help="same-function,latency to prove first that it is the same")
    parser.add_argument("--compiled", action="store_true", help="transformers compiled too: minutes more")
    arguments = parser.parse_args()
    import synthetic

    from export.convert import convert

    work = arguments.work / str(os.getpid())
    work.mkdir(parents=True)
    try:
        for shape in arguments.shapes.split(","):
            source, pruned = work / f"{shape}-original", work / f"{shape}-pruned"
            say(f"{shape}: making the model")
            synthetic.make(source, shape, laid_out=True)
            say(f"{shape}: pruning")
            convert(source, pruned, synthetic.THIRD.get(shape, "33%"))
            options = {
                "output": arguments.output / shape, "device": arguments.device, "batch": arguments.batch,
                "prompt": arguments.prompt, "new-tokens": arguments.new_tokens, "repeats": arguments.repeats,
                "seconds": arguments.seconds, "only": arguments.only, "work": work, "backend": "torch,onnx",
            }  # fmt: skip
            command = [sys.executable, "-m", "export.cli", "validate", str(source), str(pruned)]
            command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
            command.append("--compiled" if arguments.compiled else "--no-compiled")
            say(" ".join(command[1:]))
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path})
            say(f"{shape}: done, exit code {done.returncode}")
            for directory in (source, pruned):
                shutil.rmtree(directory)
            if done.returncode:
                sys.exit(done.returncode)
            print(json.dumps(json.loads((arguments.output / shape / "results.json").read_text())["notes"]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
