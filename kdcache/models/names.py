"""Names of models outside timm's registry: on the Hub, in a folder, or made by a function. timm is imported at first use.

- `hf-hub:ORG/NAME[@REVISION]`: a model on the Hub, timm's or an image classifier of transformers (`kdcache.models.hf`). Its
  exact name has the commit, `hf-hub:ORG/NAME@COMMIT`.
- `local-dir:PATH`: a folder with config.json and model.safetensors, as `kdcache export`, timm or transformers write it. Its
  exact name has the beginning of a digest of both, `local-dir:PATH@DIGEST`. Records contain `local-dir:FOLDER@DIGEST`,
  without the path.
- `package.module:function`: a function that is called with num_classes=..., and with class_names=... if it takes that, and
  returns an nn.Module.
"""

import contextlib
import hashlib
import inspect
import json
import re
import shlex
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kdcache.errors import IncompatibleError, IntegrityError, NotFoundError, RetryError, UsageError, printable, unknown_name
from kdcache.importing import first_line, is_function_name, load_function
from kdcache.models.aliases import ALIASES
from kdcache.system.documents import read_json
from kdcache.system.files import lacking, set_aside

__all__ = [
    "ALIASES",
    "CONFIG",
    "HUB",
    "LOCAL",
    "POINTER",
    "PROCESSORS",
    "WEIGHTS",
    "architecture_of",
    "companion",
    "config_file",
    "damaged",
    "exact_name",
    "find_aliases",
    "folder_name",
    "is_factory",
    "is_pointer",
    "is_reference",
    "is_transformers",
    "kept",
    "licence",
    "list_models",
    "load_factory",
    "missing_weights",
    "own_size",
    "place",
    "public_name",
    "read_config",
    "resolve",
    "split_weights",
    "stated_size",
    "takes",
    "timm_with_zoo",
    "weights_identity",
    "whole_number",
]

HUB, LOCAL = "hf-hub:", "local-dir:"
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # files of models' folders
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # beside them, transformers' settings of image processors
POINTER = "it is a Git LFS pointer, which stands for the weights: they were not fetched"
FORMS = "an alias, a timm name, hf-hub:ORG/NAME[@REVISION], local-dir:PATH or package.module:function"
# Models as timm registers them, weights in its tables of configurations, and the CIFAR networks in theirs.
_NAMED = re.compile(r"^@register_model\s*\ndef (\w+)\(|^\s*[\"'](\w+\.\w+)[\"']\s*:\s*_?\w+\(|^ +\"(cifar_\w+)\":", re.MULTILINE)
_PINNED = re.compile(r"(.+)@([0-9a-f]{12})", re.DOTALL)


def timm_with_zoo() -> ModuleType:
    """timm, with the models of kdcache.models.cifar in its registry."""
    import timm

    import kdcache.models.cifar  # noqa: F401

    return timm


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


@cache
def _names_in_source() -> frozenset[str]:
    """Names of models and of weights that stand in the source of timm and of the CIFAR networks, read without importing them.

    They are no others than timm's, and nearly all of them: a name that is not among them is asked of timm itself, which takes
    seconds and torch.
    """
    import importlib.util

    spec = importlib.util.find_spec("timm")
    folders = [Path(place) / "models" for place in (spec.submodule_search_locations if spec else None) or ()]
    names: set[str] = set()
    for file in (*(file for folder in folders for file in folder.glob("*.py")), Path(__file__).with_name("cifar.py")):
        names.update(name for pair in _NAMED.findall(file.read_text("utf-8")) for name in pair if name)
    return frozenset(name for name in names if name.partition(".")[0] in names)  # some weights have no model any more


def resolve(name: str, kind: str = "model", *, run: bool = True) -> str:
    """The exact name behind an alias, a timm name or a reference. Raises NotFoundError, for timm's with close matches.

    Without `run`, a function's module is not imported, so that plans and dry runs execute nothing.
    """
    if is_reference(name):
        if not run and is_factory(name) and is_function_name(name):
            return name
        return exact_name(name)
    exact = ALIASES.get(name, name)
    if exact in _names_in_source():
        return exact
    timm = timm_with_zoo()
    architecture, _, tag = exact.partition(".")
    if architecture not in list_models():
        fix = f"name its kind: {HUB}{name} or {LOCAL}{name}" if "/" in name else "list what there is with: kdcache models"
        raise unknown_name(kind, name, [*ALIASES, *list_models()], error=NotFoundError, fix=fix)
    tagged = timm.models.get_arch_pretrained_cfgs(architecture)
    if tag and exact not in tagged:
        raise unknown_name(f"{kind} with pretrained weights", name, [architecture, *tagged], error=NotFoundError)
    return exact


