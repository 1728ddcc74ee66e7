"""Threads: how many, who takes them, where they are recorded, and what of an earlier run counts with others."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import SHIPPED, TEXT, asked, invoke, run_program, swept
from programs import threads as taken

from export.generate import generate
from export.select import select
from export.sweep.job import sweep
from export.validate.run import validate
from prune_attn import Compute, Latency, WriteOptions, convert
from pruner import machine
from pruner.errors import PruneAttnError


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    convert(SHIPPED, out, 4, options=WriteOptions(dtype="float32"))
    return out


def test_default_is_what_the_affinity_leaves():
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    cpus = sorted(os.sched_getaffinity(0))

    def run(count, **more):
        return run_program(taken, json.dumps(cpus[:count]), env=env | more)

    assert run(1) == "1 1\n"
    if len(cpus) > 1:
        assert run(2) in ("2 2\n", "1 1\n")  # 1 where the two are one core's
        assert run(2, OMP_NUM_THREADS="1") == "1 1\n"


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/pod/box", {"pod/box/cpu.max": "150000 100000"}, 1.5),
        ("0::/pod/box", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),  # the parent's
        ("0::/gone/elsewhere", {"cpu.max": "200000 100000"}, 2),  # a container that sees its own group as the root
        ("0::/", {"cpu.max": "max 100000"}, np.inf),
        ("0::/", {"cpu.max": "nonsense"}, np.inf),
        ("4:cpu,cpuacct:/box", {"cpu,cpuacct/box/cpu.cfs_quota_us": "50000",
                                "cpu,cpuacct/box/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/box\n3:memory:/box", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/box", {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, np.inf),
        ("4:cpuset:/", {"cpuset/cpu.max": "100000 100000"}, np.inf),
    ],
)  # fmt: skip
def test_quotas_of_control_groups(tmp_path, monkeypatch, group, files, cores):
    (tmp_path / "cgroup").write_text(group + "\n")
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    found = machine.cpu_quota(tmp_path / "cgroup", tmp_path / "fs")
    assert found == cores
    monkeypatch.setattr(machine, "cpu_quota", lambda: found)
    monkeypatch.setattr(machine, "cpu_cores", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.threads() == max(1, int(min(cores, 64)))


def test_afterwards_all_is_as_it_was():
    before = torch.get_num_threads(), machine.threads()
    with machine.computing(3) as count:
        assert (count, torch.get_num_threads(), machine.threads()) == (3, 3, 3)
    assert (torch.get_num_threads(), machine.threads()) == before
    for wrong in (0, -1, 10**6):
        with pytest.raises(PruneAttnError, match=f"--threads {wrong}: must be 1 to"), machine.computing(wrong):
            pass


def test_pytorch_and_onnx_runtime_take_them(pruned, monkeypatch):
    import onnxruntime

    seen, real = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, **rest: seen.append(options.intra_op_num_threads) or real(path, options, **rest),
    )
    assert generate(pruned, "It was", new_tokens=2, threads=3).threads == 3
    assert seen == [3]
    from pruner.model import TorchLanguageModel

    prefill = TorchLanguageModel.prefill
    monkeypatch.setattr(
        TorchLanguageModel, "prefill", lambda self, ids: seen.append(torch.get_num_threads()) or prefill(self, ids)
    )
    assert generate(pruned, "It was", new_tokens=2, backend="torch", threads=2).threads == 2
    assert seen == [3, 2]


def test_files_of_results_say_how_many(pruned, tmp_path):
    def said(*args: object) -> str:
        done = invoke(*args, "--threads", 2)
        assert done.exception is None, done.output
        return done.stdout

    small = ["--strategy", "similarity", "--samples", "2", "--length", "16"]
    said("select", SHIPPED, "--drop", "4", "--text", TEXT, "-o", tmp_path / "plan.json", *small)
    assert json.loads((tmp_path / "plan.json").read_text())["selection"]["calibration"]["threads"] == 2
    args = ["--text", TEXT, "--fractions", "4", "--strategy", "last", "--limit", "1", "--rounds", "0"]
    said("sweep", SHIPPED, "-o", tmp_path / "swept", *args)
    assert json.loads((tmp_path / "swept" / "sweep.json").read_text())["setting"]["threads"] == 2
    said("validate", SHIPPED, pruned, "--only", "same-function", "--backend", "torch", "-o", tmp_path / "report")
    assert json.loads((tmp_path / "report" / "results.json").read_text())["environment"]["threads"] == 2
    assert json.loads(said("generate", pruned, "--prompt", "It", "--new-tokens", "1", "--json"))["threads"] == 2
    done = invoke("convert", SHIPPED, tmp_path / "out", "--drop", "4", "--threads", "2")
    assert isinstance(done.exception, PruneAttnError)
    assert "--threads is for choosing by a text" in str(done.exception)


def stopped(work, monkeypatch, module, name):
    """Run ``work``, stopped at the second call of ``module.name``."""
    calls, real = [], getattr(module, name)

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, once)
        with pytest.raises(KeyboardInterrupt):
            work()


def test_validate_takes_nothing_from_a_run_with_other_threads(pruned, tmp_path, monkeypatch, no_footprint):
    from pruner.evaluate import latency

    def run(threads):
        short = Latency(batches="1", prompts="16,32", new_tokens=2, repeats=3, seconds=0, compiled=False)
        compute = Compute("torch", dtype="float32", threads=threads)
        return validate(
            SHIPPED, pruned, tmp_path / "report", latency=short, same_function=False, compute=compute
        ).results

    stopped(lambda: run(1), monkeypatch, latency, "run_in_turn")
    assert any("earlier run" in note for note in run(1)["notes"])
    stopped(lambda: run(1), monkeypatch, latency, "run_in_turn")
    assert not any("earlier run" in note for note in run(2)["notes"])


def test_select_refuses_to_go_on_with_other_threads(tmp_path, monkeypatch):
    from pruner.select import calibrated as job

    def run(threads, resume=False, **more):
        options = {"text": TEXT, "samples": 2, "length": 16, "threads": threads, "resume": resume} | more
        return select(SHIPPED, output=tmp_path / "plan.json", **asked(drop=2, **options))

    with monkeypatch.context() as patch:
        patch.setattr(job, "extend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(1)
    with pytest.raises(PruneAttnError, match="another number of threads"):
        run(2, resume=True)
    for name, other, says in (
        ("cpu_name", lambda: "abacus", "processor"),
        ("package_version", lambda name: "0" if name == "torch" else None, "version of torch"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(machine, name, other)
            with pytest.raises(PruneAttnError, match=f"another {says}"):
                run(1, resume=True)
    assert run(1, resume=True).plan.selection["calibration"]["threads"] == 1


def test_sweep_refuses_to_go_on_with_other_threads(tmp_path, monkeypatch):
    from pruner.evaluate import perplexity

    def run(threads):
        return sweep(SHIPPED, tmp_path / "out", **swept(
            text=TEXT, fractions="2", strategy="last", window=64, limit=2, rounds=0, threads=threads))  # fmt: skip

    stopped(lambda: run(1), monkeypatch, perplexity, "score")
    with pytest.raises(PruneAttnError, match="another number of threads"):
        run(2)


def test_a_busy_machine_is_told(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.4, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert "the load is 1000.4 on 8 cores" in machine.busy()
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0, 1000.0, 1000.0))
    assert machine.busy() is None
