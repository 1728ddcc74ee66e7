"""``verify`` finds what was changed, and only then complains."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from conftest import SHIPPED, asked, edit_config

from prune_attn import Layers, WriteOptions, convert, export, verify
from pruner import PruneAttnError, open_checkpoint
from pruner.errors import MachineError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    convert(SHIPPED, tmp_path / "out", 4, options=WriteOptions(max_shard_size="4MB"))
    return tmp_path / "out"


def found(out: Path, match: str, against: Path | None = None) -> None:
    problems = verify(out, against).problems
    assert problems
    assert match in problems[0]
    assert all("\n" not in problem for problem in problems)


def test_command(cli, out):
    assert "ok" in cli("verify", out, check=0).stdout
    assert "91 tensors" in cli("verify", out, "--against", SHIPPED, check=0).stdout
    told = json.loads(cli("verify", out, "--against", SHIPPED, "--json", check=0).stdout)
    assert told["ok"]
    assert told["tensors_compared"] == 91
    (out / "tokenizer.json").unlink()
    done = cli("verify", out, check=1)
    assert "tokenizer.json: is missing" in done.stderr
    assert not json.loads(cli("verify", out, "--json", check=1).stdout)["ok"]
    cli("verify", out / "none", check=2)
    cli("verify", out, "--against", out / "none", check=2)


@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_one_changed_byte_is_found_against_the_source(out, where):
    shard = sorted(out.glob("*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + int(where * (len(raw) - start - 1))] ^= 1
    shard.write_bytes(raw)
    assert verify(out).ok  # no weights are read
    found(out, "is not the source's", SHIPPED)


def test_rewritten_truncated_and_swapped_shards(out, tmp_path):
    from safetensors.torch import load_file, save_file

    shards = sorted(out.glob("*.safetensors"))
    kept = [s.read_bytes() for s in shards]
    save_file(load_file(shards[0]), shards[0], metadata={"format": "pt"})  # the same tensors, laid out differently
    found(out, shards[0].name)
    shards[0].write_bytes(kept[0][:-10])
    found(out, "truncated")
    shards[0].write_bytes(kept[1])
    found(out, shards[0].name)
    shards[0].unlink()
    found(out, "missing")


def test_config_code_and_plan(out):
    config = (out / "config.json").read_text()
    edit_config(out, rope_theta=5.0)
    found(out, "rope")
    (out / "config.json").write_text(config)
    edit_config(out, auto_map=...)
    found(out, "auto_map")
    (out / "config.json").write_text(config)
    edit_config(out, rms_norm_eps=1e-6)  # well formed, but not what was written
    found(out, "config.json")
    (out / "config.json").write_text(config)
    code = out / "modeling_pruned_llama.py"
    code.write_text(code.read_text() + "\nimport os\n")
    found(out, "do not trust it")
    convert(SHIPPED, out, 4, options=WriteOptions(overwrite=True))
    record = json.loads((out / "pruning_plan.json").read_text())
    record["result"]["attention"].append(11)
    (out / "pruning_plan.json").write_text(json.dumps(record))
    found(out, "layers")
    (out / "pruning_plan.json").unlink()
    found(out, "pruning_plan.json")


def test_another_source(out, make_llama, tmp_path):
    found(out, "another model", make_llama())
    shutil.copytree(SHIPPED, tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text("{}")
    found(out, "generation_config.json", tmp_path / "other")


def test_not_written_by_us(tmp_path):
    found(SHIPPED, "pruning_plan.json")
    (tmp_path / "empty").mkdir()
    found(tmp_path / "empty", "pruning_plan.json")
    with pytest.raises(PruneAttnError, match="no such directory"):
        verify(tmp_path / "none")


def test_what_does_not_belong_there(out):
    for name in ("model-00009-of-00009.safetensors", "pytorch_model.bin", "evil.py", "deep/evil.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
        found(out, name.split("/")[0])
        (out / name).unlink()
        (out / "deep").rmdir() if "deep" in name else None
    (out / "README.md").write_text("a better card")  # people may
    assert verify(out, SHIPPED).ok
    for name in ("tokenizer.json", "model.safetensors.index.json"):
        with open(out / name, "ab") as file:
            file.write(b" ")
        found(out, name)
        convert(SHIPPED, out, 4, options=WriteOptions(max_shard_size="4MB", overwrite=True))


@pytest.mark.parametrize(
    "damage",
    [
        dict(files={"f": None}), dict(files={"f" * 300: {}}), dict(files=[]), dict(attention=None), dict(mlp=True),
        dict(mlp=[99]), dict(mlp="x"), dict(source=None), dict(source=[]), dict(source={"shards": 5}), dict(source={}),
        dict(converted_to="x"), dict(converted_to={}), dict(original={"num_hidden_layers": 99}), dict(version=2),
        dict(strategy="similarity", order=None), dict(result=None), dict(model=5), dict(sublayer="block"),
        dict(attention=[7, 8, 9, 10]),
    ],
)  # fmt: skip
def test_plans_that_were_tampered_with(out, damage):
    record = json.loads((out / "pruning_plan.json").read_text())
    (out / "pruning_plan.json").write_text(json.dumps(record | damage))
    found(out, "", SHIPPED)
    verify(out)  # whatever it says, it does not crash


def test_a_step_that_only_laid_it_out_anew(tmp_path):
    """The export in between has the very files of its source, so that either may be what it is held against."""
    places = [SHIPPED, *(tmp_path / name for name in ("once", "exported", "twice"))]
    convert(places[0], places[1], Layers("9")), export(places[1], places[2]), convert(places[2], places[3], Layers("5"))
    for place in places[:-1]:
        assert verify(places[-1], place).problems == []


def test_every_dtype_in_between_is_said(tmp_path, cli):
    convert(SHIPPED, tmp_path / "once", 1, options=WriteOptions(dtype="bfloat16", graph=None))
    convert(tmp_path / "once", tmp_path / "twice", Layers("5"), options=WriteOptions(dtype="float32", graph=None))
    said = cli("verify", tmp_path / "twice", "--against", SHIPPED, check=0).stdout
    assert "converted to bfloat16, then to float32, byte for byte" in said


@pytest.mark.parametrize(
    "steps",
    [
        [{"layers": "9"}, {"layers": "5"}],
        [{"layers": "2,9", "dtype": "bfloat16"}, {"drop": 1, "sublayer": "mlp"}, {"layers": "5", "dtype": "float32"}],
        [{"drop": 2, "sublayer": "block"}, {"layers": "4", "sublayer": "block"}, {"layers": "3"}],
        [{"layers": "5"}, {"layers": "5", "sublayer": "mlp"}],  # a whole block in the end
    ],
)
def test_pruned_again_and_again(tmp_path, steps):
    """Against the first original and against what lay between, byte for byte; a wrong one is found."""
    places = [SHIPPED, *(tmp_path / str(i) for i in range(len(steps)))]
    for before, after, options in zip(places, places[1:], steps, strict=False):
        convert(before, after, **asked(onnx=False, **options))
    out = places[-1]
    for place in places[:-1]:
        result = verify(out, place)
        assert result.ok, result.problems
        assert result.compared == len(open_checkpoint(out).tensors)
    text = (out / "README.md").read_text()
    for number, (step, place) in enumerate(zip(steps[:-1], places, strict=False), 1):
        name = "mlp" if step.get("sublayer") == "mlp" else "attention"
        layers = json.loads((places[number] / "pruning_plan.json").read_text())[name]
        assert f"- step {number} before, from `{place.name}`: {'MLP' if name == 'mlp' else name} at layers " in text
        assert f"at layers {', '.join(map(str, layers))}" in text

    plan = json.loads((out / "pruning_plan.json").read_text())
    shutil.rmtree(places[1])  # what lay between is not needed
    assert verify(out, SHIPPED).ok
    other = plan["previous"] | {"sublayer": "mixed", "order": None, "attention": [1], "mlp": []}
    (out / "pruning_plan.json").write_text(json.dumps(plan | {"previous": other}))
    found(out, "is not what converting", SHIPPED)
    (out / "pruning_plan.json").write_text(json.dumps(plan | {"previous": None}))
    found(out, "another model", SHIPPED)
    (out / "pruning_plan.json").write_text(json.dumps(plan))
    shard = next(out.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    found(out, "is not the source's", SHIPPED)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pruning_plan.json", '{"format": "prune-attn plan", "files": null}'),
        ("generation_config.json", '{"top_p": "x"}'),
        ("generation_config.json", '{"top_p": 1e999}'),
    ],
)
def test_only_the_file_at_fault_is_named(out, name, text):
    """Not the graph and not genai_config.json, which are made with the help of it: writing them again is no cure."""
    (out / name).write_text(text)
    assert {problem.partition(": ")[0] for problem in verify(out).problems} == {str(out / name)}


def test_a_companion_that_grew_is_not_read(out):
    path, before = out / "tokenizer.json", resource.getrusage(resource.RUSAGE_SELF).ru_utime
    os.truncate(path, 8 << 30)  # of holes, which take 30 s to hash
    found(out, "tokenizer.json: is not what was written")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 2


@pytest.mark.parametrize("name", ["model.onnx", "genai_config.json"])
def test_a_directory_where_export_writes(cli, out, name):
    (out / name).unlink()
    (out / name / "sub").mkdir(parents=True)
    before = sorted(out.rglob("*"))
    assert f"{out / name}: is a directory where a file belongs; move it away" in cli("export", out, check=2).stderr
    assert sorted(out.rglob("*")) == before


def test_a_directory_called_as_what_a_killed_export_leaves(out):
    (out / ".model.onnx.prune-attn-new-0123456789ab").mkdir()
    export(out)
    assert (out / ".model.onnx.prune-attn-new-0123456789ab").is_dir()  # it is somebody else's


def test_a_failed_export_names_the_file_that_it_was_for(out, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(MachineError, match=f"^{out / 'model.onnx'}: cannot be written: the disk is full"):
        export(out)
