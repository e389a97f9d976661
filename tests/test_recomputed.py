"""Protects `verify --replay` with the teacher at hand: intact archives are never called damaged, changed logits are found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.archive import Archive, ArchiveWriter, CanvasCard, Noise, TeacherCard
from kdcache.datasets.canvas import Canvas
from kdcache.errors import IncompatibleError, RetryError
from kdcache.models.creation import Normalisation, create_model
from kdcache.system.progress import Silent
from kdcache.teachers import recomputed
from kdcache.teachers.forward import Forward
from kdcache.teachers.noise import measured_noise
from kdcache.teachers.recomputed import replay_with_teacher
from kdcache.teachers.registry import Teacher
from kdcache.teachers.shards import write_shards
from kdcache.training.devices import seeded
from kdcache.views.policy import ViewPolicy
from tests.tf32 import TF32

CPU, POLICY = torch.device("cpu"), ViewPolicy.load("pets", size=16)
UNMEASURED = Noise(views=23, kl_mean=0.0, kl_max=0.0, max_logit_difference=0.0)  # as float32 dumps used to record


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, Normalisation]:
    """A convolutional teacher with logits as large as a trained one's."""
    with seeded(0):
        model, normalise = create_model("cifar_resnet8", 3, input_size=16)
    model.fc.weight.data *= 20
    return model.eval(), normalise


@pytest.fixture(autouse=True)
def _at_hand(made: tuple[nn.Module, Normalisation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputed, "load_teacher", lambda teacher: made)


def dumped(path: Path, canvas: Canvas, made: Any, precision: Any = "fp32", noise: Noise | str | None = "measured") -> Archive:
    forward = Forward(*made, CPU, precision)
    if noise == "measured":
        noise = measured_noise(forward, canvas, POLICY, 8, Silent())
    card = TeacherCard(
        alias="t", name="cifar_resnet8", weights_sha256="3" * 64, input_size=16, mean=made[1].mean, std=made[1].std,
        precision=precision, batch_size=8, noise=noise,
    )  # fmt: skip
    writer = ArchiveWriter(
        path, num_views=2, num_samples=len(canvas), class_names=canvas.card.class_names, codec="f32", policy=POLICY,
        source=canvas.card, canvas=CanvasCard.of(canvas, POLICY), teacher=card,
        provenance={"device": "NVIDIA A100-SXM4-80GB", "versions": {"torch": "2.11.0"}},
    )  # fmt: skip
    write_shards(writer, forward, canvas, batch_size=8)
    return writer.finalize()


def replayed(archive: Archive, canvas: Canvas) -> Any:
    return replay_with_teacher(archive, canvas, 46, Teacher(Path(), {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_logits_of_a_dump_are_computed_again(tmp_path: Path, canvas: Canvas, made: Any, precision: str) -> None:
    result = replayed(dumped(tmp_path / "a", canvas, made, precision), canvas)
    assert result.ok, result.failures
    assert "23 logit vectors recomputed on cpu: largest difference 0, " in result.notes[0]


@pytest.mark.parametrize("noise", [UNMEASURED, None], ids=["recorded as 0", "not recorded"])
def test_an_archive_computed_with_tf32_is_intact(tmp_path: Path, canvas: Canvas, made: Any, noise: Noise | None) -> None:
    with TF32():
        archive = dumped(tmp_path / "a", canvas, made, noise=noise)
    result = replayed(archive, canvas)
    assert result.ok, result.failures
    largest = float(result.notes[0].partition("largest difference ")[2].partition(",")[0])
    assert largest > 0.002, "as float32's own noise would not explain"


def test_tf32_in_a_dump_is_measured_as_noise(tmp_path: Path, canvas: Canvas, made: Any) -> None:
    exact = measured_noise(Forward(*made, CPU, "fp32"), canvas, POLICY, 8, Silent())
    with TF32():
        coarse = measured_noise(Forward(*made, CPU, "fp32"), canvas, POLICY, 8, Silent())
    assert exact is not None
    assert coarse is not None
    assert (exact.reference, exact.views) == ("float64", 23)
    assert 0 < exact.max_logit_difference < 1e-4
    assert coarse.max_logit_difference > 20 * exact.max_logit_difference


@pytest.mark.parametrize("noise", [UNMEASURED, "measured"], ids=["old", "new"])
@pytest.mark.parametrize("change", ["swapped", "moved"])
def test_changed_logits_are_found(tmp_path: Path, canvas: Canvas, made: Any, noise: Any, change: str) -> None:
    def changed(self: Forward, views: torch.Tensor) -> torch.Tensor:
        logits = Forward.in_float32(self, views).clone()
        if len(views) < 8:  # the last batch of a view
            logits[-1] = logits[-1].flip(0) if change == "swapped" else logits[-1] + torch.tensor([0.0, 0.2, 0.0])
        return logits

    if noise == "measured":
        noise = measured_noise(Forward(*made, CPU, "fp32"), canvas, POLICY, 8, Silent())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "launch", changed)
        archive = dumped(tmp_path / "a", canvas, made, noise=noise)
    result = replayed(archive, canvas)
    assert len(result.failures) == 1
    with pytest.raises(IncompatibleError, match="in 1 of 23 logit vectors") as caught:
        result.raise_if_failed()
    # It may also be that device: checksums alone tell of damage, and nobody is told to delete what is intact.
    assert "NVIDIA A100-SXM4-80GB with torch 2.11.0, here on cpu with torch" in caught.value.why
    assert "delete" not in str(caught.value)
    assert f"kdcache verify {archive.location} --replay 46 --device auto" in caught.value.fix


def test_a_model_without_float64_has_no_known_noise(canvas: Canvas) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean(dim=(2, 3))  # float32 by its code

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.float().mean(dim=(2, 3)))

    for model in (Half(), Stubborn()):
        told = []
        progress = Silent()
        progress.say = told.append  # type: ignore[method-assign]
        forward = Forward(model, Normalisation((0.5,) * 3, (0.5,) * 3), CPU, "fp32")
        assert measured_noise(forward, canvas, POLICY, 8, progress) is None
        assert "cannot run in float64" in told[0]


def test_too_little_memory_for_a_batch_of_the_dump_can_be_repeated(
    tmp_path: Path, canvas: Canvas, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = dumped(tmp_path / "a", canvas, made)

    def full(self: Forward, views: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Forward, "launch", full)
    with pytest.raises(RetryError, match="batches of 8 views") as caught:
        replayed(archive, canvas)
    assert caught.value.fix == "end what else uses that memory and repeat the command", "it is on the CPU already"
    assert np.isfinite(archive.read(0, 0, 3).logits).all()


def test_too_little_memory_for_views_can_be_repeated(
    tmp_path: Path, canvas: Canvas, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = dumped(tmp_path / "a", canvas, made)

    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(recomputed, "replay", full)
    with pytest.raises(RetryError, match="no memory to render views on cpu"):
        replayed(archive, canvas)
