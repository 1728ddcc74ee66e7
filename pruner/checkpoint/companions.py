"""Which small files of a checkpoint describe its use: tokenizer, generation config, chat template, licence, policy."""

from __future__ import annotations

from fnmatch import fnmatch

# Weights in other formats, and what describes the checkpoint itself (its README, report, model.onnx, genai_config.json,
# plan), match none of these.
USE = (
    "tokenizer*", "tokenization_*.py",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "generation_config.json", "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
LICENCE = (
    "license*", "licence*", "*_license*", "copying*", "notice*", "use_policy*", "acceptable_use*", "*usage_policy*",
    "responsible*use*guide*", "policy*",
)  # fmt: skip
_FOLDER = "additional_chat_templates"
_NOT = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".data", ".h5", ".msgpack", ".chk")


def is_companion(name: str, patterns: tuple[str, ...] = USE + LICENCE) -> bool:
    """Whether a file comes along with the weights; ``name`` is relative to the checkpoint, with ``/``."""
    folder, _, _ = name.rpartition("/")
    return (
        folder in ("", _FOLDER)
        and any(fnmatch(name.lower(), pattern) for pattern in patterns)
        and not name.lower().endswith(_NOT)
    )