def exact_name(name: str) -> str:
    """The exact name of a reference that exists and can be used. An exact name is returned unchanged.

    Asks the Hub for the commit of a revision, and imports a factory's module. Raises NotFoundError for a missing model, and
    RetryError if the Hub cannot be reached.
    """
    if name.startswith(HUB):
        return _on_hub(name)
    if name.startswith(LOCAL):
        return _in_folder(name)
    load_factory(name)
    return name


def own_size(name: str) -> int:
    """Side of the inputs that the configuration of a model (exact name, not a factory's) states, in pixels; 224 without one."""
    if is_reference(name):
        return stated_size(read_config(config_file(name), name), name)
    published = timm_with_zoo().models.get_pretrained_cfg(name)
    return int(published.input_size[-1]) if published is not None else 224


def stated_size(config: Mapping[str, Any], name: str) -> int:
    """Side of the inputs that a config.json of timm or transformers states, in pixels; 224 without one.

    Raises IntegrityError where it states something else; `name` is the model's.
    """
    stated = config.get("pretrained_cfg", config).get("input_size")
    if not stated and _of_transformers(config):
        towers = config.get("vision_config")
        stated = config.get("image_size") or (towers.get("image_size") if isinstance(towers, Mapping) else None)
    if not stated:
        return 224
    side = stated.get("width", stated.get("height")) if isinstance(stated, Mapping) else stated
    return whole_number(side[-1] if isinstance(side, list | tuple) and side else side, name, "the size of its images")


def whole_number(value: object, name: str, what: str) -> int:
    """A number in the config.json of the model `name`, above zero, also one in text. Raises IntegrityError for anything else."""
    if isinstance(value, int | str) and not isinstance(value, bool) and re.fullmatch(r"0*[1-9]\d{0,8}", str(value), re.ASCII):
        return int(value)
    raise damaged(name, f"{what} is {json.dumps(value, default=str)[:100]}, not a number above 0")


def is_reference(name: str) -> bool:
    """Whether `name` is of one of this module's forms, and so not timm's."""
    return ":" in name


def is_transformers(name: str) -> bool:
    """Whether a model in a folder or on the Hub is one of transformers, by its config.json."""
    return name.startswith((HUB, LOCAL)) and _of_transformers(read_config(config_file(name), name))


def _of_transformers(config: Mapping[str, Any]) -> bool:
    return "architecture" not in config and isinstance(config.get("model_type"), str)


def public_name(exact: str) -> str:
    """The recorded form of an exact name, which identifies the model: for a local folder its name and digest, no path."""
    if not exact.startswith(LOCAL):
        return exact
    folder, digest = place(exact)
    name = folder.resolve().name if folder.name in {"", ".."} else folder.name
    return f"{LOCAL}{name}@{digest}" if digest else f"{LOCAL}{name}"


def folder_name(name: str) -> str:
    """A short form of a typed name for use in folder names, without the path of a local folder."""
    return re.sub(r"[^\w.+-]", "-", public_name(name).partition("@")[0])[:60]


def is_factory(name: str) -> bool:
    """Whether `name` is of a function. The function also sets the weights of the model that it makes."""
    return is_reference(name) and not name.startswith((HUB, LOCAL))


def kept(name: str, folder: Path) -> str:
    """The name from which the model of a teacher or run is made again: its own `folder`, if that has timm's configuration.

    The model's original files may have moved meanwhile. Without a configuration it is the exact name. A record may be a
    stranger's, so that NotFoundError is raised for another folder, and for a model on the Hub whose configuration was never
    fetched here.
    """
    if (folder / CONFIG).is_file():
        return f"{LOCAL}{folder}"
    if name.startswith(LOCAL):
        raise NotFoundError(
            f"{folder} has no {CONFIG}",
            why=f"that is what its model is made from; {printable(name)}, which its record names, is not looked at",
            fix=f"restore {CONFIG} from a copy; or set its folder aside, and train it again: {set_aside(folder)}",
        )
    if name.startswith(HUB) and not _fetched_before(name):
        repo, _, revision = name.removeprefix(HUB).partition("@")
        wanted = shlex.join(["hf", "download", repo, CONFIG, *(["--revision", revision] if revision else [])])
        raise NotFoundError(
            f"{folder} has no {CONFIG}, and says that its model is {name}",
            why="nothing is fetched because a record says so, which may be a stranger's",
            fix=f"restore {CONFIG} from a copy; or, if you trust it, fetch that of the Hub: {wanted}",
        )
    return name


