"""Bad input gets one line that names the file, the right exit code, and leaves everything as it was."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHIPPED, asked, edit_config, tree

from prune_attn import WriteOptions, convert
from pruner import PruneAttnError, open_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def sharded(make_llama: Callable[..., Path]) -> Path:
    return make_llama("sharded", max_shard_size="200KB")


def rewrite_header(file: Path, edit: Callable[[dict], None]) -> None:
    """Change a header and write it back as it stands, whether or not it is true."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def refused(source: Path, match: str, **options: object) -> str:
    """Converting raises one line that matches, and nothing is written beside the source."""
    before, beside = tree(source) if source.is_dir() else None, sorted(source.parent.iterdir())
    with pytest.raises(PruneAttnError, match=match) as error:
        convert(source, source.parent / "out", **asked(**{"drop": 1} | options))
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert sorted(source.parent.iterdir()) == beside
    assert before is None or tree(source) == before
    return str(error.value)


def test_one_line_and_exit_code_2(cli, tmp_path):
    for args in (
        ["convert", tmp_path / "none", tmp_path / "out", "--drop", "4"],
        ["convert", SHIPPED, tmp_path / "out", "--drop", "4", "--plan", tmp_path / "none.json"],
        ["convert", SHIPPED, tmp_path / "out", "--frobnicate"],
        ["convert", SHIPPED],
        ["inspect", tmp_path],
        ["verify", tmp_path / "none"],
        ["prune", SHIPPED],
    ):
        done = cli(*args, check=2)
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith("prune-attn: ")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNE_ATTN_DEBUG", "1")
    assert "Traceback" in cli("inspect", tmp_path / "none").stderr


def test_not_a_checkpoint(tmp_path, source):
    refused(tmp_path / "none", "none: no such directory")
    refused(source / "config.json", r"config\.json: is a file")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, r"pytorch_model\.bin: is a safetensors file; call it model\.safetensors")
    (source / "pytorch_model.bin").rename(source / "model-4bit.safetensors")
    refused(source, r"its safetensors must be called model\.safetensors")
    (source / "model-4bit.safetensors").rename(source / "model.gguf")
    refused(source, "GGUF")
    (source / "model.gguf").unlink()
    refused(source, r"no model\.safetensors")
    (source / "config.json").write_text("{")
    refused(source, r"config\.json: is not JSON")
    (source / "config.json").write_text("[]")
    refused(source, r"config\.json: is not a JSON object")
    (source / "config.json").write_bytes(b"\xff\xfe")
    refused(source, r"config\.json: is not JSON")
    (source / "config.json").unlink()
    refused(source, r"no config\.json")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(architectures=["MistralForCausalLM"], model_type="mistral"), "MistralForCausalLM"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(model_type=...), "LlamaForCausalLM"),
        (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
        (dict(quantization_config={"quant_method": "awq"}), "awq"),
        (dict(quantization_config={"load_in_8bit": True}), "bitsandbytes"),
        (dict(num_hidden_layers=11), "layers.11"),
        (dict(num_hidden_layers=13), "layers.12"),
        (dict(intermediate_size=513), r"mlp\..*has shape"),
        (dict(num_key_value_heads=1), r"k_proj.weight' has shape"),
        (dict(num_key_value_heads=3), "no multiple"),
        (dict(vocab_size=4097), r"has shape \[4096, 160\]"),
        (dict(hidden_size="160"), "hidden_size"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers"),
        (dict(num_hidden_layers=10**30), "num_hidden_layers"),
        (dict(rope_theta="x"), "positive number"),
        (dict(rope_theta=[1]), "positive number"),
        (dict(extra=float("nan")), "is not JSON"),
        (dict(num_attention_heads=True), "num_attention_heads"),
        (dict(attention_bias=True), "q_proj.bias"),
        (dict(rope_theta=5.0), "rope_theta"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "contradicts"),
    ],
)
def test_config_that_is_not_this_llama(source, fields, match):
    edit_config(source, **fields)
    assert str(source) in refused(source, match)


