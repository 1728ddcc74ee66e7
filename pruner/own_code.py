"""What in a configuration makes transformers run code that lies beside it, or on the Hub."""

from __future__ import annotations

from typing import Any

_FIELDS = ("auto_map", "custom_pipelines")
_KERNELS = ("attn_implementation", "_attn_implementation")  # a Hub id here is fetched and run


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's, a generation's or a model's configuration without what makes transformers run its own code.

    A tokenizer's class that is in such code is named as the one that needs ``tokenizer.json`` alone.
    """
    kept = {key: value for key, value in config.items() if key not in _FIELDS}
    for key in _KERNELS:
        if "/" in str(kept.get(key)):
            del kept[key]
    name = kept.get("tokenizer_class")
    if isinstance(name, str) and name in _classes(config.get("auto_map")):
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return kept


def _classes(auto_map: Any) -> set[str]:
    """The names of classes in an ``auto_map``, with and without "Fast"."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    lists = [value if isinstance(value, list) else [value] for value in values]
    names = {name.rsplit(".", 1)[-1].removesuffix("Fast") for items in lists for name in items if isinstance(name, str)}
    return names | {f"{name}Fast" for name in names}
