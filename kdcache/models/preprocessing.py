"""How a model's pretrained configuration wants test images: timm's `crop_pct`, `crop_mode` and `interpolation`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdcache.models import hf
from kdcache.models.names import config_file, is_factory, is_reference, is_transformers, read_config, timm_with_zoo

__all__ = ["Preprocessing", "configuration", "preprocessing", "stated_by"]


@dataclass(frozen=True)
class Preprocessing:
    """timm's preprocessing of test images, for one input size."""

    crop_pct: float  # of the side that the photograph is resized to
    crop_mode: str  # center: that is the short side; squash: both sides; border: the long side
    interpolation: str
    assumed: tuple[str, ...] = ()  # fields that the configuration lacks, which are timm's defaults


def preprocessing(name: str, input_size: int, model: nn.Module | None = None) -> Preprocessing:
    """The preprocessing that the model `name` (exact) states for inputs of `input_size` pixels.

    At its `test_input_size` that is its `test_crop_pct`, by which timm's published figures are made. The configuration of a
    factory's model is found on the `model` only.
    """
    if is_factory(name):
        return stated_by({} if model is None else configuration(model), input_size)
    if is_reference(name):
        if is_transformers(name):
            return stated_by(hf.stated(name), input_size)
        config = read_config(config_file(name), name)
        return stated_by(config.get("pretrained_cfg", config), input_size)
    published = timm_with_zoo().models.get_pretrained_cfg(name)
    return stated_by({} if published is None else published.to_dict(), input_size)


def configuration(model: nn.Module) -> Mapping[str, Any]:
    """The timm configuration that a model carries as `pretrained_cfg` or `default_cfg`; empty without one."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        stated = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {}
        if stated:
            return stated
    return {}


def stated_by(config: Mapping[str, Any], input_size: int) -> Preprocessing:
    """The preprocessing in timm's `config`, with timm's defaults (`timm.data.resolve_data_config`) for what it lacks."""
    from timm.data.constants import DEFAULT_CROP_MODE, DEFAULT_CROP_PCT

    for_tests = config.get("test_input_size")
    at_test_size = isinstance(for_tests, (tuple, list)) and for_tests[-1] == input_size != config.get("input_size", [0])[-1]
    crop_pct = (config.get("test_crop_pct") if at_test_size else None) or config.get("crop_pct")
    stated: dict[str, Any] = {
        "crop_pct": crop_pct,
        "crop_mode": config.get("crop_mode"),
        "interpolation": config.get("interpolation"),
    }
    usual: dict[str, Any] = {"crop_pct": DEFAULT_CROP_PCT, "crop_mode": DEFAULT_CROP_MODE, "interpolation": "bicubic"}
    return Preprocessing(
        **{key: value or usual[key] for key, value in stated.items()},
        assumed=tuple(key for key, value in stated.items() if not value),
    )
