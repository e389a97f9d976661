"""Signatures of archives, by the OpenSSF's model-signing. Checksums prove that an archive is whole; a signature, whose it is.

A signature covers `kdcache.json` and `README.md`, and through the manifest's checksums every byte of the archive. It is a
Sigstore bundle in `kdcache.sig`, made with an elliptic-curve key. Signing and checking need no network.
"""

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.archive.format.manifest import CARD_NAME, MANIFEST_LIMIT, MANIFEST_NAME
from kdcache.archive.format.store import LocalStore
from kdcache.archive.reading.reader import Archive
from kdcache.archive.reading.verification import Failure, Verification
from kdcache.errors import IntegrityError, NotFoundError, UsageError, printable
from kdcache.system.files import lacking
from kdcache.system.refusals import named

__all__ = ["SIGNATURE_NAME", "sign_archive", "verify_signature"]

SIGNATURE_NAME = "kdcache.sig"
SIGNATURE_LIMIT = 1 << 20
SIGNED = (MANIFEST_NAME, CARD_NAME)
MAKE_KEYS = (
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out pub.pem makes a pair"
)


def sign_archive(archive: Archive, key: Path) -> Path:
    """Sign an archive with the private key in `key` (PEM, NIST curve, not encrypted). Returns the signature's file."""
    signing = _library().signing
    _require_file(key)
    with _signed_files(archive) as folder, tempfile.TemporaryDirectory() as beside:
        made = Path(beside) / SIGNATURE_NAME
        try:
            signing.Config().set_hashing_config(_hashing()).use_elliptic_key_signer(private_key=key).sign(folder, made)
        except (ValueError, TypeError, AttributeError) as error:  # the last for keys that are on no curve
            raise UsageError(
                f"{key} is not a key that can sign",
                why=_first_line(error),
                fix=f"give an unencrypted private key in PEM on the curve P-256, P-384 or P-521: {MAKE_KEYS}",
            ) from error
        LocalStore(archive.path).write(SIGNATURE_NAME, made.read_bytes())
    return archive.path / SIGNATURE_NAME


def verify_signature(archive: Archive, public_key: Path) -> Verification:
    """Verify that the holder of `public_key`'s private half signed the archive's present manifest and card."""
    verifying = _library().verifying
    _require_file(public_key)
    if not archive.store.exists(SIGNATURE_NAME):
        raise NotFoundError(
            f"{archive.location} is not signed",
            why=f"there is no {SIGNATURE_NAME} in it",
            fix="ask whoever shared it to sign it with: kdcache sign; or leave out --signed-by",
        )
    try:
        checker = verifying.Config().set_hashing_config(_hashing()).use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError) as error:  # the last for keys that are on no curve
        raise UsageError(
            f"{public_key} is not a public key", why=_first_line(error), fix=f"give one in PEM: {MAKE_KEYS}"
        ) from error
    result = Verification("signature", checked=len(SIGNED))
    with _signed_files(archive) as folder, tempfile.TemporaryDirectory() as beside:
        signature = Path(beside) / SIGNATURE_NAME
        data = archive.store.read(SIGNATURE_NAME, limit=SIGNATURE_LIMIT)
        with named(signature):
            signature.write_bytes(data)
        try:
            checker.verify(folder, signature)
        except Exception as error:  # a stranger's file can make the parsers raise anything
            signed = " and ".join(SIGNED)
            result.failures.append(Failure(SIGNATURE_NAME, f"the signature of {signed} by {public_key}", "another one"))
            result.error = IntegrityError(
                f"{archive.location} is not what the owner of {public_key} signed",
                why=f"{SIGNATURE_NAME} was made with another key, or {signed} were changed since: {_first_line(error)}",
                fix="do not use this archive; get it again from whoever signed it, or ask which key they sign with",
            )
    return result


@contextmanager
def _signed_files(archive: Archive) -> Iterator[Path]:
    """A temporary folder with exactly the files that a signature covers."""
    with tempfile.TemporaryDirectory() as folder:
        for name in SIGNED:
            data = archive.store.read(name, limit=MANIFEST_LIMIT)
            with named(Path(folder) / name):
                (Path(folder) / name).write_bytes(data)
        yield Path(folder)


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise UsageError(
            "signatures need the package model-signing", why=_first_line(error), fix="pip install 'kdcache[sign]'"
        ) from None
    return model_signing


def _hashing() -> Any:
    return _library().hashing.Config().use_file_serialization(hashing_algorithm="sha256")


def _require_file(key: Path) -> None:
    if not key.is_file():
        raise NotFoundError(
            f"key {key} {lacking(key)}", why="a key is in a file", fix=f"correct the path {shlex.quote(str(key))}; {MAKE_KEYS}"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return printable(lines[0].strip())[:300] or type(error).__name__
