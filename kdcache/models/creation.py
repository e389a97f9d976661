"""The boundary to timm: names, creation, weights, normalisation. timm is imported at the first use of a model.

The CIFAR models of `kdcache.models.cifar` are timm models with names that begin with `cifar_`. `kdcache.models.names`
defines the names of models outside timm.
"""

import hashlib
import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, NotFoundError, RetryError, UsageError
from kdcache.importing import first_line, this_folder_too, unusable
from kdcache.models import hf
from kdcache.models.checkpoints import misfit, read_weights, require_plain
from kdcache.models.classes import Outputs, imagenet, labelled
from kdcache.models.heads import classifier_names
from kdcache.models.names import (
    CONFIG,
    LOCAL,
    architecture_of,
    config_file,
    is_factory,
    is_reference,
    is_transformers,
    licence,
    load_factory,
    own_size,
    place,
    public_name,
    read_config,
    resolve,
    stated_size,
    takes,
    timm_with_zoo,
    whole_number,
)
from kdcache.models.preprocessing import configuration

__all__ = [
    "Normalisation",
    "Published",
    "checkpoint_classes",
    "create_model",
    "create_whole",
    "described",
    "has_new_head",
    "licence",
    "load_weights",
    "note",
    "published",
    "require_weights",
    "timm_config",
    "weights_digest",
]

# Published top-1 of the ImageNet teachers of distillation papers, in % (logit standardization, CVPR 2024, table 3).
IMAGENET_TOP1 = {"resnet34.tv_in1k": 73.31, "resnet50.tv_in1k": 76.16}


AS_MANY = "have the function return a model that gives logits [B, num_classes]"


@dataclass(frozen=True)
class Normalisation:
    """Per-channel `mean` and `std` of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumed: bool = field(default=False, compare=False)  # ImageNet's values, as the model states none

    def __call__(self, views: Tensor) -> Tensor:
        """Normalise views, uint8 `[B, 3, S, S]`, for the model: float32 `[B, 3, S, S]`."""
        return (views.float() - _of_pixels(self.mean, views.device)) / _of_pixels(self.std, views.device)


@cache  # of few different values; captured steps read them where they are
def _of_pixels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Each channel's number of pixels in [0, 255], float32 `[1, C, 1, 1]`; copied to a device once, where all streams see it."""
    with torch.inference_mode(False):
        return (torch.tensor(values).view(1, -1, 1, 1) * 255).to(device)


def note(name: str) -> str | None:
    """A note on a model's published results, by exact name; None for most models."""
    from kdcache.models.cifar import ELSEWHERE, TOP1

    if name in IMAGENET_TOP1:
        return f"ImageNet: {IMAGENET_TOP1[name]:.2f} % (teacher of distillation papers)"
    return f"CIFAR-100: {TOP1[name]:.2f} % ({ELSEWHERE.get(name, 'CRD')})" if name in TOP1 else None


@dataclass(frozen=True)
class Published:
    """Published weights of a model: their classes in order, by name where known, and their input size."""

    num_classes: int
    class_names: tuple[str, ...] | None
    input_size: int

    @property
    def outputs(self) -> Outputs | None:
        return labelled(self.class_names) if self.class_names else None


def published(name: str) -> Published | None:
    """The published weights of a model by exact name; None without weights. ImageNet's classes have WordNet ids as names."""
    if is_factory(name):
        return None
    if is_reference(name):
        config = read_config(config_file(name), name)
        if is_transformers(name):
            return Published(*hf.labels_of(config, name), stated_size(config, name))
        stated = config.get("pretrained_cfg", config) | config
        labels = stated.get("label_names")
        if "num_classes" not in stated:
            return None
        count = whole_number(stated["num_classes"], name, "num_classes") if stated["num_classes"] else 0
        known = tuple(map(str, labels)) if isinstance(labels, list) else _by_tag(stated.get("tag"), count)
        return Published(count, known, stated_size(config, name))
    timm = timm_with_zoo()
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return None
    subset = timm.data.infer_imagenet_subset({"num_classes": config.num_classes})
    names = config.label_names or (timm.data.ImageNetInfo(subset).label_names() if subset else None)
    return Published(config.num_classes, tuple(names) if names else None, own_size(name))


def _by_tag(tag: object, count: int) -> tuple[str, ...] | None:
    """ImageNet's classes, of weights whose tag, as timm writes them (`augreg_in21k_ft_in1k`), says that they know them."""
    known = imagenet(count) if isinstance(tag, str) and re.search(r"(?:^|_)in\d+k(?:_\d+)?$", tag) else None
    return known.names if known else None


