"""model.onnx over the .safetensors bytes, against PyTorch with the same sublayers switched off."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT, SHIPPED, asked, edit_config, hub_snapshot, random_llama, run_program
from programs import convert_lightly, export_four_times, export_killed

from export.generate import generate
from export.onnx.runtime import open_on_cuda
from export.onnx.session import OnnxSession
from prune_attn import Drop, Layers, WriteOptions, convert, export, verify
from pruner import PruneAttnError, open_checkpoint
from pruner.checkpoint.config import read_decoder
from pruner.model import TorchLanguageModel
from pruner.names import GRAPH
from pruner.text import load_tokenizer

DROPPED = (3, 7, 11)
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
LIMIT = 1e-4


def small_llama(directory: Path, **fields) -> Path:
    """A random model whose logits are far apart."""
    small = {"vocab_size": 64, "intermediate_size": 96, "initializer_range": 0.2}
    return random_llama(directory, **small | fields)


def converted(place: Path, fields: dict, options: dict) -> TorchLanguageModel:
    """``convert`` a random model of these fields to ``place / "out"``; PyTorch with the same sublayers switched off."""
    source = small_llama(place / "source", **fields)
    convert(source, place / "out", **asked(**options))
    oracle, layers = TorchLanguageModel(source), open_checkpoint(place / "out").decoder
    oracle.switch_off(
        set(range(layers.num_layers)) - set(layers.present("attention")),
        set(range(layers.num_layers)) - set(layers.present("mlp")),
    )
    return oracle


def difference(session, oracle, prompts, steps: int = 8) -> float:
    """Largest logit difference over a prefill of these prompts and decode steps with the cache."""
    ours, theirs = session.prefill(prompts), oracle.prefill(prompts)
    worst = np.abs(ours - theirs).max()
    for _ in range(steps):
        tokens = theirs.argmax(-1)
        ours, theirs = session.decode(tokens), oracle.decode(tokens)
        worst = max(worst, np.abs(ours - theirs).max())
    return float(worst)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("onnx") / "pruned"
    convert(SHIPPED, output, Layers(",".join(map(str, DROPPED))), options=WriteOptions(dtype="float32"))
    return output


@pytest.fixture(scope="module")
def oracle() -> TorchLanguageModel:
    model = TorchLanguageModel(SHIPPED, dtype="float32")
    model.switch_off(DROPPED)
    return model


@pytest.fixture(scope="module")
def session(pruned) -> OnnxSession:
    return OnnxSession(pruned, device="cpu")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED)(TEXT)["input_ids"]


def genai_tokens(directory: Path, ids: list[int]) -> list[int]:
    """``ids``, which genai's own tokenizer must give for TEXT, and 32 greedy tokens more."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(directory))
    tokenizer = genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    assert tokenizer.encode(TEXT).tolist() == ids
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 32, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)))


@pytest.fixture
def copy(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "copy"))


# -- right -------------------------------------------------------------------------------------------------------------


def test_logits_prefill_and_64_steps(session, oracle, ids):
    batch = np.array([ids, ids[::-1]])
    assert np.abs(session.logits(batch) - oracle.logits(batch)).max() < LIMIT
    assert difference(session, oracle, [ids], steps=64) < LIMIT


def test_what_was_returned_stays(session, ids):
    session.prefill([ids])
    first = session.decode([7])
    kept = first.copy()
    session.decode([8])
    assert np.array_equal(first, kept)


def test_batch_of_unequal_prompts(session, oracle, ids):
    assert difference(session, oracle, [ids, ids[:3], ids[4:11]], steps=64) < LIMIT


@pytest.mark.parametrize("last_token_logits", [False, True])
def test_prompts_padded_as_on_cuda(copy, oracle, ids, last_token_logits):
    export(copy, last_token_logits=last_token_logits)
    session = OnnxSession(copy, max_length=100)  # no multiple of 64
    session.bucket = 64
    assert difference(session, oracle, [ids, ids[:3]], steps=4) < LIMIT
    assert difference(session, oracle, [(ids * 9)[:90], ids], steps=4) < LIMIT
    session.prefill([ids]), oracle.prefill([ids])
    assert np.abs(session.extend([ids[1:]]) - oracle.extend([ids[1:]])).max() < LIMIT
    if not last_token_logits:
        assert np.abs(session.logits(np.array([ids])) - oracle.logits(np.array([ids]))).max() < LIMIT


