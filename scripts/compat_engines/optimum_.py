"""optimum's ``ORTModelForCausalLM`` on the CPU, one prompt at a time."""

NOTE = (
    "one prompt at a time, or prompts of one length: its generate pads a batch on the left, and such rows give token 0 "
    "only (docs/guide/onnx.md)"
)
LIMITS = {
    "grouped": (
        "Please fix either the inputs",
        "makes its cache with one key/value head a query head, but for the types that it lists",
    ),
}


def run(request):
    import json
    from importlib.metadata import version
    from pathlib import Path

    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    options = {"file_name": "model.onnx", "trust_remote_code": True}
    if json.loads(Path(request["directory"], "genai_config.json").read_text())["model"]["decoder"]["num_hidden_layers"]:
        model = ORTModelForCausalLM.from_pretrained(request["directory"], **options)
    else:  # no attention, no cache: it wants to be told
        model = ORTModelForCausalLM.from_pretrained(
            request["directory"], use_cache=False, use_io_binding=False, **options
        )
    tokenizer = AutoTokenizer.from_pretrained(request["directory"], trust_remote_code=True)
    ids, tokens = [], []
    for text in request["texts"]:
        inputs = tokenizer(text, return_tensors="pt")
        new = request["new_tokens"]
        made = model.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        ids.append(inputs.input_ids[0].tolist())
        tokens.append(made[0, len(ids[-1]) :].tolist())
    versions = f"{version('optimum-onnx')}, transformers {version('transformers')}"
    return {"version": f"{versions}, torch {torch.__version__}", "ids": ids, "tokens": tokens}