def has_new_head(name: str, num_classes: int, file: Path | None = None) -> bool:
    """Whether a model's classifier is initialised anew, when it starts from the weights in `file`, or from its published ones.

    A model of a factory has the classifier that its function makes.
    """
    if is_factory(name):
        return False
    if file is None:
        known = published(name)
        return num_classes != (known.num_classes if known else 1000)  # which timm takes for granted, too
    with torch.random.fork_rng(devices=()):
        if is_transformers(name):
            model = hf.create(name, num_classes, pretrained=False)
        else:
            model = timm_with_zoo().create_model(_source(name), num_classes=num_classes)
    own, state = model.state_dict(), _state_for(model, file)
    return any(state[key].shape != own[key].shape for key in _head_keys(model) & own.keys() & state.keys())


def create_model(
    name: str,
    num_classes: int,
    *,
    input_size: int,
    pretrained: bool = False,
    class_names: Sequence[str] | None = None,
    drop_path: float | None = None,
) -> tuple[nn.Module, Normalisation]:
    """A model by exact name, for square inputs of `input_size` pixels.

    `pretrained` loads its weights (timm's from the Hub). With another number of classes the classifier is initialised anew.
    A function that takes `class_names` is given them; without them, numbers. `drop_path` is the largest drop rate of its
    stochastic depth. Raises UsageError for a model without one, RetryError if weights cannot be fetched, NotFoundError if there
    are none, and IncompatibleError if the model does not take such inputs or does not give one logit per class.
    """
    if is_factory(name):
        if pretrained:
            raise NotFoundError(
                f"model {name!r} has no pretrained weights that kdcache knows of",
                why="it has those that its function gives it",
                fix="leave the option out: whatever the function returns is what training starts from",
            )
        if drop_path is not None:
            raise _no_drop_path(name, drop_path, "kdcache does not tell a function of it")
        model, normalise, found = create_whole(name, num_classes, input_size=input_size, class_names=class_names)
        if found != num_classes:
            raise _impossible(name, num_classes, input_size, _UnfitError(_not_logits(num_classes), AS_MANY))
        return model, normalise
    if is_transformers(name):
        if drop_path is not None:
            raise _no_drop_path(name, drop_path, "it is a model of transformers, whose drop rate is in its config.json")
        return _create_of_transformers(name, num_classes, input_size, pretrained)
    timm = timm_with_zoo()
    elsewhere = is_reference(name)
    config = timm.models.get_pretrained_cfg(architecture_of(config_file(name), name) if elsewhere else name)
    if pretrained and not elsewhere and (config is None or not config.has_weights):
        raise NotFoundError(
            f"model {name!r} has no pretrained weights",
            why="its architecture was published without any that timm could fetch",
            fix="train it first, with kdcache train-teacher --from-scratch or --checkpoint FILE, or use another model",
        )
    if pretrained and name.startswith(LOCAL):
        resolve(name)  # checks the files against the digest in the name
    source = _source(name)
    sized: dict[str, Any] = {"img_size": input_size} if config is not None and config.fixed_input_size else {}
    if drop_path is not None:
        sized["drop_path_rate"] = drop_path
    random_state = torch.get_rng_state()
    try:
        model = timm.create_model(source, num_classes=num_classes, **sized)
        if drop_path and not any(getattr(layer, "drop_prob", 0.0) for layer in model.modules()):
            raise _no_drop_path(name, drop_path, "none of its blocks can be dropped")
        if _try_out(model, input_size) != num_classes:
            raise _UnfitError(_not_logits(num_classes), AS_MANY)
    except Exception as error:  # architectures raise different errors for an unsupported size
        if isinstance(error, TypeError) and "drop_path_rate" in str(error):
            raise _no_drop_path(name, sized["drop_path_rate"], "its architecture has no stochastic depth") from error
        raise _impossible(name, num_classes, input_size, error, own=own_size(name)) from error
    try:
        if pretrained:
            torch.set_rng_state(random_state)  # undo the trial's use of random numbers, for a reproducible new classifier
            model = timm.create_model(source, pretrained=True, num_classes=num_classes, **sized)
    except Exception as error:  # errors of timm, the Hub, and readers of damaged files
        if isinstance(error, OSError) or (isinstance(error, RuntimeError) and not elsewhere):
            raise RetryError(
                f"the pretrained weights of {name!r} could not be fetched",
                why=first_line(error),
                fix="repeat when the Hub can be reached, or use kdcache train-teacher with --checkpoint FILE or --from-scratch",
            ) from error
        if not elsewhere:
            raise
        raise IntegrityError(
            f"the weights of {public_name(name)} cannot be loaded",
            why=" ".join(str(error).split())[:200] or type(error).__name__,
            fix="get them again, or correct its config.json: they must be of the architecture that it names",
        ) from error
    data = timm.data.resolve_model_data_config(model)
    return model, Normalisation(tuple(data["mean"]), tuple(data["std"]))