def test_prefill_in_parts(session, oracle, ids):
    session.prefill([ids[:5]]), session.extend([ids[5:6]])
    assert np.abs(session.extend([ids[6:]]) - oracle.prefill([ids])).max() < LIMIT
    assert np.abs(session.decode([7]) - oracle.decode([7])).max() < LIMIT
    session.prefill([ids[:5]]), session.decode(ids[5:6]), oracle.prefill([ids[:5]])
    assert np.abs(session.extend([ids[6:]]) - oracle.extend([ids[5:]])).max() < LIMIT


def test_a_prefill_begins_anew(session, oracle, ids):
    """One user's text must not be in the next one's memory: neither after an answer nor after a prompt refused."""
    from pruner.evaluate.compiled import CompiledLanguageModel

    compiled = CompiledLanguageModel(SHIPPED, dtype="float32", context=64)
    compiled.switch_off(DROPPED)
    oracle.reset()
    want = oracle.prefill([ids[:9]])
    for model in (session, oracle, compiled):
        model.prefill([ids]), model.prefill([ids[::-1], ids])
        assert np.abs(model.prefill([ids[:9]]) - want).max() < LIMIT
        with pytest.raises(PruneAttnError):
            model.prefill([[]])
        for go_on in (lambda model: model.decode([7]), lambda model: model.extend([[7, 8]])):
            with pytest.raises(PruneAttnError, match="nothing to go on from"):
                go_on(model)


def in_threads(count: int, work) -> list:
    """What ``work(i)`` gave, or the ``PruneAttnError`` that it raised, of threads that begin together."""
    from concurrent.futures import ThreadPoolExecutor

    begin = threading.Barrier(count)

    def run(i: int):
        begin.wait()
        try:
            return work(i)
        except PruneAttnError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("held", [False, True])
def test_threads_do_not_mix_their_texts(session, oracle, ids, held):
    prompts = [ids[i : i + 4 + i] for i in range(4)]

    def greedy(model, prompt: list[int], steps: int = 6) -> list[int]:
        tokens = [int(model.prefill([prompt]).argmax())]
        for _ in range(steps):
            tokens.append(int(model.decode(tokens[-1:]).argmax()))
        return tokens

    def work(i: int) -> list[int]:
        with session if held else contextlib.nullcontext():
            return greedy(session, prompts[i])

    alone = [greedy(oracle, prompt) for prompt in prompts]
    for _ in range(3):
        for got, want in zip(in_threads(4, work), alone, strict=True):
            assert got == want or (not held and "another thread" in str(got))


def test_a_text_taken_over_by_another_thread(session, oracle, ids):
    for model in (session, oracle):
        model.prefill([ids])
        in_threads(1, lambda _, model=model: model.prefill([ids[:3]]))
        for go_on in (lambda model: model.decode([7]), lambda model: model.extend([[7]])):
            with pytest.raises(PruneAttnError, match="another thread has begun a text"):
                go_on(model)
        model.prefill([ids]), model.decode([7])


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"layers": "1"}),
        ({}, {"layers": "0", "allow_first_layer": True}),
        ({}, {"layers": "3"}),
        ({}, {"layers": "0-3", "allow_all": True}),
        ({}, {"layers": "1,2", "sublayer": "mlp"}),
        ({}, {"layers": "1", "max_shard_size": "100KB"}),
        ({"num_hidden_layers": 1}, {"layers": "0", "allow_all": True}),
        ({"tie_word_embeddings": True}, {"layers": "1"}),
        ({"attention_bias": True, "mlp_bias": True}, {"layers": "1"}),
        ({"head_dim": 64}, {"layers": "1"}),
        ({"head_dim": 80}, {"layers": "1"}),
        ({"head_dim": 128, "num_key_value_heads": 4}, {"layers": "1"}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, {"layers": "1"}),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, {"layers": "1"}),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                }
            },
            {"layers": "1"},
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64,
                }
            },
            {"layers": "1"},
        ),
    ],
)  # fmt: skip
def test_shapes(tmp_path, fields, options):
    oracle = converted(tmp_path, fields, options)
    onnx.checker.check_model(tmp_path / "out" / GRAPH)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, n).tolist() for n in (150, 40)]
    assert difference(OnnxSession(tmp_path / "out"), oracle, prompts) < LIMIT


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_from_its_own_bytes(tmp_path, dtype, ids):
    convert(SHIPPED, tmp_path / "out", Layers("3,7,11"), options=WriteOptions(dtype=dtype))
    onnx.checker.check_model(tmp_path / "out" / GRAPH)
    if dtype == "bfloat16":
        with pytest.raises(PruneAttnError, match="bfloat16 does not run on the CPU"):
            OnnxSession(tmp_path / "out", device="cpu")
        return
    reference = TorchLanguageModel(SHIPPED, dtype="float32")
    reference.switch_off(DROPPED)
    expected = reference.logits(np.array([ids]))
    error = OnnxSession(tmp_path / "out", device="cpu").logits(np.array([ids])) - expected
    assert np.linalg.norm(error) / np.linalg.norm(expected) < 1e-2


