"""Shared fixtures: the shipped trained model, small models of odd shapes, and the command line."""

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

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHIPPED = Path(__file__).parent / "data" / "gutenberg-llama-5m"
TEXT = Path(__file__).parent / "data" / "austen-test.txt"

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


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a person does: a process of its own, its output in pipes."""

    def run(*args: object, check: int | None = None, **kwargs: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "export.cli", *map(str, args)], capture_output=True, text=True, check=False, **kwargs
        )
        if check is not None:
            assert done.returncode == check, done.stderr + done.stdout
        return done

    return run


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


def hub_snapshot(files: Path, repository: Path) -> Path:
    """These files as ``snapshot_download`` lays them out: links of a snapshot, which is returned, into ``blobs/``."""
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(files.iterdir())):
        shutil.copy(file, blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    return snapshot


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    """Write a small random LlamaForCausalLM with transformers; returns its directory."""

    def make(name: str = "model", *, dtype: str = "float32", max_shard_size: str = "5GB", **config: object) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = {
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        } | config  # fmt: skip
        torch.manual_seed(len(name))
        model = LlamaForCausalLM(LlamaConfig(**fields))
        with torch.no_grad():  # norms and biases that are all ones and zeros would hide mix-ups
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0, 0.2)
        model.to(getattr(torch, dtype)).save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return tmp_path / name

    return make


def edit_config(directory: Path, **fields: object) -> None:
    """Change fields of a config.json; ``...`` removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by relative name."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
