"""The boundary to timm: names, creation, weights, normalisation. timm is imported when a model is first asked for.

So are the CIFAR models of `kdcache.models.cifar`, which are timm models of names that begin with `cifar_`.
Models elsewhere than in timm are named as `kdcache.models.names` says.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, NotFoundError, RetryError, unknown_name
from kdcache.models.names import (
    CONFIG,
    HUB,
    LOCAL,
    architecture_of,
    config_file,
    exact_name,
    first_line,
    is_factory,
    is_reference,
    licence,
    load_factory,
    place,
    public_name,
    read_config,
    this_folder_too,
    timm_with_zoo,
    unusable,
)

__all__ = [
    "ALIASES",
    "Normalisation",
    "Published",
    "create_model",
    "described",
    "find_aliases",
    "licence",
    "list_models",
    "load_weights",
    "note",
    "published",
    "resolve",
    "timm_config",
    "weights_digest",
]

ALIASES: dict[str, str] = {
    # The temperature study's models, with the ImageNet-1K weights of timm that its section 3.1 describes.
    "rn50": "resnet50.a1_in1k",
    "vit_s": "vit_small_patch16_224.augreg_in1k",
    "cn_t": "convnext_tiny.fb_in1k",
    "rny6.4": "regnety_064.ra3_in1k",
    "rn18": "resnet18.a1_in1k",
    "mnv4": "mobilenetv4_conv_medium.e500_r224_in1k",
    "cn_p": "convnextv2_pico.fcmae_ft_in1k",
    "mvit": "mobilevitv2_150.cvnets_in1k",
    # The ImageNet pairs of the distillation papers are rn34-rn18 and rn50-mnv1.
    "rn34": "resnet34.a1_in1k",
    "mnv1": "mobilenetv1_100.ra4_e3600_r224_in1k",
    # Networks of their CIFAR pairs, in models/cifar. Where timm has one of that name (vgg13, resnet50), the name is timm's,
    # and the zoo's is cifar_vgg13, cifar_resnet50.
    "resnet20": "cifar_resnet20",
    "resnet32": "cifar_resnet32",
    "resnet56": "cifar_resnet56",
    "resnet110": "cifar_resnet110",
    "resnet8x4": "cifar_resnet8x4",
    "resnet32x4": "cifar_resnet32x4",
    "wrn16_2": "cifar_wrn_16_2",
    "wrn40_1": "cifar_wrn_40_1",
    "wrn40_2": "cifar_wrn_40_2",
    "vgg8": "cifar_vgg8",
}


@dataclass(frozen=True)
class Normalisation:
    """Per-channel `mean` and `std` of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumed: bool = field(default=False, compare=False)  # the model does not state them: they are ImageNet's

    def __call__(self, views: Tensor) -> Tensor:
        """Views uint8 `[B, 3, S, S]` as the model wants them: float32 `[B, 3, S, S]`."""
        mean = torch.tensor(self.mean, device=views.device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.std, device=views.device).view(1, -1, 1, 1) * 255
        return (views.float() - mean) / std


def list_models(pattern: str = "") -> list[str]:
    """timm's model names that match a shell pattern, sorted: those of weights, for a pattern with a dot."""
    return list(timm_with_zoo().list_models(pattern, include_tags="." in pattern))


def find_aliases(pattern: str) -> dict[str, str]:
    """The aliases that match a shell pattern themselves, or whose models do by exact name or architecture."""
    return {
        alias: name
        for alias, name in ALIASES.items()
        if any(fnmatchcase(one, pattern) for one in (alias, name, name.partition(".")[0]))
    }


def note(name: str) -> str | None:
    """What is published of a model by exact name; None for most."""
    from kdcache.models.cifar import TOP1

    return f"CIFAR-100: {TOP1[name]:.2f} % (CRD)" if name in TOP1 else None


def resolve(name: str, kind: str = "model") -> str:
    """The exact name behind an alias, a timm name or a reference. Raises NotFoundError, for timm's with close matches."""
    if is_reference(name):
        return exact_name(name)
    timm = timm_with_zoo()
    exact = ALIASES.get(name, name)
    architecture, _, tag = exact.partition(".")
    if architecture not in list_models():
        fix = f"name its kind: {HUB}{name} or {LOCAL}{name}" if "/" in name else "list what there is with: kdcache models"
        raise unknown_name(kind, name, [*ALIASES, *list_models()], error=NotFoundError, fix=fix)
    tagged = timm.models.get_arch_pretrained_cfgs(architecture)
    if tag and exact not in tagged:
        raise unknown_name(f"{kind} with pretrained weights", name, [architecture, *tagged], error=NotFoundError)
    return exact


