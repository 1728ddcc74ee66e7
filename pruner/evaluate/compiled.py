"""transformers as a person would tune it: a static cache and a compiled decode step (CUDA graphs on a GPU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pruner.errors import PruneAttnError
from pruner.model import NOTHING_BEGUN, Logits, TorchLanguageModel, check_extension, check_prompts

if TYPE_CHECKING:
    from transformers import StaticCache


class CompiledLanguageModel(TorchLanguageModel):
    """``TorchLanguageModel`` with ``StaticCache`` of ``context`` tokens and ``torch.compile`` of the decode step.

    Prompts of one batch must have one length. The first decode step of each batch size compiles, for a minute or so.
    Source: https://huggingface.co/docs/transformers/llm_optims
    """

    _static: StaticCache | None = None  # made by the first prompts
    _batch = 0  # rows that it is for
    _at = 0  # tokens in it

    def __init__(self, directory: Any, *, context: int, **options: Any) -> None:
        import torch

        super().__init__(directory, **options)
        self._context = context
        # each model by itself: sharing a code object, they would take turns in recompiling each other
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
        mode = "reduce-overhead" if self.device.startswith("cuda") else "default"
        self._step = torch.compile(self.model.forward, mode=mode, fullgraph=True)

    def reset(self) -> None:
        import torch

        with self._lock:
            self._at = 0
            if self._static is not None:
                with torch.no_grad():
                    self._static.reset()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        from transformers import StaticCache

        with self._turn(begins=True):
            if self._at:  # else it is empty, and emptying it would count in what is timed
                self.reset()
            check_prompts(prompts)
            if len({len(prompt) for prompt in prompts}) != 1:
                raise PruneAttnError("the static cache takes prompts of one length")
            if self._static is None or self._batch != len(prompts):
                self._static = None  # given back before the new one is asked for
                self._static = StaticCache(config=self.model.config, max_cache_len=self._context)
                self._batch = len(prompts)
            return self._run(self.model.forward, prompts)

    def extend(self, prompts: Sequence[Sequence[int]]) -> Logits:
        with self._turn():
            check_extension(self._batch if self._at else 0, prompts)
            check_prompts(prompts)
            return self._run(self.model.forward, prompts)

    def decode(self, tokens: Sequence[int]) -> Logits:
        with self._turn():
            if not self._at:
                raise PruneAttnError(NOTHING_BEGUN)
            return self._run(self._step, [[token] for token in tokens])

    def _run(self, forward: Callable[..., Any], tokens: Sequence[Sequence[int]]) -> Logits:
        import torch

        with torch.no_grad():  # not inference_mode: its tensors the cache could not write to
            ids = torch.tensor(tokens, device=self.device)
            positions = torch.arange(self._at, self._at + ids.shape[1], device=self.device)[None].expand(len(ids), -1)
            self._at += ids.shape[1]
            out = forward(
                input_ids=ids, position_ids=positions, past_key_values=self._static, use_cache=True, logits_to_keep=1
            )
            return out.logits[:, -1].float().cpu().numpy()
