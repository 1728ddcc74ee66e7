"""vLLM on the CPU."""

LIMITS = {
    "layer 0": ("too many values to unpack", "its Nemotron-NAS model takes layer 0's attention for granted"),
    "every": ("number of key-value attention heads", "refuses a model without a KV cache"),
}


def run(request):
    import os

    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        request["directory"], enforce_eager=True, dtype="float32", trust_remote_code=True, max_model_len=512,
        max_num_seqs=8,
    )  # fmt: skip
    options = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True)
    made = llm.generate(request["texts"], options)
    return {
        "version": f"{vllm.__version__} on the CPU",
        "ids": [list(output.prompt_token_ids) for output in made],
        "tokens": [list(output.outputs[0].token_ids) for output in made],
    }
