"""The fuzzer, for a quarter of a minute; ``scripts/fuzz`` runs it at length, and says how a case is run again."""

from __future__ import annotations

import subprocess
import sys

from conftest import PIPES, ROOT


def test_fuzz():
    fuzz = [sys.executable, ROOT / "scripts" / "fuzz.py", "--seed", "19", "--cases", "100"]
    done = subprocess.run(fuzz, **PIPES, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("100 cases"), done.stdout
