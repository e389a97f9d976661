"""Functions of people's own that make datasets and models: once they are changed as the fix says, they are used."""

import importlib
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from kdcache.datasets import SPLITS
from kdcache.datasets.naming import find_source
from tests.following import followed


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a source of the same second and length would be taken for the old one


def write(source: str) -> str:
    """Save a module of one's own, and name its function."""
    Path("own_data.py").write_text(f"from tests.mapstyle import *\n{dedent(source)}")
    sys.modules.pop("own_data", None)
    importlib.invalidate_caches()
    return "own_data:make"


def read(spec: str) -> int:
    images = find_source(spec).open(Path("data"))
    assert len(images.class_names()) >= 2
    return sum(len(images.samples(split)) for split in SPLITS)


GOOD = "def make(split): return Pictures(split, targets=targets(split), classes=['cat', 'dog'])"
PIPED = "def make(split): return Pictures(split, targets=targets(split), classes=['cat', 'dog'], transform=%s)"
CASES = {  # what was written, the fix's words, what is written then
    "no parameter": ("def make(): return pictures('train')", "def make(split): ...", "def make(split): return pictures(split)"),
    "it fails": ("def make(split): raise ValueError('no')", "mend it; try it with: python -c 'from own_data import make'", GOOD),
    "the import fails": ("raise OSError('no')", "mend it; try it with: python -c 'from own_data import make'", GOOD),
    "a slip": ("def maker(split): return pictures(split)", "use own_data:maker", GOOD),
    "nothing like it": ("x = 1", "correct what follows the colon", GOOD),
    "no function": ("make = 3", "name a function or a class", GOOD),
    "iterable": (
        "class IterableDataset(Pictures): ...\ndef make(split): return IterableDataset(split)",
        "return a map-style dataset, with __len__ and __getitem__",
        GOOD,
    ),
    "a loader": (
        "class Loader:\n    def __init__(self, dataset): self.dataset = dataset\ndef make(split): return Loader(pictures(split))",
        "return its `dataset`",
        "class Loader:\n    def __init__(self, dataset): self.dataset = dataset\n"
        "def make(split): return Loader(pictures(split)).dataset",
    ),
    "a generator": ("def make(split): return iter(pictures(split))", "return for example a torch.utils.data.Dataset", GOOD),
    "empty": (
        "class Empty(Pictures):\n    def __len__(self): return 0\ndef make(split): return Empty(split)",
        "check what it reads, and from where",
        GOOD,
    ),
    "other names": (
        "def make(split): return Pictures(split, targets=targets(split), classes=['cat', split])",
        "give both datasets the same `classes`",
        GOOD,
    ),
    "too few names": (
        "def make(split): return Pictures(split, lambda p, label: (p, label + 1), classes=['cat', 'dog'])",
        "name them all",
        "def make(split): return Pictures(split, lambda p, label: (p, label + 1), classes=['none', 'cat', 'dog'])",
    ),
    "a gap": (
        "def make(split): return Pictures(split, lambda p, label: (p, label * 2))",
        "name all 3 classes: an attribute `classes`",
        "def make(split): return Pictures(split, lambda p, label: (p, label * 2), classes=['cat', 'emu', 'dog'])",
    ),
    "names in a text": (
        "def make(split): return Pictures(split, targets=targets(split), classes='catdog')",
        "make classes a list such as ['cat', 'dog']",
        "def make(split): return Pictures(split, targets=targets(split), classes=['cat', 'dog'])",
    ),
    "no names": (
        "def make(split): return Pictures(split, targets=targets(split), classes=3)",
        "or leave it out",
        "def make(split): return Pictures(split, targets=targets(split))",
    ),
    "empty names": (
        "def make(split): return Pictures(split, targets=targets(split), classes=['cat', ' '])",
        "give every class a name of its own",
        GOOD,
    ),
    "joined": (
        """
        class Joined(Pictures): ...
        def make(split):
            both = [Pictures(split, classes=[*"ab"]), Pictures(split, classes=[*"ba"])]
            return Joined(split, targets=targets(split), datasets=both)
        """,
        "give the joined dataset its classes",
        """
        class Joined(Pictures): ...
        def make(split):
            both = [Pictures(split, classes=[*"ab"]), Pictures(split, classes=[*"ba"])]
            return Joined(split, targets=targets(split), datasets=both, classes=[*"ab"])
        """,
    ),
    "kept back": (
        "def make(split): return Pictures(split, lambda p, label: (p, label - 1))",
        "leave such items out, or take another split",
        GOOD,
    ),
    "items fail": ("def make(split): return Pictures(split, lambda p, label: 1 / 0)", "mend the dataset", GOOD),
    "floats": (
        "def make(split): return Pictures(split, lambda p, label: (p / 255, label))",
        "uint8 pixels [H, W], [H, W, 3] or [3, H, W]",
        "def make(split): return Pictures(split, lambda p, label: (p, label))",
    ),
    "random": (
        "def make(split): return Pictures(split, lambda p, label: (np.random.permutation(p), label), targets=targets(split))",
        "return images as they are stored",
        GOOD,
    ),
    "labels transformed": (
        "def make(split): return Pictures(split, targets=targets(split), target_transform=abs)",
        "leave target_transform out",
        "def make(split): return Pictures(split, targets=targets(split))",
    ),
    "a policy's transforms": (
        "from torchvision import transforms as T\n" + PIPED % "T.Compose([T.RandomResizedCrop(32), T.RandomHorizontalFlip()])",
        "leave the transform out of the dataset, and say instead: --policy 'none:crop.kind=inception",
        GOOD,
    ),
    "others": (
        "from torchvision import transforms as T\n" + PIPED % "T.RandomInvert()",
        "what a policy can do is shown by: kdcache policy imagenet",
        GOOD,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_functions_are_used_when_they_are_written_as_the_fix_says(case: str) -> None:
    wrong, says, right = CASES[case]

    def mend(fix: str) -> str:
        assert says in fix, fix
        return write(right)

    assert followed(read, write(wrong), mend) == 16


def test_the_policy_in_place_of_a_transform_is_understood() -> None:
    from kdcache.views import ViewPolicy

    wrong = (
        "from torchvision import transforms as T\n" + PIPED % "T.Compose([T.Resize(40), T.CenterCrop(32), T.ColorJitter(0.2)])"
    )

    def mend(fix: str) -> str:
        spec = fix.partition("--policy ")[2].split(" --size ")[0].strip("'")
        assert ViewPolicy.load(spec, size=int(fix.partition("--size ")[2].split()[0])).size == 32
        return write(GOOD)

    followed(read, write(wrong), mend)


def test_a_text_that_names_no_function_lists_names() -> None:
    def mend(fix: str) -> str:
        return fix.removeprefix("--dataset ").replace("mymodule:make", write(GOOD))

    assert followed(read, "factory:own data", mend) == 16
