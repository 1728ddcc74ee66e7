"""Greedy text from a directory, by ONNX Runtime or PyTorch, with its times."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pruner import machine
from pruner.checkpoint import open_checkpoint
from pruner.checkpoint.generation import check_ids, read_generation
from pruner.errors import PruneAttnError
from pruner.hub.source import Revision, fetch
from pruner.machine import computing
from pruner.model import LanguageModel, TorchLanguageModel
from pruner.progress import Progress
from pruner.prompt import PromptTokenizer


@dataclass(frozen=True)
class Generated:
    """``text`` is what was added; ``tokens_per_second`` is by the median decode step (``None``: there was none).

    The first of them is no measure: on CUDA it captures the graph that the others are.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    backend: str
    device: str
    prefill_ms: float
    tokens_per_second: float | None
    threads: int


def generate(
    directory: str | os.PathLike[str],
    prompt: str,
    *,
    new_tokens: int = 64,
    backend: str = "onnx",
    device: str = "auto",
    threads: int | None = None,
    hub: Revision = Revision(),  # noqa: B008
    progress: Progress | None = None,
    write: Callable[[str], None] | None = None,
    chat: bool = False,
) -> Generated:
    """Go on from ``prompt`` until ``new_tokens``, the end of text or of the context; ``write`` gets text as it comes.

    ``directory`` may be a Hub id, at ``hub``. The prompt is taken as it is, with the
    tokenizer's own BOS, or with ``chat`` as a user's message in the chat template. ``threads``: see
    ``pruner.machine.computing``. Raises ``PruneAttnError``.
    """
    with computing(threads, torch=backend == "torch"):
        directory = fetch(directory, hub, runtime=backend == "onnx", progress=progress)
        tokenizer = PromptTokenizer(directory)
        ids = tokenizer.chat_ids(prompt) if chat else tokenizer.ids(prompt)
        return _generate(directory, tokenizer, ids, new_tokens, backend, device, write)


def _generate(
    directory: Path,
    tokenizer: PromptTokenizer,
    ids: list[int],
    new_tokens: int,
    backend: str,
    device: str,
    write: Callable[[str], None] | None,
) -> Generated:
    checkpoint = open_checkpoint(directory)
    ends = read_generation(checkpoint, tokenizer.eos_id()).eos
    check_ids(ids, checkpoint, "the prompt")
    if not ids:
        raise PruneAttnError("the prompt is empty and the tokenizer adds nothing; give some text")
    model, took = _open(directory, backend, device, len(ids) + new_tokens)
    if len(ids) >= model.max_length:
        raise PruneAttnError(f"the prompt has {len(ids)} tokens and the context {model.max_length}; give a shorter one")
    # after a letter a first space stays, and bytes of half a character do not join the prompt's
    anchor = tokenizer.plain_ids("a")

    def text_of(tokens: list[int]) -> str:
        return tokenizer.text(anchor + tokens)[len(before) :]

    before = tokenizer.text(anchor)
    shown = ""
    out: list[int] = []
    started = time.perf_counter()
    logits = model.prefill([ids])
    prefill_ms, steps = 1000 * (time.perf_counter() - started), []
    for _ in range(min(new_tokens, model.max_length - len(ids))):
        if out:
            started = time.perf_counter()
            logits = model.decode(out[-1:])
            steps.append(time.perf_counter() - started)
        out.append(int(logits[0].argmax()))
        if out[-1] in ends:
            break
        text = text_of(out)
        if write and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
            write(text[len(shown) :])
            shown = text
    text = text_of(out)
    if write:
        write(text[len(shown) :])
    speed = 1 / statistics.median(steps) if steps else None
    return Generated(text, out, len(ids), backend, took, prefill_ms, speed, machine.threads())


def _open(directory: str | os.PathLike[str], backend: str, device: str, tokens: int) -> tuple[LanguageModel, str]:
    """The model, with room for so many tokens where its context has it, and the device that it took."""
    if backend == "onnx":
        from export.onnx.session import OnnxSession, context_of

        checkpoint = open_checkpoint(directory)
        session = OnnxSession(directory, device=device, max_length=min(tokens, context_of(checkpoint)))
        return session, session.device
    if backend != "torch":
        raise PruneAttnError(f"unknown backend {backend!r}; choose onnx or torch")
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchLanguageModel(directory, device=device), device
