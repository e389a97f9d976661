"""Several jobs of a study on one GPU: as many as its memory suffices for, by what jobs of their kind took before."""

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcache.study import slots
from kdcache.study.jobs import Job
from kdcache.study.running import _on_gpu
from kdcache.study.slots import Slot, gpu_slot, kind_of, measured
from kdcache.system import peak
from kdcache.system.peak import gpu_memory

PROCESSES = multiprocessing.get_context("fork")  # which takes no time to import anything
GB = 10**9


def free(gpu: str) -> tuple[int, int] | None:
    """The memory of two made-up GPUs, nothing of which is taken yet; nothing is known of others."""
    return {"0": (100 * GB, 100 * GB), "GPU-abc": (40 * GB, 100 * GB)}.get(gpu)


def hold(folder: str, devices: list[str], needed: int | None, most: int, alone: bool, told: Any, end: Any) -> None:
    """In a process of its own: a place, until it may end."""
    slots.tempfile.tempdir, slots.PATIENCE = folder, 0.01
    with gpu_slot(devices, lambda: needed, most=most, memory=free, alone=alone) as slot:
        told.send((slot.gpu, slot.claim))
        end.poll(None)


class Holders:
    def __init__(self, folder: Path) -> None:
        self.folder, self.held = str(folder), []

    def start(self, needed: int | None, devices: tuple[str, ...] = ("0",), *, most: int = 4, alone: bool = False) -> Any:
        told, teller = PROCESSES.Pipe(duplex=False)
        waits, end = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=hold, args=(self.folder, list(devices), needed, most, alone, teller, waits))
        process.start()
        self.held.append((process, end))
        return SimpleNamespace(told=told, end=end, process=process)

    def gpu(self, *arguments: Any, **options: Any) -> str:
        """The GPU that a new holder has at once."""
        holder = self.start(*arguments, **options)
        assert holder.told.poll(20), "it has no place"
        return holder.told.recv()[0]

    def waits(self, *arguments: Any, **options: Any) -> Any:
        holder = self.start(*arguments, **options)
        assert not holder.told.poll(0.3), "it has a place"
        return holder


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[Holders]:
    made = Holders(tmp_path)
    yield made
    for process, _ in made.held:
        process.kill()
        process.join()


def test_jobs_share_a_gpu_as_far_as_its_memory_suffices(holders: Holders) -> None:
    first = holders.start(40 * GB)
    assert first.told.poll(20)
    assert holders.gpu(45 * GB) == "0"
    third = holders.waits(30 * GB)  # with the others it would be 115 of 100
    first.process.kill()  # however it ends, its place is free
    assert third.told.poll(20)


def test_a_job_of_which_nothing_is_known_has_a_gpu_to_itself(holders: Holders) -> None:
    first = holders.start(None)
    assert first.told.poll(20)
    second = holders.waits(1 * GB)
    first.end.send(None)
    assert second.told.poll(20)
    holders.waits(None)
    holders.waits(1 * GB, alone=True)


def test_an_empty_gpu_is_the_better_place_and_no_gpu_has_more_jobs_than_asked_for(holders: Holders) -> None:
    both = ("0", "GPU-abc")
    assert {holders.gpu(10 * GB, both, most=2), holders.gpu(10 * GB, both, most=2)} == set(both)
    assert [holders.gpu(10 * GB, (gpu,), most=2) for gpu in both] == list(both)
    holders.waits(10 * GB, both, most=2)


def test_what_other_programs_have_is_not_given_away(holders: Holders) -> None:
    assert holders.gpu(50 * GB, ("GPU-abc",)) == "GPU-abc", "alone it is tried, as ever"
    holders.waits(41 * GB, ("GPU-abc",))


def test_gpus_without_known_memory_are_not_shared(holders: Holders) -> None:
    assert holders.gpu(1 * GB, ("7",)) == "7"
    holders.waits(1 * GB, ("7",))


def test_with_one_place_a_job_claims_the_whole_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with gpu_slot(["0"], lambda: GB, most=1, memory=free) as slot:
        assert slot == Slot("0", slot.lock, None)


# ---------------------------------------------------------------- what jobs take


def train(number: int, *more: str, teacher: str = "vit_s", dataset: str = "pets") -> Job:
    return Job(f"train-{number:08x}", "train", "", ("train-teacher", "--teacher", teacher, "--dataset", dataset, *more))


def dump(number: int, trained: Job, *more: str) -> Job:
    words = ("dump-teacher", *trained.arguments[1:5], "--teacher-folder", f"{{{trained.id}}}", *more)
    return Job(f"dump-{number:08x}", "dump", "", words, (trained.id,))


def distill(number: int, dumped: Job, *more: str) -> Job:
    return Job(f"distill-{number:08x}", "distill", "", ("distill", "--archive", f"{{{dumped.id}}}", *more), (dumped.id,))


def kinds(*jobs: Job, beside: tuple[Job, ...] = ()) -> set[tuple[Any, ...]]:
    known = {job.id: job for job in (*jobs, *beside)}
    return {kind_of(job, known) for job in jobs}


