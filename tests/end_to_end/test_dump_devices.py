"""Dumps on other devices and under pressure: too little memory, a full disk, interruptions, and machines of several kinds."""

import contextlib
import json
import os
import signal
import threading
import weakref

import numpy as np
import pytest
import torch

from kdcache.archive import ArchiveWriter, open_archive
from kdcache.models.creation import Normalisation, create_model
from kdcache.replay.prefetch import Rendered
from kdcache.system.interrupts import Stopped
from kdcache.teachers import dump, shards
from kdcache.teachers.config import USUAL, UsualDump
from kdcache.teachers.forward import Forward
from kdcache.teachers.shards import write_shards
from kdcache.views.policy import ViewPolicy
from kdcache.views.probe import grids
from tests.end_to_end.conftest import data_files
from tests.hostile import resealed
from tests.squares import squares


@pytest.fixture
def command(few_home, few_archive):
    """A dump of the few digits, without the number of views."""
    dataset = open_archive(few_archive).manifest.provenance["dataset"]
    teacher = ["--teacher", "test_vit", "--dataset", dataset, "--canvas", "32", "--policy", "digits"]
    return ["dump-teacher", *teacher, "--home", few_home]


@pytest.fixture
def other_machine(monkeypatch):
    """A machine whose usual dump is a GPU's: call it with the kind of device, and the precision that is usual there."""

    def on(kind="NVIDIA H100", precision="fp32"):
        monkeypatch.setattr(dump, "usual_dump", lambda device: UsualDump(precision, USUAL["cuda"].batch_size))
        monkeypatch.setattr(dump, "device_kind", lambda device: kind)

    return on


# ---------------------------------------------------------------- one batch behind


class Bright(Forward):
    """A teacher of three classes: how bright a view is, with what happens noted in `log`."""

    def __init__(self, log=None, precision="fp32"):
        super().__init__(torch.nn.Identity(), Normalisation((0.5,) * 3, (0.5,) * 3), torch.device("cpu"), precision)
        self.log = [] if log is None else log

    def launch(self, views):
        self.log.append("launch")
        return self.in_float32(views)

    def in_float32(self, views):
        return views.float().mean(dim=(2, 3)) / 16


def begun(path, canvas, views=2, shard_rows=8):
    names = canvas.card.class_names
    policy = ViewPolicy.load("pets", size=16)
    return ArchiveWriter(path, num_views=views, num_samples=len(canvas), class_names=names, shard_rows=shard_rows, policy=policy)


def test_a_batch_is_launched_before_the_one_before_it_is_looked_at(tmp_path, canvas, monkeypatch):
    log, columns = [], shards._Begun.columns
    monkeypatch.setattr(shards._Begun, "columns", lambda self: (log.append("look"), columns(self))[1])
    write_shards(begun(tmp_path / "a", canvas, views=1), Bright(log), canvas, batch_size=8)
    assert log == ["launch", "launch", "look", "launch", "look", "look"]


def test_batches_that_overflow_are_repeated_in_float32(tmp_path, canvas):
    class Overflowing(Bright):
        def launch(self, views):
            logits = super().launch(views)
            return torch.where(torch.arange(len(views))[:, None] == 3, torch.inf, logits)

    for name, forward in (("exact", Bright()), ("half", Overflowing(precision="fp16"))):
        writer = begun(tmp_path / name, canvas)
        write_shards(writer, forward, canvas, batch_size=4)
        writer.finalize()
    assert data_files(tmp_path / "half") == data_files(tmp_path / "exact")
    writer = begun(tmp_path / "fp32", canvas)
    with pytest.raises(Exception, match="inf"):  # there is no better precision than float32
        write_shards(writer, Overflowing(), canvas, batch_size=4)


def test_shards_are_written_by_one_other_thread_and_given_up_when_they_are_there(tmp_path, canvas, monkeypatch):
    writer, threads, held, write = begun(tmp_path / "a", canvas), set(), [], ArchiveWriter.write
    claim = writer.claim

    @contextlib.contextmanager
    def noted(view, block, **options):
        with claim(view, block, **options) as mine:
            held.append((view, block))
            yield mine
            held.remove((view, block))
            assert (tmp_path / f"a/.dump/shards/{view}-{block}.json").is_file()

    def slow(self, view, block, *columns):
        threads.add(threading.get_ident())
        assert (view, block) in held
        write(self, view, block, *columns)

    writer.claim = noted
    monkeypatch.setattr(ArchiveWriter, "write", slow)
    write_shards(writer, Bright(), canvas, batch_size=4)
    assert threads
    assert threading.get_ident() not in threads
    assert not held
    assert writer.finalize().verify().ok


