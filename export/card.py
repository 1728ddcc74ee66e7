"""The model card (``README.md``) of a pruned directory."""

from __future__ import annotations

from typing import Any

from pruner.nemotron_nas.dialect import MODEL_TYPE


def _numbers(layers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"


def model_card(plan: dict[str, Any], config: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> bytes:
    """Markdown with the Hub's metadata: what was removed, how it was chosen, how to load it. UTF-8 bytes."""
    source = plan["source"]["name"]
    custom = config["model_type"] == MODEL_TYPE
    trust = ", trust_remote_code=True" if custom else ""
    code = (
        "The two `.py` files here are all the custom code there is: transformers' own Llama without the modules that "
        "`block_configs` drops.\n"
        if custom
        else "Whole blocks were removed, so this is a plain Llama and needs no custom code.\n"
    )
    base = f"base_model: {source}\n" if source.count("/") == 1 else ""
    strip = "".join(
        "█" if i not in plan["attention"] and i not in plan["mlp"] else "░" if i in plan["attention"] else "▒"
        for i in range(plan["model"]["numbered_layers"])
    )
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
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- pruned
- attention-pruning
---

# {source.rsplit("/", 1)[-1]}, pruned

Sublayers of `{source}` were physically removed by prune-attn {plan["tool"]["version"]}; the tensors that are left are
the source's. Accuracy and latency: not validated.

- attention removed at layers: {_numbers(plan["attention"])}
- MLP removed at layers: {_numbers(plan["mlp"])}
- chosen by: `{plan["strategy"]}`{f" ({plan['requested']})" if plan["requested"] else ""}, see `pruning_plan.json`

`{strip}` (█ kept, ░ attention removed, ▒ MLP removed; from layer 0)

| | before | after |
|---|---:|---:|
{rows}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
```

{code}
Licence and use policy are the source's.

Method: Tyukin et al., *Attention Is All You Need But You Don't Need All Of It For Inference of Large Language Models*,
2024, [arXiv 2407.15516](https://arxiv.org/abs/2407.15516).
""".encode()
