"""``validate``: the pruned directory measured against the original on one machine in one run, part by part."""

from __future__ import annotations

import datetime
import gc
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export import record
from export.card import update_card
from export.onnx.runtime import why_not_installed
from export.report import FORMAT, RESULTS, VERSION
from export.validate import function as same
from export.validate.facts import environment, model_facts, pruning_facts
from export.validate.footprint import footprint, open_model
from export.validate.graphs import Graphs
from export.validate.limits import Limits, check
from export.validate.parts import FOLDER, Parts
from pruner import __version__, machine
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.checkpoint.generation import check_ids
from pruner.checkpoint.load import check_finite
from pruner.device import pick_device
from pruner.dtypes import WEIGHT_DTYPES
from pruner.errors import MachineError, PruneAttnError, one_line
from pruner.evaluate import agreement, bootstrap, latency
from pruner.evaluate.perplexity import default_batch, sliding_windows
from pruner.files import expand
from pruner.hub.source import fetch
from pruner.machine import computing, decoding_seconds, reading_seconds, setting
from pruner.names import GRAPH
from pruner.progress import Progress, Stages, Step, keeping
from pruner.summary import identity
from pruner.text import Text, Texts, load_tokenizer, read_text

PARTS = ("same-function", "accuracy", "tasks", "latency")
BACKENDS = ("torch", "onnx")
MODELS = ("original", "pruned")

_WINDOW = 4096  # at most, by default: the whole context of a Llama-2
_LEAST_TOKENS = 4 * bootstrap.BLOCK
_PROMPTS = (128, 512, 2048)
_CHECKED = (2, 128)  # rows and tokens that the same-function check runs
_GREEDY_PROMPTS, _GREEDY_PROMPT_TOKENS, _GREEDY_NEW_TOKENS = 16, 128, 64


@dataclass(frozen=True)
class Validation:
    """``results`` is what ``results.json`` holds. ``exit_code``: 0; 1 where it is not the same function; 3 where a
    limit is broken. ``problems`` has a line for each."""

    results: dict[str, Any]
    output: Path
    exit_code: int
    problems: list[str] = field(default_factory=list)


