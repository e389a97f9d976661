"""The classifier of a timm model: where it is, and how a new one begins."""

import torch
from torch import nn

from kdcache.errors import IncompatibleError

__all__ = ["classifier_names", "zero_head"]


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give the logits, as the model's configuration has them; distilled models have two."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier", ())
    return (names,) if isinstance(names, str) else tuple(names or ())


@torch.no_grad()
def zero_head(model: nn.Module, name: str) -> None:
    """Set weights and biases of the classifier to zero, in place: every class is equally likely at first.

    A random classifier sends noise into pretrained features with the first gradients (Kumar et al., ICLR 2022). IncompatibleError
    for a model, called `name`, whose configuration does not say where its classifier is.
    """
    layers = [model.get_submodule(each) for each in classifier_names(model)]
    if not layers or not all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
        raise IncompatibleError(
            f"the new classifier of {name} cannot be set to zero",
            why="its configuration does not say which layer that is",
            fix="start it as timm does: --head-init timm",
        )
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()
