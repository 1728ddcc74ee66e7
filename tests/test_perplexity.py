"""Perplexity against transformers' documented recipe, and the windows themselves."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

from export.convert import convert
from export.onnx.session import OnnxSession
from prune_attn import Layers, WriteOptions
from pruner.errors import PruneAttnError
from pruner.evaluate.perplexity import score, sliding_windows
from pruner.model import TorchLanguageModel


@torch.no_grad()
def recipe(model, input_ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, list[float]]:
    """huggingface.co/docs/transformers/perplexity, as it stands there: (perplexity, each window's mean)."""
    seq_len, nll_sum, n_tokens, prev_end_loc, means = input_ids.size(1), 0.0, 0, 0, []
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        window = input_ids[:, begin_loc:end_loc]
        target_ids = window.clone()
        target_ids[:, :-trg_len] = -100
        neg_log_likelihood = model(window, labels=target_ids).loss
        num_loss_tokens = (target_ids != -100).sum().item() - 1
        nll_sum += neg_log_likelihood.item() * num_loss_tokens
        n_tokens += num_loss_tokens
        means.append(neg_log_likelihood.item())
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return math.exp(nll_sum / n_tokens), means


@pytest.mark.parametrize("stride", [64, 24])
def test_the_recipe(shipped, text_ids, stride):
    ids = text_ids(500)
    windows = sliding_windows(ids, length=64, stride=stride, bos_id=1)
    scores = score(TorchLanguageModel(shipped, dtype="float32"), windows, batch=3)
    truth, means = recipe(oracle.original(shipped), torch.tensor([[1, *ids]]), 64, stride)
    ends = np.flatnonzero(np.diff(scores.position) < 0) + 1
    ours = [
        nll[scored].mean()
        for nll, scored in zip(np.split(scores.nll, ends), np.split(scores.scored, ends), strict=True)
    ]
    assert ours == pytest.approx(means, rel=1e-5)
    # without overlap the recipe's weights are ours; with it, they are one too few for each window but the first
    counts = np.array([int(scored.sum()) for scored in np.split(scores.scored, ends)])
    weights = counts - (np.arange(len(counts)) > 0) * (stride < 64)
    assert math.exp(np.average(ours, weights=weights)) == pytest.approx(truth, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(np.average(ours, weights=counts)), rel=1e-5)
    assert scores.tokens == (500 if stride == 24 else 500 - 7)


def test_onnx_scores_the_same(shipped, tmp_path, text_ids):
    convert(shipped, tmp_path / "pruned", Layers("4,5"), options=WriteOptions(dtype="float32"))
    windows = sliding_windows(text_ids(300), length=128, stride=64, bos_id=1)
    a = score(TorchLanguageModel(tmp_path / "pruned"), windows)
    b = score(OnnxSession(tmp_path / "pruned", device="cpu"), windows)
    np.testing.assert_allclose(a.nll, b.nll, atol=2e-4)


@pytest.mark.parametrize("bos", ["once", "every", "none"])
@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(10, 4, 4), (10, 4, 1), (9, 4, 3), (2, 4, 2), (4, 4, 2), (17, 8, 5)]
)
def test_every_token_counts_once(bos, tokens, length, stride):
    ids = np.arange(100, 100 + tokens)
    if bos == "every" and stride == length:
        with pytest.raises(PruneAttnError, match="stride"):
            sliding_windows(ids, length=length, stride=stride, bos_id=7, bos=bos)
        stride -= 1
    windows = sliding_windows(ids, length=length, stride=stride, bos_id=7, bos=bos)
    counted = [token for w in windows for token in w.ids[len(w.ids) - w.scored :]]
    assert len(counted) == len(set(counted))
    missed = sorted(set(ids) - set(counted))
    if bos == "every":
        assert all(w.ids[0] == 7 for w in windows)
        assert missed == []
    elif stride < length:
        assert missed == ([100] if bos == "none" else [])
    else:  # the first of each window
        assert missed == [w.ids[0] for w in windows if w.ids[0] != 7]
    assert all(2 <= len(w.ids) <= length for w in windows)
    assert 7 not in counted


def test_too_short():
    with pytest.raises(PruneAttnError, match="longer"):
        sliding_windows(np.array([5]), length=8)


def test_bits_a_byte(shipped, text_ids):
    scores = score(TorchLanguageModel(shipped), sliding_windows(text_ids(65), length=64, stride=32, bos_id=1))
    assert scores.bits_per_byte(200) == pytest.approx(math.log2(scores.perplexity) * scores.tokens / 200)
