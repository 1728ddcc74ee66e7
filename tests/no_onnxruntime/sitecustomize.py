"""On PYTHONPATH: Python runs this as it starts, and ``onnxruntime`` is looked for and not found."""

import importlib.machinery
import sys

real = importlib.machinery.PathFinder


class Finder(real):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0].startswith("onnxruntime") else real.find_spec(name, path, target)


sys.meta_path = [Finder if finder is real else finder for finder in sys.meta_path]
