"""``LanguageModel``, the small protocol that everything is measured through, and its PyTorch form."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from pruner.checkpoint import open_checkpoint
from pruner.checkpoint.generation import check_ids, check_pad
from pruner.checkpoint.load import load_tensor
from pruner.device import check_cuda
from pruner.errors import PruneAttnError
from pruner.nemotron_nas import dialect

if TYPE_CHECKING:
    import torch

Logits = np.ndarray  # float32


class LanguageModel(Protocol):
    """A decoder with a KV cache, for one text (or batch) at a time. Token ids are whole numbers, logits float32, on the
    host. All but ``reset`` raise ``PruneAttnError`` for what cannot be run."""

    vocab_size: int
    max_length: int  # tokens of context

    def logits(self, input_ids: np.ndarray) -> Logits:
        """(B, T) ids, all of full length, to (B, T, V) logits. Leaves the cache alone."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Begin anew with B prompts, of any lengths: whatever was in the cache is forgotten.

        (B, V) logits of each one's last token.
        """
        ...

    def extend(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """More tokens of the text in the cache, which has to be one row (B = 1); (1, V) logits of the last one."""
        ...

    def decode(self, tokens: Sequence[int]) -> Logits:
        """The next token of each of the B rows; (B, V) logits."""
        ...

    def reset(self) -> None:
        """Empty the cache."""
        ...


NOTHING_BEGUN = "nothing to go on from; call prefill() first"


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """``PruneAttnError`` where there is nothing to run."""
    if not len(prompts) or not min(map(len, prompts)):
        raise PruneAttnError("an empty prompt; give at least one token")


def check_extension(rows: int, prompts: Sequence[Sequence[int]]) -> None:
    """``PruneAttnError`` where these prompts cannot extend a cache of so many rows (0: nothing was begun)."""
    if not rows:
        raise PruneAttnError(NOTHING_BEGUN)
    if rows != 1 or len(prompts) != 1:
        raise PruneAttnError(
            f"only one text can be extended; the cache holds {rows} rows and {len(prompts)} were given"
        )


def check_step(rows: int, tokens: Sequence[int]) -> None:
    """``PruneAttnError`` where these are not one token for each of the rows in the cache (0: nothing was begun)."""
    if not rows:
        raise PruneAttnError(NOTHING_BEGUN)
    if len(tokens) != rows:
        raise PruneAttnError(f"{len(tokens)} tokens were given for the {rows} rows in the cache")


class Turns:
    """One thread's text at a time in a model's cache.

    Calls from several threads take turns. Whose text is in the cache is who began it: ``decode`` and ``extend`` from
    another thread are refused. ``with model:`` holds the model over a whole generation, and others wait.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: threading.Thread | None = None  # None: nothing was begun

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def _turn(self, begins: bool = False) -> Iterator[None]:
        with self._lock:
            if begins:
                self._owner = threading.current_thread()
            elif self._owner not in (None, threading.current_thread()):
                raise PruneAttnError(
                    "another thread has begun a text of its own in this model's cache; give each thread its own model, "
                    "or hold it over a whole generation (with model: prefill, decode ...)"
                )
            yield


