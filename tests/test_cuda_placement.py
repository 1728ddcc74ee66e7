"""The CUDA session without a GPU: ONNX Runtime's own CUDA provider over stand-ins for CUDA's libraries.

What it decides before anything runs is its own: which operators it has kernels for, which go to the CPU, and whether it
would capture a CUDA graph. Kernels do nothing here, so logits are checked for their shape alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fake_cuda
import onnx
import onnxruntime
import pytest
from conftest import hub_snapshot

from export import convert, export
from export.onnx import GRAPH, block_placement
from export.onnx.block_placement import BlockPlacement

PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
SHAPES = {"mask.width", "total_sequence_length"}  # what stays on the host, where shapes lie
RUN = """
import json, sys
from pathlib import Path
import onnxruntime
from export.onnx import session as module
from pruner.errors import PruneAttnError
onnxruntime.preload_dlls = lambda: None  # it would find the real ones, where they are installed
out = {}
def run(session):
    session._unproven = False  # the stand-ins compute nothing
    placed = (session._stepper or session._session).get_provider_graph_assignment_info()
    cpu = [node.name for part in placed if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()]
    shapes = []
    for rows in ([[5, 6, 7]], [[5], [6, 7, 8]], [[9]]):
        session.reset()
        shapes.append(session.prefill(rows).shape)
        shapes += [session.decode([3] * len(rows)).shape for _ in range(3)]  # the first ones capture
    return cpu, shapes
for directory in sys.argv[1:]:
    try:
        session = module.OnnxSession(directory, device="cuda")
        ours = run(session)
        session._session = module._cuda_session(Path(directory, "model.onnx"), session.decoder, 8, True)
        session._stepper, session._batch = None, 0  # as in a service of somebody's own
        out[directory] = [ours, run(session)]
    except PruneAttnError as error:
        out[directory] = str(error)
print(json.dumps(out))
"""


def real_driver() -> bool:
    try:
        return bool(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return False


pytestmark = pytest.mark.skipif(
    not fake_cuda.available() or not PROVIDER.exists() or real_driver(),
    reason="needs a C compiler, binutils, onnxruntime-gpu, and no NVIDIA driver (with one, scripts/bench_cuda)",
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cuda")
    fake_cuda.build(PROVIDER, directory)
    return directory


def run(libraries: Path, code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def opened(libraries):
    """Open directories in a new process: of each, with our decode step and with the graph alone, the operators on the
    CPU and the logits' shapes, or what was said."""

    def opened(*directories: Path) -> dict:
        out = json.loads(run(libraries, RUN, *directories))
        return {directory.name: out[str(directory)] for directory in directories}

    return opened


def test_a_decode_step_can_be_a_cuda_graph(opened, make_llama, tmp_path):
    """No copy between host and GPU in any graph: with one, ONNX Runtime refuses to open it for capturing."""
    models = {
        "plain": {"dtype": "float16"},
        "bf16": {"dtype": "bfloat16", "num_key_value_heads": 1, "tie_word_embeddings": True, "intermediate_size": 256},
        "fused": {"dtype": "float16", "hidden_size": 128, "intermediate_size": 256},  # gate and up, in decode steps
        "wide": {"dtype": "float16", "head_dim": 128, "attention_bias": True, "mlp_bias": True},
    }
    made = {}
    for name, fields in models.items():
        source = make_llama(name, vocab_size=64, **fields)
        for layers in ("0,3", "0,1,2,3"):
            for last in (False, True):
                directory = tmp_path / f"{name}-{layers}-{last}"
                convert(source, directory, layers=layers, allow_all=True)
                export(directory, context=64, last_token_logits=last)
                made[directory] = (SHAPES if layers == "0,3" or last else set()) | ({"ids.end"} if last else set())
    found = opened(*made)
    for directory, allowed in made.items():
        (ours, shapes), (cpu, same) = found[directory.name]
        assert set(cpu) == allowed, directory.name
        assert set(ours) == (set() if "0,3" in directory.name else allowed), directory.name
        assert shapes == same == [[rows, 64] for rows in (1, 2, 1) for _ in range(4)], directory.name


def test_a_copy_would_be_noticed(opened, make_llama, tmp_path):
    """That the test above can fail: Clip reads its bounds on the GPU, so one that comes from a shape is copied."""
    convert(make_llama(dtype="float16"), tmp_path / "out", layers="1")
    export(tmp_path / "out", last_token_logits=True)
    model = onnx.load(tmp_path / "out" / GRAPH, load_external_data=False)
    (node,) = (node for node in model.graph.node if node.name == "last_token.index")
    position = list(model.graph.node).index(node)
    model.graph.node.insert(position, onnx.helper.make_node("Squeeze", ["ids.end", "axis_0"], ["bound"]))
    node.op_type, node.input[:] = "Clip", ["last_token.position", "", "bound"]
    onnx.save(model, tmp_path / "out" / GRAPH)
    assert "cannot use the graph capture feature" in opened(tmp_path / "out")["out"]


