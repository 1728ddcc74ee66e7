"""The two plots of a sweep. matplotlib is imported when they are drawn."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.sweep.table import Row, within_noise
from pruner.errors import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import LineStyleType, RcKeyType

# Okabe and Ito's colours, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/); the line's style and
# the marker tell them apart in grey. The page is white whatever is around it.
_LOOKS: tuple[tuple[str, LineStyleType, str], ...] = (
    ("#D55E00", "--", "v"), ("#E69F00", ":", "^"), ("#009E73", "-.", "s"), ("#0072B2", "-", "o"),
    ("#CC79A7", (0, (5, 1)), "D"),
)  # fmt: skip
_STYLE: dict[RcKeyType, Any] = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "savefig.facecolor": "white", "text.parse_math": False,
}  # fmt: skip


_MARKERS = {"attention": "o", "mlp": "s", "block": "D"}
_TITLES = {"attention": "attention dropped", "mlp": "MLP dropped", "block": "whole blocks dropped"}


def draw(directory: Path, setting: dict[str, Any], original: Row, points: list[Row]) -> None:
    """Write ``perplexity.png`` and, where speed was measured, ``speed.png``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from PIL import Image

    with rc_context(_STYLE):
        for name, plot in (("perplexity", _perplexity), ("speed", _speed)):
            if name == "speed" and not setting["speed"]:
                continue
            figure = Figure(dpi=110, layout="constrained")
            plot(figure, setting, original, points)
            drawn = BytesIO()
            figure.savefig(drawn)
            Image.open(drawn).convert("RGB").quantize(64).save(directory / f"{name}.png", optimize=True)  # a third


def _perplexity(figure: Figure, setting: dict[str, Any], original: Row, points: list[Row]) -> None:
    """Perplexity against the fraction dropped: a panel a sublayer kind, a line a strategy."""
    kinds = setting["sublayers"]
    figure.set_size_inches(3.4 * len(kinds) + 1.2, 4.2)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    axis = _Axis(original, points)
    for kind, panel in zip(kinds, panels, strict=True):
        panel.axhline(original["perplexity"], color="black", linewidth=1)
        for strategy, (color, style, marker) in zip(setting["strategies"], _LOOKS, strict=False):
            rows = [r for r in points if (r["sublayer"], r["strategy"]) == (kind, strategy) and r["perplexity"]]
            rows.sort(key=lambda row: row["dropped"])
            dropped = [100 * row["dropped"] / row["of"] for row in rows]
            panel.plot(
                [0, *dropped], [original["perplexity"], *map(axis.at, rows)],
                color=color, linestyle=style, marker=marker, markevery=slice(1, None), label=strategy,
            )  # fmt: skip
            axis.mark_beyond(panel, dropped, rows, color)
        panel.plot([0], [original["perplexity"]], "*", color="black", markersize=13, label="original", clip_on=False)
        panel.set(title=_TITLES[kind], xlabel="% dropped", xlim=(0, None))
        axis.set(panel)
    panels[0].set_ylabel("perplexity (lower is better)")
    panels[0].legend(loc="upper left", frameon=False)
    figure.suptitle(_title(setting), fontsize=9, color="#444444")


