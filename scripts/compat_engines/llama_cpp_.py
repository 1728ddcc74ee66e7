"""llama.cpp: converted to GGUF by its own converter, then run by llama-cpp-python."""

LIMITS = {}


def run(request):
    import os
    import subprocess
    import sys
    from pathlib import Path

    import llama_cpp
    from llama_cpp import Llama

    converter = next(Path(sys.prefix).glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    gguf = Path(request["scratch"]) / "model.gguf"
    subprocess.run(
        [sys.executable, converter, request["directory"], "--outfile", gguf],
        check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    llm = Llama(str(gguf), n_ctx=512, n_threads=2, verbose=False)
    ids, tokens = [], []
    for text, prompt in zip(request["texts"], request["prompts"], strict=True):
        ids.append(llm.tokenize(text.encode()))
        llm.reset()
        made = []
        for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
            made.append(token)
            if len(made) == request["new_tokens"]:
                break
        tokens.append(made)
    return {"version": f"llama-cpp-python {llama_cpp.__version__}", "ids": ids, "tokens": tokens}
