"""Long work says where it is, in one shape, and what it kept when it was stopped."""

import json
import os
import pty
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from conftest import SHIPPED, TEXT, asked, start_cli, swept

from export.cli import bars
from export.select import select
from export.sweep.job import sweep
from export.validate.run import validate
from prune_attn import Compute, Latency, WriteOptions, convert
from pruner.progress import Stages, Step, keeping

SMALL = {"text": TEXT, "samples": 8, "length": 16}
QUICK = {
    "latency": Latency(batches="1", prompts="16", new_tokens=2, repeats=3, seconds=0, compiled=False),
    "compute": Compute(backends="torch", dtype="float32"),
}
QUICKLY = ["--only=same-function,latency", "--backend=torch", "--dtype=float32", "--batch=1", "--prompt=16"]
QUICKLY += ["--new-tokens=2", "--repeats=3", "--seconds=0"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    convert(SHIPPED, out, 4, options=WriteOptions(dtype="float32"))
    return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The original as the pruned one was converted."""
    from prune_attn import export

    out = tmp_path_factory.mktemp("wide") / "out"
    export(SHIPPED, out, options=WriteOptions(dtype="float32"))
    return out


class Seen(list):
    """A progress that remembers, and stops the work where ``when`` says so."""

    def __init__(self, when=lambda step: False):
        self.when = when

    def __call__(self, step):
        assert type(step) is Step
        if step.total:
            self.append(step)
            assert 0 <= step.done <= step.total * (1 + 1e-9)
        if self.when(step):
            raise KeyboardInterrupt

    def whats(self):
        return list(dict.fromkeys(step.what for step in self))


def test_lines_at_the_start_at_each_step_and_every_half_minute(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bars, "say", lambda line, err: said.append(line))
    lines = bars.Lines()
    at = {"total": 10.0, "unit": "layers", "seconds": 1080}
    lines(Step("choosing", 0, **at))
    assert said == ["choosing: 10 layers, about 18 min"]
    for now[0], done, status in ((1, 1, "a"), (3, 1, "b"), (4, 1, "c"), (32, 2, "c"), (34, 2, "c"), (50, 3, "c")):
        lines(Step("choosing", done, status=status, **at))
    assert said[1:] == [
        "choosing: 10% of 10 layers; b; about 27 s left",
        "choosing: 20% of 10 layers; c; about 2 min left",
    ]
    now[0] = 70
    ends = iter((False, True))
    lines.tick_until(SimpleNamespace(wait=lambda _: next(ends)))  # nothing was heard of it for long
    assert said[3:] == ["choosing: 30% of 10 layers; c; about 3 min left"]
    lines(Step("a note"))
    lines(Step("writing", 0, 5e6, "bytes", seconds=1))
    lines(Step("writing", 5e6, 5e6, "bytes", seconds=1))
    lines(Step("fetching", 0, 13_476_000_000, "bytes", "meta/llama", 270))
    assert said[4:] == ["a note", "fetching: 13.48 GB, meta/llama, about 4 min"]


def test_stages_are_one_whole():
    seen = Seen()
    stages = Stages("validating", {"a": 1.0, "b": 3.0, "c": 4.0}, seen)
    with stages.stage("a", "first") as inside:
        inside(Step("whatever", 1, 2))
    stages.skip("b")
    with stages.stage("c", "last") as inside:
        inside(Step("whatever", 3, 4, status="nearly"))
    assert seen.whats() == ["validating"]
    assert [(step.done, step.total, step.status) for step in seen] == [
        (0, 8, "3 parts"), (0, 8, "first"), (0.5, 8, "first"), (1, 8, "first"),
        (1, 5, "last"), (4, 5, "last, nearly"), (5, 5, "last"),
    ]  # fmt: skip


def test_the_passes_of_select_have_their_names(tmp_path):
    seen = Seen()
    select(SHIPPED, output=tmp_path / "plan.json", progress=seen, **asked(drop=2, **SMALL))
    assert seen.whats() == ["running the original", "choosing"]
    assert seen[0].done == 0
    assert seen[0].total == 12  # layers
    choosing = [step for step in seen if step.what == "choosing"]
    assert choosing[0].seconds > 0
    assert choosing[-1].done == choosing[-1].total


def test_validate_has_one_progress(pruned, wide, tmp_path, no_footprint):
    seen = Seen()
    validate(wide, pruned, tmp_path / "report", progress=seen, **QUICK)
    assert seen.whats() == ["validating"]
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == pytest.approx(seen[-1].total)
    assert {"comparing the tensors", "timing, torch, 1 x 16"} <= {step.status for step in seen}


def notes(work):
    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    return "; ".join(caught.value.__notes__)


def test_what_a_stopped_select_kept(tmp_path):
    plan, partial = tmp_path / "plan.json", tmp_path / "plan.partial.json"
    first = Seen(lambda step: step.what == "running the original" and step.done > 3)
    assert notes(lambda: select(SHIPPED, output=plan, progress=first, **asked(drop=2, **SMALL))) == "nothing was kept"
    assert not partial.exists()
    later = Seen(lambda step: step.status.startswith("1 dropped"))
    told = notes(lambda: select(SHIPPED, output=plan, progress=later, **asked(drop=2, **SMALL)))
    assert told == f"what was computed is kept in {partial}; --resume goes on from there"
    kept = json.loads(partial.read_text())["known"]
    assert len(kept) > 2
    whole = select(SHIPPED, output=tmp_path / "other.json", **asked(drop=2, **SMALL))
    assert select(SHIPPED, output=plan, **asked(drop=2, resume=True, **SMALL)).plan == whole.plan


def test_what_a_stopped_convert_kept(tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.plan.partial.json"
    writing = Seen(lambda step: step.what == "writing")
    told = notes(lambda: convert(SHIPPED, out, progress=writing, **asked(drop=2, **SMALL)))
    assert f"kept in {partial}" in told
    assert partial.exists()
    assert not out.exists()
    dry = Seen(lambda step: step.status.startswith("1 dropped"))
    told = notes(lambda: convert(SHIPPED, tmp_path / "dry", dry_run=True, progress=dry, **asked(drop=2, **SMALL)))
    assert told == "nothing was kept"
    convert(SHIPPED, out, **asked(drop=2, resume=True, **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_stopped_validate_kept(pruned, wide, tmp_path, no_footprint):
    report = tmp_path / "report"
    timing = Seen(lambda step: step.status == "timing, torch, 1 x 16")
    told = notes(lambda: validate(wide, pruned, report, progress=timing, **QUICK))
    files = list((report / "unfinished").glob("*.json"))
    assert (
        told == f"{len(files)} finished parts are kept in {report / 'unfinished'}; the same command goes on from there"
    )
    assert len(files) > 5
    rest = Seen()
    validate(wide, pruned, report, progress=rest, **QUICK)
    assert not any(step.status.startswith("comparing") for step in rest)
    assert rest[-1].done == pytest.approx(rest[-1].total)
    start = Seen(lambda step: step.status == "hashing the original")
    assert notes(lambda: validate(wide, pruned, tmp_path / "b", progress=start, **QUICK)).startswith("nothing was")
    assert not (tmp_path / "b").exists()


def test_what_a_stopped_sweep_kept(tmp_path):
    options = {"text": TEXT, "fractions": "2,4", "strategy": "last", "window": 32, "limit": 2, "rounds": 0}
    second = Seen(lambda step: step.status == "perplexity, 2 of 3")
    told = notes(lambda: sweep(SHIPPED, tmp_path / "out", progress=second, **swept(**options)))
    assert told == f"what is finished is kept in {tmp_path / 'out.partial'}; the same command goes on from there"
    assert len(json.loads((tmp_path / "out.partial" / "progress.json").read_text())["perplexity"]) == 1
    rest = Seen()
    sweep(SHIPPED, tmp_path / "out", progress=rest, **swept(**options))
    assert rest.whats() == ["measuring"]


def test_errors_get_no_note():
    with pytest.raises(OSError, match="full") as caught, keeping(lambda: "kept"):
        raise OSError("full")
    assert not hasattr(caught.value, "__notes__")


def test_in_a_pipe(pruned, wide, tmp_path, cli):
    options = ["--only=same-function", "--backend=torch", "--dtype=float32"]
    run = ["validate", wide, pruned, "-o", tmp_path / "report", "--json", *options]
    done = cli(*run, check=0)
    assert json.loads(done.stdout)["format"]
    assert done.stderr.startswith("validating: ")
    assert " parts, about " in done.stderr.splitlines()[0]
    done = cli(*run, "--quiet", check=0)
    assert json.loads(done.stdout)["format"]
    assert done.stderr == ""


def test_on_a_terminal(tmp_path):
    parent, child = pty.openpty()
    options = ["--text", TEXT, "--samples", "8", "--length", "16", "--json", "-o", tmp_path / "plan.json"]
    done = start_cli("select", SHIPPED, "--drop", "2", *options, stderr=child, env={**os.environ, "TERM": "xterm"})
    os.close(child)
    shown = b""
    try:
        while part := os.read(parent, 65536):
            shown += part
    except OSError:  # how Linux tells that the other side is closed
        pass
    assert json.loads(done.communicate()[0])["plan"]
    assert done.returncode == 0
    assert "choosing" in shown.decode()
    assert "━" in shown.decode()


def test_nobody_reads(cli, tmp_path):
    """A reader of standard error that goes away (head -1) does not stop the work."""
    read, write = os.pipe()
    os.close(read)
    options = ["--text", TEXT, "--samples", "8", "--length", "16", "-o", tmp_path / "plan.json"]
    cli("select", SHIPPED, "--drop", "2", *options, stderr=write, check=0)
    os.close(write)
    assert (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_tells_what_was_kept(pruned, wide, tmp_path, signum):
    report = tmp_path / "report"
    run = ["validate", wide, pruned, "-o", report, *QUICKLY, "--prompt=16,32,48,64"]
    process = start_cli(*run, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(report.glob("unfinished/*.json"))) < 3:
        time.sleep(0.01)
    process.send_signal(signum)
    last = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 128 + signum
    count = len(list(report.glob("unfinished/*.json")))
    assert count >= 3
    told = f"{count} finished parts are kept in {report / 'unfinished'}; the same command goes on from there"
    assert last == f"prune-attn: stopped by {signal.Signals(signum).name}; nothing half written is left; {told}"
