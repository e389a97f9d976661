"""train-teacher and dump-teacher beyond one finetuning: several durations, recipes, entropies, and weights taken as they are."""

import hashlib
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo

from kdcache.archive import open_archive
from kdcache.cli import run
from kdcache.datasets.cifar import CIFAR100
from kdcache.datasets.fine import Pets
from kdcache.datasets.folder import Folder
from kdcache.datasets.imagenet import ImageNet
from kdcache.models.creation import Published, create_model, published
from kdcache.system.seals import SEAL
from kdcache.teachers.finetuning import _duration
from kdcache.teachers.recipes import RECIPES
from kdcache.training.config import TrainConfig
from kdcache.training.learner import Learner
from kdcache.training.optimizers import make_optimizer
from tests.end_to_end.conftest import DUMP, without_costs
from tests.end_to_end.test_distill import only
from tests.end_to_end.test_methods import stop_after
from tests.miniatures import CIFAR10_NAMES
from tests.weights import save_weights

SMALL = ["train-teacher", "--teacher", "test_resnet", "--from-scratch", "--batch-size", "10"]  # two steps an epoch
AS_IS = ["train-teacher", *DUMP[1:], "--epochs", "0"]


def record(folder):
    return {key: value for key, value in json.loads((folder / "teacher.json").read_text()).items() if key != SEAL}


def by_epochs(home):
    return {record(file.parent)["training"]["epochs"]: file.parent for file in home.glob("teachers/*/teacher.json")}


