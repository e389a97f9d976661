"""torchvision's datasets in small: random images in the files that each of its classes reads."""

import bz2
import csv
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.miniatures import RNG, cars, cifar10_python, cifar100_python, flowers, pets, save

COUNTS = {"train": 6, "test": 4}


def pixels(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def idx(file: Path, array: NDArray) -> None:
    """The format of MNIST's files: a type, the dimensions, and big-endian values."""
    code = {"uint8": 8, "int32": 12}[array.dtype.name]
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


def mnist(folder: str, classes: int = 10) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for split, count in COUNTS.items():
            prefix = root / folder / "raw" / ("train" if split == "train" else "t10k")
            idx(Path(f"{prefix}-images-idx3-ubyte"), pixels(count, 28, 28))
            idx(Path(f"{prefix}-labels-idx1-ubyte"), (np.arange(count) * 3 % classes).astype(np.uint8))

    return write


def qmnist(root: Path) -> None:
    for split, count in COUNTS.items():
        idx(root / f"QMNIST/raw/qmnist-{split}-images-idx3-ubyte", pixels(count, 28, 28))
        rows = np.zeros((count, 8), np.int32)
        rows[:, 0] = np.arange(count) % 10
        idx(root / f"QMNIST/raw/qmnist-{split}-labels-idx2-int", rows)


def emnist(root: Path) -> None:
    for split, count in COUNTS.items():
        for variant in ("balanced", "letters"):
            idx(root / f"EMNIST/raw/emnist-{variant}-{split}-images-idx3-ubyte", pixels(count, 28, 28))
            idx(root / f"EMNIST/raw/emnist-{variant}-{split}-labels-idx1-ubyte", np.arange(1, count + 1).astype(np.uint8))


def folders(base: Path, classes: Sequence[str], count: int, suffix: str = "jpg", name: str = "{}") -> None:
    for class_name in classes:
        for i in range(1, count + 1):
            save(base / class_name / f"{name.format(i)}.{suffix}")


def caltech101(root: Path) -> None:
    folders(root / "caltech101/101_ObjectCategories", ["BACKGROUND_Google", "Faces", "accordion"], 9, name="image_{:04d}")


def caltech256(root: Path) -> None:
    for number, name in enumerate(["001.ak47", "002.american-flag"], 1):
        folders(root / "caltech256/256_ObjectCategories", [name], 9, name=f"{number:03d}_{{:04d}}")


def cifar10(root: Path) -> None:
    """The Python form, with keys as torchvision reads them: Python 2 wrote texts."""
    cifar10_python(root)
    for file in (root / "cifar-10-batches-py").glob("*_batch*"):
        content = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps({key.decode(): value for key, value in content.items()}))


def clevr(root: Path) -> None:
    base = root / "clevr/CLEVR_v1.0"
    for split, count in (("train", 6), ("val", 4), ("test", 1)):
        files = [f"CLEVR_{split}_{i:06d}.png" for i in range(count)]
        for file in files:
            save(base / "images" / split / file)
        scenes = [{"image_filename": file, "objects": [{}] * (3 + i % 2)} for i, file in enumerate(files)]
        (base / "scenes").mkdir(exist_ok=True)
        (base / f"scenes/CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def country211(root: Path) -> None:
    for split in ("train", "valid", "test"):
        folders(root / "country211" / split, ["AD", "AE", "ZW"], 2)


def dtd(root: Path) -> None:
    base, names = root / "dtd/dtd", ("banded", "blotchy")
    for partition in (1, 2):
        for split, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4, 5))):
            (base / "labels").mkdir(parents=True, exist_ok=True)
            lines = [f"{name}/{name}_{number + partition:04d}.jpg" for name in names for number in numbers]
            (base / f"labels/{split}{partition}.txt").write_text("\n".join(lines) + "\n")
            for line in lines:
                save(base / "images" / line)


def eurosat(root: Path) -> None:
    folders(root / "eurosat/2750", ["AnnualCrop", "Forest"], 9, name="Tile_{}")


