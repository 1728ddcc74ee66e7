"""The small files that come along from the source: tokenizer, generation config, chat template, licence, policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.checkpoint.companions import LICENCE, USE, is_companion
from pruner.checkpoint.meta_files import TOKENIZER, meta_files, tokenizer_json
from pruner.errors import PruneAttnError
from pruner.files import read_bounded
from pruner.record import is_file_name

_MOST_BYTES = 128 << 20  # the largest tokenizer.json have 35 MB


def companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Relative name (with ``/``) to bytes of everything that comes along, sorted; links are followed.

    Where there is ``tokenizer.model`` alone, ``tokenizer.json`` is made of it. With Meta's distribution come the files
    that Hugging Face's form has and it lacks, and the licence that its ``download.sh`` puts above it, where the
    tokenizer lies there too.
    """
    source, files = checkpoint.path, {}
    found = _matching(source, USE + LICENCE)
    if checkpoint.meta:
        files = meta_files(source)
        if TOKENIZER in files and TOKENIZER not in found:
            found = _matching(source.resolve().parent, LICENCE) | found
    elif "tokenizer.json" not in found and (made := tokenizer_json(source)) is not None:
        files["tokenizer.json"] = made
    files |= {name: read_bounded(path, _MOST_BYTES) for name, path in found.items()}
    return dict(sorted(files.items()))


def _matching(directory: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    files = [*directory.glob("*"), *directory.glob("additional_chat_templates/*")]
    names = {file.relative_to(directory).as_posix(): file for file in files if file.is_file()}
    found = {name: file for name, file in names.items() if is_companion(name, patterns)}
    for name, file in found.items():
        if not is_file_name(name):
            raise PruneAttnError(f"{file}: has a name of more than 200 or of unprintable characters; rename it")
    return found


def tokenizer_class(files: dict[str, bytes], config: dict[str, Any]) -> str | None:
    """The tokenizer class to name in ``config.json`` where only ``model_type`` used to imply it; ``files`` come along.

    ``AutoTokenizer`` looks ``llama`` up in its own table; the pruned model's type is not in that table.
    """
    if config.get("tokenizer_class") or not any(name.startswith("tokenizer.") for name in files):
        return None
    try:
        if json.loads(files.get("tokenizer_config.json", b"{}")).get("tokenizer_class"):
            return None
    except (ValueError, AttributeError, RecursionError):
        pass
    return "LlamaTokenizer"
