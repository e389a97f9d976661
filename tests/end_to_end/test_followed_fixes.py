"""Damage of every file that a command reads back: the fix of the error is followed to the letter, and the command ends well."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.cli import run
from tests.end_to_end.conftest import FEW
from tests.end_to_end.test_distill import only
from tests.following import amended, fix_of, followed_by_command, told_sites, typed
from tests.sites import note

STUDENT = ["distill", "--tau", "4", *FEW, "--epochs", "1"]


@pytest.fixture(scope="module")
def finished(few_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a teacher, its archive and a student of it; only to be copied."""
    home = tmp_path_factory.mktemp("finished") / "home"
    shutil.copytree(few_trained, home)
    assert run([*STUDENT, "--home", str(home)]) == 0
    return home


Command = Callable[[Path, list[str]], list[str]]  # from the workspace, and the options that name teacher and dataset


def distil(home: Path, teacher: list[str]) -> list[str]:
    return STUDENT


def dump(home: Path, teacher: list[str]) -> list[str]:
    return ["dump-teacher", *teacher, "--views", "3"]


def train(home: Path, teacher: list[str]) -> list[str]:
    return ["train-teacher", *teacher, "--from-scratch", "--epochs", "1"]


def report(home: Path, teacher: list[str]) -> list[str]:
    return ["report", str(home / "runs"), "--output", str(home / "report")]


def export(home: Path, teacher: list[str]) -> list[str]:
    terms = ["--license", "data=cc-by-4.0,weights=mit"]
    return ["export", str(only(home, "runs/*/*/")), "--output", str(home / "exported"), *terms]


# What is read back: the file, the command that meets the damage, and those to repeat where the fix says so.
DAMAGED: dict[str, tuple[str, Command, list[Command]]] = {
    "a run's settings": ("runs/*/*/args.yaml", report, [distil]),
    "a run's summary": ("runs/*/*/summary.json", report, [distil]),
    "a run's figures": ("runs/*/*/metrics.jsonl", report, [distil]),
    "an exported run's model": ("runs/*/*/config.json", export, [distil]),
    "a teacher's record": ("teachers/*/teacher.json", train, []),
    "a canvas's record": ("data/*/canvas.json", distil, []),
    "a canvas's pixels": ("data/*/pixels.npy", distil, []),
    "a manifest": ("archives/*/kdcache.json", distil, [dump]),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_an_export_makes_a_model_card_anew_that_says_too_little(finished: Path, tmp_path: Path, kdcache) -> None:
    home = tmp_path / "my home"
    shutil.copytree(finished, home)
    only(home, "runs/*/*/config.json").write_text("{}")
    followed_by_command(kdcache, export(home, []), amended)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_set_aside_and_made_anew(
    name: str, finished: Path, few_trained: Path, tmp_path: Path, kdcache
) -> None:
    pattern, meets, makes = DAMAGED[name]
    home, source = tmp_path / "my home", few_trained.parent / "digits"
    shutil.copytree(finished, home)
    teacher = ["--teacher", "test_vit", "--dataset", f"arrays:{source}", "--canvas", "32", "--policy", "digits"]
    files = sorted(home.glob(pattern))
    assert files
    for file in files:
        cut(file)
    command = [*meets(home, teacher), "--home", str(home)] if meets not in {report, export} else meets(home, teacher)
    with told_sites() as sites:
        while (result := kdcache(*command)).status == 4:  # of several damaged files, a command names one at a time
            assert "Traceback" not in result.err
            before = len(list(home.rglob("*.aside")))
            typed(fix_of(result.err), "mv")
            assert len(list(home.rglob("*.aside"))) == before + 1, "nothing may be lost"
            for make in makes:
                made = kdcache(*make(home, teacher), "--home", home)
                assert made.status == 0, made.err
    assert result.status == 0, result.err
    note({site for error, of_it in sites.items() if "mv " in error for site in of_it})
    assert list(home.rglob("*.aside"))
    listed = kdcache("ls", "--home", home)
    assert listed.status == 0
    assert "   damaged" not in listed.out


DUMP = ["dump-teacher", "--teacher", "test_vit", "--dataset", "digits"]
MISTAKES = [
    ["distill", "--tau", "0"],
    ["distill", "--tau", "abc"],
    ["distill", "--seed", "-1"],
    ["distill", "--method", "kdd"],
    ["distill", "--batch-size", "5000"],
    ["distill", "--opt", "nothing"],
    ["distill", "--opt", "sgd", "--opt-betas", "0.9,0.99"],
    ["distill", "--sched", "step"],
    ["distill", "--sched", "step", "--decay-epochs", "3", "--min-lr", "0.1"],
    ["distill", "--min-lr", "5"],
    ["distill", "--warmup-epochs", "9999"],
    ["distill", "--warmup-lr", "0.1"],
    ["distill", "--memory", "much"],
    ["distill", "--workers", "5000"],
    [*DUMP, "--policy", "petz"],
    [*DUMP, "--codec", "i8"],
    [*DUMP, "--layout", "tar"],
    [*DUMP, "--layout", "zarr:lz4"],
    [*DUMP, "--layout", "zarr:pcodec", "--codec", "u8"],
    [*DUMP, "--shard", "3/2"],
]


@pytest.mark.parametrize("command", MISTAKES, ids=lambda command: " ".join(command[-2:]))
def test_a_command_that_is_mended_as_its_error_says_is_understood(
    command: list[str], trained: Path, tmp_path: Path, kdcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def mend(command: list[str], told: str) -> list[str]:
        mended = amended(command, told)
        assert "--dry-run" in mended
        assert mended != command
        return mended

    followed_by_command(kdcache, [*command, "--dry-run", "--home", str(trained)], mend)


MISTAKEN_FILES = [
    ["view", "ARCHIVE", "--views", "7:9", "--out", "sheet.png"],
    ["view", "ARCHIVE", "--out", "nowhere/sheet.png"],
    ["view", "ARCHIVE", "--out", "."],
    ["stats", "ARCHIVE", "--codec", "u8"],
    ["stats", "ARCHIVE", "--plot", "entropies.txt"],
    ["convert", "ARCHIVE", "--views", "5:9", "-o", "converted"],
    ["convert", "ARCHIVE", "--layout", "zarr:lz4", "-o", "converted"],
    ["convert", "ARCHIVE", "--codec", "i8", "-o", "converted"],
    ["pull", "ARCHIVE", "pulled", "--views", "9:12"],
    ["policy", "petz"],
]


@pytest.mark.parametrize("command", MISTAKEN_FILES, ids=" ".join)
def test_a_command_on_an_archive_that_is_mended_as_its_error_says_ends_well(
    command: list[str], few_trained: Path, tmp_path: Path, kdcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCACHE_HOME", str(few_trained))
    followed_by_command(kdcache, [word.replace("ARCHIVE", str(only(few_trained, "archives/*"))) for word in command], amended)
