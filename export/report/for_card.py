"""What the model card takes from ``results.json``: its tables, and the metadata of the Hub."""

from __future__ import annotations

from typing import Any

from export.markdown import plain
from export.report.content import glance_rows, task_rows
from export.report.pieces import Table
from export.report.render import markdown_table
from pruner.errors import printable


def card_section(results: dict[str, Any]) -> str:
    """Markdown: quality and speed against the original, tasks where they were run, and where it was measured."""
    environment = results["environment"]
    device = environment["gpu"]["name"] if environment["gpu"] else environment["cpu"]
    parts = [markdown_table(Table(["", "original", "pruned", "change"], list(glance_rows(results))))]
    for facts in list(results["tasks"].values())[:1]:
        head = ["task", "metric", "shots", "n", "original", "pruned", "ratio"]
        parts.append(markdown_table(Table(head, list(task_rows(facts)))))
    text = next(
        (f"; text {plain(a['text']['name'], 80)}, {a['tokens']:,} tokens" for a in results["accuracy"].values()), ""
    )
    parts.append(
        f"Measured by prune-attn {environment['prune_attn']['version']} on {device}, {results['created'][:10]}{text}; "
        "in brackets 95% bootstrap intervals. The whole report is in `report/`."
    )
    return "\n\n".join(parts) + "\n"


def eval_results(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The pruned model's figures for the card's ``model-index``, of the first backend measured."""
    out = []

    def add(dataset: str, metric: str, name: str, value: float) -> None:
        out.append(
            {
                "task_type": "text-generation", "task_name": "Text generation", "dataset_type": dataset,
                "dataset_name": dataset, "metric_type": metric, "metric_name": name, "metric_value": round(value, 6),
            }
        )  # fmt: skip

    for facts in list(results["accuracy"].values())[:1]:
        text = printable(facts["text"]["name"], 80)
        add(text, "perplexity", f"perplexity, window {facts['window']}, stride {facts['stride']}",
            facts["perplexity"]["pruned"]["value"])  # fmt: skip
        add(text, "agreement", "most likely token the same as the original's", facts["agreement"]["value"])
    for facts in list(results["tasks"].values())[:1]:
        for task, row in facts["pruned"]["tasks"].items():
            shots = "" if row.get("shots") is None else f", {row['shots']}-shot"
            add(printable(task, 80), printable(row["metric"], 40), f"{row['metric']}{shots}", row["value"])
    return out
