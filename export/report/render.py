"""The report as Markdown and as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.markdown import plain
from export.report import pieces, plots
from pruner import __version__
from pruner.errors import printable

_MOST = 4000  # characters of a paragraph or a cell; a cell lists the hashes of every shard


def render_markdown(title: str, sections: list[pieces.Section], captions: dict[str, str]) -> str:
    parts = [f"# {plain(title)}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [plain(text, _MOST) for text in section.text]
        parts += [markdown_table(table) for table in section.tables]
        parts += [f"![{captions[name]}]({name}.png)" for name in section.plots if name in captions]
    return "\n\n".join(parts) + f"\n\nWritten by prune-attn {__version__}; every figure is in `results.json`.\n"


def markdown_table(table: pieces.Table) -> str:
    """With its caption above."""
    columns = [i for i, _ in enumerate(table.head) if table.head[i] or any(row[i] for row in table.rows)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(plain(cells[i], _MOST) for i in columns) + " |"

    lines = [line(table.head), "|" + "|".join("---" if i == 0 else "---:" for i in columns) + "|"]
    lines += [line(row) for row in table.rows]
    return (f"{table.caption}:\n\n" if table.caption else "") + "\n".join(lines)


def render_html(title: str, sections: list[pieces.Section], figures: dict[str, Any], captions: dict[str, str]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, _MOST) if type(value) is str else value,
    )
    drawn = {name: plots.svg(figures[name], name) for name in captions}
    page = environment.get_template("report.html.j2")
    return page.render(title=title, sections=sections, drawn=drawn, captions=captions, version=__version__)
