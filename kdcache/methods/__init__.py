"""Distillation losses. A method is a frozen dataclass of its own options, called with student logits and targets.

Third parties add methods through the entry point group `kdcache.methods`: subclasses of `Method`, or frozen dataclasses that are
called in the same way. No method knows whether its teacher was cached or live, and none needs torch before it computes a loss.
"""

from typing import TYPE_CHECKING, Any

# These register themselves.
from kdcache.methods import curriculum as _curriculum  # noqa: F401
from kdcache.methods import decoupled as _decoupled  # noqa: F401
from kdcache.methods import labels as _labels  # noqa: F401
from kdcache.methods import relational as _relational  # noqa: F401
from kdcache.methods import tempered as _tempered  # noqa: F401
from kdcache.methods import weighted as _weighted  # noqa: F401
from kdcache.methods.base import METHODS, LogitMethod, Method

if TYPE_CHECKING:
    from kdcache.methods.states import State
else:  # type checkers would take any name from a module with this function

    def __getattr__(name: str) -> Any:
        if name == "State":  # a module of torch, which is imported for it
            from kdcache.methods.states import State

            return State
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["METHODS", "LogitMethod", "Method", "State", "build"]


def build(name: str, **options: Any) -> Method:
    """The method `name` with its options."""
    return METHODS.build(name, **options)
