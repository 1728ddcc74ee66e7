"""Write, prove and deliver pruned checkpoints. The command line only calls what is here."""

from export.adopt import Adoption, adopt
from export.convert import convert
from export.deliver import Export, export
from export.push import Push, push
from export.verify import Verification, verify
from export.write import Conversion

__all__ = ["Adoption", "Conversion", "Export", "Push", "Verification", "adopt", "convert", "export", "push", "verify"]
