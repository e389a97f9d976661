"""Functions that return map-style datasets, as a user may have them: `tests.mapstyle:pictures` is a dataset."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

COUNTS = {"train": 10, "test": 6}


class Pictures:
    """Random pictures of two classes. `attributes` are set on the object, and `item` makes an item of pixels and label."""

    def __init__(self, split: str, item: Callable[[Any, int], Any] | None = None, **attributes: Any) -> None:
        drawn = np.random.default_rng(list(COUNTS).index(split))
        self.pixels = drawn.integers(0, 256, (COUNTS[split], 12, 10, 3), dtype=np.uint8)
        self.item = item or (lambda pixels, label: (Image.fromarray(pixels), label))
        self.read: list[int] = []
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return self.item(self.pixels[i], i % 2)


def targets(split: str) -> list[int]:
    return [i % 2 for i in range(COUNTS[split])]


def pictures(split: str) -> Pictures:
    return Pictures(split, targets=targets(split), classes=["cat", "dog"])


def arrays(split: str) -> Pictures:
    """Without names, labels to be listed by reading, pixels with the channels first."""
    return Pictures(split, lambda pixels, label: (pixels.transpose(2, 0, 1), np.array([label])))
