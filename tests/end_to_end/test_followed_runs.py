"""Workspaces in which something is missing, exchanged or another one's: the fix of each error is followed by the command line."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.archive import write_archive
from kdcache.cli import run
from tests.end_to_end.conftest import FEW
from tests.end_to_end.test_distill import only
from tests.following import amended, dataset_in, fix_of, followed_by_command

DISTILL = ["distill", "--tau", "4", *FEW, "--epochs", "1"]
TERMS = ["--license", "data=cc-by-4.0,weights=mit"]


@pytest.fixture(scope="module")
def finished(few_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a teacher, its archive and a student of it; only to be copied."""
    home = tmp_path_factory.mktemp("finished") / "home"
    shutil.copytree(few_trained, home)
    assert run([*DISTILL, "--home", str(home)]) == 0
    return home


class Place:
    """A workspace of one's own, and what lies in it."""

    def __init__(self, home: Path, digits: Path, finished: Path) -> None:
        self.home, self.finished = home, finished
        self.data = ["--dataset", f"arrays:{digits}"]
        self.digits = digits
        self.teacher = ["--teacher", "test_vit", *self.data, "--canvas", "32", "--policy", "digits"]

    @property
    def archive(self) -> Path:
        return only(self.home, "archives/*")

    @property
    def run(self) -> Path:
        return only(self.home, "runs/*/*/")

    @property
    def folder(self) -> Path:
        return only(self.home, "teachers/*/")

    @property
    def dump(self) -> list[str]:
        return ["dump-teacher", *self.teacher, "--views", "3"]

    def restore(self, pattern: str) -> None:
        """Put back what matches the pattern from the copy that one has."""
        for source in self.finished.glob(pattern):
            target = self.home / source.relative_to(self.finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)


Spoil = Callable[[Place], object]
Mend = Callable[[Place, list[str], str], list[str]]


def says(words: str, does: Spoil | None = None, then: Callable[[Place], list[str]] | None = None) -> Mend:
    def mend(place: Place, command: list[str], told: str) -> list[str]:
        assert words in fix_of(told), told
        if does is not None:
            does(place)
        return then(place) if then is not None else command

    return mend


def plain(place: Place, command: list[str], told: str) -> list[str]:
    return amended(command, told)


def named(place: Place, command: list[str], told: str) -> list[str]:
    """The dataset is named as the fix says, or by its name where that leaves it open."""
    name = dataset_in(fix_of(told))
    return [*command, "--dataset", place.data[1] if name == "NAME" else name]


def exported(place: Place) -> list[str]:
    return ["export", str(place.run), "--output", str(place.home / "exported"), *TERMS]


def without(*options: str) -> Mend:
    def mend(place: Place, command: list[str], told: str) -> list[str]:
        assert any(f"leave {option} out" in fix_of(told) for option in options) or "leave them out" in fix_of(told), told
        return [word for word in command if word not in options]

    return mend


def trained_first(place: Place, command: list[str], told: str) -> list[str]:
    train = shlex.split(fix_of(told).removeprefix("train it first: "))[1:]
    assert run([*train, "--epochs", "1", "--canvas", "32", "--home", str(place.home)]) == 0
    return command


def own_logits(place: Place) -> Path:
    """An archive that write_archive made, of the same images."""
    rng = np.random.default_rng(0)
    write_archive(place.home / "own", rng.normal(0, 4, (3, 160, 10)).astype(np.float32), [str(i) for i in range(10)])
    return place.home / "own"


def exchanged_runs(place: Place) -> None:
    assert run(["distill", "--tau", "8", *FEW, "--epochs", "1", "--home", str(place.home)]) == 0
    first, second = sorted(place.home.glob("runs/*/*/"))
    first.rename(place.home / "kept")
    second.rename(first)


def renamed_archive(place: Place) -> None:
    """Another recipe's archive has the name of this one."""
    name = place.archive.name
    place.archive.rename(place.home / "kept")
    assert run([*place.dump, "--view-seed", "3", "--home", str(place.home)]) == 0
    place.archive.rename(place.home / "archives" / name)