def plain(directory: Path):
    """(ids, mask) and caches to logits and caches, by plain ONNX Runtime on the CPU; no caches: empty ones."""
    import onnxruntime

    session = onnxruntime.InferenceSession(directory / GRAPH, providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

    def run(ids: np.ndarray, mask: np.ndarray, caches: list[np.ndarray] | None = None):
        inputs = session.get_inputs()[2:]
        empty = [np.zeros((len(ids), i.shape[1], 0, i.shape[3]), dtypes[i.type]) for i in inputs]
        feed = dict(zip((i.name for i in inputs), caches or empty, strict=True))
        logits, *caches = session.run(None, {"input_ids": ids, "attention_mask": mask, **feed})
        return logits, caches

    return run


@pytest.mark.parametrize("last_token_logits", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layers", ["3,7,11", "0-11"])
def test_a_row_padded_on_the_left_has_nan_for_logits(tmp_path, ids, dtype, last_token_logits, layers):
    convert(SHIPPED, tmp_path / "out", Layers(layers, allow_all=True), options=WriteOptions(dtype=dtype))
    export(tmp_path / "out", last_token_logits=last_token_logits)
    run, prompts = plain(tmp_path / "out"), (ids[:7], ids[7:11], ids[:2])
    batch, mask = np.zeros((3, 7), np.int64), np.zeros((3, 7), np.int64)
    for row, prompt in enumerate(prompts):
        batch[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    right, _ = run(batch, mask)
    batch[2], mask[2] = np.roll(batch[2], 5), np.roll(mask[2], 5)
    left, caches = run(batch, mask)
    assert np.isfinite(right).all()
    assert np.array_equal(left[:2], right[:2])
    assert np.isnan(left[2]).all()
    assert np.isfinite(caches).all()  # a service's next request lies in the same buffers
    mask = np.pad(mask, ((0, 0), (0, 1)))
    mask[[0, 1, 2], [7, 4, 7]] = 1
    step, caches = run(np.full((3, 1), 7), mask, caches)
    assert np.isfinite(step[:2]).all()
    assert np.isnan(step[2]).all()
    assert np.isfinite(caches).all()


@pytest.mark.parametrize("last_token_logits", [False, True])
def test_the_guard_changes_no_other_row_by_a_bit(tmp_path, monkeypatch, last_token_logits):
    """As on a GPU: everything bound, fp16, a mask of fixed length, beside the graph without the guard."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_guard import run_guard_works

    convert(SHIPPED, tmp_path / "out", 8)
    assert run_guard_works(str(tmp_path / "out"), last_token_logits, False, "cpu") == {"wrong": []}
    bare = onnx.load(tmp_path / "out" / "bare.onnx", load_external_data=False)
    assert not [node.name for node in bare.graph.node if "guard" in node.name]


def test_last_token_logits(copy, oracle, ids):
    export(copy, last_token_logits=True)
    session = OnnxSession(copy)
    assert difference(session, oracle, [ids, ids[:3]]) < LIMIT
    with pytest.raises(PruneAttnError, match="scores no text"):
        session.logits(np.array([ids]))


def test_no_last_token_beyond_the_context(tmp_path):
    """Where no attention is left to refuse it; in ONNX Runtime itself, since our session asks no such thing."""
    import onnxruntime

    convert(small_llama(tmp_path / "source"), tmp_path / "out", Layers("0,1,2,3", allow_all=True))
    export(tmp_path / "out", context=4, last_token_logits=True)
    session = onnxruntime.InferenceSession(tmp_path / "out" / GRAPH, providers=["CPUExecutionProvider"])
    for tokens in (4, 5):
        ids = np.full((1, tokens), 7)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if tokens == 4:
            assert session.run(["logits"], feed)[0].shape == (1, 1, 64)
        else:
            with pytest.raises(Exception, match="last_column"):
                session.run(["logits"], feed)


def test_the_first_product_does_not_wait(copy):
    """By ONNX Runtime's own profile: nothing that concerns the last token runs before the layers."""
    import onnxruntime

    export(copy, last_token_logits=True)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(copy / "profile")
    session = onnxruntime.InferenceSession(copy / GRAPH, options, providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.ones((1, 4), np.int64), "attention_mask": np.ones((1, 4), np.int64)}
    for node in session.get_inputs()[2:]:
        feed[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
    session.run(["logits"], feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = sorted((e["ts"], e["name"]) for e in events if e["name"].endswith("_kernel_time"))
    names = [name.removesuffix("_kernel_time") for _, name in ran]
    assert names[:3] == ["model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.qkv_proj"]
    assert names.index("last_token.column") > names.index("model.norm")


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_graph_holds_no_weights_and_says_what_it_is(pruned):
    path = pruned / GRAPH
    onnx.checker.check_model(path)
    model = onnx.load_model(path, load_external_data=False)
    assert path.stat().st_size < 100_000
    assert "model.layers.4.self_attn.o_proj" in {node.name for node in model.graph.node}
    properties = {prop.key: prop.value for prop in model.metadata_props}
    shard = open_checkpoint(pruned).shards[0]
    assert json.loads(properties["prune_attn.shards"])[shard.path.name]["header_sha256"] == shard.header_sha256
    assert json.loads(properties["prune_attn.plan"])["attention"] == list(DROPPED)


def test_a_long_context_takes_no_room(tmp_path):
    source = small_llama(tmp_path / "source", max_position_embeddings=131072)
    convert(source, tmp_path / "out", Layers("1"))
    assert (tmp_path / "out" / GRAPH).stat().st_size < 100_000


def test_export_into_an_output(tmp_path, ids):
    with pytest.raises(PruneAttnError, match="name an output"):
        export(SHIPPED)
    result = export(SHIPPED, tmp_path / "out", context=512, options=WriteOptions(dtype="float32"))
    assert (result.packed, result.attention, result.context) == (12, 12, 512)
    assert verify(tmp_path / "out", SHIPPED).ok
    session = OnnxSession(tmp_path / "out")
    assert session.max_length == 512
    assert difference(session, TorchLanguageModel(SHIPPED, dtype="float32"), [ids]) < LIMIT


def test_after_save_pretrained(copy, tmp_path, oracle, ids):
    from transformers import AutoModelForCausalLM

    import pruner

    pruner.register()
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.save_pretrained(tmp_path / "saved")
    result = export(tmp_path / "saved")
    assert result.packed == 0
    assert difference(OnnxSession(tmp_path / "saved"), oracle, [ids]) < LIMIT
    model.save_pretrained(copy)  # over the shards that a graph lies beside
    assert not (copy / GRAPH).exists()


def test_convert_without_torch(tmp_path):
    run_program(convert_lightly, SHIPPED, tmp_path / "out")
    assert (tmp_path / "out" / GRAPH).exists()
    convert(SHIPPED, tmp_path / "plain", 4, options=WriteOptions(graph=None))
    assert not (tmp_path / "plain" / GRAPH).exists()


def test_mixed_dtypes(tmp_path):
    from safetensors.torch import load_file, save_file

    source = small_llama(tmp_path / "source", dtype="float16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(PruneAttnError, match="--dtype float16"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = convert(source, tmp_path / "out", Layers("1"))
    assert any("no model.onnx" in note for note in result.notes)
    assert not (tmp_path / "out" / GRAPH).exists()
    assert export(source, tmp_path / "mended", options=WriteOptions(dtype="float16")).packed == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"head_dim": 24}, "multiple of 16"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64, "factor": 4.0,
                }
            },
            "'longrope'",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, fields, message):
    with pytest.raises(PruneAttnError, match=message):
        export(small_llama(tmp_path / "source", **fields), tmp_path / "out")


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_is_refused_is_refused_before_anything_is_copied(tmp_path, dtype, monkeypatch):
    shutil.copytree(SHIPPED, source := tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: llama2\n---\n")  # whose notes come last
    monkeypatch.setattr(sys.modules["export.write"], "write_shards", lambda *_: pytest.fail("weights were copied"))
    with pytest.raises(PruneAttnError, match=r"--context 99999: .*source was made for 1 to 1024 tokens"):
        export(source, tmp_path / "out", context=99999, options=WriteOptions(dtype=dtype))
    assert not (tmp_path / "out").exists()


# -- stale -------------------------------------------------------------------------------------------------------------


def rewrite(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "rewritten": "yes"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4096)


@pytest.mark.parametrize("damage", [rewrite, truncate])
def test_a_changed_shard_is_caught(copy, damage):
    damage(copy)
    for use in (OnnxSession, export):
        with pytest.raises(PruneAttnError, match=r"model\.safetensors"):
            use(copy)
    assert any("model.safetensors" in problem for problem in verify(copy).problems)


def test_a_change_that_was_meant(copy, oracle, ids):
    rewrite(copy)
    export(copy, accept_changes=True)
    assert difference(OnnxSession(copy), oracle, [ids]) < LIMIT


def test_a_tampered_graph_is_caught(copy):
    model = onnx.load_model(copy / GRAPH, load_external_data=False)
    next(i for i in model.graph.initializer if i.external_data).external_data[1].value = "8192"
    (copy / GRAPH).write_bytes(model.SerializeToString())
    assert any("is not what prune-attn writes" in problem for problem in verify(copy).problems)
    (copy / GRAPH).write_bytes(b"\x00garbage")
    assert any(GRAPH in problem for problem in verify(copy).problems)
    with pytest.raises(PruneAttnError, match=GRAPH):
        OnnxSession(copy)


@pytest.mark.parametrize("name", ["logits", "present.3.key", "past_key_values.0.value", "input_ids"])
def test_a_graph_that_lacks_an_input_or_output(cli, copy, name):
    model = onnx.load_model(copy / GRAPH, load_external_data=False)
    for values in (model.graph.input, model.graph.output):
        for value in [value for value in values if value.name == name]:
            values.remove(value)
    (copy / GRAPH).write_bytes(model.SerializeToString())
    assert "model.onnx: is damaged; write it again" in cli("generate", copy, "--prompt", "It", check=2).stderr
    assert len(verify(copy).problems) == 1
    export(copy)
    assert verify(copy).problems == []


@pytest.mark.parametrize("damage", [b"", b"\x00garbage"])
def test_an_export_mends_what_is_damaged(copy, session, ids, damage):
    (copy / GRAPH).write_bytes(damage)
    (copy / "genai_config.json").write_text('{"model":')
    problems = verify(copy).problems
    assert len(problems) == 2
    assert all(f"prune-attn export {copy}" in problem for problem in problems)
    export(copy)
    assert verify(copy).ok
    assert np.array_equal(OnnxSession(copy).logits(np.array([ids])), session.logits(np.array([ids])))
    (copy / GRAPH).unlink()
    assert f"is missing; prune-attn export {copy}" in verify(copy).problems[0]


@pytest.mark.parametrize("fields", [{"rope_theta": 20000.0}, {"rms_norm_eps": 1e-3}])
def test_another_configuration_is_caught(copy, fields):
    """Of the same shards, so that nothing but the graph shows it."""
    config = json.loads((copy / "config.json").read_bytes())
    if "rope_theta" in fields and "rope_parameters" in config:
        fields = {"rope_parameters": config["rope_parameters"] | fields, **fields}
    edit_config(copy, **fields)
    for use in (OnnxSession, export):
        with pytest.raises(PruneAttnError, match=r"config\.json: .* is not what model\.onnx was made for"):
            use(copy)
    export(copy, accept_changes=True)
    OnnxSession(copy)


@pytest.mark.parametrize("how", ["whole blocks", "laid out"])
def test_save_pretrained_over_a_plain_output(tmp_path, how):
    """No class of ours takes the graph away there: it must fail, not compute with the new shards."""
    import onnxruntime
    from transformers import AutoModelForCausalLM

    if how == "whole blocks":
        convert(SHIPPED, tmp_path / "out", Drop(2, sublayer="block"))
    else:
        export(SHIPPED, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    onnxruntime.InferenceSession(tmp_path / "out" / GRAPH, providers=["CPUExecutionProvider"])
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(Exception, match="External data path does not exist"):
        onnxruntime.InferenceSession(tmp_path / "out" / GRAPH, providers=["CPUExecutionProvider"])
    with pytest.raises(PruneAttnError, match=r"model\.safetensors: is not a shard that model\.onnx was made over"):
        OnnxSession(tmp_path / "out")


def test_save_pretrained_without_the_head(copy):
    from transformers import AutoModel

    AutoModel.from_pretrained(copy, trust_remote_code=True).save_pretrained(copy)
    assert not (copy / GRAPH).exists()


def test_exports_at_the_same_time(copy):
    in_threads(3, lambda _: run_program(export_four_times, copy))
    assert verify(copy).ok


@pytest.mark.parametrize("index_too", [False, True])
def test_swapped_shards_are_caught(tmp_path, index_too):
    convert(SHIPPED, tmp_path / "out", Layers("3"), options=WriteOptions(max_shard_size="6MB"))
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))
    first.rename(tmp_path / "moved"), second.rename(first), (tmp_path / "moved").rename(second)
    if index_too:  # the checkpoint then is whole again, and only the graph knows
        index = tmp_path / "out" / "model.safetensors.index.json"
        text = index.read_text().replace(first.name, "moved").replace(second.name, first.name)
        index.write_text(text.replace("moved", second.name))
        assert open_checkpoint(tmp_path / "out").tensors
    for use in (OnnxSession, export):
        with pytest.raises(PruneAttnError, match=first.name):
            use(tmp_path / "out")
    assert any(first.name in problem for problem in verify(tmp_path / "out").problems)


@pytest.mark.parametrize("replaced", [0, 1])
def test_an_export_killed_in_place_leaves_a_graph_that_runs(copy, session, ids, replaced):
    run_program(export_killed, copy, replaced, check=-signal.SIGKILL)
    half = OnnxSession(copy)
    assert half.max_length == (256 if replaced else 1024)
    assert np.array_equal(half.logits(np.array([ids])), session.logits(np.array([ids])))
    problems = verify(copy).problems  # of the two files, one is the new graph's; what is half written is no stranger
    assert [("context_length" in problem) for problem in problems] == [True] * replaced
    assert len(list(copy.glob(".*.prune-attn-new-*"))) == 2 - replaced
    export(copy)  # cleans up after the killed one
    assert verify(copy).ok
    assert not list(copy.glob(".*"))


def test_an_export_in_place_keeps_the_options_of_the_earlier_one(copy, cli):
    def options(*given: str) -> tuple[int, bool]:
        done = json.loads(cli("export", copy, "--json", *given, check=0).stdout)
        genai = json.loads((copy / "genai_config.json").read_text())
        assert done["context"] == genai["model"]["context_length"]
        shape = onnx.load_model(copy / GRAPH, load_external_data=False).graph.output[0].type.tensor_type.shape
        assert done["last_token_logits"] == (shape.dim[1].dim_value == 1)
        return done["context"], done["last_token_logits"]

    assert options() == (1024, False)
    assert options("--context", "256") == (256, False)
    assert options("--last-token-logits") == (256, True)
    assert options() == (256, True)
    assert options("--all-logits", "--context", "512") == (512, False)
    assert export(copy, last_token_logits=True).context == 512
    edit_config(copy, max_position_embeddings=300)
    assert export(copy, accept_changes=True).context == 300
    (copy / GRAPH).write_bytes(b"damaged")
    assert options() == (300, False)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model.context_length", 512),
        ("model.decoder.num_hidden_layers", 12),
        ("model.decoder.outputs.logits", "l"),
        ("search.max_length", 5000),
        ("model.decoder", None),
    ],
)
def test_a_genai_config_of_another_graph_is_caught(copy, place, value):
    path = copy / "genai_config.json"
    config = json.loads(path.read_text())
    *folders, name = place.split(".")
    inner = config
    for folder in folders:
        inner = inner[folder]
    inner[name] = value
    config["search"]["temperature"] = 0.5  # a person's to change
    path.write_text(json.dumps(config))
    (problem,) = verify(copy).problems
    assert problem.startswith(f"{path}: ")
    export(copy)
    assert verify(copy).ok


