"""The model card: metadata that the Hub takes, what it says, its snippets run, and what a person wrote in it kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SHIPPED, run_program
from huggingface_hub import ModelCard
from programs import convert_without_graph

from export.card import update_card
from export.licence import licence_notes, llama_licence
from prune_attn import Drop, Layers, SavedPlan, WriteOptions, convert, export, verify
from pruner import PruneAttnError

THEIRS = """---
license: llama2
license_link: LICENSE.txt
language:
- en
- de
tags: [facebook]
extra_gated_heading: x
---
# Llama
"""


def snapshot(tmp_path: Path, repo_id: str = "meta-llama/Llama-2-5m-hf", card: str = THEIRS) -> Path:
    """The shipped model as it would lie in the Hub's cache."""
    directory = tmp_path / f"models--{repo_id.replace('/', '--')}" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(SHIPPED, directory)
    (directory / "README.md").write_text(card)
    return directory


@pytest.fixture
def out(tmp_path: Path) -> Path:
    convert(SHIPPED, tmp_path / "out", 4, options=WriteOptions(dtype="float32"))
    return tmp_path / "out"


def measured(perplexity: float) -> dict[str, Any]:
    """What ``results.json`` says, as far as the card takes it."""
    estimate = {"value": 1.1, "low": 1.05, "high": 1.15}
    values = {"original": {"value": 27.58}, "pruned": {"value": perplexity}, "ratio": estimate}
    text = {"text": {"name": "Austen"}, "tokens": 4096, "window": 512, "stride": 256}
    return {
        "created": "2026-11-28T20:00:00Z",
        "environment": {"gpu": None, "cpu": {"name": "a CPU"}, "prune_attn": {"version": "0.1.0"}},
        "dtypes": {"torch": "float32"},
        "accuracy": {"torch": {"perplexity": values, "agreement": {**estimate, "value": 0.8}, **text}},
        "tasks": {},
        "latency": {},
        "models": {name: {"bytes": 10, "kv_cache_bytes_per_token": 4} for name in ("original", "pruned")},
    }


def perplexities(card: ModelCard) -> list[tuple[float, str]]:
    return [(r.metric_value, r.dataset_name) for r in card.data.eval_results if r.metric_type == "perplexity"]


def test_metadata(tmp_path):
    source = snapshot(tmp_path)
    (source / "LICENSE.txt").write_text("LLAMA 2 COMMUNITY LICENSE AGREEMENT")
    convert(source, tmp_path / "out", "33%")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.to_dict() == {
        "base_model": "meta-llama/Llama-2-5m-hf",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "attention-pruning", "onnx"],
        "license": "llama2",
        "license_link": "LICENSE.txt",
        "language": ["en", "de"],
    }
    for said in (
        "████████░░░░", "8, 9, 10, 11", "`last` (33%)", "Not validated", "2407.15516", "long contexts",
        "at commit `012345678901`", "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta",
    ):  # fmt: skip
        assert said in text
    assert "licensed under the LLAMA 2" in (tmp_path / "out" / "NOTICE.txt").read_text()
    assert verify(tmp_path / "out", source).ok
    convert(source, tmp_path / "again", "33%")
    assert (tmp_path / "again" / "README.md").read_text() == text
    # pruned once more from where nothing tells of the Hub, it still derives from it
    convert(tmp_path / "out", tmp_path / "twice", 1)
    data = ModelCard((tmp_path / "twice" / "README.md").read_text()).data
    assert data.base_model == "meta-llama/Llama-2-5m-hf"
    assert data.license == "llama2"


def test_what_went_before_and_where_nothing_goes(tmp_path):
    convert(SHIPPED, tmp_path / "once", Layers("9"))
    convert(tmp_path / "once", tmp_path / "twice", Layers("5"))
    text = (tmp_path / "twice" / "README.md").read_text()
    assert "█████░███░██" in text
    assert "attention removed at layers: 5, 9" in text
    exported = export(SHIPPED, tmp_path / "exported")
    assert not any("removed" in note for note in exported.notes)
    text = (tmp_path / "exported" / "README.md").read_text()
    assert "# gutenberg-llama-5m, laid out anew\n" in text
    assert "removed at layers: none" in text
    assert "Whole blocks" not in text
    assert ModelCard(text).data.tags == ["onnx"]


