"""Datasets of the Hugging Face Hub, or folders in their form."""

import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from kdcache.datasets import DATASETS, Images, Licence, Sample, Split, UsersOwn, resolved
from kdcache.datasets.folder import in_test_split
from kdcache.datasets.labels import classes_of, tested_on_training
from kdcache.datasets.own import RECIPE
from kdcache.errors import IntegrityError, NotFoundError, RetryError, UsageError
from kdcache.system.progress import Progress

__all__ = ["Hub"]

HELD_OUT = 0.2  # of the training images, where a dataset has no test split
_TESTS = ("test", "validation", "valid", "val")


@DATASETS.register("hf")
@dataclass(frozen=True)
class Hub(UsersOwn):
    """Any image classification dataset of the Hugging Face Hub, or a folder in its form: `hf:ORG/NAME`.

    It takes `pip install 'kdcache[hf]'`. `image` and `label` are the columns, by default those of that name, or the only ones of
    their kind; `train` and `test` the splits, the latter by default `test`, `validation`, `valid` or `val`. Where there is none
    of these, a share of the training images is held out: `test=0.2` unless another one is given. `revision` is a commit or
    branch, `config` one of several configurations.
    """

    repo: str = ""
    config: str | None = None
    revision: str | None = None
    image: str | None = None
    label: str | None = None
    train: str = "train"
    test: str | None = None
    licence: Licence | None = None

    recipe = RECIPE

    def __post_init__(self) -> None:
        if not self.repo:
            raise UsageError(
                "dataset hf needs a repository", why="it reads one dataset of the Hub", fix="--dataset hf:timm/oxford-iiit-pet"
            )
        if Path(folder := resolved(self.repo)).is_dir():
            object.__setattr__(self, "repo", folder)

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        try:
            import datasets
        except ImportError:
            raise UsageError(
                f"dataset hf:{self.repo} needs the package datasets", why="it is not installed", fix="pip install 'kdcache[hf]'"
            ) from None
        cache = data / "hf"
        download_config = datasets.DownloadConfig(local_files_only=not fetch, cache_dir=cache / "downloads")
        try:
            whole = datasets.load_dataset(
                self.repo, self.config, revision=self.revision, cache_dir=str(cache), download_config=download_config
            )
        except (ValueError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
            raise NotFoundError(
                f"dataset hf:{self.repo} is not there",
                why=" ".join(str(error).split())[:300],
                fix="correct its name, config or revision; log in with `hf auth login` if it is gated",
            ) from None
        except Exception as error:  # `datasets` raises errors of several download libraries
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if Path(self.repo).is_dir():
                raise IntegrityError(
                    f"dataset hf:{self.repo} cannot be read", why=why, fix="restore its files from a copy, or write them anew"
                ) from None
            raise RetryError(
                f"dataset hf:{self.repo} cannot be fetched",
                why=why,
                fix="repeat the command when the Hub can be reached: what was fetched is kept",
            ) from None
        return _HubImages(self, whole)


class _HubImages(Images):
    """A `DatasetDict` with a column of images and one of labels."""

    def __init__(self, source: Hub, whole: Mapping[str, Any]) -> None:
        from datasets import ClassLabel
        from datasets import Image as Pictures

        self._fraction = _fraction(source, whole)
        test = source.test or next((name for name in _TESTS if name in whole and name != source.train), _TESTS[0])
        chosen: dict[Split, str] = {"train": source.train, "test": source.train if self._fraction else test}
        for name in chosen.values():
            if name not in whole:
                raise UsageError(
                    f"dataset hf:{source.repo} has no split {name!r}",
                    why=f"its splits are {', '.join(whole)}",
                    fix=f"--dataset {shlex.quote(DATASETS.spec(_with_splits(source, list(whole))))}",
                )
        features = whole[chosen["train"]].features
        self._image = _column(source, "image", source.image, [n for n, kind in features.items() if isinstance(kind, Pictures)])
        labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        self._label = _column(source, "label", source.label, labels or [name for name in features if name == "label"])
        # Images stay encoded here; the canvas decodes each once.
        self._parts = {split: whole[name].cast_column(self._image, Pictures(decode=False)) for split, name in chosen.items()}
        kind, where = features[self._label], f"dataset hf:{source.repo}, column {self._label}"
        self._labels, self._names = classes_of(
            {split: list(part[self._label]) for split, part in self._parts.items()},
            list(kind.names) if isinstance(kind, ClassLabel) else None,
            where,
            naming="make the column a ClassLabel, which names them",
            by_value=not isinstance(kind, ClassLabel),
        )
        # Before, texts that are numbers were in the order of texts: canvases of that order are another state.
        reordered = (
            not isinstance(kind, ClassLabel)
            and self._names != sorted(self._names)
            and isinstance(self._parts["train"][0][self._label], str)
        )
        self._order = " in the order of numbers" if reordered else ""
        self.remarks: list[str] = []
        self.refused = None
        if source.test == source.train:
            self.refused = tested_on_training(
                f"dataset hf:{source.repo}",
                f"test={source.test} is its training split",
                f"hold a part of it out: test={HELD_OUT}, or name another split",
            )
        if self._fraction:
            self.remarks.append(
                f"there is no test split: {self._fraction:g} of the images of split {source.train} are held out for testing, "
                f"chosen by their numbers (another share: test=0.1; another split: test=NAME)"
            )

    def class_names(self) -> Sequence[str]:
        return self._names

    def samples(self, split: Split) -> Sequence[Sample]:
        part = self._parts[split]
        named = split if not self._fraction else "train"
        samples = [
            Sample(f"{named}/{i:07d}", label, lambda i=i: _stored(part[i][self._image]))  # type: ignore[misc]
            for i, label in enumerate(self._labels[split])
        ]
        if self._fraction:
            samples = [sample for sample in samples if in_test_split(sample.key, self._fraction) == (split == "test")]
        if not samples:
            raise UsageError(
                f"no image is left for the {split} split",
                why=f"there are {len(part)} in all, and {self._fraction:g} of them are for testing",
                fix="use another share, such as test=0.5",
            )
        return samples

    def fingerprint(self) -> str:
        return (
            " ".join(part._fingerprint for part in self._parts.values())
            + (f" {self._fraction}" if self._fraction else "")
            + self._order
        )


def _fraction(source: Hub, whole: Mapping[str, Any]) -> float:
    """The share of the training split that is held out for testing; 0 where there is a test split."""
    if source.test is None:
        return HELD_OUT if not any(name in whole and name != source.train for name in _TESTS) else 0
    if source.test in whole:
        return 0
    try:
        share = float(source.test)
    except ValueError:
        return 0  # the name of no split, which is told with those that there are
    if not 0 < share < 1:
        raise UsageError(
            f"dataset hf:{source.repo} has test={source.test}",
            why="it is the name of a split, or the share of the training images that is held out, between 0 and 1",
            fix=f"use test={HELD_OUT}",
        )
    return share


_FITTING = {"image": "an Image feature of `datasets`", "label": "a ClassLabel, or a column called label"}


def _column(source: Hub, role: str, chosen: str | None, fitting: Sequence[str]) -> str:
    if chosen in fitting:
        return str(chosen)
    if chosen is None and (role in fitting or len(fitting) == 1):
        return role if role in fitting else fitting[0]
    raise UsageError(
        f"dataset hf:{source.repo} has {len(fitting)} columns that may be the {role}"
        + (f", and {chosen!r} is not one" if chosen else ""),
        why=f"these may: {', '.join(fitting) or 'none'}",
        fix=f"name it: --dataset {shlex.quote(DATASETS.spec(replace(source, **{role: fitting[0]})))}"
        if fitting
        else f"add such a column to it, {_FITTING[role]}, or use another dataset",
    )


def _with_splits(source: Hub, known: Sequence[str]) -> Hub:
    """The source with splits that there are; where there is only one, a part of it is held out."""
    train = source.train if source.train in known else "train" if "train" in known else known[0]
    others = [name for name in (source.test, *_TESTS, *known) if name in known and name != train]
    return replace(source, train=train, test=others[0] if others else str(HELD_OUT))


def _stored(cell: Mapping[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"])
