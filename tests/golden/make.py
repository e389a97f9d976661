"""Makes the golden files from fixed numbers, which say what format 1 and each version of policies mean: do not replace them.

    python -m tests.golden.make archive     data/golden/v1, a tiny archive of format version 1 as the first kdcache wrote it
    python -m tests.golden.make layouts     data/golden/layouts, one for every layout, between them in all codecs, and a part
    python -m tests.golden.make views       tests/golden/views.json, digests of rendered views and written-out draws
    python -m tests.golden.make pieces      tests/golden/pieces.json, the same for what policies gained after that
    python -m tests.golden.make photographs tests/golden/photographs.json, views and boxes of version 2 of policies

Nothing is overwritten: to replace a golden file on purpose, delete it first, and say in the changelog why old archives or
old seeds no longer mean what they meant.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.archive import Archive, ArchiveWriter, CanvasCard, TeacherCard, derive, open_archive
from kdcache.datasets import SourceCard
from kdcache.views.policy import (
    PRESETS,
    ColorJitter,
    InceptionCrop,
    Mix,
    PadCrop,
    RandAugment,
    RandomErasing,
    ViewPolicy,
    ViewTable,
)
from tests.squares import squares

FIRST_PRESETS = ("none", "eval", "pets", "cifar", "imagenet", "crd", "digits")  # those that photographs.json was made with
ARCHIVE = Path(__file__).parents[2] / "data" / "golden" / "v1"
LAYOUTS = Path(__file__).parents[2] / "data" / "golden" / "layouts"
WRITTEN = {  # folder: layout and codec
    "zarr": ("zarr", "i16"),
    "zarr-bitshuffle": ("zarr:bitshuffle", "u8"),
    "zarr-pcodec": ("zarr:pcodec", "f16"),
    "hdf5": ("hdf5", "u8"),
    "webdataset": ("webdataset", "f32"),
}
PART = "hdf5-part"  # the statistics of view 1 of `hdf5`
VIEWS = Path(__file__).parent / "views.json"
PIECES = Path(__file__).parent / "pieces.json"
PHOTOGRAPHS = Path(__file__).parent / "photographs.json"
# Upright, wide, square, a panorama each way; and the first again in other pixels, which change nothing.
SHAPES = np.array([(300, 400), (640, 360), (100, 100), (5000, 100), (70, 1400), (3, 4)])
NUM_VIEWS, NUM_SAMPLES, NUM_CLASSES = 2, 11, 5
SIZES = {"digits": 16, "pets": 24, "cifar": 32, "crd": 32, "none": 20}
DRAWN_VIEWS = (0, 3)
PIECE_POLICIES = {
    "eval": ViewPolicy.load("eval:version=1", size=24),
    "all": ViewPolicy(
        version=1,
        size=24,
        seed=2,
        crop=InceptionCrop(scale=(0.2, 1.0)),
        filter="bicubic",
        randaugment=RandAugment(n=2, m=9, interpolation="bilinear", fill=128),
        jitter=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, probability=0.8),
        erase=RandomErasing(),
        mix=Mix(probability=0.8, beta=0.2),
    ),
    "pad": ViewPolicy(
        version=1, size=32, crop=PadCrop(), randaugment=RandAugment(n=4, m=20), jitter=ColorJitter(hue=0.5), mix=Mix(beta=1)
    ),
}


def logits(view: int) -> NDArray[np.float32]:
    """Multiples of 2^-9 between -19.6 and 19.6, from whole numbers only: float32 `[N, C]`."""
    position, label = np.arange(NUM_SAMPLES)[:, None], np.arange(NUM_CLASSES)
    return (((view * 7919 + position * 104_729 + label * 1_299_709) % 20_011 - 10_005) / 512).astype(np.float32)


def fingerprints(view: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Stand-ins for the digests and grids of the views."""
    position = np.arange(NUM_SAMPLES)
    digest = (position * 2_654_435_761 + view) % 2**32
    return digest.astype(np.uint32), ((position[:, None] * 31 + np.arange(16) * 7 + view) % 256).astype(np.uint8)


