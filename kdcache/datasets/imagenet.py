"""ImageNet-1K (ILSVRC 2012), in folders or in its original tar files, and Tiny ImageNet."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.datasets import DATASETS, Counts, Images, Recipe, Sample, Split
from kdcache.datasets.fetching import Download, Listed, Rooted, damaged_file, find_or_fetch, first_with, pictures
from kdcache.datasets.folder import Folder
from kdcache.datasets.tars import in_tar, members
from kdcache.errors import NotFoundError
from kdcache.system.progress import Progress

__all__ = ["ImageNet", "TinyImageNet"]

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12/data"


@DATASETS.register("imagenet")
@dataclass(frozen=True)
class ImageNet(Rooted):
    """ImageNet-1K (Russakovsky et al. 2015): 1,281,167 and 50,000 (validation) images, 1,000 classes. Got by hand.

    `train/<wnid>/` and `val/<wnid>/`; or the tar files for training and validation as they are, beside the unpacked development
    kit: images are read out of them, nothing is unpacked.
    """

    licence = None
    recipe = Recipe(policy="imagenet", canvas=256, teacher_epochs=0, student="rn18", student_epochs=100, pretrained=True)
    counts = Counts(1_281_167, 50_000, 1000)

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        def find(place: Path) -> Path | None:
            folders = (place / "train").is_dir() and any((place / name).is_dir() for name in ("val", "validation", "test"))
            return place if folders or all((place / name).is_file() for name in (TRAIN_TAR, VAL_TAR)) else None

        base = find_or_fetch(
            "imagenet",
            self.root,
            data,
            find,
            f"train/<wnid>/ and val/<wnid>/, or {TRAIN_TAR}, {VAL_TAR} and the unpacked development kit,",
            [],
            "--dataset hf:ILSVRC/imagenet-1k (accept its terms there first)",
            progress,
            fetch,
        )
        return Folder(str(base)) if (base / "train").is_dir() else _in_tars(base)


def _in_tars(base: Path) -> Images:
    from scipy.io import loadmat

    meta, truth = base / DEVKIT / "meta.mat", base / DEVKIT / "ILSVRC2012_validation_ground_truth.txt"
    for file in (meta, truth):
        if not file.is_file():
            raise NotFoundError(
                f"{file} does not exist",
                why="the labels of the validation images are in the development kit",
                fix=f"tar -xzf ILSVRC2012_devkit_t12.tar.gz -C {shlex.quote(str(base))}",
            )
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        wnids = sorted(wnid_of.values())
        order = [wnids.index(wnid_of[int(line)]) for line in truth.read_text().split()]
    except Exception as error:  # damaged files fail in every way
        raise damaged_file(meta, f"{type(error).__name__}: {error}") from None
    number = {wnid: i for i, wnid in enumerate(wnids)}

    def list_samples(split: Split) -> Sequence[Sample]:
        if split == "test":
            pictures = sorted(members(base / VAL_TAR), key=lambda member: member.name)
            if len(pictures) != len(order):
                raise damaged_file(truth, f"it has {len(order)} labels, {VAL_TAR} has {len(pictures)} images")
            return [Sample(m.name, label, in_tar(m)) for m, label in zip(pictures, order, strict=True)]
        samples = []
        for inner in sorted(members(base / TRAIN_TAR), key=lambda member: member.name):  # one tar a class: n01440764.tar
            wnid = inner.name.removesuffix(".tar")
            if wnid not in number:
                raise damaged_file(base / TRAIN_TAR, f"{inner.name} is not one of the {len(wnids)} classes")
            pictures = sorted(members(inner.file, inner.offset, inner.size), key=lambda member: member.name)
            samples += [Sample(f"{wnid}/{m.name}", number[wnid], in_tar(m)) for m in pictures]
        return samples

    return Listed(base, wnids, list_samples, [base / TRAIN_TAR, base / VAL_TAR, meta, truth])


@DATASETS.register("tiny-imagenet")
@dataclass(frozen=True)
class TinyImageNet(Rooted):
    """Tiny ImageNet (CS231n): 100,000 and 10,000 (validation) images of 64 x 64 pixels, 200 classes."""

    licence = None
    recipe = Recipe(
        policy="imagenet",
        canvas=64,
        teacher_epochs=40,
        student="rn18",
        student_epochs=512,
        pretrained=True,
        test_policy="none",
    )
    counts = Counts(100_000, 10_000, 200)

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        base = find_or_fetch(
            "tiny-imagenet",
            self.root,
            data,
            first_with("wnids.txt", "train", "val/val_annotations.txt", below=("", "tiny-imagenet-200")),
            "the folder tiny-imagenet-200/",
            [Download("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", 248)],
            "--dataset hf:zh-plus/tiny-imagenet",
            progress,
            fetch,
        )
        annotations = base / "val/val_annotations.txt"
        try:
            wnids = sorted((base / "wnids.txt").read_text().split())
        except ValueError as error:
            raise damaged_file(base / "wnids.txt", f"{type(error).__name__}: {error}") from None
        number = {wnid: i for i, wnid in enumerate(wnids)}
        try:
            rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line]
            val = [(base / "val/images" / name, number[wnid]) for name, wnid in rows]
        except (ValueError, KeyError) as error:
            raise damaged_file(annotations, f"{type(error).__name__}: {error}") from None
        train = [(file, number[wnid]) for wnid in wnids for file in sorted((base / "train" / wnid / "images").glob("*.JPEG"))]
        rows_of: dict[Split, list[tuple[Path, int]]] = {"train": train, "test": sorted(val)}
        files = [base / "wnids.txt", annotations, *(file for file, _ in (*train, *val))]
        return Listed(base, wnids, lambda split: pictures(rows_of[split], base), files)
