"""``prune-attn generate``."""

from __future__ import annotations

import sys
from typing import Any

import click
from cloup import argument, command, option, option_group

from export.cli.bars import show_progress
from export.cli.options import HUB, JSON, PATH, QUIET, THREADS, examples
from export.cli.show import print_json, write_text


@command(
    epilog=examples(
        'generate pruned --prompt "It was a dark and stormy night, and"', "generate pruned --chat --prompt - < ask.txt"
    )
)
@argument("directory", type=PATH, help="A pruned directory, or a Hub id.")
@option_group(
    "The text",
    option("--prompt", required=True, help="What to go on from; - reads it from standard input."),
    option("--chat", is_flag=True, help="Put the prompt into the model's chat template, as a user's message."),
    option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="How many at most."),
)
@option_group(
    "The machine",
    option("--backend", type=click.Choice(["onnx", "torch"]), default="onnx", show_default=True),
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    THREADS,
)
@HUB
@QUIET
@JSON
def generate(
    directory: str, as_json: bool, quiet: bool, revision: str | None, cache_dir: str | None, **options: Any
) -> None:
    """Go on from a prompt, greedily, and say how long it took."""
    from export.generate import generate
    from pruner.hub.source import Revision, fetch

    with show_progress(quiet) as progress:  # closed before text comes
        runtime = options["backend"] == "onnx"
        directory = str(fetch(directory, Revision(revision, cache_dir), runtime=runtime, progress=progress))
    if options["prompt"] == "-":
        options["prompt"] = _read_input()
    result = generate(directory, write=None if as_json else write_text, **options)
    if as_json:
        print_json(vars(result))
        return
    click.echo()
    speed = f", {result.tokens_per_second:.1f} tokens/s" if result.tokens_per_second else ""
    click.echo(
        f"{result.backend} on {result.device}: prefill of {result.prompt_tokens} tokens {result.prefill_ms:.1f} ms"
        f"{speed} ({len(result.tokens)} new)",
        err=True,
    )


def _read_input() -> str:
    from pruner.errors import PruneAttnError

    if sys.stdin is None:
        raise PruneAttnError("standard input is closed; give it a text, or the text itself to --prompt")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise PruneAttnError(f"standard input is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
