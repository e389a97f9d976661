"""An option is declared once: flags, environment, configurations, studies, records and identities are the same field."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from kdcache.cli import commands
from kdcache.cli import run as run_command
from kdcache.cli.app import command
from kdcache.errors import UsageError
from kdcache.models import names
from kdcache.models.names import list_models
from kdcache.options import as_text, flag_of
from kdcache.report.records import RunArgs
from kdcache.students.config import DistillConfig, Grid, PlanConfig
from kdcache.study.schema import StudentsSpec, TrainSpec
from kdcache.teachers.config import DumpConfig, DumpRecipe, TeacherConfig
from kdcache.training import optimizers
from kdcache.training.config import StudentRuntime, TrainConfig, Training

PACKAGE = Path(commands.__file__).parents[1]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Options of distill with a value each, as typed.
TYPED = {
    "tau": "1,4,20",
    "method": "kd,dkd:alpha=2,beta=0.5",
    "control": "none,bottom:3",
    "seed": "0-2",
    "opt": "adamw,sgd:lr=0.05,momentum=0.8",
    "lr": "0.1,0.002",
    "batch_size": "32",
    "sched": "step",
    "decay_epochs": "150,180",
    "clip_grad": "0",
    "model_ema_decay": "0.999",
    "memory": "12GB",
    "parallel": "batches",
}


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DistillConfig]:
    """What distill is asked for by a command line and its surroundings."""

    def call(*arguments: str, **environment: str) -> DistillConfig:
        asked: list[DistillConfig] = []
        monkeypatch.setattr("kdcache.students.distill.distill", lambda config, *_: asked.append(config) or [])
        for name, value in environment.items():
            monkeypatch.setenv(f"KDCACHE_DISTILL_{name.upper()}", value)
        assert run_command(["distill", *arguments]) == 0
        return asked[0].model_copy(update={"command": ""})

    return call


def test_flags_environment_configuration_study_and_python_say_the_same(
    received: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    flags = [word for name, value in TYPED.items() for word in (flag_of(name), value)]
    expected = received(*flags)
    assert (expected.grid.tau, expected.grid.seed) == ((1.0, 4.0, 20.0), (0, 1, 2))
    assert expected.grid.method == ("kd", "dkd:alpha=2,beta=0.5")
    assert expected.grid.training.opt == ("adamw", "sgd:lr=0.05,momentum=0.8")
    assert (expected.grid.training.clip_grad, expected.runtime.memory) == (None, 12_000_000_000)
    assert DistillConfig(**TYPED) == expected
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in TYPED.items()}))
    assert received("--config", str(file)) == expected
    study = {name: value for name, value in TYPED.items() if name not in {"memory", "parallel"}}
    form = StudentsSpec.model_validate({"archive": "a", **study})
    one_job = form.given() | {"batch_size": 32, "archive": ()}
    same = expected.but(lr="0.002,0.1").given()  # a study sorts numbers
    assert DistillConfig(**one_job).given() == {name: value for name, value in same.items() if name in one_job} | {"archive": ()}
    assert received(**TYPED) == expected


def test_a_job_of_a_study_is_typed_as_it_is_read(received: Callable[..., DistillConfig]) -> None:
    config = DistillConfig(**TYPED, archive=("a,b", "c"), force=True, amp=False, channels_last=False, decay_all=True)
    again = received(*config.arguments(first=("archive",)))
    assert again.given() == {name: value for name, value in config.given().items() if name != "channels_last"}


def test_a_study_sorts_lists_of_numbers_and_nothing_else() -> None:
    form = TrainSpec.model_validate({"mean": "0.5,0.4,0.5", "decay-epochs": [9, 5, 9], "epochs": "20,5", "seed": "1,0"})
    assert (form.mean, form.decay_epochs, form.epochs, form.seed) == ((0.5, 0.4, 0.5), (5, 9), (5, 20), (0, 1))
    config = TeacherConfig(teacher="t", dataset="d", **form.given() | {"epochs": (5,), "seed": 1})
    assert config.arguments()[-2:] == ["--mean", "0.5,0.4,0.5"]
    named = StudentsSpec.model_validate({"archive": "a", "method": ["wttm", "kd", "kd"], "tau": [20, 1]})
    assert (named.method, named.tau) == (("wttm", "kd"), (1.0, 20.0))


def test_flags_win_over_the_environment_and_that_over_a_configuration(
    received: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("tau: [1, 2]\nlr: 0.1\nepochs: 7\n")
    config = received("--config", str(file), "--tau", "4", tau="3", lr="0.2")
    assert (config.grid.tau, config.grid.training.lr, config.grid.epochs) == ((4.0,), (0.2,), 7)


@pytest.mark.parametrize("options", [TeacherConfig, DumpConfig, DistillConfig, PlanConfig])
def test_every_option_says_what_it_is_and_every_flag_is_one(options: Any) -> None:
    name = {TeacherConfig: "train-teacher", DumpConfig: "dump-teacher", DistillConfig: "distill", PlanConfig: "plan"}[options]
    flags = {flag for param in dict(command().every_command())[name].params for flag in param.opts}
    for option, declared in options.declared().items():
        assert declared.option.help.endswith("."), option
        assert flag_of(option) in flags


def test_help_has_options_in_groups_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["distill", "--help"]) == 0
    shown = capsys.readouterr().out
    headings = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "From which archive:",
        "Which students:",
        "How to train:",
        "How to test:",
        "Where and how fast:",
        "Common:",
    ]
    assert "[default: 0.002]" in " ".join(shown.split())
    assert run_command(["train-teacher", "--help"]) == 0
    assert "Learning rate [the recipe's]." in " ".join(capsys.readouterr().out.split())


def test_the_list_of_commands_needs_none_of_their_options(run_python: Run) -> None:
    code = "import sys; from kdcache.cli import run; run(['--help']); print(*{'pydantic', 'numpy', 'torch'} & set(sys.modules))"
    assert run_python(code).stdout.splitlines()[-1] == ""


# ---------------------------------------------------------------- one declaration


def test_weight_decay_of_all_is_declared_once_and_used_once() -> None:
    named = {file.relative_to(PACKAGE).as_posix(): file.read_text().count("decay_all") for file in PACKAGE.rglob("*.py")}
    assert {file: count for file, count in named.items() if count} == {
        "training/config.py": 1,  # declared
        "training/optimizers.py": 1,  # used
        "teachers/recipes.py": 1,  # CRD's recipe
    }
    assert StudentsSpec.model_validate({"archive": "a", "decay-all": True}).decay_all
    assert TrainSpec.model_validate({"decay-all": True}).decay_all
    assert DistillConfig(decay_all=True).grid.training.decay_all
    assert TrainConfig(epochs=1, decay_all=True).identity() == {"epochs": 1, "decay_all": True}


# ---------------------------------------------------------------- names of before


def test_names_of_before_are_still_read(tmp_path: Path, received: Callable[..., DistillConfig]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("ema_decay: 0.9\ncompiled: true\n")
    config = received("--config", str(file))
    assert (config.grid.training.model_ema_decay, config.runtime.compile) == (0.9, True)
    stored = {
        **{"archive": "a", "archive_digest": "d", "archive_name": "a", "dataset": "digits", "teacher": "t", "student": "s"},
        **{"method": {}, "method_spec": "kd", "control": {}, "control_spec": "none", "tau": 1, "seed": 0, "epochs": 1},
        **{"batch_size": 64, "opt": "adamw", "lr": 0.002, "weight_decay": 0.05},
    }
    old, new = (RunArgs(**stored, **{name: 0.9}) for name in ("ema_decay", "model_ema_decay"))
    assert old == new
    assert Training(ema_decay=0.9) == Training(model_ema_decay=0.9)
    assert StudentRuntime(compiled=True).compile


def test_runs_keep_the_identities_they_had() -> None:
    assert TrainConfig(epochs=3, model_ema_decay=0.9, clip_grad=0).identity() == {
        "epochs": 3,
        "ema_decay": 0.9,
        "clip_grad": None,
    }


# ---------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("arguments", "wrong", "fix"),
    [
        (["--tau", "0"], "--tau '0'", "--tau 1,4,20"),
        (["--seed", "2-0"], "--seed '2-0'", "--seed 1-3"),
        (["--seed", "1.5"], "--seed '1.5'", "--seed 1-3"),
        (["--lr", "fast"], "--lr 'fast'", "--lr 1,4,20"),
        (["--opt", ""], "--opt ''", "--opt NAME"),
        (["--memory", "lots"], "--memory 'lots'", "--memory 12GB"),
        (["--momentum", "1"], "--momentum '1'", "give a number below 1"),
        (["--model-ema-decay", "2"], "--model-ema-decay '2'", "give a number below 1"),
        (["--decay-epochs", "x"], "--decay-epochs 'x'", "--decay-epochs 1-3"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(
    arguments: list[str], wrong: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["distill", *arguments]) == 2
    error, why, mend = capsys.readouterr().err.splitlines()
    assert error == f"error: {wrong}"
    assert why.startswith("why: ")
    assert mend == f"fix: {fix}"


def test_an_option_that_there_is_not_is_refused_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError, match="temperature"):
        Grid(temperature=4)
    file = tmp_path / "options.yaml"
    file.write_text("temperature: 4\n")
    assert run_command(["distill", "--config", str(file)]) == 2
    assert "'temperature'" in capsys.readouterr().err


def test_a_step_schedule_wants_epochs_only_where_nothing_is_left_to_a_recipe() -> None:
    assert TeacherConfig(teacher="a", dataset="b", sched="step").training.sched == "step"
    with pytest.raises(UsageError, match="step without epochs"):
        TrainConfig(epochs=1, sched="step")


@pytest.mark.parametrize(("value", "text"), [((1.0, 4.5), "1,4.5"), ((3,), "3"), (5e-05, "5e-05"), (2.0, "2"), ("a:b", "a:b")])
def test_values_are_written_as_they_are_typed(value: Any, text: str) -> None:
    assert as_text(value) == text


def test_the_recipe_of_a_dump_knows_its_rows() -> None:
    rows = DumpRecipe(codec="u8", shard_rows=8).rows(2, 20, ["a", "b"])
    assert (rows.num_views, rows.num_samples, rows.num_blocks) == (2, 20, 3)


# ---------------------------------------------------------------- planning without torch


def test_a_study_is_planned_without_torch(run_python: Run, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from kdcache.study.jobs import plan_study
from kdcache.study.schema import find_study, load_study
from kdcache.workspace import Workspace
for name in ("ttm", "controls", "student_initialization"):
    file = find_study(name)
    assert plan_study(load_study(file), file, Workspace(sys.argv[1])).jobs
print([name for name in ("torch", "timm", "torchvision") if name in sys.modules])
"""
    assert run_python(code, tmp_path).stdout.strip() == "[]"


