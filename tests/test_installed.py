"""ONNX Runtime is an extra: what needs none runs without, what needs it names the extra; two of them are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "data" / "gutenberg-llama-5m"
EXTRAS = "pip install '.[cuda]' (NVIDIA GPU) or '.[cpu]' in the clone of prune-attn"
# in a process of its own: the module is looked for and not found, as where it was never installed
ABSENT = """
import importlib.machinery, sys
real = importlib.machinery.PathFinder
class Finder(real):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0].startswith("onnxruntime") else real.find_spec(name, path, target)
sys.meta_path = [Finder if finder is real else finder for finder in sys.meta_path]
"""


@pytest.fixture
def without(tmp_path):
    """The command line where there is no ONNX Runtime."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(ABSENT)
    path = os.pathsep.join((str(tmp_path / "path"), str(ROOT)))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "export.cli", *map(str, arguments)]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)

    return run


def test_converting_needs_no_onnx_runtime(without, tmp_path):
    out = tmp_path / "out"
    for arguments in (
        ("inspect", MODEL),
        ("convert", MODEL, out, "--drop", 4),
        ("verify", out, "--against", MODEL),
        ("export", out, "--last-token-logits"),
        ("select", MODEL, "--drop", 1, "--strategy", "similarity", "--text", ROOT / "tests/data/calibration.txt",
         "--samples", 2, "--length", 32, "-o", tmp_path / "plan.json"),
    ):  # fmt: skip
        done = without(*arguments)
        assert done.returncode == 0, done.stderr
    assert (out / "model.onnx").is_file()


def test_what_needs_it_names_the_extra(without, tmp_path):
    out = tmp_path / "out"
    assert without("convert", MODEL, out, "--drop", 4).returncode == 0
    for arguments in (
        ("generate", out, "--prompt", "It was"),
        ("generate", out, "--prompt", "It was", "--device", "cuda"),
        ("validate", MODEL, out, "--backend", "onnx", "--only", "same-function"),
    ):
        done = without(*arguments)
        assert done.returncode == 2
        assert EXTRAS in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = without("validate", MODEL, out, "--only", "same-function", "--quiet")
    assert done.returncode == 0, done.stderr
    notes = json.loads((out / "report" / "results.json").read_text())["notes"]
    assert any("ONNX Runtime was not measured: ONNX Runtime is not installed" in note for note in notes)


def test_two_that_overwrite_each_other_are_found(tmp_path, cli, monkeypatch):
    out = tmp_path / "out"
    assert cli("convert", MODEL, out, "--drop", 4).returncode == 0
    for name in ("onnxruntime", "onnxruntime_gpu"):
        (tmp_path / "site" / f"{name}-1.31.1.dist-info").mkdir(parents=True)
        (tmp_path / "site" / f"{name}-1.31.1.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.31.1\n"
        )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(tmp_path / "site"))))
    done = cli("generate", out, "--prompt", "It was")
    assert done.returncode == 2
    assert "onnxruntime and onnxruntime-gpu are both installed" in done.stderr
    assert f"pip uninstall -y onnxruntime onnxruntime-gpu, then {EXTRAS}" in done.stderr
    for name in ("onnxruntime", "onnxruntime_gpu"):  # each in a folder of its own: nothing is overwritten
        (tmp_path / name).mkdir()
        (tmp_path / "site" / f"{name}-1.31.1.dist-info").rename(tmp_path / name / f"{name}-1.31.1.dist-info")
    apart = (str(ROOT), str(tmp_path / "onnxruntime"), str(tmp_path / "onnxruntime_gpu"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(apart))
    assert cli("generate", out, "--prompt", "It was", "--new-tokens", 2).returncode == 0