def same_teacher(one, other):
    for name in ("model.safetensors", "best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (one, other)]
    for row in logs[0] + logs[1]:
        without_costs(row)
    assert logs[0] == logs[1]
    records = [{**record(folder), "command": None, "cost": None} for folder in (one, other)]
    assert records[0] == records[1]


@pytest.fixture(scope="module")
def small(datasets_in_small):
    """How to train on 20 images of 10 classes."""
    return [*SMALL, "--dataset", f"cifar10:{datasets_in_small / 'cifar10'}"]


@pytest.fixture(scope="module")
def two(small, tmp_path_factory):
    """A workspace with teachers of 1 and 3 epochs, trained together."""
    home = tmp_path_factory.mktemp("two")
    assert run([*small, "--epochs", "1,3", "--home", str(home)]) == 0
    return home


@pytest.fixture
def untrainable(monkeypatch):
    def step(*_):
        raise AssertionError("something is trained")

    monkeypatch.setattr(Learner, "step", step)


def test_teachers_of_several_durations_equal_teachers_alone(two, small, kdcache, tmp_path):
    alone = kdcache(*small, "--epochs", 3, "--home", tmp_path)
    assert alone.status == 0, alone.err
    same_teacher(only(tmp_path, "teachers/*"), by_epochs(two)[3])
    assert set(by_epochs(two)) == {1, 3}
    first, other = (json.loads((by_epochs(two)[epochs] / "metrics.jsonl").open().readline()) for epochs in (1, 3))
    assert first["lr"] != other["lr"]  # schedules of their own


@pytest.mark.parametrize("at", [1, 4, 5])  # of 2 + 2 steps in the first epoch, where one of the teachers ends
def test_interrupted_teachers_end_as_if_they_had_not_been(two, small, kdcache, tmp_path, monkeypatch, at):
    arguments = [*small, "--epochs", "1,3", "--home", tmp_path]
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        assert kdcache(*arguments).status == 130
    assert set(by_epochs(tmp_path)) == ({1} if at == 5 else set())
    result = kdcache(*arguments)
    assert result.status == 0, result.err
    for epochs, folder in by_epochs(two).items():
        same_teacher(by_epochs(tmp_path)[epochs], folder)
    assert result.out.splitlines() == [str(by_epochs(tmp_path)[epochs]) for epochs in (1, 3)]


def test_a_teacher_whose_record_was_not_written_any_more_is_not_trained_again(two, small, kdcache, tmp_path, untrainable):
    source = by_epochs(two)[3]
    place = tmp_path / "teachers" / source.name
    place.mkdir(parents=True)
    for name in ("model.safetensors", "metrics.jsonl", "summary.json", "best.safetensors"):
        (place / name.replace("model", "last")).write_bytes((source / name).read_bytes())
    assert kdcache(*small, "--epochs", 3, "--home", tmp_path).status == 0
    same_teacher(place, source)
    assert not (place / "last.safetensors").exists()


def test_durations_are_compared_and_chosen_from(two, small, kdcache, tmp_path):
    again = kdcache(*small, "--epochs", "1,3", "--home", two)
    assert again.err.count("already trained") == 2
    for epochs, folder in by_epochs(two).items():
        entropies = record(folder)["entropies"]
        [line] = [line for line in again.err.splitlines() if line.split()[:2] == [str(epochs), "random"]]
        figures = [entropies[which][key] for which in ("views", "clean") for key in ("entropy", "entropy_rest")]
        assert line.split()[3:] == [f"{value:.3f}" for value in figures]
    assert "such teachers distil worse" in again.err
    rows = [json.loads(line) for line in (by_epochs(two)[3] / "metrics.jsonl").open()]
    assert rows[-1]["views_entropy"] == record(by_epochs(two)[3])["entropies"]["views"]["entropy"] != rows[0]["views_entropy"]

    dump = ["dump-teacher", *small[1:3], *small[-2:], "--views", 1, "--home", two]
    chosen = kdcache(*dump, "--teacher-epochs", 1, "--output", tmp_path / "one")
    assert chosen.status == 0, chosen.err
    assert "choose with" not in chosen.err
    dumped = open_archive(tmp_path / "one").manifest
    assert dumped.teacher.training["epochs"] == 1
    assert dumped.provenance["teacher_entropies"] == record(by_epochs(two)[1])["entropies"]["clean"]
    newest = kdcache(*dump, "--dry-run")
    assert "the newest of 2" in newest.err
    assert "--teacher-epochs" in newest.err
    missing = kdcache(*dump, "--teacher-epochs", 7, "--no-finetune")
    assert missing.status == 3
    clash = kdcache(*dump, "--teacher-epochs", 1, "--teacher-folder", by_epochs(two)[1])
    assert clash.status == 2
    assert "--teacher-folder" in clash.err


def test_the_early_report_is_what_the_archive_says_of_these_views(home, archive, kdcache):
    entropies, dumped = record(only(home, "teachers/*"))["entropies"]["views"], open_archive(archive)
    assert entropies["rows"] == 1024
    stored = dumped.read(0, 0, 1024)
    assert stored.entropy.mean() == pytest.approx(entropies["entropy"], abs=1e-5)
    assert stored.entropy_rest.mean() == pytest.approx(entropies["entropy_rest"], abs=1e-5)
    assert entropies["policy"] == dumped.manifest.policy.digest
    told = kdcache(*DUMP, "--views", 3, "--home", home)
    top1 = f"{dumped.manifest.teacher.top1_clean:.2f} % on clean test images, {dumped.manifest.statistics.top1_views:.2f} %"
    assert f"teacher's top-1: {top1} on these views" in told.err


@pytest.mark.exhaustive
def test_a_trained_checkpoint_is_dumped_as_it_is(trained, kdcache, tmp_path, untrainable):
    home, source = tmp_path / "home", only(trained, "teachers/*")
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes((source / "model.safetensors").read_bytes())
    place = ["--home", home, "--data-dir", trained / "data"]
    dump = [*DUMP, "--views", 1, "--checkpoint", weights, *place]
    planned = kdcache(*dump, "--dry-run")
    assert "weights as they are would be tested first" in planned.err
    assert not home.exists()
    result = kdcache(*dump, "--no-finetune")
    assert result.status == 0, result.err
    found, expected = record(only(home, "teachers/*")), record(source)
    assert {key: found["training"][key] for key in ("start", "epochs", "checkpoint_sha256")} == {
        "start": "checkpoint",
        "epochs": 0,
        "checkpoint_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    for key in ("weights_sha256", "top1_clean", "mean", "std", "input_size", "class_names"):
        assert found[key] == expected[key]
    for which in ("views", "clean"):
        assert found["entropies"][which] == pytest.approx(expected["entropies"][which])
    again = kdcache(*dump)
    assert (again.out, "nothing to do" in again.err) == (result.out, True)

    head = {key: torch.roll(value, 1, 0) for key, value in load_file(weights).items() if key.startswith("head.")}
    save_file(load_file(weights) | head, tmp_path / "rolled.safetensors")
    doubted = kdcache(*AS_IS, "--checkpoint", tmp_path / "rolled.safetensors", *place)
    assert doubted.status == 0
    assert "WARNING" in doubted.err
    assert "another order" in doubted.err
    assert "WARNING" in kdcache(*DUMP, "--views", 1, "--teacher-folder", doubted.out.strip(), *place).err
    darker = kdcache(*AS_IS, "--checkpoint", weights, "--mean", "0.1,0.1,0.1", "--std", "0.2,0.2,0.2", *place)
    assert record(home / "teachers" / darker.out.strip().rpartition("/")[2])["mean"] == [0.1, 0.1, 0.1]


def test_a_checkpoint_of_other_classes_is_not_taken_as_it_is(trained, kdcache, tmp_path):
    save_weights(create_model("test_vit", 7, input_size=32)[0], tmp_path / "seven.safetensors")
    common = ["--checkpoint", tmp_path / "seven.safetensors", "--home", tmp_path, "--data-dir", trained / "data"]
    for command in (AS_IS, [*DUMP, "--views", 1]):
        result = kdcache(*command, *common)
        assert result.status == 5
        assert "seven.safetensors has 7 classes, dataset digits has 10" in result.err
    assert not list(tmp_path.glob("teachers/*/teacher.json"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet's thousand classes with one tiny image each."""
    root = tmp_path_factory.mktemp("imagenet")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / "one.png")
    for split in ("train", "val"):
        for wnid in ImageNetInfo().label_names():
            (root / split / wnid).mkdir(parents=True)
            (root / split / wnid / "one.png").hardlink_to(root / "one.png")
    (root / "one.png").unlink()
    return root


@pytest.mark.exhaustive
def test_published_weights_are_dumped_as_they_are(imagenet, kdcache, tmp_path, monkeypatch, untrainable):
    """The network is not there: what timm would fetch is made here."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = timm.create_model("test_resnet").state_dict()
    fetched = []

    def load(*arguments, **_):
        fetched.append(arguments[0])
        return dict(weights)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    small = ["--canvas", 16, "--size", 32, "--home", tmp_path]
    common = ["dump-teacher", "--teacher", "test_resnet", "--views", 1, *small]
    result = kdcache(*common, "--dataset", f"imagenet:{imagenet}")
    assert result.status == 0, result.err
    assert fetched == ["timm/test_resnet.r160_in1k"]
    made = record(only(tmp_path, "teachers/*"))
    assert (made["training"]["start"], made["training"]["epochs"]) == ("timm", 0)
    assert made["class_names"] == list(published("test_resnet").class_names)
    torch.testing.assert_close(load_file(only(tmp_path, "teachers/*") / "model.safetensors"), weights)
    assert "WARNING" in result.err  # of weights that nobody trained
    assert open_archive(result.out.strip()).manifest.known_licences.weights == "apache-2.0"

    again = kdcache("train-teacher", *common[1:3], "--dataset", f"imagenet:{imagenet}", *small)
    assert "already tested" in again.err
    assert len(fetched) == 1
    scratch = kdcache("train-teacher", *common[1:3], "--dataset", f"imagenet:{imagenet}", "--from-scratch", *small)
    assert scratch.status == 2
    assert "--epochs 100" in scratch.err
    first, second = (imagenet / "train" / wnid for wnid in made["class_names"][:2])
    for split in ("train", "val"):
        (imagenet / split / first.name).rename(imagenet / split / "n00000001")
        (imagenet / split / second.name).rename(imagenet / split / "n01440764")
    order = kdcache(*common, "--teacher-epochs", 0, "--dataset", f"folder:{imagenet}")
    assert order.status == 5
    assert "no output is called 'n00000001'" in order.err


@pytest.mark.parametrize(("names", "words"), [(None, "taken for granted"), (CIFAR10_NAMES[::-1], "airplane -> output 9")])
def test_the_order_of_classes_is_compared_where_weights_name_them(
    small, kdcache, tmp_path, monkeypatch, untrainable, names, words
):
    monkeypatch.setattr("kdcache.teachers.as_is.published", lambda name: Published(10, names and tuple(names), 32))
    weights = timm.create_model("test_resnet").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(weights))
    result = kdcache("train-teacher", *small[1:3], *small[-2:], "--epochs", 0, "--home", tmp_path)
    assert result.status == 0, result.err
    assert words in result.err


def test_published_weights_of_other_classes_are_refused_before_anything_is_fetched(datasets_in_small, kdcache, tmp_path):
    spec = f"cifar100:{datasets_in_small / 'cifar100'}"
    result = kdcache("train-teacher", "--teacher", "test_resnet", "--dataset", spec, "--epochs", 0, "--home", tmp_path)
    assert result.status == 5
    assert "test_resnet has 1000 classes" in result.err
    assert "train-teacher --teacher test_resnet" in result.err
    assert not list(tmp_path.iterdir())


def test_cifars_own_models_are_trained_as_they_were_published(datasets_in_small, kdcache, tmp_path, monkeypatch):
    recipe = CIFAR100.recipe
    monkeypatch.setattr(CIFAR100, "recipe", type(recipe)(**{**vars(recipe), "durations": (1, 2)}))
    spec = f"cifar100:{datasets_in_small / 'cifar100'}"
    common = ["train-teacher", "--teacher", "cifar_resnet8", "--dataset", spec, "--batch-size", 2, "--home", tmp_path]
    result = kdcache(*common, "--epochs", "paper", "--weight-decay", 0.001)
    assert result.status == 0, result.err
    assert "start random, 1, 2 epochs" in result.err
    assert "recipe crd" in result.err
    assert "1 epochs end before the learning rate falls" in result.err
    assert "training takes about" in result.err
    training = record(by_epochs(tmp_path)[2])["training"]
    published_settings = {
        "opt": "momentum",
        "lr": 0.05,
        "momentum": 0.9,
        "sched": "step",
        "decay_epochs": [150, 180, 210],
        "decay_rate": 0.1,
        "clip_grad": None,
        "smoothing": 0.0,
        "decay_all": True,
    }
    flags = {"batch_size": 2, "weight_decay": 0.001}
    assert {key: training[key] for key in published_settings | flags} == published_settings | flags
    assert training["policy"]["crop"] == {"kind": "pad", "padding": 4}
    # By another recipe there is no start but a random one either.
    other = kdcache(*common, "--epochs", 1, "--recipe", "study", "--clip-grad", 0, "--sched", "step", "--decay-epochs", "1")
    assert other.status == 0, other.err
    assert "cifar_resnet8 has no published weights: it is trained from scratch" in other.err
    training = record(tmp_path / "teachers" / other.out.strip().rpartition("/")[2])["training"]
    assert [training[key] for key in ("opt", "lr", "smoothing", "clip_grad", "decay_epochs")] == ["adamw", 0.002, 0.1, None, [1]]
    refused = kdcache(*common, "--epochs", 1, "--pretrained")
    assert refused.status == 3
    assert "no pretrained weights" in refused.err


def test_recipes_are_the_published_ones():
    crd = TrainConfig(**RECIPES["crd"].training, epochs=RECIPES["crd"].epochs)
    assert (crd.epochs, crd.batch_size, crd.weight_decay, crd.decay_all) == (240, 64, 5e-4, True)
    assert Pets.recipe.durations == (20, 50, 200, 400)
    assert CIFAR100.recipe.durations == (40, 100, 200, 400)
    assert (ImageNet.recipe.teacher_epochs, Folder.recipe.durations) == (0, ())
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    for decay_all, decayed in ((False, 1), (True, 4)):
        config = TrainConfig(epochs=1, opt="momentum", weight_decay=5e-4, decay_all=decay_all)
        groups = make_optimizer(model, config).param_groups
        assert sum(len(group["params"]) for group in groups if group["weight_decay"]) == decayed
        assert not any(group["nesterov"] for group in groups)


def test_durations_are_said_in_words():
    assert [_duration(seconds) for seconds in (7.4, 80, 100, 1234, 7000, 123456)] == [
        "7 s",
        "80 s",
        "1.7 min",
        "21 min",
        "1.9 h",
        "34 h",
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--epochs", "paper"], 2, "--epochs paper for digits"),
        (["--epochs", "0"], 5, "has 1000 classes, dataset digits has 10"),
        (["--epochs", "0", "--from-scratch"], 2, "in 0 epochs"),
        (["--epochs", "some"], 2, "--epochs 'some'"),
        (["--recipe", "cdr"], 2, "crd"),
        (["--mean", "1,2"], 2, "--mean '1,2'"),
        (["--sched", "step"], 2, "--decay-epochs 150"),
        (["--checkpoint", "nowhere.pth", "--epochs", "0"], 3, "nowhere.pth"),
        (["--smoothing", "2"], 2, "--smoothing"),
    ],
)
def test_teachers_that_make_no_sense_are_refused(trained, kdcache, tmp_path, arguments, status, words):
    home = tmp_path / "home"
    result = kdcache("train-teacher", *DUMP[1:], *arguments, "--home", home, "--data-dir", trained / "data")
    assert result.status == status, result.err
    assert words in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]
    assert not home.exists()
