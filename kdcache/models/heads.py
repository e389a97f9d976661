"""The classifiers of models: where they are, how a new one begins, and models with some of their outputs, in another order."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcache.errors import IncompatibleError

__all__ = ["SelectedOutputs", "classifier_names", "select_rows", "zero_head"]


class SelectedOutputs(nn.Module):
    """A `model` of which some `outputs` are kept: logits `[B, len(outputs)]`. For models whose classifier is not known."""

    def __init__(self, model: nn.Module, outputs: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        self.model, self.num_outputs = model, num_outputs
        self.register_buffer("outputs", torch.tensor(outputs, dtype=torch.int64))
        for attribute in ("pretrained_cfg", "default_cfg"):
            if hasattr(model, attribute):
                setattr(self, attribute, getattr(model, attribute))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits.index_select(1, self.get_buffer("outputs"))


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The layers of a model that give its logits, by its configuration: distilled transformers have two."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier", ())
    return (names,) if isinstance(names, str) else tuple(names or ())


@torch.no_grad()
def zero_head(model: nn.Module, name: str) -> None:
    """Set weights and biases of the classifier to zero, in place: every class is equally likely at first.

    A random classifier sends noise into pretrained features with the first gradients (Kumar et al., ICLR 2022). IncompatibleError
    for a model, called `name`, whose configuration does not say where its classifier is.
    """
    modules = dict(model.named_modules())
    named = [modules.get(each) for each in classifier_names(model)]
    layers = [layer for layer in named if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not named or len(layers) < len(named):
        raise IncompatibleError(
            f"the new classifier of {name} cannot be set to zero",
            why="its configuration does not say which layer that is",
            fix="start it as timm does: --head-init timm of train-teacher and distill",
        )
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()


def select_rows(full: nn.Module, model: nn.Module, outputs: Sequence[int], num_outputs: int, *, input_size: int) -> None:
    """Give `model`, of `len(outputs)` classes, the weights of `full`, of the same architecture: row i of a classifier is row
    `outputs[i]` of the original.

    Raises IncompatibleError if the logits then differ from those of `full`.
    """
    theirs, ours = full.state_dict(), model.state_dict()
    rows = {
        key
        for key in (f"{name}.{part}" for name in classifier_names(full) for part in ("weight", "bias"))
        if key in theirs and theirs[key].shape[:1] == (num_outputs,)
    }
    differing = {key for key in theirs.keys() & ours.keys() if theirs[key].shape != ours[key].shape}
    if not rows or not differing <= rows or theirs.keys() != ours.keys():
        raise _inseparable(f"its classifier is not one of layers with a row for each output: {sorted(differing - rows)[:3]}")
    index = torch.tensor(outputs)
    model.load_state_dict({key: value[index] if key in rows else value for key, value in theirs.items()})
    _require_same(full, model, outputs, input_size)


@torch.inference_mode()
def _require_same(full: nn.Module, model: nn.Module, outputs: Sequence[int], input_size: int) -> None:
    image = torch.randn(1, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))
    modes = [(each, each.training) for each in (full, model)]
    expected, found = full.eval()(image)[:, list(outputs)], model.eval()(image)
    for each, training in modes:
        each.train(training)
    allowed = 1e-5 * max(1.0, float(expected.abs().max()))
    if expected.isfinite().all() and not float((expected - found).abs().max()) <= allowed:
        raise _inseparable("with these rows alone its logits are others")


def _inseparable(why: str) -> IncompatibleError:
    return IncompatibleError(
        "the model cannot be reduced to the dataset's classes",
        why=why,
        fix="finetune it instead: kdcache train-teacher --epochs 20",
    )
