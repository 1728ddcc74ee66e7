"""Text files, and the tokenizer of a checkpoint directory."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pruner.checkpoint.meta import meta_parts
from pruner.checkpoint.meta_files import meta_files
from pruner.errors import PruneAttnError, one_line
from pruner.files import expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """A text as token ids, int64 (N,), with no special token added; ``sha256`` and ``bytes`` are the file's."""

    path: Path
    sha256: str
    bytes: int
    ids: np.ndarray


def load_tokenizer(directory: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The directory's tokenizer. Raises ``PruneAttnError`` where it has none that works."""
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
        reason = "no tokenizer.json and no tokenizer.model"
        if has_tokenizer(place) or (place / "vocab.json").is_file():  # else transformers makes one of three tokens
            try:
                return AutoTokenizer.from_pretrained(str(place))
            except (OSError, ValueError) as error:
                reason = one_line(error, 120)
        raise PruneAttnError(f"{directory}: has no tokenizer that loads ({reason}); copy the original's")


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer's file lies there, as Llama's do."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_text(path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read and tokenize a UTF-8 text file. Raises ``PruneAttnError`` for one that is missing, empty or not text."""
    data, text = read_utf8(path)
    # verbose=False: that a book is longer than the context is no news
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    return Text(expand(path), hashlib.sha256(data).hexdigest(), len(data), ids)


def read_utf8(path: str | os.PathLike[str]) -> tuple[bytes, str]:
    """A text file's bytes and text. Raises as ``read_text``."""
    path = expand(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise PruneAttnError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise PruneAttnError(f"{path}: is a directory; give a text file") from None
    except UnicodeDecodeError as error:
        raise PruneAttnError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise PruneAttnError(f"{path}: is empty; give a text file with something in it")
    return data, text
