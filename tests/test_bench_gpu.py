"""`kdcache bench gpu`: every check's code in small on the CPU, and a report that keeps what was found, whatever happens."""

import contextlib
import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdcache import cli
from kdcache.bench.gpu import CHECKS, Check, Outcome, measuring, rendering, run_checks, runs, students, teachers
from kdcache.bench.gpu.measuring import Found, NotHereError, Setting
from kdcache.bench.turns import Result
from kdcache.errors import NotFoundError, UsageError
from kdcache.students.records import record_graph
from kdcache.system.progress import Silent
from tests.stand_ins import launched

HAS_GPU = torch.cuda.is_available()
LONG = {"packed", "processes"}  # whole commands
ON_A_GPU_ONLY = {"launches", "smoothing", "graph"}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(torch.device("cpu"), tmp_path, 0.01, Silent(), tiny=True)


def names() -> list[Any]:
    marks = {True: [pytest.mark.exhaustive], False: []}
    return [pytest.param(check.name, marks=marks[check.name in LONG]) for check in CHECKS if check.name not in ON_A_GPU_ONLY]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", names())
def test_every_check_runs_in_small_on_a_cpu(name: str) -> None:
    for _ in range(3):
        [outcome] = run_checks([name], 0.01, device="cpu", tiny=True).outcomes
        if not outcome.reason.endswith(runs.BUSY):
            break
    assert (outcome.state, outcome.reason) == ("found", "")
    assert outcome.results
    assert all(np.isfinite(result.value) for result in outcome.results)
    if name in {"bytes", "numerics", "waits", "resume", "streams", "processes"}:  # and not a matter of speed
        assert outcome.missed == []


@pytest.mark.parametrize("name", sorted(ON_A_GPU_ONLY))
def test_what_needs_a_gpu_is_left_out_with_the_reason(name: str) -> None:
    [outcome] = run_checks([name], 0.01, device="cpu", tiny=True).outcomes
    assert outcome.state == "left out"
    assert outcome.reason


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_every_check_runs_in_small_on_a_gpu(tmp_path: Path) -> None:
    report = run_checks([], 0.1, tiny=True, output=tmp_path / "report.json")
    assert [(each.name, each.reason) for each in report.outcomes if each.state == "failed"] == []
    found = {each.name: each for each in report.outcomes}
    for name in ("bytes", "numerics", "waits", "resume", "launches", "smoothing"):
        assert found[name].missed == [], name


# ---------------------------------------------------------------- the checks notice what they look for


