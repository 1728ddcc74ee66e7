"""mlx-lm, which is for Apple machines but has a CPU build for Linux."""

LIMITS = {
    "every": ("IndexError: list index out of range", "makes its attention mask from the first KV cache"),
    "width 600": (r"Expected shape \(768", "rounds the MLP width up to a multiple of 256"),
}


def run(request):
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, tokenizer = mlx_lm.load(request["directory"], tokenizer_config={"trust_remote_code": True})
    model.set_dtype(mx.float32)
    tokens = [
        [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=request["new_tokens"])]
        for prompt in request["prompts"]
    ]
    return {
        "version": f"{mlx_lm.__version__}, mlx {mx.__version__} on the CPU",
        "ids": [tokenizer.encode(text) for text in request["texts"]],
        "tokens": tokens,
    }
