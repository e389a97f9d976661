"""Teachers that are no teachers, or know the classes in another order: refused before a dump, by name, unless it is meant."""

import json
import shlex
import textwrap

import numpy as np
import pytest
from PIL import Image

from kdcache.archive import open_archive
from kdcache.system.seals import sealed_record
from kdcache.teachers.order import class_order, exchanged, told_cycles, told_outputs
from tests.end_to_end.test_distill import only
from tests.hostile import resealed

NAMES = ["blue", "green", "red"]

TEACHERS = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Mean(nn.Module):
        places = (2, 1, 0)

        def __init__(self, num_classes):
            super().__init__()
            self.scale = nn.Parameter(torch.full((1,), 4.0))

        def forward(self, x):
            return self.scale * x.mean(dim=(2, 3))[:, list(self.places)]

    class Rotated(Mean):
        places = (1, 0, 2)

    class Noisy(Mean):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1)

    class Company(Mean):
        def forward(self, x):
            return F.batch_norm(super().forward(x), None, None, training=True) if len(x) > 1 else super().forward(x)

    class Even(Mean):
        def forward(self, x):
            return super().forward(x).softmax(dim=1)

    class Logarithms(Mean):
        def forward(self, x):
            return super().forward(x).log_softmax(dim=1)

    class Blind(Mean):
        def forward(self, x):
            return 0 * super().forward(x) + torch.tensor([1.0, 2.0, 3.0])

    class Broken(Mean):
        def forward(self, x):
            return super().forward(x) + (torch.nan if x.std() > 0 and len(x) > 1 and x.mean() != 0 else 0)
"""


@pytest.fixture
def coloured(tmp_path, monkeypatch):
    """A folder of images in three colours, and a module of teachers in the working directory."""
    rng = np.random.default_rng(7)
    for split in ("train", "test"):
        for name, channel in zip(NAMES, (2, 1, 0), strict=True):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += np.uint8(100 + i)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    (tmp_path / "odd_teachers.py").write_text(textwrap.dedent(TEACHERS))
    monkeypatch.chdir(tmp_path)
    return f"folder:{tmp_path / 'images'}"


def dump(kdcache, data, teacher, *more):
    shown = ["--canvas", "16", "--size", "16", "--policy", "none", "--views", "1", "-b", "8"]
    teacher = ["--teacher", f"odd_teachers:{teacher}"]
    return kdcache("dump-teacher", "--dataset", data, *teacher, "--teacher-epochs", "0", *shown, "--home", "home", *more)


def test_a_sound_teacher_is_dumped_without_a_word(coloured, kdcache, tmp_path):
    result = dump(kdcache, coloured, "Mean")
    assert result.status == 0, result.err
    assert "WARNING" not in result.err
    assert open_archive(only(tmp_path / "home", "archives/*")).manifest.teacher.accepted is None


@pytest.mark.parametrize(
    ("teacher", "words", "flag"),
    [
        ("Noisy", "the same batch twice", "--accept-random-teacher"),
        ("Company", "views in another batch", "--accept-batch-dependent-teacher"),
        ("Even", "are probabilities", "--accept-probabilities"),
        ("Logarithms", "logarithms of probabilities", "--accept-probabilities"),
        ("Blind", "the same for 8 different views", "--accept-constant-teacher"),
    ],
)
def test_no_teacher_is_dumped_unless_it_is_meant(coloured, kdcache, tmp_path, teacher, words, flag):
    refused = dump(kdcache, coloured, teacher)
    assert refused.status == 5
    assert words in refused.err
    assert flag in refused.err.split("fix:")[1]
    assert not list((tmp_path / "home" / "archives").glob("*/kdcache.json"))
    meant = dump(kdcache, coloured, teacher, flag)
    assert meant.status == 0, meant.err
    archive = open_archive(only(tmp_path / "home", "archives/*"))
    assert words in archive.manifest.teacher.accepted[flag.removeprefix("--").replace("-", "_")]
    for shown in (kdcache("info", archive.path).out, (archive.path / "README.md").read_text()):
        assert "accepted of the teacher" in shown
        assert words in " ".join(shown.replace("\\", "").split())
    replayed = kdcache("verify", archive.path, "--replay", "4", "--home", "home", "--teacher", f"odd_teachers:{teacher}")
    assert replayed.status == 0, replayed.err
    assert ("others each time" in replayed.out + replayed.err) == (teacher == "Noisy")


def test_logits_that_are_not_finite_are_refused_whatever_is_accepted(coloured, kdcache):
    refused = dump(kdcache, coloured, "Broken", "--accept-random-teacher")
    assert refused.status == 5
    assert "not finite" in refused.err


def test_classes_in_another_order_are_named_and_put_right(coloured, kdcache, tmp_path):
    refused = dump(kdcache, coloured, "Rotated")
    assert refused.status == 5
    assert "3 of 3 classes are in another order: 'blue' is its output of 'red'" in refused.err
    file = refused.err.split("fix:")[1].split("--classes ")[1].split(";")[0]
    assert json.loads((tmp_path / shlex.split(file)[0]).read_text()) == {"blue": 2, "green": 0, "red": 1}
    mended = dump(kdcache, coloured, "Rotated", "--classes", shlex.split(file)[0])
    assert mended.status == 0, mended.err
    assert "WARNING" not in mended.err
    archive = open_archive(only(tmp_path / "home", "archives/*"))
    assert archive.manifest.statistics.top1_views == 100
    assert archive.manifest.teacher.accepted is None


def test_another_order_that_is_meant_is_recorded(coloured, kdcache, tmp_path):
    meant = dump(kdcache, coloured, "Rotated", "--accept-class-order")
    assert meant.status == 0, meant.err
    assert "where guessing has 33.33 % of 3 classes" in meant.err
    accepted = open_archive(only(tmp_path / "home", "archives/*")).manifest.teacher.accepted
    assert "another order" in accepted["accept_class_order"]


def test_a_folder_of_another_teacher_is_not_dumped_under_this_ones_name(coloured, kdcache, tmp_path):
    assert dump(kdcache, coloured, "Mean").status == 0
    folder = only(tmp_path / "home", "teachers/*")
    shown = ["--canvas", "16", "--size", "16", "--policy", "none", "--views", "1", "--home", "home", "--teacher-folder", folder]
    refused = kdcache("dump-teacher", "--dataset", coloured, "--teacher", "odd_teachers:Even", *shown)
    assert refused.status == 2
    assert "the folder's teacher is odd_teachers:Mean, not odd_teachers:Even" in refused.err
    assert kdcache("dump-teacher", "--dataset", coloured, "--teacher", "odd_teachers:Mean", *shown).status == 0


def answers(classes, images, accuracy, order=None, seed=0):
    """Labels, and outputs that are right with some probability, else any, of a teacher with its classes in that order."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    outputs = np.where(rng.random(images) < accuracy, labels, rng.integers(0, classes, images))
    return outputs if order is None else np.argsort(order)[outputs], labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "accuracy"), [(2, 0.5), (3, 0.0), (10, 0.0), (10, 0.2), (37, 0.1), (100, 0.0), (1000, 0.3)])
