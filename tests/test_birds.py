"""The two sets of birds of the study `granularity`, built from ImageNet and somebody's set of birds."""

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from kdcache.study.schema import find_study, load_study, shipped_folder

SCRIPT = shipped_folder() / "birds.py"
OWN = ["black-billed magpie", "green magpie", "001.Black_Vulture", "KING VULTURE"]


@pytest.fixture(scope="module")
def birds() -> ModuleType:
    spec = importlib.util.spec_from_file_location("birds", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (2, 2), (7, 7, 7)).save(data, "JPEG", comment=str(shade).encode())  # so that no two files are the same
    return data.getvalue()


def fill(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(picture(first + number))


@pytest.fixture
def sources(birds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """An ImageNet of four birds and a fish, and a set of six birds: small sets, of 4 classes with 3 + 2 images."""
    for name, value in {"CLASSES": 4, "TRAIN": 3, "TEST": 2, "SPLITS": {"train": 3, "test": 2}}.items():
        monkeypatch.setattr(birds, name, value)
    for number, wnid in enumerate(("n01580077", "n01582220", "n01614925", "n01616318", "n01440764")):
        fill(tmp_path / f"imagenet/train/{wnid}", 1, 900)
        fill(tmp_path / f"imagenet/val/{wnid}", 6, 10 * number)
    for number, name in enumerate([*OWN, "magpie", "albatross of mine"]):
        fill(tmp_path / f"own/train/{name}", 4, 100 + 10 * number)
        fill(tmp_path / f"own/test/{name}", 2, 500 + 10 * number)
    return f"folder:{tmp_path / 'imagenet'}", f"folder:{tmp_path / 'own'}"


def test_a_dry_run_names_what_is_missing(
    birds: ModuleType, sources: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--imagenet", sources[0], "--birds", sources[1], "--out", str(out)]
    assert birds.main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "imagenet-birds: 4 of 4 classes of 3 + 2 images" in said
    assert "  n01582220-magpie: 6 images to choose from" in said
    assert "missing: n01514668 cock: 0 images in the validation split" in said
    assert "green_magpie (a kind of magpie): 6 images" in said
    assert "missing: finer kinds of" in said
    assert "missing: 2 classes of yours are no finer kind of any" in said
    assert not out.exists()

    for image in sorted((tmp_path / "imagenet/val/n01582220").iterdir())[:2]:
        image.unlink()
    for image in sorted((tmp_path / "own/train/KING VULTURE").iterdir())[:2]:
        image.unlink()
    assert birds.main(arguments) == 3
    said = capsys.readouterr()
    assert "missing: n01582220 magpie: 4 images in the validation split" in said.out
    assert "missing: king vulture (a kind of vulture): 4 images in all, 5 are needed" in said.out
    assert [line.partition(":")[0] for line in said.err.splitlines()] == ["error", "why", "fix"]
    assert "imagenet-birds lacks 1 of 4 classes; finer-grained-birds lacks 1 of 4" in said.err
    assert not out.exists()


def test_the_sets_are_what_the_study_reads(
    birds: ModuleType, sources: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--imagenet", sources[0], "--birds", sources[1], "--birds", sources[1], "--out", str(tmp_path / "out")]
    assert birds.main(arguments) == 0
    names = {spec.removeprefix("folder:") for spec in load_study(find_study("granularity")).archives["birds"].dataset}
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == names
    fine = tmp_path / "out/finer-grained-birds"
    for split, count in (("train", 3), ("test", 2)):
        found = {folder.name: len(list(folder.iterdir())) for folder in (fine / split).iterdir()}
        assert found == dict.fromkeys(("black_billed_magpie", "green_magpie", "black_vulture", "king_vulture"), count)
    record = json.loads((fine / "birds.json").read_text())
    chosen = record["classes"]["king_vulture"]
    assert chosen["kind"] == "vulture"
    assert len({*chosen["train"], *chosen["test"]}) == 5
    own = {file.read_bytes() for file in (tmp_path / "own").glob("*/KING VULTURE/*")}
    made = {file.read_bytes() for file in fine.glob("*/king_vulture/*.jpg")}
    assert made < own, "files as they are"
    assert len(made) == 5
    coarse = {file.read_bytes() for file in (tmp_path / "out/imagenet-birds").glob("*/*/*.jpg")}
    assert picture(900) not in coarse, "nothing that the weights were trained on"
    assert picture(40) not in coarse, "a fish is no bird"

    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert birds.main(arguments) == 0
    assert capsys.readouterr().out.count("is there already") == 2
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == times
    assert birds.main([*arguments, "--seed", "1"]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("king vulture", "vulture"),
        ("laughing gull", ""),
        ("magpie", ""),
        ("american robin", ""),  # a name of ImageNet's own class
        ("european robin", "robin"),
        ("black footed albatross", "albatross"),
        ("greater prairie chicken", "prairie chicken"),
        ("nightjar", ""),  # ends with jay's letters only nearly
        ("bluejay", ""),
    ],
)
def test_a_finer_kind_is_named_by_its_last_words(birds: ModuleType, name: str, kind: str) -> None:
    assert birds.kind_of(name) == kind


def test_all_of_imagenets_birds_are_classes_of_its(birds: ModuleType) -> None:
    from kdcache.models.classes import imagenet

    assert len(set(birds.BIRDS)) == 59
    assert set(birds.BIRDS) < set(imagenet("imagenet-1k").names)  # type: ignore[union-attr]


def test_images_that_cannot_be_read_and_sets_without_birds_are_named(
    birds: ModuleType, sources: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--imagenet", sources[0], "--birds", sources[1], "--out", str(tmp_path / "out")]
    for file in (tmp_path / "own/train/green magpie").iterdir():
        file.write_bytes(file.read_bytes()[:200])
    assert birds.main(arguments) == 2
    assert "green magpie/" in capsys.readouterr().err
    assert not (tmp_path / "out/finer-grained-birds").exists()
    for wrong, status, said in (
        (["--imagenet", sources[1], "--birds", sources[1]], 2, "none of ImageNet's birds"),
        (["--imagenet", sources[0]], 2, "no set of birds is named"),
        (["--imagenet", "folder:/nowhere", "--birds", sources[1]], 3, "does not exist"),
    ):
        assert birds.main(wrong) == status
        assert said in capsys.readouterr().err