def _create_of_transformers(name: str, num_classes: int, input_size: int, pretrained: bool) -> tuple[nn.Module, Normalisation]:
    if pretrained and name.startswith(LOCAL):
        resolve(name)  # checks the files against the digest in the name
    model = hf.create(name, num_classes, pretrained=pretrained)
    try:
        if _try_out(model, input_size) != num_classes:
            raise _UnfitError(_not_logits(num_classes), AS_MANY)
    except Exception as error:
        raise _impossible(public_name(name), num_classes, input_size, error, own=own_size(name)) from error
    return model, _stated(model)


def _source(name: str) -> str:
    """The name of a model as timm takes it."""
    return f"{LOCAL}{place(name)[0]}" if name.startswith(LOCAL) else name


def _no_drop_path(name: str, drop_path: float, why: str) -> UsageError:
    return UsageError(f"--drop-path {drop_path:g} with {public_name(name)}", why=why, fix="leave --drop-path out")


class _UnfitError(ValueError):
    """What is wrong with a model whatever its input size is; `mend` says what its function is to do, if it has one."""

    def __init__(self, why: str, mend: str) -> None:
        super().__init__(why)
        self.mend = mend


def _impossible(name: str, num_classes: int, input_size: int, error: Exception, own: int | None = None) -> KdcacheError:
    if isinstance(error, KdcacheError):
        return error
    other = "choose another input size with --size" if own in {None, input_size} else f"use its own input size, --size {own}"
    if isinstance(error, _UnfitError) and is_factory(name):
        other = error.mend  # as no other size does
    elif is_reference(name) and not is_factory(name):
        other += ", correct its config.json"
    return IncompatibleError(
        f"model {name!r} cannot be made for {input_size} px and {num_classes} classes",
        why=first_line(error),
        fix=f"{other}, or use another model",
    )


def create_whole(
    name: str, num_classes: int, *, input_size: int, class_names: Sequence[str] | None = None
) -> tuple[nn.Module, Normalisation, int]:
    """A model that a function makes for `num_classes`, and the number of outputs that it has, which may be another."""
    make = load_factory(name)
    given: dict[str, Any] = {"num_classes": num_classes}
    if takes(make, "class_names"):
        given["class_names"] = tuple(class_names or map(str, range(num_classes)))
    try:
        with this_folder_too():
            model = make(**given)
    except KdcacheError:
        raise
    except Exception as error:
        called = f"calling it with num_classes={num_classes}" + (", class_names=..." if "class_names" in given else "")
        raise unusable(name, "model", called, error) from error
    try:
        if not isinstance(model, nn.Module):
            raise _UnfitError(
                f"it returns a {type(model).__name__}, not an nn.Module", "have the function return the module itself"
            )
        found = _try_out(model, input_size)
        places = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
        if len(set(places)) < len(places):
            raise _UnfitError(
                "two of its weights are one and the same tensor, which safetensors cannot store",
                "have the function give each layer a tensor of its own: tensor.clone()",
            )
    except Exception as error:
        raise _impossible(name, num_classes, input_size, error) from error
    return model, _stated(model), found


