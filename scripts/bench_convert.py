"""See ``scripts/bench_convert``. Each way is a process of its own, in turn, to a cold destination, fsync included."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import SHAPES, make

DROP = "33%"

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
layers = model.model.layers
for i in range(len(layers) - int(sys.argv[3]), len(layers)):
    del layers[i].self_attn, layers[i].input_layernorm
model.save_pretrained(sys.argv[2])
"""


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:  # not wait4's ru_maxrss, which begins with what this process had when it forked
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, int(next(line for line in status if line.startswith("VmHWM")).split()[1]))
        time.sleep(0.005)
    taken = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} failed: {process.stderr.read().decode()[-2000:]}")
    return taken, peak / 1024


def sync(path: Path) -> float:
    """Seconds that it takes to fsync every file below ``path``."""
    start = time.perf_counter()
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="bash scripts/bench_convert")
    parser.add_argument("--shape", choices=SHAPES, default="2gb", help="default: 2gb")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--no-transformers", action="store_true", help="leave the ordinary way out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-convert-") as name:
        work = Path(name)
        source, out, plain = work / "source", work / "out", work / "plain.bin"
        make(source, options.shape)
        drop = json.loads(subprocess.check_output(
            [sys.executable, "-m", "export.cli", "convert", source, out, "--drop", DROP, "--dry-run", "--json"]
        ))  # fmt: skip
        kept, dropped = sum(drop["shards"].values()), len(drop["plan"]["attention"])
        with open(plain, "wb") as file:  # exactly as many bytes as our output has, for cp
            for shard in sorted(source.glob("*.safetensors")):
                with open(shard, "rb") as weights:
                    while (block := weights.read(16 << 20)) and file.tell() < kept:
                        file.write(block[: kept - file.tell()])
            os.fsync(file.fileno())
        ways = {
            "cp": (["cp", str(plain), str(out)], True),
            "prune-attn convert": (
                [sys.executable, "-m", "export.cli", "convert", str(source), str(out), "--drop", DROP], False,
            ),
            "from_pretrained, delete, save_pretrained": (
                [sys.executable, "-c", TRANSFORMERS, str(source), str(out), str(dropped)], True,
            ),
        }  # fmt: skip
        if options.no_transformers:
            del ways["from_pretrained, delete, save_pretrained"]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        memory: dict[str, float] = dict.fromkeys(ways, 0.0)
        for i in range(options.runs + 1):  # the first is a warm-up, so that all read the source from the page cache
            for way, (command, needs_sync) in ways.items():
                os.sync()
                taken, peak = run(command)
                taken += sync(out) if needs_sync else 0  # ours has synced by itself
                if i:
                    seconds[way].append(taken)
                    memory[way] = max(memory[way], peak)
                shutil.rmtree(out) if out.is_dir() else out.unlink()
    base = seconds["prune-attn convert"]
    rows = {
        way: {
            "seconds": {"median": statistics.median(t), "min": min(t), "max": max(t)},
            "ratio_to_ours": statistics.median(a / b for a, b in zip(t, base, strict=True)),
            "peak_mb": memory[way],
        }
        for way, t in seconds.items()
    }
    if options.json:
        print(json.dumps({"shape": options.shape, "bytes": kept, "runs": options.runs, "ways": rows}, indent=2))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    table = Table(title=f"{options.shape}, {kept / 1e9:.2f} GB written, {options.runs} runs in turn, {machine}")
    for column in ("", "median s", "min", "max", "GB/s", "time / ours", "peak MB"):
        table.add_column(column, justify="right" if column else "left")
    for way, row in rows.items():
        median, least, most = (row["seconds"][key] for key in ("median", "min", "max"))
        speed = kept / 1e9 / median
        numbers = (f"{x:.2f}" for x in (median, least, most, speed, row["ratio_to_ours"]))
        table.add_row(way, *numbers, f"{row['peak_mb']:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
