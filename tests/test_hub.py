"""Hub ids as sources, and push, against a real HTTP server on loopback that speaks the Hub's protocol."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SHIPPED, run_cli, run_program, start_cli, tree
from hub_server import Fault, HubServer, Repo, sha256
from programs import convert_and_push, download, fetch

from export.generate import generate
from prune_attn import Revision, convert
from pruner import PruneAttnError
from pruner.hub.source import is_hub_id

TOKEN = "hf_writerWRITERwriter"
FILES = {file.name: file.read_bytes() for file in SHIPPED.iterdir()}
WEIGHTS = len(FILES["model.safetensors"])
CDN = f"/cdn/{sha256(FILES['model.safetensors'])}"
CARD = b"---\nlicense: llama2\nlanguage:\n- en\nmodel-index: x\n---\n# A model\n"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("own/llama-2-5m", FILES | {"README.md": CARD, "LICENSE.txt": b"LLAMA 2 COMMUNITY LICENSE AGREEMENT"})
        yield server


@pytest.fixture
def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """A user with a token in the environment, an empty home and cache, and this Hub."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return clean | mine


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """The command in ``tmp_path``; a keyword sets a variable of its environment, or takes it away (``None``).

    Whatever it prints is without the token, and one line where it fails.
    """

    def run(*args: object, check: int = 0, **changes: str | None) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in (environment | changes).items() if value is not None}
        done = run_cli(*args, check=check, env=env, cwd=tmp_path)
        assert env.get("HF_TOKEN", TOKEN) not in done.stdout + done.stderr
        if "PRUNE_ATTN_DEBUG" not in env:
            assert len(done.stderr.splitlines()) == (check != 0)
        return done

    return run


def nothing_half_made(place: Path) -> bool:
    """No output, nothing staged, nothing half fetched."""
    left = [p.name for p in place.rglob("*")]
    return not any(name == "out" or "prune-attn-" in name or name.endswith(".incomplete") for name in left)


def fetched(hub: HubServer, repo_id: str) -> set[str]:
    """Names of the files that were asked for: each by a HEAD first."""
    paths = [seen.path for seen in hub.log if seen.method == "HEAD" and seen.path.startswith(f"/{repo_id}/resolve/")]
    return {path.split("/", 5)[5] for path in paths}


# -- there and back ----------------------------------------------------------------------------------------------------


