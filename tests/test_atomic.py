"""An output appears whole or not at all: kills at any moment, full disks, and what they leave behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SHIPPED, run_program, start_cli, tree
from programs import convert_and_verify
from safetensors.numpy import save_file

from export import shards as safetensors
from export import staging
from prune_attn import WriteOptions, convert, verify
from pruner import MachineError, PruneAttnError, open_checkpoint
from pruner.checkpoint.config import read_decoder
from pruner.progress import Step


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 MB in 3 shards, so that a kill lands in the middle of the copying."""
    directory = tmp_path_factory.mktemp("big")
    config = json.loads((SHIPPED / "config.json").read_text())
    config |= {"hidden_size": 1024, "head_dim": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config |= {"intermediate_size": 2816, "vocab_size": 1000, "num_hidden_layers": 10}
    (directory / "config.json").write_text(json.dumps(config))

    rng = np.random.default_rng(0)
    names = read_decoder(config, directory).tensors()
    shards: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for i, (name, shape) in enumerate(names.items()):
        shards[i * 3 // len(names)][name] = rng.integers(0, 1 << 15, shape, dtype=np.uint16).view(np.float16)
    files = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, directory / file, metadata={"format": "pt"})
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


@pytest.mark.parametrize("existing", [False, True])
def test_kills_at_many_moments(cli, big, tmp_path, existing):
    out = tmp_path / "out"
    command = ["convert", big, out, "--drop", "3", "--overwrite", "--max-shard-size", "50MB"]
    started = time.monotonic()
    cli(*command, check=0)
    takes = time.monotonic() - started
    new = tree(out)
    if existing:
        convert(big, out, 1, options=WriteOptions(overwrite=True))
    old = tree(out) if existing else None
    shutil.rmtree(out) if not existing else None
    rng, unfinished = random.Random(existing), 0
    for i in range(15):
        process, started = start_cli(*command), time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(takes * (0.3 + 0.8 * rng.random()))
            takes = time.monotonic() - started  # the machine is less busy now
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3]
        process.send_signal(how)
        _, stderr = process.communicate()
        assert "Traceback" not in stderr
        if not out.exists():
            assert not existing
            unfinished += 1
        elif (now := tree(out)) == new:
            if existing:  # put the old one back for the next round
                convert(big, out, 1, options=WriteOptions(overwrite=True))
                assert tree(out) == old
            else:
                shutil.rmtree(out)
        else:
            assert now == old
            unfinished += 1
        if how != signal.SIGKILL:
            assert process.returncode in (0, 128 + how, -how)
            assert [p.name for p in tmp_path.iterdir() if p.name != "out" and i == 0] == []
    assert unfinished > 2  # else nothing was tested
    convert(big, out, 3, options=WriteOptions(overwrite=True, max_shard_size="50MB"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # what the kills left is gone
    assert verify(out, big).ok


@pytest.mark.parametrize("existing", [False, True])
def test_every_sync_that_fails_leaves_the_old_or_the_new(tmp_path, monkeypatch, existing):
    """Fail the n-th sync, for every n, as a full disk does; the last one comes when the output is in its place."""
    out, real = tmp_path / "out", os.fsync
    convert(SHIPPED, out, 4)
    new = tree(out)
    shutil.rmtree(out)
    if existing:
        convert(SHIPPED, out, 1)
    old, outcomes = tree(tmp_path), []
    while not outcomes or outcomes[-1] != "new":
        calls = 0

        def failing(fd: int) -> None:
            nonlocal calls
            calls += 1
            if calls == len(outcomes) + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd)

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises((MachineError, OSError)):
            convert(SHIPPED, out, 4, options=WriteOptions(overwrite=True))
        outcomes.append("old" if tree(tmp_path) == old else "new")
    assert tree(out) == new
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(outcomes) > 8


def test_a_full_disk_is_known_before_writing(tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(MachineError, match="1,000 free") as error:
        convert(SHIPPED, tmp_path / "deep" / "out", 4)
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_told_clearly(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(MachineError, match=r"model\.safetensors.*disk is full"):
        convert(SHIPPED, tmp_path / "deep" / "out", 4)
    assert list(tmp_path.iterdir()) == []


def test_without_the_kernels_help(tmp_path, monkeypatch):
    """Other file systems: no copy_file_range, no reservation, no exchange."""
    convert(SHIPPED, tmp_path / "a", 4)

    def unsupported(*args):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", unsupported)
    monkeypatch.setattr(safetensors, "reserve", lambda *args: False)
    monkeypatch.setattr(staging, "exchange", lambda *args: False)
    convert(SHIPPED, tmp_path / "b", 2)
    convert(SHIPPED, tmp_path / "b", 4, options=WriteOptions(overwrite=True))
    assert tree(tmp_path / "b") == tree(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_exchange_cut_short_is_put_back(tmp_path):
    """Where the file system cannot exchange, a kill between two renames leaves the old output under another name."""
    convert(SHIPPED, tmp_path / "out", 4)
    old = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.prune-attn-old-0123456789ab")
    convert(SHIPPED, tmp_path / "other", 1)
    assert tree(tmp_path / "out") == old


def test_only_our_own_leftovers_are_removed(tmp_path):
    stale = tmp_path / ".gone.prune-attn-new-0123456789ab"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    kept = [".out.prune-attn-new", ".out.prune-attn-new-0123456789ab.txt", "x.prune-attn-new-0123456789ab", ".hidden"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".link.prune-attn-new-0123456789ab").symlink_to(tmp_path / ".hidden")
    alive = tmp_path / ".alive.prune-attn-new-0123456789ab"
    alive.mkdir()
    holder = os.open(alive, os.O_RDONLY)  # another open of the same folder, so its lock is another's
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        convert(SHIPPED, tmp_path / "out", 4)
        left = {p.name for p in tmp_path.iterdir()}
        assert left == {*kept, "out", alive.name, ".link.prune-attn-new-0123456789ab"}
    finally:
        os.close(holder)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(SHIPPED, source)
    file = source / "model.safetensors"

    def touch(step: Step) -> None:
        os.utime(file, (1, 1))

    with pytest.raises(PruneAttnError, match="changed while it was read"):
        convert(source, tmp_path / "out", 4, progress=touch)
    with pytest.raises(PruneAttnError, match="ended while it was read"):
        convert(source, tmp_path / "out", 4, progress=lambda step: os.truncate(file, 20_000))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_place_that_cannot_be_written_is_the_machines_failure(cli):
    done = cli("convert", SHIPPED, "/proc/out", "--drop", "4", check=1)
    assert done.stderr.startswith("prune-attn: /proc")
    assert len(done.stderr.splitlines()) == 1


def test_streaming_memory_and_imports(big, tmp_path):
    """At most 250 MB for the whole process, and no torch, whatever the size; a conversion holds a piece at a time."""
    for dtype in ("", "float32"):
        out = tmp_path / f"out-{dtype}"
        megabytes, torch = run_program(convert_and_verify, big, out, dtype).split()
        if not dtype:
            assert int(megabytes) < 100
            assert torch == "False"
    assert open_checkpoint(out).dtypes == ("F32",)


@pytest.mark.parametrize("existing", [False, True])
def test_what_appears_meanwhile_is_not_replaced(tmp_path, existing):
    """A conversion takes minutes; whoever puts files at OUTPUT meanwhile keeps them."""
    out = tmp_path / "out"
    if existing:
        convert(SHIPPED, out, 1)

    def somebody(step: Step) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("years of work")

    with pytest.raises(PruneAttnError, match="appeared while this ran"):
        convert(SHIPPED, out, 4, progress=somebody, options=WriteOptions(overwrite=existing))
    assert (out / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_is_one_line_or_silence(tmp_path):
    """Also while modules load; by the console script, as a person runs it."""
    script = Path(sys.executable).parent / "prune-attn"
    for i in range(12):
        process = subprocess.Popen(
            [script, "convert", SHIPPED, tmp_path / "out", "--drop", "4", "--overwrite"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(0.06 + 0.02 * i)  # before that, Python itself is still starting
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert "Traceback" not in stderr
        assert len(stderr.splitlines()) <= 1
        assert process.returncode in (0, 130, -signal.SIGINT)