def _fetched_before(name: str) -> bool:
    """Whether the configuration of a model on the Hub is in the Hub's cache on this machine."""
    from huggingface_hub import errors, try_to_load_from_cache

    repo, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return isinstance(try_to_load_from_cache(repo, CONFIG, revision=revision or None), str)
    except errors.HFValidationError:
        return False


def licence(name: str) -> str | None:
    """The licence of pretrained weights, as stated by timm, their card or their configuration; None if unknown."""
    if is_factory(name):
        return None
    if not is_reference(name):
        config = timm_with_zoo().models.get_pretrained_cfg(name)
        return (config.license or None) if config is not None else None
    file = config_file(name)
    card: Path | None = file.with_name("README.md")
    if name.startswith(HUB):
        with contextlib.suppress(RetryError):  # offline it stays unknown; sharing asks for it
            card = _download(name, "README.md", needed=False)
    stated = _card_licence(card) if card is not None and card.is_file() else None
    settings = read_config(file, name)
    stated = stated or settings.get("pretrained_cfg", settings).get("license")
    return stated if isinstance(stated, str) and stated.lower() not in {"", "unknown"} else None


def _card_licence(card: Path) -> str | None:
    import yaml
    from huggingface_hub import metadata_load

    try:
        stated = metadata_load(card) or {}
    except (ValueError, RecursionError, yaml.YAMLError):  # a malformed card of a stranger
        return None
    stated_licence = stated.get("license_name") if stated.get("license") == "other" else stated.get("license")
    return " and ".join(map(str, stated_licence)) if isinstance(stated_licence, list) else stated_licence


def _on_hub(name: str) -> str:
    """The exact name of a model on the Hub. Its configuration is fetched, or taken from the Hub's local cache."""
    repo, _, revision = name.partition(":")[2].partition("@")
    typed = f"{HUB}{repo}@{revision}" if revision else f"{HUB}{repo}"
    config = _download(typed, CONFIG)
    assert config is not None
    _require_kind(config, typed)
    return f"{HUB}{repo}@{config.parent.name}"  # the Hub's cache has one folder per commit


