"""How teachers were trained where that was published: `train-teacher --recipe NAME`. Flags win over a recipe."""

from dataclasses import dataclass
from typing import Literal

from kdcache.errors import unknown_name

__all__ = ["RECIPES", "TeacherRecipe", "teacher_recipe"]


@dataclass(frozen=True)
class TeacherRecipe:
    """Settings that were published together; None is what suits the model or the dataset."""

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
    # Rates and weight decay are 5e-4 and 0.05 for CNNs, 5e-5 and 0.1 for ViTs; from scratch, those of its students.
    "study": TeacherRecipe("temperature study (arXiv 2603.02430), section 3.1"),
    # The paper's appendix and the code of CRD, of mdistiller, and of the papers that took their teachers from there agree.
    "crd": TeacherRecipe(
        "CRD (ICLR 2020) and its train_teacher.py; mdistiller, configs/cifar100/vanilla.yaml",
        epochs=240,
        policy="crd",
        pretrained=False,
        opt="momentum",  # timm's name of SGD with plain momentum; its `sgd` has Nesterov's
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
    """The recipe of that name, or the one under which a model by exact name was published for a dataset."""
    if name is None:
        name = "crd" if exact.startswith("cifar_") and dataset in {"cifar10", "cifar100"} else "study"
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return name, RECIPES[name]
