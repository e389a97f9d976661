"""Who writes a learner's checkpoints: the learner itself, or, so that a GPU is not left waiting for a disk, a thread."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.training.checkpoint import on_host, write_checkpoint

__all__ = ["Writer"]

PENDING = 1 << 30  # bytes of all learners' checkpoints that may lie in host memory until they are written


class Writer:
    """Writes the checkpoints of the learner in `folder`.

    From a GPU they are copied into pinned memory in the order of its work, and one thread writes those of all learners. A
    learner's next checkpoint waits for its last one. What goes wrong in the thread is raised by the next call.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._ahead = device.type == "cuda"
        self._pending: Future[None] | None = None

    def write(
        self,
        state: Mapping[str, Any],
        weights: Mapping[str, Mapping[str, Tensor]],
        best: Mapping[str, Tensor] | None,
        rows: Sequence[Mapping[str, float]],
    ) -> None:
        """Write what `write_checkpoint` does, as it is now. `best` weights are on the host, and never change."""
        self.wait()
        if not self._ahead:
            self._write(dict(state), {name: on_host(tensors) for name, tensors in weights.items()}, best, rows)
            return
        taken = sum(tensor.nbytes for tensor in _tensors((state, weights)))
        _room.take(taken)
        try:
            state, weights, rows = on_host((dict(state), dict(weights), list(rows)))
            done = self._copied()
            self._pending = _thread().submit(self._write_later, done, taken, state, weights, best, rows)
        except BaseException:
            _room.give(taken)
            raise

    def wait(self) -> None:
        """Until all is written. Raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _copied(self) -> Any:
        """An event after the copies."""
        return torch.cuda.current_stream(self._device).record_event()

    def _write_later(self, done: Any, taken: int, *what: Any) -> None:
        try:
            done.synchronize()
            self._write(*what)
        finally:
            _room.give(taken)

    def _write(
        self,
        state: dict[str, Any],
        weights: dict[str, dict[str, Tensor]],
        best: Mapping[str, Tensor] | None,
        rows: Sequence[Mapping[str, float]],
    ) -> None:
        files = {} if best is None else {"best": dict(best)}
        write_checkpoint(self._folder, state | {"weights": weights["last"]}, files | weights, rows)


class _Room:
    """Host memory for copies that wait to be written: a copy that is larger than all of it is taken in alone."""

    def __init__(self) -> None:
        self._taken = 0
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= PENDING)
            self._taken += nbytes

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._taken -= nbytes
            self._changed.notify_all()


_room = _Room()


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="kdcache-checkpoints")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
