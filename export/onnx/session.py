"""``OnnxSession``: ``model.onnx`` as a ``LanguageModel`` in ONNX Runtime, set up as any service can set it up.

Buffers are bound once (IO binding), updated in place and run: one KV buffer for the whole context stands for past and
present at once, so nothing is copied per step. On CUDA the decode step is one captured graph, so its mask has a fixed
length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from export.onnx import GraphOptions
from export.onnx.runtime import open_runtime
from export.onnx.staleness import check_fresh, graph_options, read_graph
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import MachineError, PruneAttnError, one_line
from pruner.llama import Decoder
from pruner.model import Logits, Turns, check_extension, check_prompts, check_step
from pruner.names import GRAPH

# ONNX Runtime prefers cuDNN's attention on Hopper, which plans anew for every prompt length: 40 to 70 ms, where on an
# H200 the prefill of 600 tokens takes 17. Prompts are padded to multiples of this, so that plans are met again.
_BUCKET = 64
_MAX_LENGTH = 4096  # the KV buffer is allocated at once, so a 128k context is taken only when asked for
_ELEMENT_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": 16}  # 16: ONNX's own number, numpy has none


def context_of(checkpoint: Checkpoint, options: GraphOptions | None = None) -> int:
    """Tokens that the ``model.onnx`` beside these shards was made for; ``options``: where they were read already."""
    options = options or graph_options(read_graph(checkpoint.path / GRAPH))
    return options.context or checkpoint.decoder.context


class OnnxSession(Turns):
    """A directory that ``convert`` or ``export`` wrote, run by ONNX Runtime. A ``LanguageModel``.

    ``device``: ``cpu``, ``cuda``, or ``auto``, which takes CUDA where it works; ``.device`` says which it took and
    ``.why_not_cuda`` why not the other. ``max_length`` (tokens; default the graph's context, at most 4096) is what the
    KV buffer is allocated for, ``kv_bytes_per_token * batch * max_length`` bytes at the first prefill. Raises
    ``PruneAttnError`` for a stale graph, for a dtype that the device cannot run, and for CUDA that is asked for and not
    there (never a silent fall to the CPU).

    One cache holds one text (or batch) at a time, which ``prefill`` begins anew. Calls from several threads take turns,
    and ``decode`` or ``extend`` from another thread than the one that began the text is refused. To share a session,
    hold it over a whole generation: ``with session: session.prefill(...); session.decode(...)``.

    ``.runtime`` is the ``onnxruntime.InferenceSession``. Prompts for an empty cache are padded to multiples of
    ``.bucket`` tokens, which may be changed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        device: str = "auto",
        max_length: int | None = None,
        cuda_graph: bool = True,
    ) -> None:
        checkpoint = open_checkpoint(directory)
        options = graph_options(check_fresh(checkpoint))
        path, context = checkpoint.path / GRAPH, context_of(checkpoint, options)
        if max_length is not None and not 1 <= max_length <= context:
            raise PruneAttnError(f"max_length {max_length}: {path} was made for 1 to {context} tokens")
        dtype = WEIGHT_DTYPES[checkpoint.dtypes[0]]
        runtime, self.device, self.why_not_cuda = open_runtime(
            path, checkpoint.decoder, dtype, device, cuda_graph=cuda_graph
        )
        self._take(
            runtime, checkpoint.decoder, dtype, max_length or min(context, _MAX_LENGTH), cuda_graph,
            options.last_token_logits,
        )  # fmt: skip

    @classmethod
    def over(
        cls, runtime: Any, decoder: Decoder, dtype: str, max_length: int, *, device: str, cuda_graph: bool
    ) -> OnnxSession:
        """A session over an ``InferenceSession`` of anybody's graph with these inputs and the last token's logits.

        For tests and benchmarks: nothing is checked.
        """
        session = cls.__new__(cls)
        session.device, session.why_not_cuda = device, None
        session._take(runtime, decoder, dtype, max_length, cuda_graph, True)
        return session

    def _take(
        self, runtime: Any, decoder: Decoder, dtype: str, max_length: int, cuda_graph: bool, last_token_logits: bool
    ) -> None:
        super().__init__()
        self.runtime, self.decoder, self.dtype, self.max_length = runtime, decoder, dtype, max_length
        self.vocab_size, self.last_token_logits = decoder.vocab_size, last_token_logits
        self.cuda_graph = cuda_graph and self.device == "cuda"
        self.bucket = _BUCKET if self.device == "cuda" else 1
        self._slots = len(decoder.present("attention"))
        self._graph_id = 0
        self._batch = 0  # rows that the buffers are for
        self._lengths: np.ndarray | None = None  # tokens in the cache, a row

    # -- LanguageModel -------------------------------------------------------------------------------------------------

    def logits(self, input_ids: np.ndarray) -> Logits:
        """(B, T) token ids to (B, T, V) float32 logits; the cache is left alone.

        Raises ``PruneAttnError`` for a graph with the last token's logits only, and for more tokens than fit.
        """
        if self.last_token_logits:
            raise PruneAttnError(
                f"this {GRAPH} gives the last token's logits only, which scores no text; "
                "export it again without --last-token-logits"
            )
        ids = self._checked(input_ids)
        if ids.shape[1] > self.max_length:
            raise PruneAttnError(f"{ids.shape[1]} tokens do not fit the context of {self.max_length}")
        length = ids.shape[1]
        ids = np.pad(ids, ((0, 0), (0, self._padded(length) - length)))  # causal: what follows changes nothing
        # nobody reads this cache later, so one layer's worth serves all of them in turn
        scratch = (self._buffer(ids.shape), self._buffer(ids.shape)) if self._slots else ()
        with self._lock:
            return self._run(ids, np.ones_like(ids), [scratch] * self._slots)[:, :length]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Begin anew with B prompts, lists of token ids of any lengths: what was in the cache is forgotten.

        (B, V) float32 logits of each one's last token. Raises ``PruneAttnError`` for an empty prompt, for ids out of
        range and for more tokens than ``max_length``, ``MachineError`` where memory is too small.
        """
        with self._turn(begins=True):
            self.reset()
            return self._feed(prompts)

    def extend(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """More tokens of the text in the cache: ``[tokens]``, since it has to be one; (1, V) logits of the last one.

        Raises as ``prefill``, and where nothing was begun or there are several rows.
        """
        with self._turn():
            check_extension(0 if self._lengths is None else len(self._lengths), prompts)
            return self._feed(prompts)

    def decode(self, tokens: Sequence[int]) -> Logits:
        """One token more for each of the B rows; (B, V) float32 logits.

        Raises ``PruneAttnError`` where nothing was begun, for another number of tokens and where the context is full.
        """
        with self._turn():
            check_step(0 if self._lengths is None else len(self._lengths), tokens)
            assert self._lengths is not None
            ids = self._checked(np.asarray(tokens)[:, None])
            self._check_room(self._lengths + 1)
            self._mask[np.arange(len(tokens)), self._lengths] = 1
            self._bound["input_ids"].update_inplace(ids)
            self._bound["attention_mask"].update_inplace(self._mask)
            self.run_step()
            self._lengths = self._lengths + 1
            logits = self._bound["logits"].numpy()[:, 0]
            return logits.copy() if self.device == "cpu" else logits  # on the host it is the next step's buffer too

    def reset(self) -> None:
        """Forget the text in the cache; its memory stays."""
        with self._lock:
            self._lengths = None

    def run_step(self, wait: bool = True) -> None:
        """The decode step over what its buffers hold. ``wait=False``: queued on the GPU, for benchmarks."""
        self.runtime.run_with_iobinding(self._step, self._run_options(self._graph_id, wait))

    # -- the machinery -------------------------------------------------------------------------------------------------

    def _feed(self, prompts: Sequence[Sequence[int]]) -> Logits:
        check_prompts(prompts)
        new = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        past = np.zeros_like(new) if self._lengths is None else self._lengths
        self._check_room(past + new)
        self._allocate(len(prompts))
        # attention takes no padding where the cache holds something
        width = int(new.max()) if past.any() else self._padded(int(new.max()))
        # right padding: attention wants each row to begin at position 0
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = self._checked(np.asarray(prompt)[None])
        mask = (np.arange(int(past[0]) + width) < (past + new)[:, None]).astype(np.int64)
        out = self._run(ids, mask, self._cache)
        self._lengths = past + new
        self._mask[:] = np.arange(self.max_length) < self._lengths[:, None]
        return out[:, 0] if self.last_token_logits else out[np.arange(len(new)), new - 1]

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise PruneAttnError(f"token ids must be whole numbers, (B, T); got {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise PruneAttnError(f"token ids must be 0 to {self.vocab_size - 1}; got {ids.min()} to {ids.max()}")
        return np.ascontiguousarray(ids, dtype=np.int64)

    def _padded(self, width: int) -> int:
        return min(-(-width // self.bucket) * self.bucket, self.max_length)

    def _check_room(self, lengths: np.ndarray) -> None:
        if lengths.max() > self.max_length:
            raise PruneAttnError(
                f"the context of {self.max_length} tokens is full ({lengths.max()} wanted); give a shorter prompt"
            )

    def _value(self, shape: Sequence[int], element_type: Any) -> Any:
        import onnxruntime

        try:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), element_type, self.device, 0)
        except Exception as error:  # ONNX Runtime's own classes
            raise MachineError(
                f"no memory for {list(shape)} on {self.device} ({one_line(error)}); lower the batch or max_length"
            ) from None

    def _buffer(self, shape: Sequence[int]) -> Any:
        batch, tokens = shape
        return self._value(
            (batch, self.decoder.num_kv_heads, tokens, self.decoder.head_dim), _ELEMENT_TYPES[self.dtype]
        )

    def _allocate(self, batch: int) -> None:
        """Buffers, and the bound decode step, for this many rows; kept while the batch stays the same."""
        if self._batch == batch:
            return
        self._batch, self._step, self._cache, self._bound = 0, None, [], {}  # given back before new ones are asked for
        # the small ones first: after the cache they could make ONNX Runtime's arena grow by a gigabyte
        self._bound = {
            "input_ids": self._value((batch, 1), np.int64),
            "attention_mask": self._value((batch, self.max_length), np.int64),
            "logits": self._value((batch, 1, self.vocab_size), np.float32),
        }
        self._mask = np.zeros((batch, self.max_length), np.int64)
        self._cache = [(self._buffer(self._mask.shape), self._buffer(self._mask.shape)) for _ in range(self._slots)]
        self._step = self.runtime.io_binding()
        for name, value in self._bound.items():
            bind = self._step.bind_ortvalue_output if name == "logits" else self._step.bind_ortvalue_input
            bind(name, value)
        self._bind_cache(self._step, self._cache)
        self._graph_id += 1  # a captured graph holds addresses, so new buffers need a new one
        self._batch = batch

    def _bind_cache(self, binding: Any, cache: Sequence[tuple[Any, ...]]) -> None:
        for slot, pair in enumerate(cache):
            for name, value in zip(("key", "value"), pair, strict=True):
                binding.bind_ortvalue_input(f"past_key_values.{slot}.{name}", value)
                binding.bind_ortvalue_output(f"present.{slot}.{name}", value)

    def _run(self, ids: np.ndarray, mask: np.ndarray, cache: Sequence[tuple[Any, ...]]) -> Logits:
        """One call outside of any CUDA graph; logits on the host."""
        binding = self.runtime.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")
        self._bind_cache(binding, cache)
        try:
            self.runtime.run_with_iobinding(binding, self._run_options(-1))
        except Exception as error:
            if "llocat" in str(error):
                raise MachineError(
                    f"{self.device} has no memory for {list(ids.shape)} tokens ({one_line(error)}); "
                    "give fewer at a time, or export with --last-token-logits"
                ) from None
            raise
        return binding.get_outputs()[0].numpy()

    def _run_options(self, graph_id: int, wait: bool = True) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        if not wait:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options