def fer2013(root: Path) -> None:
    (root / "fer2013").mkdir(parents=True)
    with (root / "fer2013/fer2013.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["emotion", "pixels", "Usage"])
        for i, usage in enumerate(["Training"] * 6 + ["PublicTest"] * 2 + ["PrivateTest"] * 2):
            rows.writerow([i % 7, " ".join(map(str, pixels(48 * 48))), usage])


def fgvc_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nA310\n")
    (data / "families.txt").write_text("Boeing 707\nA310\n")
    for split, first in (("train", 0), ("val", 4), ("test", 6)):
        for level, names in (("variant", ("707-320", "A310")), ("family", ("Boeing 707", "A310"))):
            rows = [f"{first + i:07d} {names[i % 2]}" for i in range(4 if split == "train" else 2)]
            (data / f"images_{level}_{split}.txt").write_text("\n".join(rows) + "\n")
        for row in rows:
            save(data / f"images/{row.partition(' ')[0]}.jpg")
    for level in ("variant", "family"):
        both = [(data / f"images_{level}_{split}.txt").read_text() for split in ("train", "val")]
        (data / f"images_{level}_trainval.txt").write_text("".join(both))


def food101(root: Path) -> None:
    base, listing = root / "food-101", {"train": (1001, 1002, 1003), "test": (1004, 1005)}
    (base / "meta").mkdir(parents=True)
    for split, numbers in listing.items():
        rows = {name: [f"{name}/{number}" for number in numbers] for name in ("apple_pie", "waffles")}
        (base / f"meta/{split}.json").write_text(json.dumps(rows))
        for row in (row for part in rows.values() for row in part):
            save(base / f"images/{row}.jpg")


def gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    folders(base / "GTSRB/Training", ["00000", "00001"], 3, "ppm", "00000_{:05d}")
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(4):
        save(base / f"GTSRB/Final_Test/Images/{i:05d}.ppm")
        lines.append(f"{i:05d}.ppm;24;20;5;5;20;18;{i % 2}")
    (base / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


WNIDS = ("n01440764", "n02102040", "n02979186")


def imagenet(root: Path) -> None:
    import torch

    for split in ("train", "val"):
        folders(root / split, WNIDS, 2, "JPEG", f"{split}_{{}}")
    names = {"n01440764": ("tench", "Tinca tinca"), "n02102040": ("crane",), "n02979186": ("crane",)}  # as two of the real ones
    torch.save((names, ["n01440764"] * 6), root / "meta.bin")


def imagenette(root: Path) -> None:
    for folder in ("imagenette2", "imagenette2-160"):
        for split in ("train", "val"):
            folders(root / folder / split, WNIDS, 2, "JPEG", f"{split}_{{}}")


def inaturalist(root: Path) -> None:
    names = ["00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris"]
    names.append("00001_Animalia_Annelida_Polychaeta_Sabellida_Sabellidae_Sabella_spallanzanii")
    for version in ("2021_train", "2021_valid"):
        folders(root / version, names, 3, name="a{}")


def pcam(root: Path) -> None:
    import h5py

    (root / "pcam").mkdir(parents=True)
    for split, count in (("train", 6), ("valid", 2), ("test", 4)):
        with h5py.File(root / f"pcam/camelyonpatch_level_2_split_{split}_x.h5", "w") as file:
            file["x"] = pixels(count, 96, 96, 3)
        with h5py.File(root / f"pcam/camelyonpatch_level_2_split_{split}_y.h5", "w") as file:
            file["y"] = (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)


def places365(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/alley 1\n")
    lines = [f"/a/airfield/{i:08d}.jpg 0" for i in range(3)] + [f"/a/alley/{i:08d}.jpg 1" for i in range(3)]
    (root / "places365_train_standard.txt").write_text("\n".join(lines) + "\n")
    for line in lines:
        save(root / f"data_large_standard{line.split()[0]}")
    (root / "places365_val.txt").write_text("".join(f"Places365_val_{i:08d}.jpg {i % 2}\n" for i in range(4)))
    for i in range(4):
        save(root / f"val_large/Places365_val_{i:08d}.jpg")


def rendered_sst2(root: Path) -> None:
    for split in ("train", "valid", "test"):
        folders(root / "rendered-sst2" / split, ["negative", "positive"], 3, "png")


def semeion(root: Path) -> None:
    root.mkdir(parents=True)
    rows = [[*(pixels(256) % 2).astype(float), *np.eye(10, dtype=int)[i % 10]] for i in range(20)]
    (root / "semeion.data").write_text("".join(" ".join(map(str, row)) + " \n" for row in rows))


def stl10(root: Path) -> None:
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    (base / "class_names.txt").write_text("airplane\nbird\ncar\n")
    for split, count in COUNTS.items():
        pixels(count, 3, 96, 96).tofile(base / f"{split}_X.bin")
        (np.arange(count) % 3 + 1).astype(np.uint8).tofile(base / f"{split}_y.bin")
    pixels(1, 3, 96, 96).tofile(base / "unlabeled_X.bin")


def sun397(root: Path) -> None:
    base = root / "SUN397"
    folders(base / "a", ["abbey", "airport_terminal"], 9, name="sun_{}")
    (base / "ClassName.txt").write_text("/a/abbey\n/a/airport_terminal\n")


def svhn(root: Path) -> None:
    from scipy.io import savemat

    root.mkdir(parents=True)
    for split, count in (*COUNTS.items(), ("extra", 2)):
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]  # 10 stands for the digit 0
        savemat(root / f"{split}_32x32.mat", {"X": pixels(32, 32, 3, count), "y": labels})


def usps(root: Path) -> None:
    root.mkdir(parents=True)
    for file, count in (("usps.bz2", 6), ("usps.t.bz2", 4)):
        values = RNG.uniform(-1, 1, (count, 256))
        lines = [f"{i % 10 + 1} " + " ".join(f"{j + 1}:{v:.4f}" for j, v in enumerate(row)) for i, row in enumerate(values)]
        (root / file).write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))


def within(folder: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda root: write(root / folder)


MINIATURES: dict[str, Callable[[Path], None]] = {
    "caltech101": caltech101,
    "caltech256": caltech256,
    "cifar10": cifar10,
    "cifar100": cifar100_python,
    "clevr": clevr,
    "country211": country211,
    "dtd": dtd,
    "emnist": emnist,
    "eurosat": eurosat,
    "fashion_mnist": mnist("FashionMNIST"),
    "fer2013": fer2013,
    "fgvc_aircraft": fgvc_aircraft,
    "flowers102": within("flowers-102", flowers),
    "food101": food101,
    "gtsrb": gtsrb,
    "imagenet": imagenet,
    "imagenette": imagenette,
    "inaturalist": inaturalist,
    "kmnist": mnist("KMNIST"),
    "mnist": mnist("MNIST"),
    "oxford_iiit_pet": within("oxford-iiit-pet", pets),
    "pcam": pcam,
    "places365": places365,
    "qmnist": qmnist,
    "rendered_sst2": rendered_sst2,
    "semeion": semeion,
    "stanford_cars": within("stanford_cars", cars),
    "stl10": stl10,
    "sun397": sun397,
    "svhn": svhn,
    "usps": usps,
}
