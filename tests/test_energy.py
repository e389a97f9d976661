"""Energy counters: folders and modules like those of Linux and NVIDIA, and what becomes of those that cannot be read."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.models.creation import Normalisation
from kdcache.system import energy
from kdcache.system.distributed import Rank, this_rank
from kdcache.system.energy import NOTHING, UNKNOWN, Meter, Spent, total
from kdcache.training.config import TrainConfig
from kdcache.training.devices import metered, seeded
from kdcache.training.learner import Learner
from kdcache.training.lockstep import charge

RANGE = 65_532_610_987  # microjoules after which AMD's counters begin anew


class Zones:
    """`/sys/class/powercap` of a machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def zone(self, zone: str, name: str, microjoules: int) -> None:
        place = self.folder / zone
        place.mkdir(parents=True)
        (place / "name").write_text(f"{name}\n")
        (place / "max_energy_range_uj").write_text(f"{RANGE}\n")
        self.set(zone, microjoules)

    def set(self, zone: str, microjoules: int) -> None:
        written = self.folder / zone / "written"
        written.write_text(f"{microjoules}\n")
        written.replace(self.folder / zone / "energy_uj")  # at once, as the thread of an open meter reads it


@pytest.fixture
def zones(tmp_path: Path) -> Zones:
    """Two packages with a core zone, and what is more than a package or the same once more."""
    made = Zones(tmp_path / "powercap")
    made.zone("intel-rapl:0", "package-0", 5_000_000)
    made.zone("intel-rapl:1", "package-1", 7_000_000)
    made.zone("intel-rapl:0:0", "core", 1_000_000)
    made.zone("intel-rapl:2", "psys", 90_000_000)
    made.zone("intel-rapl-mmio:0", "package-0", 5_000_000)
    return made


