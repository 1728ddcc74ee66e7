"""Sources that are not safetensors: PyTorch's files and Meta's distribution, read in place, or refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import secrets
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHIPPED, asked, edit_config, run_program, tree
from foreign import tensors, write_bin, write_meta
from oracle import ids, logits, original
from programs import convert_without_graph

from prune_attn import Layers, WriteOptions, convert, export, verify
from pruner import PruneAttnError, open_checkpoint
from pruner.checkpoint.load import load_tensor
from pruner.checkpoint.pickled import read_pickled
from pruner.model import TorchLanguageModel
from pruner.summary import inspect
from pruner.text import load_tokenizer


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    return {name: load_tensor(tensor) for name, tensor in open_checkpoint(directory).tensors.items()}


SHAPES = {
    "grouped heads": dict(hidden_size=128, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4),
    "bf16, one layer": dict(dtype="bfloat16", num_hidden_layers=1, num_key_value_heads=4),
    "fp16, wide MLP": dict(dtype="float16", intermediate_size=384, num_key_value_heads=4),
}
COPIES: dict[str, Callable[[Path, Path], Path]] = {
    "bin": write_bin,
    "bin in 3 shards": lambda source, output: write_bin(source, output, shards=3),
    "bin without zip, 2 shards": lambda source, output: write_bin(source, output, shards=2, legacy=True),
    "Meta, 1 part": write_meta,
    "Meta, 4 parts": lambda source, output: write_meta(source, output, 4),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_works_as_with_safetensors(make_llama, tmp_path, shape, copy):
    plain = make_llama("plain", **SHAPES[shape])
    source = COPIES[copy](plain, tmp_path / "source")
    before = tree(source)
    same(loaded(source), tensors(plain))
    told, expected = inspect(open_checkpoint(source)), inspect(open_checkpoint(plain))
    assert {k: v for k, v in told.items() if k not in ("path", "shards")} == {
        k: v for k, v in expected.items() if k not in ("path", "shards")
    }
    options = dict(layers="0", allow_all=True) if told["layers"] == 1 else dict(layers="1,3")
    for directory in (source, plain):
        convert(directory, tmp_path / f"{directory.name}-pruned", **asked(**options, max_shard_size="300KB"))
    same(tensors(tmp_path / "source-pruned"), tensors(tmp_path / "plain-pruned"))
    export(source, tmp_path / "exported", options=WriteOptions(dtype="float32"))
    same(tensors(tmp_path / "exported"), {k: v.float() for k, v in tensors(plain).items()})
    for output in ("source-pruned", "exported"):
        assert verify(tmp_path / output, source).ok
    model = TorchLanguageModel(source, dtype="float32")
    assert np.array_equal(model.logits(ids().numpy()), logits(original(plain), ids()).numpy())
    assert tree(source) == before


def test_verify_finds_one_changed_byte_in_another_format(make_llama, tmp_path):
    plain = make_llama()
    source = write_meta(plain, tmp_path / "source", 2)
    convert(source, tmp_path / "out", Layers("1"))
    name = "model.layers.2.self_attn.q_proj.weight"
    place = open_checkpoint(tmp_path / "out").tensors[name]
    with open(place.path, "r+b") as file:
        file.seek(place.start + 1000)
        file.write(b"\x7f")
    assert name in verify(tmp_path / "out", source).problems[0]
    assert verify(tmp_path / "out", plain).problems  # other files than it was made from
    convert(source, tmp_path / "out", Layers("1"), options=WriteOptions(overwrite=True))
    with zipfile.ZipFile(source / "consolidated.01.pth") as archive:
        crc = archive.getinfo("consolidated.01/data/3").CRC.to_bytes(4, "little")
    part = (source / "consolidated.01.pth").read_bytes()
    (source / "consolidated.01.pth").write_bytes(part.replace(crc, bytes(4)))  # as if other weights lay there
    assert "another model" in verify(tmp_path / "out", source).problems[0]


# -- PyTorch's files ---------------------------------------------------------------------------------------------------


def save(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_views_strides_and_shared_storage(tmp_path, legacy, protocol, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as if saved there
    big = torch.randn(7, 11, 13)
    state = OrderedDict(
        whole=big, view=big[2:5], transposed=big.permute(2, 0, 1), sliced=big[:, 3::4, 5], row=big[3, 4],
        expanded=torch.randn(5).expand(3, 5), scalar=torch.tensor(2.5), empty=torch.zeros(0, 4),
        tied=big, half=big.half().permute(2, 1, 0), bfloat=big.bfloat16()[1], double=big.double(),
        long=torch.arange(6)[::2], parameter=torch.nn.Parameter(torch.randn(3, 4).t()),
        one=torch.randn(1, 9)[:, ::3].t(),
    )  # fmt: skip
    state._metadata = OrderedDict({"": {"version": 1}})
    file = save(tmp_path / "x.bin", state, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    shard = read_pickled(file)
    assert list(shard.tensors) == list(state)
    assert shard.tensors["tied"].start == shard.tensors["whole"].start
    assert shard.tensors["empty"].shape == (0, 4)
    for name in ("long", "empty"):  # no weights of a Llama
        del state[name], shard.tensors[name]
    same({name: load_tensor(tensor) for name, tensor in shard.tensors.items()}, state)


def test_tied_weights_are_written_once(make_llama, tmp_path):
    plain = make_llama("tied", tie_word_embeddings=True)
    source = write_bin(plain, tmp_path / "source")
    state = tensors(plain)
    save(source / "pytorch_model.bin", state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    same(loaded(source), state)
    convert(source, tmp_path / "out", Layers("1"))
    assert "lm_head.weight" not in tensors(tmp_path / "out")


def test_safetensors_win_where_both_are(shipped, tmp_path):
    shutil.copytree(shipped, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"never read")
    (tmp_path / "both" / "consolidated.00.pth").write_bytes(b"never read")
    assert open_checkpoint(tmp_path / "both").shards[0].path.name == "model.safetensors"


class _Runs:
    """What a pickle does to whoever loads it."""

    def __init__(self, how: object) -> None:
        self.how = how

    def __reduce__(self) -> object:
        return self.how


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("where", ["a value", "the whole", "beside tensors", "a plain pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(cli, shipped, tmp_path, where, protocol, legacy):
    source, trace = write_bin(shipped, tmp_path / "source"), tmp_path / "ran"
    bomb = _Runs((os.system, (f"touch {trace}",)))
    value = {"a value": {"lm_head.weight": bomb}, "the whole": bomb, "beside tensors": {"x": torch.ones(2), "y": bomb}}
    if where == "a plain pickle":
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(bomb, protocol))
    else:
        options = dict(pickle_protocol=protocol) if protocol else {}
        save(source / "pytorch_model.bin", value[where], _use_new_zipfile_serialization=not legacy, **options)
    for call in (open_checkpoint, TorchLanguageModel, lambda path: convert(path, tmp_path / "out", 1)):
        with pytest.raises(PruneAttnError, match=r"pytorch_model\.bin: .*(posix\.system|is no PyTorch)") as error:
            call(source)
        assert "\n" not in str(error.value)
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"(S'x'\nios\nsystem\n.", b"cbuiltins\neval\n(S'1'\ntR.", b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'x'\ntR.",
        b"(cos\nsystem\nS'x'\no.", b"\x80\x02\x82\x01.",
        b"ctorch\nload\n(S'x'\ntR.", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", b"Px\n.", b"\x80\x02\x85.",
        b"ctorch\nFloatStorage\n)R.", b"ctorch\nFloatStorage\n}b.", b"\x80\x02}q\x00h\x05.", b"t.", b"a.", b"\x80\x02",
        b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"", b"N.", b"}(K\x01Nu.",
        b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.",
        b"(" * 10_000 + b"t" * 10_000 + b".",
    ],
)  # fmt: skip
def test_pickles_written_by_hand(tmp_path, program):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", program)
    (tmp_path / "y.bin").write_bytes(b"\x80\x02" + program)
    for name in ("x.bin", "y.bin"):
        with pytest.raises(PruneAttnError, match=f"{name}: ") as error:
            read_pickled(tmp_path / name)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"model": {"x": torch.ones(2)}, "epoch": 3}, "'model', which is a dict"),
        ({"x": torch.ones(2), "step": 7}, "'step', which is a int"),
        ({"x": None}, "'x', which is nothing"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a tensor"),
        ({3: torch.ones(2)}, "tensor's name belongs"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"x": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"x": torch.ones(2, dtype=torch.float8_e4m3fn)}, "_rebuild_tensor_v3"),
        ({"x": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "_rebuild_qtensor"),
    ],
)
def test_anything_but_tensors_is_refused_by_name(tmp_path, value, match):
    with pytest.raises(PruneAttnError, match=match):
        read_pickled(save(tmp_path / "x.bin", value))


def test_what_torch_alone_could_tell_apart(tmp_path):
    state = {"x": torch.nn.Parameter(torch.ones(2, 3))}
    state["x"]._is_hf_initialized = True  # as transformers marks its parameters
    found = read_pickled(save(tmp_path / "x.bin", state)).tensors
    assert torch.equal(load_tensor(found["x"]), torch.ones(2, 3))
    negative = torch.complex(torch.zeros(4), torch.arange(4.0)).conj().imag  # its bytes lack the sign
    for value, match in (
        (negative, "marked as conjugate or negative"),
        (torch.ones(1).expand(10_000, 10_000), "claims more bytes"),
    ):
        with pytest.raises(PruneAttnError, match=match):
            read_pickled(save(tmp_path / "x.bin", {"x": value}))


def test_what_a_file_says_cannot_fill_memory_or_a_terminal(tmp_path):
    pairs = b"(" + b"".join(b"X\5\0\0\0%05dK\0\x86" % i for i in range(30_000)) + b"l\x85q\1"
    program = b"\x80\2ccollections\nOrderedDict\nq\0" + pairs + b"h\0h\1R" * 100_000 + b"."
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w") as archive:
        archive.writestr("x/data.pkl", program)
    with pytest.raises(PruneAttnError, match=r"bomb\.bin: has more than 1,048,576 entries"):
        read_pickled(tmp_path / "bomb.bin")
    for name in ("\x1b]0;owned\x07\n", "n" * 5_000_000):
        for value in ({name: torch.ones(1)}, {name: 3}):
            with pytest.raises(PruneAttnError) as error:
                open_checkpoint(write_bin_of(tmp_path / secrets.token_hex(4), value))
            assert str(error.value).isprintable()
            assert len(str(error.value)) < 1000
    whole = save(tmp_path / "x.bin", {"x": torch.ones(2)}).read_bytes()
    (tmp_path / "x.bin").write_bytes(whole.replace(b"X\1\0\0\x000", b"X\1\0\0\0\x07"))  # the storage's key
    with pytest.raises(PruneAttnError) as error:
        read_pickled(tmp_path / "x.bin")
    assert r"data/\x07' is missing" in str(error.value).replace("...", " is missing")


def write_bin_of(directory: Path, value: object) -> Path:
    directory.mkdir()
    shutil.copy(SHIPPED / "config.json", directory)
    save(directory / "pytorch_model.bin", value)
    return directory


def rezip(file: Path, edit: Callable[[str, bytes], bytes | None], **options: object) -> None:
    """Write a zip again with its records edited (``None``: left out)."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in records.items():
            if (edited := edit(name, data)) is not None:
                archive.writestr(name, edited)


