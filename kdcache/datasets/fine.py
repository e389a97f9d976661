"""Fine-grained datasets: Oxford's pets and flowers, Stanford's cars."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.datasets import DATASETS, Counts, Images, Recipe, Split
from kdcache.datasets.fetching import Download, Listed, Rooted, damaged_file, find_or_fetch, first_with, pictures
from kdcache.system.progress import Progress

__all__ = ["Cars", "Flowers", "Pets"]

VGG = "https://www.robots.ox.ac.uk/~vgg/data"


@DATASETS.register("pets")
@dataclass(frozen=True)
class Pets(Rooted):
    """Oxford-IIIT Pet (Parkhi et al. 2012): 3,680 and 3,669 images, 37 breeds."""

    licence = "CC-BY-SA-4.0"
    recipe = Recipe(
        policy="pets",
        canvas=336,
        teacher_epochs=20,
        student="rn18",
        student_epochs=1024,
        pretrained=True,
        durations=(20, 50, 200, 400),
    )
    counts = Counts(3680, 3669, 37)

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        base = find_or_fetch(
            "pets",
            self.root,
            data,
            first_with("images", "annotations/trainval.txt", "annotations/test.txt", below=("", "oxford-iiit-pet")),
            "the folders images/ and annotations/ of the Oxford-IIIT Pet dataset",
            [
                Download(f"{VGG}/pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", 792),
                Download(f"{VGG}/pets/data/annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f", 19),
            ],
            "--dataset hf:timm/oxford-iiit-pet",
            progress,
            fetch,
        )
        listings: dict[Split, Path] = {"train": base / "annotations/trainval.txt", "test": base / "annotations/test.txt"}
        rows = {split: _pet_rows(file) for split, file in listings.items()}
        # The image's name contains the breed: Abyssinian_100.
        breeds = {number: name.rpartition("_")[0] for part in rows.values() for name, number in part}
        if sorted(breeds) != list(range(1, len(breeds) + 1)):
            raise damaged_file(listings["train"], f"its {len(breeds)} classes are not numbered from 1 on")
        paths = {split: [(base / f"images/{name}.jpg", number - 1) for name, number in part] for split, part in rows.items()}
        files = [*listings.values(), *(file for part in paths.values() for file, _ in part)]
        return Listed(base, [breeds[i] for i in sorted(breeds)], lambda split: pictures(paths[split], base), files)


def _pet_rows(file: Path) -> list[tuple[str, int]]:
    """(image name, class number) of lines such as `Abyssinian_100 1 1 1`."""
    try:
        lines = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip() and line[0] != "#"]
        return [(line[0], int(line[1])) for line in lines]
    except (ValueError, IndexError) as error:
        raise damaged_file(file, str(error)) from None


@DATASETS.register("flowers")
@dataclass(frozen=True)
class Flowers(Rooted):
    """Oxford 102 Flowers (Nilsback and Zisserman 2008): 2,040 (train and validation) and 6,149 images, 102 classes."""

    licence = None
    recipe = Recipe(policy="pets", canvas=336, teacher_epochs=20, student="rn18", student_epochs=1024, pretrained=True)
    counts = Counts(2040, 6149, 102)

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        base = find_or_fetch(
            "flowers",
            self.root,
            data,
            first_with("jpg", "imagelabels.mat", "setid.mat", below=("", "flowers-102")),
            "the folder jpg/ with imagelabels.mat and setid.mat of the 102 flowers",
            [
                Download(f"{VGG}/flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", 345),
                Download(f"{VGG}/flowers/102/imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", 1),
                Download(f"{VGG}/flowers/102/setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", 1),
            ],
            "--dataset hf:dpdl-benchmark/oxford_flowers102",
            progress,
            fetch,
        )
        labels = _matlab(base / "imagelabels.mat", "labels")[0].astype(np.int64) - 1
        sets = base / "setid.mat"
        chosen: dict[Split, np.ndarray] = {
            "train": np.sort(np.concatenate([_matlab(sets, "trnid")[0], _matlab(sets, "valid")[0]])).astype(np.int64),
            "test": np.sort(_matlab(sets, "tstid")[0]).astype(np.int64),
        }
        if any(part.size and not 1 <= part.min() <= part.max() <= len(labels) for part in chosen.values()):
            raise damaged_file(sets, f"it names images beyond the {len(labels)} that have labels")
        paths = {
            split: [(base / f"jpg/image_{number:05d}.jpg", int(labels[number - 1])) for number in part.tolist()]
            for split, part in chosen.items()
        }
        # The dataset has only class numbers; 001 is the pink primrose.
        names = [f"{number:03d}" for number in range(1, int(labels.max()) + 2)]
        files = [base / "imagelabels.mat", sets, *(file for part in paths.values() for file, _ in part)]
        return Listed(base, names, lambda split: pictures(paths[split], base), files)


@DATASETS.register("cars")
@dataclass(frozen=True)
class Cars(Rooted):
    """Stanford Cars (Krause et al. 2013): 8,144 and 8,041 images, 196 models. Has to be got by hand."""

    licence = None
    recipe = Recipe(policy="pets", canvas=336, teacher_epochs=20, student="rn18", student_epochs=1024, pretrained=True)
    counts = Counts(8144, 8041, 196)

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        base = find_or_fetch(
            "cars",
            self.root,
            data,
            first_with("cars_train", "cars_test", "devkit/cars_meta.mat", below=("", "stanford_cars")),
            "cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat of Stanford Cars",
            [],
            "--dataset hf:tanganke/stanford_cars",
            progress,
            fetch,
        )
        meta = base / "devkit/cars_meta.mat"
        names = [str(np.asarray(cell).item()) for cell in _matlab(meta, "class_names").reshape(-1)]
        inside, beside = base / "devkit/cars_test_annos_withlabels.mat", base / "cars_test_annos_withlabels.mat"
        annotated: dict[Split, Path] = {
            "train": base / "devkit/cars_train_annos.mat",
            "test": beside if beside.is_file() else inside,
        }
        paths = {split: _car_rows(file, base / f"cars_{split}", len(names)) for split, file in annotated.items()}
        files = [meta, *annotated.values(), *(file for part in paths.values() for file, _ in part)]
        return Listed(base, names, lambda split: pictures(paths[split], base), files)


def _car_rows(file: Path, folder: Path, classes: int) -> list[tuple[Path, int]]:
    rows = _matlab(file, "annotations").reshape(-1)
    try:
        labelled = [(folder / str(row["fname"].item()), int(row["class"].item()) - 1) for row in rows]
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise damaged_file(file, f"its annotations have no file names and classes: {error}") from None
    if any(not 0 <= label < classes for _, label in labelled):
        raise damaged_file(file, f"it has labels beyond the {classes} classes")
    return labelled


def _matlab(file: Path, name: str) -> Any:
    """One variable of a .mat file."""
    from scipy.io import loadmat

    try:
        return loadmat(file)[name]
    except Exception as error:  # damaged files fail in every way
        raise damaged_file(file, f"{type(error).__name__}: {error}") from None
