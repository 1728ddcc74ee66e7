"""Write pruner/evaluate/cloze/cloze.jsonl from the Austen text: python scripts/make_cloze.py

An item is 48 words of the text and four continuations of 6 words. The wrong three are true continuations of other
places in the text, with other first words and nearly as many letters, so that length tells nothing.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEED, ITEMS, CONTEXT, WORDS = 20, 400, 48, 6
APART = 2000  # words between an item and its wrong continuations
LETTERS = 4  # by which the four may differ in length


def main() -> None:
    text = (ROOT / "tests" / "data" / "austen-test.txt").read_text(encoding="utf-8")
    rng = random.Random(SEED)
    words = [match.span() for match in re.finditer(r"\S+", text)]

    def span(i: int, n: int) -> str:
        return text[words[i][0] : words[i + n - 1][1]]

    def one_spaced(i: int) -> bool:
        """Whether a continuation at word i stands on one line, one space after a word without punctuation."""
        gaps = [text[words[j][1] : words[j + 1][0]] for j in range(i - 1, i + WORDS - 1)]
        return set(gaps) == {" "} and text[slice(*words[i - 1])].isalpha()

    starts = [i for i in range(CONTEXT, len(words) - WORDS) if one_spaced(i)]
    items, used = [], []
    while len(items) < ITEMS:
        i = rng.choice(starts)
        if any(abs(i - j) < CONTEXT + WORDS for j in used):
            continue
        right = span(i, WORDS)
        choices = [right]
        while len(choices) < 4:
            j = rng.choice(starts)
            wrong = span(j, WORDS)
            firsts = {choice.split()[0].lower() for choice in choices}
            alike = abs(len(wrong) - len(right)) <= LETTERS and wrong.split()[0].lower() not in firsts
            if alike and abs(i - j) > APART:
                choices.append(wrong)
        rng.shuffle(choices)
        used.append(i)
        items.append({"context": span(i - CONTEXT, CONTEXT), "choices": choices, "label": choices.index(right)})
    output = ROOT / "pruner" / "evaluate" / "cloze" / "cloze.jsonl"
    output.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    print(f"{output}: {len(items)} items")


if __name__ == "__main__":
    main()
