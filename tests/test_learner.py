"""Protects training that goes on elsewhere: on another kind of device, with its weights, optimiser and random numbers."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcache.errors import IntegrityError
from kdcache.models.creation import Normalisation
from kdcache.training import devices, learner
from kdcache.training.config import TrainConfig
from kdcache.training.graphs import Lanes
from kdcache.training.learner import Learner
from kdcache.training.optimizers import Rates, load_state, make_optimizer
from kdcache.training.timing import Timer

HALF = Normalisation((0.5,) * 3, (0.5,) * 3)
CPU = torch.device("cpu")
VIEWS = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """A linear layer on the mean pixel, with dropout: it draws random numbers in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(x.mean(dim=(2, 3))))


def made(
    folder: Path,
    device: torch.device = CPU,
    model: nn.Module | None = None,
    timer: Timer | None = None,
    lanes: Lanes | None = None,
    **config: Any,
) -> Learner:
    with devices.seeded(7):
        model = Tiny() if model is None else model
    settings = TrainConfig(**({"epochs": 1} | config))
    return Learner(folder, model, HALF, settings, steps_per_epoch=50, seed=3, device=device, timer=timer, lanes=lanes)


def step(one: Learner) -> Tensor:
    one.step(VIEWS.to(one.device), lambda logits: logits.square().mean(), lambda logits: {})
    return one.model.fc.weight.detach().clone()  # type: ignore[union-attr, operator]


def as_if_written_on(kind: str, folder: Path, *, earlier: bool = False) -> None:
    """Make a CPU's checkpoint one of that kind of device; `earlier`: of a version that did not write the kind."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    states = {"cpu": 1, "cuda": 2}[kind]
    state |= {"rng": [[*own, torch.zeros(16, dtype=torch.uint8)][:states] for own in state["rng"]], "device": kind}
    if earlier:
        del state["device"]
    torch.save(state, folder / "checkpoint.pt")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_gpus_checkpoint_goes_on_on_a_cpu_and_says_so(tmp_path: Path, earlier: bool) -> None:
    first = made(tmp_path)
    step(first)
    first.suspend()
    expected = step(first)
    as_if_written_on("cuda", tmp_path, earlier=earlier)
    again = made(tmp_path)
    assert torch.equal(step(again), expected)  # the host's random numbers go on
    assert again.moved_from == "cuda"
    assert "bits may differ" in " ".join(again.notes)


def test_a_cpus_checkpoint_goes_on_on_a_gpu_whose_random_numbers_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tmp_path)
    step(first)
    first.suspend()
    expected = step(first)
    set_back: list[int] = []
    own = torch.full((16,), 5, dtype=torch.uint8)

    def set_two(states: list[Tensor], device: torch.device) -> None:
        assert torch.equal(states[1], own)
        set_back.append(len(states))
        devices.set_rng_states(states, device)

    monkeypatch.setattr(learner, "rng_states", lambda device: [*devices.rng_states(device), own])
    monkeypatch.setattr(learner, "set_rng_states", set_two)
    again = made(tmp_path)
    assert torch.equal(step(again), expected)
    assert set(set_back) == {2}


def test_where_nothing_has_moved_nothing_is_said(tmp_path: Path) -> None:
    first = made(tmp_path)
    step(first)
    first.suspend()
    assert (made(tmp_path).notes, first.notes) == ([], [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("there", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_training_moves_between_a_cpu_and_a_gpu(tmp_path: Path, there: tuple[str, str], opt: str) -> None:
    begun, on = map(torch.device, there)
    first = made(tmp_path, begun, opt=opt, amp=False)
    step(first)
    first.suspend()
    weights, again = first.model.fc.weight.detach().cpu(), made(tmp_path, on, opt=opt)  # type: ignore[union-attr, operator]
    assert torch.equal(again.model.fc.weight.detach().cpu(), weights)  # type: ignore[union-attr, operator]
    assert again.moved_from == (there[0] if begun != on else None)
    for _ in range(3):
        assert torch.isfinite(step(again)).all()
    again.suspend()
    assert made(tmp_path, begun, opt=opt).steps == 4


def test_the_state_of_an_optimiser_has_the_memory_format_of_the_weights() -> None:
    """Fused kernels refuse any other; what is read from a file is contiguous."""
    layer = torch.nn.Conv2d(16, 4, 3).to(memory_format=torch.channels_last)
    config = TrainConfig(epochs=1)
    optimizer, other = make_optimizer(layer, config), make_optimizer(layer, config)
    layer(torch.ones(1, 16, 5, 5)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for values in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            values[name] = values[name].contiguous().clone(memory_format=torch.contiguous_format)
    load_state(other, state, Rates(other))
    for parameter, values in other.state.items():
        assert values["exp_avg"].stride() == parameter.stride()
        assert torch.equal(values["exp_avg"], optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize("place", ["load_state_dict", "read"])
def test_a_checkpoint_that_memory_does_not_suffice_for_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """So that a group of students is divided; the folder is given back for that."""
    first = made(tmp_path)
    step(first)
    first.suspend()

    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(*((Tiny, "load_state_dict") if place == "load_state_dict" else (torch, "load")), full)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            made(tmp_path)
    again = made(tmp_path)  # while the error, which refers to the other one, is still there
    assert again.steps == 1
    assert caught.value is not None


def test_a_damaged_checkpoints_folder_is_moved_aside_and_nothing_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "the first run"
    for other in range(2):
        first = made(folder)
        step(first)
        first.suspend()
        (folder / "checkpoint.pt").write_bytes(b"cut off")
        with pytest.raises(IntegrityError, match="cannot be used") as caught:
            made(folder)
        subprocess.run(caught.value.fix.partition(": ")[2], shell=True, check=True)
        assert not folder.exists()
        assert len(list(tmp_path.glob("the first run.aside*/checkpoint.pt"))) == other + 1
    assert made(folder).steps == 0


def test_a_figure_that_an_earlier_version_did_not_log_begins_with_the_next_epoch(tmp_path: Path) -> None:
    """Its sum over the rest of an epoch, divided by all of its steps, would be no mean."""

    def measured(one: Learner, **figures: float) -> None:
        values = {name: torch.tensor(value) for name, value in figures.items()}
        one.step(VIEWS, lambda logits: logits.square().mean(), lambda logits: values)

    earlier = made(tmp_path, epochs=2)
    measured(earlier, agreement=1.0)
    earlier.suspend()
    now = made(tmp_path, epochs=2)
    measured(now, agreement=3.0, correlation=0.5)
    now.end_epoch({})
    measured(now, agreement=3.0, correlation=0.5)
    now.end_epoch({"test_top1": 1.0})
    assert [(row["agreement"], row.get("correlation")) for row in now.rows] == [(2.0, None), (3.0, 0.5)]
    assert all("train_loss" in row for row in now.rows)