def test_jobs_of_one_kind_take_as_much_memory() -> None:
    same = (train(1, "--epochs", "20"), train(2, "--epochs", "200", "--seed", "1"), train(3, "--epochs", "5", "--seed", "2"))
    assert len(kinds(*same[1:])) == 1
    assert len(kinds(same[1], train(4, "--epochs", "20,50", "--seed", "1"))) == 2
    assert len(kinds(train(1), train(2, teacher="rn50"), train(3, dataset="cars"), train(4, "--batch-size", "8"))) == 4
    one, other = train(1, "--epochs", "20"), train(2, "--epochs", "50")
    a, b = dump(1, one, "--policy", "pets"), dump(2, other, "--policy", "pets")
    assert len(kinds(a, b, beside=(one, other))) == 1
    students = (distill(1, a, "--tau", "1,2", "--lr", "0.1"), distill(2, b, "--tau", "4,20", "--lr", "0.2"))
    assert len(kinds(*students, beside=(a, b))) == 1
    assert len(kinds(students[0], distill(3, b, "--tau", "4", "--lr", "0.2"), beside=(a, b))) == 2
    assert len(kinds(students[0], distill(3, b, "--tau", "4,20", "--lr", "0.2", "--method", "dkd"), beside=(a, b))) == 2


def test_what_a_job_takes_is_the_most_that_its_kind_took() -> None:
    jobs = [train(1, "--seed", "1"), train(2, "--seed", "2"), train(3, "--seed", "3"), train(4, "--seed", "4", teacher="rn50")]
    records = {jobs[0].id: {"gpu_bytes": 20 * GB}, jobs[1].id: {"gpu_bytes": 30 * GB}, jobs[3].id: {"seconds": 1.0}}
    known = {job.id: job for job in jobs}
    assert measured(jobs[2], known, records.get) == 33 * GB
    assert measured(jobs[3], known, records.get) is None


# ---------------------------------------------------------------- memory of GPUs


class Nvml(SimpleNamespace):
    """A module like pynvml with three whole GPUs, and a part of one."""

    class NVMLError(Exception):
        pass

    def __init__(self, names: tuple[str, ...] = ("H200", "H200", "H200")) -> None:
        parts = {"MIG-11": (5, 10)}

        def by_uuid(uuid: str) -> str:
            if uuid not in parts:
                raise self.NVMLError("Not Found")
            return uuid

        super().__init__(
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetCount=lambda: len(names),
            nvmlDeviceGetHandleByIndex=lambda number: number,
            nvmlDeviceGetName=lambda handle: names[handle],
            nvmlDeviceGetUUID=lambda handle: ("GPU-0a", "GPU-0b", "GPU-1c")[handle],
            nvmlDeviceGetHandleByUUID=by_uuid,
            nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(
                **dict(zip(("free", "total"), parts.get(handle, (handle, 80)), strict=True))
            ),
        )


@pytest.mark.parametrize(
    ("gpu", "memory"),
    [("2", (2, 80)), ("GPU-0b", (1, 80)), ("GPU-1", (2, 80)), ("GPU-0", None), ("MIG-11", (5, 10)), ("MIG-9", None), ("3", None)],
)
def test_the_memory_of_a_gpu_is_found_by_the_name_that_cuda_has_for_it(
    monkeypatch: pytest.MonkeyPatch, gpu: str, memory: tuple[int, int] | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert gpu_memory(gpu) == memory


def test_numbers_of_unequal_gpus_are_trusted_in_the_order_of_their_places_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(("T4", "H200", "H200")))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert gpu_memory("2") is None
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert gpu_memory("2") == (2, 80)


def test_a_process_tells_at_its_end_what_it_took(tmp_path: Path, run_python, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peak.PEAK_FILE, str(tmp_path / "peak"))
    gpu = "SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 1, max_memory_reserved=lambda device: 5)"
    code = "import sys; from types import SimpleNamespace; from kdcache.system.peak import tell_peak; tell_peak(); {}"
    run_python(code.format("pass"))
    assert peak.read_peak(tmp_path / "peak") is None, "it used no GPU"
    run_python(code.format(f"sys.modules['torch'] = SimpleNamespace(cuda={gpu})"))
    assert peak.read_peak(tmp_path / "peak") == 5 + peak.CONTEXT


def test_a_job_that_memory_does_not_suffice_for_beside_others_is_tried_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    said: list[str] = []
    seen: list[dict[str, str]] = []

    def call(environment: dict[str, str], *locks: int) -> tuple[int, str]:
        seen.append(environment)
        return (75, "") if len(seen) == 1 else (0, "made")

    progress = SimpleNamespace(say=said.append)
    assert _on_gpu(call, ["2"], lambda: 1, 2, "a job", progress) == (0, "made")
    assert seen == [{"CUDA_VISIBLE_DEVICES": "2", "KDCACHE_SHARED_GPU": "1"}, {"CUDA_VISIBLE_DEVICES": "2"}]
    assert said == ["exit status 75 beside other jobs on GPU 2; it is tried again on a GPU of its own: a job"]
    seen.clear()
    assert _on_gpu(call, ["2"], lambda: None, 2, "a job", progress) == (75, ""), "it was alone"
