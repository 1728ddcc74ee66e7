"""The table of a sweep, as CSV for programs and as Markdown for people."""

from __future__ import annotations

import csv
import io
from typing import Any

from export.markdown import plain
from export.sweep.measure import TIMED

Row = dict[str, Any]


def to_csv(original: Row, points: list[Row]) -> str:
    """One line for the original and one a point; lists of layers are separated by spaces, what is unknown is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(original), lineterminator="\n")
    writer.writeheader()
    for row in (original, *points):
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
    return out.getvalue()


def to_markdown(setting: dict[str, Any], original: Row, points: list[Row]) -> str:
    """Perplexity by strategy and fraction, speed by fraction, and which layers went, for each sublayer kind."""
    text, given, speed = setting["text"], setting["calibration"], setting["speed"]
    tools = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    lines = [
        f"# Sweep of {plain(setting['source']['name'])}",
        "",
        f"Finished on {setting['finished']}, on {setting['device']} ({setting['hardware']}), dtype {setting['dtype']}; "
        f"{tools}.",
        "",
        f"Perplexity on {plain(text['name'])}: {text['tokens']:,} tokens in windows of {text['window']}, no overlap. "
        + (f"Calibrated on {plain(given['name'])}." if given else "No calibration text."),
        "",
        f"**Original: {_number(original['perplexity'])}.** Best of each column in bold.",
    ]
    for sublayer in setting["sublayers"]:
        rows = [row for row in points if row["sublayer"] == sublayer]
        heads = {row["fraction"]: f"{row['fraction']} ({row['dropped']} of {row['of']})" for row in rows}
        best = {f: min((r["perplexity"] or float("inf")) for r in rows if r["fraction"] == f) for f in heads}
        lines += ["", f"## {sublayer}", "", *_header("perplexity", *heads.values())]
        for strategy in setting["strategies"]:
            cells = [
                f"**{_number(row['perplexity'])}**" if row["perplexity"] == best[row["fraction"]] else
                _number(row["perplexity"])
                for row in rows
                if row["strategy"] == strategy
            ]  # fmt: skip
            lines.append(_line(strategy, *cells))
        first = [row for row in rows if row["strategy"] == setting["strategies"][0]]
        lines += ["", *_header("", *heads.values())]
        if speed:
            lines += [_line(f"{kind} speed-up", *(_speedup(row, original, kind) for row in first)) for kind in TIMED]
            lines += [_line(f"{kind}, ms", *(f"{row[f'{kind}_ms']:.2f}" for row in first)) for kind in TIMED]
        for name, column in (("weights", "bytes"), ("KV cache", "kv_cache_bytes_per_token")):
            lines.append(_line(name, *(f"{100 * (row[column] / original[column] - 1):+.1f}%" for row in first)))
        lines += ["", *_header("dropped layers", *heads.values())]
        for strategy in setting["strategies"]:
            chosen = [row["attention"] or row["mlp"] for row in rows if row["strategy"] == strategy]
            lines.append(_line(strategy, *(" ".join(map(str, layers)) for layers in chosen)))
    if speed:
        lines += [
            "",
            f"Speed-up: how many times as fast as the original ({original['decode_ms']:.2f} ms a decoded token, "
            f"{original['prefill_ms']:.2f} ms a prefill), batch 1, prompt of {speed['prompt']} tokens, "
            f"{speed['new_tokens']} new ones. Ratio of medians over {speed['rounds']} rounds in which both ran in "
            "turn, with its 95% bootstrap interval. The original against itself, which is the noise: "
            + ", ".join(f"{kind} {_speedup(original, original, kind).removesuffix(' (?)')}" for kind in TIMED)
            + "; (?) marks an interval that meets that or 1. Speed depends on how many sublayers went and not on "
            "which, so it was measured once a column.",
        ]
    return "\n".join([*lines, "", "![perplexity](perplexity.png)", *(["![speed](speed.png)"] if speed else []), ""])


def within_noise(row: Row, original: Row, kind: str) -> bool:
    """Whether the interval of the speed-up meets 1, or the interval of the original against itself."""
    low, high = original[f"{kind}_speedup_low"], original[f"{kind}_speedup_high"]
    return row[f"{kind}_speedup_low"] <= max(high, 1) and row[f"{kind}_speedup_high"] >= min(low, 1)


def _speedup(row: Row, original: Row, kind: str) -> str:
    low, high = row[f"{kind}_speedup_low"], row[f"{kind}_speedup_high"]
    mark = " (?)" if within_noise(row, original, kind) else ""
    return f"{row[f'{kind}_speedup']:.2f} [{low:.2f}, {high:.2f}]{mark}"


def _number(value: float | None) -> str:
    if value is None:
        return "not a number"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _header(*cells: str) -> list[str]:
    return [_line(*cells), _line("---", *["---:"] * (len(cells) - 1))]
