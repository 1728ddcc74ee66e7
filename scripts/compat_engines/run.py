"""Run one engine on one model, in the engine's own venv: ``python run.py MODULE REQUEST.json RESULT.json``."""

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # this directory must not stay on the path: its modules are called what the engines are called
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    module, request, result = sys.argv[1:]
    answer = importlib.import_module(f"compat_engines.{module}").run(json.loads(Path(request).read_text()))
    Path(result).write_text(json.dumps(answer))
