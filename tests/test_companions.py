"""What a source brings along, and a source that changes while it is read: nothing of it is taken on trust."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHIPPED, TEXT, hub_snapshot, tree
from foreign import write_meta
from safetensors.torch import load_file, save_file

from export import record
from prune_attn import Calibration, Layers, WriteOptions, adopt, convert, export, push, select, verify
from pruner import PruneAttnError, open_checkpoint
from pruner.text import load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
LEAN = WriteOptions(graph=None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def shards(source: Path) -> Path:
    """The model in two shards, the second of which is opened when the first is copied."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    late = {name for name in tensors if "layers.11" in name or name == "model.norm.weight"}
    parts = {"model-1.safetensors": tensors.keys() - late, "model-2.safetensors": late}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in sorted(names)}, source / file, metadata={"format": "pt"})
    where = {name: file for file, names in parts.items() for name in names}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return source


def refused(source: Path, match: str, **options: object) -> None:
    before = tree(source)
    with pytest.raises(PruneAttnError, match=match) as error:
        convert(source, source.parent / "out", Layers("3"), **options)
    assert error.value.exit_code == 2
    assert tree(source) == before
    assert not (source.parent / "out").exists()


# -- pointers, empty files, no JSON ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [POINTER, b""], ids=["pointer", "empty"])
@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
     "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "merges.txt", "LICENSE.txt"],
)  # fmt: skip
def test_pointers_and_empty_files(source, name, content):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(content)
    refused(source, rf"{name}: is .*({'git lfs pull' if content else 'empty'})")
    with pytest.raises(PruneAttnError, match=name):
        export(source, source.parent / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_pointers_in_place_of_config_and_index(shards, name):
    for content, match in ((POINTER, "git lfs pull"), (b"", "empty")):
        (shards / name).write_bytes(content)
        refused(shards, rf"{name}: is .*{match}")


@pytest.mark.parametrize("text", ['{"do_sample": true,}', "null", "[]", "5", '{"temperature": NaN}', "{" * 5000])
@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"]
)
def test_what_is_no_json(source, name, text):
    (source / name).write_text(text)
    refused(source, rf"{name}: ")


@pytest.mark.parametrize("content", [POINTER, b"", b"[]"])
def test_an_output_that_has_such_a_file_is_one_problem(cli, source, tmp_path, content):
    """As one is that was made when they were taken for sound: its record has the file's own hash."""
    out = tmp_path / "out"
    convert(source, out, Layers("3"), options=LEAN)
    (out / "generation_config.json").write_bytes(content)
    plan = json.loads((out / "pruning_plan.json").read_text())
    plan["files"]["generation_config.json"] = record.file_facts(out / "generation_config.json")
    (out / "pruning_plan.json").write_text(json.dumps(plan))
    done = cli("verify", out, check=1)
    assert done.stderr.count("\n") == 1
    assert "generation_config.json: is " in done.stderr
    with pytest.raises(PruneAttnError, match=r"generation_config\.json: is "):
        push(out, "user/pruned", dry_run=True)


# -- a source that changes ---------------------------------------------------------------------------------------------