def test_zips_that_are_damaged(shipped, tmp_path):
    source = write_bin(shipped, tmp_path / "source")
    file = source / "pytorch_model.bin"
    whole = file.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(PruneAttnError, match=rf"pytorch_model\.bin: .*({match})") as error:
            open_checkpoint(source)
        assert "\n" not in str(error.value)

    for data, match in (
        (b"", "no PyTorch file"), (b"PK", "no PyTorch file"), (b"\x93NUMPY", "no PyTorch file"),
        (b"GGUF\3\0\0\0", "GGUF"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (whole[:-1], "truncated"), (whole[: len(whole) // 2], "truncated"), (whole[:40], "truncated"),
        (whole[: len(whole) // 2] + whole[len(whole) // 2 + 64 :], "truncated"),
    ):  # fmt: skip
        file.write_bytes(data)
        refused(match)
    for edit, match in (
        (lambda n, d: None if n.endswith("data/7") else d, "data/7 is missing"),
        (lambda n, d: d[:-2] if n.endswith("data/7") else d, "bytes and .* are needed"),
        (lambda n, d: None if n.endswith("data.pkl") else d, "no data.pkl"),
        (lambda n, d: b"big" if n.endswith("byteorder") else d, "big-endian"),
        (lambda n, d: d[: len(d) // 2] if n.endswith("data.pkl") else d, "makes no sense"),
        (lambda n, d: d.replace(b"HalfStorage", b"HalfStorXge"), "torch.HalfStorXge"),
        (lambda n, d: d.replace(b"HalfStorage", b"LongStorage"), "bytes and .* are needed"),
        (lambda n, d: d.replace(b"M\x00\x02", b"M\x01\x02"), "beyond its storage|needed"),
    ):
        file.write_bytes(whole)
        rezip(file, edit)
        refused(match)
    file.write_bytes(whole)
    rezip(file, lambda n, d: d, compression=zipfile.ZIP_DEFLATED)
    refused("compressed")
    file.write_bytes(whole)
    rezip(file, lambda n, d: d)  # written by another program, and right
    open_checkpoint(source)
    file.write_bytes(io.BytesIO(whole).getvalue()[:-1] + b"\0\0")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("other/data.pkl", b"N.")
    refused("2 data.pkl")


def test_indexes_and_shards_that_disagree(make_llama, tmp_path):
    source = write_bin(make_llama(), tmp_path / "source", shards=2)
    first, second = sorted(source.glob("*.bin"))

    def refused(match: str) -> None:
        with pytest.raises(PruneAttnError, match=match):
            open_checkpoint(source)

    kept = second.read_bytes()
    second.unlink()
    refused(r"pytorch_model-00002-of-00002\.bin: is missing")
    shutil.copy(first, second)
    refused("is in pytorch_model-00001-of-00002.bin too")
    second.write_bytes(kept)
    state = torch.load(second, weights_only=True)
    state.popitem()  # the buffer, which is recomputed
    save(second, state)
    open_checkpoint(source)
    state.popitem()
    save(second, state)
    refused("it is not there")


@pytest.mark.parametrize("legacy", [False, True])
def test_random_damage_never_escapes_as_another_error(shipped, tmp_path, legacy):
    state = {name: t for name, t in list(tensors(shipped).items())[:6] if t.numel() < 100_000}
    file, rng = save(tmp_path / "x.bin", state, _use_new_zipfile_serialization=not legacy), random.Random(0)
    whole, refusals = file.read_bytes(), 0
    with zipfile.ZipFile(file) if not legacy else io.BytesIO() as archive:
        ranges = [(0, 1500)] if legacy else [(0, 1500), (archive.start_dir, len(whole))]
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(*rng.choice(ranges))] = rng.randrange(256)
        file.write_bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.1 else damaged)
        with contextlib.suppress(PruneAttnError):  # a flip can leave a file that still makes sense
            read_pickled(file)
            continue
        refusals += 1
    assert refusals > 300


def test_memory_does_not_grow_with_the_weights(tmp_path):
    """0.4 GB of weights, q of which has to be gathered, are converted in far less."""
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=10, num_attention_heads=16, num_key_value_heads=16, vocab_size=8192, rms_norm_eps=1e-5,
    )  # fmt: skip
    shapes = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1}
    state = {"model.embed_tokens.weight": torch.zeros(8192, 1024), "lm_head.weight": torch.zeros(8192, 1024)}
    state = {name: t.half() for name, t in state.items()} | {"model.norm.weight": torch.zeros(1024).half()}
    for i in range(10):
        for name in shapes:
            state[f"model.layers.{i}.self_attn.{name}.weight"] = torch.zeros(1024, 1024).half().T
        for name in ("gate_proj", "up_proj"):
            state[f"model.layers.{i}.mlp.{name}.weight"] = torch.zeros(4096, 1024).half()
        state[f"model.layers.{i}.mlp.down_proj.weight"] = torch.zeros(1024, 4096).half()
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{name}.weight"] = torch.zeros(1024).half()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    save(tmp_path / "source" / "pytorch_model.bin", state)
    del state
    megabytes = int(run_program(convert_without_graph, tmp_path / "source", tmp_path / "out"))
    assert megabytes < 130  # of which Python and NumPy take some 60


# -- Meta's distribution -----------------------------------------------------------------------------------------------


def test_a_tokenizer_comes_with_it(shipped, tmp_path):
    (tmp_path / "llama").mkdir()
    source = write_meta(shipped, tmp_path / "llama" / "llama-2-5m")
    (source / "tokenizer.model").rename(tmp_path / "llama" / "tokenizer.model")  # where Meta's download.sh puts it
    (tmp_path / "llama" / "LICENSE").write_text("the licence")
    convert(source, tmp_path / "out", 1)
    assert verify(tmp_path / "out", source).ok
    written = tree(tmp_path / "out")
    assert written["LICENSE"] == b"the licence"
    assert written["tokenizer.model"] == (shipped / "tokenizer.model").read_bytes()
    assert json.loads(written["generation_config.json"])["eos_token_id"] == 2
    texts = ["It was a dark and stormy night,", " a  b\n\n", "日本語 🦙 naïve", ""]
    for directory in (source, tmp_path / "out"):
        tokenizer = load_tokenizer(directory)
        for text in texts:
            assert tokenizer(text)["input_ids"] == load_tokenizer(shipped)(text)["input_ids"]
        assert tokenizer.eos_token_id == 2
    (tmp_path / "llama" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's form, which Llama 3 has
    with pytest.raises(PruneAttnError, match=r"tokenizer\.model: is no SentencePiece"):
        open_checkpoint(source)
    model = (shipped / "tokenizer.model").read_bytes()
    for damaged, match in ((model[:5000], "truncated"), (model.replace(b"\x03the", b"\x03th\xff"), "not UTF-8 text")):
        (tmp_path / "llama" / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(PruneAttnError, match=rf"tokenizer\.model: is no tokenizer of a Llama 2.*{match}"):
            convert(source, tmp_path / "other", 1)
        assert not (tmp_path / "other").exists()


def test_a_tokenizer_of_another_model(make_llama, shipped, tmp_path):
    """It has 4,096 tokens, and the models 128 and 4,200."""
    (tmp_path / "llama").mkdir()
    source = write_meta(make_llama(vocab_size=128), tmp_path / "llama" / "small")
    shutil.copy(shipped / "tokenizer.model", tmp_path / "llama")
    with pytest.raises(PruneAttnError, match=r"llama/tokenizer\.model: has 4096 tokens and the model in .* has 128"):
        open_checkpoint(source)
    source = write_meta(make_llama("padded", vocab_size=4200), tmp_path / "llama" / "padded")
    with pytest.raises(PruneAttnError, match=r"has 4096 tokens and the model in .* has 4200"):
        open_checkpoint(source)
    shutil.copy(shipped / "tokenizer.model", source)  # beside the parts it is meant: rows can be padded
    assert open_checkpoint(source).decoder.vocab_size == 4200


def test_first_llamas_parts(make_llama, tmp_path):
    """The 7B's has the rotary buffer in each layer; a part without rows is of another model."""
    source = write_meta(plain := make_llama(), tmp_path / "source", 2)
    parts = [torch.load(source / f"consolidated.0{i}.pth") for i in range(2)]
    parts[0]["layers.0.attention.inner_attention.rope.freqs"] = torch.ones(8)
    save(source / "consolidated.00.pth", parts[0])
    same(loaded(source), tensors(plain))
    for name in ("layers.1.attention.wq.weight", "layers.1.attention.wk.weight"):
        parts[0][name] = torch.cat([part[name] for part in parts])
        parts[1][name] = parts[1][name][:0]
    for i, part in enumerate(parts):
        save(source / f"consolidated.0{i}.pth", part)
    with pytest.raises(PruneAttnError, match=r"consolidated\.01\.pth: 'layers\.1\.attention\.wq"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (dict(dim=...), "dim is 'None'"),
        (dict(n_layers=...), "n_layers is 'None'"),
        (dict(n_heads=0), "n_heads is '0'"),
        (dict(norm_eps=...), "norm_eps is 'None'"),
        (dict(norm_eps="small"), "norm_eps is 'small'"),
        (dict(vocab_size=127), "vocab_size is 127, but the 2 parts have 128"),
        (dict(vocab_size=-2), "vocab_size is '-2'"),
        (dict(n_layers=3), "layers.3.* does not belong"),
        (dict(n_layers=5), r"consolidated\.00\.pth: has no 'layers\.4"),
        (dict(multiple_of=32), "feed_forward.w1.* has shape"),
        (dict(ffn_dim_multiplier=2.0), "feed_forward.w1.* has shape"),
        (dict(n_kv_heads=...), "attention.wk.* has shape"),
        (dict(n_heads=3), "no multiple"),
        (dict(dim=32), "has shape"),
        (dict(use_scaled_rope=True), "Llama 3.1"),
        (dict(quantization_args={"scheme": "int4"}), "quantised"),
        (dict(rope_theta=500000.0), r"params\.json: rope_theta 500000 .* neither Llama 2's nor CodeLlama's"),
    ],
)
def test_params_that_are_not_of_these_parts(make_llama, tmp_path, params, match):
    source = write_meta(make_llama(), tmp_path / "source", 2, **params)
    with pytest.raises(PruneAttnError, match=match) as error:
        open_checkpoint(source)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)


def test_parts_that_do_not_belong_together(make_llama, tmp_path):
    source = write_meta(make_llama(), tmp_path / "source", 2)
    parts = [source / f"consolidated.0{i}.pth" for i in range(2)]

    def refused(match: str) -> None:
        with pytest.raises(PruneAttnError, match=match) as error:
            open_checkpoint(source)
        assert "\n" not in str(error.value)

    kept = [part.read_bytes() for part in parts]
    parts[1].unlink()
    refused(r"consolidated\.00\.pth: .* is a part missing")
    parts[0].rename(parts[1])
    refused(r"consolidated\.00\.pth: is missing")
    parts[0].write_bytes(kept[0])
    shutil.copy(parts[0], source / "consolidated.02.pth")
    refused("is a part missing, or of another model")
    (source / "consolidated.02.pth").unlink()
    state = torch.load(parts[1], weights_only=True)
    save(parts[1], state | {"layers.0.attention.wo.weight": torch.ones(64, 31)})
    refused(r"consolidated\.01\.pth: 'layers\.0\.attention\.wo\.weight' has shape \[64, 31\]")
    save(parts[1], state | {"layers.0.attention.wo.weight": torch.ones(64, 32).half()})
    refused(r"consolidated\.01\.pth: .* is F16, which another part has in F32")
    save(parts[1], {name: t for name, t in state.items() if "w3" not in name})
    refused(r"consolidated\.01\.pth: has no 'layers\.0\.feed_forward\.w3")
    parts[1].write_bytes(kept[1][:-100])
    refused(r"consolidated\.01\.pth: is truncated")
    parts[1].write_bytes(kept[1])
    open_checkpoint(source)
    for text, match in (("{", "is not JSON"), ("[]", "is not a JSON"), ('{"model": 3}', "is not a JSON")):
        (source / "params.json").write_text(text)
        refused(rf"params\.json: {match}")
    (source / "params.json").unlink()
    refused(r"params\.json: is missing")


def test_formats_that_are_not_read_are_named(shipped, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shipped, source)
    weights = source / "model.safetensors"

    def refused(match: str, path: Path = source) -> None:
        with pytest.raises(PruneAttnError, match=match) as error:
            open_checkpoint(path)
        assert "\n" not in str(error.value)

    state = tensors(shipped)
    name = "model.layers.0.mlp.up_proj"
    for extra, match in (
        ({f"{name}.g_idx": torch.zeros(4)}, "GPTQ"),
        ({f"{name}.qweight": torch.zeros(4)}, "GPTQ or AWQ"),
        ({f"{name}.SCB": torch.zeros(4)}, "bitsandbytes"),
        ({f"{name}.weight.quant_state.bitsandbytes__nf4": torch.zeros(4)}, "bitsandbytes"),
        ({f"{name}.weight": state[f"{name}.weight"].to(torch.int8)}, "quantised"),
    ):
        weights.unlink(missing_ok=True)
        save(source / "pytorch_model.bin", state | extra)
        refused(f"{match}.*convert from the unquantised checkpoint")
    (source / "pytorch_model.bin").unlink()
    edit_config(source, quantization_config={"quant_method": "awq"}, _name_or_path="someone/base")
    refused("awq.*convert from the unquantised .*someone/base")
    edit_config(source, quantization_config={"_load_in_8bit": True})
    refused("bitsandbytes")
    edit_config(source, quantization_config=..., _name_or_path=...)
    for file, match in (
        ("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("adapter_config.json", "adapter"),
        ("model.pt", "must be called pytorch_model.bin"), ("model-q4_0.gguf", "GGUF"),
    ):  # fmt: skip
        (source / file).write_text("{}")
        refused(match)
        if not file.endswith(".gguf"):
            (source / file).unlink()
    refused("GGUF.*convert from", source / "model-q4_0.gguf")
    (source / "model-q4_0.gguf").unlink()
    (source / "ggml-model.bin").write_bytes(b"lmgg" + bytes(8))
    refused("GGUF.*convert from")
    (source / "model.safetensors").write_bytes(b"GGUF" + bytes(8))
    refused(r"model\.safetensors: is GGUF")
    save(source / "model.safetensors", state)
    refused(r"model\.safetensors: is a PyTorch file; call it pytorch_model\.bin")
    assert SHIPPED.is_dir()


# -- Hugging Face's form with the slow tokenizer alone -----------------------------------------------------------------


def slow_source(tmp_path: Path, **config: object) -> Path:
    source = tmp_path / "slow"
    shutil.copytree(SHIPPED, source)
    (source / "tokenizer.json").unlink()
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return source


def test_a_slow_tokenizer_becomes_a_fast_one(tmp_path):
    """Pieces by SentencePiece itself; what the source's other files add, by transformers' reading of the source."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    pad = {"content": "[PAD]", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    source = slow_source(tmp_path, add_bos_token=False, add_eos_token=True, added_tokens_decoder={"4096": pad})
    (source / "added_tokens.json").write_text('{"<extra>": 4097, "[PAD]": 4096}')
    before = {p.name for p in source.iterdir()}
    convert(source, tmp_path / "out", 4)
    assert {p.name for p in source.iterdir()} == before
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    pieces = SentencePieceProcessor(model_file=str(SHIPPED / "tokenizer.model"))
    for text in ("Once upon a time", "  two  spaces\n\nnew lines ", "été — 漢字 🙂", "x"):
        assert made.encode(text).ids == [*pieces.encode(text), 2]
    assert made.encode("a[PAD]").ids == AutoTokenizer.from_pretrained(source)("a[PAD]")["input_ids"]
    assert made.token_to_id("<extra>") == 4097
    assert "### onnxruntime-genai" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", source).ok
    shipped = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    (source / "added_tokens.json").unlink()
    (source / "tokenizer_config.json").unlink()
    export(source, tmp_path / "plain")
    made = Tokenizer.from_file(str(tmp_path / "plain" / "tokenizer.json"))
    assert made.encode("Once upon a time").ids == shipped.encode("Once upon a time").ids
    assert made.get_vocab() == shipped.get_vocab()


@pytest.mark.parametrize(
    "damage",
    [
        lambda source: edit_json(source / "tokenizer_config.json", tokenizer_class="GemmaTokenizer"),
        lambda source: edit_json(source / "tokenizer_config.json", bos_token="<none>"),
        lambda source: (source / "added_tokens.json").write_text('{"[PAD]": 5000}'),
        lambda source: (source / "tokenizer.model").write_bytes(b"\nnot one"),
        lambda source: (source / "tokenizer.model").unlink(),
    ],
)
def test_where_no_fast_tokenizer_can_be_made(tmp_path, damage, cli):
    source = slow_source(tmp_path)
    damage(source)
    out = tmp_path / "out"
    assert "there is no tokenizer.json" in cli("convert", source, out, "--drop", 4, check=0).stdout
    text = (out / "README.md").read_text()
    assert not (out / "tokenizer.json").exists()
    assert "### onnxruntime-genai" not in text
    assert "Note: there is no tokenizer.json" in text
    assert "### ONNX Runtime" in text
    assert verify(out, source).ok
    assert "tokenizer.json" not in cli("convert", source, tmp_path / "torch", "--drop", 4, "--no-onnx", check=0).stdout


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
