"""Small files that want all memory, all time, or the terminal: one line, exit code 2, and soon."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SHIPPED, run_cli

from prune_attn import Layers, WriteOptions, convert, export, verify
from pruner import PruneAttnError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("what", ["FIFO", "/dev/zero", "/dev/stdin"])
def test_only_regular_files_are_plans_and_graphs(cli, source, tmp_path, what):
    cli("convert", source, tmp_path / "out", "--layers", "3", check=0)
    for file in (tmp_path / "plan.json", tmp_path / "out" / "model.onnx"):
        file.unlink(missing_ok=True)
        os.mkfifo(file) if what == "FIFO" else file.symlink_to(what)
    limits = dict(timeout=60, stdin=subprocess.PIPE, preexec_fn=lambda: limited(20, memory=True))
    done = cli("convert", source, tmp_path / "new", "--plan", tmp_path / "plan.json", check=2, **limits)
    assert "plan.json: is not a regular file" in done.stderr
    done = cli("verify", tmp_path / "out", check=1, **limits)
    assert "model.onnx: " in done.stderr


def test_a_config_is_bounded(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"id2label": "x" * (5 << 20)}))
    with pytest.raises(PruneAttnError, match=r"config\.json: is larger than"):
        convert(source, source.parent / "out", 1)


ESCAPE = "[/x]\x1b]0;owned\x07\x9b2J\u202e"


def shown_safely(done: subprocess.CompletedProcess[str], longest: int = 2100) -> bool:
    lines = (done.stdout + done.stderr).splitlines()
    return all(line.isprintable() and len(line) <= longest for line in lines)


@pytest.mark.parametrize("value", [ESCAPE, "x" * 3_000_000], ids=["escapes", "megabytes"])
def test_foreign_text_reaches_the_terminal_escaped_and_short(cli, source, tmp_path, value):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": value}))
    done = cli("convert", source, tmp_path / "out", "--layers", "3", check=0)  # no graph: a note says why
    assert "no model.onnx" in done.stdout
    assert shown_safely(done)
    (source / "config.json").write_text(json.dumps(config | {"architectures": [value]}))
    for args in (("inspect", source), ("verify", tmp_path / "out", "--against", source)):
        assert shown_safely(cli(*args, check=2))
    plan = tmp_path / "plan.json"
    for fields in ({"format": "prune-attn plan", "version": value}, {"drop_attn_list": [], "num_hidden_layers": value}):
        plan.write_text(json.dumps(fields))
        assert shown_safely(cli("convert", SHIPPED, tmp_path / "new", "--plan", plan, check=2))


def test_a_directory_with_a_hostile_name(cli, tmp_path):
    for name in (ESCAPE.replace("/", ""), os.fsdecode(b"\xff\xfe")):
        shutil.copytree(SHIPPED, tmp_path / name)
        done = cli("inspect", tmp_path / name, check=0)
        assert shown_safely(done)
        cli("inspect", tmp_path / name, "--json", check=0)
        for args in (("convert", tmp_path / name, tmp_path / name / "[x]", "--layers", "3"),):
            assert shown_safely(cli(*args, check=2))
        done = cli("convert", tmp_path / name, tmp_path / f"{name}out", "--layers", "3", check=0)
        assert shown_safely(done)
        assert shown_safely(cli("verify", tmp_path / f"{name}out", "--against", tmp_path / name, check=0))


def test_what_a_model_says_cannot_move_the_cursor(monkeypatch, capsys):
    from export.cli import show

    show.write_text("as\x1bit\tis\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show.write_text("\x1b[2J\x07\nzero\u200cwidth\t\x9bm")
    assert capsys.readouterr().out == "as\x1bit\tis\n\\x1b[2J\\x07\nzero\u200cwidth\t\\x9bm"


def limited(seconds: int, memory: bool) -> None:
    """In the new process: so much CPU time, however busy the machine is, and 1 GB."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


def refused_soon(*args: object, seconds: int = 20, match: str = "", memory: bool = True) -> None:
    """One line, exit code 2, within seconds of CPU time and 1 GB (of which the command itself has 0.4)."""
    done = run_cli(*args, check=2, timeout=10 * seconds, preexec_fn=lambda: limited(seconds, memory))
    assert shown_safely(done)
    assert match in done.stderr


