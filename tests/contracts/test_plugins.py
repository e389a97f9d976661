"""Protects plugins: what an installed package declares as an entry point is found by its name, in each of the five registries."""

import subprocess
import sys
from pathlib import Path

import pytest

REGISTRIES = {
    "kdcache.codecs": "from kdcache.codecs import CODECS as REGISTRY",
    "kdcache.layouts": "from kdcache.archive import LAYOUTS as REGISTRY",
    "kdcache.methods": "from kdcache.methods import METHODS as REGISTRY",
    "kdcache.controls": "from kdcache.targets import CONTROLS as REGISTRY",
    "kdcache.datasets": "from kdcache.datasets import DATASETS as REGISTRY",
}

PLUGIN = '''
"""A package that knows nothing of kdcache: frozen dataclasses, which are named in its entry points."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mine:
    power: int = 2

    def __call__(self, student_logits, targets, state=None):
        return student_logits.sum() ** self.power
'''

FOUND = """
{registry}
found = REGISTRY.parse("mine:power=3")
assert found.power == 3, found
assert REGISTRY.spec(found) == "mine:3", REGISTRY.spec(found)
assert REGISTRY.to_dict(found) == {{"name": "mine", "power": 3}}
assert REGISTRY.from_dict(REGISTRY.to_dict(found)) == found
print(type(found).__module__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages, into which a plugin was installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "kdcache_mine.py").write_text(PLUGIN)
    info = site / "kdcache_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kdcache-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\nmine = kdcache_mine:Mine\n\n" for group in REGISTRIES))
    return site


ADAPTED = """
from kdcache.methods import METHODS, Method
import torch
method = METHODS.build("mine")
assert isinstance(method, Method) and method.views_per_step == 1 and method.uses_tau and list(method.doubts([20.0], 3)) == []
assert method.new_optimizer(method.new_state()) is None and method.figures(method.new_state()) == {}
assert method(torch.ones(2, 3), None, method.new_state()) == 36
assert METHODS.name_of(method) == "mine" and METHODS.from_dict(METHODS.to_dict(method)) == method
"""


def test_a_callable_that_knows_nothing_of_methods_gets_their_defaults(installed: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n" + ADAPTED
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("group", REGISTRIES)
def test_what_a_package_declares_is_found_by_name(installed: Path, group: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n" + FOUND.format(registry=REGISTRIES[group])
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "kdcache_mine"
