"""Shared fixtures: small real images, canvases and archives on disk; and one quick, repeatable hypothesis profile."""

import os

# Tests run side by side, a process a core. The threads of two torch processes spin against each other, and everything that
# is trained takes ten times as long; so each gets one, before torch is imported, and so do processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else each of the many processes that tests start compiles the whole package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdcache.archive import Archive, ArchiveWriter, CanvasCard
from kdcache.datasets.canvas import Canvas, load_canvas
from kdcache.datasets.folder import Folder
from kdcache.errors import KdcacheError
from kdcache.views.policy import ViewPolicy, ViewTable
from tests.fixes import not_understood
from tests.miniatures import MINIATURES
from tests.torch_miniatures import MINIATURES as TORCH_MINIATURES

settings.register_profile(
    "kdcache", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("kdcache")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts jobs in the background; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def thin(grid: list[Any]) -> None:
    """Mark all tests of a grid as exhaustive, but for a diagonal that has each value of every parameter."""
    values: dict[str, list[int]] = {}  # by axis, each value's identity in the order of the values
    for item in grid:
        for axis, value in item.callspec.params.items():
            known = values.setdefault(axis, [])
            if id(value) not in known:
                known.append(id(value))
    longest = max(values, key=lambda axis: len(values[axis]))
    for item in grid:
        place = {axis: values[axis].index(id(value)) for axis, value in item.callspec.params.items()}
        if any(number != place[longest] % len(values[axis]) for axis, number in place.items()):
            item.add_marker(pytest.mark.exhaustive)


# Contract tests whose combinations with every component are a grid. kdcache.testing knows no marks of ours.
GRIDS = {
    "test_error_and_divergence_stay_within_the_stated_bounds",
    "test_large_values_are_stored_within_the_bound_or_refused_and_never_clipped",
    "test_the_loss_is_a_finite_scalar_with_a_finite_gradient",
    "test_half_precision_students_lose_no_more_than_their_own_rounding",
    "test_the_smallest_archives_work",
    "test_any_wish_for_the_size_of_shards_keeps_pairs_together",
}


# Contract tests that take long for each component.
LONG = {"test_any_other_content_has_another_digest", "test_an_archive_of_nothing_but_zeros_is_written_in_full"}


@pytest.hookimpl(tryfirst=True)  # before the exhaustive tests are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Grids are thinned. Files with slow tests come first, so that workers, which get whole files, end at about the same time."""
    grids: dict[str, list[Any]] = {}
    for item in items:
        if getattr(item, "originalname", None) in LONG:
            item.add_marker(pytest.mark.exhaustive)
        if item.get_closest_marker("grid") or getattr(item, "originalname", None) in GRIDS:
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for grid in grids.values():
        thin(grid)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _quick_disk() -> Iterator[None]:
    """Waiting for the disk takes most of the time and only matters when the power fails; processes that tests start do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def _fixes_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No error of a test, expected or not, tells people to use a command or an option that is not there."""
    told: list[str] = []

    def remembered(error: KdcacheError, what: str, *, why: str, fix: str) -> None:
        made(error, what, why=why, fix=fix)
        told.append(fix)

    made = KdcacheError.__init__
    monkeypatch.setattr(KdcacheError, "__init__", remembered)
    yield
    assert [wrong for fix in told for wrong in not_understood(fix)] == []


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run source text in a fresh interpreter of this environment."""

    def run(code: str, *arguments: object, check: bool = True, seconds: int = 120) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def photos() -> NDArray[np.uint8]:
    """Twelve colour images `[12, 3, 40, 40]` with gradients, edges and noise: nothing in them is symmetric."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:40, 0:40]
    images = []
    for i in range(12):
        planes = np.stack([x * (i + 2) + y, 6 * y - x * i, (x - 20) ** 2 // (i + 1) + 5 * y]) + rng.integers(0, 60, (3, 40, 40))
        planes[:, 5 : 12 + i, 8:19] = rng.integers(0, 256, (3, 1, 1))
        images.append(planes % 256)
    return np.array(images, np.uint8)


def save_folder(root: Path, images: NDArray[np.uint8], classes: int = 3) -> None:
    """Write `images [N, 3, R, R]` as PNG files, class after class, with every one in train/ and test/."""
    for split in ("train", "test"):
        for i, image in enumerate(images):
            folder = root / split / f"class_{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:02d}.png")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 small pictures (an odd number, so that one has no mixing partner) in three classes."""
    root = tmp_path_factory.mktemp("images")
    save_folder(root, np.random.default_rng(11).integers(0, 256, (23, 3, 20, 20), dtype=np.uint8))
    return root


@pytest.fixture(scope="session")
def datasets_in_small(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every dataset's files in small, laid out as the real ones are, and in `images` those of `image_folder`."""
    root = tmp_path_factory.mktemp("datasets")
    (root / "images").symlink_to(image_folder)
    for name, make in MINIATURES.items():
        make(root / name)
    for name in ("dtd", "eurosat", "food101", "mnist"):
        TORCH_MINIATURES[name](root / f"torch-{name}")
    return root


@pytest.fixture(scope="session")
def canvas(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Canvas:
    return load_canvas(Folder(str(image_folder)), "train", 20, tmp_path_factory.mktemp("canvases"))


@dataclass(frozen=True)
class Dump:
    """A finished archive, with what was put into it."""

    archive: Archive
    canvas: Canvas
    logits: NDArray[np.float32]  # [V, N, C], what the codec keeps of them


@pytest.fixture(scope="session")
def make_dump() -> Callable[..., Dump]:
    """Write the archive of `canvas` as a dump does: every view rendered, its fingerprint stored beside made-up logits."""
    from kdcache.views import fingerprint, render_positions

    def make(
        path: Path,
        canvas: Canvas,
        *,
        policy: ViewPolicy,
        drawn_by: ViewPolicy | Callable[[NDArray[np.uint8], ViewTable], Tensor] | None = None,
        views: int = 3,
    ) -> Dump:
        """`drawn_by` draws the views instead of `policy`, which is what the manifest claims."""
        count, classes = len(canvas), len(canvas.card.class_names)
        logits = (np.random.default_rng(3).integers(-4000, 4000, (views, count, classes)) / 512).astype(np.float32)
        writer = ArchiveWriter(
            path,
            num_views=views,
            num_samples=count,
            class_names=canvas.card.class_names,
            labels=canvas.labels,
            keys=canvas.keys,
            shard_rows=8,
            policy=policy,
            source=canvas.card,
            canvas=CanvasCard.of(canvas, policy),
        )
        for view in range(views):
            table = (drawn_by if isinstance(drawn_by, ViewPolicy) else policy).parameters(view, count, canvas.sizes)
            if callable(drawn_by):
                images = drawn_by(canvas.pixels, table)
            else:
                images = render_positions(canvas.pixels, table, np.arange(count))
            digest, probe = fingerprint(images)
            for _, block in (shard for shard in writer.missing() if shard[0] == view):
                rows = np.array(writer.positions(block))
                writer.write(view, block, logits[view, rows], sample=table.sample[rows], digest=digest[rows], probe=probe[rows])
        return Dump(writer.finalize(), canvas, logits)

    return make


FINGERPRINT = ("sample", "digest", "probe")


def made_up(seed: int, dump: Dump) -> NDArray[np.float32]:
    """Logits `[V, N, C]` of another teacher: far from those of `dump`."""
    return np.random.default_rng(seed).normal(0, 4, dump.logits.shape).astype(np.float32)


def redump(path: Path, dump: Dump, logits: NDArray[np.float32], **changes: Any) -> Archive:
    """Another teacher's archive of the very views of `dump`, with `changes` of what its writer is told.

    `views`, `sample`, `digest`: which views it has, and what is stored instead of the columns `[V, N]` of `dump`.
    """
    manifest, views = dump.archive.manifest, changes.pop("views", dump.archive.views)
    stored = {name: np.stack([dump.archive.column(name, view) for view in dump.archive.views]) for name in FINGERPRINT}
    stored |= {name: changes.pop(name) for name in ("sample", "digest") if name in changes}
    options: dict[str, Any] = {
        "num_samples": logits.shape[1],
        "class_names": manifest.class_names,
        "labels": dump.archive.labels(),
        "keys": dump.archive.keys(),
        "policy": manifest.policy,
        "source": manifest.source,
        "canvas": manifest.canvas,
    }
    writer = ArchiveWriter(path, first_view=views.start, num_views=len(views), **options | changes)
    for view, block in writer.missing():
        rows = slice(writer.positions(block).start, writer.positions(block).stop)
        writer.write(view, block, logits[view, rows], **{name: column[view, rows] for name, column in stored.items()})
    return writer.finalize()


@pytest.fixture(scope="session")
def dump(tmp_path_factory: pytest.TempPathFactory, canvas: Canvas, make_dump: Callable[..., Dump]) -> Dump:
    """Three views of the 23 pictures under the paper's policy. Shared: do not change its files."""
    return make_dump(tmp_path_factory.mktemp("archive") / "a", canvas, policy=ViewPolicy.load("pets", size=16))
