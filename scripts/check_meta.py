"""See ``scripts/check_meta``: small made-up distributions of every shape, converted by both, compared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoTokenizer

from export.deliver import export
from prune_attn import convert, verify
from pruner.text import load_tokenizer

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "tests" / "data" / "gutenberg-llama-5m" / "tokenizer.model"
VOCABULARY = 4096
CASES = {  # parts, dtype, fields of params.json
    "7B: one part": (1, torch.bfloat16, {"dim": 256, "n_heads": 4, "n_layers": 3, "multiple_of": 256}),
    "13B: two parts": (2, torch.bfloat16, {"dim": 320, "n_heads": 10, "n_layers": 2, "multiple_of": 64}),
    "70B: eight parts, grouped heads": (
        8, torch.bfloat16,
        {"dim": 512, "n_heads": 16, "n_kv_heads": 8, "n_layers": 2, "multiple_of": 128, "ffn_dim_multiplier": 1.3},
    ),
    "CodeLlama 34B: four parts, rope_theta": (
        4, torch.bfloat16,
        {"dim": 256, "n_heads": 8, "n_kv_heads": 4, "n_layers": 2, "multiple_of": 256, "ffn_dim_multiplier": 1.0,
         "rope_theta": 1000000},
    ),
    "float16 (theirs is rounded to bfloat16)": (
        2, torch.float16, {"dim": 256, "n_heads": 4, "n_layers": 2, "multiple_of": 32}
    ),
}  # fmt: skip
TEXTS = [
    "It was a dark and stormy night, and the", " leading", "trailing ", "  two  and   three   spaces ", "",
    "\n\ttabs\n\n", "naïve café ▁itself, 日本語, Ελληνικά, 🦙🦙",
    "<s> in the text </s> stays text", "a\u00a0b\u200bc\x00d", "!?" * 40,
]  # fmt: skip
FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size",
    "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias", "model_type", "architectures",
)  # fmt: skip
THEIR_IDS = """
import json, sys
from transformers import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast
slow = LlamaTokenizer(sys.argv[1], legacy=False)
fast = LlamaTokenizerFast(sys.argv[1], legacy=True, add_prefix_space=True)  # what the Hub's tokenizer.json is
ours = AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)
texts = json.load(sys.stdin)
ids = {n: [t(text)["input_ids"] for text in texts] for n, t in (("slow", slow), ("fast", fast), ("ours", ours))}
print(json.dumps(ids))
"""


def make(directory: Path, parts: int, dtype: torch.dtype, params: dict[str, float]) -> None:
    """Random parts of the right shapes. Those of one part are views of one storage, as in some of Meta's files."""
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-5, "vocab_size": -1}))
    shutil.copy(TOKENIZER, directory)
    dim, heads, multiple = params["dim"], params["n_heads"], params["multiple_of"]
    kv = dim // heads * params.get("n_kv_heads", heads)
    hidden = int(params.get("ffn_dim_multiplier", 1) * int(8 * dim / 3))
    hidden = multiple * ((hidden + multiple - 1) // multiple)
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (VOCABULARY, dim // parts), "norm.weight": (dim,),
        "output.weight": (VOCABULARY // parts, dim), "rope.freqs": (dim // heads // 2,),
    }  # fmt: skip
    for i in range(params["n_layers"]):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in {
            "attention.wq": (dim // parts, dim), "attention.wk": (kv // parts, dim),
            "attention.wv": (kv // parts, dim), "attention.wo": (dim, dim // parts),
            "feed_forward.w1": (hidden // parts, dim), "feed_forward.w2": (dim, hidden // parts),
            "feed_forward.w3": (hidden // parts, dim), "attention_norm": (dim,), "ffn_norm": (dim,),
        }.items()}  # fmt: skip
    whole = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items() if len(shape) == 1}
    for part in range(parts):
        storage = torch.randn(sum(r * c for r, c in (s for s in shapes.values() if len(s) == 2))).to(dtype)
        state, used = dict(whole), 0
        for name, shape in shapes.items():
            if len(shape) == 2:
                state[name] = storage[used : used + shape[0] * shape[1]].view(shape)
                used += shape[0] * shape[1]
        torch.save(state, directory / f"consolidated.{part:02d}.pth")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def check(theirs_python: str, source: Path, work: Path, parts: int) -> str:
    """How many tensors are equal; AssertionError where one is not, or the configuration or the token ids differ."""
    script = ["-m", "transformers.models.llama.convert_llama_weights_to_hf", "--llama_version", "2"]
    paths = ["--input_dir", source, "--output_dir", work / "theirs", "--num_shards", str(parts)]
    done = subprocess.run([theirs_python, *script, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    export(source, work / "ours")
    convert(source, work / "pruned", 1)
    for name in ("ours", "pruned"):
        assert (found := verify(work / name, source)).ok, found.problems
    theirs, ours, pruned = (tensors(work / name) for name in ("theirs", "ours", "pruned"))
    assert theirs.keys() == ours.keys() > pruned.keys(), theirs.keys() ^ ours.keys()
    for name, expected in theirs.items():
        for got in (ours[name], pruned.get(name)):
            assert got is None or torch.equal(got.to(expected.dtype), expected), name
    config, expected = (json.loads((work / name / "config.json").read_text()) for name in ("ours", "theirs"))
    differing = {f: (config.get(f), expected.get(f)) for f in FIELDS if config.get(f) != expected.get(f)}
    assert not differing, differing

    texts = json.dumps(TEXTS)
    done = subprocess.run(
        [theirs_python, "-c", THEIR_IDS, TOKENIZER, work / "pruned"], input=texts, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ours"] == told["fast"], "token ids in transformers 4.46.3"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    (work / "plain").mkdir()
    shutil.copy(TOKENIZER, work / "plain")
    (work / "plain" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    plain = AutoTokenizer.from_pretrained(work / "plain")
    tokenizers = [load_tokenizer(directory) for directory in (source, work / "pruned")]
    for text, slow, ours_there in zip(TEXTS, told["slow"], told["ours"], strict=True):
        if "<s>" not in text:
            assert ours_there == slow == [1, *pieces.encode(text)], (text, ours_there, slow)
        for tokenizer in tokenizers:
            got = tokenizer(text)["input_ids"]
            assert got == [1, *plain(text, add_special_tokens=False)["input_ids"]], (text, got)
            assert tokenizer.decode(got[1:]) == plain.decode(got[1:]), text
            # transformers 5 drops one leading space, and takes the name of a special token in a text for the token
            assert text.startswith(" ") or "<s>" in text or got == slow, (text, got, slow)
    return f"{len(theirs)} of {len(theirs)}"


def main() -> None:
    table, failed = Table("distribution", "parts", "tensors equal", "config, token ids"), 0
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="check-meta-") as work:
        for i, (case, (parts, dtype, params)) in enumerate(CASES.items()):
            source = Path(work, str(i))
            make(source, parts, dtype, params)
            try:
                table.add_row(case, str(parts), check(sys.argv[1], source, Path(work, f"{i}-out"), parts), "equal")
            except AssertionError as error:
                failed += 1
                table.add_row(case, str(parts), "", str(error)[-500:])
    Console(width=120).print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