def test_weak_teachers_in_the_right_order_are_not_accused(classes, accuracy, seed):
    assert not class_order(*answers(classes, 512, accuracy, seed=seed), classes).better


@pytest.mark.parametrize(("classes", "accuracy"), [(2, 0.8), (3, 0.6), (10, 0.4), (37, 0.6), (100, 0.7), (128, 0.8)])
def test_classes_that_are_rotated_are_put_back(classes, accuracy):
    order = np.roll(np.arange(classes), 1)
    found = class_order(*answers(classes, 512, accuracy, order), classes)
    assert found.better
    assert np.mean(np.argsort(order)[order] == np.arange(classes)) == 1
    assert np.mean(np.array(found.outputs) == np.argsort(order)) > 0.9


@pytest.mark.parametrize("seen", [1000, 600])
def test_only_classes_whose_images_tell_are_put_into_the_mapping(seen):
    """There are many classes, with few images each or none: what the best assignment gives those is a guess."""
    order, rng = np.roll(np.arange(1000), 1), np.random.default_rng(3)
    labels = np.repeat(np.arange(seen), 8)
    predicted = np.where(rng.random(len(labels)) < 0.6, order[labels], rng.integers(0, 1000, len(labels)))
    assert class_order(predicted, labels, 1000).better
    told = told_outputs(predicted, labels, 1000)
    assert len(told) > 0.95 * seen
    assert all(order[number] == output for number, output in told.items())


@pytest.mark.parametrize(("classes", "images"), [(37, 222), (100, 512)])
def test_two_classes_of_many_that_are_exchanged_are_found_by_few_images(classes, images):
    order = np.arange(classes)
    order[[0, classes - 1]] = classes - 1, 0
    assert class_order(*answers(classes, images, 1.0, order), classes).better


