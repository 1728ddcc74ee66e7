"""``results.json``, ``report.md``, ``report.html`` and PNG plots; and several results side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export.report import FORMAT, RESULTS, UNFINISHED, VERSION, content, plots
from export.report.render import render_html, render_markdown
from pruner.errors import PruneAttnError
from pruner.files import read_json, replace_file
from pruner.record import is_layers, is_small, misfit

REPORT_FILES = (RESULTS, "report.md", "report.html", "compare.md", "compare.html")


_PRUNING = {  # drawn, a cell a layer
    "layers": is_small, "attention": is_layers, "mlp": is_layers,
    "absent_before": {"attention": is_layers, "mlp": is_layers},
}  # fmt: skip


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
    if wrong := misfit(results, {"pruning": _PRUNING}):
        raise PruneAttnError(f"{path}: is damaged ({wrong!r} is not what it should be); measure again")
    return results


def write_report(results: dict[str, Any], output: Path) -> list[Path]:
    """All files into ``output``, each replaced in one step, ``results.json`` last; what was written."""
    title, sections = content.title(results), content.sections(results)
    names = [name for section in sections for name in section.plots]
    figures = {name: figure for name in names if (figure := plots.FIGURES[name][0](results)) is not None}
    captions = {name: plots.FIGURES[name][1] for name in figures}
    files = {f"{name}.png": plots.png(figure) for name, figure in figures.items()}
    files["report.md"] = render_markdown(title, sections, captions).encode()
    files["report.html"] = render_html(title, sections, figures, captions).encode()
    files[RESULTS] = (json.dumps(results, indent=1, allow_nan=False) + "\n").encode()
    return _write(output, files)


def is_ours(name: str) -> bool:
    """Whether a file of a report's directory is the report's, one that a kill left half written included."""
    return name in _ours() or (name.startswith(".") and name.removeprefix(".").removesuffix(".new") in _ours())


def _ours() -> set[str]:
    return {*REPORT_FILES, UNFINISHED, "compare.png", *(f"{name}.png" for name in plots.FIGURES)}


def _write(output: Path, files: dict[str, bytes]) -> list[Path]:
    output.mkdir(parents=True, exist_ok=True)
    for name in _ours() - files.keys() - {RESULTS}:  # another kind of report's
        path = output / name
        if path.is_file():
            path.unlink()
    return [replace_file(output / name, data) for name, data in files.items()]


# -- Markdown and HTML -------------------------------------------------------------------------------------------------
