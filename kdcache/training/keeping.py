"""Keeping what a model says of some test images, with the features that its classifier sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.datasets.canvas import Canvas
from kdcache.models.heads import classifier_names
from kdcache.replay.prefetch import render_batches
from kdcache.training.outputs import KeptOutputs, chosen_images
from kdcache.views.policy import ViewPolicy

__all__ = ["kept_outputs"]

BATCH = 64


@torch.no_grad()
def kept_outputs(
    model: nn.Module, predict: Callable[[Tensor], Tensor], canvas: Canvas, policy: ViewPolicy, weights: str = ""
) -> KeptOutputs:
    """Outputs for the kept images of a test `canvas`, shown by `policy`. `weights` is the digest of the model's, if known.

    `predict` maps views uint8 `[B, 3, S, S]` on the host to logits `[B, C]`, by calling `model` in evaluation mode.
    """
    samples = chosen_images(canvas.labels, 2)
    places = np.argsort(policy.parameters(0, len(canvas), canvas.sizes).sample)
    logits: list[np.ndarray] = []
    features: list[np.ndarray] | None = []
    done = 0
    with _seen_by_classifier(model) as seen:
        while done < len(samples):
            batch = samples[done : done + BATCH]
            # On the CPU: so few of them are not worth a copy of the canvas on a GPU.
            (views,) = (item.images for item in render_batches(canvas, policy, [(0, places[batch])]))
            seen.clear()
            answers = predict(views)
            logits.append(answers.float().cpu().numpy())
            known = _rows(seen[-1], len(batch)) if seen else None
            if features is not None and known is not None:
                features.append(known)
            else:
                features = None
            done += len(batch)
            if len(logits) == 1:  # now it is known how much an image takes
                width = logits[0].shape[1] + (features[0].shape[1] if features else 0)
                samples = chosen_images(canvas.labels, width)
    count = len(samples)
    rows = np.concatenate(logits)[:count].astype(np.float32)
    wide = np.concatenate(features)[:count].astype(np.float32) if features else None
    wide = wide if wide is not None and np.isfinite(wide).all() else None
    labels = canvas.labels[samples].astype(np.int32)
    return KeptOutputs(samples.astype(np.int32), labels, rows, wide, canvas.card.digest, weights)


@contextmanager
def _seen_by_classifier(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets the input of the model's classifier each time it runs: of the layer that its configuration names, or of
    every linear layer, of which the last to run is meant."""
    try:
        layers: list[nn.Module] = [model.get_submodule(name) for name in classifier_names(model)]
    except AttributeError:  # of a model around the one that is configured
        layers = []
    layers = layers or [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = inputs[:1]  # the last one only

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _rows(features: Tensor, images: int) -> np.ndarray | None:
    """Features `[B, D]`, or `[B, D, 1, 1]` of a convolution; None for others, such as one row for each of many tokens."""
    if len(features) != images or features[0].numel() != features.shape[1]:
        return None
    rows: np.ndarray = features.detach().float().flatten(1).cpu().numpy()
    return rows
