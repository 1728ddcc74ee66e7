"""``generation_config.json`` and the ids of special tokens, as transformers and onnxruntime-genai can take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pruner.checkpoint.directory import Checkpoint
from pruner.checkpoint.fields import is_number, is_whole
from pruner.errors import PruneAttnError, printable
from pruner.files import read_json
from pruner.names import CONFIG

GENERATION = "generation_config.json"
_MOST_BYTES = 64 << 20  # of tokenizer.json: Llama 3's has 9 to 17 MB


def _at_least(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number from {least}", lambda v: is_whole(v) and v >= least


_FLAG = ("true or false", lambda v: isinstance(v, bool))
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # each may be null too
    "do_sample": _FLAG, "use_cache": _FLAG,
    "temperature": ("a number from 0", lambda v: is_number(v) and v >= 0),
    "top_p": ("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1),
    "top_k": _at_least(0),
    "repetition_penalty": ("a number above 0", lambda v: is_number(v) and v > 0),
    "length_penalty": ("a number", is_number),
    "max_length": _at_least(1), "max_new_tokens": _at_least(1), "min_length": _at_least(0),
    "min_new_tokens": _at_least(0), "no_repeat_ngram_size": _at_least(0),
    "num_beams": _at_least(1), "num_return_sequences": _at_least(1),
    "cache_implementation": ("the name of a cache", lambda v: isinstance(v, str)),
    "early_stopping": ('true, false or "never"', lambda v: isinstance(v, bool) or v == "never"),
    "bos_token_id": ("a whole number", is_whole), "pad_token_id": ("a whole number", is_whole),
    "eos_token_id": (
        "a whole number or a list of them",
        lambda v: is_whole(v) or (isinstance(v, list) and all(map(is_whole, v))),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """How a model's text is made: ``fields`` of ``generation_config.json``, and the special tokens that it has.

    ``beyond`` are fields that name a token for which the model has no embedding.
    """

    fields: dict[str, Any]
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    beyond: dict[str, int]


def read_generation(checkpoint: Checkpoint, eos: int | None = 2) -> Generation:
    """``generation_config.json``, else ``config.json``, else transformers' defaults, ``eos`` for the end of text.

    Raises ``PruneAttnError`` for a field of a type or value that transformers or onnxruntime-genai refuses.
    """
    path = checkpoint.path / GENERATION
    found = read_json(path) if path.is_file() else {}
    fields = {key: value for key, value in found.items() if value is not None}
    for key, (what, fits) in _FIELDS.items():
        if key in fields and not fits(fields[key]):
            raise PruneAttnError(f"{path}: {key} is {printable(repr(fields[key]), 60)}; it must be {what}, or null")
    answers, beams = fields.get("num_return_sequences", 1), fields.get("num_beams", 1)
    if answers > beams and not (beams == 1 and fields.get("do_sample")):  # transformers loads no such model
        raise PruneAttnError(f"{path}: num_return_sequences is {answers}, more than num_beams ({beams}); set it to 1")
    beyond: dict[str, int] = {}

    def ids(name: str, default: int | None) -> tuple[int, ...]:
        value = fields.get(name, checkpoint.config.get(name, default))
        every = value if isinstance(value, list) else [] if value is None else [value]
        have = tuple(i for i in every if 0 <= i < checkpoint.decoder.vocab_size)
        if len(have) < len(every):
            beyond[name] = next(i for i in every if i not in have)
        return have

    bos, ends, pad = ids("bos_token_id", 1), ids("eos_token_id", eos), ids("pad_token_id", None)
    return Generation(fields, next(iter(bos), None), ends, next(iter(pad), None), beyond)


def token_notes(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each special token and each added token that the model has no embedding for."""
    size = checkpoint.decoder.vocab_size
    for name, i in read_generation(checkpoint).beyond.items():
        cure = f"{GENERATION} or {CONFIG} names it; set it to a token of the model, or to null"
        yield f"{name} {i} is beyond the {size} embeddings, so genai_config.json leaves it out: {cure}"
    try:
        check_pad(checkpoint)
    except PruneAttnError as error:
        yield str(error)
    names = {i: name for i, name in added_tokens(checkpoint).items() if i >= size}
    if names:
        i = min(names)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"the tokenizer's token {printable(names[i], 40)!r} ({i}){more} is beyond the {size} embeddings: "
            "text with it cannot be run; resize the original's embeddings if it is meant to be there"
        )


def added_tokens(checkpoint: Checkpoint) -> dict[int, str]:
    """Id to text of the tokens that the tokenizer's files add to its vocabulary; what is malformed is left out."""
    found: dict[int, Any] = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        data: dict[str, Any] = {}
        with suppress(PruneAttnError):  # there is none, or it is refused as a companion
            data = read_json(checkpoint.path / name, _MOST_BYTES)
        if name == "added_tokens.json":
            found |= {i: token for token, i in data.items() if is_whole(i)}
        listed, decoder = data.get("added_tokens"), data.get("added_tokens_decoder")
        for token in listed if isinstance(listed, list) else []:
            if isinstance(token, dict) and is_whole(token.get("id")):
                found[token["id"]] = token.get("content")
        for i, token in decoder.items() if isinstance(decoder, dict) else ():
            if i.isdecimal() and isinstance(token, dict):
                found[int(i)] = token.get("content")
    return {i: token for i, token in found.items() if isinstance(token, str)}


def check_pad(checkpoint: Checkpoint) -> None:
    """Raise ``PruneAttnError`` where ``config.json`` pads with a token for which there is no embedding."""
    pad, size = checkpoint.config.get("pad_token_id"), checkpoint.decoder.vocab_size
    if pad is not None and not -size <= pad < size:
        raise PruneAttnError(
            f"{checkpoint.path / CONFIG}: pad_token_id is {_named(pad, checkpoint)}, beyond the {size} embeddings, and "
            "transformers does not load such a model; set it to null"
        )


def _named(token: int, checkpoint: Checkpoint) -> str:
    name = added_tokens(checkpoint).get(token)
    return str(token) if name is None else f"{token} ({printable(name, 40)!r})"


def check_ids(ids: Any, checkpoint: Checkpoint, what: str) -> None:
    """Raise ``PruneAttnError`` for a token that the model has no embedding for; ``what`` the ``ids`` are of."""
    import numpy as np

    if np.size(ids) and (kind := np.asarray(ids).dtype).kind not in "iu":
        raise PruneAttnError(f"{what}: token ids must be whole numbers; got {kind}")
    size, least, most = checkpoint.decoder.vocab_size, int(np.min(ids, initial=0)), int(np.max(ids, initial=0))
    if least < 0 or most >= size:
        token = _named(least if least < 0 else most, checkpoint)
        raise PruneAttnError(
            f"{what}: holds the token {token}, and {checkpoint.path} has embeddings for 0 to "
            f"{size - 1} only; take it out"
        )
