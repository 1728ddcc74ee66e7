"""Texts as people have them: what is read of which file, what each option means, and losses that are no numbers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHIPPED, TEXT, asked, invoke, swept
from safetensors.torch import load_file, save_file

import export.cli.convert
from export.select import select
from export.sweep.job import sweep
from export.validate.run import validate
from prune_attn import Accuracy, Calibration, Compute, Layers, WriteOptions, convert
from pruner import PruneAttnError
from pruner.select.evaluator import Evaluator
from pruner.select.exhaustive import exhaustive
from pruner.select.search import search
from pruner.text import load_tokenizer, read_text

SMALL = dict(samples=8, length=16)
PARTS = TEXT.read_text("utf-8")[:12_000].split("\n\n")
PLAIN = "\n\n".join(PARTS)


def lines(field: str, values: list, **more: object) -> str:
    return "".join(json.dumps({"id": 1, field: value, **more}, ensure_ascii=False) + "\n" for value in values)


@pytest.fixture
def texts(tmp_path) -> Path:
    """The same text in the forms that people have it in."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "plain.txt").write_text(PLAIN)
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + PLAIN.encode())
    (folder / "data.jsonl").write_text(lines("text", PARTS))
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines("text", PARTS).encode())
    (folder / "data.json").write_text(lines("text", PARTS) + "\n")
    (folder / "noname").write_text(lines("text", PARTS).replace("\n", "\r\n"))
    (folder / "content.ndjson").write_text(lines("content", PARTS))
    (folder / "first.txt").write_text("\n\n".join(PARTS[:9]))
    (folder / "rest.jsonl").write_text(lines("text", PARTS[9:]))
    return folder


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (["plain.txt"], None), (["bom.txt"], None), (["data.jsonl"], None), (["bom.jsonl"], None),
        (["data.json"], None), (["noname"], None), (["content.ndjson"], "content"), (["first.txt", "rest.jsonl"], None),
    ],
)  # fmt: skip
def test_the_same_text_in_every_form(texts, names, field):
    tokenizer = load_tokenizer(SHIPPED)
    files = [texts / name for name in names]
    text = read_text(files if len(files) > 1 else files[0], tokenizer, field)
    assert text.ids.tolist() == tokenizer(PLAIN, add_special_tokens=False)["input_ids"]
    assert (text.bytes, text.sha256) == (len(PLAIN.encode()), hashlib.sha256(PLAIN.encode()).hexdigest())
    assert text.name == ", ".join(names)


def test_a_separator_inside_a_value_is_no_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\u2028two\u0085three\nfour"}, ensure_ascii=False))
    assert read_text(tmp_path / "a.jsonl", load_tokenizer(SHIPPED)).content == "one\u2028two\u0085three\nfour"


