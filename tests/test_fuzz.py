"""The fuzzer, for about half a minute; ``scripts/fuzz`` runs it at length, and says how a case is run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_fuzz():
    fuzz = Path(__file__).parent.parent / "scripts" / "fuzz.py"
    done = subprocess.run(
        [sys.executable, fuzz, "--seed", "19", "--cases", "200"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("200 cases"), done.stdout
