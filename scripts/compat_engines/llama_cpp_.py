"""llama.cpp, by llama-cpp-python, on the file that ``prune-attn export --gguf`` writes."""

LIMITS = {"every": ("no attention is left", "wants a KV cache")}


def run(request):
    import subprocess
    import sys

    gguf = request["scratch"] + "/model.gguf"
    command = [*request["prune_attn"], "export", request["directory"], "--gguf", gguf]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return generate(request, gguf)


def generate(request, gguf):
    import llama_cpp

    llm = llama_cpp.Llama(gguf, n_ctx=512, n_threads=2, verbose=False)
    ids, tokens = [], []
    for text, prompt in zip(request["texts"], request["prompts"], strict=True):
        ids.append(llm.tokenize(text.encode()))
        llm.reset()
        made = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
        tokens.append([token for token, _ in zip(made, range(request["new_tokens"]), strict=False)])
    return {"version": f"(llama-cpp-python {llama_cpp.__version__})", "ids": ids, "tokens": tokens}
