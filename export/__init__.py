"""Write, prove and deliver pruned checkpoints. The command line only calls what is here."""

from export.convert import Conversion, convert
from export.deliver import Export, export
from export.hub import Push, push
from export.verify import Verification, verify

__all__ = ["Conversion", "Export", "Push", "Verification", "convert", "export", "push", "verify"]