def test_what_fails_while_a_shard_is_written_stops_the_dump_and_keeps_the_others(tmp_path, canvas, monkeypatch):
    write, log = ArchiveWriter.write, []

    def full(self, view, block, *columns):
        if (view, block) == (1, 0):
            raise OSError(28, "No space left on device", "shard")
        write(self, view, block, *columns)

    monkeypatch.setattr(ArchiveWriter, "write", full)
    writer = begun(tmp_path / "a", canvas, views=8)
    with pytest.raises(OSError, match="No space left"):
        write_shards(writer, Bright(log), canvas, batch_size=8)
    assert len(log) < 8 * 3, "not at the end only"
    assert not {(0, 0), (0, 1), (0, 2)} & set(writer.missing())
    monkeypatch.undo()
    write_shards(writer, Bright(), canvas, batch_size=8)  # no claim was left behind
    assert writer.finalize().verify().ok


@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupted_dump_keeps_every_shard_whose_batches_were_begun(tmp_path, canvas, at):
    class Interrupted(Bright):
        def launch(self, views):
            logits = super().launch(views)
            if len(self.log) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return logits

    writer = begun(tmp_path / "a", canvas)
    with pytest.raises(Stopped):
        write_shards(writer, Interrupted(), canvas, batch_size=8)  # each batch is a shard
    assert len(writer.missing()) == 6 - at
    write_shards(writer, Bright(), canvas, batch_size=8)
    assert writer.finalize().verify().ok


# ---------------------------------------------------------------- too little memory


def test_a_batch_that_finds_no_memory_ends_with_75_and_keeps_what_was_written(
    few_home, few_archive, kdcache, command, monkeypatch
):
    launch, launched = Forward.launch, []

    def full(self, views):
        launched.append(len(views))
        if len(launched) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.15 GiB.")
        return launch(self, views)

    monkeypatch.setattr(Forward, "launch", full)
    failed = kdcache(*command, "--views", 5)
    assert failed.status == 75
    error, why, fix = failed.err.splitlines()[-3:]
    assert error == "error: no memory for batches of 64 views on cpu"
    assert why.startswith("why: CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert "repeat the command" in fix
    assert "-b 32 makes another one (with --output, name another folder)" in fix
    monkeypatch.undo()
    assert (few_archive / ".dump/shards/3-0.json").is_file()
    assert kdcache(*command, "--views", 5).status == 0
    assert open_archive(few_archive).num_views == 5


def test_with_batches_of_one_view_there_is_nothing_smaller_to_advise(kdcache, command, monkeypatch, tmp_path):
    def full(self, views):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Forward, "launch", full)
    failed = kdcache(*command, "--views", 1, "-b", 1, "-o", tmp_path / "a")
    assert failed.status == 75
    assert "repeat the command" in failed.err
    assert "-b 1" not in failed.err


def test_a_batch_without_memory_is_begun_once_more_beside_fewer_rendered_views(tmp_path, canvas, monkeypatch):
    class Scarce(Bright):
        def launch(self, views):
            logits = super().launch(views)
            if len(self.log) in {2, 9}:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return logits

    halved = []
    monkeypatch.setattr(shards.Resident, "halve", lambda self: halved.append(self))
    for name, forward in (("usual", Bright()), ("scarce", Scarce())):
        writer = begun(tmp_path / name, canvas)
        write_shards(writer, forward, canvas, batch_size=2)
        writer.finalize()
    assert data_files(tmp_path / "scarce") == data_files(tmp_path / "usual")
    assert len(halved) == 2
    assert halved[0] is halved[1]


def test_a_batch_that_is_written_is_let_go_before_the_next_is_rendered(canvas):
    draws, alive = ViewPolicy.load("none", size=20).parameters(0, 8, squares(8)), []

    def rendered():
        for _ in range(5):
            images = torch.zeros(8, 3, 20, 20, dtype=torch.uint8)
            alive.append(weakref.ref(images))
            item = Rendered(images, np.zeros(8, np.uint32), draws, None, np.arange(8), np.zeros((8, 16), np.uint8))
            del images
            yield item
            del item
            assert [number for number, each in enumerate(alive) if each() is not None] == [len(alive) - 1]

    assert len(list(shards._answered(rendered(), Bright(), shards.Resident(), lambda: None))) == 5


