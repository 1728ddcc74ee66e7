"""Which small files of a checkpoint describe its use: tokenizer, generation config, chat template, licence, policy."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from pruner.checkpoint.meta_files import TOKENIZER, tokenizer_file

# Weights in other formats, code, and what describes the checkpoint itself (its README, report, model.onnx,
# genai_config.json, plan), match none of these.
USE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "generation_config.json", "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
LICENCE = (
    "license*", "licence*", "*_license*", "copying*", "notice*", "use_policy*", "acceptable_use*", "*usage_policy*",
    "responsible*use*guide*", "policy*",
)  # fmt: skip
_FOLDER = "additional_chat_templates"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".data", ".h5", ".msgpack", ".chk")
_CODE = (
    ".py", ".pyc", ".pyo", ".pyw", ".pyi", ".pyx", ".ipynb", ".pkl", ".pickle", ".joblib", ".so", ".dll", ".dylib",
    ".exe", ".jar", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js",
)  # fmt: skip


def is_companion(name: str, patterns: tuple[str, ...] = USE + LICENCE) -> bool:
    """Whether a file comes along with the weights; ``name`` is relative to the checkpoint, with ``/``."""
    folder, _, _ = name.rpartition("/")
    return (
        folder in ("", _FOLDER)
        and any(fnmatch(name.lower(), pattern) for pattern in patterns)
        and not name.lower().endswith(_WEIGHTS + _CODE)
    )


def companion_files(directory: Path, *, meta: bool = False) -> dict[str, Path]:
    """Relative name to path of all that comes along, of whatever kind it is, sorted; nothing is read.

    With Meta's distribution (``meta``) also the licence that its ``download.sh`` puts above it, where the tokenizer
    lies there too.
    """
    found = _matching(directory, USE + LICENCE)
    if meta and TOKENIZER not in found and tokenizer_file(directory) is not None:
        found = _matching(directory.resolve().parent, LICENCE) | found
    return dict(sorted(found.items()))


def _matching(directory: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    names = [*os.listdir(directory)]
    if (directory / _FOLDER).is_dir():
        names += [f"{_FOLDER}/{name}" for name in os.listdir(directory / _FOLDER)]
    return {
        name: directory / name for name in names if is_companion(name, patterns) and not (directory / name).is_dir()
    }
