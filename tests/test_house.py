"""The house rules: which way imports go, what stands once, how long things are, what is imported when."""

from __future__ import annotations

import ast
import resource
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, run_program
from programs import heavy_imports

from pruner import names

LONGEST_FILE, LONGEST_FUNCTION = 350, 60


def module_name(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


FILES = {
    module_name(f): f
    for f in sorted([ROOT / "prune_attn.py", *ROOT.glob("pruner/**/*.py"), *ROOT.glob("export/**/*.py")])
}


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def imported(module: str) -> Iterator[str]:
    """Every module that this one imports, at its top or inside a function; of ours the very file."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield "." * node.level + (inner if inner in FILES else node.module)


def who_imports(*packages: str) -> set[str]:
    return {m for m in FILES for name in imported(m) if any(f"{name}.".startswith(f"{p}.") for p in packages)}


def within(modules: set[str], *rooms: str) -> bool:
    return all(any(f"{m}.".startswith(f"{room}.") for room in rooms) for m in modules)


def test_pruner_never_imports_export():
    assert within(who_imports("export"), "export", "prune_attn")


def test_no_circle_of_imports():
    left = {m: {name for name in imported(m) if name in FILES and name != m} for m in FILES}
    while free := {m for m, needs in left.items() if not needs}:
        left = {m: needs - free for m, needs in left.items() if m not in free}
    assert not left, f"circles among, or leading to: {sorted(left)}"


def test_libraries_stay_in_their_rooms():
    assert within(who_imports("click", "cloup", "rich"), "export.cli")
    assert within(who_imports("onnx", "onnxruntime"), "export.onnx")
    assert within(who_imports("onnxruntime_genai"), "export.serve")


def test_report_measures_nothing():
    assert not {m for m in who_imports("export.validate") if m.startswith("export.report")}
    assert not {m for m in who_imports("torch", "pruner.evaluate") if m.startswith("export.report")}


def test_a_verb_is_one_thin_file():
    from export.cli.main import cli

    for name, command in cli.commands.items():
        file = f"export.cli.{name}"
        assert command.callback.__module__ == file
        commands = [d for node in parsed(file).body if isinstance(node, ast.FunctionDef) for d in node.decorator_list
                    if "command" in ast.unparse(d)]  # fmt: skip
        assert len(commands) == 1, file


def test_names_of_files_stand_once():
    """``model.onnx`` and so on are said in ``pruner/names.py``; elsewhere by their names."""
    said = {value for name, value in vars(names).items() if name.isupper()}
    for module in FILES.keys() - {"pruner.names"}:
        if module.endswith("_pruned_llama"):  # shipped: it stands alone
            continue
        literal = {
            n.value for n in ast.walk(parsed(module)) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        assert not literal & said, module


@pytest.mark.parametrize("field", ["max_position_embeddings", "rms_norm_eps"])
def test_defaults_stand_once(field):
    """Whoever wants such a field asks the one place that knows what its absence means."""
    asks = set()
    for module in FILES:
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".get") and node.args:
                asks |= {module for name in node.args[:1] if ast.unparse(name) == repr(field)}
    assert len(asks) == 1, asks


def test_nothing_is_too_long():
    """A file or function that is longer says why: a comment above it that begins with ``# long:``."""
    for module, file in FILES.items():
        lines = file.read_text().splitlines()
        assert len(lines) <= LONGEST_FILE or any(line.startswith("# long:") for line in lines), module
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                assert "# long:" in lines[first - 2], f"{module}: {node.name}"


def test_shipped_code_imports_nothing_of_ours():
    for name in ("configuration_pruned_llama", "modeling_pruned_llama"):
        for module in imported(f"pruner.nemotron_nas.{name}"):
            top = module.split(".")[0]
            theirs = top in ("torch", "transformers") or top in sys.stdlib_module_names
            assert theirs or module == ".configuration_pruned_llama"


@pytest.mark.parametrize("module", ["prune_attn", "pruner", "export", "export.cli.main"])
def test_importing_is_light(module):
    assert run_program(heavy_imports, module).strip() == "[]"


def test_the_public_door():
    """What an editor shows of ``prune_attn`` is what there is, and each has a docstring."""
    import prune_attn

    shown = {alias.name for node in ast.walk(parsed("prune_attn")) if isinstance(node, ast.If)
             for inner in node.body if isinstance(inner, ast.ImportFrom) for alias in inner.names}  # fmt: skip
    assert shown == set(prune_attn.__all__)
    for name in prune_attn.__all__:
        assert (getattr(prune_attn, name).__doc__ or "").strip(), name


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
