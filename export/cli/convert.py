"""``prune-attn convert``."""

from __future__ import annotations

import os
import shlex
from functools import partial
from typing import TYPE_CHECKING, Any

from cloup import argument, command, option, option_group

from export.cli.bars import show_progress
from export.cli.options import ALLOW, CHOOSING, DTYPE, HUB, JSON, PATH, QUIET, SUBLAYER, TEXTS, examples
from export.cli.requests import take_calibration, take_request, take_revision
from export.cli.show import echo, make_table, print_json, show_push
from export.cli.validate import run_validation
from pruner.errors import PruneAttnError
from pruner.progress import format_bytes, keeping

if TYPE_CHECKING:
    from export.convert import Conversion
    from pruner.hub.source import Revision


@command(
    epilog=examples(
        "convert Llama-2-13b-hf pruned --drop 33% --text general",
        "convert meta-llama/Llama-2-7b-hf pruned --plan plan.json --push user/llama-2-7b-pruned",
    )
)
@argument("source", type=PATH, help="A Llama checkpoint: a directory, or a Hub id. It is never touched.")
@argument("output", type=PATH, help="A new directory. It appears whole or not at all.")
@option_group(
    "What to drop",
    option("--drop", metavar="N|P%", help="How many sublayers: a count, or a percentage of the original's."),
    option("--layers", metavar="A-B,C", help="Drop these layers, numbered from 0 as they are in SOURCE."),
    option("--plan", type=PATH, help="Drop what a saved plan says (ours, EvoPress's or LLM-Drop's)."),
    option("--sublayer", type=SUBLAYER, help="What to drop.  [default: attention]"),
    *ALLOW,
)
@CHOOSING
@option_group(
    "How to write",
    option("--dtype", type=DTYPE, help="Convert the weights.  [default: as they are]"),
    option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest weights file."),
    option("--onnx/--no-onnx", default=True, help="Write model.onnx and genai_config.json too.  [default: do]"),
    option("--overwrite", is_flag=True, help="Replace OUTPUT where prune-attn wrote it."),
    option("--dry-run", is_flag=True, help="Check everything and show the result; write nothing."),
)
@option_group(
    "Afterwards",
    option("--validate", "then_validate", is_flag=True, help="Measure OUTPUT against SOURCE (briefly on a CPU)."),
    option("--validation-text", **TEXTS, help="Text for --validate to measure on. Without it: no accuracy."),
    option("--push", metavar="OWNER/NAME", help="Then push OUTPUT to this Hub repository."),
)
@HUB
@QUIET
@JSON
def convert(
    source: str,
    output: str,
    as_json: bool,
    quiet: bool,
    then_validate: bool,
    validation_text: list[str] | None,
    **options: Any,
) -> None:
    """Write SOURCE, a directory or a Hub id, to OUTPUT with sublayers physically removed."""
    from export.convert import convert
    from export.layout import WriteOptions
    from export.onnx import GraphOptions

    field = options["text_field"]
    _check_validation(then_validate, validation_text, field, as_json, options)
    threads = options["threads"]
    if then_validate and options["text"] is None:  # these are for the measuring alone
        del options["threads"]
        if validation_text:
            del options["text_field"]
    hub, dry_run = take_revision(options), options.pop("dry_run")
    calibration = take_calibration(options, options["strategy"])
    drop = take_request(options, calibration is not None)
    write = WriteOptions(graph=GraphOptions() if options.pop("onnx") else None, **options)
    with show_progress(quiet) as progress:
        result = convert(
            source, output, drop, calibration=calibration, options=write, hub=hub, dry_run=dry_run, progress=progress
        )
    if as_json:
        print_json(result.to_json())
        return
    _show(result, source, output, hub)
    for pushed in result.pushed:
        show_push(pushed)
    if then_validate:
        from export.validate.options import Compute
        from export.validate.run import brief, validate

        with keeping(lambda: f"{output} is whole"):
            accuracy, latency = brief(validation_text, field)
            compute = Compute(threads=threads)
            measure = partial(validate, result.source, output, accuracy=accuracy, latency=latency, compute=compute)
            run_validation(measure, False, quiet)


def _check_validation(
    then_validate: bool, text: list[str] | None, field: str | None, as_json: bool, options: dict[str, Any]
) -> None:
    if then_validate and (as_json or options["dry_run"]):
        raise PruneAttnError("--validate goes with neither --json nor --dry-run; run prune-attn validate afterwards")
    if text is not None and not then_validate:
        raise PruneAttnError("--validation-text goes with --validate; add it, or leave both out")
    if text is not None:  # known before hours of work
        check_validation_text(text, options["text"], field)


def _show(result: Conversion, source: str, output: str, hub: Revision) -> None:
    before, after = result.before, result.after
    table = make_table("", "before", "after", "")
    for label, key, show in (
        ("attention sublayers", "attention_sublayers", str),
        ("MLP sublayers", "mlp_sublayers", str),
        ("parameters", "parameters", "{:,}".format),
        ("weights", "bytes", format_bytes),
        ("KV cache per token", "kv_cache_bytes_per_token", format_bytes),
    ):
        change = f"{100 * (after[key] / before[key] - 1):+.1f}%" if after[key] != before[key] else ""
        table.add_row(label, show(before[key]), show(after[key]), change)
        dropped = [
            f"{name} at {', '.join(map(str, layers))}"
            for name, layers in (("attention", result.plan.attention), ("MLP", result.plan.mlp))
            if layers
        ]
    verb = "would drop" if result.dry_run else "dropped"
    following = (
        "nothing was written; run it without --dry-run"
        if result.dry_run
        else f"next: prune-attn verify {shlex.quote(output)} --against {shlex.quote(source)}"
        + (f" --revision {shlex.quote(hub.revision)}" if hub.revision else "")
        + (f" --cache-dir {shlex.quote(os.fspath(hub.cache_dir))}" if hub.cache_dir else "")
    )
    echo(f"{verb} {'; '.join(dropped)}", table, *(f"note: {note}" for note in result.notes), following)


def check_validation_text(measured: list[str], chosen: list[str] | None, field: str | None) -> None:
    """``PruneAttnError`` where it cannot be read, or is what the sublayers are chosen by."""
    from pruner.text import check_apart, read_contents

    read_contents(measured, field)
    if chosen is not None:
        check_apart(measured, chosen, field, field)
