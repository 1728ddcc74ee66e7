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
from export.staging import replace_files
from pruner.errors import MachineError, PruneAttnError, one_line
from pruner.files import expand
from pruner.nemotron_nas.dialect import MODEL_TYPE

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_BEGIN, _END = "<!-- results: prune-attn writes between these two lines -->", "<!-- end of results -->"
_RESULTS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_MODEL_ID = re.compile(r'^model_id = "[^"\n]*"', re.MULTILINE)
_NOT_VALIDATED = "Not validated: accuracy and latency were not measured by prune-attn."


def read_card(directory: Path) -> dict[str, Any]:
    """The metadata of a directory's ``README.md``; empty where there is none that can be read."""
    import yaml

    try:
        text = (directory / record.CARD).read_text("utf-8-sig")
        block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
        found = yaml.safe_load(block[1]) if block else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
    name, commit = plan["source"]["name"], plan["source"].get("hub", {}).get("commit")
    custom = config["model_type"] == MODEL_TYPE
    their_card = read_card(source)
    licence = llama_licence(source, their_card)
    origin = f"[`{name}`](https://huggingface.co/{name}) at commit `{commit[:12]}`" if commit else f"`{name}`"
    how = f"`{plan['strategy']}`" + (f" ({plan['requested']})" if plan["requested"] else "")
    rows = "\n".join(
        f"| {label} | {before[key]:,} | {after[key]:,} |"
        for label, key in (
            ("attention sublayers", "attention_sublayers"),
            ("MLP sublayers", "mlp_sublayers"),
            ("parameters", "parameters"),
            ("bytes of weights", "bytes"),
            ("KV-cache bytes a token", "kv_cache_bytes_per_token"),
        )
    )
    code = (
        "The two `.py` files here are all the custom code there is: transformers' own Llama without the modules that\n"
        "`block_configs` drops."
        if custom
        else "Whole blocks were removed, so this is a plain Llama and needs no custom code."
    )
    attention, mlp = _gone(plan)
    changed, did = (
        ("pruned", "Sublayers were physically removed") if attention or mlp else ("laid out anew", "Laid out")
    )
    return f"""---
{_metadata(plan, their_card, licence, onnx)}
---

# {name.rsplit("/", 1)[-1]}, {changed}

{did} by prune-attn {plan["tool"]["version"]} from
{origin}.
The tensors that are left are the source's{f", converted to {plan['converted_to']}" if plan["converted_to"] else ""}.

- attention removed at layers: {_numbers(attention)}
- MLP removed at layers: {_numbers(mlp)}
- chosen by: {how}, see `pruning_plan.json`

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

{code}

## Limits

- Attention carries what is far back in a text: where some of it is removed, long contexts, copying and retrieval
  suffer first, and multiple-choice scores do not show it. Measure on your own texts.
- It has the limits and biases of `{name}`, and has not been trained since anything was removed.

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


def _numbers(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"


def _strip(plan: dict[str, Any], attention: set[int], mlp: set[int]) -> str:
    return "".join("█░▒·"[(i in attention) + 2 * (i in mlp)] for i in range(plan["model"]["numbered_layers"]))


def _metadata(plan: dict[str, Any], theirs: dict[str, Any], licence: Licence | None, onnx: bool) -> str:
    from huggingface_hub.repocard_data import ModelCardData

    made_from: dict[str, Any] | None = plan
    while made_from and "hub" not in made_from["source"]:  # a local copy of something that came from the Hub?
        made_from = made_from.get("previous")
    carried = {
        key: value
        for key in ("license", "license_name", "license_link", "language")
        if isinstance(value := theirs.get(key), str) or (key == "language" and isinstance(value, list))
    }
    return ModelCardData(
        base_model=made_from["source"]["hub"]["repo_id"] if made_from else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*(["pruned", "attention-pruning"] if any(_gone(plan)) else []), *(["onnx"] if onnx else [])],
        **({"license": licence.key} if licence else {}) | carried,
    ).to_yaml()


def _loading(custom: bool, without: set[str], engine_notes: list[str]) -> str:
    parts = ["`model_id` is this repository's id, or the path of its directory."]
    for engine, snippet in SNIPPETS.items():
        if engine in without:
            continue
        trust = ", trust_remote_code=True" if custom else ""
        parts.append(f"### {engine}\n\n{snippet.replace('TRUST', trust)}")
    return "\n\n".join([*parts, *(f"Note: {note}." for note in engine_notes)])


def _licence(theirs: dict[str, Any], licence: Licence | None, name: str) -> str:
    if licence is not None:
        return (
            f"{licence.notice}\n\nIts terms and its acceptable use policy go on to hold. Whoever passes this model on "
            f"does so with a copy of the licence and with this notice; the name {licence.name_rule}."
        )
    known = theirs.get("license_name") or theirs.get("license")
    if not isinstance(known, str):
        return f"That of `{name}`; its card here named none."
    return f"As `{name}`: {' '.join(known.split())[:80]}."


# -- a card that is there ----------------------------------------------------------------------------------------------


def load_card(directory: Path) -> ModelCard:
    """The directory's card by ``huggingface_hub``'s own class, which checks the metadata. ``PruneAttnError``."""
    from huggingface_hub import ModelCard

    path = directory / record.CARD
    try:
        return ModelCard(path.read_text("utf-8"))
    except FileNotFoundError:
        raise PruneAttnError(f"{path}: is missing; convert again, or write one") from None
    except Exception as error:  # YAML, and whatever its values are not
        reason = one_line(error, 160)
        raise PruneAttnError(f"{path}: its metadata is not what the Hub takes ({reason}); correct it") from None


def update_card(directory: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Put what was measured (``results.json``) into the card: its tables, and ``model-index`` in its metadata.

    All else that is in the card stays as it is, a person's own words too. Raises ``PruneAttnError``.
    """
    from huggingface_hub import EvalResult

    from export.report.for_card import card_section, eval_results

    directory = expand(directory)
    card = load_card(directory)
    section = f"{_BEGIN}\n{card_section(results).strip()}\n{_END}"
    if _RESULTS.search(card.text):
        card.text = _RESULTS.sub(lambda _: section, card.text, count=1)
    else:  # a card of a person's own making
        card.text = f"{card.text.rstrip()}\n\n## Results\n\n{section}\n"
    measured = [EvalResult(**row) for row in eval_results(results)]
    card.data.eval_results = measured or None
    title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    card.data.model_name = (title[1] if title else directory.name) if measured else None
    replace_files(directory, {record.CARD: str(card).encode()})


def name_repository(directory: Path, repo_id: str) -> None:
    """Write the repository's id into the card's snippets, so that they can be pasted from the Hub.

    Where the directory cannot be written to, they stay as they are.
    """
    path = directory / record.CARD
    text = path.read_text("utf-8")
    named = _MODEL_ID.sub(f'model_id = "{repo_id}"', text)
    named = re.sub(r"^hf download \S+ ", f"hf download {repo_id} ", named, flags=re.MULTILINE)
    with suppress(MachineError, PermissionError):
        replace_files(directory, {record.CARD: named.encode()} if named != text else {})