# ---------------------------------------------------------------- machines of several kinds


def test_an_archive_goes_on_in_its_batches_wherever_it_is_gone_on_with(few_home, few_archive, kdcache, command, other_machine):
    other_machine()
    grown = kdcache(*command, "--views", 4)
    assert (grown.status, grown.out.strip()) == (0, str(few_archive))
    assert f"{few_archive} was begun in batches of 64 views, and goes on with them" in grown.err
    told = kdcache(*command, "--views", 4, "--dry-run")
    assert told.out.strip() == str(few_archive)
    asked = kdcache(*command, "--views", 1, "-b", 256)
    assert asked.status == 0
    assert asked.out.strip() != str(few_archive)
    assert open_archive(asked.out.strip()).manifest.teacher.batch_size == 256
    assert kdcache(*command, "--views", 1).out.strip() == asked.out.strip(), "what is usual here comes first"


def test_a_folder_goes_on_in_its_batches_unless_others_are_asked_for(kdcache, command, other_machine, tmp_path):
    assert kdcache(*command, "--views", 1, "-o", tmp_path / "a").status == 0
    other_machine()
    assert kdcache(*command, "--views", 2, "-o", tmp_path / "a").status == 0
    refused = kdcache(*command, "--views", 3, "-o", tmp_path / "a", "-b", 256)
    assert refused.status == 5
    assert 'it has {"batch_size": 64}, this dump has {"batch_size": 256}' in refused.err


def test_the_usual_batch_of_a_gpu_is_larger(kdcache, command, other_machine, tmp_path):
    other_machine(precision="bf16")
    made = kdcache(*command, "--views", 1, "-o", tmp_path / "a")
    assert made.status == 0
    card = open_archive(tmp_path / "a").manifest.teacher
    assert (card.batch_size, card.precision, card.noise.reference, card.memory_format) == (256, "bf16", "float32", "contiguous")


def test_jobs_of_one_dump_on_other_machines_agree_or_are_refused(few_home, kdcache, command, other_machine):
    dumped = [*command, "--views", 2, "--view-seed", 1]
    begun = kdcache(*dumped, "--shard", "0/2")
    assert begun.status == 0
    other_machine(precision="bf16")
    refused = kdcache(*dumped, "--shard", "1/2")
    assert refused.status == 2
    assert f"others write {begun.out.strip()} in fp32" in refused.err
    assert "--precision fp32 writes shards of theirs, --precision bf16 begins another" in refused.err
    agreed = kdcache(*dumped, "--shard", "1/2", "--precision", "fp32")
    assert (agreed.status, agreed.out) == (0, begun.out)
    assert open_archive(begun.out.strip()).num_views == 2


def test_an_archive_says_which_devices_computed_it_if_there_were_several(few_home, few_archive, kdcache, command, other_machine):
    assert "devices" not in open_archive(few_archive).manifest.provenance
    assert "computed on" not in kdcache("info", few_archive).out
    other_machine("NVIDIA H100")
    assert kdcache(*command, "--views", 5).status == 0
    assert open_archive(few_archive).manifest.provenance["devices"] == {"cpu": [[0, 2]], "NVIDIA H100": [[3, 4]]}
    other_machine("NVIDIA A100")
    assert kdcache(*command, "--views", 6).status == 0
    manifest = open_archive(few_archive).manifest
    assert manifest.provenance["devices"] == {"cpu": [[0, 2]], "NVIDIA H100": [[3, 4]], "NVIDIA A100": [[5, 5]]}
    kinds = "cpu (3 shards), NVIDIA H100 (2 shards), NVIDIA A100 (1 shards)"
    assert kinds in " ".join(kdcache("info", few_archive).out.split())
    assert f"| computed on | {kinds} |" in (few_archive / "README.md").read_text()
    assert kdcache("convert", few_archive, "--views", "3:6", "--home", few_home, "-o", few_home / "part").status == 0
    assert "| computed on | NVIDIA H100 (2 shards), NVIDIA A100 (1 shards) |" in (few_home / "part/README.md").read_text()


