"""Sources that contradict themselves: what is taken, what is refused, and what it is held against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHIPPED, asked, edit_config, tree
from safetensors.torch import load_file, save_file, save_model

from export.convert import convert
from export.deliver import export
from export.generate import generate
from export.gguf import write_gguf
from export.verify import verify
from pruner.checkpoint import open_checkpoint
from pruner.errors import PruneAttnError
from pruner.model import TorchLanguageModel
from pruner.summary import inspect

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "source")
    return tmp_path / "source"


def refused(source: Path, match: str, verb: Callable[..., object] = convert, **options: object) -> str:
    """One line that matches, nothing written, the source as it was."""
    before, beside = tree(source), sorted(source.parent.iterdir())
    with pytest.raises(PruneAttnError, match=match) as error:
        verb(source, source.parent / "out", **asked(**{"drop": 1} | options) if verb is convert else {})
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert "report this" not in str(error.value)
    assert (tree(source), sorted(source.parent.iterdir())) == (before, beside)
    return str(error.value)


def edit_weights(source: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(source / "model.safetensors")
    edit(state)
    save_file(state, source / "model.safetensors")


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def transformers_logits(directory: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits


# -- tied embeddings ---------------------------------------------------------------------------------------------------


def test_a_tied_model_with_a_head_that_differs_is_untied(source, tmp_path, text_ids):
    edit_config(source, tie_word_embeddings=True)  # the shipped model's head is its own
    for out, make in ((tmp_path / "cut", lambda out: convert(source, out, **asked(drop=2))),
                      (tmp_path / "whole", lambda out: export(source, out))):  # fmt: skip
        notes = make(out).notes
        assert any("tie_word_embeddings" in note and "head" in note for note in notes)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        assert verify(out, against=source).problems == []
    ids = text_ids(20)
    right = transformers_logits(SHIPPED, ids)
    assert torch.equal(transformers_logits(tmp_path / "whole", ids), right)
    assert torch.equal(transformers_logits(source, ids), right)  # what transformers 5 makes of the source
    edit_weights(source, lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    assert not any("tie_word_embeddings" in note for note in convert(source, tmp_path / "equal", **asked(drop=2)).notes)
    assert json.loads((tmp_path / "equal/config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_model_whose_matrix_is_called_the_head(make_llama, tmp_path, text_ids):
    from transformers import LlamaForCausalLM

    tied = make_llama("tied", tie_word_embeddings=True)
    source = tmp_path / "source"
    shutil.copytree(tied, source)
    save_model(LlamaForCausalLM.from_pretrained(tied), source / "model.safetensors")
    if HEAD not in load_file(source / "model.safetensors"):  # which name is kept is the library's choice
        edit_weights(source, lambda state: state.update({HEAD: state.pop(EMBEDDING)}))
    assert EMBEDDING not in load_file(source / "model.safetensors")
    convert(source, tmp_path / "out", **asked(layers="2")), convert(tied, tmp_path / "right", **asked(layers="2"))
    assert verify(tmp_path / "out", against=source).problems == []
    ids = [5, 17, 99, 3]
    assert torch.equal(transformers_logits(tmp_path / "out", ids), transformers_logits(tmp_path / "right", ids))
    edit_config(source, tie_word_embeddings=False)
    refused(source, "embed_tokens.weight' is in no shard", layers="2")


# -- adapters, leftovers, indexes, names -------------------------------------------------------------------------------


def test_an_adapter_beside_full_weights_is_refused(cli, source):
    edit_json(source / "adapter_config.json", peft_type="LORA")
    (source / "adapter_model.safetensors").write_bytes(b"")
    refused(source, "adapter.*merge_and_unload")
    assert "merge_and_unload" in cli("inspect", source, check=2).stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("compression_config", {"quant_method": "compressed-tensors"}),
        ("quantization", {"group_size": 64, "bits": 4}),
    ],
)
def test_leftovers_of_quantisation_over_whole_weights(source, field, value):
    edit_config(source, **{field: value})
    refused(source, f"the weights are quantised .*but they are float16.*remove {field}")
    edit_weights(source, lambda s: s.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, dtype=torch.int32)}))
    assert "remove" not in refused(source, "is quantised .*convert from the unquantised")


@pytest.mark.parametrize("flags", [{"load_in_4bit": False, "load_in_8bit": False}, {"_load_in_8bit": False}])
def test_a_quantization_config_that_quantises_nothing_is_taken(source, tmp_path, flags):
    edit_config(source, quantization_config={"quant_method": "bitsandbytes"} | flags)
    convert(source, tmp_path / "out", **asked(drop=2))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert verify(tmp_path / "out", against=source).problems == []
    transformers_logits(tmp_path / "out", [1, 2])


def test_stale_indexes(make_llama, tmp_path):
    source = make_llama("source", tie_word_embeddings=True, max_shard_size="200KB", num_hidden_layers=6)
    index = source / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    first = sorted(source.glob("*.safetensors"))[0].name
    right = transformers_logits(source, [1, 2, 3])
    found["weight_map"] |= {HEAD: first, "model.layers.0.self_attn.rotary_emb.inv_freq": first}
    index.write_text(json.dumps(found))
    assert torch.equal(transformers_logits(source, [1, 2, 3]), right)
    assert open_checkpoint(source).decoder.tied
    convert(source, tmp_path / "out", **asked(layers="2"))
    assert verify(tmp_path / "out", against=source).problems == []
    edit_config(source, tie_word_embeddings=False)
    refused(source, "lm_head.weight' is in .*not there", layers="2")


def test_names_of_architectures(source, tmp_path):
    edit_config(source, architectures=["LLaMAForCausalLM"])  # of old conversions
    (
        convert(source, tmp_path / "cut", **asked(drop=2)),
        convert(source, tmp_path / "blocks", **asked(drop=2, sublayer="block")),
    )
    assert json.loads((tmp_path / "blocks/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    shutil.rmtree(tmp_path / "cut"), shutil.rmtree(tmp_path / "blocks")
    edit_config(source, model_type="mistral", architectures=["LlamaForCausalLM"])
    refused(source, "model_type is 'mistral'")
    edit_config(source, model_type=...)
    refused(source, '"model_type": "llama"')
    edit_config(source, model_type="llama", architectures="LlamaForCausalLM")
    refused(source, "architectures must be a list")
    edit_config(source, architectures=["LlamaForCausalLM", "OtherModel"])
    refused(source, "LlamaForCausalLM and OtherModel")


def test_shards_without_their_index(make_llama):
    source = make_llama("source", max_shard_size="200KB")
    (source / "model.safetensors.index.json").unlink()
    refused(source, r"shards without their index; download model\.safetensors\.index\.json")


def test_what_keeps_a_file_from_being_read(make_llama, source):
    config = source / "config.json"
    config.unlink()
    refused(source, "no config.json in it; download config.json too")
    config.symlink_to("gone")
    refused(source, r"config\.json: is a link to a file that is gone")
    config.unlink(), config.mkdir()
    refused(source, r"config\.json: is not a regular file")
    config.rmdir(), config.write_bytes(b'{"a": "\xe3"}')
    assert "codec" not in refused(source, r"config\.json: .* not UTF-8")
    sharded = make_llama("sharded", max_shard_size="200KB")
    index = sharded / "model.safetensors.index.json"
    index.unlink(), index.symlink_to("gone")
    refused(sharded, r"index\.json: is a link to a file that is gone")


@pytest.mark.parametrize(
    ("rename", "match"),
    [
        (lambda n: n.removeprefix("model."), "saved from LlamaModel"),
        (lambda n: n.replace(".weight", ".base_layer.weight"), "merge_and_unload"),
        (lambda n: f"base_model.model.{n}", "save it as"),
    ],
)
def test_names_of_tensors(source, rename, match):
    def edit(state: dict[str, torch.Tensor]) -> None:
        renamed = {rename(name): tensor for name, tensor in state.items() if name != HEAD}
        state.clear()
        state.update(renamed)

    edit_weights(source, edit)
    refused(source, match)
    shutil.copy(SHIPPED / "model.safetensors", source)
    edit_weights(source, lambda s: s.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 160)}))
    refused(source, "merge_and_unload")


def test_metadata_null_is_none(source, tmp_path):
    raw = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length]) | {"__metadata__": None}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert len(load_file(source / "model.safetensors")) == 111  # the library takes it
    convert(source, tmp_path / "out", **asked(drop=2))


# -- configurations that transformers refuses --------------------------------------------------------------------------

ROPE = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    "fields",
    [
        dict(rms_norm_eps=0), dict(attention_bias=None), dict(mlp_bias=0), dict(tie_word_embeddings="true"),
        dict(use_cache=None), dict(hidden_act=None), dict(max_position_embeddings="1024"),
        dict(max_position_embeddings=1024.0), dict(initializer_range=1), dict(initializer_range=2.0),
        dict(pretraining_tp="1"), dict(attention_dropout="0"), dict(eos_token_id="2"), dict(eos_token_id=["2"]),
        dict(bos_token_id=[1]), dict(pad_token_id=1.5), dict(pad_token_id=True), dict(head_dim=33),
        dict(num_attention_heads=3, num_key_value_heads=3), dict(dtype="float99"), dict(id2label={"a": "b"}),
        dict(layer_types=["full_attention"]), dict(per_layer_config=1), dict(num_labels=None), dict(num_labels="2"),
        dict(attribute_map=1), dict(ignore_keys_at_rope_validation=1),
        dict(rope_parameters=ROPE | {"rope_type": "linear"}), dict(rope_parameters=ROPE | {"rope_type": "dynamic"}),
        dict(rope_parameters=ROPE | {"rope_type": "yarn"}), dict(rope_parameters=ROPE | {"rope_type": "longrope"}),
        dict(rope_parameters=ROPE | {"rope_type": "llama3", "factor": 2.0}),
        dict(rope_parameters=None, rope_scaling={"type": "linear"}),
    ],
)  # fmt: skip
def test_what_transformers_refuses_is_refused(source, fields):
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    edit_config(source, **fields)
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError, StrictDataclassError)):
        LlamaConfig.from_pretrained(source)
    for key in fields:
        if key not in ("num_key_value_heads", "rope_parameters"):
            refused(source, key if key != "rope_scaling" else "rope scaling 'linear': has no factor")
            break
    else:
        refused(source, "rope scaling '.*': has no .*factor")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(rope_parameters=ROPE | {"rope_type": "linear", "factor": None}), "'linear': factor is None"),
        (dict(rope_parameters=ROPE | {"rope_type": "linear", "factor": "2"}), "'linear': factor is '2'"),
        (dict(rope_parameters=ROPE | {"rope_type": "mine"}), "'mine' is none that transformers has"),
        (dict(max_position_embeddings=10**12), "max_position_embeddings is 1000000000000"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ],
)
def test_what_transformers_takes_and_cannot_run_is_refused(source, fields, match):
    edit_config(source, **fields)
    refused(source, match)


def test_layer_types_follow_the_blocks(source, tmp_path):
    edit_config(source, layer_types=["full_attention"] * 12)
    convert(source, tmp_path / "out", **asked(drop=2, sublayer="block"))
    transformers_logits(tmp_path / "out", [1, 2])  # which counts them


# -- generation_config.json and special tokens -------------------------------------------------------------------------


def genai_model(directory: Path) -> list[int]:
    import onnxruntime_genai as genai

    model = genai.Model(str(directory))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=8)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([[1, 300, 301]], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))


@pytest.mark.parametrize(
    ("fields", "config", "tokens"),
    [
        (dict(eos_token_id=[]), dict(eos_token_id=[]), dict(bos_token_id=1)),
        (dict(eos_token_id=None), dict(eos_token_id=None), dict(bos_token_id=1)),
        (dict(pad_token_id=-1, bos_token_id=None), dict(bos_token_id=None), dict(eos_token_id=2, pad_token_id=2)),
        (dict(eos_token_id=4096), {}, dict(bos_token_id=1)),
        (dict(top_k=10**6, do_sample=True), {}, dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)),
    ],
)
def test_generation_configs_that_onnxruntime_genai_must_load(source, tmp_path, fields, config, tokens):
    edit_json(source / "generation_config.json", **fields)
    edit_config(source, **config)
    convert(source, tmp_path / "out", **asked(drop=2, dtype="float32"))
    model = json.loads((tmp_path / "out/genai_config.json").read_text())["model"]
    assert {name: value for name, value in model.items() if name.endswith("_token_id")} == tokens
    assert genai_model(tmp_path / "out")[:3] == [1, 300, 301]
    assert len(generate(tmp_path / "out", "It was", new_tokens=3).tokens) <= 3


def test_no_end_of_text_in_a_gguf(source, tmp_path):
    gguf = pytest.importorskip("gguf")
    edit_json(source / "generation_config.json", eos_token_id=[])
    write_gguf(source, tmp_path / "model.gguf")
    assert "tokenizer.ggml.eos_token_id" not in gguf.GGUFReader(tmp_path / "model.gguf").fields


@pytest.mark.parametrize(
    "fields",
    [
        dict(eos_token_id="2"), dict(eos_token_id=[2.0]), dict(bos_token_id=[1]), dict(pad_token_id="0"),
        dict(temperature="0.6"), dict(temperature=-1.0), dict(top_p=1.5), dict(top_p="1"), dict(top_k=1.5),
        dict(top_k=-1), dict(repetition_penalty="1"), dict(repetition_penalty=0), dict(do_sample="yes"),
        dict(max_new_tokens="9"), dict(max_new_tokens=0), dict(early_stopping="x"), dict(num_beams="2"),
        dict(cache_implementation=5), dict(num_return_sequences=3), dict(num_return_sequences=3, num_beams=2),
    ],
)  # fmt: skip
def test_generation_configs_that_are_refused(source, fields):
    edit_json(source / "generation_config.json", **fields)
    key = next(iter(fields))
    for verb in (convert, export):
        refused(source, rf"generation_config\.json: {key} is", verb)


@pytest.mark.parametrize("text", ['{"temperature": NaN}', '{"top_p": 1e999}', '{"a": {"b": -Infinity}}'])
def test_numbers_that_are_none(source, text):
    (source / "generation_config.json").write_text(text)
    refused(source, r"generation_config\.json: .*(NaN|infinite)")


def with_added_token(directory: Path) -> None:
    """A ``[PAD]`` of id 4096, which a tokenizer gets and a model of 4096 embeddings does not."""
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append(
        {"id": 4096, "content": "[PAD]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    path.write_text(json.dumps(data))


def test_a_token_beyond_the_embeddings(cli, source, tmp_path):
    with_added_token(source)
    out, text = tmp_path / "out", tmp_path / "text.txt"
    notes = convert(source, out, **asked(drop=2, dtype="float32")).notes
    assert any("'[PAD]' (4096)" in note for note in notes)
    text.write_text("It was a day. [PAD] " * 2000)
    named = r"[PAD]"
    for args in (
        ("generate", out, "--backend", "torch", "--prompt", "It was [PAD]"),
        ("generate", out, "--prompt", "It was [PAD]"),
        ("select", source, "-o", tmp_path / "plan.json", "--drop", "2", "--text", text),
        ("validate", source, out, "--text", text, "--only", "accuracy"),
    ):
        assert named in cli(*args, check=2).stderr
    with pytest.raises(PruneAttnError, match=r"\[PAD\]"):
        TorchLanguageModel(out).prefill([[1, 4096]])
    for ids in ([[1.5]], [[True]], [["1"]]):
        with pytest.raises(PruneAttnError, match="token ids must be whole numbers"):
            TorchLanguageModel(out).prefill(ids)
    assert generate(out, "It was", backend="torch", new_tokens=2).tokens


def test_padding_with_a_token_beyond_the_embeddings(cli, source, tmp_path):
    with_added_token(source)
    edit_config(source, pad_token_id=4096)
    notes = convert(source, tmp_path / "out", **asked(drop=2, dtype="float32")).notes
    assert any("pad_token_id is 4096 ('[PAD]')" in note and "set it to null" in note for note in notes)
    with pytest.raises(AssertionError):  # the note is true
        transformers_logits(tmp_path / "out", [1])
    told = cli("generate", tmp_path / "out", "--backend", "torch", "--prompt", "It", check=2).stderr
    assert "[PAD]" in told
    assert inspect(open_checkpoint(source))["vocab_size"] == 4096
