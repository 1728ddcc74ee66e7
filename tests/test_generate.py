"""``generate``: the tokenizer without transformers, prompts from standard input, chat templates."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SHIPPED, run_program
from programs import generate_lightly

from export.generate import generate
from prune_attn import WriteOptions, convert
from pruner import PruneAttnError
from pruner.prompt import PromptTokenizer
from pruner.text import load_tokenizer

TEXTS = ("It was a dark night", "Größe \N{GRINNING FACE}", "a\nb </s> c", "x")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ->{% endif %}"
)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    convert(SHIPPED, output := tmp_path_factory.mktemp("generate") / "pruned", 4, options=WriteOptions(dtype="float32"))
    return output


@pytest.fixture
def source(tmp_path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "source"))


@pytest.fixture
def chatty(pruned, tmp_path) -> Path:
    output = Path(shutil.copytree(pruned, tmp_path / "chatty"))
    (output / "chat_template.jinja").write_text(TEMPLATE)
    return output


def edit(directory: Path, **fields) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_ids_are_those_of_transformers(source, adds_bos):
    if not adds_bos:
        file = json.loads((source / "tokenizer.json").read_text())
        (source / "tokenizer.json").write_text(json.dumps(file | {"post_processor": None}))
    ours, theirs = PromptTokenizer(source), load_tokenizer(source)
    for text in TEXTS:
        assert ours.ids(text) == theirs(text)["input_ids"]
        assert ours.plain_ids(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.text(ours.ids(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    assert ours.eos_id() == theirs.eos_token_id == 2


def test_a_directory_without_tokenizer_json(source):
    want = [PromptTokenizer(source).ids(text) for text in TEXTS]
    (source / "tokenizer.json").unlink()
    assert [PromptTokenizer(source).ids(text) for text in TEXTS] == want
    (source / "tokenizer.model").unlink()
    with pytest.raises(PruneAttnError, match="has no tokenizer that loads"):
        PromptTokenizer(source)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(PruneAttnError, match=r"tokenizer\.json: is no tokenizer that loads"):
        PromptTokenizer(source)


def test_padding_and_truncation_of_training_are_not_those_of_a_prompt(source):
    from tokenizers import Tokenizer

    want = PromptTokenizer(source).ids(TEXTS[0])
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(2), tokenizer.enable_padding(length=64)
    tokenizer.save(str(source / "tokenizer.json"))
    assert PromptTokenizer(source).ids(TEXTS[0]) == want


def test_text_by_onnx_runtime_needs_neither_torch_nor_transformers(pruned):
    by_torch = generate(pruned, "It was", backend="torch", device="cpu").text
    assert run_program(generate_lightly, pruned).strip() == by_torch.strip()


def test_a_prompt_from_standard_input(pruned, cli):
    words = ("generate", pruned, "--device", "cpu", "--new-tokens", "4", "--json")
    want = json.loads(cli(*words, "--prompt", "It was\n a night", check=0).stdout)["tokens"]
    for end in ("\n", "\r\n", ""):
        said = cli(*words, "--prompt", "-", input=f"\N{BYTE ORDER MARK}It was\n a night{end}", check=0).stdout
        assert json.loads(said)["tokens"] == want


def test_standard_input_that_is_closed(pruned, cli):
    done = cli("generate", pruned, "--prompt", "-", check=2, preexec_fn=lambda: os.close(0))
    assert "standard input is closed" in done.stderr


def test_standard_input_that_is_no_text(pruned, cli):
    done = cli("generate", pruned, "--prompt", "-", input=b"It was \xff", text=False, check=2)
    assert done.stderr.decode() == "prune-attn: standard input is not UTF-8 text (byte 7); save it as UTF-8\n"


@pytest.mark.parametrize("where", ["file", "config", "list"])
def test_a_chat_template_as_transformers_applies_it(chatty, where):
    if where != "file":
        (chatty / "chat_template.jinja").unlink()
        listed = [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        edit(chatty, chat_template=TEMPLATE if where == "config" else listed)
    said = load_tokenizer(chatty).apply_chat_template(
        [{"role": "user", "content": " Why? "}], add_generation_prompt=True, return_dict=False
    )
    tokenizer = PromptTokenizer(chatty)
    assert tokenizer.chat_ids(" Why? ") == said
    assert said.count(1) == 1  # BOS is the template's
    assert "[INST] Why? [/INST] ->" in tokenizer.text(said)


def test_chat(chatty, cli):
    words = ("generate", chatty, "--device", "cpu", "--new-tokens", "4", "--json")
    plain, chat = (json.loads(cli(*words, "--prompt", "Why?", *more, check=0).stdout) for more in ((), ("--chat",)))
    assert chat["prompt_tokens"] == len(PromptTokenizer(chatty).chat_ids("Why?")) > plain["prompt_tokens"]
    assert chat["tokens"] == generate(chatty, "Why?", new_tokens=4, device="cpu", chat=True).tokens


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, r"has no chat template .*; leave out --chat"),
        ("{% for %}", "its chat template fails"),
        ("{{ raise_exception('system only') }}", r"its chat template fails \(.*system only"),
        ("{{ messages[5].content }}", "its chat template fails"),
        ("{{ ().__class__.__bases__ }}", "its chat template fails"),
    ],
)
def test_chat_templates_that_do_not_work(chatty, cli, template, said):
    path = chatty / "chat_template.jinja"
    path.unlink() if template is None else path.write_text(template)
    done = cli("generate", chatty, "--prompt", "Why?", "--chat", check=2)
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(PruneAttnError, match=said):
        generate(chatty, "Why?", chat=True)
