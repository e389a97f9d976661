"""Protects who is charged for a GPU's time: work is timed where it is done, however far ahead of it the host is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache.system.energy import Spent
from kdcache.training import timing
from kdcache.training.learner import Learner
from kdcache.training.lockstep import charge
from kdcache.training.timing import DeviceTimer, HostTimer, timer_of
from tests.test_learner import VIEWS, Tiny, made


class Queue:
    """A device that works through a queue. Its host's clock moves by what the host does, and by what it waits for."""

    def __init__(self) -> None:
        self.host = self.free = 0.0  # seconds: now, and when the queue will be empty
        self.waits = self.events = 0

    def work(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def wait(self, until: float) -> None:
        self.waits += self.host < until
        self.host = max(self.host, until)

    def event(self) -> "Moment":
        self.events += 1
        return Moment(self)


class Moment:
    def __init__(self, queue: Queue) -> None:
        self._queue, self.at = queue, 0.0

    def record(self) -> None:
        self.at = max(self._queue.host, self._queue.free)

    def query(self) -> bool:
        return self.at <= self._queue.host

    def synchronize(self) -> None:
        self._queue.wait(self.at)

    def elapsed_time(self, end: "Moment") -> float:
        assert end.query(), "a time is asked for that is not over"
        return 1000 * (end.at - self.at)


class Slow(Tiny):
    """A model that takes a device so long."""

    def __init__(self, queue: Queue, seconds: float) -> None:
        super().__init__()
        self._queue, self._seconds = queue, seconds

    def forward(self, x: Tensor) -> Tensor:
        self._queue.work(self._seconds)
        return super().forward(x)


def step(one: Learner) -> None:
    one.step(VIEWS, lambda logits: logits.square().mean(), lambda logits: {})


def test_each_learner_is_charged_for_its_own_work_on_a_device_that_is_behind(tmp_path: Path) -> None:
    queue = Queue()
    seconds = {"big": 0.060, "small": 0.002}
    learners = {
        name: made(tmp_path / name, model=Slow(queue, each), timer=DeviceTimer(queue.event)) for name, each in seconds.items()
    }
    for _ in range(15):
        for one in learners.values():
            step(one)
            queue.host += 0.001
    assert queue.waits == 0, "a step waits for nothing"
    found = {name: one.uncharged for name, one in learners.items()}
    assert found == pytest.approx({"big": 0.9, "small": 0.03})
    charge(list(learners.values()), Spent(31.0, None, None))
    for one in learners.values():
        one.end_epoch({})
    assert [one.last["seconds"] for one in learners.values()] == pytest.approx([0.9, 0.03])
    assert [one.last["device_seconds"] for one in learners.values()] == pytest.approx([30.0, 1.0])


def test_a_device_that_keeps_up_is_timed_with_few_events(tmp_path: Path) -> None:
    queue = Queue()
    one = made(tmp_path, model=Slow(queue, 0.001), timer=DeviceTimer(queue.event))
    for _ in range(20):
        step(one)
        queue.host += 0.01
    assert queue.events == 2
    assert one.uncharged == pytest.approx(0.02)
    assert one.uncharged == pytest.approx(0.02)  # asking counts nothing twice


def test_a_host_is_never_further_ahead_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_PENDING", 8)
    queue = Queue()
    timer = DeviceTimer(queue.event)
    for _ in range(100):
        with timer.running():
            queue.work(1.0)
    assert queue.events <= 2 * 9
    assert timer.read() == pytest.approx(100.0)
    assert timer.read() == 0.0


def test_a_cpu_is_timed_by_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((1.0, 3.0, 10.0, 10.5))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    timer = timer_of(torch.device("cpu"))
    assert isinstance(timer, HostTimer)
    for _ in range(2):
        with timer.running():
            pass
    assert timer.read() == 2.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_work_is_charged_to_whoever_gave_it(tmp_path: Path) -> None:
    """The big learner has 20 times the small one's work, and the host does not wait for either."""
    gpu = torch.device("cuda")

    class Busy(Tiny):
        def __init__(self, turns: int) -> None:
            super().__init__()
            self.turns, self.much = turns, torch.ones(2048, 2048, device=gpu) / 2048

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.turns):
                self.much = self.much @ self.much
            return super().forward(x)

    learners = [made(tmp_path / str(turns), gpu, model=Busy(turns), amp=False) for turns in (40, 2)]
    views = VIEWS.to(gpu)
    for turn in range(15):
        if turn == 5:  # the first steps load libraries
            for one in learners:
                assert one.uncharged > 0
            charge(learners, Spent(1.0))
        for one in learners:
            one.step(views, lambda logits: logits.square().mean(), lambda logits: {})
    big, small = (one.uncharged for one in learners)
    assert 5 < big / small < 25
