"""``python -m export.cli``."""

from export.cli.main import main

main()
