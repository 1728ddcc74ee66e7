"""See ``scripts/bench_formats``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from synthetic import make

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from foreign import write_bin, write_meta

PROGRAM = """
import sys, time
from prune_attn import convert
start = time.perf_counter()
result = convert(sys.argv[1], sys.argv[2], drop="33%")
took = time.perf_counter() - start
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print(took, peak, sum(result.shards.values()))
"""


def main() -> None:
    shape = sys.argv[1] if len(sys.argv) > 1 else "2gb"
    table = Table("source", "GB written", "s", "peak MB")
    with tempfile.TemporaryDirectory(prefix="bench-formats-", dir=sys.argv[2] if len(sys.argv) > 2 else None) as work:
        plain = Path(work, "plain")
        make(plain, shape)
        for name, source in (
            ("safetensors", lambda: plain),
            ("pytorch_model.bin, 4 shards", lambda: write_bin(plain, Path(work, "bin"), shards=4)),
            ("pytorch_model.bin without zip", lambda: write_bin(plain, Path(work, "old"), legacy=True)),
            ("Meta, 2 parts", lambda: write_meta(plain, Path(work, "meta"), 2)),
        ):
            directory, output = source(), Path(work, "out")
            command = [sys.executable, "-c", PROGRAM, directory, output]
            took, peak, nbytes = map(float, subprocess.check_output(command, text=True).split())
            table.add_row(name, f"{nbytes / 1e9:.2f}", f"{took:.2f}", f"{peak / 1e6:.0f}")
            shutil.rmtree(output)
            if directory != plain:
                shutil.rmtree(directory)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
