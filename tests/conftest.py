"""What tests share: the shipped trained model, small random models, the command line, programs in other processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "tests" / "data" / "gutenberg-llama-5m"
TEXT = ROOT / "tests" / "data" / "austen-test.txt"
CALIBRATION = ROOT / "tests" / "data" / "calibration.txt"
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

# whatever its directory, a process that a test starts runs this clone's code
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def shipped() -> Path:
    """The trained model that the project ships: 12 layers, 5 heads of 32, fp16, one file."""
    return SHIPPED


@pytest.fixture
def text_ids() -> Callable[[int], list[int]]:
    """The first tokens of Austen's *Emma*, which the shipped model was not trained on, without BOS."""

    def tokens(count: int) -> list[int]:
        from pruner.text import load_tokenizer

        text = TEXT.read_text()[: 12 * count]
        return load_tokenizer(SHIPPED)(text, add_special_tokens=False, verbose=False)["input_ids"][:count]

    return tokens


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "export.cli", *map(str, args)]


def start_cli(*args: object, **kwargs: Any) -> subprocess.Popen[Any]:
    """Start the command as a person does: a process of its own, its output in pipes unless ``kwargs`` say otherwise."""
    return subprocess.Popen(command(*args), **PIPES | kwargs)


def run_cli(*args: object, check: int | None = None, **kwargs: Any) -> subprocess.CompletedProcess[Any]:
    """The same to its end, which must have the exit code ``check``."""
    return _ended(subprocess.run(command(*args), **PIPES | kwargs), check)


def run_program(program: Callable[..., None], *args: object, check: int = 0, **kwargs: Any) -> str:
    """What a function of programs.py prints, in a process that has imported nothing else."""
    words = [sys.executable, ROOT / "tests" / "programs.py", program.__name__, *map(str, args)]
    return _ended(subprocess.run(words, **PIPES | kwargs), check).stdout


def _ended(done: subprocess.CompletedProcess[Any], check: int | None) -> subprocess.CompletedProcess[Any]:
    assert check in (None, done.returncode), f"{done.stderr}{done.stdout}"
    return done


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_cli


def invoke(*args: object) -> Result:
    """The command line in this process: quicker than ``run_cli``, and open to monkeypatches."""
    from export.cli.main import cli

    return CliRunner().invoke(cli, [str(arg) for arg in args])


def asked(**options: Any) -> dict[str, Any]:
    """Options as the command line names them, as the arguments of ``convert`` (and ``choose``) that they stand for."""
    from prune_attn import Calibration, Drop, Layers, SavedPlan, WriteOptions
    from pruner.select.request import CALIBRATED

    def taken(*names: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    allowed, sublayer = taken("allow_first_layer", "allow_all"), taken("sublayer")
    text, by_text = (
        options.pop("text", None),
        taken("text_field", "samples", "length", "seed", "device", "objective", "resume", "threads"),
    )
    amount, layers, plan = (options.pop(name, None) for name in ("drop", "layers", "plan"))
    strategy = taken("strategy")
    arguments: dict[str, Any] = {}
    if text is not None:
        arguments["calibration"] = Calibration(text, **strategy, **by_text)
        strategy = {} if strategy.get("strategy") in (None, *CALIBRATED) else strategy
    if plan is not None:
        arguments["drop"] = SavedPlan(plan, amount, **allowed)
    elif layers is not None:
        arguments["drop"] = Layers(layers, **sublayer, **allowed)
    elif amount is not None:
        arguments["drop"] = Drop(amount, **sublayer, **strategy, **allowed)
    if "onnx" in options:
        assert options.pop("onnx") is False
        options["graph"] = None
    return arguments | ({"options": WriteOptions(**options)} if options else {})


def swept(**options: Any) -> dict[str, Any]:
    """Options as the command line names them, as the arguments of ``sweep`` that they stand for."""
    from prune_attn import Calibration, Machine, Measure, Points

    def taken(**names: str) -> dict[str, Any]:
        return {field: options.pop(name) for field, name in names.items() if name in options}

    field = {"text_field": options.pop("text_field", None)}
    by = taken(samples="samples", length="length", seed="seed")
    arguments = {
        "measure": Measure(**taken(text="text", window="window", limit="limit", rounds="rounds"), **field),
        "points": Points(**taken(fractions="fractions", sublayers="sublayer", strategies="strategy")),
        "machine": Machine(**taken(device="device", dtype="dtype", threads="threads")),
    }
    text = options.pop("calibration", None)
    return arguments | options | ({"calibration": Calibration(text, **by, **field)} if text is not None else {})


def hub_snapshot(files: Path, repository: Path) -> Path:
    """These files as ``snapshot_download`` lays them out: links of a snapshot, which is returned, into ``blobs/``."""
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(files.iterdir())):
        shutil.copy(file, blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    return snapshot


def random_llama(
    directory: Path, *, dtype: str = "float32", max_shard_size: str = "5GB", with_tokenizer: bool = False, **config: Any
) -> Path:
    """Write a small random LlamaForCausalLM with transformers, perhaps with the shipped tokenizer; its directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        "vocab_size": 4096 if with_tokenizer else 128, "hidden_size": 64, "intermediate_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    } | config  # fmt: skip
    torch.manual_seed(len(directory.name))
    model = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():  # norms and biases that are all ones and zeros would hide mix-ups
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    if with_tokenizer:
        for file in SHIPPED.glob("tokenizer*"):
            shutil.copy(file, directory)
    return directory


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    """``random_llama`` in the test's directory."""

    def make(name: str = "model", **fields: Any) -> Path:
        return random_llama(tmp_path / name, **fields)

    return make


@pytest.fixture
def no_footprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """``validate`` starts no processes to measure memory, which take most of a short run; test_validate.py lets it."""
    from export.validate import timing

    monkeypatch.setattr(timing, "footprint", lambda *args: {"failed": "not measured in this test"})


def edit_config(directory: Path, **fields: object) -> None:
    """Change fields of a config.json; ``...`` removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by relative name."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
