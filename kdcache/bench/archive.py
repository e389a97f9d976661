"""Benchmarks of archives: reading against a memory map of equal bytes, writing against a plain file, memory, opening."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.archive import Archive, ArchiveWriter, derive, open_archive
from kdcache.bench.turns import Result, taking_turns
from kdcache.codecs import CODECS
from kdcache.system.progress import Progress

__all__ = ["archive"]

VIEWS, SAMPLES, CLASSES = 4, 1 << 17, 1000  # 1 GB of int16
BLOCK = 256  # rows of a batch
BATCHES = 64  # batches of random rows per turn
SHARDS = 10_000
STEP = np.float32(2.0**-9)


def archive(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure block and random reading, writing, opening and memory, at C = 1000 and 1 GB."""
    source = _write(folder / "zarr", progress)
    flat = _flat_copy(source, folder / "flat.npy")
    share = seconds / 6
    results = [
        *_blocks(share, source, flat, folder, progress),
        *_random_rows(share, source, flat, progress),
        *_compressed(share, source, folder, progress),
        *_writing(share, folder, progress),
        *_opening(folder, progress),
        *_memory(folder, source, progress),
    ]
    return results


def _rows(seed: int, count: int) -> NDArray[np.float32]:
    """Logits like a classifier's, most of them similar and a few larger: float32 `[count, C]`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.2, (count, CLASSES)).astype(np.float32)
    logits[np.arange(count)[:, None], rng.integers(0, CLASSES, (count, 5))] += rng.gamma(2, 3, (count, 5)).astype(np.float32)
    return logits


def _write(path: Path, progress: Progress, *, layout: str = "zarr", views: int = VIEWS) -> Archive:
    writer = ArchiveWriter(
        path, num_views=views, num_samples=SAMPLES, class_names=[str(label) for label in range(CLASSES)], layout=layout
    )
    logits = _rows(0, writer.plan.shard_rows)
    orders = [np.random.default_rng(view).permutation(SAMPLES) for view in range(views)]
    missing = writer.missing()
    for number, (view, block) in enumerate(missing):
        rows = writer.positions(block)
        writer.write(view, block, np.roll(logits, number, axis=1)[: len(rows)], orders[view][rows.start : rows.stop])
        progress.update("bench archive: write", number + 1, len(missing))
    return writer.finalize(progress)


def _flat_copy(source: Archive, path: Path) -> Path:
    """Write the archive's logits `[V, N, C]` to a plain file, for a memory map."""
    flat = np.lib.format.open_memmap(path, "w+", np.int16, (source.num_views, source.num_samples, CLASSES))
    for view in source.views:
        for block in range(source.manifest.num_blocks):
            start = block * source.manifest.shard_rows
            stored = source.stored(view, block)["logits"]
            flat[view, start : start + len(stored)] = stored
    flat.flush()
    return path


def _blocks(seconds: float, source: Archive, copy: Path, folder: Path, progress: Progress) -> list[Result]:
    """Read every row once, 256 at a time, as float32: first with newly opened files and checksums, then again."""
    import webdataset

    tars = derive(source, folder / "webdataset", layout="webdataset", progress=progress)
    urls = sorted(str(path) for path in tars.path.rglob("shard-*.tar"))

    def again(archive: Archive = source) -> None:
        for view in archive.views:
            for start in range(0, SAMPLES, BLOCK):
                archive.logits(view, slice(start, start + BLOCK))

    def first(archive: Archive = source) -> None:
        again(open_archive(archive.path))

    def mapped() -> None:
        flat = np.load(copy, mmap_mode="r")
        for view in range(VIEWS):
            for start in range(0, SAMPLES, BLOCK):
                np.multiply(flat[view, start : start + BLOCK], STEP, dtype=np.float32)

    def plain_webdataset() -> None:
        for record in webdataset.WebDataset(urls, shardshuffle=False).decode():
            np.multiply(record["logits.npy"], STEP, dtype=np.float32)

    zarr, known, memmap = taking_turns("bench archive: blocks", seconds, progress, first, again, mapped)
    tar, webdataset_side = taking_turns("bench archive: records", seconds, progress, lambda: first(tars), plain_webdataset)
    rows = VIEWS * SAMPLES
    progress.say(
        f"blocks, million rows/s: zarr {rows / zarr / 1e6:.2f}, memory map {rows / memmap / 1e6:.2f}, "
        f"tar {rows / tar / 1e6:.2f}, plain webdataset {rows / webdataset_side / 1e6:.2f}"
    )
    shutil.rmtree(tars.path)
    return [
        Result("blocks of raw zarr", "256 rows, compared with checksums", "memory map, same bytes", zarr / memmap, 1 / 0.9),
        Result("blocks of raw zarr", "256 rows that were compared", "memory map, same bytes", known / memmap, 1 / 0.9),
        Result("blocks of raw zarr", "256 rows, compared with checksums", "plain webdataset", zarr / webdataset_side, 1.0),
        Result("blocks of tar", "256 rows, compared with checksums", "plain webdataset", tar / webdataset_side, 1.0),
    ]


