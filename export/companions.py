"""The small files that come along from the source: tokenizer, generation config, chat template, licence, policy.

They are checked, bounded and copied; what would make a loader run the source's own code stays behind.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.checkpoint.companions import USE, is_companion
from pruner.checkpoint.directory import READ
from pruner.checkpoint.meta_files import TOKENIZER, meta_files, tokenizer_file, tokenizer_json
from pruner.errors import PruneAttnError, printable
from pruner.files import check_inside, leads_out, open_regular, read_bounded, read_json
from pruner.names import CONFIG
from pruner.nemotron_nas.dialect import CODE_FILES, MODEL_TYPE
from pruner.own_code import without_code
from pruner.record import is_file_name

Companions = dict[str, Path | bytes]  # relative name, with /, to the file that is copied, or to what is written

_MOST_BYTES = 128 << 20  # the largest tokenizer.json have 35 MB
_MOST_JSON = 64 << 20
_MOST_FILES = 1000
_POINTERS = (b"version https://git-lfs", b"version https://hawser")
_NO_CONFIG = ("tokenizer.json", "vocab.json", "added_tokens.json")  # their names are tokens


def companions(checkpoint: Checkpoint) -> Companions:
    """Everything that comes along, sorted; links are followed, as far as they stay in the source.

    Where there is ``tokenizer.model`` alone, ``tokenizer.json`` is made of it. With Meta's distribution come the files
    that Hugging Face's form has and it lacks. Cost: JSON is read and checked. Raises ``PruneAttnError`` for what is
    gone, empty, a Git LFS pointer, no regular file, too large, no JSON where JSON belongs, or lies elsewhere.
    """
    source, found = checkpoint.path, checkpoint.companions
    if len(found) > _MOST_FILES:
        raise PruneAttnError(f"{source}: has {len(found)} licences and tokenizer files; take away what is none")
    files: Companions = {name: _checked(name, path, source) for name, path in found.items()}
    if checkpoint.meta:
        if (tokenizer := tokenizer_file(source)) is not None:
            _checked(TOKENIZER, tokenizer, source)
        files = {**meta_files(source), **files}
    elif "tokenizer.json" not in files and (made := tokenizer_json(source)) is not None:
        files["tokenizer.json"] = made
    return dict(sorted(files.items()))


def _checked(name: str, path: Path, source: Path) -> Path | bytes:
    """The file, or its content without what names code. Raises ``PruneAttnError``."""
    if not is_file_name(name):
        raise PruneAttnError(f"{path}: has a name of more than 200 or of unprintable characters; rename it")
    with open_regular(path) as file:
        head, size = file.read(100), os.fstat(file.fileno()).st_size
    check_inside(path, source if path.is_relative_to(source) else source.resolve().parent)
    if not size:
        raise PruneAttnError(f"{path}: is empty; download it again, or remove it")
    if head.startswith(_POINTERS):
        raise PruneAttnError(f"{path}: is a Git LFS pointer; run `git lfs pull` in that repository")
    if size > _MOST_BYTES:
        raise PruneAttnError(f"{path}: is larger than {_MOST_BYTES:,} bytes, which no such file needs; remove it")
    if not (name.endswith(".json") and is_companion(name, USE)):
        return path
    content = read_json(path, _MOST_JSON)
    kept = content if name in _NO_CONFIG else without_code(content)
    return path if kept == content else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def check_links(checkpoint: Checkpoint) -> None:
    """``PruneAttnError`` where what is read of the source beside its weights is a link that leads out of it."""
    for name in READ:
        if (path := checkpoint.path / name).is_symlink():
            check_inside(path, checkpoint.path)


def left_behind(checkpoint: Checkpoint, along: Companions) -> list[str]:
    """What of the source is not carried along, since it is code, and which of its weights lie elsewhere."""
    source, ours = checkpoint.path, CODE_FILES if checkpoint.config["model_type"] == MODEL_TYPE else ()
    named = [name for name, path in checkpoint.companions.items() if along.get(name) != path]
    if not ours and without_code(checkpoint.config) != checkpoint.config:
        named.append(CONFIG)
    code = sorted(path.name for path in source.glob("*.py") if path.name not in ours)
    notes = []
    if code or named:
        files = f" ({printable(', '.join(code))})" if code else ""
        fields = f"; what names it in {' and '.join(named)} is left out" if named else ""
        notes.append(f"the source's own code{files} was neither run nor carried along{fields}")
    if away := [shard.path.name for shard in checkpoint.shards if leads_out(shard.path, source)]:
        notes.append(f"weights that were copied lie outside the source, to which it links: {', '.join(away)}")
    return notes


def check_delivered(checkpoint: Checkpoint) -> None:
    """``PruneAttnError`` where what lies beside an output's weights is damaged, lies elsewhere or names code."""
    for name, what in companions(checkpoint).items():
        if isinstance(what, bytes) and name in checkpoint.companions:
            raise PruneAttnError(f"{checkpoint.path / name}: names code to run (auto_map) that is not prune-attn's")


def content(what: Path | bytes) -> bytes:
    """The bytes of one of ``Companions``."""
    return what if isinstance(what, bytes) else read_bounded(what, _MOST_BYTES)


def digest(what: Path | bytes) -> str:
    """SHA-256 of a file's content, or of bytes."""
    if isinstance(what, bytes):
        return hashlib.sha256(what).hexdigest()
    with open_regular(what) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_class(files: Companions, config: dict[str, Any]) -> str | None:
    """The tokenizer class to name in ``config.json`` where only ``model_type`` used to imply it; ``files`` come along.

    ``AutoTokenizer`` looks ``llama`` up in its own table; the pruned model's type is not in that table.
    """
    if config.get("tokenizer_class") or not any(name.startswith("tokenizer.") for name in files):
        return None
    found = files.get("tokenizer_config.json", b"{}")
    settings = json.loads(found) if isinstance(found, bytes) else read_json(found)
    return None if settings.get("tokenizer_class") else "LlamaTokenizer"