def write_golden_archive(path: Path, layout: str = "zarr", codec: str = "i16") -> Archive:
    policy = ViewPolicy.load("digits:version=1", size=16, seed=1)
    names = tuple(f"class {i}" for i in range(NUM_CLASSES))
    writer = ArchiveWriter(
        path,
        num_views=NUM_VIEWS,
        num_samples=NUM_SAMPLES,
        class_names=names,
        labels=np.arange(NUM_SAMPLES) * 3 % NUM_CLASSES,
        keys=[f"picture/{i:02d}" for i in range(NUM_SAMPLES)],
        shard_rows=4,
        layout=layout,
        codec=codec,
        policy=policy,
        source=SourceCard(
            name="golden", split="train", num_samples=NUM_SAMPLES, class_names=names, licence="CC0-1.0", digest="1" * 64
        ),
        canvas=CanvasCard(size=16, digest="2" * 64),
        teacher=TeacherCard(
            alias="golden",
            name="none",
            weights_sha256="3" * 64,
            input_size=16,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            precision="fp32",
            batch_size=4,
            top1_clean=87.5,
        ),
        provenance={"command": "python -m tests.golden.make archive"},
    )
    for view, block in writer.missing():
        rows = np.array(writer.positions(block))
        digest, probe = (column[rows] for column in fingerprints(view))
        writer.write(
            view,
            block,
            logits(view)[rows],
            policy.parameters(view, NUM_SAMPLES, squares(NUM_SAMPLES)).sample[rows],
            digest,
            probe,
        )
    return writer.finalize()


def write_golden_layouts(folder: Path) -> None:
    for name, (layout, codec) in WRITTEN.items():
        write_golden_archive(folder / name, layout, codec)
    derive(open_archive(folder / "hdf5"), folder / PART, views=range(1, 2), contents="statistics")


def digit_images() -> NDArray[np.uint8]:
    """The first five training digits on their canvas."""
    from kdcache.datasets.canvas import load_canvas
    from kdcache.datasets.digits import Digits

    with tempfile.TemporaryDirectory() as folder:
        return np.array(load_canvas(Digits(), "train", 32, Path(folder)).pixels[:5])


