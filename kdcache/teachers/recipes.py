"""Published training recipes of teachers: `train-teacher --recipe NAME`. Flags override a recipe."""

from dataclasses import dataclass
from typing import Literal

from kdcache.errors import unknown_name

__all__ = ["RECIPES", "TeacherRecipe", "teacher_recipe"]


@dataclass(frozen=True)
class TeacherRecipe:
    """Settings that were published together. None means the default of the model or the dataset."""

    source: str
    epochs: int | None = None
    policy: str | None = None
    pretrained: bool | None = None
    batch_size: int = 64
    opt: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    sched: Literal["cosine", "step"] = "cosine"
    decay_epochs: tuple[int, ...] = ()
    decay_rate: float = 0.1
    clip_grad: float | None = 1.0
    decay_all: bool = False  # weight decay of biases and norms too
    smoothing: float = 0.1


RECIPES: dict[str, TeacherRecipe] = {
    # Learning rate and weight decay: 5e-4 and 0.05 for CNNs, 5e-5 and 0.1 for ViTs; from scratch, those of its students.
    "study": TeacherRecipe("temperature study (arXiv 2603.02430), section 3.1"),
    # CRD's appendix and code, mdistiller, and the papers that use their teachers agree on these settings.
    "crd": TeacherRecipe(
        "CRD (ICLR 2020) and its train_teacher.py; mdistiller, configs/cifar100/vanilla.yaml",
        epochs=240,
        policy="crd",
        pretrained=False,
        opt="momentum",  # timm's name for SGD with plain momentum; its `sgd` uses Nesterov momentum
        lr=0.05,
        weight_decay=5e-4,
        sched="step",
        decay_epochs=(150, 180, 210),
        clip_grad=None,
        decay_all=True,
        smoothing=0.0,
    ),
}


def teacher_recipe(name: str | None, exact: str, dataset: str) -> tuple[str, TeacherRecipe]:
    """(name, recipe) of recipe `name`. Without a name: "crd" for a CIFAR model on CIFAR, else "study"."""
    if name is None:
        name = "crd" if exact.startswith("cifar_") and dataset in {"cifar10", "cifar100"} else "study"
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return name, RECIPES[name]
