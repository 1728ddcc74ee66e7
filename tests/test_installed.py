"""ONNX Runtime is an extra: what needs none runs without, what needs it names the extra; two of them are found."""

from __future__ import annotations

import json
import os

import pytest
from conftest import CALIBRATION, ROOT, SHIPPED

EXTRAS = "pip install '.[cuda]' (NVIDIA GPU) or '.[cpu]' in the clone of prune-attn"
# a folder whose sitecustomize.py hides the module, as where it was never installed
HIDING = ROOT / "tests" / "no_onnxruntime"


@pytest.fixture
def without(cli, monkeypatch):
    """The command line where there is no ONNX Runtime."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(HIDING), str(ROOT))))
    return cli


def test_converting_needs_no_onnx_runtime(without, tmp_path):
    out = tmp_path / "out"
    for arguments in (
        ("inspect", SHIPPED),
        ("convert", SHIPPED, out, "--drop", 4),
        ("verify", out, "--against", SHIPPED),
        ("export", out, "--last-token-logits"),
        ("select", SHIPPED, "--drop", 1, "--strategy", "similarity", "--text", CALIBRATION,
         "--samples", 2, "--length", 32, "-o", tmp_path / "plan.json"),
    ):  # fmt: skip
        done = without(*arguments)
        assert done.returncode == 0, done.stderr
    assert (out / "model.onnx").is_file()


def test_what_needs_it_names_the_extra(without, tmp_path):
    out = tmp_path / "out"
    assert without("convert", SHIPPED, out, "--drop", 4).returncode == 0
    for arguments in (
        ("generate", out, "--prompt", "It was"),
        ("generate", out, "--prompt", "It was", "--device", "cuda"),
        ("validate", SHIPPED, out, "--backend", "onnx", "--only", "same-function"),
    ):
        done = without(*arguments)
        assert done.returncode == 2
        assert EXTRAS in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = without("validate", SHIPPED, out, "--only", "same-function", "--quiet")
    assert done.returncode == 0, done.stderr
    notes = json.loads((out / "report" / "results.json").read_text())["notes"]
    assert any("ONNX Runtime was not measured: ONNX Runtime is not installed" in note for note in notes)


def test_two_that_overwrite_each_other_are_found(tmp_path, cli, monkeypatch):
    out = tmp_path / "out"
    assert cli("convert", SHIPPED, out, "--drop", 4).returncode == 0
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
