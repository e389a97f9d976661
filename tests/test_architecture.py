"""Protects what other code and other people rely on: light imports, public names, exit codes, and the command line."""

import dataclasses
import importlib
import inspect
import json
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdcache
from kdcache import errors
from tests.conftest import Dump

HERE = Path(__file__).parent
FROZEN = HERE / "cli_frozen.json"
HEAVY = ("torch", "timm", "torchvision")
LIGHT = (
    "kdcache",
    "kdcache.archive",
    "kdcache.report",
    "kdcache.views.policy",
    "kdcache.views",
    "kdcache.codecs",
    "kdcache.stats",
    "kdcache.targets",
    "kdcache.methods",
    "kdcache.methods.presets",
    "kdcache.study.running",
)

PRINT_HEAVY = f"""
import importlib, sys
importlib.import_module(sys.argv[1])
print(*[name for name in {HEAVY} if name in sys.modules])
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("module", LIGHT)
def test_reading_and_reporting_need_no_torch(module: str, run_python: Run) -> None:
    assert run_python(PRINT_HEAVY, module).stdout.split() == []


def test_methods_and_controls_are_described_without_torch(run_python: Run) -> None:
    run_python(
        f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))  # importing any of them raises ImportError
from kdcache.methods import METHODS
from kdcache.methods.presets import PRESETS
from kdcache.targets import CONTROLS, control
for method in [*map(METHODS.build, METHODS), *(preset.build() for preset in PRESETS.values())]:
    assert METHODS.parse(METHODS.spec(method)) == METHODS.from_dict(METHODS.to_dict(method)) == method
    assert method.views_per_step in (1, 2) and method.largest_tau > 0 and isinstance(method.uses_tau, bool)
    list(method.doubts({{1.0, 20.0}}, 3)), METHODS.describe(METHODS.name_of(method)), method.needs, method.source
for spec in ("none", "ls-instance", "ls-global:plain-mean", "bottom:3", "topk:5"):
    control = CONTROLS.parse(spec)
    assert CONTROLS.from_dict(CONTROLS.to_dict(control)) == control
    control.check(10), control.smooths
"""
    )


def test_the_check_for_heavy_imports_would_notice_one(run_python: Run) -> None:
    assert "torch" in run_python(PRINT_HEAVY, "torch").stdout.split()


def test_an_archive_is_written_read_and_verified_where_torch_is_not_installed(tmp_path: Path, run_python: Run) -> None:
    run_python(
        f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))  # importing any of them raises ImportError
