"""The tokenizer of a checkpoint directory, and texts: plain files, JSON lines, and the one that comes along."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pruner.checkpoint.companions import companion_files
from pruner.checkpoint.meta import meta_parts
from pruner.checkpoint.meta_files import meta_files
from pruner.errors import PruneAttnError, one_line
from pruner.files import expand, read_json
from pruner.names import CONFIG
from pruner.own_code import without_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


GENERAL = "general"  # names the calibration text that comes along; a file of that name is ./general
_GENERAL_FILE = Path(__file__).parent / "texts" / "general.txt"
_JSON_LINES = (".jsonl", ".ndjson")

Texts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]  # one file, or several


@dataclass(frozen=True)
class Text:
    """A text as token ids, int64 (N,), with no special token added.

    ``path``: the files as they were named; ``name``: without their folders. ``sha256`` and ``bytes`` are those of the
    ``content`` in UTF-8: of a plain file without a byte-order mark they are the file's own.
    """

    path: str
    name: str
    sha256: str
    bytes: int
    ids: np.ndarray
    content: str


def load_tokenizer(directory: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The directory's tokenizer. Raises ``PruneAttnError`` where it has none that works.

    Code that lies there is never run: a tokenizer that asks for some is made of its ``tokenizer.json`` alone.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import pruner

    logging.disable_progress_bar()
    pruner.register()
    directory = expand(directory)
    with tempfile.TemporaryDirectory() as made:
        place = directory
        if meta_parts(directory) and not (directory / "tokenizer.json").exists():
            place = Path(made)
            for name, data in meta_files(directory).items():
                (place / name).write_bytes(data)
        elif _asks_for_code(directory):
            place = _without_code(directory, Path(made))
        reason = "no tokenizer.json and no tokenizer.model"
        if has_tokenizer(place) or (place / "vocab.json").is_file():  # else transformers makes one of three tokens
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
                tokenizer.name_or_path = str(directory)
                return tokenizer
            except (OSError, ValueError) as error:
                reason = one_line(error, 120)
        raise PruneAttnError(f"{directory}: has no tokenizer that loads ({reason}); copy the original's")


_CONFIGS = ("tokenizer_config.json", CONFIG)


def _asks_for_code(directory: Path) -> bool:
    """Whether a tokenizer's class is said to be in code of its own."""
    settings, config = (read_json(directory / n) if (directory / n).is_file() else {} for n in _CONFIGS)
    name = "tokenizer_class"
    return without_code(settings) != settings or without_code(config).get(name) != config.get(name)


def _without_code(directory: Path, place: Path) -> Path:
    """``place``, with the tokenizer's files in it as links, and its configurations without what asks for code."""
    for name, path in companion_files(directory).items():
        if "/" not in name and name not in _CONFIGS:
            (place / name).symlink_to(path.resolve())
    for name in _CONFIGS:
        if (directory / name).is_file():
            (place / name).write_text(json.dumps(without_code(read_json(directory / name))))
    return place


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer's file lies there, as Llama's do."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_text(texts: Texts, tokenizer: PreTrainedTokenizerBase, field: str | None = None) -> Text:
    """Read and tokenize one text of one or several files; see ``read_contents``."""
    content = "\n\n".join(read_contents(texts, field))
    data = content.encode()
    # verbose=False: that a book is longer than the context is no news
    ids = np.array(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    paths = [os.fspath(path) for path in _files(texts)]
    name = ", ".join(Path(path).name for path in paths)
    return Text(", ".join(paths), name, hashlib.sha256(data).hexdigest(), len(data), ids, content)


def read_contents(texts: Texts, field: str | None = None) -> list[str]:
    """The text of each file: UTF-8, without a byte-order mark. ``general`` is the text that comes along.

    JSON lines (known by .jsonl or .ndjson, or by what is in them) give the strings in their ``field`` (default: text),
    an empty line between them. Raises ``PruneAttnError`` for a file that is missing, empty, no text, or has no such
    field on some line.
    """
    paths = _files(texts)
    if not paths:
        raise PruneAttnError("no text file is named; give one")
    return [_read(_GENERAL_FILE if os.fspath(path) == GENERAL else expand(path), field or "text") for path in paths]


def check_apart(measured: Texts, chosen: Texts, field: str | None = None, chosen_field: str | None = None) -> None:
    """``PruneAttnError`` where a text to measure on is one to choose by: that says nothing of unseen text."""
    seen = set(read_contents(chosen, chosen_field))
    for path, content in zip(_files(measured), read_contents(measured, field), strict=True):
        if content in seen:
            raise PruneAttnError(
                f"{path}: is the calibration text too; test the choice on text that it was not made on"
            )


def _files(texts: Texts) -> list[str | os.PathLike[str]]:
    return [texts] if isinstance(texts, str | os.PathLike) else list(texts)


def _read(path: Path, field: str) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise PruneAttnError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise PruneAttnError(f"{path}: is a directory; give its text files one by one") from None
    except UnicodeDecodeError as error:
        raise PruneAttnError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8, and unpack it if it is compressed"
        ) from None
    if "\0" in text:
        raise PruneAttnError(f"{path}: is not UTF-8 text (it holds zero bytes); save it as UTF-8")
    text = text.removeprefix("\ufeff")
    if path.suffix.lower() in _JSON_LINES or _looks_like_json_lines(text):
        text = "\n\n".join(_values(path, text, field))
    elif path.suffix.lower() == ".json":
        raise PruneAttnError(f"{path}: is not JSON lines (one object a line); make it so, or give plain text")
    if not text.strip():
        raise PruneAttnError(f"{path}: is empty; give a text file with something in it")
    return text


def _looks_like_json_lines(text: str) -> bool:
    """Whether the first two lines with something on them (or the only one) are JSON objects that hold something."""
    lines = list(islice((line for line in io.StringIO(text) if line.strip()), 2))
    return bool(lines) and all(isinstance(row := _parse(line), dict) and row for line in lines)


def _values(path: Path, text: str, field: str) -> list[str]:
    out = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _parse(line)
        if not isinstance(row, dict):
            raise PruneAttnError(f"{path}: line {number} is not a JSON object; JSON lines have one on each line")
        value = row.get(field)
        if not isinstance(value, str):
            others = one_line(ValueError(", ".join(name for name, x in row.items() if isinstance(x, str))), 120)
            cure = f"name the field with --text-field (fields with text there: {others})"
            if not others or field in row:
                cure = "leave that line out, or make its text a string"
            raise PruneAttnError(f"{path}: line {number} has no text in a field {field!r}; {cure}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise PruneAttnError(f"{path}: line {number} has half a character (a lone surrogate); mend it") from None
        out.append(value)
    return out


def _parse(line: str) -> Any:
    """What a line of JSON says; ``None`` where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
