"""Calibration losses of many pruned models at once: those that begin alike are run once, up to where they part.

A model is a set of layers whose sublayer is dropped. The walk goes through the layers with the hidden states of every
distinct beginning; what it holds is one state for each beginning not yet finished, in the dtype it computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pruner.checkpoint import Checkpoint
from pruner.checkpoint.load import load_tensor
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import MachineError
from pruner.select.memory import Room, room
from pruner.select.request import check_objective
from pruner.select.search import Dropped

if TYPE_CHECKING:
    import torch

    from pruner.checkpoint.tensor import Tensor
    from pruner.nemotron_nas.modeling_pruned_llama import PrunedLlamaDecoderLayer

Known = list[list[float]]  # [ce, kl] of each sample of a batch


class Evaluator:
    """Runs ``checkpoint`` on calibration windows ``ids`` (S, T), its ``sublayer`` dropped at any sets of layers.

    ``objective`` "ce" is the next-token cross-entropy, "kl" the divergence from the original's next-token
    distribution KL(original || pruned), both in nats a token. ``breaks`` are sample counts at which losses will be
    asked for. CPU computes in float32, a GPU in the checkpoint's dtype. Weights that do not fit the device are read
    layer by layer (``resident``: ``None`` decides by what is free). Cost: see ``table``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: np.ndarray,
        *,
        sublayer: str,
        objective: str = "kl",
        device: str = "cpu",
        breaks: Iterable[int] = (),
        batch: int | None = None,
        resident: bool | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        import torch

        check_objective(objective)
        self.checkpoint, self.sublayer, self.objective, self.device = checkpoint, sublayer, objective, device
        self.decoder = checkpoint.decoder
        self.samples, self.length = ids.shape
        stored = WEIGHT_DTYPES[checkpoint.dtypes[0]]
        self.dtype = "float32" if device == "cpu" or stored == "float64" else stored
        self._dtype = getattr(torch, self.dtype)
        self.room: Room = room(self.decoder, self.samples, self.length, self._dtype.itemsize, device, batch, resident)
        self.batches = _batches(self.samples, self.room.batch, breaks)
        self.known: dict[Dropped, list[Known | None]] = {}  # for each batch
        self.layer_samples = 0  # layers run, whole or in part, times the samples they were run on
        self.similarity: dict[int, float] = {}
        self._advance = advance or (lambda _: None)
        self._ids = torch.from_numpy(np.ascontiguousarray(ids))
        self._layers = _Layers(checkpoint, self._dtype, device, self.room.resident)
        self._embedding = load_tensor(checkpoint.tensors["model.embed_tokens.weight"], checkpoint.seen)  # stays mapped
        self._head = self._load(checkpoint.head)
        self._norm = self._layers.norm(self._load("model.norm.weight"))
        self._rotary = self._layers.rotary(self._embedding.new_zeros(1, dtype=self._dtype, device=device), self.length)
        self._teacher: dict[int, torch.Tensor] = {}  # batch to the original's last states, (B, T, C)
        self._teacher_batch: tuple[int, list[tuple[torch.Tensor, torch.Tensor]]] | None = None

    def losses(self, sets: Sequence[Dropped], samples: int | None = None) -> np.ndarray:
        """Mean loss of each set, float64 (len(sets),); see ``table``."""
        return self.table(sets, samples).mean(1)

    def table(
        self, sets: Sequence[Dropped], samples: int | None = None, done: Callable[[], None] | None = None
    ) -> np.ndarray:
        """Loss of each set on each of the first ``samples`` windows (default: all), float64 (len(sets), samples).

        What is no number is inf. What is known already is not run again. Cost: one layer for each distinct beginning
        of the sets, and the head for each set. ``done`` is called whenever something more is known.
        """
        wanted = [b for b, (_, stop) in enumerate(self.batches) if stop <= (samples or self.samples)]
        self._prepare(wanted, done)
        missing: dict[tuple[Dropped, ...], list[int]] = {}
        for b in wanted:
            new = tuple(dict.fromkeys(s for s in sets if self._row(s)[b] is None))
            if new:
                missing.setdefault(new, []).append(b)
        for new, batches in missing.items():
            step = self.room.chunk(len(new))
            for i in range(0, len(batches), step):
                self._walk(batches[i : i + step], new)
                if done:
                    done()
        column = 0 if self.objective == "ce" else 1
        rows = map(self._row, sets)
        table = np.array([[x for b in wanted if (known := row[b]) for x in known[column]] for row in rows])
        return np.where(np.isfinite(table), table, np.inf)  # values overflowed: worse than any number

    def perplexity(self, dropped: Dropped) -> float:
        """exp of the mean cross-entropy over the windows on which this set has been run; inf where it is no number."""
        values = [x for row in self._row(dropped) if row is not None for x in row[0]]
        mean = sum(values) / len(values)
        return math.exp(mean) if mean < 700 else math.inf

    # -- the walk --------------------------------------------------------------------------------------------------

    def _row(self, dropped: Dropped) -> list[Known | None]:
        return self.known.setdefault(dropped, [None] * len(self.batches))

    def _prepare(self, wanted: list[int], done: Callable[[], None] | None) -> None:
        """Run the original: its last states, which KL is measured from, and each sublayer's similarity."""
        todo = [b for b in wanted if b not in self._teacher]
        step = self.room.chunk(1)
        for i in range(0, len(todo), step):
            self._walk(todo[i : i + step], (frozenset(),), original=True)
            if done:
                done()

    def _walk(self, batches: list[int], sets: tuple[Dropped, ...], original: bool = False) -> None:
        import torch

        from pruner.model import inference

        try:
            with inference():
                start = [self._embed(b) for b in batches]
                # depth-first in groups of at most `width` states, so that a layer's weights serve a whole group
                stack = [(0, [(start, sets)])]
                while stack:
                    layer, nodes = stack.pop()
                    if layer == self.decoder.num_layers:
                        for states, (dropped,) in nodes:
                            self._score(batches, states, dropped, original)
                        continue
                    module, grown = self._layers[layer], []
                    while nodes:
                        states, here = nodes.pop()
                        grown += self._branch(module, layer, batches, states, here, original)
                    grown.reverse()
                    width = self.room.width
                    stack += [(layer + 1, grown[i : i + width]) for i in range(0, len(grown), width)]
        except torch.OutOfMemoryError:
            raise MachineError(
                f"the GPU ran out of memory at {self.room.batch} x {self.length} tokens a batch; free some of it, "
                "or give a smaller --length"
            ) from None

    def _branch(
        self,
        module: PrunedLlamaDecoderLayer,
        layer: int,
        batches: list[int],
        states: list[torch.Tensor],
        sets: tuple[Dropped, ...],
        original: bool,
    ) -> list[tuple[list[torch.Tensor], tuple[Dropped, ...]]]:
        """The states after one layer: with its sublayer, and without, as far as any set wants either."""
        kept, gone = tuple(s for s in sets if layer not in s), tuple(s for s in sets if layer in s)
        with_it, without = [], []
        for b, x in zip(batches, states, strict=True):
            x = x.to(self.device)
            whole = self._attention(module, x) if kept or self.sublayer == "mlp" else x
            if kept:
                y = self._mlp(module, whole)
                if original:
                    self._compare(layer, *{"attention": (x, whole), "mlp": (whole, y), "block": (x, y)}[self.sublayer])
                with_it.append(y.to(self.room.store))
            if gone:
                y = self._mlp(module, x) if self.sublayer == "attention" else whole if self.sublayer == "mlp" else x
                without.append(y.to(self.room.store))
            n = (self.batches[b][1] - self.batches[b][0]) * (bool(kept) + (bool(gone) and self.sublayer != "block"))
            self.layer_samples += n
            self._advance(n)
        return [(after, part) for after, part in ((with_it, kept), (without, gone)) if part]

    def _attention(self, module: PrunedLlamaDecoderLayer, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) and what the attention adds to it, if the layer has one."""
        if module.self_attn is None:
            return x
        h = module.input_layernorm(x)
        return x + module.self_attn(hidden_states=h, position_embeddings=self._rotary, attention_mask=None)[0]

    def _mlp(self, module: PrunedLlamaDecoderLayer, x: torch.Tensor) -> torch.Tensor:
        return x if module.mlp is None else x + module.mlp(module.post_attention_layernorm(x))

    def _compare(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """LLM-Drop's similarity (arXiv 2406.15786, section 3.1): 1 - cos a token in float32, averaged over tokens."""
        import torch.nn.functional as F  # noqa: N812

        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
        self.similarity[layer] = self.similarity.get(layer, 0.0) + float((1 - cosine.double()).mean(1).sum())

    def _embed(self, b: int) -> torch.Tensor:
        start, stop = self.batches[b]
        return self._embedding[self._ids[start:stop]].to(self._dtype).to(self.room.store)

    # -- the head --------------------------------------------------------------------------------------------------

    def _score(self, batches: list[int], states: list[torch.Tensor], dropped: Dropped, original: bool) -> None:
        for b, x in zip(batches, states, strict=True):
            x = self._norm(x.to(self.device))
            if original:
                self._teacher[b] = x.to(self.room.teacher) if self.objective == "kl" else x[:0]
            values = self._loss(b, x, original)
            self._row(dropped)[b] = values

    def _loss(self, b: int, x: torch.Tensor, original: bool) -> Known:
        """[ce of each sample, kl of each sample] of the last states (B, T, C), the head run over a part at a time."""
        import torch

        start, stop = self.batches[b]
        targets = self._ids[start:stop, 1:].reshape(-1).to(self.device)
        rows = x[:, :-1].reshape(-1, x.shape[-1])
        parts = [slice(i, i + self.room.rows) for i in range(0, len(rows), self.room.rows)]
        ce, kl = [], []
        for i, part in enumerate(parts):
            logits = (rows[part] @ self._head.T).float()
            total = logits.logsumexp(-1)
            ce.append(total - logits.gather(1, targets[part, None])[:, 0])
            if self.objective == "kl" and not original:
                p, p_log_p = self._original(b, parts)[i]
                kl.append(p_log_p + total - torch.einsum("nv,nv->n", p, logits))
        out = [torch.cat(ce).view(stop - start, -1).double().mean(1).tolist()]
        out.append(torch.cat(kl).view(stop - start, -1).double().mean(1).tolist() if kl else [0.0] * (stop - start))
        return out

    def _original(self, b: int, parts: list[slice]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The original's next-token probabilities p (N, V) and sum of p log p (N,), by part, of one batch."""
        if self._teacher_batch is None or self._teacher_batch[0] != b:
            self._teacher_batch = None  # freed before the next is made
            x = self._teacher[b][:, :-1].to(self.device)
            rows, made = x.reshape(-1, x.shape[-1]), []
            for part in parts:
                log_p = (rows[part] @ self._head.T).float().log_softmax(-1)
                p = log_p.exp()
                made.append((p, (p * log_p).sum(-1)))
            self._teacher_batch = (b, made)
        return self._teacher_batch[1]

    def _load(self, name: str) -> torch.Tensor:
        return load_tensor(self.checkpoint.tensors[name], self.checkpoint.seen).to(self.device, self._dtype)


class _Layers:
    """The decoder's layers as transformers' modules: all on the device, or one at a time from the mapped files."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str, resident: bool) -> None:
        from pruner.nemotron_nas.configuration_pruned_llama import PrunedLlamaConfig

        keep_out = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "quantization_config")
        self.config = PrunedLlamaConfig(**{k: v for k, v in checkpoint.config.items() if k not in keep_out})
        self.config._attn_implementation = "sdpa"
        self._dtype, self._device, self._seen = dtype, device, checkpoint.seen
        self._tensors: dict[int, dict[str, Tensor]] = {i: {} for i in range(checkpoint.decoder.num_layers)}
        for name, tensor in checkpoint.tensors.items():
            if name.startswith("model.layers."):
                layer, field = name.removeprefix("model.layers.").split(".", 1)
                self._tensors[int(layer)][field] = tensor
        self._held: dict[int, PrunedLlamaDecoderLayer] = {}
        self._resident = resident
        if resident:
            self._held = {i: self._load(i) for i in self._tensors}

    def __getitem__(self, i: int) -> PrunedLlamaDecoderLayer:
        if i not in self._held:
            self._held.clear()  # before the next is read: two may not fit
            self._held[i] = self._load(i)
        return self._held[i]

    def _load(self, i: int) -> PrunedLlamaDecoderLayer:
        import torch

        from pruner.nemotron_nas.modeling_pruned_llama import PrunedLlamaDecoderLayer

        with torch.device("meta"):
            module = PrunedLlamaDecoderLayer(self.config, i, 0)
        state = {name: load_tensor(t, self._seen).to(self._device, self._dtype) for name, t in self._tensors[i].items()}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).eval()

    def norm(self, weight: torch.Tensor) -> torch.nn.Module:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        norm = LlamaRMSNorm(len(weight), self.config.rms_norm_eps)
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.requires_grad_(False)

    def rotary(self, like: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rotary = LlamaRotaryEmbedding(config=self.config).to(like.device)
        return rotary(like, torch.arange(length, device=like.device)[None])


def _batches(samples: int, size: int, breaks: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive (start, stop) of at most ``size`` samples, none across one of ``breaks``."""
    ends = sorted({b for b in breaks if 0 < b < samples} | {samples})
    out, start = [], 0
    for end in ends:
        while start < end:
            out.append((start, min(start + size, end)))
            start = out[-1][1]
    return out
