"""See ``scripts/compat``. An engine is pip requirements and a program, run in its venv for each pruned model."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "tests" / "data" / "gutenberg-llama-5m"
CASES = {
    "attention, the deepest third": ["--drop", "33%"],
    "attention, in the middle": ["--layers", "3,5-7"],
    "attention at layer 0": ["--layers", "0,5", "--allow-first-layer"],
    "every attention": ["--drop", "100%", "--allow-all"],
    "MLP": ["--layers", "3,11", "--sublayer", "mlp"],
    "blocks (plain Llama)": ["--drop", "2", "--sublayer", "block"],
}
ENGINES = {
    "transformers 4.57": (["transformers==4.57.*", "accelerate", "sentencepiece", "protobuf"], "transformers"),
}

TRANSFORMERS = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

source, pruned, plan = sys.argv[1], sys.argv[2], json.load(open(sys.argv[2] + "/pruning_plan.json"))
text = "It was a dark and stormy night, and the"
tokenizer = AutoTokenizer.from_pretrained(pruned, trust_remote_code=True)
ids = tokenizer(text, return_tensors="pt").input_ids
assert torch.equal(ids, AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids)
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16):
        for implementation in ("eager", "sdpa"):
            options = dict(torch_dtype=dtype, attn_implementation=implementation)
            model, info = AutoModelForCausalLM.from_pretrained(
                pruned, trust_remote_code=True, output_loading_info=True, **options
            )
            assert not any(info.values()), info
            original = LlamaForCausalLM.from_pretrained(source, **options)
            for i in plan["attention"]:
                attention = original.model.layers[i].self_attn
                attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
            for i in plan["mlp"]:
                original.model.layers[i].mlp.forward = lambda x: torch.zeros_like(x)
            assert torch.equal(model(ids, use_cache=False).logits, original(ids, use_cache=False).logits), options
    model = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True, torch_dtype=torch.float32)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=2)
    tokens = model.generate(ids, use_cache=False, **options)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(ids, cache_implementation=cache, **options), tokens), cache
    model.save_pretrained(pruned + "-again")
    again = AutoModelForCausalLM.from_pretrained(pruned + "-again", trust_remote_code=True, torch_dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)
print(json.dumps({"version": transformers.__version__, "tokens": tokens[0].tolist()}))
"""
PROGRAMS = {"transformers": TRANSFORMERS}


def venv(name: str, requirements: list[str]) -> Path:
    """The interpreter of the engine's venv, made where it is not there yet."""
    directory = ROOT / ".venvs" / name.replace(" ", "-")
    python = directory / "bin" / "python"
    if not (directory / ".done").exists():
        print(f"setting up {directory.relative_to(ROOT)} ...", file=sys.stderr)
        subprocess.check_call([sys.executable, "-m", "venv", "--clear", directory])
        for what in (["torch==2.13.0"], requirements):  # torch first: nothing then pulls another build of it
            subprocess.check_call([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what])
        (directory / ".done").touch()
    return python


def main() -> None:
    chosen = sys.argv[1:] or list(ENGINES)
    unknown = [name for name in chosen if name not in ENGINES]
    if unknown:
        sys.exit(f"compat: unknown engine {unknown[0]!r}; choose from: {', '.join(ENGINES)}")
    table, failed = Table("engine", "version", "pruned", "result"), 0
    with tempfile.TemporaryDirectory(prefix="compat-") as work:
        expected = {}
        for i, (case, options) in enumerate(CASES.items()):
            output = f"{work}/{i}"
            subprocess.check_call(
                [sys.executable, "-m", "export.cli", "convert", SHIPPED, output, *options], stdout=subprocess.DEVNULL
            )
            here = run(Path(sys.executable), "transformers", output)
            if "error" in here:
                sys.exit(f"compat: {case}: fails here already: {here['error']}")
            expected[case] = output, here["tokens"]
        for name in chosen:
            requirements, program = ENGINES[name]
            python = venv(name, requirements)
            for case, (output, tokens) in expected.items():
                got = run(python, program, output)
                same = got.get("tokens") == tokens
                failed += not same
                result = "same greedy tokens as here" if same else got.get("error", "other tokens")
                table.add_row(name, got.get("version", "?"), case, result)
    Console(width=120).print(table)
    sys.exit(1 if failed else 0)


def run(python: Path, program: str, output: str) -> dict[str, object]:
    """What the engine's program printed last, or its last line of error."""
    command = [python, "-c", PROGRAMS[program], SHIPPED, output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["died"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