def test_nvidias_own_nemotron_nas_is_not_a_pruned_llama(source, tmp_path):
    convert(source, tmp_path / "pruned", 4)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    for damage in (
        lambda b: b[3]["attention"].update(n_heads_in_group=5),
        lambda b: b[3]["ffn"].update(ffn_mult=1.3),
        lambda b: b[3]["ffn"].update(replace_with_linear=True),
        lambda b: b[3].pop("ffn"),
        lambda b: b.pop(),
    ):
        blocks = json.loads(json.dumps(config["block_configs"]))
        damage(blocks)
        edit_config(tmp_path / "pruned", block_configs=blocks)
        with pytest.raises(PruneAttnError, match="block_configs"):
            open_checkpoint(tmp_path / "pruned")


def test_quantised_tensors_without_a_word_in_the_config(source):
    def gptq(header: dict) -> None:
        header["model.layers.0.mlp.up_proj.qweight"] = header.pop("model.layers.0.mlp.up_proj.weight")

    rewrite_header(source / "model.safetensors", gptq)
    refused(source, "quantised")


NAME = "model.layers.3.mlp.up_proj.weight"
LIES: dict[str, tuple[Callable[[dict], None], str]] = {
    "overlap": (lambda h: h[NAME].update(data_offsets=[o - 64 for o in h[NAME]["data_offsets"]]), "overlaps"),
    "gap": (lambda h: h.pop(NAME), "gap"),
    "beyond the end": (
        lambda h: h.update(x={"dtype": "F16", "shape": [9], "data_offsets": [10985280, 10985298]}),
        "truncated",
    ),
    "size against shape": (lambda h: h[NAME].update(shape=[511, 160]), "spans"),
    "negative offset": (lambda h: h[NAME].update(data_offsets=[-2, 4]), "malformed"),
    "boolean shape": (lambda h: h[NAME].update(shape=[True, 160]), "malformed"),
    "no dtype": (lambda h: h[NAME].pop("dtype"), "lacks dtype"),
    "unknown dtype": (lambda h: h[NAME].update(dtype="Q4"), "Q4"),
    "entry is a list": (lambda h: h.update({NAME: [1, 2]}), "lacks dtype"),
    "three offsets": (lambda h: h[NAME].update(data_offsets=[1, 2, 3]), "lacks dtype"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"format": 1}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies(source, lie):
    edit, match = LIES[lie]
    rewrite_header(source / "model.safetensors", edit)
    assert "model.safetensors" in refused(source, match)


def test_file_that_is_no_safetensors(source):
    file = source / "model.safetensors"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for damaged, match in (
        (b"", "0 bytes"),
        (whole[:5], "5 bytes"),
        (whole[:100], "truncated"),
        (whole[:-1], "truncated"),
        (whole + b"\0", "does not mention"),
        (struct.pack("<Q", 2**63) + whole[8:], "absurd"),
        (struct.pack("<Q", length) + b"x" * length + whole[8 + length :], "cannot be read"),
        (struct.pack("<Q", length) + b"[" * length + whole[8 + length :], "cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 19) + b'{"a":{"x":1},"a":1}', "stands twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
    ):
        file.write_bytes(damaged)
        refused(source, match)
    file.unlink()
    file.symlink_to("nowhere")
    refused(source, "link to a file that is gone")
    file.unlink()
    file.mkdir()
    refused(source, "not a regular file")


def test_random_damage_never_escapes_as_another_error(source):
    file, rng = source / "model.safetensors", random.Random(0)
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    refusals = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(end)] = (
                rng.choice(b'{}[]",:0159-\x00\xff') if rng.random() < 0.7 else rng.randrange(256)
            )
        file.write_bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.1 else damaged)
        with contextlib.suppress(PruneAttnError):  # a flip can leave a header that is still true
            open_checkpoint(source)
            continue
        refusals += 1
    assert refusals > 250