class Nvml:
    """A module like pynvml, of GPUs with so many millijoules; None: without a counter. Those in `divided` have parts (MIG)."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: dict[str, int | None], *, driver: bool = True, divided: tuple[str, ...] = ()) -> None:
        self.gpus, self.driver, self.open, self.divided = gpus, driver, 0, divided

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.gpus:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> int:  # noqa: N802
        return int(handle.startswith("MIG-"))

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:  # noqa: N802
        if not self.divided:
            raise self.NVMLError("Not Supported")
        return (int(handle in self.divided),) * 2

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        value = self.gpus[handle]
        if value is None:
            raise self.NVMLError("Not Supported")
        return value


# ---------------------------------------------------------------- CPU packages


def test_packages_are_added_up_and_nothing_is_counted_twice(zones: Zones) -> None:
    meter = Meter(powercap=zones.folder)
    for zone, microjoules in (("intel-rapl:0", 8_000_000), ("intel-rapl:1", 7_500_000), ("intel-rapl:0:0", 3_000_000)):
        zones.set(zone, microjoules)
    zones.set("intel-rapl:2", 99_000_000)
    spent = meter.lap()
    assert spent.cpu_joules == pytest.approx(3.5)
    assert spent.gpu_joules is None
    assert spent.device_seconds is not None
    assert 0 < spent.device_seconds < 10
    assert meter.lap().cpu_joules == 0


def test_a_full_counter_begins_anew(zones: Zones) -> None:
    zones.set("intel-rapl:0", RANGE - 2_000_000)
    meter = Meter(powercap=zones.folder)
    zones.set("intel-rapl:0", 1_000_000)
    assert meter.lap().cpu_joules == pytest.approx(3.0)


def test_an_open_meter_looks_before_a_counter_is_full_twice(zones: Zones, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POLL", 0.001)
    with Meter(powercap=zones.folder) as meter:
        package = meter._packages[0]
        for lap in range(1, 4):  # each of them nearly once around
            zones.set("intel-rapl:0", 5_000_000 - lap * 1_000_000)
            while package._at != 5_000_000 - lap * 1_000_000:
                time.sleep(0.001)
        assert meter.lap().cpu_joules == pytest.approx(3 * (RANGE - 1_000_000) / 1e6)


def test_what_a_counter_may_have_missed_is_unknown(zones: Zones, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(energy.time, "monotonic", lambda: now)
    meter = Meter(powercap=zones.folder)
    now += 60  # of 65 that a kilowatt takes to fill it
    zones.set("intel-rapl:0", 6_000_000)
    assert meter.lap() == Spent(60.0, None, 1.0)
    now += 70
    zones.set("intel-rapl:0", 7_000_000)
    assert meter.lap() == Spent(70.0, None, None)
    meter.lap()
    zones.set("intel-rapl:0", 9_000_000)
    assert meter.lap().cpu_joules == 2.0


@pytest.mark.parametrize("damage", ["no folder", "no counter", "a folder", "no number", "no range", "no name"])
def test_packages_that_cannot_be_read_are_unknown_and_not_zero(zones: Zones, tmp_path: Path, damage: str) -> None:
    zone = zones.folder / "intel-rapl:1"
    powercap = tmp_path / "not-there" if damage == "no folder" else zones.folder
    if damage in {"no counter", "a folder"}:  # as root reads whatever is there
        (zone / "energy_uj").unlink()
        if damage == "a folder":
            (zone / "energy_uj").mkdir()
    elif damage == "no number":
        (zone / "energy_uj").write_text("")
    elif damage == "no range":
        (zone / "max_energy_range_uj").write_text("0")
    elif damage == "no name":
        (zone / "name").unlink()
    meter = Meter(powercap=powercap)
    spent = meter.lap()
    assert spent.cpu_joules is None
    assert "cpu_joules" not in spent.known()


def test_processes_side_by_side_have_equal_parts_of_the_packages(zones: Zones, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", 3), ("WORLD_SIZE", 8), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert this_rank() == Rank(3, 8, 1, 4)
    meter = Meter(share=this_rank().share, powercap=zones.folder)
    zones.set("intel-rapl:0", 9_000_000)
    assert meter.lap().cpu_joules == 1.0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    meter = Meter(share=this_rank().share, powercap=zones.folder)
    assert meter.lap().cpu_joules is None, "how many share them is not known"
    monkeypatch.delenv("RANK")
    assert this_rank().share == 1.0


# ---------------------------------------------------------------- GPUs


def test_only_the_gpus_that_are_named_are_read(tmp_path: Path) -> None:
    nvml = Nvml({"GPU-a": 5_000, "GPU-b": 1_000_000, "GPU-c": 7_000})
    with Meter(["GPU-a", "GPU-c"], powercap=tmp_path, nvml=nvml) as meter:
        nvml.gpus |= {"GPU-a": 6_500, "GPU-b": 9_000_000, "GPU-c": 7_250}
        spent = meter.lap()
        assert (spent.gpu_joules, spent.cpu_joules) == (1.75, None)
        assert nvml.open == 1
        nvml.gpus["GPU-a"] = 10  # the driver was loaded anew
        assert meter.lap().gpu_joules is None
        nvml.gpus["GPU-a"] = 1_010
        assert meter.lap().gpu_joules == 1.0
    assert nvml.open == 0


@pytest.mark.parametrize(
    "nvml",
    [
        Nvml({}, driver=False),
        Nvml({"GPU-a": 1}),
        Nvml({"GPU-a": 1, "GPU-b": None}),
        Nvml({"GPU-a": 1, "GPU-b": 1}, divided=("GPU-b",)),
    ],
    ids=["driver", "unknown", "old", "MIG"],
)
def test_gpus_without_a_counter_are_unknown(tmp_path: Path, nvml: Nvml) -> None:
    with Meter(["GPU-a", "GPU-b"], powercap=tmp_path, nvml=nvml) as meter:
        assert meter.lap().gpu_joules is None
    assert nvml.open == 0


def test_the_gpu_of_a_device_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever CUDA_VISIBLE_DEVICES makes of the numbers."""
    asked: list[Any] = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(uuid="0a1b")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    nvml = Nvml({"GPU-0a1b": 2_000, "GPU-other": 0})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with metered(torch.device("cuda:1")) as meter:
        nvml.gpus = {"GPU-0a1b": 5_000, "GPU-other": 70_000}
        assert meter.lap().gpu_joules == 3.0
    assert asked == [torch.device("cuda:1")]
    with metered(torch.device("cpu")) as meter:
        assert meter.lap().gpu_joules is None


