"""Weights as they are, for datasets with some of their classes or in another order: what is computed, kept and refused."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnetv2 import ResNetV2
from torch import nn

from kdcache.archive import open_archive
from kdcache.errors import IncompatibleError
from kdcache.models.classes import imagenet
from kdcache.models.creation import Published, create_model
from kdcache.models.heads import select_rows
from kdcache.teachers.registry import Teacher, load_teacher
from kdcache.training.learner import Learner
from tests.end_to_end.test_distill import only
from tests.weights import save_weights

SMALL = ["--canvas", "16", "--size", "32"]
TEACHER = ["--teacher", "test_resnet"]
NAMES = ["English springer", "gas_pump", "n01440764"]  # as folders are sorted
OUTPUTS = [217, 571, 0]


@pytest.fixture(autouse=True)
def untrainable(monkeypatch):
    def step(*_):
        raise AssertionError("something is trained")

    monkeypatch.setattr(Learner, "step", step)


@pytest.fixture
def fetched(monkeypatch):
    """What timm would fetch is made here."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model("test_resnet").eval()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(weights))
    return model


def folder_of(place, names):
    """A dataset of four images a class."""
    rng = np.random.default_rng(7)
    for split in ("train", "test"):
        for name in names:
            (place / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / split / name / f"{i}.png")
    return f"folder:{place}"


@pytest.fixture
def photos(tmp_path):
    return folder_of(tmp_path / "photos", NAMES)


def record(home):
    return json.loads((only(home, "teachers/*") / "teacher.json").read_text())


def logits(model, size=32):
    with torch.inference_mode():
        return model.eval()(torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1)))


def teacher_of(home):
    return load_teacher(Teacher(only(home, "teachers/*"), record(home)))[0]


def test_published_weights_are_reduced_to_the_classes_of_a_subset(fetched, photos, kdcache, tmp_path):
    dump = ["dump-teacher", *TEACHER, "--dataset", photos, *SMALL, "--views", 2, "--home", tmp_path]
    result = kdcache(*dump, "--teacher-epochs", 0, "--codec", "f32")
    assert result.status == 0, result.err
    for line in (
        "classes: 3 of 1000 outputs, 2 by name, 1 by WordNet id; 997 outputs are not used",
        "English springer -> output 217 (n02102040 English springer)",
        "n01440764 tench -> output 0",
    ):
        assert line in result.err
    assert "a new classifier" not in result.err
    made = record(tmp_path)
    assert made["class_names"] == NAMES
    assert made["classes"]["outputs"] == OUTPUTS
    assert made["classes"]["num_outputs"] == 1000
    model = teacher_of(tmp_path)
    torch.testing.assert_close(logits(model), logits(fetched)[:, OUTPUTS], atol=1e-6, rtol=0)
    assert load_file(only(tmp_path, "teachers/*") / "model.safetensors")["fc.weight"].equal(fetched.fc.weight[OUTPUTS])
    archive = open_archive(result.out.strip())
    assert archive.class_names == tuple(NAMES)
    assert archive.manifest.teacher.training["classes_sha256"] == made["training"]["classes_sha256"]
    assert kdcache("verify", result.out.strip(), "--replay", 1, "--home", tmp_path).status == 0
    assert kdcache("export", only(tmp_path, "teachers/*"), "--output", tmp_path / "exported").status == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)
    assert torch.equal(logits(again), logits(model))

    before = made["training"]["classes_sha256"]
    told = tmp_path / "told.json"
    told.write_text('{"gas_pump": "n03425413", "English springer": 5}')
    other = kdcache(*dump, "--classes", told)
    assert other.status == 0, other.err
    assert "English springer -> output 5 (n01496331 electric ray)" in other.err
    assert "2 by --classes, 1 by WordNet id" in other.err
    assert other.out != result.out
    by_mapping = {json.loads(file.read_text())["training"]["classes_sha256"] for file in tmp_path.glob("teachers/*/teacher.json")}
    assert len(by_mapping) == 2
    assert before in by_mapping
    assert kdcache(*dump, "--classes", told).out == other.out