def test_shards_and_index_that_disagree(sharded):
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    shards = sorted(f.name for f in sharded.glob("*.safetensors"))

    def with_map(edit: Callable[[dict], None]) -> None:
        data = json.loads(good)
        edit(data["weight_map"])
        index.write_text(json.dumps(data))

    with_map(lambda m: m.pop("model.norm.weight"))
    refused(sharded, "missing from it")
    with_map(lambda m: m.update({"model.norm.weight": shards[0]}))
    refused(sharded, "says that 'model.norm.weight' is in")
    with_map(lambda m: m.update(extra=shards[0]))
    refused(sharded, "it is not there")
    with_map(lambda m: m.update(extra="model-00099-of-00099.safetensors"))
    refused(sharded, r"model-00099-of-00099\.safetensors: is missing")
    for path in ("../sharded/" + shards[0], "/etc/passwd", ".."):
        with_map(lambda m, path=path: m.update(extra=path))
        refused(sharded, "not a file beside it")
    for text in ("{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "nonsense"):
        index.write_text(text)
        refused(sharded, r"index\.json")
    index.write_text(good.replace('"model.norm.weight"', '"lm_head.weight"'))
    refused(sharded, "stands twice")
    index.write_text(good)
    shutil.copy(sharded / shards[1], sharded / shards[2])
    refused(sharded, "is in .* too")


def test_tensor_missing_everywhere(source):
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.5.self_attn.v_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    refused(source, r"v_proj.weight' is in no shard")
    tensors["model.layers.5.self_attn.v_proj.weights"] = tensors["model.layers.5.self_attn.k_proj.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    refused(source, "does not belong")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(drop="0"), "drops nothing"),
        (dict(drop="0%"), "drops nothing"),
        (dict(drop="-3"), "neither a count"),
        (dict(drop="a third"), "neither a count"),
        (dict(drop="0.33"), "neither a count"),
        (dict(drop="101%"), "more than 100%"),
        (dict(drop=13), "only 12"),
        (dict(drop=12), "--allow-all"),
        (dict(drop="100%", sublayer="mlp"), "--allow-all"),
        (dict(drop=12, sublayer="block", allow_all=True), "no model be left"),
        (dict(drop=11, strategy="keep-last"), "--allow-first-layer"),
        (dict(drop=12, strategy="keep-last", allow_all=True), "only 11"),
        (dict(drop=4, strategy="deepest"), "unknown strategy"),
        (dict(drop=4, sublayer="head"), "unknown sublayer"),
        (dict(drop=4, dtype="int8"), "unknown dtype"),
        (dict(drop=4, max_shard_size="big"), "not a size"),
        (dict(drop=4, max_shard_size="0"), "not a size"),
        (dict(drop=None, layers="3,12"), "out of range"),
        (dict(drop=None, layers="3,5,3"), "twice"),
        (dict(drop=None, layers="3-5,4"), "twice"),
        (dict(drop=None, layers="5-3"), "written wrongly"),
        (dict(drop=None, layers="3;5"), "written wrongly"),
        (dict(drop=None, layers=""), "written wrongly"),
        (dict(drop=None, layers="-1"), "written wrongly"),
        (dict(drop=None, layers="0,3"), "--allow-first-layer"),
        (dict(drop=None, layers="0", sublayer="block"), "--allow-first-layer"),
        (dict(drop=None, layers="0-11", allow_first_layer=True), "--allow-all"),
        (dict(drop=None, layers="0-11", sublayer="block", allow_all=True), "no model be left"),
    ],
)
def test_options_that_cannot_be(source, options, match):
    refused(source, match, **options)


