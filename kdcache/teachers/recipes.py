"""Training recipes of teachers, two published ones and ours: `train-teacher --recipe NAME`. Flags override a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdcache.datasets import Recipe
from kdcache.errors import UsageError, unknown_name
from kdcache.options import as_text, flag_of
from kdcache.teachers.config import TeacherConfig
from kdcache.training.config import TrainConfig, Training

__all__ = ["RECIPES", "TeacherRecipe", "durations_of", "own_flags", "settings_of", "teacher_recipe"]


@dataclass(frozen=True)
class TeacherRecipe:
    """Settings that belong together. Those of `training` have `Training`'s names; None is what suits model or dataset."""

    source: str
    epochs: int | None = None
    policy: str | None = None
    pretrained: bool | None = None
    smoothing: float = 0.1
    head_epochs: int = 0  # for which a new head is trained alone, before everything is
    training: Mapping[str, Any] = field(default_factory=dict)


RECIPES: dict[str, TeacherRecipe] = {
    # Learning rate and weight decay: 5e-4 and 0.05 for CNNs, 5e-5 and 0.1 for ViTs; from scratch, those of its students.
    # It names no warm-up, and trains with timm, whose new heads are random.
    "study": TeacherRecipe("temperature study (arXiv 2603.02430), section 3.1", training={"head_init": "timm"}),
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
            "head_init": "timm",
        },
    ),
    # The study's, but for how a new head begins: a random one spoils pretrained features before it has learnt anything, and
    # small datasets are over before they recover.
    "lp-ft": TeacherRecipe("Kumar et al., ICLR 2022 (arXiv 2202.10054): linear probing, then finetuning", head_epochs=10),
}

# Datasets that the papers train on; cifar10 is trained as cifar100 is.
OF_THE_PAPERS = {"pets", "cars", "cifar10", "cifar100", "tiny-imagenet", "imagenet"}


def teacher_recipe(name: str | None, exact: str, dataset: str) -> tuple[str, TeacherRecipe]:
    """(name, recipe) of recipe `name`. Without a name: "crd" for a CIFAR model on CIFAR, "study" for the papers' datasets.

    For other datasets it is "lp-ft", which differs from "study" where a new head is put on pretrained weights.
    """
    if name is None:
        if exact.startswith("cifar_") and dataset in {"cifar10", "cifar100"}:
            name = "crd"
        else:
            name = "study" if dataset in OF_THE_PAPERS else "lp-ft"
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return name, RECIPES[name]


def settings_of(recipe: TeacherRecipe, training: Training, epochs: int, exact: str, scratch: bool) -> TrainConfig:
    """What the flags of `training` say, and else the recipe; and where that is silent, what suits the model."""
    given, published = training.given(), dict(recipe.training)
    if given.get("sched", published.get("sched")) != published.get("sched"):
        published.pop("decay_epochs", None)  # they are those of another schedule
    return TrainConfig(**(_suitable(exact, scratch) | published | given), epochs=epochs)


def _suitable(exact: str, scratch: bool) -> dict[str, float]:
    """Learning rate and weight decay: the temperature study's for finetuning; from scratch, its students' rate."""
    is_vit = "vit" in exact and "mobilevit" not in exact
    if scratch:
        return {"lr": 0.002, "weight_decay": 0.05}
    return {"lr": 5e-5, "weight_decay": 0.1} if is_vit else {"lr": 5e-4, "weight_decay": 0.05}


def durations_of(config: TeacherConfig, recipe: TeacherRecipe, suggested: Recipe, start: str) -> list[int]:
    """The epochs of each teacher: those asked for, or the recipe's, or those that the dataset suggests.

    UsageError where there are none, and for random weights (`start`) that are taken as they are.
    """
    if config.epochs == "paper":
        if not suggested.durations:
            raise UsageError(
                f"--epochs paper for {config.subject.dataset}",
                why="the temperature study compares durations on pets and cifar100 only",
                fix="name them, for example: --epochs 20,50,200,400",
            )
        return list(suggested.durations)
    durations = list(dict.fromkeys(config.epochs)) or [suggested.teacher_epochs if recipe.epochs is None else recipe.epochs]
    if 0 in durations and start == "random":
        raise UsageError(
            f"{config.subject.teacher} from scratch in 0 epochs",
            why="weights are taken as they are"
            + (f" unless --epochs says more: {config.subject.dataset} suggests it" if not config.epochs else "")
            + ", and random ones know nothing",
            fix="say for how long to train: --epochs 100, or which weights to take: --checkpoint FILE",
        )
    return durations


def own_flags(config: TeacherConfig) -> str:
    """What the command line says of the training, beside or instead of the recipe, for a line that names the recipe."""
    flags = config.training.arguments()
    for name in ("smoothing", "head_epochs"):
        if (value := getattr(config, name)) is not None:
            flags += [flag_of(name), as_text(value)]
    return f", but {' '.join(flags)}" if flags else ""
