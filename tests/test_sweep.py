"""The sweep: its figures against plain PyTorch, its files, what it keeps when it is stopped, what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import oracle
import pytest
import torch
from conftest import CALIBRATION, SHIPPED, TEXT, start_cli, swept, tree
from transformers import AutoTokenizer

from export.sweep.job import sweep
from export.sweep.table import within_noise
from prune_attn import Measure, Points, SavedPlan, convert
from pruner import PruneAttnError
from pruner.model import TorchLanguageModel

SMALL = dict(strategy="last", window=64, limit=2, rounds=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """The text's beginning: tokenizing all of it takes longer than most of these sweeps."""
    file = tmp_path_factory.mktemp("text") / "test.txt"
    file.write_text("".join(TEXT.read_text().splitlines(keepends=True)[:1500]))
    return file


@torch.no_grad()
def perplexity(attention, mlp, windows: int, window: int) -> float:
    """Of the first windows, the BOS before the text: the model called on each, cross-entropy of the next tokens."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    ids = tokenizer(TEXT.read_text()[: 20 * windows * window], return_tensors="pt", verbose=False).input_ids[0]
    assert ids[0] == tokenizer.bos_token_id
    ids = ids[: windows * window].view(windows, window)
    logits = oracle.logits(oracle.original(SHIPPED, attention, mlp), ids)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = losses.double().view(windows, -1)
    return math.exp(losses.mean())


def test_the_table_against_plain_pytorch(tmp_path):
    from PIL import Image

    shares = "25%,50%"
    result = sweep(
        SHIPPED,
        tmp_path / "out",
        Measure(TEXT, window=128, limit=4, rounds=0),
        points=Points(shares, ["attention", "mlp", "block"]),
    )
    rows = [result.original, *result.points]
    assert [(r["sublayer"], r["strategy"], r["fraction"]) for r in result.points] == [
        (kind, name, share)
        for kind in ("attention", "mlp", "block")
        for name in ("last", "keep-last")
        for share in shares.split(",")
    ]
    for row in rows:
        # nothing but a whole text's first token is predicted from nothing, so a window's first token never counts
        expected = perplexity(row["attention"], row["mlp"], 4, 128)
        assert row["perplexity"] == pytest.approx(expected, rel=2e-5)
    assert all(row["perplexity"] > result.original["perplexity"] for row in result.points)
    for fewer, more in zip(result.points[::2], result.points[1::2], strict=True):
        assert set(fewer["attention"]) < set(more["attention"]) or set(fewer["mlp"]) < set(more["mlp"])
        assert fewer["perplexity"] < more["perplexity"]
        assert fewer["bytes"] > more["bytes"]

    saved = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert saved == result.to_json()
    table = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [float(line["perplexity"]) for line in table] == [row["perplexity"] for row in rows]
    assert [line["mlp"].split() for line in table] == [[str(i) for i in row["mlp"]] for row in rows]
    page = (tmp_path / "out" / "sweep.md").read_text()
    assert all(f"{row['perplexity']:.2f}" in page for row in rows)
    with Image.open(tmp_path / "out" / "perplexity.png") as plot:
        assert plot.size > (800, 300)
    assert not (tmp_path / "out" / "speed.png").exists()
    assert not (tmp_path / "out.partial").exists()
    plan = tmp_path / "out" / "plans" / "attention-keep-last.json"
    assert convert(SHIPPED, tmp_path / "pruned", SavedPlan(plan, "25%")).plan.attention == (8, 9, 10)


@pytest.mark.parametrize(("attention", "mlp"), [((8, 9, 11), ()), ((), (0, 5)), ((3, 4), (3, 4)), (range(12), (2,))])
def test_without_is_the_model_with_those_switched_off(attention, mlp):
    model = TorchLanguageModel(SHIPPED, dtype="float32")
    ids = oracle.ids(length=40, vocab=model.vocab_size).numpy()
    pruned = model.without(attention, mlp)
    names = {name for name, _ in pruned.model.named_parameters()}
    assert not any(f"layers.{i}.self_attn" in name for i in attention for name in names)
    assert not any(f"layers.{i}.mlp" in name for i in mlp for name in names)
    theirs = {p.data_ptr() for p in model.model.parameters()}
    assert all(p.data_ptr() in theirs for p in pruned.model.parameters())  # no weight was copied
    expected = oracle.logits(oracle.original(SHIPPED, attention, mlp), torch.from_numpy(ids))
    assert torch.equal(torch.from_numpy(pruned.logits(ids)), expected)
    # the caches are apart, and the original stays whole
    whole = oracle.logits(oracle.original(SHIPPED), torch.from_numpy(ids))
    pruned.prefill(ids[:, :-1].tolist())
    model.prefill(ids[:, :-1].tolist())
    for one, right in ((pruned, expected), (model, whole)):
        assert torch.allclose(torch.from_numpy(one.decode(ids[:, -1].tolist())), right[:, -1], atol=1e-4)


def test_speed_is_measured_once_for_each_count_and_shown(tmp_path, make_llama, text, cli):
    small = make_llama("small", with_tokenizer=True, max_position_embeddings=64)
    arguments = ["sweep", small, "-o", tmp_path / "out", "--text", text, "--fractions", "33%", "--window", 64]
    done = cli(*arguments, "--limit", 1, "--rounds", 5, "--json", check=0)
    result = json.loads(done.stdout)
    said = ("other work is running: ", "measuring: ")  # where the machine is busy
    assert all(line.startswith(said) for line in done.stderr.splitlines())
    assert result == json.loads((tmp_path / "out" / "sweep.json").read_text())
    last, keep_last = result["points"]
    assert (last["attention"], keep_last["attention"]) == ([3], [2])
    for row in (result["original"], last, keep_last):
        for kind in ("decode", "prefill"):
            assert row[f"{kind}_ms"] > 0
            assert row[f"{kind}_speedup_low"] <= row[f"{kind}_speedup"] <= row[f"{kind}_speedup_high"]
            assert row is result["original"] or row[f"{kind}_ms"] == last[f"{kind}_ms"]
    assert (tmp_path / "out" / "speed.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out" / "sweep.md").read_text()
    assert ("(?)" in page.split("Speed-up:")[0]) == any(
        within_noise(last, result["original"], kind) for kind in ("decode", "prefill")
    )


@pytest.mark.parametrize(
    ("interval", "noise"),
    [((1.1, 1.2), False), ((1.04, 1.2), True), ((0.9, 1.2), True), ((0.7, 0.8), False), ((0.8, 0.97), True)],
)
def test_what_noise_hides(interval, noise):
    def row(low, high):
        return {"decode_speedup_low": low, "decode_speedup_high": high}

    assert within_noise(row(*interval), row(0.96, 1.05), "decode") is noise


def test_an_interrupted_sweep_goes_on(tmp_path, text, monkeypatch):
    from pruner.evaluate import perplexity as module

    options = SMALL | dict(text=text, fractions="10%,25%,33%,50%")
    straight = sweep(SHIPPED, tmp_path / "straight", **swept(**options))
    score, calls = module.score, []

    def stopping(*args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        return score(*args, **kwargs)

    monkeypatch.setattr(module, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep(SHIPPED, tmp_path / "out", **swept(**options))
    assert not (tmp_path / "out").exists()
    with pytest.raises(PruneAttnError, match="another text"):
        sweep(SHIPPED, tmp_path / "out", **swept(**options | dict(limit=3)))
    monkeypatch.setattr(module, "score", lambda *args, **kwargs: calls.append(args) or score(*args, **kwargs))
    resumed = sweep(SHIPPED, tmp_path / "out", **swept(**options))
    assert len(calls) == 5  # the original and four fractions, each once
    assert (resumed.original, resumed.points) == (straight.original, straight.points)
    names = set(tree(tmp_path / "out"))
    assert names == set(tree(tmp_path / "straight"))
    assert {p.name for p in tmp_path.iterdir()} == {"out", "straight"}


def test_a_sweep_that_finished_nothing_leaves_nothing(tmp_path, text):
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(SHIPPED, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    options = SMALL | dict(strategy="last,similarity", text=text, calibration=CALIBRATION, samples=2, length=32)
    with pytest.raises(PruneAttnError, match=r"model\.norm\.weight holds NaN"):
        sweep(source, tmp_path / "out", **swept(fractions="1", **options))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_sweep_goes_on(cli, tmp_path, text):
    command = ["sweep", SHIPPED, "-o", tmp_path / "out", "--text", text, "--strategy", "last", "--window", "64",
               "--rounds", "0", "--json", "--limit", "40", "--fractions", "2,4"]  # fmt: skip
    state, kept = tmp_path / "out.partial" / "progress.json", {}
    with start_cli(*command, stdout=subprocess.DEVNULL, stderr=None) as process:
        while not kept and process.poll() is None:
            time.sleep(0.05)
            kept = json.loads(state.read_text())["perplexity"] if state.exists() else {}
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = json.loads(state.read_text())["perplexity"]
    state.write_text(json.dumps(json.loads(state.read_text()) | {"perplexity": kept | {"nothing": 12.5}}))
    done = cli(*command, check=0)
    assert json.loads(done.stdout)["original"]["perplexity"] == 12.5  # what was kept is taken, not computed again


def test_search_and_similarity_beat_the_last_on_unseen_text(tmp_path):
    lines = TEXT.read_text().splitlines(keepends=True)
    (tmp_path / "calibration.txt").write_text("".join(lines[len(lines) // 2 :]))
    options = dict(calibration=tmp_path / "calibration.txt", samples=8, length=128, window=256, limit=8, rounds=0)
    result = sweep(
        SHIPPED,
        tmp_path / "out",
        **swept(text=TEXT, strategy="last,similarity,search", fractions="33%,25%", **options),
    )
    of = {(row["strategy"], row["fraction"]): row["perplexity"] for row in result.points}
    for fraction in ("25%", "33%"):
        assert result.original["perplexity"] < of["search", fraction] < of["last", fraction]
        assert of["similarity", fraction] < of["last", fraction]
    plan = json.loads((tmp_path / "out" / "plans" / "attention-search.json").read_text())
    assert plan["attention"] == result.points[-2]["attention"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(strategy="deepest"), "unknown 'deepest'; choose of last"),
        (dict(strategy="last,search"), "search chooses by a text; give one with --calibration"),
        (dict(sublayer="attention,heads"), "unknown 'heads'; choose of attention, mlp, block"),
        (dict(sublayer=""), "unknown ''"),
        (dict(fractions="33%,100%"), "--fractions 100%: that is 12 attention sublayers"),
        (dict(fractions="11", strategy="keep-last"), "can drop only 10"),
        (dict(fractions="0%"), "--fractions 0% drops nothing"),
        (dict(fractions="a third"), "--fractions 'a third' is neither"),
        (dict(fractions="101%"), "--fractions 101%: more than 100%"),
        (dict(window=100_000), "context is 1024"),
        (dict(rounds=2), "too few"),
        (dict(text="missing.txt"), r"missing\.txt: no such text file"),
        (dict(strategy="search", calibration=TEXT, text=TEXT), "is the calibration text too"),
        (dict(device="cuda"), "no CUDA device"),
    ],
)
def test_bad_input(tmp_path, text, options, match):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(PruneAttnError, match=match) as error:
        sweep(SHIPPED, tmp_path / "out", **swept(**SMALL | {"text": text} | options))
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_outputs_that_are_not_ours_stay(tmp_path, text, cli):
    options = SMALL | dict(text=text, fractions="1")
    out = tmp_path / "out"
    sweep(SHIPPED, out, **swept(**options))
    with pytest.raises(PruneAttnError, match="--overwrite"):
        sweep(SHIPPED, out, **swept(**options))
    sweep(SHIPPED, out, overwrite=True, **swept(**options | dict(fractions="2")))
    assert json.loads((out / "sweep.json").read_text())["setting"]["fractions"] == ["2"]
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    done = cli("sweep", SHIPPED, "-o", out, "--text", text, "--overwrite", check=2)
    assert "notes.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert tree(out) == before
    os.mkdir(tmp_path / "new.partial")
    with pytest.raises(PruneAttnError, match="in the way"):
        sweep(SHIPPED, tmp_path / "new", **swept(**options))


@pytest.mark.parametrize(
    ("worst", "beyond"), [(1.0003, []), (1.04, []), (1.5, []), (9, []), (30, ["↑600"]), (5e6, ["↑1e8"])]
)
def test_the_plots_can_be_read_whatever_explodes(tmp_path, monkeypatch, worst, beyond):
    from matplotlib.figure import Figure

    from export.sweep.plots import draw

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: (figures.append(figure), save(figure, file)))

    def row(dropped: int, perplexity: float) -> dict[str, object]:
        speeds = {
            f"{kind}_speedup{x}": 1 + dropped / 10 for kind in ("decode", "prefill") for x in ("", "_low", "_high")
        }
        row = {"sublayer": "mlp", "strategy": "last", "dropped": dropped, "of": 10, "perplexity": perplexity}
        return row | speeds

    names = {"source": {"name": "a$_$^b"}, "text": {"name": "x$y$", "tokens": 10}, "dtype": "float32", "hardware": "x"}
    setting = names | {"sublayers": ["mlp"], "strategies": ["last"], "speed": {"rounds": 1}}
    draw(tmp_path, setting, row(0, 20.0), [row(1, 20 * worst**0.5), row(2, 20 * worst)])
    for figure in figures:
        for panel in figure.axes:
            low, high = panel.get_ylim()
            assert low < 20
            assert min(worst, 10) * 20 < high <= 400
            ticks = [t for t in panel.get_yticks() if low <= t <= high]
            assert 3 <= len(ticks) <= 9
            labels = [label.get_text() for label in panel.get_yticklabels()]
            assert max(map(len, labels), default=0) <= 7
            shown = [text.get_text() for text in panel.texts]
            assert shown == beyond if worst < 100 else shown[-1:] == beyond
    assert len(figures) == 2
