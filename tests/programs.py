"""Programs that tests run in processes of their own: ``conftest.run_program`` calls ``python programs.py NAME ...``.

Each imports what it needs itself, so that what it does not need can be looked for afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def _peak_megabytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024


def _without(*modules: str) -> None:
    assert not set(modules) & sys.modules.keys()


def heavy_imports(module: str) -> None:
    __import__(module)
    print([name for name in ("torch", "transformers", "onnx", "numpy", "rich") if name in sys.modules])


def convert_lightly(source: str, output: str) -> None:
    from prune_attn import convert

    convert(source, output, drop=4)
    _without("torch", "transformers")


def generate_lightly(directory: str) -> None:
    from export.generate import generate

    print(generate(directory, "It was", device="cpu").text)
    _without("torch", "transformers")


def convert_and_verify(source: str, output: str, dtype: str) -> None:
    """Prints the peak of memory in MB, and whether torch was needed; ``dtype`` "" keeps the source's."""
    from prune_attn import WriteOptions, convert, verify

    convert(source, output, 3, options=WriteOptions(dtype=dtype or None))
    assert verify(output, source).ok
    print(_peak_megabytes(), "torch" in sys.modules)


def convert_without_graph(source: str, output: str) -> None:
    """Within 30 s of CPU time and without torch; prints the peak of memory in MB."""
    import resource

    from prune_attn import WriteOptions, convert

    resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
    convert(source, output, 1, options=WriteOptions(graph=None))
    _without("torch")
    print(_peak_megabytes())


def export_four_times(directory: str) -> None:
    from prune_attn import export

    for _ in range(4):
        export(directory)


def export_killed(directory: str, replaced: str) -> None:
    """Export in place, killed when one more file than ``replaced`` is about to be."""
    from prune_attn import export

    replace, left = os.replace, int(replaced)

    def kill(*paths: str) -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        replace(*paths)

    os.replace = kill
    export(directory, context=256)


def choose_killed(source: str, text: str, partial: str) -> None:
    """A search for 4 attentions, killed as soon as something is kept of 2."""
    from prune_attn import Calibration, open_checkpoint
    from pruner.progress import Step
    from pruner.select.choose import choose

    def progress(step: Step) -> None:
        if Path(partial).exists() and step.status.startswith("2 dropped"):
            os.kill(os.getpid(), signal.SIGKILL)

    calibration = Calibration(text, samples=10, length=32)
    choose(open_checkpoint(source), 4, calibration, partial=Path(partial), progress=progress)


def threads(cpus: str) -> None:
    """How many are taken, and given to torch, where only these CPUs (of a JSON list) may be used."""
    os.sched_setaffinity(0, json.loads(cpus))
    import torch

    from pruner.machine import computing

    with computing() as count:
        print(count, torch.get_num_threads())


def download(repo_id: str, options: str) -> None:
    """``options``: ``snapshot_download``'s, as JSON; prints where the files are."""
    import huggingface_hub

    print(huggingface_hub.snapshot_download(repo_id, **json.loads(options)))


def fetch(repo_id: str) -> None:
    """Prints the names of the files that a conversion would fetch."""
    from pruner.hub.source import fetch

    print(*(file.name for file in fetch(repo_id).iterdir()))


def convert_and_push(source: str, output: str, repo_id: str) -> None:
    from prune_attn import Revision, convert, push

    convert(source, output, 4, hub=Revision(cache_dir="cache"))
    print(push(output, repo_id).url)


def sessions_on_cuda(*directories: str) -> None:
    """Open each on CUDA, prefill, decode; prints the operators on the CPU and the logits' shapes, or what was said."""
    import onnxruntime

    from export.onnx.runtime import on_cpu
    from export.onnx.session import OnnxSession
    from pruner.errors import PruneAttnError

    onnxruntime.preload_dlls = lambda: None  # it would find the real ones, where they are installed
    out: dict[str, object] = {}
    for directory in directories:
        try:
            session, shapes = OnnxSession(directory, device="cuda"), []
            for rows in ([[5, 6, 7]], [[5], [6, 7, 8]], [[9]]):
                session.reset()
                shapes.append(session.prefill(rows).shape)
                shapes += [session.decode([3] * len(rows)).shape for _ in range(3)]  # the first ones capture
            out[directory] = [[name for name, _ in on_cpu(session.runtime)], shapes]
        except PruneAttnError as error:
            out[directory] = str(error)
    print(json.dumps(out))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