def test_round_trip(hub, run, environment, tmp_path):
    commit = hub.repos["own/llama-2-5m"].branches["main"]
    run("convert", "own/llama-2-5m", "out", "--drop", "33%", "--max-shard-size", "4MB", "--dtype", "float32")
    out = tmp_path / "out"
    source = json.loads((out / "pruning_plan.json").read_text())["source"]
    assert source["hub"] == {"repo_id": "own/llama-2-5m", "commit": commit}
    assert "91 tensors equal own/llama-2-5m's" in run("verify", "out", "--against", "own/llama-2-5m").stdout
    listed = run("push", "out", "user/llama-2-attn33", "--dry-run").stdout
    assert hub.count("POST .*") == 0
    pushed = run("push", "out", "user/llama-2-attn33").stdout
    repo = hub.repos["user/llama-2-attn33"]
    assert pushed.strip() == f"pushed: {hub.url}/user/llama-2-attn33/commit/{repo.branches['main']}"
    there = repo.commits[repo.branches["main"]]
    assert {name: data for name, data in there.items() if name != ".gitattributes"} == tree(out)
    assert all(name in listed for name in tree(out))
    assert sum(name.endswith(".safetensors") for name in there) > 3

    def pull(**options: str) -> Path:
        return Path(run_program(download, "user/llama-2-attn33", json.dumps(options), env=environment).strip())

    snapshot = pull(cache_dir=str(tmp_path / "cache"))
    assert all(file.is_symlink() for file in snapshot.iterdir())
    assert {k: v for k, v in tree(snapshot).items() if k != ".gitattributes"} == tree(out)
    run("verify", snapshot)  # .gitattributes and all
    # as `hf download --local-dir` lays it out
    pull(local_dir=str(tmp_path / "local"))
    assert (tmp_path / "local" / ".gitattributes").is_file()
    assert (tmp_path / "local" / ".cache" / "huggingface").is_dir()
    run("verify", "local")
    run("push", "local", "user/llama-2-again")
    assert set(tree(out)) == files(hub.repos["user/llama-2-again"])
    run("convert", "own/llama-2-5m", "local", "--drop", "1", "--overwrite")
    (tmp_path / "local" / ".cache").mkdir()
    (tmp_path / "local" / ".cache" / "mine").write_text("x")
    (tmp_path / "out" / ".git").mkdir()
    run("verify", "out")
    for place, why in (("local", ".cache/mine, which prune-attn did not write"), ("out", "is a git clone")):
        done = run("convert", "own/llama-2-5m", place, "--drop", "1", "--overwrite", check=2)
        assert why in done.stderr
    (tmp_path / "out" / ".git").rmdir()

    import numpy as np
    import onnxruntime as ort
    import oracle
    import torch

    ids = oracle.ids(1, 20, 4096)
    expected = oracle.logits(oracle.original(SHIPPED, [8, 9, 10, 11]), ids)
    assert torch.equal(oracle.logits(oracle.pruned(snapshot), ids), expected)
    session = ort.InferenceSession(snapshot / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 20), np.int64)}
    feed |= {cache.name: np.zeros((1, 5, 0, 32), np.float32) for cache in session.get_inputs()[2:]}
    assert np.abs(session.run(["logits"], feed)[0] - expected.numpy()).max() < 1e-3
    # whatever was written anywhere, the token is not in it
    assert [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()] == []


def test_verify_takes_hub_ids_on_both_sides(hub, run, out):
    first = hub.add("own/plain", FILES).branches["main"]
    hub.repos["own/plain"].commit("main", FILES | {"config.json": b"{}"})
    run("push", "out", "user/pruned")
    repo = hub.repos["user/pruned"]
    sides = ("verify", "user/pruned", "--against", "own/plain", "--revision", first)
    assert "91 tensors equal own/plain's" in run(*sides).stdout
    assert run("verify", "user/pruned", "--cache-dir", "cache").stdout == "user/pruned: ok\n"
    assert run("verify", "user/pruned", HF_HUB_OFFLINE="1").stdout == "user/pruned: ok\n"
    good = repo.commits[repo.branches["main"]]
    shard = bytearray(good["model.safetensors"])
    shard[-1] ^= 1
    for files, found in (
        ({"model.safetensors": bytes(shard)}, "is not the source's"),
        ({"model.safetensors": bytes(shard[:-1])}, "is truncated"),
        ({"modeling_pruned_llama.py": b"import os"}, "modeling_pruned_llama.py: is not what was written"),
        ({"evil.py": b"", "pytorch_model.bin": b""}, "evil.py on the Hub was not written by prune-attn"),
        ({"pruning_plan.json": b"{}"}, "missing or not prune-attn's"),
    ):
        repo.commit("main", good | files)
        hub.log.clear()
        done = run("verify", *sides[1:], PRUNE_ATTN_DEBUG="1", check=1)
        assert found in done.stderr.splitlines()[0]
        assert not fetched(hub, "user/pruned") & {"evil.py", "pytorch_model.bin"}
    repo.commit("fixed", good)
    run(*sides, "--output-revision", "fixed")
    assert "--output-revision" in run("verify", "user/pruned", "--revision", "fixed", check=2).stderr
    assert "user/none" in run("verify", "user/none", check=2).stderr
    assert "--cache-dir" in run("verify", "out", "--cache-dir", "cache", check=2).stderr


