"""What a person meets in the first hour, from the command line and from Python."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import PIPES, ROOT, SHIPPED, TEXT, swept

from export.gguf import write_gguf
from export.report.compare import report
from export.select import select
from export.sweep.job import sweep
from export.validate.run import validate
from prune_attn import Accuracy, Calibration, Compute, Drop, SavedPlan, convert, export, push, verify
from pruner.errors import PruneAttnError
from pruner.plan import parse_drop
from pruner.summary import inspect


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory with the model, a text and a converted copy; relative paths lead elsewhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "model").symlink_to(SHIPPED)
    home = tmp_path / "home"
    (home / "model").symlink_to(SHIPPED)
    (home / "text").write_text(TEXT.read_text()[:60_000])
    (home / "other").write_text(TEXT.read_text()[60_000:120_000])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(home))
    yield home
    assert not list(elsewhere.iterdir())


def test_home_in_quotes_from_python(home):
    convert("~/model", "~/out", 4)
    assert verify("~/out", "~/model")
    small = {"samples": 2, "length": 16}
    select("~/model", 4, calibration=Calibration("~/text", "similarity", **small), output="~/plan.json")
    assert convert("~/model", "~/planned", SavedPlan("~/plan.json")).output == home / "planned"
    export("~/model", "~/laid-out")
    export("~/laid-out")
    write_gguf("~/out", "~/out.gguf")
    assert push("~/out", "user/name", dry_run=True).files
    small_sweep = {"fractions": "4", "window": 64, "limit": 2, "rounds": 0} | small
    sweep(
        "~/model",
        "~/swept",
        **swept(text="~/text", calibration="~/other", strategy="similarity", **small_sweep),
    )
    (home / "work").mkdir()
    accuracy, compute = Accuracy("~/text", max_tokens=600, window=64), Compute("torch", work="~/work")
    validate("~/model", "~/out", "~/measured", accuracy=accuracy, latency=None, compute=compute)
    report(["~/measured/results.json"], "~/rendered")
    made = {path.name for path in home.iterdir()}
    assert {"out", "plan.json", "planned", "laid-out", "out.gguf", "swept", "measured", "rendered"} < made
    assert (home / "rendered" / "report.html").is_file()


def test_home_in_quotes_from_the_command_line(home, cli):
    env = {**os.environ, "HOME": str(home)}
    facts = json.loads(cli("inspect", "~/model", "--json", check=0, env=env).stdout)
    assert facts["path"] == str(home / "model")
    cli("convert", "~/model", "~/out", "--drop", "4", check=0, env=env)
    cli("verify", "~/out", "--against", "~/model", check=0, env=env)
    said = cli("generate", "~/out", "--prompt", "It was", "--new-tokens", "2", check=0, env=env).stdout
    assert said.strip()


@pytest.mark.parametrize("layers", [23, 32, 5])
def test_inspect_offers_what_convert_takes(make_llama, cli, layers):
    source = make_llama(num_hidden_layers=layers, hidden_size=16, intermediate_size=32, vocab_size=16)
    wanted = {parse_drop(share, layers) for share in ("1", "10%", "25%", "33%", "50%")}
    shown = cli("inspect", source, check=0).stdout
    for kind in ("attention", "MLP", "blocks"):
        assert {int(n) for n in re.findall(rf"(?m)^ *(\d+) {kind} ", shown)} == wanted


def test_inspect_of_a_pruned_model_counts_shares_of_the_original(tmp_path, cli):
    convert(SHIPPED, tmp_path / "out", Drop(3, sublayer="block"))
    shown = cli("inspect", tmp_path / "out", check=0).stdout
    assert re.search(r"(?m)^ *6 blocks ", shown)  # half of 12, not of the 9 that are left
    from pruner.checkpoint import open_checkpoint

    assert inspect(open_checkpoint(tmp_path / "out"))["original_layers"] == 12


def test_a_count_that_was_meant_as_a_percentage(tmp_path, cli):
    for args in (
        ["convert", SHIPPED, tmp_path / "out", "--drop", "33"],
        ["select", SHIPPED, "-o", tmp_path / "plan", "--drop", "33"],
        ["sweep", SHIPPED, "-o", tmp_path / "out", "--text", TEXT, "--fractions", "33"],
    ):
        assert "did you mean 33%?" in cli(*args, check=2).stderr
    assert "did you mean" not in cli("convert", SHIPPED, tmp_path / "out", "--drop", "101", check=2).stderr
    with pytest.raises(PruneAttnError, match=r"did you mean 13%\?"):
        convert(SHIPPED, tmp_path / "out", SavedPlan(convert(SHIPPED, tmp_path / "a", 4).plan, 13))


def test_a_plan_from_python(tmp_path, make_llama):
    result = convert(SHIPPED, tmp_path / "a", 4)
    again = convert(SHIPPED, tmp_path / "b", SavedPlan(result.plan))
    assert again.plan == result.plan
    assert verify(tmp_path / "b", SHIPPED)
    cut = convert(SHIPPED, tmp_path / "c", SavedPlan(result.plan, 2))
    assert set(cut.plan.attention) == set(result.plan.order[:2])
    chosen = select(
        SHIPPED,
        2,
        output=tmp_path / "plan.json",
        calibration=Calibration(TEXT, samples=2, length=16, strategy="similarity"),
    )
    convert(SHIPPED, tmp_path / "d", chosen.plan)
    with pytest.raises(PruneAttnError, match="made for another model"):
        convert(make_llama(num_hidden_layers=12), tmp_path / "e", SavedPlan(chosen.plan))


def test_a_verification_is_true_where_all_is_well(tmp_path):
    convert(SHIPPED, tmp_path / "out", 4)
    assert bool(verify(tmp_path / "out")) is True
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert bool(verify(tmp_path / "out")) is False


def test_run_as_a_module(tmp_path):
    run = [sys.executable, "-m", "prune_attn"]
    assert "Usage: prune-attn" in subprocess.run([*run, "--help"], **PIPES).stdout
    assert subprocess.run([*run, "inspect", tmp_path / "none"], **PIPES).returncode == 2


def test_types_are_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("pruner", "export"):
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in settings["package-data"][package]


def test_hints_name_no_package_that_is_on_no_index():
    for file in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("pruner/**/*.py"),
        *ROOT.glob("export/**/*"),
    ):
        if file.suffix in (".py", ".md", ".j2"):
            for line in file.read_text().splitlines():
                assert "prune-attn" not in line.partition("pip install")[2].partition(";")[0].partition(" in ")[0], line