WEIGHTS = """
import ctypes, gc, json, sys
import onnxruntime
from pathlib import Path
from safetensors import safe_open
from export.onnx import cuda_driver, gpu_weights
from export.onnx.decode import decode_step
from export.onnx.session import OnnxSession
from export.onnx.staleness import read_graph
from pruner.checkpoint import open_checkpoint
onnxruntime.preload_dlls = lambda: None
directory = Path(sys.argv[1])
gpu_weights._CHUNK = 1000  # several a tensor
graphs = [read_graph(directory / "model.onnx"), decode_step(open_checkpoint(directory), None, 64)]
with gpu_weights.GpuWeights(directory, graphs) as weights:
    pass
wrong, seen = [], 0
tensors = {}
for shard in directory.glob("*.safetensors"):
    with safe_open(shard, "np") as file:
        tensors |= {name: file.get_tensor(name).tobytes() for name in file.keys()}
for name, value in weights.values.items():
    for packed, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        if packed in name:
            want = b"".join(tensors[name.replace(packed, part)] for part in parts)
            break
    else:
        want = tensors[name]
    wrong += [name] * (ctypes.string_at(value.data_ptr(), len(want)) != want or bool(value.data_ptr() % 256))
    seen += 1
live = [len(gpu_weights._live)]
del weights, value
session = OnnxSession(directory, device="cuda")
gc.collect()
live.append(len(gpu_weights._live))
del session
gc.collect()
live.append(len(gpu_weights._live))
idle = [len(cuda_driver._idle)]
sessions = [OnnxSession(directory, device="cuda") for _ in range(2)]  # the first takes up the stream
idle.append(len(cuda_driver._idle))
del sessions
gc.collect()
idle.append(len(cuda_driver._idle))
print(json.dumps([seen, wrong, live, idle]))
"""


@pytest.mark.parametrize(("shard", "linked"), [("5GB", False), ("100KB", False), ("100KB", True)])
def test_weights_are_the_bytes_of_the_shards_and_are_given_back(libraries, make_llama, tmp_path, shard, linked):
    source, out = make_llama(dtype="float16", hidden_size=128, intermediate_size=256), tmp_path / "out"
    convert(source, out, layers="1", max_shard_size=shard)
    if linked:
        out = hub_snapshot(out, tmp_path / "models--a--b")
    seen, wrong, live, idle = json.loads(run(libraries, WEIGHTS, out))
    assert not wrong
    assert live == [seen, seen, 0]  # as long as a session has them
    assert idle == [1, 0, 2]


OPEN = """
import sys
import onnxruntime
from export.onnx import cuda_driver, gpu_weights, session as module
from export.onnx.session import OnnxSession
from pruner.errors import PruneAttnError
onnxruntime.preload_dlls = lambda: None
call = cuda_driver._call
def failing(name):
    cuda_driver._call = lambda function, *arguments: 2 if function == name else call(function, *arguments)
def opened(device):
    try:
        session = OnnxSession(sys.argv[1], device=device)
        print(session.device, "own step" if session._stepper else "whole", session.why_not_cuda)
    except PruneAttnError as error:
        print(error)
"""


@pytest.fixture
def fp16(make_llama, tmp_path):
    convert(make_llama(dtype="float16"), tmp_path / "out", layers="1")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("cuMemAlloc_v2", "the GPU's memory is too small: "),
        ("cuMemHostAlloc", "no page-locked memory for 16,777,216 bytes (CUDA error 2)"),
        ("cuMemcpyHtoD_v2", "bytes could not be copied to the GPU (CUDA error 2)"),
    ],
)
def test_what_a_gpu_refuses_is_said_of_the_shard(libraries, fp16, function, said):
    code = f"{OPEN}failing({function!r})\nopened('cuda')\nopened('auto')\n"
    error, auto = run(libraries, code, fp16).splitlines()
    assert error.startswith(f"{fp16 / 'model.safetensors'}: ")
    assert said in error
    assert auto == f"cpu whole {error}"