def overwrite(file: Path) -> None:
    """The same length, another content."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def append(file: Path) -> None:
    with open(file, "ab") as out:
        out.write(b" ")


def replace(file: Path) -> None:
    shutil.copy(file, f"{file}.new")
    os.replace(f"{file}.new", file)


CHANGES = [overwrite, append, replace, Path.unlink]
READ = [
    "model-2.safetensors",
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "generation_config.json",
]


def meanwhile(change: Callable[[Path], None], file: Path) -> Callable[[object], None]:
    """A progress that changes the file once, when the first bytes are copied and the second shard is not yet open."""
    done: list[None] = []

    def progress(step: object) -> None:
        if not done:
            done.append(change(file))

    return progress


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", READ)
def test_what_changes_before_it_is_opened_is_not_converted(shards, tmp_path, name, change):
    for dtype in (None, "float32") if name == READ[0] else (None,):
        (tmp_path / "x").mkdir(exist_ok=True)
        work = shutil.copytree(shards, tmp_path / "x" / "source", dirs_exist_ok=True)
        with pytest.raises(PruneAttnError, match=rf"source/{name}: (changed|vanished|is missing)") as error:
            convert(work, tmp_path / "out", Layers("3"), options=WriteOptions(dtype=dtype),
                    progress=meanwhile(change, work / name))  # fmt: skip
        assert error.value.exit_code == 2
        assert not (tmp_path / "out").exists()


def test_a_source_that_vanishes_is_the_sources_fault(cli, shards, tmp_path):
    with pytest.raises(PruneAttnError, match=rf"{shards}/.*(vanished|is missing)"):
        convert(shards, tmp_path / "out", Layers("3"), progress=meanwhile(shutil.rmtree, shards))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["bin", "pth"])
def test_pytorch_files_that_change(source, tmp_path, form):
    import torch

    if form == "pth":
        source = write_meta(source, tmp_path / "meta")
        file = source / "consolidated.00.pth"
    else:
        file = source / "pytorch_model.bin"
        torch.save(load_file(source / "model.safetensors"), file)
        (source / "model.safetensors").unlink()
    progress = meanwhile(replace, file)
    with pytest.raises(PruneAttnError, match=rf"{file.name}: changed"):
        convert(source, tmp_path / "out", Layers("3"), progress=progress)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [overwrite, replace, Path.unlink])
def test_a_source_that_changes_before_anything_of_it_is_opened(cli, source, tmp_path, change):
    """The command has read the headers and waits for the text, which comes through a FIFO."""
    os.mkfifo(tmp_path / "text")
    process = subprocess.Popen(
        [sys.executable, "-m", "export.cli", "convert", source, tmp_path / "out", "--drop", "1", "--text",
         tmp_path / "text", "--samples", "2", "--length", "32", "--strategy", "similarity"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with open(tmp_path / "text", "w") as text:  # waits for the reader
        change(source / "model.safetensors")
        text.write(TEXT.read_text()[:20_000])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert f"{source}/model.safetensors: " in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("prune-attn: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_plan_is_not_made_of_a_source_that_changed(source, tmp_path):
    calibration = Calibration(TEXT, strategy="similarity", samples=2, length=32)
    with pytest.raises(PruneAttnError, match=r"tokenizer\.json: changed"):
        select(source, 1, calibration=calibration, output=tmp_path / "plan.json",
               progress=meanwhile(replace, source / "tokenizer.json"))  # fmt: skip
    assert not (tmp_path / "plan.json").exists()


def test_a_source_that_changes_while_it_is_compared_is_a_problem(source, tmp_path):
    convert(source, tmp_path / "out", Layers("3"), options=LEAN)
    found = verify(tmp_path / "out", source, progress=meanwhile(replace, source / "model.safetensors"))
    assert [problem for problem in found.problems if "source/model.safetensors: changed" in problem] == found.problems
    assert len(found.problems) == 1


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "id_rsa").write_text('{"key": "PRIVATE"}')
    return tmp_path / "ssh" / "id_rsa"


@pytest.mark.parametrize(
    "name",
    ["LICENSE.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "NOTICE", "chat_template.jinja",
     "additional_chat_templates/x.jinja"],
)  # fmt: skip
def test_a_link_out_of_the_source_is_not_followed(source, secret, name):
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(secret)
    refused(source, rf"{name}: leads out")
    with pytest.raises(PruneAttnError, match="leads out"):
        export(source, source.parent / "out")
    with pytest.raises(PruneAttnError, match="leads out"):
        convert(source, source.parent / "out", Layers("3"), dry_run=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "additional_chat_templates"])
def test_links_of_other_kinds(shards, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    if name.startswith("add"):
        elsewhere.mkdir()
        (elsewhere / "x.jinja").write_text("PRIVATE")
    else:
        (shards / name).rename(elsewhere)
    (shards / name).symlink_to(elsewhere)
    refused(shards, rf"{name}.*: leads out")
    (shards / name).unlink()
    if elsewhere.is_file():
        elsewhere.rename(shards / f"real-{name}")
        (shards / name).symlink_to(f"real-{name}")
    (tmp_path / "link").symlink_to(shards)
    assert verify(convert(tmp_path / "link", tmp_path / "out", Layers("3")).output, shards)


def test_a_card_elsewhere_says_nothing(source, tmp_path):
    (tmp_path / "card").write_text("---\nlicense_name: PRIVATE\n---\n")
    (source / "README.md").symlink_to(tmp_path / "card")
    convert(source, tmp_path / "out", Layers("3"), options=LEAN)
    assert not any(b"PRIVATE" in data for data in tree(tmp_path / "out").values())


def test_weights_may_lie_elsewhere_and_it_is_said(cli, source, tmp_path):
    (source / "model.safetensors").rename(tmp_path / "weights")
    (source / "model.safetensors").symlink_to(tmp_path / "weights")
    done = cli("convert", source, tmp_path / "out", "--layers", "3", check=0)
    assert "outside the source" in done.stdout
    assert "model.safetensors" in done.stdout.split("outside the source")[1]
    done = cli("convert", SHIPPED, tmp_path / "plain", "--layers", "3", check=0)
    assert "outside the source" not in done.stdout


def test_the_hub_caches_own_blobs_and_no_others(source, tmp_path):
    (source / "LICENSE").write_text("version 2.0 of MIT")  # as a Git LFS pointer begins
    snapshot = hub_snapshot(source, tmp_path / "models--a--b")
    convert(snapshot, tmp_path / "out", Layers("3"), options=LEAN)
    assert (tmp_path / "out" / "LICENSE").read_text() == "version 2.0 of MIT"
    other = tmp_path / "models--private--c" / "blobs"
    other.mkdir(parents=True)
    (other / "blob").write_text("PRIVATE")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(other / "blob")
    with pytest.raises(PruneAttnError, match="LICENSE: leads out"):
        convert(snapshot, tmp_path / "new", Layers("3"), options=LEAN)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "nowhere", "/dev/zero"])
def test_what_is_no_file_is_no_companion(cli, source, tmp_path, kind):
    if kind == "FIFO":
        os.mkfifo(source / "NOTICE")
    elif kind == "socket":
        import socket

        socket.socket(socket.AF_UNIX).bind(os.path.relpath(source / "NOTICE"))
    else:
        (source / "NOTICE").symlink_to(kind)
    done = cli("convert", source, tmp_path / "out", "--layers", "3", check=2, timeout=30)
    assert f"{source}/NOTICE: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_companions_are_not_read_into_memory(source, tmp_path):
    (source / "LICENSE").write_text("MIT")
    os.truncate(source / "LICENSE", 120 << 20)
    program = (
        "import sys\nfrom prune_attn import Layers, WriteOptions, convert\n"
        "convert(*sys.argv[1:], Layers('3'), options=WriteOptions(graph=None))\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    run = [sys.executable, "-c", program, source, tmp_path / "out"]
    assert int(subprocess.run(run, check=True, capture_output=True, text=True).stdout) < 120_000  # KiB
    assert verify(tmp_path / "out", source)


# -- the source's own code ---------------------------------------------------------------------------------------------

CODE = """import pathlib
from transformers import PreTrainedTokenizerFast
pathlib.Path({marker!r}).write_text("ran")
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""