# -- the session -------------------------------------------------------------------------------------------------------


def test_hub_cache_links(pruned, tmp_path, session, ids):
    snapshot = hub_snapshot(pruned, tmp_path / "models--a--b")
    batch = np.array([ids])
    assert np.array_equal(OnnxSession(snapshot).logits(batch), session.logits(batch))
    assert genai_tokens(snapshot, ids) == genai_tokens(pruned, ids)
    with pytest.raises(PruneAttnError, match="is a link"):
        export(snapshot)


def test_links_that_onnx_runtime_refuses(pruned, tmp_path):
    for file in pruned.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / GRAPH).unlink()
    shutil.copy(pruned / GRAPH, tmp_path)
    with pytest.raises(PruneAttnError, match="ONNX Runtime cannot open it"):
        OnnxSession(tmp_path)
    assert "is no link and model.safetensors is one" in verify(tmp_path).problems[0]


def test_generate_takes_what_the_context_holds(tmp_path):
    """A session has room for 4,096 tokens unless it is told; and text where bytes meet the prompt's."""
    source = tmp_path / "source"
    shutil.copytree(SHIPPED, source)
    edit_config(source, max_position_embeddings=8192)
    convert(source, tmp_path / "out", 2)
    said = generate(tmp_path / "out", TEXT * 210, new_tokens=3, device="cpu")
    assert said.prompt_tokens > 4096
    assert len(said.tokens) == 3
    tokenizer = load_tokenizer(source)
    for prompt in ("\N{LEFT DOUBLE QUOTATION MARK}", "x \N{GRINNING FACE}", "It was"):
        shown: list[str] = []
        said = generate(tmp_path / "out", prompt, new_tokens=6, device="cpu", write=shown.append)
        assert "".join(shown) == said.text
        assert said.text.strip() == tokenizer.decode(said.tokens, skip_special_tokens=True).strip()


