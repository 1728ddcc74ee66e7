"""The main job end to end: what is written, that it loads, and that nothing else changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHIPPED, asked, edit_config, hub_snapshot, tree
from oracle import greedy, ids, logits, original, pruned
from safetensors import safe_open
from safetensors.torch import load_file

from prune_attn import Drop, Layers, WriteOptions, convert, verify
from pruner import PruneAttnError, open_checkpoint


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def expected_names(source: Path, attention: set[int], mlp: set[int]) -> set[str]:
    gone = [f"layers.{i}.{part}." for i in attention for part in ("self_attn", "input_layernorm")]
    gone += [f"layers.{i}.{part}." for i in mlp for part in ("mlp", "post_attention_layernorm")]
    return {name for name in all_tensors(source) if not any(part in name for part in gone)}


def test_command_drops_the_deepest_third(cli, shipped, tmp_path):
    before = tree(shipped)
    done = cli("convert", shipped, tmp_path / "out", "--drop", "33%", check=0)
    assert "attention at 8, 9, 10, 11" in done.stdout
    assert "prune-attn verify" in done.stdout
    assert done.stderr == ""  # quiet in a pipe
    source, output = all_tensors(shipped), all_tensors(tmp_path / "out")
    assert output.keys() == expected_names(shipped, {8, 9, 10, 11}, set())
    assert all(output[k].dtype == source[k].dtype and torch.equal(output[k], source[k]) for k in output)
    assert tree(shipped) == before


def test_json_and_python_say_the_same(cli, shipped, tmp_path):
    told = json.loads(cli("convert", shipped, tmp_path / "a", "--drop", "4", "--json", check=0).stdout)
    result = convert(shipped, tmp_path / "b", 4)
    assert told["after"] == result.after
    assert result.before["parameters"] == sum(t.numel() for t in all_tensors(shipped).values())
    assert result.after["parameters"] == sum(t.numel() for t in all_tensors(tmp_path / "b").values())
    assert result.after["bytes"] == 2 * result.after["parameters"]
    assert result.after["kv_cache_bytes_per_token"] == 2 * 2 * 5 * 32 * 8  # K and V, fp16, 5 heads of 32, 8 layers
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_files_that_come_along_and_that_do_not(shipped, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shipped, source)
    along = ["LICENSE.txt", "USE_POLICY.md", "Notice", "chat_template.jinja", "special_tokens_map.json",
             "additional_chat_templates/tool_use.jinja", "added_tokens.json"]  # fmt: skip
    behind = ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "original/params.json", "README.md",
              "model.onnx", "genai_config.json", "report/results.json", "modeling_other.py"]  # fmt: skip
    for name in along + behind:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(json.dumps({"name": name}) if name in along and name.endswith("json") else name)
    convert(source, tmp_path / "out", 2)
    written = tree(tmp_path / "out")
    for name in [*along, "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"]:
        assert written[name] == (source / name).read_bytes()
    for name in behind:
        assert written.get(name) != name.encode()


CASES = {
    "middle": dict(attention=[1, 2], options=dict(layers="1-2")),
    "last": dict(attention=[3], options=dict(drop=1)),
    "first": dict(attention=[0, 2], options=dict(layers="2,0", allow_first_layer=True)),
    "every attention": dict(attention=[0, 1, 2, 3], options=dict(drop="100%", allow_all=True)),
    "mlp": dict(mlp=[0, 3], options=dict(layers="0,3", sublayer="mlp")),
    "every mlp": dict(mlp=[0, 1, 2, 3], options=dict(drop=4, sublayer="mlp", allow_all=True)),
    "blocks": dict(attention=[1, 2], mlp=[1, 2], options=dict(layers="1,2", sublayer="block")),
}
SHAPES = {
    "grouped heads, 4 shards": dict(max_shard_size="200KB"),
    "bf16, tied": dict(dtype="bfloat16", tie_word_embeddings=True),
    "biases, wide heads": dict(attention_bias=True, mlp_bias=True, head_dim=32, num_key_value_heads=4),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_original_with_the_sublayers_off(make_llama, tmp_path, shape, case):
    source = make_llama(**SHAPES[shape])
    attention, mlp = CASES[case].get("attention", []), CASES[case].get("mlp", [])
    convert(source, tmp_path / "out", **asked(max_shard_size="300KB", **CASES[case]["options"]))
    assert verify(tmp_path / "out", source).ok
    for dtype in (torch.float32, torch.bfloat16):
        for implementation in ("eager", "sdpa"):
            expected = logits(original(source, attention, mlp, dtype, implementation), ids())
            assert torch.equal(logits(pruned(tmp_path / "out", dtype, implementation), ids()), expected)


@pytest.mark.parametrize(
    "options", [dict(drop=4), dict(layers="0,5", allow_first_layer=True), dict(drop=12, allow_all=True)]
)
def test_cached_generation_gives_the_uncached_tokens(shipped, tmp_path, options):
    convert(shipped, tmp_path / "out", **asked(**options))
    model = pruned(tmp_path / "out")
    assert len([n for n, _ in model.named_parameters() if "q_proj" in n]) == 12 - len(
        convert_attention(tmp_path / "out")
    )
    prompts = ids(2, 24, 4096)
    mask = torch.ones_like(prompts)
    mask[1, :9], prompts[1, :9] = 0, 0  # left padding
    expected = greedy(model, prompts, 24, mask, use_cache=False)
    for cache in ("dynamic", "static"):
        assert torch.equal(greedy(model, prompts, 24, mask, cache_implementation=cache), expected)
    beams = [greedy(model, prompts, 12, mask, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)
    alone = greedy(model, prompts[1:, 9:], 24)
    assert torch.equal(alone[0, -24:], expected[1, -24:])


def convert_attention(directory: Path) -> list[int]:
    return json.loads((directory / "pruning_plan.json").read_text())["attention"]


def test_logits_of_cached_steps_are_close_to_the_uncached(shipped, tmp_path):
    convert(shipped, tmp_path / "out", Layers("0,3,11", allow_first_layer=True))
    model, tokens = pruned(tmp_path / "out"), ids(2, 40, 4096)
    expected, cache, got = logits(model, tokens), None, []
    with torch.no_grad():
        for chunk in (tokens[:, :16], *tokens[:, 16:].split(1, dim=1)):
            out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            got.append(out.logits)
    assert (torch.cat(got, 1) - expected).abs().max() < 1e-4
    assert cache.get_seq_length() == 40
    assert sum(layer.is_initialized for layer in cache.layers) == 9  # a dropped attention owns no slot


def test_save_pretrained_round_trips_and_compiles(shipped, tmp_path):
    convert(shipped, tmp_path / "out", 4)
    model = pruned(tmp_path / "out")
    expected = logits(model, ids(1, 16, 4096))
    model.save_pretrained(tmp_path / "again", max_shard_size="4MB")
    assert torch.equal(logits(pruned(tmp_path / "again"), ids(1, 16, 4096)), expected)
    compiled = torch.compile(model, backend="aot_eager")
    assert (logits(compiled, ids(1, 16, 4096)) - expected).abs().max() < 1e-4


def test_register_makes_auto_classes_work_without_remote_code(shipped, tmp_path):
    from transformers import AutoModelForCausalLM

    import pruner

    convert(shipped, tmp_path / "out", 4)
    pruner.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__module__.startswith("pruner.")
    model.save_pretrained(tmp_path / "again")  # ships the code, so that others load it without us
    assert torch.equal(logits(pruned(tmp_path / "again"), ids(1, 9, 4096)), logits(model, ids(1, 9, 4096)))


ROPES = {
    "default, old fields": dict(rope_theta=500000.0, rope_scaling=None, rope_parameters=...),
    "llama3, old fields": dict(
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        rope_parameters=...,
    ),  # fmt: skip
    "linear, oldest spelling": dict(
        rope_theta=..., rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters=...
    ),
    "new fields alone": dict(
        rope_theta=...,
        rope_scaling=...,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0},
    ),
    "none at all": dict(rope_theta=..., rope_scaling=..., rope_parameters=...),
}


@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_carried_through_in_every_spelling(make_llama, tmp_path, rope):
    source = make_llama()
    edit_config(source, **ROPES[rope])
    convert(source, tmp_path / "out", Layers("2"))
    model = pruned(tmp_path / "out")
    expected = logits(original(source, [2]), ids(1, 200))
    assert torch.equal(logits(model, ids(1, 200)), expected)
    model.save_pretrained(tmp_path / "again")
    for directory in (tmp_path / "out", tmp_path / "again"):
        config = json.loads((directory / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert (config["rope_scaling"] is None) == (config["rope_parameters"]["rope_type"] == "default")
        # what transformers 4 reads: rope_theta and rope_scaling, nothing else
        edit_config(directory, rope_parameters=...)
        assert torch.equal(logits(pruned(directory), ids(1, 200)), expected)


def test_vocabulary_of_the_dialect(shipped, tmp_path):
    convert(shipped, tmp_path / "out", Layers("3,11"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert [i for i, b in enumerate(config["block_configs"]) if b["attention"]["no_op"]] == [3, 11]
    kept = {"no_op": False, "n_heads_in_group": 1, "replace_with_linear": False}
    dropped = {"no_op": True, "n_heads_in_group": None, "replace_with_linear": False}
    ffn = {"no_op": False, "ffn_mult": 3 * 512 / (2 * 160), "replace_with_linear": False}
    assert config["block_configs"][2] == {"attention": kept, "ffn": ffn}
    assert config["block_configs"][3] == {"attention": dropped, "ffn": ffn}
    loaded = pruned(tmp_path / "out").config
    assert loaded.block_configs[3].attention.no_op is True  # vLLM reads it so
    assert loaded.block_configs[2].ffn.ffn_mult == 4.8


@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(4096, 11008), (5120, 13824), (8192, 28672), (2048, 5632), (160, 512)]
)
def test_engines_compute_the_mlp_width_back(shipped, hidden, intermediate):
    from dataclasses import replace

    from pruner.nemotron_nas.dialect import engine_intermediate_size

    decoder = replace(open_checkpoint(shipped).decoder, hidden_size=hidden, intermediate_size=intermediate)
    assert engine_intermediate_size(decoder) == intermediate


def test_odd_mlp_width_is_said_clearly(make_llama, tmp_path):
    source = make_llama(intermediate_size=200)
    result = convert(source, tmp_path / "out", Layers("1"))
    assert any("256" in note for note in result.notes)
    assert torch.equal(logits(pruned(tmp_path / "out"), ids()), logits(original(source, [1]), ids()))


def test_whole_blocks_give_a_plain_llama(shipped, tmp_path):
    convert(shipped, tmp_path / "out", Drop("25%", sublayer="block", strategy="keep-last"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 9)
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    source, output = all_tensors(shipped), all_tensors(tmp_path / "out")
    assert torch.equal(output["model.layers.8.mlp.up_proj.weight"], source["model.layers.11.mlp.up_proj.weight"])
    assert verify(tmp_path / "out", shipped).ok


def test_pruning_further(shipped, tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    convert(shipped, a, 3)  # 9, 10, 11
    result = convert(a, b, "25%")  # of the original's 12: three more
    assert result.plan.attention == (6, 7, 8)
    assert torch.equal(logits(pruned(b), ids(1, 32, 4096)), logits(original(shipped, range(6, 12)), ids(1, 32, 4096)))
    result = convert(b, c, Layers("10", sublayer="block"))  # the attention went before; the MLP goes now
    assert (result.plan.attention, result.plan.mlp) == ((), (10,))
    expected = logits(original(shipped, range(6, 12), [10]), ids(1, 32, 4096))
    assert torch.equal(logits(pruned(c), ids(1, 32, 4096)), expected)
    config = json.loads((c / "config.json").read_text())
    assert config["num_hidden_layers"] == 12
    assert config["block_configs"][10]["attention"]["no_op"]
    assert config["block_configs"][10]["ffn"]["no_op"]
    assert verify(c, b).ok
    with pytest.raises(PruneAttnError, match="layer 7 has no attention left"):
        convert(b, tmp_path / "d", Layers("7"))


def test_percentages_are_of_the_original_after_blocks_went(shipped, tmp_path):
    convert(shipped, tmp_path / "a", Drop("33%", sublayer="block"))
    assert open_checkpoint(tmp_path / "a").decoder.num_layers == 8
    assert convert(tmp_path / "a", tmp_path / "b", "33%", dry_run=True).plan.attention == (4, 5, 6, 7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_conversion_is_pytorchs(shipped, tmp_path, dtype):
    convert(shipped, tmp_path / "out", 4, options=WriteOptions(dtype=dtype))
    source, output = all_tensors(shipped), all_tensors(tmp_path / "out")
    assert all(torch.equal(output[k], source[k].to(getattr(torch, dtype))) for k in output)
    assert verify(tmp_path / "out", shipped).ok
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert pruned(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def test_overflow_is_refused_and_nothing_written(make_llama, tmp_path):
    from safetensors.torch import save_file

    source = make_llama(dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruneAttnError, match=r"up_proj.*too large for float16"):
        convert(source, tmp_path / "out", Layers("1"), options=WriteOptions(dtype="float16"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_hub_cache_snapshot_is_a_source_and_the_output_holds_real_files(shipped, tmp_path):
    snapshot = hub_snapshot(shipped, tmp_path / "models--someone--gutenberg")
    convert(snapshot, tmp_path / "out", 4)
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert verify(tmp_path / "out", snapshot).ok
    plan = json.loads((tmp_path / "out" / "pruning_plan.json").read_text())
    assert plan["source"]["name"] == "someone/gutenberg"


def test_old_rotary_buffers_go(shipped, tmp_path):
    from safetensors.torch import save_file

    source = tmp_path / "source"
    shutil.copytree(shipped, source)
    tensors = load_file(source / "model.safetensors")
    for i in range(12):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out", 4)
    assert not any("inv_freq" in name for name in all_tensors(tmp_path / "out"))
    assert verify(tmp_path / "out", source).ok


def test_tokenizer_loads_where_only_the_model_type_named_it(shipped, tmp_path):
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    shutil.copytree(shipped, source)
    (source / "tokenizer_config.json").unlink()
    convert(source, tmp_path / "out", 4)
    text = "It was a dark and stormy night."
    expected = AutoTokenizer.from_pretrained(source)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)(text).input_ids == expected


def test_layout_on_disk(make_llama, tmp_path):
    source = make_llama(max_shard_size="200KB", attention_bias=True)
    convert(source, tmp_path / "out", Layers("2"), options=WriteOptions(max_shard_size="400KB"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(tmp_path / "out").values())
    place: dict[str, tuple[str, int, int]] = {}
    for shard in shards:
        raw = shard.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert (8 + length) % 4096 == 0
        header = json.loads(raw[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert len(raw) - 8 - length <= 400_000
        place |= {name: (shard.name, *entry["data_offsets"]) for name, entry in header.items()}
        with safe_open(shard, "pt") as file:  # the reference reader accepts it
            assert set(file.keys()) == header.keys()
    for i in range(4):
        for part, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            if part == "self_attn" and i == 2:
                continue
            run = [place[f"model.layers.{i}.{part}.{n}_proj.weight"] for n in names]
            assert len({file for file, _, _ in run}) == 1
            assert all(a[2] == b[1] for a, b in zip(run, run[1:], strict=False))
        assert len({place[n][0] for n in place if f"layers.{i}." in n}) == 1


def test_a_group_larger_than_a_shard_is_not_cut(make_llama, tmp_path):
    source = make_llama()
    convert(source, tmp_path / "out", Layers("2"), options=WriteOptions(max_shard_size="10KB"))
    for i in (0, 1, 3):
        where = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        assert len({where[f"model.layers.{i}.self_attn.{n}_proj.weight"] for n in "qkv"}) == 1
    assert verify(tmp_path / "out", source).ok


def test_dry_run_writes_nothing(cli, shipped, tmp_path):
    told = json.loads(
        cli("convert", shipped, tmp_path / "deep" / "out", "--drop", "4", "--dry-run", "--json", check=0).stdout
    )
    assert told["dry_run"]
    assert list(tmp_path.iterdir()) == []
    result = convert(shipped, tmp_path / "out", 4)
    assert (
        told["shards"] == {f.name: f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")} == result.shards
    )


def test_one_layer(make_llama, tmp_path):
    source = make_llama(num_hidden_layers=1)
    with pytest.raises(PruneAttnError, match="--allow-all"):
        convert(source, tmp_path / "out", 1)
    convert(source, tmp_path / "out", Drop(1, allow_all=True))
    assert torch.equal(logits(pruned(tmp_path / "out"), ids()), logits(original(source, [0]), ids()))
    assert torch.equal(
        greedy(pruned(tmp_path / "out"), ids(), 8), greedy(pruned(tmp_path / "out"), ids(), 8, use_cache=False)
    )


def test_inspect(cli, shipped, make_llama):
    facts = json.loads(cli("inspect", shipped, "--json", check=0).stdout)
    tensors = all_tensors(SHIPPED)
    assert facts["parameters"] == sum(t.numel() for t in tensors.values())
    one = sum(t.numel() for n, t in tensors.items() if ".4.self_attn." in n or ".4.input_layernorm" in n)
    assert facts["savings"]["attention"][3] == {
        "drop": 4, "parameters": 4 * one, "bytes": 8 * one, "kv_cache_bytes_per_token": 4 * 2 * 2 * 160,
    }  # fmt: skip
    assert "12 of 12" in cli("inspect", shipped, check=0).stdout
    grouped = json.loads(cli("inspect", make_llama(max_shard_size="200KB"), "--json", check=0).stdout)
    assert grouped["kv_cache_bytes_per_token"] == 2 * 4 * 2 * 16 * 4
    assert len(grouped["shards"]) > 1


def test_other_widths_are_offered_to_vllm(make_llama, tmp_path):
    """vLLM takes ``ffn.intermediate_size`` where a block has no ``ffn_mult``; what is saved still has ``ffn_mult``."""
    import pickle

    from transformers import AutoConfig

    for width in (200, 256):
        convert(
            make_llama(f"m{width}", intermediate_size=width),
            tmp_path / f"o{width}",
            Layers("1"),
            options=WriteOptions(graph=None),
        )
        config = AutoConfig.from_pretrained(tmp_path / f"o{width}", trust_remote_code=True)
        for ffn in (config.block_configs[1].ffn, pickle.loads(pickle.dumps(config.block_configs))[1].ffn):
            assert hasattr(ffn, "ffn_mult") == (width == 256)
            assert ffn.intermediate_size == (200 if width == 200 else None)
        assert config.to_dict()["block_configs"][1]["ffn"].keys() == {"no_op", "ffn_mult", "replace_with_linear"}
