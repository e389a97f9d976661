"""Protects checkpoints that a thread writes: they hold one moment, none is lost, and what goes wrong is said."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.errors import KdcacheError
from kdcache.training import learner, writer
from kdcache.training.checkpoint import read_checkpoint
from kdcache.training.config import TrainConfig
from kdcache.training.devices import computes_in_bf16
from kdcache.training.writer import Writer
from tests.test_learner import CPU, made, step


class Copied:
    """An event after copies from a device: `happen` makes it happen."""

    def __init__(self, *, happened: bool) -> None:
        self._gate = threading.Event()
        if happened:
            self._gate.set()

    def happen(self) -> None:
        self._gate.set()

    def synchronize(self) -> None:
        assert self._gate.wait(10)


class AheadWriter(Writer):
    """Writes in a thread, as from a GPU. `events` are those of its copies."""

    events: list[Copied]
    happened = True

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device)
        self._ahead, self.events = True, []

    def _copied(self) -> Copied:
        self.events.append(Copied(happened=self.happened))
        return self.events[-1]


class LateWriter(AheadWriter):
    happened = False


def state_of(number: float) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    tensor = torch.full((3,), number)
    return {"steps": number, "sums": [tensor]}, {"last": {"w": tensor}}


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    one, (state, weights), rows = LateWriter(tmp_path, CPU), state_of(1.0), [{"epoch": 0}]
    one.write(state, weights, None, rows)
    weights["last"]["w"].fill_(2.0)  # the next step
    rows[0]["epoch"] = 9
    assert read_checkpoint(tmp_path) is None
    one.events[0].happen()
    one.wait()
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found["sums"][0].tolist() == found["weights"]["w"].tolist() == [1.0] * 3
    assert '"epoch": 0' in (tmp_path / "metrics.jsonl").read_text()


def test_a_checkpoint_waits_for_the_last_one(tmp_path: Path) -> None:
    one = LateWriter(tmp_path, CPU)
    one.write(*state_of(1.0), None, [])
    threading.Timer(0.05, one.events[0].happen).start()
    one.write(*state_of(2.0), None, [])
    assert (read_checkpoint(tmp_path) or {})["steps"] == 1.0
    one.events[1].happen()
    one.wait()
    assert (read_checkpoint(tmp_path) or {})["steps"] == 2.0


def test_an_error_in_the_thread_is_the_learners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    one = AheadWriter(tmp_path, CPU)
    with monkeypatch.context() as patched:
        patched.setattr("kdcache.system.files.os.fsync", full)
        one.write(*state_of(1.0), None, [])
        with pytest.raises(KdcacheError):
            one.wait()
    one.wait()  # it is said once
    assert writer._room._taken == 0


def test_copies_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PENDING", 50)  # bytes; a checkpoint has 24
    writers = [LateWriter(tmp_path / str(number), CPU) for number in range(3)]
    begun: list[int] = []

    def write_all() -> None:
        for number, one in enumerate(writers):
            one.write(*state_of(1.0), None, [])
            begun.append(number)

    thread = threading.Thread(target=write_all)
    thread.start()
    thread.join(0.2)
    assert begun == [0, 1], "the third one waits for room"
    writers[0].events[0].happen()
    thread.join(10)
    assert begun == [0, 1, 2]
    for one in writers[1:]:
        one.events[0].happen()
        one.wait()


def test_training_with_a_thread_ends_as_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(folder: Path) -> None:
        for number in range(4):
            one = made(folder, epochs=2, model_ema_decay=0.5)
            for _ in range(25):
                step(one)
            if number % 2:
                one.end_epoch({"test_top1": 10.0 * number})
            if number == 3:
                assert one.status == "complete"
            one.suspend()

    train(tmp_path / "at once")
    monkeypatch.setattr(learner, "Writer", AheadWriter)
    train(tmp_path / "ahead")
    names = {file.name for file in (tmp_path / "at once").iterdir()}
    assert names == {file.name for file in (tmp_path / "ahead").iterdir()} >= {"best.safetensors", "ema.safetensors"}
    for name in names:
        if name.endswith(".safetensors"):
            assert (tmp_path / "at once" / name).read_bytes() == (tmp_path / "ahead" / name).read_bytes()


# ---------------------------------------------------------------- bf16


def test_a_cpu_trains_in_float32_unless_told_otherwise(tmp_path: Path) -> None:
    assert not computes_in_bf16(CPU)
    assert [made(tmp_path / str(amp), amp=amp).amp for amp in (None, True, False)] == [False, True, False]


def test_an_identity_says_what_was_asked_for() -> None:
    """Wherever a run is planned, its folder is the same; and those of before are found."""
    identities = [TrainConfig(epochs=3, amp=amp).identity() for amp in (None, True, False)]
    assert identities == [{"epochs": 3}, {"epochs": 3, "amp": True}, {"epochs": 3, "amp": False}]


@pytest.mark.parametrize("recorded", [True, False, None])
def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool | None
) -> None:
    """None: by a version that had bf16 only where it was asked for."""
    monkeypatch.setattr(learner, "computes_in_bf16", lambda device: bool(recorded))
    first = made(tmp_path)
    step(first)
    first.suspend()
    if recorded is None:
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        del state["amp"]
        torch.save(state, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(learner, "computes_in_bf16", lambda device: not recorded)
    again = made(tmp_path)
    assert again.amp is bool(recorded)
    assert f"begun in {'bf16' if recorded else 'float32'}" in " ".join(again.notes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_checkpoint_is_of_one_moment(tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    one = made(tmp_path, gpu, amp=False)
    for _ in range(3):
        step(one)
    expected = {name: value.cpu().clone() for name, value in one.model.state_dict().items()}
    one._save()
    for _ in range(20):
        step(one)
    one._writer.wait()
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found["steps"] == 3
    assert all(torch.equal(found["weights"][name], value) for name, value in expected.items())
    assert all(isinstance(group["lr"], float) for group in found["optimizer"]["param_groups"])
    assert all(value.device == CPU for state in found["optimizer"]["state"].values() for value in state.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_of_ampere_or_later_trains_in_bf16(tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    native = bool(torch.version.hip) or torch.cuda.get_device_properties(gpu).major >= 8
    assert made(tmp_path, gpu).amp is computes_in_bf16(gpu) is native