def test_what_a_killed_card_left_is_cleared(hub, run, out):
    left = out / ".README.md.prune-attn-new-0123456789ab"
    left.write_text("half")
    run("verify", "out")
    run("push", "out", "user/pruned", "--dry-run")
    assert left.exists()  # nothing is written there
    run("push", "out", "user/pruned")
    assert not left.exists()
    assert files(hub.repos["user/pruned"]) == set(tree(out))
    left.write_text("half")
    run("convert", "own/llama-2-5m", "out", "--drop", "1", "--overwrite")
    assert not left.exists()


def test_push_that_is_killed_goes_on(hub, run, environment, tmp_path):
    convert(SHIPPED, tmp_path / "out", 4)
    large = sha256((tmp_path / "out" / "model.safetensors").read_bytes())
    for how in (signal.SIGTERM, signal.SIGKILL):
        hub.faults = [Fault(f"PUT /lfs/{large}/2", stall=1_000_000, times=9)]
        process = start_cli("push", "out", "user/pruned", env=environment, cwd=tmp_path)
        while hub.count(f"PUT /lfs/{large}/2") == 0 or len(hub.objects) < 1:  # the other file is there
            time.sleep(0.02)
        started = time.monotonic()
        process.send_signal(how)
        process.communicate()
        assert time.monotonic() - started < 5
        assert process.returncode in (-how, 128 + how)
        hub.faults[0].go.set()
        assert list(hub.repos["user/pruned"].commits[hub.repos["user/pruned"].branches["main"]]) == [".gitattributes"]
        if how == signal.SIGTERM:
            hub.log.clear()
    before = len(hub.log)
    run("push", "out", "user/pruned")
    again = [seen for seen in hub.log[before:] if seen.method == "PUT"]
    assert {seen.path for seen in again} == {f"/lfs/{large}/{part}" for part in (1, 2, 3, 4)}
    before, repo = len(hub.log), hub.repos["user/pruned"]
    told = json.loads(run("push", "out", "user/pruned", "--json").stdout)
    assert not any(seen.method == "PUT" or "/commit/" in seen.path for seen in hub.log[before:])
    assert told["commit"] == repo.branches["main"]
    assert len(repo.commits) == 2


