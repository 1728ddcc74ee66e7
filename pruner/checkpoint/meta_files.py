"""The small files that Meta's distribution lacks and Hugging Face's form has: tokenizer and generation config.

``tokenizer.json`` is made from ``tokenizer.model`` (SentencePiece, byte-pair encoding with byte fallback) in the form
that Llama 2's repositories on the Hub have. transformers 5 takes the vocabulary and the merges from it alone.
Format: https://github.com/google/sentencepiece, ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pruner.errors import PruneAttnError
from pruner.files import open_regular, read_bounded, read_json

TOKENIZER = "tokenizer.model"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # kinds of pieces
_BPE = 2  # kind of model
_MOST_BYTES = 4 << 20  # Llama 2's has 0.5 MB
_LONGEST_TOKEN = 500  # characters; all ways to cut one in two are tried


def tokenizer_file(directory: Path) -> Path | None:
    """``tokenizer.model`` beside the parts, or above them, where Meta's ``download.sh`` puts it."""
    places = (directory / TOKENIZER, Path(directory.resolve().parent) / TOKENIZER)
    return next((path for path in places if path.is_file()), None)


def check_tokenizer(directory: Path, vocabulary: int) -> None:
    """Refuse a ``tokenizer.model`` that is not of this model, of ``vocabulary`` tokens."""
    path = tokenizer_file(directory)
    if path is None:
        return
    with open_regular(path) as file:
        if file.read(1) != b"\n":  # the first field of SentencePiece's protocol buffer
            raise PruneAttnError(
                f"{path}: is no SentencePiece model (Llama 3's is not); of Meta's distributions Llama 2's are read, of "
                "the others give the Hugging Face form"
            )
    try:
        pieces = len(_parse(read_bounded(path, _MOST_BYTES)).pieces)
    except ValueError as error:
        raise _no_tokenizer(path, error) from None
    if pieces > vocabulary or (pieces < vocabulary and path.parent != directory):
        raise PruneAttnError(
            f"{path}: has {pieces} tokens and the model in {directory} has {vocabulary}; put that model's own "
            f"{TOKENIZER} beside its parts"
        )


def _no_tokenizer(path: Path, error: Exception) -> PruneAttnError:
    return PruneAttnError(f"{path}: is no tokenizer of a Llama 2 ({error}); download it again")


def meta_files(directory: Path) -> dict[str, bytes]:
    """Name to bytes of what Hugging Face's form of the model in ``directory`` has beside config and weights.

    Without a ``tokenizer.model`` there are no tokenizer files. Raises ``PruneAttnError`` for one that is damaged or
    of another kind.
    """
    generation = {"bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "temperature": 0.6, "top_p": 0.9}
    files = {"generation_config.json": _dump(generation)}
    path = tokenizer_file(directory)
    if path is None:
        return files
    model = read_bounded(path, _MOST_BYTES)
    try:
        tokenizer, special = _tokenizer(model)
    except ValueError as error:
        raise _no_tokenizer(path, error) from None
    unknown, beginning, end = special
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": beginning,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,  # transformers' way to say that it does not know
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": unknown,
    }
    return files | {
        TOKENIZER: model,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _dump(config),
    }


