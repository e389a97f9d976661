"""Options that contradict each other, models, devices, studies and reports: each error's fix is followed by the command line."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdcache.archive import write_archive
from kdcache.sharing.signing import MAKE_KEYS
from tests.end_to_end.conftest import FEW
from tests.end_to_end.test_distill import only
from tests.following import amended, fix_of, followed_by_command

FEW_DIGITS = ["--dataset", "arrays:PLACE_OF_DIGITS", "--canvas", "32", "--policy", "digits"]
DUMP = ["dump-teacher", "--teacher", "test_vit", *FEW_DIGITS, "--views", "3", "--dry-run"]
TRAIN = ["train-teacher", "--teacher", "test_vit", *FEW_DIGITS]
TAKEN = [*TRAIN, "--epochs", "0", "--checkpoint", "WEIGHTS"]
BRIEF = ["--from-scratch", "--epochs", "1"]
STUDENT = ["distill", "--tau", "4", *FEW, "--epochs", "1"]
DISTILL = ["distill", "--dry-run"]
Mend = Callable[[list[str], str], list[str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def says(words: str, *mended: str, does: Callable[[], object] | None = None) -> Mend:
    """The fix has these words; who follows them does this, and types that (or the same command)."""

    def mend(command: list[str], told: str) -> list[str]:
        assert words in fix_of(told), told
        if does is not None:
            does()
        return list(mended) or command

    return mend


def file(name: str, text: str) -> Callable[[], object]:
    return lambda: Path(name).write_text(text)


def weights() -> dict[str, torch.Tensor]:
    return load_file("weights.safetensors")


def two_sets() -> None:
    torch.save({"state_dict": weights(), "state_dict_ema": weights()}, "two.pt")


def resnet() -> None:
    import timm

    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), "resnet.pt")


def make_keys(fix: str) -> None:
    subprocess.run(fix[fix.index("openssl") :].removesuffix(" makes a pair"), shell=True, check=True, capture_output=True)


def keys(command: list[str], told: str) -> list[str]:
    make_keys(fix_of(told))
    return command


LAYERLESS = """
from torch import nn
def net(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
"""
SAME: Mend = amended
OPTIONS: dict[str, tuple[list[str], Callable[[], object] | None, Mend]] = {
    # options of training
    "tau and a method without": ([*DISTILL, "--method", "ctkd", "--tau", "4"], None, SAME),
    "smoothing and a method without tau": ([*DISTILL, "--method", "ctkd", "--control", "ls-instance"], None, SAME),
    "smoothing of z-scores": ([*DISTILL, "--method", "zkd", "--control", "ls-global"], None, SAME),
    "no such control": ([*DISTILL, "--control", "botom:3"], None, SAME),
    "all classes kept": (
        [*DISTILL, "--control", "bottom:10"],
        None,
        lambda c, t: [w.replace("bottom:10", f"bottom:{fix_of(t).rpartition(' ')[2]}") for w in c],
    ),
    "a second archive without two views": (
        [*DISTILL, "--second-archive", "ARCHIVE"],
        None,
        says("use --method mlkd", *DISTILL, "--second-archive", "ARCHIVE", "--method", "mlkd"),
    ),
    "a size of none": ([*DISTILL, "--student-size", "big"], None, SAME),
    "a size that is too small": ([*DISTILL, "--student-size", "0"], None, SAME),
    "own of a function": (
        [*DISTILL, "--student", "own_net:net", "--student-size", "own"],
        file(
            "own_net.py",
            "import timm\ndef net(num_classes): return timm.create_model('test_vit', num_classes=num_classes, img_size=64)\n",
        ),
        lambda c, t: [*c[:-1], "160"] if "--student-size 160" in t else [],
    ),
    "a start of a function": (
        [*DISTILL, "--student", "own_net2:net", "--init", "pretrained"],
        file(
            "own_net2.py",
            "import timm\ndef net(num_classes): return timm.create_model('test_vit', num_classes=num_classes, img_size=32)\n",
        ),
        SAME,
    ),
    "a start that is not there": (
        [*DISTILL, "--init", "weights.pt"],
        None,
        says("write one of these names", *DISTILL, "--init", "random"),
    ),
    "no seed": ([*DISTILL, "--seed", ""], None, lambda c, t: [*c[:-1], "0"] if fix_of(t) else []),
    "a random test policy": (
        [*DISTILL, "--test-policy", "pets"],
        None,
        lambda c, t: [*c[:-1], fix_of(t).removeprefix("use ").partition(",")[0]],
    ),
    "layers": ([*STUDENT, "--student", "own_net3:net", "--layer-decay", "0.5"], file("own_net3.py", LAYERLESS), SAME),
    "no device": ([*STUDENT, "--device", "mps"], None, SAME),
    "no GPU": ([*STUDENT, "--device", "cuda:9"], None, SAME),
    "a graph without a GPU": (
        [*STUDENT, "--graph"],
        None,
        lambda c, t: [w for w in c if w != "--graph"] if "leave --graph out" in t else [],
    ),
    "no such archive": ([*DISTILL, "--archive", "nowhere"], None, says("kdcache ls", *DISTILL)),
    "an archive without a name": ([*DISTILL, "--archive", ""], None, says("kdcache ls", *DISTILL)),
    "no such dataset": (
        ["dump-teacher", "--teacher", "test_vit", "--dataset", "digitz", "--dry-run"],
        None,
        lambda c, t: [w.replace("digitz", "digits") for w in c] if "kdcache datasets" in t or "digits" in t else [],
    ),
    "no such model": (
        ["dump-teacher", "--teacher", "test_vitt", "--dataset", "digits", "--dry-run"],
        None,
        lambda c, t: [w.replace("test_vitt", "test_vit") for w in c] if "test_vit" in fix_of(t) or "kdcache models" in t else [],
    ),
    "no such option in a file": (
        [*DISTILL, "--config", "c.yaml"],
        file("c.yaml", "tuu: 4"),
        says("use 'tau'", does=file("c.yaml", "tau: 4")),
    ),
    "a configuration that is a list": (
        [*DISTILL, "--config", "c.yaml"],
        file("c.yaml", "- tau"),
        lambda c, t: (Path("c.yaml").write_text(fix_of(t).partition("example: ")[2]), c)[1],
    ),
    "a configuration that is none": (
        [*DISTILL, "--config", "c.yaml"],
        file("c.yaml", "tau: ["),
        lambda c, t: (Path("c.yaml").write_text(fix_of(t).partition("example: ")[2]), c)[1],
    ),
    "a configuration that is not there": ([*DISTILL, "--config", "d.yaml"], None, says("correct the path", *DISTILL)),
    "too few betas": ([*DISTILL, "--opt-betas", "0.9"], None, SAME),
    # teachers
    "a schedule": ([*TRAIN, *BRIEF, "--sched", "step"], None, SAME),
    "the paper's epochs": (
        [*TRAIN, "--from-scratch", "--epochs", "paper"],
        None,
        lambda c, t: [*c[:-1], "1"] if "--epochs 20,50" in t else [],
    ),
    "nothing from scratch": (
        [*TRAIN, "--from-scratch", "--epochs", "0"],
        None,
        lambda c, t: [*c[:-1], "1"] if "--epochs 100" in t else [],
    ),
    "weights as they are": (
        [*TRAIN, "--from-scratch", "--epochs", "0"],
        None,
        says("which weights to take: --checkpoint FILE", *TRAIN, "--checkpoint", "WEIGHTS", "--epochs", "0"),
    ),
    "a head from scratch": ([*TRAIN, *BRIEF, "--head-epochs", "1"], None, SAME),
    "classes with a head": (
        [*TAKEN, "--classes", "dataset", "--head-epochs", "3"],
        None,
        says("leave one of them out", *TAKEN, "--classes", "dataset"),
    ),
    "classes of the trained": (
        [*TRAIN, "--checkpoint", "WEIGHTS", "--classes", "dataset", "--epochs", "1"],
        None,
        lambda c, t: [*c[:-1], "0"] if "take its weights as they are: --epochs 0" in t else [],
    ),
    "a list that is not there": (
        [*TAKEN, "--classes", "nowhere.txt"],
        None,
        says("or dataset for the dataset's own order", *TAKEN, "--classes", "dataset"),
    ),
    "a list of too few": (
        [*TAKEN, "--classes", "c.txt"],
        file("c.txt", "a\nb\n"),
        says("give 10 names", does=file("c.txt", "\n".join("0123456789"))),
    ),
    "a list that is none": (
        [*TAKEN, "--classes", "c.json"],
        file("c.json", "[1"),
        says('or JSON: {"class of the dataset"', does=file("c.json", json.dumps({str(i): i for i in range(10)}))),
    ),
    "an output too many": (
        [*TAKEN, "--classes", "c.json"],
        file("c.json", json.dumps({str(i): i + 1 for i in range(10)})),
        says("give a number from 0 to 9", does=file("c.json", json.dumps({str(i): i for i in range(10)}))),
    ),
    "outputs without names": (
        [*TAKEN, "--classes", "c.json"],
        file("c.json", json.dumps({str(i): "x" for i in range(10)})),
        says("give the number of the output", does=file("c.json", json.dumps({str(i): i for i in range(10)}))),
    ),
    "classes that are lacking": (
        [*TAKEN, "--classes", "c.json"],
        file("c.json", json.dumps({str(i): i for i in range(9)})),
        says('{"9": NUMBER}', does=file("c.json", json.dumps({str(i): i for i in range(10)}))),
    ),
    "a class of no name": (
        [*TAKEN, "--classes", "c.json"],
        file("c.json", json.dumps({f"{i}x": i for i in range(10)})),
        says("", does=file("c.json", json.dumps({str(i): i for i in range(10)}))),
    ),
    "a checkpoint that is not there": ([*TRAIN, "--checkpoint", "w.pt", "--epochs", "0"], None, says("correct the path", *TAKEN)),
    "a checkpoint that is a folder": (
        [*TRAIN, "--epochs", "0", "--checkpoint", "FOLDER"],
        None,
        lambda c, t: [*c[:-1], fix_of(t).rpartition(": ")[2].replace("/FILE", "/model.safetensors")],
    ),
    "weights of no such name": (
        [*TRAIN, "--epochs", "0", "--checkpoint", "WEIGHTS#ema"],
        None,
        lambda c, t: [*c[:-1], fix_of(t).removeprefix("name the file: ")],
    ),
    "one of several sets": (
        [*TRAIN, "--epochs", "0", "--checkpoint", "two.pt"],
        two_sets,
        lambda c, t: [*c[:-1], fix_of(t).partition(": ")[2].partition(" or ")[0]],
    ),
    "no such set": (
        [*TRAIN, "--epochs", "0", "--checkpoint", "two.pt#best"],
        two_sets,
        lambda c, t: [*c[:-1], fix_of(t).partition(": ")[2]],
    ),
    "another model's weights": (
        [*TRAIN, "--epochs", "0", "--checkpoint", "resnet.pt"],
        resnet,
        says(
            "name the model and --size",
            TRAIN[0],
            "--teacher",
            "test_resnet",
            *FEW_DIGITS,
            "--epochs",
            "0",
            "--checkpoint",
            "resnet.pt",
        ),
    ),
    "a file that is cut": (
        [*TRAIN, "--epochs", "0", "--checkpoint", "two.pt"],
        lambda: (two_sets(), Path("two.pt").write_bytes(Path("two.pt").read_bytes()[:99])),
        says("", does=lambda: torch.save(weights(), "two.pt")),
    ),
    "a teacher's folder and a checkpoint": (
        [*DUMP, "--teacher-folder", "FOLDER", "--checkpoint", "WEIGHTS"],
        None,
        says("leave one of them out", *DUMP, "--teacher-folder", "FOLDER"),
    ),
    "no teacher there": ([*DUMP, "--teacher-folder", "nowhere"], None, says("kdcache train-teacher --teacher", *DUMP)),
    "no training": (
        [*[w for w in DUMP if w != "--dry-run"], "--size", "32", "--teacher-epochs", "7", "--no-finetune"],
        None,
        says("kdcache train-teacher --teacher test_vit --dataset", *DUMP),
    ),
    "another one's folder": ([DUMP[0], "--teacher", "test_resnet", *DUMP[3:], "--teacher-folder", "FOLDER"], None, SAME),
    "drop path of what has none": ([TRAIN[0], "--teacher", "vgg8", *TRAIN[3:], *BRIEF, "--drop-path", "0.1"], None, SAME),
    "a learning rate beyond all": (
        [*TRAIN, *BRIEF, "--lr", "1e30", "--opt", "sgd", "--clip-grad", "0"],
        None,
        says("use a smaller --lr than 1e+30", *TRAIN, *BRIEF),
    ),
    # what is read
    "an empty name": (["info", ""], None, says("kdcache ls", "info", "ARCHIVE")),
    "no such sample": (
        ["view", "ARCHIVE", "--sample", "9999"],
        None,
        lambda c, t: [*c[:-1], t.partition("samples 0 to ")[2].split()[0]],
    ),
    "figures and codecs": (
        ["stats", "ARCHIVE", "--plot", "e.svg", "--fidelity"],
        None,
        says("leave one of them out", "stats", "ARCHIVE", "--plot", "e.svg"),
    ),
    "a plot in no folder": (
        ["stats", "ARCHIVE", "--plot", "no/e.svg"],
        None,
        says("name a file in a folder that exists", "stats", "ARCHIVE", "--plot", "e.svg"),
    ),
    "not the same": (["diff", "ARCHIVE", "OTHER", "--strict"], None, says("leave --strict out", "diff", "ARCHIVE", "OTHER")),
    "no such model, listed": (["models", "zzzz"], None, says("kdcache models", "models", "*vit*")),
    "no runs": (["report", "nowhere"], None, says("kdcache distill --tau 1,4,20 --seed 0-2", "report", "RUNS", "--output", "r")),
    "no runs named": (["report", "", "--output", "r"], None, says("", "report", "RUNS", "--output", "r")),
    "a report in a file": (
        ["report", "RUNS", "--output", "taken"],
        file("taken", ""),
        says("name another place", "report", "RUNS", "--output", "r"),
    ),
    "an option of another bench": (
        ["bench", "views", "--output", "x.json"],
        None,
        lambda c, t: ["bench", "views", "--help"] if "leave --output out" in t else [],
    ),
    # what is shared
    "no licences": (["push", "ARCHIVE", "p"], None, SAME),
    "a licence of what": (
        ["push", "ARCHIVE", "p", "--license", "mit"],
        None,
        lambda c, t: [*c[:-1], f"{fix_of(t).split()[-1]},weights=mit"],
    ),
    "unknown licences": (
        ["push", "ARCHIVE", "p", "--license", "data=unknown,weights=mit"],
        None,
        says("name their licence", "push", "ARCHIVE", "p", "--license", "data=cc0-1.0,weights=mit"),
    ),
    "onto itself": (
        ["push", "ARCHIVE", "ARCHIVE", "--license", "data=mit,weights=mit"],
        None,
        says("name another folder", "push", "ARCHIVE", "p", "--license", "data=mit,weights=mit"),
    ),
    "into a folder of others": (
        ["pull", "ARCHIVE", "full"],
        lambda: (Path("full").mkdir(), Path("full/x").touch()),
        says("name a folder that does not exist yet", "pull", "ARCHIVE", "p"),
    ),
    "into another archive": (["pull", "ARCHIVE", "OTHER"], None, says("choose another place", "pull", "ARCHIVE", "p")),
    "a pull without a name": (["pull", "."], lambda: None, says("", "pull", "ARCHIVE", "p")),
    "a key that is not there": (["sign", "ARCHIVE", "--key", "key.pem"], None, keys),
    "a key that is none": (["sign", "ARCHIVE", "--key", "key.pem"], file("key.pem", "x"), keys),
    "no signature": (
        ["verify", "ARCHIVE", "--quick", "--signed-by", "pub.pem"],
        lambda: make_keys(f": {MAKE_KEYS}"),
        says("leave out --signed-by", "verify", "ARCHIVE", "--quick"),
    ),
    "a public key that is none": (
        ["sign", "ARCHIVE", "--key", "pub.pem"],
        lambda: make_keys(f": {MAKE_KEYS}"),
        lambda c, t: [*c[:-1], "key.pem"] if make_keys(fix_of(t)) is None else [],
    ),
}


@pytest.fixture(scope="module")
def finished(few_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a teacher, its archive and a student of it; only to be copied."""
    from kdcache.cli import run

    home = tmp_path_factory.mktemp("finished") / "home"
    shutil.copytree(few_trained, home)
    assert run(["distill", "--tau", "4", *FEW, "--epochs", "1", "--home", str(home)]) == 0
    return home


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", OPTIONS)
def test_a_command_ends_well_when_the_fix_of_its_error_was_followed(
    case: str, few_trained: Path, finished: Path, tmp_path: Path, kdcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, spoil, mend = OPTIONS[case]
    home = tmp_path / "home"
    shutil.copytree(finished, home)
    monkeypatch.setenv("KDCACHE_HOME", str(home))
    archive, folder = only(home, "archives/*"), only(home, "teachers/*/")
    shutil.copy(folder / "model.safetensors", "weights.safetensors")
    if "OTHER" in command:
        write_archive("other", np.zeros((1, 20, 3), np.float32), ["a", "b", "c"])
    if spoil is not None:
        spoil()
    places = {
        "ARCHIVE": str(archive),
        "WEIGHTS": "weights.safetensors",
        "FOLDER": str(folder),
        "OTHER": "other",
        "RUNS": str(home / "runs"),
        "PLACE_OF_DIGITS": str(few_trained.parent / "digits"),
    }

    def filled(words: list[str]) -> list[str]:
        for place, value in places.items():
            words = [word.replace(place, value) for word in words]
        return words

    followed_by_command(kdcache, filled(command), lambda command, told: filled(mend(command, told)))
