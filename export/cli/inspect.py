"""``prune-attn inspect``."""

from __future__ import annotations

from typing import Any

from cloup import argument, command

from export.cli.options import HUB, JSON, PATH, examples
from export.cli.show import describe_sublayers, echo, make_table, print_json, sample_rows
from pruner.files import expand
from pruner.progress import format_bytes


@command(epilog=examples("inspect Llama-2-13b-hf", "inspect meta-llama/Llama-2-7b-hf --json"))
@argument("checkpoint", type=PATH, help="A directory, or a Hub id of which no weights are fetched.")
@HUB
@JSON
def inspect(checkpoint: str, as_json: bool, **options: Any) -> None:
    """Show a checkpoint's sublayers and sizes, and what dropping some would save."""
    from pruner.hub.source import Revision, open_source
    from pruner.summary import inspect

    facts = inspect(open_source(checkpoint, Revision(**options)))
    if not expand(checkpoint).exists():
        facts["path"] = checkpoint  # the Hub id, not the cache
    if as_json:
        print_json(facts)
        return
    table = make_table("", "")
    shards = facts["shards"]
    rows = [
        ("attention sublayers", describe_sublayers(facts["attention_layers"], facts["numbered_layers"])),
        ("MLP sublayers", describe_sublayers(facts["mlp_layers"], facts["numbered_layers"])),
        ("heads", "{num_attention_heads} over {num_key_value_heads} key/value, {head_dim} wide".format(**facts)),
        ("hidden, intermediate", "{hidden_size:,}, {intermediate_size:,}".format(**facts)),
        ("vocabulary", f"{facts['vocab_size']:,}" + (", embeddings tied" if facts["tied_embeddings"] else "")),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", format_bytes(facts["bytes"])),
        ("dtype", ", ".join(facts["dtypes"])),
        ("shards", f"{len(shards)}" + (f" ({shards[0]['file']})" if len(shards) == 1 else "")),
        ("KV cache per token", format_bytes(facts["kv_cache_bytes_per_token"])),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    saved = make_table("dropping", "of", "parameters", "weights", "KV cache per token")
    for kind, name in (("attention", "attention"), ("mlp", "MLP"), ("block", "blocks")):
        of = (
            len(facts["attention_layers" if kind == "attention" else "mlp_layers"])
            if kind != "block"
            else facts["layers"]
        )
        for saving in sample_rows(facts["savings"][kind], facts["original_layers"]):
            cache = saving["kv_cache_bytes_per_token"]
            saved.add_row(
                f"{saving['drop']} {name}",
                str(of),
                f"-{saving['parameters']:,}",
                f"-{format_bytes(saving['bytes'])}",
                f"-{format_bytes(cache)}" if cache else "0",
            )
    echo(str(facts["path"]), table, saved)