def gradient_images() -> NDArray[np.uint8]:
    """Five colour gradients of 48 x 48 pixels, from whole numbers only."""
    y, x = np.mgrid[0:48, 0:48]
    planes = [[x * 5 + i * 40, y * 5 + x * i, (x * y) // (4 + i) + 30 * i] for i in range(5)]
    return (np.array(planes) % 256).astype(np.uint8)


def rendered(
    images: NDArray[np.uint8], policy: ViewPolicy, renderer: Any, version: int, sizes: NDArray[np.int64] | None = None
) -> dict[str, Any]:
    """Digests of the views of `images` under `policy`, with fingerprints of `version`; square ones without `sizes`."""
    from kdcache.views import fingerprint, render_positions

    found: dict[str, Any] = {}
    sizes = squares(len(images)) if sizes is None else sizes
    for view in DRAWN_VIEWS:
        pixels = render_positions(images, policy.parameters(view, len(images), sizes), np.arange(len(images)), renderer)
        digest, grid = fingerprint(pixels, version)
        found[f"view {view}"] = {
            "sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
            "fingerprint": digest.tolist(),
            "grid of position 0": grid[0].tolist(),
        }
    return found


def drawn_parameters() -> dict[str, Any]:
    """The table of draws of five samples, as whole numbers."""
    policy = ViewPolicy.load("pets:version=1", size=32)
    found: dict[str, Any] = {}
    for view in DRAWN_VIEWS:
        table = policy.parameters(view, 5, squares(5))
        columns = ("sample", "partner", "box", "flip", "operations", "signs", "mix", "lam_units", "cut")
        found[f"view {view}"] = {name: getattr(table, name).astype(int).tolist() for name in columns}
    return found


def orders() -> dict[str, Any]:
    """What a seed means to the stream and to the shuffling control."""
    import torch

    from kdcache.replay.stream import epoch_positions, epoch_view
    from kdcache.targets import Targets, control, row_keys

    keys = row_keys("5" * 64, 3, torch.arange(4))
    shuffled = control("bottom", k=2, seed=7)(Targets(torch.arange(10).float().repeat(4, 1), 1.0), keys).logits
    return {
        "positions of epoch 2, 13 samples, seed 5": epoch_positions(13, 5, 2).tolist(),
        "views of epochs 0 to 11, 6 views, seed 5": [epoch_view(6, 5, epoch) for epoch in range(12)],
        "row keys": keys[:, 0].tolist(),
        "bottom:k=2,seed=7 of 0 to 9": shuffled.int().tolist(),
    }


def later_parameters() -> dict[str, Any]:
    """The table of draws of seven samples under the policy with all pieces, as whole numbers."""
    found: dict[str, Any] = {}
    for view in DRAWN_VIEWS:
        columns = by_name(PIECE_POLICIES["all"].parameters(view, 7, squares(7)))
        found[f"view {view}"] = {name: column.astype(int).tolist() for name, column in columns.items()}
    return found


def by_name(table: ViewTable) -> dict[str, NDArray]:
    fields = (field.name for field in dataclasses.fields(table))
    return {name: getattr(table, name) for name in fields if name not in {"view", "policy"}}


def pieces(renderer: Any = "reference") -> dict[str, Any]:
    """Everything that pieces.json holds, as this installation computes it."""
    pictures = {"digits": digit_images(), "gradient": gradient_images()}
    return {
        "policies": {
            "eval at its own size": ViewPolicy.load("eval:version=1").digest,
            **{name: policy.digest for name, policy in PIECE_POLICIES.items()},
        },
        "views": {
            name: {picture: rendered(images, policy, renderer, 2) for picture, images in pictures.items()}
            for name, policy in PIECE_POLICIES.items()
        },
        "parameters": later_parameters(),
    }


def views(renderer: Any = "reference") -> dict[str, Any]:
    """Everything that views.json holds, as this installation computes it."""
    pictures = {"digits": digit_images(), "gradient": gradient_images()}
    return {
        "policies": {name: ViewPolicy.load(f"{name}:version=1").digest for name in PRESETS},
        "images": {name: hashlib.sha256(images.tobytes()).hexdigest() for name, images in pictures.items()},
        "views": {
            preset: {
                name: rendered(images, ViewPolicy.load(f"{preset}:version=1", size=size), renderer, 1)
                for name, images in pictures.items()
            }
            for preset, size in SIZES.items()
        },
        "parameters": drawn_parameters(),
        "orders": orders(),
    }


def photographs(renderer: Any = "reference") -> dict[str, Any]:
    """Everything that photographs.json holds, as this installation computes it: version 2, on photographs of many shapes."""
    images = gradient_images()
    policies = {name: ViewPolicy.load(name, "bicubic", size=24) for name in FIRST_PRESETS}
    return {
        "policies": {name: policy.digest for name, policy in policies.items()},
        "boxes": {
            name: policy.parameters(3, len(SHAPES), SHAPES)
            .box[np.argsort(policy.parameters(3, len(SHAPES), SHAPES).sample)]
            .tolist()
            for name, policy in policies.items()
        },
        "views": {name: rendered(images, policy, renderer, 2, SHAPES[: len(images)]) for name, policy in policies.items()},
    }


def main(arguments: list[str]) -> None:
    targets = {"archive": ARCHIVE, "layouts": LAYOUTS, "views": VIEWS, "pieces": PIECES, "photographs": PHOTOGRAPHS}
    if len(arguments) != 1 or arguments[0] not in targets:
        sys.exit(__doc__)
    target = targets[arguments[0]]
    if target.exists():
        sys.exit(f"{target} is there already, and golden files are not overwritten")
    if target is ARCHIVE:
        write_golden_archive(target)
    elif target is LAYOUTS:
        write_golden_layouts(target)
    else:
        made = {VIEWS: views, PIECES: pieces, PHOTOGRAPHS: photographs}[target]
        text = json.dumps(made(), indent=1)
        target.write_text(text + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