def test_the_costs_of_jobs_that_may_share_a_gpu_are_unknown(zones: Zones, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others each takes longer, and counters count all of them."""
    monkeypatch.setattr(Meter.__init__, "__kwdefaults__", (Meter.__init__.__kwdefaults__ or {}) | {"powercap": zones.folder})
    with metered(torch.device("cpu")) as meter:
        zones.set("intel-rapl:0", 6_000_000)
        assert meter.lap().cpu_joules == 1.0
    monkeypatch.setenv("KDCACHE_SHARED_GPU", "1")
    with metered(torch.device("cpu")) as meter:
        zones.set("intel-rapl:0", 7_000_000)
        assert meter.lap() == UNKNOWN


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_uses_energy() -> None:
    device = torch.device("cuda")
    with metered(device) as meter:
        x = torch.randn(4096, 4096, device=device)
        while (spent := meter.lap()).gpu_joules == 0:
            x = (x @ x).tanh()
    assert spent.gpu_joules is None or 0 < spent.gpu_joules < 10_000


# ---------------------------------------------------------------- sums


def test_sums_know_no_more_than_their_parts() -> None:
    parts = [Spent(1.0, 2.0, None), Spent(3.0, None, None), Spent(4.0, 5.0, 6.0)]
    assert total(parts) == Spent(8.0, None, None)
    assert total([]) == NOTHING
    assert Spent(1.0, 2.0, None) * 0.5 == Spent(0.5, 1.0, None)
    assert (Spent(1.0, 2.0, None) + UNKNOWN).known() == {}


# ---------------------------------------------------------------- models in training


def learner(folder: Path, epochs: int = 2) -> Learner:
    with seeded(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    same = Normalisation((0.5,) * 3, (0.5,) * 3)
    how: dict[str, Any] = {"steps_per_epoch": 2, "seed": 0, "device": torch.device("cpu")}
    return Learner(folder, model, same, TrainConfig(epochs=epochs, batch_size=4), **how)


def step(one: Learner, views: int = 4) -> None:
    one.step(torch.zeros(views, 3, 2, 2, dtype=torch.uint8), lambda logits: logits.square().sum(), lambda logits: {})


def test_learners_share_what_all_of_them_took(tmp_path: Path) -> None:
    one, other, idle = (learner(tmp_path / name) for name in ("one", "other", "idle"))
    for each in (one, one, other):
        step(each)
    whole = one.uncharged + other.uncharged
    share = one.uncharged / whole
    charge([one, other, idle], Spent(10.0, None, 100.0))
    charge([one, other], Spent(1.0, None, 10.0))  # a test, in which nobody stepped
    one.end_epoch({})
    other.end_epoch({})
    assert one.last["device_seconds"] == pytest.approx(10 * share + 0.5)
    assert one.last["device_seconds"] + other.last["device_seconds"] == pytest.approx(11.0)
    assert one.last["cpu_joules"] + other.last["cpu_joules"] == pytest.approx(110.0)
    assert "gpu_joules" not in one.last
    step(idle)
    idle.end_epoch({})
    assert idle.last["device_seconds"] == 0


@pytest.mark.parametrize("known", [True, False])
def test_what_an_epoch_took_before_it_was_suspended_counts(tmp_path: Path, known: bool) -> None:
    """Of checkpoints from before this was recorded, nothing is known of such an epoch, and all of the next one."""
    begun = learner(tmp_path)
    step(begun)
    charge([begun], Spent(3.0, 30.0, None))
    begun.suspend()
    if not known:
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        del state["spent"]
        torch.save(state, tmp_path / "checkpoint.pt")
    resumed = learner(tmp_path)
    for _ in range(2):
        step(resumed)
        charge([resumed], Spent(4.0, 40.0, None))
        resumed.end_epoch({"test_top1": 50.0})
    first, second = ({name: row.get(name) for name in ("device_seconds", "gpu_joules")} for row in resumed.rows)
    assert first == ({"device_seconds": 7.0, "gpu_joules": 70.0} if known else {"device_seconds": None, "gpu_joules": None})
    assert second == {"device_seconds": 4.0, "gpu_joules": 40.0}


def test_a_learner_that_nobody_charges_says_nothing(tmp_path: Path) -> None:
    alone = learner(tmp_path)
    step(alone)
    alone.end_epoch({})
    assert not {"device_seconds", "gpu_joules", "cpu_joules"} & alone.last.keys()


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3", True, None, [1]])
def test_records_of_others_are_taken_for_what_they_can_be(value: Any) -> None:
    assert Spent.of({"device_seconds": value, "gpu_joules": 2, "more": 1}) == Spent(None, 2.0, None)
    assert Spent.of(value) == UNKNOWN