def test_select(hub, run, tmp_path):
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    words = ("--text", "text.txt", "--strategy", "similarity", "--samples", "2", "--length", "64", "-o", "plan.json")
    run("select", "own/llama-2-5m", "--drop", "3", "--quiet", *words)
    run("convert", "own/llama-2-5m", "out", "--plan", "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["source"]["hub"]["repo_id"] == "own/llama-2-5m"


def test_an_adapter_beside_full_weights(hub, run, tmp_path):
    files = {f.name: f.read_bytes() for f in SHIPPED.iterdir()} | {"adapter_config.json": b"{}"}
    hub.add("own/adapted", files)
    for words in (("inspect", "own/adapted"), ("convert", "own/adapted", "out", "--drop", "2")):
        assert "merge_and_unload" in run(*words, check=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_head_that_differs_is_seen_once_it_is_fetched(hub, run, tmp_path):
    files = {f.name: f.read_bytes() for f in SHIPPED.iterdir()}
    config = json.loads(files["config.json"]) | {"tie_word_embeddings": True}
    hub.add("own/half-tied", files | {"config.json": json.dumps(config).encode()})
    assert "tie_word_embeddings" in run("convert", "own/half-tied", "out", "--drop", "2").stdout
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    run("verify", "out", "--against", "own/half-tied")


def test_convert_and_push(hub, run, tmp_path):
    done = run("convert", "own/llama-2-5m", "out", "--drop", "4", "--push", "user/other")
    assert "pushed: " in done.stdout
    assert "note: the repository's name should say that it derives from Llama 2" in done.stdout
    assert "user/other" in hub.repos
    hub.faults = [Fault("POST .*/preupload/.*", status=403)]
    done = run("convert", SHIPPED, "again", "--drop", "4", "--push", "user/third", check=2)
    assert "again is whole, push it again with `prune-attn push again user/third`" in done.stderr
    for wrong in ("user/x y", "a/b/c"):
        run("convert", SHIPPED, "third", "--drop", "4", "--push", wrong, check=2)
    run("convert", SHIPPED, "third", "--drop", "4", "--push", "user/x", check=2, HF_TOKEN=None)
    assert not (tmp_path / "third").exists()


# -- down --------------------------------------------------------------------------------------------------------------


def test_inspect_reads_headers_only(hub, run, make_llama):
    sharded = make_llama("sharded", max_shard_size="200KB")
    hub.add("own/sharded", {f.name: f.read_bytes() for f in sharded.iterdir()})
    for repo_id, directory in (("own/llama-2-5m", SHIPPED), ("own/sharded", sharded)):
        hub.log.clear()
        told = json.loads(run("inspect", repo_id, "--json").stdout)
        here = json.loads(run("inspect", directory, "--json").stdout)
        assert told == here | {"path": repo_id}
        weights = [seen for seen in hub.log if seen.path.startswith("/cdn/")]
        assert len(weights) == len(told["shards"])
        assert all(seen.range == "bytes=0-99999" or seen.sent < 200_000 for seen in weights)
    assert sum(seen.sent for seen in weights) <= 100_000 * len(weights)


def test_only_what_is_needed_is_fetched(hub, run, environment):
    more = ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "original/params.json", "onnx/model.onnx"]
    more += ["other.safetensors", "model.safetensors.index.json", "flax_model.msgpack", "run.py", "model.onnx", "a.png"]
    hub.add("own/full", FILES | dict.fromkeys(more, b"x"))
    run("convert", "own/full", "out", "--drop", "4")
    assert fetched(hub, "own/full") == set(FILES)
    hub.log.clear()
    run("convert", "own/full", "out2", "--drop", "4")  # it is in the cache
    assert fetched(hub, "own/full") == {"config.json"}  # whether the branch has moved
    assert sum(seen.sent for seen in hub.log if seen.path.startswith("/cdn/")) == 0

    others = {k: v for k, v in FILES.items() if k != "model.safetensors"}
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "consolidated.00.pth", "x.gguf"]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    hub.add("own/bin", others | dict.fromkeys(names, b"x") | {"pytorch_model.bin.index.json": index})
    meta = {"consolidated.00.pth": b"x", "consolidated.01.pth": b"x", "params.json": b"{}", "tokenizer.model": b"x"}
    hub.add("own/meta", meta | {"checklist.chk": b"x"})
    for repo_id, expected in (
        ("own/bin", [*others, *names[:2], "pytorch_model.bin.index.json"]),
        ("own/meta", list(meta)),
    ):
        assert sorted(run_program(fetch, repo_id, env=environment).split()) == sorted(expected)
        assert "PyTorch weights" in run("inspect", repo_id, check=2).stderr
    hub.add("own/gguf", {"x.gguf": b"x", "config.json": FILES["config.json"]})
    assert "GGUF" in run("convert", "own/gguf", "out3", "--drop", "4", check=2).stderr


def test_bad_input_costs_no_download(hub, run, tmp_path):
    for options, match in (
        (["--drop", "200%"], "more than 100%"),
        (["--layers", "99"], "out of range"),
        (["--layers", "0"], "--allow-first-layer"),
    ):
        assert match in run("convert", "own/llama-2-5m", "out", *options, check=2).stderr
    run("convert", "own/llama-2-5m", "out", "--drop", "4", "--dry-run")
    mistral = json.dumps(json.loads(FILES["config.json"]) | {"architectures": ["MistralForCausalLM"]}).encode()
    hub.add("own/mistral", FILES | {"config.json": mistral})
    assert "MistralForCausalLM" in run("convert", "own/mistral", "out", "--drop", "4", check=2).stderr
    hub.add("own/cut", FILES | {"model.safetensors": FILES["model.safetensors"][:-10]})
    assert "truncated" in run("convert", "own/cut", "out", "--drop", "4", check=2).stderr
    assert sum(seen.sent for seen in hub.log) < WEIGHTS
    assert nothing_half_made(tmp_path)


