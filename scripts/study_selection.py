"""How many calibration tokens it takes, of what length and kind, and by which objective: many sets on unseen text.

    python scripts/study_selection.py run FILE.npz --layers 1,2,4 --sizes 4 --lengths 64,512 --kinds spread
    python scripts/study_selection.py analyse FILE.npz [--plot PNG]

``run`` keeps the losses of every set by window; what FILE has already is not run again, so it may be filled bit by
bit. ``analyse`` draws so many windows at random, takes the set that is best on them, and gives by how much its
perplexity on all the unseen windows is above that of the best set there: the mean of 2,000 draws.

Kinds: ``spread`` (windows from all over the calibration text), ``row`` (its beginning only, read on in one piece),
``own`` (the first half of the test text; unseen is always the second half) and ``code`` (this project's source).
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np

from pruner import open_checkpoint
from pruner.select.evaluator import Evaluator
from pruner.select.sampling import windows
from pruner.text import load_tokenizer, read_text

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
SHIPPED = DATA / "gutenberg-llama-5m"
KINDS = ("spread", "row", "own", "code")
MAIN = 256  # the length that objectives and kinds are compared at


def run(options: argparse.Namespace) -> None:
    checkpoint, tokenizer = open_checkpoint(options.source), load_tokenizer(options.source)
    layers = [int(i) for i in options.layers.split(",")] if options.layers else range(1, checkpoint.decoder.num_layers)
    sets = [frozenset(s) for size in map(int, options.sizes.split(",")) for s in combinations(layers, size)]
    names = np.array([" ".join(map(str, sorted(s))) for s in sets])
    kept = dict(np.load(options.file)) if options.file.exists() else {"sets": names}
    if not np.array_equal(kept["sets"], names):
        raise SystemExit(f"{options.file}: has other sets; name another file")

    def ids(kind: str) -> np.ndarray:
        if kind == "code":
            source = "\n".join(p.read_text() for p in sorted((ROOT / "pruner").glob("*.py")))
            return np.array(tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"])
        known = read_text(options.test if kind in ("own", "unseen") else options.text, tokenizer).ids
        half = len(known) // 2
        return {"own": known[:half], "unseen": known[half:], "row": known[: options.tokens]}.get(kind, known)

    jobs = [("unseen", options.unseen_length, options.unseen)]
    jobs += [(kind, int(n), options.tokens) for kind in options.kinds.split(",") for n in options.lengths.split(",")]
    for kind, length, tokens in jobs:
        key = "unseen" if kind == "unseen" else f"{kind}/{length}"
        if key in kept:
            continue
        chosen = windows(ids(kind), tokens // length, length, 0)
        evaluator = Evaluator(checkpoint, chosen, sublayer="attention", objective="kl", device=options.device)
        evaluator.losses(sets)
        rows = [evaluator.known[s] for s in sets]  # batches of [ce, kl]
        kept[key] = np.array([[[x for batch in row for x in batch[c]] for c in (0, 1)] for row in rows])
        np.savez_compressed(options.file, **kept)
        print(key, "done", flush=True)


def excess(losses: np.ndarray, unseen: np.ndarray, n: int, in_a_row: bool) -> float:
    """Mean percentage by which the set best on ``n`` of the windows, (sets, windows), is above the best on unseen."""
    have, rng = losses.shape[1], np.random.default_rng(0)
    if in_a_row:  # back from the order that ``windows`` gives them in to that of the text
        stride = max(1, int(have**0.5))
        losses = losses[:, np.argsort([i for first in range(stride) for i in range(first, have, stride)])]
        draws = np.arange(have - n + 1)[:, None] + np.arange(n)
    else:
        draws = np.stack([rng.permutation(have)[:n] for _ in range(2000 if n < have else 1)])
    chosen = losses[:, draws].mean(2).argmin(0)
    return 100 * (unseen[chosen].mean() / unseen.min() - 1)


def analyse(options: argparse.Namespace) -> None:
    data = dict(np.load(options.file))
    sizes = np.array([len(s.split()) for s in data["sets"]])
    keys = sorted((k for k in data if "/" in k), key=lambda k: (KINDS.index(k.split("/")[0]), int(k.split("/")[1])))
    columns = [(key, 1) for key in keys] + [(f"spread/{MAIN}", 0)] * (f"spread/{MAIN}" in keys)
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        unseen = np.exp(data["unseen"][rows, 0].mean(1))
        curves: dict[tuple[str, int], dict[int, float]] = {}
        for key, column in columns:
            losses, length = data[key][rows, column], int(key.split("/")[1])
            counts = [2**i for i in range(12) if 2**i <= losses.shape[1]]
            curves[key, column] = {
                n * length: excess(losses, unseen, n, key.startswith("row")) for n in counts if n * length >= 128
            }
        heads = [f"{k.replace('/', ', ')}, {('CE', 'KL')[c]}" for k, c in columns]
        print(f"{size} dropped, {len(rows)} sets; unseen perplexity {unseen.min():.2f} to {unseen.max():.2f}\n")
        print("| calibration tokens | " + " | ".join(heads) + " |\n|---:|" + "---:|" * len(heads))
        for tokens in sorted({t for curve in curves.values() for t in curve}):
            cells = [f"{c[tokens]:.2f}%" if tokens in c else "" for c in curves.values()]
            print(f"| {tokens:,} | " + " | ".join(cells) + " |")
        names = data["sets"][rows]
        print("\nbest unseen: " + "; ".join(f"{names[i]} ({unseen[i]:.2f})" for i in np.argsort(unseen)[:4]))
        for key, column in columns:
            best = int(data[key][rows, column].mean(1).argmin())
            print(f"{key} {('CE', 'KL')[column]}, all its tokens: {names[best]} ({unseen[best]:.2f} unseen)")
        print()
        if options.plot:
            plot(options.plot, curves)


def plot(path: Path, curves: dict[tuple[str, int], dict[int, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for (key, column), curve in curves.items():
        kind, length = key.split("/")
        label = f"{length} tokens, {('CE', 'KL')[column]}"
        style = {"marker": ".", "linestyle": "-" if column else "--"}
        if kind == "spread":
            left.plot(curve.keys(), curve.values(), label=label, **style)
        if int(length) == MAIN and column == 1:
            right.plot(curve.keys(), curve.values(), label=kind, **style)
    left.set_title("length of a window (spread)", fontsize=10)
    right.set_title(f"kind of text (windows of {MAIN}, KL)", fontsize=10)
    left.set_ylabel("unseen perplexity above the best set's, %")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("calibration tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=72)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python scripts/study_selection.py")
    parser.add_argument("what", choices=("run", "analyse"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--source", type=Path, default=SHIPPED)
    parser.add_argument("--text", type=Path, default=DATA / "calibration.txt")
    parser.add_argument(
        "--test", type=Path, default=DATA / "austen-test.txt", help="not of the calibration text's authors"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", help="choose from these only (default: all but 0)")
    parser.add_argument("--sizes", default="4")
    parser.add_argument("--lengths", default=str(MAIN))
    parser.add_argument("--kinds", default="spread", help=", ".join(KINDS))
    parser.add_argument("--tokens", type=int, default=16384, help="for each length and kind")
    parser.add_argument("--unseen", type=int, default=32768, help="tokens of unseen text")
    parser.add_argument("--unseen-length", type=int, default=512)
    parser.add_argument("--plot", type=Path, help="draw the curves here")
    options = parser.parse_args()
    run(options) if options.what == "run" else analyse(options)


if __name__ == "__main__":
    main()
