"""Several teachers: students of their average, and what is refused before any of them is trained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kdcache.archive import Ensemble, open_archive
from kdcache.replay.stream import CachedTargets
from kdcache.targets import averaged
from tests.conftest import Dump, made_up, redump

STUDENT = ["--student", "test_vit", "--epochs", 2, "--batch-size", 8, "--renderer", "reference"]


@pytest.fixture(scope="module")
def teachers(dump: Dump, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives `first` and `second` (or `rounded`) of the same views in other shards and codecs, and their averages."""
    folder = tmp_path_factory.mktemp("teachers")
    one, two = made_up(1, dump), made_up(2, dump)
    redump(folder / "first", dump, one, codec="f32", shard_rows=4)
    redump(folder / "second", dump, two, codec="f32", shard_rows=16)
    redump(folder / "rounded", dump, two, codec="i16")
    redump(folder / "mean", dump, ((one.astype(np.float64) + two) / 2).astype(np.float32), codec="f32")
    at_4 = np.stack([averaged(torch.from_numpy(np.stack(pair, axis=1)), 4.0).numpy() for pair in zip(one, two, strict=True)])
    redump(folder / "mean-at-4", dump, at_4, codec="f32")
    return folder


@pytest.fixture
def distill(kdcache: Callable[..., Any], image_folder: Path, teachers: Path, tmp_path: Path) -> Callable[..., Any]:
    """Distil from archives of `teachers`, named, in a workspace of one's own."""

    def call(*names: str, home: str = "home", options: tuple[object, ...] = ()) -> Any:
        archives = [part for name in names for part in ("--archive", teachers / name)]
        place = ["--dataset", f"folder:{image_folder}", "--home", tmp_path / home, "--data-dir", tmp_path / "data"]
        return kdcache("distill", *archives, *STUDENT, *place, *options)

    return call


def runs(home: Path) -> dict[str, Path]:
    """Run folders by what was trained, less the hash at the end."""
    return {folder.name.rpartition("--")[0]: folder for folder in sorted(home.glob("runs/*/test_vit--*"))}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("average", "stored", "tau", "controls"),
    [("logits", "mean", "1,20", "none,ls-global"), ("probabilities", "mean-at-4", "4", "none,ls-global")],
)
def test_students_of_several_archives_are_those_of_an_archive_that_holds_the_averages(
    average: str, stored: str, tau: str, controls: str, distill: Callable[..., Any], tmp_path: Path
) -> None:
    grid = ("--tau", tau, "--control", controls)
    for names, home in ((("first", "second"), "several"), ((stored,), "one")):
        result = distill(*names, home=home, options=(*grid, "--average", average))
        assert result.status == 0, result.err
    several, one = runs(tmp_path / "several"), runs(tmp_path / "one")
    assert len(several) == len(one) == len(tau.split(",")) * len(controls.split(","))
    for what, folder in one.items():
        assert (several[what] / "last.safetensors").read_bytes() == (folder / "last.safetensors").read_bytes()
    assert len({(folder / "last.safetensors").read_bytes() for folder in one.values()}) == len(one)


@pytest.mark.exhaustive
def test_runs_say_which_archives_were_averaged_and_the_report_shows_them(
    distill: Callable[..., Any], kdcache: Callable[..., Any], teachers: Path, tmp_path: Path
) -> None:
    for how in ("logits", "probabilities"):
        assert distill("first", "second", options=("--tau", "4,20", "--average", how)).status == 0
    folders = list(tmp_path.glob("home/runs/first+second/test_vit--*"))
    assert len(folders) == 4
    assert (tmp_path / "home/runs/first+second/views.png").is_file()
    digests = {name: open_archive(teachers / name).manifest.digest for name in ("first", "second")}
    for folder in folders:
        args = yaml.safe_load((folder / "args.yaml").read_text())
        assert {archive["archive_name"]: archive["archive_digest"] for archive in args["archives"]} == digests
        assert args["archive_digest"] not in digests.values()
        assert args["teacher"] == "unknown+unknown"
    assert distill("first", options=("--tau", "4")).status == 0
    written = kdcache("report", "--home", tmp_path / "home")
    assert written.status == 0, written.err
    page = Path(written.out.strip()).read_text()
    for words in ("average logits", "average probabilities", "first+second", "Archive first ", "Archive second "):
        assert words in page
    assert "it is the average of the logits of " in page
    assert page.count('alt="Contact sheet') == 3  # of both averages and of the archive that was used alone


