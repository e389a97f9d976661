"""Archives and models that are passed on, studies and teachers: what follows the fix of an error ends well."""

import contextlib
import copy
import dataclasses
import http.client
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import safetensors.torch
import timm
import yaml
from PIL import Image

from kdcache.archive import Archive, Licences, open_archive, write_archive
from kdcache.cli import run
from kdcache.models.classes import imagenet
from kdcache.sharing.export import Export, export, push_export
from kdcache.sharing.push_pull import pull, push, shipment
from kdcache.sharing.signing import MAKE_KEYS, sign_archive
from kdcache.study.jobs import Job, StudyPlan, plan_study
from kdcache.study.running import run_job, run_study, study_place
from kdcache.study.schema import load_study
from kdcache.system.energy import Spent
from kdcache.system.locks import locked_by_family
from kdcache.system.progress import Silent
from kdcache.system.remote import open_remote
from kdcache.teachers.as_is import Start, take
from kdcache.teachers.config import TeacherAndData, TeacherConfig
from kdcache.teachers.head import HEAD, Head
from kdcache.teachers.planning import TeacherPlan
from kdcache.workspace import Workspace
from tests.archives import finish, logits, writer
from tests.end_to_end.conftest import Outcome
from tests.following import amended, followed, followed_by_command, typed
from tests.hostile import edit_manifest
from tests.hub import WritableHub
from tests.miniatures import save
from tests.servers import Fault, FaultyServer, faulty_s3
from tests.weights import save_weights

TERMS = Licences(data="cc-by-4.0", weights="mit")
Act = Callable[[], object]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kdcache.system.attempts.BACKOFF", 0.002)


def says(words: str, value: Any = None, does: Act | None = None) -> Callable[[str], Any]:
    def mend(fix: str) -> Any:
        assert words in fix, fix
        if does is not None:
            does()
        return value

    return mend


# ---------------------------------------------------------------- archives that are pushed and pulled


def made(name: str = "a") -> Archive:
    return finish(writer(Path(name)))


def another(name: str = "b") -> Archive:
    """An archive of another teacher's logits."""
    to = writer(Path(name))
    for view, block in to.missing():
        to.write(view, block, logits(view + 9)[list(to.positions(block))])
    return to.finalize()


def sent(archive: Archive, place: str = "out") -> Archive:
    return open_archive(push(archive, place, licences=TERMS))


CHANGED: dict[str, Callable[[bytes], bytes]] = {
    "damaged": lambda whole: whole[:-9],
    "another": lambda whole: Path("b/kdcache.json").read_bytes(),
}


@pytest.mark.parametrize("now", CHANGED)
@pytest.mark.parametrize(
    "act", [lambda archive: pull(archive, "here"), lambda archive: shipment(archive, Licences())], ids=["pull", "push"]
)
def test_what_changes_while_it_is_passed_on_is_passed_on_again(act: Callable[[Archive], object], now: str) -> None:
    another()
    archive = sent(made())
    file = archive.path / "kdcache.json"
    whole = file.read_bytes()
    file.write_bytes(CHANGED[now](whole))

    def again(fix: str) -> Archive:
        assert fix.startswith("repeat the command"), fix
        file.write_bytes(whole)  # whoever writes it is done
        return open_archive(archive.path)

    assert followed(act, archive, again)


def test_an_archive_with_impossible_names_is_got_again() -> None:
    for name in ("a", "b"):
        made(name)
    edit_manifest(Path("a"), lambda m: m["files"].append({"path": ".pull", "bytes": 1, "sha256": "0" * 64}))
    followed(lambda name: pull(open_archive(name), "here"), "a", says("get it again from whoever made it", "b"))


def test_a_folder_that_another_process_fills_is_waited_for() -> None:
    archive = made()
    Path("here/.pull").mkdir(parents=True)
    held = filelock.FileLock("here/.pull/lock")
    held.acquire()
    followed(lambda folder: pull(archive, folder), "here", says("wait for it", "here", held.release))


def test_a_folder_in_which_something_is_in_the_way_is_left() -> None:
    archive = made()
    for folder in (".pull", "zarr.json"):
        Path("here", folder).mkdir(parents=True)
    followed(lambda folder: pull(archive, folder), "here", says("correct the path: it is a folder", "there"))


