"""The benchmark against timm's online distillation: both sides do what they are said to do."""

import math
import sys

import torch

from kdcache.bench import rival
from kdcache.bench.pipeline import digits_canvas
from kdcache.models.creation import create_model
from kdcache.system.progress import Silent
from kdcache.training.config import TrainConfig
from kdcache.training.devices import seeded

SMALL = rival._Setting("test_vit", "test_resnet", 32, 32, batch=8, batches=2, cached=1.0, packed=1.0)
CPU = torch.device("cpu")


def test_it_measures_both_sides_and_when_the_dump_has_paid(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rival, "ON_CPU", (SMALL,))
    monkeypatch.setattr(rival, "TAUS", (1.0, 4.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = rival.rival(0.1, tmp_path, Silent())
    assert [result.measured for result in results] == ["from the cache", "dump of a view", "one of 2 on a stream"]
    assert all(result.value > 0 for result in results)
    assert math.isfinite(results[0].value)


def test_timm_learns_from_the_teacher_on_augmented_and_mixed_images(tmp_path) -> None:
    canvas = digits_canvas(tmp_path, 32, 16, Silent())
    with seeded(0):
        teacher, _ = create_model("test_vit", 10, input_size=32)
    seen: list[torch.Tensor] = []
    teacher.eval().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    before = [parameter.clone() for parameter in teacher.parameters()]
    epoch = rival._online(SMALL, teacher, canvas, TrainConfig(epochs=1, batch_size=8), CPU)
    epoch()
    epoch()
    assert [len(images) for images in seen] == [8] * 4  # in every step of every epoch
    assert not torch.equal(seen[0], seen[2])
    assert all(torch.equal(was, now) for was, now in zip(before, teacher.parameters(), strict=True))


def test_timm_and_what_older_versions_did_have_the_same_loss(monkeypatch) -> None:
    with seeded(0):
        (student, _), (teacher, _) = (create_model("test_vit", 10, input_size=32) for _ in range(2))
        images, labels = torch.randn(4, 3, 32, 32), torch.eye(10)[:4]
    criterion = torch.nn.CrossEntropyLoss()
    new = rival._task(student.eval(), teacher.eval(), criterion, CPU)(images, labels)
    monkeypatch.setitem(sys.modules, "timm.task", None)
    old = rival._task(student, teacher, criterion, CPU)(images, labels)
    torch.testing.assert_close(new, old)