def _speed(figure: Figure, setting: dict[str, Any], original: Row, points: list[Row]) -> None:
    """Perplexity against speed: decode and prefill, a colour a strategy, a marker a sublayer kind."""
    figure.set_size_inches(9.6, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    axis = _Axis(original, points)
    for timed, panel in zip(("decode", "prefill"), panels, strict=True):
        panel.axhline(original["perplexity"], color="black", linewidth=1)
        panel.axvline(1, color="black", linewidth=1)
        panel.axvspan(original[f"{timed}_speedup_low"], original[f"{timed}_speedup_high"], color="#cccccc", zorder=0)
        for strategy, (color, style, _) in zip(setting["strategies"], _LOOKS, strict=False):
            for kind in setting["sublayers"]:
                rows = [r for r in points if (r["sublayer"], r["strategy"]) == (kind, strategy) and r["perplexity"]]
                rows.sort(key=lambda row: row["dropped"])
                speed = [row[f"{timed}_speedup"] for row in rows]
                panel.plot(
                    [1, *speed], [original["perplexity"], *map(axis.at, rows)],
                    color=color, linestyle=style, linewidth=0.8,
                )  # fmt: skip
                axis.mark_beyond(panel, speed, rows, color)
                for x, row in zip(speed, rows, strict=True):
                    panel.errorbar(
                        x, axis.at(row),
                        xerr=[[x - row[f"{timed}_speedup_low"]], [row[f"{timed}_speedup_high"] - x]],
                        color=color, marker=_MARKERS[kind], elinewidth=0.8,
                        markerfacecolor="white" if within_noise(row, original, timed) else color,
                    )  # fmt: skip
        panel.plot([1], [original["perplexity"]], "*", color="black", markersize=13, zorder=3)
        reached = [1.0, *(row[f"{timed}_speedup"] for row in points)]
        margin = 0.1 * (max(reached) - min(reached)) + 0.01
        panel.set(xlabel=f"{timed} speed, times the original's", xlim=(min(reached) - margin, max(reached) + margin))
        axis.set(panel)
    panels[0].set_ylabel("perplexity (lower is better)")
    _legend(figure, setting)
    figure.suptitle(f"{_title(setting)}, {setting['hardware']}", fontsize=9, color="#444444")


def _legend(figure: Figure, setting: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks = zip(setting["strategies"], _LOOKS, strict=False)
    entries: list[Artist] = [Line2D([], [], color="black", marker="*", linestyle="", markersize=11, label="original")]
    entries += [Line2D([], [], color=color, linestyle=style, label=name) for name, (color, style, _) in looks]
    entries += [
        Line2D([], [], color="#666666", marker=_MARKERS[kind], linestyle="", label=_TITLES[kind])
        for kind in setting["sublayers"]
    ]
    entries.append(Line2D([], [], color="#666666", marker="o", linestyle="", markerfacecolor="white",
                          label="within noise"))  # fmt: skip
    entries.append(Patch(color="#cccccc", label="original against itself"))
    figure.legend(handles=entries, loc="outside right upper", frameon=False)


_MOST = 10  # times the original's perplexity: a model beyond that is broken, and by how much nobody needs to see


class _Axis:
    """A logarithmic axis of perplexity that ends where nobody looks; arrows with values show what is beyond."""

    def __init__(self, original: Row, points: list[Row]) -> None:
        values = [row["perplexity"] for row in (original, *points) if row["perplexity"]]
        self.cap = _MOST * original["perplexity"]
        self.low, self.high = min(values) / 1.05, 1.05 * min(max(values), self.cap)
        if max(values) > self.cap:
            self.high = 2 * self.cap  # room for the values
        self.marked: list[tuple[Axes, float]] = []

    def at(self, row: Row) -> float:
        """Where a row is drawn."""
        return min(row["perplexity"], self.cap)

    def mark_beyond(self, panel: Axes, places: list[float], rows: list[Row], color: str) -> None:
        """Write the values of those that are beyond over them, one above the other where several are at one place."""
        for x, row in zip(places, rows, strict=True):
            if row["perplexity"] > self.cap:
                value = f"{row['perplexity']:,.0f}" if row["perplexity"] < 1e5 else f"{row['perplexity']:.0e}"
                value = value.replace("e+0", "e").replace("e+", "e")
                above = 6 + 9 * self.marked.count((panel, x))
                panel.annotate(f"\u2191{value}", (x, self.cap), (0, above), textcoords="offset points", ha="center",
                               fontsize=7.5, color=color)  # fmt: skip
                self.marked.append((panel, x))

    def set(self, panel: Axes) -> None:
        """Limits, and ticks that can be read: 3 to 8 of them."""
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

        panel.set_yscale("log")
        panel.set_ylim(self.low, self.high)
        narrow = self.high < 3 * self.low
        panel.yaxis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_minor_formatter(NullFormatter())


def _title(setting: dict[str, Any]) -> str:
    text = setting["text"]
    names = [printable(name, 60) for name in (setting["source"]["name"], text["name"])]
    return f"{names[0]}: {text['tokens']:,} tokens of {names[1]}, {setting['dtype']}"