@dataclass(frozen=True)
class Published:
    """What weights know that were published for a model: classes, in order and by name where that is known, at this size."""

    num_classes: int
    class_names: tuple[str, ...] | None
    input_size: int


def published(name: str) -> Published | None:
    """What is known of a model's weights by exact name; None where it has none. ImageNet's classes are named by WordNet ids."""
    if is_factory(name):
        return None
    if is_reference(name):
        config = read_config(config_file(name), name)
        stated = config.get("pretrained_cfg", config) | config
        labels, size = stated.get("label_names"), stated.get("input_size", [224])
        known = tuple(map(str, labels)) if isinstance(labels, list) else None
        return Published(int(stated["num_classes"]), known, int(size[-1])) if "num_classes" in stated else None
    timm = timm_with_zoo()
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return None
    subset = timm.data.infer_imagenet_subset({"num_classes": config.num_classes})
    names = config.label_names or (timm.data.ImageNetInfo(subset).label_names() if subset else None)
    return Published(config.num_classes, tuple(names) if names else None, config.input_size[-1])


def create_model(name: str, num_classes: int, *, input_size: int, pretrained: bool = False) -> tuple[nn.Module, Normalisation]:
    """A model by exact name, for square inputs of `input_size` pixels.

    `pretrained` loads its weights, those of timm from the Hub; a classifier of another number of classes is drawn anew.
    RetryError where they cannot be fetched, NotFoundError where there are none. IncompatibleError for a model that does not
    take such inputs, or does not give one logit per class.
    """
    if is_factory(name):
        return _create_by_factory(name, num_classes, input_size, pretrained)
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
        resolve(name)  # the files are still those of its digest
    source = f"{LOCAL}{place(name)[0]}" if name.startswith(LOCAL) else name
    sized: dict[str, Any] = {"img_size": input_size} if config is not None and config.fixed_input_size else {}
    random_state = torch.get_rng_state()
    try:
        model = timm.create_model(source, num_classes=num_classes, **sized)
        _try_out(model, input_size, num_classes)
    except Exception as error:  # every architecture has its own way to refuse a size
        raise _impossible(name, num_classes, input_size, error) from error
    try:
        if pretrained:
            torch.set_rng_state(random_state)  # a new classifier is drawn as if nothing had been tried before
            model = timm.create_model(source, pretrained=True, num_classes=num_classes, **sized)
    except Exception as error:  # of timm, the Hub and readers of damaged files
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


def _impossible(name: str, num_classes: int, input_size: int, error: Exception) -> KdcacheError:
    if isinstance(error, KdcacheError):
        return error
    return IncompatibleError(
        f"model {name!r} cannot be made for {input_size} px and {num_classes} classes",
        why=first_line(error),
        fix="choose another input size with --size, or another model",
    )


def _create_by_factory(name: str, num_classes: int, input_size: int, pretrained: bool) -> tuple[nn.Module, Normalisation]:
    if pretrained:
        raise NotFoundError(
            f"model {name!r} has no pretrained weights that kdcache knows of",
            why="it has those that its function gives it",
            fix="leave the option out: whatever the function returns is what training starts from",
        )
    make = load_factory(name)
    try:
        with this_folder_too():
            model = make(num_classes=num_classes)
    except Exception as error:
        raise unusable(name, f"calling it with num_classes={num_classes}", error) from error
    try:
        if not isinstance(model, nn.Module):
            raise TypeError(f"it returns a {type(model).__name__}, not an nn.Module")
        _try_out(model, input_size, num_classes)
        places = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
        if len(set(places)) < len(places):
            raise ValueError("two of its weights are one and the same tensor, which safetensors cannot store")
    except Exception as error:
        raise _impossible(name, num_classes, input_size, error) from error
    return model, _stated(model)