def test_errors(session, oracle, pruned, ids):
    session.reset()
    with pytest.raises(PruneAttnError, match="prefill"):
        session.decode([1])
    for model in (session, oracle):
        model.prefill([ids, ids])
        for tokens, message in (([1], "1 tokens were given for the 2 rows"), ([1, 4096], "0 to 4095"), ([1, -1], "-1")):
            with pytest.raises(PruneAttnError, match=message):
                model.decode(tokens)
    for call, message in (
        (lambda: session.extend([ids, ids]), "only one text can be extended"),
        (lambda: session.logits(np.array([[0.5]])), "whole numbers"),
        (lambda: session.prefill([[0.5]]), "whole numbers"),
        (lambda: session.logits(np.zeros((1, 2000), int)), "do not fit"),
        (lambda: OnnxSession(pruned, device="cuda"), "float32 has no CUDA attention kernel"),
        (lambda: OnnxSession(pruned, max_length=5000), "1 to 1024"),
    ):
        with pytest.raises(PruneAttnError, match=message):
            call()
    short = OnnxSession(pruned, max_length=8)
    short.prefill([ids[:8]])
    with pytest.raises(PruneAttnError, match="context of 8 tokens is full"):
        short.decode([1])


def test_cuda_is_not_taken_for_granted(tmp_path):
    convert(SHIPPED, tmp_path / "out", 4)
    session = OnnxSession(tmp_path / "out")
    if session.device == "cuda":
        return
    with pytest.raises(PruneAttnError, match=r"driver|built without CUDA|is missing"):
        OnnxSession(tmp_path / "out", device="cuda")
    assert session.why_not_cuda


