"""optimum's ``ORTModelForCausalLM`` on the CPU, one prompt at a time."""

LIMITS = {}


def run(request):
    from importlib.metadata import version

    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    model = ORTModelForCausalLM.from_pretrained(request["directory"], file_name="model.onnx", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(request["directory"], trust_remote_code=True)
    ids, tokens = [], []
    for text in request["texts"]:
        inputs = tokenizer(text, return_tensors="pt")
        new = request["new_tokens"]
        made = model.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        ids.append(inputs.input_ids[0].tolist())
        tokens.append(made[0, len(ids[-1]) :].tolist())
    versions = f"optimum-onnx {version('optimum-onnx')}, transformers {version('transformers')}"
    return {"version": f"{versions}, torch {torch.__version__}", "ids": ids, "tokens": tokens}
