"""`kdcache doctor` says what is wrong with a machine, whatever is wrong with it: never a traceback, never a secret."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache import cli
from kdcache.cli.machine import WIDTH
from kdcache.doctor import devices, machine, software, surroundings
from kdcache.errors import NotFoundError
from kdcache.system import locks
from kdcache.system.locks import NoLocksError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is left alone, libraries are not imported in a process of their own, and few views are drawn: all take time."""
    for name in list(os.environ):
        if surroundings.MATTER.fullmatch(name) and name not in {"PYTHONPATH", "OMP_NUM_THREADS"}:
            monkeypatch.delenv(name)
    monkeypatch.setattr(software, "unusable_modules", dict)
    monkeypatch.setattr(devices, "VIEWS", 4)


Said = SimpleNamespace


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    def run(*arguments: object, home: Path = tmp_path) -> Said:
        capfd.readouterr()
        status = cli.run(
            ["doctor", *map(str, arguments), "--home", str(home), *([] if "--online" in arguments else ["--offline"])]
        )
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Said(status=status, out=out, err=err)

    return run


def found(said: Said) -> dict[str, Any]:
    """The findings of `doctor --json` by name."""
    return {each["name"]: each for each in json.loads(said.out)["findings"]}


def lines_of(said: Said, name: str) -> str:
    """A finding's text and fix, from the plain output."""
    at = re.search(rf"^  \w+ +{re.escape(name)} .*(?:\n {{20,}}.*)*", said.out, re.MULTILINE)
    assert at, said.out
    return " ".join(at[0].split())


def test_a_sound_machine_has_no_problem_and_a_report_of_80_columns(doctor: Any) -> None:
    said = doctor()
    assert (said.status, said.err) == (0, "")
    assert all(len(line) <= WIDTH and line.isprintable() for line in said.out.splitlines())
    assert lines_of(said, "renderers on cpu") == "ok renderers on cpu 12 views are the same bytes by both"
    assert lines_of(said, "float32 on cpu").startswith("ok float32 on cpu IEEE 754")
    assert f"torch {torch.__version__.partition('+')[0]}" in " ".join(said.out.split())
    assert "device cpu, dumps in fp32" in lines_of(said, "by default") or torch.cuda.is_available()


def test_json_has_the_same_findings_and_is_nothing_else(doctor: Any) -> None:
    said = doctor("--json")
    assert said.status == json.loads(said.out)["problems"] == 0
    assert {"python", "kdcache", "libraries", "processor", "torch", "home", "file locks", "hub", "content"} <= found(said).keys()
    assert {each["state"] for each in found(said).values()} <= {"ok", "note"}


