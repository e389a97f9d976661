"""Teachers on a GPU: whether float32 is float32, and how much of a dump is the model."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.bench.gpu.measuring import Found, Setting
from kdcache.bench.pipeline import digits_canvas, open_writer
from kdcache.bench.turns import Result, taking_turns
from kdcache.models.creation import Normalisation, create_model
from kdcache.system.precision import FLOAT32_ERROR, float32_error
from kdcache.teachers.forward import Forward
from kdcache.teachers.shards import write_shards
from kdcache.training.devices import seeded
from kdcache.views.policy import ViewPolicy

__all__ = ["dump", "numerics"]

LOGITS_ERROR = 1e-3  # of float32 logits, as a share of their deviation; TF32 makes more than ten times as much
DUMP = 1 / 0.95
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def _model(name: str, size: int, device: torch.device) -> tuple[nn.Module, Normalisation]:
    with seeded(0):
        model, normalise = create_model(name, 10, input_size=size)
    return model.eval().requires_grad_(False).to(device), normalise


def _views(count: int, size: int, device: torch.device) -> Tensor:
    drawn = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(drawn).to(device)


@torch.inference_mode()
def _exact(model: nn.Module, normalise: Normalisation, views: Tensor) -> Tensor:
    """Logits in float64; the model is float32 again afterwards."""
    try:
        logits: Tensor = model.double()(normalise(views).double())
    finally:
        model.float()
    return logits.cpu()


def numerics(setting: Setting) -> Found:
    """How far logits are from float64 in each precision. float32 must be IEEE's; of the others the noise is recorded."""
    error = float32_error(setting.device)
    results = [Result("float32", "error of conv and matmul", "float64", error, FLOAT32_ERROR)]
    details: dict[str, Any] = {}
    names, size = (("test_vit",), 32) if setting.tiny else (("resnet50", "vit_small_patch16_224"), 224)
    for name in names:
        model, normalise = _model(name, size, setting.device)
        views = _views(16, size, setting.device)
        truth = _exact(model, normalise, views)
        far = {}
        for precision in ("fp32", "fp16", "bf16"):
            logits = Forward(model, normalise, setting.device, precision)(views)
            far[precision] = float((torch.from_numpy(logits).double() - truth).abs().max() / truth.std())
        results.append(Result(f"fp32 logits of {name}", "largest error", "their deviation", far["fp32"], LOGITS_ERROR))
        first, again = (Forward(model, normalise, setting.device, "fp16")(views) for _ in range(2))
        details[name] = {"largest error over deviation": far, "fp16 repeats bit for bit": bool((first == again).all())}
    return Found(results, details)


def dump(setting: Setting) -> Found:
    """A dump of ViT-S at 224 px (rendering to shards, without finishing) against forward passes over constant batches.

    The bare model runs under autocast, in the dump's precision and by batches of the same size.
    """
    name, size, side = ("test_vit", 32, 40) if setting.tiny else ("vit_small_patch16_224", 224, 336)
    samples, batch, precision = (32, 16, "bf16") if setting.tiny else (4096, 256, "fp16")
    canvas = digits_canvas(setting.folder, side, samples, setting.progress)
    policy = ViewPolicy.load("pets", size=size)
    model, normalise = _model(name, size, setting.device)
    forward = Forward(model, normalise, setting.device, precision)  # type: ignore[arg-type]
    bare_model, _ = _model(name, size, setting.device)
    fixed = normalise(_views(batch, size, setting.device))
    numbers = itertools.count()

    def dumped() -> None:
        writer = open_writer(setting.folder / f"archive-{next(numbers)}", canvas, policy, views=1)
        write_shards(writer, forward, canvas, batch_size=batch)

    @torch.inference_mode()
    def bare() -> None:
        with torch.autocast(setting.device.type, HALF[precision]):
            for _ in range(samples // batch):
                bare_model(fixed)

    sides = [setting.waiting(side) for side in (dumped, bare)]
    ours, theirs = taking_turns("bench gpu: dump", setting.seconds, setting.progress, *sides)
    rates = {"views_per_s": round(samples / ours), "bare_views_per_s": round(samples / theirs), "share": round(theirs / ours, 3)}
    return Found([Result(f"dump {name}/{size}", f"a view of {samples} samples", "bare forward", ours / theirs, DUMP)], rates)