def test_buffers_of_too_large_a_batch(libraries, fp16):
    code = f"""{OPEN}
session = OnnxSession(sys.argv[1], device="cuda")
failing("cuMemHostAlloc")
try:
    session.prefill([[5, 6, 7]])
except PruneAttnError as error:
    print(error)
"""
    assert run(libraries, code, fp16) == "no page-locked memory for 8 bytes (CUDA error 2); lower the batch\n"


def test_copying_stops_with_an_open_that_fails(libraries, fp16):
    code = f"""{OPEN}
import threading, time
gpu_weights._CHUNK, copies = 1000, []
write = gpu_weights.GpuMemory.write
def slow(*arguments):
    time.sleep(0.05)
    copies.append(write(*arguments))
gpu_weights.GpuMemory.write = slow
def fails(*arguments):
    raise RuntimeError("no session in this test")
module._session = fails
opened("cuda")
time.sleep(0.1)
print(len(copies) <= 2 * gpu_weights._THREADS, threading.active_count())
"""
    error, stopped = run(libraries, code, fp16).splitlines()
    assert "no session in this test" in error
    assert stopped == "True 1"


def test_a_session_in_a_cycle_when_python_ends(libraries, fp16):
    code = f"{OPEN}session = OnnxSession(sys.argv[1], device='cuda')\nsession.itself = session\ndel session\n"
    run(libraries, code, fp16)