def _stated(model: nn.Module) -> Normalisation:
    """The mean and std in a model's timm configuration, or ImageNet's."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    stated = configuration(model)
    mean, std = stated.get("mean"), stated.get("std")
    if mean is not None and std is not None:
        return Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
    return Normalisation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, assumed=True)


def described(
    name: str, model: nn.Module, normalise: Normalisation, digest: str, *, pretrained: bool, selected: bool = False
) -> str:
    """One line about a model before training: the digest of its weights, their licence, and what is new or assumed.

    `selected`: its classifier has rows of the pretrained one, and so is not new.
    """
    parts = [f"{public_name(name)}: start weights sha256 {digest[:12]}..."]
    if pretrained:
        parts.append(f"licence {licence(name) or 'unknown'}")
        theirs, ours = getattr(model, "pretrained_cfg", {}).get("num_classes"), getattr(model, "num_classes", None)
        if theirs != ours and not selected:
            parts.append(f"a new classifier for {ours} classes, instead of its {theirs}")
    if normalise.assumed:
        parts.append("inputs normalised as ImageNet's, as it states no mean and std")
    return ", ".join(parts)


def timm_config(
    name: str,
    model: nn.Module,
    normalise: Normalisation,
    tested: Mapping[str, Any],
    input_size: int,
    class_names: Sequence[str],
) -> bytes | None:
    """The `config.json` from which timm, or transformers, makes this model again; None for a model of a factory.

    It states how test images were shown: `tested` has timm's fields `crop_pct`, `crop_mode` and `interpolation`.
    """
    from timm.models._hub import save_config_for_hf

    if is_factory(name):
        return None
    evaluation: dict[str, Any] = {"input_size": [3, input_size, input_size], "mean": normalise.mean, "std": normalise.std}
    evaluation |= tested
    if hf.is_hf(model):
        return hf.config_json(model, evaluation, class_names)
    with tempfile.TemporaryDirectory() as folder:
        save_config_for_hf(model, str(Path(folder) / CONFIG))
        config: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text())
    # Entries about the original weights and their evaluation do not apply.
    of_others = re.compile("test_.*|label_.*|license|tag|notes|description|origin_url|paper_.*")
    stated = {key: value for key, value in config["pretrained_cfg"].items() if not of_others.fullmatch(key)}
    config |= {"label_names": list(class_names), "pretrained_cfg": stated | evaluation}
    config.get("model_args", {}).pop("drop_path_rate", None)  # which is of the training, not of the architecture
    return (json.dumps(config, indent=1) + "\n").encode()


@torch.inference_mode()
def _try_out(model: nn.Module, input_size: int) -> int:
    """The number of logits for an image: some architectures refuse a size only then. Raises the model's own error.

    Two images are tried, as what averages over a batch, say, gives one of them what looks like its logits.
    """
    logits = model.eval()(torch.zeros(2, 3, input_size, input_size))
    model.train()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        raise _UnfitError("it does not give one vector of logits per image", AS_MANY)
    return int(logits.shape[1])


def _not_logits(num_classes: int) -> str:
    return f"it does not give one vector of {num_classes} logits per image"


def load_weights(model: nn.Module, file: Path, *, replace_head: bool = False) -> list[str]:
    """Load a checkpoint (see `kdcache.models.checkpoints`) into `model`. Returns the names of tensors not loaded.

    Models of kdcache.models.cifar also read checkpoints of CRD and mdistiller, which name tensors differently. Classifier
    weights for another number of classes raise IncompatibleError; `replace_head` leaves them out instead.
    """
    state = _state_for(model, file)
    own = model.state_dict()
    # PyTorch has counted batches since 0.4.1 only, and uses the counts where a norm has no momentum.
    if all(key.endswith("num_batches_tracked") for key in own.keys() - state.keys()):
        state = {key: own[key] for key in own.keys() - state.keys()} | state
    differing = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    head = _head_keys(model)
    others = differing and not set(differing) <= head
    if others or own.keys() != state.keys() or any(state[key].shape[1:] != own[key].shape[1:] for key in differing):
        raise misfit(file, own, state)
    require_plain(file, own, state)
    if not differing:
        model.load_state_dict(state)
        return []
    theirs, ours = (int(s[differing[0]].shape[0]) for s in (state, own))
    if not replace_head:
        raise IncompatibleError(
            f"{file} has {theirs} classes, {ours} are needed",
            why="the classifier's weights have another shape",
            fix="use a teacher of this dataset, or finetune this one first: kdcache train-teacher --checkpoint "
            + shlex.quote(str(file)),
        )
    model.load_state_dict({key: value for key, value in state.items() if key not in head}, strict=False)
    return sorted(head & own.keys())


def checkpoint_classes(model: nn.Module, file: Path) -> int | None:
    """The number of classes that the classifier in a checkpoint has, for a model of that architecture; None if it has none."""
    state = _state_for(model, file)
    heads = [state[key] for name in classifier_names(model) if (key := f"{name}.weight") in state]
    return int(heads[0].shape[0]) if heads and heads[0].ndim else None


def _state_for(model: nn.Module, file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under the names that `model` gives them."""
    rename = partial(hf.renamed, model) if hf.is_hf(model) else getattr(model, "rename_published", dict)
    return read_weights(file, model.state_dict().keys(), rename)


def _head_keys(model: nn.Module) -> set[str]:
    return {f"{name}.{part}" for name in classifier_names(model) for part in ("weight", "bias")}


def require_weights(model: nn.Module, sha256: str, file: Path) -> None:
    """Raise IncompatibleError if the weights that were loaded from `file` are not those of the record beside it."""
    if weights_digest(model) != sha256:
        raise IncompatibleError(
            f"{file} is not the file that its record describes",
            why="the sha256 of its weights differs from teacher.json",
            fix="restore the file, or train the teacher again",
        )


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all weights and buffers, sorted by name."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