class TorchLanguageModel(Turns):
    """A checkpoint directory, plain or pruned, run by transformers, with any sublayers switched off.

    ``dtype`` (float32, float16, bfloat16; ``None``: the checkpoint's own) is what it computes in. Raises
    ``PruneAttnError`` for what ``open_checkpoint`` refuses, and for a device that PyTorch does not have.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str | None = None,
        attention_implementation: str = "sdpa",
    ) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        from pruner.nemotron_nas.configuration_pruned_llama import PrunedLlamaConfig
        from pruner.nemotron_nas.modeling_pruned_llama import DeciLMForCausalLM

        logging.disable_progress_bar()

        checkpoint = open_checkpoint(directory)
        if device.startswith("cuda"):
            check_cuda()
        pruned = checkpoint.config["model_type"] == dialect.MODEL_TYPE
        kind, config = (DeciLMForCausalLM, PrunedLlamaConfig) if pruned else (LlamaForCausalLM, LlamaConfig)
        check_pad(checkpoint)
        self._checkpoint = checkpoint
        # from the tensors, not the directory: one way for every format, and no pickle is run
        self.model = kind.from_pretrained(
            None,
            config=config.from_dict(checkpoint.config),
            state_dict={name: load_tensor(tensor, checkpoint.seen) for name, tensor in checkpoint.tensors.items()},
            dtype=getattr(torch, dtype) if dtype else "auto",
            attn_implementation=attention_implementation,
            trust_remote_code=False,
        )
        self.model.to(device).eval()  # type: ignore[arg-type]  # its decorator hides the method's self
        self.device = device
        self.decoder = checkpoint.decoder
        self.vocab_size = checkpoint.decoder.vocab_size
        self.max_length = int(self.model.config.max_position_embeddings)
        self._whole = [(layer.self_attn, layer.mlp) for layer in self.model.model.layers]
        super().__init__()
        self.reset()

    def switch_off(self, attention: Iterable[int] = (), mlp: Iterable[int] = ()) -> None:
        """Make these sublayers (by layer number) contribute nothing; all others work again. Empties the cache.

        This is the oracle that a pruned directory is held against: nothing is removed, the residual just passes by.
        """
        off_attention, off_mlp, slot = set(attention), set(mlp), 0
        for i, (layer, (self_attn, layer_mlp)) in enumerate(zip(self.model.model.layers, self._whole, strict=True)):
            if self_attn is not None:
                layer.self_attn = _Nothing(pair=True) if i in off_attention else self_attn
                if i not in off_attention:
                    # slot 0 tells the cache's length, so it has to belong to an attention that runs
                    self_attn.layer_idx, slot = slot, slot + 1
            if layer_mlp is not None:
                layer.mlp = _Nothing(pair=False) if i in off_mlp else layer_mlp
        self.reset()

    def without(self, attention: Iterable[int] = (), mlp: Iterable[int] = ()) -> TorchLanguageModel:
        """A model that has no such sublayers at all, the class that a pruned directory loads as, over these weights.

        No weight is copied; its cache is its own. Sublayers that were switched off here work again.
        """
        import torch

        from pruner.nemotron_nas.configuration_pruned_llama import PrunedLlamaConfig
        from pruner.nemotron_nas.dialect import block_configs
        from pruner.nemotron_nas.modeling_pruned_llama import DeciLMForCausalLM

        self.switch_off()
        other = copy.copy(self)
        Turns.__init__(other)
        other.decoder = self.decoder.without(attention, mlp)
        fields = self.model.config.to_dict() | {"block_configs": block_configs(other.decoder)}
        with torch.device("meta"):
            other.model = DeciLMForCausalLM._from_config(
                PrunedLlamaConfig(**fields),
                dtype=self.model.dtype,
                attn_implementation=self.model.config._attn_implementation,
            )
        weights = self.model.state_dict()
        other.model.load_state_dict({name: weights[name] for name in other.model.state_dict()}, assign=True)
        other.model.model.rotary_emb = self.model.model.rotary_emb  # its buffers are in no state_dict
        other.model.eval()
        other._whole = [(layer.self_attn, layer.mlp) for layer in other.model.model.layers]
        other.reset()
        return other

    def logits(self, input_ids: np.ndarray) -> Logits:
        import torch

        check_ids(input_ids, self._checkpoint, "the text")
        with self._lock, inference():
            out = self.model(input_ids=torch.as_tensor(input_ids, device=self.device), use_cache=False)
        return out.logits.float().cpu().numpy()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        with self._turn(begins=True):
            self.reset()
            return self._feed(prompts)

    def extend(self, prompts: Sequence[Sequence[int]]) -> Logits:
        with self._turn():
            rows = 0 if self._mask is None else len(self._mask)
            check_extension(rows, prompts)
            return self._feed(prompts)

    def decode(self, tokens: Sequence[int]) -> Logits:
        import torch

        with self._turn():
            check_step(0 if self._mask is None else len(self._mask), tokens)
            check_ids(tokens, self._checkpoint, "the text")
            ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
            return self._forward(ids, torch.ones_like(ids))

    def reset(self) -> None:
        from transformers import DynamicCache

        with self._lock:
            self._cache = DynamicCache()
            self._mask: torch.Tensor | None = None

    def _feed(self, prompts: Sequence[Sequence[int]]) -> Logits:
        import torch

        check_prompts(prompts)
        for prompt in prompts:
            check_ids(prompt, self._checkpoint, "the prompt")
        width = max(len(prompt) for prompt in prompts)
        # left padding: the last column is each row's last token
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        return self._forward(ids, mask)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Logits:
        import torch

        mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=1)
        if mask.shape[1] > self.max_length:
            raise PruneAttnError(f"the context of {self.max_length} tokens is full; give a shorter prompt")
        self._mask = mask
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with inference():
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1].float().cpu().numpy()


@contextmanager
def inference() -> Iterator[None]:
    """No gradients, and no cuDNN attention: on Hopper it plans anew for every length, 5 ms per layer and token."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with (
        torch.inference_mode(),
        sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    ):
        yield


def _Nothing(pair: bool) -> torch.nn.Module:  # noqa: N802, a module class that needs torch to be defined
    import torch

    class Nothing(torch.nn.Module):
        def forward(
            self, hidden_states: torch.Tensor, *args: object, **kwargs: object
        ) -> torch.Tensor | tuple[torch.Tensor, None]:  # (B, T, C) -> zeros
            zeros = torch.zeros_like(hidden_states)
            return (zeros, None) if pair else zeros

    return Nothing()
