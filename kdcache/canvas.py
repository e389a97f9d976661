"""Canvas: a whole split decoded once, uint8 `[N, 3, R, R]` in one memory map, reused by every teacher and student.

A canvas is a folder: `pixels.npy`, `labels.npy`, `sizes.npy` and `canvas.json` (keys, source card, digest). It is built
under a temporary name and renamed when whole, so what has the right name is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import filelock
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kdcache.datasets import Sample, Source, SourceCard, Split, dataset, source_card
from kdcache.errors import IntegrityError
from kdcache.progress import Progress, Silent

__all__ = ["Canvas", "load_canvas", "require_intact"]

_CHUNK = 256  # samples decoded between two progress reports
FORMAT = 1


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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Side of the canvas in pixels."""
        return int(self.pixels.shape[-1])

    @cached_property
    def intact(self) -> bool:
        """Whether pixels, labels and keys are still those of `digest`; reads all of them."""
        return _digest(self.pixels, self.labels, self.keys) == self.digest


def load_canvas(source: Source, split: Split, size: int, home: Path, progress: Progress | None = None) -> Canvas:
    """The canvas of one split at `size` pixels below `home`, built now if it is missing or its source has changed.

    Raises IntegrityError that names every image which cannot be decoded.
    """
    progress = progress or Silent()
    name = dataset.name_of(source)
    described = json.dumps([FORMAT, dataset.to_dict(source), split, size, source.fingerprint()], sort_keys=True)
    path = home / f"{name}-{split}-{size}px-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    if not path.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        # Another process may be building the same canvas: wait for it rather than decode everything twice.
        with filelock.FileLock(path.with_name(path.name + ".lock")):
            if not path.is_dir():
                _build(source, split, size, path, progress)
    return _open(path)


def require_intact(canvas: Canvas) -> None:
    """Raises IntegrityError if the pixels, labels or keys are not those that were decoded."""
    if not canvas.intact:
        raise IntegrityError(
            f"canvas {canvas.path} was changed after it was built",
            why="the sha256 of its pixels, labels and keys is not the recorded one",
            fix=f"delete it, and it is built again: rm -r {canvas.path}",
        )


def _open(path: Path) -> Canvas:
    try:
        meta = json.loads((path / "canvas.json").read_text())
        pixels = np.load(path / "pixels.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(path / "labels.npy", allow_pickle=False)
        sizes = np.load(path / "sizes.npy", allow_pickle=False)
        card = SourceCard.model_validate(meta["card"])
        keys = tuple(meta["keys"])
        if not len(pixels) == len(labels) == len(sizes) == len(keys) == card.num_samples:
            raise ValueError("its parts have different lengths")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"canvas {path} cannot be read",
            why=str(error).splitlines()[0],
            fix=f"delete it, and it is built again: rm -r {path}",
        ) from None
    return Canvas(path, pixels, labels, sizes, keys, card, meta["digest"])


def _build(source: Source, split: Split, size: int, path: Path, progress: Progress) -> None:
    samples = source.samples(split)
    card = source_card(source, split, samples)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed: whoever holds the lock is alone here
    temporary.mkdir()
    try:
        pixels = np.lib.format.open_memmap(
            temporary / "pixels.npy", mode="w+", dtype=np.uint8, shape=(len(samples), 3, size, size)
        )
        # Room is taken before pixels are written: on a full disk a memory map would end the process without a word.
        with (temporary / "pixels.npy").open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, (temporary / "pixels.npy").stat().st_size)
        sizes = np.zeros((len(samples), 2), np.int32)
        _decode_all(samples, size, pixels, sizes, f"canvas {card.name}/{split}", progress)
        labels = np.array([sample.label for sample in samples], np.int64)
        keys = [sample.key for sample in samples]
        pixels.flush()
        np.save(temporary / "labels.npy", labels)
        np.save(temporary / "sizes.npy", sizes)
        meta = {"card": card.model_dump(mode="json"), "keys": keys, "digest": _digest(pixels, labels, keys)}
        (temporary / "canvas.json").write_text(json.dumps(meta))
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _digest(pixels: NDArray[np.uint8], labels: NDArray[np.int64], keys: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(keys)).encode())
    digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(labels), _CHUNK):
        digest.update(pixels[start : start + _CHUNK].tobytes())
    return digest.hexdigest()


def _decode_all(
    samples: Sequence[Sample], size: int, pixels: NDArray[np.uint8], sizes: NDArray[np.int32], task: str, progress: Progress
) -> None:
    broken: list[str] = []

    def decode(i: int) -> None:
        try:
            pixels[i], sizes[i] = _decode(samples[i], size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            broken.append(f"{samples[i].key} ({error})")

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside the interpreter lock
        for start in range(0, len(samples), _CHUNK):
            stop = min(start + _CHUNK, len(samples))
            list(pool.map(decode, range(start, stop)))
            progress.update(task, stop, len(samples))
    if broken:
        shown = "; ".join(sorted(broken)[:10]) + (f"; and {len(broken) - 10} more" if len(broken) > 10 else "")
        raise IntegrityError(
            f"{len(broken)} of {len(samples)} images cannot be decoded: {shown}",
            why="a sample without pixels has no views",
            fix="replace or remove these files and run the command again",
        )


def _decode(sample: Sample, size: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Pixels `[3, size, size]` and original (width, height) of one sample."""
    with sample.load() as image:
        image = ImageOps.exif_transpose(image)
        original = image.size
        # Pillow's reducing decoder for JPEG is not used: its output depends on the library's version.
        square = _as_rgb(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1), original


def _as_rgb(image: Image.Image) -> Image.Image:
    """Three 8-bit channels. Alpha is dropped, as torchvision's loaders do; 16 bits are scaled, where Pillow would clip them."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")
