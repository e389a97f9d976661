"""Teachers that start well: new heads at zero, and trained alone before anything else is."""

import hashlib
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from kdcache.models.creation import create_model
from kdcache.teachers import head
from kdcache.training.config import TrainConfig
from kdcache.views.policy import ViewPolicy
from tests.end_to_end.test_distill import only
from tests.end_to_end.test_methods import stop_after
from tests.end_to_end.test_teachers import by_epochs, record, same_teacher
from tests.weights import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_weights(create_model("test_vit", 7, input_size=32)[0], file)
    return file


@pytest.fixture
def command(few_trained, weights):
    """How to train on 160 digits, from weights of seven classes, in two steps an epoch."""
    data = ["--dataset", f"arrays:{few_trained.parent / 'digits'}", "--canvas", "32", "--policy", "digits", "--batch-size", "80"]
    return ["train-teacher", "--teacher", "test_vit", "--checkpoint", weights, *data]


@pytest.fixture
def counted(monkeypatch):
    """Batches whose features were computed, so far; after as many as `stop_at` a signal arrives."""
    of = head._Features.__call__
    counts = {"batches": 0, "stop_at": 0}

    def count(self, views):
        counts["batches"] += 1
        if counts["batches"] == counts["stop_at"]:
            os.kill(os.getpid(), signal.SIGINT)
        return of(self, views)

    monkeypatch.setattr(head._Features, "__call__", count)
    return counts


