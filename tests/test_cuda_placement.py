"""The CUDA session without a GPU: ONNX Runtime's own CUDA provider over stand-ins for CUDA's libraries.

What it decides before anything runs is its own: which operators it has kernels for, which go to the CPU, and whether it
would capture a CUDA graph. Kernels do nothing here, so logits are checked for their shape alone.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import fake_cuda
import onnx
import onnxruntime
import pytest
from conftest import run_program
from programs import sessions_on_cuda

from prune_attn import Layers, convert, export
from pruner.names import GRAPH

PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
SHAPES = {"mask.width", "total_sequence_length"}  # what stays on the host, where shapes lie


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


@pytest.fixture(scope="module")
def opened(libraries):
    """Open directories in a new process: of each the operators on the CPU and the logits' shapes, or what was said."""

    def opened(*directories: Path) -> dict:
        env = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
        out = json.loads(run_program(sessions_on_cuda, *directories, env=env))
        return {directory.name: out[str(directory)] for directory in directories}

    return opened


def test_a_decode_step_can_be_a_cuda_graph(opened, make_llama, tmp_path):
    """No copy between host and GPU in any graph: with one, ONNX Runtime refuses to open it for capturing."""
    models = {
        "plain": {"dtype": "float16"},
        "bf16": {"dtype": "bfloat16", "num_key_value_heads": 1, "tie_word_embeddings": True, "intermediate_size": 256},
        "wide": {"dtype": "float16", "head_dim": 128, "attention_bias": True, "mlp_bias": True},
    }
    made = {}
    for name, fields in models.items():
        source = make_llama(name, vocab_size=64, **fields)
        for layers in ("0,3", "0,1,2,3"):
            for last in (False, True):
                directory = tmp_path / f"{name}-{layers}-{last}"
                convert(source, directory, Layers(layers, allow_all=True))
                export(directory, context=64, last_token_logits=last)
                made[directory] = (SHAPES if layers == "0,3" or last else set()) | ({"ids.end"} if last else set())
    found = opened(*made)
    for directory, allowed in made.items():
        cpu, shapes = found[directory.name]
        assert set(cpu) == allowed, directory.name
        assert shapes == [[rows, 64] for rows in (1, 2, 1) for _ in range(4)], directory.name


def test_a_copy_would_be_noticed(opened, make_llama, tmp_path):
    """That the test above can fail: Clip reads its bounds on the GPU, so one that comes from a shape is copied."""
    convert(make_llama(dtype="float16"), tmp_path / "out", Layers("1"))
    export(tmp_path / "out", last_token_logits=True)
    model = onnx.load(tmp_path / "out" / GRAPH, load_external_data=False)
    (node,) = (node for node in model.graph.node if node.name == "last_token.index")
    position = list(model.graph.node).index(node)
    model.graph.node.insert(position, onnx.helper.make_node("Squeeze", ["ids.end", "axis_0"], ["bound"]))
    node.op_type, node.input[:] = "Clip", ["last_token.position", "", "bound"]
    onnx.save(model, tmp_path / "out" / GRAPH)
    assert "cannot use the graph capture feature" in opened(tmp_path / "out")["out"]
