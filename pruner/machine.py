"""What figures depend on besides the model: threads, processor, GPU, versions of the tools."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pruner.errors import PruneAttnError

MOST_THREADS = 1024
PACKAGES = (
    "torch", "transformers", "onnxruntime-gpu", "onnxruntime", "lm_eval", "numpy", "safetensors", "tokenizers",
)  # fmt: skip
_count: int | None = None  # what `computing` was told


def threads() -> int:
    """How many threads to compute with: what ``computing`` was told, or what this process may use.

    That is the cores (not hyperthreads) of its CPU affinity, the quotas of its control groups, and OMP_NUM_THREADS.
    """
    if _count is not None:
        return _count
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    limits = [cpu_cores(), cpu_quota()] + ([int(said)] if said.isdecimal() and int(said) else [])
    return max(1, int(min(limits)))


@contextmanager
def computing(wanted: int | None = None, *, torch: bool = True) -> Iterator[int]:
    """Compute with ``wanted`` threads, by default ``threads()``; yields how many. Afterwards all is as it was.

    This sets PyTorch's threads (and imports it; not with ``torch=False``). ONNX sessions opened meanwhile take
    ``threads()``. A smaller number that the caller gave PyTorch stands. Raises ``PruneAttnError`` for a wrong number.
    """
    global _count
    if wanted is not None and not 1 <= wanted <= MOST_THREADS:
        raise PruneAttnError(f"--threads {wanted}: must be 1 to {MOST_THREADS}")
    before, module = _count, import_module("torch") if torch else None
    _count = wanted or threads()
    if module is not None:
        set_before = module.get_num_threads()
        _count = wanted or min(_count, set_before)
        module.set_num_threads(_count)
    try:
        yield _count
    finally:
        _count = before
        if module is not None:
            module.set_num_threads(set_before)


def busy() -> str | None:
    """A line that says so where more wants to run on this machine than it has cores."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= cores:
        return None
    return f"other work is running: the load is {load:.1f} on {cores} cores, so this takes longer and times vary" + (
        f"; fewer threads than {threads()} may be faster (--threads)" if threads() > 1 else ""
    )


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the process's control groups (version 1 or 2) allow; infinity without a quota.

    A group is bound by its parents too. In a container the files may lie at the mount itself.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return float("inf")
    quotas = [float("inf")]
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            roots = (mount, mount / "unified")
        elif "cpu" in controllers.split(","):
            roots = (mount / controllers, mount / "cpu")
        else:
            continue
        for root in roots:
            place = root / path.lstrip("/")
            quotas += [_quota(folder) for folder in (place, *place.parents) if folder.is_relative_to(root)]
    return min(quotas)


def _quota(folder: Path) -> float:
    """Of one group: ``cpu.max`` has "quota period" or "max period", version 1 a file for each (-1: none)."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return float("inf")
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return float("inf")
    return int(quota) / int(period)


def cpu_cores() -> int:
    """Cores that this process may run on; two threads of one core count once, as they share what computes."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def setting(device: str) -> dict[str, Any]:
    """What must be equal for figures of two runs to belong together, by what a person calls it."""
    facts: dict[str, Any] = {
        "number of threads": threads(),
        "processor": cpu_name(),
        "version of Python": platform.python_version(),
        **{f"version of {name}": package_version(name) for name in PACKAGES},
    }
    if device.startswith("cuda"):
        import torch

        facts["GPU"] = torch.cuda.get_device_name(device)
    return facts


def package_version(package: str) -> str | None:
    """``None`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def reading_seconds(parameters: int, tokens: float, device: str) -> float:
    """About how long a model takes to read so many tokens; a guess for progress, right within a factor of a few."""
    speed = 2e14 if device.startswith("cuda") else 3e10 * threads()  # operations a second
    return 2 * parameters * tokens / speed


def decoding_seconds(nbytes: int, steps: float, device: str) -> float:
    """The same for so many decode steps, each of which reads all the weights once."""
    return steps * (nbytes / (2e12 if device.startswith("cuda") else 1e10) + 1e-3)
