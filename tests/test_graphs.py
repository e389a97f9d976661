"""Protects steps that are replayed as graphs: bit for bit what a step does, or off, with the reason and nothing lost.

Without a GPU, stand-ins take the place of what captures. What they do right or wrong is found as it would be there.
"""

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from kdcache.methods import build
from kdcache.students.records import record_graph
from kdcache.targets import Targets
from kdcache.training import graphs, optimizers
from kdcache.training.devices import seeded
from kdcache.training.graphs import GraphedStep, Lane, Lanes, Parts
from kdcache.training.learner import Learner
from tests.test_learner import CPU, made

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Again:
    """A captured piece of work that is simply done again; its result is where it was."""

    def __init__(self, work: Callable[[], Tensor], result: Tensor) -> None:
        self.work, self.result = work, result

    def replay(self) -> None:
        self.result.copy_(self.work())


class StandIn:
    """A lane without a stream."""

    captures = replays = discarded = 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[], Tensor]) -> tuple[Again, Tensor]:
        self.captures += 1

        def counted() -> Tensor:
            self.replays += 1
            return self.again(work)

        result = work().clone()
        return Again(counted, result), result

    def again(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def discard(self, graph: object) -> None:
        self.discarded += graph is not None

    def reached(self) -> str:
        return "reached"

    def wait_for(self, event: object) -> None:
        assert event == "reached"


class Refusing(StandIn):
    def capture(self, work: Callable[[], Tensor]) -> tuple[Again, Tensor]:
        work()  # some of it may be done, and gradients be left
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        finally:  # as the end of a capture raises
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


class Net(nn.Module):
    """Batch norms, whose buffers change, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class HostRandom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + random.random())


class Fresh(Net):
    """Puts a new tensor in the place of a buffer in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return super().forward(x)


class Unsteady(Net):
    """Two runs of one step give other bits, as sums of no fixed order do."""

    turns = 0

    def forward(self, x: Tensor) -> Tensor:
        Unsteady.turns += 1
        return super().forward(x) * (1 + 1e-3 * (Unsteady.turns % 7))


@pytest.fixture(autouse=True)
def a_cpu_that_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "FUSED_ON", {"cpu", "cuda"})


def student(folder: Path, model: nn.Module | None = None, device: torch.device = CPU, **how: Any) -> Learner:
    with seeded(1):
        model = Net() if model is None else model
    return made(folder, device, model=model, **({"epochs": 2, "model_ema_decay": 0.9, "amp": False} | how))


def batch(number: int, device: torch.device = CPU, rows: int = 6) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(number)
    views = torch.randint(0, 256, (rows, 3, 4, 4), dtype=torch.uint8, generator=generator)
    logits = torch.randn(rows, 5, generator=generator)
    label = torch.randint(0, 5, (rows,), generator=generator)
    return views.to(device), Targets(logits, 4.0, label, label, torch.rand(rows, generator=generator)).to(device)


def train(one: Learner, steps: int, method: str = "kd", begin: int = 0, **options: Any) -> None:
    loss = build(method, **options)
    state = loss.new_state().to(one.device)
    for number in range(begin, begin + steps):
        views, targets = batch(number, one.device)
        state.epoch = one.epoch + 1
        one.step(
            views,
            lambda z, t: loss(z, t, state),
            lambda z, t: {"top": z.amax(dim=1).mean()},
            (targets,),
            min(state.epoch, loss.ramp_epochs),
        )


def everything(one: Learner) -> list[Tensor]:
    return [tensor.clone() for tensor in one._changing()]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return graphs._same(ones, others)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "momentum"])
