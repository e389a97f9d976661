"""Image classifiers of `transformers`, in folders and on the Hub (extra `hf`): `hf-hub:ORG/NAME`, `local-dir:PATH`.

They are told from timm's by their config.json, which names a `model_type`. A model from here is transformers' own module, with
its own names of weights; called with normalised images `[B, 3, S, S]` it returns logits `[B, C]`. Its `pretrained_cfg` states
what timm's models state there, as its image processor does it. Code that comes with a model is never run.
"""

import contextlib
import copy
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, NotFoundError, RetryError
from kdcache.importing import first_line
from kdcache.models.names import (
    HUB,
    LOCAL,
    PROCESSORS,
    companion,
    config_file,
    damaged,
    place,
    public_name,
    read_config,
    stated_size,
    whole_number,
)

__all__ = [
    "config_json",
    "create",
    "is_hf",
    "labels_of",
    "loaded_quietly",
    "locate",
    "renamed",
    "stated",
    "transformers_for",
]

CLASSIFIER = ("ForImageClassification", "ForImageClassificationWithTeacher")  # ends of the names of classes with a classifier
INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
MOST_CLASSES = 1_000_000
WARPED_FROM = 384  # px; ConvNeXt's processor crops smaller images only


def is_hf(model: nn.Module) -> bool:
    """Whether a model was made here."""
    return hasattr(model, "_kdcache_hf")


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers is given to load a model by exact name: a folder, or a repository and its revision."""
    if name.startswith(LOCAL):
        return str(place(name)[0]), {}
    repo, _, revision = name.removeprefix(HUB).partition("@")
    return repo, {"revision": revision or None}


def labels_of(config: Mapping[str, Any], name: str) -> tuple[int, tuple[str, ...] | None]:
    """(number of classes, their names if it has any) of weights with this config.json; no classes without a classifier.

    Raises IntegrityError where it states something else; `name` is the model's.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise damaged(name, f"architectures is {json.dumps(architectures)[:100]}, not a list")
    if not any(str(each).endswith(CLASSIFIER) for each in architectures):
        return 0, None
    labels = config.get("id2label")
    if not labels:
        count = config.get("num_labels")
        # as transformers counts where nothing is said
        return 2 if count is None else whole_number(count, name, "num_labels"), None
    if not isinstance(labels, Mapping):
        raise damaged(name, f"id2label is {json.dumps(labels)[:100]}, not a mapping")
    if wrong := [number for number in labels if not re.fullmatch(r"\d{1,9}", str(number), re.ASCII)]:
        raise damaged(name, f"id2label has {json.dumps(wrong[0])[:100]} for the number of a class")
    numbered = {int(number): str(label) for number, label in labels.items()}
    if max(numbered) >= MOST_CLASSES:
        raise damaged(name, f"id2label numbers a class {max(numbered)}")
    names = tuple(numbered.get(number, f"LABEL_{number}") for number in range(max(numbered) + 1))
    unnamed = all(label == f"LABEL_{number}" for number, label in enumerate(names))
    return len(names), None if unnamed else names


def create(name: str, num_classes: int, *, pretrained: bool) -> nn.Module:
    """A model by exact name. With another number of classes than its weights know, the classifier is initialised anew.

    Raises RetryError if weights cannot be fetched, and IntegrityError or IncompatibleError if they are not such a model's.
    """
    where, revision = locate(name)
    with loaded_quietly(name):
        library = transformers_for(name)
        config, made = library.AutoConfig.from_pretrained(where, **revision), library.AutoModelForImageClassification
        if type(config) not in library.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise IncompatibleError(
                f"{public_name(name)} is not an image classifier of transformers",
                why=f"its config.json is of the model type {config.model_type!r}",
                fix="use a model of timm or an image classifier, or name a function that makes yours: package.module:function",
            )
        model: nn.Module = made.from_config(_with(config, num_classes), dtype=torch.float32)
        with torch.device("meta"):
            other = made.from_config(_with(config, num_classes + 1), dtype=torch.float32)
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    head = {key for key, value in model.state_dict().items() if shapes.get(key) != value.shape}
    if pretrained:
        known, _ = labels_of(read_config(config_file(name), name), name)
        _load(name, model, head, new=num_classes != known)
    _dress(name, model, config, head, num_classes)
    return model