def _download(name: str, file: str, *, needed: bool = True) -> Path | None:
    """Download a file of a model on the Hub; None if it does not exist and is not `needed`."""
    from huggingface_hub import errors, hf_hub_download

    repo, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(repo, file, revision=revision or None))
    except errors.HFValidationError as error:
        raise UsageError(f"{name} is not a model on the Hub", why=first_line(error), fix=f"{HUB}ORG/NAME[@REVISION]") from None
    except errors.RepositoryNotFoundError as error:  # also raised for gated and private repositories
        raise NotFoundError(
            f"{name}: {type(error).__name__}",
            why="no such model, or not one that this account may read",
            fix="correct its name, or log in: hf auth login, or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"{name} does not exist", why="it has no such revision", fix="correct what follows @") from None
    except errors.RemoteEntryNotFoundError:
        if not needed:
            return None
        raise NotFoundError(
            f"{name} has no {file}",
            why="models of timm and transformers have one",
            fix="choose a model of timm's: hf-hub:timm/...",
        ) from None
    except Exception as error:  # errors of huggingface_hub, and of its HTTP library, which varies
        raise RetryError(
            f"{name} could not be fetched",
            why=first_line(error.__cause__ or error),
            fix="repeat when the Hub can be reached; what was fetched before is kept",
        ) from error


def _in_folder(name: str) -> str:
    """The exact name of a local folder. Raises IntegrityError if an exact name's folder has other contents now."""
    folder, pinned = place(name)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise NotFoundError(
                f"{LOCAL}{folder} is not a model",
                why=f"there is no {file} in it" if folder.is_dir() else "there is no such folder",
                fix="name a folder with config.json and model.safetensors, or make one: kdcache export RUN",
            )
        if is_pointer(path := folder / file):
            raise IntegrityError(
                f"{path} cannot be read", why=POINTER, fix=f"fetch it: git -C {shlex.quote(str(folder))} lfs pull"
            )
    _require_kind(folder / CONFIG, name)
    processors = [file for file in PROCESSORS if is_transformers(name) and (folder / file).is_file()]
    digest = hashlib.sha256()
    for file in (CONFIG, WEIGHTS, *processors):
        with (folder / file).open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    fingerprint = digest.hexdigest()[:12]
    if pinned not in {"", fingerprint}:
        raise IntegrityError(
            f"{LOCAL}{folder} is not what it was",
            why=f"the digest of its files is {fingerprint}, not {pinned}",
            fix=f"restore them, or use the model as it is now: {LOCAL}{folder}",
        )
    return f"{LOCAL}{folder.resolve()}@{fingerprint}"


def place(name: str) -> tuple[Path, str]:
    """(folder of a local model, digest in an exact name or "")."""
    typed = name.removeprefix(LOCAL)
    pinned = _PINNED.fullmatch(typed)
    if pinned and not Path(typed).expanduser().is_dir():
        return Path(pinned[1]).expanduser(), pinned[2]
    return Path(typed).expanduser(), ""


def is_pointer(file: Path) -> bool:
    """Whether a file is what Git has in the place of a large one that it has not fetched."""
    with file.open("rb") as opened:
        return opened.read(24).startswith((b"version https://git-lfs", b"version https://hawser"))


def split_weights(place: Path) -> tuple[Path, str]:
    """(file, part) of `FILE#NAME`, which names one of several sets of weights in a file; "" for all of a file."""
    file, mark, part = place.name.rpartition("#")
    if not mark or not file or not part or place.exists():
        return place, ""
    return place.with_name(file), part


def missing_weights(file: Path) -> NotFoundError:
    """The error for a file of weights that is not there, or is none."""
    if file.is_dir():
        return NotFoundError(
            f"checkpoint {file} is a folder", why="weights are in a file", fix=f"name the file of weights in it: {file}/FILE"
        )
    return NotFoundError(f"checkpoint {file} {lacking(file)}", why="weights are in a file", fix="correct the path")


def weights_identity(place: Path) -> str:
    """sha256 of a file of weights, with the part that is named of it. Raises NotFoundError if there is no such file."""
    file, part = split_weights(place)
    if not file.is_file():
        raise missing_weights(file)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return f"{digest}#{part}" if part else digest


def config_file(name: str) -> Path:
    """Path of the `config.json` of a model in a folder or on the Hub."""
    if name.startswith(LOCAL):
        return place(name)[0] / CONFIG
    file = _download(name, CONFIG)
    assert file is not None
    return file


def companion(name: str, file: str) -> Path | None:
    """A file beside the `config.json` of a model in a folder or on the Hub; None where there is none."""
    if name.startswith(HUB):
        return _download(name, file, needed=False)
    path = place(name)[0] / file
    return path if path.is_file() else None


def _require_kind(file: Path, name: str) -> None:
    """Raises IncompatibleError for a model that is neither timm's nor transformers'."""
    if not _of_transformers(read_config(file, name)):
        architecture_of(file, name)


def read_config(file: Path, name: str) -> dict[str, Any]:
    """Parse the `config.json` of a model in a folder or on the Hub. Raises IntegrityError if it is damaged."""
    try:
        config = read_json(file)
        if isinstance(config, dict) and isinstance(config.get("pretrained_cfg", {}), dict):
            return config
        why = "it holds no mapping"
    except (OSError, ValueError) as error:
        why = first_line(error)
    raise damaged(name, why)


def damaged(name: str, why: str) -> IntegrityError:
    return IntegrityError(f"{CONFIG} of {name} cannot be read", why=why, fix="restore it, or use another model")


def architecture_of(file: Path, name: str) -> str:
    config = read_config(file, name)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not timm_with_zoo().models.is_model(architecture):
        stated = "no architecture" if architecture is None else f"the architecture {architecture!r}, which timm lacks"
        raise IncompatibleError(
            f"{name} is not a model of timm",
            why=f"its {CONFIG} names {stated}",
            fix="use a model of timm's, or name a function that makes yours: package.module:function",
        )
    return architecture


def load_factory(name: str) -> Callable[..., Any]:
    """The function behind `package.module:function`."""
    called = "num_classes=..., and to return an nn.Module"
    return load_function(name, "model", forms=FORMS, called=called, listing="kdcache models")


def takes(make: Callable[..., Any], argument: str) -> bool:
    """Whether a function names `argument` among its parameters."""
    try:
        return argument in inspect.signature(make).parameters
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return False
