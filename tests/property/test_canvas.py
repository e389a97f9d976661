"""Building a canvas: whatever stops it, and however many do it at once, it ends with the same bytes, of the right files."""

import json
import multiprocessing
import operator
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import kdcache.datasets.canvas as module
from kdcache.datasets import SourceCard
from kdcache.datasets.canvas import Canvas, load_canvas, require_intact
from kdcache.datasets.folder import Folder
from kdcache.errors import IncompatibleError, IntegrityError, RetryError, UsageError
from kdcache.replay.stream import CachedTargets
from kdcache.views.policy import ViewPolicy
from tests.conftest import Dump

COUNT, SIZE, CHUNK = 23, 8, 4


class Notes:
    """Progress that keeps what it is told, and can do something after a number of images."""

    def __init__(self, at: int | None = None, do: Callable[[], None] = lambda: None) -> None:
        self.said: list[str] = []
        self.done: list[int] = []
        self._at, self._do = at, do

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        self.done.append(done)
        if self._at is not None and done >= self._at:
            self._at = None
            self._do()

    def say(self, text: str) -> None:
        self.said.append(text)


class StoppedError(Exception):
    pass


def stop() -> None:
    raise StoppedError


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_SAMPLES", CHUNK)


@pytest.fixture
def root(tmp_path: Path, image_folder: Path) -> Path:
    shutil.copytree(image_folder, tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "canvases"


def spoil(root: Path, *names: str) -> None:
    for name in names:
        (root / "train" / name).write_bytes(b"no picture")


def files(canvas: Canvas) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in canvas.path.iterdir()}


def unfinished(home: Path) -> Path:
    [folder] = home.glob(".*.tmp")
    return folder


def interrupt(root: Path, home: Path, at: int = 2 * CHUNK, size: int = SIZE) -> Path:
    with pytest.raises(StoppedError):
        load_canvas(Folder(str(root)), "train", size, home, Notes(at, stop))
    return unfinished(home)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the samples that were decoded, as it happens."""
    keys: list[str] = []
    original = module.decode

    def decode(sample: Any, size: int) -> Any:
        keys.append(sample.key)
        return original(sample, size)

    monkeypatch.setattr(module, "decode", decode)
    return keys


# ---------------------------------------------------------------- resuming


def test_an_interrupted_build_goes_on_where_it_stopped_and_ends_with_the_same_bytes(
    root: Path, home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    uninterrupted = load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "other")
    folder = interrupt(root, home)
    decoded.clear()
    notes = Notes()
    resumed = load_canvas(Folder(str(root)), "train", SIZE, home, notes)
    assert notes.done[0] == 2 * CHUNK
    assert f"{2 * CHUNK} of {COUNT}" in notes.said[0]
    assert sorted(decoded) == sorted(resumed.keys[2 * CHUNK :])
    assert files(resumed) == files(uninterrupted)
    assert sorted(files(resumed)) == ["canvas.json", "labels.npy", "pixels.npy", "sizes.npy"]
    assert not folder.exists()


def test_a_build_that_was_killed_within_a_line_of_its_journal_can_be_killed_again(root: Path, home: Path) -> None:
    folder = interrupt(root, home)
    os.truncate(folder / "journal.jsonl", (folder / "journal.jsonl").stat().st_size - 3)
    interrupt(root, home, at=3 * CHUNK)
    notes = Notes()
    assert load_canvas(Folder(str(root)), "train", SIZE, home, notes).intact
    assert notes.done[0] == 3 * CHUNK


BUILD = f"""
import sys, time
from pathlib import Path
import kdcache.datasets.canvas
from kdcache.datasets.folder import Folder

class Slow:
    def update(self, task, done, total, note=""):
        print(done, flush=True)
        while done >= 8 and done < total and not Path(sys.argv[3]).exists():
            time.sleep(0.02)
    def say(self, text):
        print(text, flush=True)