def test_a_link_is_replaced_by_the_file_that_is_meant() -> None:
    archive = made()
    card = archive.path / "README.md"
    card.rename("card")
    card.symlink_to(Path("card").absolute())

    def meant() -> None:
        card.unlink()
        Path("card").rename(card)

    followed(lambda place: sent(archive, place), "out", says("replace it by the file that is meant", "out", meant))


@pytest.fixture
def key() -> str:
    assert subprocess.run(MAKE_KEYS.removesuffix(" makes a pair"), shell=True, capture_output=True, check=True)
    return "key.pem"


def test_an_archive_that_is_signed_is_signed_anew_for_others(key: str) -> None:
    archive = made()
    sign_archive(archive, Path(key))

    def public(fix: str) -> Archive:
        aside, *first, last = fix.partition("push it from there: ")[2].replace("FOLDER", "folder").split(" && ")
        typed(aside, "mv")
        for command in first:
            assert run(shlex.split(command)[1:]) == 0
        assert last == "kdcache push folder DESTINATION"
        return open_archive("folder")

    assert (followed(lambda archive: sent(archive), archive, public).path / "kdcache.sig").is_file()


def test_signatures_are_made_once_their_package_is_there(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = made()
    monkeypatch.setitem(sys.modules, "model_signing", None)

    def installed(fix: str) -> Archive:
        assert fix == "pip install 'kdcache[sign]'"
        monkeypatch.delitem(sys.modules, "model_signing")
        return archive

    assert followed(lambda archive: sign_archive(archive, Path(key)), archive, installed).is_file()


# ---------------------------------------------------------------- the Hub and buckets

URL = "hf://datasets/team/logits"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultyServer, WritableHub]]:
    content = WritableHub("secret")
    with FaultyServer(content) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server, content


Hub = tuple[FaultyServer, WritableHub]


HUB_SAYS: dict[str, tuple[Fault, str]] = {
    "refuses": (Fault(status=422), "correct what it says, and repeat the command"),
    "fails": (Fault(status=500), "repeat the command when it can"),
    "hangs up": (Fault(reset=True), "repeat the command when it can"),
}


@pytest.mark.parametrize("case", HUB_SAYS)
def test_what_the_hub_does_not_take_is_pushed_again(hub: Hub, case: str) -> None:
    server, _ = hub
    archive = made()
    server.faults[""], words = HUB_SAYS[case]
    assert followed(lambda url: sent(archive, url), URL, says(words, URL, server.forget)).num_views == 2


def test_the_hub_takes_what_is_pushed_with_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = made()
    monkeypatch.setenv("HF_TOKEN", "wrong")

    def logged_in(fix: str) -> str:
        name = fix.rpartition("or set ")[2]
        monkeypatch.setenv(name, "secret")
        return URL

    assert followed(lambda url: sent(archive, url), URL, logged_in).num_views == 2


def test_names_that_the_hub_does_not_allow_are_corrected(hub: Hub) -> None:
    archive = made()
    wrong = "hf://datasets/team/log--its"
    assert followed(lambda url: sent(archive, url), wrong, says("correct its name", URL)).num_views == 2


def test_what_is_on_the_hub_stays_there(hub: Hub) -> None:
    _, content = hub
    archive = made()
    whole = {"kdcache.json": b"{}", "cat.jpg": b"meow"}
    content.repos["team/logits"] = {"main": dict(whole)}
    elsewhere = "hf://datasets/team/others"
    assert followed(lambda url: sent(archive, url), URL, says("choose another place", elsewhere))
    del content.repos["team/logits"]["main"]["kdcache.json"]
    nothing_yet = f"{URL}/sub"
    assert followed(lambda url: sent(archive, url), URL, says("choose a place where there is nothing yet", nothing_yet))
    assert content.repos["team/logits"]["main"]["cat.jpg"] == b"meow"

    def place(name: str) -> str:
        push_export(Export("test_vit", {"config.json": b"{}"}, TERMS), name)
        return name

    content.repos["team/model"] = {"main": {"notes.txt": b"mine"}}
    assert followed(place, "team/model", says("name a repository that does not exist yet", "team/new")) == "team/new"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with faulty_s3() as server:
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with contextlib.closing(http.client.HTTPConnection(server.url.removeprefix("http://"))) as connection:
            connection.request("PUT", "/bucket")
            assert connection.getresponse().status == 200
        yield "s3://bucket"


