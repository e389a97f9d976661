"""Archives behind servers: the same rows as in the folder, whatever the servers and the processes in between do."""

import hashlib
import http.client
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.archive import LAYOUTS, Archive, open_archive, write_archive
from kdcache.archive.format.manifest import FileRecord
from kdcache.archive.reading import cache, reader
from kdcache.archive.reading.cache import Cache
from kdcache.cli import run
from kdcache.errors import IncompleteError, IntegrityError, KdcacheError, NotFoundError, RetryError, UsageError
from kdcache.replay.stream import CachedTargets
from kdcache.system import attempts, remote
from kdcache.system.remote import open_remote
from tests.servers import Fault, FaultyServer, fake_hub, faulty_s3

COMMIT, OLDER = "c0ffee" * 6 + "cafe", "0" * 40
SHARD = "logits/c/1/0/0"  # of the first layout: view 1, block 0


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A cache of each test's own, and no patience."""
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "BACKOFF", 0.002)
    for name in ("HF_TOKEN", "KDCACHE_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """The same logits `[3, 600, 40]` in every layout, in folders of its name; shards of some 20 kB."""
    root = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 3, (3, 600, 40)).astype(np.float32)
    order = np.stack([rng.permutation(600) for _ in range(3)])
    for name in LAYOUTS:
        write_archive(
            root / name, logits, [f"class {i}" for i in range(40)], sample=order, labels=np.arange(600) % 40, layout=name
        )
    return root


@pytest.fixture(scope="module")
def one_server(archives) -> Iterator[FaultyServer]:
    with FaultyServer(archives) as server:
        yield server


@pytest.fixture
def server(one_server) -> FaultyServer:
    one_server.forget()
    return one_server


@pytest.fixture(scope="module")
def one_s3(archives) -> Iterator[FaultyServer]:
    with faulty_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200
        connection.close()
        publish(archives / "zarr", "s3://bucket/team/zarr")
        yield server


@pytest.fixture
def s3(one_s3) -> FaultyServer:
    one_s3.forget()
    return one_s3


@pytest.fixture
def hub(archives, monkeypatch) -> Iterator[FaultyServer]:
    folder = archives / "zarr"
    files = {f"zarr/{p.relative_to(folder).as_posix()}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with FaultyServer(fake_hub({COMMIT: files, OLDER: {"zarr/README.md": b"nothing yet"}}, {"main": COMMIT}, "secret")) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server


def publish(folder: Path, url: str) -> None:
    there = open_remote(url)
    for path in sorted(folder.rglob("*"), key=lambda path: path.name == "kdcache.json"):
        if path.is_file():
            there.put(path.relative_to(folder).as_posix(), path)


def assert_equal(one: Archive, other: Archive, views: range | None = None) -> None:
    assert one.manifest == other.manifest
    for view in views or other.views:
        ours, theirs = (archive.read(view, 0, archive.num_samples) for archive in (one, other))
        for name, values in theirs.fields().items():
            np.testing.assert_array_equal(getattr(ours, name), values, err_msg=name)


def cached(suffix: str = "") -> list[Path]:
    """Files in the cache, less the locks."""
    root = Path(os.environ["KDCACHE_CACHE"])
    return [path for path in root.glob("??/*") if path.name.endswith(suffix)]


# --------------------------------------------------------------------------------------------- the same as a folder


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_remote_reading_equals_local_reading(server, archives, name):
    here, there = open_archive(archives / name), open_archive(f"{server.url}/{name}/")
    assert there.labels().tolist() == here.labels().tolist()
    assert there.keys() == here.keys()
    assert there.verify("full").checked == here.verify("full").checked
    assert there.verify("full").ok

    @given(
        st.integers(0, 2),
        st.lists(st.integers(0, 600), min_size=2, max_size=2).map(sorted),
        st.lists(st.integers(0, 599), max_size=50),
    )
    def same(view, ends, samples):
        for ours, theirs in (
            (there.read(view, *ends), here.read(view, *ends)),
            (there.find(view, samples), here.find(view, samples)),
        ):
            for field, values in theirs.fields().items():
                np.testing.assert_array_equal(getattr(ours, field), values)

    same()
    files = {request.path for request in server.asked()}
    assert all(len(server.asked(path)) == 1 for path in files if "/c/" in path or path.endswith((".h5", ".tar")))


def test_archives_on_s3_and_the_hub_equal_the_folder(s3, hub, archives):
    here = open_archive(archives / "zarr")
    bucket = open_archive("s3://bucket/team/zarr/")
    assert_equal(bucket, here)
    assert (bucket.name, bucket.location) == ("zarr", "s3://bucket/team/zarr")
    shutil.rmtree(os.environ["KDCACHE_CACHE"])
    dataset = open_archive("hf://datasets/team/logits/zarr")
    assert_equal(dataset, here)
    assert (dataset.name, dataset.location) == ("zarr", f"hf://datasets/team/logits@{COMMIT}/zarr")
    assert dataset.verify("quick").ok
    assert dataset.verify("full").ok
    with pytest.raises(UsageError, match="no folder on this machine"):
        _ = dataset.path


def test_the_hub_is_read_at_one_commit_and_its_token_goes_nowhere_else(hub):
    first = open_archive("hf://datasets/team/logits/zarr")
    hub.forget()
    again = pickle.loads(pickle.dumps(first))  # in a worker, say, after somebody pushed to the branch
    assert again.location == first.location
    assert not hub.asked("/main")
    again.labels()
    assert {request.headers.get("authorization") for request in hub.requests if "/cdn/" in request.path} == {None}
    with pytest.raises(IncompleteError, match="not finished"):
        open_archive(f"hf://datasets/team/logits@{OLDER}/zarr")


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_was_not_fetched_before_they_started(server, archives, run_python, method):
    code = """
import multiprocessing, pickle, sys, numpy as np
from kdcache.archive import open_archive

def work(archive, queue):
    queue.put(archive.read(2, 0, 600).logits)

if __name__ == "__main__":
    there = open_archive(sys.argv[1])
    there.read(0, 0, 600).load()  # this process has talked to the server already
    context = multiprocessing.get_context(sys.argv[3])
    queue = context.Queue()
    worker = context.Process(target=work, args=(there, queue), daemon=True)
    worker.start()
    assert np.array_equal(queue.get(timeout=60), open_archive(sys.argv[2]).read(2, 0, 600).logits)
    worker.join()
"""
    script = Path(os.environ["KDCACHE_CACHE"]).with_name("workers.py")
    script.write_text(code)
    call = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run_python(call, script, f"{server.url}/hdf5", archives / "hdf5", method)


# ------------------------------------------------------------------------------------------------- faults underway


FAULTS = {
    "500 twice": Fault(times=2, status=500),
    "503 three times": Fault(times=3, status=503),
    "too many requests": Fault(times=1, status=429),
    "torn down": Fault(times=2, reset=True),
    "breaks off": Fault(times=3, cut=7000),
    "breaks off, without ranges": Fault(times=2, cut=9000, no_ranges=True),
    "stalls": Fault(times=1, stall=0.6),
    "slow": Fault(drip=(8000, 0.03)),
    "wrong bytes once": Fault(times=1, wrong=True),
    "too short once": Fault(times=1, short=100),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_that_pass_are_survived(server, archives, monkeypatch, kind):
    if kind == "stalls":
        monkeypatch.setattr(attempts, "READ_TIMEOUT", 0.25)
    there = open_archive(f"{server.url}/zarr")
    server.faults = {SHARD: FAULTS[kind]}
    assert_equal(there, open_archive(archives / "zarr"), range(1, 2))
    size = (archives / "zarr" / SHARD).stat().st_size
    if FAULTS[kind].times:
        assert len(server.asked(SHARD)) > 1
    if kind == "breaks off":  # every byte was sent once
        assert [request.start for request in server.asked(SHARD)] == [0, 7000, 14000, 21000]
        assert server.sent[f"/zarr/{SHARD}"] == size
    assert not cached(".part")


@pytest.mark.parametrize("fault", [Fault(times=2, status=500), Fault(times=1, cut=5000), Fault(times=1, wrong=True)])
def test_s3_with_faults(s3, archives, fault):
    there = open_archive("s3://bucket/team/zarr")
    s3.faults = {SHARD: fault}
    assert_equal(there, open_archive(archives / "zarr"), range(1, 2))
    assert len(s3.asked(SHARD)) == 1 + fault.times
    s3.faults = {"small": Fault(times=2, status=503)}
    there.store.remote.put("small", b"bytes")
    assert b"".join(there.store.remote.stream("small")) == b"bytes"
    s3.faults = {"": Fault(times=1, status=500)}
    assert "small" in list(there.store.remote.names())


def test_giving_up_says_what_was_tried(server, capfd):
    there = open_archive(f"{server.url}/zarr")
    server.faults = {SHARD: Fault(status=500), "kdcache.json": Fault(status=503)}
    with pytest.raises(RetryError, match=f"{SHARD} cannot be reached") as caught:
        there.read(1, 0, 10).load()
    assert f"tried {attempts.ATTEMPTS} times" in caught.value.why
    assert "500 Internal Server Error" in caught.value.why
    assert len(server.asked(SHARD)) == attempts.ATTEMPTS

    assert run(["info", f"{server.url}/zarr"]) == 75
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["error", "why", "fix"]
    assert "tried 4 times, the last time: the server answered 503" in said[1]


def test_a_connection_that_always_breaks_at_the_same_byte_is_given_up(server):
    there = open_archive(f"{server.url}/zarr")
    server.faults = {SHARD: Fault(cut=5000, no_ranges=True)}
    with pytest.raises(RetryError, match="cannot be reached"):
        there.read(1, 0, 10).load()
    assert [path.stat().st_size for path in cached(".part")] == [5000]
    server.faults = {}
    there.read(1, 0, 10).load()
    assert server.asked(SHARD)[-1].start == 5000


def test_bytes_that_stay_wrong_are_refused_by_name(server, archives):
    there = open_archive(f"{server.url}/zarr")
    server.faults = {SHARD: Fault(wrong=True)}
    record = there._record_of(SHARD)
    with pytest.raises(IntegrityError) as caught:
        there.read(1, 0, 10).load()
    data = bytearray((archives / "zarr" / SHARD).read_bytes())
    data[-1] ^= 4
    for part in (SHARD, record.sha256, hashlib.sha256(data).hexdigest()):
        assert part in caught.value.what
    assert len(server.asked(SHARD)) == 2
    assert record.sha256 not in {path.name.removesuffix(".part") for path in cached()}
    found = there.verify("full")
    assert [failure.where for failure in found.failures if "sha256 is" in failure.got] == [SHARD]


def test_a_missing_or_forbidden_shard_is_named(server):
    there = open_archive(f"{server.url}/zarr")
    for status, why in ((404, "404 Not Found"), (403, "403 Forbidden")):
        server.faults = {SHARD: Fault(status=status)}
        with pytest.raises(IntegrityError, match=SHARD) as caught:
            there.read(1, 0, 10).load()
        assert why in caught.value.why
    assert len(server.asked(SHARD)) == 2  # asking again would not help
    assert [failure.where for failure in there.verify("quick").failures] == [SHARD]


# -------------------------------------------------------------------------------------------------- hostile servers


def test_bytes_beyond_the_recorded_size_are_never_kept(server, monkeypatch):
    there = open_archive(f"{server.url}/zarr")
    server.faults = {SHARD: Fault(endless=True)}
    with pytest.raises(IntegrityError, match=f"{SHARD}: the file has more than"):
        there.read(1, 0, 10).load()
    assert len(server.asked(SHARD)) == 1
    assert not cached(".part")
    assert server.sent[f"/zarr/{SHARD}"] < 32 << 20  # what fits into buffers on the way
    server.faults = {"kdcache.json": Fault(endless=True)}
    monkeypatch.setattr(reader, "MANIFEST_LIMIT", 1_000_000)
    with pytest.raises(IntegrityError, match="more than 1,000,000 bytes"):
        open_archive(f"{server.url}/zarr")
    assert server.sent["/zarr/kdcache.json"] < 32 << 20


def test_redirects_are_followed_but_not_in_circles(server, archives):
    there = open_archive(f"{server.url}/zarr")
    server.faults = {SHARD: Fault(times=1, redirect=f"{server.url}/zarr/{SHARD}")}
    assert_equal(there, open_archive(archives / "zarr"), range(1, 2))
    server.faults = {"logits/c/2/0/0": Fault(redirect="/zarr/logits/c/2/0/0")}
    with pytest.raises(IntegrityError, match="cannot be read") as caught:
        there.read(2, 0, 10).load()
    assert "in circles" in caught.value.why
    assert len(server.asked("logits/c/2/0/0")) < 15


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a//b", "./a", "..\\secret", ""])
def test_no_name_leads_out_of_an_archive(server, name):
    store = open_archive(f"{server.url}/zarr").store
    server.forget()
    for access in (store.local, store.read, store.size, store.exists, lambda name: store.prefetch([name])):
        with pytest.raises(IntegrityError, match="leads out of the archive"):
            access(name)
    assert not server.requests


def test_https_is_read_with_a_certificate_to_trust_and_never_leads_to_http(server, archives, tmp_path, monkeypatch):
    with FaultyServer(archives, tls=tmp_path) as secure:
        with pytest.raises(NotFoundError, match="is not read") as caught:
            open_archive(f"{secure.url}/zarr")
        assert "UnknownIssuer" in caught.value.why
        remote._obstore.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        there = open_archive(f"{secure.url}/zarr")
        assert_equal(there, open_archive(archives / "zarr"), range(1))
        secure.faults = {SHARD: Fault(redirect=f"{server.url}/zarr/{SHARD}")}
        with pytest.raises(IntegrityError, match="cannot be read"):
            there.read(1, 0, 10).load()
    assert not server.requests


def test_a_file_of_unknown_length_is_refused(server):
    server.faults = {"kdcache.json": Fault(chunked=True)}
    with pytest.raises(KdcacheError, match="does not say how long") as caught:
        open_archive(f"{server.url}/zarr")
    assert caught.value.exit_code == 5


# ------------------------------------------------------------------------------------------------------- the cache


def test_kill_9_in_mid_download_and_no_byte_is_fetched_twice(server, archives):
    path = f"/zarr/{SHARD}"
    server.faults = {SHARD: Fault(drip=(2048, 0.05))}
    code = "import sys; from kdcache.archive import open_archive; open_archive(sys.argv[1]).read(1, 0, 10).load()"
    process = subprocess.Popen([sys.executable, "-c", code, f"{server.url}/zarr"])
    try:
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size > 8192 for part in cached(".part")) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: server.at_once == 0)
    (part,) = cached(".part")
    held = part.stat().st_size
    assert 8192 < held < (archives / "zarr" / SHARD).stat().st_size
    server.forget()
    assert_equal(open_archive(f"{server.url}/zarr"), open_archive(archives / "zarr"), range(1, 2))
    assert [request.start for request in server.asked(SHARD)] == [held]
    assert server.sent[path] == (archives / "zarr" / SHARD).stat().st_size - held


def test_prefetch_fetches_many_files_at_a_time_and_each_once(server, archives):
    there = open_archive(f"{server.url}/zarr")
    there.store.local("zarr.json")  # the table of shards is read
    server.forget()
    server.gate = threading.Barrier(6, action=lambda: setattr(server, "gate", None), timeout=30)
    for _ in range(3):
        there.prefetch(0)
    assert_equal(there, open_archive(archives / "zarr"), range(1))
    assert server.gate is None  # six requests have waited for each other
    assert server.most_at_once >= 6
    assert max(len(server.asked(request.path)) for request in server.asked()) == 1


def test_what_fails_in_a_prefetch_is_tried_again_by_who_needs_it(server, archives):
    there = open_archive(f"{server.url}/zarr")
    server.faults = {SHARD: Fault(status=500)}
    there.prefetch(1)
    wait_until(lambda: len(server.asked(SHARD)) == attempts.ATTEMPTS)
    with pytest.raises(RetryError, match=SHARD):
        there.read(1, 0, 10).load()
    server.faults = {}
    assert_equal(there, open_archive(archives / "zarr"), range(1, 2))


def test_the_least_recently_used_files_give_way(server, archives, monkeypatch):
    here = open_archive(archives / "hdf5")
    size = here._record_of(here.reader.files(1, 0)[0]).bytes
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", str(int(size * 2.5)))
    there = open_archive(f"{server.url}/hdf5")
    names = [there.reader.files(view, 0)[0] for view in range(3)]
    paths = [there.store.cache.path(there._record_of(name)) for name in names]
    for view, day in ((0, 1), (1, 2)):
        there.read(view, 0, 10).load()
        os.utime(paths[view], (day * 86400, day * 86400))
    there.store.local(names[0])  # used just now
    there.read(2, 0, 10).load()
    assert [path.exists() for path in paths] == [True, False, True]
    server.forget()
    assert_equal(open_archive(f"{server.url}/hdf5"), here)
    assert server.asked(names[1])
    assert sum(path.stat().st_size for path in cached()) <= there.store.cache.limit


def test_what_cannot_fit_is_refused_with_the_fix(server, monkeypatch):
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", "10 kB")
    there = open_archive(f"{server.url}/hdf5")
    for ask in (lambda: there.read(0, 0, 10).load(), lambda: there.fetch(0)):
        with pytest.raises(UsageError, match="bytes") as caught:
            ask()
        assert "10,000 bytes" in caught.value.why
        assert caught.value.fix.startswith("export KDCACHE_CACHE_LIMIT=")


def test_a_prefetch_leaves_room_for_what_is_read_now(server):
    there = open_archive(f"{server.url}/hdf5")
    files = {view: there.reader.files(view, 0)[0] for view in range(3)}
    size = max(there._record_of(name).bytes for name in files.values())
    there.store.cache.limit = int(size * 1.5)
    there.fetch(0)
    there.prefetch(0, 1)
    there.fetch(0)
    time.sleep(0.1)
    assert not server.asked(files[1])
    assert len(server.asked(files[0])) == 1
    there.store.cache.limit = int(size * 2.5)
    there.prefetch(0, 1)
    wait_until(lambda: server.asked(files[1]))


def test_files_that_vanish_are_fetched_again_and_maps_outlive_them(server, archives, monkeypatch):
    here, there = open_archive(archives / "zarr"), open_archive(f"{server.url}/zarr")
    assert_equal(there, here)
    for path in cached():
        path.unlink()
    count = len(server.requests)
    assert_equal(there, here)  # mapped
    assert len(server.requests) == count
    again, fetch, left = open_archive(f"{server.url}/zarr"), Cache.fetch, [2]

    def unlucky(cache: Cache, record: FileRecord, where: str, stream: Any) -> Path:
        path = fetch(cache, record, where, stream)
        if left[0] and record.path == SHARD:
            left[0] -= 1
            path.unlink()  # another process made room before this one had opened it
        return path

    monkeypatch.setattr(Cache, "fetch", unlucky)
    for path in cached():
        path.unlink()
    assert_equal(again, here)
    assert left == [0]


def test_a_damaged_file_in_the_cache_is_noticed_and_replaced(server, archives):
    here, there = open_archive(archives / "zarr"), open_archive(f"{server.url}/zarr")
    there.read(1, 0, 600).load()
    path = there.store.cache.path(there._record_of(SHARD))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    server.forget()
    assert_equal(open_archive(f"{server.url}/zarr"), here, range(1, 2))
    assert len(server.asked(SHARD)) == 1
    path.write_bytes(data[:50])
    assert_equal(open_archive(f"{server.url}/zarr"), here, range(1, 2))
    assert len(server.asked(SHARD)) == 2


@pytest.mark.exhaustive
def test_processes_share_one_download(server):
    server.faults = {"": Fault(drip=(4096, 0.02))}
    code = "import sys; from kdcache.archive import open_archive; print(open_archive(sys.argv[1]).read(1, 0, 600).logits.sum())"
    started = [
        subprocess.Popen([sys.executable, "-c", code, f"{server.url}/hdf5"], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {process.communicate(timeout=60)[0] for process in started}
    assert len(said) == 1
    assert len(said.pop().strip()) > 1
    shards = [request.path for request in server.asked() if request.path.endswith(".h5")]
    assert len(shards) == len(set(shards)) > 0


PLANTED = {
    "a link": lambda place, victim: place.symlink_to(victim),
    "a link to nothing": lambda place, victim: place.symlink_to(victim.with_name("nothing")),
    "another name of a file": lambda place, victim: place.hardlink_to(victim),
    "a pipe": lambda place, victim: os.mkfifo(place),
    "a file of others": lambda place, victim: (place.write_bytes(b"planted"), os.geteuid() or os.chown(place, 12345, 12345)),
}


@pytest.mark.filterwarnings("ignore:.*which nothing of kdcache makes there")
@pytest.mark.parametrize("suffix", ["", ".part"])
@pytest.mark.parametrize("planted", PLANTED)
def test_what_others_plant_in_the_cache_is_not_followed(server, archives, tmp_path, planted, suffix):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    there = open_archive(f"{server.url}/zarr")
    path = there.store.cache.path(there._record_of(SHARD))
    place = path.with_name(path.name + suffix)
    place.parent.mkdir(parents=True, exist_ok=True)
    PLANTED[planted](place, victim)
    assert_equal(there, open_archive(archives / "zarr"), range(1, 2))
    assert victim.read_bytes() == b"mine"
    assert not victim.with_name("nothing").exists()
    assert path.is_file()
    assert not path.is_symlink()
    assert path.stat().st_nlink == 1
    assert not cached(".part")


@pytest.mark.parametrize("which", ["the shard's folder", "locks"])
def test_a_folder_of_the_cache_that_is_a_link_is_refused(server, tmp_path, which):
    there = open_archive(f"{server.url}/zarr")
    path = there.store.cache.path(there._record_of(SHARD))
    folder = path.parent if which != "locks" else path.parent.parent / "locks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link") as caught:
        there.read(1, 0, 10).load()
    assert not list((tmp_path / "elsewhere").iterdir())
    command = caught.value.fix.partition(": ")[2].partition(";")[0]
    subprocess.run(command, shell=True, check=True)
    there.read(1, 0, 10).load()


def test_what_is_no_file_of_the_cache_stays_when_room_is_made(server, archives, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", "100 kB")
    there = open_archive(f"{server.url}/zarr")
    root = there.store.cache.root
    names = {f"{number:02x}" for number in range(256)} - {record.sha256[:2] for record in there._records.values()}
    file, folder = (root / name for name in sorted(names)[:2])
    root.mkdir()
    file.write_bytes(b"theirs")
    (folder / "theirs").mkdir(parents=True)
    for place in (file, folder / "theirs"):
        os.utime(place, (1, 1))  # what is oldest goes first
    assert_equal(there, open_archive(archives / "zarr"))
    assert file.read_bytes() == b"theirs"
    assert (folder / "theirs").is_dir()


def test_a_file_of_the_cache_that_is_exchanged_after_its_check_is_checked_again(server, archives):
    here, there = open_archive(archives / "zarr"), open_archive(f"{server.url}/zarr")
    path = there.store.local(SHARD)
    whole, status = path.read_bytes(), path.stat()
    for written in (path.with_name("other"), path):  # another file of its size and time; then the same one, changed
        written.write_bytes(bytes(len(whole)))
        os.utime(written, ns=(status.st_atime_ns, status.st_mtime_ns))
        written.replace(path)
        assert_equal(there, here, range(1, 2))
        assert path.read_bytes() == whole
        there = open_archive(f"{server.url}/zarr")
        there.store.local(SHARD)


def test_a_full_disk_is_a_retry_error_and_nothing_is_lost(server, archives, run_python):
    code = """
import resource, sys
from kdcache.archive import open_archive
from kdcache.errors import RetryError
there = open_archive(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
try:
    there.read(1, 0, 10).load()
except RetryError as error:
    print(error)
"""
    said = run_python(code, f"{server.url}/zarr").stdout.splitlines()
    assert said[0].endswith("cannot be written")
    assert "ulimit -f" in said[2], "there is room, but files may not be larger"
    (part,) = cached(".part")
    assert 0 < part.stat().st_size <= 9000
    held = part.stat().st_size
    assert_equal(open_archive(f"{server.url}/zarr"), open_archive(archives / "zarr"), range(1, 2))
    assert server.asked(SHARD)[-1].start == held


def test_an_interpreter_that_ends_does_not_wait_for_its_prefetches(server, run_python):
    server.faults = {"/0": Fault(drip=(100, 0.05))}
    code = "import sys; from kdcache.archive import open_archive; open_archive(sys.argv[1]).prefetch(0, 1, 2)"
    started = time.monotonic()
    run_python(code, f"{server.url}/zarr")
    assert time.monotonic() - started < 10  # the first shard alone would take 20 s


@pytest.mark.parametrize(("text", "limit"), [("50GB", 50 * 10**9), ("1.5 tb", 15 * 10**11), ("700", 700), ("2M", 2 * 10**6)])
def test_the_limit_is_read_as_people_write_it(monkeypatch, tmp_path, text, limit):
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", text)
    monkeypatch.delenv("KDCACHE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.from_environment() == Cache(tmp_path / "kdcache", limit)


@pytest.mark.parametrize("text", ["much", "-5GB", "5 parsecs", "1e400", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", text)
    with pytest.raises(UsageError, match="KDCACHE_CACHE_LIMIT"):
        Cache.from_environment()


# ------------------------------------------------------------------------------------------------------- locations


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        ("{http}/nothing", 3, "no archive at"),
        ("{http}/forbidden", 3, "403 Forbidden"),
        ("{http}/unfinished", 6, "not finished"),
        ("http://127.0.0.1:9/zarr", 75, "Connection refused"),
        ("s3://bucket/nothing", 3, "no archive at"),
        ("s3://bucket/half", 6, "not finished"),
        ("s3://other/zarr", 3, "no archive at"),
        ("hf://datasets/team/unknown", 3, "no such dataset"),
        ("hf://datasets/team/logits@nope/zarr", 3, "no such revision"),
        ("hf://team/logits", 2, "hf://datasets/"),
        ("htps://host/zarr", 2, "https://"),
        ("ftp://host/zarr", 2, "s3://"),
        ("https://", 2, "no host"),
        ("https://host/zarr?token=secret", 2, "question mark"),
        ("https://me:secret@host/zarr", 2, "password"),
    ],
)
def test_locations_without_an_archive(server, s3, hub, archives, capfd, url, status, words):
    server.faults = {"/forbidden/kdcache.json": Fault(status=403)}
    (archives / "unfinished" / ".dump").mkdir(parents=True, exist_ok=True)
    (archives / "unfinished" / ".dump" / "plan.json").write_text("{}")
    open_remote("s3://bucket/half").put("logits/c/0/0/0", b"some")
    assert run(["info", url.format(http=server.url)]) == status
    said = capfd.readouterr().err
    assert [line.partition(":")[0] for line in said.splitlines()] == ["error", "why", "fix"]
    assert words in said
    assert "secret" not in said


def test_credentials_of_s3_come_from_profiles_and_their_absence_is_said(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = TEAMKEY\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    remote._obstore.cache_clear()
    try:
        open_archive("s3://bucket/team/zarr")
        assert "Credential=TEAMKEY/" in s3.asked("kdcache.json")[0].headers["authorization"]
        s3.faults = {"kdcache.json": Fault(status=403)}
        with pytest.raises(NotFoundError, match="no archive at") as caught:
            open_archive("s3://bucket/team/zarr")
        assert "AWS_SKIP_SIGNATURE" in caught.value.fix
    finally:
        remote._obstore.cache_clear()


def test_files_are_put_on_object_stores_only(server):
    with pytest.raises(UsageError, match="cannot be written to"):
        open_remote(server.url).put("a", b"")


def test_commands_take_urls(server, archives, capfd):
    assert run(["info", f"{server.url}/zarr"]) == 0
    assert f"{server.url}/zarr" in capfd.readouterr().out.replace("\n", "")
    assert run(["verify", f"{server.url}/zarr"]) == 0
    assert run(["verify", "--quick", f"{server.url}/hdf5"]) == 0
    assert not server.asked(".h5")  # sizes are asked for, nothing is fetched
    assert "quick: ok" in capfd.readouterr().out
    server.faults = {SHARD: Fault(wrong=True)}
    shutil.rmtree(os.environ["KDCACHE_CACHE"])
    assert run(["verify", f"{server.url}/zarr"]) == 4


def test_training_reads_a_remote_archive_one_view_ahead(dump):
    with FaultyServer(dump.archive.path) as server:
        there = open_archive(server.url)
        local, far = (CachedTargets(archive, dump.canvas, 5, seed=3) for archive in (dump.archive, there))
        for epoch in range(3):
            batches = far.epoch(epoch)
            first = next(batches)
            following = far.view(epoch + 1)
            wait_until(lambda view=following: all(there.store.cache.find(there._record_of(n)) for n in there._files_of(view)))
            for ours, theirs in zip([first, *batches], local.epoch(epoch), strict=True):
                assert ours.view == theirs.view
                assert (ours.logits == theirs.logits).all()
                assert (ours.images == theirs.images).all()
        shards = [request.path for request in server.asked() if "/c/" in request.path]
        assert len(shards) == len(set(shards))


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_work_of_threads_is_counted_in_one_place():
    downloads = cache._Downloads()
    begun, free = [], threading.Event()

    def task(number: int) -> Callable[[], Path]:
        def work() -> Path:
            begun.append(number)
            free.wait(10)
            return Path(str(number))

        return work

    futures = [downloads.begin((str(i), 0), task(i), first=False) for i in range(20)]
    wait_until(lambda: len(begun) == cache.WORKERS)
    urgent = downloads.begin(("19", 0), task(19), first=True)
    assert urgent is futures[19]
    free.set()
    assert [future.result(10) for future in futures] == [Path(str(i)) for i in range(20)]
    assert begun[cache.WORKERS] == 19  # who waits for a file passes what is only fetched ahead
