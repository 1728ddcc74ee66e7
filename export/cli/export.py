"""``prune-attn export``."""

from __future__ import annotations

import shlex
from typing import Any

from cloup import argument, command, option, option_group

from export.cli.bars import show_progress
from export.cli.options import DTYPE, HUB, JSON, PATH, QUIET, examples, given, takes_only
from export.cli.requests import take, take_revision
from export.cli.show import echo, print_json, say
from pruner.errors import PruneAttnError
from pruner.progress import format_bytes


@command(epilog=examples("export pruned --last-token-logits", "export Llama-2-7b-hf llama-2-7b-onnx --dtype float16"))
@argument("directory", type=PATH, help="What convert or export wrote; with an OUTPUT any Llama, or a Hub id.")
@argument("output", type=PATH, required=False, help="A new directory for the weights and the graph.")
@option_group(
    "The graph",
    option(
        "--last-token-logits/--all-logits",
        default=None,
        help="Logits of each row's last token only, or of all.  [default: as model.onnx has it, else all]",
    ),
    option("--context", type=int, metavar="N", help="Tokens.  [default: as model.onnx has it, else the model's own]"),
    option("--accept-changes", is_flag=True, help="Shards were changed since the last export, and that was meant."),
)
@option_group(
    "Into an OUTPUT",
    option("--dtype", type=DTYPE, help="Convert the weights."),
    option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest weights file there."),
    option("--overwrite", is_flag=True, help="Replace OUTPUT where prune-attn wrote it; replace FILE."),
)
@option("--gguf", type=PATH, metavar="FILE", help="Write a GGUF file for llama.cpp, and nothing else.")
@HUB
@QUIET
@JSON
def export(directory: str, output: str | None, as_json: bool, quiet: bool, gguf: str | None, **options: Any) -> None:
    """Write model.onnx and genai_config.json: in place, or for any Llama into OUTPUT."""
    if gguf is not None:
        from export.gguf import write_gguf

        takes_only("--gguf FILE", "directory", "gguf", "overwrite", "as_json")
        with show_progress(quiet) as progress:
            written = write_gguf(directory, gguf, overwrite=options["overwrite"], progress=progress)
        if as_json:
            print_json(written)
        else:
            say(f"{gguf}: {format_bytes(written['bytes'])}; next: llama-completion -m {shlex.quote(gguf)}")
        return
    from export.deliver import export
    from export.layout import WriteOptions

    hub, writing = take_revision(options), take(options, ("dtype", "max_shard_size", "overwrite"))
    for name in filter(given, writing if output is None else ()):
        option = f"--{name.replace('_', '-')}"
        raise PruneAttnError(f"{option} belongs to an export into an OUTPUT; name one, or leave it out")
    write = None if output is None else WriteOptions(**writing)
    with show_progress(quiet) as progress:
        result = export(directory, output, options=write, hub=hub, progress=progress, **options)
    if as_json:
        print_json(result.to_json())
        return
    from pruner.text import has_tokenizer

    where = shlex.quote(str(result.path))
    following = f'prune-attn generate {where} --prompt "Once upon a time"'
    if not has_tokenizer(result.path):
        following = f"copy the original's tokenizer files into {where}; nothing generates text without them"
    packed = "" if result.packed == result.attention else f", {result.attention - result.packed} with q, k, v apart"
    echo(
        f"{result.path}: model.onnx ({format_bytes(result.graph_bytes)} over the .safetensors bytes) and "
        f"genai_config.json, {result.attention} attentions{packed}, context {result.context}",
        *(f"note: {note}" for note in result.notes),
        f"next: {following}",
    )