@pytest.mark.exhaustive
def test_the_beginning_of_another_archive_is_finished_or_left(bucket: str) -> None:
    one, other = made(), another()
    mark = json.dumps({"shards": sent(other, "public").manifest.shards.sha256}).encode()
    open_remote(f"{bucket}/a").put(".push.json", mark)
    words = "finish that push, or choose another place"
    assert followed(lambda url: sent(one, url), f"{bucket}/a", says(words, f"{bucket}/b")).num_views == 2
    finished = followed(lambda given: sent(*given), (one, f"{bucket}/a"), says(words, (other, f"{bucket}/a")))
    assert finished.manifest.digest == other.manifest.digest


# ---------------------------------------------------------------- studies

ONE = {
    "title": "One student",
    "paper": "none",
    "question": "Does it work?",
    "varies": "nothing",
    "expected": "It does.",
    "cost": {"gpu-hours": 0, "archive-bytes": "1 MB"},
    "archives": {"one": {"dataset": "digits", "teacher": "test_vit", "train": {"epochs": 1}, "dump": {"views": 2}}},
    "students": [{"archive": "one", "student": "test_vit", "tau": 1, "epochs": 1}],
}


def study(**sections: Any) -> str:
    Path("s.yaml").write_text(yaml.safe_dump(copy.deepcopy(ONE) | sections))
    return "s.yaml"


def planned(name: str) -> StudyPlan:
    plan = plan_study(load_study(Path(name)), Path(name), Workspace(Path("home")))
    if plan.missing:
        raise plan.missing[0]
    return plan


def of_archive(**changes: Any) -> dict[str, Any]:
    return {"archives": {"one": ONE["archives"]["one"] | changes}}


def paired(second: str) -> dict[str, Any]:
    """Students of two views of two policies' archives, and of an archive of other images."""
    several = {"two": {**ONE["archives"]["one"], "dump": {"views": 2, "policy": ["none", "digits"]}}}
    other = {"other": {**ONE["archives"]["one"], "dataset": "pets"}}
    students = [{**ONE["students"][0], "method": "mlkd", "second-archive": second}]
    return {"archives": ONE["archives"] | several | other, "students": students}


def published(row: list[Any]) -> dict[str, Any]:
    table = {"table": "Table 1", "of": {"dataset": "pets"}, "by": ["teacher"], "across": {"tau": ["1", "4"]}, "rows": [row]}
    return {"published": [table]}


NAME_ONE = "name one that has such an archive, and a single policy"
PLANS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "no images": (
        of_archive(dataset="folder:nowhere"),
        "write where yours are into a copy of the study",
        {**of_archive(dataset="folder:pictures"), "students": [{**ONE["students"][0], "batch-size": 2}]},
    ),
    "no images for it": (of_archive(dataset=["digits", "folder:nowhere"]), "or take that dataset out of it", {}),
    "second views of other images": (paired("other"), NAME_ONE, paired("one")),
    "second views of two policies": (paired("two"), NAME_ONE, paired("one")),
    "too few numbers": (published(["rn50", 71.5]), "write the line as the paper has it", published(["rn50", 71.5, 73.0])),
    "no numbers": (published(["rn50", 71.5, "-"]), "and null for what the paper leaves out", published(["rn50", 71.5, None])),
}


@pytest.mark.parametrize("case", PLANS)
def test_studies_come_to_jobs_when_they_say_what_the_fix_says(case: str) -> None:
    wrong, words, right = PLANS[case]
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save(Path(f"pictures/{split}/{name}/0.jpg"))
    assert followed(planned, study(**wrong), lambda fix: says(words, study(**right))(fix)).jobs


def done_already() -> StudyPlan:
    """A study of which everything is there."""
    plan = planned(study())
    place = study_place(plan.name, Workspace(Path("home")))
    place.folder.mkdir(parents=True)
    for job in plan.jobs:
        place.record(job.id).write_text("{}")
    return plan


def ran(plan: StudyPlan, home: str = "home") -> bool:
    return run_study(plan, Workspace(Path(home)), file=Path("s.yaml")) == []


def test_a_workspace_whose_name_breaks_a_line_has_another_one() -> None:
    plan = done_already()
    words = "name another folder, or rename that one"

    def ran_in(home: str) -> bool:
        return ran(plan, home)

    assert followed(ran_in, "ho\nme", says(words, "home"))
    Path("home").rename("ho\nme")
    assert followed(ran_in, "ho\nme", says(words, "home", lambda: Path("ho\nme").rename("home")))


