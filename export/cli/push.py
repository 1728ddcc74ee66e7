"""``prune-attn push``."""

from __future__ import annotations

from typing import Any

from cloup import argument, command, option, option_group

from export.cli.bars import show_progress
from export.cli.options import JSON, PATH, QUIET, examples
from export.cli.show import print_json, show_push


@command(
    epilog=examples("push pruned user/llama-2-13b-pruned --dry-run", "push pruned user/llama-2-13b-pruned --private")
)
@argument("output", type=PATH, help="A directory that convert wrote.")
@argument("repository", help="The Hub repository, owner/name. It is made where there is none.")
@option_group(
    "The Hub",
    option("--private", is_flag=True, help="Make the repository private, where it is new."),
    option("--revision", metavar="BRANCH", help="Push to this branch, or to refs/pr/N.  [default: main]"),
    option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the main branch."),
    option("--commit-message", metavar="TEXT", help="What the commit says."),
)
@option("--dry-run", is_flag=True, help="List what would be pushed; ask nobody, send nothing.")
@QUIET
@JSON
def push(output: str, repository: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Push OUTPUT, which convert wrote, to REPOSITORY (owner/name) on the Hub."""
    from export.push import push

    with show_progress(quiet) as progress:
        result = push(output, repository, progress=progress, **options)
    if as_json:
        print_json(result.to_json())
    else:
        show_push(result)
