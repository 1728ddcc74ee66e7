"""The model card (``README.md``) of a pruned directory: metadata for the Hub, and what a reader has to know."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import record
from export.engines import SNIPPETS
from export.licence import Licence, llama_licence
from export.markdown import code, plain
from export.staging import replace_files
from pruner.errors import MachineError, PruneAttnError, one_line, printable
from pruner.files import check_inside, expand, read_bounded
from pruner.hub.source import is_hub_id
from pruner.names import CARD
from pruner.nemotron_nas.dialect import MODEL_TYPE

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_BEGIN, _END = "<!-- results: prune-attn writes between these two lines -->", "<!-- end of results -->"
_RESULTS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_MODEL_ID = re.compile(r'^model_id = "[^"\n]*"', re.MULTILINE)
_NOT_VALIDATED = "Not validated: accuracy and latency were not measured by prune-attn."

_FRONT = re.compile(r"(\s*---\r?\n)(.*?)(\r?\n---[ \t]*(?:\r?\n|$))", re.DOTALL)  # a card's metadata, in YAML
_CARD_BYTES, _FRONT_CHARACTERS = 4 << 20, 1 << 18  # YAML is read at 0.2 MB a second


def read_card(directory: Path) -> dict[str, str | list[str]]:
    """What a directory's ``README.md`` says of licence and language, as it is written there: a text, or texts.

    Empty where there is none that can be read. YAML would make ``false`` of Norwegian and a date of a licence's name.
    """
    import yaml

    try:
        check_inside(directory / CARD, directory)
        block = _FRONT.match(_text(directory / CARD))
        if block is None or len(block[2]) > _FRONT_CHARACTERS:
            return {}
        found = yaml.load(block[2], Loader=yaml.BaseLoader)
    except (OSError, PruneAttnError, yaml.YAMLError, RecursionError):
        return {}
    texts = {key: _texts(found.get(key)) for key in _CARRIED} if isinstance(found, dict) else {}
    return {key: value for key, value in texts.items() if value}


_CARRIED = ("license", "license_name", "license_link", "language")


def _texts(value: Any) -> str | list[str] | None:
    """A text or a list of texts, of lengths that a licence or a language has; ``None`` for anything else."""
    if isinstance(value, list):
        return [text for item in value[:1000] if (text := _text_of(item))]
    return _text_of(value)


def _text_of(value: Any) -> str | None:
    sound = isinstance(value, str) and 0 < len(value.strip()) <= 400 and value.lower() not in ("~", "null")
    return printable(value, 400) if sound else None


def _text(card: Path) -> str:
    """A card's text; ``PruneAttnError`` where it is missing, no regular file, no UTF-8, or larger than any card."""
    try:
        return read_bounded(card, _CARD_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PruneAttnError(f"{card}: is not UTF-8 text; save it as UTF-8") from None


# long: the card is one text, read here as it is written
def model_card(
    plan: dict[str, Any],
    config: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
    source: Path,
    *,
    onnx: bool,
    without: set[str],
    engine_notes: list[str],
) -> bytes:
    """The card of a new output, UTF-8 bytes: the same input gives the same bytes.

    ``plan`` is the record, ``source`` the directory that licence and language are carried from; ``without`` are
    engines of ``SNIPPETS`` that do not load it, and ``engine_notes`` say why, and which others do not.
    """
    name = plan["source"]["name"]
    custom = config["model_type"] == MODEL_TYPE
    their_card = read_card(source)
    licence = llama_licence(source, their_card)
    rows = "\n".join(
        f"| {label} | {before[key]:,} | {after[key]:,} |"
        for label, key in (
            ("attention sublayers", "attention_sublayers"),
            ("MLP sublayers", "mlp_sublayers"),
            ("parameters", "parameters"),
            ("bytes of weights", "bytes"),
            ("KV-cache bytes per token", "kv_cache_bytes_per_token"),
        )
    )
    attention, mlp = _gone(plan)
    custom_code = (
        "The two `.py` files here are all the custom code there is: transformers' own Llama without the modules that\n"
        "`block_configs` drops."
        if custom
        else f"{'Whole blocks were removed, so t' if mlp else 'T'}his is a plain Llama and needs no custom code."
    )
    changed, did = (
        ("pruned", "Sublayers were physically removed") if attention or mlp else ("laid out anew", "Laid out")
    )
    return f"""---
{_metadata(plan, their_card, licence, onnx)}
---

# {plain(name.rsplit("/", 1)[-1])}, {changed}

{did} by prune-attn {plan["tool"]["version"]} from
{_origin(plan)}.
The tensors that are left are the source's{f", converted to {plan['converted_to']}" if plan["converted_to"] else ""}.

- attention removed at layers: {_numbers(attention)}
- MLP removed at layers: {_numbers(mlp)}
- chosen by: {_how(plan)}, see `pruning_plan.json`{_before(plan)}

`{_strip(plan, attention, mlp)}` (█ kept, ░ attention removed, ▒ MLP removed, · both; from layer 0)

| | before | after |
|---|---:|---:|
{rows}

## Results

{_BEGIN}
{_NOT_VALIDATED}
{_END}

## Load it

{_loading(custom, without, engine_notes)}

{custom_code}

## Limits

- Attention carries what is far back in a text: where some of it is removed, long contexts, copying and retrieval
  suffer first, and multiple-choice scores do not show it. Measure on your own texts.
- It has the limits and biases of {code(name)}, and has not been trained since anything was removed.

## Licence

{_licence(their_card, licence, name)}

## Citation

```bibtex
@misc{{tyukin2024attention,
  title  = {{Attention Is All You Need But You Don't Need All Of It For Inference of Large Language Models}},
  author = {{Georgy Tyukin and Gbetondji J-S Dovonon and Jean Kaddour and Pasquale Minervini}},
  year   = {{2024}},
  eprint = {{2407.15516}},
  archivePrefix = {{arXiv}}
}}
```
""".encode()


def _gone(plan: dict[str, Any]) -> tuple[set[int], set[int]]:
    """Layers without attention and without MLP, those that were dropped before included."""
    result, layers = plan["result"], plan["model"]["numbered_layers"]
    if result["num_hidden_layers"] != layers:  # renumbered: nothing is missing from those that are left
        return set(plan["attention"]), set(plan["mlp"])
    return set(range(layers)) - set(result["attention"]), set(range(layers)) - set(result["mlp"])


def _origin(step: dict[str, Any]) -> str:
    name, hub = step["source"]["name"], step["source"].get("hub")
    if not hub or not is_hub_id(hub["repo_id"]):
        return code(name)
    return f"[{code(name)}](https://huggingface.co/{hub['repo_id']}) at commit {code(hub['commit'][:12])}"


def _how(step: dict[str, Any]) -> str:
    return code(step["strategy"], 40) + (f" ({plain(step['requested'], 80)})" if step["requested"] else "")


def _before(plan: dict[str, Any]) -> str:
    """A line for each time that it was pruned before, the first one first."""
    lines = []
    for number, step in enumerate(record.steps(plan)[:-1], 1):
        went = [
            f"{name} at layers {_numbers(set(step[kind]))}"
            for kind, name in (("attention", "attention"), ("mlp", "MLP"))
            if step[kind]
        ]
        lines.append(f"\n- step {number} before, from {_origin(step)}: {' and '.join(went) or 'nothing'} removed, "
                     f"chosen by {_how(step)}")  # fmt: skip
    return "".join(lines)


def _numbers(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"


def _strip(plan: dict[str, Any], attention: set[int], mlp: set[int]) -> str:
    return "".join("█░▒·"[(i in attention) + 2 * (i in mlp)] for i in range(plan["model"]["numbered_layers"]))


def _metadata(plan: dict[str, Any], theirs: dict[str, Any], licence: Licence | None, onnx: bool) -> str:
    from huggingface_hub.repocard_data import ModelCardData

    # a local copy of something that came from the Hub?
    hub = next((step["source"]["hub"] for step in reversed(record.steps(plan)) if step["source"].get("hub")), None)
    return ModelCardData(
        base_model=hub["repo_id"] if hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*(["pruned", "attention-pruning"] if any(_gone(plan)) else []), *(["onnx"] if onnx else [])],
        **({"license": licence.key} if licence else {}) | theirs,
    ).to_yaml()


def _loading(custom: bool, without: set[str], engine_notes: list[str]) -> str:
    parts = ["`model_id` is this repository's id, or the path of its directory."]
    for engine, snippet in SNIPPETS.items():
        if engine in without:
            continue
        trust = ", trust_remote_code=True" if custom else ""
        parts.append(f"### {engine}\n\n{snippet.replace('TRUST', trust)}")
    return "\n\n".join([*parts, *(f"Note: {note}." for note in engine_notes)])


def _licence(theirs: dict[str, str | list[str]], licence: Licence | None, name: str) -> str:
    if licence is not None:
        return (
            f"{licence.notice}\n\nIts terms and its acceptable use policy go on to hold. Whoever passes this model on "
            f"does so with a copy of the licence and with this notice; the name {licence.name_rule}."
        )
    known = theirs.get("license_name") or theirs.get("license")
    if known is None:
        return f"That of {code(name)}; its card here named none."
    return f"As {code(name)}: {plain(known if isinstance(known, str) else ', '.join(known), 80)}."


# -- a card that is there ----------------------------------------------------------------------------------------------


def load_card(directory: Path) -> ModelCard:
    """The directory's card by ``huggingface_hub``'s own class, which checks the metadata. ``PruneAttnError``."""
    path = directory / CARD
    if not os.path.lexists(path):
        raise PruneAttnError(f"{path}: is missing; convert again, or write one")
    return _check_card(_text(path), path)


def _check_card(text: str, path: Path) -> ModelCard:
    from huggingface_hub import ModelCard

    try:
        block = _FRONT.match(text)
        if block is not None and len(block[2]) > _FRONT_CHARACTERS:
            raise ValueError(f"it has more than {_FRONT_CHARACTERS:,} characters")
        return ModelCard(text)
    except Exception as error:  # YAML, and whatever its values are not
        reason = one_line(error, 160)
        raise PruneAttnError(f"{path}: its metadata is not what the Hub takes ({reason}); correct it") from None


def update_card(directory: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Put what was measured (``results.json``) into the card: its tables, and ``model-index`` in its metadata.

    All else that is in the card stays as it is, a person's own words too. Raises ``PruneAttnError``.
    """
    from export.report.for_card import card_section, eval_results

    directory = expand(directory)
    load_card(directory)  # which checks it
    text = _text(directory / CARD)
    block = _FRONT.match(text)
    begin, front, end = block.groups() if block else ("---\n", "", "\n---\n")
    body = text[block.end() :] if block else text
    section = f"{_BEGIN}\n{card_section(results).strip()}\n{_END}"
    if _RESULTS.search(body):
        body = _RESULTS.sub(lambda _: section, body, count=1)
    else:  # a card of a person's own making
        body = f"{body.rstrip()}\n\n## Results\n\n{section}\n"
    title = re.search(r"^# (.+)$", body, re.MULTILINE)
    index = _model_index(title[1].strip() if title else directory.name, eval_results(results))
    front = "\n".join(filter(None, [_MODEL_INDEX.sub("", f"{front}\n").rstrip(), index]))
    card = f"{begin}{front}{end}{body}"
    _check_card(card, directory / CARD)
    replace_files(directory, {CARD: card.encode()})


# with all lines that belong to it; a list may stand at its own depth
_MODEL_INDEX = re.compile(r"^model-index[ \t]*:.*\n(?:(?:[ \t-].*)?\n)*", re.MULTILINE)


def _model_index(name: str, rows: list[dict[str, Any]]) -> str:
    """``model-index`` in YAML, which names the model; empty where nothing was measured."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import ModelCardData

    measured = [EvalResult(**row) for row in rows]
    return ModelCardData(model_name=name, eval_results=measured).to_yaml() if measured else ""


def retrained_card(pruned: Path) -> str:
    """The card of a directory that was trained from ``pruned``: its card, saying so, without what was measured."""
    text = _text(pruned / CARD)
    block = _FRONT.match(text)
    if block:
        front = _MODEL_INDEX.sub("", f"{block[2]}\n").rstrip()
        text = block[1] + front + block[3] + text[block.end() :]
    text = _RESULTS.sub(lambda _: f"{_BEGIN}\n{_NOT_VALIDATED}\n{_END}", text, count=1)
    text = re.sub(r"^The tensors that are left are the source's.*$", _RETRAINED, text, count=1, flags=re.MULTILINE)
    text = text.replace("and has not been trained since anything was removed", "and what its further training adds")
    return text if _RETRAINED in text else f"{text.rstrip()}\n\n{_RETRAINED}\n"


_RETRAINED = "It was trained further afterwards: the weights are not the source's."


def name_repository(directory: Path, repo_id: str) -> None:
    """Write the repository's id into the card's snippets, so that they can be pasted from the Hub.

    Where the directory cannot be written to, they stay as they are.
    """
    path = directory / CARD
    text = _text(path)
    named = _MODEL_ID.sub(f'model_id = "{repo_id}"', text)
    named = re.sub(r"^hf download \S+ ", f"hf download {repo_id} ", named, flags=re.MULTILINE)
    with suppress(MachineError, PermissionError):
        replace_files(directory, {CARD: named.encode()} if named != text else {})
