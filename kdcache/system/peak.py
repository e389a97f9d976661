"""How much of a GPU's memory a process has taken at most, told at its end to the one that started it; and what a GPU has."""

import atexit
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from kdcache.system.documents import read_json
from kdcache.system.files import write_atomically

__all__ = ["PEAK_FILE", "gpu_memory", "read_peak", "tell_peak"]

PEAK_FILE = "KDCACHE_PEAK_FILE"  # where the environment names it
CONTEXT = 1 << 30  # that CUDA and its libraries take of a GPU beside the allocator's blocks


def tell_peak() -> None:
    """At the end of this process, write what it has taken of a GPU into the file that the environment names, if it does."""
    # Not inherited: the processes that render for this one take nothing.
    if file := os.environ.pop(PEAK_FILE, None):
        atexit.register(_tell, Path(file), os.getpid())


def _tell(file: Path, process: int) -> None:
    torch = sys.modules.get("torch")  # a process without it has not used a GPU
    if torch is None or os.getpid() != process or not torch.cuda.is_initialized():
        return
    reserved = max(torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count()))
    write_atomically(file, json.dumps(reserved + CONTEXT).encode())


def read_peak(file: Path) -> int | None:
    """Bytes that were told; None if the process has used no GPU."""
    try:
        return int(read_json(file))
    except (OSError, ValueError):
        return None


def gpu_memory(gpu: str) -> tuple[int, int] | None:
    """Free and all bytes of a GPU, by its name in CUDA_VISIBLE_DEVICES, without using it; None if they are unknown."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        found = pynvml.nvmlDeviceGetMemoryInfo(_handle(gpu, pynvml))
        return int(found.free), int(found.total)
    except (pynvml.NVMLError, LookupError):
        return None
    finally:
        pynvml.nvmlShutdown()


def _handle(gpu: str, nvml: Any) -> Any:
    """NVML's handle of a GPU. LookupError if it cannot be told which one is meant."""
    if not re.fullmatch(r"\d+", gpu):
        named = (nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount()))
        whole = [handle for handle in named if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(gpu)]
        return whole[0] if len(whole) == 1 else nvml.nvmlDeviceGetHandleByUUID(gpu)  # a part of a GPU has a whole UUID
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    # CUDA counts the fastest first, NVML by place; among equals that is the same order.
    equal = len({_text(nvml.nvmlDeviceGetName(handle)) for handle in handles}) == 1
    if not equal and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise LookupError(gpu)
    return handles[int(gpu)]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