import numpy as np, kdcache
logits = np.arange(24, dtype=np.float32).reshape(1, 8, 3)
kdcache.write_archive(sys.argv[1], logits, ["a", "b", "c"], labels=np.zeros(8, int), keys=list("abcdefgh"))
archive = kdcache.open_archive(sys.argv[1])
assert (archive.find(0, np.arange(8)).logits == logits[0]).all()
assert archive.verify("full").ok and archive.keys() == list("abcdefgh")
kdcache.stats.relative_entropy(logits), kdcache.ViewPolicy.load("pets").parameters(0, 10, np.ones((10, 2), int))
""",
        tmp_path / "a",
    )


# ---------------------------------------------------------------- public names, DESIGN.md section 7


@pytest.mark.parametrize(
    "name",
    [
        "open_archive",
        "Archive",
        "ArchiveWriter",
        "write_archive",
        "ViewPolicy",
        "CachedTargets",
        "Batch",
        "views.render",
        "targets.Targets",
        "targets.control",
        "methods.build",
        "datasets.build",
        "Workspace",
        "Canvas",
        "stats.relative_entropy",
    ],
)
def test_public_names_are_where_the_design_says(name: str) -> None:
    found: Any = kdcache
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
    assert found.__doc__


def test_all_public_names_resolve_and_others_are_attribute_errors() -> None:
    for name in kdcache.__all__:
        assert getattr(kdcache, name)
    assert dir(kdcache) == sorted(kdcache.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        kdcache.no_such_name  # noqa: B018


def test_dir_shows_the_public_names_before_any_was_used(run_python: Run) -> None:
    shown = run_python("import kdcache, sys; print(*dir(kdcache)); assert 'torch' not in sys.modules").stdout.split()
    assert {"open_archive", "CachedTargets", "Workspace", "methods", "targets", "stats", "views", "datasets"} <= set(shown)
    assert "importlib" not in shown


def test_every_module_has_the_names_that_it_exports() -> None:
    for found in pkgutil.walk_packages(kdcache.__path__, "kdcache."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == [], found.name


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_public_signatures_keep_the_parameters_of_the_design(dump: Dump) -> None:
    from kdcache import methods, stats, targets, views

    assert parameters(kdcache.open_archive) == ["path"]
    assert parameters(kdcache.write_archive)[:3] == ["path", "logits", "class_names"]
    assert {"sample", "labels", "codec", "layout"} <= set(parameters(kdcache.write_archive))
    assert parameters(kdcache.CachedTargets)[:5] == ["archive", "canvas", "batch_size", "seed", "device"]
    assert parameters(kdcache.ViewPolicy.parameters) == ["view", "num_samples", "sizes"]
    assert parameters(views.render)[:2] == ["images", "rows"]
    assert parameters(targets.Targets)[:5] == ["logits", "tau", "label_a", "label_b", "lam"]
    assert parameters(targets.control)[0] == "name"
    assert parameters(methods.build)[0] == "name"
    assert parameters(methods.build("kd").__call__) == ["student_logits", "targets", "state"]
    assert parameters(targets.control("none").__call__) == ["targets", "rng_key"]
    assert parameters(stats.relative_entropy) == ["logits", "tau"]
    members = {"manifest", "num_views", "num_samples", "num_classes", "class_names", "keys", "labels", "read", "find", "verify"}
    assert members <= set(dir(dump.archive))
    assert parameters(kdcache.Archive.read) == ["view", "start", "stop"]
    assert parameters(kdcache.Archive.find) == ["view", "samples"]
    assert parameters(kdcache.Archive.verify)[0] == "level"


def test_rows_and_batches_keep_their_fields() -> None:
    from kdcache.archive import Rows

    assert {"logits", "sample", "entropy", "entropy_rest", "probe"} <= set(dir(Rows))
    assert {"images", "logits", "sample", "label_a", "label_b", "lam", "view"} <= {
        field.name for field in dataclasses.fields(kdcache.Batch)
    }


# ---------------------------------------------------------------- errors

EXIT_CODES = {
    "KdcacheError": 1,
    "UsageError": 2,
    "NotFoundError": 3,
    "IntegrityError": 4,
    "IncompatibleError": 5,
    "IncompleteError": 6,
    "RetryError": 75,
}


def test_every_error_has_its_documented_exit_code() -> None:
    classes = {
        name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.KdcacheError)
    }
    assert {name: kind.exit_code for name, kind in classes.items()} == EXIT_CODES
    for name, code in EXIT_CODES.items():
        [line] = [line for line in (errors.__doc__ or "").splitlines() if name in line]
        assert str(code) in line.split()


@pytest.mark.parametrize("name", EXIT_CODES)
def test_an_error_is_three_lines_and_survives_the_way_out_of_a_worker_process(name: str) -> None:
    error = getattr(errors, name)("what 1", why="why 2", fix="fix 3")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == "error: what 1\nwhy: why 2\nfix: fix 3"


# ---------------------------------------------------------------- the command line


def command_line() -> dict[str, list[str]]:
    """Every command with its arguments and the spellings of its options."""
    from kdcache.cli.app import command as whole

    def described(command: Any) -> list[str]:
        return sorted(
            " ".join([*param.opts, *param.secondary_opts, *(["(required)"] if param.required else [])])
            for param in command.params
        )

    group = whole()
    return {"kdcache": described(group)} | {name: described(command) for name, command in group.every_command()}


def test_commands_and_options_are_those_that_scripts_rely_on() -> None:
    frozen, now = json.loads(FROZEN.read_text()), command_line()
    gone = [f"{name} {option}" for name in frozen for option in frozen[name] if option not in now.get(name, [])]
    new = [f"{name} {option}" for name in now for option in now[name] if option not in frozen.get(name, [])]
    assert frozen == now, (
        f"the command line changed. Gone or changed: {gone or 'nothing'}; new: {new or 'nothing'}. People's scripts call it. "
        f"If this is meant, say so in the changelog and run: python -m tests.test_architecture --freeze"
    )


def test_every_command_says_what_it_is_for() -> None:
    from kdcache.cli.app import command as whole

    assert [name for name, command in whole().every_command() if not command.help] == []


if __name__ == "__main__" and sys.argv[1:] == ["--freeze"]:
    FROZEN.write_text(json.dumps(command_line(), indent=1) + "\n")
    print(f"wrote {FROZEN}")
