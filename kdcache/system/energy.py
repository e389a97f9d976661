"""Seconds and joules of work, from the energy counters of NVIDIA GPUs and, on Linux, of CPU packages.

A counter covers a whole GPU or package, including use by other processes. No counter covers memory, disks, fans and power
supplies. A counter that cannot be read gives None, never a guess: without a driver, in most virtual machines, for a part of
a GPU (MIG), and for CPU packages often without root.
"""

import importlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["NOTHING", "SHARED_GPU", "UNKNOWN", "Meter", "Spent", "total"]

SHARED_GPU = "KDCACHE_SHARED_GPU"  # in the environment of a job that may have others beside it on its GPU: its costs are unknown
POWERCAP = Path("/sys/class/powercap")
POLL = 10.0  # seconds; package counters wrap around after a minute of full load at the earliest
MOST_WATTS = 1000.0  # of one package; if a pause is long enough for a wrap at this power, the energy is unknown

JouleCounter = Callable[[], float | None]  # joules so far


@dataclass(frozen=True)
class Spent:
    """Seconds summed over processes, and joules of their GPUs and of CPU packages. None is unknown."""

    device_seconds: float | None = None
    gpu_joules: float | None = None
    cpu_joules: float | None = None

    def __add__(self, other: "Spent") -> "Spent":
        """Sum of both. A field that is unknown in one is unknown in the sum."""
        pairs = zip(self._values, other._values, strict=True)
        return Spent(*(None if a is None or b is None else a + b for a, b in pairs))

    def __mul__(self, share: float) -> "Spent":
        return Spent(*(None if value is None else value * share for value in self._values))

    @property
    def _values(self) -> tuple[float | None, float | None, float | None]:
        return self.device_seconds, self.gpu_joules, self.cpu_joules

    @property
    def hours(self) -> float | None:
        """Device-hours, summed over the processes."""
        return None if self.device_seconds is None else self.device_seconds / 3600

    @property
    def watt_hours(self) -> float | None:
        """Watt-hours of the counted devices, see `counted`."""
        joules = [value for value in (self.gpu_joules, self.cpu_joules) if value is not None]
        return sum(joules) / 3600 if joules else None

    @property
    def counted(self) -> str:
        """Names of the devices that the energy covers."""
        kinds = (("GPUs", self.gpu_joules), ("CPU packages", self.cpu_joules))
        return " and ".join(name for name, value in kinds if value is not None)

    def known(self) -> dict[str, float]:
        """The known fields by name, for logs and records."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, record: object) -> "Spent":
        """The values in a record of unknown origin. Anything but a plausible number is unknown."""
        fields = record if isinstance(record, Mapping) else {}
        return cls(*(_number(fields.get(name)) for name in ("device_seconds", "gpu_joules", "cpu_joules")))


UNKNOWN, NOTHING = Spent(), Spent(0.0, 0.0, 0.0)


def total(parts: Iterable[Spent]) -> Spent:
    return reduce(add, parts, NOTHING)


def _number(value: object) -> float | None:
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if real else None  # type: ignore[arg-type]


class Meter:
    """Measures from one `lap` to the next: seconds, and joules of some GPUs and of this machine's CPU packages.

    gpus: their NVML UUIDs (`GPU-...`).
    share: this process's share of the packages, if several work side by side; None: unknown, so packages are not read.
    unknown: others take a part of the time and the energy that is not known: every lap is UNKNOWN, and nothing is read.
    powercap, nvml: sources of counters, a folder and a module like `pynvml`.

    While the meter is open (`with`), a thread polls the package counters, so that no wrap-around is missed.
    """

    def __init__(
        self,
        gpus: Sequence[str] = (),
        *,
        share: float | None = 1.0,
        unknown: bool = False,
        powercap: Path = POWERCAP,
        nvml: Any = None,
    ) -> None:
        self._share, self._unknown = share, unknown
        self._packages = [] if share is None or unknown else _packages(powercap)
        self._gpus, self._close = _gpus(gpus, nvml) if gpus and not unknown else ([], lambda: None)
        self._closed = threading.Event()
        self._last = self._reading()

    def lap(self) -> Spent:
        """Spent since the last lap, or since the meter was made."""
        if self._unknown:
            return UNKNOWN
        before, self._last = self._last, self._reading()
        seconds, gpu, cpu = (_difference(*pair) for pair in zip(before, self._last, strict=True))
        return Spent(seconds, gpu, None if cpu is None or self._share is None else cpu * self._share)

    def __enter__(self) -> Self:
        if self._packages:
            threading.Thread(target=self._watch, name="kdcache-energy", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self._close()

    def _watch(self) -> None:
        while not self._closed.wait(POLL):
            for package in self._packages:
                package.look()

    def _reading(self) -> tuple[float, float | None, float | None]:
        return time.monotonic(), _sum(self._gpus), _sum([package.joules for package in self._packages])


def _sum(counters: Sequence[JouleCounter]) -> float | None:
    values = [counter() for counter in counters]
    known = [value for value in values if value is not None]
    return sum(known) if values and len(known) == len(values) else None


def _difference(before: float | None, after: float | None) -> float | None:
    """Increase of a counter; None if it is unknown, or if the counter was reset."""
    return None if before is None or after is None or after < before else after - before


def _gpus(uuids: Sequence[str], nvml: Any) -> tuple[list[JouleCounter], Callable[[], None]]:
    """(counters of the GPUs, function that ends NVML). A counter that cannot be read gives None."""
    nvml = nvml or importlib.import_module("pynvml")

    def counter(uuid: str) -> JouleCounter:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        if _is_divided(handle, nvml):  # the counter is of the whole GPU
            return lambda: None

        def joules() -> float | None:
            try:
                return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
            except nvml.NVMLError:  # GPUs before Volta have no counter
                return None

        return joules

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return [lambda: None], lambda: None
    try:
        return [counter(uuid) for uuid in uuids], nvml.nvmlShutdown
    except nvml.NVMLError:
        return [lambda: None], nvml.nvmlShutdown


def _is_divided(handle: Any, nvml: Any) -> bool:
    """Whether this is a GPU that is divided into parts (MIG), or such a part."""
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle)) or nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except nvml.NVMLError:  # of most GPUs, which cannot be divided
        return False


class _Package:
    """Joules that a CPU package has used since this object was made. Its counter wraps around when full."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = _integer(zone / "max_energy_range_uj")
        self._lock = threading.RLock()
        self._joules, self._missed = 0.0, False
        self._at, self._seen = _integer(self._file), time.monotonic()

    def look(self) -> None:
        """Add the counter's increase since the last look."""
        with self._lock:
            at, now = _integer(self._file), time.monotonic()
            if at is None or self._at is None or not self._range or now - self._seen > self._range / 1e6 / MOST_WATTS:
                self._missed = True
            else:
                self._joules += (at - self._at) % self._range / 1e6
            self._at, self._seen = at, now

    def joules(self) -> float | None:
        """Joules so far; None if some may have been missed since the last call."""
        with self._lock:
            self.look()
            missed, self._missed = self._missed, False
            return None if missed else self._joules


def _packages(powercap: Path) -> list[_Package]:
    """The CPU packages that Linux lists (Intel and AMD). Subzones, and psys, which contains packages, are left out."""
    try:
        zones = sorted(powercap.glob("intel-rapl:*"))
        return [_Package(zone) for zone in zones if (zone / "name").read_text("utf-8").startswith("package")]
    except (OSError, UnicodeDecodeError):
        return []


def _integer(file: Path) -> int | None:
    try:
        return int(file.read_text("ascii"))
    except (OSError, ValueError):
        return None
