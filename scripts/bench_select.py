"""See ``scripts/bench_select``. Naive: plain transformers, each candidate through all layers on all samples."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import SHAPES, make

from pruner import open_checkpoint
from pruner.model import TorchLanguageModel, inference
from pruner.progress import Step
from pruner.select.choose import choose
from pruner.select.request import Calibration
from pruner.select.sampling import how_many, windows
from pruner.text import load_tokenizer, read_text

DATA = Path(__file__).parent.parent / "tests" / "data"
SHIPPED, TEXT = DATA / "gutenberg-llama-5m", DATA / "calibration.txt"


def naive(source: Path, text: Path, drop: int, samples: int, length: int, device: str, seed: int) -> dict[str, Any]:
    """Greedy on the same windows and objective (KL to the original), nothing shared and nothing screened."""
    import torch

    model = TorchLanguageModel(source, device=device, dtype="float32" if device == "cpu" else None)
    ids = torch.from_numpy(windows(read_text(text, load_tokenizer(source)).ids, samples, length, seed)).to(device)
    size, layers = max(1, 4096 // length), model.decoder.num_layers

    def states(part: torch.Tensor) -> torch.Tensor:  # (B, T, C), after the last norm
        return model.model.model(input_ids=part, use_cache=False).last_hidden_state[:, :-1]

    started, evaluations, dropped = time.monotonic(), 0, []
    with inference():
        original = [states(part) for part in ids.split(size)]
        for _ in range(drop):
            losses = {}
            for i in range(1, layers):
                if i in dropped:
                    continue
                model.switch_off([*dropped, i])
                total = 0.0
                for part, truth in zip(ids.split(size), original, strict=True):
                    for x, y in zip(states(part), truth, strict=True):
                        log_q, log_p = (model.model.lm_head(h).float().log_softmax(-1) for h in (x, y))
                        total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean())
                losses[i] = total / samples
                evaluations += layers
            dropped.append(min(losses, key=lambda i: (losses[i], -i)))
    return {
        "seconds": time.monotonic() - started, "layer_evaluations": evaluations,
        "layers": sorted(dropped), "loss": min(losses.values()),
    }  # fmt: skip


def news(step: Step) -> None:
    """What is said besides how far it is."""
    if not step.total:
        print(step, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bash scripts/bench_select")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape (default: the shipped model)")
    parser.add_argument("--source", type=Path, help="a checkpoint instead")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--drop", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dir", type=Path, help="where to make the checkpoint (default: a temporary directory)")
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, help="default: not for a shape")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-select-") as name:
        source, text = options.source or SHIPPED, options.text
        if options.shape:
            source = Path(name) / "source"
            print(f"making {options.shape} ...", file=sys.stderr)
            make(source, options.shape)
            for file in SHIPPED.glob("tokenizer*"):
                shutil.copy(file, source)
        drop = options.drop or (10 if options.shape else 4)
        samples = options.samples or (64 if options.shape else None)
        length = options.length or (2048 if options.shape else None)
        known = read_text(text, load_tokenizer(source))
        if (
            samples and length and len(known.ids) < samples * length * 1.05
        ):  # random weights don't mind reading it twice
            times = int(samples * length * 1.05 / len(known.ids)) + 1
            text = Path(name) / "text.txt"
            text.write_bytes(Path(known.path).read_bytes() * times)
            known = read_text(text, load_tokenizer(source))
        context = int(open_checkpoint(source).config["max_position_embeddings"])
        samples, length = how_many(known, context, samples, length, print)
        common = {"samples": samples, "length": length, "seed": options.seed, "device": options.device}
        made = choose(open_checkpoint(source), drop, Calibration(text, **common), progress=news)
        plan = made.plan
        result = {
            "shape": options.shape or str(source), "drop": drop, **common,
            "dtype": plan.selection["calibration"]["dtype"],
            "search": {**made.cost, "layers": list(plan.attention), "loss": plan.selection["scores"][drop - 1]},
        }  # fmt: skip
        if options.naive or (options.naive is None and not options.shape):
            result["naive"] = naive(source, text, drop, samples, length, options.device, options.seed)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{drop} attentions, {samples} samples of {length} tokens, {result['dtype']} on {options.device}")
    for way in ("search", "naive"):
        if way in result:
            row = result[way]
            print(
                f"{way:8}{row['seconds']:9.1f} s {row['layer_evaluations']:10,.0f} layer evaluations"
                f"   KL {row['loss']:.5f}   {row['layers']}"
            )


if __name__ == "__main__":
    main()
