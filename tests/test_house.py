"""The house: which way imports go, what is imported when, and that the shipped files stand alone."""

from __future__ import annotations

import ast
import resource
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_program
from programs import heavy_imports


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
    assert run_program(heavy_imports, module).strip() == "[]"


def test_help_answers_at_once(cli):
    """By CPU time, which other work on the machine does not add to."""

    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(5):
        before = seconds()
        assert "convert" in cli("--help", check=0).stdout
        times.append(seconds() - before)
    assert min(times) < 0.3


def test_no_arguments_shows_the_help(cli):
    done = cli()
    assert "Usage: prune-attn" in done.stdout + done.stderr
    assert "prune-attn: Usage" not in done.stderr
