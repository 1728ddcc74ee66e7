"""What a report says, as sections of sentences and tables; Markdown, HTML and the model card are written from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from export.report.pieces import Section, Table, interval, short_name, size
from pruner.errors import printable

RUNNERS = {
    "torch": "PyTorch, transformers eager",
    "torch-compiled": "PyTorch, transformers compiled",
    "onnx": "ONNX Runtime",
}
_BACKENDS = {"torch": "PyTorch", "onnx": "ONNX Runtime"}
_SHORT_SHOWN = {"faster": "", "slower": "slower", "no speed-up shown": "none shown"}
_SHORT = {"torch": "PyTorch", "torch-compiled": "compiled", "onnx": "ONNX Runtime"}


_DIGITS = 16  # of a hash


def title(results: dict[str, Any]) -> str:
    """Of a report."""
    return f"{short_name(results['models']['pruned']['name'])} against its original"


def sections(results: dict[str, Any]) -> list[Section]:
    """The whole report. Where it is not the same function, no loss and no gain is stated."""
    function = results["same_function"]
    if function is not None and not function["ok"]:
        return [*_function(results), *_removed(results), *_about(results)]
    return [
        *_glance(results),
        *_gates(results),
        *_removed(results),
        *_function(results),
        *_accuracy(results),
        *_tasks(results),
        *_latency(results),
        *_about(results),
    ]


# -- at a glance -------------------------------------------------------------------------------------------------------


def glance_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    """Label, original, pruned, change with its interval."""
    for backend, facts in results["accuracy"].items():
        p = facts["perplexity"]
        where = _where(results, backend)
        yield [
            f"perplexity{where}", f"{p['original']['value']:.2f}", f"{p['pruned']['value']:.2f}",
            interval(p["ratio"], "{:+.1%}", -1),
        ]  # fmt: skip
        yield [f"same most likely token{where}", "", interval(facts["agreement"], "{:.1%}"), ""]
    for backend, facts in results["tasks"].items():
        if facts["average_ratio"] is not None:
            a, b = (facts[m]["average"] for m in ("original", "pruned"))
            yield [
                f"task average{_where(results, backend)}", f"{a:.2%}", f"{b:.2%}", f"{facts['average_ratio'] - 1:+.1%}",
            ]  # fmt: skip
    for backend, facts in results["latency"].items():
        for what in ("decode", "prefill"):
            yield [f"{what} speed, {_SHORT[backend]}", "1", interval(facts["speedup"][what]), _shown(facts, what)]
    a, b = results["models"]["original"], results["models"]["pruned"]
    for label, key in (("weights", "bytes"), ("KV cache per token", "kv_cache_bytes_per_token")):
        change = f"{b[key] / a[key] - 1:+.1%}" if a[key] else ""
        yield [label, size(a[key]), size(b[key]), change]


def _where(results: dict[str, Any], backend: str) -> str:
    return f", {_BACKENDS[backend]}" if len(results["dtypes"]) > 1 else ""


def _shown(facts: dict[str, Any], what: str) -> str:
    speedup = facts["speedup"][what]
    if speedup["low"] <= 1 <= speedup["high"]:
        return "no speed-up shown"
    return "faster" if speedup["low"] > 1 else "slower"


def _glance(results: dict[str, Any]) -> Iterator[Section]:
    text = []
    for backend, facts in results["accuracy"].items():
        ratio = facts["perplexity"]["ratio"]
        text.append(
            f"Perplexity{_where(results, backend)} goes from {facts['perplexity']['original']['value']:.2f} to "
            f"{facts['perplexity']['pruned']['value']:.2f} ({interval(ratio, '{:+.1%}', -1)})."
        )
    for backend, facts in results["latency"].items():
        speedup = facts["speedup"]["decode"]
        if speedup["low"] <= 1 <= speedup["high"]:
            text.append(
                f"{RUNNERS[backend]}: no decode speed-up was shown; the interval {speedup['low']:.2f} to "
                f"{speedup['high']:.2f} includes 1."
            )
        else:
            text.append(f"{RUNNERS[backend]}: decodes {interval(speedup)} times as fast.")
    table = Table(["", "original", "pruned", "change"], list(glance_rows(results)))
    note = "In brackets: 95% bootstrap intervals. Speeds are geometric means over the batches and prompts below."
    yield Section("At a glance", [*text, note], [table], ["glance"])


def _gates(results: dict[str, Any]) -> Iterator[Section]:
    if results["gates"]:
        rows = [
            [f"{g['name'].replace('_', ' ')}, {g['backend']}",
             "none" if g["measured"] is None else f"{g['measured']:.4f}", f"{g['limit']:.4f}",
             "kept" if g["ok"] else "BROKEN"]
            for g in results["gates"]
        ]  # fmt: skip
        yield Section("Limits", [], [Table(["", "measured", "limit", ""], rows)])


def _removed(results: dict[str, Any]) -> Iterator[Section]:
    pruning = results["pruning"]
    text = [
        f"{name} removed at {_layers(pruning[kind])} ({len(pruning[kind])} of {pruning['layers']})."
        for kind, name in (("attention", "Attention"), ("mlp", "MLP"))
        if pruning[kind]
    ]
    if pruning["strategy"]:
        asked = f" ({printable(pruning['requested'], 80)})" if pruning["requested"] else ""
        text.append(f"Chosen by {printable(pruning['strategy'], 40)}{asked}.")
    yield Section("Which layers are gone", text, [], ["layers"])


def _layers(layers: list[int]) -> str:
    return ("layers " if len(layers) > 1 else "layer ") + ", ".join(map(str, layers))


# -- the same function -------------------------------------------------------------------------------------------------


def _function(results: dict[str, Any]) -> Iterator[Section]:
    function = results["same_function"]
    if function is None:
        return
    rows = []
    facts = function["bytes"]
    state = f"{facts['tensors']} tensors byte for byte" if facts["ok"] else f"{len(facts['problems'])} DIFFER"
    rows.append(["tensors against the original's", state, "", ""])
    for part, label in (
        ("torch", "PyTorch: pruned against the original with those sublayers switched off"),
        ("onnx", "pruned: model.onnx against PyTorch"),
    ):
        facts = function[part]
        if facts is None:
            continue
        error = "not finite" if facts["relative_error"] is None else f"{facts['relative_error']:.1e}"
        state = "bit-equal" if facts["equal"] else "to rounding" if facts["ok"] else "DIFFERENT"
        rows.append([label, state, error, f"{facts['agreement']:.2%}"])
    text = []
    if not function["ok"]:
        text.append(
            "THIS IS NOT THE SAME FUNCTION. The pruned directory is something else than the original without those "
            "sublayers, so that no difference could be called the method's loss, and none was measured."
        )
        text += function["bytes"]["problems"]
    yield Section("The same function", text, [Table(["", "", "relative error", "same token"], rows)])


# -- accuracy ----------------------------------------------------------------------------------------------------------


def _accuracy(results: dict[str, Any]) -> Iterator[Section]:
    if not results["accuracy"]:
        return
    first = next(iter(results["accuracy"].values()))
    bos = {"once": "BOS once, before the text", "every": "BOS before every window", "none": "no BOS"}[first["bos"]]
    text = [
        f"On {printable(first['text']['name'], 80)}: {first['tokens']:,} tokens scored, in windows of "
        f"{first['window']} with stride {first['stride']}, {bos}; each token counts once, in the first window that "
        "holds it.",
    ]
    tables = []
    for backend, facts in results["accuracy"].items():
        perplexity = facts["perplexity"]
        rows = [
            ["perplexity", *_both(perplexity, "{:.2f}"), interval(perplexity["ratio"], "{:+.1%}", -1)],
            ["bits a byte", *(f"{facts['bits_per_byte'][m]:.4f}" for m in ("original", "pruned")), ""],
            ["most likely token is the text's", *(f"{facts['accuracy'][m]:.1%}" for m in ("original", "pruned")), ""],
            ["calibration error (15 bins)", *_both(facts["calibration_error"], "{:.4f}"), ""],
            ["same most likely token", "", interval(facts["agreement"], "{:.1%}"), ""],
            ["KL divergence, mean (nats)", "", interval(facts["kl"]["mean"], "{:.4f}"), ""],
            ["KL divergence, 99th percentile", "", interval(facts["kl"]["p99"], "{:.3f}"), ""],
            [
                f"greedy text the same, tokens of {facts['greedy']['new_tokens']}", "",
                interval(facts["greedy"]["mean"], "{:.1f}"),
                f"median {facts['greedy']['median']:.0f} of {facts['greedy']['prompts']} prompts",
            ],
        ]  # fmt: skip
        tables.append(
            Table(["", "original", "pruned", "change"], rows, f"{_BACKENDS[backend]}, {_dtype(results, backend)}")
        )
    rows = [
        [f"{row['from']} to {row['to']}", f"{row['original']:.2f}", f"{row['pruned']:.2f}",
         interval(row["ratio"], "{:+.1%}", -1)]
        for row in first["position"]
    ]  # fmt: skip
    tables.append(Table(["tokens of context", "original", "pruned", "change"], rows, "Perplexity by position"))
    yield Section("Accuracy", text, tables, ["position"])


def _both(facts: dict[str, Any], form: str) -> list[str]:
    return [interval(facts[name], form) for name in ("original", "pruned")]


def _dtype(results: dict[str, Any], backend: str) -> str:
    return results["dtypes"]["torch" if backend == "torch-compiled" else backend]


def task_rows(facts: dict[str, Any]) -> Iterator[list[str]]:
    """Task, metric, shots, n, original, pruned, pruned / original."""
    for name, a in facts["original"]["tasks"].items():
        b = facts["pruned"]["tasks"][name]
        ratio = f"{b['value'] / a['value']:.3f}" if a["value"] else ""
        shots = "" if a.get("shots") is None else str(a["shots"])
        values = [f"{t['value']:.2%}" + (f" ± {t['stderr']:.2%}" if t.get("stderr") else "") for t in (a, b)]
        yield [printable(name, 80), printable(a["metric"], 40), shots, str(a.get("n") or ""), *values, ratio]
    if facts["average_ratio"] is not None:
        averages = [f"{facts[m]['average']:.2%}" for m in ("original", "pruned")]
        yield ["average", "", "", "", *averages, f"{facts['average_ratio']:.3f}"]


def _tasks(results: dict[str, Any]) -> Iterator[Section]:
    if not results["tasks"]:
        return
    head = ["task", "metric", "shots", "n", "original", "pruned", "ratio"]
    limit = results["options"]["limit"]
    text = ["By lm-evaluation-harness; ± is one standard error." + (f" At most {limit} of each task." if limit else "")]
    tables = [Table(head, list(task_rows(facts)), _BACKENDS[backend]) for backend, facts in results["tasks"].items()]
    yield Section("Tasks", text, tables)


# -- latency -----------------------------------------------------------------------------------------------------------


def _latency(results: dict[str, Any]) -> Iterator[Section]:
    if not results["latency"]:
        return
    text = [
        "Original and pruned in turn (A B A B) in one process, warmed up; decode steps with the KV history that the "
        "prefill left. Milliseconds; prefill and first token are medians over the repeats, decode is over all steps. "
        "Speed-ups are ratios of medians with their 95% intervals over the repeats."
    ]
    if results["bandwidth"]:
        text.append(
            "Floor: the bytes of weights and KV history that a step must read over the copy bandwidth measured in this "
            f"run, {results['bandwidth'] / 1e12:.2f} TB/s."
        )
    load = results["environment"]["load_average"]
    if results["environment"]["device"] == "cpu" and load and load[0] > 1:
        text.append(f"The machine was busy when this began (load average {load[0]:g}); see the spread.")
    tables = []
    for backend, facts in results["latency"].items():
        floor = bool(results["bandwidth"])
        head = ["batch x prompt", "", "prefill", "first token", "decode", "p90", "p99", "tokens/s"]
        head += ["decode / floor"] * floor + ["repeats"]
        rows = []
        for case in facts["cases"]:
            for model in ("original", "pruned"):
                t = case[model]
                d = t["decode_ms"]
                rows.append(
                    [f"{case['batch']} x {case['prompt']}" if model == "original" else "", model]
                    + [f"{t[key]['median']:.1f}" for key in ("prefill_ms", "first_token_ms")]
                    + [f"{d['median']:.2f}", f"{d['p90']:.2f}", f"{d['p99']:.2f}", f"{t['tokens_per_second']:,.1f}"]
                    + ([f"{t['floor_ratio']:.2f}"] if floor else [])
                    + [str(case["repeats"])]
                )
            s = case["speedup"]
            rows.append(
                ["", "speed-up", *(interval(s[key]) for key in ("prefill", "first_token", "decode")), "", ""]
                + [interval(s["end_to_end"])] + [""] * floor + [_SHORT_SHOWN[_shown(case, "decode")]]
            )  # fmt: skip
        tables.append(Table(head, rows, f"{RUNNERS[backend]}, {_dtype(results, backend)}"))
    rows = []
    for backend, facts in results["latency"].items():
        for model in ("original", "pruned") if facts["memory"] else ():
            m = facts["memory"][model]
            if "failed" in m:
                rows.append([f"{RUNNERS[backend]}, {model}", "failed", "", ""])
                continue
            gpu = size(m["peak_gpu_bytes"]) if m["peak_gpu_bytes"] else ""
            rows.append([f"{RUNNERS[backend]}, {model}", f"{m['load_s']:.1f}", size(m["peak_rss_bytes"]), gpu])
    if rows:
        measured = [m for f in results["latency"].values() if f["memory"] for m in f["memory"].values() if "batch" in m]
        caption = "Load time and peak memory, each in a process of its own"
        if measured:
            caption += (
                f", over loading, a prefill of {measured[0]['batch']} x {measured[0]['prompt']} tokens and a few steps"
            )
        tables.append(Table(["", "load s", "host", "GPU"], rows, caption))
    yield Section("Latency and memory", text, tables, ["decode"])


# -- what it was -------------------------------------------------------------------------------------------------------


def _about(results: dict[str, Any]) -> Iterator[Section]:
    environment, gpu = results["environment"], results["environment"]["gpu"]
    rows = [["device", f"{gpu['name']} ({size(gpu['memory_bytes'])})" if gpu else environment["cpu"]]]
    if gpu:
        rows.append(["driver, CUDA", f"{gpu['driver']}, {gpu['cuda']}"])
        rows.append(["CPU", environment["cpu"]])
    tool = environment["prune_attn"]
    rows += [
        ["cores, threads", f"{environment['cores']}, {environment['threads']}"],
        ["computed in", ", ".join(f"{_BACKENDS[b]} {dtype}" for b, dtype in results["dtypes"].items())],
        ["software", ", ".join(f"{name} {v}" for name, v in environment["packages"].items())],
        ["Python, system", f"{environment['python']}, {environment['platform']}"],
        ["prune-attn", tool["version"] + (f", commit {tool['commit']}" if tool["commit"] else "")],
        ["measured", f"{results['created']}, {results['seconds']:.0f} s, seed {results['options']['seed']}"],
    ]
    models = []  # whole hashes are in results.json
    for name in ("original", "pruned"):
        m = results["models"][name]
        hashes = m["weights_sha256"] or {k: v["header_sha256"] for k, v in m["shards"].items()}
        kind = "SHA-256" if m["weights_sha256"] else "header SHA-256"
        short = "; ".join(f"{k} {v[:_DIGITS]}" for k, v in hashes.items())
        models.append([name, printable(m["name"]), f"{m['parameters']:,}", kind, short])
    yield Section(
        "What was measured, and where",
        results["notes"] and ["Notes: " + "; ".join(results["notes"]) + "."],
        [
            Table(["", ""], rows, words=True),
            Table(["", "model", "parameters", "hash", f"first {_DIGITS} digits"], models, words=True),
        ],
    )


# -- numbers -----------------------------------------------------------------------------------------------------------