kdcache.datasets.canvas._CHUNK_SAMPLES = {CHUNK}
print(kdcache.datasets.canvas.load_canvas(Folder(sys.argv[1]), "train", {SIZE}, Path(sys.argv[2]), Slow()).digest)
"""


@pytest.fixture
def build(root: Path, home: Path, tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Start a process that builds the canvas and stops halfway until the file `go` is there."""
    started: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", BUILD, str(root), str(home), str(tmp_path / "go")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    pytest.fail(f"the process ended without {text!r}: {lines}")


def test_a_build_killed_by_the_system_goes_on_and_ends_with_the_same_bytes(
    root: Path, home: Path, tmp_path: Path, build: Callable[[], "subprocess.Popen[str]"], decoded: list[str]
) -> None:
    process = build()
    read_until(process, "8")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    notes = Notes()
    resumed = load_canvas(Folder(str(root)), "train", SIZE, home, notes)
    assert notes.done[0] == 8
    assert len(decoded) == COUNT - 8
    assert files(resumed) == files(load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "other"))


def test_of_two_processes_one_builds_and_the_other_waits_and_says_so(
    root: Path, home: Path, tmp_path: Path, build: Callable[[], "subprocess.Popen[str]"]
) -> None:
    first = build()
    read_until(first, "8")
    second = build()
    read_until(second, "waiting for another process to build")
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    canvas = load_canvas(Folder(str(root)), "train", SIZE, home)
    require_intact(canvas)
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert outputs[0].split()[-1] == outputs[1].split()[-1] == canvas.digest
    assert outputs[1].split() == [canvas.digest]  # it decoded nothing
    assert [path.name for path in home.iterdir() if path.is_dir()] == [canvas.path.name]


def test_who_waited_for_a_process_that_was_killed_goes_on_in_its_place(
    root: Path, home: Path, tmp_path: Path, build: Callable[[], "subprocess.Popen[str]"]
) -> None:
    first = build()
    read_until(first, "8")
    second = build()
    read_until(second, "waiting for another process to build")
    (tmp_path / "go").touch()
    os.kill(first.pid, signal.SIGKILL)
    assert second.wait(60) == 0
    assert load_canvas(Folder(str(root)), "train", SIZE, home).intact


@pytest.mark.exhaustive
@given(data=st.data())
def test_files_cut_short_by_a_crash_never_end_in_wrong_pixels(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    home = tmp_path_factory.mktemp("cut")
    expected = load_canvas(Folder(str(image_folder)), "train", SIZE, home / "whole").digest
    folder = interrupt(image_folder, home, at=data.draw(st.sampled_from([CHUNK, 3 * CHUNK, COUNT])))
    for name in data.draw(st.sets(st.sampled_from(["journal.jsonl", "pixels.npy"]))):
        length = data.draw(st.integers(0, (folder / name).stat().st_size))
        os.truncate(folder / name, length)
    resumed = load_canvas(Folder(str(image_folder)), "train", SIZE, home)
    assert resumed.digest == expected
    assert resumed.intact


@pytest.mark.parametrize("name", ["journal.jsonl", "pixels.npy"])
def test_a_changed_bit_of_what_was_decoded_before_is_decoded_again(
    root: Path, home: Path, tmp_path: Path, decoded: list[str], name: str
) -> None:
    """A resumed build reads back what it has never compared with anything else: pixels, and the sizes of images."""
    expected = files(load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "whole"))
    sound = Path(shutil.copytree(interrupt(root, home, at=3 * CHUNK), tmp_path / "sound"))
    data, again = (sound / name).read_bytes(), set()
    for place in range(200 if name == "pixels.npy" else 0, len(data), len(data) // 12):
        shutil.rmtree(home)
        building = interrupt(root, home, at=3 * CHUNK)
        (building / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        decoded.clear()
        assert files(load_canvas(Folder(str(root)), "train", SIZE, home)) == expected, place
        again.add(len(decoded))
    assert max(again) == COUNT
    assert COUNT - 3 * CHUNK not in again
    assert COUNT - 2 * CHUNK in again, "sound chunks before the changed one are kept"


def test_a_build_that_an_earlier_version_began_goes_on(root: Path, home: Path, tmp_path: Path, decoded: list[str]) -> None:
    folder = interrupt(root, home)
    first, *lines = (folder / "journal.jsonl").read_text().splitlines()
    (folder / "journal.jsonl").write_text(
        "".join(f"{line}\n" for line in [first, *(json.dumps(json.loads(x)["outcomes"]) for x in lines)])
    )
    decoded.clear()
    resumed = load_canvas(Folder(str(root)), "train", SIZE, home)
    assert len(decoded) < COUNT
    assert files(resumed) == files(load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "other"))


@pytest.mark.parametrize("text", ["[" * 100_000 + "\n", "", "\n", "[]\n", "{}\n[[1, 2]]\n", "\ufffd\n", "null\nnull\n", "{"])
def test_a_journal_of_something_else_is_not_trusted(root: Path, home: Path, decoded: list[str], text: str) -> None:
    folder = interrupt(root, home)
    (folder / "journal.jsonl").write_text(text)
    decoded.clear()
    assert load_canvas(Folder(str(root)), "train", SIZE, home).intact
    assert len(decoded) == COUNT


def test_pixels_that_no_journal_speaks_of_are_decoded_again(root: Path, home: Path, tmp_path: Path, decoded: list[str]) -> None:
    folder = interrupt(root, home)
    with (folder / "pixels.npy").open("ab") as file:
        file.write(bytes(3 * SIZE * SIZE * CHUNK))  # a chunk that looks finished: only the journal knows that it is not
    resumed = load_canvas(Folder(str(root)), "train", SIZE, home)
    assert files(resumed) == files(load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "other"))


