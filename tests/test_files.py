"""Reading others' files, and showing what they say: strict JSON, bounds, one printable line."""

from __future__ import annotations

import json

import pytest

from pruner import PruneAttnError
from pruner.errors import printable
from pruner.files import read_json


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


def test_what_is_printed_is_one_short_line():
    assert printable("a\tb\n c") == "a b c"
    assert printable("\x1b]0;owned\x07 \x9b2J \u202eright \ud800") == "\\x1b]0;owned\\x07 \\x9b2J \\u202eright \\ud800"
    assert printable("Überraschung 🙂") == "Überraschung 🙂"
    long = printable("file.json: " + "\x1b" * 5_000_000 + "; download it again", 300)
    assert len(long) <= 300
    assert long.startswith("file.json: ")
    assert long.endswith("; download it again")
    assert printable("two  spaces/of a path") == "two  spaces/of a path"
