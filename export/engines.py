"""What is known of each engine: what it loads, on what it runs, the lines that load a model in it."""

from __future__ import annotations

from typing import Any

from pruner.checkpoint import Checkpoint
from pruner.dtypes import WEIGHT_DTYPES
from pruner.llama import Decoder
from pruner.nemotron_nas import dialect


def runs_on(checkpoint: Checkpoint, dtype: str | None) -> list[str]:
    names = {dtype} if dtype else {WEIGHT_DTYPES[d] for d in checkpoint.dtypes}
    return [RUNS_ON[name] for name in names if len(names) == 1 and name in RUNS_ON]


def notes_for(result: Decoder, config: dict[str, Any], dropped: bool) -> list[str]:
    """What to know of engines; ``dropped``: whether anything was removed, or the model only laid out anew."""
    notes = []
    if config["model_type"] != dialect.MODEL_TYPE:
        if dropped:
            notes.append(
                "whole blocks removed and the rest renumbered: the output is a plain Llama, without custom code"
            )
        return notes
    if dialect.engine_intermediate_size(result) != result.intermediate_size:
        notes.append(
            f"intermediate_size {result.intermediate_size} is no multiple of 256: mlx-lm and llama.cpp's own converter "
            "(and SGLang, by its source) will not load this; transformers, vLLM, ONNX Runtime and export --gguf will"
        )
    if not any(result.attention):
        notes.append(
            "no attention is left, hence no KV cache: vLLM, llama.cpp, mlx-lm and onnxruntime-genai 0.11 will not run "
            "this; transformers, ONNX Runtime and onnxruntime-genai 0.18 will"
        )
    elif not result.attention[0]:
        notes.append(
            "layer 0 has no attention: vLLM and llama.cpp's own converter will not run this; "
            "transformers, ONNX Runtime and export --gguf will"
        )
    if any(a and not m for a, m in zip(result.attention, result.mlp, strict=True)):
        notes.append("attention without its MLP: llama.cpp's own converter gets this wrong; export --gguf does not")
    return notes


def does_not_load(output: Checkpoint, onnx: bool) -> set[str]:
    """The engines of ``export.card.SNIPPETS`` with nothing to load, or that cannot, as ``scripts/compat`` finds."""
    engines = set() if onnx else {"onnxruntime-genai", "ONNX Runtime"}
    if not output.decoder.attention[0]:
        engines.add("vLLM")
    from export.gguf import why_no_gguf  # it brings numpy

    if why_no_gguf(output):
        engines.add("llama.cpp")
    if not (output.path / TOKENIZER_JSON).is_file():
        engines.add("onnxruntime-genai")
    return engines


TOKENIZER_JSON = "tokenizer.json"
NO_TOKENIZER = (
    "there is no tokenizer.json and none could be made of a tokenizer.model, so onnxruntime-genai loads no tokenizer "
    "here; write one with transformers' AutoTokenizer.save_pretrained and convert again"
)
RUNS_ON = {
    "float32": "float32 runs on the CPU: ONNX Runtime has no CUDA attention kernel for it",
    "float16": "float16 runs on CUDA; on a CPU it is half as fast as float32, so convert with --dtype float32 for one",
    "bfloat16": "bfloat16 runs on CUDA only; for a CPU convert with --dtype float32",
}


# How to load a model, by engine. PATH is the repository or its directory; TRUST is ", trust_remote_code=True" or
# nothing. The first three are run by tests/test_card.py, the other two by scripts/compat (which has no llama.cpp
# program and no Hub: it calls llama.cpp's library with these options, and copies).
SNIPPETS = {
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = "PATH"
model = AutoModelForCausalLM.from_pretrained(model_idTRUST)
tokenizer = AutoTokenizer.from_pretrained(model_idTRUST)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```""",
    "onnxruntime-genai": """```python
import os

import onnxruntime_genai as genai
from huggingface_hub import snapshot_download

model_id = "PATH"
model = genai.Model(model_id if os.path.isdir(model_id) else snapshot_download(model_id))
tokenizer = genai.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")
tokens = tokenizer.encode("Once upon a time")
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=len(tokens) + 40, do_sample=False)
generator = genai.Generator(model, parameters)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```""",
    "ONNX Runtime": """```python
import os

import numpy as np
import onnxruntime as ort
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

model_id = "PATH"
path = model_id if os.path.isdir(model_id) else snapshot_download(model_id)
tokenizer = AutoTokenizer.from_pretrained(pathTRUST)
session = ort.InferenceSession(f"{path}/model.onnx", providers=["CPUExecutionProvider"])
ids = tokenizer("Once upon a time", return_tensors="np")["input_ids"]
# A batch: pad it on the right, with 0 in the mask, and take each row's logits at its own last token. A row that is
# padded on the left has NaN for logits, of which argmax makes token 0; one whose pads have a 1 is silently wrong.
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
for cache in session.get_inputs()[2:]:  # keys and values of the attentions that are left: empty at first
    dtype = np.float16 if "float16" in cache.type else np.float32
    inputs[cache.name] = np.zeros((1, cache.shape[1], 0, cache.shape[3]), dtype)
logits, *caches = session.run(None, inputs)  # the caches go in again with the next token
print(tokenizer.decode(int(logits[0, -1].argmax())))
```""",
    "vLLM": """```python
from vllm import LLM, SamplingParams

model_id = "PATH"
if __name__ == "__main__":  # vLLM starts processes that import this file
    llm = LLM(model_idTRUST)
    print(llm.generate(["Once upon a time"], SamplingParams(max_tokens=40, temperature=0))[0].outputs[0].text)
```""",
    "llama.cpp": """```bash
# a directory that is here already needs no download; prune-attn writes the file, with its gguf extra
hf download PATH --local-dir model
prune-attn export model --gguf model.gguf
llama-completion -m model.gguf -p "Once upon a time" -n 40 -no-cnv
```""",
}
