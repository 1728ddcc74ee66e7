"""The small files that come along from the source: tokenizer, generation config, chat template, licence, policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pruner.checkpoint.companions import is_companion


def companions(source: Path) -> dict[str, Path]:
    """Relative name (with ``/``) to file of everything that comes along, sorted; links are followed."""
    files = [*source.glob("*"), *source.glob("additional_chat_templates/*")]
    names = {file.relative_to(source).as_posix(): file for file in files if file.is_file()}
    return {name: names[name] for name in sorted(names) if is_companion(name)}


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
