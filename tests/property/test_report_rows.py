"""Whatever a grid of students can vary makes rows of its own in the report: no run is taken for another one's repetition."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.archive.reading.ensemble import Ensemble
from kdcache.replay.subject import Subject
from kdcache.report import collect
from kdcache.report.table import summarise
from kdcache.students.config import DistillConfig, Grid
from kdcache.students.grid import StudentSpec, plan_students
from kdcache.students.records import write_args
from kdcache.training.config import HowTested, StudentTraining
from kdcache.workspace import Workspace
from tests.conftest import Dump

# Two values of each option of a grid; what one means is written by whoever plans, so that nothing here knows of args.yaml.
VALUES: dict[str, tuple[Any, Any]] = {
    "tau": ((1.0,), (4.0,)),
    "method": (("kd",), ("dist",)),
    "control": (("none",), ("bottom:1",)),
    "student": (("test_vit",), ("test_resnet",)),
    "student_size": ((), ("12",)),
    "init": (("random",), ("WEIGHTS",)),
    "seed": ((0,), (1,)),
    "epochs": (2, 3),
    "share_order": (False, True),
    "batch_size": (8, 16),
    "opt": (("adamw",), ("sgd",)),
    "lr": ((0.002,), (0.001,)),
    "momentum": (0.9, 0.5),
    "amp": (False, True),
    "model_ema_decay": (None, 0.9),
    "weight_decay": (0.05, 0.0),
    "clip_grad": (1.0, 2.0),
    "decay_all": (False, True),
    "warmup_epochs": (0.0, 1.0),
    "min_lr": (0.0, 1e-4),
    "layer_decay": (None, 0.5),
    "drop_path": (None, 0.1),
    "opt_betas": (None, (0.8, 0.9)),
    "crop_pct": (0.9, 0.5),
    "interpolation": ("bicubic", "bilinear"),
    "test_policy": ("none", "eval"),
}
# These say the same in other words, decide on one kind of start only, need another option, or change no result.
ELSEWHERE = {
    "preset",
    "force",
    "training",
    "tested",
    "sched",
    "decay_epochs",
    "decay_rate",
    "val_interval",
    "head_init",
    "warmup_lr",
}


def test_every_option_of_a_grid_has_two_values_here() -> None:
    options = {name for model in (Grid, StudentTraining, HowTested) for name in model.model_fields}
    assert options == set(VALUES) | ELSEWHERE


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm
    from safetensors.torch import save_model

    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_model(timm.create_model("test_vit", num_classes=3, img_size=16), str(file))
    return file


def config_of(chosen: dict[str, Any], weights: Path) -> DistillConfig:
    chosen = {
        name: tuple(str(weights) if each == "WEIGHTS" else each for each in value) if name == "init" else value
        for name, value in chosen.items()
    }
    parts = {
        field: model(**{name: value for name, value in chosen.items() if name in model.model_fields})
        for field, model in (("training", StudentTraining), ("tested", HowTested))
    }
    own = {name: value for name, value in chosen.items() if name in Grid.model_fields}
    return DistillConfig(grid=Grid(**own, **parts), dataset="digits")


def record(spec: StudentSpec, config: DistillConfig, archive: Ensemble) -> None:
    """The folder of a finished run, as `distill` writes it, without training."""
    spec.folder.mkdir(parents=True, exist_ok=True)
    learner: Any = SimpleNamespace(amp=bool(spec.settings.amp), moved_from=None)
    about = {**({"student_size": spec.size} if spec.size else {}), "test": json.dumps(spec.tested.identity())}
    write_args(learner, spec, config, archive, archive, 1, about)
    (spec.folder / "metrics.jsonl").write_text('{"epoch": 0, "test_top1": 50.0}\n')
    (spec.folder / "summary.json").write_text('{"status": "complete", "epochs": 1, "final_top1": 50.0}')


@pytest.mark.parametrize("field", sorted(VALUES))
@settings(max_examples=4)
@given(others=st.fixed_dictionaries({name: st.integers(0, 1) for name in VALUES}))
def test_runs_that_differ_in_any_option_are_two_cells(dump: Dump, weights: Path, field: str, others: dict[str, int]) -> None:
    base = {name: VALUES[name][number] for name, number in others.items()}
    if base["opt"] == ("sgd",) or field == "opt":
        base["opt_betas"] = None  # of Adam only
    if field == "opt_betas":
        base["opt"] = ("adamw",)
    if base["share_order"] or field == "share_order":
        base["seed"] = (1,)  # of seed 0, the order is its own
    if field == "seed":
        base["share_order"] = False
    if base["init"] != ("random",) or field == "init":
        base |= {"student": ("test_vit",), "student_size": ()}
    if field in {"student", "student_size"}:
        base["init"] = ("random",)
    if field in {"crop_pct", "interpolation"}:
        base["test_policy"] = "eval"
    elif base["test_policy"] == "none" or field == "test_policy":
        base |= {"crop_pct": None, "interpolation": None}
    base |= {"layer_decay": None} if field != "layer_decay" else {"student": ("test_vit",), "student_size": ()}
    archive = Ensemble((dump.archive,), "logits")
    with tempfile.TemporaryDirectory() as home:
        for value in VALUES[field]:
            config = config_of(base | {field: value}, weights)
            for spec in plan_students(config.grid, Subject.of(archive), Workspace(home), dataset=config.dataset):
                record(spec, config, archive)
        runs = collect([Path(home)])
        table = summarise(runs)
    assert len(runs) == 2
    assert not table.repeated
    assert sum(cell.n for cell in table.cells.values()) == 2
