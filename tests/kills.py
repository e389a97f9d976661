"""Kills a writer at every step of what it does to the disk, and looks at what is left. A process of its own runs this:

    python -m tests.kills FOLDER [EVERY]

Each victim is a fork of that process, so a kill costs milliseconds. It prints the number of steps in each scenario. With
EVERY, it kills before each so-many-th step only.
"""

import io
import os
import shutil
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.archive import ArchivePlan, ArchiveWriter, derive, open_archive
from kdcache.archive.layouts.zarr import ZarrLayout
from kdcache.archive.writing import writer as writer_module
from kdcache.errors import KdcacheError
from tests.archives import LABELS, SAMPLES, files, logits, writer

# All that changes a folder. A kill before one of them is a kill after the one before it.
CHANGES = ("mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir", "truncate")
KILLED = 9


def die_at(step: int, *, syncs: bool) -> None:
    """From now on, this process ends just before the `step`th change of the disk, or as soon as a file is opened to write."""
    left = step

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if not left:
                os._exit(KILLED)
            left -= 1
            return change(*arguments, **options)

        return run

    for name in (*CHANGES, *(["fsync"] if syncs else [])):
        setattr(os, name, counted(getattr(os, name)))
    opened = io.open

    def open_and_count(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return (counted(opened) if set(mode) & set("wxa+") else opened)(file, mode, *arguments, **options)

    io.open = open_and_count  # what pathlib calls


def in_a_fork(act: Callable[[], Any], step: int | None = None, *, syncs: bool = False) -> bool:
    """Run `act` in a process of its own, until it is killed at `step`: whether it was."""
    child = os.fork()
    if not child:
        try:
            if step is not None:
                die_at(step, syncs=syncs)
            act()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in ({0} if step is None else {0, KILLED}), f"ended with {code} at step {step}"
    return code == KILLED


def write_all(session: ArchiveWriter) -> None:
    """As a dump does it: every shard is claimed before it is written."""
    for view, block in session.missing():
        with session.claim(view, block) as mine:
            assert mine
            rows = np.array(session.positions(block))
            session.write(view, block, logits(view)[rows])
    session.finalize()


@dataclass(frozen=True)
class Scenario:
    """`before` makes the state that `act`, killed and repeated, starts at."""

    before: Callable[[Path], Any]
    act: Callable[[Path], Any]
    syncs: bool = False


def _dump(views: int, layout: str, shard_rows: int = SAMPLES) -> Callable[[Path], None]:
    return lambda path: write_all(writer(path, num_views=views, shard_rows=shard_rows, layout=layout))


def _abandoned_append(path: Path) -> None:
    """One view, and a second one that was killed when all files but the manifest were those of two."""
    _dump(1, "hdf5")(path)
    step, manifest = 0, (path / "kdcache.json").read_bytes()
    while in_a_fork(lambda: _dump(2, "hdf5")(path), step) and len(list(path.glob("shards-*"))) < 2:
        step += 1
    assert (path / "kdcache.json").read_bytes() == manifest


def _derive(path: Path) -> None:
    source = path.with_name("source")
    derive(open_archive(source), path, layout="hdf5", codec="u8")


SCENARIOS = {
    "fresh": Scenario(lambda path: None, _dump(1, "hdf5", shard_rows=16), syncs=True),
    "append-zarr": Scenario(_dump(1, "zarr"), _dump(2, "zarr")),
    "append-webdataset": Scenario(_dump(1, "webdataset"), _dump(2, "webdataset")),
    "append-after-another": Scenario(_abandoned_append, _dump(3, "hdf5")),
    "derive": Scenario(lambda path: _dump(1, "zarr")(path.with_name("source")), _derive),
}


def compute_once(owner: Any, name: str) -> None:
    """What is computed from the same plan and rows again and again: most of the time of a run, and none of its writing."""
    compute, known = getattr(owner, name), {}

    def remembered(*arguments: Any) -> Any:
        plan = next(argument for argument in arguments if isinstance(argument, ArchivePlan))
        key = plan.model_dump_json()
        if key not in known:
            known[key] = compute(*arguments)
        return copy(known[key])

    setattr(owner, name, remembered)


def check_old(path: Path, old: str, new: str) -> None:
    """An archive that was finished stays so, whatever was being done to it."""
    archive = open_archive(path)
    assert archive.manifest.digest in {old, new}
    assert archive.verify("full").failures == []
    np.testing.assert_array_equal(archive.labels(), LABELS)
    np.testing.assert_array_equal(archive.read(0, 0, archive.num_samples).logits, logits(0))


def run(scenario: Scenario, folder: Path, every: int = 1) -> int:
    start, whole, path = folder / "start", folder / "whole", folder / "a"
    start.mkdir()
    scenario.before(start / "a")
    shutil.copytree(start, whole)
    scenario.act(whole / "a")
    expected, new = files(whole / "a"), open_archive(whole / "a").manifest.digest
    old = open_archive(start / "a").manifest.digest if (start / "a/kdcache.json").exists() else None
    for kills in range(0, 10_000, every):
        place = folder / str(kills)
        shutil.copytree(start, place)
        path = place / "a"
        killed = in_a_fork(lambda path=path: scenario.act(path), kills, syncs=scenario.syncs)
        try:
            if old:
                check_old(path, old, new)
            scenario.act(path)
            found = files(path)
            assert sorted(found) == sorted(expected)
            assert found == expected
            assert not list(path.rglob(".*"))
        except (AssertionError, KdcacheError, OSError) as error:
            raise AssertionError(f"killed at step {kills}: {error}") from error
        shutil.rmtree(place)
        if not killed:
            return kills
    raise AssertionError("it never ended by itself")


if __name__ == "__main__":
    os.fsync = lambda handle: None  # a kill loses nothing that was handed to the system: waiting for the disk shows nothing
    compute_once(ZarrLayout, "closing_files")
    compute_once(writer_module, "compute_statistics")
    for name, scenario in SCENARIOS.items():
        place = Path(sys.argv[1]) / name
        place.mkdir()
        print(name, run(scenario, place, *map(int, sys.argv[2:])), flush=True)
