"""timm's optimisers, by name; their learning rates, and their states in checkpoints."""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import UsageError
from kdcache.training.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Rates", "capturable", "load_state", "make_optimizer", "portable_state", "require_optimizer"]

FUSED_ON = {"cuda"}  # kinds of devices
OF_THE_DEVICE = ("fused", "foreach", "capturable")  # in groups of parameters: how the update is done, not which

_NAMED = re.compile(r"name=[\"'](?!fused|bnb)(\w+)[\"']")  # those want other libraries, which may not be there


def require_optimizer(name: str, betas: tuple[float, ...] | None = None) -> None:
    """UsageError for a name that is not one of timm's optimisers, or one that does not take these betas."""
    if betas or name not in _names_in_source():
        import torch
        from torch import nn

        make_optimizer([nn.Parameter(torch.zeros(1))], TrainConfig(epochs=1, opt=name, opt_betas=betas))


@cache
def _names_in_source() -> frozenset[str]:
    """Names that stand in timm's table of optimisers, read without importing it and torch; it knows a few more."""
    spec = importlib.util.find_spec("timm")
    files = [Path(place) / "optim" / "_optim_factory.py" for place in (spec.submodule_search_locations if spec else None) or ()]
    return frozenset(name for file in files if file.is_file() for name in _NAMED.findall(file.read_text("utf-8")))


def make_optimizer(of: "nn.Module | Sequence[nn.Parameter]", config: TrainConfig) -> "torch.optim.Optimizer":
    """The optimiser of a training. UsageError where timm has none of that name, or cannot make it as asked for.

    By `layer_decay`, its groups of parameters have a `lr_scale`, which the caller multiplies their rates by. Where torch can, a
    GPU updates all parameters in one kernel.
    """
    import timm.optim

    name = config.opt
    more: dict[str, Any] = {}
    if config.opt_betas:
        more["betas"] = config.opt_betas
    if config.layer_decay is not None:
        more["layer_decay"] = config.layer_decay
    try:
        if config.opt_betas:
            _require_betas(name, config.opt_betas)
        made: torch.optim.Optimizer = timm.optim.create_optimizer_v2(  # type: ignore[attr-defined]
            of,
            opt=name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=not config.decay_all,
            **more,
        )
    except (ValueError, AssertionError, KeyError) as error:
        raise UsageError(
            f"optimiser {name!r} cannot be made", why=str(error), fix="use --opt adamw, --opt sgd or another timm name"
        ) from None
    if config.layer_decay is not None and len({group.get("lr_scale", 1.0) for group in made.param_groups}) == 1:
        raise UsageError(
            f"--layer-decay {config.layer_decay:g} with a {type(of).__name__}",
            why="the model does not say which layers it has: it has no group_matcher, and names no classifier",
            fix="leave --layer-decay out",
        )
    _fuse(made)
    return made


def _require_betas(name: str, betas: Sequence[float]) -> None:
    """UsageError for betas that an optimiser does not take: timm would leave them out without a word."""
    import timm.optim

    known = timm.optim.get_optimizer_info(name.lower().rpartition("_")[2])  # type: ignore[attr-defined]
    wanted = known.num_betas if known.has_betas else 0
    if len(betas) != wanted:
        raise UsageError(
            f"--opt-betas {','.join(f'{beta:g}' for beta in betas)} with --opt {name}",
            why=f"{name} takes {wanted} betas" if wanted else f"{name} has no betas",
            fix="leave --opt-betas out" + (", or give as many" if wanted else ", or use --opt adamw"),
        )


def _fuse(optimizer: "torch.optim.Optimizer") -> bool:
    """Whether a GPU does the update, in one kernel for all parameters, which has to be told here."""
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fused = type(optimizer) in {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW} and all(
        parameter.device.type in FUSED_ON and parameter.is_floating_point() for parameter in parameters
    )
    if fused:
        for group in optimizer.param_groups:
            group["fused"] = True
    return fused


class Rates:
    """The learning rates of an optimiser: those that its groups of parameters have now, times a share and their `lr_scale`.

    Those of a fused optimiser are numbers on its device. One kernel sets them all, and nobody waits for it.
    """

    def __init__(self, optimizer: "torch.optim.Optimizer") -> None:
        import torch

        self._optimizer = optimizer
        groups = optimizer.param_groups
        self._full = [(float(group["lr"]), float(group.get("lr_scale", 1.0))) for group in groups]
        self.values = [rate * scale for rate, scale in self._full]  # as they were set last
        self.on_device = _fuse(optimizer)
        if self.on_device:
            self._base = torch.tensor(self.values).to(groups[0]["params"][0].device)
            self._now = self._base.clone()
            self._each = self._now.unbind()

    def set(self, share: float) -> None:
        import torch

        self.values = [rate * share * scale for rate, scale in self._full]
        if self.on_device:
            torch.mul(self._base, share, out=self._now)
        for number, group in enumerate(self._optimizer.param_groups):
            group["lr"] = self._each[number] if self.on_device else self.values[number]


def portable_state(optimizer: "torch.optim.Optimizer", rates: Rates) -> dict[str, Any]:
    """What a checkpoint keeps of an optimiser; learning rates are numbers."""
    state = optimizer.state_dict()
    for group, rate in zip(state["param_groups"], rates.values, strict=True):
        group["lr"] = rate
    return state


def load_state(optimizer: "torch.optim.Optimizer", state: Mapping[str, Any], rates: Rates) -> None:
    """Take over a state, perhaps of another kind of device; how the update is done stays as it suits this one."""
    groups = [
        saved | {name: own[name] for name in OF_THE_DEVICE if name in own}
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():  # fused kernels want the memory format of the weights
        for name, value in values.items():
            if hasattr(value, "stride") and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = parameter.detach().clone().to(value.dtype).copy_(value)
    rates.values = [float(group["lr"]) for group in groups]


@contextmanager
def capturable(*optimizers: "torch.optim.Optimizer") -> Iterator[None]:
    """Inside, a step may be captured in a graph: Adam and its kin want to be told. Fused kernels compute the same."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    try:
        for group in groups:
            group["capturable"] = True
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value
