"""Example options for the contract tests. A component whose options all have defaults needs no entry here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kdcache.archive import LAYOUTS
from kdcache.codecs import CODECS
from kdcache.datasets import DATASETS
from kdcache.methods import METHODS
from kdcache.registry import Registry
from kdcache.targets import CONTROLS

REGISTRIES: dict[str, Registry[Any]] = {registry.kind: registry for registry in (CODECS, LAYOUTS, CONTROLS, METHODS, DATASETS)}

FILES = "FILES"  # stands for a folder with all datasets in small: see tests/miniatures.py

# kind -> name -> one or more sets of options. Without an entry a component is made without options.
EXAMPLES: dict[str, dict[str, tuple[dict[str, Any], ...]]] = {
    "layout": {
        "zarr": ({}, {"compression": "bitshuffle"}, {"compression": "pcodec"}),
        "webdataset": ({}, {"record_rows": 1}, {"record_rows": 24}),
    },
    "control": {
        "bottom": ({"k": 1}, {"k": 3, "seed": 5}, {"k": 2, "per": "sample"}),
        "topk": ({"k": 1}, {"k": 10}),
        "ls-global": ({}, {"average": "mean-entropy"}, {"average": "plain-mean"}),
    },
    "method": {
        "kd": ({}, {"tau_squared": False}, {"kd_weight": 0.9, "ce_weight": 0.1}, {"student_tau": 2.0}),
        "zkd": ({}, {"score": "centred"}, {"score": "scaled", "std": "population"}, {"student_tau": 2.0}),
        "zdkd": ({}, {"score": "scaled"}),
        "ce": ({}, {"smoothing": 0.5}),
        "maxlogit": ({}, {"which": "both"}),
        "maxlogit-dkd": ({}, {"which": "both", "label_rule": "pair"}),
        "dkd": ({}, {"alpha": 2.0, "beta": 0.5, "label_rule": "pair"}),
        "rld": ({}, {"confidence_tau": None, "label_rule": "pair"}, {"ce_weight": 1.0}),
        "zrld": ({}, {"std": "population"}),
        "eakd": ({}, {"entropy_bound": 100.0}),
        "mlkd": ({"views": 1}, {"views": 1, "temperatures": "2+6"}),  # of two views: test_methods.py
        "zmlkd": ({"views": 1},),
    },
    "dataset": {
        "folder": ({"root": f"{FILES}/images"}, {"root": f"{FILES}/images/train", "split_fraction": 0.4}),
        "cifar10": ({"root": f"{FILES}/cifar10"}, {"root": f"{FILES}/cifar10-python"}),
        "cifar100": ({"root": f"{FILES}/cifar100"}, {"root": f"{FILES}/cifar100-python"}),
        "pets": ({"root": f"{FILES}/pets"},),
        "flowers": ({"root": f"{FILES}/flowers"},),
        "cars": ({"root": f"{FILES}/cars"},),
        "tiny-imagenet": ({"root": f"{FILES}/tiny-imagenet"},),
        "imagenet": ({"root": f"{FILES}/imagenet"}, {"root": f"{FILES}/imagenet-tars"}),
        "arrays": ({"root": f"{FILES}/arrays"}, {"root": f"{FILES}/npz/data.npz"}),
        "tars": ({"root": f"{FILES}/tars"},),
        "hf": ({"repo": f"{FILES}/hub"},),
        "torch": (
            {"dataset": "mnist", "root": f"{FILES}/torch-mnist"},
            {"dataset": "food101", "root": f"{FILES}/torch-food101"},
            {"dataset": "dtd", "root": f"{FILES}/torch-dtd", "train": "train+val", "variant": "2"},
            {"dataset": "eurosat", "root": f"{FILES}/torch-eurosat", "split_fraction": 0.4},
        ),
        "factory": ({"function": "tests.mapstyle:pictures"}, {"function": "tests.mapstyle:arrays"}),
    },
}


def examples(kind: str) -> list[Any]:
    """Parameters `(name, options)` for every registered component of `kind`, for `pytest.mark.parametrize`."""
    return [
        pytest.param(name, options, id=f"{name}-{number}" if number else name)
        for name in REGISTRIES[kind]
        for number, options in enumerate(EXAMPLES.get(kind, {}).get(name, ({},)))
    ]


def cases(kind: str) -> list[Any]:
    """The same as parameters of a fixture, each of which is a pair."""
    return [pytest.param(example.values, id=example.id) for example in examples(kind)]


def with_files(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`options` with the place of the datasets filled in."""
    return {key: value.replace(FILES, str(folder)) if isinstance(value, str) else value for key, value in options.items()}