def with_code(source: Path, marker: Path) -> Path:
    """A tokenizer that transformers loads by code that lies beside it."""
    config = json.loads((source / "tokenizer_config.json").read_text())
    auto = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", "tokenization_own.OwnTokenizer"]}
    config |= {"auto_map": auto, "tokenizer_class": "OwnTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenization_own.py", "my_license_check.py"):
        (source / name).write_text(CODE.format(marker=str(marker)))
    return source


def test_code_is_not_carried_along_and_that_is_said(cli, source, tmp_path):
    from transformers import AutoTokenizer

    with_code(source, tmp_path / "marker")
    generation = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(generation | {"auto_map": {"x": "y.z"}}))
    config = json.loads((source / "config.json").read_text())
    asks = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, "custom_pipelines": {"x": {"impl": "x.Y"}},
            "attn_implementation": "somebody/kernel", "tokenizer_class": "OwnTokenizer"}  # fmt: skip
    (source / "config.json").write_text(json.dumps(config | asks))
    out = tmp_path / "out"
    said = cli("convert", source, out, "--layers", "3", check=0).stdout
    card = (out / "README.md").read_text().replace("\\_", "_")
    for text in (" ".join(said.split()), card):
        assert "my_license_check.py, tokenization_own.py" in text
        assert "own code" in text
        assert "tokenizer_config.json" in text
    assert {file.name for file in out.glob("*.py")} == {"configuration_pruned_llama.py", "modeling_pruned_llama.py"}
    for file in out.glob("*.json"):
        if "auto_map" in file.read_text():
            assert file.name == "config.json"
    written = json.loads((out / "config.json").read_text())
    assert all("pruned_llama." in value for value in written["auto_map"].values())
    assert not {"custom_pipelines", "attn_implementation"} & written.keys()
    assert verify(out, source)
    original, pruned = (
        AutoTokenizer.from_pretrained(SHIPPED),
        AutoTokenizer.from_pretrained(out, trust_remote_code=True),
    )
    assert pruned("It is a truth.").input_ids == original("It is a truth.").input_ids
    assert not (tmp_path / "marker").exists()
    convert(source, tmp_path / "blocks", Layers("3", sublayer="block"), options=LEAN)
    assert "own code" not in cli("convert", out, tmp_path / "twice", "--layers", "5", check=0).stdout  # it is ours
    plain = (tmp_path / "blocks" / "README.md").read_text()
    assert "tokenization" in plain  # a plain Llama's card says it too
    assert "auto_map" not in (tmp_path / "blocks" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["original", "pruned"])