def test_published_classes_in_another_order_are_put_in_order(fetched, photos, kdcache, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcache.teachers.as_is.published", lambda name: Published(1000, imagenet(1000).names[::-1], 32))
    result = kdcache("train-teacher", *TEACHER, "--dataset", photos, *SMALL, "--epochs", 0, "--home", tmp_path)
    assert result.status == 0, result.err
    assert record(tmp_path)["classes"]["outputs"] == [999 - output for output in OUTPUTS]


def test_checkpoints_of_1001_classes_have_background_first(photos, kdcache, tmp_path):
    full = create_model("test_resnet", 1001, input_size=32)[0]
    save_weights(full, tmp_path / "tf.safetensors")
    place = [*TEACHER, "--dataset", photos, *SMALL, "--home", tmp_path]
    result = kdcache("dump-teacher", *place, "--views", 1, "--checkpoint", tmp_path / "tf.safetensors")
    assert result.status == 0, result.err
    assert record(tmp_path)["classes"]["outputs"] == [output + 1 for output in OUTPUTS]
    torch.testing.assert_close(logits(teacher_of(tmp_path)), logits(full)[:, [o + 1 for o in OUTPUTS]], atol=1e-6, rtol=0)


def test_names_that_do_not_tell_are_settled_by_a_file(kdcache, tmp_path):
    spec = folder_of(tmp_path / "clothes", ["dress", "hat", "trousers"])
    full = create_model("test_resnet", 5, input_size=32)[0]
    save_weights(full, tmp_path / "five.safetensors")
    home = tmp_path / "home"
    place = [*TEACHER, "--dataset", spec, *SMALL, "--home", home, "--checkpoint", tmp_path / "five.safetensors"]
    refused = kdcache("train-teacher", *place, "--epochs", 0)
    assert refused.status == 5
    assert "five.safetensors has 5 classes, dataset folder:" in refused.err
    assert "--classes FILE" in refused.err
    assert not home.exists()
    names = tmp_path / "names.txt"
    for text, words in (
        ("hat\nshoe\npants\ndress\n", "names 4 outputs"),
        ("hat\nshoe\npants\ndress\nsock\n", "no output is called 'trousers'"),
        ("hat\nshoe\ntrousers\ndress\nhat\n", "'hat' may be 0 (hat), 4 (hat)"),
    ):
        names.write_text(text)
        wrong = kdcache("train-teacher", *place, "--epochs", 0, "--classes", names)
        assert wrong.status in {2, 5}
        assert words in wrong.err
        assert [line.partition(":")[0] for line in wrong.err.splitlines()[-3:]] == ["error", "why", "fix"]
    names.write_text("hat\nshoe\ntrousers\ndress\nsock\n")
    result = kdcache("train-teacher", *place, "--epochs", 0, "--classes", names)
    assert result.status == 0, result.err
    assert record(home)["classes"]["outputs"] == [3, 0, 2]
    torch.testing.assert_close(logits(teacher_of(home)), logits(full)[:, [3, 0, 2]], atol=1e-6, rtol=0)
    by_number = tmp_path / "numbers.json"
    by_number.write_text('{"dress": 3, "hat": 0, "trousers": 3}')
    doubled = kdcache("train-teacher", *place, "--epochs", 0, "--classes", by_number)
    assert (doubled.status, "'dress' and 'trousers' would be the same output, 3" in doubled.err) == (5, True)
    by_number.write_text('{"dress": 3, "hat": 0, "trousers": 2}')
    again = kdcache("train-teacher", *place, "--epochs", 0, "--classes", by_number)
    assert "already tested" in again.err  # the same mapping, whichever way it was said
    trained = kdcache("train-teacher", *place, "--epochs", 2, "--classes", names)
    assert trained.status == 2
    assert "--epochs 0" in trained.err


def test_as_many_classes_whose_names_do_not_tell_are_shown(kdcache, tmp_path):
    spec = folder_of(tmp_path / "clothes", ["dress", "hat"])
    save_weights(create_model("test_resnet", 2, input_size=32)[0], tmp_path / "two.safetensors")
    place = [*TEACHER, "--dataset", spec, *SMALL, "--home", tmp_path, "--checkpoint", tmp_path / "two.safetensors"]
    result = kdcache("train-teacher", *place, "--epochs", 0)
    assert result.status == 0, result.err
    assert "taken for granted" in result.err
    assert "dress -> output 0" in result.err
    assert "classes" not in record(tmp_path)
    settled = kdcache("train-teacher", *place, "--epochs", 0, "--classes", "dataset")
    assert "taken for granted" not in settled.err
    assert "already tested" in settled.err


def test_weights_that_were_registered_otherwise_are_found_by_what_classes_says(kdcache, tmp_path):
    spec = folder_of(tmp_path / "clothes", ["dress", "hat"])
    save_weights(create_model("test_resnet", 2, input_size=32)[0], tmp_path / "two.safetensors")
    place = [*TEACHER, "--dataset", spec, *SMALL, "--home", tmp_path, "--checkpoint", tmp_path / "two.safetensors"]
    assert kdcache("train-teacher", *place, "--epochs", 0).status == 0
    (tmp_path / "names.txt").write_text("dress\nhat\n")
    for classes in ("dataset", tmp_path / "names.txt"):
        first = kdcache("dump-teacher", *place, "--views", 1, "--classes", classes)
        assert (first.status, "already tested" in first.err) == (0, True), first.err
    for classes in ("dataset", tmp_path / "names.txt"):
        again = kdcache("dump-teacher", *place, "--views", 1, "--classes", classes)
        assert (again.status, "already tested" in again.err) == (0, False), again.err
    assert len(record(tmp_path)["training"]["said_sha256"]) == 2


SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.body(x).relu().mean((2, 3)))

class Named(Net):
    pretrained_cfg = {"label_names": ["hat", "shoe", "trousers", "dress", "sock"]}
