"""timm's optimisers, by name."""

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import UsageError
from kdcache.training.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["make_optimizer", "require_optimizer"]

_NAMED = re.compile(r"name=[\"'](?!fused|bnb)(\w+)[\"']")  # those want other libraries, which may not be there


def require_optimizer(name: str) -> None:
    """UsageError for a name that is not one of timm's optimisers."""
    if name not in _names_in_source():
        import torch
        from torch import nn

        make_optimizer([nn.Parameter(torch.zeros(1))], TrainConfig(epochs=1, opt=name))


@cache
def _names_in_source() -> frozenset[str]:
    """Names that stand in timm's table of optimisers, read without importing it and torch; it knows a few more."""
    spec = importlib.util.find_spec("timm")
    files = [Path(place) / "optim" / "_optim_factory.py" for place in (spec.submodule_search_locations if spec else None) or ()]
    return frozenset(name for file in files if file.is_file() for name in _NAMED.findall(file.read_text("utf-8")))


def make_optimizer(of: "nn.Module | Sequence[nn.Parameter]", config: TrainConfig) -> "torch.optim.Optimizer":
    """The optimiser of a training. UsageError where timm has none of that name, or cannot make it."""
    import timm.optim

    name = config.opt
    try:
        made: torch.optim.Optimizer = timm.optim.create_optimizer_v2(  # type: ignore[attr-defined]
            of,
            opt=name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=not config.decay_all,
        )
    except (ValueError, AssertionError, KeyError) as error:
        raise UsageError(
            f"optimiser {name!r} cannot be made", why=str(error), fix="use --opt adamw, --opt sgd or another timm name"
        ) from None
    return made
