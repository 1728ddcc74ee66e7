"""The report's plots, each from ``results``: as PNG files, and as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6  # inches: small enough that a telephone does not shrink the letters away
_TEXT, _FAINT, _KEPT = "#1f2328", "#d0d7de", "#8c959f"
_ORIGINAL, _PRUNED, _BETTER, _WORSE = "#4477aa", "#dd7722", "#2a8f7f", "#cc5544"
# what a page may want in other shades
VARIABLES = {
    _TEXT: "text", _FAINT: "faint", _KEPT: "kept", _ORIGINAL: "original", _PRUNED: "pruned", _BETTER: "better",
    _WORSE: "worse",
}  # fmt: skip


def _figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for ax in axes:
        ax.set_facecolor("none")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(_KEPT)
        ax.tick_params(colors=_TEXT, labelsize=8.5)
        ax.grid(color=_FAINT, linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def _label(ax: Axes, x: str = "", y: str = "", title: str = "") -> None:
    ax.set_xlabel(x, color=_TEXT, fontsize=9)
    ax.set_ylabel(y, color=_TEXT, fontsize=9)
    if title:
        ax.set_title(title, color=_TEXT, fontsize=9.5, loc="left")


def _legend(ax: Axes) -> None:
    ax.legend(frameon=False, fontsize=8, labelcolor=_TEXT)


def glance(results: dict[str, Any]) -> Figure | None:
    """Pruned over original, in percent, with intervals; 100 is the original."""
    rows: list[tuple[str, float, float, float, bool]] = []  # label, value, low, high, more is better

    def add(label: str, e: dict[str, float], more: bool, invert: bool = False) -> None:
        value, low, high = e["value"], e["low"], e["high"]
        if invert:
            value, low, high = 1 / value, 1 / high, 1 / low
        rows.append((label, 100 * value, 100 * low, 100 * high, more))

    for facts in list(results["accuracy"].values())[:1]:
        add("perplexity", facts["perplexity"]["ratio"], False)
    for facts in list(results["tasks"].values())[:1]:
        if facts["average_ratio"] is not None:
            add("task average", dict.fromkeys(("value", "low", "high"), facts["average_ratio"]), True)
    for backend, facts in results["latency"].items():
        name = {"torch": "PyTorch", "torch-compiled": "compiled", "onnx": "ONNX"}[backend]
        add(f"decode time, {name}", facts["speedup"]["decode"], False, invert=True)
        add(f"prefill time, {name}", facts["speedup"]["prefill"], False, invert=True)
    a, b = results["models"]["original"], results["models"]["pruned"]
    for label, key in (("weights", "bytes"), ("KV cache", "kv_cache_bytes_per_token")):
        if a[key]:
            add(label, dict.fromkeys(("value", "low", "high"), b[key] / a[key]), False)
    figure, (ax,) = _figure(0.9 + 0.29 * len(rows))
    for i, (_, value, low, high, more) in enumerate(rows):
        better = (low > 100) if more else (high < 100)
        worse = (high < 100) if more else (low > 100)
        colour = _BETTER if better else _WORSE if worse else _KEPT
        ax.plot([100, value], [i, i], color=colour, linewidth=1, alpha=0.5)
        ax.plot([low, high], [i, i], color=colour, linewidth=4, alpha=0.45, solid_capstyle="butt")
        ax.plot(value, i, "o", color=colour, markersize=5)
        side = 1 if value >= 100 else -1
        edge = max(high, value) if side > 0 else min(low, value)
        ax.annotate(
            f"{value:.0f}%", (edge, i), (5 * side, 0), textcoords="offset points", va="center",
            ha="left" if side > 0 else "right", fontsize=8, color=_TEXT,
        )  # fmt: skip
    ax.axvline(100, color=_TEXT, linewidth=1)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.18)
    ax.grid(axis="y", visible=False)
    _label(ax, "% of the original; green is better, red worse")
    return figure


def layers(results: dict[str, Any]) -> Figure | None:
    """A strip: a cell for each layer's attention and MLP, hollow where it is gone."""
    pruning = results["pruning"]
    count = pruning["layers"]
    figure, (ax,) = _figure(1.15)
    from matplotlib.patches import Rectangle

    for y, kind in ((1, "attention"), (0, "mlp")):
        for i in range(count):
            gone, before = i in pruning[kind], i in pruning["absent_before"][kind]
            ax.add_patch(
                Rectangle(
                    (i - 0.42, y - 0.38), 0.84, 0.76, facecolor="none" if gone or before else _KEPT,
                    edgecolor=_WORSE if gone else _FAINT if before else _KEPT, linewidth=1.3 if gone else 0.6,
                )
            )  # fmt: skip
    ax.set_xlim(-0.7, count - 0.3)
    ax.set_ylim(-0.6, 1.6)
    ax.set_yticks([1, 0], ["attention", "MLP"])
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, 1000, 10000) if count / s <= 16)
    ax.set_xticks(range(0, count, step))
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    _label(ax, "layer; hollow is gone")
    return figure