def test_a_build_of_other_files_or_of_another_size_is_not_gone_on_with(
    root: Path, home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    interrupt(root, home)
    Image.new("RGB", (20, 20), (1, 2, 3)).save(root / "train/class_0/00.png")
    decoded.clear()
    changed = load_canvas(Folder(str(root)), "train", SIZE, home)
    assert len(decoded) == COUNT
    assert (changed.pixels[0].reshape(3, -1).T == (1, 2, 3)).all()
    interrupt(root, tmp_path / "sizes")
    decoded.clear()
    load_canvas(Folder(str(root)), "train", SIZE + 1, tmp_path / "sizes")
    assert len(decoded) == COUNT


def test_a_build_by_another_pillow_is_not_gone_on_with(
    root: Path, home: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(root, home)
    decoded.clear()
    monkeypatch.setattr(module.PIL, "__version__", "99.0")
    load_canvas(Folder(str(root)), "train", SIZE, home)
    assert len(decoded) == COUNT


def test_images_that_change_while_they_are_decoded_leave_no_canvas(root: Path, home: Path) -> None:
    victim = root / "train/class_0/00.png"
    before = victim.read_bytes(), victim.stat()

    def change() -> None:
        Image.new("RGB", (20, 20), (1, 2, 3)).save(victim)

    with pytest.raises(RetryError, match="changed while"):
        load_canvas(Folder(str(root)), "train", SIZE, home, Notes(CHUNK, change))
    victim.write_bytes(before[0])
    os.utime(victim, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    notes = Notes()
    canvas = load_canvas(Folder(str(root)), "train", SIZE, home, notes)  # the old files again: none of the build is used
    assert notes.done[0] == CHUNK
    assert not any("going on" in text for text in notes.said)
    assert canvas.intact


# ---------------------------------------------------------------- leaving out


def test_corrupt_images_are_left_out_and_listed_in_the_card(root: Path, home: Path, tmp_path: Path) -> None:
    spoil(root, "class_1/01.png", "class_0/09.png")
    notes = Notes()
    canvas = load_canvas(Folder(str(root)), "train", SIZE, home, notes, skip_corrupt=True)
    assert canvas.card.skipped == ("class_0/09.png", "class_1/01.png")
    assert len(canvas) == canvas.card.num_samples == COUNT - 2
    assert canvas.intact
    [said] = [text for text in notes.said if "left out" in text]
    assert "2 of 23 train" in said
    assert "class_0/09.png, class_1/01.png" in said
    for name in canvas.card.skipped:
        (root / "train" / name).unlink()
    without = load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "without")
    assert files(canvas)["pixels.npy"] == files(without)["pixels.npy"]
    assert (canvas.digest, canvas.card.digest) == (without.digest, without.card.digest)  # the very same samples
    assert without.card.skipped == ()
    np.testing.assert_array_equal(canvas.sizes, without.sizes)
    np.testing.assert_array_equal(canvas.labels, without.labels)


def test_a_canvas_with_gaps_is_the_canvas_of_the_split_from_then_on_and_every_use_says_so(root: Path, home: Path) -> None:
    spoil(root, "class_1/01.png")
    built = load_canvas(Folder(str(root)), "train", SIZE, home, skip_corrupt=True)
    notes = Notes()
    assert load_canvas(Folder(str(root)), "train", SIZE, home, notes).path == built.path
    assert ["1 of 23 train images are left out" in text for text in notes.said] == [True]
    assert load_canvas(Folder(str(root)), "test", SIZE, home).card.skipped == ()


def test_the_flag_changes_nothing_where_all_images_can_be_decoded(root: Path, home: Path, tmp_path: Path) -> None:
    plain = load_canvas(Folder(str(root)), "train", SIZE, home)
    skipping = load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "other", skip_corrupt=True)
    assert files(plain) == files(skipping)
    assert b"skipped" not in files(plain)["canvas.json"]


def test_what_was_decoded_before_the_error_is_not_decoded_again_to_leave_images_out(
    root: Path, home: Path, decoded: list[str]
) -> None:
    spoil(root, "class_1/01.png")
    with pytest.raises(IntegrityError, match="skip-corrupt"):
        load_canvas(Folder(str(root)), "train", SIZE, home)
    assert len(decoded) == COUNT
    assert len(load_canvas(Folder(str(root)), "train", SIZE, home, skip_corrupt=True)) == COUNT - 1
    assert len(decoded) == COUNT


def test_an_interrupted_build_with_gaps_ends_with_the_same_bytes(root: Path, home: Path, tmp_path: Path) -> None:
    spoil(root, "class_0/03.png", "class_0/09.png", "class_2/20.png")
    whole = load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "other", skip_corrupt=True)
    interrupt(root, home)
    assert files(load_canvas(Folder(str(root)), "train", SIZE, home, skip_corrupt=True)) == files(whole)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_of_which_nothing_is_left_is_refused(root: Path, home: Path, split: Any) -> None:
    for file in (root / split / "class_1").iterdir():
        file.write_bytes(b"")
    with pytest.raises(IntegrityError, match="class_1") as caught:
        load_canvas(Folder(str(root)), split, SIZE, home, skip_corrupt=True)
    assert "8 of 23" in caught.value.why