def test_names_that_are_read_from_timms_source_are_names_of_timm() -> None:
    import timm
    import timm.optim

    known = names._names_in_source()
    models = set(list_models())
    assert len(known & models) > 0.9 * len(models)
    for name in known - models:
        architecture, dot, _ = name.partition(".")
        assert dot, name
        assert name in timm.models.get_arch_pretrained_cfgs(architecture)
    assert optimizers._names_in_source() <= set(timm.optim.list_optimizers(exclude_filters=["fused*", "bnb*"]))


# ---------------------------------------------------------------- what distill prints


def test_distill_prints_its_runs_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from kdcache.methods import METHODS
    from kdcache.students.distill import StudentResult
    from kdcache.students.grid import StudentSpec
    from kdcache.targets import CONTROLS

    settings = TrainConfig(epochs=2)
    spec = StudentSpec("rn18", "resnet18", METHODS.build("kd"), CONTROLS.build("none"), 4.0, 0, 0, settings, Path("runs/a/b"))
    result = StudentResult(spec, {"status": "complete", "final_top1": 50.0, "best_top1": 51.0})
    monkeypatch.setattr("kdcache.students.distill.distill", lambda *_: [result])
    assert run_command(["distill", "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    shown = ("run", "student", "method", "control", "tau", "seed", "epochs", "status", "final_top1")
    assert [printed[key] for key in shown] == ["runs/a/b", "rn18", "kd", "none", 4.0, 0, 2, "complete", 50.0]
