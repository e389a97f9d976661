"""Students of an archive that lies behind a server are those of the folder."""

import pytest
import yaml

from tests.servers import Fault, FaultyServer

STUDENT = ["--student", "test_vit", "--epochs", "1", "--batch-size", "640", "--tau", "4"]


@pytest.mark.exhaustive
def test_distill_from_a_url_equals_distill_from_the_folder(home, archive, kdcache, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    assert kdcache("distill", *STUDENT, "--home", home).status == 0
    with FaultyServer(archive.parent) as server:
        server.faults = {"logits/c/0/0/0": Fault(times=1, cut=1000)}
        url = f"{server.url}/{archive.name}"
        result = kdcache("distill", *STUDENT, "--archive", url, "--workers", 1, "--home", tmp_path, "--data-dir", home / "data")
        assert result.status == 0, result.err
        shards = [request for request in server.asked() if "/c/" in request.path and not request.start]
        assert len(shards) == len({request.path for request in shards})
    (here,), (there,) = ([*folder.glob(f"runs/{archive.name}/test_vit--*")] for folder in (home, tmp_path))
    assert here.name == there.name
    assert (here / "last.safetensors").read_bytes() == (there / "last.safetensors").read_bytes()
    assert yaml.safe_load((there / "args.yaml").read_text())["archive"] == url

    report = kdcache("report", "--home", tmp_path)  # the server is gone, and the report says what it could not draw
    assert report.status == 0, report.err
