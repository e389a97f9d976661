"""Images inside tar files, read in place. An index of the members' offsets is made once, and nothing is unpacked."""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kdcache.datasets.fetching import damaged_file

__all__ = ["Member", "in_tar", "members"]


@dataclass(frozen=True)
class Member:
    """The bytes of a regular file inside a tar file."""

    name: str
    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.file.open("rb") as tar:
            tar.seek(self.offset)
            return tar.read(self.size)


def members(file: Path, offset: int = 0) -> Iterator[Member]:
    """Regular files in an uncompressed tar file, or in an inner tar file that begins at byte `offset` of `file`."""
    try:
        with file.open("rb") as whole:
            whole.seek(offset)  # tarfile starts at the present position; its offsets count from the file's start
            with tarfile.open(fileobj=whole, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        yield Member(member.name, file, member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all members, possibly millions
    except (tarfile.TarError, EOFError) as error:
        raise damaged_file(file, f"{type(error).__name__}: {error}") from None


def in_tar(member: Member) -> Callable[[], Image.Image]:
    """A function that opens the image inside a tar file."""
    return lambda: Image.open(io.BytesIO(member.read()))
