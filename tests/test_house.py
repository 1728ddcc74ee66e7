"""The house: which way imports go, what is imported when, and that the shipped files stand alone."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_pruner_never_imports_export():
    for file in (ROOT / "pruner").rglob("*.py"):
        assert not any(name.split(".")[0] == "export" for name in imports(file)), file


def test_shipped_code_imports_nothing_of_ours():
    for name in ("configuration_pruned_llama.py", "modeling_pruned_llama.py"):
        for module in imports(ROOT / "pruner" / "nemotron_nas" / name):
            top = module.split(".")[0]
            theirs = top in ("torch", "transformers") or top in sys.stdlib_module_names
            assert theirs or module == ".configuration_pruned_llama"


@pytest.mark.parametrize("module", ["pruner", "export", "export.cli"])
def test_importing_is_light(module):
    heavy = ("torch", "transformers", "onnx", "numpy", "rich")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_help_answers_at_once():
    run = [sys.executable, "-m", "export.cli", "--help"]
    subprocess.check_output(run)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert b"convert" in subprocess.check_output(run)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_no_arguments_shows_the_help(cli):
    done = cli()
    assert "Usage: prune-attn" in done.stdout + done.stderr
    assert "prune-attn: Usage" not in done.stderr
