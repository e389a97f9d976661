"""Datasets in small: some random images, laid out file by file as the real ones are."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RNG = np.random.default_rng(23)


def picture(size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def save(file: Path, size: tuple[int, int] = (24, 20)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(size).save(file)


def encoded(suffix: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, suffix)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def batch(count: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (count, 3072), dtype=np.uint8)


CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100_NAMES = [f"fine_{i:02d}" for i in range(100)]


def cifar10(root: Path, images: list[NDArray[np.uint8]] | None = None) -> None:
    """The binary form: a byte for the label, then red, green and blue planes."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = images[i] if images else batch(4)
        labels = np.array([(4 * i + k) % 10 for k in range(4)], np.uint8)
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")


def cifar10_python(root: Path, images: list[NDArray[np.uint8]] | None = None) -> None:
    """The Python form: a pickled mapping, with keys as Python 2 wrote them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {
            b"batch_label": f"training batch {i + 1} of 5".encode(),
            b"labels": [(4 * i + k) % 10 for k in range(4)],
            b"data": images[i] if images else batch(4),
            b"filenames": [f"{k}.png".encode() for k in range(4)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {"num_cases_per_batch": 4, "label_names": CIFAR10_NAMES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def cifar100(root: Path) -> None:
    """The binary form: a byte for the coarse label, one for the fine label."""
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for name, count in (("train", 12), ("test", 6)):
        labels = np.stack([np.arange(count) % 20, (np.arange(count) * 9) % 100], axis=1).astype(np.uint8)
        np.concatenate([labels, batch(count)], axis=1).tofile(folder / f"{name}.bin")
    (folder / "fine_label_names.txt").write_text("\n".join(CIFAR100_NAMES) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse_{i}" for i in range(20)) + "\n")


def cifar100_python(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 12), ("test", 6)):
        content = {
            "filenames": [f"{k}.png" for k in range(count)],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": [(k * 9) % 100 for k in range(count)],
            "coarse_labels": [k % 20 for k in range(count)],
            "data": batch(count),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {"fine_label_names": CIFAR100_NAMES, "coarse_label_names": [f"coarse_{i}" for i in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))


BREEDS = ("Abyssinian", "american_bulldog", "Bengal")


def pets(root: Path) -> None:
    """`images/` of both splits in one folder, and listings: name, class from 1, species, breed within the species."""
    rows: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, breed in enumerate(BREEDS, 1):
        for i in (1, 10, 2, 33):
            split = "test" if i == 33 else "trainval"
            rows[split].append(f"{breed}_{i} {number} {1 if breed[0].isupper() else 2} 1")
            save(root / f"images/{breed}_{i}.jpg")
    save(root / "images/Bengal_999.jpg")  # some images are in no listing
    (root / "annotations/trimaps").mkdir(parents=True)
    (root / "annotations/list.txt").write_text("#Image CLASS-ID SPECIES BREED ID\n")
    for split, lines in rows.items():
        (root / f"annotations/{split}.txt").write_text("\n".join(lines) + "\n")


def flowers(root: Path) -> None:
    from scipy.io import savemat

    for number in range(1, 13):
        save(root / f"jpg/image_{number:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": np.array([[1, 2, 3] * 4], np.uint8)})
    sets = {"trnid": [5, 1, 9], "valid": [2, 3], "tstid": [4, 6, 7, 8, 10, 11, 12]}
    savemat(root / "setid.mat", {name: np.array([part], np.uint16) for name, part in sets.items()})


CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012")


def cars(root: Path) -> None:
    """Annotations are arrays of structs; those of the test images have their classes in a file of its own."""
    from scipy.io import savemat

    names = np.empty((1, len(CARS)), object)
    names[0] = CARS
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    for split, file, count in (("train", "devkit/cars_train_annos.mat", 7), ("test", "cars_test_annos_withlabels.mat", 5)):
        rows = np.empty(
            (1, count), [(f"bbox_{edge}", object) for edge in ("x1", "y1", "x2", "y2")] + [("class", object), ("fname", object)]
        )
        for i in range(count):
            rows[0, i] = (1, 2, 20, 18, i % 3 + 1, f"{i + 1:05d}.jpg")
            save(root / f"cars_{split}/{i + 1:05d}.jpg")
        savemat(root / file, {"annotations": rows})


WNIDS = ("n01440764", "n01443537", "n02123045")


def tiny_imagenet(root: Path) -> None:
    base = root / "tiny-imagenet-200"
    base.mkdir(parents=True)
    (base / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (base / "words.txt").write_text("".join(f"{wnid}\tsome fish, fish\n" for wnid in WNIDS))
    for wnid in WNIDS:
        for i in (0, 1, 10, 2):
            save(base / f"train/{wnid}/images/{wnid}_{i}.JPEG", (64, 64))
        (base / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    lines = []
    for i in range(7):
        save(base / f"val/images/val_{i}.JPEG", (64, 64))
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t62\t62\n")
    (base / "val/val_annotations.txt").write_text("".join(lines))


def imagenet(root: Path) -> None:
    for wnid in WNIDS:
        for i in range(3):
            save(root / f"train/{wnid}/{wnid}_{i}.JPEG")
        save(root / f"val/{wnid}/ILSVRC2012_val_0000000{WNIDS.index(wnid)}.JPEG")


def imagenet_tars(root: Path) -> None:
    """A tar of a tar for each class, a tar of validation images, and the development kit, whose classes have other numbers."""
    from scipy.io import savemat

    root.mkdir(parents=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
        for wnid in reversed(WNIDS):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for i in (10, 2, 1):
                    add(inner, f"{wnid}_{i}.JPEG", encoded())
            add(tar, f"{wnid}.tar", buffer.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in (3, 1, 2, 5, 4):
            add(tar, f"ILSVRC2012_val_{i:08d}.JPEG", encoded())
    kit = root / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    synsets = np.empty((4, 1), fields)
    for row, (number, wnid) in enumerate(zip((3, 1, 2), WNIDS, strict=True)):
        synsets[row, 0] = (number, wnid, "a thing", 0)
    synsets[3, 0] = (4, "n00001740", "entity", 2)  # inner nodes are not classes
    savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n3\n1\n")


def arrays(root: Path) -> None:
    root.mkdir(parents=True)
    for split, count in (("train", 9), ("test", 4)):
        np.save(root / f"{split}_images.npy", RNG.integers(0, 256, (count, 12, 10, 3), dtype=np.uint8))
        np.save(root / f"{split}_labels.npy", np.arange(count) % 3)
    (root / "class_names.txt").write_text("left\nright\nstraight on\n")


def npz(root: Path) -> None:
    root.mkdir(parents=True)
    parts = {}
    for split, count in (("train", 9), ("test", 4)):
        parts[f"{split}_images"] = RNG.integers(0, 256, (count, 14, 14), dtype=np.uint8)  # grey, as MedMNIST has them
        parts[f"{split}_labels"] = np.arange(count)[:, None] % 2
    np.savez(root / "data.npz", **parts)


def tars(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "class_names.txt").write_text("a\nb\n")
    for shard, count in (("train-000000", 4), ("train-000001", 3), ("test-000000", 3)):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(count):
                add(tar, f"{i:06d}.jpg", encoded())
                add(tar, f"{i:06d}.cls", str(i % 2).encode())


def hub(root: Path) -> None:
    """A folder that `datasets` reads as it reads a repository: Parquet files with the schema of images and classes."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Pictures

    features = Features({"image": Pictures(), "label": ClassLabel(names=["cat", "dog", "newt"])})
    for split, count in (("train", 7), ("test", 4)):
        rows = {"image": [picture() for _ in range(count)], "label": [i % 3 for i in range(count)]}
        (root / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(root / f"data/{split}-00000-of-00001.parquet")


MINIATURES: dict[str, Callable[[Path], None]] = {
    "cifar10": cifar10,
    "cifar10-python": cifar10_python,
    "cifar100": cifar100,
    "cifar100-python": cifar100_python,
    "pets": pets,
    "flowers": flowers,
    "cars": cars,
    "tiny-imagenet": tiny_imagenet,
    "imagenet": imagenet,
    "imagenet-tars": imagenet_tars,
    "arrays": arrays,
    "npz": npz,
    "tars": tars,
    "hub": hub,
}
