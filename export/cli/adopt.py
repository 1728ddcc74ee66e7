"""``prune-attn adopt``."""

from __future__ import annotations

from typing import Any

from cloup import argument, command, option

from export.cli.options import JSON, PATH, examples
from export.cli.show import print_json, say


@command(epilog=examples("adopt trained --like pruned", "adopt trained --like pruned --json"))
@argument("directory", type=PATH, help="What save_pretrained wrote after PRUNED was trained further.")
@option("--like", type=PATH, required=True, metavar="PRUNED", help="The directory of convert that was trained.")
@JSON
def adopt(as_json: bool, **options: Any) -> None:
    """Write plan, card and graph for DIRECTORY, which was trained after PRUNED was pruned.

    It is marked as changed: verify checks its structure, and push takes it.
    """
    from export.adopt import adopt

    result = adopt(**options)
    if as_json:
        print_json(result.to_json())
        return
    say(f"{result.path}: adopted; {', '.join(result.files)} were written")
    for note in result.notes:
        say(f"note: {note}")
