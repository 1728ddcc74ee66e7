"""``validate`` end to end on the shipped model, against plain PyTorch; tampering, limits, bad input, going on."""

from __future__ import annotations

import contextlib
import json
import math
import shutil

import jsonschema
import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT, SHIPPED, TEXT, edit_config
from safetensors.torch import load_file, save_file

from export.convert import convert
from export.report import UNFINISHED
from export.report.compare import report
from export.report.for_card import card_section, eval_results
from export.validate.run import validate
from prune_attn import Accuracy, Compute, Latency, Layers, Limits, Tasks, WriteOptions
from pruner.errors import PruneAttnError
from pruner.evaluate import agreement, bootstrap
from pruner.model import TorchLanguageModel

SCHEMA = json.loads((ROOT / "export/report/results.schema.json").read_text())
LAYERS = [1, 4, 6, 7]
ACCURACY = Accuracy(TEXT, window=128, stride=64, max_tokens=1024)
LATENCY = Latency(batches=(1, 2), prompts="16,32", new_tokens=4, repeats=3, seconds=1)
TORCH = Compute(backends="torch")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(original, pruned), the whole validation of them, done once."""
    directory = tmp_path_factory.mktemp("validate") / "pruned"
    convert(SHIPPED, directory, Layers(LAYERS), options=WriteOptions(dtype="float32"))
    return SHIPPED, directory, validate(SHIPPED, directory, accuracy=ACCURACY, latency=LATENCY)


def test_results_keep_the_schema(pair):
    _, pruned, done = pair
    on_disk = json.loads((pruned / "report/results.json").read_text())
    jsonschema.validate(on_disk, SCHEMA)
    assert on_disk == json.loads(json.dumps(done.results))
    assert done.exit_code == 0
    assert done.results["same_function"]["torch"]["equal"]
    assert done.results["same_function"]["onnx"]["relative_error"] < 1e-5
    assert done.results["pruning"]["attention"] == LAYERS
    assert set(done.results["latency"]) == {"torch", "onnx"}
    names = {p.name for p in (pruned / "report").iterdir()}
    assert names == {
        "results.json",
        "report.md",
        "report.html",
        "glance.png",
        "layers.png",
        "position.png",
        "decode.png",
    }


@torch.no_grad()
def test_figures_against_plain_pytorch(pair, text_ids):
    original, pruned, done = pair
    ids = torch.tensor([1, *text_ids(1024)])
    models = oracle.original(original), oracle.pruned(pruned)
    nll, same, kl, scored_to = [[], []], [], [], 1
    for begin in range(0, len(ids), 64):
        end = min(begin + 128, len(ids))
        logs = [oracle.logits(m, ids[None, begin:end])[0].log_softmax(-1) for m in models]
        first = scored_to - begin - 1
        targets = ids[scored_to:end]
        for out, log in zip(nll, logs, strict=True):
            out += (-log[first : end - begin - 1].gather(1, targets[:, None])[:, 0]).tolist()
        a, b = (log[first : end - begin - 1] for log in logs)
        same += (a.argmax(-1) == b.argmax(-1)).tolist()
        kl += torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1).tolist()
        scored_to = end
        if end == len(ids):
            break
    for backend in ("torch", "onnx"):
        facts = done.results["accuracy"][backend]
        assert facts["tokens"] == 1024
        for name, values in zip(("original", "pruned"), nll, strict=True):
            assert facts["perplexity"][name]["value"] == pytest.approx(math.exp(np.mean(values)), rel=1e-4)
        assert facts["agreement"]["value"] == pytest.approx(np.mean(same), abs=2e-3)
        assert facts["kl"]["mean"]["value"] == pytest.approx(np.mean(kl), rel=1e-3)
        assert facts["kl"]["p99"]["value"] == pytest.approx(np.quantile(kl, 0.99), rel=0.05)
        ratio = facts["perplexity"]["ratio"]
        assert 1 < ratio["low"] < ratio["value"] < ratio["high"]


def test_one_changed_tensor_is_found(pair, tmp_path, cli):
    original, pruned, _ = pair
    shutil.copytree(pruned, tmp_path / "tampered")
    shard = tmp_path / "tampered/model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-4:] = np.float32(7).tobytes()  # one number of the last tensor
    shard.write_bytes(data)
    done = cli("validate", original, tmp_path / "tampered", "--text", TEXT, check=1)
    assert "not the same function" in done.stderr
    results = json.loads((tmp_path / "tampered/report/results.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert not results["same_function"]["ok"]
    assert results["accuracy"] == results["latency"] == results["tasks"] == {}
    assert "NOT THE SAME FUNCTION" in (tmp_path / "tampered/report/report.md").read_text()


def test_a_head_of_its_own_that_the_tied_original_lacks(tmp_path, make_llama):
    original, pruned = make_llama(tie_word_embeddings=True), tmp_path / "pruned"
    convert(original, pruned, 1, options=WriteOptions(graph=None))
    (pruned / "pruning_plan.json").unlink()  # as another tool leaves it
    edit_config(pruned, tie_word_embeddings=False)
    weights = load_file(pruned / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(128, 64)}, pruned / "model.safetensors")
    done = validate(original, pruned, latency=None, compute=TORCH)
    assert done.exit_code == 1
    assert "'lm_head.weight' is not in" in done.problems[0]


def test_limits_just_above_and_below(pair, tmp_path):
    original, pruned, done = pair
    increase = done.results["accuracy"]["torch"]["perplexity"]["ratio"]["value"] - 1
    same = done.results["accuracy"]["torch"]["agreement"]["value"]
    options = dict(accuracy=ACCURACY, latency=None, compute=TORCH, output=tmp_path / "r")
    kept = validate(original, pruned, limits=Limits(increase + 1e-4, min_agreement=same - 1e-4), **options)
    assert (kept.exit_code, kept.problems) == (0, [])
    # same seed, same numbers
    assert kept.results["accuracy"]["torch"] == done.results["accuracy"]["torch"]
    broken = validate(original, pruned, limits=Limits(increase - 1e-4, min_agreement=same + 1e-4), **options)
    assert broken.exit_code == 3
    assert len(broken.problems) == 2
    assert all(word in " ".join(broken.problems) for word in ("--max-perplexity-increase", "--min-agreement"))


def test_goes_on_where_it_was_stopped(pair, tmp_path, monkeypatch):
    original, pruned, done = pair
    options = dict(accuracy=ACCURACY, latency=None, compute=TORCH, output=tmp_path / "r")
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "greedy_match", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            validate(original, pruned, **options)
    assert not (tmp_path / "r/results.json").exists()
    assert not list((tmp_path / "r" / UNFINISHED).glob("graphs*"))
    monkeypatch.setattr(agreement, "compare", None)  # would be called again only if the saved part were not used
    again = validate(original, pruned, **options)
    assert again.results["accuracy"]["torch"] == done.results["accuracy"]["torch"]
    assert not (tmp_path / "r" / UNFINISHED).exists()


def test_report_again_and_side_by_side(pair, tmp_path, cli):
    _, pruned, _ = pair
    results = pruned / "report/results.json"
    cli("report", results, "-o", tmp_path / "again", check=0)
    assert (tmp_path / "again/report.md").read_text() == (pruned / "report/report.md").read_text()
    written = report([results, pruned / "report"], tmp_path / "both")
    assert {p.name for p in written} == {"compare.png", "compare.md", "compare.html"}
    page = (tmp_path / "both/compare.html").read_text()
    assert page.count("<svg") == 1
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_memory_where_there_is_room_for_two_steps_only(pair, tmp_path):
    """The session is opened for the prompt and the new tokens, no more."""
    short = Latency(batches=[1], prompts=[16], new_tokens=2, repeats=3, seconds=1)
    compute = Compute(backends=["onnx"])
    done = validate(*pair[:2], tmp_path / "report", latency=short, same_function=False, compute=compute)
    memory = done.results["latency"]["onnx"]["memory"]
    assert all(memory[model]["peak_rss_bytes"] > 0 for model in ("original", "pruned"))
    assert not any("memory" in note for note in done.results["notes"])


def test_a_report_where_no_memory_could_be_measured(pair, tmp_path):
    results = json.loads(json.dumps(pair[2].results))
    for facts in results["latency"].values():
        facts["memory"] = {model: {"failed": "killed by signal 9"} for model in ("original", "pruned")}
    (tmp_path / "results.json").write_text(json.dumps(results))
    report([tmp_path / "results.json"], tmp_path / "again")
    assert "peak memory, each in a process of its own" in (tmp_path / "again/report.md").read_text()


def test_the_page_stands_alone(pair):
    page = (pair[1] / "report/report.html").read_text()
    assert page.count("<svg") == 4
    assert not any(word in page for word in ("<script", "<link", 'src="', "@import"))
    assert "prefers-color-scheme: dark" in page


def test_no_speedup_is_said_where_none_was_shown(pair):
    from export.report.content import glance_rows

    results = json.loads(json.dumps(pair[2].results))
    results["latency"]["onnx"]["speedup"]["decode"] = {"value": 1.02, "low": 0.97, "high": 1.08}
    row = next(row for row in glance_rows(results) if row[0] == "decode speed, ONNX Runtime")
    assert row[-1] == "no speed-up shown"


def test_the_card(pair):
    results = pair[2].results
    assert "| perplexity, PyTorch |" in card_section(results)
    from huggingface_hub import EvalResult

    found = [EvalResult(**entry) for entry in eval_results(results)]
    assert found[0].metric_value == pytest.approx(
        results["accuracy"]["torch"]["perplexity"]["pruned"]["value"], abs=1e-6
    )


def test_a_limit_without_a_value_is_broken(pair):
    from export.validate.limits import Limits, check

    results = pair[2].results | {"tasks": {"torch": {"average_ratio": None}}}
    (gate,) = check(Limits(min_task_average_ratio=0.9), results)
    assert not gate["ok"]
    jsonschema.validate(results | {"tasks": {}, "gates": [gate]}, SCHEMA)
    results["tasks"]["torch"]["average_ratio"] = 0.0
    (gate,) = check(Limits(min_task_average_ratio=0.9), results)
    assert (gate["ok"], gate["measured"]) == (False, 0.0)


def test_an_original_that_is_not_finite_is_named():
    from export.validate.function import compare_torch

    class Model:
        vocab_size = 3

        def __init__(self, value):
            self.value = value

        def reset(self): ...

        def switch_off(self, *_): ...

        def logits(self, ids):
            return np.full((*ids.shape, 3), self.value, np.float32)

        def prefill(self, rows):
            return np.full((len(rows), 3), self.value, np.float32)

        def decode(self, tokens):
            return self.prefill(tokens)

    ids = np.zeros((2, 16), dtype=np.int64)
    with pytest.raises(PruneAttnError, match=r"original.s logits.*not finite in float16"):
        compare_torch(Model(np.inf), Model(1), ids, [0], [], "float16")
    facts = compare_torch(Model(1), Model(np.inf), ids, [0], [], "float16")
    assert not facts["ok"]
    json.dumps(facts, allow_nan=False)


def test_draws_with_nothing_to_count_are_left_out():
    has = np.array([1, 0, 0])
    found = bootstrap.estimate(lambda c: c @ (2.0 * has) / np.where(c @ has, c @ has, np.nan), 3)
    assert found == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_bootstrap_covers():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        a, b = rng.lognormal(0.2, 0.1, 30), rng.lognormal(0, 0.1, 30)
        estimate = bootstrap.median_ratio([(a, b)], seed)
        inside += estimate["low"] <= math.exp(0.2) <= estimate["high"]
    assert 180 <= inside <= 200
    values, block = rng.random(1000), bootstrap.blocks(1000)
    everything = np.ones((1, block[-1] + 1), dtype=int)
    assert bootstrap.quantile(values, block, 0.9, everything)[0] == pytest.approx(np.quantile(values, 0.9), abs=2e-3)


def test_greedy_match_counts_until_the_first_difference(shipped, text_ids):
    model = TorchLanguageModel(shipped)
    prompts = np.array(text_ids(64)).reshape(4, 16)
    assert agreement.greedy_match(model, model, prompts, 6)["lengths"] == [6] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(accuracy=Accuracy("absent.txt")), "no such text file"),
        (dict(compute=Compute(backends="tensorrt")), "choose of torch, onnx"),
        (dict(latency=Latency(prompts="1000", new_tokens=100)), "do not fit the context"),
        (dict(latency=Latency(batches="0")), "--batch"),
        (dict(latency=Latency(batches=[])), "--batch"),
        (dict(latency=None, same_function=False), "nothing is to be measured"),
        (dict(limits=Limits(min_agreement=0.5)), "not measured"),
        (dict(compute=Compute(device="cuda")), "CUDA"),
        (dict(tasks=Tasks("no_such_task_anywhere")), "no_such_task_anywhere"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(pair, tmp_path, options, message):
    original, pruned, _ = pair
    if options.get("compute") == Compute(device="cuda") and torch.cuda.is_available():
        pytest.skip("has CUDA")
    with pytest.raises(PruneAttnError, match=message):
        validate(original, pruned, tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "accuracy"], "add --text FILE"),
        (["--only", "tasks"], "say which"),
        (["--only", "speed"], "choose of same-function, accuracy, tasks, latency"),
        (["--only", "same-function", "--batch", "1"], "--batch is for latency, which is not asked for"),
        (["--window", "64"], "--window is for accuracy, which is not asked for"),
        (["--min-agreement", "high"], "is no number"),
        (["--min-agreement", "80"], "is more than all"),
        (["--min-decode-speedup", "1.1", "--only", "same-function"], "add latency in --only"),
    ],
)
def test_options_that_do_not_go_together(pair, tmp_path, options, message, cli):
    assert message in cli("validate", *pair[:2], "-o", tmp_path / "r", *options, check=2).stderr
    assert not (tmp_path / "r").exists()


def test_bad_input(pair, tmp_path, make_llama, cli):
    original, pruned, _ = pair
    (tmp_path / "short.txt").write_text("A few words.")
    assert "too few" in cli("validate", original, pruned, "--text", tmp_path / "short.txt", check=2).stderr
    assert "not made from" in cli("validate", make_llama(), pruned, check=2).stderr
    other = tmp_path / "other"
    shutil.copytree(pruned, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[1000:1002]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer is not" in cli("validate", original, other, "--text", TEXT, check=2).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    assert "thesis.tex" in cli("validate", original, pruned, "-o", tmp_path / "full", check=2).stderr
    assert "validate" in cli("report", other / "config.json", "-o", tmp_path / "x", check=2).stderr


def test_results_that_were_damaged(pair, tmp_path):
    text = json.dumps(pair[2].results)
    again, huge = tmp_path / "again", "1" + "0" * 400

    def damaged(*keys: str, raw: str) -> None:
        results = json.loads(text)
        inner = results
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = "@@"
        (tmp_path / "results.json").write_text(json.dumps(results).replace('"@@"', raw))
        with pytest.raises(PruneAttnError, match=r"results\.json: ") as error:
            report([tmp_path / "results.json"], again)
        assert str(error.value).isprintable()
        assert not again.exists()
        with contextlib.suppress(PruneAttnError):  # and no other error; it may not be looked at
            report([tmp_path / "results.json"] * 2, tmp_path / "side by side")

    backend = next(iter(json.loads(text)["latency"]))
    damaged("latency", backend, "speedup", "decode", raw=f'{{"value": {huge}, "low": 1, "high": 1}}')
    damaged("latency", backend, "speedup", "decode", raw='{"value": "\\u001b[2J", "low": 1, "high": 1}')
    damaged("models", "pruned", "bytes", raw='"x"')
    damaged("models", "original", "bytes", raw="[]")
    damaged("models", raw="[]")
    damaged("pruning", "layers", raw="1000000000")
    damaged("pruning", "attention", raw="{}")
    damaged("accuracy", raw='{"torch": 5}')
