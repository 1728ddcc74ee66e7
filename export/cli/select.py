"""``prune-attn select``."""

from __future__ import annotations

import shlex
from typing import Any

from cloup import argument, command, option, option_group

from export.cli.bars import show_progress
from export.cli.options import ALLOW, CHOOSING, HUB, JSON, PATH, QUIET, SUBLAYER, examples
from export.cli.requests import take_calibration, take_drop, take_revision
from export.cli.show import echo, make_table, print_json


@command(
    epilog=examples(
        "select Llama-2-13b-hf --drop 33% --text general --device cuda -o plan.json",
        "select Llama-2-13b-hf --drop 50% --text mine.jsonl --strategy similarity",
    )
)
@argument("source", type=PATH, help="A Llama checkpoint: a directory, or a Hub id, which is fetched.")
@option_group(
    "What to drop",
    option("--drop", metavar="N|P%", required=True, help="How many: a count, or a percentage of the original's."),
    option("--sublayer", type=SUBLAYER, default="attention", show_default=True),
    *ALLOW,
)
@CHOOSING
@option_group(
    "The plan",
    option("-o", "--output", type=PATH, default="plan.json", show_default=True, help="Where the plan goes."),
    option("--overwrite", is_flag=True, help="Replace the plan that lies there."),
)
@HUB
@QUIET
@JSON
def select(source: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Choose what to drop; save the plan, which serves every fraction (convert --plan PLAN --drop 25%)."""
    from export.select import select

    hub, overwrite = take_revision(options), options.pop("overwrite")
    calibration = take_calibration(options, options["strategy"])
    drop = take_drop(options, calibration is not None)
    with show_progress(quiet) as progress:
        result = select(
            source, drop, calibration=calibration, output=output, overwrite=overwrite, hub=hub, progress=progress
        )
    if as_json:
        print_json(result.to_json())
        return
    plan, facts = result.plan, result.plan.selection or {}
    count = len({*plan.attention, *plan.mlp})
    measure = facts.get("objective", "")
    columns = [name for name in (measure, "perplexity") if facts and (name == measure or "perplexity" in facts)]
    table = make_table("", "layer", *columns)
    for i, layer in enumerate(plan.order or ()):
        shown = [_shown(facts["scores"][i], 4)] if columns else []
        shown += [_shown(facts["perplexity"][i], 2)] if "perplexity" in facts else []
        table.add_row(f"{i + 1}{' <' if i + 1 == count else ''}", str(layer), *shown)
    lines = [f"{plan.sublayer} by {plan.strategy}, in the order in which they go; the first {count} (<) are asked for"]
    if "perplexity" in facts:
        lines[0] += (
            f"; {measure} and perplexity with all up to there dropped (none: {facts['original_perplexity']:.2f})"
        )
    after = [
        f"of {n}, better than the first {n}: {', '.join(map(str, layers))}" for n, layers in (plan.sets or {}).items()
    ]
    if result.cost:
        after.append(
            "{seconds:.1f} s, {layer_evaluations:,.0f} layer evaluations, {tokens_per_second:,.0f} tokens/s".format(
                **result.cost
            )
        )
    where = shlex.quote(str(result.path))
    after += [f"note: {note}" for note in result.notes]
    after.append(f"next: prune-attn convert {shlex.quote(source)} OUTPUT --plan {where}")
    echo(*lines, table, *after)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"  # none: no number came out
