"""Published training recipes of teachers: `train-teacher --recipe NAME`. Flags override a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdcache.errors import unknown_name

__all__ = ["RECIPES", "TeacherRecipe", "teacher_recipe"]


@dataclass(frozen=True)
class TeacherRecipe:
    """Settings that were published together. Those of `training` have `Training`'s names; None is what suits model or dataset."""

    source: str
    epochs: int | None = None
    policy: str | None = None
    pretrained: bool | None = None
    smoothing: float = 0.1
    training: Mapping[str, Any] = field(default_factory=dict)


RECIPES: dict[str, TeacherRecipe] = {
    # Learning rate and weight decay: 5e-4 and 0.05 for CNNs, 5e-5 and 0.1 for ViTs; from scratch, those of its students.
    "study": TeacherRecipe("temperature study (arXiv 2603.02430), section 3.1"),
    # CRD's appendix and code, mdistiller, and the papers that use their teachers agree on these settings.
    "crd": TeacherRecipe(
        "CRD (ICLR 2020) and its train_teacher.py; mdistiller, configs/cifar100/vanilla.yaml",
        epochs=240,
        policy="crd",
        pretrained=False,
        smoothing=0.0,
        training={
            "opt": "momentum",  # timm's name of SGD with plain momentum; its `sgd` has Nesterov's
            "lr": 0.05,
            "weight_decay": 5e-4,
            "sched": "step",
            "decay_epochs": (150, 180, 210),
            "clip_grad": None,
            "decay_all": True,
        },
    ),
}


def teacher_recipe(name: str | None, exact: str, dataset: str) -> tuple[str, TeacherRecipe]:
    """(name, recipe) of recipe `name`. Without a name: "crd" for a CIFAR model on CIFAR, else "study"."""
    if name is None:
        name = "crd" if exact.startswith("cifar_") and dataset in {"cifar10", "cifar100"} else "study"
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return name, RECIPES[name]