def tokenizer_json(directory: Path) -> bytes | None:
    """``tokenizer.json`` for a directory of Hugging Face's form that has ``tokenizer.model`` alone.

    With the added tokens, BOS and EOS that its other files name. ``None`` where there is nothing to make it of, or it
    is no tokenizer of Llama's kind.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        return None
    try:
        config, added = (_beside(directory, name) for name in ("tokenizer_config.json", "added_tokens.json"))
        if config.get("tokenizer_class") not in (None, "LlamaTokenizer", "LlamaTokenizerFast"):
            return None
        data, (_, *defaults) = _tokenizer(read_bounded(path, _MOST_BYTES))
        tokenizer = json.loads(data)
        _add_tokens(tokenizer, config, added)
        ends = [
            _content(config.get(f"{name}_token") or default) if config.get(f"add_{name}_token", name == "bos") else None
            for name, default in zip(("bos", "eos"), defaults, strict=True)
        ]
        tokenizer["post_processor"] = _template(tokenizer, *ends)
    except (PruneAttnError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return _dump(tokenizer)


def _beside(directory: Path, name: str) -> dict[str, Any]:
    return read_json(directory / name) if (directory / name).is_file() else {}


def _content(token: Any) -> str:
    return token if isinstance(token, str) else token["content"]


def _add_tokens(tokenizer: dict[str, Any], config: dict[str, Any], added: dict[str, Any]) -> None:
    """Put in what was added to the vocabulary. Raises ``ValueError`` where the numbers do not go on from it."""
    ends = [token for name, token in config.items() if name.endswith("_token") and isinstance(token, (str, dict))]
    special = set(map(_content, ends))
    tokens = {i: {"content": text, "special": text in special} for text, i in added.items()}
    tokens |= {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    ids = dict(tokenizer["model"]["vocab"])
    listed = {token["id"] for token in tokenizer["added_tokens"]}
    for i, token in sorted(tokens.items()):
        if ids.setdefault(token["content"], len(ids)) != i:
            raise ValueError(f"token {i}")
        if i not in listed:
            flags = {
                name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            tokenizer["added_tokens"].append({"id": i, "content": token["content"], **flags})


def _template(tokenizer: dict[str, Any], beginning: str | None, end: str | None) -> dict[str, Any]:
    """The post-processor that puts ``beginning`` before each text and ``end`` behind it."""
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    def template(sequences: str) -> list[dict[str, Any]]:
        return [
            {"Sequence": {"id": name, "type_id": i}} if token == "" else {"SpecialToken": {"id": token, "type_id": i}}
            for i, name in enumerate(sequences)
            for token in (beginning, "", end)
            if token is not None
        ]

    names = [token for token in (beginning, end) if token is not None]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names}
    return {"type": "TemplateProcessing", "single": template("A"), "pair": template("AB"), "special_tokens": special}


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _parse(model: bytes) -> Any:
    """The protocol buffer ``ModelProto`` in these bytes. Raises ``ValueError``."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

    try:
        return ModelProto.FromString(model)
    except DecodeError:
        raise ValueError("it is truncated or no protocol buffer") from None


@lru_cache(maxsize=1)
def _tokenizer(model: bytes) -> tuple[bytes, tuple[str, ...]]:
    """``tokenizer.json``, and the names of the tokens 0, 1 and 2: unknown, beginning, end."""
    parsed = _parse(model)
    pieces = [(piece.piece, piece.score, piece.type) for piece in parsed.pieces]
    if not all(isinstance(text, str) for text, _, _ in pieces):  # protobuf gives bytes for those
        raise ValueError("a token is not UTF-8 text")
    kind, normaliser = parsed.trainer_spec.model_type, parsed.normalizer_spec.name
    if kind != _BPE or normaliser != "identity":
        raise ValueError(f"kind {kind}, normaliser {normaliser!r}; Llama's are {_BPE} and 'identity'")
    if [kind for _, _, kind in pieces[:3]] != [_UNKNOWN, _CONTROL, _CONTROL]:
        raise ValueError("its first three tokens are not the unknown one, beginning and end")
    vocabulary = {text: i for i, (text, _, _) in enumerate(pieces)}
    if len(vocabulary) != len(pieces) or max(map(len, vocabulary)) > _LONGEST_TOKEN:
        raise ValueError(f"a token stands twice in it or has more than {_LONGEST_TOKEN} characters")
    unknown, beginning, end = (text for text, _, _ in pieces[:3])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": text, **flags, "special": kind != _USER_DEFINED}
        for i, (text, _, kind) in enumerate(pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]

    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(pieces, vocabulary),
        },
    }
    tokenizer["post_processor"] = _template(tokenizer, beginning, None)
    return _dump(tokenizer), (unknown, beginning, end)


def _merges(pieces: list[tuple[str, float, int]], vocabulary: dict[str, int]) -> list[list[str]]:
    """Every pair of tokens that makes a token, best first: SentencePiece merges what makes the token of highest score.

    Ties (one token from several pairs) in the order of transformers' ``generate_merges``.
    """
    pairs = []
    for text, score, _ in pieces:
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        known = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        pairs += [(-score, -len(left), -len(right), left, right) for left, right in known]
    return [[left, right] for *_, left, right in sorted(pairs, key=lambda pair: pair[:3])]
