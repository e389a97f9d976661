"""Map-style datasets, of which each item is (image, label), as a source has its samples.

They are objects with a length and items by number, as torch's `Dataset` is; this module needs no torch. Labels are listed without
decoding images where the dataset has them in an attribute, and checked against the items as these are decoded.
"""

import hashlib
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdcache.datasets import SPLITS, Images, Sample, Split
from kdcache.datasets.labels import require_names
from kdcache.datasets.transforms import datasets_inside, require_untransformed
from kdcache.errors import KdcacheError, UsageError
from kdcache.importing import first_line
from kdcache.system.progress import Progress

__all__ = ["MapStyle", "Part", "image_files", "listed_labels", "names_of", "picture", "require_map_style"]

_LABELS = ("targets", "labels", "_labels", "y")  # attributes with one label an item
_PAIRS = ("samples", "imgs", "_samples")  # attributes with one (file, label) an item
_FILES = ("_image_files", "_images", *_PAIRS)
_PROBES = 8  # images of each part that are looked at whenever it is opened

_iterated: dict[tuple[str, int, str], list[int]] = {}  # labels that this process has listed by going through all items


@dataclass(frozen=True)
class Part:
    """One dataset with the `labels` and `keys` of its items; `digest` changes if the images looked at have changed."""

    dataset: Any
    labels: Sequence[int]
    keys: Sequence[str]
    digest: str

    def sample(self, i: int, alone: AbstractContextManager[Any]) -> Sample:
        """Item `i`, which is read while `alone` is held."""

        def load() -> Image.Image:
            with alone:
                image, label = _pair(self.dataset[i])
                if label != self.labels[i]:
                    raise ValueError(f"its label is {label} now, and was {self.labels[i]} when labels were listed")
                return picture(image)

        return Sample(self.keys[i], self.labels[i], load)


class MapStyle(Images):
    """Images of the datasets in `parts`, of classes `names`.

    `remarks` are said to the user. `chosen`: whether a sample belongs to a split, by its key, where one part is for both splits.
    `threads`: whether several threads may read items at once.
    """

    def __init__(
        self,
        names: Sequence[str],
        parts: Mapping[Split, Sequence[Part]],
        state: str,
        *,
        remarks: Sequence[str] = (),
        chosen: Callable[[str, Split], bool] | None = None,
        threads: bool,
    ) -> None:
        self._names, self._parts, self._state, self.remarks = tuple(names), parts, state, tuple(remarks)
        self._chosen = chosen
        self._alone: AbstractContextManager[Any] = nullcontext() if threads else threading.Lock()

    def class_names(self) -> Sequence[str]:
        return self._names

    def samples(self, split: Split) -> Sequence[Sample]:
        samples = [part.sample(i, self._alone) for part in self._parts[split] for i in range(len(part.keys))]
        if self._chosen is not None:
            samples = [sample for sample in samples if self._chosen(sample.key, split)]
            if not samples:
                raise UsageError(
                    f"no image is left for the {split} split",
                    why=f"there are {sum(len(part.keys) for part in self._parts[split])} in all",
                    fix="use another split_fraction, such as 0.2",
                )
        return samples

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._state}\n{self._names}\n".encode())
        for split in SPLITS:
            for part in self._parts[split]:
                digest.update(f"{split} {part.digest}\n".encode())
                for key, label in zip(part.keys, part.labels, strict=True):
                    digest.update(f"{label} {key}\n".encode())
        return digest.hexdigest()


def require_map_style(dataset: Any, where: str) -> None:
    """Raise UsageError for anything but a dataset whose items are had by number, any number of times, untransformed."""
    kind = type(dataset).__name__
    if any(base.__name__ == "IterableDataset" for base in type(dataset).__mro__):
        raise UsageError(
            f"{where} is an IterableDataset ({kind})",
            why="a sample's number says which view it gets: items must be had by number, in one order, any number of times",
            fix="return a map-style dataset, with __len__ and __getitem__; for tar shards there is: --dataset tars:ROOT",
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping):
        raise UsageError(
            f"{where} is a {kind}",
            why="a map-style dataset is asked for: an object with __len__ and __getitem__, whose items are (image, label)",
            fix="return its `dataset`" if hasattr(dataset, "dataset") else "return for example a torch.utils.data.Dataset",
        )
    require_untransformed(dataset, where)
    if len(dataset) < 1:
        raise UsageError(f"{where} is empty", why="its length is 0", fix="check what it reads, and from where")