def validate(
    original: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    text: Texts | None = None,
    text_field: str | None = None,
    backend: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    only: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: str = "once",
    max_tokens: int | None = None,
    batch: str = "1,8",
    prompt: str | None = None,
    new_tokens: int = 128,
    repeats: int = 20,
    seconds: float = 60,
    compiled: bool | None = None,
    seed: int = 0,
    threads: int | None = None,
    work: str | os.PathLike[str] | None = None,
    max_perplexity_increase: str | float | None = None,
    min_agreement: str | float | None = None,
    min_task_average_ratio: str | float | None = None,
    min_decode_speedup: str | float | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Measure ``pruned`` against ``original`` and write ``results.json``, ``report.md``, ``report.html`` and plots.

    ``output`` defaults to ``pruned/report``. ``only`` (of PARTS, separated by commas) leaves the others out; without
    ``text`` there is no accuracy. ``dtype`` is PyTorch's (default: float32 on the CPU, as stored on CUDA); ONNX Runtime
    computes in what is stored. docs/guide/validating.md says what each part measures. A run that was stopped goes on
    where it was when it is started again with the same options, and as many ``threads`` (``pruner.machine.computing``).

    Raises ``PruneAttnError`` for what cannot be measured, before anything is, and ``MachineError`` for a device whose
    memory is too small for one row.
    """
    with computing(threads):
        run = _Run(
            open_checkpoint(fetch(original, progress=progress)),
            open_checkpoint(fetch(pruned, runtime=True, progress=progress)),
            options={
                "backend": backend, "device": device, "dtype": dtype, "tasks": tasks, "limit": limit, "only": only,
                "window": window, "stride": stride, "bos": bos, "max_tokens": max_tokens, "batch": batch,
                "prompt": prompt, "new_tokens": new_tokens, "repeats": repeats, "seconds": seconds,
                "compiled": compiled, "seed": seed,
            "text_field": text_field,
            },
            text=text,
            limits=Limits.parse(max_perplexity_increase, min_agreement, min_task_average_ratio, min_decode_speedup),
            output=None if output is None else expand(output),
            progress=progress,
        )  # fmt: skip
        with run.working(work):
            run.measure()
        return run.finish()


def brief() -> dict[str, Any]:
    """The options of ``convert --validate``: on a CPU a few minutes' worth for a small model, else the defaults."""
    if pick_device("auto") == "cuda":
        return {}
    return {"max_tokens": 4096, "batch": "1", "new_tokens": 16, "repeats": 5, "seconds": 3}


class _Run:
    """One validation: options checked, then the parts one after another. Models stay open while parts share them."""

    def __init__(
        self,
        original: Checkpoint,
        pruned: Checkpoint,
        *,
        options: dict[str, Any],
        text: Texts | None,
        limits: Limits,
        output: Path | None,
        progress: Progress | None,
    ) -> None:
        self.checkpoints = {"original": original, "pruned": pruned}
        self.options, self.limits = options, limits
        self.seed = int(options["seed"])
        self.notes: list[str] = []
        self.attention, self.mlp = same.dropped_layers(original, pruned)
        self.parts_wanted = self._parts(text)
        self.output = output or pruned.path / "report"
        _check_output(self.output, original.path)
        self.device = pick_device(options["device"])
        self.dtypes = self._dtypes()
        self.backends = self._backends()
        self.context = min(c.decoder.context for c in self.checkpoints.values())
        self._read(text)
        self.cases = self._cases() if "latency" in self.parts_wanted else []
        self.tasks = self._task_names()
        self.limits.need(self.parts_wanted, bool(self.tasks))
        key = [VERSION, __version__, *map(identity, self.checkpoints.values()), self.device, self.dtypes]
        self.parts = Parts(self.output, [*key, setting(self.device), self.seed])
        self.models: dict[str, Any] = {}
        self.open_as: tuple[str, str] | None = None
        self.stages = Stages("validating", self._seconds(), progress)
        if progress is not None and (busy := machine.busy()):
            progress(Step(busy))

    # -- options -------------------------------------------------------------------------------------------------------

    def _parts(self, text: Any) -> list[str]:
        only, tasks = self.options["only"], self.options["tasks"]
        if only is None:
            wanted = [p for p in PARTS if (p != "accuracy" or text is not None) and (p != "tasks" or tasks)]
        else:
            wanted = _choices(only, PARTS, "--only")
            if "accuracy" in wanted and text is None:
                raise PruneAttnError("accuracy needs a text that neither model has seen; add --text FILE")
            if "tasks" in wanted and not tasks:
                raise PruneAttnError("--only tasks: say which, for example --tasks openllm")
            if {"accuracy", "tasks"} & set(wanted) and "same-function" not in wanted:
                wanted.insert(0, "same-function")  # without it no loss can be called the method's
        if "accuracy" not in wanted:
            why = ": no text to measure on was given (--text, or --validation-text of convert)" if text is None else ""
            self.notes.append(f"accuracy was not measured{why}")
        if "same-function" not in wanted:
            self.notes.append("whether the pruned model is the original without those sublayers was not checked here")
        return wanted

    def _dtypes(self) -> dict[str, str]:
        """What each backend computes in."""
        stored = {name: WEIGHT_DTYPES[c.dtypes[0]] for name, c in self.checkpoints.items()}
        self.stored = stored["pruned"]
        self.converted = stored["pruned"] if stored["original"] != stored["pruned"] else None
        asked = self.options["dtype"]
        if asked is None:
            asked = "float32" if self.device == "cpu" and self.converted is None else self.stored
        elif self.converted and asked != self.converted:
            raise PruneAttnError(
                f"{self.checkpoints['pruned'].path}: was converted to {self.converted}, so that only --dtype "
                f"{self.converted} gives both models the same weights; leave --dtype out"
            )
        if asked not in ("float32", "float16", "bfloat16"):
            raise PruneAttnError(f"unknown dtype {asked!r}; choose float16, bfloat16 or float32")
        return {"torch": asked, "torch-compiled": asked, "onnx": self.stored}

    def _why_no_onnx(self, pruned: Path) -> str | None:
        if not (pruned / GRAPH).is_file():
            return f"{pruned / GRAPH}: missing; prune-attn export {pruned} writes it, or says why it cannot"
        if self.device == "cpu" and self.stored == "bfloat16":
            return f"{pruned}: bfloat16 does not run on the CPU in ONNX Runtime"
        if self.device == "cuda" and self.stored == "float32":
            return f"{pruned}: float32 does not run on CUDA in ONNX Runtime"
        return why_not_installed()

    def _backends(self) -> list[str]:
        pruned, asked = self.checkpoints["pruned"], self.options["backend"]
        why = self._why_no_onnx(pruned.path)
        if asked is None:
            if why:
                self.notes.append(f"ONNX Runtime was not measured: {why}")
            return ["torch"] if why else list(BACKENDS)
        backends = _choices(asked, BACKENDS, "--backend")
        if "onnx" in backends and why:
            raise PruneAttnError(f"{why}; or leave onnx out of --backend")
        if "onnx" in backends and self.stored != self.dtypes["torch"] and "torch" in backends:
            self.notes.append(f"PyTorch computes in {self.dtypes['torch']} here, ONNX Runtime in {self.stored}")
        return backends

    def _read(self, text: Texts | None) -> None:
        """The text as windows, where there is one; the ids that are run otherwise."""
        rng = np.random.default_rng(self.seed)
        vocabulary = self.checkpoints["original"].decoder.vocab_size
        if vocabulary != self.checkpoints["pruned"].decoder.vocab_size:
            raise PruneAttnError(f"{self.checkpoints['pruned'].path}: its vocabulary is not the original's")
        self.ids = rng.integers(3 % vocabulary, vocabulary, 1 << 16)
        self.text: Text | None = None
        if text is None or "accuracy" not in self.parts_wanted:
            return
        tokenizers = [load_tokenizer(c.path) for c in self.checkpoints.values()]
        self.text = read_text(text, tokenizers[0], self.options["text_field"])
        check_ids(self.text.ids, self.checkpoints["original"], self.text.path)
        sample = self.text.content[:20_000]
        encoded = [tokenizer(sample, verbose=False)["input_ids"] for tokenizer in tokenizers]
        if tokenizers[0].get_vocab() != tokenizers[1].get_vocab() or encoded[0] != encoded[1]:
            raise PruneAttnError(
                f"{self.checkpoints['pruned'].path}: its tokenizer is not the original's, so they cannot be compared; "
                f"copy the tokenizer files from {self.checkpoints['original'].path}"
            )
        most = self.options["max_tokens"]
        self.scored_ids, self.scored_bytes = self.text.ids, self.text.bytes
        if most is not None and most < len(self.text.ids):
            self.scored_ids = self.text.ids[:most]
            self.scored_bytes = len(tokenizers[0].decode(self.scored_ids).encode())
            self.notes.append(f"of the text's {len(self.text.ids):,} tokens the first {most:,} were taken")
        if len(self.scored_ids) < _LEAST_TOKENS:
            raise PruneAttnError(
                f"{self.text.path}: {len(self.scored_ids)} tokens are too few to say anything; give {_LEAST_TOKENS} at "
                "least, and better 100,000"
            )
        first = tokenizers[0]("a", verbose=False)["input_ids"][:1]
        self.bos_id = first[0] if first == [tokenizers[0].bos_token_id] else None
        self.window = self.options["window"] or min(self.context, _WINDOW)
        if self.window > self.context:
            raise PruneAttnError(f"--window {self.window}: the model's context is {self.context} tokens")
        self.stride = self.options["stride"] or max(1, self.window // 2)
        self.windows = sliding_windows(
            self.scored_ids, length=self.window, stride=self.stride, bos_id=self.bos_id, bos=self.options["bos"]
        )
        self.ids = self.text.ids

    def _cases(self) -> list[tuple[int, int]]:
        """(batch, prompt) pairs."""
        new = self.options["new_tokens"]
        batches = _numbers(self.options["batch"], "--batch")
        if not self.options["seconds"] >= 0:  # nan too
            raise PruneAttnError(f"--seconds {self.options['seconds']}: must be 0 or more")
        if self.options["repeats"] < latency.LEAST_REPEATS:
            raise PruneAttnError(f"--repeats: at least {latency.LEAST_REPEATS} are needed for an interval")
        if new < 2:
            raise PruneAttnError("--new-tokens: at least 2 are needed to time a decode step")
        if self.options["prompt"] is not None:
            prompts = _numbers(self.options["prompt"], "--prompt")
            for p in prompts:
                if p + new > self.context:
                    raise PruneAttnError(
                        f"--prompt {p} and --new-tokens {new} do not fit the context of {self.context} tokens"
                    )
        else:
            room = self.context - new
            if room < 1:
                raise PruneAttnError(f"--new-tokens {new} leaves no prompt in the context of {self.context} tokens")
            prompts = [p for p in _PROMPTS if p <= room]
            if len(prompts) < len(_PROMPTS) and room not in prompts:
                prompts.append(room)
        return [(b, p) for b in batches for p in prompts]

    def _task_names(self) -> list[str]:
        if "tasks" not in self.parts_wanted:
            return []
        from pruner.evaluate.tasks import resolve_tasks

        self.tokenizer = load_tokenizer(self.checkpoints["original"].path)
        return resolve_tasks([part.strip() for part in self.options["tasks"].split(",") if part.strip()])

    # -- the parts -----------------------------------------------------------------------------------------------------

    @contextmanager
    def working(self, work: str | os.PathLike[str] | None) -> Iterator[None]:
        """A place for graphs (and for the original's weights, where they have to be laid out), removed at the end."""
        made = self.output.exists()
        if work is None:
            folder = self.output / FOLDER / "graphs"
        else:
            work = expand(work)
            if not work.is_dir():
                raise PruneAttnError(f"{work}: is no directory; make it, or choose another place for --work")
            folder = Path(tempfile.mkdtemp(dir=work, prefix="prune-attn-"))
        self.graphs = Graphs(folder)
        self.graphs.remove()  # a killed run's
        try:
            with keeping(self._kept):
                yield
        finally:
            self.close()
            self.graphs.remove()
            if not made and self.output.is_dir() and not any((self.output / FOLDER).glob("*.json")):
                self.parts.remove()
                if not any(self.output.iterdir()):
                    self.output.rmdir()

    def _kept(self) -> str:
        """What a run that is stopped leaves."""
        folder = self.output / FOLDER
        count = len(list(folder.glob("*.json")))
        if not count:
            return "nothing was finished that could be kept"
        return f"{count} finished parts are kept in {folder}; the same command goes on from there"

    def _seconds(self) -> dict[str, float]:
        """About how long each part takes, by its name: what the progress of the whole is made of."""
        stored, device = {n: c.nbytes for n, c in self.checkpoints.items()}, self.device
        weights, parameters = max(stored.values()), self.checkpoints["original"].parameters
        new, repeats, limit = (self.options[name] for name in ("new_tokens", "repeats", "seconds"))

        def run(rows: int, prompt: int, steps: int) -> float:
            return reading_seconds(parameters, rows * prompt, device) + decoding_seconds(weights, steps, device)

        def timed(batch: int, prompt: int) -> float:
            once = 2 * run(batch, prompt, new)
            return once + max(latency.LEAST_REPEATS * once, min(repeats * once, limit))

        load, out = 1 + weights / 1e9, {}
        whole = "same-function" in self.parts_wanted
        out |= {f"facts-{name}": nbytes / 1e9 if whole else 0.01 for name, nbytes in stored.items()}
        if whole:
            out |= {"same-bytes": weights / 5e8, "same-torch": 2 * load + 2 * run(*_CHECKED, 8), "same-onnx": load}
        compiled = ["torch-compiled"] if "latency" in self.parts_wanted and self._wants_compiled() else []
        for backend in [*self.backends, *compiled]:
            if "accuracy" in self.parts_wanted and backend not in compiled:
                tokens = sum(len(window.ids) for window in self.windows)
                out[f"accuracy-{backend}"] = 2 * load + 2 * run(1, tokens, 0)
                out[f"greedy-{backend}"] = 2 * run(_GREEDY_PROMPTS, _GREEDY_PROMPT_TOKENS, 2 * _GREEDY_NEW_TOKENS)
            if self.tasks and backend not in compiled:
                items = 4 * 300 * (self.options["limit"] or 1500) * len(self.tasks)  # tokens, roughly
                out |= {f"tasks-{backend}-{name}": load + run(1, items, 0) for name in MODELS}
            for case in self.cases:
                out[f"latency-{backend}-{case[0]}x{case[1]}"] = timed(*case)
                out |= {f"memory-{backend}-{name}": 5 + load for name in MODELS if backend not in compiled}
        return out

    def measure(self) -> None:
        """Every part that was asked for; what an earlier run finished is taken from it."""
        started = time.time()
        whole = "same-function" in self.parts_wanted
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": None,
            "options": self.options,
            "environment": environment(self.device),
            "models": {
                name: self._part(f"facts-{name}", whole, f"hashing the {name}", lambda c=c: model_facts(c, whole))
                for name, c in self.checkpoints.items()
            },
            "pruning": pruning_facts(*self.checkpoints.values(), self.attention, self.mlp),
            "dtypes": {backend: self.dtypes[backend] for backend in self.backends},
            "same_function": None,
            "accuracy": {},
            "tasks": {},
            "latency": {},
            "bandwidth": None,
            "gates": [],
            "notes": self.notes,
        }
        if self.device == "cuda" and "latency" in self.parts_wanted:
            self.results["bandwidth"] = self._part("bandwidth", None, "memory bandwidth", latency.copy_bandwidth)
        if "same-function" in self.parts_wanted:
            self.results["same_function"] = self._same_function()
            if not self.results["same_function"]["ok"]:
                return self._done(started)
        if "latency" in self.parts_wanted:  # the processes that it starts want the memory that models here would take
            footprints = {backend: self._footprints(backend) for backend in self.backends}
        for backend in self.backends:
            if "accuracy" in self.parts_wanted:
                self.results["accuracy"][backend] = self._accuracy(backend)
            if "latency" in self.parts_wanted:
                self.results["latency"][backend] = self._latency(backend, footprints[backend])
        if "latency" in self.parts_wanted and self._wants_compiled():
            self._beside()
        self.close()
        for backend in self.backends if self.tasks else ():
            self.results["tasks"][backend] = self._tasks(backend)
        return self._done(started)

    def _done(self, started: float) -> None:
        if self.parts.reused:
            self.notes.append(f"{len(self.parts.reused)} parts were finished by an earlier run that was stopped")
        if self.graphs.copied:
            self.notes.append(
                f"{self.graphs.copied / 1e9:.2f} GB of weights were laid out anew for ONNX Runtime while this ran"
            )
        self.results["seconds"] = round(time.time() - started, 1)

    def _part(self, name: str, options: Any, status: str, make: Callable[[], Any]) -> Any:
        """A part of the results: taken from an earlier run, or made and saved. ``self.progress`` is this part's."""
        value = self.parts.saved(name, options)
        if value is not None:
            self.stages.skip(name)
            return value
        with self.stages.stage(name, status) as self.progress:
            return self.parts.save(name, options, make())

    def _models(self, backend: str, purpose: str = "score") -> dict[str, Any]:
        """Both models of a backend, open. ``purpose``: score a text, or serve; they differ in ONNX's graph."""
        key = (backend, purpose if backend == "onnx" else "")
        if self.open_as != key:
            self.close()
            for name in MODELS:
                self.models[name] = self._open(backend, name, purpose)
            self.open_as = key
        return self.models

    def _open(self, backend: str, name: str, purpose: str) -> Any:
        try:
            context = max(p for _, p in self.cases) + self.options["new_tokens"] if self.cases else 1
            if purpose == "score":
                read = max(self.window, _GREEDY_PROMPT_TOKENS + _GREEDY_NEW_TOKENS) if self.text else _CHECKED[1]
                context = self.context if self.tasks else max(context, read)
            return open_model(
                backend, self._directory(backend, name, purpose), self.device, self.dtypes[backend],
                min(context, self.context),
            )  # fmt: skip
        except Exception as error:
            if not latency.out_of_memory(error):
                raise
            self.close()
            raise MachineError(
                f"{self.checkpoints[name].path}: the memory of {self.device} is too small for both models at once; "
                "use --device cpu, or a larger one"
            ) from None

    def _directory(self, backend: str, name: str, purpose: str) -> Path:
        checkpoint = self.checkpoints[name]
        if backend != "onnx":
            return checkpoint.path
        dtype = self.converted if name == "original" else None
        return self.graphs.directory(name, checkpoint, dtype, purpose == "serve")

    def close(self) -> None:
        """Let the open models go, and their memory."""
        self.models, self.open_as = {}, None
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _same_function(self) -> dict[str, Any]:
        original, pruned = self.checkpoints.values()
        rows, tokens = _CHECKED
        tokens = min(tokens, self.context)
        ids = np.asarray(self.ids[: rows * tokens], dtype=np.int64).reshape(rows, tokens)

        def compare_bytes() -> dict[str, Any]:
            return same.compare_bytes(original, pruned, self.attention, self.mlp, self.progress)

        def compare_torch() -> dict[str, Any]:
            models = self._models("torch")
            try:
                return same.compare_torch(*models.values(), ids, self.attention, self.mlp, self.dtypes["torch"])
            except same.NotFiniteError:
                check_finite(original)  # another dtype is no cure for a weight that is NaN
                raise

        def compare_onnx() -> dict[str, Any]:
            torch_model = self._models("torch")["pruned"]
            session = open_model("onnx", pruned.path, self.device, None, tokens)  # the very file that is shipped
            return same.compare_onnx(torch_model, session, ids, self.stored)

        facts: dict[str, Any] = {
            "bytes": self._part("same-bytes", None, "comparing the tensors", compare_bytes),
            "torch": None,
            "onnx": None,
        }
        if facts["bytes"]["ok"]:
            facts["torch"] = self._part("same-torch", ids.tolist(), "comparing logits, torch", compare_torch)
            if facts["torch"]["ok"] and "onnx" in self.backends:
                facts["onnx"] = self._part("same-onnx", ids.tolist(), "comparing logits, onnx", compare_onnx)
        facts["ok"] = all(part["ok"] for part in facts.values() if part is not None)
        return facts

    def _accuracy(self, backend: str) -> dict[str, Any]:
        assert self.text is not None
        what = {
            "text": {"name": self.text.name, "sha256": self.text.sha256, "tokens": len(self.scored_ids)},
            "window": self.window,
            "stride": self.stride,
            "bos": self.options["bos"] if self.bos_id is not None else "none",
        }

        def measure() -> dict[str, Any]:
            models = self._models(backend)
            batch = default_batch(models["original"], self.window)
            while True:
                try:
                    result = agreement.compare(
                        models["original"], models["pruned"], self.windows, batch=batch,
                        progress=self.progress,
                    )  # fmt: skip
                    break
                except Exception as error:
                    if not latency.out_of_memory(error):
                        raise
                    if batch == 1:
                        raise MachineError(
                            f"{self.device} has no memory for a window of {self.window} tokens; give a smaller --window"
                        ) from None
                    batch //= 2
            for name, scores in (("original", result.original), ("pruned", result.pruned)):
                if not scores.nll.mean() < 700:  # NaN too
                    raise PruneAttnError(
                        f"{self.checkpoints[name].path}: its perplexity is not a number in {self.dtypes[backend]}; "
                        f"give another --dtype, or another --backend than {backend}"
                    )
            share = result.original.tokens / len(self.scored_ids)  # under 1 where windows do not overlap
            return agreement.summary(result, round(self.scored_bytes * share), self.seed)

        def greedy() -> dict[str, Any]:
            models = self._models(backend)
            length = min(_GREEDY_PROMPT_TOKENS, self.context // 4)
            starts = np.linspace(0, len(self.scored_ids) - length, _GREEDY_PROMPTS).astype(int)
            prompts = np.stack([self.scored_ids[start : start + length] for start in starts])
            if self.bos_id is not None and self.options["bos"] != "none":
                prompts[:, 0] = self.bos_id
            return agreement.greedy_match(
                models["original"], models["pruned"], prompts, min(_GREEDY_NEW_TOKENS, self.context - length),
                seed=self.seed, progress=self.progress,
            )  # fmt: skip

        measured = self._part(f"accuracy-{backend}", what, f"reading the text, {backend}", measure)
        return {**what, **measured, "greedy": self._part(f"greedy-{backend}", what, f"greedy text, {backend}", greedy)}

    # -- latency -------------------------------------------------------------------------------------------------------

    def _footprints(self, backend: str) -> dict[str, Any]:
        """Load time and peak memory of each model, at the largest case."""
        batch, prompt = max(self.cases, key=lambda case: case[0] * case[1])
        context = min(self.context, prompt + self.options["new_tokens"])
        out = {}
        for name in MODELS:

            def measure(name: str = name) -> dict[str, Any]:
                self.close()
                directory = self._directory(backend, name, "serve")
                return footprint(backend, directory, self.device, self.dtypes[backend], batch, prompt, context)

            out[name] = self._part(
                f"memory-{backend}-{name}", [batch, prompt, context], f"loading and memory, {backend}", measure
            )
            if "failed" in out[name]:
                self.notes.append(f"memory of the {name}, {backend}: {out[name]['failed']}")
            elif out[name]["batch"] < batch:
                self.notes.append(
                    f"memory of the {name}, {backend}: measured at batch {out[name]['batch']}, not {batch}"
                )
        return out

    def _latency(self, backend: str, footprints: dict[str, Any] | None) -> dict[str, Any]:
        cases = [case for case in (self._case(backend, *case) for case in self.cases) if case is not None]
        if not cases:
            raise MachineError(f"{self.device} has no memory for one row of the shortest --prompt; give shorter ones")
        return {
            "cases": cases,
            "speedup": latency.speedup([(c["original"], c["pruned"]) for c in cases], self.seed),
            "memory": footprints,
        }

    def _case(self, backend: str, batch: int, prompt: int) -> dict[str, Any] | None:
        new, repeats, seconds = (self.options[name] for name in ("new_tokens", "repeats", "seconds"))
        name = f"latency-{backend}-{batch}x{prompt}"

        def measure() -> dict[str, Any]:
            rows, notes = batch, []
            while True:
                ids = np.resize(np.asarray(self.ids, dtype=np.int64), (rows, prompt))
                try:
                    times = latency.run_in_turn(
                        self._models(backend, "serve"), ids, new, repeats=repeats, seconds=seconds,
                        progress=self.progress,
                    )  # fmt: skip
                    break
                except Exception as error:
                    if not latency.out_of_memory(error) or (isinstance(error, MachineError) and not self.models):
                        raise
                    self.close()  # what it had taken
                    if rows == 1:
                        return {
                            "notes": [f"{backend}, prompt {prompt}: not measured, {self.device} has no memory for it"]
                        }
                    rows //= 2
                    notes = [f"{backend}, prompt {prompt}: batch {rows} instead of {batch}, for want of memory"]
            summaries = {model: latency.summary(t, rows) for model, t in times.items()}
            return {
                "batch": rows, "prompt": prompt, "new_tokens": new, "repeats": len(times["original"].whole),
                **summaries, "speedup": latency.speedup([tuple(summaries[m] for m in MODELS)], self.seed),
                "notes": notes,
            }  # fmt: skip

        room = max(prompt for _, prompt in self.cases)  # what the KV buffer is allocated for
        options = [new, repeats, seconds, self.text and self.text.sha256, room]
        case = self._part(name, options, f"timing, {backend}, {batch} x {prompt}", measure)
        self.notes += case.pop("notes")
        if not case:
            return None
        for model in MODELS if self.results["bandwidth"] else ():
            facts, scale = self.results["models"][model], self._scale(backend)
            floor = latency.floor_ms(
                scale * (facts["bytes"] - facts["embedding_bytes"]), scale * facts["kv_cache_bytes_per_token"],
                prompt + new / 2, case["batch"], self.results["bandwidth"],
            )  # fmt: skip
            case[model] |= {"floor_ms": floor, "floor_ratio": case[model]["decode_ms"]["median"] / floor}
        return case

    def _scale(self, backend: str) -> float:
        """Bytes of an element as it is computed over bytes as it is stored."""
        size = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
        return size[self.dtypes[backend]] / size[self.stored]

    def _wants_compiled(self) -> bool:
        asked = self.options["compiled"]
        return "torch" in self.backends and (self.device == "cuda" if asked is None else bool(asked))

    def _beside(self) -> None:
        """transformers compiled: what a person would take instead. Where it does not work, a note says so."""
        try:
            self.results["latency"]["torch-compiled"] = self._latency("torch-compiled", None)
        except Exception as error:
            self.notes.append(f"transformers compiled could not be measured: {one_line(error, 160)}")

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def _tasks(self, backend: str) -> dict[str, Any]:
        from pruner.evaluate.tasks import compare_tasks, run_tasks

        limit, out = self.options["limit"], {}
        for name in MODELS:
            done: dict[str, Any] = {}
            options = {task: [name, limit, self.options["seed"], _file_hash(task)] for task in self.tasks}
            for task in self.tasks:  # each is saved when it is done
                part = self.parts.saved(f"task-{backend}-{name}-{task}", options[task])
                if part is not None:
                    done[task] = part

            def save(task: str, value: Any, name: str = name, options: Any = options) -> None:
                self.parts.save(f"task-{backend}-{name}-{task}", options[task], value)

            with self.stages.stage(f"tasks-{backend}-{name}", f"tasks, {backend}, {name}") as progress:
                out[name] = run_tasks(
                    lambda name=name: self._open(backend, name, "score"), self.tokenizer, self.tasks, limit=limit,
                    max_length=self.context, done=done, save=save,
                    progress=_of_several([task for task in self.tasks if task not in done], progress),
                )  # fmt: skip
            self.close()
        compared = compare_tasks(out["original"], out["pruned"])
        for name, facts in out.items():
            for task, entry in facts["tasks"].items():
                for note in entry.get("notes", ()):  # truncated requests, a smaller batch
                    if (line := f"{task}, {backend}, {name}: {note}") not in self.notes:
                        self.notes.append(line)
                entry.pop("items", None)  # compared above, and long
        return {**out, "compared": compared, "average_ratio": (compared["average"] or {}).get("ratio")}

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self) -> Validation:
        """Write the report; judge."""
        from export.report.write import write_report

        function = self.results["same_function"]
        broken = function is not None and not function["ok"]
        problems = [f"not the same function: {line}" for line in _why(function)] if broken else []
        if not broken:
            self.results["gates"] = check(self.limits, self.results)
            problems = [gate["line"] for gate in self.results["gates"] if not gate["ok"]]
        write_report(self.results, self.output)
        self.parts.remove()
        pruned = self.checkpoints["pruned"].path
        if not broken and self.output.resolve().is_relative_to(pruned.resolve()) and record.read_record(pruned):
            update_card(pruned, self.results)
        return Validation(self.results, self.output, 1 if broken else 3 if problems else 0, problems)


def _of_several(tasks: Sequence[str], progress: Progress) -> Progress:
    """Each task alike, as nobody knows how long each takes."""

    def inside(step: Step) -> None:
        place = tasks.index(step.what) if step.what in tasks else 0
        progress(Step("tasks", place + step.done / step.total, len(tasks), status=step.what))

    return inside


def _file_hash(task: str) -> str | None:
    """Of a task's own YAML file, which may be changed between two runs."""
    file = Path(task.rpartition("@")[0] or task)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _why(function: dict[str, Any]) -> Iterator[str]:
    yield from function["bytes"]["problems"]
    for part, what in (("torch", "the original with those sublayers switched off"), ("onnx", "PyTorch")):
        facts = function[part]
        if facts is not None and not facts["ok"]:
            size = "are not finite" if facts["relative_error"] is None else f"are off by {facts['relative_error']:.1e}"
            who = "the pruned model's" if part == "torch" else "model.onnx's"
            yield f"{who} logits {size} against {what}; convert again"


def _choices(text: str, known: Sequence[str], option: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for part in chosen:
        if part not in known:
            raise PruneAttnError(f"{option} {part!r}: choose of {', '.join(known)}")
    if not chosen:
        raise PruneAttnError(f"{option} names nothing; choose of {', '.join(known)}")
    return [part for part in known if part in chosen]


def _numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isdecimal() and 0 < int(part) < 1 << 20 for part in parts):
        raise PruneAttnError(f"{option} {text!r}: write whole numbers over 0, for example 1,8")
    return sorted({int(part) for part in parts})


def _check_output(output: Path, original: Path) -> None:
    """Refuse a directory that holds something else than a report, or lies in the original, which is never touched."""
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(original)):
        raise PruneAttnError(f"{output}: lies in the original; choose another directory with --output")
    if output.is_dir():
        from export.report.write import is_ours

        strange = [p for p in output.iterdir() if not is_ours(p.name)]
        if strange and not (output / RESULTS).is_file():
            raise PruneAttnError(f"{output}: holds {strange[0].name} and no report; choose another directory")
    elif output.exists() or output.is_symlink():
        raise PruneAttnError(f"{output}: is not a directory; choose another one")