def position(results: dict[str, Any]) -> Figure | None:
    """Perplexity of both by position in the context, and their ratio with its interval."""
    if not results["accuracy"]:
        return None
    rows = next(iter(results["accuracy"].values()))["position"]
    figure, (upper, lower) = _figure(3.9, 2)
    x = range(len(rows))
    names = [f"{r['from']}–{r['to']}" for r in rows]
    for key, colour in (("original", _ORIGINAL), ("pruned", _PRUNED)):
        upper.plot(x, [r[key] for r in rows], "o-", color=colour, label=key, markersize=4)
    upper.set_xticks(x, [""] * len(rows))
    _label(upper, y="perplexity")
    _legend(upper)
    ratio = [r["ratio"] for r in rows]
    lower.fill_between(
        x, [100 * (e["low"] - 1) for e in ratio], [100 * (e["high"] - 1) for e in ratio], color=_PRUNED, alpha=0.25,
        linewidth=0,
    )  # fmt: skip
    lower.plot(x, [100 * (e["value"] - 1) for e in ratio], "o-", color=_PRUNED, markersize=4)
    lower.set_xticks(x, names, rotation=35, ha="right")
    _label(lower, "tokens of context before", "increase, %")
    return figure


def decode(results: dict[str, Any]) -> Figure | None:
    """A decode step against the context, a panel for each batch: medians, and up to the 90th percentile."""
    found = results["latency"]
    if not found:
        return None
    batches = sorted({case["batch"] for facts in found.values() for case in facts["cases"]})
    figure, axes = _figure(0.9 + 2.3 * len(batches), len(batches))
    styles = {"torch": ("-", "PyTorch"), "torch-compiled": (":", "compiled"), "onnx": ("--", "ONNX")}
    for ax, batch in zip(axes, batches, strict=True):
        for backend, facts in found.items():
            cases = sorted((c for c in facts["cases"] if c["batch"] == batch), key=lambda c: c["prompt"])
            x = [c["prompt"] for c in cases]
            for model, colour in (("original", _ORIGINAL), ("pruned", _PRUNED)):
                steps = [c[model]["decode_ms"] for c in cases]
                middle = [s["median"] for s in steps]
                line, name = styles[backend]
                ax.plot(x, middle, line, color=colour, marker="o", markersize=4, label=f"{name}, {model}")
                ax.fill_between(x, middle, [s["p90"] for s in steps], color=colour, alpha=0.12, linewidth=0)
        ax.set_ylim(bottom=0)
        _label(ax, "prompt tokens before" if batch == batches[-1] else "", "ms per step", f"batch {batch}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(found), frameon=False, fontsize=8, labelcolor=_TEXT
    )  # above, where it covers no line
    return figure


FIGURES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "glance": (glance, "Quality and speed before and after"),
    "layers": (layers, "Which layers are gone"),
    "position": (position, "Perplexity by position in the context"),
    "decode": (decode, "Decode latency against context"),
}


def compared(rows: list[dict[str, Any]]) -> Figure | None:
    """Several results: perplexity increase against decode speed-up, a point each. Rows as ``compare.summary_row``."""
    points = [r for r in rows if r["speedup"] is not None and r["increase"] is not None]
    if not points:
        return None
    figure, (ax,) = _figure(3.4)
    for r in points:
        s, p = r["speedup"], r["increase"]
        y = 100 * (p["value"] - 1)
        ax.plot([s["low"], s["high"]], [y, y], color=_PRUNED, linewidth=1.5, alpha=0.5)
        ax.plot(
            [s["value"]] * 2, [100 * (p["low"] - 1), 100 * (p["high"] - 1)], color=_PRUNED, linewidth=1.5, alpha=0.5
        )
        ax.plot(s["value"], y, "o", color=_PRUNED, markersize=5)
        ax.annotate(
            r["label"], (s["value"], y), (5, 5), textcoords="offset points", parse_math=False, fontsize=7.5, color=_TEXT
        )
    ax.plot(1, 0, "D", color=_ORIGINAL, markersize=6)
    ax.annotate("original", (1, 0), (5, 5), textcoords="offset points", fontsize=7.5, color=_TEXT)
    ax.margins(0.2)
    _label(ax, f"decode speed-up, {points[0]['backend']}", "perplexity increase, %")
    return figure


def png(figure: Figure) -> bytes:
    """On white, 200 dots an inch."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def svg(figure: Figure, name: str) -> str:
    """An ``<svg>`` element whose colours are CSS variables of the page; ``name`` is what its ids begin with."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\1{name}-", text)
    return re.sub("|".join(VARIABLES), lambda m: f"var(--{VARIABLES[m[0]]})", text)
