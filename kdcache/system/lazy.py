"""Modules that are imported when they are first used, by code that describes a computation far more often than it does one."""

import importlib
from types import ModuleType
from typing import Any

__all__ = ["lazy"]


class _Lazy(ModuleType):
    """A stand-in for the module of its name. It keeps each attribute that it was asked for."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value


def lazy(name: str) -> ModuleType:
    """The module `name`, imported at the first use of one of its attributes.

    For type checkers the import is written out beside it:

        if TYPE_CHECKING:
            import torch
        else:
            torch = lazy("torch")
    """
    return _Lazy(name)
