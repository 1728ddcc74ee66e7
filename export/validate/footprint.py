"""Load time and peak memory of one model, in a process of its own: what another model took would count otherwise."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from export.onnx.session import OnnxSession
from pruner.evaluate.compiled import CompiledLanguageModel
from pruner.evaluate.latency import gpu_bytes, out_of_memory
from pruner.machine import computing, threads
from pruner.model import LanguageModel, TorchLanguageModel

_STEPS = 4


def open_model(backend: str, directory: str | os.PathLike[str], device: str, dtype: str | None, context: int) -> Any:
    """A ``LanguageModel`` of one of the backends: torch, torch-compiled, onnx (whose dtype is the directory's)."""
    if backend == "onnx":
        return OnnxSession(directory, device=device, max_length=context)
    if backend == "torch-compiled":
        return CompiledLanguageModel(directory, device=device, dtype=dtype, context=context)
    return TorchLanguageModel(directory, device=device, dtype=dtype)


def footprint(
    backend: str,
    directory: str | os.PathLike[str],
    device: str,
    dtype: str | None,
    batch: int,
    prompt: int,
    context: int,
) -> dict[str, Any]:
    """``load_s``, and the peak of host RSS and GPU bytes over loading, one prefill and a few decode steps.

    Where memory is too short for the batch, a smaller one is taken; ``batch`` says which.
    """
    import pruner

    arguments = [threads(), backend, os.fspath(directory), device, dtype, batch, prompt, context]
    path = os.pathsep.join(filter(None, [str(Path(pruner.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "export.validate.footprint", json.dumps(arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {
            "failed": (lines[-1] if lines else f"killed by signal {-done.returncode}, perhaps for its memory")[:300]
        }
    return json.loads(done.stdout.splitlines()[-1])


def _measure(
    backend: str, directory: str, device: str, dtype: str | None, batch: int, prompt: int, context: int
) -> dict[str, Any]:
    if device == "cuda":
        import torch

        torch.cuda.init()
    gpu, rss, start = gpu_bytes() if device == "cuda" else 0, _peak_rss(), time.perf_counter()
    model = open_model("torch" if backend == "torch-compiled" else backend, directory, device, dtype, context)
    out: dict[str, Any] = {"load_s": round(time.perf_counter() - start, 3)}
    while True:
        try:
            _run(model, batch, prompt, min(_STEPS, context - prompt))
            break
        except Exception as error:
            if batch == 1 or not out_of_memory(error):
                raise
            batch //= 2
    return out | {
        "batch": batch,
        "prompt": prompt,
        "peak_rss_bytes": _peak_rss(),
        "rss_bytes_before": rss,
        "peak_gpu_bytes": gpu_bytes() - gpu if device == "cuda" else None,  # neither runtime gives memory back
    }


def _run(model: LanguageModel, batch: int, prompt: int, steps: int) -> None:
    model.reset()
    logits = model.prefill([[3 + i % (model.vocab_size - 3) for i in range(prompt)]] * batch)
    for _ in range(steps):
        logits = model.decode(logits.argmax(axis=-1).tolist())


def _peak_rss() -> int:
    """Bytes. Not ``ru_maxrss`` on Linux, which a child process inherits from its parent."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    wanted, *arguments = json.loads(sys.argv[1])
    with computing(wanted, torch=arguments[0] != "onnx"):
        print(json.dumps(_measure(*arguments)))