@pytest.mark.parametrize(
    ("repo_id", "variables", "match"),
    [
        ("own/gated", {}, "accept its licence at https://huggingface.co/own/gated, with the account"),
        (
            "own/gated",
            {"HF_TOKEN": None},
            "accept its licence at https://huggingface.co/own/gated, then .*`hf auth login`",
        ),
        ("own/private", {"HF_TOKEN": None}, "missing or private .*`hf auth login`"),
        ("own/none", {"HF_TOKEN": "hf_readerREADERreader"}, "missing or private .*use a token that may see it"),
        ("own/llama-2-5m", {"HF_TOKEN": "hf_wrongWRONGwrongWRONG"}, "does not accept your token .*`hf auth login`"),
        ("own/llama-2-5m", {"HF_TOKEN": "hf_wröngWRONGwrong"}, "characters in it that no token has"),
        ("own/llama-2-5m", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ("nothing", {}, "nothing: there is no such directory, and on the Hub it is missing or private"),
        ("not/a/hub", {}, "no such directory"),
        ("./own/llama-2-5m", {}, "no such directory"),
    ],
)
def test_what_cannot_be_had(hub, run, tmp_path, repo_id, variables, match):
    hub.add("own/gated", FILES, gated=True)
    hub.add("own/private", FILES, private=True)
    for debug in (None, "1"):
        code = 1 if debug else 2  # a traceback's
        done = run("convert", repo_id, "out", "--drop", "4", check=code, PRUNE_ATTN_DEBUG=debug, **variables)
        assert re.search(match, done.stderr), done.stderr
    assert nothing_half_made(tmp_path)


def test_revisions(hub, run, tmp_path):
    repo = hub.repos["own/llama-2-5m"]
    old = repo.branches["main"]
    repo.commit("main", {"README.md": b"nothing here any more"})
    repo.branches["v1"] = repo.branches["refs/pr/1"] = old
    for revision in ("v1", old, "refs/pr/1"):
        done = run("convert", "own/llama-2-5m", "out", "--drop", "4", "--overwrite", "--revision", revision)
        assert f"--against own/llama-2-5m --revision {revision}" in done.stdout
    assert json.loads((tmp_path / "out" / "pruning_plan.json").read_text())["source"]["hub"]["commit"] == old
    done = run("inspect", "own/llama-2-5m", "--revision", "v2", check=2)
    assert "has no revision 'v2'" in done.stderr
    assert "weights" in run("inspect", "own/llama-2-5m", check=2).stderr
    for empty in ("--revision", "--cache-dir"):
        assert "is empty" in run("inspect", "own/llama-2-5m", empty, "", check=2).stderr
    assert "belongs to a Hub id" in run("verify", "out", "--revision", "v1", check=2).stderr
    assert "no Hub id" in run("inspect", SHIPPED, "--revision", "v1", check=2).stderr
    # a path that exists is a path
    (tmp_path / "own").mkdir()
    shutil.copytree(SHIPPED, tmp_path / "own" / "llama-2-5m")
    hub.log.clear()
    run("inspect", "own/llama-2-5m")
    assert hub.log == []


def test_offline_what_is_cached_will_do(hub, run, tmp_path):
    run("convert", "own/llama-2-5m", "out", "--drop", "4", "--cache-dir", "cache")
    (tmp_path / "out").rename(tmp_path / "first")
    hub.log.clear()
    for how in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        run("convert", "own/llama-2-5m", "out", "--drop", "4", "--cache-dir", "cache", "--overwrite", **how)
        assert tree(tmp_path / "out") == tree(tmp_path / "first")
    assert hub.log == []
    shutil.rmtree(tmp_path / "out")
    next((tmp_path / "cache").rglob("model.safetensors")).unlink()
    done = run("convert", "own/llama-2-5m", "out", "--drop", "4", "--cache-dir", "cache", check=2, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert "not whole" in done.stderr
    assert nothing_half_made(tmp_path)


def test_what_passes_by_itself(hub, run, tmp_path):
    hub.faults = [
        Fault("GET /api/models/.*", status=429, headers={"Retry-After": "1"}),
        Fault("GET /api/models/own/llama-2-5m", status=500),
        Fault("HEAD .*/tokenizer.json", status=500),
        Fault(f"GET {CDN}", status=503),
        Fault(f"GET {CDN}", times=2, cut=10_900_000),  # the header's request is whole before that, the other is not
    ]
    run("convert", "own/llama-2-5m", "out", "--drop", "4")
    assert all(fault.times == 0 for fault in hub.faults)
    run("verify", "out", "--against", SHIPPED)
    resumed = [seen.range for seen in hub.log if seen.path.startswith("/cdn/") and seen.range]
    assert "bytes=10485760-" in resumed  # from where the library last wrote, not from the beginning


def test_what_does_not_pass(environment, tmp_path):
    """Each with a Hub of its own, at once: most of the time they wait."""
    cases = [
        (Fault("GET /api/models/.*", 99, 429, {"Retry-After": "3600"}), "after 3600 seconds", 1),
        (Fault("GET /api/models/.*", 99, 503), "the Hub fails (503)", 1),
        (
            Fault("GET .*/tokenizer.json", 99, 403, body={"error": f"no, Bearer {TOKEN}"}),
            "forbids it (403: no, Bearer",
            2,
        ),
        (Fault("GET /cdn/.*", 99, cut=1000), "connection was lost", 1),
    ]
    with ExitStack() as stack:
        running = []
        for i, (fault, match, code) in enumerate(cases):
            server, place = stack.enter_context(HubServer()), tmp_path / str(i)
            server.add("own/model", FILES)
            server.faults = [fault]
            place.mkdir()
            env = environment | {"HF_ENDPOINT": server.url, "HF_HOME": str(place / "home")}
            running.append(
                (start_cli("convert", "own/model", "out", "--drop", "4", env=env, cwd=place), match, code, place)
            )
        for process, match, code, place in running:
            _, stderr = process.communicate()
            assert match in stderr
            assert len(stderr.splitlines()) == 1
            assert TOKEN not in stderr
            assert process.returncode == code
            assert nothing_half_made(place)


def test_interrupted_pull(hub, run, environment, tmp_path):
    """Ctrl-C in the middle of the weights: soon gone, nothing half made; what was whole is not fetched again."""
    # the header's request, which is whole before that, is the first
    hub.faults = [Fault(f"GET {CDN}", times=2, stall=4_000_000)]
    other = f"/cdn/{sha256(FILES['tokenizer.model'])}"
    process = start_cli("convert", "own/llama-2-5m", "out", "--drop", "4", env=environment, cwd=tmp_path)
    while not {(CDN, False), (other, True)} <= {(seen.path, seen.done) for seen in hub.log if not seen.range}:
        time.sleep(0.02)
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert stderr == "prune-attn: stopped by SIGINT; nothing half written is left\n"
    assert nothing_half_made(tmp_path)
    hub.faults[0].go.set()
    hub.faults, before = [], len(hub.log)
    run("convert", "own/llama-2-5m", "out", "--drop", "4")
    again = {seen.path.split("/")[-1] for seen in hub.log[before:] if seen.method == "HEAD"}
    assert again == {"config.json", "model.safetensors"}


def test_generate_and_export(hub, run, tmp_path):
    convert(SHIPPED, tmp_path / "first", 4)
    run("push", "first", "user/pruned")
    said = json.loads(run("generate", "user/pruned", "--device", "cpu", "--prompt", "It was", "--json").stdout)
    assert said["tokens"] == generate(tmp_path / "first", "It was", device="cpu").tokens
    assert "name an output" in run("export", "user/pruned", check=2).stderr
    run("export", "user/pruned", "exported")
    run("convert", "user/pruned", "twice", "--drop", "25%")  # of the never-pruned model's 12
    assert len(json.loads((tmp_path / "twice" / "pruning_plan.json").read_text())["attention"]) == 3


# -- up ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    convert(SHIPPED, tmp_path / "out", 4)
    return tmp_path / "out"


def files(repo: Repo, branch: str = "main") -> set[str]:
    return set(repo.commits[repo.branches[branch]]) - {".gitattributes"}


def test_only_what_prune_attn_wrote_is_pushed(hub, run, out, tmp_path):
    written = set(tree(out))
    for name in (
        "report/results.json",
        "report/plots/a.png",
        "report/.hidden",
        "report/x.tmp",
        "report/__pycache__/x.pyc",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"x")
    for name in (".cache/huggingface/x", "__pycache__/x.pyc"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_bytes(b"x")
    run("push", "out", "user/pruned", "--commit-message", "Better")
    repo = hub.repos["user/pruned"]
    assert files(repo) == written | {"report/results.json", "report/plots/a.png"}
    assert repo.messages[repo.branches["main"]] == "Better"
    # what an earlier push left and would be taken for part of this model goes; the rest of the repository stays
    stale = [
        "model-00001-of-00002.safetensors",
        "model.packed-00001-of-00001.safetensors",
    ]  # the second a plain Llama's
    repo.commit("main", repo.commits[repo.branches["main"]] | dict.fromkeys([*stale, "notes.md"], b"x"))
    shutil.rmtree(out / "report")
    done = run("push", "out", "user/pruned")
    assert files(repo) == written | {"notes.md"}
    for name in stale:
        assert f"{name}, of an earlier push, was removed there" in done.stdout


def test_what_is_not_pushed(hub, run, out, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (out / "report").mkdir()
    (out / "report" / "link").symlink_to(tmp_path / "secret")
    assert "leads out of the directory" in run("push", "out", "user/pruned", check=2).stderr
    (out / "report" / "link").unlink()
    (out / "report" / "folder").symlink_to(tmp_path)
    assert "folder: leads out of the directory" in run("push", "out", "user/pruned", check=2).stderr
    (out / "report" / "folder").unlink()
    (out / "report" / "inside").symlink_to(out / "config.json")
    run("push", "out", "user/pruned", "--dry-run")
    shutil.rmtree(out / "report")
    (out / "report").symlink_to(tmp_path)
    assert "leads out of the directory" in run("push", "out", "user/pruned", check=2).stderr
    (out / "report").unlink()
    (out / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (out / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert "tokenizer.json: leads out" in run("push", "out", "user/pruned", check=2).stderr
    (out / "tokenizer.json").unlink()
    assert "does not verify: " in run("push", "out", "user/pruned", check=2).stderr
    (tmp_path / "tokenizer.json").rename(out / "tokenizer.json")
    (out / "id_rsa").write_text("secret")
    assert "id_rsa: was not written by prune-attn" in run("push", "out", "user/pruned", check=2).stderr
    (out / "id_rsa").unlink()
    (out / "README.md").write_text("---\nlicense: [\n---\n")
    assert "README.md: its metadata" in run("push", "out", "user/pruned", check=2).stderr
    assert "pruning_plan.json" in run("push", SHIPPED, "user/pruned", check=2).stderr
    assert "no such directory" in run("push", "none", "user/pruned", check=2).stderr
    assert hub.log == []  # before anybody was asked


def test_where_to(hub, run, out):
    run("push", "out", "mine", "--private")  # the token's owner
    assert hub.repos["user/mine"].private
    hub.add("user/public", {})
    assert "is public" in run("push", "out", "user/public", "--private", check=2).stderr
    run("push", "out", "user/public", "--revision", "experiment")
    assert files(hub.repos["user/public"]) == set()
    assert "model.onnx" in files(hub.repos["user/public"], "experiment")
    hub.add("own/theirs", {"README.md": b"theirs"})
    done = run("push", "out", "own/theirs", "--create-pr")
    assert done.stdout.strip() == f"pushed: {hub.url}/own/theirs/discussions/1"
    assert "model.onnx" in files(hub.repos["own/theirs"], "refs/pr/1")
    assert files(hub.repos["own/theirs"]) == {"README.md"}
    hub.repos["user/public"].branches["refs/pr/1"] = hub.repos["user/public"].branches["main"]
    run("push", "out", "user/public", "--revision", "refs/pr/1")
    assert "model.onnx" in files(hub.repos["user/public"], "refs/pr/1")
    assert "leave --revision out" in run("push", "out", "own/theirs", "--create-pr", "--revision", "x", check=2).stderr
    assert "may write to it" in run("push", "out", "own/theirs", check=2).stderr
    assert "may write to it" in run("push", "out", "own/new", check=2).stderr
    assert "`hf auth login`" in run("push", "out", "user/x", check=2, HF_TOKEN=None).stderr
    assert "does not accept your token" in run("push", "out", "user/x", check=2, HF_TOKEN="hf_wrongWRONGwrong").stderr
    assert "HF_HUB_OFFLINE" in run("push", "out", "user/x", check=2, HF_HUB_OFFLINE="1").stderr


def test_push_through_what_passes(hub, run, out):
    hub.faults = [
        Fault("POST /api/repos/create", status=500),
        Fault("POST .*/preupload/.*", status=429, headers={"Retry-After": "0"}),
        Fault("POST .*/batch", status=503),
        Fault("PUT .*", status=500),
        Fault("POST .*/commit/.*", status=500),
        Fault("POST .*/commit/.*", cut=3),  # committed, but the answer is lost
    ]
    run("push", "out", "user/pruned")
    assert all(fault.times == 0 for fault in hub.faults)
    repo = hub.repos["user/pruned"]
    assert {k: v for k, v in repo.commits[repo.branches["main"]].items() if k != ".gitattributes"} == tree(out)
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    ("fault", "match", "code"),
    [
        (
            Fault("POST .*/commit/.*", times=9, status=409, body={"error": "conflict"}),
            "somebody else meanwhile (409: conflict)",
            2,
        ),
        (
            Fault("POST .*/preupload/.*", times=9, status=404, headers={"X-Error-Code": "RepoNotFound"}),
            "missing or private",
            2,
        ),
        (
            Fault("POST .*/validate-yaml", times=9, status=400, body={"errors": [{"message": "bad licence"}]}),
            "bad licence",
            2,
        ),
        (
            Fault("POST .*/create", times=9, status=403, body={"error": "not hf_writerWRITERwriter"}),
            "403: not <token>",
            2,
        ),
    ],
)
def test_push_that_cannot_be(hub, run, out, fault, match, code):
    hub.faults = [replace(fault)]
    done = run("push", "out", "user/pruned", check=code)
    assert match in done.stderr
    assert "user/pruned" not in hub.repos or files(hub.repos["user/pruned"]) == set()


def test_hub_ids():
    for good in ("gpt2", "meta-llama/Llama-2-7b-hf", "a/b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "x/y_"):
        assert is_hub_id(good), good
    for bad in (
        "",
        "/a",
        "a/",
        "a/b/c",
        "../a",
        "./a",
        "a b",
        "a--b/c",
        "a..b",
        "-a/b",
        "a/b.",
        "a/" + "b" * 97,
        "ä/b",
        "~/x",
    ):
        assert not is_hub_id(bad), bad


def test_in_python(hub, environment, tmp_path):
    """The same by functions."""
    url = run_program(convert_and_push, "own/llama-2-5m", "out", "user/llama-2-x", env=environment, cwd=tmp_path)
    assert url.startswith(hub.url)
    with pytest.raises(PruneAttnError, match="no Hub id"):
        convert(SHIPPED, tmp_path / "x", 4, hub=Revision(revision="main"))