def test_without_anything_known(tmp_path, out):
    data = ModelCard((out / "README.md").read_text()).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    for damaged in (
        "---\n: [\n---\n",
        "---\n- a\n---\n",
        "\xff",
        "---\nlicense: {a: b}\nlanguage: [[]]\n---\n",
        "",
    ):
        source = snapshot(tmp_path / str(abs(hash(damaged))), card=damaged)
        convert(source, source / ".." / "out", 4, options=WriteOptions(graph=None))
        data = ModelCard((source / ".." / "out" / "README.md").read_text()).data.to_dict()
        assert set(data) == {"base_model", "library_name", "pipeline_tag", "tags"}
        assert "onnx" not in data["tags"]
        assert "ONNX" not in (source / ".." / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("license: mit\nlanguage: [en, no]", {"license": "mit", "language": ["en", "no"]}),
        ("license: [mit, apache-2.0]\nlanguage: no", {"license": ["mit", "apache-2.0"], "language": "no"}),
        ("license: on\nlicense_name: 2023-07-18\nlanguage:\n- yes\n- 12\n- 1.50\n- n", {
            "license": "on", "license_name": "2023-07-18", "language": ["yes", "12", "1.50", "n"]}),
        ("license: 0x1F\nlicense_link: 1.50\nlanguage: ~", {"license": "0x1F", "license_link": "1.50"}),
        ("license: !!bool 'x'\nlanguage: !!timestamp x", {"license": "x", "language": "x"}),
        ("license: [[mit]]\nlicense_name: {a: b}\nlanguage: [[en], fr, {a: b}, '']", {"language": ["fr"]}),
        ('license: "\\ud800 \\e[31m"\nlanguage: ["\\ud800"]', {
            "license": "\\ud800 \\x1b[31m", "language": ["\\ud800"]}),
        ("license: " + 1000 * "x", {}),
    ],
)  # fmt: skip
def test_what_is_carried_is_text(tmp_path, written, read):
    source = snapshot(tmp_path, card=f"---\n{written}\n---\n# x\n")
    convert(source, tmp_path / "out", 4, options=WriteOptions(graph=None))
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    carried = {k: v for k, v in card.data.to_dict().items() if k.startswith(("license", "language"))}
    assert carried == read


def test_a_hostile_card_costs_nothing(tmp_path):
    doubling = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    cards = (f"---\n{doubling}license: *a39\nlanguage: *a39\n---\n", "FIFO", "device", "huge", "link")
    for i, card in enumerate(cards):
        source = snapshot(tmp_path / str(i), card=card)
        if i:
            (source / "README.md").unlink()
        if card == "FIFO":
            os.mkfifo(source / "README.md")
        elif card == "device":
            (source / "README.md").symlink_to("/dev/zero")
        elif card == "huge":
            (source / "README.md").write_text("---\nlicense: mit\n---\n")
            os.truncate(source / "README.md", 1 << 33)
        elif card == "link":
            (source / "README.md").symlink_to("nowhere")
        out = tmp_path / f"out{i}"
        assert int(run_program(convert_without_graph, source, out, timeout=300)) < 488
        data = ModelCard((out / "README.md").read_text()).data.to_dict()
        assert set(data) == {"base_model", "library_name", "pipeline_tag", "tags"}


