"""onnxruntime-genai on the CPU: the directory as it is."""

LIMITS = {}
LIMITS_0_11 = {"every": ("signal 11", "crashes on a model without a KV cache")}


def run(request):
    import onnxruntime_genai as genai

    model = genai.Model(request["directory"])
    tokenizer = genai.Tokenizer(model)
    try:
        tokenizer.update_options(add_special_tokens="true")  # without it, encode leaves out BOS
        bos = []
    except AttributeError:
        bos = [1]
    ids, tokens = [], []
    for text, prompt in zip(request["texts"], request["prompts"], strict=True):
        ids.append(bos + list(map(int, tokenizer.encode(text))))
        tokens.append(greedy(model, prompt, request["new_tokens"], min_length=len(prompt) + request["new_tokens"]))
    return {"version": genai.__version__, "ids": ids, "tokens": tokens}


def greedy(model, prompt, new_tokens, **search):
    import onnxruntime_genai as genai

    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False, **search)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)[len(prompt) :]))
