"""Protects what a resume, an export or a dump reads back: a changed bit is noticed, and files of before are read as they are."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kdcache.datasets.canvas import load_canvas, require_intact
from kdcache.datasets.folder import Folder
from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError
from kdcache.models.creation import load_weights
from kdcache.report.records import collect
from kdcache.system.energy import Spent
from kdcache.system.seals import SEAL, sealed_record
from kdcache.teachers.head import HEAD, Head, read_head
from kdcache.training.checkpoint import CHECKPOINT
from kdcache.workspace import read_record
from tests.reports import RunFolders
from tests.test_learner import Tiny, made, step


def flips(file: Path, count: int | None = None) -> Iterator[tuple[int, int]]:
    """Change one bit of a file at a time, `count` at random places of all that there are, and change it back."""
    data = file.read_bytes()
    bits = range(8 * len(data)) if count is None else random.Random(1).sample(range(8 * len(data)), count)
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        yield bit // 8, bit % 8
    file.write_bytes(data)


def all_noticed(file: Path, read: Callable[[], object], count: int | None = None) -> KdcacheError:
    read()
    noticed: list[KdcacheError] = []
    for byte, bit in flips(file, count):
        try:
            read()
        except (IntegrityError, IncompatibleError) as error:  # a seal that is none any more is not that of the record
            noticed.append(error)
        else:
            pytest.fail(f"bit {bit} of byte {byte} is not noticed")
    read()
    return noticed[-1]


def trained(folder: Path, *, over: bool = False) -> Path:
    one = made(folder, epochs=2, model_ema_decay=0.5)
    for epoch in range(1 + over):
        for _ in range(50):
            step(one)
        one.end_epoch({"test_top1": 10.0 + epoch})
    one.suspend()
    return folder


def resumed(folder: Path) -> None:
    one = made(folder, epochs=2, model_ema_decay=0.5)
    assert one.epoch == 1
    one.abandon()


def test_a_changed_bit_of_a_checkpoint_is_noticed_and_the_fix_trains_anew(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    error = all_noticed(folder / CHECKPOINT, lambda: resumed(folder), 60)
    aside = error.fix.rsplit(": ", 1)[1].split()
    assert aside[0] == "mv"
    Path(aside[1]).rename(aside[2])
    assert made(folder, epochs=2, model_ema_decay=0.5).epoch == 0
    assert (Path(aside[2]) / CHECKPOINT).is_file()


def test_a_checkpoint_whose_end_is_lost_is_noticed(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    data = (folder / CHECKPOINT).read_bytes()
    for size in (*range(len(data) - 100, len(data)), 0, 10, len(data) // 2):
        (folder / CHECKPOINT).write_bytes(data[:size])
        with pytest.raises(IntegrityError):
            resumed(folder)
    (folder / CHECKPOINT).write_bytes(data + b"x")
    with pytest.raises(IntegrityError):
        resumed(folder)


def test_best_weights_that_a_resume_reads_are_checked(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    all_noticed(folder / "best.safetensors", lambda: resumed(folder), 40)


@pytest.mark.parametrize("name", ["last", "ema", "best"])
def test_a_changed_bit_of_weights_is_noticed(tmp_path: Path, name: str) -> None:
    file = trained(tmp_path / "run", over=True) / f"{name}.safetensors"
    error = all_noticed(file, lambda: load_weights(Tiny(), file), 150)
    assert f"mv {file.parent} {file.parent}.aside" in error.fix


def test_weights_are_still_everybodys_safetensors(tmp_path: Path) -> None:
    file = trained(tmp_path, over=True) / "last.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    bare = load_file(file)
    assert {key: value.shape for key, value in bare.items()} == {k: v.shape for k, v in Tiny().state_dict().items()}
    again = trained(tmp_path / "again", over=True) / "last.safetensors"
    assert again.read_bytes() == file.read_bytes(), "the same weights are the same bytes"
    save_file(bare, file)  # as versions before wrote them, whose summaries do not name them
    file.with_name("summary.json").unlink()
    assert load_weights(Tiny(), file) == []


def test_a_changed_bit_of_a_head_is_noticed(tmp_path: Path) -> None:
    Head({"fc.weight": torch.ones(2, 3)}, {"test_top1": 3.0}, Spent(), amp=True).write(tmp_path)
    all_noticed(tmp_path / HEAD, lambda: read_head(tmp_path), 150)
    assert (head := read_head(tmp_path)) is not None
    assert (head.row, head.amp) == ({"test_top1": 3.0}, True)


@pytest.mark.parametrize("header", [b"[" * 100_000, b"[]", b"null", b'{"__metadata__": []}', b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_head_whose_header_was_made_to_break_its_reader_is_damaged(tmp_path: Path, header: bytes) -> None:
    Head({"fc.weight": torch.ones(2, 3)}, {"test_top1": 3.0}, Spent(), amp=True).write(tmp_path)
    (tmp_path / HEAD).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(IntegrityError):
        read_head(tmp_path)


def test_a_changed_bit_of_a_summary_is_noticed(tmp_path: Path) -> None:
    file = trained(tmp_path, over=True) / "summary.json"
    error = all_noticed(file, lambda: read_record(file), 500)
    assert f"mv {tmp_path} {tmp_path}.aside" in error.fix
    assert SEAL not in read_record(file)


def test_a_record_that_was_changed_on_purpose_is_read_without_its_seal(tmp_path: Path) -> None:
    file = tmp_path / "teacher.json"
    file.write_bytes(sealed_record({"a": 1, "names": ["ö", "\U0001f600", '"']}))
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"a": 2}))
    with pytest.raises(IntegrityError) as caught:
        read_record(file)
    assert f"take its field {SEAL} out" in caught.value.fix
    del record[SEAL]
    file.write_text(json.dumps(record | {"a": 2}))
    assert read_record(file)["a"] == 2


def test_a_report_notices_a_changed_summary(tmp_path: Path) -> None:
    folder = RunFolders(tmp_path)()
    summary = folder / "summary.json"
    summary.write_bytes(sealed_record(json.loads(summary.read_text())))
    collect([tmp_path])
    summary.write_bytes(summary.read_bytes().replace(b'"complete"', b'"diverged"'))
    with pytest.raises(IntegrityError, match=r"summary\.json is damaged"):
        collect([tmp_path])


@pytest.mark.exhaustive
def test_changed_bits_of_a_canvas_are_noticed(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "images" / "train" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (9, 7), (number, 40, 200)).save(tmp_path / "images" / "train" / label / f"{number}.png")
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "test")
    source = Folder(str(tmp_path / "images"))

    def read() -> None:
        require_intact(load_canvas(source, "train", 4, tmp_path / "c"))

    canvas = load_canvas(source, "train", 4, tmp_path / "c")
    all_noticed(canvas.path / "canvas.json", read, 200)
    for name in ("labels.npy", "sizes.npy", "pixels.npy"):
        data = (canvas.path / name).read_bytes()
        for byte in range(128, len(data), 5):
            (canvas.path / name).write_bytes(data[:byte] + bytes([data[byte] ^ 16]) + data[byte + 1 :])
            with pytest.raises(IntegrityError):
                read()
        for byte in range(0, 128, 3):  # a header with another space in it means the same
            for bit in range(8):
                (canvas.path / name).write_bytes(data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :])
                try:
                    again = load_canvas(source, "train", 4, tmp_path / "c")
                    require_intact(again)
                except IntegrityError:
                    continue
                assert (again.pixels == canvas.pixels).all()
                assert again.labels.tolist() == canvas.labels.tolist()
        (canvas.path / name).write_bytes(data)
    meta = json.loads((canvas.path / "canvas.json").read_text())
    del meta[SEAL]  # as before
    (canvas.path / "canvas.json").write_text(json.dumps(meta))
    read()


def test_files_of_before_are_read_as_they_were(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    torch.save(torch.load(folder / CHECKPOINT, weights_only=True), folder / CHECKPOINT)
    save_file(load_file(folder / "best.safetensors"), folder / "best.safetensors")
    resumed(folder)