@pytest.mark.parametrize(
    ("capability", "kv_heads", "users", "seen"),
    [
        (9, 8, {}, {"ORT_ENABLE_XQA": "0", "CUBLAS_WORKSPACE_CONFIG": ":0:0"}),
        (9, 4, {}, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}),
        (8, 8, {}, {}),
        (9, 8, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, {"ORT_ENABLE_XQA": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    ],
)
def test_what_is_set_on_hopper_is_set_while_a_graph_opens_only(monkeypatch, capability, kv_heads, users, seen):

    names = ("ORT_ENABLE_XQA", "CUBLAS_WORKSPACE_CONFIG")

    def environment() -> dict[str, str]:
        return {name: os.environ[name] for name in names if name in os.environ}

    def opened(path, options, providers):
        assert options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"
        found.append(environment())
        raise RuntimeError("no GPU in this test")

    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    found: list[dict[str, str]] = []
    monkeypatch.setattr("onnxruntime.InferenceSession", opened)
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads}
    config = json.loads((SHIPPED / "config.json").read_bytes()) | heads
    with pytest.raises(PruneAttnError, match="no GPU in this test"):
        open_on_cuda(SHIPPED / GRAPH, read_decoder(config, SHIPPED / "config.json"), capability)
    assert found == [seen]
    assert environment() == users


