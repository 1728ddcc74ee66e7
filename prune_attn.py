"""The console script's entry: quiet about an interrupt that comes before there is anything to clean up."""

import signal


def main() -> None:
    """Run the command line (``export.cli``)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C simply ends the process
    from export.cli.main import main

    main()


if __name__ == "__main__":
    main()
