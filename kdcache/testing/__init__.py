"""Contract tests for your own methods, controls, codecs, layouts and datasets: what kdcache's components pass, as classes.

A test module of your package subclasses the contract of its component, and pytest runs what it inherits:

    from kdcache.testing import MethodContract

    class TestMine(MethodContract):
        spec = "mine:alpha=2"

`spec` is what a user types. A component that is registered by a decorator has to be imported before; one that is declared as an
entry point is found. A fixture `component` of your own, with parameters if you like, takes the place of `spec`. Each class states
what may be changed for components that are meant to behave otherwise.

These modules need pytest, on which kdcache itself does not depend.
"""

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "CodecContract": "kdcache.testing.codecs",
    "ComponentContract": "kdcache.testing.components",
    "ControlContract": "kdcache.testing.controls",
    "DatasetContract": "kdcache.testing.datasets",
    "LayoutContract": "kdcache.testing.layouts",
    "MethodContract": "kdcache.testing.methods",
}
__all__ = ["CodecContract", "ComponentContract", "ControlContract", "DatasetContract", "LayoutContract", "MethodContract"]

if TYPE_CHECKING:
    from kdcache.testing.codecs import CodecContract
    from kdcache.testing.components import ComponentContract
    from kdcache.testing.controls import ControlContract
    from kdcache.testing.datasets import DatasetContract
    from kdcache.testing.layouts import LayoutContract
    from kdcache.testing.methods import MethodContract
else:  # each is loaded for itself: a codec's contract needs no torch

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
