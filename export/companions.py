"""The small files that come along from the source: tokenizer, generation config, chat template, licence, policy."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# What describes the model's use. Weights in other formats, and what describes the source itself (its README, report,
# model.onnx, genai_config.json, plan), match none of these.
_PATTERNS = (
    "tokenizer*", "tokenization_*.py",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "generation_config.json", "chat_template*", "additional_chat_templates/*.jinja",
    "license*", "licence*", "*_license*", "copying*", "notice*", "use_policy*", "acceptable_use*", "*usage_policy*",
    "responsible*use*guide*", "policy*",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".data", ".h5", ".msgpack")


def companions(source: Path) -> dict[str, Path]:
    """Relative name (with ``/``) to file of everything that comes along, sorted; links are followed."""
    files = [*source.glob("*"), *source.glob("additional_chat_templates/*")]
    names = {file.relative_to(source).as_posix(): file for file in files if file.is_file()}
    return {
        name: names[name]
        for name in sorted(names)
        if any(fnmatch(name.lower(), pattern) for pattern in _PATTERNS) and not name.lower().endswith(_WEIGHTS)
    }


def tokenizer_class(source: Path, names: dict[str, Path], config: dict[str, Any]) -> str | None:
    """The tokenizer class to name in ``config.json`` where only ``model_type`` used to imply it.

    ``AutoTokenizer`` looks ``llama`` up in its own table; the pruned model's type is not in that table.
    """
    if config.get("tokenizer_class") or not any(name.startswith("tokenizer.") for name in names):
        return None
    try:
        if json.loads((source / "tokenizer_config.json").read_bytes()).get("tokenizer_class"):
            return None
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    return "LlamaTokenizer"
