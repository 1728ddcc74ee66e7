"""Results side by side: a page that fits a screen and a telephone, whatever the models are called."""

from __future__ import annotations

from html.parser import HTMLParser

from export.report.compare import compare_rows, compare_table
from export.report.pieces import Section
from export.report.render import render_html

NAME = "x/<script>alert(1)</script>`$a$\x1b[31m" + 5000 * "y"


def results(name: str) -> dict[str, object]:
    estimate = {"value": 1.5, "low": 1.25, "high": 1.75}
    accuracy = {"perplexity": {k: {"value": 9.0} for k in ("original", "pruned")} | {"ratio": estimate}}
    return {
        "models": {"original": {"bytes": 2}, "pruned": {"name": name, "bytes": 1}},
        "pruning": {"attention": [1], "mlp": []},
        "same_function": None,
        "tasks": {},
        "accuracy": {"torch": accuracy | {"agreement": estimate}},
        "latency": {"onnx": {"speedup": {"decode": estimate}}},
    }


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tables, self.heads, self.cells, self.tags = [], [], [], set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "table":
            self.tables.append(dict(attrs).get("class"))
        if tag == "td":
            self.heads.append(dict(attrs).get("data-head"))
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_each_cell_knows_its_column_so_that_rows_can_be_stacked():
    table = compare_table(compare_rows([results(NAME), results("plain")]))
    page = Cells()
    page.feed(render_html("Results compared", [Section("2 results", [], [table])], {}, {}))
    assert page.tables == ["stacked"]
    assert page.heads == table.head * 2
    assert "script" not in page.tags
    label, increase = page.cells[0], page.cells[table.head.index("increase")]
    assert label.startswith("script>")
    assert len(label) <= 40
    assert label.isprintable()
    assert increase == "+50.0% [+25.0%, +75.0%]"
