"""What the calibration text is worth: sets chosen on ``general`` and on books, measured on unseen prose and code.

python scripts/study_general.py MODEL --drop 2,4 [--samples 64 --length 512] [--stored]. The prose is Austen's; the code
is networkx's and sympy's, which torch brings along and of which ``general`` has none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from pathlib import Path

from pruner.checkpoint import open_checkpoint
from pruner.select.calibrated import CONFIRM, SCREEN
from pruner.select.evaluator import Evaluator
from pruner.select.sampling import windows
from pruner.select.search import search
from pruner.text import load_tokenizer, read_text

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
CALIBRATION = {"general": ROOT / "pruner" / "texts" / "general.txt", "books": DATA / "calibration.txt"}
CODE = {"networkx": "algorithms/*.py", "sympy": "core/*.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--drop", default="2,4", help="how many attentions, ascending")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--unseen", type=int, default=32, help="windows of 512 tokens of each unseen text")
    parser.add_argument("--stored", action="store_true", help="choose in the stored dtype, not in float32")
    options = parser.parse_args()
    counts = [int(n) for n in options.drop.split(",")]
    checkpoint = open_checkpoint(options.model)
    tokenizer = load_tokenizer(options.model)
    chosen = {}
    for name, file in CALIBRATION.items():
        ids = windows(read_text(file, tokenizer).ids, options.samples, options.length, 0)
        screen = max(8, options.samples // SCREEN)
        # "cpu:0" is the CPU in the stored dtype
        evaluator = Evaluator(checkpoint, ids, sublayer="attention", breaks=(screen,),
                              device="cpu:0" if options.stored else "cpu")  # fmt: skip
        candidates = tuple(layer for layer in checkpoint.decoder.present("attention") if layer)
        evaluator.losses([frozenset()])
        similar = tuple(sorted(candidates, key=lambda layer, e=evaluator: e.similarity[layer]))
        found = search(evaluator.table, candidates, max(counts) - 1, samples=options.samples, screen=screen,
                       confirm=CONFIRM, others=[similar])  # fmt: skip
        chosen[name] = {n: found.sets[n][1] for n in counts}
    for unseen, file in {"prose": DATA / "austen-test.txt", "code": code()}.items():
        ids = windows(read_text(file, tokenizer).ids, options.unseen, 512, 0)
        evaluator = Evaluator(checkpoint, ids, sublayer="attention", objective="ce")
        sets = [frozenset(), *(sets[n] for sets in chosen.values() for n in counts)]
        evaluator.losses(sets)
        print(f"{unseen}: nothing dropped {evaluator.perplexity(frozenset()):.2f}")
        for n in counts:
            print(f"  {n} dropped:", *(f"{name} {evaluator.perplexity(sets[n]):.2f}" for name, sets in chosen.items()))
    for name, sets in chosen.items():
        print(name, *(sorted(dropped) for dropped in sets.values()))


def code() -> Path:
    """The first 300,000 characters of each project's modules, in one file."""
    parts = []
    for package, pattern in CODE.items():
        distribution = importlib.metadata.distribution(package)
        folder = Path(str(distribution.locate_file(package)))
        print(f"{package} {distribution.version}: {pattern}")
        parts.append("\n".join(file.read_text("utf-8") for file in sorted(folder.glob(pattern)))[:300_000])
    file = Path(tempfile.mkdtemp()) / "code.txt"
    file.write_text("\n".join(parts), "utf-8")
    return file


if __name__ == "__main__":
    main()
