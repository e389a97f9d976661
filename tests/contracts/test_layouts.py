"""Every layout keeps its contract, with every codec that differs in what it stores."""

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcache.archive import LAYOUTS
from kdcache.codecs import CODECS
from kdcache.testing import LayoutContract
from kdcache.testing.layouts import content, kept, reading_lines, write
from tests.contracts.examples import cases

SPECS = [LAYOUTS.spec(LAYOUTS.build(name, **options)) for name, options in (case.values[0] for case in cases("layout"))]
# Every layout with a codec that has parameters and one that has none; every codec. (Single bytes are not for pcodec.)
PAIRS = [pair for pair in itertools.product(SPECS, CODECS) if pair[0] == "zarr" or pair[1] in {"i16", "u8"}]
PAIRS.remove(("zarr:pcodec", "u8"))
# Each layout and each codec; the other pairs are exhaustive.
QUICK = {
    *(("zarr", "f16"), ("zarr", "f32"), ("zarr", "i16"), ("zarr:bitshuffle", "u8"), ("zarr:pcodec", "i16")),
    *(("hdf5", "i16"), ("webdataset", "u8"), ("webdataset:1", "i16"), ("webdataset:24", "u8")),
}
CASES = [pytest.param(pair, id="-".join(pair), marks=() if pair in QUICK else pytest.mark.exhaustive) for pair in PAIRS]


class TestEveryLayout(LayoutContract):
    @pytest.fixture(
        scope="class",
        params=[pytest.param(pair, id="-".join(pair), marks=() if pair in QUICK else pytest.mark.exhaustive) for pair in PAIRS],
    )
    @classmethod
    def names(cls, request: pytest.FixtureRequest) -> tuple[str, str]:
        layout, codec = request.param
        return layout, codec

    # Below, in one process for all: what takes the time is to start it.
    test_the_cards_two_lines_read_the_logits_without_kdcache = None


READ = """
import json, sys, numpy
sys.modules['kdcache'] = None
for lines, output in json.load(open(sys.argv[1])):
    names = {}
    exec(lines, names)
    numpy.save(output, numpy.asarray(names["logits"]))
assert not [name for name in sys.modules if name.startswith('kdcache.')]
"""


@pytest.mark.exhaustive
def test_the_cards_two_lines_read_the_logits_without_kdcache(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    archives, tasks, written = [], [], content()
    for number, names in enumerate(PAIRS):
        archive = write(tmp_path / str(number), written, *names)
        moved = tmp_path / f"an archive's copy {number}"  # a plain copy, with nothing of the original left
        shutil.copytree(archive.path, moved)
        archives.append(archive)
        tasks.append((reading_lines(archive, moved), str(tmp_path / f"{number}.npy")))
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    run_python(READ, tmp_path / "tasks.json")
    for names, archive, (_, output) in zip(PAIRS, archives, tasks, strict=True):
        logits = np.load(output)
        rows = len(logits)
        assert 1 <= rows <= 256, names
        np.testing.assert_array_equal(logits.astype(np.float32), kept(archive, written.logits[0, :rows]), err_msg=str(names))
