"""Distillation losses. A method is a frozen dataclass of its own options, called with student logits and targets.

Third parties add methods through the entry point group `kdcache.methods`. No method knows whether its teacher was
cached or live.
"""

from typing import Any, Protocol

from torch import Tensor

from kdcache.registry import Registry
from kdcache.targets import Targets

__all__ = ["METHODS", "LogitMethod", "Method", "State", "build"]


class Method(Protocol):
    def __call__(self, student_logits: Tensor, targets: Targets, state: Any = None) -> Tensor:
        """The loss of `student_logits [B, C]`, a scalar; `state` is what methods with a schedule or parameters go on with."""


METHODS: Registry[Method] = Registry("method", entry_points="kdcache.methods")


def build(name: str, **options: Any) -> Method:
    """The method `name` with its options."""
    return METHODS.build(name, **options)


# They register themselves.
from kdcache.methods import curriculum as _curriculum  # noqa: E402, F401
from kdcache.methods import decoupled as _decoupled  # noqa: E402, F401
from kdcache.methods import relational as _relational  # noqa: E402, F401
from kdcache.methods import tempered as _tempered  # noqa: E402, F401
from kdcache.methods import weighted as _weighted  # noqa: E402, F401
from kdcache.methods.base import LogitMethod, State  # noqa: E402