@pytest.mark.parametrize("devices", [[], {"a": 1}, {"a": [[0]], "b": [["x", 1]]}, {"a": [[-(10**30), 10**30]], "b": [[2, 1]]}])
def test_a_strangers_record_of_devices_does_no_harm(few_archive, kdcache, devices):
    manifest = json.loads((few_archive / "kdcache.json").read_text())
    manifest["provenance"]["devices"] = devices
    (few_archive / "kdcache.json").write_text(json.dumps(resealed(manifest)))
    assert kdcache("info", few_archive).status == 0


# ---------------------------------------------------------------- verification


def test_verify_recomputes_on_the_device_that_it_is_told(few_home, few_archive, kdcache):
    told = kdcache("verify", few_archive, "--replay", 20, "--device", "cpu", "--home", few_home)
    assert told.status == 0
    assert "64 logit vectors recomputed on cpu" in told.out
    wrong = kdcache("verify", few_archive, "--replay", 20, "--device", "cuda:77", "--home", few_home)
    assert wrong.status == 2
    assert "'cuda:77' cannot be used" in wrong.err


def test_logits_of_another_device_are_not_called_damaged(few_home, few_archive, kdcache, monkeypatch):
    launch = Forward.launch
    monkeypatch.setattr(Forward, "launch", lambda self, views: launch(self, views) + 0.5)
    differs = kdcache("verify", few_archive, "--replay", 20, "--home", few_home)
    assert differs.status == 5
    assert "full: ok" in differs.out
    assert "replay 20: DIFFERS" in differs.out
    assert "delete" not in differs.err
    assert np.isfinite(open_archive(few_archive).read(0, 0, 3).logits).all()


# ---------------------------------------------------------------- with a GPU

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("precision", [pytest.param(name, marks=GPU) for name in ("fp16", "bf16", "fp32")])
def test_dumps_on_one_gpu_are_equal_and_verified_there_and_on_the_cpu(few_home, kdcache, command, tmp_path, precision):
    for name in ("a", "b"):
        made = kdcache(*command, "--views", 2, "--device", "cuda", "--precision", precision, "-o", tmp_path / name)
        assert made.status == 0, made.err
    one, other = (open_archive(tmp_path / name).manifest for name in ("a", "b"))
    assert one.digest == other.digest
    assert one.teacher.batch_size == 256
    assert one.teacher.memory_format == ("contiguous" if precision == "fp32" else "channels_last")  # of the patch embedding
    assert one.teacher.noise.reference == ("float64" if precision == "fp32" else "float32")
    for device in ("cuda", "cpu"):
        checked = kdcache("verify", tmp_path / "a", "--replay", 160, "--device", device, "--home", few_home)
        assert checked.status == 0, checked.out + checked.err
        assert f"160 logit vectors recomputed on {device}" in checked.out


@pytest.mark.parametrize("precision", [pytest.param(name, marks=GPU) for name in ("fp16", "fp32")])
def test_on_a_gpu_nothing_is_waited_for_until_results_are_looked_at(canvas, precision):
    gpu = torch.device("cuda")
    model, _ = create_model("test_resnet", 3, input_size=20)
    forward = Forward(model.eval().to(gpu), lambda views: views.float() / 255, gpu, precision)
    images = torch.from_numpy(canvas.pixels[:8].copy()).to(gpu)
    forward(images)
    draws = ViewPolicy.load("none", size=20).parameters(0, 8, squares(8))
    item = Rendered(images, np.zeros(8, np.uint32), draws, None, np.arange(8), grids(images))
    try:
        torch.cuda.set_sync_debug_mode("error")
        begun = shards._Begun(item, forward)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logits, *_, grid = begun.columns()
    np.testing.assert_array_equal(logits, forward(images))
    np.testing.assert_array_equal(grid, grids(images))


@pytest.mark.parametrize("much", [pytest.param(1 << 50, marks=GPU)])
def test_a_full_gpu_ends_a_dump_with_75(kdcache, command, tmp_path, monkeypatch, much):
    monkeypatch.setattr(Forward, "launch", lambda self, views: torch.empty(much, dtype=torch.uint8, device=self.device))
    failed = kdcache(*command, "--views", 1, "--device", "cuda", "-b", 160, "-o", tmp_path / "a")
    monkeypatch.undo()
    assert failed.status == 75, failed.err
    assert [line.split(":")[0] for line in failed.err.splitlines()[-3:]] == ["error", "why", "fix"]
    assert kdcache(*command, "--views", 1, "--device", "cuda", "-b", 160, "-o", tmp_path / "a").status == 0
