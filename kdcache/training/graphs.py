"""A learner's step, captured once in a CUDA graph and replayed: one launch in the place of some thousand.

A replay does what was captured, on the tensors that it was captured with. So what a step is given is copied into tensors that
stay, and a graph is used only where it has been found to give the same bits as the step itself: weights, optimiser, random
numbers and figures. Where it does not, or cannot be captured, the step goes on as it was, and `state` says why.
"""

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["GraphedStep", "Lane", "Lanes", "Parts"]

T = TypeVar("T")

WARM_UP = 3  # steps in which libraries choose their kernels and the optimiser makes its state, as torch's notes on graphs want
PROOFS = 2  # steps that are done both ways at first: on the batch that the graph is captured with, and on another one
PAUSE = 4  # times as many steps until the next one is: code that counts its calls may change what it does


class Replayable(Protocol):
    """A captured piece of work, such as `torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...


class Lane:
    """A stream of a GPU, and the memory of the graphs that are replayed in it, one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._first: Replayable | None = None  # while one graph is there, its pool is

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Work inside is done in this stream, after all that the current stream has been given."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def capture(self, work: Callable[[], T]) -> tuple[Replayable, T]:
        """`work` as a graph, with the tensors that it will have its results in. Nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on: they write checkpoints and read energy counters.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        except BaseException:
            if self._first is None:
                self._pool = torch.cuda.graph_pool_handle()
            raise
        self._first = self._first or graph
        return graph, result

    def discard(self, graph: Replayable | None) -> None:
        """Keep no memory for a graph that is given up."""
        if graph is not None and graph is self._first:
            self._first, self._pool = None, torch.cuda.graph_pool_handle()

    def reached(self) -> Any:
        """An event after what this stream has been given so far."""
        return self._stream.record_event()

    def wait_for(self, event: Any) -> None:
        """The current stream goes on when `event` has happened."""
        torch.cuda.current_stream(self._device).wait_event(event)


class Lanes:
    """Streams for learners that step side by side. Each has its own memory for a step, as their steps may overlap."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes, self._given = lanes, 0

    @classmethod
    def of(cls, device: torch.device, count: int) -> "Lanes":
        return cls([Lane(device) for _ in range(count)])

    def __next__(self) -> Lane:
        self._given += 1
        return self._lanes[(self._given - 1) % len(self._lanes)]

    @property
    def of_the_random(self) -> Lane:
        """For all steps that draw random numbers: before torch 2.13, graphs have one place for a GPU's seed between them."""
        return self._lanes[0]


@dataclass(frozen=True)
class Parts:
    """What of a learner a step changes, and what belongs around it."""

    tensors: Callable[[], list[Tensor]]  # weights, buffers, states of optimisers, averages, sums of figures: always the same ones
    random: Callable[[], list[Tensor]]  # the host's random state, and then the device's
    set_random: Callable[[list[Tensor]], None]
    forget: Callable[[], None]  # gradients, which a step that failed may have left
    capturable: Callable[[], AbstractContextManager[None]]
    timed: Callable[[], AbstractContextManager[None]]
    before: Callable[[], None]  # what is done anew in each step: learning rates
    after: Callable[[Tensor], None]  # with the result, which the next replay overwrites


