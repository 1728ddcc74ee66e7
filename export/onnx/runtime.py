"""``model.onnx`` opened by ONNX Runtime on the device that was asked for, with settings that any service can make too.

Sources: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html; what they give:
docs/notes/cuda.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pruner.errors import MachineError, PruneAttnError, one_line
from pruner.llama import Decoder
from pruner.machine import threads

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of the driver's API
_HOPPER = 9
# What must not be left to the CPU. session.disable_cpu_ep_fallback would refuse the few shape operators too, which
# ONNX Runtime places there by design.
_HEAVY = {"FusedMatMul", "GroupQueryAttention", "SkipSimplifiedLayerNormalization", "RMSNormalization"}
# Weights straight from the driver, not from the arena, which grows by powers of two: 1.8 GB less at 13B
_CUDA_ENTRIES = {"session.use_device_allocator_for_initializers": "1"}


def why_not_installed() -> str | None:
    """What is wrong with the installed ONNX Runtime, and the cure: it is not there, or there twice."""
    cure = "pip install '.[cuda]' (NVIDIA GPU) or '.[cpu]' in the clone of prune-attn"
    if _place("onnxruntime") is not None and _place("onnxruntime") == _place("onnxruntime-gpu"):
        return (
            "onnxruntime and onnxruntime-gpu are both installed, and one has overwritten the other; "
            f"pip uninstall -y onnxruntime onnxruntime-gpu, then {cure}"
        )
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:  # no origin: the folder that is left when one of two was uninstalled
        return f"ONNX Runtime is not installed; {cure}"
    return None


def _place(package: str) -> str | None:
    """The folder that a package is installed in: two overwrite each other only in one and the same."""
    try:
        return os.path.realpath(str(distribution(package).locate_file("")))
    except PackageNotFoundError:
        return None


def open_runtime(
    path: Path, decoder: Decoder, dtype: str, device: str, *, cuda_graph: bool = True
) -> tuple[Any, str, str | None]:
    """(``onnxruntime.InferenceSession``, ``cpu`` or ``cuda``, why it is not CUDA).

    ``device``: ``cpu``, ``cuda`` or ``auto``, which takes CUDA where it works. Raises ``PruneAttnError`` for a dtype
    that the device cannot run, for CUDA that was asked for and is not there, and for an ONNX
    Runtime that is not installed, or twice.
    """
    if why := why_not_installed():
        raise PruneAttnError(why)
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
            return open_on_cuda(path, decoder, check_cuda(), cuda_graph=cuda_graph), "cuda", None
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
        return _open(path, [_CPU], {}), "cpu", reason
    except Exception as error:  # ONNX Runtime's own classes
        cure = f"; see prune-attn verify {path.parent}"
        raise PruneAttnError(f"{path}: ONNX Runtime cannot open it ({one_line(error)}){cure}") from None


def open_on_cuda(
    path: Path, decoder: Decoder, capability: int, *, cuda_graph: bool = True, defaults: bool = False
) -> Any:
    """An ``InferenceSession`` on the GPU, which is of this compute ``capability`` (major).

    ``defaults``: ONNX Runtime's own settings instead of ours. Raises ``MachineError`` where the GPU's memory is too
    small, ``PruneAttnError`` for what else fails and for anything heavy that would run on the CPU.
    """
    import onnxruntime

    provider = {"device_id": 0, "enable_cuda_graph": str(int(cuda_graph))}
    onnxruntime.set_default_logger_severity(3)  # it warns of a plugin that nobody asked for
    settings, entries = ({}, {}) if defaults else (_hopper_settings(capability, decoder), _CUDA_ENTRIES)
    try:
        with _environment(settings):
            session = _open(path, [(_CUDA, provider)], entries)
    except Exception as error:
        if "llocat" in str(error):
            raise MachineError(f"{path}: the GPU's memory is too small ({one_line(error)})") from None
        raise PruneAttnError(f"{path}: CUDA was asked for and failed ({one_line(error)})") from None
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default
    if _CUDA not in session.get_providers():
        raise PruneAttnError("ONNX Runtime fell back to the CPU though CUDA was asked for; check nvidia-smi")
    strays = {op_type for _, op_type in on_cpu(session)} & _HEAVY
    if strays:
        raise PruneAttnError(
            f"{path}: ONNX Runtime would run {', '.join(sorted(strays))} on the CPU though CUDA was asked for; "
            "install another onnxruntime-gpu, or use --device cpu"
        )
    return session


def on_cpu(session: Any) -> set[tuple[str, str]]:
    """(name, operator) of nodes placed on the CPU; empty where this ONNX Runtime (before 1.24) does not tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return set()
    placed = session.get_provider_graph_assignment_info()
    return {(node.name, node.op_type) for part in placed if part.ep_name == _CPU for node in part.get_nodes()}


def check_cuda() -> int:
    """The GPU's compute capability (major). ``PruneAttnError`` that names what CUDA lacks: driver, GPU or library."""
    import onnxruntime

    if _CUDA not in onnxruntime.get_available_providers():
        raise PruneAttnError(
            "this onnxruntime was built without CUDA; pip uninstall -y onnxruntime onnxruntime-genai, then "
            "pip install '.[cuda]' in the clone of prune-attn"
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


def _open(path: Path, providers: list[Any], entries: Mapping[str, str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 4  # what fails, fails with an exception or is checked for
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(path, options, providers=providers)


def _hopper_settings(capability: int, decoder: Decoder) -> dict[str, str]:
    """Environment variables; measured on Hopper only (docs/notes/cuda.md)."""
    if capability != _HOPPER:
        return {}
    # with no workspace cuBLAS does not split a few tokens' products over two kernels: 3 to 5% of a 7B's decode
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    if decoder.num_heads == decoder.num_kv_heads:  # cuDNN's attention is 3% faster than the one that is tried first
        settings["ORT_ENABLE_XQA"] = "0"
    return settings


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
