"""What the NaN guard of ``model.onnx`` costs (``scripts/bench_cuda.py --guard``), and that it works on a GPU.

The same graph with the guard and with its nodes taken out, in turn, over one KV buffer. Opened anew in several
processes, since where weights lie makes a difference by itself. Needs numpy, onnx, onnxruntime-gpu, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTEXT = 4096


def without_guard(model: Any) -> Any:
    """The graph (changed in place) without the nodes that make NaN of rows padded on the left."""
    graph = model.graph
    (guard,) = (node for node in graph.node if node.name == "guard")
    for node in graph.node:
        node.input[:] = [guard.input[1] if name == "guard" else name for name in node.input]
    for names, kept in (
        ({"guard", "guard.begins", "mask.begin"}, graph.node),
        ({"guard.nan", "mask.first"}, graph.initializer),
    ):
        for entry in [entry for entry in kept if entry.name in names]:
            kept.remove(entry)
    return model


def write_both(directory: str, last_token_logits: bool) -> dict[str, Path]:
    """Two graphs over the shards in ``directory``."""
    import onnx

    from export.onnx import GraphOptions
    from export.onnx.graph import build_graph
    from pruner.checkpoint import open_checkpoint

    paths = {name: Path(directory, f"{name}.onnx") for name in ("guarded", "bare")}
    graph = build_graph(open_checkpoint(directory), None, GraphOptions(last_token_logits=last_token_logits))
    onnx.save(graph, paths["guarded"])
    onnx.save(without_guard(graph), paths["bare"])
    return paths


class Caller:
    """Graphs over the same weights, called with everything bound to buffers on the device."""

    def __init__(self, directory: str, last_token_logits: bool, cuda_graph: bool, device: str, first: str) -> None:
        import onnxruntime

        from export.onnx.runtime import open_runtime
        from pruner.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(directory)
        self.decoder, self.device, self.cuda_graph = checkpoint.decoder, device, cuda_graph
        paths, self.value = write_both(directory, last_token_logits), onnxruntime.OrtValue
        dtype = {"F16": "float16", "BF16": "bfloat16"}[checkpoint.dtypes[0]]
        self.runtimes = {
            name: open_runtime(paths[name], self.decoder, dtype, device, cuda_graph=cuda_graph)[0]
            for name in sorted(paths, key=lambda name: name != first)
        }
        self.element = {"float16": 10, "bfloat16": 16}[dtype]  # TensorProto's numbers
        self.time = 1 if last_token_logits else None
        self.graph_id = 0

    def cache(self, rows: int, tokens: int) -> list[Any]:
        import numpy as np

        d = self.decoder
        shape = [rows, d.num_kv_heads, tokens, d.head_dim]
        zeros = self.value.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), self.element)
        values = []
        for _ in range(2 * len(d.present("attention"))):
            values.append(self.value.ortvalue_from_shape_and_type(shape, self.element, self.device, 0))
            values[-1].update_inplace(zeros)
        return values

    def calls(self, ids: Any, mask: Any, cache: Sequence[Any], graph: bool = False) -> dict[str, Callable[[], Any]]:
        """For each graph a call with (B, T) ``ids`` and (B, width) ``mask``; it gives its logits' ``OrtValue``."""
        import numpy as np
        import onnxruntime

        self.graph_id += 1  # new buffers, a new capture
        options = onnxruntime.RunOptions()
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(self.graph_id if graph else -1))
        inputs = [self.value.ortvalue_from_numpy(array, self.device, 0) for array in (ids, mask)]
        shape = [len(ids), self.time or ids.shape[1], self.decoder.vocab_size]
        logits = self.value.ortvalue_from_shape_and_type(shape, np.float32, self.device, 0)

        def call(runtime: Any) -> Callable[[], Any]:
            binding = runtime.io_binding()
            for name, value in zip(("input_ids", "attention_mask"), inputs, strict=True):
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("logits", logits)
            for i, value in enumerate(cache):
                name = f"{i // 2}.{('key', 'value')[i % 2]}"
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                binding.bind_ortvalue_output(f"present.{name}", value)

            def run() -> Any:
                runtime.run_with_iobinding(binding, options)
                return logits

            return run

        return {name: call(runtime) for name, runtime in self.runtimes.items()}


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int, times: int) -> dict[str, Any]:
    """Milliseconds a call, and guarded over bare with its 95% interval; ``times`` calls in a row, in changing order."""
    import numpy as np

    from pruner.evaluate.bootstrap import median_ratio

    ms: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            for _ in range(times):
                calls[name]()
            ms[name].append(1e3 * (time.perf_counter() - start) / times)
    kept = {name: values[3:] for name, values in ms.items()}  # the first ones capture and warm up
    medians = {name: round(float(np.median(values)), 4) for name, values in kept.items()}
    return medians | {"ratio": median_ratio([(kept["guarded"], kept["bare"])])}


