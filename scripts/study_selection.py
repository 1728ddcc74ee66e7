"""How many calibration tokens it takes, and which objective: every set of some sizes, on calibration and unseen text.

    python scripts/study_selection.py run FILE.npz [--device cuda] [--layers 1,2,4] [--sizes 3,4,6] ...
    python scripts/study_selection.py analyse FILE.npz

``run`` keeps each set's losses by window. ``analyse`` draws so many windows at random, 500 times, takes the set that is
best on them, and prints by how much its perplexity on all the unseen windows is above that of the best set there.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np

from pruner import open_checkpoint
from pruner.select.evaluator import Evaluator
from pruner.select.job import windows
from pruner.text import load_tokenizer, read_text

SHIPPED = Path(__file__).parent.parent / "tests" / "data" / "gutenberg-llama-5m"


def run(options: argparse.Namespace) -> None:
    checkpoint, tokenizer = open_checkpoint(options.source), load_tokenizer(options.source)
    layers = [int(i) for i in options.layers.split(",")] if options.layers else range(1, checkpoint.decoder.num_layers)
    sets = [frozenset(s) for size in map(int, options.sizes.split(",")) for s in combinations(layers, size)]
    kept = {"sets": np.array([" ".join(map(str, sorted(s))) for s in sets]), "length": options.length}
    for name, text, samples in (("calibration", options.text, options.windows), ("test", options.test, options.unseen)):
        ids = windows(read_text(text, tokenizer).ids, samples, options.length, 0)
        evaluator = Evaluator(checkpoint, ids, sublayer="attention", objective="kl", device=options.device)
        evaluator.losses(sets, done=lambda name=name: print(name, "batch done", flush=True))
        rows = [evaluator.known[s] for s in sets]  # batches of [ce, kl]
        kept[name] = np.array([[[x for batch in row for x in batch[c]] for c in (0, 1)] for row in rows])
        np.savez_compressed(options.file, **kept)


def analyse(options: argparse.Namespace) -> None:
    data, rng = np.load(options.file), np.random.default_rng(0)
    sets, sizes = data["sets"], np.array([len(s.split()) for s in data["sets"]])
    unseen = np.exp(data["test"][:, 0].mean(1))
    calibration, length = data["calibration"], int(data["length"])
    have, columns = calibration.shape[2], np.unique(sizes)
    print(f"{len(sets)} sets, {have} calibration windows of {length} tokens, {data['test'].shape[2]} unseen ones\n")
    heads = [f"{size} dropped, {name}" for size in columns for name in ("CE", "KL")]
    print("| calibration tokens | " + " | ".join(heads) + " |\n|---:|" + "---:|" * len(heads))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n < have]
    for n in [*counts, have]:
        draws = [rng.choice(have, n, replace=False) for _ in range(500 if n < have else 1)]
        cells = []
        for size in columns:
            rows = np.flatnonzero(sizes == size)
            for column in (0, 1):
                chosen = [rows[calibration[rows, column][:, draw].mean(1).argmin()] for draw in draws]
                cells.append(f"{100 * (unseen[chosen].mean() / unseen[rows].min() - 1):.2f}%")
        print(f"| {n * length:,} | " + " | ".join(cells) + " |")
    print()
    for size in columns:
        rows = np.flatnonzero(sizes == size)
        for name, values in (
            ("unseen", unseen), ("CE", np.exp(calibration[:, 0].mean(1))), ("KL", calibration[:, 1].mean(1))
        ):  # fmt: skip
            first = rows[np.argsort(values[rows])[:3]]
            print(f"{size} dropped, best by {name}: " + "; ".join(f"{sets[i]} ({unseen[i]:.2f} unseen)" for i in first))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python scripts/study_selection.py")
    parser.add_argument("what", choices=("run", "analyse"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--source", type=Path, default=SHIPPED)
    parser.add_argument("--text", type=Path, default=SHIPPED.parent / "calibration.txt")
    parser.add_argument("--test", type=Path, help="a text that is not of the calibration text's authors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", help="choose from these only (default: all but 0)")
    parser.add_argument("--sizes", default="3,4,6")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=192)
    parser.add_argument("--unseen", type=int, default=192)
    options = parser.parse_args()
    run(options) if options.what == "run" else analyse(options)


if __name__ == "__main__":
    main()