# -- onnxruntime-genai -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_token_logits", [False, True])
def test_genai_gives_the_same_greedy_tokens(copy, oracle, ids, last_token_logits):
    export(copy, last_token_logits=last_token_logits)
    assert json.loads((copy / "genai_config.json").read_bytes())["search"]["max_length"] == 1024
    oracle.reset()
    tokens, logits = list(ids), oracle.prefill([ids])
    while len(tokens) < len(ids) + 32 and tokens[-1] != 2:
        tokens.append(int(logits.argmax()))
        logits = oracle.decode(tokens[-1:])
    assert genai_tokens(copy, ids) == tokens


def genai_model(directory: Path, prompts: list[list[int]]):
    """genai's model, and what it goes on with after each prompt alone: 16 tokens."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(directory))
    return model, [genai_batch(model, np.array([prompt]))[0] for prompt in prompts]


def genai_batch(model, ids: np.ndarray) -> list[list[int]]:
    import onnxruntime_genai as genai

    parameters, width = genai.GeneratorParams(model), ids.shape[1]
    length = {"max_length": width + 16, "min_length": width + 16}
    parameters.set_search_options(batch_size=len(ids), do_sample=False, **length)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[width:].tolist() for row in range(len(ids))]


@pytest.mark.parametrize("last_token_logits", [False, True])
def test_genai_takes_a_batch_of_unequal_prompts(copy, ids, last_token_logits):
    """It decodes with holes in the mask, as 1 1 0 0 1, and means the right thing."""
    export(copy, last_token_logits=last_token_logits)
    prompts = [ids, ids[:3], ids[4:11]]
    model, single = genai_model(copy, prompts)
    padded = [prompt + [2] * (len(ids) - len(prompt)) for prompt in prompts]  # 2: its pad
    assert genai_batch(model, np.array(padded)) == single


def test_the_engine_of_genai_takes_unequal_requests(copy, ids):
    genai = pytest.importorskip("onnxruntime_genai")
    prompts = [ids, ids[:3], ids[4:11]]
    model, single = genai_model(copy, prompts)
    engine, requests = genai.Engine(model), []

    def begin(prompt: list[int]) -> None:
        requests.append(engine.create_request())
        options = genai.TurnOptions(requests[-1])
        options.set_do_sample(False)
        options.set_max_generated_tokens(16), options.set_min_generated_tokens(16)
        requests[-1].begin_turn(np.array(prompt, np.int32), options)

    begin(prompts[0]), begin(prompts[1])
    events, tokens = engine.create_event_buffer(64), [[], [], []]
    while engine.has_pending_requests():
        for event in engine.run(events):
            tokens[requests.index(event.request)].append(event.token)
        if len(tokens[0]) == 4 and len(requests) == 2:  # one that joins others
            begin(prompts[2])
    assert tokens == single


# -- docs/guide/onnx.md ------------------------------------------------------------------------------------------------


def snippet(name: str) -> str:
    page = (ROOT / "docs" / "guide" / "onnx.md").read_text()
    return page.split(f"<!-- test: {name} -->\n```python\n")[1].split("```")[0]


@pytest.mark.parametrize("name", ["plain", "genai", "session"])
def test_the_ways_into_a_service(name, pruned, oracle, ids):
    if name == "genai":
        pytest.importorskip("onnxruntime_genai")
    names = {"PRUNED": str(pruned), "PROMPT": TEXT, "prompt_ids": ids}
    exec(snippet(name), names)
    oracle.reset()
    tokens, logits = list(ids), oracle.prefill([ids])
    for _ in range(32):
        tokens.append(int(logits.argmax()))
        logits = oracle.decode(tokens[-1:])
    assert list(map(int, names["tokens"])) == tokens


@pytest.mark.parametrize("last_token_logits", [False, True])
def test_a_batch_by_hand(copy, oracle, ids, last_token_logits):
    export(copy, last_token_logits=last_token_logits)
    prompts = [ids, ids[:3], ids[4:11]]
    names = {"PRUNED": str(copy), "prompts": prompts}
    exec(snippet("batch"), names)
    for prompt, tokens in zip(prompts, names["tokens"], strict=True):
        oracle.reset()
        expected = [int(oracle.prefill([prompt]).argmax())]
        while len(expected) < 32:
            expected.append(int(oracle.decode(expected[-1:]).argmax()))
        assert tokens == expected


# -- the command line --------------------------------------------------------------------------------------------------


def test_commands(cli, copy):
    assert json.loads(cli("export", copy, "--context", "256", "--json", check=0).stdout)["context"] == 256
    words = ("generate", copy, "--prompt", TEXT, "--new-tokens", "12", "--device", "cpu")
    ours, theirs = (json.loads(cli(*words, "--backend", b, "--json").stdout) for b in ("onnx", "torch"))
    assert ours["text"] == theirs["text"]
    assert "tokens/s" in cli(*words).stderr
    rewrite(copy)
    done = cli("export", copy, check=2)
    assert done.stderr.count("\n") == 1
    assert "model.safetensors: has 20" in done.stderr
