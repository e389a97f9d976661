"""How far a teacher's logits are from those of a better precision, since archives say so, and verification allows for it."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kdcache.archive import Noise
from kdcache.datasets.canvas import Canvas
from kdcache.importing import first_line
from kdcache.replay.prefetch import render_batches
from kdcache.system.progress import Progress
from kdcache.teachers.forward import Forward, batches
from kdcache.views.policy import ViewPolicy

__all__ = ["in_float64", "measured_noise"]

HALF_VIEWS, FLOAT_VIEWS = 256, 64  # views on which half precision and float32 are measured: float64 takes several times as long


def measured_noise(forward: Forward, canvas: Canvas, policy: ViewPolicy, batch_size: int, progress: Progress) -> Noise | None:
    """The distance of this teacher's logits from a reference, over the canvas's first views; None, with a note, if unknown.

    The reference of half precision is IEEE float32 on the same device, that of float32 is float64.
    """
    half = forward.precision != "fp32"
    count = min(HALF_VIEWS if half else FLOAT_VIEWS, len(canvas))
    items = [(0, rows) for rows in batches(range(count), batch_size)]
    rendered = [item.images for item in render_batches(canvas, policy, items, device=forward.device)]
    if half:
        reference = torch.cat([forward.in_float32(images).double().cpu() for images in rendered])
    else:
        try:
            better = in_float64(forward)
            reference = torch.cat([better(images).cpu() for images in rendered])
        except Exception as error:  # parts of it are float32 by their code, the device has no float64, or no room for it
            progress.say(f"the noise of its logits is not measured, as the teacher cannot run in float64: {first_line(error)}")
            return None
    used = torch.from_numpy(np.concatenate([forward(images) for images in rendered])).double()
    log_p, log_q = reference.log_softmax(dim=1), used.log_softmax(dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp(min=0)
    difference = (reference - used).abs().max()
    if not (kl.isfinite().all() and difference.isfinite()):
        progress.say("the noise of the teacher's logits is not measured, as some are not finite")
        return None
    return Noise(
        views=count,
        kl_mean=kl.mean().item(),
        kl_max=kl.max().item(),
        max_logit_difference=difference.item(),
        reference="float32" if half else "float64",
    )


def in_float64(forward: Forward) -> Callable[[Tensor], Tensor]:
    """Maps uint8 views to logits float64 `[B, C]`, by a copy of the model with weights and normalisation in float64."""
    model, normalise, device = copy.deepcopy(forward.model).double(), forward.normalise, forward.device
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=device).view(1, -1, 1, 1) * 255
        for values in (normalise.mean, normalise.std)
    )

    @torch.inference_mode()
    def logits(views: Tensor) -> Tensor:
        result: Tensor = model((views.to(device).double() - mean) / std)
        if result.dtype != torch.float64:
            raise TypeError(f"its logits are {str(result.dtype).removeprefix('torch.')}")
        return result

    return logits
