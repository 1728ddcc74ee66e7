"""Every link and every path that the pages and the code name leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("docs", "export", "pruner", "scripts", "tests")
FILES = [
    path.relative_to(ROOT)
    for path in sorted((*ROOT.glob("*.md"), *(path for room in ROOMS for path in (ROOT / room).rglob("*"))))
    if path.is_file() and path.suffix in ("", ".py", ".md", ".json") and "data" not in path.parts
]
PAGES = [path for path in FILES if path.suffix == ".md"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
NAMED = re.compile(r"(?<![\w/.])docs/[\w/.-]+\.(?:md|json|png)\b")  # not docs/ of another repository or package
OTHERS = ("pruner/texts", "tests", "scripts/make_general.py", "export/onnx/graph.py")  # they name other projects' docs


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_somewhere(page):
    for link in LINK.findall((ROOT / page).read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_that_are_named_exist():
    for path in FILES:
        if not str(path).startswith(OTHERS):
            for name in NAMED.findall((ROOT / path).read_text()):
                assert (ROOT / name).is_file(), f"{path}: {name}"


def test_docs_have_three_rooms():
    assert {path.name for path in (ROOT / "docs").iterdir()} == {"guide", "reference", "notes"}


def test_every_verb_is_on_the_page_of_the_command_line():
    from export.cli.main import cli

    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    assert set(re.findall(r"^\| `(\w+)", page, re.MULTILINE)) == set(cli.commands)
