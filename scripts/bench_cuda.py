"""Speed and correctness on a CUDA GPU, in one run.

    scripts/bench_cuda [--shapes 7b,13b] [--prompts 512,2048,4000] [--processes N] [--without A,B]
                       [--work DIR] [--output DIR] [--keep]
    python scripts/bench_cuda.py --guard [--work DIR]      # bench_guard.py; no setup and no transformers are needed

Speed, on a checkpoint of random fp16 weights (it does not depend on what they are): load, prefill, decode a token with
and without a CUDA graph, GPU memory, for the original and for the deepest third of its attention removed, beside the
onnxruntime-genai model builder's graph of the original and transformers. The floor of a decode step is the bytes that
it must read (every weight but the embedding table, and the KV cache) over the copy bandwidth measured in this run.
Correctness, on the shipped trained model in fp16 and bf16: logits against PyTorch in fp32 on the CPU.
Every process has the GPU to itself, and ONNX Runtime's rows have several (the original's in turn), since the same one
differs from process to process: by 3% with a CUDA graph, by a tenth without. Needs 2.1 times the checkpoint on disk
(13B: 55 GB).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
SHIPPED = ROOT / "tests/data/gutenberg-llama-5m"

from bench_guard import CONTEXT, bench_guard, guard_markdown, run_guard, run_guard_works  # noqa: E402

from prune_attn import WriteOptions  # noqa: E402

# -- one measurement, in a process of its own --------------------------------------------------------------------------


def spread(times: list[float]) -> dict[str, float]:
    import numpy as np

    low, middle, high = np.percentile(times, (10, 50, 90)) * 1e3
    return {"ms": round(float(middle), 3), "p10": round(float(low), 3), "p90": round(float(high), 3), "n": len(times)}


def measure(open_model: Callable[[], Any], prompts: list[int], rounds: int = 4, steps: int = 12) -> dict[str, Any]:
    """Load, prefill and decode of a ``LanguageModel``, with the KV history that the prefill left.

    Prefill and decode steps take turns: for the host, launching one and the same CUDA graph takes 30 us or 160, and
    stays so from one prefill to the next.
    """
    import numpy as np
    import torch

    from pruner.evaluate.latency import gpu_bytes

    torch.cuda.init()
    before, start = gpu_bytes(), time.perf_counter()
    model = open_model()
    out: dict[str, Any] = {"load_s": round(time.perf_counter() - start, 2), "prefill": {}, "decode": {}}
    tokens = np.random.default_rng(0).integers(3, model.vocab_size, max(prompts)).tolist()
    for prompt in prompts:
        prefill, decode = [], []
        for _ in range(rounds + 1):
            model.reset()
            start = time.perf_counter()
            model.prefill([tokens[:prompt]])
            prefill.append(time.perf_counter() - start)
            for token in tokens[: steps + 4]:
                start = time.perf_counter()
                model.decode([token])
                decode.append(time.perf_counter() - start)
        out["prefill"][prompt] = spread(prefill[1:])  # the first round captures and warms up
        counted = np.reshape(decode, (rounds + 1, -1))[1:, 4:]
        out["decode"][prompt] = spread(counted.ravel().tolist())
        if getattr(model, "cuda_graph", False):
            out.setdefault("queued_ms", {})[prompt] = queued(model)
    out["gpu_bytes"] = gpu_bytes() - before
    return out


def queued(model: Any, steps: int = 40) -> float:
    """Milliseconds of a decode step, the GPU's part: an ``OnnxSession``'s, many in a row, the last of them awaited."""
    start = time.perf_counter()
    for step in range(steps):
        model.run_step(wait=step == steps - 1)
    return round((time.perf_counter() - start) / steps * 1e3, 3)


def run_ours(directory: str, prompts: list[int], cuda_graph: bool) -> dict[str, Any]:
    from export.onnx.session import OnnxSession

    return measure(lambda: OnnxSession(directory, device="cuda", cuda_graph=cuda_graph), prompts)


def run_lengths(directory: str) -> dict[str, Any]:
    """Prefill of 12 prompt lengths that were not met before (601 to 645 tokens), as they are and padded as we do."""
    import numpy as np

    from export.onnx.session import OnnxSession

    out = {}
    for name, bucket in (("as they are", 1), ("padded", None)):
        model = OnnxSession(directory, device="cuda")
        model.bucket = bucket or model.bucket
        tokens = np.random.default_rng(0).integers(3, model.vocab_size, 700).tolist()
        model.prefill([tokens])  # not the first run
        times = []
        for length in range(601, 649, 4):
            start = time.perf_counter()
            model.prefill([tokens[:length]])
            times.append(time.perf_counter() - start)
        out[name] = spread(times)
        del model
    return out


def run_builder(
    directory: str, like: str, prompts: list[int], cuda_graph: bool, defaults: bool = False
) -> dict[str, Any]:
    """The builder's graph in our session: the same runtime, binding and buffers; only the graph differs.

    ``defaults``: without what our session sets. The graph gets the one node that ours ends with, which makes
    the logits float32, so that the host need not.
    """
    import onnx

    from export.onnx.runtime import check_cuda, open_on_cuda
    from export.onnx.session import OnnxSession
    from pruner.checkpoint import open_checkpoint

    path = Path(directory, "model.onnx")
    model = onnx.load(path, load_external_data=False)
    if model.graph.output[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        for node in model.graph.node:
            node.output[:] = ["logits.half" if name == "logits" else name for name in node.output]
        model.graph.node.append(onnx.helper.make_node("Cast", ["logits.half"], ["logits"], to=onnx.TensorProto.FLOAT))
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        onnx.save(model, path)

    decoder = open_checkpoint(like).decoder

    def opened() -> OnnxSession:
        runtime = open_on_cuda(path, decoder, check_cuda(), cuda_graph=cuda_graph, defaults=defaults)
        return OnnxSession.over(runtime, decoder, "float16", CONTEXT, device="cuda", cuda_graph=cuda_graph)

    return measure(opened, prompts)


def run_torch(directory: str, prompts: list[int], compiled: bool) -> dict[str, Any]:
    """transformers with sdpa: its growing cache, or a static one with the decode step compiled (CUDA graphs)."""
    from pruner.evaluate.compiled import CompiledLanguageModel
    from pruner.model import TorchLanguageModel

    if compiled:
        return measure(lambda: CompiledLanguageModel(directory, device="cuda", context=CONTEXT), prompts)
    return measure(lambda: TorchLanguageModel(directory, device="cuda"), prompts)


def run_bandwidth() -> dict[str, Any]:
    import torch

    from pruner.evaluate.latency import copy_bandwidth

    return {"bytes_per_s": copy_bandwidth(), "device": torch.cuda.get_device_name(0)}


def run_correct(dtype: str, directory: str) -> dict[str, Any]:
    """The pruned shipped model on the GPU against the original in fp32 on the CPU with the sublayers switched off.

    The source is fp16, so bfloat16's errors hold the rounding of the weights too.
    """
    import numpy as np

    from export.convert import convert
    from export.onnx.session import OnnxSession
    from pruner.model import TorchLanguageModel
    from pruner.text import load_tokenizer

    result = convert(SHIPPED, directory, "33%", options=WriteOptions(dtype=dtype))
    tokens = load_tokenizer(SHIPPED)((ROOT / "README.md").read_text(), verbose=False)["input_ids"]
    windows = np.array(tokens[:2048]).reshape(8, 256)
    truth, ours = TorchLanguageModel(SHIPPED, dtype="float32"), OnnxSession(directory, device="cuda")
    truth.switch_off(result.plan.attention)
    rows: dict[str, Any] = {}

    def compare(name: str, got: list[np.ndarray], want: list[np.ndarray]) -> None:
        a, b = np.concatenate(got), np.concatenate(want)
        rows[name] = {
            "relative_error": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
            "agreement": float((a.argmax(-1) == b.argmax(-1)).mean()),
        }

    compare("2,048 tokens", [ours.logits(windows)], [truth.logits(windows)])
    unequal = [tokens[:200], tokens[300:317], tokens[400:403]]
    for name, prompts in (("3 unequal prompts", unequal), ("1 prompt", unequal[:1])):
        got, want = [ours.prefill(prompts)], [truth.prefill(prompts)]
        for _ in range(64):
            following = want[-1].argmax(-1).tolist()
            got.append(ours.decode(following))
            want.append(truth.decode(following))
        compare(f"prefill of {name}, 64 decode steps", got, want)
    got, want = [ours.prefill([tokens[:30]])], [truth.prefill([tokens[:30]])]
    for part in (tokens[30:31], tokens[31:200]):
        got.append(ours.extend([part]))
        want.append(truth.extend([part]))
    compare("prefill in 3 parts", got, want)
    return rows


def run_genai(dtype: str, directory: str) -> dict[str, Any]:
    """Greedy tokens of onnxruntime-genai on the GPU beside those of transformers in fp32 on the CPU, same directory."""
    import onnxruntime

    onnxruntime.preload_dlls()  # genai looks for the same CUDA libraries
    import onnxruntime_genai as genai
    import torch
    from compat_engines.genai import greedy
    from transformers import AutoModelForCausalLM

    from export.convert import convert

    convert(SHIPPED, directory, "33%", options=WriteOptions(dtype=dtype))
    config = genai.Config(directory)
    config.clear_providers()
    config.append_provider("cuda")
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    ids = [int(i) for i in tokenizer.encode("It was a dark and stormy night, and the")]
    got = greedy(model, ids, 64)
    reference = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    want = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=2)[0, len(ids) :]
    same = [a == b for a, b in zip(got, want.tolist(), strict=False)]
    return {"device": model.device_type, "tokens": len(want), "same": [*same, False].index(False)}


JOBS = {
    "guard": run_guard,
    "guard_works": run_guard_works,
    "ours": run_ours,
    "builder": run_builder,
    "torch": run_torch,
    "bandwidth": run_bandwidth,
    "correct": run_correct,
    "genai": run_genai,
    "lengths": run_lengths,
}


def job(name: str, **arguments: Any) -> dict[str, Any]:
    """Run one of JOBS in a new process; its result, or ``{"failed": why}``."""
    shown = ", ".join(
        f"{k} {Path(v).name if isinstance(v, str) else v}" for k, v in arguments.items() if k != "prompts"
    )
    print(f"{time.strftime('%H:%M:%S')} {name} {shown}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--job", name, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    gc.collect()
    if done.returncode:
        lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        print(f"  failed: {lines[-1]}", file=sys.stderr, flush=True)
        return {"failed": lines[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(times: int, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each row the process of the middle decode speed of several, with the range that they had.

    The rows take turns, since a GPU's speed drifts over minutes by as much as rows differ.
    """
    turns = [[job(name, **arguments) for name, arguments in rows] for _ in range(times)]
    return [middle(done) for done in zip(*turns, strict=True)]