def test_nobody_is_asked_to_run_a_sources_code(source, tmp_path, kind):
    """On a terminal, where transformers asks and "y" runs it; a pruned directory's model is in no table of its own."""
    where = source
    if kind == "pruned":
        convert(source, tmp_path / "out", Layers("3"), options=LEAN)
        where = tmp_path / "out"
    with_code(where, tmp_path / "marker")
    answers, terminal = pty.openpty()
    os.write(answers, b"y\ny\ny\n")
    command = ["select", where, "--drop", "1", "--text", TEXT, "--samples", "2", "--length", "32", "--strategy",
               "similarity", "-o", tmp_path / "plan.json"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "export.cli", *map(str, command)],
        stdin=terminal, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr
    assert not (tmp_path / "marker").exists()
    text = "It is a truth universally acknowledged."
    assert load_tokenizer(where)(text).input_ids == load_tokenizer(SHIPPED)(text).input_ids


def test_verify_and_adopt_know_foreign_code(cli, source, tmp_path):
    """An output of a time when code came along, and one whose tokenizer was saved with it."""
    out = tmp_path / "out"
    convert(source, out, Layers("3"), options=LEAN)
    trained = shutil.copytree(out, tmp_path / "trained")
    for name in ("pruning_plan.json", "README.md"):
        (trained / name).unlink()
    with_code(out, tmp_path / "marker")
    plan = json.loads((out / "pruning_plan.json").read_text())
    for name in ("tokenizer_config.json", "tokenization_own.py", "my_license_check.py"):
        plan["files"][name] = record.file_facts(out / name)
    (out / "pruning_plan.json").write_text(json.dumps(plan))
    assert "tokenization_own.py: is code" in cli("verify", out, check=1).stderr
    for name in ("tokenization_own.py", "my_license_check.py"):
        (out / name).unlink()
        del plan["files"][name]
    (out / "pruning_plan.json").write_text(json.dumps(plan))
    assert "tokenizer_config.json: names code" in cli("verify", out, check=1).stderr
    shutil.copy(out / "tokenizer_config.json", trained)
    convert(source, tmp_path / "like", Layers("3"), options=LEAN)
    with pytest.raises(PruneAttnError, match=r"tokenizer_config\.json: names code"):
        adopt(trained, tmp_path / "like")


def test_a_checkpoint_knows_what_it_was_read_from(shards):
    checkpoint = open_checkpoint(shards)
    checkpoint.check_unchanged()
    assert {path.name for path in checkpoint.seen} >= set(READ)
    append(shards / "README.md")  # nothing is read of it but once
    checkpoint.check_unchanged()
    replace(shards / "model-1.safetensors")
    with pytest.raises(PruneAttnError, match=r"model-1\.safetensors: changed"):
        checkpoint.check_unchanged()
