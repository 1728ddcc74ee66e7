"""Limits that a pruned model must keep, each held against the measured value of every backend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pruner.errors import PruneAttnError


@dataclass(frozen=True)
class Limits:
    """Fractions: 0.25 is 25%. ``None``: no limit."""

    max_perplexity_increase: float | None = None
    min_agreement: float | None = None
    min_task_average_ratio: float | None = None
    min_decode_speedup: float | None = None

    @classmethod
    def parse(cls, *values: str | float | None) -> Limits:
        """The four limits in the order above, each a number or a percentage."""
        return cls(*(_fraction(name, value) for name, value in zip(cls.__annotations__, values, strict=True)))

    def __post_init__(self) -> None:
        if self.min_agreement is not None and self.min_agreement > 1:
            raise PruneAttnError(f"--min-agreement {self.min_agreement:g} is more than all; write for example 80%")

    def need(self, accuracy: bool, tasks: bool, latency: bool) -> None:
        """Raise ``PruneAttnError`` for a limit whose value this run would not measure."""
        for name, part, there in (
            ("max_perplexity_increase", "--text", accuracy),
            ("min_agreement", "--text", accuracy),
            ("min_task_average_ratio", "--tasks", tasks),
            ("min_decode_speedup", "latency in --only", latency),
        ):
            if getattr(self, name) is not None and not there:
                raise PruneAttnError(f"{_option(name)} limits what is not measured; add {part}")


def check(limits: Limits, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each limit with each backend's measured value: name, backend, limit, measured, ok, and a line that says it."""
    gates = []
    for name, backend, measured in _measured(results):
        limit = getattr(limits, name)
        if limit is None:
            continue
        if measured is None:  # a limit without a value must not pass
            line = f"{_option(name)}, {backend}: nothing was measured that it could be held against"
            gates.append(
                {"name": name, "backend": backend, "limit": limit, "measured": None, "ok": False, "line": line}
            )
            continue
        ok = measured <= limit if name.startswith("max") else measured >= limit
        shown = [f"{x:+.2%}" if "increase" in name else f"{x:.4f}" for x in (measured, limit)]
        relation = "keeps" if ok else "is over" if name.startswith("max") else "is under"
        gates.append(
            {
                "name": name, "backend": backend, "limit": limit, "measured": measured, "ok": ok,
                "line": f"{_option(name)}, {backend}: {shown[0]} {relation} the limit of {shown[1]}",
            }
        )  # fmt: skip
    return gates


def _measured(results: dict[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    for backend, facts in results["accuracy"].items():
        yield "max_perplexity_increase", backend, facts["perplexity"]["ratio"]["value"] - 1
        yield "min_agreement", backend, facts["agreement"]["value"]
    for backend, facts in results["tasks"].items():
        yield "min_task_average_ratio", backend, facts["average_ratio"]
    for backend, facts in results["latency"].items():
        if backend != "torch-compiled":  # stands beside
            yield "min_decode_speedup", backend, facts["speedup"]["decode"]["value"]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fraction(name: str, value: str | float | None) -> float | None:
    if value is None or isinstance(value, (int, float)):
        return value
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)\s*(%?)\s*", value)
    if not match:
        raise PruneAttnError(f"{_option(name)} {value!r} is no number; write for example 25% or 0.25")
    return float(match[1]) / (100 if match[2] else 1)
