"""Canvas: a whole split decoded once, uint8 `[N, 3, R, R]` in one memory map, reused by every teacher and student.

A canvas is a folder: `pixels.npy`, `labels.npy`, `sizes.npy` and `canvas.json` (keys, source card, digest). It is built in a
hidden folder that is renamed when it is whole, so what has the right name is complete. The hidden folder outlives a kill:
its journal says which samples are finished, and the next build goes on behind them. Where the file system has no locks,
every process builds in a hidden folder of its own, and a killed build begins anew.
"""

import errno
import glob
import hashlib
import json
import os
import shlex
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from blake3 import blake3
from numpy.typing import NDArray

from kdcache.datasets import DATASETS, Images, Sample, Source, SourceCard, Split, identity, source_card
from kdcache.datasets.classes import how_classes_differ, say_classes
from kdcache.datasets.decoding import LARGE, decode, generous
from kdcache.datasets.journal import Outcome, journal_line, npy_header, resume
from kdcache.errors import IntegrityError, KdcacheError, RetryError, UsageError, printable
from kdcache.system.documents import NO_FILE, read_record
from kdcache.system.files import set_aside, unique, write_atomically
from kdcache.system.locks import locked, locked_if_possible
from kdcache.system.progress import Progress, Silent
from kdcache.system.refusals import named
from kdcache.system.room import require_room
from kdcache.system.seals import sealed_record

__all__ = ["MAX_SIZE", "Canvas", "canvas_path", "canvases_of", "load_canvas", "require_intact"]

MAX_SIZE = 4096  # pixels; a larger side is surely a typing mistake
FORMAT = 2  # increases when the same files give other pixels
_CHUNK_BYTES = 1 << 26  # pixels that are decoded and written together; a kill loses at most two chunks
_CHUNK_SAMPLES = 512
_LARGEST_RECORD = 1 << 32  # bytes of canvas.json, with the key of every sample


@dataclass(frozen=True)
class Canvas:
    """`pixels` uint8 `[N, 3, R, R]` (memory map), `labels` int64 `[N]`, `keys`, original `sizes` int32 `[N, 2]` (w, h)."""

    path: Path
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    keys: tuple[str, ...]
    card: SourceCard
    digest: str  # sha256 of pixels, labels and keys
    _as_stored: bool = field(default=False, init=False, repr=False, compare=False)  # set by `_open`, not by replace()
    _checked: bool = field(default=False, init=False, repr=False, compare=False)  # set by `require_intact`

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Callable[..., "Canvas"], tuple[Any, ...]]:
        # A spawned worker maps the file again, as pickling would copy all pixels. A canvas made in memory has no file.
        if self._as_stored:
            return _open, (self.path,)
        return Canvas, tuple(getattr(self, part.name) for part in fields(self) if part.init)

    @property
    def size(self) -> int:
        """Side of the canvas in pixels."""
        return int(self.pixels.shape[-1])

    @cached_property
    def all_square(self) -> bool:
        """Whether no photograph lost its proportions on the canvas."""
        return bool((self.sizes[:, 0] == self.sizes[:, 1]).all())

    @cached_property
    def sizes_digest(self) -> str:
        """sha256 of the original sizes, on which crops depend."""
        return hashlib.sha256(self.sizes.astype("<i4").tobytes()).hexdigest()

    @property
    def intact(self) -> bool:
        """Whether pixels, labels and keys still match `digest`. Reads all of them."""
        return _digest(self.pixels, self.labels, self.keys) == self.digest


