"""File names, each said once."""

from __future__ import annotations

PLAN_FILE = "pruning_plan.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PYTORCH = "pytorch_model.bin"
PYTORCH_INDEX = "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"
CARD = "README.md"
GRAPH = "model.onnx"
GENAI_CONFIG = "genai_config.json"