def zipped(path: Path, pickle: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle)


def itself_as_pairs(path: Path) -> None:
    """OrderedDict(items) whose items are a list of 30,000 entries, each the list itself."""
    zipped(path, b"\x80\2ccollections\nOrderedDict\n]q\0(" + b"h\0" * 30_000 + b"e\x85R.")


def brackets(path: Path) -> None:
    zipped(path, b"\x80\2" + b"]" * (15 << 20) + b".")


def legacy_braces(path: Path) -> None:
    path.write_bytes(b"\x80\2" + b"}" * (16 << 20) + b".")


def two_million_names(path: Path) -> None:
    entry = b"PK\1\2" + bytes(42)
    directory = entry * 2_000_000
    local = b"PK\3\4" + bytes(26)
    end64 = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2_000_000, 2_000_000, len(directory), len(local))
    locator = b"PK\6\7" + struct.pack("<IQI", 0, len(local) + len(directory), 1)
    last = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(local + directory + end64 + locator + last)


def offset_of_2_63(path: Path) -> None:
    extra = struct.pack("<HHQ", 1, 8, 1 << 63)
    name = b"x/data.pkl"
    entry = b"PK\1\2" + struct.pack(
        "<HHHHHHIIIHHHHHII", 20, 45, 0, 0, 0, 0, 0, 2, 2, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF
    )
    local, entry = b"PK\3\4" + bytes(26), entry + name + extra
    path.write_bytes(local + entry + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0))


@pytest.mark.parametrize("write", [itself_as_pairs, brackets, legacy_braces, two_million_names, offset_of_2_63])
def test_pickles_and_zips_that_want_everything(source, write: Callable[[Path], None]):
    (source / "model.safetensors").unlink()
    write(source / "pytorch_model.bin")
    names = write is two_million_names  # which want time, not memory
    command = ("convert", source, source.parent / "out", "--layers", "3")
    refused_soon(*command, match="pytorch_model.bin: ", memory=not names, seconds=6 if names else 20)


def test_a_header_of_95_megabytes(source):
    names = ",".join(f'"{i}":{{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}' for i in range(1_650_000))
    header = f"{{{names}}}".encode()
    assert 90_000_000 < len(header) < 100_000_000
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused_soon("inspect", source, match="model.safetensors: ")


@pytest.mark.parametrize("layers", ["0-99999,99999", ",".join(["0-999999"] * 500)])
def test_layers_that_no_model_has(source, layers):
    refused_soon("convert", source, source.parent / "out", "--layers", layers, seconds=5)


@pytest.mark.parametrize("form", ["ours", "llm-drop"])
def test_plans_with_200_000_repeats(source, tmp_path, form):
    plan = tmp_path / "plan.json"
    layers = [*range(1, 100_000), *range(1, 100_000)]
    ours = {"format": "prune-attn plan", "version": 1, "sublayer": "mixed", "attention": layers, "mlp": []}
    plan.write_text(json.dumps(ours if form == "ours" else {"drop_attn_list": layers, "drop_mlp_list": []}))
    refused_soon("convert", source, tmp_path / "out", "--plan", plan, seconds=5, match="plan.json: ")


def test_a_record_of_100_000_files(cli, source, tmp_path):
    out = tmp_path / "out"
    cli("convert", source, out, "--layers", "3", check=0)
    plan = json.loads((out / "pruning_plan.json").read_text())
    for count in (100_000, 9_000):
        files = plan["files"] | {f"f{i}": {"size": 1, "sha256": "0"} for i in range(count)}
        (out / "pruning_plan.json").write_text(json.dumps(plan | {"files": files}))
        done = cli("verify", out, check=1, timeout=200, preexec_fn=lambda: limited(20, memory=False))
        assert 0 < len(done.stderr.splitlines()) <= 101


