"""Small files that want all memory, all time, or the terminal: one line, exit code 2, and soon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SHIPPED

from export import convert
from pruner import PruneAttnError
from pruner.errors import printable
from pruner.files import read_json


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": {"b": NaN}}', "a.b is NaN"),
        ('{"a": [0, -Infinity]}', "a.1 is NaN, infinite"),
        ('{"a": 1e999}', "a is NaN, infinite"),
        ('{"a": 1' + "0" * 400 + "}", "a is NaN, infinite"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"a": ["\\ud800"]}', "a.0 holds half a surrogate pair"),
        ('{"\\udfff": 1}', "holds half a surrogate pair"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100"),
        ('{"a":' + "[" * 100_000, "nested"),
        ("[]", "is not a JSON object"),
        ("", "it is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b'{"a": "\xff"}', "is not JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, match):
    file = tmp_path / "some.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PruneAttnError, match=match) as error:
        read_json(file)
    assert str(error.value).startswith(f"{file}: ")
    assert len(str(error.value)) < len(str(file)) + 400
    assert str(error.value).isprintable()


def test_sound_json_is_read(tmp_path):
    value = {"a": [1.5, -3, None, True, "\U0001f600", 10**30], "b": {}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), '{"a":' * 100 + "1" + "}" * 100):
        (tmp_path / "some.json").write_text(text)
        assert read_json(tmp_path / "some.json") == json.loads(text)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_only_regular_files_are_read(source, name):
    file = source / name
    for make in (lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(file)):
        file.unlink()
        make()
        start = time.monotonic()
        with pytest.raises(PruneAttnError, match=name):
            convert(source, source.parent / "out", drop=1)
        assert time.monotonic() - start < 5


def test_a_config_is_bounded(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"id2label": "x" * (5 << 20)}))
    with pytest.raises(PruneAttnError, match=r"config\.json: is larger than"):
        convert(source, source.parent / "out", drop=1)


def test_what_is_printed_is_one_short_line():
    assert printable("a\tb\n c") == "a b c"
    assert printable("\x1b]0;owned\x07 \x9b2J \u202eright \ud800") == "\\x1b]0;owned\\x07 \\x9b2J \\u202eright \\ud800"
    assert printable("Überraschung 🙂") == "Überraschung 🙂"
    long = printable("file.json: " + "\x1b" * 5_000_000 + "; download it again", 300)
    assert len(long) <= 300
    assert long.startswith("file.json: ")
    assert long.endswith("; download it again")
    assert printable("two  spaces/of a path") == "two  spaces/of a path"


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
    from export import cli

    cli._write_text("as\x1bit\tis\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    cli._write_text("\x1b[2J\x07\nzero\u200cwidth\t\x9bm")
    assert capsys.readouterr().out == "as\x1bit\tis\n\\x1b[2J\\x07\nzero\u200cwidth\t\\x9bm"
