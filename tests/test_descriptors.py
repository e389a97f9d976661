"""Protects archives of many shards from the number of files that a process may have open: no command keeps one for each."""

import gc
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.archive import Archive, open_archive
from kdcache.archive.writing.derive import derive
from tests.hostile import build

COMMANDS = """
import os, resource, sys
from pathlib import Path
from kdcache.archive import open_archive
from kdcache.cli import run
folder, limit, views = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
a, sent, terms = folder / "a", folder / "sent", ["--license", "data=mit,weights=mit"]
for command in (
    ["info", a],
    ["stats", a],
    ["stats", a, "--fidelity"],
    ["verify", "--quick", a],
    ["verify", a],
    ["diff", a, folder / "b"],
    ["ls", "--home", folder],
    ["push", a, sent, *terms],
    ["push", a, folder / "sent part", "--views", f"1:{views - 1}", *terms],
    ["pull", sent, folder / "pulled"],
    ["pull", sent, folder / "pulled part", "--views", f"0:{views - 1}"],
    ["pull", sent, folder / "statistics", "--stats-only"],
    ["convert", sent, "--output", folder / "converted", "--layout", sys.argv[4]],
):
    assert run([str(word) for word in command]) == 0, command
archive = open_archive(a)
for view in archive.views:
    archive.read(view, 0, archive.num_samples).load()
    archive.find(view, archive.take(view, archive.read(view, 0, 3).sample).sample)
assert len(os.listdir("/proc/self/fd")) < 32, os.listdir("/proc/self/fd")
"""


def _two(folder: Path, layout: str, views: int) -> Archive:
    build(folder / "b", layout, num_views=views, num_samples=4, class_names=tuple("vwxyz"))
    return open_archive(build(folder / "a", layout, num_views=views, num_samples=4))


@pytest.mark.parametrize(
    ("layout", "views", "limit", "to"),
    [
        ("zarr", 12, 64, "webdataset"),  # 84 files
        pytest.param("hdf5", 72, 64, "hdf5", marks=pytest.mark.exhaustive),  # 72
        *(
            pytest.param(*case, 1024, to, marks=pytest.mark.exhaustive)
            for *case, to in [
                ("zarr", 1300, "zarr:bitshuffle"),
                ("zarr:pcodec", 200, "hdf5"),
                ("hdf5", 1300, "hdf5"),
                ("webdataset", 1300, "webdataset"),
            ]
        ),
    ],
)
def test_many_shards_need_few_descriptors(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]], layout: str, views: int, limit: int, to: str
) -> None:
    archive = _two(tmp_path, layout, views)
    assert sum(len(shard.files) for shard in archive.shards()) > limit
    run_python(COMMANDS, tmp_path, limit, views, to, seconds=1800)
    assert open_archive(tmp_path / "converted").manifest.digest == archive.manifest.digest


def test_rows_outlive_what_they_were_read_through(tmp_path: Path) -> None:
    """Files are mapped without a descriptor; the mapping lasts as long as anything that lies in it."""
    archive = derive(open_archive(build(tmp_path / "a", "zarr")), tmp_path / "b")
    expected = archive.column("probe", 0)
    stored = [archive.reader.gather("probe", 0, block, slice(0, 3)) for block in (0, 1)]
    assert not any(values.flags.writeable for values in stored)
    with pytest.raises(ValueError, match="read-only"):
        stored[0][...] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        stored[0].flags.writeable = True
    del archive
    gc.collect()
    for block, values in enumerate(stored):
        assert (values == expected[4 * block : 4 * block + 3]).all()
