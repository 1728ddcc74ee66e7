"""The text that accuracy is measured on: read once for both models, checked, and cut into windows."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from export import record
from export.validate.options import Accuracy
from pruner.checkpoint import Checkpoint
from pruner.checkpoint.generation import check_ids
from pruner.errors import PruneAttnError
from pruner.evaluate import bootstrap
from pruner.evaluate.perplexity import Window, sliding_windows
from pruner.record import read_record
from pruner.text import Text, load_tokenizer, read_text

_WINDOW = 4096  # at most, by default: the whole context of a Llama-2
_LEAST_TOKENS = 4 * bootstrap.BLOCK


@dataclass(frozen=True)
class Corpus:
    """``ids`` (N,) and ``bytes`` are those of the scored part of ``text``; ``bos_id``: ``None`` for none."""

    text: Text
    ids: np.ndarray
    bytes: int
    bos: str
    bos_id: int | None
    window: int
    stride: int
    windows: list[Window]
    chosen_by: bool  # says the plan: it is the calibration text

    @property
    def notes(self) -> list[str]:
        """What a reader has to know of it."""
        notes = []
        if self.chosen_by:
            notes.append(
                "the sublayers were chosen by this very text; measure on another, since unseen text suffers more"
            )
        if len(self.ids) != len(self.text.ids):
            notes.append(f"of the text's {len(self.text.ids):,} tokens the first {len(self.ids):,} were taken")
        return notes


def read_corpus(asked: Accuracy, original: Checkpoint, pruned: Checkpoint, context: int) -> Corpus:
    """``PruneAttnError`` where the text is too short, or the two tokenizers make different tokens of it."""
    tokenizers = [load_tokenizer(checkpoint.path) for checkpoint in (original, pruned)]
    text = read_text(asked.text, tokenizers[0], asked.text_field)
    check_ids(text.ids, original, text.path)
    sample = text.content[:20_000]
    encoded = [tokenizer(sample, verbose=False)["input_ids"] for tokenizer in tokenizers]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab() or encoded[0] != encoded[1]:
        raise PruneAttnError(
            f"{pruned.path}: its tokenizer is not the original's, so they cannot be compared; "
            f"copy the tokenizer files from {original.path}"
        )
    ids, nbytes = text.ids, text.bytes
    if asked.max_tokens is not None and asked.max_tokens < len(ids):
        ids = ids[: asked.max_tokens]
        shown = tokenizers[0].decode(ids)
        assert isinstance(shown, str)  # of one row
        nbytes = len(shown.encode())
    if len(ids) < _LEAST_TOKENS:
        raise PruneAttnError(
            f"{text.path}: {len(ids)} tokens are too few to say anything; give {_LEAST_TOKENS} at "
            "least, and better 100,000"
        )
    first = tokenizers[0]("a", verbose=False)["input_ids"][:1]
    bos_id = first[0] if first == [tokenizers[0].bos_token_id] else None
    window = asked.window or min(context, _WINDOW)
    if window > context:
        raise PruneAttnError(f"--window {window}: the model's context is {context} tokens")
    stride = asked.stride or max(1, window // 2)
    windows = sliding_windows(ids, length=window, stride=stride, bos_id=bos_id, bos=asked.bos)
    bos = asked.bos if bos_id is not None else "none"
    return Corpus(text, ids, nbytes, bos, bos_id, window, stride, windows, _chosen_by(pruned, text.sha256))


def _chosen_by(pruned: Checkpoint, sha256: str) -> bool:
    """Whether some step of the directory's record names this text."""
    facts = read_record(pruned.path)
    return any(f'"{sha256}"' in json.dumps(step.get("selection")) for step in (record.steps(facts) if facts else ()))