def test_the_home_is_left_as_it_was(doctor: Any, tmp_path: Path) -> None:
    assert doctor(home=tmp_path / "not" / "there").status == 0
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_a_file_is_a_problem(doctor: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = doctor(home=tmp_path / "file")
    assert said.status == NotFoundError.exit_code
    assert "problem home" in lines_of(said, "home")
    assert f"{tmp_path / 'file'} is a file" in said.err
    assert re.fullmatch(r"error: 2 problems on this machine: home, data\nwhy: home: .*\nfix: .*KDCACHE_HOME\n", said.err)


def test_a_home_that_may_not_be_written_is_a_problem(doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access
    monkeypatch.setattr(
        machine.os, "access", lambda place, mode: not (mode & os.W_OK and Path(place) == tmp_path) and real(place, mode)
    )
    said = doctor("--json")
    assert said.status == NotFoundError.exit_code
    assert "may not read and write" in found(said)["home"]["text"]
    assert found(said)["file locks"]["state"] == "note"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may look everywhere")
def test_a_home_that_may_not_be_seen_is_a_problem(doctor: Any, tmp_path: Path) -> None:
    (tmp_path / "closed" / "home").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    try:
        assert doctor(home=tmp_path / "closed" / "home").status == NotFoundError.exit_code
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_missing_and_useless_locks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line[1] for line in machine.locks(tmp_path)] == ["ok"]
    real = locks.locked

    def none(path: Path, **how: Any) -> Any:
        raise NoLocksError(37, "no locks", str(path))

    monkeypatch.setattr(locks, "locked", none)
    [(_, state, text, _)] = machine.locks(tmp_path)
    assert (state, "--shard I/N" in text) == ("note", True)
    monkeypatch.setattr(locks, "locked", lambda path, **how: real(Path(f"{path}{os.urandom(4).hex()}"), **how))
    [(_, state, text, _)] = machine.locks(tmp_path)
    assert (state, "twice" in text) == ("problem", True)


def test_renderers_that_differ_are_a_problem(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = devices.render_positions

    def wrong(pixels: Any, table: Any, positions: Any, renderer: str, *where: Any) -> Any:
        views = real(pixels, table, positions, renderer, *where)  # type: ignore[arg-type]
        if renderer == "device":
            views[3, 1, 2, 2] += 1
        return views

    monkeypatch.setattr(devices, "render_positions", wrong)
    said = doctor()
    assert said.status == NotFoundError.exit_code
    assert "3 of 12 views differ from the reference fix: use --renderer reference" in lines_of(said, "renderers on cpu")


def test_float32_with_fewer_bits_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.conv2d

    def as_tf32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:  # 13 of the 23 bits of the fraction are cut off
            x, w = ((each.view(torch.int32) & ~0x1FFF).view(torch.float32) for each in (x, w))
        return real(x, w)

    assert [line[1] for line in devices.float32(CPU)] == ["ok"]
    monkeypatch.setattr(torch, "conv2d", as_tf32)
    assert [line[1] for line in devices.float32(CPU)] == ["problem"]


def test_a_check_that_fails_is_a_line_and_the_others_go_on(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Any]:
        raise RuntimeError("driver gone\nand more")

    monkeypatch.setattr(devices, "gpus", broken)
    said = doctor("--json")
    assert found(said)["GPU"]["text"] == "could not be examined: RuntimeError: driver gone"
    assert found(said)["content"]["state"] == "ok"


# ---------------------------------------------------------------- libraries


BROKEN = {
    "kd_sound": "",
    "kd_raises": "print('its own words'); raise ImportError('libcudart.so.12: cannot open shared object file')",
    "kd_crashes": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    "kd_hangs": "import time; time.sleep(60)",
    "kd_exits": "raise SystemExit(3)",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("modules")
def test_libraries_that_raise_crash_or_hang_are_told_with_the_reason() -> None:
    found = software._tried(["kd_sound", "kd_raises", "kd_exits", "kd_missing", "kd_crashes", "kd_sound"])
    assert found.pop("kd_missing") == "ModuleNotFoundError: No module named 'kd_missing'"
    assert found == {
        "kd_raises": "ImportError: libcudart.so.12: cannot open shared object file",
        "kd_exits": "SystemExit: 3",
        "kd_crashes": f"it ends the process ({signal.SIGILL.name})",
    }
    assert software._tried(["kd_hangs", "kd_raises"], patience=2) == {
        "kd_hangs": "not known: importing it had not ended after 2 s",
        "kd_raises": "not known: not tried, since kd_hangs took so long",
    }


def test_missing_broken_and_old_libraries_are_problems_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.3", "zarr": "3.1.6", "pillow": "11.1"}
    demands = {
        "torch": (">=2.11", ""),
        "zarr": (">=3.1", ""),
        "pillow": (">=11.0", ""),
        "timm": (">=1", ""),
        "pcodec": (">=0.3", "pcodec"),
    }
    monkeypatch.setattr(software, "required", lambda: demands)
    monkeypatch.setattr(software, "_version", versions.get)
    unusable = {"timm": "ModuleNotFoundError: No module named 'timm'", "PIL": "ImportError: libjpeg.so"}
    lines = {name: (state, text, fix) for name, state, text, fix in software.libraries(unusable)}
    assert lines["torch"] == ("problem", "2.3 is not what kdcache needs (>=2.11)", "pip install 'torch>=2.11'")
    assert lines["pillow"] == (
        "problem",
        "11.1 cannot be imported: ImportError: libjpeg.so",
        "pip install --force-reinstall 'pillow>=11.0'",
    )
    assert lines["timm"] == ("problem", "missing", "pip install 'timm>=1'")
    assert lines["libraries"] == ("ok", "zarr 3.1.6", "")
    assert list(software.extras()) == [("pcodec", "note", "not installed: pcodec", "pip install 'kdcache[pcodec]'")]


def test_without_torch_everything_else_is_examined(tmp_path: Path) -> None:
    """The real command in an environment whose torch is broken."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    for name in ("h5py", "huggingface_hub", "matplotlib", "obstore", "scipy", "sklearn", "timm", "torchvision", "zarr"):  # slow
        (fakes / f"{name}.py").touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(fakes), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "kdcache", "doctor", "--offline", "--home", tmp_path / "home"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    said = Said(status=done.returncode, out=done.stdout, err=done.stderr)
    assert said.status == NotFoundError.exit_code, said.err
    assert re.fullmatch(
        r"error: a problem on this machine: torch\nwhy: .*libtorch_cpu.so.*\nfix: pip install .*'torch.*\n", said.err
    )
    assert "archives can still be read" in lines_of(said, "torch")
    assert lines_of(said, "GPU") == "note GPU not examined, as torch cannot be imported"
    assert "ok content" in lines_of(said, "content") or "note content none yet" in lines_of(said, "content")
    training = subprocess.run(
        [sys.executable, "-m", "kdcache", "train-teacher", "--teacher", "test_vit", "--dataset", "digits", "--home", tmp_path],
        **{"env": environment, "capture_output": True, "text": True, "timeout": 120, "check": False},  # type: ignore[call-overload]
    )
    assert training.returncode == NotFoundError.exit_code
    assert training.stderr.count("\n") == 3
    assert "kdcache doctor" in training.stderr


def test_a_bug_asks_for_the_doctors_report(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("kdcache.doctor.examine", broken)
    assert cli.run(["doctor"]) == 1
    assert capfd.readouterr().err.splitlines()[2].endswith("with what kdcache doctor prints")


# ---------------------------------------------------------------- GPUs that are not here


class NVMLError(Exception):
    """Of a fake NVML."""


def nvml(**changes: Any) -> SimpleNamespace:
    """A driver that knows two GPUs."""

    def refused(*_: object) -> None:
        raise NVMLError

    functions = {
        "Init": lambda: None,
        "Shutdown": lambda: None,
        "SystemGetDriverVersion": lambda: "570.1",
        "SystemGetCudaDriverVersion": lambda: 12080,
        "DeviceGetCount": lambda: 2,
        "DeviceGetHandleByIndex": lambda index: index,
        "DeviceGetHandleByUUID": lambda uuid: uuid,
        "DeviceGetName": lambda handle: "NVIDIA Test",
        "DeviceGetMigMode": lambda handle: [1, 1],
        "DeviceGetTotalEnergyConsumption": refused,
    } | changes
    return SimpleNamespace(NVMLError=NVMLError, **{f"nvml{name}": function for name, function in functions.items()})


def test_gpus_that_torch_cannot_use_are_a_problem_unless_they_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, said in ((None, "built without CUDA"), ("13.2", "newer than the driver's 12.8"), ("12.6", "cannot use them")):
        monkeypatch.setattr(torch.version, "cuda", built)
        driver, (name, state, text, fix) = devices.gpus()
        assert "570.1, for CUDA 12.8" in driver[2]
        assert (name, state) == ("GPU", "problem")
        assert said in text
        assert "CUDA 12.8 or older" in fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list(devices.gpus())[1][1:] == ("note", "hidden by CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES")


def test_each_gpu_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    properties = SimpleNamespace(name="NVIDIA Test", major=8, minor=6, uuid="1234")
    stubs = {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "get_device_properties": lambda device: properties,
        "device": lambda device: __import__("contextlib").nullcontext(),
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)

    def free(device: torch.device) -> tuple[float, float]:
        if device.index == 2:
            raise RuntimeError("CUDA error: uncorrectable ECC error")
        return (70e9, 80e9) if device.index == 0 else (10e9, 80e9)

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    _, sound, busy, broken = devices.gpus()
    expected = "NVIDIA Test, 70.0 GB of 80.0 GB free, capability 8.6, bf16 native, MIG on, energy not counted"
    assert sound == ("cuda:0", "ok", expected, "")
    assert busy[:2] == ("cuda:1", "note")
    assert broken[:3] == ("cuda:2", "problem", "cannot be used: RuntimeError: CUDA error: uncorrectable ECC error")


# ---------------------------------------------------------------- environment and network


SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "HTTPS_PROXY": "http://somebody:hunter2@proxy.example:8080",
    "HF_ENDPOINT": "https://me:pa55@hub.example/?token=t0ken",
    "KDCACHE_HOME": "s3://bucket/x?X-Amz-Signature=s1gned",
    "TORCH_HOME": "/models/hf_abcdefghijklmnopqrstuvwxyz",
}


def test_no_secret_is_shown(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    said = doctor("--json")
    for secret in ("hf_abc", "wJalr", "hunter2", "somebody", "pa55", "t0ken", "s1gned"):
        assert secret not in said.out + said.err
    assert found(said)["HTTPS_PROXY"]["text"] == "http://***@proxy.example:8080"
    assert found(said)["HF_TOKEN"]["text"] == "set (not shown)"
    assert found(said)["hub token"]["text"] == "there is one"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HTTPS_PROXY", "http://user:p@ssw0rd@proxy:80", "ssw0rd"),
        ("HTTPS_PROXY", "user:p@ss@proxy:80", "ss@"),
        ("HF_HOME", "/x/github_pat_11ABCDEFG0123456789", "11ABC"),
        ("HF_HOME", "/x/glpat-abcdefghijklmnop", "abcdef"),
        ("HF_HOME", "/x/sk-proj-abcdefghijklmnop", "abcdef"),
    ],
)
def test_parts_of_values_that_are_secret_are_left_out(name: str, value: str, secret: str) -> None:
    assert secret not in surroundings.shown(name, value)


def test_what_is_wrong_with_an_address_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:s3cretpw@hub.invalid")
    assert "s3cret" not in str(list(surroundings.hub(offline=False, patience=1.0)))


def test_a_mistyped_variable_is_told_and_the_right_ones_are_not(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {
        "KDCACHE_DISTILL_TAU": "4",
        "KDCACHE_DATA_DIR": "data",
        "KDCACHE_CACHE_LIMIT": "5GB",
        "KDCACHE_DUMP_TEACHER_VIEWS": "2",
    }
    for name, value in {**right, "KDCACHE_DISTIL_TAU": "4"}.items():
        monkeypatch.setenv(name, value)
    said = doctor("--json")
    assert {found(said)[name]["state"] for name in right} == {"ok"}
    assert found(said)["KDCACHE_DISTIL_TAU"]["state"] == "note"
    assert found(said)["KDCACHE_DISTIL_TAU"]["fix"] == "use KDCACHE_DISTILL_TAU, or unset KDCACHE_DISTIL_TAU"


def test_a_rank_without_its_fellows_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert list(surroundings.environment())[-1][:2] == ("processes", "problem")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "MASTER_ADDR" in list(surroundings.environment())[-1][2]


def test_wrong_settings_of_the_cache_are_a_problem(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", "a lot")
    said = doctor("--json")
    assert said.status == NotFoundError.exit_code
    assert found(said)["cache"]["fix"].startswith("export KDCACHE_CACHE_LIMIT=")
    assert found(said)["temporary"]["state"] == "ok"


@pytest.fixture
def answering() -> Iterator[str]:
    """A server that answers everything with 401, as a hub does where nobody has logged in."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def hub(place: str, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[str, str]:
    monkeypatch.setenv("HF_ENDPOINT", place)
    (_, state, text, _), *_ = surroundings.hub(**{"offline": False, "patience": 0.3} | how)
    return state, text


def test_the_hub_answers_or_the_reason_is_told(answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub(answering, monkeypatch) == ("ok", f"{answering} answers")
    assert hub(answering, monkeypatch, offline=True) == ("note", f"{answering} was not asked (--offline)")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        state, text = hub(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        assert state == "note"
        assert "cannot be reached" in text
    for nonsense in ("no URL", "http://127.0.0.1:1", "ftp://[::", "http://127.0.0.1:notaport"):
        state, text = hub(nonsense, monkeypatch)
        assert state == "note"
        assert "cannot be reached" in text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub(answering, monkeypatch)[1].startswith("HF_HUB_OFFLINE is set")


# ---------------------------------------------------------------- the whole


def test_the_workspaces_content_is_counted(doctor: Any, tmp_path: Path) -> None:
    for file in (
        "archives/a/kdcache.json",
        "archives/b/.dump",
        "teachers/t/teacher.json",
        "runs/a/1/args.yaml",
        "runs/a/1/summary.json",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    text = found(doctor("--json"))["content"]["text"]
    assert text == "1 archives and 1 unfinished, 1 teachers, 1 of 1 runs ended, 0 reports, 0 studies"


@pytest.mark.exhaustive
def test_the_real_command_imports_every_library(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdcache", "doctor", "--json", "--home", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in {0, NotFoundError.exit_code}, done.stderr
    libraries = found(Said(out=done.stdout))["libraries"]
    assert libraries["state"] == "ok"
    assert len(libraries["text"].split(",")) == sum(not extra for _, extra in software.required().values())