def load_canvas(
    source: Source,
    split: Split,
    size: int,
    home: Path,
    progress: Progress | None = None,
    *,
    skip_corrupt: bool = False,
    allow_large: bool = False,
    force: bool = False,
    tell: bool = False,
    building: Callable[[], None] = lambda: None,
) -> Canvas:
    """The canvas of one split at `size` pixels below `home`. It is built if it is missing or its source has changed.

    With `skip_corrupt`, a build leaves out images that cannot be decoded, and lists them in the source card. Later calls
    use that canvas with or without the option. With `allow_large`, images beyond 178 megapixels, which Pillow takes for an
    attack, are decoded too. With `force`, tests on training images are allowed. With `tell`, the classes of a training split
    are told before it is decoded. `building` is called before a build.

    Raises IntegrityError, which names every image that cannot be decoded; UsageError for a size beyond `MAX_SIZE`, and for
    test images that are training images; RetryError if the disk has no room, or if images change while they are decoded.
    """
    progress = progress or Silent()
    if not 1 <= size <= MAX_SIZE:
        raise UsageError(
            f"a canvas of {size} px", why=f"its side is between 1 and {MAX_SIZE} px", fix="use for example --canvas 256"
        )
    images = source.open(home, progress)
    if (refused := getattr(images, "refused", None)) is not None and not force:
        raise refused
    fingerprint = images.fingerprint()
    series, state = _names(source, split, size, fingerprint)
    path = home / f"{series}-{state[:8]}"
    if not path.is_dir():
        building()
        if tell:
            say_classes(source, images, progress)
            tell = False
        home.mkdir(parents=True, exist_ok=True)
        with _alone(path, progress) as folder:
            if not path.is_dir():
                _mention_others(series, path, progress)
                with named(folder):
                    _build(source, images, split, size, path, folder, state, fingerprint, skip_corrupt, allow_large, progress)
    with suppress(OSError):  # of a build that was killed as it had finished; in a read-only folder it stays
        (path / "journal.jsonl").unlink(missing_ok=True)
        if (lock := _lock(path)).exists():
            with locked(lock, wait=False) as alone:
                if alone:  # else whoever holds it deletes it
                    lock.unlink(missing_ok=True)
    canvas = _open(path, state)
    # Older canvases do not record their state: split, size and classes are what can be told without decoding them again.
    if (canvas.card.split, canvas.size) != (split, size):
        raise _of_others(path, f"{canvas.card.name}/{canvas.card.split}, {canvas.size} px")
    if difference := how_classes_differ(canvas.card.class_names, images.class_names()):
        raise _of_others(path, f"{canvas.card.name}/{canvas.card.split}, of other classes: {difference}")
    if tell:
        say_classes(source, images, progress, canvas.card.class_names, canvas.labels.tolist())
    if skipped := canvas.card.skipped:
        shown = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        progress.say(
            f"{len(skipped)} of {len(skipped) + len(canvas)} {split} images are left out, they cannot be decoded: {shown}"
        )
    if unused := canvas.card.unused:
        shown = ", ".join(f"{count:,} {printable(heading)}" for heading, count in unused.items())
        progress.say(f"{sum(unused.values()):,} files beside the {split} images are not used: {shown}")
    return canvas


def canvas_path(source: Source, split: Split, size: int, home: Path) -> Path:
    """Folder of the canvas of a split, for the present state of its files, whether built or not. Fetches nothing."""
    series, state = _names(source, split, size, source.open(home, fetch=False).fingerprint())
    return home / f"{series}-{state[:8]}"


def canvases_of(source: Source, split: Split, home: Path) -> Iterator[Canvas]:
    """The canvases of a split that were built below `home` before, of any size and state. The source itself is not looked at."""
    name = getattr(source, "short_name", DATASETS.name_of(source))
    for folder in sorted(home.glob(f"{glob.escape(name)}-{split}-*px-????????-????????")):
        size = folder.name.removeprefix(f"{name}-{split}-").partition("px-")[0]
        if size.isdecimal() and folder.name.startswith(f"{_names(source, split, int(size), '')[0]}-"):
            with suppress(KdcacheError):
                yield _open(folder)