def middle(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for result in done:
        if "failed" in result:
            return result

    def first(result: dict[str, Any]) -> float:
        return next(iter(result["decode"].values()))["ms"]

    done = sorted(done, key=first)
    return {**done[len(done) // 2], "processes": len(done), "range_ms": [first(done[0]), first(done[-1])]}


# -- the whole run -----------------------------------------------------------------------------------------------------


def build_with_genai(source: Path, output: Path, work: Path) -> None:
    """The onnxruntime-genai builder's fp16 CUDA graph, logits of the last token only as ours."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(output)]
    options = ["-p", "fp16", "-e", "cuda", "-c", str(work / "cache"), "--extra_options", "prune_lm_head=true"]
    done = subprocess.run(command + options, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the genai builder failed: {done.stderr.strip().splitlines()[-1]}")


def bench(
    shape: str, work: Path, results: dict[str, Any], without: set[str], keep: bool, save: Callable[[], None]
) -> None:
    """Add one shape's rows to ``results``, saved as they come since all of them take minutes."""
    import synthetic

    from export.convert import convert
    from export.deliver import export
    from pruner.checkpoint import open_checkpoint
    from pruner.summary import totals

    source, original, pruned, builder = (work / f"{shape}-{n}" for n in ("source", "original", "pruned", "builder"))
    prompts, times = results["prompts"], results["processes"]
    results["shapes"].append(run := {"shape": shape, "dropped": 0, "rows": [], "lengths": {"failed": "not run"}})

    def add(model: str, runner: str, measured: dict[str, Any], directory: Path) -> None:
        checkpoint = open_checkpoint(directory)
        sizes = totals(checkpoint.decoder, checkpoint.tensors)
        weights = sizes["bytes"] - checkpoint.tensors["model.embed_tokens.weight"].nbytes
        floors = {
            str(p): 1e3 * (weights + p * sizes["kv_cache_bytes_per_token"]) / results["bandwidth"] for p in prompts
        }  # fmt: skip
        run["rows"].append({"model": model, "runner": runner, "floor_ms": floors, **measured})
        save()

    graphs = (True,) if "eager" in without else (True, False)

    def add_in_turn(model: str, directory: Path, others: dict[str, tuple[str, dict[str, Any]]]) -> None:
        arguments = {"directory": str(directory), "prompts": prompts}
        rows = {
            "ours" + ", CUDA graph" * graph: ("ours", {**arguments, "cuda_graph": graph}) for graph in graphs
        } | others
        for runner, measured in zip(rows, in_turn(times, list(rows.values())), strict=True):
            add(model, runner, measured, directory)

    synthetic.make(source, shape)
    for file in SHIPPED.glob("tokenizer*"):
        shutil.copy(file, source)  # the builder wants one
    export(source, original, last_token_logits=True)
    shutil.rmtree(source)
    rows = {}
    if "builder" not in without:
        build_with_genai(original, builder, work)
        arguments = {"directory": str(builder), "like": str(original), "prompts": prompts}
        for defaults in (True, False):
            for graph in () if defaults and "defaults" in without else graphs:
                name = "genai builder" + ", CUDA graph" * graph + ", ONNX Runtime's defaults" * defaults
                rows[name] = ("builder", {**arguments, "cuda_graph": graph, "defaults": defaults})
    add_in_turn("original", original, rows)
    shutil.rmtree(builder, ignore_errors=True)
    if "pruned" not in without:
        run["dropped"] = len(convert(original, pruned, synthetic.THIRD.get(shape, "33%")).plan.attention)
        export(pruned, last_token_logits=True)
        add_in_turn(f"{run['dropped']} dropped", pruned, {})
    if "lengths" not in without:
        run["lengths"] = job("lengths", directory=str(original))
    for compiled in (False, True) if "torch" not in without else ():
        measured = job("torch", directory=str(original), prompts=prompts, compiled=compiled)
        add("original", "transformers" + ", compiled" * compiled, measured, original)
    for directory in () if keep else (original, pruned):
        shutil.rmtree(directory, ignore_errors=True)


def markdown(results: dict[str, Any]) -> str:
    prompts = results["prompts"]
    lines = [
        f"{results['device']}, copy bandwidth {results['bandwidth'] / 1e12:.2f} TB/s, {results['date']}; "
        + ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    ]
    for run in results["shapes"]:
        lines += ["", f"### {run['shape'].upper()} shape, fp16, batch 1", ""]
        head = [f"prefill {p}" for p in prompts] + [f"decode at {p}" for p in prompts]
        lines += ["| | | load s | GPU GB | " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) + 2)]
        for row in run["rows"]:
            if "failed" in row:
                lines.append(f"| {row['model']} | {row['runner']} | failed: {row['failed']} |" + " |" * (len(head) + 1))
                continue
            prefill = [f"{row['prefill'][str(p)]['ms']:.1f}" for p in prompts]
            decode = [
                f"{row['decode'][str(p)]['ms']:.2f} ({row['decode'][str(p)]['ms'] / row['floor_ms'][str(p)]:.2f})"
                for p in prompts
            ]
            runner = row["runner"]
            if row.get("processes", 1) > 1:
                low, high = row["range_ms"]
                runner += f" ({row['processes']} processes, {low:.2f} to {high:.2f} at {prompts[0]})"
            if "queued_ms" in row:
                runner += f"; queued {row['queued_ms'][str(prompts[0])]:.2f}"
            cells = [row["model"], runner, f"{row['load_s']:.1f}", f"{row['gpu_bytes'] / 1e9:.1f}"]
            lines.append("| " + " | ".join(cells + prefill + decode) + " |")
        if "failed" not in run["lengths"]:
            said = ", ".join(f"{name} {row['ms']:.1f} ms" for name, row in run["lengths"].items())
            lines += ["", f"Prefill of a prompt length not met before (601 to 645 tokens), original, ours: {said}."]
    if results["shapes"]:
        said = "Milliseconds, medians; in brackets the decode step over its floor; queued: the GPU's part of it."
        lines += ["", said]
    if results["correct"]:
        lines += ["", "### Correctness on the GPU, shipped model, attention of the deepest third removed", ""]
        lines += ["| dtype | | relative error | same most likely token |", "|---|---|---:|---:|"]
        for dtype, rows in results["correct"].items():
            for name, row in rows.items() if "failed" not in rows else ():
                lines.append(f"| {dtype} | {name} | {row['relative_error']:.1e} | {row['agreement']:.2%} |")
    for dtype, row in results["genai"].items():
        if "failed" not in row:
            same = f"the first {row['same']} of {row['tokens']} greedy tokens are those of transformers in fp32"
            lines += ["", f"onnxruntime-genai on {row['device']}, {dtype}: {same}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(JOBS[sys.argv[2]](**json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="7b,13b", help="of scripts/synthetic.py; empty: correctness only")
    parser.add_argument("--prompts", default="512,2048,4000")
    parser.add_argument("--processes", type=int, default=3, help="of each row of ONNX Runtime; the middle one is shown")
    parser.add_argument("--without", default="", help="builder, defaults, eager, pruned, lengths, torch, correct")
    parser.add_argument("--guard", action="store_true", help="only what the NaN guard costs and whether it works")
    parser.add_argument("--work", type=Path, default=Path("out/bench_cuda"), help="where the checkpoints are made")
    parser.add_argument("--keep", action="store_true", help="leave the original and the pruned directory in --work")
    parser.add_argument("--output", type=Path, help="write results.json and results.md here")
    arguments = parser.parse_args()
    without = set(filter(None, arguments.without.split(",")))
    prompts = [int(p) for p in arguments.prompts.split(",")]
    work = arguments.work if arguments.keep else arguments.work / str(os.getpid())
    work.mkdir(parents=True)
    try:
        bandwidth = job("bandwidth")
        if "failed" in bandwidth:
            sys.exit("this needs a CUDA GPU and a PyTorch that sees it: " + bandwidth["failed"])
        if arguments.guard:
            print(guard_markdown(bench_guard("7b", work, min(arguments.processes, 2), job, bandwidth["device"])))
            return
        from export.validate.facts import package_version

        packages = ("onnxruntime-gpu", "onnxruntime-genai-cuda", "torch", "transformers")
        results: dict[str, Any] = {
            "date": date.today().isoformat(), "device": bandwidth["device"], "bandwidth": bandwidth["bytes_per_s"],
            "versions": {p: package_version(p) or "absent" for p in packages}, "prompts": prompts,
            "processes": arguments.processes, "correct": {}, "genai": {}, "shapes": [],
        }  # fmt: skip

        def save() -> None:
            if arguments.output:
                arguments.output.mkdir(parents=True, exist_ok=True)
                (arguments.output / "results.json").write_text(json.dumps(results, indent=1))
                (arguments.output / "results.md").write_text(markdown(results))

        if "correct" not in without:
            for dtype in ("float16", "bfloat16"):
                results["correct"][dtype] = job("correct", dtype=dtype, directory=str(work / dtype))
                results["genai"][dtype] = job("genai", dtype=dtype, directory=str(work / f"{dtype}-genai"))
        for shape in filter(None, arguments.shapes.split(",")):
            bench(shape, work, results, without, arguments.keep, save)
        save()
        print(markdown(results))
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
