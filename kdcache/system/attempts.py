"""When to ask a server again: how long it is waited for, how often, and which of its answers are final."""

import random
import re
import threading
import time
from typing import NoReturn

from kdcache.errors import IncompatibleError, NotFoundError, RetryError

__all__ = [
    "WORTH_REPEATING",
    "Attempts",
    "MissingError",
    "credentials",
    "ending",
    "give_up_if_certain",
    "reason_of",
    "refuse",
    "status_of",
]

FIRST_ATTEMPTS = 4  # of a server that never answered: its name may be mistyped, and somebody is waiting
ATTEMPTS = 10  # in a row without a new byte, of a server that did: two minutes in all
BACKOFF = 0.5  # seconds before the second attempt; doubled before each further one
LONGEST_BACKOFF = 30.0
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0  # seconds without a byte


class MissingError(NotFoundError):
    """The server says that it has no such file."""


def ending() -> bool:
    """Whether the interpreter only waits for its threads, which should then end too."""
    return not threading.main_thread().is_alive()


class Attempts:
    """Attempts in a row that brought nothing new, with a growing pause before each next one."""

    def __init__(self, what: str, *, answered: bool = False) -> None:
        self._what, self._limit = what, ATTEMPTS if answered else FIRST_ATTEMPTS
        self._failed = 0

    def progressed(self) -> None:
        self._failed, self._limit = 0, ATTEMPTS

    def failed(self, reason: str) -> None:
        """Returns when it is time to try again; raises RetryError when it is time to give up."""
        self._failed += 1
        if self._failed >= self._limit or ending():
            raise RetryError(
                f"{self._what} cannot be reached",
                why=f"tried {self._failed} times, the last time: {reason}",
                fix="look at the address and the network, then repeat the command: what was fetched is kept",
            )
        pause = min(LONGEST_BACKOFF, BACKOFF * 2 ** (self._failed - 1)) * random.uniform(0.5, 1.0)
        until = time.monotonic() + pause
        while (left := until - time.monotonic()) > 0 and not ending():
            time.sleep(min(left, 0.2))


_STATUS = re.compile(r"non-2xx status code: (\d{3})([^:]*)")
_CAUSE = re.compile(r'message: "([^"]+)"|error: "([^"]+)"')
_CREDENTIALS_OF_MACHINES = "169.254.169.254"  # where clouds keep them, and obstore looks last
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
WORTH_REPEATING = {408, 425, 429}  # of the client errors: too slow, too early, too often


def status_of(error: Exception) -> int | None:
    """The HTTP status that obstore's error tells of, if any."""
    # It has classes for 401, 403 and 404 only; any other status is in its text.
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def reason_of(error: Exception) -> str:
    """What happened, in few words: obstore's text goes on for a page, with the cause at its end."""
    text = str(error)
    if found := _STATUS.search(text):
        return f"the server answered {found[1]}{found[2]}".rstrip()
    if "TimedOut" in text or "kind: Timeout" in text:
        return f"no answer for {READ_TIMEOUT:g} seconds"
    causes = [message or other for message, other in _CAUSE.findall(text)]
    return causes[-1] if causes else text.partition("\n")[0].partition(" in ")[0]


def give_up_if_certain(error: Exception, where: str, answered: bool) -> None:
    """Raise what asking again would not change, also considering whether the server has `answered` before."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status in {404, 410}:
        raise MissingError(
            f"{where} does not exist", why="the server answered 404 Not Found", fix="correct the address"
        ) from None
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        raise NotFoundError(f"not allowed to read {where}", why=reason_of(error), fix=credentials(where)) from None
    if _CREDENTIALS_OF_MACHINES in str(error) and not answered:
        why = "no credentials are set, and this machine has none of its own"
        raise NotFoundError(f"not allowed to read {where}", why=why, fix=credentials(where)) from None
    if status is None and "Content-Length" in str(error):
        raise IncompatibleError(
            f"{where}: the server does not say how long the file is",
            why="it sends no Content-Length, so that a broken connection would look like the end of the file",
            fix="serve the archive's files as they are, without compressing them on the way",
        ) from None
    if status is None and (found := _CERTIFICATE.search(str(error))):
        raise NotFoundError(
            f"{where} is not read",
            why=f"the server's certificate is not one to trust: {found[1]}",
            fix="where you know who issued it: export SSL_CERT_FILE=THEIR-CERTIFICATES.pem",
        ) from None
    if status is None and "following redirect" in str(error):
        refuse(where, "the server redirects in circles, or from https to http")
    if status is not None and 300 <= status < 500 and status not in WORTH_REPEATING:
        refuse(where, reason_of(error))


def refuse(where: str, why: str) -> NoReturn:
    raise NotFoundError(f"{where} cannot be read", why=why, fix="correct the address, or ask whoever runs the server") from None


def credentials(where: str) -> str:
    if where.startswith("s3:"):
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_REGION, AWS_ENDPOINT_URL), "
            "or AWS_SKIP_SIGNATURE=true for public data; profiles of ~/.aws are read where boto3 is installed"
        )
    if where.startswith("hf:"):
        return "log in with: hf auth login, or set HF_TOKEN; ask for access on the page of the dataset if it is gated"
    return "ask whoever runs the server for access"
