"""``results.json``, ``report.md``, ``report.html`` and PNG plots; and several results side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.report import FORMAT, RESULTS, VERSION, content, plots
from export.safetensors import replace_file
from pruner import __version__
from pruner.errors import PruneAttnError
from pruner.files import expand, read_json

REPORT_FILES = (RESULTS, "report.md", "report.html", "compare.md", "compare.html")


def read_results(path: Path) -> dict[str, Any]:
    """A ``results.json`` (or the directory that holds it). Raises ``PruneAttnError`` for anything else."""
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise PruneAttnError(f"{path}: no such file; give a results.json that prune-attn validate wrote")
    results = read_json(path)
    if results.get("format") != FORMAT:
        raise PruneAttnError(f"{path}: was not written by prune-attn validate; give its results.json")
    if results.get("version") != VERSION:
        raise PruneAttnError(
            f"{path}: has version {results.get('version')!r}, this prune-attn reads {VERSION}; measure again"
        )
    return results


def write_report(results: dict[str, Any], output: Path) -> list[Path]:
    """All files into ``output``, each replaced in one step, ``results.json`` last; what was written."""
    title, sections = content.title(results), content.sections(results)
    names = [name for section in sections for name in section.plots]
    figures = {name: figure for name in names if (figure := plots.FIGURES[name][0](results)) is not None}
    captions = {name: plots.FIGURES[name][1] for name in figures}
    files = {f"{name}.png": plots.png(figure) for name, figure in figures.items()}
    files["report.md"] = _markdown(title, sections, captions).encode()
    files["report.html"] = _html(title, sections, figures, captions).encode()
    files[RESULTS] = (json.dumps(results, indent=1, allow_nan=False) + "\n").encode()
    return _write(output, files)


def report(results: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> list[Path]:
    """Render one ``results.json`` again, or several side by side, into ``output``; the files written.

    Raises ``PruneAttnError`` for what ``validate`` did not write, and for an ``output`` that holds something else.
    """
    output, found = expand(output), [read_results(expand(path)) for path in results]
    if output.exists() and (not output.is_dir() or any(not is_ours(p.name) for p in output.iterdir())):
        raise PruneAttnError(f"{output}: holds something else than a report; choose another directory")
    if len(found) == 1:
        try:
            return write_report(found[0], output)
        except (KeyError, TypeError, AttributeError) as error:
            raise PruneAttnError(f"{results[0]}: is damaged ({type(error).__name__} {error}); measure again") from None
    rows = compare_rows(found)
    figure = plots.compared(rows)
    captions = {"compare": "Quality against speed"} if figure else {}
    sections = [content.Section(f"{len(rows)} results", _caveats(found), [_compare_table(rows)], list(captions))]
    files = {"compare.png": plots.png(figure)} if figure else {}
    files["compare.md"] = _markdown("Results compared", sections, captions).encode()
    files["compare.html"] = _html("Results compared", sections, {"compare": figure}, captions).encode()
    return _write(output, files)


def compare_rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a result: label, and of the first backend that has them perplexities, agreement, tasks, speed-up."""
    names = [r["models"]["pruned"]["name"].rstrip("/").rsplit("/", 1)[-1] for r in found]
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


def _compare_table(rows: list[dict[str, Any]]) -> content.Table:
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
    return content.Table(
        head,
        [
            [
                r["label"] + (" (NOT THE SAME FUNCTION)" if r["broken"] else ""), str(r["attention"]), str(r["mlp"]),
                f"{r['perplexity'][0]:.2f} to {r['perplexity'][1]:.2f}" if r["perplexity"] else "",
                content.interval(r["increase"], "{:+.1%}", -1) if r["increase"] else "",
                content.interval(r["agreement"], "{:.1%}") if r["agreement"] else "",
                f"{r['task_ratio']:.3f}" if r["task_ratio"] is not None else "",
                content.interval(r["speedup"]) + (" ONNX" if r["backend"] == content.RUNNERS["onnx"] else " PyTorch")
                if r["speedup"] else "",
                f"{r['weights']:+.1%}",
            ]
            for r in rows
        ],
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


def is_ours(name: str) -> bool:
    """Whether a file of a report's directory is the report's, one that a kill left half written included."""
    return name in _ours() or (name.startswith(".") and name.removeprefix(".").removesuffix(".new") in _ours())


def _ours() -> set[str]:
    from export.report.parts import FOLDER

    return {*REPORT_FILES, FOLDER, "compare.png", *(f"{name}.png" for name in plots.FIGURES)}


def _write(output: Path, files: dict[str, bytes]) -> list[Path]:
    output.mkdir(parents=True, exist_ok=True)
    for name in _ours() - files.keys() - {RESULTS}:  # another kind of report's
        path = output / name
        if path.is_file():
            path.unlink()
    return [replace_file(output / name, data) for name, data in files.items()]


# -- Markdown and HTML -------------------------------------------------------------------------------------------------


def _markdown(title: str, sections: list[content.Section], captions: dict[str, str]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.text
        parts += [markdown_table(table) for table in section.tables]
        parts += [f"![{captions[name]}]({name}.png)" for name in section.plots if name in captions]
    return "\n\n".join(parts) + f"\n\nWritten by prune-attn {__version__}; every figure is in `results.json`.\n"


def markdown_table(table: content.Table) -> str:
    """With its caption above."""
    columns = [i for i, _ in enumerate(table.head) if table.head[i] or any(row[i] for row in table.rows)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells[i].replace("|", "\\|") for i in columns) + " |"

    lines = [line(table.head), "|" + "|".join("---" if i == 0 else "---:" for i in columns) + "|"]
    lines += [line(row) for row in table.rows]
    return (f"{table.caption}:\n\n" if table.caption else "") + "\n".join(lines)


def _html(title: str, sections: list[content.Section], figures: dict[str, Any], captions: dict[str, str]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    drawn = {name: plots.svg(figures[name], name) for name in captions}
    page = environment.get_template("report.html.j2")
    return page.render(title=title, sections=sections, drawn=drawn, captions=captions, version=__version__)