def _random_rows(seconds: float, source: Archive, copy: Path, progress: Progress) -> list[Result]:
    flat: NDArray[np.int16] = np.load(copy, mmap_mode="r")
    rng = np.random.default_rng(1)
    draws = [(int(rng.integers(VIEWS)), rng.integers(0, SAMPLES, BLOCK)) for _ in range(BATCHES)]
    positions = [np.argsort(source.column("sample", view)) for view in source.views]

    def ours() -> None:
        for view, samples in draws:
            _ = source.find(view, samples).logits

    def mapped() -> None:
        for view, samples in draws:
            np.multiply(flat[view][positions[view][samples]], STEP, dtype=np.float32)

    ours_seconds, gathered = taking_turns("bench archive: random rows", seconds, progress, ours, mapped)
    return [Result("random rows by sample", "find 256", "memory map, same bytes", ours_seconds / gathered, 1 / 0.3)]


def _compressed(seconds: float, source: Archive, folder: Path, progress: Progress) -> list[Result]:
    """Measure decoding on one thread, in seconds per gigabyte of decoded int16."""
    results = []
    for compression in ("bitshuffle", "pcodec"):
        part = derive(source, folder / compression, layout=f"zarr:{compression}", views=range(1), progress=progress)
        gigabytes = SAMPLES * CLASSES * 2 / 1e9

        def read(archive: Archive = part) -> None:
            for block in range(archive.manifest.num_blocks):
                for _ in archive.reader.pieces("logits", 0, block, slice(0, archive.manifest.block_rows(block))):
                    pass

        [taken] = taking_turns(f"bench archive: {compression}", seconds / 2, progress, read)
        name, measured = f"decode zarr:{compression}", "to int16, one thread, all checked"
        results.append(Result(name, measured, "seconds a GB", taken / gigabytes, 1.0))
        shutil.rmtree(part.path)
    return results


def _writing(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    path = folder / "writing"
    writer = ArchiveWriter(path, num_views=1, num_samples=1 << 15, class_names=[str(label) for label in range(CLASSES)])
    logits = _rows(2, writer.plan.shard_rows)
    writer.write(0, 0, logits)
    sizes = sum(file.stat().st_size for file in path.rglob("*") if ".dump" not in file.parts and file.is_file())
    numbers = np.arange(len(logits))
    stored: dict[str, NDArray] = {**CODECS.build("i16").encode(logits), "probe": np.zeros((len(logits), 16))}
    stored |= dict.fromkeys(("argmax", "sample", "entropy", "entropy_rest", "digest"), numbers)
    data = os.urandom(sizes)

    def plain() -> None:
        with (folder / "plain").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    sides = lambda: writer.write_stored(0, 0, stored), lambda: writer.write(0, 0, logits), plain
    rows, whole, file = taking_turns("bench archive: writing", seconds, progress, *sides)
    shutil.rmtree(path)
    return [
        Result("writing stored rows", "shard, two digests, synced", "plain file, synced", rows / file, 2.0),
        Result("writing logits", "the same with codec and entropies", "plain file, synced", whole / file, 2.0),
    ]


def _opening(folder: Path, progress: Progress) -> list[Result]:
    """Measure the opening of an archive with ten thousand shards."""
    names = ["a", "b", "c", "d"]
    writer = ArchiveWriter(
        folder / "shards", num_views=SHARDS // 4, num_samples=8, class_names=names, shard_rows=2, layout="hdf5"
    )
    logits = np.zeros((2, 4), np.float32)
    for number, (view, block) in enumerate(missing := writer.missing()):
        writer.write(view, block, logits)
        progress.update("bench archive: ten thousand shards", number + 1, len(missing))
    path = writer.finalize().path
    [taken] = taking_turns("bench archive: opening", 1, progress, lambda: open_archive(path))
    return [Result("opening ten thousand shards", "open_archive", "seconds", taken, 0.05)]


def _memory(folder: Path, source: Archive, progress: Progress) -> list[Result]:
    """Measure the peak of a process's own memory (without mapped files) above that after its imports, in stored shards."""
    if not Path("/proc/self/status").is_file():
        progress.say("this system does not tell a process's own memory: its benchmark is left out")
        return []
    shard = source.manifest.shard_rows * CLASSES * 2
    results = []
    for name in ("reader", "writer"):
        done = subprocess.run(
            [sys.executable, "-m", "kdcache.bench.archive", name, str(source.path), str(folder / "memory")],
            check=True,
            capture_output=True,
            text=True,
        )
        results.append(Result(f"memory of the {name}", "peak, own memory", "shards", json.loads(done.stdout) / shard, 4.0))
    return results


def _own_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def _peak(work: Callable[[], object]) -> int:
    """Peak growth of the process's own memory while `work` runs, in bytes."""
    before, peak, over = _own_memory(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], _own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return peak[0] - before


def _read_everything(path: str) -> None:
    for view in (opened := open_archive(path)).views:
        for start in range(0, opened.num_samples, BLOCK):
            opened.read(view, start, start + BLOCK).load()


def _write_three_shards(path: str) -> None:
    writer = ArchiveWriter(path, num_views=3, num_samples=1 << 15, class_names=[str(label) for label in range(CLASSES)])
    for view, block in writer.missing():
        writer.write(view, block, _shard(len(writer.positions(block))))


def _shard(rows: int) -> NDArray[np.float32]:
    """A shard's logits as one array, like in a dump."""
    logits = np.empty((rows, CLASSES), np.float32)
    for start, part in _parts(rows):
        logits[start : start + len(part)] = part
    return logits


def _parts(rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, rows, BLOCK):
        yield start, _rows(start, min(BLOCK, rows - start))


if __name__ == "__main__":
    what, source_path, target = sys.argv[1:]
    time.sleep(0.01)
    print(_peak((lambda: _read_everything(source_path)) if what == "reader" else (lambda: _write_three_shards(target))))