def _with(config: Any, num_classes: int) -> Any:
    changed = copy.deepcopy(config)
    if changed.num_labels != num_classes:
        changed.num_labels = num_classes
    changed.return_dict = True
    return changed


def _load(name: str, model: nn.Module, head: set[str], *, new: bool) -> None:
    """Load the weights that `name` has into `model`; a `new` classifier, of other classes than they know, stays as it is."""
    where, revision = locate(name)
    random_state = torch.get_rng_state()
    with loaded_quietly(name):
        full, told = transformers_for(name).AutoModelForImageClassification.from_pretrained(
            where, **revision, dtype=torch.float32, output_loading_info=True
        )
    torch.set_rng_state(random_state)
    own, theirs = model.state_dict(), full.state_dict()
    missing = set(told["missing_keys"])
    differing = {key for key, value in theirs.items() if own[key].shape != value.shape}
    if lacking := sorted((missing | differing | (own.keys() - theirs.keys())) - (head if new else set())):
        raise IntegrityError(
            f"the weights of {public_name(name)} cannot be loaded",
            why=f"{len(lacking)} tensors are missing or of another shape, for example {lacking[0]!r}",
            fix="get them again, or correct its config.json: they must be of the architecture that it names",
        )
    model.load_state_dict({key: own[key] if new and key in head else theirs[key] for key in own})


def renamed(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that a model from here gives them: those in files are often of an older transformers."""
    own = model.state_dict()
    if not own.keys() & state.keys() or own.keys() == state.keys():
        return dict(state)
    heads = [state[key] for name in model.pretrained_cfg["classifier"] if (key := f"{name}.weight") in state]
    classes = int(heads[0].shape[0]) if heads and heads[0].ndim else model.num_classes
    random_state = torch.get_rng_state()
    with loaded_quietly(type(model).__name__):
        full, told = type(model).from_pretrained(
            None,
            config=_with(model.config, classes),
            state_dict=dict(state),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    torch.set_rng_state(random_state)
    others = {each[0] if isinstance(each, tuple) else each for each in told["mismatched_keys"]}
    left_out = {*told["missing_keys"], *others}
    found = {key: value for key, value in full.state_dict().items() if key not in left_out}
    return found | {key: state[key] for key in (*told["unexpected_keys"], *others) if key in state}


def _dress(name: str, model: Any, config: Any, head: set[str], num_classes: int) -> None:
    """Have a model return logits, and state what timm's models state."""
    own = stated(name)
    count, names = labels_of(read_config(config_file(name), name), name)
    layers = {key.rpartition(".")[0]: None for key in model.state_dict() if key in head}
    model.pretrained_cfg = {
        "input_size": (3, size := stated_size(config.to_dict(), name), size),
        **own,
        "num_classes": count,
        "label_names": names,
        "classifier": tuple(layers),
    }
    model.num_classes = num_classes
    model._kdcache_hf = True
    if own.get("channels") == "BGR":
        model.register_forward_pre_hook(_reversed)
    model.register_forward_hook(_logits)


def _logits(model: nn.Module, arguments: Any, output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _reversed(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0].flip(1), *arguments[1:])


def stated(name: str) -> Mapping[str, Any]:
    """What the image processor of a model by exact name does, as timm states it; nothing where it has none.

    `mean` and `std` are found by asking it: it is given images of a single colour. `channels` is BGR where it swaps them. A
    config.json that kdcache wrote says all of this itself.
    """
    if written := read_config(config_file(name), name).get("pretrained_cfg"):
        return dict(written)
    if not any(companion(name, file) for file in PROCESSORS):
        return {}
    where, revision = locate(name)
    with loaded_quietly(name):
        processor = transformers_for(name).AutoImageProcessor.from_pretrained(where, **revision)
    return _evaluation(processor.to_dict()) | _normalisation(name, processor)


def _normalisation(name: str, processor: Any) -> dict[str, Any]:
    from PIL import Image

    def seen(colour: tuple[int, int, int]) -> Tensor:
        with loaded_quietly(name):
            pixels: Tensor = processor(Image.new("RGB", (64, 64), colour), return_tensors="pt")["pixel_values"][0]
        return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].double()

    black = seen((0, 0, 0))
    gains = torch.stack([seen((255, 0, 0)), seen((0, 255, 0)), seen((0, 0, 255))], dim=1) - black[:, None]  # [seen, shown]
    straight = bool(gains[0, 0].abs() >= gains[0, 2].abs())
    slopes = gains.diag() if straight else gains.flip(1).diag()
    expected = torch.diag(slopes) if straight else torch.diag(slopes).flip(1)
    if not slopes.all() or not torch.allclose(gains, expected, atol=1e-4):
        raise IncompatibleError(
            f"the image processor of {public_name(name)} does not treat colours one by one",
            why="kdcache normalises each of them by its mean and std, as most models want it",
            fix="use another model, or a function that makes this one and does the rest in its forward: package.module:function",
        )
    std = 1 / slopes
    mean = 0.0 - black * std
    order = slice(None) if straight else slice(None, None, -1)
    found = {"mean": tuple(mean.tolist()[order]), "std": tuple(std.tolist()[order])}
    for key, declared in (("mean", getattr(processor, "image_mean", None)), ("std", getattr(processor, "image_std", None))):
        exact = declared if isinstance(declared, list | tuple) and len(declared) == 3 else [round(x, 6) for x in found[key]]
        close = all(abs(a - b) < 1e-5 for a, b in zip(exact, found[key], strict=True))
        found[key] = tuple(exact if close else (round(x, 6) for x in found[key]))
    return found | ({} if straight else {"channels": "BGR"})


