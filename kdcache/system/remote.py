"""Bytes by name on other machines: over HTTP, on object stores and on the Hugging Face Hub.

obstore sends single requests. From which byte on to ask again is decided here, and when in `attempts`, alike for every server.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from kdcache import errors
from kdcache.errors import KdcacheError, NotFoundError, RetryError, UsageError, unknown_name
from kdcache.system import attempts as patience
from kdcache.system.attempts import (
    WORTH_REPEATING,
    Attempts,
    MissingError,
    credentials,
    give_up_if_certain,
    reason_of,
    refuse,
    status_of,
)

__all__ = ["SCHEMES", "MissingError", "Remote", "hub_address", "is_url", "open_remote"]

SCHEMES = ("https", "http", "s3", "gs", "az", "hf")
_NO_TIMEOUT = "365days"  # of a whole request: a large file on a slow line is no error


class Remote(Protocol):
    """Files below a URL. Names are relative POSIX paths; who calls has made sure that they lead nowhere else."""

    url: str  # the same bytes at any time and in any process, where the server knows revisions

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of `name` from byte `start` on, piece by piece as they arrive; broken connections are made anew.

        Raises MissingError for what is not there, NotFoundError for what is not allowed, RetryError after many attempts that
        brought nothing.
        """

    def size(self, name: str) -> int: ...

    def names(self, folder: str = "") -> Iterator[str]:
        """Names of all files below `folder`, in order; none where the server lists nothing."""

    def require_writable(self) -> None:
        """UsageError where files can only be read. Asks no server."""

    def put(self, name: str, data: bytes | Path) -> None: ...
    def delete(self, name: str) -> None: ...


def is_url(location: object) -> bool:
    return "://" in str(location)


def open_remote(url: str) -> Remote:
    """Raises UsageError for a URL that is not understood. Asks no server, but the Hub for the commit of a revision."""
    try:
        parts = urlsplit(url)
    except ValueError as error:  # as of half an IPv6 address
        raise _no_url(url, error) from None
    if parts.scheme not in SCHEMES:
        known = [f"{scheme}://" for scheme in SCHEMES]
        raise unknown_name("kind of URL", f"{parts.scheme}://", known, fix=f"use one of {', '.join(known)}")
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise UsageError(
            f"{url.partition('?')[0]}?... is not the folder of an archive",
            why="an archive is many files below one URL, and a query or fragment names a single one",
            fix="give the URL up to the question mark; for private data use the credentials of s3:// or hf://",
        )
    if parts.username or parts.password:
        raise UsageError(
            f"{parts.scheme}://...@{parts.hostname} holds a user name or password",
            why="URLs of archives are printed, and recorded with the results of runs",
            fix="leave it out; for private data use the credentials of s3:// or hf://",
        )
    if not parts.netloc:
        raise UsageError(f"{url} names no host", why="what follows :// is a host or bucket", fix=f"{parts.scheme}://HOST/FOLDER")
    url = url.rstrip("/")
    if parts.scheme == "hf":
        return _open_hub(url)
    if parts.scheme in {"http", "https"}:
        return _Objects(url, url, listing=False)
    return _Objects(url, url, writable=True)


# ------------------------------------------------------------------------------------------------------- obstore


