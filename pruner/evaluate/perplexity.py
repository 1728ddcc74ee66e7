"""Perplexity by sliding windows: every token's negative log-likelihood, of which everything else is made.

The windows are those of transformers' documented recipe (https://huggingface.co/docs/transformers/perplexity): each
begins ``stride`` tokens after the last and is ``length`` long; of each, only the tokens that no earlier window has
scored count. The recipe weighs each window by its tokens less one; here every token weighs the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pruner.errors import PruneAttnError
from pruner.model import LanguageModel, Logits
from pruner.progress import Progress, Step

BOS = ("once", "every", "none")
_LOGIT_BYTES = 512 << 20  # of one call of logits
_ROWS = 512  # positions whose log-probabilities are made at a time


@dataclass(frozen=True)
class Window:
    """Token ids (T,), int64, of which the last ``scored`` count: no earlier window has scored them."""

    ids: np.ndarray
    scored: int


@dataclass(frozen=True)
class TokenScores:
    """One entry for each token of each window but its first; all arrays (N,), in the order of the text.

    ``nll``: negative natural log-likelihood, float32. ``position``: tokens of context that it was predicted from, at
    least 1. ``scored``: whether it counts; overlapping windows see a token more than once, and one of them counts.
    """

    nll: np.ndarray
    position: np.ndarray
    scored: np.ndarray

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return int(self.scored.sum())

    @property
    def total(self) -> float:
        """Nats of the whole text."""
        return float(self.nll[self.scored].sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean over the tokens that count."""
        return math.exp(self.total / self.tokens)

    def bits_per_byte(self, nbytes: int) -> float:
        """``nbytes``: of the text that the tokens make, UTF-8. Does not depend on the tokenizer, unlike perplexity."""
        return self.total / math.log(2) / nbytes


def sliding_windows(
    ids: np.ndarray, *, length: int, stride: int | None = None, bos_id: int | None = None, bos: str = "once"
) -> list[Window]:
    """Cut a text, (N,) token ids without special tokens, into windows of at most ``length`` tokens.

    ``stride`` (default ``length``: no overlap, and each window's first token is not scored, as in the recipe) is how
    far each window begins after the one before. ``bos``: ``once``
    puts ``bos_id`` before the text, as the tokenizer does and the recipe has it; ``every`` before every window, as
    part of its length; ``none``, or no ``bos_id``, nowhere, and the text's first token is then not scored. Raises
    ``PruneAttnError`` for a stride that would leave tokens out, and for a text of fewer than 2 tokens.
    """
    if bos not in BOS:
        raise PruneAttnError(f"unknown BOS handling {bos!r}; choose {', '.join(BOS)}")
    prefix = np.array([bos_id] if bos_id is not None and bos != "none" else [], dtype=np.int64)
    every = bos == "every" and len(prefix) > 0
    room = length - every
    stride = room if stride is None else stride
    if length < 2 or not 1 <= stride <= room:
        raise PruneAttnError(f"window {length} and stride {stride}: give 1 <= stride <= window, and a window over 1")
    text = np.asarray(ids, dtype=np.int64) if every else np.concatenate([prefix, np.asarray(ids, dtype=np.int64)])
    if len(ids) < 2:
        raise PruneAttnError(f"the text has {len(ids)} tokens; give a longer one")
    windows, done = [], 0 if every else 1  # what comes first has nothing that it could be predicted from
    for begin in range(0, len(text), stride):
        end = min(begin + room, len(text))
        part = np.concatenate([prefix, text[begin:end]]) if every else text[begin:end]
        if len(part) > 1:
            windows.append(Window(part, min(end - done, len(part) - 1)))
        done = end
        if end == len(text):
            break
    return windows


def default_batch(model: LanguageModel, length: int) -> int:
    """How many windows to give at once: at most 8, and at most 512 MB of logits."""
    return max(1, min(8, _LOGIT_BYTES // (4 * length * model.vocab_size)))


def batches(windows: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """At most ``batch`` neighbours of one length at a time."""
    group: list[Window] = []
    for window in windows:
        if group and (len(group) == batch or len(window.ids) != len(group[0].ids)):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def score(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Every token's negative log-likelihood. ``progress`` counts windows."""
    batch = batch or default_batch(model, max(len(w.ids) for w in windows))
    parts, done = [], 0
    for group in batches(windows, batch):
        ids = np.stack([window.ids for window in group])
        parts += negative_log_likelihoods(model.logits(ids), ids)
        done += len(group)
        if progress is not None:
            progress(Step("reading the text", done, len(windows), "windows"))
    return TokenScores(np.concatenate(parts), *places(windows))


def places(windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    """``position`` and ``scored`` of ``TokenScores``."""
    position = [np.arange(1, len(w.ids), dtype=np.int32) for w in windows]
    scored = [np.arange(1, len(w.ids)) >= len(w.ids) - w.scored for w in windows]
    return np.concatenate(position), np.concatenate(scored)


def negative_log_likelihoods(logits: Logits, ids: np.ndarray) -> list[np.ndarray]:
    """(B, T, V) logits and their (B, T) ids to B arrays of T - 1 negative log-likelihoods, float32."""
    import torch

    out = []
    for row, row_ids in zip(logits, ids, strict=True):
        targets = torch.from_numpy(row_ids[1:])
        parts = []
        for start in range(0, len(targets), _ROWS):
            chunk = torch.from_numpy(row[start : min(start + _ROWS, len(targets))])
            chosen = chunk.gather(1, targets[start : start + _ROWS, None])[:, 0]
            parts.append(chunk.logsumexp(dim=1) - chosen)
        out.append(torch.cat(parts).numpy())
    return out