def test_the_error_shows_ten_names_and_a_file_lists_all(root: Path, home: Path) -> None:
    names = [f"class_{i % 3}/{i:02d}.png" for i in range(12)]
    spoil(root, *names)
    with pytest.raises(IntegrityError) as caught:
        load_canvas(Folder(str(root)), "train", SIZE, home)
    assert sum(name in caught.value.what for name in names) == 10
    assert "and 2 more" in caught.value.what
    assert "--skip-corrupt" in caught.value.fix
    [listing] = home.glob("*.txt")
    assert str(listing) in caught.value.why
    assert sorted(line.partition(": ")[0] for line in listing.read_text().splitlines()) == sorted(names)
    assert len(str(caught.value).splitlines()) == 3


def test_an_archive_fits_students_that_leave_out_the_same_images_and_no_others(
    root: Path, home: Path, tmp_path: Path, make_dump: Callable[..., Dump]
) -> None:
    whole = {name: (root / "train" / name).read_bytes() for name in ("class_1/01.png", "class_0/09.png")}
    spoil(root, *whole)
    dumped = load_canvas(Folder(str(root)), "train", SIZE, home, skip_corrupt=True)
    archive = make_dump(tmp_path / "a", dumped, policy=ViewPolicy.load("none", size=SIZE), views=1).archive
    source = archive.manifest.source
    assert isinstance(source, SourceCard)
    assert source.skipped == ("class_0/09.png", "class_1/01.png")
    same = load_canvas(Folder(str(root)), "train", SIZE, tmp_path / "elsewhere", skip_corrupt=True)
    assert len(list(CachedTargets(archive, same, 7, seed=0))) == 3
    (root / "train/class_1/01.png").write_bytes(whole["class_1/01.png"])
    fewer = load_canvas(Folder(str(root)), "train", SIZE, home, skip_corrupt=True)
    assert fewer.card.skipped == ("class_0/09.png",)
    with pytest.raises(IncompatibleError, match="other images"):
        CachedTargets(archive, fewer, 7, seed=0)