def test_a_graph_that_was_edited_runs_as_it_is(libraries, fp16):
    code = f"{OPEN}opened('cuda')\n"
    assert run(libraries, code, fp16) == "cuda own step None\n"
    model = onnx.load(fp16 / GRAPH, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(a for a in node.attribute if a.name == "scale").f *= 2
    onnx.save(model, fp16 / GRAPH)
    assert run(libraries, code, fp16) == "cuda whole None\n"


def test_a_step_that_differs_gives_way_to_the_graph(libraries, fp16):
    """The stand-ins compute nothing, so that nothing agrees with anything."""
    code = f"""{OPEN}
import numpy, warnings
numpy.seterr(all="ignore")
session = OnnxSession(sys.argv[1], device="cuda")
session.prefill([[5, 6, 7]])
with warnings.catch_warnings(record=True) as caught:
    print(session.decode([3]).shape, session._stepper, [w.category.__name__ for w in caught])
print(session.decode([3]).shape, session._mask.sum())
"""
    assert run(libraries, code, fp16).splitlines() == ["(1, 128) None ['RuntimeWarning']", "(1, 128) 5"]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_on_hopper_a_decode_step_comes_after_an_empty_kernel(libraries, fp16, cuda_graph, monkeypatch):
    monkeypatch.setenv("HOPPER", "1")
    code = f"""{OPEN}
from export.onnx import block_placement
block_placement._DIFFERENCE = 99  # what the stand-ins take says nothing
launched = []
def counting(function, *arguments):
    if function == "cuLaunchKernel":
        assert arguments[8].value == session._stream
        launched.append(arguments[1].value)
    return call(function, *arguments)
cuda_driver._call = counting
session = OnnxSession(sys.argv[1], device="cuda", cuda_graph={cuda_graph})
session._unproven = False
for rows, steps in ((1, 31), (2, 51), (1, 21)):
    session.reset()
    session.prefill([[5, 6, 7]] * rows)
    for _ in range(steps):
        session.decode([3] * rows)
    print(rows, len(launched), sorted(set(launched)), session._placements[rows].clusters)
session._placements[1].clusters = 3
session.decode([3])
print(launched[100:])
failing("cuLaunchKernel")
session.decode([3])
print(session._placements[1].clusters)
cuda_driver._empty.cache_clear()
failing("cuModuleLoadData")
print(cuda_driver.launch_empty(session._stream, 1))
"""
    assert run(libraries, code, fp16).splitlines() == [
        "1 30 [4, 8, 12, 16, 32] None",  # the first step over new buffers is not counted
        "2 80 [4, 8, 12, 16, 32] 0",
        "1 100 [4, 8, 12, 16, 32] 0",  # goes on where it was
        "[12]",
        "0",
        "False",
    ]


def test_gate_and_up_are_the_halves_of_one_buffer(libraries, make_llama, tmp_path):
    convert(make_llama(dtype="float16", hidden_size=128, intermediate_size=256), tmp_path / "out", layers="1")
    code = f"""{OPEN}
class Recorder:
    def __init__(self, binding):
        self.binding, self.bound = binding, []
    def __getattr__(self, name):
        def bind(which, *arguments):
            self.bound.append((name, which, *arguments))
            return getattr(self.binding, name)(which, *arguments)
        return bind
session = OnnxSession(sys.argv[1], device="cuda")
bound = Recorder(session._stepper.io_binding())
class Stepper:
    get_outputs, io_binding = session._stepper.get_outputs, lambda self: bound
session._stepper = Stepper()
session._allocate(1)
outputs = {{row[5:] for row in bound.bound if row[1].endswith("gate_up_proj")}}
inputs = {{row[1]: row[5:] for row in bound.bound if row[1] in ("gate", "up")}}
start = session._product.address
print(outputs == {{((1, 1, 512), start)}}, inputs == {{"gate": ((1, 1, 256), start), "up": ((1, 1, 256), start + 512)}})
print(session._product.size)
failing("cuMemAlloc_v2")
try:
    session._bind_step(1)
except PruneAttnError as error:
    print(error)
"""
    assert run(libraries, code, tmp_path / "out").splitlines() == [
        "True True",
        "1024",
        "the GPU's memory is too small: 1,024 bytes were refused (CUDA error 2); lower max_length",
    ]


def test_no_empty_kernel_before_hopper(libraries, fp16):
    code = f"""{OPEN}
session = OnnxSession(sys.argv[1], device="cuda")
session.prefill([[5]])
print(session._placements.get(1))
"""
    assert run(libraries, code, fp16) == "None\n"


class Gpu:
    """A clock, and a step that is quick or slow by what the last kernel left; ``sets``: milliseconds by clusters.

    Every seventh step the host is late by 0.15 ms, and every eleventh prompt, of three steps, is a longer one.
    """

    def __init__(self, sets: dict[int, float], launches: bool = True) -> None:
        self.sets, self.launches, self.step_ms, self.now, self.launched, self.steps = sets, launches, 8.0, 0.0, [], 0

    def launch(self, clusters: int) -> bool:
        self.launched.append(clusters)
        self.step_ms = self.sets.get(clusters, self.step_ms)
        return self.launches

    def decode(self, placement: BlockPlacement, times: int) -> None:
        for _ in range(times):
            with placement.step():
                self.steps += 1
                late, longer = self.steps % 7 == 0, self.steps // 3 % 11 == 0
                self.now += (self.step_ms + 0.15 * late + 0.66 * longer) / 1000


@pytest.mark.parametrize(
    ("sets", "steps", "chosen"),
    [
        ({1: 7.8, 2: 8.0, 3: 8.0, 4: 8.0, 8: 8.0}, 20, 1),
        ({1: 8.0, 2: 8.0, 3: 8.0, 4: 8.0, 8: 7.7}, 20, 8),
        ({1: 8.0, 3: 7.7, 8: 8.0}, 30, 3),  # 2 and 4 leave it as it was
        ({1: 8.0, 2: 8.0, 4: 7.7}, 30, 4),
        ({}, 50, 0),
        ({1: 7.95, 2: 8.0, 3: 8.0, 4: 8.0, 8: 8.0}, 50, 0),  # too little to tell
    ],
)
def test_the_kernel_that_decides_is_found(monkeypatch, sets, steps, chosen):
    gpu = Gpu(sets)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.now)
    placement = BlockPlacement(gpu.launch)
    with placement.step(first=True):
        gpu.now += 1  # captures
    gpu.decode(placement, 3)
    with pytest.raises(KeyError), placement.step():
        raise KeyError("a step that fails")
    gpu.decode(placement, 1 + steps)  # that round does not count
    assert placement.clusters == chosen
    gpu.step_ms, gpu.launched = 8.0, []  # a prompt
    gpu.decode(placement, 3)
    assert gpu.launched == [chosen] * 3 * bool(chosen)
    assert gpu.step_ms == sets.get(chosen, 8.0)


def test_prompts_of_any_length_may_come_while_it_is_tried():
    rounds = [{1: 7.7 + more, 2: 8 + more, 3: 8 + more, 4: 8 + more, 8: 8 + more} for more in (0, 3, 1, 5)]
    assert block_placement._decided(rounds) == 1


def test_what_is_quick_only_after_some_others_is_not_chosen():
    rounds = [{1: 8.0, 2: 8.0 if i % 3 else 7.0, 3: 8.0 if i % 3 == 0 else 7.0, 4: 8.0, 8: 8.0} for i in range(10)]
    assert block_placement._decided(rounds) == 0


def test_a_kernel_that_cannot_be_launched(monkeypatch):
    gpu = Gpu({1: 7.0}, launches=False)
    placement = BlockPlacement(gpu.launch)
    gpu.decode(placement, 5)
    assert (placement.clusters, len(gpu.launched)) == (0, 1)
