"""``prune-attn sweep``."""

from __future__ import annotations

from typing import Any

import click
from cloup import argument, command, option, option_group

from export.cli.bars import show_progress
from export.cli.options import DTYPE, JSON, PATH, QUIET, TEXT_FIELD, TEXTS, THREADS, examples
from export.cli.requests import take
from export.cli.show import echo, make_table, print_json
from pruner.select.request import Calibration


@command(
    epilog=examples(
        "sweep Llama-2-7b-hf -o sweep --text test.txt --calibration general --device cuda",
        "sweep Llama-2-7b-hf -o sweep --text test.txt --sublayer attention,mlp,block --rounds 0",
    )
)
@argument("source", type=PATH, help="A Llama checkpoint: a directory, or a Hub id, which is fetched.")
@option("-o", "--output", type=PATH, required=True, help="Folder for the table, the plots and the plans.")
@option_group(
    "What to drop",
    option("--sublayer", default="attention", show_default=True, metavar="A,B", help="Of attention, mlp, block."),
    option("--fractions", default="10%,25%,33%,50%", show_default=True, metavar="P%,N", help="How many go."),
    option(
        "--strategy",
        metavar="A,B",
        help="Of last, keep-last, similarity, search, exhaustive.  "
        "[default: the first four; two without --calibration]",
    ),
)
@option_group(
    "What to choose by",
    option("--calibration", **TEXTS, help="A text for similarity, search and exhaustive; or general."),
    TEXT_FIELD,
    option("--samples", type=click.IntRange(1), help="Calibration samples.  [default: as select has it]"),
    option("--length", type=click.IntRange(2), help="Tokens a calibration sample.  [default: as select has it]"),
    option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of samples and search."),
)
@option_group(
    "What to measure",
    option("--text", required=True, **TEXTS, help="Test text, UTF-8 or JSON lines: perplexity is measured on it."),
    option("--window", type=click.IntRange(2), help="Tokens a test window.  [default: the context, at most 2048]"),
    option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N test windows.  [default: all]"),
    option(
        "--rounds", type=click.IntRange(0), default=10, show_default=True, help="Times that speed is measured; 0: not."
    ),
)
@option_group(
    "The machine",
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    option("--dtype", type=DTYPE, help="Compute in this.  [default: the checkpoint's on CUDA, float32 on the CPU]"),
    THREADS,
)
@option("--overwrite", is_flag=True, help="Replace an OUTPUT that sweep wrote.")
@QUIET
@JSON
def sweep(source: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure what each fraction of each sublayer costs and gains: a table and two plots.

    Interrupted, it keeps what is finished in OUTPUT.partial; the same command goes on from there.
    """
    from export.sweep.job import sweep
    from export.sweep.options import Machine, Measure, Points

    field, by = options["text_field"], options["calibration"]
    measure = Measure(options["text"], field, **take(options, ("window", "limit", "rounds")))
    points = Points(options["fractions"], options["sublayer"], options["strategy"])
    calibration = by and Calibration(by, text_field=field, **take(options, ("samples", "length", "seed")))
    machine = Machine(**take(options, ("device", "dtype", "threads")))
    with show_progress(quiet) as progress:
        result = sweep(
            source, output, measure, points=points, calibration=calibration, machine=machine,
            overwrite=options["overwrite"], progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(result.to_json())
        return
    table = make_table("dropped", "by", "perplexity", "", "decode", "prefill")
    for row in (result.original, *result.points):
        what = f"{row['dropped']} of {row['of']} {row['sublayer']}" if row["sublayer"] else "nothing"
        cost = [f"{row['perplexity']:,.2f}", f"x{row['perplexity_ratio']:.2f}"] if row["perplexity"] else ["-", ""]
        speed = [f"x{row[s]:.2f}" if row[s] else "-" for s in ("decode_speedup", "prefill_speedup")]
        table.add_row(what, row["strategy"], *cost, *speed)
    echo(table, f"{result.path}: sweep.md, sweep.csv, sweep.json, the plots, and plans for convert --plan")
