"""SIGINT, SIGTERM and SIGHUP end the process by an exception, so that nothing half written is left."""

from __future__ import annotations

import signal
from typing import NoReturn


class Stopped(BaseException):
    """A signal asked the process to end; unwinding removes what was half written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        told = getattr(self, "__notes__", [])  # by what was stopped: see pruner.progress.keeping
        return "; ".join([f"stopped by {signal.Signals(self.signum).name}", "nothing half written is left", *told])


def stop(signum: int, frame: object) -> NoReturn:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # the first one is enough, and nothing may cut the cleaning short
    raise Stopped(signum)


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
