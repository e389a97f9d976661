"""scikit-learn's digits, for first steps and tests: they need no download."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kdcache.datasets import DATASETS, Recipe, Sample, Split
from kdcache.system.progress import Progress

__all__ = ["Digits"]


@DATASETS.register("digits")
@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI Optdigits test set, 8 x 8 grey); every fifth one is for testing."""

    licence = "CC-BY-4.0"
    recipe = Recipe(
        policy="digits",
        canvas=32,
        teacher_epochs=40,
        student="test_resnet",
        student_epochs=20,
        pretrained=False,
        test_policy="none",
    )

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> "Digits":
        return self

    def class_names(self) -> Sequence[str]:
        return [str(digit) for digit in range(10)]

    def samples(self, split: Split) -> Sequence[Sample]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        return [
            Sample(f"digits/{i:04d}", int(label), lambda pixels=image: Image.fromarray(pixels))  # type: ignore[misc]
            for i, (image, label) in enumerate(zip(images, bunch.target, strict=True))
            if (i % 5 == 4) == (split == "test")
        ]

    def fingerprint(self) -> str:
        return "digits-1"