def test_a_persons_metadata_is_not_rewritten(out):
    """But for model-index: no text turns into a truth value, no comment goes."""
    front = "# mine\nlicense: mit\nlanguage: [en, no]\n"
    index = "model-index:\n- name: old\n\n  results: []\n"
    (out / "README.md").write_bytes(f"---\n{front}{index}date: 2023-07-18 # then\n---\n\n# Mine\n".encode())
    for _ in range(2):
        update_card(out, measured(31.5))
        text = (out / "README.md").read_text()
        assert f"---\n{front}date: 2023-07-18 # then\nmodel-index:\n- name: Mine\n" in text
        assert text.count("model-index") == text.count("- name: Mine") == 1
        assert perplexities(ModelCard(text)) == [(31.5, "Austen")]
    flow = "---\n{license: mit}\n---\n# Mine\n"  # cannot be added to by lines
    (out / "README.md").write_text(flow)
    with pytest.raises(PruneAttnError, match=r"README\.md: its metadata"):
        update_card(out, measured(31.5))
    assert (out / "README.md").read_text() == flow


NASTY = "a `b` <script>alert(1)</script> [x](http://y) ![i](z) | *c* _d_ $e$ &lt; \x1b[31m ~~f~~"


def shown(markdown: str) -> tuple[str, set[str]]:
    """What a reader sees, and the kinds of marks that made it."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = [t for block in parser.parse(markdown) for t in block.children or []]
    kinds = {t.type for t in tokens} - {"text_special"}
    return "".join("\n" if t.type == "softbreak" else t.content for t in tokens), kinds


def test_foreign_text_shows_as_it_is_written():
    from export.markdown import code, plain

    seen = NASTY.replace("\x1b", "\\x1b")
    assert shown(plain(NASTY)) == (seen, {"text"})
    assert shown(code(NASTY)) == (seen.replace("`", "'"), {"code_inline"})
    assert shown(f"| a |\n|---|\n| {plain(NASTY)} |")[0] == "a" + seen
    assert plain("llama_2_7b-hf [1.18, 1.24]") == "llama_2_7b-hf [1.18, 1.24]"
    assert len(plain("x" * 5_000_000)) == len(code("x" * 5_000_000)) - 2 == 100


def test_names_in_the_card_are_escaped(tmp_path):
    name = NASTY.replace("/", "∕")
    source = tmp_path / name
    shutil.copytree(SHIPPED, source)
    (source / "README.md").write_text(f"---\nlicense: '{NASTY[:60]}'\n---\n".replace("\x1b", ""))
    convert(source, tmp_path / "plan", 1)
    plan = json.loads((tmp_path / "plan" / "pruning_plan.json").read_text())
    plan |= {"strategy": 9 * NASTY, "requested": 100_000 * NASTY}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    convert(source, tmp_path / "out", SavedPlan(tmp_path / "plan.json"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert len(text) < 10_000
    assert text.replace("\n", "").isprintable()
    seen, kinds = shown(text.split("---\n", 2)[2].replace("<!--", "").replace("-->", ""))
    assert not kinds & {"html_inline", "image", "s_open", "em_open"}
    assert seen.count("<script>") >= 5
    assert "# a \\`b\\`" in text


def test_what_does_not_load_it_is_not_recommended(tmp_path, make_llama):
    snippet = "\nprune-attn export model --gguf model.gguf\n"
    convert(SHIPPED, tmp_path / "out", Layers("0,5", allow_first_layer=True))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "LLM(" not in text
    assert snippet in text
    assert "layer 0 has no attention" in text
    convert(SHIPPED, tmp_path / "none", Drop("100%", allow_all=True))
    text = (tmp_path / "none" / "README.md").read_text()
    assert "LLM(" not in text
    assert snippet not in text
    assert "no attention is left" in text
    convert(SHIPPED, tmp_path / "plain", 4)
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "LLM(model_id, trust_remote_code=True)" in text
    assert snippet in text
    assert "convert_hf_to_gguf.py" not in text
    convert(make_llama(intermediate_size=200), tmp_path / "odd", Layers("1"), options=WriteOptions(graph=None))
    text = (tmp_path / "odd" / "README.md").read_text()
    assert "LLM(model_id, trust_remote_code=True)" in text
    assert snippet not in text  # it has no tokenizer
    assert "no multiple of 256" in text
    convert(SHIPPED, tmp_path / "blocks", Drop(2, sublayer="block"))
    text = (tmp_path / "blocks" / "README.md").read_text()
    assert "LLM(model_id)" in text
    assert "trust_remote_code" not in text
    assert "██████████··" in text


@pytest.mark.parametrize("engine", ["transformers", "ONNX Runtime", "onnxruntime-genai"])
def test_snippets_run(out, engine, capsys):
    text = (out / "README.md").read_text()
    code = re.search(f"### {engine}\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    exec(code.replace("PATH", str(out)), {"__name__": "snippet"})
    said = capsys.readouterr().out.strip()
    from oracle import greedy, original
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    tokens = greedy(original(SHIPPED, [8, 9, 10, 11]), ids, 10)[0]
    if engine == "ONNX Runtime":
        assert said == tokenizer.decode(tokens[ids.shape[1]]).strip()
    else:
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() in said


def test_update(out):
    before = (out / "README.md").read_text()
    update_card(out, measured(31.5))
    card = ModelCard((out / "README.md").read_text())
    assert "| perplexity | 27.58 | 31.50 |" in card.text
    assert "Not validated" not in card.text
    assert perplexities(card) == [(31.5, "Austen")]
    assert card.data.model_name == "gutenberg-llama-5m, pruned"
    assert "model-index" in str(card)
    update_card(out, measured(30.25))  # again: in its place, not below
    text = (out / "README.md").read_text()
    assert text.count("| perplexity |") == 1
    assert "30.25" in text
    assert "31.5" not in text
    outside = re.compile(r"---.*?---\n|<!-- results.*?end of results -->", re.DOTALL)
    assert outside.sub("", text) == outside.sub("", before)
    assert verify(out, SHIPPED).ok
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_persons_own_card_is_kept(out):
    (out / "README.md").write_text("---\nlicense: mit\nwidget:\n- text: hi\n---\n\n# Mine\n\nMy words.\n")
    update_card(out, measured(31.5))
    card = ModelCard((out / "README.md").read_text())
    assert card.text.startswith("\n# Mine\n\nMy words.\n\n## Results\n")
    assert card.data.license == "mit"
    assert card.data.widget == [{"text": "hi"}]
    assert card.data.model_name == "Mine"
    (out / "README.md").write_text("---\nmodel-index: 5\nlicense: [\n---\n")
    with pytest.raises(PruneAttnError, match=r"README\.md: its metadata"):
        update_card(out, measured(31.5))
    (out / "README.md").unlink()
    with pytest.raises(PruneAttnError, match=r"README\.md: is missing"):
        update_card(out, measured(31.5))


@pytest.mark.parametrize(
    ("card", "family"),
    [
        ({"license": "llama2"}, "Llama 2"),
        ({"license": "llama3"}, "Llama 3"),
        ({"license": "llama3.1"}, "Llama 3.1"),
        ({"license": "other", "license_name": "llama-3.2"}, "Llama 3.2"),
        ({"license": "apache-2.0"}, None),
        ({}, None),
    ],
)
def test_licence_by_its_name(tmp_path, card, family):
    found = llama_licence(tmp_path, card)
    assert (found and found.family) == family


def test_licence_by_its_text_and_what_it_asks(tmp_path):
    assert licence_notes(None, tmp_path, "a/b") == []
    (tmp_path / "LICENSE.txt").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n...")
    licence = llama_licence(tmp_path, {})
    assert licence.key == "llama3.1"
    assert licence_notes(licence, tmp_path, "me/Llama-3.1-8B-attn") == []
    assert 'must begin with "Llama"' in licence_notes(licence, tmp_path, "me/my-llama")[0]
    (tmp_path / "LICENSE.txt").unlink()
    assert "copy of itself" in licence_notes(licence, tmp_path)[0]
    two = llama_licence(tmp_path, {"license": "llama2"})
    (tmp_path / "LICENSE").write_text("x")
    for name, fine in (("llama-2-7b-attn33", 1), ("Llama2-x", 1), ("my-Llama_2", 1), ("pruned", 0), ("llama-20", 0)):
        assert (licence_notes(two, tmp_path, f"me/{name}") == []) == fine
