"""How test images are to be shown to a model: as its pretrained configuration says, or as asked for."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kdcache.datasets.canvas import Canvas
from kdcache.errors import IncompatibleError
from kdcache.models.names import public_name
from kdcache.models.preprocessing import Preprocessing, preprocessing
from kdcache.training.config import SMALLEST_CROP, HowTested
from kdcache.views.crops import CenterCrop
from kdcache.views.policy import Filter, ViewPolicy
from kdcache.views.tested import TestViews

__all__ = ["doubts", "drawable_filter", "model_filter", "views_of_tests", "wanted_canvas"]

FILTERS = get_args(Filter)
OF_VIEWS, OF_TESTS = "--policy imagenet:filter=bicubic", "--interpolation bicubic"
LITTLE = 1.03  # a canvas that lacks less than this factor of the wanted pixels is not worth a word
MUCH = 2.0


def views_of_tests(options: HowTested, name: str, size: int, model: nn.Module | None = None) -> TestViews:
    """How to test the model `name` (exact) on views of `size` pixels.

    The configuration of a factory's model is found on `model`. IncompatibleError for a configuration that cannot be drawn.
    """
    if options.test_policy == "model":
        stated = preprocessing(name, size, model)
        crop_pct = options.crop_pct or stated.crop_pct
        interpolation = options.interpolation or stated.interpolation
        _require_drawable(name, stated, crop_pct, interpolation)
        crop = CenterCrop(mode=stated.crop_mode, resize=math.floor(size / crop_pct))  # as timm.data.create_transform has it
        policy = ViewPolicy(size=size, crop=crop, filter=interpolation, hflip=0.0)
        return TestViews(origin="model", policy=policy, crop_pct=crop_pct)
    policy = options.drawn(size)
    if policy.filter == "auto":
        policy = policy.settled(model_filter(name, size, model, option=OF_TESTS))
    return TestViews(origin=options.test_policy or "none", policy=policy)


def model_filter(name: str, size: int, model: nn.Module | None = None, *, option: str = OF_VIEWS) -> Any:
    """The filter that the policy filter "auto" stands for: the interpolation of the model's configuration.

    IncompatibleError, which names the `option` that overrides it, for an interpolation that views do not have.
    """
    return drawable_filter(name, preprocessing(name, size, model).interpolation, option)


def drawable_filter(name: str, interpolation: Any, option: str = OF_VIEWS) -> Any:
    """The stated `interpolation` as a filter of views. IncompatibleError, which names the model, if there is no such filter."""
    if interpolation not in FILTERS:
        raise IncompatibleError(
            f"the configuration of {public_name(name)} has interpolation {interpolation!r}",
            why="the filter of views is taken from there, and views are resized bilinear or bicubic",
            fix=f"name the filter, for example: {option}",
        )
    return interpolation


def _require_drawable(name: str, stated: Preprocessing, crop_pct: Any, interpolation: Any) -> None:
    wrong = {
        "crop_pct": None if isinstance(crop_pct, (int, float)) and SMALLEST_CROP <= crop_pct <= 1 else crop_pct,
        "crop_mode": None if stated.crop_mode in {"center", "squash"} else stated.crop_mode,
        "interpolation": None if interpolation in FILTERS else interpolation,
    }
    for field, value in wrong.items():
        if value is not None:
            raise IncompatibleError(
                f"the configuration of {public_name(name)} has {field} {value!r}",
                why="test images are shown as a model's configuration says, and such a view cannot be drawn",
                fix="say how to show them: train-teacher (or distill) "
                + (OF_TESTS if field == "interpolation" else "--test-policy eval"),
            )


def wanted_canvas(sizes: NDArray[np.int32], policy: ViewPolicy) -> NDArray[np.float64]:
    """The side of a canvas from which a centre crop loses no sharpness, for photographs of `sizes [N, 2]`: float `[N]`.

    A square canvas has as many pixels along the long side as along the short one, so a photograph of 4:3 wants 4/3 of what a
    square one wants. More pixels than the photograph has are of no use.
    """
    crop = policy.crop
    assert isinstance(crop, CenterCrop)
    longest = sizes.max(axis=1).astype(np.float64)
    aspect = np.ones(len(sizes)) if crop.mode == "squash" else longest / sizes.min(axis=1)
    resized = crop.resize or policy.size / crop.fraction
    wanted: NDArray[np.float64] = np.minimum(aspect * resized, longest)
    return wanted


def doubts(options: HowTested, tested: TestViews, name: str, canvas: Canvas, model: nn.Module | None = None) -> Iterator[str]:
    """Notes on what the configuration of a model does not say, and on a canvas that is too small for its test crop."""
    if options.test_policy == "model":
        assumed = preprocessing(name, tested.policy.size, model).assumed
        if fields := ", ".join(field for field in assumed if getattr(options, field, None) is None):
            yield (
                f"the configuration of {public_name(name)} states no {fields}: timm's defaults are used, {tested.title} "
                "(others with --crop-pct, --interpolation, --test-policy)"
            )
    wanted = wanted_canvas(canvas.sizes, tested.policy)
    side = float(np.quantile(wanted, 0.5))
    if side > LITTLE * canvas.size:
        better = 8 * math.ceil(side / 8)
        yield (
            f"the canvas of {canvas.size} px is smaller than the {side:.0f} px that the test crop wants for most of these "
            f"photographs, which are shown less sharp than they are: --canvas {better} keeps all of it"
        )
    narrow = np.flatnonzero(wanted > MUCH * max(side, canvas.size))
    if len(narrow):
        width, height = canvas.sizes[narrow[0]]
        yield (
            f"{len(narrow)} of {len(canvas)} test images are so long that the square canvas keeps less than half of their "
            f"sharpness, such as {canvas.keys[narrow[0]]} ({width} x {height})"
        )