def test_studies_run_once_snakemake_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, find = done_already(), importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    def installed(fix: str) -> StudyPlan:
        assert fix == "pip install 'kdcache[grid]'"
        monkeypatch.setattr("importlib.util.find_spec", find)
        return plan

    assert followed(ran, plan, installed)


@pytest.mark.parametrize("way", ["wait for it", "or copy the study to another name"])
def test_a_study_that_another_process_runs_is_waited_for_or_copied(way: str) -> None:
    plan = done_already()
    place = study_place(plan.name, Workspace(Path("home")))
    place.record(plan.jobs[0].id).rename("kept")

    def other() -> StudyPlan:
        """The other process is done, or the plan is another study's, whose jobs are there."""
        Path("kept").rename(place.record(plan.jobs[0].id))
        if way == "wait for it":
            return plan
        shutil.copytree(place.folder, place.folder.with_name("t"))
        return dataclasses.replace(plan, name="t")

    with locked_by_family(place.folder / ".lock", wait=False):
        assert followed(ran, plan, lambda fix: says(way, other())(fix))


@pytest.mark.exhaustive
def test_jobs_are_run_in_the_order_that_the_fix_says() -> None:
    made()
    jobs = [
        Job("report-00000001", "report", "one", ("pull", "a", "b")),
        Job("report-00000002", "report", "two", ("pull", "{report-00000001}", "c"), ("report-00000001",)),
    ]
    plan = Path("plan.json")
    settings = {"home": "home", "data_dir": None, "directory": str(Path.cwd())}
    plan.write_text(json.dumps(settings | StudyPlan("s", tuple(jobs), 0, None, None, ()).as_json()))

    def ran(name: str) -> bool:
        return run_job(plan, name) == 0

    def first(fix: str) -> str:
        assert run(shlex.split(fix)[1:]) == 0
        return jobs[1].id

    assert followed(ran, jobs[1].id, first)
    assert open_archive("c").num_views == 2
    assert followed(ran, "report-3", says("use one of those that it lists", json.loads(plan.read_text())["jobs"][0]["id"]))


@pytest.mark.exhaustive
def test_a_study_goes_on_when_the_cause_of_a_failure_is_mended() -> None:
    job = Job("report-00000001", "report", "one", ("pull", "a", str(Path("b").absolute())))

    def ran(command: str) -> bool:
        plan = StudyPlan("s", (job,), 0, None, None, ())
        return run_study(plan, Workspace(Path("home")), file=Path("s.yaml"), command=command) == [str(Path("b").absolute())]

    def mended(fix: str) -> str:
        made()
        return fix.partition("mend the cause, then go on with what is missing: ")[2]

    assert followed(ran, "kdcache study run s.yaml", mended)
    assert open_archive("b").num_views == 2


# ---------------------------------------------------------------- teachers: which outputs are which classes

VIT = "test_vit.r160_in1k"
THOUSAND = imagenet(1000)
NO_CLASSIFIER = "vit_small_patch16_224.dino"


def taken(names: tuple[str, ...], start: Start = "timm", classes: str | None = None, model: str = VIT) -> Any:
    checkpoint, subject = Path("w.safetensors") if start == "checkpoint" else None, TeacherAndData(teacher=model, dataset="d")
    found = take(model, names, subject, start, checkpoint=checkpoint, classes=classes and Path(classes), input_size=160)
    return found.mapping.outputs


def as_file(content: dict[str, object]) -> str:
    Path("classes.json").write_text(json.dumps(content))
    return "classes.json"


def test_outputs_are_told_in_a_file_as_the_fix_says() -> None:
    foreign = ("this", "that")
    words = "or say which output is which class: --classes FILE"
    told = says(words, as_file({"this": 7, "that": "tench"}))
    assert followed(lambda classes: taken(foreign, classes=classes), None, told) == (7, 0)

    def unclear(fix: str) -> str:
        example = fix.partition("--classes: ")[2].partition("; or")[0]
        return as_file(json.loads(example.replace("NUMBER OR NAME", "7")))

    assert followed(lambda classes: taken(("tench", "that"), classes=classes), None, unclear) == (0, 7)
    assert followed(lambda classes: taken(("tench", "crane"), classes=classes), None, unclear) == (0, 7)