def another_digits(place: Place) -> None:
    """One of the images of the dump is another one now."""
    shutil.copytree(place.digits, place.home / "d")
    images = np.load(place.home / "d/train_images.npy")
    images[0] = 255 - images[0]
    np.save(place.home / "d/train_images.npy", images)


def unfinished_run(place: Place) -> None:
    (place.run / "summary.json").unlink()


def in_use(name: str) -> Spoil:
    def spoil(place: Place) -> None:
        (place.home / name).mkdir()
        (place.home / name / "notes.txt").touch()

    return spoil


CASES: dict[str, tuple[Callable[[Place], list[str]], Spoil | None, Mend]] = {
    # exports
    "two sets of weights": (
        lambda p: [*exported(p), "--last", "--best"],
        None,
        lambda p, c, t: [*exported(p), fix_of(t).removeprefix("use ")],
    ),
    "averages that were not kept": (
        lambda p: [*exported(p), "--ema"],
        None,
        says("export --last or --best", then=lambda p: [*exported(p), "--last"]),
    ),
    "weights that are missing": (
        exported,
        lambda p: (p.run / "last.safetensors").unlink(),
        says("restore it from a copy", lambda p: p.restore("runs/*/*/last.safetensors")),
    ),
    "a folder in use": (
        exported,
        in_use("exported"),
        says(
            "name a folder that does not exist yet: --output",
            then=lambda p: ["export", str(p.run), "--output", str(p.home / "e"), *TERMS],
        ),
    ),
    "several runs": (
        lambda p: ["export", str(p.home / "runs"), "--output", str(p.home / "e"), *TERMS],
        lambda p: run(["distill", "--tau", "8", *FEW, "--epochs", "1", "--home", str(p.home)]),
        lambda p, c, t: [*shlex.split(fix_of(t))[1:], *c[2:]],
    ),
    "an unfinished run": (
        exported,
        unfinished_run,
        says("repeat the distill command", lambda p: run([*DISTILL, "--home", str(p.home)])),
    ),
    "a teacher's figures": (
        lambda p: ["export", str(p.folder), "--output", str(p.home / "e"), *TERMS],
        lambda p: (p.folder / "metrics.jsonl").write_text("x\n"),
        says("restore it", lambda p: p.restore("teachers/*/metrics.jsonl")),
    ),
    "a teacher without weights": (
        lambda p: ["export", str(p.folder), "--output", str(p.home / "e"), *TERMS],
        lambda p: (p.folder / "model.safetensors").unlink(),
        says("restore it", lambda p: p.restore("teachers/*/model.safetensors")),
    ),
    "no model on the Hub": (
        lambda p: [*exported(p), "--dry-run", "--push", "name"],
        None,
        lambda p, c, t: [*c[:-1], fix_of(t).split()[1].replace("ORG/NAME", "org/name")],
    ),
    # runs
    "the run of another student": (lambda p: DISTILL, exchanged_runs, plain),
    "a run's settings": (lambda p: DISTILL, lambda p: (p.run / "args.yaml").write_text("- 1"), plain),
    "no archive": (
        lambda p: DISTILL,
        lambda p: p.archive.rename(p.home / "kept"),
        says("kdcache dump-teacher --teacher", lambda p: run([*p.dump, "--home", str(p.home)])),
    ),
    "one of several archives": (
        lambda p: [*DISTILL, "--strict"],
        lambda p: shutil.copytree(p.archive, p.home / "archives/copy"),
        plain,
    ),
    "an archive of elsewhere": (
        lambda p: ["view", str(p.archive), "--out", str(p.home / "s.png")],
        lambda p: (shutil.rmtree(p.home / "data"), shutil.rmtree(p.home / "teachers")),
        named,
    ),
    "a tau beyond all": (
        lambda p: [*DISTILL, "--tau", "1e-9"],
        None,
        lambda p, c, t: [*c[:-1], fix_of(t).rpartition("--tau ")[2]],
    ),
    "a tau beyond the paper's": (
        lambda p: [*DISTILL, "--tau", "90", "--method", "ttm"],
        None,
        says("use a smaller tau", then=lambda p: [*DISTILL, "--method", "ttm"]),
    ),
    "with force": (
        lambda p: [*DISTILL, "--tau", "90", "--method", "ttm"],
        None,
        lambda p, c, t: [*c, "--force"] if "or --force" in t else [],
    ),
    "of one view": (
        lambda p: [*DISTILL, "--method", "mlkd", "--archive", str(p.home / "one")],
        lambda p: run(["convert", str(p.archive), "--views", "0:1", "-o", str(p.home / "one")]),
        says("or use mlkd:views=1", then=lambda p: [*DISTILL, "--method", "mlkd:views=1", "--archive", str(p.home / "one")]),
    ),
    # teachers
    "the archive of another recipe": (lambda p: p.dump, renamed_archive, plain),
    "another file of weights": (
        lambda p: [*p.dump, "--views", "4", "--teacher-folder", str(p.folder)],
        lambda p: shutil.copy(p.run / "last.safetensors", p.folder / "model.safetensors"),
        says("", lambda p: p.restore("teachers/*/model.safetensors")),
    ),
    "views of another size": (lambda p: [*p.dump, "--size", "24", "--teacher-folder", str(p.folder)], None, plain),
    "a warm-up's rate": (
        lambda p: ["train-teacher", *p.teacher, "--from-scratch", "--epochs", "2", "--warmup-epochs", "1", "--warmup-lr", "0.5"],
        None,
        plain,
    ),
    "too large a batch": (
        lambda p: ["distill", "--tau", "4", "--batch-size", "5000", "--epochs", "1", "--student", "test_vit"],
        None,
        plain,
    ),
    "a start that is not trained": (lambda p: [*DISTILL, "--student", "test_resnet", "--init", "target"], None, trained_first),
    "other images": (
        lambda p: ["distill", "--tau", "9", *FEW, "--epochs", "1", "--dataset", f"arrays:{p.home / 'd'}"],
        another_digits,
        says("restore the images of the dump", then=lambda p: [*DISTILL, *p.data]),
    ),
    "a teacher without its weights": (
        lambda p: [*p.dump, "--views", "4", "--teacher-folder", str(p.folder)],
        lambda p: (p.folder / "model.safetensors").unlink(),
        says("kdcache train-teacher", lambda p: p.restore("teachers/*/model.safetensors")),
    ),
    "a file in the workspace's place": (
        lambda p: [*p.dump, "--home", str(p.home / "taken")],
        lambda p: (p.home / "taken").touch(),
        lambda p, c, t: c[:-2] if "choose another place with --home" in t else [],
    ),
    "an archive of one's own": (
        lambda p: [*DISTILL, "--archive", str(own_logits(p))],
        None,
        says("make one with: kdcache dump-teacher", lambda p: run([*p.dump, "--home", str(p.home)]), lambda p: DISTILL),
    ),
    "a folder of others": (
        lambda p: ["push", str(p.archive), str(p.home / "p"), *TERMS],
        in_use("p"),
        says("name a folder that does not exist yet", then=lambda p: ["push", str(p.archive), str(p.home / "q"), *TERMS]),
    ),
    # sharing
    "a smoke without a study": (
        lambda p: ["report", "--smoke"],
        None,
        says("name it: --study FILE", then=lambda p: ["report", str(p.home / "runs"), "--output", str(p.home / "r")]),
    ),
    "no such job's number": (lambda p: ["study", "run", "quickstart", "--dry-run", "--jobs-per-gpu", "none"], None, plain),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_a_workspace_is_of_use_again_when_the_fix_was_followed(
    case: str, few_trained: Path, finished: Path, tmp_path: Path, kdcache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "my home"
    shutil.copytree(finished, home)
    monkeypatch.setenv("KDCACHE_HOME", str(home))
    place = Place(home, few_trained.parent / "digits", finished)
    makes, spoil, mend = CASES[case]
    command = makes(place) if spoil is None else []
    if spoil is not None:
        command = makes(place)
        spoil(place)
    followed_by_command(kdcache, command, lambda command, told: mend(place, command, told))
