"""Images inside tar files, read in place. An index of the members' offsets is made once, and nothing is unpacked."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kdcache.datasets.fetching import damaged_file
from kdcache.errors import UsageError

__all__ = ["Member", "in_tar", "members"]

LARGEST_HEADER = 1 << 20  # bytes of a header's extension, as of a long name
LARGEST_MEMBER = 1 << 30  # bytes


@dataclass(frozen=True)
class Member:
    """The bytes of a regular file inside a tar file."""

    name: str
    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        self.require_small()
        with self.file.open("rb") as tar:
            tar.seek(self.offset)
            return tar.read(self.size)

    def require_small(self) -> None:
        """Raises UsageError for what would take all memory to read."""
        if self.size > LARGEST_MEMBER:
            raise UsageError(
                f"{self.file} has a member {self.name!r} of {self.size:,} bytes",
                why=f"it would be read into memory, and no picture has more than {LARGEST_MEMBER:,} bytes",
                fix="make the tar file again without it",
            )


class _Headers(io.FileIO):
    """A file of which headers are read: a header that claims to be huge is refused before memory is taken for it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header at byte {self.tell():,} claims to have {size:,} bytes")
        return super().read(size) or b""


def members(file: Path, offset: int = 0) -> Iterator[Member]:
    """Regular files in an uncompressed tar file, or in an inner tar file that begins at byte `offset` of `file`."""
    try:
        with _Headers(file) as whole:
            length = os.fstat(whole.fileno()).st_size
            whole.seek(offset)  # tarfile starts at the present position; its offsets count from the file's start
            with tarfile.open(fileobj=whole, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        _require_size(member, file, length)
                        yield Member(member.name, file, member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all members, possibly millions
    except (tarfile.TarError, EOFError) as error:
        raise damaged_file(file, f"{type(error).__name__}: {error}") from None


def _require_size(member: tarfile.TarInfo, file: Path, length: int) -> None:
    """Refuse by its name a member that is not all there."""
    if member.size > length - member.offset_data:
        raise damaged_file(file, f"its member {member.name!r} claims {member.size:,} bytes, more than there are in the file")


def in_tar(member: Member) -> Callable[[], Image.Image]:
    """A function that opens the image inside a tar file. Raises UsageError for a member that is too large to be one."""
    member.require_small()
    return lambda: Image.open(io.BytesIO(member.read()))