def places(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The path of every value inside a JSON value; of lists the first item stands for all."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def refusal(work: Callable[[], object]) -> str | None:
    """What bad input is told, if it is refused."""
    try:
        work()
    except PruneAttnError as error:
        return str(error) if error.exit_code == 2 else pytest.fail(str(error))
    return None


def test_a_pruned_source_whose_plan_has_wrong_types(tmp_path):
    """Whatever its plan says, a directory is pruned once more, or refused by the plan's name."""
    hub = tmp_path / "models--o--n" / "snapshots" / ("0" * 40)
    shutil.copytree(SHIPPED, hub)
    convert(hub, tmp_path / "once", Layers("3"), options=WriteOptions(graph=None))
    twice = tmp_path / "twice"
    convert(tmp_path / "once", twice, Layers("5"), options=WriteOptions(graph=None))
    text = (twice / "pruning_plan.json").read_text()
    wrong = [None, 5, "x", [], {}, [[]], {"x": {}}, True, -1, "\\ud800"]
    tried = 0
    for i, place in enumerate(places(json.loads(text))):
        record = json.loads(text)
        inner = record
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong[i % len(wrong)]
        (twice / "pruning_plan.json").write_text(json.dumps(record).replace("\\\\ud800", "\\ud800"))
        tried += 1
        problem = refusal(
            lambda: convert(twice, tmp_path / "out", Layers("7"), options=WriteOptions(overwrite=True, graph=None))
        )
        if problem is None:
            assert verify(tmp_path / "out", twice)
        else:
            assert "pruning_plan.json: " in problem, place
        verify(twice, tmp_path / "once")  # whatever it says, it does not crash
    assert tried > 60


def test_graphs_whose_metadata_and_constants_have_wrong_types(cli, source, tmp_path):
    import onnx

    out = tmp_path / "out"
    cli("convert", source, out, "--layers", "3", check=0)
    whole = onnx.load(out / "model.onnx", load_external_data=False)

    def metadata(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
        def edit(model: onnx.ModelProto) -> None:
            next(p for p in model.metadata_props if p.key.endswith(key)).value = value

        return edit

    def constant(**fields: object) -> Callable[[onnx.ModelProto], None]:
        def edit(model: onnx.ModelProto) -> None:
            tensor = next(t for t in model.graph.initializer if t.name == "rotary.inv_freq")
            for name, value in fields.items():
                setattr(tensor, name, value)

        return edit

    edits = [metadata(key, value) for key in ("options", "shards") for value in (
        "5", "[]", "", "{", '"x"', "[" * 100_000, '{"context": "x"}', '{"context": -5, "last_token_logits": 3}',
        '{"model.safetensors": 5}', '{"model.safetensors": {"size": "\\ud800", "header_sha256": []}}', "NaN",
        '{"\\u001b]0;x": {"size": [], "header_sha256": {}}}', '{"context": 1e999, "last_token_logits": false}',
    )]  # fmt: skip
    edits += [constant(raw_data=b"abc"), constant(raw_data=b""), constant(data_type=onnx.TensorProto.STRING),
              constant(data_type=99), constant(data_location=onnx.TensorProto.EXTERNAL)]  # fmt: skip
    edits.append(lambda model: model.graph.node[3].attribute.add(name="epsilon"))
    for i, edit in enumerate(edits):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        edit(model)
        (out / "model.onnx").write_bytes(model.SerializeToString())
        problems = verify(out).problems
        assert problems, i
        assert all("model.onnx" in problem for problem in problems)
        assert refusal(lambda: export(out, accept_changes=True)) is None, i  # the cure that is named
        assert verify(out), i


@pytest.mark.parametrize("what", ["one token of 1 MB", "16 MB of fields"])
def test_a_tokenizer_of_metas_that_wants_all_time(source, tmp_path, what):
    from foreign import write_meta

    meta = write_meta(source, tmp_path / "meta")
    model = (meta / "tokenizer.model").read_bytes()
    if what.startswith("one"):
        at = 0
        for _ in range(5):
            at += 2 + model[at + 1]  # the first tokens are short
        rest = model[at + 2 + model[at + 1] :]  # the sixth is another now: text in piece in model
        piece = b"ab" * 500_000
        for _ in range(2):
            piece = b"\x0a" + bytes(len(piece) >> shift & 127 | 128 for shift in (0, 7, 14)) + b"\0" + piece
        (meta / "tokenizer.model").write_bytes(model[:at] + piece + rest)
    else:
        (meta / "tokenizer.model").write_bytes(model + b"\x20\x01" * (8 << 20))
    refused_soon("convert", meta, tmp_path / "out", "--layers", "3", seconds=15, match="tokenizer.model: ")