def test_output_that_must_not_be_touched(source, tmp_path):
    def no(output: Path, match: str, **options: object) -> None:
        before = tree(tmp_path)
        with pytest.raises(PruneAttnError, match=match):
            convert(source, output, **asked(drop=4, **options))
        assert tree(tmp_path) == before

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    no(stranger, "not empty")
    no(stranger, "not written by prune-attn", overwrite=True)
    (stranger / "pruning_plan.json").write_text('{"format": "prune-attn plan"}')
    no(stranger, "not written by prune-attn", overwrite=True)
    no(source, "source itself", overwrite=True)
    no(source / ".." / "source", "source itself")
    no(source / "out", "inside the source")
    (tmp_path / "loop").symlink_to("loop")
    no(tmp_path / "loop", "leads nowhere")
    with contextlib.chdir(stranger):
        no(Path("."), "you are in", overwrite=True)
    no(tmp_path, "contains the source", overwrite=True)
    (tmp_path / "link").symlink_to(source)
    no(tmp_path / "link", "source itself", overwrite=True)
    no(stranger / "thesis.tex", "not a directory", overwrite=True)
    no(stranger / "thesis.tex" / "deep", "not a directory")
    convert(source, tmp_path / "out", 4)
    no(tmp_path / "out", "--overwrite")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "mine.txt").write_text("not yours")
    no(tmp_path / "out", "mine.txt|notes", overwrite=True)
    shutil.rmtree(tmp_path / "out" / "notes")
    convert(source, tmp_path / "out", 2, options=WriteOptions(overwrite=True))
    assert json.loads((tmp_path / "out" / "pruning_plan.json").read_text())["attention"] == [10, 11]
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", 2)
    assert tree(tmp_path / "empty") == tree(tmp_path / "out")


def test_options_without_effect_are_refused(cli, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("words " * 50)
    for args, said in (
        (["convert", SHIPPED, out, "--drop", "4", "--seed", "1"], "--seed is for choosing by a text"),
        (["convert", SHIPPED, out, "--drop", "4", "--strategy", "last", "--text", text], "looks at no text"),
        (["select", SHIPPED, "--drop", "4", "--resume"], "--resume is for choosing by a text"),
        (["export", SHIPPED, "--max-shard-size", "1MB"], "--max-shard-size belongs to an export into an OUTPUT"),
        (["validate", SHIPPED, out, "--only", "latency", "--stride", "8"], "--stride is for accuracy"),
        (["validate", SHIPPED, out, "--limit", "8"], "--limit is for tasks"),
    ):
        assert said in cli(*args, check=2).stderr
    assert list(tmp_path.iterdir()) == [text]


def test_partial_plans_of_others_are_left(cli, tmp_path):
    partial = tmp_path / "out.plan.partial.json"
    partial.write_text("somebody's hours")
    cli("convert", SHIPPED, tmp_path / "out", "--drop", "4", check=0)
    assert partial.read_text() == "somebody's hours"
    text = tmp_path / "text.txt"
    text.write_text("Some words. " * 900)
    chosen = ["--drop", "1", "--text", text, "--samples", "2", "--length", "32"]
    cli("convert", SHIPPED, tmp_path / "dry", *chosen, "--dry-run", check=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", partial.name, "text.txt"]


def test_epsilon(source):
    for value in (None, "a", -1):
        edit_config(source, rms_norm_eps=value)
        refused(source, "rms_norm_eps is")


def test_a_report_is_never_written_into_the_original(cli, source, tmp_path):
    before = tree(source)
    cli("convert", source, tmp_path / "out", "--drop", "1", check=0)
    for output in (source, source / "report"):
        said = cli("validate", source, tmp_path / "out", "-o", output, check=2).stderr
        assert f"{output}: lies in the original" in said
    assert tree(source) == before


def test_an_unpruned_copy_is_no_pruned_model(cli, source):
    assert f"{source}: lacks no sublayer of {SHIPPED}" in cli("validate", SHIPPED, source, check=2).stderr
    assert not (source / "report").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to drop"),
        (["--drop", "4", "--layers", "3"], "leave out --drop"),
        (["--drop", "1", "--strategy", "last", "--text", "text.txt"], "looks at no text"),
        (["--drop", "1", "--seed", "0"], "--seed is for choosing by a text"),
        (["--drop", "1", "--samples", "4"], "--samples is for choosing by a text"),
        (["--drop", "1", "--resume"], "--resume is for choosing by a text"),
        (["--layers", "3", "--text", "text.txt"], "--text is for choosing by it"),
    ],
)
def test_options_of_no_use(cli, tmp_path, options, said):
    """Before anything is fetched: there is no such repository."""
    assert said in cli("convert", "nobody/nothing", tmp_path / "out", *options, check=2).stderr
    if "--seed" in options or "--samples" in options:
        assert said in cli("select", "nobody/nothing", "-o", tmp_path / "plan.json", *options, check=2).stderr