@pytest.mark.parametrize(
    ("name", "data", "field", "match"),
    [
        ("a.jsonl", lines("text", ["x", None], title="y"), None, "line 2 has no text .*; leave that line out"),
        ("a.jsonl", lines("messages", [["x"]]), None, "line 1 has no text .*; leave that line out"),
        ("a.jsonl", lines("content", ["x"], title="y"), None, r"line 1 has no text .*'text'.*--text-field.*content, t"),
        ("a.jsonl", lines("text", ["x"]) + lines("txt", ["x"]), None, r"line 2 has no text"),
        ("a.jsonl", lines("text", ["x"]), "body", r"'body'"),
        ("a.jsonl", lines("text", [["x"]]), None, r"line 1 has no text"),
        ("a.jsonl", lines("text", [None]), None, r"line 1 has no text"),
        ("a.jsonl", '{"text": "x"}\n{"text": "x"\n', None, r"line 2 is not a JSON object"),
        ("a.jsonl", "[" * 100_000, None, r"line 1 is not a JSON object"),
        ("a.jsonl", '["x"]\n', None, r"line 1 is not a JSON object"),
        ("a.jsonl", '{"text": "\\ud800"}\n', None, r"line 1 .*surrogate"),
        ("a.jsonl", lines("text", [" "]), None, "is empty"),
        ("a.jsonl", "\n", None, "is empty"),
        ("a.json", '[{"text": "x"}]', None, "not JSON lines"),
        ("a.json", '{\n  "text": "x"\n}', None, "not JSON lines"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00", None, "unpack"),
        ("a.txt", b"h\0e\0y\0", None, "zero bytes"),
        ("a.txt", b"\xef\xbb\xbf \n", None, "is empty"),
    ],
)
def test_what_holds_no_text_is_refused(tmp_path, name, data, field, match):
    file = tmp_path / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(PruneAttnError, match=match) as error:
        read_text(file, load_tokenizer(SHIPPED), field)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_and_folders_are_refused(tmp_path):
    with pytest.raises(PruneAttnError, match="no text file is named"):
        select(SHIPPED, 1, output=tmp_path / "plan.json", calibration=Calibration([]))
    with pytest.raises(PruneAttnError, match="one by one"):
        select(SHIPPED, 1, output=tmp_path / "plan.json", calibration=Calibration(tmp_path))


def test_several_texts_and_a_field_at_the_command_line(texts, tmp_path):
    """The same tokens, so the same choice; only how the text is called differs."""
    plans = []
    for i, given in enumerate((["plain.txt"], ["first.txt", "rest.jsonl"], ["content.ndjson"])):
        args = [arg for name in given for arg in ("--text", texts / name)]
        args += ["--text-field", "content"] if i == 2 else []
        args += ["--samples", 8, "--length", 16, "-o", tmp_path / f"{i}.json"]
        assert invoke("select", SHIPPED, "--drop", 2, *args).exception is None
        plans.append(json.loads((tmp_path / f"{i}.json").read_text()))
        assert plans[-1]["selection"]["calibration"].pop("text") == ", ".join(given)
    assert plans[0] == plans[1] == plans[2]
    done = invoke("select", SHIPPED, "--drop", 2, "--text-field", "content", "-o", tmp_path / "p.json")
    assert "--text-field is for choosing by a text" in str(done.exception)


def test_sweep_and_validate_read_json_lines(texts, tmp_path):
    """The text is the plain one's: its hash, its bytes, its tokens."""
    options = dict(text=texts / "content.ndjson", text_field="content", window=64)
    made = sweep(SHIPPED, tmp_path / "s", **swept(**options, fractions="2", strategy="last", limit=2, rounds=0))
    known = hashlib.sha256(PLAIN.encode()).hexdigest()
    assert (made.setting["text"]["sha256"], made.setting["text"]["bytes"]) == (known, len(PLAIN.encode()))
    with pytest.raises(PruneAttnError, match="is the calibration text too"):
        sweep(
            SHIPPED,
            tmp_path / "t",
            **swept(text=[texts / "data.jsonl", TEXT], calibration=texts / "plain.txt", rounds=0),
        )
    pruned = convert(SHIPPED, tmp_path / "pruned", Layers([2]), options=WriteOptions(graph=None)).output
    asked, compute = Accuracy(texts / "content.ndjson", "content", window=64), Compute("torch")
    measured = validate(SHIPPED, pruned, tmp_path / "r", accuracy=asked, latency=None, compute=compute).results
    measured = measured["accuracy"]["torch"]
    assert measured["text"]["sha256"] == known
    assert measured["text"]["tokens"] == len(load_tokenizer(SHIPPED)(PLAIN, add_special_tokens=False)["input_ids"])


# -- convert --validate: --text chooses, --validation-text is measured on ----


@pytest.fixture
def measured(monkeypatch):
    """Run ``convert`` here; what it would then validate with is returned, and whether it chose by a text."""
    seen: list[dict] = []
    monkeypatch.setattr(export.cli.convert, "run_validation", lambda measure, *_: seen.append(measure.keywords))

    def run(*args: object) -> tuple[dict | None, Exception | None]:
        seen.clear()
        done = invoke("convert", SHIPPED, *args, "--no-onnx")
        return (seen[0] if seen else None), done.exception

    return run


def test_text_is_always_the_calibration_text(measured, texts, tmp_path):
    small = ("--samples", 8, "--length", 16)
    text, other = ("--text", texts / "plain.txt"), ("--validation-text", texts / "first.txt")
    by_text = convert(SHIPPED, tmp_path / "o", dry_run=True, **asked(drop=2, text=texts / "plain.txt", **SMALL)).plan
    assert by_text.attention != (10, 11)
    for i, (args, chosen, validated) in enumerate((
        (("--drop", 2, *text, *small), by_text.attention, None),
        (("--drop", 2, *text, *small, "--strategy", "search"), by_text.attention, None),
        (("--drop", 2, *text, *small, *other), by_text.attention, [str(texts / "first.txt")]),
        (("--drop", 2), (10, 11), None),
        (("--drop", 2, *other, "--validation-text", TEXT), (10, 11), [str(texts / "first.txt"), str(TEXT)]),
        (("--drop", 2, "--strategy", "last", *other), (10, 11), [str(texts / "first.txt")]),
        (("--layers", "3", "--validation-text", texts / "content.ndjson", "--text-field", "content"), (3,),
         [str(texts / "content.ndjson")]),
    )):  # fmt: skip
        options, error = measured(tmp_path / str(i), "--validate", *args)
        assert error is None
        accuracy = options["accuracy"]
        assert (accuracy and accuracy.text) == validated
        plan = json.loads((tmp_path / str(i) / "pruning_plan.json").read_text())
        assert tuple(plan["attention"]) == chosen
    assert accuracy.text_field == "content"


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("--layers", "3", "--text", "plain.txt"), "--validation-text"),
        (("--drop", 2, "--strategy", "last", "--text", "plain.txt"), "looks at no text"),
        (("--drop", 2, "--text", "plain.txt", "--validation-text", "data.jsonl"), "is the calibration text too"),
        (("--drop", 2, "--validation-text", "absent.txt"), "no such text"),
        (("--drop", 2, "--validation-text", "content.ndjson"), "--text-field"),
        (("--drop", 2, "--text-field", "content"), "--text-field is for"),
    ],
)
def test_texts_that_do_not_fit_are_refused_before_anything_is_written(measured, texts, tmp_path, args, match):
    args = [texts / arg if "." in str(arg) else arg for arg in args]
    options, error = measured(tmp_path / "out", "--validate", *args)
    assert options is None
    assert isinstance(error, PruneAttnError)
    assert match in str(error)
    assert not (tmp_path / "out").exists()


