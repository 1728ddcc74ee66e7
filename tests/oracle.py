"""The independent truth: the original in plain transformers, its sublayers made to contribute nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM


def original(
    directory: Path,
    attention: Iterable[int] = (),
    mlp: Iterable[int] = (),
    dtype: torch.dtype = torch.float32,
    implementation: str = "sdpa",
) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=implementation).eval()
    for i in attention:
        model.model.layers[i].self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    for i in mlp:
        model.model.layers[i].mlp.forward = lambda x: torch.zeros_like(x)
    return model


def pruned(directory: Path, dtype: torch.dtype = torch.float32, implementation: str = "sdpa"):
    """As a stranger loads it; anything missing, unexpected or mismatched fails here."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=dtype, attn_implementation=implementation, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def ids(batch: int = 2, length: int = 48, vocab: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def greedy(
    model, input_ids: torch.Tensor, new_tokens: int, mask: torch.Tensor | None = None, **options
) -> torch.Tensor:
    """Greedy tokens by ``generate``; EOS does not stop it, so that lengths are equal."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    return model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