"""


@pytest.mark.parametrize("function", ["Net", "Named"])
def test_outputs_of_a_function_are_selected(function, kdcache, tmp_path, monkeypatch):
    spec = folder_of(tmp_path / "clothes", ["dress", "hat", "trousers"])
    (tmp_path / "fixed_nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("hat\nshoe\ntrousers\ndress\nsock\n")
    try:
        place = ["--teacher", f"fixed_nets:{function}", "--dataset", spec, *SMALL, "--home", tmp_path]
        said = ["--classes", names] if function == "Net" else ["--teacher-epochs", 0]
        result = kdcache("dump-teacher", *place, "--views", 1, *said, "--precision", "bf16")
        assert result.status == 0, result.err
        assert record(tmp_path)["classes"]["outputs"] == [3, 0, 2]
        model = teacher_of(tmp_path)
        assert torch.equal(logits(model), logits(model.model)[:, [3, 0, 2]])
        if function == "Net":
            refused = kdcache("train-teacher", *place, "--epochs", 0)
            assert refused.status == 5
            assert "has 5 classes, dataset" in refused.err
    finally:
        sys.modules.pop("fixed_nets", None)


FREE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, class_names):
        assert len(class_names) == num_classes
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))
        self.pretrained_cfg = {"classifier": "2"}

class Fixed(Net):
    def __init__(self, num_classes):
        super().__init__(5, "hsrdo")
        self.pretrained_cfg = {"label_names": ["hat", "shoe", "trousers", "dress", "sock"]}
"""


@pytest.mark.parametrize(("function", "outputs"), [("Net", [3, 0, 2]), ("Fixed", [3, 0, 2]), ("Net", [2, 0, 1])])
def test_outputs_of_a_functions_checkpoint_are_selected(function, outputs, kdcache, tmp_path, monkeypatch):
    spec = folder_of(tmp_path / "clothes", ["dress", "hat", "trousers"])
    (tmp_path / "free_nets.py").write_text(FREE)
    monkeypatch.chdir(tmp_path)
    full = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5 if 3 in outputs else 3))
    save_weights(full, tmp_path / "full.safetensors")
    said = tmp_path / "m.json"
    said.write_text(json.dumps(dict(zip(["dress", "hat", "trousers"], outputs, strict=True))))
    place = ["--teacher", f"free_nets:{function}", "--checkpoint", tmp_path / "full.safetensors", "--dataset", spec, *SMALL]
    place += ["--home", tmp_path, *(["--classes", said] if function == "Net" else [])]
    try:
        for words in ("top-1", "complete"):
            result = kdcache("dump-teacher", *place, "--views", 1)
            assert result.status == 0, result.err
            assert words in result.err
        found = teacher_of(tmp_path)
        assert torch.equal(found.outputs, torch.tensor(outputs))
        expected = logits(full)[:, outputs]
        torch.testing.assert_close(logits(found), expected, atol=1e-6, rtol=0)
        if function == "Net" and 3 in outputs:
            said.write_text('{"dress": 3}')
            refused = kdcache("dump-teacher", *place, "--views", 1)
            assert refused.status == 5
            assert "m.json lacks 2 of the 3 classes" in refused.err
            assert "'hat', 'trousers'" in refused.err
            assert '{"hat": NUMBER}' in refused.err
    finally:
        sys.modules.pop("free_nets", None)


# ---------------------------------------------------------------- classifiers of every kind


def distilled(classes):
    made = VisionTransformerDistilled(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=classes)
    made.pretrained_cfg = {"classifier": ("head", "head_dist")}
    return made


def convolution(classes):
    made = ResNetV2(layers=(1,), channels=(128,), num_classes=classes, stem_chs=32)
    made.pretrained_cfg = {"classifier": "head.fc"}
    return made


def squashed(classes):
    made = nn.Sequential(nn.Flatten(), nn.Linear(768, classes), nn.Softmax(1))
    made.pretrained_cfg = {"classifier": "1"}
    return made


@pytest.mark.parametrize("make", [distilled, convolution])
@pytest.mark.parametrize("outputs", [[6, 2], [4, 3, 2, 1, 0, 5, 6]])
def test_rows_of_all_classifiers_are_selected(make, outputs):
    full, model = make(7), make(len(outputs))
    for parameter in full.parameters():  # some classifiers begin with zeros
        nn.init.normal_(parameter, std=0.1)
    select_rows(full, model, outputs, 7, input_size=16)
    expected = logits(full, 16)[:, outputs]
    assert expected.abs().max() > 0
    torch.testing.assert_close(logits(model, 16), expected, atol=1e-6, rtol=0)


def test_a_model_whose_logits_depend_on_each_other_is_refused():
    with pytest.raises(IncompatibleError, match="cannot be reduced"):
        select_rows(squashed(7), squashed(3), [0, 1, 2], 7, input_size=16)
    bare = squashed(7)
    bare.pretrained_cfg = {}
    with pytest.raises(IncompatibleError, match="cannot be reduced"):
        select_rows(bare, squashed(3), [0, 1, 2], 7, input_size=16)


def test_weights_survive_being_written(tmp_path):
    full, model = distilled(7), distilled(3)
    select_rows(full, model, [6, 0, 1], 7, input_size=16)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["head_dist.weight"].equal(full.head_dist.weight[[6, 0, 1]])