def _names(source: Source, split: Split, size: int, fingerprint: str) -> tuple[str, str]:
    """(name that all canvases of a split and size begin with, sha256 of this state of the files)."""
    which = [identity(source), split, size]
    series = f"{getattr(source, 'short_name', DATASETS.name_of(source))}-{split}-{size}px-{_sha256(which)[:8]}"
    return series, _sha256([FORMAT, which, fingerprint])


def require_intact(canvas: Canvas) -> None:
    """Raises IntegrityError if the pixels, labels or keys are not those that were decoded. They are read once, however often."""
    if canvas._checked:
        return
    if not canvas.intact:
        raise IntegrityError(
            f"canvas {canvas.path} was changed after it was built",
            why="the sha256 of its pixels, labels and keys is not the recorded one",
            fix=f"set it aside, and it is built again: {set_aside(canvas.path)}",
        )
    object.__setattr__(canvas, "_checked", True)


def _of_others(path: Path, what: str) -> IntegrityError:
    return IntegrityError(
        f"canvas {path} is another one: {what}",
        why="its folder was copied, renamed or exchanged: folders are named after the images, their state and their size",
        fix=f"give it its own name again; or set it aside, and the right one is built: {set_aside(path)}",
    )


def _open(path: Path, state: str | None = None) -> Canvas:
    """The canvas in a folder. With `state`, the digest of the files that its name comes from, it must be that of these files."""
    try:
        with named(path):
            meta = read_record(path / "canvas.json", limit=_LARGEST_RECORD)
        if any((path / name).exists() and not (path / name).is_file() for name in ("pixels.npy", "labels.npy", "sizes.npy")):
            raise ValueError(NO_FILE)  # but a pipe, from which reading would wait without end
        pixels = np.load(path / "pixels.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(path / "labels.npy", allow_pickle=False)
        sizes = np.load(path / "sizes.npy", allow_pickle=False)
        card = SourceCard.model_validate(meta["card"])
        if state is not None and meta.get("state", state) != state:  # older canvases do not record it
            raise _of_others(path, f"{card.name}/{card.split}, {pixels.shape[-1]} px, of other files or in another state")
        keys = tuple(meta["keys"])
        if not len(pixels) == len(labels) == len(sizes) == len(keys) == card.num_samples:
            raise ValueError("its parts have different lengths")
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
            raise ValueError(f"its pixels are {pixels.dtype} {list(pixels.shape)}, not uint8 [N, 3, R, R]")
        if sizes.shape != (len(keys), 2) or sizes.dtype.kind not in "iu" or sizes.min() < 1:
            raise ValueError(f"sizes.npy is {sizes.dtype} {list(sizes.shape)}, not the width and height of every image")
        digest = str(meta["digest"])
        canvas = Canvas(path, pixels, labels, sizes, keys, card, digest)
        if meta.get("sizes_digest", canvas.sizes_digest) != canvas.sizes_digest:  # older canvases have none
            raise ValueError("sizes.npy is not the one that was written with it")
    except (KdcacheError, MemoryError):
        raise
    except Exception as error:  # NumPy parses headers as Python, which has many errors
        if isinstance(error, OSError) and error.errno not in {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}:
            raise  # which says nothing of the canvas
        raise IntegrityError(
            f"canvas {path} cannot be read",
            why=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix=f"set it aside, and it is built again: {set_aside(path)}",
        ) from None
    object.__setattr__(canvas, "_as_stored", True)
    return canvas


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(pixels: NDArray[np.uint8], labels: NDArray[np.int64], keys: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(keys)).encode())
    digest.update(labels.astype("<i8").tobytes())
    step = _chunk(pixels.shape[-1])
    for start in range(0, len(labels), step):
        digest.update(np.ascontiguousarray(pixels[start : start + step]).data)
    return digest.hexdigest()