def listed_labels(
    dataset: Any, where: str, progress: Progress, *, read: Callable[[Any], Any] | None = None, twice: bool = False
) -> tuple[list[int], str, bool]:
    """The labels of all items; a digest of the images that were looked at; and whether all items were decoded for it.

    `read` gives the labels of datasets whose attribute is no usual one. `twice` refuses images that differ from call to call.
    Raises UsageError for items that are no (image, label), and for images or labels that cannot be used.
    """
    count = len(dataset)
    looked, broken, digest = {}, [], hashlib.sha256()
    for i in sorted({round(i) for i in np.linspace(0, count - 1, _PROBES)}):
        try:
            image, looked[i] = _item(dataset, i, where)
            pixels = np.asarray(image).tobytes()
            again = np.asarray(_item(dataset, i, where)[0]).tobytes() if twice else pixels
        except _NotReadError as error:
            broken.append(error)
        except KdcacheError:
            raise
        except Exception as error:  # decoders raise many: it is the canvas that names all images that cannot be decoded
            digest.update(f"{i} {error}\n".encode("utf-8", "replace"))
        else:
            digest.update(f"{looked[i]} {image.mode} {image.size}\n".encode() + pixels)
            if again != pixels:
                raise UsageError(
                    f"{where}: image {i} has other pixels each time it is read",
                    why="it has something random inside, while views are drawn again from a policy, for teacher and student",
                    fix="return images as they are stored, and describe the augmentation by a policy: kdcache policy imagenet",
                )
    if broken and not looked:
        raise broken[0]
    labels = _as_labels(read(dataset), count) if read else _stored(dataset, count)
    if labels is not None and all(labels[i] == label for i, label in looked.items()):
        return _checked(labels, where), digest.hexdigest(), False
    known = (where, count, digest.hexdigest())
    if known not in _iterated:
        task = f"labels of {where}"
        labels = []
        for i in range(count):
            labels.append(_item(dataset, i, where)[1])
            if i % 256 == 0 or i == count - 1:
                progress.update(task, i + 1, count)
        _iterated[known] = labels
    return _checked(_iterated[known], where), digest.hexdigest(), True


def _stored(dataset: Any, count: int) -> list[int] | None:
    """Labels in an attribute of the dataset, or of those that it is made of; None without one."""
    indices, inner = getattr(dataset, "indices", None), getattr(dataset, "dataset", None)
    if indices is not None and inner is not None and len(indices) == count:  # torch's Subset
        within = _stored(inner, len(inner))
        return None if within is None else [within[i] for i in indices]
    several = getattr(dataset, "datasets", None)
    if isinstance(several, list | tuple) and sum(map(len, several)) == count:  # torch's ConcatDataset
        joined = [_stored(each, len(each)) for each in several]
        return None if None in joined else [label for labels in joined for label in labels or ()]
    for name in (*_LABELS, *_PAIRS):
        values = getattr(dataset, name, None)
        if values is None or callable(values):
            continue
        try:
            labels = _as_labels([label for _, label in values] if name in _PAIRS else values, count)
        except (TypeError, ValueError):
            continue
        if labels is not None:
            return labels
    return None


def _as_labels(values: Any, count: int) -> list[int] | None:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if array.dtype.kind not in "iu" or array.ndim < 1 or array.size != count or len(array) != count:
        return None
    return [int(label) for label in array.reshape(-1)]


def image_files(dataset: Any) -> list[str] | None:
    """The image file of each item, where the dataset lists them in an attribute."""
    for name in _FILES:
        values = getattr(dataset, name, None)
        if isinstance(values, list) and len(values) == len(dataset):
            files = [value[0] if name in _PAIRS and isinstance(value, tuple | list) else value for value in values]
            if all(isinstance(file, str | Path) for file in files):
                return [str(file) for file in files]
    return None