def test_replayed_steps_are_the_steps_bit_for_bit(tmp_path: Path, opt: str) -> None:
    lane = StandIn()
    graphed = student(tmp_path / "graphed", opt=opt, lanes=Lanes([lane]))  # type: ignore[list-item]
    plain = student(tmp_path / "plain", opt=opt)
    for one in (graphed, plain):
        train(one, 10)
        one.end_epoch({"test_top1": 1.0})
        train(one, 10, begin=10)
        one.end_epoch({"test_top1": 2.0})
    assert (graphed.graph, plain.graph, lane.captures, lane.replays) == ("on", "", 1, 20 - graphs.WARM_UP)
    expected = everything(plain)  # without sums of figures, which begin anew
    assert equal(everything(graphed)[: len(expected)], expected)
    timeless = [[{**row, "seconds": 0} for row in one.rows] for one in (graphed, plain)]
    assert timeless[0] == timeless[1]
    for name in ("last.safetensors", "best.safetensors", "ema.safetensors", "logit_moments.json"):
        assert (tmp_path / "graphed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_suspended_student_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, cut = (student(tmp_path / name, lanes=Lanes([StandIn()])) for name in ("whole", "cut"))  # type: ignore[list-item]
    train(whole, 14)
    train(cut, 8)
    cut.suspend()
    cut = student(tmp_path / "cut", lanes=Lanes([StandIn()]))  # type: ignore[list-item]
    assert cut.graph == ""
    train(cut, 6, begin=8)
    assert cut.graph == "on"
    assert equal(everything(cut), everything(whole))


class Forgetting(StandIn):
    """Replays leave out the step that the optimiser is at."""

    def again(self, work: Callable[[], Tensor]) -> Tensor:
        steps = [state["step"] for state in self.learner.optimizer.state.values()]
        before = [step.clone() for step in steps]
        result = work()
        for step, value in zip(steps, before, strict=True):
            step.copy_(value)
        return result

    learner: Learner


class OffByABit(StandIn):
    """Replays change the last bit of one weight."""

    def again(self, work: Callable[[], Tensor]) -> Tensor:
        result = work()
        weight = self.learner.parameters[-1].detach()
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
        return result

    learner: Learner


class Frozen(StandIn):
    """Replays see the batch that was captured, as where a loss has a tensor that is not among those given."""

    def capture(self, work: Callable[[], Tensor]) -> tuple[Again, Tensor]:
        assert self.learner._graphed is not None
        held = graphs._tensors(self.learner._graphed._held)
        self.seen = list(zip(held, [tensor.clone() for tensor in held], strict=True))
        return super().capture(work)

    def again(self, work: Callable[[], Tensor]) -> Tensor:
        present = [tensor.clone() for tensor, _ in self.seen]
        for tensor, value in self.seen:
            tensor.copy_(value)
        result = work()
        for (tensor, _), value in zip(self.seen, present, strict=True):
            tensor.copy_(value)
        return result

    learner: Learner


@pytest.mark.parametrize("wrong", [Forgetting, OffByABit, Frozen])
def test_a_graph_of_other_bits_is_noticed_and_changes_nothing(tmp_path: Path, wrong: Any) -> None:
    lane = wrong()
    graphed, plain = student(tmp_path / "graphed", lanes=Lanes([lane])), student(tmp_path / "plain")
    lane.learner = graphed
    for one in (graphed, plain):
        train(one, 12)
    assert graphed.graph == "off (a replay of the same step gives other bits)"
    assert lane.captures == 1
    assert equal(everything(graphed), everything(plain))


@pytest.mark.parametrize(
    ("lane", "model", "reason"),
    [
        (Refusing, Net, "CUDA error: operation not permitted when stream is capturing"),
        (StandIn, HostRandom, "the model draws random numbers on the host"),
        (StandIn, Fresh, "a step puts new tensors in the place of old ones"),
        (StandIn, Unsteady, "a second run of the same step gives other bits"),
    ],
)
def test_what_cannot_be_captured_goes_on_as_it_was(tmp_path: Path, lane: Any, model: type[nn.Module], reason: str) -> None:
    found = []
    for name in ("graphed", "plain"):
        random.seed(5)
        Unsteady.turns = 0
        with seeded(1):
            made_model = model()
        one = student(tmp_path / name, made_model, **({"lanes": Lanes([lane()])} if name == "graphed" else {}))
        train(one, graphs.WARM_UP if model is Unsteady else 9)
        found.append(everything(one))
        if name == "graphed":
            train(one, 9 - one.steps, begin=one.steps)
            assert one.graph == f"off ({reason})"
            assert all(parameter.grad is None for parameter in one.parameters)
    assert equal(*found)


class Counting(Net):
    """Does something else from its 30th call on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1.0 if self.calls < 30 else 2.0)


class Recorded(StandIn):
    """Replays do what the model did when it was captured, as a graph does."""

    def capture(self, work: Callable[[], Tensor]) -> tuple[Again, Tensor]:
        self.calls = self.model.calls
        return super().capture(work)

    def again(self, work: Callable[[], Tensor]) -> Tensor:
        present, self.model.calls = self.model.calls, self.calls
        result = work()
        self.model.calls = present
        return result

    model: Counting


def test_code_that_counts_its_calls_is_found_out(tmp_path: Path) -> None:
    lane = Recorded()
    with seeded(1):
        lane.model = Counting()
    one = student(tmp_path, lane.model, lanes=Lanes([lane]))  # type: ignore[list-item]
    lane.model.calls = 20  # a replay calls no Python
    train(one, 8)
    assert one.graph == "on"
    lane.model.calls = 29
    train(one, graphs.PAUSE * 5 - 8, begin=8)
    assert one.graph == "off (a replay of the same step gives other bits, found at step 20 of this session)"


def test_random_numbers_of_a_host_make_dropout_impossible_to_capture(tmp_path: Path) -> None:
    one = made(tmp_path, lanes=Lanes([StandIn()]))  # type: ignore[list-item]
    for _ in range(6):
        views, targets = batch(0)
        one.step(views, lambda z, t: z.square().mean(), lambda z, t: {}, (targets,))
    assert "random numbers on the host" in one.graph


def test_random_numbers_of_a_device_go_on_and_share_a_lane() -> None:
    """A device's random state belongs to what is compared, and its drawers follow one another."""
    state, drawn = torch.zeros(1, dtype=torch.uint8), torch.zeros(1)
    host = torch.zeros(1, dtype=torch.uint8)

    def work(given: list[Tensor]) -> Tensor:
        state.add_(1)
        drawn.add_(state.float() * given[0])
        return drawn.clone()

    def set_random(states: list[Tensor]) -> None:
        state.copy_(states[1])

    results: list[float] = []
    nothing = contextlib.nullcontext
    parts = Parts(
        tensors=lambda: [drawn],
        random=lambda: [host.clone(), state.clone()],
        set_random=set_random,
        forget=lambda: None,
        capturable=nothing,
        timed=nothing,
        before=lambda: None,
        after=lambda result: results.append(result.item()),
    )
    lanes = [StandIn(), StandIn()]
    given = Lanes(lanes)  # type: ignore[arg-type]
    next(given)
    graphed = GraphedStep(given, parts)
    for number in range(8):
        graphed([torch.tensor(float(number))], work)
    assert results == np.cumsum([(number + 1) * number for number in range(8)]).tolist()
    assert graphed.state == "on"
    assert [lane.captures for lane in lanes] == [1, 0]


def test_a_loss_that_grows_is_captured_anew_until_it_is_grown(tmp_path: Path) -> None:
    lane = StandIn()
    graphed, plain = (
        student(tmp_path / name, epochs=4, **({"lanes": Lanes([lane])} if name == "graphed" else {}))
        for name in ("graphed", "plain")
    )
    for one in (graphed, plain):
        for epoch in range(4):
            train(one, 8, "dkd", begin=8 * epoch, warmup_epochs=2)
            one.end_epoch({"test_top1": 1.0})
    assert (graphed.graph, lane.captures) == ("on", 2)
    assert (tmp_path / "graphed" / "last.safetensors").read_bytes() == (tmp_path / "plain" / "last.safetensors").read_bytes()


def test_a_batch_of_another_size_is_a_step_as_ever(tmp_path: Path) -> None:
    one = student(tmp_path, lanes=Lanes([StandIn()]))  # type: ignore[list-item]
    train(one, 8)
    views, targets = batch(1, rows=3)
    one.step(views, lambda z, t: build("kd")(z, t), lambda z, t: {"top": z.amax(dim=1).mean()}, (targets,), 0)
    train(one, 2)
    assert (one.graph, one.steps) == ("on", 11)


@pytest.mark.parametrize("opt", ["lion", "lookahead_adamw"])
def test_an_optimiser_that_takes_its_rate_from_the_host_has_no_graph(tmp_path: Path, opt: str) -> None:
    one = student(tmp_path, opt=opt, lanes=Lanes([StandIn()]))  # type: ignore[list-item]
    train(one, 6)
    assert one.graph == f"off (--opt {opt} takes its learning rate from the host)"


def test_no_memory_for_a_proof_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    monkeypatch.setattr(graphs, "_copies", full)
    graphed, plain = student(tmp_path / "graphed", lanes=Lanes([StandIn()])), student(tmp_path / "plain")  # type: ignore[list-item]
    for one in (graphed, plain):
        train(one, 7)
    assert graphed.graph.startswith("off (CUDA out of memory")
    assert equal(everything(graphed), everything(plain))


def test_a_pass_that_memory_lacked_for_is_gone_when_the_step_is_done_without_a_proof(tmp_path: Path) -> None:
    graphed, plain = student(tmp_path / "graphed", lanes=Lanes([StandIn()])), student(tmp_path / "plain")  # type: ignore[list-item]
    work, passes = graphed._work, 0
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def short(*arguments: Any) -> Tensor:
        nonlocal passes
        passes += 1
        alive.extend(each() is not None for each in held)
        activations = torch.zeros(3)
        if passes == 4:  # in the first proof
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return work(*arguments)

    graphed._work = short  # type: ignore[method-assign]
    for one in (graphed, plain):
        train(one, 7)
    assert alive[:1] == [False]
    assert graphed.graph.startswith("off (CUDA out of memory")
    assert equal(everything(graphed), everything(plain))


def test_a_graph_that_is_given_up_keeps_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(StandIn):
        def again(self, work: Callable[[], Tensor]) -> Tensor:
            return work() + 1

    lane = Wrong()
    train(student(tmp_path / "run", lanes=Lanes([lane])), 7)  # type: ignore[list-item]
    assert lane.discarded == 1
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    pools = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    real = Lane(CPU)
    real._first = kept = Again(lambda: torch.zeros(1), torch.zeros(1))
    real.discard(Again(lambda: torch.zeros(1), torch.zeros(1)))  # another one: the pool has to stay
    assert (real._first, real._pool) == (kept, 0)
    real.discard(kept)
    assert (real._first, real._pool) == (None, 1)


def test_the_first_batch_may_be_of_another_size_than_the_others(tmp_path: Path) -> None:
    graphed, plain = student(tmp_path / "graphed", lanes=Lanes([StandIn()])), student(tmp_path / "plain")  # type: ignore[list-item]
    loss = build("kd")
    for one in (graphed, plain):
        views, targets = batch(0, rows=4)
        one.step(views, loss, lambda z, t: {"top": z.amax(dim=1).mean()}, (targets,), 0)
        train(one, 7, begin=1)
    assert graphed.graph == "on"
    assert equal(everything(graphed), everything(plain))


def test_args_record_it_for_the_session_that_it_is_of(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("tau: 1\n")
    record_graph(tmp_path, "on")
    assert yaml.safe_load(file.read_text()) == {"tau": 1, "graph": "on"}
    file.write_text("graph: 'on'\nresumed: [{device: cuda}]\n")
    record_graph(tmp_path, "off (because)")
    assert yaml.safe_load(file.read_text()) == {"graph": "on", "resumed": [{"device": "cuda", "graph": "off (because)"}]}


# ---------------------------------------------------------------- on a GPU


class Dropping(Net):
    """Draws random numbers on its device."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.2, self.training)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("opt", ["adamw", "sgd"])
@pytest.mark.parametrize("model", [Net, Dropping])
def test_a_gpu_replays_the_steps_bit_for_bit(tmp_path: Path, model: type[nn.Module], opt: str, amp: bool) -> None:
    gpu = torch.device("cuda")
    made_of = []
    for name in ("graphed", "plain"):
        with seeded(1):
            net = model()
        how = {"lanes": Lanes.of(gpu, 1)} if name == "graphed" else {}
        made_of.append(student(tmp_path / name, net, gpu, opt=opt, amp=amp, **how))
    graphed, plain = made_of
    for one in made_of:
        for epoch in range(2):
            train(one, 12, begin=12 * epoch)
            one.end_epoch({"test_top1": float(epoch)})
    assert graphed.graph == "on", graphed.graph
    for name in ("last.safetensors", "best.safetensors", "ema.safetensors", "logit_moments.json"):
        assert (tmp_path / "graphed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    timeless = [[{**row, "seconds": 0} for row in one.rows] for one in (graphed, plain)]
    assert timeless[0] == timeless[1]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("lanes", [1, 3])
def test_students_side_by_side_on_a_gpu_become_what_they_become_alone(tmp_path: Path, lanes: int) -> None:
    gpu = torch.device("cuda")
    kinds = [Net, Dropping, Net, Dropping, Net]

    def all_of(where: str, shared: Lanes | None) -> list[Learner]:
        made_here = []
        for number, kind in enumerate(kinds):
            with seeded(number):
                net = kind()
            how = {} if shared is None else {"lanes": shared}
            made_here.append(student(tmp_path / where / str(number), net, gpu, lr=0.001 * (number + 1), **how))
        return made_here

    together, alone = all_of("together", Lanes.of(gpu, lanes)), all_of("alone", None)
    for number in range(20):
        for one in together:
            train(one, 1, begin=number)
    for one in alone:
        train(one, 20)
    assert [one.graph for one in together] == ["on"] * len(kinds)
    for one, other in zip(together, alone, strict=True):
        views, _ = batch(99, gpu)
        assert torch.equal(one.predict(views), other.predict(views))  # which waits for the lane
        assert equal(everything(one), everything(other))


@pytest.mark.gpu
@GPU
def test_a_step_that_reads_its_loss_is_not_captured_and_goes_on(tmp_path: Path) -> None:
    gpu = torch.device("cuda")

    class Reading(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if x.mean().item() > -9 else 2.0)

    with seeded(1):
        one = student(tmp_path, Reading(), gpu, lanes=Lanes.of(gpu, 1))
    train(one, 9)
    assert one.graph.startswith("off (")
    assert all(torch.isfinite(tensor).all() for tensor in everything(one) if tensor.is_floating_point())
    with seeded(1):
        other = student(tmp_path / "after", device=gpu, lanes=Lanes.of(gpu, 1))  # the GPU is as usable as before
    train(other, 9)
    assert other.graph == "on"
