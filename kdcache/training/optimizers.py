"""timm's optimisers, by name."""

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import UsageError
from kdcache.training.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["make_optimizer", "require_optimizer"]

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

    By `layer_decay`, its groups of parameters have a `lr_scale`, which the caller multiplies their rates by.
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