def _chunk(size: int) -> int:
    """Number of samples that are read or written together."""
    return max(1, min(_CHUNK_SAMPLES, _CHUNK_BYTES // (3 * size * size)))


# ---------------------------------------------------------------- building


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[Path]:
    """The hidden folder to build in. Whoever holds the lock builds; the others wait rather than decode everything twice.

    Two processes that wrote into one folder would mix their pixels: without locks, each gets a folder of its own.
    """
    lock, text = _lock(path), f"waiting for another process to build {path}"
    with locked_if_possible(lock, waiting=lambda: progress.say(text)) as alone:
        if alone:
            yield _unfinished(path)
            lock.unlink(missing_ok=True)  # while it is held: later it may be another process's
            return
        folder = path.with_name(f".{path.name}.{unique()}.tmp")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _mention_others(series: str, path: Path, progress: Progress) -> None:
    """Tell about canvases of the same dataset and size from other states of the files. They are kept, as others may use them."""
    paths = {*path.parent.glob(f"{series}-*"), *path.parent.glob(f".{series}-*.tmp")} - {path, _unfinished(path)}
    others = sorted(folder for folder in paths if folder.is_dir())
    if others:
        size = 0
        for folder in others:
            with suppress(FileNotFoundError):  # another process may be renaming it at this moment
                size += sum(file.stat().st_size for file in folder.iterdir())
        progress.say(
            f"canvases of earlier states of these files: {len(others)}, {size / 1e6:.1f} MB; "
            f"once nothing needs them: rm -r {shlex.join(map(str, others))}"
        )


def _lock(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _build(
    source: Source,
    images: Images,
    split: Split,
    size: int,
    path: Path,
    folder: Path,
    state: str,
    fingerprint: str,
    skip_corrupt: bool,
    allow_large: bool,
    progress: Progress,
) -> None:
    names, samples = images.class_names(), images.samples(split)
    count = getattr(images, "unused", None)
    unused: Mapping[str, int] = {} if count is None else count(split)
    card = source_card(source, names, split, samples, unused=unused)
    # A build resumes only one with the same identity. Another version of Pillow may decode a file to other pixels.
    identity = {"state": state, "samples": card.digest, "pillow": PIL.__version__}
    if allow_large:  # what was too large before is decoded now
        identity["large"] = "allowed"
    outcomes = _decode_all(samples, size, folder, identity, f"canvas {card.name}/{split}", progress, allow_large)
    if images.fingerprint() != fingerprint:
        shutil.rmtree(folder)
        raise RetryError(
            f"images of {card.name}/{split} changed while they were decoded",
            why="some pixels would be of the old files, some of the new ones",
            fix="wait until nothing writes to them, and repeat the command",
        )
    kept = [(sample, outcome) for sample, outcome in zip(samples, outcomes, strict=True) if not isinstance(outcome, str)]
    if len(kept) < len(samples):
        reasons = {sample.key: why for sample, why in zip(samples, outcomes, strict=True) if isinstance(why, str)}
        if not skip_corrupt:
            raise _undecodable(reasons, len(samples), path)
        lost = sorted({sample.label for sample in samples} - {sample.label for sample, _ in kept})
        if lost:
            raise IntegrityError(
                f"class {card.class_names[lost[0]]!r} has no image that can be decoded ({len(lost)} such class(es))",
                why=f"{len(reasons)} of {len(samples)} {split} images are corrupt, and --skip-corrupt would leave nothing of it",
                fix="replace some of its files",
            )
        card = source_card(source, names, split, [sample for sample, _ in kept], tuple(reasons), unused)
    labels = np.array([sample.label for sample, _ in kept], np.int64)
    keys = [sample.key for sample, _ in kept]
    with named(folder / "pixels.npy"), (folder / "pixels.npy").open("r+b") as file:
        file.write(npy_header(len(kept), size))
        _sync(file)
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    sizes = np.array([outcome for _, outcome in kept], np.int32)
    for name, array in (("labels.npy", labels), ("sizes.npy", sizes)):
        with named(folder / name), (folder / name).open("wb") as file:
            np.save(file, array)
            _sync(file)
    digest = _digest(pixels, labels, keys)
    meta = {"card": card.model_dump(mode="json"), "keys": keys, "digest": digest, "state": state}
    meta["sizes_digest"] = Canvas(path, pixels, labels, sizes, tuple(keys), card, digest).sizes_digest
    with named(folder / "canvas.json"), (folder / "canvas.json").open("wb") as file:
        file.write(sealed_record(meta, indent=None))
        _sync(file)
    try:
        folder.replace(path)
    except OSError as error:  # where there are no locks, another process may have built the same canvas meanwhile
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    # Not before: killed in between, the next build would have to start at nothing.
    (path / "journal.jsonl").unlink(missing_ok=True)


def _decode_all(
    samples: Sequence[Sample],
    size: int,
    folder: Path,
    identity: dict[str, str],
    task: str,
    progress: Progress,
    allow_large: bool,
) -> list[Outcome]:
    """Write the pixels of all samples that can be decoded to `folder`, in order. Returns the outcome of every sample."""
    outcomes = resume(folder, identity, size)
    before, step, started = len(outcomes), _chunk(size), time.monotonic()
    if before:
        progress.say(f"{task}: {before} of {len(samples)} images were decoded before, going on from there")
        progress.update(task, before, len(samples))
    require_room(
        folder,
        (len(samples) - before) * 3 * size * size,
        "the canvas",
        why=f"{len(samples) - before} images of {size} x {size} pixels are to be decoded",
        elsewhere="put it on another disk with --data-dir",
    )
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes and resizes outside the interpreter lock
    try:
        with (
            named(folder),
            (folder / "pixels.npy").open("ab") as pixels,
            (folder / "journal.jsonl").open("ab") as journal,
            generous(allow_large),
        ):
            chunks = (samples[start : start + step] for start in range(before, len(samples), step))
            for decoded in _ahead(pool, lambda sample: decode(sample, size), chunks):
                written = blake3()
                for result in decoded:
                    if not isinstance(result, str):
                        pixels.write(result[0])
                        written.update(result[0])
                _sync(pixels)
                # The journal lists samples only after their pixels are synced to disk.
                finished = [result if isinstance(result, str) else result[1] for result in decoded]
                journal.write(journal_line(finished, written))
                _sync(journal)
                outcomes += finished
                speed = (len(outcomes) - before) / max(time.monotonic() - started, 1e-9)
                progress.update(task, len(outcomes), len(samples), f"{speed:.0f} images/s")
    finally:
        pool.shutdown(cancel_futures=True)
    return outcomes


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _ahead(pool: Executor, decode: Callable[[Sample], Any], chunks: Iterator[Sequence[Sample]]) -> Iterator[list[Any]]:
    """Decoded chunks in order. The next chunk is decoded while the caller writes one."""
    running: deque[Iterator[Any]] = deque()
    for chunk in chunks:
        running.append(pool.map(decode, chunk))
        if len(running) > 1:
            yield list(running.popleft())
    while running:
        yield list(running.popleft())


def _undecodable(reasons: dict[str, str], total: int, path: Path) -> IntegrityError:
    listing = path.with_name(path.name + ".corrupt.txt")
    write_atomically(listing, "".join(f"{key}: {why}\n" for key, why in reasons.items()).encode())
    shown = "; ".join(f"{key} ({why})" for key, why in list(reasons.items())[:10])
    more = f"; and {len(reasons) - 10} more" if len(reasons) > 10 else ""
    return IntegrityError(
        f"{len(reasons)} of {total} images cannot be decoded: {shown}{more}",
        why=f"a sample without pixels has no views (the whole list: {listing})",
        fix=(
            f"repeat the command with {LARGE}, if you trust these files; or "
            if any(LARGE in why for why in reasons.values())
            else ""
        )
        + "mend or convert these files, or repeat the command with --skip-corrupt to leave them out",
    )