class _Objects:
    """Files below `base`, which obstore understands; people know it as `url`."""

    def __init__(
        self, url: str, base: str, *, listing: bool = True, writable: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        self.url = url
        self._base, self._listing, self._writable, self._headers = base, listing, writable, dict(headers or {})
        self._answered = False

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        if _threads_are_lost():
            yield from _in_another_process(self.url, "stream", name, start)
            return
        import obstore
        from obstore.exceptions import NotSupportedError

        attempts = self._attempts(name)
        position, ranges = start, True
        while True:
            offset = position if ranges else 0
            try:
                answer = obstore.get(self._store, name, options={"range": {"offset": offset}} if offset else None)
                for piece in answer.stream(min_chunk_size=1):  # larger ones would be lost when the line breaks
                    self._answered = True
                    offset += len(piece)
                    if offset > position:
                        attempts.progressed()
                        new = memoryview(piece)[position - offset :]
                        position = offset
                        yield bytes(new) if len(new) < len(piece) else piece
                return
            except NotSupportedError:  # to a server without ranges we listen again from its first byte on
                if not ranges:
                    raise
                ranges = False
            except _failures() as error:
                if status_of(error) == 416:  # there is nothing from this byte on
                    return
                give_up_if_certain(error, self._where(name), self._answered)
                attempts.failed(reason_of(error))

    def size(self, name: str) -> int:
        import obstore

        if _threads_are_lost():
            return int(b"".join(_in_another_process(self.url, "size", name, 0)))
        return int(self._repeated(name, lambda: obstore.head(self._store, name))["size"])

    def names(self, folder: str = "") -> Iterator[str]:
        import obstore

        _require_threads(self._where(folder))
        attempts, last = self._attempts(folder), None
        while self._listing:
            try:
                for page in obstore.list(self._store, folder or None, offset=last):
                    for item in page:
                        self._answered, last = True, item["path"]
                        attempts.progressed()
                        yield last
                return
            except _failures() as error:
                give_up_if_certain(error, self._where(folder), self._answered)
                attempts.failed(reason_of(error))

    def put(self, name: str, data: bytes | Path) -> None:
        import obstore

        self.require_writable()
        self._repeated(name, lambda: obstore.put(self._store, name, data))

    def delete(self, name: str) -> None:
        import obstore

        self.require_writable()
        self._repeated(name, lambda: obstore.delete(self._store, name))

    def require_writable(self) -> None:
        if not self._writable:
            raise UsageError(
                f"{self.url} cannot be written to",
                why="files are put on object stores only",
                fix="use a URL such as s3://BUCKET/FOLDER",
            )

    def _repeated(self, name: str, request: Any) -> Any:
        _require_threads(self._where(name))
        attempts = self._attempts(name)
        while True:
            try:
                answer = request()
                self._answered = True
                return answer
            except _failures() as error:
                give_up_if_certain(error, self._where(name), self._answered)
                attempts.failed(reason_of(error))

    def _attempts(self, name: str) -> Attempts:
        return Attempts(self._where(name), answered=self._answered)

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}".rstrip("/")

    @property
    def _store(self) -> Any:
        # Headers are part of the key, so that a token is never sent for somebody else's URL.
        return _obstore(self._base, tuple(sorted(self._headers.items())), patience.CONNECT_TIMEOUT, patience.READ_TIMEOUT)


def _failures() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return BaseError, FileNotFoundError


@cache
def _obstore(base: str, headers: tuple[tuple[str, str], ...], connect_timeout: float, read_timeout: float) -> Any:
    """obstore's store of a URL: with connections that are kept for the next request, and without a will of its own to retry."""
    from datetime import timedelta

    from obstore.store import from_url

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    plain = endpoint.startswith("http://") if base.startswith("s3:") else base.startswith("http:")
    failures: tuple[type[Exception], ...] = (ValueError, *_failures())
    try:
        return from_url(
            base,
            client_options={
                "allow_http": plain,  # where it is not, no redirect leads from https to http
                "connect_timeout": timedelta(seconds=connect_timeout),
                "read_timeout": timedelta(seconds=read_timeout),
                "timeout": _NO_TIMEOUT,
                "default_headers": dict(headers),
            },
            retry_config={"max_retries": 0},
            **({"credential_provider": profile} if base.startswith("s3:") and (profile := _aws_profile()) else {}),
        )
    except failures as error:
        raise _no_url(base, error) from None


def _no_url(url: str, error: Exception) -> UsageError:
    return UsageError(f"{url} is not a URL of an archive", why=str(error).partition("\n")[0], fix="correct the URL")


