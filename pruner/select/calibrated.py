"""``select``: the order in which a model's sublayers would go, by any strategy. Imports nothing heavy by itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pruner import machine
from pruner._version import __version__
from pruner.checkpoint.generation import check_ids
from pruner.errors import PruneAttnError
from pruner.files import expand, read_json
from pruner.progress import Progress, Step
from pruner.select.exhaustive import exhaustive, layer_evaluations, subsets
from pruner.select.request import Calibration, check_objective
from pruner.select.sampling import how_many, windows
from pruner.select.search import Found, expected_work, extend, search

if TYPE_CHECKING:
    import numpy as np

    from pruner.checkpoint import Checkpoint
    from pruner.plan import PruningPlan

SCREEN, CONFIRM = 8, 4  # a step tries all its sets on one in SCREEN samples (at least 8), and CONFIRM of them on all
PARTIAL = "prune-attn partial plan"
_MOST_KEPT = 1 << 30  # bytes; a long search keeps every figure


def told_of(partial: Path) -> str:
    """What a run that is stopped has kept."""
    if not partial.exists():
        return "nothing was kept"
    return f"what was computed is kept in {partial}; --resume goes on from there"


class Job:
    """One selection by a calibration text."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sublayer: str,
        calibration: Calibration,
        partial: Path | None,
        progress: Progress | None,
    ) -> None:
        check_objective(calibration.objective)
        self.checkpoint, self.sublayer, self.calibration = checkpoint, sublayer, calibration
        self.strategy, self.objective = calibration.strategy, calibration.objective
        self.device, self.seed, self.progress = calibration.device, calibration.seed, progress
        self.partial, self.resume = None if partial is None else expand(partial), calibration.resume
        self.what, self.status, self.expected, self.saved_at = "running the original", "", 0.0, time.monotonic()
        self.total, self.before = 0.0, 0  # of what is done now, in layers times samples
        self.seconds: float | None = None
        self.check_partial()

    def check_partial(self) -> None:
        if self.partial is None:
            if self.resume:
                raise PruneAttnError("nothing to resume from; name the plan that the stopped run was making")
            return
        if self.partial.exists() and not self.resume:
            raise PruneAttnError(
                f"{self.partial}: a run that was stopped left this; go on from it with --resume, or remove it"
            )

    def prepare(self) -> None:
        """Read the text and the partial plan, open the model, say what will be done, run the original."""
        from pruner.device import check_cuda
        from pruner.select.evaluator import Evaluator
        from pruner.text import load_tokenizer, read_text

        if self.device.startswith("cuda"):
            import torch

            check_cuda()
            torch.cuda.reset_peak_memory_stats(self.device)
        asked = self.calibration
        self.text = read_text(asked.text, load_tokenizer(self.checkpoint.path), asked.text_field)
        check_ids(self.text.ids, self.checkpoint, self.text.path)
        context = self.checkpoint.decoder.context
        self.samples, self.length = how_many(self.text, context, asked.samples, asked.length, self.say)
        self.screen = min(self.samples, max(8, self.samples // SCREEN))
        ids = windows(self.text.ids, self.samples, self.length, self.seed)
        left = self.read_partial()
        self.evaluator = evaluator = Evaluator(
            self.checkpoint,
            ids,
            sublayer=self.sublayer,
            objective=self.objective if self.strategy != "similarity" else "ce",
            device=self.device,
            breaks=(self.screen,),
            batch=left.get("batch"),
            advance=self.advance,
        )
        evaluator.known = {frozenset(dropped): rows for dropped, rows in left.get("known", [])}
        room = evaluator.room
        self.say(
            f"{self.samples} samples of {self.length} tokens, {evaluator.dtype} on {self.device}, "
            f"about {room.expected / 1e9:.1f} GB"
            + ("" if room.resident else "; the model does not fit, so its layers are read one at a time")
            + ("" if room.store == self.device else "; hidden states wait in CPU memory")
        )
        self.total = self.samples * self.checkpoint.decoder.num_layers
        tokens = self.samples * self.length
        self.seconds = machine.reading_seconds(self.checkpoint.parameters, tokens, self.device)
        if busy := machine.busy():
            self.say(busy)
        self.began = time.monotonic()
        self.advance(0)
        evaluator.losses([frozenset()])
        if not all(map(math.isfinite, (evaluator.perplexity(frozenset()), *evaluator.similarity.values()))):
            self.not_finite("the whole model's loss")

    def not_finite(self, what: str) -> NoReturn:
        """Say why: a weight that is no number, or a dtype in which values overflow."""
        from pruner.checkpoint.load import check_finite

        check_finite(self.checkpoint)
        cpu = self.device == "cpu"
        cure = "it is of no use as it is" if cpu else "choose with --device cpu, which computes in float32"
        raise PruneAttnError(
            f"{self.checkpoint.path}: {what} is not a number in {self.evaluator.dtype}: values overflow; {cure}"
        )

    def by_similarity(self, candidates: tuple[int, ...]) -> tuple[int, ...]:
        """Least change first; of equal ones the deeper first."""
        scores = self.evaluator.similarity
        return tuple(sorted(candidates, key=lambda layer: (scores[layer], -layer)))

    def by_loss(self, candidates: tuple[int, ...], count: int) -> Found:
        """The best sets up to ``count``, and a greedy order beyond."""
        layers, screen, samples = self.checkpoint.decoder.num_layers, self.screen, self.samples
        shape = {"layers": layers, "samples": samples, "screen": screen, "confirm": CONFIRM}
        done = self.evaluator.layer_samples
        work = expected_work(len(candidates), count, 0, **shape)
        if self.strategy == "exhaustive":
            work = samples * layer_evaluations(list(subsets(candidates, count)), layers)
            work += expected_work(len(candidates), -1, count, **shape)
        self.expected = work * (time.monotonic() - self.began) / done
        self.what, self.total, self.before, self.seconds = "choosing", work, done, self.expected
        self.advance(0)

        def losses(sets: Any, samples: int) -> np.ndarray:
            return self.evaluator.table(sets, samples, self.keep)

        def step(size: int, found: Found) -> None:
            _, dropped = found.sets[size]
            self.status = f"{size} dropped: {_listed(dropped)}; perplexity {self.evaluator.perplexity(dropped):.2f}"
            if self.strategy != "exhaustive":
                done = self.evaluator.layer_samples - self.before
                self.total = done + expected_work(len(candidates), count, size, **shape)
            self.save()

        if self.strategy == "exhaustive":
            found = exhaustive(losses, candidates, count, samples)
        else:
            others = [self.by_similarity(candidates)]
            found = search(
                losses, candidates, count, samples=samples, screen=screen, confirm=CONFIRM, others=others, step=step
            )
            self.save()
        for size in range(1, count + 1):
            if not math.isfinite(found.sets[size][0]):
                self.not_finite(f"the loss with any {size} dropped")
        extend(losses, candidates, found, screen, step)
        self.total = self.evaluator.layer_samples - self.before  # no longer an estimate
        self.advance(0)
        return found

    # -- the plan --------------------------------------------------------------------------------------------------

    def plan(self, order: tuple[int, ...], found: Found | None, count: int, requested: str) -> PruningPlan:
        """The plan with everything that says how it came about; nothing in it depends on how long it took."""
        from pruner.plan import PruningPlan, only_present

        evaluator = self.evaluator
        facts: dict[str, Any] = {"objective": "similarity" if found is None else self.objective}
        if found is None:
            facts["scores"] = [evaluator.similarity[i] / self.samples for i in order]
        else:
            steps = [found.sets[size] for size in range(1, len(order) + 1)]
            facts["scores"] = [_number(loss) for loss, _ in steps]
            facts["perplexity"] = [_number(evaluator.perplexity(dropped)) for _, dropped in steps]
            facts["confirmed"] = found.confirmed
        facts["original_perplexity"] = evaluator.perplexity(frozenset())
        facts["calibration"] = {
            "text": self.text.name,
            "sha256": self.text.sha256,
            "bytes": self.text.bytes,
            "tokens": len(self.text.ids),
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "dtype": evaluator.dtype,
            "device": self.device,
            "threads": machine.threads(),
        }
        sets = {} if found is None else {n: tuple(sorted(s)) for n, (_, s) in found.sets.items() if n}
        sets = {n: dropped for n, dropped in sets.items() if set(dropped) != set(order[:n])}
        made = PruningPlan.of(self.sublayer, self.strategy, order, count, requested)
        made = replace(made, sets=sets or None, selection=facts, source=self.checkpoint.fingerprint())
        return only_present(made, self.checkpoint.decoder)

    def cost(self, seconds: float) -> dict[str, Any]:
        """What it took in this run."""
        done, layers = self.evaluator.layer_samples, self.checkpoint.decoder.num_layers
        cost: dict[str, Any] = {
            "seconds": seconds,
            "layer_evaluations": done / self.samples,
            "tokens_per_second": done * self.length / layers / seconds,
            "expected_seconds": self.expected,
        }
        if self.device.startswith("cuda"):
            import torch

            cost["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return cost

    # -- progress, and what is kept for --resume ---------------------------------------------------------------------

    def say(self, line: str) -> None:
        if self.progress is not None:
            self.progress(Step(line))

    def advance(self, _: int) -> None:
        if self.progress is not None:
            done, of = self.evaluator.layer_samples - self.before, self.samples
            total = max(self.total, done)  # an estimate
            self.progress(Step(self.what, done / of, total / of, "layer evaluations", self.status, self.seconds))

    def keep(self) -> None:
        if time.monotonic() - self.saved_at > 5:
            self.save()

    def key(self) -> dict[str, Any]:
        """What the losses depend on."""
        from pruner.summary import identity

        return {
            "source": identity(self.checkpoint),
            "sublayer": self.sublayer,
            "objective": self.objective,
            "text": self.text.sha256,
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "device": self.device,
            "tokenizer": hashlib.sha256(self.text.ids.tobytes()).hexdigest(),  # the same text is other tokens
            "screen": self.screen,
            "version of prune-attn": __version__,
            **machine.setting(self.device),
        }

    def save(self) -> None:
        if self.partial is None or not any(self.evaluator.known):  # the original has to be run again anyway
            return
        self.saved_at = time.monotonic()
        known = [[sorted(dropped), rows] for dropped, rows in self.evaluator.known.items()]
        state = {"format": PARTIAL, "key": self.key(), "batch": self.evaluator.room.batch, "known": known}
        staging = self.partial.with_name(f".{self.partial.name}.{os.getpid()}")
        self.partial.parent.mkdir(parents=True, exist_ok=True)  # convert makes OUTPUT's folders only when it writes
        try:
            staging.write_text(json.dumps(state))
            os.replace(staging, self.partial)
        finally:
            staging.unlink(missing_ok=True)

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Ctrl-C loses nothing that has been computed."""
        try:
            yield
        except BaseException as stop:
            if not isinstance(stop, Exception):
                self.save()
            raise

    def read_partial(self) -> dict[str, Any]:
        if not self.resume or self.partial is None or not self.partial.exists():
            return {}
        try:
            state = read_json(self.partial, _MOST_KEPT)
            key, _, _ = state["key"], state["batch"], state["known"]
        except (PruneAttnError, KeyError, TypeError):
            raise PruneAttnError(f"{self.partial}: is not a partial plan; remove it and start again") from None
        differs = [name for name, value in self.key().items() if key.get(name) != value]
        if differs:
            raise PruneAttnError(
                f"{self.partial}: was made with another {differs[0]}; give the same options, or remove it"
            )
        return state


def _number(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def _listed(layers: Any) -> str:
    return ", ".join(map(str, sorted(layers)))
