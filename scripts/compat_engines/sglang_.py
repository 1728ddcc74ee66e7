"""SGLang on the CPU, without its kernels: those for CPUs are built from its repository only."""

LIMITS = {}


def run(request):
    import os

    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    import sglang

    engine = sglang.Engine(
        model_path=request["directory"], device="cpu", dtype="float32", trust_remote_code=True,
        attention_backend="torch_native", sampling_backend="pytorch", grammar_backend="none", disable_cuda_graph=True,
        disable_radix_cache=True, disable_overlap_schedule=True, max_total_tokens=4096, context_length=512,
    )  # fmt: skip
    options = {"temperature": 0, "max_new_tokens": request["new_tokens"], "ignore_eos": True}
    made = engine.generate(input_ids=request["prompts"], sampling_params=options)
    ids = engine.tokenizer_manager.tokenizer(request["texts"]).input_ids
    engine.shutdown()
    return {"version": f"{sglang.__version__} on the CPU", "ids": ids, "tokens": [m["output_ids"] for m in made]}
