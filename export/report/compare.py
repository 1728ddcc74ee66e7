"""``report``: several results side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.report import content, pieces, plots
from export.report.render import render_html, render_markdown
from export.report.write import _write, is_ours, read_results, write_report
from pruner.errors import PruneAttnError, one_line
from pruner.files import expand


def report(results: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> list[Path]:
    """Render one ``results.json`` again, or several side by side, into ``output``; the files written.

    Raises ``PruneAttnError`` for what ``validate`` did not write, and for an ``output`` that holds something else.
    """
    output, found = expand(output), [read_results(expand(path)) for path in results]
    if output.exists() and (not output.is_dir() or any(not is_ours(p.name) for p in output.iterdir())):
        raise PruneAttnError(f"{output}: holds something else than a report; choose another directory")
    try:
        return write_report(found[0], output) if len(found) == 1 else _write_comparison(found, output)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        which = results[0] if len(found) == 1 else "one of the results"
        raise PruneAttnError(
            f"{which}: is damaged ({type(error).__name__} {one_line(error, 80)}); measure again"
        ) from None


def _write_comparison(found: Sequence[dict[str, Any]], output: Path) -> list[Path]:
    rows = compare_rows(found)
    figure = plots.compared(rows)
    captions = {"compare": "Quality against speed"} if figure else {}
    sections = [pieces.Section(f"{len(rows)} results", _caveats(found), [compare_table(rows)], list(captions))]
    files = {"compare.png": plots.png(figure)} if figure else {}
    files["compare.md"] = render_markdown("Results compared", sections, captions).encode()
    files["compare.html"] = render_html("Results compared", sections, {"compare": figure}, captions).encode()
    return _write(output, files)


def compare_rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a result: label, and of the first backend that has them perplexities, agreement, tasks, speed-up."""
    names = [pieces.short_name(r["models"]["pruned"]["name"], 40) for r in found]
    rows = []
    for i, results in enumerate(found):
        broken = results["same_function"] is not None and not results["same_function"]["ok"]
        accuracy = next(iter(results["accuracy"].values()), None)
        tasks = next(iter(results["tasks"].values()), None)
        backend = next((b for b in ("onnx", "torch") if b in results["latency"]), None)
        bytes_before, bytes_after = (results["models"][m]["bytes"] for m in ("original", "pruned"))
        rows.append(
            {
                "label": names[i] if names.count(names[i]) == 1 else f"{names[i]} ({i + 1})",
                "broken": broken,
                "attention": len(results["pruning"]["attention"]),
                "mlp": len(results["pruning"]["mlp"]),
                "perplexity": accuracy and [accuracy["perplexity"][m]["value"] for m in ("original", "pruned")],
                "increase": accuracy and accuracy["perplexity"]["ratio"],
                "agreement": accuracy and accuracy["agreement"],
                "task_ratio": tasks and tasks["average_ratio"],
                "backend": backend and content.RUNNERS[backend],
                "speedup": backend and results["latency"][backend]["speedup"]["decode"],
                "weights": bytes_after / bytes_before - 1,
            }
        )
    return rows


def compare_table(rows: list[dict[str, Any]]) -> pieces.Table:
    head = [
        "",
        "attention gone",
        "MLP gone",
        "perplexity",
        "increase",
        "same token",
        "task ratio",
        "decode speed-up",
        "weights",
    ]
    return pieces.Table(
        head,
        [
            [
                r["label"] + (" (NOT THE SAME FUNCTION)" if r["broken"] else ""), str(r["attention"]), str(r["mlp"]),
                f"{r['perplexity'][0]:.2f} to {r['perplexity'][1]:.2f}" if r["perplexity"] else "",
                pieces.interval(r["increase"], "{:+.1%}", -1) if r["increase"] else "",
                pieces.interval(r["agreement"], "{:.1%}") if r["agreement"] else "",
                f"{r['task_ratio']:.3f}" if r["task_ratio"] is not None else "",
                pieces.interval(r["speedup"]) + (" ONNX" if r["backend"] == content.RUNNERS["onnx"] else " PyTorch")
                if r["speedup"] else "",
                f"{r['weights']:+.1%}",
            ]
            for r in rows
        ],
        stacked=True,
    )  # fmt: skip


def _caveats(found: Sequence[dict[str, Any]]) -> list[str]:
    """What keeps these results from being compared."""

    def differ(values: list[Any]) -> bool:
        return len({json.dumps(v, sort_keys=True) for v in values if v is not None}) > 1

    accuracy = [next(iter(r["accuracy"].values()), None) for r in found]
    keys = ("text", "window", "stride", "bos")
    checks = (
        ("originals", [r["models"]["original"]["config_sha256"] for r in found]),
        ("texts or windows", [a and [a[k] for k in keys] for a in accuracy]),
        ("machines", [[r["environment"]["cpu"], r["environment"]["gpu"], r["environment"]["threads"]] for r in found]),
    )
    return [f"Beware: the {what} differ." for what, values in checks if differ(values)]