def _evaluation(processor: Mapping[str, Any]) -> dict[str, Any]:
    """`crop_pct`, `crop_mode`, `interpolation` and `input_size` of a processor's settings, as far as they have them."""
    found: dict[str, Any] = {}
    if (resample := processor.get("resample")) in INTERPOLATION:
        found["interpolation"] = INTERPOLATION[resample]
    size = processor.get("size")
    resized, aspect_kept = _side(size), isinstance(size, Mapping) and "shortest_edge" in size
    if not resized or not processor.get("do_resize", True):
        return found
    crop = _side(processor.get("crop_size")) if processor.get("do_center_crop") else None
    side, share = crop or resized, (crop or resized) / resized
    if (given := processor.get("crop_pct")) and aspect_kept and crop is None:
        aspect_kept = resized < WARPED_FROM
        share = given if aspect_kept else 1.0
    return found | {
        "input_size": (3, side, side),
        "crop_pct": share,
        "crop_mode": "center" if aspect_kept else "squash",
    }


def _side(size: Any) -> int | None:
    """The side of a square, as processors write it; None for other sizes."""
    if isinstance(size, Mapping):
        sides = {value for key in ("shortest_edge", "height", "width") if (value := size.get(key))}
        size = sides.pop() if len(sides) == 1 else None
    return int(size) if isinstance(size, int | float) else None


def config_json(model: Any, evaluation: Mapping[str, Any], class_names: Sequence[str]) -> bytes:
    """transformers' config.json of a model, with the preprocessing under `pretrained_cfg`, where kdcache reads it."""
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: number for number, name in enumerate(class_names)}
    config.architectures = [type(model).__name__]
    written: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    written["id2label"] = {str(number): name for number, name in enumerate(class_names)}
    channels = {key: value for key, value in model.pretrained_cfg.items() if key == "channels"}
    written["pretrained_cfg"] = {**evaluation, **channels}
    return (json.dumps(written, indent=1) + "\n").encode()


def transformers_for(name: str) -> Any:
    """The package transformers, which model `name` needs. Raises NotFoundError if it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise NotFoundError(
            f"model {public_name(name)} needs the package transformers",
            why="it is not installed" if isinstance(error, ModuleNotFoundError) else first_line(error),
            fix="pip install 'kdcache[hf]'",
        ) from None


@contextlib.contextmanager
def loaded_quietly(name: str) -> Iterator[None]:
    """Silence transformers meanwhile, and turn its errors into kdcache's. Raises NotFoundError if it is not installed."""
    logging = transformers_for(name).utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except KdcacheError:
        raise
    except Exception as error:  # errors of the Hub's client, of readers of damaged files, of models
        why = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, OSError) and name.startswith(HUB):
            raise RetryError(
                f"{public_name(name)} could not be loaded",
                why=why,
                fix="repeat when the Hub can be reached; what was fetched before is kept",
            ) from error
        raise IntegrityError(
            f"the files of {public_name(name)} cannot be loaded",
            why=why,
            fix="get them again, or correct its config.json and preprocessor_config.json: they must go with the weights",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
