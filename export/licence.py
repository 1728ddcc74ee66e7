"""Meta's Llama licences, as far as they ask something of whoever passes a derivative on: notice, copy, name.

Sources: the licence texts' section 1.b (Llama 2, July 18, 2023: notice and copy; Llama 3 and later: the name too).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pruner.files import open_regular

NOTICE = "NOTICE.txt"


@dataclass(frozen=True)
class Licence:
    """``key`` is the Hub's ``license``, ``family`` how the licence calls the model, ``notice`` what it wants said."""

    key: str
    family: str
    notice: str
    name: re.Pattern[str]
    name_rule: str


def _licence(version: str) -> Licence:
    if version == "2":
        notice = "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc."
        name, rule = r"llama[-_. ]?2(?!\d)", "should say that it derives from Llama 2, such as llama-2-7b-attn33"
    else:
        meta = "Meta " if version == "3" else ""
        what = f"{meta}Llama {version}"
        notice = f"{what} is licensed under the {what} Community License, Copyright © Meta Platforms, Inc."
        begin = "Llama 3" if version == "3" else "Llama"
        name, rule = "^" + begin.replace(" ", "[-_. ]?"), f'must begin with "{begin}": the licence says so'
    key = f"llama{version}"
    return Licence(key, f"Llama {version}", f"{notice} All Rights Reserved.", re.compile(name, re.IGNORECASE), rule)


_LICENCES = {version: _licence(version) for version in ("2", "3", "3.1", "3.2", "3.3")}
_NAMED = re.compile(r"\bllama[-_ ]?(2|3(?:\.[123])?)(?![.\d])", re.IGNORECASE)
_TEXT = re.compile(r"\bLLAMA (2|3(?:\.[123])?) COMMUNITY LICENSE", re.IGNORECASE)


def llama_licence(directory: Path, card: Mapping[str, str | list[str]]) -> Licence | None:
    """Which of Meta's licences a directory is under, by what its card says, or else by the licence text in it."""
    named = [*_listed(card.get("license")), *_listed(card.get("license_name"))]
    match = next(filter(None, map(_NAMED.match, named)), None)
    if match is None and card.get("license", "other") == "other":
        for file in licence_files(directory):
            with open_regular(file) as text:
                match = match or _TEXT.search(text.read(4096).decode("utf-8", "replace"))
    return _LICENCES[match[1]] if match else None


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def licence_files(directory: Path) -> list[Path]:
    """The licence texts in a directory."""
    return sorted(f for f in directory.iterdir() if re.match(r"(?i)licen[sc]e|.*_license", f.name) and f.is_file())


def licence_notes(licence: Licence | None, directory: Path, repository: str | None = None) -> list[str]:
    """What the licence asks for and is not done: a copy of itself, and a name, where ``repository`` breaks its rule."""
    if licence is None:
        return []
    notes = []
    if not licence_files(directory):
        notes.append(
            f"the {licence.family} licence wants a copy of itself to go along and there is none: put it, as "
            "LICENSE.txt, beside the source's weights and convert again"
        )
    if repository is not None and not licence.name.search(repository.rsplit("/", 1)[-1]):
        notes.append(f"the repository's name {licence.name_rule}")
    return notes