class GraphedStep:
    """Does a learner's steps, by replay from when it may. `state` is "" until it is known, then "on" or "off (reason)"."""

    def __init__(self, lanes: Lanes, parts: Parts) -> None:
        self._lanes, self._lane, self._parts = lanes, next(lanes), parts
        self.state = ""
        self._steps = self._proofs = self._due = 0
        self._held: Any = None
        self._done: Any = None
        self._graph: Replayable | None = None
        self._output: Tensor | None = None
        self._stage: Hashable = None

    def __call__(self, given: T, work: Callable[[T], Tensor], stage: Hashable = None) -> None:
        """Do `work(given)`, after `Parts.before`, and give its result to `Parts.after`.

        `work` may depend on tensors in `given`, on those of `Parts`, and on `stage`, and on nothing else that changes.
        """
        self.join()
        if self.state.startswith("off") or not self._hold(given):
            with self._parts.timed():
                self._parts.before()
                self._parts.after(work(given))
            return
        lane, self._steps = self._lane, self._steps + 1
        with lane.entered(), self._parts.timed():
            self._parts.before()
            if self._steps <= WARM_UP:
                result = self._warmed_up(work)
            elif self._graph is not None and self._output is not None and self._may_replay(stage):
                self._graph.replay()
                result = self._output
            else:
                result = self._proven(work, stage)
            self._parts.after(result)
        self._done = lane.reached()

    def _may_replay(self, stage: Hashable) -> bool:
        return self._stage == stage and self._proofs == PROOFS and self._steps < self._due

    def join(self) -> None:
        """The current stream goes on when the steps so far are done: before anybody else uses what they change."""
        if self._done is not None:
            self._lane.wait_for(self._done)

    def _hold(self, given: Any) -> bool:
        """Copy what is given to where a graph reads it; false for a batch of another size than those before."""
        if self._held is None:
            self._held = _mapped(given, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
            return True
        ours, theirs = list(_tensors(self._held)), list(_tensors(given))
        if [(each.shape, each.dtype) for each in ours] != [(each.shape, each.dtype) for each in theirs]:
            if self._graph is None:  # an odd batch at the beginning; another kind may be the usual one
                self._held, self._steps = None, 0
                return self._hold(given)
            return False
        torch._foreach_copy_(ours, theirs, non_blocking=True)
        return True

    def _warmed_up(self, work: Callable[[Any], Tensor]) -> Tensor:
        drawn = self._parts.random()
        result = work(self._held)
        if self._steps == WARM_UP and not _same(drawn, self._parts.random()):
            self._lane = self._lanes.of_the_random  # from the next step on
        return result

    def _proven(self, work: Callable[[Any], Tensor], stage: Hashable) -> Tensor:
        """One step both ways, which counts once. What is left is what `work` does, whatever a replay did."""
        parts, held = self._parts, self._held
        tensors = parts.tensors()
        capture = self._stage != stage or self._graph is None
        expected: list[Tensor] | None = None
        drawn, drawn_elsewhere, lacking = parts.random(), _random_elsewhere(), ""
        # Memory that lacks is seen to outside of the handlers: an error refers to all that the failed pass held.
        try:
            start = _copies(tensors)
        except RuntimeError as error:
            lacking = _first_line(error)
        if lacking:
            self._off(lacking)
            return work(held)
        try:
            result = work(held)
        except torch.OutOfMemoryError as error:  # which the copies have brought about
            lacking = _first_line(error)
        if lacking:
            parts.forget()
            torch._foreach_copy_(tensors, start)
            parts.set_random(drawn)
            del start
            self._off(lacking)
            return work(held)
        drawn_after = parts.random()

        def back_to(values: Sequence[Tensor], states: list[Tensor]) -> None:
            torch._foreach_copy_(tensors, list(values[: len(tensors)]))
            parts.set_random(states)

        try:
            if not _same(drawn[:1], drawn_after[:1]) or drawn_elsewhere != _random_elsewhere():
                raise _UnequalError("the model draws random numbers on the host")
            if [each.data_ptr() for each in parts.tensors()] != [each.data_ptr() for each in tensors]:
                raise _UnequalError("a step puts new tensors in the place of old ones")
            expected = _copies([*tensors, result])
            back_to(start, drawn)
            if capture:
                self._capture(lambda: work(held), stage)
                back_to(start, drawn)  # only a stand-in computes anything in a capture
            assert self._graph is not None
            assert self._output is not None
            self._graph.replay()
            if not _same(expected, [*tensors, self._output]) or not _same(drawn_after, parts.random()):
                back_to(start, drawn)
                steady = _same(expected, [*tensors, work(held)])
                since = f", found at step {self._steps} of this session" if self.state == "on" else ""
                raise _UnequalError(f"{'a replay' if steady else 'a second run'} of the same step gives other bits{since}")
        except Exception as error:  # each library has its own errors in a capture
            parts.forget()
            self._off(str(error) if isinstance(error, _UnequalError) else _first_line(error))
            if expected is None:
                return result
            back_to(expected, drawn_after)
            return expected[-1]
        self._proofs = min(self._proofs + 1, PROOFS)
        if self._proofs == PROOFS:
            self.state, self._due = "on", PAUSE * self._steps
        return self._output

    def _capture(self, work: Callable[[], Tensor], stage: Hashable) -> None:
        with self._parts.capturable():
            self._graph, self._output = self._lane.capture(work)
        self._stage, self._proofs = stage, 0

    def _off(self, reason: str) -> None:
        self.state = f"off ({reason})"
        self._lane.discard(self._graph)
        self._graph = self._output = None


class _UnequalError(Exception):
    """A replay would not do what the step does."""


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with its tensors changed, and those of its lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value)}
        return replace(value, **{name: _mapped(part, change) for name, part in parts.items()})
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


@torch.no_grad()
def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def _same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all bits are equal. The host waits for them."""
    return len(ones) == len(others) and all(torch.equal(_bits(a), _bits(b)) for a, b in zip(ones, others, strict=True))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _random_elsewhere() -> tuple[Any, ...]:
    """The states of random numbers that are not torch's."""
    name, keys, place, *_ = np.random.get_state()
    return random.getstate(), name, bytes(keys), place  # type: ignore[arg-type]


def _first_line(error: BaseException) -> str:
    """What went wrong first: the end of a capture has an error of its own, which says only that there was another."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
