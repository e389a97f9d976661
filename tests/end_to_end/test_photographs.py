"""Photographs from folder to student: archives of both versions of view policies, test views, students of another size."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from kdcache.archive import open_archive
from kdcache.errors import UsageError
from kdcache.system.seals import SEAL
from kdcache.views.policy import ViewPolicy

TEACHER = ["--teacher", "test_resnet", "--size", "32", "--canvas", "48"]
VERSION_1 = ["--policy", "imagenet:version=1,randaugment=none"]
VERSION_2 = ["--policy", "imagenet:randaugment=none"]


def save_photographs(root: Path, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(64, 48), (48, 64), (80, 40), (50, 50)]
    for split, count in (("train", 12), ("test", 6)):
        for number in range(count):
            width, height = shapes[number % 4]
            file = root / split / "abc"[number % 3] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)).resize((width, height)).save(file)


@pytest.fixture
def photographs(tmp_path: Path) -> list[str]:
    """A dataset of small photographs of several shapes, as an argument, and a workspace of its own."""
    save_photographs(tmp_path / "images")
    return ["--dataset", f"folder:{tmp_path / 'images'}", "--home", str(tmp_path / "home")]


@pytest.fixture
def trained(kdcache, photographs: list[str]) -> list[str]:
    assert kdcache("train-teacher", *TEACHER, *VERSION_2, *photographs, "--from-scratch", "--epochs", 1, "-b", 4).status == 0
    return photographs


def dumped(kdcache, *arguments: object) -> tuple[Path, str]:
    result = kdcache("dump-teacher", *TEACHER, *arguments)
    assert result.status == 0, result.err
    return Path(result.out.splitlines()[-1]), result.err


def test_archives_of_version_1_are_appended_to_verified_and_trained_from(kdcache, trained, tmp_path):
    old, _ = dumped(kdcache, *VERSION_1, "--views", 1, *trained)
    assert open_archive(old).manifest.policy.version == 1
    assert open_archive(old).manifest.canvas.sizes_digest is None  # as archives of before have it
    # The same recipe without a word on the version is a new archive, and says where the old one is.
    new, said = dumped(kdcache, *VERSION_2, "--views", 1, *trained)
    assert open_archive(new).manifest.policy == ViewPolicy.load("imagenet:randaugment=none", size=32)
    assert f"{old} has these views in version 1" in said
    assert "--policy imagenet:randaugment=none,version=1" in said
    differing = (open_archive(old).read(0, 0, 12).digest != open_archive(new).read(0, 0, 12).digest).sum()
    assert differing >= 8  # all but the square ones, whose filter is another

    assert dumped(kdcache, "--policy", "imagenet:randaugment=none,version=1", "--views", 2, *trained)[0] == old
    assert open_archive(old).num_views == 2
    path, said = dumped(kdcache, *VERSION_2, "--views", 3, "--output", old, *trained)
    assert path == old
    assert "has view policy version 1, and goes on with it" in said
    home = trained[-2:]
    for archive, views in ((old, 3), (new, 1)):
        assert open_archive(archive).num_views == views
        assert kdcache("verify", archive, "--replay", 36, *home).status == 0
        run = kdcache("distill", "--archive", archive, "--student", "test_resnet", "--epochs", 1, "-b", 4, *home)
        assert run.status == 0, run.err


def test_a_dump_of_square_photographs_goes_on_with_its_archive_of_version_1(kdcache, few_home):
    home = ["--home", few_home]
    (before,) = (few_home / "archives").iterdir()
    new = open_archive(before)
    assert new.manifest.policy.version == 2
    again = [
        "dump-teacher",
        "--teacher",
        "test_vit",
        "--dataset",
        new.manifest.provenance["dataset"],
        *home,
        "--canvas",
        32,
        "--policy",
    ]
    first = kdcache(*again, "digits:version=1", "--views", 1)
    assert first.status == 0, first.err
    old = Path(first.out.splitlines()[-1])
    result = kdcache(*again, "digits", "--views", 2)
    assert Path(result.out.splitlines()[-1]) == old
    assert "goes on with it" in result.err
    assert open_archive(old).manifest.policy.version == 1
    np.testing.assert_array_equal(open_archive(old).read(0, 0, 9).digest, new.read(0, 0, 9).digest)


def test_how_tests_show_photographs_is_recorded_everywhere(kdcache, trained, tmp_path):
    (record,) = (tmp_path / "home" / "teachers").glob("*/teacher.json")
    shown = json.loads(record.read_text())["test_views"]
    assert (shown["origin"], shown["crop_pct"], shown["policy"]["crop"]["resize"]) == ("model", 0.95, 33)
    config = json.loads((record.parent / "config.json").read_text())["pretrained_cfg"]
    assert [config[key] for key in ("crop_pct", "crop_mode", "interpolation")] == [0.95, "center", "bilinear"]
    archive, _ = dumped(kdcache, *VERSION_2, "--views", 1, *trained)
    assert json.loads((archive / "kdcache.json").read_text())["teacher"]["test_views"] == shown
    assert "crop 0.95 of the short side, bilinear" in (archive / "README.md").read_text()
    assert "crop 0.95 of the short side, bilinear" in kdcache("info", archive).out


@pytest.mark.exhaustive
def test_the_report_tells_students_by_how_they_were_tested(kdcache, trained, tmp_path):
    archive, _ = dumped(kdcache, *VERSION_2, "--views", 1, *trained)
    home = trained[-2:]
    student = ["distill", "--archive", archive, "--student", "test_resnet", "--epochs", 1, "-b", 4, *home]
    assert kdcache(*student).status == 0
    result = kdcache(*student, "--test-policy", "eval:crop.mode=squash", "--crop-pct", 1, "--json")
    assert result.status == 0, result.err
    assert "tests: whole image made square, bilinear" in result.err
    runs = [yaml.safe_load(file.read_text()) for file in (tmp_path / "home" / "runs").rglob("args.yaml")]
    titles = {"crop 0.95 of the short side, bilinear", "whole image made square, bilinear"}
    assert {args["test"] for args in runs} == titles
    assert kdcache("report", tmp_path / "home" / "runs", "--output", tmp_path / "report", *home).status == 0
    page = next((tmp_path / "report").rglob("*.html")).read_text()
    assert all(title in page for title in titles)


def test_students_of_another_size_see_the_teachers_views_resized(kdcache, trained, tmp_path):
    archive, _ = dumped(kdcache, *VERSION_2, "--views", 1, *trained)
    home = trained[-2:]
    student = ["distill", "--archive", archive, "--student", "test_resnet", "--epochs", 1, "-b", 4, *home]
    result = kdcache(*student, "--student-size", "24,32,40", "--json")
    assert result.status == 0, result.err
    assert "students see views of 40 px, made from the teacher's of 32 px: they are enlarged" in result.err
    runs = {args.get("student_size"): args for args in map(_args, (tmp_path / "home" / "runs").rglob("args.yaml"))}
    assert set(runs) == {None, 24, 40}
    assert runs[24]["test_views"]["policy"]["size"] == 24
    assert len(json.loads(result.out)) == 3
    # Trained together or alone, a student of another size is the same.
    weights = {file: file.read_bytes() for file in (tmp_path / "home" / "runs").rglob("last.safetensors")}
    for folder in (tmp_path / "home" / "runs").iterdir():
        folder.rename(tmp_path / "together")
    assert kdcache(*student, "--student-size", "24").status == 0
    (alone,) = (tmp_path / "home" / "runs").rglob("last.safetensors")
    assert alone.read_bytes() == weights[alone]
    own = kdcache(*student, "--student-size", "own", "--dry-run")
    assert own.status == 0
    assert "160 px" in own.out + own.err


def _args(file: Path) -> dict:
    return yaml.safe_load(file.read_text())


def test_a_teacher_that_is_tested_another_way_goes_on_with_its_archive(kdcache, trained, tmp_path):
    archive, _ = dumped(kdcache, *VERSION_2, "--views", 1, *trained)
    (file,) = (tmp_path / "home" / "teachers").glob("*/teacher.json")
    record = json.loads(file.read_text())
    del record["test_views"], record["interpolation"], record[SEAL]  # as records of before have it
    file.write_text(json.dumps(record | {"top1_clean": 12.5}))
    again, _ = dumped(kdcache, *VERSION_2, "--views", 2, *trained)
    assert again == archive
    assert open_archive(archive).num_views == 2


def test_students_are_not_shrunk_beyond_what_is_exact():
    from kdcache.students.grid import _sizes

    assert _sizes(("17", "512"), "rn18", "resnet18", 512) == [17, None]
    with pytest.raises(UsageError, match="--student-size 16"):
        _sizes(("16",), "rn18", "resnet18", 512)


@pytest.mark.parametrize("size", ["small", "7", "5000", "0x20"])
def test_impossible_student_sizes_are_refused(kdcache, few_home, size):
    result = kdcache("distill", "--student-size", size, "--home", few_home)
    assert result.status == 2
    assert f"--student-size {size}" in result.err
    assert len(result.err.strip().splitlines()) >= 3
    assert "Traceback" not in result.err


def test_photographs_of_other_sizes_than_at_the_dump_are_told(kdcache, trained, tmp_path):
    archive, _ = dumped(kdcache, *VERSION_2, "--views", 1, *trained)
    (tmp_path / "images" / "train" / "a" / "0.png").unlink()
    Image.new("RGB", (90, 30)).save(tmp_path / "images" / "train" / "a" / "0.png")
    result = kdcache("verify", archive, "--replay", 12, *trained[-2:])
    assert result.status in {4, 5}
    assert "sizes" in result.err
    assert "dump again" in result.err


def test_panoramas_and_tiny_pictures_are_dumped_and_told(kdcache, photographs, tmp_path):
    Image.new("RGB", (2000, 40), "red").save(tmp_path / "images" / "test" / "a" / "panorama.png")
    Image.new("RGB", (1, 300), "blue").save(tmp_path / "images" / "train" / "b" / "line.png")
    result = kdcache("train-teacher", *TEACHER, *VERSION_2, *photographs, "--from-scratch", "--epochs", 1, "-b", 4)
    assert result.status == 0, result.err
    assert "1 of 7 test images are so long" in result.err
    assert "a/panorama.png (2000 x 40)" in result.err
    archive, _ = dumped(kdcache, *VERSION_2, "--views", 1, *photographs)
    assert kdcache("verify", archive, "--replay", 13, *photographs[-2:]).status == 0