def _aws_profile() -> Any:
    """What boto3 finds in ~/.aws, where obstore does not look; None if the environment has credentials, or boto3 is not here."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return None
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    session = boto3.Session()
    return Boto3CredentialProvider(session) if session.get_credentials() else None


# ------------------------------------------------------------------------------------------------------- the Hub


_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+))?")
_COMMIT = re.compile("[0-9a-f]{40}")


class _Hub(_Objects):
    """A folder of a dataset repository at one commit: what is read today and tomorrow are the same bytes."""

    def __init__(self, repo: str, commit: str, folder: str) -> None:
        from huggingface_hub import HfApi, get_token

        token = get_token()
        super().__init__(
            f"hf://datasets/{repo}@{commit}" + (f"/{folder}" if folder else ""),
            f"{HfApi().endpoint}/datasets/{repo}/resolve/{commit}/{quote(folder)}".rstrip("/"),
            headers={"authorization": f"Bearer {token}"} if token else {},
        )
        self._repo, self._commit, self._folder = repo, commit, folder

    def names(self, folder: str = "") -> Iterator[str]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError

        below = "/".join(filter(None, (self._folder, folder)))

        def tree() -> list[Any]:
            options: dict[str, Any] = {"recursive": True, "repo_type": "dataset", "revision": self._commit}
            with suppress(EntryNotFoundError):  # a folder that is not there holds nothing
                return list(HfApi().list_repo_tree(self._repo, below or None, **options))
            return []

        start = len(self._folder) + 1 if self._folder else 0
        yield from sorted(item.path[start:] for item in _ask_hub(self.url, tree) if hasattr(item, "size"))  # folders have none


def hub_address(url: str) -> tuple[str, str | None, str]:
    """Repository, revision (None: not said) and folder of `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`."""
    found = _HUB.fullmatch(url.rstrip("/"))
    if not found:
        raise UsageError(
            f"{url} is not a dataset on the Hub",
            why="archives lie in dataset repositories",
            fix="hf://datasets/ORGANISATION/NAME[@REVISION][/FOLDER]",
        )
    return found["repo"], unquote(found["revision"]) if found["revision"] else None, found["folder"] or ""


def _open_hub(url: str) -> Remote:
    repo, said, folder = hub_address(url)
    revision = said or "main"
    if not _COMMIT.fullmatch(revision):
        from huggingface_hub import HfApi

        revision = _ask_hub(url, lambda: HfApi().dataset_info(repo, revision=revision, timeout=patience.READ_TIMEOUT).sha)
    return _Hub(repo, revision, folder)


def _ask_hub(url: str, question: Any) -> Any:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    attempts = Attempts(url)
    while True:
        try:
            return question()
        except (GatedRepoError, RepositoryNotFoundError) as error:  # the Hub tells nobody that a private dataset exists
            why = "no such dataset, or not one that this account may read"
            raise NotFoundError(f"{url}: {type(error).__name__}", why=why, fix=credentials(url)) from None
        except RevisionNotFoundError:
            why = "the dataset has no such revision"
            raise NotFoundError(f"{url} does not exist", why=why, fix="correct what follows @") from None
        except HFValidationError as error:
            raise UsageError(f"{url} is not a dataset on the Hub", why=str(error), fix="correct its name") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if 400 <= status < 500 and status not in WORTH_REPEATING:
                refuse(url, f"the Hub answered {status}")
            attempts.failed(f"the Hub answered {status}")
        except KdcacheError:
            raise
        except Exception as error:  # of whichever HTTP library huggingface_hub uses
            attempts.failed(f"{type(error).__name__}: {error}".partition("\n")[0])


# -------------------------------------------------------------------------------------------------- after a fork


@cache
def _owner() -> int:
    return os.getpid()


def _threads_are_lost() -> bool:
    """Whether this process was forked from one that has used obstore, whose threads stayed there: its requests never end here."""
    return _owner() != os.getpid()


def _require_threads(where: str) -> None:
    if _threads_are_lost():
        raise UsageError(
            f"{where}: listed or written in a forked process",
            why="the threads that talk to servers stayed in the process that it was forked from",
            fix="do this before forking, or start the process by spawn",
        )


def _in_another_process(url: str, verb: str, name: str, start: int) -> Iterator[bytes]:
    """What a fresh interpreter gets to hear. Takes half a second; forked workers need it only for what was not fetched before."""
    code = "from kdcache.system.remote import _answer; _answer()"
    command = [sys.executable, "-c", code, url, verb, name, str(start)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as helper:
        assert helper.stdout is not None
        assert helper.stderr is not None
        try:
            while piece := helper.stdout.read1(1 << 20):  # type: ignore[attr-defined]
                yield piece
            said = helper.stderr.read()
            status = helper.wait()
        except BaseException:  # nobody listens any more
            helper.kill()
            raise
    if status:
        try:
            kind, what, why, fix = json.loads(said.splitlines()[-1])
            error = (MissingError if kind == MissingError.__name__ else getattr(errors, kind))(what, why=why, fix=fix)
        except (ValueError, IndexError, AttributeError, TypeError):
            reason = said.decode(errors="replace").strip().rpartition("\n")[2] or f"its exit status was {status}"
            why = f"the process that fetches it failed: {reason}"
            error = RetryError(f"{url}/{name} was not fetched", why=why, fix="repeat the command")
        raise error


def _answer() -> None:
    """The other end of `_in_another_process`."""
    url, verb, name, start = sys.argv[1:]
    try:
        remote = open_remote(url)
        for piece in remote.stream(name, int(start)) if verb == "stream" else [str(remote.size(name)).encode()]:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except KdcacheError as error:
        print(json.dumps([type(error).__name__, error.what, error.why, error.fix]), file=sys.stderr)
        sys.exit(error.exit_code)