def _stated(model: nn.Module) -> Normalisation:
    """The mean and std that a model states as timm's models do, or ImageNet's."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        stated = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {}
        mean, std = stated.get("mean"), stated.get("std")
        if mean is not None and std is not None:
            return Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
    return Normalisation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, assumed=True)


def described(name: str, model: nn.Module, normalise: Normalisation, digest: str, *, pretrained: bool) -> str:
    """What is worth knowing of a model with weights of this `digest`, before training: their licence, what is new or assumed."""
    said = [f"{public_name(name)}: start weights sha256 {digest[:12]}..."]
    if pretrained:
        said.append(f"licence {licence(name) or 'unknown'}")
        theirs, ours = getattr(model, "pretrained_cfg", {}).get("num_classes"), getattr(model, "num_classes", None)
        if theirs != ours:
            said.append(f"a new classifier for {ours} classes, instead of its {theirs}")
    if normalise.assumed:
        said.append("inputs normalised as ImageNet's, as it states no mean and std")
    return ", ".join(said)


def timm_config(
    name: str, model: nn.Module, normalise: Normalisation, *, input_size: int, class_names: Sequence[str]
) -> bytes | None:
    """timm's `config.json`, from which this model is made again; None where a factory made it, which timm does not know.

    It states how models are tested here: the whole image, resized to a square.
    """
    from timm.models._hub import save_config_for_hf

    if is_factory(name):
        return None
    with tempfile.TemporaryDirectory() as folder:
        save_config_for_hf(model, str(Path(folder) / CONFIG))
        config: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text())
    # What is said of other weights, or of how those were tested, is not true of these.
    of_others = re.compile("test_.*|label_.*|license|tag|notes|description|origin_url|paper_.*")
    stated = {key: value for key, value in config["pretrained_cfg"].items() if not of_others.fullmatch(key)}
    stated |= {"input_size": [3, input_size, input_size], "mean": normalise.mean, "std": normalise.std}
    stated |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    config |= {"label_names": list(class_names), "pretrained_cfg": stated}
    return (json.dumps(config, indent=1) + "\n").encode()


@torch.inference_mode()
def _try_out(model: nn.Module, input_size: int, num_classes: int) -> None:
    """One image through the model, which some architectures refuse only then. Raises whatever they raise."""
    logits = model.eval()(torch.zeros(1, 3, input_size, input_size))
    model.train()
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise ValueError(f"it does not give one vector of {num_classes} logits per image")


def load_weights(model: nn.Module, file: Path, *, replace_head: bool = False) -> list[str]:
    """Load a checkpoint (`.safetensors`, or a `.pth` of tensors) into `model`; returns the names left at their start values.

    Models of kdcache.models.cifar read the checkpoints of CRD and mdistiller too, whose tensors have other names.
    `replace_head` leaves out classifier weights of another number of classes, which otherwise is an IncompatibleError.
    """
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = getattr(model, "rename_published", dict)
    state = rename(_read_state(file))
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differing = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    head = {f"{name}.{part}" for name in _classifier_names(model) for part in ("weight", "bias")}
    if differing and set(differing) <= head:
        theirs, ours = (int(s[differing[0]].shape[0]) for s in (state, own))
        if not replace_head:
            raise IncompatibleError(
                f"{file} has {theirs} classes, {ours} are needed",
                why="the classifier's weights have another shape",
                fix="use a teacher of this dataset, or finetune this one first: kdcache train-teacher --checkpoint " + str(file),
            )
        state = {key: value for key, value in state.items() if key not in head}
        missing = sorted(head & own.keys())
    elif differing or missing or unexpected:
        example = (differing or missing or unexpected)[0]
        raise IncompatibleError(
            f"{file} does not fit the model: {len(differing)} tensors of another shape, {len(missing)} missing, "
            f"{len(unexpected)} unknown",
            why=f"for example {example!r}; the file is another architecture's or another input size's",
            fix="name the model and --size that the checkpoint was made with",
        )
    model.load_state_dict(state, strict=False)
    return missing if differing else []


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier", ())
    return (names,) if isinstance(names, str) else tuple(names or ())


def _read_state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise NotFoundError(f"checkpoint {file} does not exist", why="there is no such file", fix="correct the path")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state.get("model", state)) if isinstance(state, Mapping) else None
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it does not hold a mapping of names to tensors")
        return dict(state)
    except Exception as error:  # every reader has its own errors for a damaged file
        raise IntegrityError(
            f"checkpoint {file} cannot be read",
            why=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix="give a .safetensors file, or a .pth file that holds only tensors",
        ) from error


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all weights and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
