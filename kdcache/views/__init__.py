"""Views: deterministic augmented versions of the samples.

`ViewPolicy` describes them (NumPy only); `render` and `fingerprint` make and check pixels, and load torch when first used.
"""

from typing import TYPE_CHECKING, Any

from kdcache.views.policy import PRESETS, ViewPolicy, ViewTable

__all__ = ["PRESETS", "ViewPolicy", "ViewTable", "fingerprint", "render", "render_positions"]

if TYPE_CHECKING:
    from kdcache.views.probe import fingerprint
    from kdcache.views.rendering import render, render_positions
else:  # type checkers would take any name from a module with this function

    def __getattr__(name: str) -> Any:
        if name in {"render", "render_positions"}:
            from kdcache.views import rendering

            return getattr(rendering, name)
        if name == "fingerprint":
            from kdcache.views import probe

            return probe.fingerprint
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
