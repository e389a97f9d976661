"""A GPU's stand-in on a machine without one: tensors of the `meta` device, and a count of what work on them would launch,
copy and wait for."""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdcache.training import optimizers

TENSOR, AUTOCAST = torch.tensor, torch.autocast.__init__
STAND_IN = torch.device("meta")  # shapes and dtypes without contents, with gradients

_NO_KERNEL = {  # beside views
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::lift_fresh", "aten::detach", "aten::resize_", "aten::set_", "aten::record_stream"),
}
_READS = {"aten::_local_scalar_dense": 1.0, "aten::is_nonzero": True, "aten::equal": True}
_COPIES = {"aten::_to_copy", "aten::copy_"}
_TAKE_ALONG = {"aten::where", "aten::index", "aten::index_put", "aten::index_put_"}  # what of them is on the host is copied


@dataclass
class Launches:
    """What work on a device started: `kernels` by operation, `copies` from the host, and what the host `waits` for."""

    by_operation: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    waits: Counter[str] = field(default_factory=Counter)

    @property
    def kernels(self) -> int:
        """One for each operation on tensors, and so a lower bound where a library starts several."""
        return sum(self.by_operation.values())


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Launches()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function._schema.name
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = any(tensor.device != torch.device("cpu") for tensor in given)
        if away and name in _READS:
            self.found.waits[name] += 1
            return _READS[name]
        if away and name in _TAKE_ALONG:
            left = sum(tensor.device.type == "cpu" for tensor in given)
            self.found.copies += left
            self.found.waits += Counter({f"an operand of {name} on the host": left})  # keeps no zeros
        if name in _COPIES and (moved := self._moved(name, given, args, kwargs)) is not None:
            return moved
        if away and name.startswith("aten::_fused_"):  # which `meta` has no form of; they return nothing
            self.found.by_operation[name] += 1
            return None
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in _NO_KERNEL or all(tensor.device.type == "cpu" for tensor in (*given, *made)):
            return result
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in function._schema.returns):
            self.found.by_operation[name] += _launches_of(name, args, made)
        return result

    def _moved(self, name: str, given: list[Tensor], args: Any, kwargs: Any) -> Tensor | None:
        """The result of a copy between the host and the device; None of any other."""
        target: torch.device = given[0].device if name == "aten::copy_" else torch.device(kwargs.get("device") or given[0].device)
        source = given[-1]
        if target.type == source.device.type:
            return None
        goes_on = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        if target.type == "cpu":
            if not goes_on:
                self.found.waits["a copy to the host"] += 1
            return (
                given[0].fill_(1)
                if name == "aten::copy_"
                else torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            )
        self.found.copies += 1
        if not goes_on:
            self.found.waits["a copy from the host"] += 1
        return given[0] if name == "aten::copy_" else torch.empty_like(source, device=target, dtype=kwargs.get("dtype"))


def _launches_of(name: str, args: Any, made: list[Tensor]) -> int:
    """One; but for an operation on lists of tensors, one for each tensor where those that belong together differ in strides."""
    lists = [each for each in args if isinstance(each, list) and each and isinstance(each[0], Tensor)]
    together = zip(*lists, strict=True)
    fast = all(len({(tensor.shape, tensor.stride()) for tensor in tensors}) == 1 for tensors in together)
    return 1 if not name.startswith("aten::_foreach_") or fast else len(lists[0])


def launched(work: Callable[[], object]) -> Launches:
    """What `work` starts on the stand-in. A copy that is not `non_blocking` is waited for; what is read from it is made up."""
    with _Counting() as counting, mock.patch.object(torch, "tensor", _tensor):
        work()
    return counting.found


def _tensor(data: Any, *, device: Any = None, **named: Any) -> Tensor:
    """As `torch.tensor`, whose copy to a device is seen here: it is made on the host, and waited for."""
    made = TENSOR(data, **named)
    return made if device is None else made.to(device)


class Event:
    """Of a stream without work: everything before it is done."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 1.0


class Stream:
    """A stream without work; `Stream.made` counts how many there have been inside `stand_in_gpu`."""

    made = 0

    def __init__(self, *_: object, **__: object) -> None:
        Stream.made += 1

    def wait_stream(self, other: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: object = None) -> Event:
        return Event()


def _autocast(self: Any, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **more: Any) -> None:
    """The stand-in has no autocast: what it would launch in bf16 is counted in float32."""
    there = device_type == STAND_IN.type
    AUTOCAST(self, "cpu" if there else device_type, dtype, enabled and not there, **more)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu" if torch.device(device) == STAND_IN else device)


@contextlib.contextmanager
def stand_in_gpu() -> Iterator[torch.device]:
    """`STAND_IN`, with streams, events and pinned memory that do nothing."""
    current = Stream()
    Stream.made = 0
    stubs = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: current,
        "stream": lambda *_: contextlib.nullcontext(),
        "synchronize": lambda *_: None,
        "mem_get_info": lambda *_: (64 << 30, 80 << 30),
    }
    devices = ["meta", "cuda"]
    with contextlib.ExitStack() as stack:
        fusing = importlib.import_module("torch.optim.optimizer")
        stack.enter_context(mock.patch.object(fusing, "_get_fused_kernels_supported_devices", return_value=devices))
        stack.enter_context(mock.patch.object(optimizers, "FUSED_ON", set(devices)))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", _autocast))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", return_value=None))
        yield STAND_IN