def test_an_interrupted_head_ends_as_if_it_had_not_been(command, kdcache, tmp_path, counted, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    how = [*command, "--head-epochs", 2, "--epochs", "1,2"]
    result = kdcache(*how, "--home", whole)
    assert result.status == 0, result.err
    assert "head.bias, head.weight start at zero" in result.err
    assert "the head alone, on frozen features, has a top-1 of" in result.err
    assert counted["batches"] == 4, "teachers of several durations share a head"

    counted |= {"batches": 0, "stop_at": 3}
    assert kdcache(*how, "--home", cut).status == 130
    assert not list(cut.glob("teachers/*/head.safetensors"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert kdcache(*how, "--home", cut).status == 130
    assert len(list(cut.glob("teachers/*/head.safetensors"))) == 2
    counted |= {"batches": 0}
    again = kdcache(*how, "--home", cut)
    assert again.status == 0, again.err
    assert not counted["batches"], "a head that is kept is not trained again"
    assert "the head alone" in again.err
    for epochs, folder in by_epochs(whole).items():
        same_teacher(by_epochs(cut)[epochs], folder)
        assert (folder / "head.safetensors").is_file()
        assert record(folder)["training"]["head_epochs"] == 2
        assert record(folder)["training"]["head_init"] == "zero"
    assert "already trained" in kdcache(*how, "--home", whole).err


def test_a_head_alone_is_a_teacher_whose_other_weights_are_as_they_were(command, weights, kdcache, tmp_path):
    result = kdcache(*command, "--head-epochs", 3, "--epochs", "0,1", "--home", tmp_path)
    assert result.status == 0, result.err
    probe, start = by_epochs(tmp_path)[0], load_file(weights)
    made = load_file(probe / "model.safetensors")
    assert {key for key, value in made.items() if value.shape != start[key].shape or not torch.equal(value, start[key])} == {
        "head.weight",
        "head.bias",
    }
    training = record(probe)["training"]
    assert record(probe)["top1_clean"] == training["head_top1"] == record(by_epochs(tmp_path)[1])["training"]["head_top1"]
    assert {key: training[key] for key in ("epochs", "head_epochs", "batch_size", "start")} == {
        "epochs": 0,
        "head_epochs": 3,
        "batch_size": 80,
        "start": "checkpoint",
    }
    assert record(probe)["cost"]["device_seconds"] > 0
    again = kdcache(*command, "--head-epochs", 3, "--epochs", "0", "--home", tmp_path)
    assert "already t" in again.err
    (probe / "teacher.json").unlink()
    (probe / "model.safetensors").unlink()
    assert kdcache(*command, "--head-epochs", 3, "--epochs", "0", "--home", tmp_path).status == 0
    assert load_file(probe / "model.safetensors").keys() == made.keys()
    # Weights as they are are others, also those of other classes.
    dump = ["dump-teacher", *command[1:-2], "--views", 1, "--home", tmp_path]
    refused = kdcache(*dump)
    assert refused.status == 5
    assert "has 7 classes, dataset" in refused.err
    chosen = kdcache(*dump[:3], *dump[5:], "--teacher-folder", probe)
    assert chosen.status == 0, chosen.err


def test_a_policy_that_leaves_nothing_to_chance_is_passed_through_the_model_once(command, kdcache, tmp_path, counted):
    fixed = [*command, "--epochs", "0", "--head-epochs", "3", "--size", "32", "--policy", "none", "--home", tmp_path]
    assert kdcache(*fixed).status == 0
    assert counted["batches"] == 2
    assert kdcache(*fixed, "--policy", "none:hflip=0.5").status == 0
    assert counted["batches"] == 2 + 3 * 2


def former_folder(folder):
    """The name that a teacher's folder had before heads began at zero."""
    made = record(folder)
    training = made["training"]
    names = ("start", "checkpoint_sha256", "canvas_digest", "test_digest", "smoothing", "seed", "policy")
    known = {key: training[key] for key in TrainConfig.model_fields if key in training and key not in {"head_init", "amp"}}
    settings = TrainConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})
    policy = ViewPolicy(**training["policy"]).as_version_1().model_dump(mode="json")  # as square images still have it
    begun = {key: training[key] for key in names} | {"policy": policy}
    identity = json.dumps([made["name"], settings.identity(), begun], sort_keys=True)
    return f"{folder.name.rpartition('--')[0]}--{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def test_folders_are_those_of_before_where_training_is(command, weights, kdcache, tmp_path):
    short = [*command, "--epochs", "1", "--test-policy", "none", "--home", tmp_path]  # tested as before, too
    for number, flags in enumerate(
        (["--recipe", "study"], ["--head-init", "timm", "--head-epochs", "0"], ["--head-epochs", "0"])
    ):
        result = kdcache(*short, *flags)
        assert result.status == 0, result.err
        folder = tmp_path / "teachers" / result.out.strip().rpartition("/")[2]
        assert (folder.name == former_folder(folder)) == (number < 2)
        assert record(folder)["training"]["head_init"] == ("timm" if number < 2 else "zero")
    assert len(list(tmp_path.glob("teachers/*/teacher.json"))) == 2
    known = tmp_path / "ten.safetensors"
    save_weights(create_model("test_vit", 10, input_size=32)[0], known)
    result = kdcache(*short, "--checkpoint", known)
    assert result.status == 0, result.err
    folder = tmp_path / "teachers" / result.out.strip().rpartition("/")[2]
    assert folder.name == former_folder(folder), "weights of the same classes keep their head"
    assert "head_init" not in record(folder)["training"]
    assert record(folder)["training"]["recipe"] == "study"


def test_a_new_head_is_trained_alone_by_the_recipe_of_datasets_of_ones_own(command, kdcache, tmp_path, monkeypatch):
    from kdcache.teachers.recipes import RECIPES

    recipe = RECIPES["lp-ft"]
    monkeypatch.setitem(RECIPES, "lp-ft", type(recipe)(**{**vars(recipe), "head_epochs": 1}))
    result = kdcache(*command, "--epochs", "1", "--home", tmp_path)
    assert result.status == 0, result.err
    assert "recipe lp-ft" in result.err
    assert "--recipe study" in result.err
    assert record(only(tmp_path, "teachers/*"))["training"]["head_epochs"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from-scratch", "--head-epochs", "5"], "--head-epochs 5 from scratch"),
        (["--teacher", "cifar_resnet8", "--drop-path", "0.1"], "--drop-path 0.1 with cifar_resnet8"),
        (["--opt", "sgd", "--opt-betas", "0.9,0.95"], "--opt-betas 0.9,0.95 with --opt sgd"),
        (["--epochs", "1,5", "--warmup-epochs", "2"], "--warmup-epochs 2 of 1 epochs"),
        (["--layer-decay", "1"], "--layer-decay"),
    ],
)
def test_starts_that_make_no_sense_are_refused_before_anything_is_decoded(command, kdcache, tmp_path, arguments, words):
    home = tmp_path / "home"
    how = command if "--from-scratch" not in arguments else [part for part in command if part not in command[3:5]]
    result = kdcache(*how, *arguments, "--home", home)
    assert result.status == 2, result.err
    assert words in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]
    assert not home.exists()


def test_a_damaged_head_is_named(command, kdcache, tmp_path, monkeypatch):
    how = [*command, "--head-epochs", 1, "--epochs", "1", "--home", tmp_path]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert kdcache(*how).status == 130
    file = only(tmp_path, "teachers/*") / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    result = kdcache(*how)
    assert result.status == 4, result.err
    assert f"mv {file} {file}.aside" in result.err
    file.unlink()
    assert kdcache(*how).status == 0