# ---------------------------------------------------------------- disks


def test_canvases_of_earlier_files_are_named_with_their_size_and_left_alone(root: Path, home: Path) -> None:
    first = load_canvas(Folder(str(root)), "train", SIZE, home)
    for other in (("test", SIZE), ("train", SIZE + 1)):
        load_canvas(Folder(str(root)), other[0], other[1], home)  # type: ignore[arg-type]
    os.utime(root / "train/class_0/00.png", (1, 1))
    half = interrupt(root, home)
    os.utime(root / "train/class_0/00.png", (2, 2))
    notes = Notes()
    load_canvas(Folder(str(root)), "train", SIZE, home, notes)
    [said] = [text for text in notes.said if "earlier" in text]
    assert said.endswith(f"rm -r {half} {first.path}")
    size = sum(file.stat().st_size for folder in (half, first.path) for file in folder.iterdir())
    assert f"2, {size / 1e6:.1f} MB" in said
    assert half.is_dir()
    assert first.path.is_dir()
    again = Notes()
    load_canvas(Folder(str(root)), "train", SIZE, home, again)
    assert again.said == []  # only who builds is told


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_full_before_anything_is_written_is_named(root: Path, home: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            load_canvas(Folder(str(root)), "train", SIZE, home)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path(caught.value.filename).is_relative_to(home)


def test_a_disk_without_room_is_an_error_before_anything_is_decoded(
    root: Path, home: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, COUNT * 3 * SIZE * SIZE - 1))
    with pytest.raises(RetryError, match=str(home)):
        load_canvas(Folder(str(root)), "train", SIZE, home)
    assert decoded == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, COUNT * 3 * SIZE * SIZE))
    assert len(load_canvas(Folder(str(root)), "train", SIZE, home)) == COUNT


def test_a_disk_that_fills_up_stops_the_build_and_room_lets_it_go_on(
    root: Path, home: Path, run_python: Callable[..., Any], decoded: list[str]
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))\n"
    done = run_python(limit + BUILD, root, home, root, check=False)
    assert done.returncode == 1
    assert "OSError: [Errno 27]" in done.stderr  # as with a full disk: an error of the system, not the end of the process
    notes = Notes()
    assert load_canvas(Folder(str(root)), "train", SIZE, home, notes).intact
    assert notes.done[0] > 0
    assert len(decoded) == COUNT - notes.done[0]


@pytest.mark.parametrize("size", [0, -3, 4097, 1_000_000])
def test_an_impossible_size_is_refused(root: Path, home: Path, size: int) -> None:
    with pytest.raises(UsageError, match=str(size)):
        load_canvas(Folder(str(root)), "train", size, home)
    assert not home.exists()


# ---------------------------------------------------------------- other processes


def test_a_canvas_goes_to_another_process_as_its_path(root: Path, home: Path) -> None:
    canvas = load_canvas(Folder(str(root)), "train", 200, home)
    sent = pickle.dumps(canvas)
    assert len(sent) < 1000 < canvas.pixels.nbytes
    again = pickle.loads(sent)
    assert isinstance(again.pixels, np.memmap)
    assert (again.keys, again.card, again.digest) == (canvas.keys, canvas.card, canvas.digest)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(operator.attrgetter("intact"), (canvas,))


def test_a_canvas_changed_in_memory_goes_to_another_process_as_it_is(root: Path, home: Path) -> None:
    canvas = load_canvas(Folder(str(root)), "train", SIZE, home)
    changed = replace(canvas, pixels=255 - canvas.pixels)
    again = pickle.loads(pickle.dumps(changed))
    np.testing.assert_array_equal(again.pixels, 255 - canvas.pixels)
    assert again.keys == canvas.keys
