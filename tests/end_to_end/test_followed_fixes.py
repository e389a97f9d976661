"""Damage of every file that a command reads back: the fix of the error is followed to the letter, and the command ends well."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.cli import run
from tests.end_to_end.conftest import FEW
from tests.end_to_end.test_distill import only

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


def follow(fix: str) -> None:
    """Run the part of a fix that moves files."""
    command = re.search(r"\bmv .*?(?=$|; )", fix)
    assert command, fix
    subprocess.run(command[0], shell=True, check=True)


def test_an_export_makes_a_model_card_anew_that_says_too_little(finished: Path, tmp_path: Path, kdcache) -> None:
    home = tmp_path / "my home"
    shutil.copytree(finished, home)
    only(home, "runs/*/*/config.json").write_text("{}")
    damaged = kdcache(*export(home, []))
    assert damaged.status == 4
    follow(damaged.err.rpartition("fix: ")[2].strip())
    assert kdcache(*export(home, [])).status == 0


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
    while (result := kdcache(*command)).status == 4:  # of several damaged files, a command names one at a time
        assert "Traceback" not in result.err
        before = len(list(home.rglob("*.aside")))
        follow(result.err.rpartition("fix: ")[2].strip())
        assert len(list(home.rglob("*.aside"))) == before + 1, "nothing may be lost"
        for make in makes:
            made = kdcache(*make(home, teacher), "--home", home)
            assert made.status == 0, made.err
    assert result.status == 0, result.err
    assert list(home.rglob("*.aside"))
    listed = kdcache("ls", "--home", home)
    assert listed.status == 0
    assert "   damaged" not in listed.out


def amended(command: list[str], told: str) -> list[str]:
    """The command as the error says that it should be: an option left out or set, or a wrong value in exchange for another."""
    fix = told.rpartition("fix: ")[2].strip()
    if left := re.match(r"leave (--[a-z-]+) out", fix):
        place = command.index(left[1])
        return command[:place] + command[place + 2 :]
    options = re.findall(r"(--[a-z-]+) ([^\s,]\S*)", fix)
    if not options:
        wrong, right = re.search(r"error: .*'([^'\n]+)'", told), re.search(r"(?:use|such as) '?([^\s',]+)'?", fix)
        assert wrong, told
        assert right, told
        return [word.replace(wrong[1], right[1]) for word in command]
    for option, value in options[:1] if " or " in fix else options:
        if option in command:
            command = [*command[: command.index(option) + 1], value.rstrip(","), *command[command.index(option) + 2 :]]
        else:
            command = [*command, option, value]
    return command


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
def test_a_command_that_is_mended_as_its_error_says_is_understood(command: list[str], trained: Path, kdcache) -> None:
    told = kdcache(*command, "--dry-run", "--home", trained)
    assert told.status == 2, told.err
    mended = amended(command, told.err)
    assert mended != command
    result = kdcache(*mended, "--dry-run", "--home", trained)
    assert result.status == 0, (mended, result.err)


MISTAKEN_FILES = [
    ["view", "ARCHIVE", "--views", "7:9", "--out", "sheet.png"],
    ["view", "ARCHIVE", "--out", "nowhere/sheet.png"],
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
    command = [word.replace("ARCHIVE", str(only(few_trained, "archives/*"))) for word in command]
    told = kdcache(*command)
    assert told.status == 2, told.err
    fix = told.err.rpartition("fix: ")[2].strip()
    if fix.startswith("mkdir "):
        subprocess.run(fix, shell=True, check=True)
        mended = command
    elif fix.startswith("kdcache "):
        mended = shlex.split(fix)[1:]
    else:
        mended = amended(command, told.err)
    result = kdcache(*mended)
    assert result.status == 0, (mended, result.err)