def confusing(classes, accuracy, order, seed=0):
    """A teacher of uneven recalls, whose classes have others that they are taken for; some pairs are halfway exchanged."""
    rng = np.random.default_rng(seed)
    recall, other = np.clip(rng.normal(accuracy, 0.12, classes), 0.05, 0.99), rng.integers(0, classes, classes)
    share = np.full(classes, 0.4)
    for a, b in rng.permutation(classes)[: classes // 20 * 2].reshape(-1, 2):
        other[[a, b]], recall[[a, b]], share[[a, b]] = (b, a), 0.5, 0.95

    def answer(labels):
        wrong = np.where(rng.random(len(labels)) < share[labels], other[labels], rng.integers(0, classes, len(labels)))
        return np.asarray(order)[np.where(rng.random(len(labels)) < recall[labels], labels, wrong)]

    return answer


@pytest.mark.parametrize(("classes", "accuracy"), [(100, 0.8), (200, 0.8), (1000, 0.9)])
def test_classes_of_many_that_have_changed_places_are_confirmed_by_more_of_their_images(classes, accuracy):
    """Four images of each class show it mostly, 32 more always."""
    order, shown = np.arange(classes), 0
    order[[0, 3, 7]] = 3, 7, 0
    for seed in range(8):
        answer, few = confusing(classes, accuracy, order, seed), np.arange(4 * classes) % classes
        cycles = told_cycles(answer(few), few, classes)
        if [0, 3, 7] in cycles:
            more = np.repeat(np.array([number for cycle in cycles for number in cycle], int), 32)
            found = exchanged(answer(more), more, cycles, classes)
            assert found is not None
            assert found.better
            assert (found.moved, [found.outputs[i] for i in (0, 3, 7)]) == ([0, 3, 7], [3, 7, 0])
            shown += 1
    assert shown >= 4


def test_classes_that_are_taken_for_each_other_are_not_accused_of_another_order():
    for seed in range(40):
        answer, few = confusing(200, 0.6, np.arange(200), seed), np.arange(800) % 200
        cycles = told_cycles(answer(few), few, 200)
        more = np.repeat(np.array([number for cycle in cycles for number in cycle], int), 32)
        assert exchanged(answer(more), more, cycles, 200) is None


def test_two_classes_of_many_that_a_fair_teacher_has_exchanged_are_named_and_put_right(kdcache, tmp_path, monkeypatch):
    rng, classes = np.random.default_rng(0), 120
    colours = np.array([(20 * (number // 12), 20 * (number % 12), 100) for number in range(classes)], np.uint8)
    images = tmp_path / "images"
    images.mkdir()
    for split, each in (("train", 40), ("test", 4)):
        labels = np.repeat(np.arange(classes), each)
        shown = np.where(rng.random(len(labels)) < 0.75, labels, rng.integers(0, classes, len(labels)))
        np.save(images / f"{split}_labels.npy", labels)
        np.save(images / f"{split}_images.npy", np.broadcast_to(colours[shown][:, None, None], (len(labels), 8, 8, 3)))
    (tmp_path / "colours.py").write_text(
        textwrap.dedent(f"""
        import torch
        from torch import nn
        NAMED = torch.tensor({colours.tolist()}) / 255

        class Nearest(nn.Module):
            def __init__(self, num_classes):
                super().__init__()
                order = torch.arange({classes})
                order[[30, 77]] = torch.tensor([77, 30])
                self.named = nn.Parameter(NAMED[order])
                self.shift = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))

            def forward(self, x):
                colour = x.mean(dim=(2, 3)) * self.shift[1] + self.shift[0]
                return -30 * torch.cdist(colour, self.named)
        """)
    )
    monkeypatch.chdir(tmp_path)
    dumped = ["dump-teacher", "--dataset", f"arrays:{images}", "--teacher", "colours:Nearest", "--teacher-epochs", "0"]
    dumped += ["--canvas", "8", "--size", "8", "--policy", "none", "--views", "1", "-b", "64", "--home", "home"]
    refused = kdcache(*dumped)
    assert refused.status == 5, refused.err
    assert "2 of 120 classes are in another order: '30' is its output of '77', '77' is its output of '30'" in refused.err
    file = shlex.split(refused.err.split("fix:")[1].split("--classes ")[1].split(";")[0])[0]
    mended = kdcache(*dumped, "--classes", file)
    assert mended.status == 0, mended.err


@pytest.mark.parametrize(("classes", "share"), [(10, 0.2), (10, 0.3), (37, 0.1), (100, 0.2)])
def test_teachers_that_take_classes_for_others_are_not_accused_of_another_order(classes, share):
    """Every class has confusions of its own, beside a small share of right answers."""
    accused = 0
    for seed in range(20):
        rng, labels = np.random.default_rng(seed), np.arange(512) % classes
        confused = rng.dirichlet(np.full(classes, 0.1), size=classes)
        wrong = np.array([rng.choice(classes, p=confused[label]) for label in labels])
        accused += class_order(np.where(rng.random(512) < share, labels, wrong), labels, classes).better
    assert accused <= 2


def test_two_classes_that_are_exchanged_are_found_among_the_others():
    order = np.arange(10)
    order[[3, 7]] = 7, 3
    found = class_order(*answers(10, 512, 0.9, order), 10)
    assert (found.better, found.moved) == (True, [3, 7])


def test_one_frequent_class_is_no_order():
    labels = np.repeat([0, 1, 2], [400, 60, 40])
    assert not class_order(np.full(500, 2), labels, 3).better


def test_a_function_that_a_record_names_is_not_called_unless_it_is_typed(coloured, kdcache, tmp_path):
    assert dump(kdcache, coloured, "Mean").status == 0
    folder = only(tmp_path / "home", "teachers/*")
    record = json.loads((folder / "teacher.json").read_text()) | {"name": "planted:make"}
    (folder / "teacher.json").write_bytes(sealed_record(record))
    (tmp_path / "planted.py").write_text("open('ran', 'w').close()\ndef make(num_classes): ...\n")
    archive = only(tmp_path / "home", "archives/*")
    result = kdcache("verify", archive, "--replay", "4", "--home", "home")
    assert result.status == 0, result.err
    assert "--teacher planted:make" in result.out
    assert not (tmp_path / "ran").exists()


def planted(archive, dataset):
    """An archive that says its images are elsewhere, as a stranger's may."""
    manifest = json.loads((archive / "kdcache.json").read_text())
    manifest["provenance"]["dataset"] = dataset
    (archive / "kdcache.json").write_text(json.dumps(resealed(manifest)))


@pytest.mark.parametrize("dataset", ["/", "folder:/", "hf:nobody/nothing", "factory:planted:make"])
def test_an_archive_has_nothing_walked_fetched_or_run(coloured, kdcache, tmp_path, dataset):
    assert dump(kdcache, coloured, "Mean").status == 0
    archive = only(tmp_path / "home", "archives/*")
    (tmp_path / "planted.py").write_text("open('ran', 'w').close()\n")
    planted(archive, dataset)
    before = sorted((tmp_path / "home" / "data").iterdir())
    student = ["--student", "test_vit", "--epochs", "1", "-b", "8"]
    for command in (["verify", archive, "--replay", "4"], ["distill", "--archive", archive, *student]):
        refused = kdcache(*command, "--home", "home")
        assert refused.status == 2, refused.err
        assert "--dataset" in refused.err.split("fix:")[1]
    assert sorted((tmp_path / "home" / "data").iterdir()) == before
    assert not (tmp_path / "ran").exists()
    assert kdcache("verify", archive, "--replay", "4", "--home", "home", "--dataset", coloured).status == 0


def test_images_outside_the_workspace_are_read_again_where_their_user_named_them(coloured, kdcache, tmp_path):
    assert dump(kdcache, coloured, "Mean").status == 0
    archive = only(tmp_path / "home", "archives/*")
    assert kdcache("verify", archive, "--replay", "4", "--home", "home").status == 0
    elsewhere = kdcache("verify", archive, "--replay", "4", "--home", "other")
    assert elsewhere.status == 2
    named = shlex.split(elsewhere.err.split("--dataset ")[1])[0]
    assert kdcache("verify", archive, "--replay", "4", "--home", "other", "--dataset", named).status == 0


def test_plans_and_dry_runs_run_nothing(coloured, kdcache, tmp_path):
    (tmp_path / "planted.py").write_text("open('ran', 'w').close()\ndef make(**_): ...\n")
    dry = kdcache("dump-teacher", "--teacher", "planted:make", "--dataset", "digits", "--dry-run", "--home", "home")
    assert dry.status == 0, dry.err
    assert "does not call" in dry.err
    assert kdcache("dump-teacher", "--teacher", "rn18", "--dataset", "planted:make", "--dry-run", "--home", "home").status == 0
    study = {
        **dict.fromkeys(("title", "paper", "question", "varies", "expected"), "words"),
        "cost": {"gpu-hours": 1, "archive-bytes": "1 GB"},
        "archives": {"a": {"dataset": ["planted:make"], "teacher": ["planted:make"]}},
        "students": [{"archive": ["a"], "student": ["planted:make"], "epochs": 1}],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    planned = kdcache("study", "plan", "study.yaml", "--home", "home")
    assert not (tmp_path / "ran").exists(), planned.err
    assert planned.status == 0, planned.err
