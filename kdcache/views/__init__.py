"""Views: deterministic augmented versions of the samples.

`ViewPolicy` describes them (NumPy only); `render`, `mix` and `fingerprint` make and check pixels, and load torch when first used.
"""

from typing import Any

from kdcache.views.policy import PRESETS, ViewPolicy, ViewTable

__all__ = ["PRESETS", "ViewPolicy", "ViewTable", "diagnose", "fingerprint", "render", "render_positions"]


def __getattr__(name: str) -> Any:
    if name in {"render", "render_positions"}:
        from kdcache.views import pixels

        return getattr(pixels, name)
    if name in {"fingerprint", "diagnose"}:
        from kdcache.views import probe

        return getattr(probe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
