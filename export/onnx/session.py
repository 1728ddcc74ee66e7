"""``OnnxSession``: ``model.onnx`` as a ``LanguageModel`` in ONNX Runtime, honest about the device it runs on.

Everything is bound (IO binding): one KV buffer for the whole context stands for past and present at once, so that
nothing is copied a step, and on CUDA the decode step is one captured graph: for one row of decode.py, where this ONNX
Runtime can share weights with it, else of ``model.onnx`` with a mask of fixed length. Source:
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from onnx import ModelProto

from export.onnx import GRAPH, GraphOptions
from export.onnx.block_placement import BlockPlacement
from export.onnx.cuda_driver import GpuMemory, borrow_stream, launch_empty, pinned
from export.onnx.decode import GATE, GATE_UP, PAST_LENGTHS, UP, decode_step
from export.onnx.gpu_weights import GpuWeights
from export.onnx.staleness import check_fresh, graph_options, is_as_written, read_graph
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.errors import MachineError, PruneAttnError, one_line
from pruner.llama import WEIGHT_DTYPES, Decoder, itemsize, safetensors_dtype
from pruner.model import Logits

_CUDA = "CUDAExecutionProvider"
_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of the driver's API
_HOPPER = 9
# What must not be left to the CPU. session.disable_cpu_ep_fallback would refuse the few shape operators too, which
# ONNX Runtime places there by design.
_HEAVY = {"FusedMatMul", "GroupQueryAttention", "SkipSimplifiedLayerNormalization", "RMSNormalization", "GatedRMSNorm"}
# ONNX Runtime prefers cuDNN's attention on Hopper, which plans anew for every prompt length: 40 to 70 ms, where on an
# H200 the prefill of 600 tokens takes 17. Prompts are padded to multiples of this, so that plans are met again.
_BUCKET = 64
# Weights straight from the driver, not from the arena, which grows by powers of two: 1.8 GB less at 13B (docs/cuda.md)
_CUDA_ENTRIES = {"session.use_device_allocator_for_initializers": "1"}
_MAX_LENGTH = 4096  # the KV buffer is allocated at once, so a 128k context is taken only when asked for
_SHARING = (1, 31)  # the ONNX Runtime that has all that decode.py and gpu_weights.py ask for
_AGREE = 0.1  # relative difference of logits: rounding makes 0.01 in bfloat16, one operator gone wrong makes 1
_ELEMENT_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": 16}  # 16: ONNX's own number, numpy has none

# of model.onnx, of decode.py, and the stream of both where block_placement.py has a say
_Sessions: TypeAlias = "tuple[Any, Any | None, int | None]"


def context_of(checkpoint: Checkpoint, options: GraphOptions | None = None) -> int:
    """Tokens that the ``model.onnx`` beside these shards was made for; ``options``: where they were read already."""
    options = options or graph_options(read_graph(checkpoint.path / GRAPH))
    return options.context or checkpoint.config["max_position_embeddings"]


class OnnxSession:
    """A directory that ``convert`` or ``export`` wrote, run by ONNX Runtime. A ``LanguageModel``.

    ``device``: ``cpu``, ``cuda``, or ``auto``, which takes CUDA where it works; ``.device`` says which it took and
    ``.why_not_cuda`` why not the other. ``max_length`` (tokens; default the graph's context, at most 4096) is what the
    KV buffer is allocated for, ``kv_bytes_per_token * batch * max_length`` bytes at the first prefill. Raises
    ``PruneAttnError`` for a stale graph, for a dtype that the device cannot run, and for CUDA that is asked for and not
    there (never a silent fall to the CPU).
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
        graph = check_fresh(checkpoint)
        options = graph_options(graph)
        context = context_of(checkpoint, options)
        if max_length is not None and not 1 <= max_length <= context:
            raise PruneAttnError(
                f"max_length {max_length}: {checkpoint.path / GRAPH} was made for 1 to {context} tokens"
            )
        self.decoder = checkpoint.decoder
        self.vocab_size = checkpoint.decoder.vocab_size
        self.max_length = max_length or min(context, _MAX_LENGTH)
        self.last_token_logits = options.last_token_logits
        self.dtype = WEIGHT_DTYPES[checkpoint.dtypes[0]]
        self.device, (self._session, self._stepper, self._stream), self.why_not_cuda = _open(
            checkpoint, self.dtype, device,
            lambda: _cuda_sessions(checkpoint, graph, self.max_length, cuda_graph, self),
        )  # fmt: skip
        self._cuda_graph = cuda_graph and self.device == "cuda"
        self._slots = len(checkpoint.decoder.present("attention"))
        self._graph_id = 0
        self._batch = 0  # rows that the buffers are for
        self._placements: dict[int, BlockPlacement] = {}  # by batch
        self._unproven = True  # until the decode step's own graph has been seen to agree with model.onnx
        self.reset()

    # -- LanguageModel -------------------------------------------------------------------------------------------------

    def logits(self, input_ids: np.ndarray) -> Logits:
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
        return self._run(ids, np.ones_like(ids), [scratch] * self._slots)[:, :length]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        if self._lengths is not None and len(prompts) != 1:
            raise PruneAttnError("only a batch of 1 can be prefilled in parts; call reset() first")
        if self._lengths is not None and len(self._lengths) != 1:
            raise PruneAttnError(f"the cache holds {len(self._lengths)} rows and 1 was given; call reset() first")
        new = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        if not len(new) or not new.min():
            raise PruneAttnError("an empty prompt; give at least one token")
        past = np.zeros_like(new) if self._lengths is None else self._lengths
        self._check_room(past + new)
        self._allocate(len(prompts))
        width = int(new.max()) if past.any() else self._padded(int(new.max()))
        # right padding: attention wants each row to begin at position 0
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        mask = (np.arange(int(past[0]) + width) < (past + new)[:, None]).astype(np.int64)
        out = self._run(self._checked(ids), mask, self._cache)
        self._lengths = past + new
        self._fill_mask(self._lengths)
        return out[:, 0] if self.last_token_logits else out[np.arange(len(new)), new - 1]

    def decode(self, tokens: Sequence[int]) -> Logits:
        if self._lengths is None:
            raise PruneAttnError("nothing to go on from; call prefill() first")
        if len(tokens) != len(self._lengths):
            raise PruneAttnError(f"{len(tokens)} tokens were given for the {len(self._lengths)} rows in the cache")
        ids = self._checked(np.asarray(tokens)[:, None])
        self._check_room(self._lengths + 1)
        if self._mask is not None:
            self._mask[np.arange(len(tokens)), self._lengths] = 1
        self._past[:], self._ids[:] = self._lengths, ids
        placement = self._placements.get(self._batch)
        with placement.step(self._fresh) if placement else contextlib.nullcontext():
            self._runner.run_with_iobinding(self._step, self._run_options(self._graph_id))
        self._fresh = False
        logits = self._logits[:, 0].copy()  # it is the buffer of the next step too
        if self._runner is self._stepper and self._unproven:
            logits = self._proven(logits, ids)
        self._lengths = self._lengths + 1
        return logits

    def reset(self) -> None:
        self._lengths: np.ndarray | None = None  # tokens in the cache, a row

    # -- the machinery -------------------------------------------------------------------------------------------------

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise PruneAttnError(f"token ids must be whole numbers, (B, T); got {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise PruneAttnError(f"token ids must be 0 to {self.vocab_size - 1}; got {ids.min()} to {ids.max()}")
        return np.ascontiguousarray(ids, dtype=np.int64)

    def _padded(self, width: int) -> int:
        """The width that a prompt is run with, for an empty cache: attention takes no padding after one that is not."""
        return min(-(-width // _BUCKET) * _BUCKET, self.max_length) if self.device == "cuda" else width

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
        self._batch, self._step, self._cache = 0, None, []  # given back before new ones are asked for
        shape = (batch, self.max_length)
        self._cache = [(self._buffer(shape), self._buffer(shape)) for _ in range(self._slots)]
        self._bind_step(batch)
        self._batch = batch

    def _bind_step(self, batch: int) -> None:
        shape, array = (batch, self.max_length), pinned if self.device == "cuda" else np.zeros
        self._runner = self._stepper if self._stepper and batch == 1 else self._session
        try:
            self._ids, self._past = array((batch, 1), np.int64), array((batch,), np.int64)
            self._logits = array((batch, 1, self.vocab_size), np.float32)
            self._mask = array(shape, np.int64) if self._runner is self._session else None
        except MachineError as error:
            raise MachineError(f"{error}; lower the batch") from None
        self._step = self._runner.io_binding()
        lengths = (PAST_LENGTHS, self._past) if self._mask is None else ("attention_mask", self._mask)
        for bind, name, value in (
            (self._step.bind_input, "input_ids", self._ids),
            (self._step.bind_input, *lengths),
            (self._step.bind_output, "logits", self._logits),
        ):
            bind(name, self.device, 0, value.dtype, value.shape, value.ctypes.data)
        self._bind_cache(self._step, self._cache)
        self._bind_products()
        self._graph_id += 1  # a captured graph holds addresses, so new buffers need a new one
        self._fresh = True
        if self._stream is not None:
            launch = functools.partial(launch_empty, self._stream)
            self._placements.setdefault(batch, BlockPlacement(launch))

    def _fill_mask(self, lengths: np.ndarray) -> None:
        if self._mask is not None:
            self._mask[:] = np.arange(self.max_length) < lengths[:, None]

    def _bind_cache(self, binding: Any, cache: Sequence[tuple[Any, ...]]) -> None:
        for slot, pair in enumerate(cache):
            for name, value in zip(("key", "value"), pair, strict=True):
                binding.bind_ortvalue_input(f"past_key_values.{slot}.{name}", value)
                binding.bind_ortvalue_output(f"present.{slot}.{name}", value)

    def _bind_products(self) -> None:
        """One buffer for every layer's gate and up, which decode.py gives out as one value and takes in as two."""
        products = [value.name for value in self._runner.get_outputs() if value.name.endswith(GATE_UP)]
        if not products:
            return
        element, width = _ELEMENT_TYPES[self.dtype], self.decoder.intermediate_size
        half = width * itemsize(safetensors_dtype(self.dtype))
        self._product, start = self._memory(2 * half)
        for name in products:
            self._step.bind_output(name, self.device, 0, element, (1, 1, 2 * width), start)
        for name, address in ((GATE, start), (UP, start + half)):
            self._step.bind_input(name, self.device, 0, element, (1, 1, width), address)

    def _memory(self, size: int) -> tuple[Any, int]:
        """So many bytes, and their address. Not in the arena of the KV buffers, which may grow by 1 GiB for them."""
        if self.device == "cpu":
            value = self._value((size,), np.uint8)
            return value, value.data_ptr()
        try:
            memory = GpuMemory(size)
        except MachineError as error:
            raise MachineError(f"{error}; lower max_length") from None
        return memory, memory.address

    def _proven(self, logits: Logits, ids: np.ndarray) -> Logits:
        """The same step by ``model.onnx``, over the same place in the cache; its logits, from now on, if they differ.

        Done at the first step of a session, since no test of ours knows the user's GPU, driver and ONNX Runtime.
        """
        self._unproven = False
        proof = self._run(ids, np.ones((1, int(self._lengths[0]) + 1), np.int64), self._cache)[:, -1]
        difference = np.linalg.norm(logits - proof) / np.linalg.norm(proof)
        if difference < _AGREE:
            return logits
        warnings.warn(
            f"a decode step by its own graph has other logits than by {GRAPH} (relative difference {difference:.2g}); "
            f"decoding goes on with {GRAPH}",
            RuntimeWarning,
            stacklevel=3,
        )
        self._stepper = None
        self._bind_step(1)
        self._fill_mask(self._lengths + 1)
        return proof

    def _run(self, ids: np.ndarray, mask: np.ndarray, cache: Sequence[tuple[Any, ...]]) -> Logits:
        """One call outside of any CUDA graph; logits on the host."""
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")
        self._bind_cache(binding, cache)
        try:
            self._session.run_with_iobinding(binding, self._run_options(-1))
        except Exception as error:
            if "llocat" in str(error):
                raise MachineError(
                    f"{self.device} has no memory for {list(ids.shape)} tokens ({one_line(error)}); "
                    "give fewer at a time, or export with --last-token-logits"
                ) from None
            raise
        return binding.get_outputs()[0].numpy()

    def _run_options(self, graph_id: int) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        if self._cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options


def _open(
    checkpoint: Checkpoint, dtype: str, device: str, on_cuda: Callable[[], _Sessions]
) -> tuple[str, _Sessions, str | None]:
    """(device, sessions, why it is not CUDA)."""
    path = checkpoint.path / GRAPH
    if device not in ("auto", "cpu", "cuda"):
        raise PruneAttnError(f"unknown device {device!r}; choose auto, cpu or cuda")
    reason: str | None = None
    if device != "cpu":
        try:
            if dtype == "float32":
                raise PruneAttnError(
                    f"{path}: float32 has no CUDA attention kernel in ONNX Runtime; convert with --dtype float16, "
                    "or use --device cpu"
                )
            return "cuda", on_cuda(), None
        except PruneAttnError as error:
            if device == "cuda":
                raise
            reason = str(error)
    if dtype == "bfloat16":
        raise PruneAttnError(
            f"{path}: bfloat16 does not run on the CPU in ONNX Runtime; convert with --dtype float32"
            + (f" (CUDA was not taken: {reason})" if reason else ", or use --device cuda")
        )
    try:
        return "cpu", (_session(path, ["CPUExecutionProvider"], {}), None, None), reason
    except Exception as error:  # ONNX Runtime's own classes
        cure = f"; see prune-attn verify {checkpoint.path}"
        raise PruneAttnError(f"{path}: ONNX Runtime cannot open it ({one_line(error)}){cure}") from None


def _session(
    model: Path | bytes,
    providers: list[Any],
    entries: Mapping[str, str],
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails, fails with an exception or is checked for below
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    for name, value in values.items():
        options.add_initializer(name, value)
    return onnxruntime.InferenceSession(model, options, providers=providers)


def _cuda_sessions(
    checkpoint: Checkpoint, graph: ModelProto, max_length: int, cuda_graph: bool, owner: object
) -> _Sessions:
    """Of ``model.onnx`` and, where it can be, of the decode step: over the same weights, and on one stream.

    On two streams a decode step is 2 to 3% slower as soon as a prompt has run on the other one (docs/cuda.md).
    """
    import onnxruntime

    path, decoder, capability = checkpoint.path / GRAPH, checkpoint.decoder, _check_cuda()
    release = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    files = {shard.path.name: shard.path.resolve() for shard in checkpoint.shards}
    folders = {file.parent for file in files.values()}
    alone = release < _SHARING or len(folders) > 1 or not decoder.present("attention")
    if alone or not is_as_written(graph, checkpoint):
        return _cuda_session(path, decoder, capability, cuda_graph), None, None
    step = decode_step(checkpoint, graph_options(graph).context, max_length)
    with GpuWeights(checkpoint.path, [graph, step]) as weights:
        stream = borrow_stream(owner)
        shared: dict[str, Any] = {"values": weights.values, "stream": stream}
        whole = _cuda_session(path, decoder, capability, cuda_graph, **shared)
        # it looks where the weights of a model without a file lie, and follows no link, though it reads nothing
        for entry in (entry for tensor in step.graph.initializer for entry in tensor.external_data):
            if entry.key == "location":
                entry.value = files[entry.value].name
        folder = {"session.model_external_initializers_file_folder_path": str(folders.pop())}
        model = step.SerializeToString()
        steps = _cuda_session(path, decoder, capability, cuda_graph, model=model, entries=folder, **shared)
    return whole, steps, stream if capability == _HOPPER else None


def _cuda_session(
    path: Path,
    decoder: Decoder,
    capability: int,
    cuda_graph: bool,
    *,
    values: Mapping[str, Any] = MappingProxyType({}),
    stream: int | None = None,
    model: bytes | None = None,
    entries: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Of ``path``, or of another ``model`` of its weights; ``values``: initializers that are on the GPU already."""
    import onnxruntime

    provider = {"device_id": 0, "enable_cuda_graph": str(int(cuda_graph))}
    if stream is not None:
        provider["user_compute_stream"] = str(stream)
    onnxruntime.set_default_logger_severity(3)  # it warns of a plugin that nobody asked for
    settings = {}
    if capability == _HOPPER:  # measured there only (docs/cuda.md)
        # with no workspace cuBLAS does not split a few tokens' products over two kernels: 3 to 5% of a 7B's decode
        settings["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
        if decoder.num_heads == decoder.num_kv_heads:  # cuDNN's attention is 3% faster than the one that is tried first
            settings["ORT_ENABLE_XQA"] = "0"
    try:
        with _environment(settings):
            session = _session(model or path, [(_CUDA, provider)], _CUDA_ENTRIES | entries, values)
    except Exception as error:
        if "llocat" in str(error):
            raise MachineError(f"{path}: the GPU's memory is too small ({one_line(error)})") from None
        raise PruneAttnError(f"{path}: CUDA was asked for and failed ({one_line(error)})") from None
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default
    if _CUDA not in session.get_providers():
        raise PruneAttnError("ONNX Runtime fell back to the CPU though CUDA was asked for; check nvidia-smi")
    strays = _on_cpu(session) & _HEAVY
    if strays:
        raise PruneAttnError(
            f"{path}: ONNX Runtime would run {', '.join(sorted(strays))} on the CPU though CUDA was asked for; "
            "install another onnxruntime-gpu, or use --device cpu"
        )
    return session


def _on_cpu(session: Any) -> set[str]:
    """Operators that the session placed on the CPU; empty where this ONNX Runtime (before 1.24) does not tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return set()
    placed = session.get_provider_graph_assignment_info()
    return {node.op_type for part in placed if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()}


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """What CUDA's libraries read while a session is made, and only then; what the user has set stays."""
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _check_cuda() -> int:
    """The GPU's compute capability (major). ``PruneAttnError`` that names what CUDA lacks: driver, GPU or library."""
    import onnxruntime

    if _CUDA not in onnxruntime.get_available_providers():
        raise PruneAttnError(
            "this onnxruntime was built without CUDA; pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()  # finds CUDA and cuDNN that pip installed
    capi = Path(onnxruntime.__file__).parent / "capi"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise PruneAttnError(
            "there is no NVIDIA driver here (libcuda.so.1 is missing); install it, or use --device cpu"
        ) from None
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise PruneAttnError("the NVIDIA driver finds no GPU here; check nvidia-smi, or use --device cpu")
    try:
        ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(capi / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        library = str(error).split(":")[0]
        raise PruneAttnError(
            f"ONNX Runtime's CUDA provider cannot be loaded, {library} is missing; "
            'pip install "onnxruntime-gpu[cuda,cudnn]"'
        ) from None
    major = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, 0)
    return major.value