def test_without_a_text_to_measure_on_the_report_says_so(tmp_path):
    pruned = convert(SHIPPED, tmp_path / "pruned", Layers([2]), options=WriteOptions(graph=None)).output
    results = validate(SHIPPED, pruned, latency=None, compute=Compute("torch")).results
    assert results["same_function"]["ok"]
    assert not results["accuracy"]
    assert any("--validation-text" in note for note in results["notes"])


# -- the text that comes along, and the note that names it ----


def test_a_choice_by_depth_alone_is_noted(texts, tmp_path):
    for args in (("--drop", 2), ("--drop", 2, "--strategy", "keep-last", "--sublayer", "mlp")):
        assert "--text general" in invoke("convert", SHIPPED, tmp_path / "out", *args, "--dry-run").stdout
    assert "--text general" in invoke("select", SHIPPED, "--drop", 2, "-o", tmp_path / "p.json").stdout
    for args in (dict(layers=[2]), dict(plan=tmp_path / "p.json"), dict(drop=2, text=texts / "plain.txt", **SMALL)):
        assert not any("--text general" in note for note in convert(SHIPPED, "o", dry_run=True, **asked(**args)).notes)


def test_general_comes_along_and_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "general").write_text("A file of that name is ./general.")
    text = read_text("general", load_tokenizer(SHIPPED))
    assert 900_000 < text.bytes < 1_300_000
    folder = ROOT / "pruner" / "texts"
    assert text.content == (folder / "general.txt").read_text("utf-8")
    sources = (folder / "SOURCES.md").read_text("utf-8")
    assert text.sha256 in sources
    for kind in ("prose", "dialogue", "questions and answers", "source code"):
        assert f"| {kind} |" in sources
    plan = select(SHIPPED, output=tmp_path / "plan.json", **asked(drop=2, text="general", **SMALL)).plan
    assert plan.selection["calibration"]["text"] == "general"
    assert read_text("./general", load_tokenizer(SHIPPED)).bytes < 100