def run_guard(
    directory: str,
    last_token_logits: bool,
    cuda_graph: bool,
    first: str,
    prompts: Sequence[int] = (512, 2048),
    rows: Sequence[int] = (1, 4),
    rounds: int = 30,
    device: str = "cuda",
) -> dict[str, Any]:
    """Prefill of one prompt and decode steps of some rows after 512 tokens. ``first``: the graph to open first."""
    import numpy as np

    caller = Caller(directory, last_token_logits, cuda_graph, device, first)
    rng, out = np.random.default_rng(0), {}
    for batch in rows:
        cache = caller.cache(batch, CONTEXT)
        for prompt in prompts if batch == 1 and not cuda_graph else ():  # no prefill is captured
            ids = rng.integers(3, caller.decoder.vocab_size, (1, prompt))
            out[f"prefill of {prompt}"] = in_turn(caller.calls(ids, np.ones_like(ids), cache), rounds, 1)
        mask = np.tile(np.arange(CONTEXT) < 513, (batch, 1)).astype(np.int64)
        ids = rng.integers(3, caller.decoder.vocab_size, (batch, 1))
        out[f"decode, {batch} rows"] = in_turn(caller.calls(ids, mask, cache, graph=True), rounds, 15)
        del cache
    return out


def run_guard_works(directory: str, last_token_logits: bool, cuda_graph: bool, device: str = "cuda") -> dict[str, Any]:
    """A row padded on the left has NaN for logits, no other row changes by a bit, and no NaN is in the cache."""
    import numpy as np

    caller = Caller(directory, last_token_logits, cuda_graph, device, "bare")
    ids = np.random.default_rng(0).integers(3, caller.decoder.vocab_size, (3, 64))
    lengths = np.array([[64], [9], [30]])
    width = 256
    wrong: list[str] = []

    def compare(what: str, ids: Any, mask: Any, graph: bool) -> None:
        cache = caller.cache(3, width)
        for padded in (False, True):
            here = mask.copy()
            if padded:
                here[2] = here[2][::-1]  # the last row's ones at its end
            got = {}
            for name, call in caller.calls(ids, here, cache, graph).items():
                got[name] = call().numpy().copy()
                if graph:  # the capture, and then what was captured
                    got[name] = call().numpy().copy()
            if not np.array_equal(got["guarded"][:2], got["bare"][:2]) or not np.isfinite(got["guarded"][:2]).all():
                wrong.append(f"{what}: another row changed")
            nan = np.isnan(got["guarded"][2])
            if not (nan.all() if padded else not nan.any()):
                wrong.append(f"{what}: {'no NaN' if padded else 'NaN'} in the last row")
            if caller.element == 10 and not all(
                np.isfinite(value.numpy()).all() for value in cache
            ):  # numpy has no bf16
                wrong.append(f"{what}: NaN in the cache")

    compare("prefill", ids, (np.arange(64) < lengths).astype(np.int64), False)
    compare("decode", ids[:, :1], (np.arange(width) < lengths + 1).astype(np.int64), True)
    return {"wrong": wrong}


def guard_markdown(results: dict[str, Any]) -> str:
    lines = [f"{results['device']}, {results['date']}; onnxruntime-gpu {results['onnxruntime']}, 7B shape, float16", ""]
    lines += [
        "| logits | CUDA graph | process | | guarded ms | bare ms | guarded / bare |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for row in results["cost"]:
        where = f"| {row['logits']} | {row['cuda_graph']} | {row['process']} |"
        if "failed" in row:
            lines.append(f"{where} failed: {row['failed']} | | | |")
            continue
        for what, found in row["cases"].items():
            ratio = found["ratio"]
            said = f"{ratio['value']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})"
            lines.append(f"{where} {what} | {found['guarded']:.3f} | {found['bare']:.3f} | {said} |")
    lines += ["", "NaN where it belongs and nowhere else:", ""]
    lines += [f"- {what}: {', '.join(wrong) or 'yes'}" for what, wrong in results["works"].items()]
    return "\n".join(lines) + "\n"


def bench_guard(
    shape: str, work: Path, processes: int, job: Callable[..., dict[str, Any]], device: str
) -> dict[str, Any]:
    """The whole measurement; ``job`` runs one of the above in a process of its own."""
    from datetime import date
    from importlib.metadata import version

    import synthetic

    results: dict[str, Any] = {"date": date.today().isoformat(), "device": device, "cost": [], "works": {}}
    results["onnxruntime"] = version("onnxruntime-gpu")
    for dtype in ("float16", "bfloat16"):
        synthetic.make(work / dtype, "small", laid_out=True, dtype=dtype)
        for last in (False, True):
            for graph in (False, True):
                done = job("guard_works", directory=str(work / dtype), last_token_logits=last, cuda_graph=graph)
                what = f"{dtype}, {'last' if last else 'all'} logits, {'a' if graph else 'no'} CUDA graph"
                results["works"][what] = done.get("wrong", [str(done.get("failed"))])
    synthetic.make(work / shape, shape, laid_out=True)
    for process in range(processes):
        for last in (True, False):
            for graph in (True, False):
                done = job(
                    "guard", directory=str(work / shape), last_token_logits=last, cuda_graph=graph,
                    first=("guarded", "bare")[process % 2],
                )  # fmt: skip
                row = {"logits": "last" if last else "all", "cuda_graph": graph, "process": process}
                results["cost"].append(row | (done if "failed" in done else {"cases": done}))
    return results