def test_the_order_of_a_checkpoint_is_said_as_the_fix_says() -> None:
    assert THOUSAND is not None
    turned = (*THOUSAND.names[1:], THOUSAND.names[0])
    save_weights(timm.create_model("test_vit", num_classes=1000), Path("w.safetensors"))
    for part, first in (("; or", 0), ("name the classes of its outputs in order: ", 1)):

        def said(fix: str, part: str = part) -> str:
            before, _, after = fix.partition(part)
            return re.findall(r"--classes (\S+)", before if part == "; or" else after)[0]

        assert followed(lambda classes: taken(turned, "checkpoint", classes), None, said)[0] == first


# ---------------------------------------------------------------- teachers: trained, tested and kept

TEACHERS = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 4.0))

    def forward(self, x):
        return %s

class Headed(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        return %s
"""
RIGHT = "self.scale * x.mean(dim=(2, 3))[:, [2, 1, 0]]"
COMMON = ["--dataset", "folder:images", "--canvas", "16", "--size", "16", "--home", "home"]
VIEWS = ["--policy", "none", "--views", "1", "-b", "8"]
DUMP = ["dump-teacher", "--teacher", "odd_nets:Mean", *COMMON, *VIEWS]
TRAIN = ["train-teacher", "--teacher", "test_vit", *COMMON, "--policy", "none", "--epochs", "1", "-b", "8", "--from-scratch"]


def nets(forward: str = RIGHT, headed: str = "self.fc(x.mean(dim=(2, 3)))") -> None:
    Path("odd_nets.py").write_text(TEACHERS % (forward, headed))
    sys.modules.pop("odd_nets", None)
    importlib.invalidate_caches()


def pictured() -> None:
    """Images in three colours."""
    rng = np.random.default_rng(7)
    for split in ("train", "test"):
        for name, channel in (("blue", 2), ("green", 1), ("red", 0)):
            for i in range(6):
                pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += np.uint8(100 + i)
                file = Path(f"images/{split}/{name}/{i}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)


@pytest.fixture
def coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such images, and functions of one's own that make models."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    pictured()
    nets()


@pytest.fixture
def kdcache(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*command: str) -> Outcome:
        capfd.readouterr()
        status = run(list(command))
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


def only(pattern: str) -> Path:
    (found,) = (path for path in Path("home").glob(pattern) if not path.name.startswith("."))
    return found


@pytest.mark.exhaustive
def test_a_teacher_is_dumped_when_it_is_mended_or_meant(coloured: None, kdcache: Any) -> None:
    as_is = [*DUMP, "--teacher-epochs", "0"]
    nets("self.scale * x.mean(dim=(2, 3))[:, [1, 0, 2]]")
    followed_by_command(kdcache, as_is, amended)  # in the order that the images suggest
    shutil.rmtree("home")
    nets(f"({RIGHT}).softmax(dim=1)")

    def meant(command: list[str], told: str) -> list[str]:
        return [*command, re.findall(r"go on with (--[a-z-]+),", told)[0]]

    def softless(command: list[str], told: str) -> list[str]:
        assert "take out its softmax" in told
        shutil.rmtree("home/teachers")
        nets()
        return command

    followed_by_command(kdcache, as_is, meant)
    shutil.rmtree("home/archives")
    followed_by_command(kdcache, as_is, softless)


def test_a_teacher_whose_logits_are_no_numbers_is_mended(coloured: None, kdcache: Any) -> None:
    nets(f"{RIGHT} * torch.nan")

    def mended(command: list[str], told: str) -> list[str]:
        assert "check " in told or "mend its forward()" in told
        nets()
        return command

    followed_by_command(kdcache, [*DUMP, "--teacher-epochs", "0"], mended)  # told when it is tested
    nets(f"({RIGHT}).mean(dim=0, keepdim=True)")
    told = kdcache(*DUMP, "--teacher-epochs", "0", "--home", "other")
    assert "does not give one vector of logits per image" in told.err, told.err
    for wrong in (f"{RIGHT} * torch.nan", f"({RIGHT})[:5]"):
        nets(wrong)
        followed_by_command(kdcache, [*DUMP, "--teacher-epochs", "0", "-o", "o"], mended)  # when it is examined
        shutil.rmtree("o")


@pytest.mark.exhaustive
def test_a_teacher_of_other_classes_is_not_the_one_that_is_trained(coloured: None, kdcache: Any) -> None:
    assert kdcache(*TRAIN).status == 0
    other = only("teachers/*")
    shutil.copytree("images", "pictures")
    for split in ("train", "test"):
        Path(f"pictures/{split}/red").rename(f"pictures/{split}/pink")
    teacher, where = ["--teacher", "test_vit"], [*COMMON[2:], *VIEWS]
    command = ["dump-teacher", *teacher, "--dataset", "folder:pictures", *where, "--teacher-folder", str(other)]

    def trained(command: list[str], told: str) -> list[str]:
        train = shlex.split(told.partition("train one on this dataset: ")[2])[1:]
        assert run([*train, *COMMON[2:], *TRAIN[-7:]]) == 0
        return command[:-2]

    followed_by_command(kdcache, command, trained)


def test_a_head_is_trained_first_where_that_can_be(coloured: None, kdcache: Any) -> None:
    train = ["train-teacher", "--teacher", "odd_nets:Headed", *COMMON, "--policy", "none", "--epochs", "1", "-b", "8"]

    def mended(command: list[str], told: str) -> list[str]:
        assert "check the weights that it starts from" in told
        nets()
        return command

    nets(headed="2 * self.fc(x.mean(dim=(2, 3)))")
    followed_by_command(kdcache, [*train, "--head-epochs", "1"], amended)  # its head does not give the logits, as they are
    nets(headed="self.fc(torch.nan * x.mean(dim=(2, 3)))")
    followed_by_command(kdcache, [*train, "--head-epochs", "2"], mended)
    shutil.rmtree("home/teachers")
    command = [*train, "--head-epochs", "1"]
    assert kdcache(*command).status == 0
    folder = only("teachers/*/")
    shutil.rmtree(folder)
    Head({}, {"top1": 50.0}, Spent()).write(folder)  # as a command leaves it that is stopped after it
    file = folder / HEAD
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    followed_by_command(kdcache, command, amended)


@pytest.mark.exhaustive
def test_a_folder_with_another_teacher_is_named_as_it_was_or_set_aside(coloured: None, kdcache: Any) -> None:
    second = [*TRAIN, "--seed", "1"]
    for command in (TRAIN, second):
        assert kdcache(*command).status == 0
    one, other = sorted(Path("home/teachers").iterdir())

    def exchange() -> None:
        one.rename("kept")
        other.rename(one)
        Path("kept").rename(other)

    def renamed(command: list[str], told: str) -> list[str]:
        assert "give it its own name again" in told
        exchange()
        return command

    exchange()
    followed_by_command(kdcache, TRAIN, renamed)
    exchange()
    followed_by_command(kdcache, TRAIN, amended)


@pytest.mark.exhaustive
def test_processes_agree_on_a_precision(coloured: None, kdcache: Any) -> None:
    share = [*DUMP[:-2], "--teacher-epochs", "0", "--shard-rows", "8", "--shard"]
    begun = [*share, "0/2", "--precision", "fp16"]
    assert kdcache(*begun).status == 0

    def theirs(command: list[str], told: str) -> list[str]:
        assert " writes shards of theirs" in told
        return [*command, *re.findall(r"(--precision) (\S+) writes", told)[0]]

    def other(command: list[str], told: str) -> list[str]:
        return [*command, *re.findall(r"(--precision) (\S+) begins another archive", told)[0]]

    followed_by_command(kdcache, [*share, "1/2"], other)
    shutil.rmtree("home/archives")
    assert kdcache(*begun).status == 0
    followed_by_command(kdcache, [*share, "1/2"], theirs)


@pytest.mark.parametrize("torch_there", ["as here", "another"])
def test_logits_of_another_model_are_dumped_again(coloured: None, kdcache: Any, torch_there: str) -> None:
    dump = [*DUMP, "--teacher-epochs", "0"]
    assert kdcache(*dump).status == 0
    nets(f"2 * {RIGHT}")
    archive = only("archives/*")
    if torch_there == "another":
        edit_manifest(archive, lambda m: m["provenance"]["versions"].update(torch="0.1"))
    verify = ["verify", str(archive), "--replay", "4", "--home", "home", "--teacher", "odd_nets:Mean"]

    def again(command: list[str], told: str) -> list[str]:
        assert ("compare on such a device" in told) == (torch_there == "another")
        typed(told.partition("set it aside (")[2].partition(")")[0], "mv")
        assert run(dump) == 0
        return verify

    followed_by_command(kdcache, verify, again)


def test_weights_without_a_classifier_are_finetuned(coloured: None) -> None:
    config = TeacherConfig.model_validate({"teacher": NO_CLASSIFIER, "dataset": "folder:images", "epochs": [0], "canvas": 16})

    def plan(epochs: int) -> TeacherPlan:
        asked = config.model_copy(update={"epochs": (epochs,)})
        return TeacherPlan(asked, Workspace(Path("home")), Silent(), None, None)

    def finetuned(fix: str) -> int:
        words = shlex.split(fix.partition("finetune them: ")[2].partition(";")[0])
        assert words[:6] == ["kdcache", "train-teacher", "--teacher", NO_CLASSIFIER, "--dataset", "folder:images"]
        return int(words[words.index("--epochs") + 1])

    assert followed(plan, 0, finetuned).durations == [20]


# ---------------------------------------------------------------- models that are exported


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and a workspace with a student of a small teacher; only to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        pictured()
        for command in (TRAIN, ["dump-teacher", "--teacher", "test_vit", *COMMON, *VIEWS], DISTILL):
            assert run(command) == 0
    return folder


DISTILL = ["distill", "--student", "test_vit", "--tau", "4", "--epochs", "1", "--batch-size", "8", "--home", "home"]


def spoilt(change: Callable[[dict[str, Any]], object]) -> Act:
    """The run's settings are others, and timm's configuration is missing, as in runs of before it was kept."""

    def spoil() -> None:
        file = only("runs/*/*/args.yaml")
        args = yaml.safe_load(file.read_text())
        change(args)
        file.write_text(yaml.safe_dump(args))
        file.with_name("config.json").unlink()

    return spoil


def own_archive(args: dict[str, Any]) -> None:
    """An archive that tells nothing of its views, where the run says that its own is."""
    names = ("blue", "green", "red")
    archive = write_archive("own", np.random.default_rng(0).normal(0, 4, (1, 18, 3)), names)
    args.update(archive=str(archive.path.absolute()), archive_digest=archive.digest, archive_name=archive.name)


BROUGHT = "bring that archive to where it was"
EXPORTS: dict[str, tuple[Act, str]] = {
    "no archive": (spoilt(lambda args: args.update(archive="nowhere")), "bring the archive to where it was"),
    "an archive of elsewhere": (spoilt(lambda args: args.update(archive="https://host/a")), "restore config.json from a copy"),
    "another archive": (spoilt(lambda args: (own_archive(args), args.update(archive_digest="0" * 64))), BROUGHT),
    "no size": (spoilt(own_archive), "restore config.json from a copy"),
    "other tests": (spoilt(lambda args: args.update(test_views={"size": "large"})), "restore it from a copy"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["restored", "trained again"])
@pytest.mark.parametrize("case", EXPORTS)
def test_a_run_is_exported_when_the_fix_was_followed(case: str, way: str, finished: Path, kdcache: Any) -> None:
    shutil.copytree(finished, ".", dirs_exist_ok=True)
    spoil, words = EXPORTS[case]
    spoil()

    def mend(command: list[str], told: str) -> list[str]:
        assert words in told
        if way == "restored":
            shutil.copytree(finished / "home/runs", "home/runs", dirs_exist_ok=True)
            return command
        typed(told.rpartition("fix: ")[2], "mv")
        assert run([*DISTILL, "--archive", str(only("archives/*")), "--dataset", "folder:images"]) == 0
        return command

    followed_by_command(kdcache, ["export", str(only("runs/*/*/")), "--output", "e"], mend)


@pytest.mark.exhaustive
def test_what_a_function_makes_is_shared_with_it(finished: Path) -> None:
    shutil.copytree(finished, ".", dirs_exist_ok=True)
    nets()
    assert run([*DISTILL, "--student", "odd_nets:Headed", "--dataset", "folder:images"]) == 0
    folder = only("runs/*/odd*/")

    def attempt(code: str | None) -> bool:
        return bool(export(folder)) if code is None else eval(code, known) == (set(), [])

    known = {"safetensors": safetensors, "make": importlib.import_module("odd_nets").Headed}
    assert followed(attempt, None, lambda fix: fix.partition("the weights: ")[2])
