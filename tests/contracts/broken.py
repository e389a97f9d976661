"""Components of each kind as third parties write them, sound and broken, with their contract tests: see test_broken.py.

pytest does not collect this file by itself: most of its tests fail, as they should.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcache.archive import LAYOUTS
from kdcache.archive.layouts.hdf5 import Hdf5Layout
from kdcache.codecs import CODECS
from kdcache.datasets import DATASETS, Recipe, Sample
from kdcache.methods import METHODS
from kdcache.targets import CONTROLS
from kdcache.testing import CodecContract, ControlContract, DatasetContract, LayoutContract, MethodContract

# ---------------------------------------------------------------- methods: plain callables


@METHODS.register("jeffreys")
@dataclass(frozen=True)
class Jeffreys:
    """Both divergences of tempered softmaxes."""

    weight: float = 0.5

    def __call__(self, student_logits, targets, state=None):
        if student_logits.shape != targets.logits.shape:
            raise ValueError("logits of another shape")
        with torch.autocast(student_logits.device.type, enabled=False):
            z = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
            log_q, log_p = (torch.log_softmax(x / targets.tau, dim=1) for x in (z, targets.logits.to(z.dtype)))
            return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1).mean() * self.weight


@METHODS.register("careless")
@dataclass(frozen=True)
class Careless:
    """Logarithms of probabilities, in the precision of the student, and a batch that is summed."""

    weight: float = 1.0

    def __call__(self, student_logits, targets, state=None):
        p, q = (torch.softmax(x / targets.tau, dim=1) for x in (targets.logits, student_logits))
        return (p * (p.log() - q.log())).sum(dim=1)[0] * self.weight


class TestSoundMethod(MethodContract):
    spec = "jeffreys:weight=2"


class TestBrokenMethod(MethodContract):
    spec = "careless"


# ---------------------------------------------------------------- controls


@CONTROLS.register("flatter")
@dataclass(frozen=True)
class Flatter:
    """Logits of a fraction of their size."""

    fraction: float = 0.5

    def __call__(self, targets, rng_key):
        return targets.with_logits(targets.logits * self.fraction)


@CONTROLS.register("noisy")
@dataclass(frozen=True)
class Noisy:
    """Noise that is another one in every batch."""

    def __call__(self, targets, rng_key):
        return targets.with_logits(targets.logits + 9 * torch.randn_like(targets.logits))


class TestSoundControl(ControlContract):
    spec = "flatter"


class TestBrokenControl(ControlContract):
    spec = "noisy"


# ---------------------------------------------------------------- codecs


@CODECS.register("i16-too")
@dataclass(frozen=True)
class Sound:
    """i16 under another name."""

    parameters = CODECS["i16"].parameters
    dtype = CODECS["i16"].dtype
    attributes = CODECS["i16"].attributes
    formula = CODECS["i16"].formula

    def encode(self, logits):
        return CODECS.build("i16").encode(logits)

    def decode(self, stored, out=None):
        return CODECS.build("i16").decode(stored, out)

    def max_error(self, stored):
        return CODECS.build("i16").max_error(stored)


@CODECS.register("clipped")
@dataclass(frozen=True)
class Clipped(Sound):
    """One that clips what it cannot store, and says nothing of it."""

    def encode(self, logits):
        return super().encode(np.nan_to_num(logits).clip(-63, 63))


class TestSoundCodec(CodecContract):
    spec = "i16-too"


class TestBrokenCodec(CodecContract):
    spec = "clipped"


# ---------------------------------------------------------------- layouts


@LAYOUTS.register("hdf5-too")
@dataclass(frozen=True)
class Other(Hdf5Layout):
    """hdf5 under another name."""


@LAYOUTS.register("shifted")
@dataclass(frozen=True)
class Shifted(Hdf5Layout):
    """The first two rows of each shard in the wrong order."""

    def shard_files(self, plan, view: int, block: int, fields: Mapping[str, Any]):
        wrong = {name: np.concatenate([rows[1:2], rows[:1], rows[2:]]) for name, rows in fields.items()}
        return super().shard_files(plan, view, block, wrong)


class TestSoundLayout(LayoutContract):
    spec = "hdf5-too"
    codec = "u8"


class _ByFields:
    """A reader with what each must have, and no more: it opens nothing that kdcache could keep."""

    def __init__(self, reader) -> None:
        self.files, self.sample_files, self.labels, self.keys = reader.files, reader.sample_files, reader.labels, reader.keys
        self.gather, self.pieces = reader.gather, reader.pieces


@LAYOUTS.register("plain")
@dataclass(frozen=True)
class Plain(Hdf5Layout):
    """hdf5 with such a reader."""

    def open(self, plan, store):
        return _ByFields(super().open(plan, store))


class TestPlainLayout(LayoutContract):
    spec = "plain"


class TestBrokenLayout(LayoutContract):
    spec = "shifted"


# ---------------------------------------------------------------- datasets


@DATASETS.register("stripes")
@dataclass(frozen=True)
class Stripes:
    """Pictures of stripes, lying and standing."""

    count: int = 7

    licence = "CC0-1.0"
    recipe = Recipe(policy="none", canvas=8, teacher_epochs=1, student="test_resnet", student_epochs=1, pretrained=False)

    def open(self, data: Path, progress: Any = None, *, fetch: bool = True) -> "Stripes":
        return self

    def class_names(self) -> Sequence[str]:
        return ["lying", "standing"]

    def samples(self, split: str) -> list[Sample]:
        return [Sample(f"{split}/{i}", i % 2, lambda i=i: self.picture(i)) for i in range(self.count)]

    def picture(self, number: int) -> Image.Image:
        stripes = (np.arange(12 * 12).reshape(12, 12) % 12 * 20 + number).astype(np.uint8)
        return Image.fromarray(stripes if number % 2 else stripes.T.copy())

    def fingerprint(self) -> str:
        return f"stripes {self.count}"


@DATASETS.register("shuffled")
@dataclass(frozen=True)
class Shuffled(Stripes):
    """The same in another order every time."""

    def samples(self, split: str) -> list[Sample]:
        return list(np.random.default_rng().permutation(super().samples(split)))


class TestSoundDataset(DatasetContract):
    spec = "stripes:5"


class TestBrokenDataset(DatasetContract):
    spec = "shuffled:60"
