"""Asking the Hub: again after what passes by itself, errors in one line, no token in them."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pruner.errors import MachineError, PruneAttnError

T = TypeVar("T")


_TRIES = 4  # waiting 1, 2 and 4 seconds, or as long as the Hub says


_PATIENCE = 120  # the longest wait, in seconds, that the Hub may ask for


def ask(
    question: Callable[[], T], repo_id: str, *, revision: str | None = None, write: bool = False, again: bool = True
) -> T:
    """Call ``huggingface_hub``, once more after what passes by itself (429, 5xx, a lost connection).

    What it raises becomes one line that says what to do, without a token in it: ``PruneAttnError``, or
    ``MachineError`` where the Hub or the network failed. ``again=False``: what must not be done twice is not.
    """
    wait = 1.0
    for left in reversed(range(_TRIES)):
        try:
            return question()
        except PruneAttnError:
            raise
        except Exception as error:
            passes, seconds = _passes(error)
            if left and again and passes and (seconds or 0) <= _PATIENCE:
                time.sleep(wait if seconds is None else seconds)
                wait *= 2
                continue
            if isinstance(error, OSError) and error.errno and not _unreachable(error):
                raise  # the disk
            problem = explain(error, repo_id, revision, write)
        raise problem from None  # the library's own exceptions may carry headers
    raise AssertionError


def explain(error: BaseException, repo_id: str, revision: str | None = None, write: bool = False) -> PruneAttnError:
    """What went wrong at the Hub, in one line that says what to do about it."""
    from huggingface_hub import constants, errors, get_token

    page, status, chain = f"https://huggingface.co/{repo_id}", _status(error), list(_chain(error))

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if is_a(errors.GatedRepoError):
        then = f"then {log_in}" if get_token() is None else "with the account that your token belongs to"
        return PruneAttnError(f"{repo_id}: is gated; accept its licence at {page}, {then}")
    if is_a(errors.RevisionNotFoundError):
        return PruneAttnError(
            f"{repo_id}: has no revision {revision or 'main'!r}; give a branch, a tag or a commit of it with --revision"
        )
    if is_a(errors.LocalTokenNotFoundError):
        return PruneAttnError(f"{repo_id}: no token is set; {log_in}")
    if is_a(errors.RepositoryNotFoundError) or (status == 404 and not is_a(errors.EntryNotFoundError)):
        hint = log_in if get_token() is None else "use a token that may see it"
        no_path = "" if write else "there is no such directory, and "
        return PruneAttnError(
            f"{repo_id}: {no_path}on the Hub it is missing or private ({status or 404}); check the name, or {hint}"
        )
    if status == 401:
        return PruneAttnError(f"{repo_id}: the Hub does not accept your token (401); log in again with `hf auth login`")
    if status == 403:
        need = "that may write to it" if write else "that may read it"
        return PruneAttnError(f"{repo_id}: the Hub forbids it (403{_said(error)}); use a token {need}: {log_in}")
    if status in (409, 412):
        return PruneAttnError(f"{repo_id}: was changed by somebody else meanwhile ({status}{_said(error)}); try again")
    if status == 429:
        after = _retry_after(error)
        when = f"after {after} seconds" if after else "later"
        return MachineError(f"{repo_id}: the Hub has had too many requests from you (429); try again {when}")
    if status and status >= 500:
        return MachineError(f"{repo_id}: the Hub fails ({status}); try again later, what is done stays done")
    if status:
        return PruneAttnError(f"{repo_id}: the Hub refuses ({status}{_said(error)})")
    if constants.HF_HUB_OFFLINE:
        return PruneAttnError(
            f"{repo_id}: there is no such directory, and it is not in the Hub's cache; HF_HUB_OFFLINE keeps from "
            "fetching it, unset it"
        )
    if is_a(UnicodeEncodeError) or "Illegal header value" in str(chain[-1]):
        return PruneAttnError(f"{repo_id}: your token has characters in it that no token has; {log_in}")
    text = _without_token(" ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split()))[:200]
    if _unreachable(error):
        return MachineError(
            f"{repo_id}: {'' if write else 'is no directory here, and '}{constants.ENDPOINT} cannot be reached, or the "
            f"connection was lost ({text}); check the network and run it again, what is done stays done"
        )
    return MachineError(f"{repo_id}: the Hub's answer could not be used ({text})")


def _chain(error: BaseException) -> Iterable[BaseException]:
    """The error and what caused it, the outermost first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return seen


def _response(error: BaseException) -> Any:
    return next((r for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None)


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)


def _retry_after(error: BaseException) -> int | None:
    value = str(getattr(_response(error), "headers", {}).get("Retry-After", ""))
    return int(value) if value.isdigit() else None


def _said(error: BaseException) -> str:
    """The Hub's own words, where it has any."""
    words = next((w for e in _chain(error) if (w := getattr(e, "server_message", None))), None)
    return f": {_without_token(' '.join(str(words).split()))[:160]}" if words else ""


def _unreachable(error: BaseException) -> bool:
    """Whether no answer came: the HTTP library's own errors, by whichever library it is, and what wraps them."""
    from huggingface_hub import errors

    libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    return any(
        type(e).__module__.split(".")[0] in libraries
        or isinstance(e, (ConnectionError, TimeoutError, errors.OfflineModeIsEnabled))
        or "Consistency check failed" in str(e)  # the connection ended early
        for e in _chain(error)
    )


def _passes(error: BaseException) -> tuple[bool, int | None]:
    """Whether it may be gone the next time, and the seconds that the Hub asks to wait."""
    from huggingface_hub import constants

    status = _status(error)
    if status is None:
        return _unreachable(error) and not constants.HF_HUB_OFFLINE, None
    return status in (408, 429, 500, 502, 503, 504), _retry_after(error)


def _why_not() -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "<token>") if token else text
    return re.sub(r"hf_\w{6,}|(?<=Bearer )[^\s'\"]+", "<token>", text)


def _range(url: str, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end``, the latter not included."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    response = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    return response.content[: end - start] if response.status_code == 206 else response.content[start:end]


class quiet:  # noqa: N801, a context manager
    """The library's warnings about retries would be lines of their own beside the one that counts."""

    def __enter__(self) -> None:
        from huggingface_hub.utils import logging

        self.before = logging.get_verbosity()
        if not os.environ.get("HF_HUB_VERBOSITY") and not os.environ.get("HF_DEBUG"):
            logging.set_verbosity(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils import logging

        logging.set_verbosity(self.before)


def beside(work: Callable[[], T], stop: threading.Event | None = None) -> T:
    """Run ``work`` in a thread of its own: an interrupt of the main thread then need not wait for its end.

    ``stop`` is set at an interrupt, and the thread given a moment to end by itself; what it was fetching is removed.
    """
    out: list[Any] = []

    def run() -> None:
        try:
            out.append((work(), None))
        except BaseException as error:
            out.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():  # by turns: a signal that another thread takes does not wake a join without an end
            thread.join(0.2)
    except BaseException:
        if stop is not None:
            stop.set()
            thread.join(1)
            _remove_incomplete()
        raise
    value, error = out[0]
    if error is not None:
        raise error
    return value


def _remove_incomplete() -> None:
    """Remove the half-fetched files that this process has open (and no other's), where the system can tell."""
    for link in Path("/proc/self/fd").glob("*"):
        try:
            file = os.readlink(link)
        except OSError:
            continue
        if file.endswith(".incomplete"):
            Path(file).unlink(missing_ok=True)
