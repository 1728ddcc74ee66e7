"""llama.cpp's own converter, and then llama-cpp-python."""

from compat_engines import llama_cpp_

LIMITS = {
    **dict.fromkeys(
        ("end", "middle", "mixed", "grouped"),
        ("other tokens for the prompt itself", "writes no token scores for these models, so text is cut otherwise"),
    ),
    "layer 0": ("Failed to load model", "its runtime takes the head size from layer 0's attention"),
    "every": ("Failed to load|Failed to create", "wants a KV cache"),
    "MLP": (
        "GGML_ASSERT|other tokens",
        "its runtime forgets the attention of a layer without MLP, and the last layer's output",
    ),
    "width 600": ("Failed to load model", "rounds the MLP width up to a multiple of 256"),
}


def run(request):
    import subprocess
    import sys
    from pathlib import Path

    converter = next(Path(sys.prefix).glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    gguf = request["scratch"] + "/model.gguf"
    subprocess.run([sys.executable, converter, request["directory"], "--outfile", gguf], check=True)
    return llama_cpp_.generate(request, gguf)
