"""How much fits: what a selection keeps on the device, what it leaves in CPU memory or in the mapped files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pruner.llama import Decoder

_CUDA_TOKENS, _CPU_TOKENS = 8192, 4096  # a batch that keeps the device busy
_LOGITS = 64 << 20  # elements of float32 logits at once


@dataclass(frozen=True)
class Room:
    """``batch`` samples are run at once and the head over ``rows`` tokens at once; ``store`` and ``teacher`` are the
    devices that hidden states and the original's last states wait on. ``resident`` says whether all weights are on
    the device; if not, ``width`` beginnings go through a layer together. Sizes in bytes."""

    batch: int
    rows: int
    resident: bool
    width: int
    store: str
    teacher: str
    state: int
    expected: int
    free: int

    def chunk(self, sets: int) -> int:
        """Batches to walk together with this many sets: one, unless a layer read once should serve more."""
        if self.resident:
            return 1
        return max(1, self.free // max(1, 2 * self.state * min(sets, self.width)))


def room(
    decoder: Decoder, samples: int, length: int, itemsize: int, device: str, batch: int | None, resident: bool | None
) -> Room:
    """Decide by the memory that is free now."""
    cuda = device.startswith("cuda")
    free, host = free_bytes(device), free_bytes("cpu")
    layer = itemsize * decoder.sublayer_parameters("block")
    outer = itemsize * decoder.vocab_size * decoder.hidden_size
    weights = decoder.num_layers * layer + outer

    def fits(batch: int) -> bool:
        return weights + _work(decoder, batch, length, itemsize) <= 0.9 * free

    if batch is None:
        batch = max(1, (_CUDA_TOKENS if cuda else _CPU_TOKENS) // length)
        while cuda and batch > 1 and (resident is False or not fits(batch)):
            batch //= 2
    batch = min(batch, samples)
    work = _work(decoder, batch, length, itemsize)
    if resident is None:
        resident = fits(batch)
    left = int(0.9 * free) - work - (weights if resident else outer + 2 * layer)
    state = batch * length * decoder.hidden_size * itemsize
    teachers = samples * length * decoder.hidden_size * itemsize
    teacher = device if teachers <= left // 4 else "cpu"
    if teacher == device:
        left -= teachers
    stack = 2 * decoder.num_layers * state  # depth-first, at most two states wait at each layer
    if resident:
        store, width, held = (device if stack <= left else "cpu"), 1, stack
    else:
        store = device if 4 * stack <= left else "cpu"
        left = left if store == device else min(host, int(0.5 * host))
        width = max(1, left // (4 * state))
        held = min(left, 2 * width * state)
    return Room(
        batch=batch,
        rows=max(1, _LOGITS // decoder.vocab_size),
        resident=resident,
        width=width,
        store=store,
        teacher=teacher,
        state=state,
        expected=work
        + (weights if resident else outer + layer)
        + (teachers if teacher == device else 0)
        + (held if store == device else 0),
        free=max(left, 0),
    )


def _work(decoder: Decoder, batch: int, length: int, itemsize: int) -> int:
    """Bytes that running one batch through a layer and the head takes besides weights and waiting states."""
    tokens = batch * length
    layer = tokens * itemsize * (4 * decoder.intermediate_size + 8 * decoder.hidden_size)
    head = 4 * (tokens * decoder.vocab_size + 4 * min(_LOGITS, tokens * decoder.vocab_size))
    return layer + head


def free_bytes(device: str) -> int:
    """Memory that can be had now on ``cpu`` (a container's limit counts) or ``cuda``."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no container, or no limit
    return max(free, 0)
