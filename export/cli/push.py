"""``prune-attn push``."""

from __future__ import annotations

from typing import Any

import click

from export.cli.bars import show_progress
from export.cli.options import JSON, PATH, QUIET
from export.cli.show import print_json, show_push


@click.command()
@click.argument("output", type=PATH)
@click.argument("repository")
@click.option("--private", is_flag=True, help="Make the repository private, where it is new.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, or to refs/pr/N.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the main branch.")
@click.option("--commit-message", metavar="TEXT", help="What the commit says.")
@click.option("--dry-run", is_flag=True, help="List what would be pushed; ask nobody, send nothing.")
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