def test_other_bytes_are_counted(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rendering.render_positions

    def wrong(pixels: Any, table: Any, positions: Any, renderer: str, *where: Any) -> Any:
        views = real(pixels, table, positions, renderer, *where)  # type: ignore[arg-type]
        if where:  # the device's
            views[0, 0, 0, 0] ^= 1
        return views

    monkeypatch.setattr(rendering, "render_positions", wrong)
    found = rendering.equal_bytes(setting)
    policies = int(found.results[0].against.split()[0])
    assert found.results[0].value == policies
    assert len(found.details["first"]) == min(policies, 5)


def test_random_policies_can_be_drawn_and_are_many() -> None:
    drawn = np.random.default_rng(1)
    made = [rendering.random_policy(drawn, 200) for _ in range(300)]
    assert len({policy.digest for policy, _ in made}) == 300
    assert all(side <= 25 * policy.size for policy, side in made)
    cases = list(rendering._cases(rendering.VIEWS))
    assert sum(case.count for case in cases) >= rendering.VIEWS
    assert {case.renderer for case in cases} == {"reference", "device"}


def test_float32_that_is_not_is_a_missed_bound(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "float32_error", lambda device: 2.0**-11)
    real = teachers.Forward.__call__
    monkeypatch.setattr(teachers.Forward, "__call__", lambda self, views: real(self, views) * 1.01)
    assert all(result.value > result.bound for result in teachers.numerics(setting).results)


def test_launches_are_those_of_a_batch(setting: Setting) -> None:
    found = rendering.launches(setting, count=lambda setting, work: (work(), 400)[1])  # type: ignore[func-returns-value]
    assert [result.value for result in found.results] == [100.0]  # of four batches


def test_launches_of_smoothing_are_counted_on_any_device(setting: Setting) -> None:
    found = students.smoothing(setting, count=lambda setting, work: launched(work).kernels)
    assert found.details["kernels"].keys() == {"ls-instance", "ls-global", "bottom", "none"}


def test_waits_are_told_with_their_place(setting: Setting) -> None:
    def places(setting: Setting, work: Any) -> Counter[str]:
        work()
        return Counter({"learner.py:1": 2})

    found = students.no_waits(setting, places)
    assert {result.value for result in found.results} == {2}
    assert found.details["usual"] == {"learner.py:1": 2}


def test_tensors_of_other_bits_are_counted(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, value in zip(folders, (1.0, 1.0, 1.0 + 2**-23), strict=True):
        folder.mkdir()
        save_file({"w": torch.tensor([value]), "same": torch.zeros(2)}, folder / "last.safetensors")
    assert runs.different_tensors(folders[:1], folders[1:2]) == 0
    assert runs.different_tensors(folders[:2], folders[1:]) == 1


def test_whether_a_run_was_replayed_is_read_from_its_record(tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_text("student: test_vit\n")
    assert runs.graph_state(tmp_path) == "not recorded"
    record_graph(tmp_path, "on")
    assert runs.graph_state(tmp_path) == "on"


def on_a_mocked_gpu(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> tuple[Setting, list[str]]:
    """A setting whose device is a GPU that does nothing, and the modes that synchronisation was debugged in."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return dataclasses.replace(setting, device=torch.device("cuda")), modes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_warnings_of_synchronisation_are_waits(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, modes = on_a_mocked_gpu(setting, monkeypatch)

    def work() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    [(place, count)] = measuring.waits(gpu, work).items()
    assert (place.partition(":")[0], count) == (Path(__file__).name, 1)
    assert modes == ["warn", "default"]
    with pytest.raises(ZeroDivisionError):
        measuring.waits(gpu, lambda: 1 // (0 if modes[-1] == "warn" else 1))
    assert modes[-1] == "default"


def test_kernels_are_the_profilers_events_on_the_device(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, _ = on_a_mocked_gpu(setting, monkeypatch)
    kinds = [SimpleNamespace(device_type=SimpleNamespace(name=name)) for name in ("CUDA", "CPU", "CUDA")]
    profiled = SimpleNamespace(events=lambda: kinds)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiled))
    assert measuring.kernels(gpu, lambda: None) == 2
    with pytest.raises(NotHereError):
        measuring.kernels(setting, lambda: None)


# ---------------------------------------------------------------- the report


def fake(name: str, outcome: Any, usual: float = 1.0) -> Check:
    class Fake(Check):
        def run(self, setting: Setting) -> Found:
            if isinstance(outcome, BaseException):
                raise outcome
            return Found([Result(name, "a", "b", outcome, 1.0)], {"path": Path("x")})

    return Fake(name, "", "", usual)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        fake("good", 0.5),
        fake("slow", 2.0),
        fake("nothing", float("nan")),
        fake("broken", RuntimeError("CUDA error: no kernel image\nmore")),
        fake("absent", NotHereError("one GPU")),
        fake("long", 0.5, usual=1e6),
    )
    monkeypatch.setattr("kdcache.bench.gpu.CHECKS", made)


@pytest.mark.usefixtures("checks")
def test_a_check_that_raises_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    report = run_checks([], 1, device="cpu", budget=100, output=tmp_path / "new" / "report.json")
    assert [(each.name, each.state) for each in report.outcomes] == [
        ("good", "found"),
        ("slow", "found"),
        ("nothing", "found"),
        ("broken", "failed"),
        ("absent", "left out"),
        ("long", "left out"),
    ]
    assert [bool(each.missed) for each in report.outcomes[:3]] == [False, True, True]
    assert report.outcomes[3].reason == "RuntimeError: CUDA error: no kernel image"
    assert "--budget 100" in report.outcomes[5].reason
    kept = json.loads((tmp_path / "new" / "report.json").read_text())
    assert [check["name"] for check in kept["checks"]] == [each.name for each in report.outcomes]
    assert kept["machine"]["versions"]["torch"]


@pytest.mark.usefixtures("checks")
def test_what_was_found_is_kept_when_the_run_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.bench.gpu.CHECKS", (fake("good", 0.5), fake("stopped", KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        run_checks([], 1, device="cpu", output=tmp_path / "report.json")
    assert [check["name"] for check in json.loads((tmp_path / "report.json").read_text())["checks"]] == ["good"]


def test_the_checks_named_are_run_in_the_order_of_value_and_others_refused() -> None:
    assert [check.name for check in CHECKS[:2]] == ["bytes", "numerics"]
    with pytest.raises(UsageError, match="unknown check of bench gpu 'byte'"):
        run_checks(["byte"], 1, device="cpu")


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output"):
        run_checks(["bytes"], 1, device="cpu", output=tmp_path)


def test_settled_work_is_done_before_it_is_measured(setting: Setting) -> None:
    done: list[int] = []
    assert measuring.waits(setting, lambda: done.append(1)) == Counter()
    assert len(done) == 4


# ---------------------------------------------------------------- the command


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("more", [[], ["--json"], ["--only", "bytes"]])
def test_without_a_gpu_the_command_says_so(more: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "gpu", *more]) == NotFoundError.exit_code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: no GPU on this machine\n")
    assert err.count("\n") == 3


@pytest.mark.parametrize("option", [["--only", "bytes"], ["--budget", "9"], ["--output", "x.json"]])
def test_options_of_gpu_are_refused_elsewhere(option: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "startup", *option]) == UsageError.exit_code
    assert f"{option[0]} with bench startup" in capfd.readouterr().err


def test_unknown_checks_are_refused_before_a_gpu_is_looked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "gpu", "--only", "bytes,dmup"]) == UsageError.exit_code
    assert "'dump'" in capfd.readouterr().err


def test_the_table_and_json_have_every_outcome(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.bench.gpu import Report

    outcomes = [
        Outcome("dump", "found", results=[Result("dump vit", "a view", "bare", 1.2, 1.05), Result("second", "a", "b", 1e-7, 1)]),
        Outcome("step", "failed", reason="OutOfMemoryError: 3 GB"),
    ]
    report = Report({"gpu": "NVIDIA Test"}, outcomes)
    monkeypatch.setattr("kdcache.bench.gpu.run_checks", lambda *_, **__: report)
    assert cli.run(["bench", "gpu"]) == 0
    shown = capfd.readouterr().out
    assert "MISSED" in shown
    assert "FAILED" in shown
    assert "OutOfMemoryError" in shown
    assert cli.run(["bench", "gpu", "--json"]) == 0
    assert [check["missed"] for check in json.loads(capfd.readouterr().out)["checks"]] == [["dump vit"], []]
