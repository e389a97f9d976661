"""Files of weights as trainers write them: read without running code, and the weights for a model found in them.

A file holds weights as they are, or beside an optimiser, arguments and the like; several sets of them (a model and its moving
average), each of which has a name; under names with what wrapped the model before them (`module.`, `_orig_mod.`, `model.`).
"""

import re
import shlex
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, NotFoundError, UsageError
from kdcache.models.names import POINTER, is_pointer, missing_weights, split_weights
from kdcache.models.recorded import require_recorded
from kdcache.system.files import set_aside
from kdcache.system.seals import BrokenSealError, require_sealed

__all__ = ["misfit", "read_weights", "require_plain"]

Renames = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

WHOLE = "."  # in `FILE#.`: the weights that are below no name, beside others that are
MOST_WRAPPERS = 6  # parts of a name that wrappers have put before it
SHOWN = 5  # names that a message lists
# Names of one of several files with the weights of one model, and of the list of them, as transformers writes.
_OF_SEVERAL = re.compile(r"(?P<begin>.+)-\d+-of-\d+(?P<ending>\.\w+)|(?P<list>.+)(?P<listed>\.\w+)\.index\.json")
# Parts of names that torch's wrappers give to what they wrap, anywhere in a model.
_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What AveragedModel and others count, beside the weights.
_COUNTS = {"n_averaged"}