# -- losses that are no numbers ----


@pytest.fixture
def broken(tmp_path):
    """The shipped model with one value of one tensor set."""

    def make(tensor: str, value: float) -> Path:
        target = tmp_path / "broken"
        shutil.copytree(SHIPPED, target)
        weights = load_file(target / "model.safetensors")
        weights[tensor].view(-1)[0] = value
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        return target

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("strategy", ["similarity", "search", "exhaustive"])
def test_select_names_the_tensor(broken, tmp_path, value, strategy):
    name = "model.layers.4.self_attn.o_proj.weight"
    source = broken(name, value)
    with pytest.raises(PruneAttnError, match=rf"model\.safetensors: {name} holds (NaN|infinity)"):
        select(source, output=tmp_path / "plan.json", **asked(drop=2, strategy=strategy, text=TEXT, **SMALL))
    assert not (tmp_path / "plan.json").exists()


def test_validate_and_sweep_name_the_tensor(broken, tmp_path):
    name = "model.layers.4.mlp.down_proj.weight"
    source = broken(name, float("nan"))
    with pytest.raises(PruneAttnError, match=name):
        sweep(source, tmp_path / "s", **swept(text=TEXT, fractions="2", window=64, limit=1, rounds=0))
    pruned = convert(source, tmp_path / "pruned", 2, options=WriteOptions(graph=None)).output
    asked = Accuracy(TEXT, window=64, max_tokens=640)
    with pytest.raises(PruneAttnError, match=name):
        validate(source, pruned, accuracy=asked, latency=None, compute=Compute("torch"))


def test_sets_whose_loss_is_no_number_are_never_chosen():
    """As where half precision overflows without some sublayer: 1 must stay, whatever the rest says."""
    cost = {1: float("inf"), 2: 2.0, 3: 3.0, 4: 0.5}

    def losses(sets, samples):
        return torch.tensor([[sum(cost[i] for i in s)] * samples for s in sets], dtype=torch.float64).numpy()

    for found in (
        search(losses, (1, 2, 3, 4), 3, samples=4, screen=2, confirm=2),
        exhaustive(losses, (1, 2, 3, 4), 3, 4),
    ):
        assert found.sets[3][1] == {2, 3, 4}


def test_a_model_that_overflows_is_told_so(make_llama, tmp_path):
    """Finite weights, and no loss that is a number: the head's logits are beyond float32."""
    source = make_llama("large", with_tokenizer=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    for strategy in ("similarity", "search"):
        with pytest.raises(PruneAttnError, match="not a number in float32: values overflow"):
            select(source, output=tmp_path / "plan.json", **asked(drop=1, strategy=strategy, text=TEXT, **SMALL))


def test_evaluator_gives_no_nan(broken):
    from pruner.checkpoint import open_checkpoint

    source = broken("model.layers.4.mlp.down_proj.weight", float("nan"))
    ids = read_text(TEXT, load_tokenizer(SHIPPED)).ids[:32].reshape(2, 16)
    evaluator = Evaluator(open_checkpoint(source), ids, sublayer="mlp", objective="ce")
    assert evaluator.losses([frozenset(), frozenset({2})]).tolist() == [float("inf")] * 2
    assert evaluator.losses([frozenset({4})]) < 20
    assert evaluator.perplexity(frozenset()) == float("inf")


def test_to_measure_on_the_calibration_text_is_told(tmp_path):
    text = tmp_path / "seen.txt"
    text.write_text(TEXT.read_text()[:20_000])
    convert(SHIPPED, out := tmp_path / "out", 1, calibration=Calibration(text, samples=1, length=16))
    measured = {"accuracy": Accuracy(text, max_tokens=1024, window=128), "latency": None, "compute": Compute("torch")}
    assert any("chosen by this very text" in note for note in validate(SHIPPED, out, **measured).results["notes"])
    text.write_text(text.read_text()[1:])
    assert not any("chosen by this very text" in note for note in validate(SHIPPED, out, **measured).results["notes"])
