"""``prune-attn sweep``."""

from __future__ import annotations

from typing import Any

import click

from export.cli.bars import show_progress
from export.cli.options import JSON, PATH, QUIET, TEXT_FIELD, TEXTS, THREADS
from export.cli.show import echo, make_table, print_json


@click.command()
@click.argument("source", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder for the table, the plots and the plans.")
@click.option("--text", required=True, **TEXTS, help="Test text, UTF-8 or JSON lines: perplexity is measured on it.")
@click.option("--calibration", **TEXTS, help="Another, by which similarity, search and exhaustive choose; or general.")
@TEXT_FIELD
@click.option("--sublayer", default="attention", show_default=True, metavar="A,B", help="Of attention, mlp, block.")
@click.option("--fractions", default="10%,25%,33%,50%", show_default=True, metavar="P%,N", help="How many go.")
@click.option(
    "--strategy",
    metavar="A,B",
    help="Of last, keep-last, similarity, search, exhaustive.  [default: the first four; two without --calibration]",
)
@click.option("--window", type=click.IntRange(2), help="Tokens a test window.  [default: the context, at most 2048]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N test windows.  [default: all]")
@click.option("--samples", type=click.IntRange(1), help="Calibration samples.  [default: as select has it]")
@click.option("--length", type=click.IntRange(2), help="Tokens a calibration sample.  [default: as select has it]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of calibration samples and search.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@THREADS
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Compute in this.  [default: the checkpoint's on CUDA, float32 on the CPU]",
)
@click.option(
    "--rounds", type=click.IntRange(0), default=10, show_default=True, help="Times that speed is measured; 0: not."
)
@click.option("--overwrite", is_flag=True, help="Replace an OUTPUT that sweep wrote.")
@QUIET
@JSON
def sweep(source: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure what each fraction of each sublayer costs and gains: a table and two plots.

    Interrupted, it keeps what is finished in OUTPUT.partial; the same command goes on from there.
    """
    from export.sweep import sweep

    with show_progress(quiet) as progress:
        result = sweep(source, output, progress=progress, **options)
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
