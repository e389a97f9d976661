"""What models say of some test images: logits and features that runs and teachers keep for figures. Nothing here needs torch.

The images are the same for all models of a dataset, as far as each keeps them: of many classes and wide features fewer are kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kdcache.errors import IntegrityError
from kdcache.system.files import Buffers, set_aside
from kdcache.system.seals import require_sealed, sealed_tensors

__all__ = ["MOST_BYTES", "MOST_IMAGES", "TEACHER_OUTPUTS", "TEST_OUTPUTS", "KeptOutputs", "chosen_images"]

TEST_OUTPUTS = "test_outputs.safetensors"  # in the folder of a run or teacher
TEACHER_OUTPUTS = "teacher_outputs.safetensors"  # beside the runs of an archive, those of its teacher
MOST_IMAGES, MOST_BYTES = 1000, 4 << 20  # of one model, whichever is less
_NUMBER = 4  # bytes of a stored number
_LARGEST_FILE = 64 << 20  # bytes: far more than a single image of the widest model takes


@dataclass(frozen=True, eq=False)
class KeptOutputs:
    """Test images by number, int32 `sample [N]`, with their int32 `label [N]`; what a model says of them, float32 `logits [N, C]`
    and `features [N, D]`, the classifier's input (None: it has none that could be found).

    `images` is the digest of the test split, `weights` that of the model's weights.
    """

    sample: NDArray[np.int32]
    label: NDArray[np.int32]
    logits: NDArray[np.float32]
    features: NDArray[np.float32] | None
    images: str
    weights: str = ""

    def __len__(self) -> int:
        return len(self.sample)

    def of_both(self, other: "KeptOutputs") -> tuple["KeptOutputs", "KeptOutputs"] | None:
        """These and `other` outputs of the images that both have, in one order; None if they are of other data or classes."""
        if self.images != other.images or self.logits.shape[1] != other.logits.shape[1]:
            return None
        _, mine, theirs = np.intersect1d(self.sample, other.sample, assume_unique=True, return_indices=True)
        return (self._of(mine), other._of(theirs)) if len(mine) else None

    def _of(self, rows: NDArray[np.int64]) -> "KeptOutputs":
        features = None if self.features is None else self.features[rows]
        return KeptOutputs(self.sample[rows], self.label[rows], self.logits[rows], features, self.images, self.weights)

    def as_file(self) -> Buffers:
        """The content of a file that `read` reads. Equal outputs give equal bytes."""
        tensors: dict[str, Any] = {"sample": self.sample, "label": self.label, "logits": self.logits}
        tensors |= {} if self.features is None else {"features": self.features}
        data = save({name: np.ascontiguousarray(values) for name, values in tensors.items()})
        return sealed_tensors(data, {"images": self.images, "weights": self.weights})

    @classmethod
    def read(cls, file: Path) -> "KeptOutputs":
        """The outputs in a file. Raises IntegrityError if it is damaged or not one of these."""
        try:
            if file.stat().st_size > _LARGEST_FILE:
                raise ValueError("it is larger than any that is written")
            require_sealed(file)
            data = file.read_bytes()
            found, about = load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            kept = cls(found["sample"], found["label"], found["logits"], found.get("features"), about["images"], about["weights"])
            kept._require_whole()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise IntegrityError(
                f"{file} is damaged",
                why=" ".join(str(error).split())[:200] or type(error).__name__,
                fix=f"restore it from a copy; or set it aside, and do without the figures of it: {set_aside(file)}",
            ) from None
        return kept

    def _require_whole(self) -> None:
        types = [each.dtype for each in (self.sample, self.label, self.logits)]
        if types != [np.int32, np.int32, np.float32] or (self.features is not None and self.features.dtype != np.float32):
            raise ValueError("its numbers are of other types")
        rows = (len(self.sample),)
        tables = [self.logits, *([] if self.features is None else [self.features])]
        if not rows[0] or not self.sample.shape == self.label.shape == rows or len(np.unique(self.sample)) < rows[0]:
            raise ValueError("its images are not one number and one label each")
        if any(table.ndim != 2 or table.shape[:1] != rows or not np.isfinite(table).all() for table in tables):
            raise ValueError("its logits or features are not rows of finite numbers, one for each image")
        if self.logits.shape[1] < 2 or self.label.min() < 0 or self.label.max() >= self.logits.shape[1]:
            raise ValueError("it has labels of classes that it has no logits of")


def chosen_images(labels: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Numbers of the test images that are kept, of labels `[N]`, where each takes `width` numbers.

    One of each class comes first, then a second one, so that fewer images are of as many classes, and the first of more.
    """
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    turn = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    scattered = ordered.astype(np.uint64) * np.uint64(2654435761) % np.uint64(1 << 32)  # neighbouring classes are often alike
    most = min(MOST_IMAGES, max(1, MOST_BYTES // (_NUMBER * width)))
    chosen: NDArray[np.int64] = order[np.lexsort((scattered, turn))][:most]
    return chosen