def test_the_order_of_the_archives_has_no_effect_and_a_dry_run_knows_what_is_trained(distill: Callable[..., Any]) -> None:
    options = ("--tau", "4", "--average", "probabilities")
    assert distill("first", "second", options=options).status == 0
    again = distill("second", "first", options=(*options, "--dry-run"))
    assert "1 student of 2 epochs, 1 of them trained already" in again.err
    other = distill("second", "first", options=("--tau", "4", "--dry-run"))
    assert "1 student of 2 epochs, 0 of them trained already" in other.err


def test_one_archive_is_trained_from_as_it_always_was(distill: Callable[..., Any], teachers: Path, tmp_path: Path) -> None:
    assert distill("first", options=("--tau", "4", "--average", "probabilities")).status == 0
    [folder] = tmp_path.glob("home/runs/first/test_vit--*")
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["archive_digest"] == open_archive(teachers / "first").manifest.digest
    assert not {"archives", "average"} & set(args)
    assert "1 of them trained already" in distill("first", options=("--tau", "4", "--dry-run")).err


def test_archives_come_from_flags_the_environment_or_a_configuration(
    kdcache: Callable[..., Any], teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    shutil.copytree(teachers / "first", tmp_path / "a folder")
    common = ["--dataset", f"folder:{image_folder}", "--dry-run", "--home", tmp_path, "--student", "test_vit"]
    common += ["--batch-size", 8]
    config = tmp_path / "study.yaml"
    config.write_text(f"archive: [{teachers / 'first'}, {teachers / 'first'}]\n")
    assert "hold the same logits" in kdcache("distill", "--config", config, *common).err
    config.write_text(f"archive: {tmp_path / 'a folder'}\n")
    assert kdcache("distill", "--config", config, *common).status == 0
    monkeypatch.setenv("KDCACHE_DISTILL_ARCHIVE", str(tmp_path / "a folder"))
    assert kdcache("distill", *common).status == 0
    monkeypatch.setenv("KDCACHE_DISTILL_ARCHIVE", f"{tmp_path / 'a folder'},{teachers / 'nowhere'}")
    assert "nowhere" in kdcache("distill", *common).err
    assert kdcache("distill", "--archive", teachers / "first", "--archive", teachers / "second", *common).status == 0


def test_fewer_views_in_one_archive_are_said(distill: Callable[..., Any], dump: Dump, teachers: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    redump(short, dump, made_up(5, dump), views=range(1, 3))
    result = distill("first", str(short), options=("--tau", "4", "--dry-run"))
    assert result.status == 0
    assert f"{teachers / 'first'} has 3 views; the 2 that all have are used" in result.err


def test_archives_that_do_not_belong_together_are_refused_before_training(
    distill: Callable[..., Any], dump: Dump, tmp_path: Path
) -> None:
    policy = dump.archive.manifest.policy
    redump(tmp_path / "flipped", dump, made_up(5, dump), policy=policy.model_copy(update={"hflip": 0.125}))
    result = distill("first", str(tmp_path / "flipped"), options=("--tau", "4"))
    assert result.status == 5
    lines = result.err.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["error", "why", "fix"]
    assert "differ in policy, policy.hflip" in lines[0]
    assert "0.125" in lines[1]
    assert not (tmp_path / "home/runs").exists()


def test_a_view_that_another_teacher_did_not_see_stops_training(distill: Callable[..., Any], dump: Dump, tmp_path: Path) -> None:
    digest = np.stack([dump.archive.column("digest", view) for view in range(3)])
    digest[:, 11] ^= 1
    redump(tmp_path / "other", dump, made_up(5, dump), digest=digest)
    result = distill("first", str(tmp_path / "other"), options=("--tau", "4"))
    assert result.status == 5
    assert str(tmp_path / "other") in result.err
    assert "at positions 11 (1 in all)" in result.err


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_the_stream_reads_every_archive_at_the_same_rows(dump: Dump, teachers: Path, average: Any, workers: int) -> None:
    archives = [open_archive(teachers / name) for name in ("first", "rounded")]
    stream = CachedTargets(Ensemble(archives, average), dump.canvas, batch_size=8, seed=3, workers=workers)
    for batch in stream:
        parts = np.stack([archive.find(batch.view, batch.sample.numpy()).logits for archive in archives], axis=1)
        found, teachers_logits = averaged(batch.logits, 4.0), torch.from_numpy(parts).double()
        assert found.shape == (8, 3)
        if average == "logits":
            torch.testing.assert_close(found, teachers_logits.mean(dim=1).float(), rtol=0, atol=0)
        else:
            mean = torch.softmax(teachers_logits / 4, dim=2).mean(dim=1)
            torch.testing.assert_close(torch.softmax(found / 4, dim=1), mean.float(), rtol=0, atol=1e-6)