def names_of(dataset: Any, where: str, attribute: str = "classes") -> tuple[str, ...] | None:
    """The class names of a dataset, or of those that it wraps, in the order of their numbers; None if it has none.

    Raises UsageError for names that are not texts, or not different ones, and for wrapped datasets that differ in them.
    """
    own = getattr(dataset, attribute, None)
    wrapped = [] if own is not None else [getattr(each, attribute, None) for each in datasets_inside(dataset)]
    several = {_as_names(names, where, attribute) for names in (own, *wrapped) if names is not None}
    if len(several) > 1:
        raise UsageError(
            f"{where} joins datasets of different {attribute}",
            why="the same number would stand for one class in the first, and for another in the second",
            fix=f"number the classes of all in one way, and give the joined dataset its {attribute}",
        )
    return several.pop() if several else None


def _as_names(names: Any, where: str, attribute: str) -> tuple[str, ...]:
    names = names.tolist() if hasattr(names, "tolist") else names
    if isinstance(names, Mapping) and sorted(names.values()) == list(range(len(names))):  # class_to_idx
        names = sorted(names, key=names.__getitem__)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"{where}: its {attribute} are a {type(names).__name__}, not a list of texts",
            why="they name the classes, in the order of their numbers",
            fix=f"make {attribute} a list such as ['cat', 'dog'], or leave it out: then classes are called by their numbers",
        )
    require_names(names, where)
    return tuple(names)


class _NotReadError(UsageError):
    """An item that its dataset fails to give."""


def _item(dataset: Any, i: int, where: str) -> tuple[Image.Image, int]:
    try:
        item = dataset[i]
    except KdcacheError:
        raise
    except Exception as error:  # it is the user's code
        raise _NotReadError(
            f"{where}: item {i} cannot be read", why=f"{type(error).__name__}: {first_line(error)}", fix="mend the dataset"
        ) from error
    try:
        image, label = _pair(item)
        return picture(image), label
    except ValueError as error:
        raise UsageError(
            f"{where}: item {i} is no (image, label)",
            why=str(error),
            fix="return a PIL image, or uint8 pixels [H, W], [H, W, 3] or [3, H, W], and the number of its class, from 0 on",
        ) from None


def _pair(item: Any) -> tuple[Any, int]:
    """(image, label) of an item. Raises ValueError, with the reason, for anything else."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise ValueError(f"it is a {type(item).__name__}{size}, not a pair")
    image, label = item
    if hasattr(label, "shape") and hasattr(label, "reshape") and np.prod(label.shape) == 1:
        label = label.reshape(-1)[0]  # an array or tensor of one number
    if isinstance(label, bool):
        raise ValueError("its label is true or false, not a number")
    try:
        return image, operator.index(label)
    except TypeError:
        shape = f" {list(label.shape)}" if hasattr(label, "shape") else ""
        raise ValueError(f"its label is a {type(label).__name__}{shape}, not a whole number") from None


def picture(image: Any) -> Image.Image:
    """A PIL image of what a dataset returns. Raises ValueError, with the reason, for anything but images of 8 bits.

    Arrays and tensors are uint8 `[H, W]`, `[H, W, 1 or 3]` or `[1 or 3, H, W]`; where both fit, a tensor has its channels first,
    and an array has them last.
    """
    if isinstance(image, Image.Image):
        return image
    if not hasattr(image, "dtype") or not hasattr(image, "shape"):
        raise ValueError(f"its image is a {type(image).__name__}")
    kind, shape, is_tensor = str(image.dtype).removeprefix("torch."), list(image.shape), hasattr(image, "detach")
    if kind != "uint8":
        reason = ": its pixels were scaled or normalised" if "float" in kind else ""
        raise ValueError(f"its image is {kind} {shape}{reason}")
    pixels = image.detach().cpu().numpy() if is_tensor else np.asarray(image)
    if pixels.ndim == 3:
        first, last = pixels.shape[0] in {1, 3}, pixels.shape[2] in {1, 3}
        if first and (is_tensor or not last):
            pixels = pixels.transpose(1, 2, 0)
        elif not last:
            pixels = pixels[None]  # neither: refused below
        if pixels.shape[-1] == 1 and pixels.ndim == 3:
            pixels = pixels[..., 0]
    if pixels.ndim not in {2, 3} or not pixels.size:
        raise ValueError(f"its image is uint8 {shape}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _checked(labels: list[int], where: str) -> list[int]:
    if min(labels) < 0:
        i = next(i for i, label in enumerate(labels) if label < 0)
        raise UsageError(
            f"{where}: item {i} has the label {labels[i]}",
            why="classes are numbered from 0 on; -1 often stands for a label that is kept back",
            fix="leave such items out, or take another split",
        )
    return labels