# Classes and functions of which files tell values beside the weights: arguments, figures, settings, times. None of them is
# called: whatever is made of them is a `_Beside`.
HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"builtins.{name}" for name in ["int", "float", "bool", "str", "bytes", "list", "tuple", "dict", "set"]),
    *(f"builtins.{name}" for name in ["complex", "frozenset", "range", "slice", "bytearray", "object"]),
    "collections.deque",
    "copyreg._reconstructor",
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath", "WindowsPath")),
    *("pathlib.PureWindowsPath", "pathlib.Path", "decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
    *("numpy.ndarray", "numpy.dtype", "numpy.bool_", "numpy.bool", "numpy.str_", "numpy.bytes_"),
    *(f"numpy.{kind}{bits}" for kind, sizes in (("int", "8 16 32 64"), ("uint", "8 16 32 64")) for bits in sizes.split()),
    *(f"numpy.float{bits}" for bits in (16, 32, 64)),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *("numpy.random.mtrand.RandomState", "numpy.random._pickle.__randomstate_ctor", "numpy.random._mt19937.MT19937"),
    *(f"numpy.random._pickle.__{name}_ctor" for name in ("generator", "bit_generator")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata")),
    *(f"omegaconf.{name}" for name in ("base.Metadata", "nodes.AnyNode", "nodes.IntegerNode", "nodes.FloatNode")),
    *(f"omegaconf.nodes.{name}Node" for name in ("String", "Boolean", "Path", "Bytes")),
    *("typing.Any", "typing.Union", "typing.Optional"),
    *(f"{name}.callbacks.model_checkpoint.ModelCheckpoint" for name in ("pytorch_lightning", "lightning.pytorch")),
    *(f"{name}.callbacks.early_stopping.EarlyStopping" for name in ("pytorch_lightning", "lightning.pytorch")),
    *("mmengine.logging.history_buffer.HistoryBuffer", "torch.torch_version.TorchVersion"),
)
TABLES = (  # likewise, and they are mappings
    *("collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict", "yacs.config.CfgNode"),
    *(f"{name}.AttributeDict" for name in ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data")),
    *(f"{name}.AttributeDict" for name in ("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing")),
    *("mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict"),
)

# What files that are no weights begin with, and what they are then.
_OTHER_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "it is compressed by gzip"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd"),
    (b"\xfd7zXZ", "it is compressed by xz"),
    (b"BZh", "it is compressed by bzip2"),
    (b"Rar!", "it is a RAR archive"),
    (b"7z\xbc\xaf", "it is a 7z archive"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes, with other names than PyTorch's"),
    (b"\x93NUMPY", "it is a single NumPy array, without names of weights"),
    (b"GGUF", "it is a GGUF file"),
)
_BEGINS = (b"PK", b"\x80")  # of zip files and of pickles
_FIXES = {
    "compressed": "unpack it, and name the file of weights that comes out",
    "archive": "unpack it, and name the file of weights that comes out",
}
USABLE = "give weights that PyTorch or safetensors has written: .safetensors, or the model.state_dict() of torch.save"


class _Beside:
    """Stands for an object beside the weights: takes all that a pickle gives it, and does nothing with it."""

    def __new__(cls, *_: Any, **__: Any) -> "_Beside":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Table:
    """Stands for a class of mappings; torch lets only its own kinds be filled."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def read_weights(place: Path, names: Collection[str], rename: Renames = dict) -> dict[str, Tensor]:
    """The weights in a file, or in the part of it that `FILE#NAME` names, for a model whose tensors have these `names`.

    `FILE#.` names what is below no name, beside what is. `rename` gives tensors the model's names, where a project of its kind
    has others. No code in the file is run. Raises NotFoundError without the file or part, IntegrityError for a file that cannot
    be read, and UsageError where several of its parts fit: which one is meant is for the user to say.
    """
    file, part = split_weights(place)
    if not file.is_file():
        raise missing_weights(file)
    content = _content(file)
    sets, lists = _sets(content)
    known = frozenset(name for name in names if not name.endswith("num_batches_tracked"))

    def fitted(weights: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
        return _fitted(weights, known, rename)

    if not sets:
        raise _unreadable(file, _without_weights(content), USABLE)
    found = {name: each for whole, weights in sets.items() for name, each in _candidates(whole, weights, known, fitted).items()}
    if part:
        if (name := "" if part == WHOLE else part) in found:
            return found[name][1]
        named = sets.get(name) or _below(name, sets)
        if not named:
            offered = [name or WHOLE for name in {**sets, **found}]
            alone = offered == [WHOLE]
            raise NotFoundError(
                f"{file} has no weights called {part!r}",
                why=f"it has: {'the whole file, without #' if alone else _some(offered, 20)}",
                fix=f"name the file: {file}" if alone else f"name one of them: {file}#{offered[0]}",
            )
        return fitted(named)[1]
    best = max(count for count, _ in found.values())
    if not best:  # they are another model's, and the largest set is told what it lacks
        return max(sets.values(), key=len)
    found = {name: (count, weights) for name, (count, weights) in found.items() if 2 * count >= best}
    if len(found) > 1:
        raise _several(file, found, "the file holds several sets of weights")
    ((name, (_, weights)),) = found.items()
    if name not in sets:
        raise _several(file, found, "beside these weights it holds others, which are not the model's")
    if of_shapes := [listed for listed, tensors in lists.items() if _is_a_set(tensors, weights)]:
        raise _several(file, found, f"beside these weights it holds others as a list without names: {_some(of_shapes)}")
    return weights


def require_plain(file: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise IncompatibleError where weights are not plain numbers, or IntegrityError where they are not finite.

    A model would take quantised or complex ones as if they were the weights, and train from NaN without a word. Buffers may be
    infinite, as masks are.
    """
    for key, value in state.items():
        kind = f"{value.layout}" if value.layout is not torch.strided else "on no device" if value.is_meta else f"{value.dtype}"
        fraction = own[key].is_floating_point()
        if (
            value.layout is not torch.strided
            or value.is_meta
            or value.is_quantized
            or (fraction and not value.is_floating_point())
        ):
            raise IncompatibleError(
                f"{file}: {key} is {kind.removeprefix('torch.')}, and {str(own[key].dtype).removeprefix('torch.')} is needed",
                why="of quantised, complex, sparse or missing numbers the model would get other weights than were trained",
                fix="have the program that wrote it write plain weights: torch.save(model.state_dict(), FILE)",
            )
        if fraction and bool(value.isnan().any()):
            raise IntegrityError(
                f"{file}: {key} is not finite",
                why="there is NaN in it, as of a training that diverged",
                fix="give weights of before that, such as those of an earlier epoch",
            )


def misfit(file: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> IncompatibleError:
    """The error for weights that are not a model's: how many tensors differ, and which."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differing = [
        f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    kinds = (("of another shape", differing), ("missing", missing), ("unknown", unknown))
    return IncompatibleError(
        f"{file} does not fit the model: {len(differing)} tensors of another shape, {len(missing)} missing, "
        f"{len(unknown)} unknown",
        why="; ".join(f"{what}: {_some(names)}" for what, names in kinds if names),
        fix=_completed(file, missing)
        if missing and not differing and not unknown
        else "name the model and --size that the checkpoint was made with",
    )


def _completed(file: Path, missing: Collection[str]) -> str:
    """What mends weights of which all are the model's, and some are missing."""
    if joined := _joined(file):
        return joined
    if all(name.rpartition(".")[2] in {"running_mean", "running_var", "num_batches_tracked"} for name in missing):
        return "have the program that wrote it write all of the model: model.state_dict(), and not its named_parameters()"
    return "name the model and --size that the checkpoint was made with, or a file that has all of its weights"


def _joined(file: Path) -> str | None:
    """How to make one file of several, of which `file` is one or the list; None if it is neither by its name."""
    if (found := _OF_SEVERAL.fullmatch(file.name)) is None:
        return None
    ending = found["ending"] or found["listed"]
    begin = file.with_name(found["begin"] or found["list"])
    load, save = ("load_file(f)", "save_file") if ending == ".safetensors" else ("torch.load(f, weights_only=True)", "torch.save")
    code = (
        f"import glob, torch; from safetensors.torch import load_file, save_file; "
        f"{save}({{k: v for f in glob.glob(glob.escape({str(begin)!r}) + '-*-of-*{ending}') for k, v in {load}.items()}}, "
        f"{f'{begin}-joined{ending}'!r})"
    )
    return f"join all files of these weights, and name the one that this writes: {shlex.join(['python3', '-c', code])}"


def _unreadable(file: Path, why: str, fix: str) -> IntegrityError:
    return IntegrityError(f"checkpoint {file} cannot be read", why=why, fix=fix)


def _several(file: Path, names: Collection[str], why: str) -> UsageError:
    places = [f"{file}#{name or WHOLE}" for name in names]
    return UsageError(
        f"{file} holds {len(places)} sets of weights for this model: {', '.join(name or 'the whole file' for name in names)}"
        if len(places) > 1
        else f"{file} holds more than the weights of this model, which are {', '.join(names) or 'those that are below no name'}",
        why=why,
        fix=f"name the ones to use: {' or '.join(places)}",
    )


def _some(names: Collection[str], most: int = SHOWN) -> str:
    shown = ", ".join(list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


# ------------------------------------------------------------ what a file holds


def _content(file: Path) -> Any:
    """All that a file holds: of a pickle, mappings, lists, tensors and numbers, and `_Beside` for anything else."""
    if is_pointer(file):
        raise _unreadable(file, POINTER, f"fetch it: git -C {shlex.quote(str(file.parent))} lfs pull")
    with file.open("rb") as opened:
        begin = opened.read(1024)
    if (why := _other_kind(begin)) is not None:
        fix = _joined(file) or next((fix for word, fix in _FIXES.items() if word in why), USABLE)
        raise _unreadable(file, why, fix)
    try:
        if _is_safetensors(begin):
            require_sealed(file)
            require_recorded(file)
            return load_file(file)
        if begin.startswith(b"PK") and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as members:
                names = members.namelist()
            if names and all(name.endswith(".npy") for name in names):
                return _of_numpy(file)
            if not any(name.endswith(("/data.pkl", "/constants.pkl")) for name in names):
                packed = f"it is a zip archive of other files: {_some(names) or 'none'}"
                raise _unreadable(file, packed, _FIXES["archive"] if names else USABLE)
        return _unpickled(file)
    except (KdcacheError, MemoryError):
        raise
    except BrokenSealError as error:
        fix = f"restore it from a copy; or set its folder aside, and repeat the command that trained it: {set_aside(file.parent)}"
        raise _unreadable(file, str(error), fix) from error
    except Exception as error:  # readers raise different errors for a damaged file
        if len(begin) > 16 and not begin.startswith(_BEGINS) and not _is_safetensors(begin):
            why, fix = "it is no file of weights: neither PyTorch, safetensors nor NumPy begin one like it", USABLE
        elif isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError):
            why, fix = _said(error), USABLE
        elif "TorchScript" in (said := _said(error)):
            why, fix = said, USABLE
        elif begin.startswith(b"PK") or _is_safetensors(begin) or isinstance(error, EOFError) or len(begin) < 16:
            why = f"it is damaged or was cut off, at {file.stat().st_size:,} bytes: {_said(error)}"
            fix = "get it again, or from a copy"
        else:
            why, fix = _said(error), USABLE
        raise _unreadable(file, why, fix) from error


def _other_kind(begin: bytes) -> str | None:
    """What a file is that holds no weights, by its first bytes."""
    if not begin:
        return "it is empty"
    if _is_safetensors(begin):
        return None
    if (known := next((what for start, what in _OTHER_KINDS if begin.startswith(start)), None)) is not None:
        return known
    text = begin.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page: what was downloaded is not the file, but a page about it or an error"
    if text.startswith(b"{"):
        listed = b"weight_map" in begin or b"total_size" in begin
        return "it lists the files that hold the weights, and holds none itself" if listed else "it is JSON, and no weights"
    return None


def _is_safetensors(begin: bytes) -> bool:
    return len(begin) > 8 and begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < 100_000_000


def _of_numpy(file: Path) -> dict[str, Tensor]:
    found = {}
    with np.load(file, allow_pickle=False) as arrays:
        for name in arrays.files:
            try:
                array = arrays[name]
            except ValueError as error:  # of objects, such as arguments, which are not read
                if "pickle" not in str(error):
                    raise
                continue
            if array.dtype.kind in "biufc":
                found[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    return found


def _unpickled(file: Path) -> Any:
    inert: list[Any] = [(_Table if name in TABLES else _Beside, name) for name in (*HARMLESS, *TABLES)]
    with torch.serialization.safe_globals(inert):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, on its own classes and on what it reads; errors say the rest
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            refused = _refused(file, error)
            if not refused:
                raise
            raise _unreadable(
                file,
                f"beside weights it holds what may run code, and is not loaded: {', '.join(refused)}",
                "have the program that wrote it write the weights alone: torch.save(model.state_dict(), FILE)",
            ) from error


def _refused(file: Path, error: Exception) -> list[str]:
    """Names of all classes and functions in a pickle that are not known to be harmless."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # it is of before PyTorch 1.6, which has no list: the first one has been named
        found = []
    named = re.search(r"GLOBAL (\S+)", str(error))
    return sorted(found) or ([named[1]] if named else [])


def _said(error: Exception) -> str:
    """What a reader said, without its colours, and without its advice on how to read files of whatever kind."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)) or type(error).__name__
    if "TorchScript" in text:
        return "it is a TorchScript program, not weights"
    if "weights_only" in text or "torch.load" in text:
        cause = re.search(r"WeightsUnpickler error: (.{1,200})", text)
        return cause[1].partition(". Please")[0] if cause else "it is no pickle of tensors and plain values"
    return text.splitlines()[0][:200]


def _without_weights(content: Any) -> str:
    if isinstance(content, Tensor):
        return "it holds one tensor, without names of weights"
    if isinstance(content, _Beside) or not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__.lstrip('_').lower()}, not a mapping of names to tensors"
    return f"there are no weights among what it holds: {_some([str(name) for name in content]) or 'nothing'}"


# ------------------------------------------------------------ which of it are the model's weights


def _sets(content: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[Tensor]]]:
    """All sets of weights by name, "" for what is not below a name; and all lists of tensors, as of moving averages.

    Tensors without a shape are no weights: they are counts and figures.
    """
    sets: dict[str, dict[str, Tensor]] = {}
    lists: dict[str, list[Tensor]] = {}
    waiting: deque[tuple[str, Any]] = deque([("", content)] if isinstance(content, Mapping | list | tuple) else ())
    seen = {id(content)}
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, Mapping):
            within = [(key, each) for key, each in value.items() if isinstance(key, str) and key != "_metadata"]
            tensors = {key: each for key, each in within if isinstance(each, Tensor)}
            if any(each.ndim for each in tensors.values()) and all(isinstance(key, str) for key in value):
                sets[path] = tensors
        else:
            within = [(str(number), each) for number, each in enumerate(value)]
            if tensors_only := [each for _, each in within if isinstance(each, Tensor)]:
                lists[path] = tensors_only
        for key, each in within:
            if isinstance(each, Mapping | list | tuple) and id(each) not in seen:  # what holds itself is looked at once
                seen.add(id(each))
                waiting.append((f"{path}.{key}" if path else key, each))
    return sets, lists


def _is_a_set(tensors: Collection[Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors without names have the shapes of most of these weights, as a moving average has."""
    own = Counter(tuple(each.shape) for each in weights.values() if each.ndim)
    found = Counter(tuple(each.shape) for each in tensors if each.ndim)
    return found <= own and 3 * found.total() >= own.total()


def _below(part: str, sets: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights whose names begin with `part`, in the set that it begins with."""
    for name, weights in sets.items():
        start = f"{part.removeprefix(f'{name}.') if name else part}."
        if not name or part.startswith(f"{name}."):
            below = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
            if below:
                return below
    return {}


def _candidates(
    name: str,
    weights: Mapping[str, Tensor],
    known: Collection[str],
    fitted: Callable[[Mapping[str, Tensor]], tuple[int, dict[str, Tensor]]],
) -> dict[str, tuple[int, dict[str, Tensor]]]:
    """A set, or those that it is made of (`student.`, `module.teacher.`): by name, what `_fitted` says of each.

    One that has all that the model has is a set of its own, whatever else is beside it.
    """
    whole = fitted(weights)
    counted = {key: value for key, value in weights.items() if key not in _COUNTS}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in counted.items():
        first, dot, rest = key.partition(".")
        if dot:
            groups.setdefault(first, {})[rest] = value
    found: dict[str, tuple[int, dict[str, Tensor]]] = {}
    for first, group in groups.items():
        # One group of all is a wrapper that `_fitted` takes off; what is in it may still be several.
        if len(group) >= len(known) and (len(group) < len(counted) or not whole[0]):
            within = _candidates(f"{name}.{first}" if name else first, group, known, fitted)
            within = {each: fits for each, fits in within.items() if fits[0] >= len(known)}
            if within and len(group) < len(counted):
                counted = {key: value for key, value in counted.items() if not key.startswith(f"{first}.")}
            found |= within
    if not found:
        return {name: whole}
    return {name: fitted(counted)} | found if whole[0] >= len(known) else found


def _fitted(weights: Mapping[str, Tensor], known: Collection[str], rename: Renames) -> tuple[int, dict[str, Tensor]]:
    """(how many names are the model's, the weights under its names): without what wrapped the model, where that fits better."""
    best, count = dict(weights), -1
    for bare in _unwrapped(weights):
        found = dict(rename(bare))
        fitting = len(known & found.keys())
        if fitting > count:
            best, count = found, fitting
    return count, best


def _unwrapped(weights: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """The weights as they are named, and by names without one shared first part more each time."""
    found: list[Mapping[str, Tensor]] = [weights]
    bare = {_WRAPPED.sub("", key): value for key, value in weights.items()}
    if len(bare) == len(weights):
        found.append(bare)
    current: Mapping[str, Tensor] = found[-1]
    for _ in range(MOST_WRAPPERS):
        counted = {key: value for key, value in current.items() if key not in _COUNTS}
        first = {key.partition(".")[0] for key in counted}
        if len(first) != 1 or not all("." in key for key in counted):
            break
        current = {key.partition(".")[2]: value for key, value in counted.items()}
        found.append(current)
    return found
