"""lm-evaluation-harness over any ``LanguageModel``. Needs the extra ``eval``; imported only once tasks are run.

``LanguageModelLM`` is the harness's own Hugging Face model with another forward pass and another decoding loop.
Tokens, BOS, truncation, batches, padding (right, for scoring) and scores are the harness's code, so that two backends
differ in their logits alone. Source: https://github.com/EleutherAI/lm-evaluation-harness, ``models/huggingface.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruner.errors import PruneAttnError
from pruner.files import read_json
from pruner.model import LanguageModel
from pruner.names import CONFIG

Report = Callable[[int, int], None]  # requests done, of how many


class QuietHFLM(HFLM):  # type: ignore[misc]  # lm_eval brings no types
    """The harness's own model over a transformers model: it reports what is done instead of drawing bars.

    Log-probabilities are made in float32, whatever the model computes in. ``truncated`` counts the requests that were
    longer than ``max_length`` and lost their beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel | SimpleNamespace,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch: int,
        max_length: int,
        report: Report | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch,
            max_length=max_length,
            softmax_dtype="float32",
        )
        self.report = report
        self.truncated = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.set_cache_hook(_Counter(self.report, len(requests)))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self.set_cache_hook(_Counter(self.report, sum(-(-length // self.max_length) for length in lengths)))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self.set_cache_hook(_Counter(self.report, len(requests)))
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.truncated += sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests)
        out = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if requests and requests[0][0] is None:  # windows of a rolling request
            self.cache_hook.add(len(requests))
        return out

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        room = kwargs.get("left_truncate_len")
        self.truncated += sum(len(self.tok_encode(s)) > room for s in strings) if room else 0
        return super().tok_batch_encode(strings, *args, **kwargs)


class LanguageModelLM(QuietHFLM):
    """A harness ``LM`` over anything that has ``LanguageModel``'s four methods. Generation is greedy.

    Raises ``PruneAttnError`` for a task that samples, and what the model raises (a graph that gives the last token's
    logits only cannot score text).
    """

    def __init__(self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        self.language_model = model
        self.ends = _ends(tokenizer)
        super().__init__(SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace()), tokenizer, **options)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        return torch.from_numpy(self.language_model.logits(inps.numpy()))  # (B, T, V)

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: torch.Tensor,
        do_sample: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """(B, T) left-padded ids and their mask to (B, T + new) ids; what is unused is filled with the pad token.

        A row is done at an end token, or as soon as its text has a stop string in it: the harness cuts there.
        """
        if do_sample:
            raise PruneAttnError("the task samples its answers, and this backend is greedy; choose another task")
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True)]
        new: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        steps = max_length - context.shape[1]
        self.language_model.reset()
        logits = self.language_model.prefill(prompts)
        for step in range(steps):
            tokens = logits.argmax(-1)
            for row in tuple(going):
                new[row].append(int(tokens[row]))
                text = self.tok_decode(new[row])
                if new[row][-1] in self.ends or any(term and term in text for term in stop):
                    going.remove(row)
            if not going or step == steps - 1:
                break
            logits = self.language_model.decode(tokens)
        self.language_model.reset()
        out = torch.full((len(new), max(map(len, new))), self.tokenizer.pad_token_id)
        for row, ids in zip(out, new, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return torch.cat([context, out], dim=1)


class _Counter:
    """The harness calls its cache hook for each finished request; this one counts them."""

    def __init__(self, report: Report | None, total: int) -> None:
        self.report, self.done, self.total = report, 0, total

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        if kind != "loglikelihood_rolling":  # these are counted by windows
            self.add(1)

    def add(self, count: int) -> None:
        self.done += count
        if self.report:
            self.report(self.done, self.total)


def _ends(tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """The tokens that ``model.generate`` would stop at: the generation config's, else the config's, else EOS."""
    for name in ("generation_config.json", CONFIG):
        path = Path(tokenizer.name_or_path) / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return [tokenizer.eos_token_id]
