"""What ``pruning_plan.json`` must look like before anything of it is used: the types of all fields, checked once."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from pruner.errors import PruneAttnError, printable
from pruner.files import read_json
from pruner.names import PLAN_FILE

FORMAT = "prune-attn plan"
MOST_LAYERS = 10_000
LONGEST_REQUEST = 10 * MOST_LAYERS  # characters of --layers
_MOST_FILES = 10_000


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 500


def _long_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= LONGEST_REQUEST)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_layers(value: Any) -> bool:
    """Whether this is a list of layer numbers, each once."""
    fits = isinstance(value, list) and len(value) <= MOST_LAYERS and all(map(_count, value))
    return fits and len(set(value)) == len(value)


def is_small(value: Any) -> bool:
    """Whether this is a number of layers."""
    return _count(value) and value <= MOST_LAYERS


def is_file_name(value: str) -> bool:
    """Whether a record can list a file of this relative name."""
    path = PurePosixPath(value)
    return 0 < len(value) < 200 and value.isprintable() and not path.is_absolute() and ".." not in path.parts


# A shape is a test, or an object's fields (those that end with ? may be absent or null; others may be there), or a
# pair: a test of the names, and the shape of all values.
_FACT = {"size?": _count, "sha256?": _text, "header_sha256?": _text}
SOURCE = {
    "name": _text,
    "hub?": {"repo_id": _text, "commit": _text},
    "config_sha256": _text,
    "shards": (is_file_name, {"size": _count, "header_sha256": _text}),
}
_PREVIOUS: dict[str, Any] = {
    "strategy": _text,
    "requested": _long_text,
    "attention": is_layers,
    "mlp": is_layers,
    "source": SOURCE,
    "tool?": {"name": _text, "version": _text},
    "original?": {"num_hidden_layers": is_small},
    "model?": {"numbered_layers": is_small},
    "result?": {"num_hidden_layers": is_small, "attention": is_layers, "mlp": is_layers},
    "converted_to?": ("float16", "bfloat16", "float32").__contains__,
}
_PREVIOUS["previous?"] = _PREVIOUS
_RECORD = _PREVIOUS | {"files": (is_file_name, _FACT)}


def misfit(value: Any, shape: Any, field: str = "") -> str | None:
    """The first field that is not as ``shape`` says; ``None`` where all are."""
    if callable(shape):
        return None if shape(value) else field
    if not isinstance(value, dict):
        return field
    if isinstance(shape, tuple):
        fits, inner = shape
        if len(value) > _MOST_FILES or not all(map(fits, value)):
            return field
        return next((wrong for key in value if (wrong := misfit(value[key], inner, f"{field}.{key}"))), None)
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if value.get(name) is None and name != key:
            continue
        inside = f"{field}.{name}".lstrip(".")
        if wrong := misfit(value[name], inner, inside) if name in value else inside:
            return wrong
    return None


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record in a directory that this tool wrote; ``None`` where there is none, or somebody else's file.

    Raises ``PruneAttnError`` for one that is damaged.
    """
    path = directory / PLAN_FILE
    if not path.exists():
        return None
    record = read_json(path)
    if record.get("format") != FORMAT:
        return None
    if wrong := misfit(record, _RECORD):
        raise PruneAttnError(
            f"{path}: is damaged ({printable(wrong, 80)!r} is not what it should be); convert again, or move it away"
        )
    return record
