"""torch and the GPUs: what there is, whether float32 and views come out right, and what commands would choose."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kdcache.doctor.findings import Line, first_line, gigabytes, note, ok, problem
from kdcache.system.precision import FLOAT32_ERROR, float32_error
from kdcache.views.policy import ColorJitter, Mix, RandAugment, RandomErasing, ViewPolicy
from kdcache.views.probe import digests
from kdcache.views.rendering import render_positions

__all__ = ["choices", "float32", "gpus", "here", "renderers", "torch_build"]

VIEWS = 24  # of each policy
AGREE = "use --renderer reference, and report this with the lines above"


def here(*, gpus: bool) -> list[torch.device]:
    """The CPU; with `gpus`, every GPU that torch can use, too."""
    count = torch.cuda.device_count() if gpus and torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", number) for number in range(count))]


def torch_build() -> Iterator[Line]:
    cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    built = (
        f"for CUDA {cuda}, cuDNN {cudnn}" if cuda else f"for ROCm {torch.version.hip}" if torch.version.hip else "for CPUs only"
    )
    yield ok("torch", f"{torch.__version__}, built {built}, threads: {torch.get_num_threads()}")
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    text = f"convolutions {conv.fp32_precision}, matrix products {matmul.fp32_precision} (none: as torch has it by default)"
    yield ok("TF32 flags", f"{text}; where kdcache means float32 it sets both to ieee")


def gpus() -> Iterator[Line]:
    """A line for the driver, and a line for each GPU that torch can use."""
    nvml = _Nvml()
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if nvml.driver:
        yield ok("driver", f"NVIDIA {nvml.driver}, for CUDA {nvml.cuda} and older; GPUs: {', '.join(nvml.names) or 'none'}")
    if nvml.names and not usable:
        yield _hidden(nvml)
    elif not usable:
        yield note("GPU", f"none: models run on the CPU{_other_accelerators()}")
    for number in range(usable):
        try:
            yield _gpu(number, nvml)
        except RuntimeError as error:
            yield problem(
                f"cuda:{number}", f"cannot be used: {first_line(error)}", "nvidia-smi; then end what blocks it, or reboot"
            )
    nvml.close()


def _other_accelerators() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    return "" if found is None else f" ({found.type} is not used by default)"


def _hidden(nvml: "_Nvml") -> Line:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None and seen.strip() in {"", "-1", "none", "None"}:
        return note("GPU", f"hidden by CUDA_VISIBLE_DEVICES={seen!r}", "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        text = "this torch is built without CUDA, so that the GPUs are not used"
    elif nvml.cuda and tuple(map(int, nvml.cuda.split("."))) < tuple(map(int, torch.version.cuda.split(".")[:2])):
        text = f"torch is built for CUDA {torch.version.cuda}, which is newer than the driver's {nvml.cuda}"
    else:
        text = f"torch cannot use them (CUDA_VISIBLE_DEVICES={seen!r})"
    fix = f"install a torch for CUDA {nvml.cuda or '(see nvidia-smi)'} or older: https://pytorch.org/get-started/locally"
    return problem("GPU", text, fix if seen is None else f"unset CUDA_VISIBLE_DEVICES; or {fix}")


def _gpu(number: int, nvml: "_Nvml") -> Line:
    device, name = torch.device("cuda", number), f"cuda:{number}"
    found = torch.cuda.get_device_properties(device)
    free, all_of_it = torch.cuda.mem_get_info(device)
    with torch.cuda.device(device):
        native = "bf16 native" if torch.cuda.is_bf16_supported(including_emulation=False) else "bf16 emulated"
    text = f"{found.name}, {gigabytes(free)} of {gigabytes(all_of_it)} free, capability {found.major}.{found.minor}, {native}"
    text += f", {nvml.of(str(getattr(found, 'uuid', '')))}"
    if free < all_of_it / 2:
        return note(name, f"{text}; others use it", "nvidia-smi shows which processes; or choose another with --device cuda:N")
    return ok(name, text)


class _Nvml:
    """What the driver says; nothing where there is none."""

    def __init__(self) -> None:
        self.driver = self.cuda = ""
        self.names: list[str] = []
        self._library: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._library = pynvml
            self.driver = str(pynvml.nvmlSystemGetDriverVersion())
            number = pynvml.nvmlSystemGetCudaDriverVersion()
            self.cuda = f"{number // 1000}.{number % 1000 // 10}"
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            self.names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
        except Exception:  # no driver, no library, no permission: torch's own words come next
            return

    def of(self, uuid: str) -> str:
        """Whether a GPU is divided (MIG), and whether its energy is counted."""
        try:
            handle = self._library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        except Exception:  # a part of a GPU has a UUID of another kind
            return "energy not counted"
        try:
            divided = "MIG on, " if self._library.nvmlDeviceGetMigMode(handle)[0] else ""
        except Exception:  # it cannot be divided
            divided = ""
        try:
            self._library.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception:
            return f"{divided}energy not counted"
        return f"{divided}energy counted"

    def close(self) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()


def float32(device: torch.device) -> Iterator[Line]:
    """Whether convolutions and matrix products of float32 have its 24 bits, against float64 on the same device."""
    name, error = f"float32 on {device}", float32_error(device)
    if error <= FLOAT32_ERROR:
        yield ok(name, f"IEEE 754: convolutions and matrix products are within {error:.1e} of float64")
    else:
        text = f"convolutions or matrix products are off by {error:.1e}: they have fewer bits than float32"
        fix = "unset NVIDIA_TF32_OVERRIDE DNNL_DEFAULT_FPMATH_MODE ONEDNN_DEFAULT_FPMATH_MODE; else report it"
        yield problem(name, text, fix)


def renderers(device: torch.device) -> Iterator[Line]:
    """Whether the device renderer gives the reference's bytes and digests on that device."""
    name, count, different = f"renderers on {device}", 0, 0
    for policy, side in _policies():
        pixels = np.random.default_rng(1).integers(0, 256, (VIEWS, 3, side, side), dtype=np.uint8)
        table, positions = policy.parameters(1, VIEWS, np.full((VIEWS, 2), side)), np.arange(VIEWS)
        expected = render_positions(pixels, table, positions, "reference")
        try:
            found = render_positions(pixels, table, positions, "device", device)
            same = (found.cpu() == expected).flatten(1).all(dim=1).numpy() & (digests(found) == digests(expected))
        except RuntimeError as error:
            yield problem(name, f"the device renderer fails: {first_line(error)}", AGREE)
            return
        count, different = count + VIEWS, different + int((~same).sum())
    if different:
        yield problem(name, f"{different} of {count} views differ from the reference", AGREE)
    else:
        yield ok(name, f"{count} views are the same bytes by both")


def _policies() -> list[tuple[ViewPolicy, int]]:
    """Policies with every operation, each with the side of a canvas."""
    every = ViewPolicy(
        size=48,
        filter="bicubic",
        randaugment=RandAugment(n=3, m=12),
        jitter=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        erase=RandomErasing(probability=0.5),
        mix=Mix(),
    )
    return [(every, 65), (ViewPolicy.load("cifar"), 40), (ViewPolicy.load("pets", size=64), 96)]


def choices() -> Iterator[Line]:
    """What commands choose where nothing is said."""
    from kdcache.replay.prefetch import choose_renderer
    from kdcache.teachers.config import usual_dump
    from kdcache.training.config import Runtime
    from kdcache.training.devices import resolve_device

    device, policy = resolve_device("auto"), ViewPolicy.load("pets")
    usual = usual_dump(device.type)
    renderer = choose_renderer("auto", policy, 336, usual.batch_size, device)
    text = f"device {device}, dumps in {usual.precision} by batches of {usual.batch_size}, {Runtime().workers} workers"
    yield ok("by default", f"{text}, the {renderer} renderer (views of {policy.size} px)")
