"""Studies: what their files may say, which jobs they come to, and which of those a change touches."""

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcache.errors import KdcacheError, NotFoundError, UsageError
from kdcache.study import running, slots
from kdcache.study.jobs import Job, StudyPlan, plan_study
from kdcache.study.schema import Cost, DumpSpec, StatsSpec, StudentsSpec, TrainSpec, find_study, load_study, shipped
from kdcache.workspace import Workspace

SMALL: dict[str, Any] = {
    "title": "A study",
    "paper": "none",
    "question": "Does it work?",
    "varies": "temperature",
    "expected": "It does.",
    "cost": {"gpu-hours": 0, "archive-bytes": "1 MB"},
    "archives": {
        "one": {"dataset": "digits", "teacher": ["test_vit", "test_resnet"], "train": {"epochs": 2}, "dump": {"views": 3}},
    },
    "students": [{"archive": "one", "student": "test_resnet", "tau": [1, 4], "seed": "0-1", "epochs": 1}],
}


def changed(**sections: Any) -> dict[str, Any]:
    return copy.deepcopy(SMALL) | sections


def students(**options: Any) -> dict[str, Any]:
    return {**SMALL["students"][0], **options}


def table(**parts: Any) -> dict[str, Any]:
    """A table of a paper."""
    whole = {"table": "Table 1", "of": {"dataset": "pets"}, "by": ["teacher"], "across": {"tau": [1, 4]}}
    return whole | {"rows": [["rn50", 71.5, 73]]} | parts


@pytest.fixture
def planned(tmp_path: Path):
    """The jobs of a study that is written into a file."""

    def plan(data: dict[str, Any], *, smoke: bool = False) -> StudyPlan:
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(data))
        return plan_study(load_study(file, smoke=smoke), file, Workspace(tmp_path / "home"), smoke=smoke)

    return plan


def of_kind(plan: StudyPlan, kind: str) -> list[Job]:
    return [job for job in plan.jobs if job.kind == kind]


def ids(plan: StudyPlan) -> set[str]:
    return {job.id for job in plan.jobs}


def value_of(job: Job, flag: str) -> str:
    return job.arguments[job.arguments.index(flag) + 1]


# ---------------------------------------------------------------- jobs


def test_a_method_of_two_views_is_shown_twice_the_images(planned) -> None:
    plan = planned(changed(students=[students(method=["kd", "mlkd"])]))
    assert plan.images == plan.students * 1438 * 3 // 2


def test_students_share_archives_and_archives_share_teachers(planned) -> None:
    plan = planned(changed(archives={"one": {**SMALL["archives"]["one"], "dump": {"policy": ["digits", "none"], "views": 3}}}))
    assert [len(of_kind(plan, kind)) for kind in ("train", "dump", "distill", "report")] == [2, 4, 4, 1]
    assert plan.students == 4 * 2 * 2  # archives x temperatures x seeds
    assert plan.images == plan.students * 1438
    for job in plan.jobs:
        before = {other.id: other for other in plan.jobs[: plan.jobs.index(job)]}
        assert set(job.after) <= set(before), "a job stands before what it needs"
        needed = {"train": [], "dump": ["train"], "distill": ["dump"], "report": ["distill"]}[job.kind]
        assert sorted({before[name].kind for name in job.after}) == needed
    distill = of_kind(plan, "distill")[0]
    assert distill.arguments == (
        *("distill", "--archive", f"{{{distill.after[0]}}}", "--tau", "1,4", "--student", "test_resnet"),
        *("--seed", "0,1", "--epochs", "1"),
    )


def test_adding_a_temperature_or_a_seed_adds_only_students(planned) -> None:
    before = planned(SMALL)
    for more in ({"tau": [1, 4, 20]}, {"seed": [0, 1, 2]}):
        after = planned(changed(students=[students(**more)]))
        assert {job.id for job in after.jobs if job.kind in {"train", "dump"}} <= ids(before)
        assert {job.kind for job in after.jobs if job.id not in ids(before)} == {"distill", "report"}


def test_adding_a_teacher_keeps_the_jobs_of_the_others(planned) -> None:
    archive = {**SMALL["archives"]["one"], "teacher": ["test_vit", "test_resnet", "test_convnext"]}
    before, after = planned(SMALL), planned(changed(archives={"one": archive}))
    assert {job.kind for job in before.jobs if job.id not in ids(after)} == {"report"}
    assert [job.kind for job in after.jobs if job.id not in ids(before)] == ["train", "dump", "distill", "report"]


def test_the_same_options_written_otherwise_are_the_same_jobs(planned) -> None:
    before = planned(SMALL)
    block = students(tau="4, 1.0", seed=[1, 0], epochs=[1])
    block["archive"] = ["one", "one"]
    assert ids(planned(changed(students=[block]))) == ids(before)
    twice = planned(changed(students=[students(), students()]))
    assert ids(twice) == ids(before)
    assert twice.students == before.students


def test_what_a_teacher_starts_from_changes_all_that_follows(planned) -> None:
    archive = {**SMALL["archives"]["one"], "train": {"epochs": 3}}
    assert not ids(planned(SMALL)) & ids(planned(changed(archives={"one": archive})))


def test_jobs_with_students_in_common_do_not_run_at_once(planned) -> None:
    plan = planned(changed(students=[students(), students(tau=[4, 20])]))
    jobs = of_kind(plan, "distill")
    assert len(jobs) == 4
    assert sorted(job.alone for job in jobs) == sorted(2 * [name for job in jobs[:2] for name in job.after])
    assert plan.students == 2 * 3 * 2
    assert not any(job.alone for job in planned(SMALL).jobs)


def test_students_wait_for_the_models_that_they_start_from(planned) -> None:
    data = changed(students=[students(init=["random", "target"])], starts={"target": {"epochs": 1}})
    plan = planned(data)
    starts = [job for job in of_kind(plan, "train") if "--from-scratch" in job.arguments]
    assert len(starts) == 1
    assert all(starts[0].id in job.after for job in of_kind(plan, "distill"))
    assert plan.students == 2 * 2 * 2 * 2
    other = planned(data | {"starts": {"target": {"epochs": 2}}})
    assert not {job.id for job in of_kind(plan, "distill")} & ids(other)


def test_several_archives_can_be_averaged(planned) -> None:
    plan = planned(changed(students=[students(average="probabilities")]))
    (job,) = of_kind(plan, "distill")
    assert len(job.after) == 2
    assert job.arguments.count("--archive") == 2
    assert job.arguments[-2:] == ("--epochs", "1")
    assert "--average" in job.arguments


def two_views(second: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A study whose students of two views have the second one from another archive."""
    other = {**SMALL["archives"]["one"], "dump": {"view-seed": 7, "views": 3}} | (second or {})
    block = students(**{"method": "mlkd", "second-archive": "two"} | options)
    return changed(archives=SMALL["archives"] | {"two": other}, students=[block])


def test_second_views_come_from_the_archive_of_the_same_teacher(planned) -> None:
    plan = planned(two_views())
    assert [len(of_kind(plan, kind)) for kind in ("train", "dump", "distill")] == [2, 4, 2]
    dumps = {job.id: job for job in of_kind(plan, "dump")}
    for job in of_kind(plan, "distill"):
        one, two = (dumps[name] for name in job.after)
        assert one.after == two.after
        assert "--view-seed" in two.arguments
        assert job.arguments[1:5] == ("--archive", f"{{{one.id}}}", "--second-archive", f"{{{two.id}}}")
    assert ids(planned(two_views(**{"second-archive": "one"}))) != ids(plan)
    assert plan.students == 2 * 2 * 2


def test_students_of_other_second_views_are_others_and_those_of_one_view_the_same(planned) -> None:
    data = two_views()
    data["archives"] |= {"three": {**SMALL["archives"]["one"], "dump": {"view-seed": 5, "views": 3}}}
    same: dict[str, Any] = {"method": ["kd", "mlkd"], "tau": 1, "seed": 0}
    plan = planned(data | {"students": [students(**same, **{"second-archive": name}) for name in ("two", "three")]})
    assert plan.students == 2 * (1 + 2)  # for each teacher: one of kd, and of mlkd one for each archive
    assert all(job.alone for job in of_kind(plan, "distill")), "those of kd are in two jobs"


def test_one_archive_of_second_views_serves_all_teachers(planned) -> None:
    plan = planned(two_views({"teacher": "test_convnext"}))
    jobs = of_kind(plan, "distill")
    assert len(jobs) == 2
    assert len({job.after[1] for job in jobs}) == 1
    (job,) = of_kind(planned(two_views({"teacher": "test_convnext"}, average="logits")), "distill")
    assert len(job.after) == 3
    assert job.arguments.count("--archive") == 2


def test_figures_of_archives_need_no_students(planned) -> None:
    plan = planned(changed(students=[], stats={"tau": [1, 40]}))
    assert [job.kind for job in plan.jobs if job.kind not in {"train", "dump"}] == ["stats", "stats", "report"]
    report = of_kind(plan, "report")[0]
    assert {name.strip("{}") for name in report.arguments[1:3]} == {job.id for job in of_kind(plan, "dump")} == set(report.after)
    assert "1,40" in of_kind(plan, "stats")[0].arguments


def test_the_smoke_version_replaces_options_and_single_values(planned) -> None:
    smoke = {
        "archives": {"teacher": {"test_vit": "test_vit2"}},
        "train": {"epochs": 1},
        "dump": {"views": None, "view-seed": 7},
        "students": {"tau": {4: 20}},
    }
    plan = planned(changed(smoke=smoke), smoke=True)
    assert [job.arguments[2] for job in of_kind(plan, "train")] == ["test_vit2", "test_resnet"]
    assert all(job.arguments[-2:] == ("--epochs", "1") for job in of_kind(plan, "train"))
    assert all("--views" not in job.arguments and "--view-seed" in job.arguments for job in of_kind(plan, "dump"))
    assert all("1,20" in job.arguments for job in of_kind(plan, "distill"))
    assert len(plan.jobs) == len(planned(SMALL).jobs)


@pytest.mark.exhaustive
def test_ten_thousand_students_are_planned(planned) -> None:
    block = students(tau=[1 + n / 10 for n in range(50)], seed="0-24", control=["none", "ls-global", "bottom:2", "bottom:3"])
    assert planned(changed(students=[block])).students == 10_000


# ---------------------------------------------------------------- files that are wrong


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"students": [students(taus=[1])]}, "unknown field students.0.taus"),
        ({"students": [students(archive="two")]}, "'two'"),
        ({"students": [students(tau=["warm"])]}, "students.0.tau = ['warm']"),
        ({"students": [students(tau=[1e9])]}, "tau 1e+09"),
        ({"students": [students(seed="3-1")]}, "students.0.seed"),
        ({"students": [students(method="kdd")]}, "unknown method 'kdd'"),
        ({"students": [students(control="bottom:99")]}, "99"),
        ({"students": [students(control="ls-global", method="maxlogit", tau=None)]}, "maxlogit with --control ls-global"),
        ({"students": [students(preset="paper:kd:cifar10")]}, "preset"),
        ({"students": [students(init="target")]}, "starts.target"),
        ({"students": [students(opt="adamm")]}, "adamm"),
        ({"students": []}, "without students"),
        ({"archives": {"one": {"dataset": "digit", "teacher": "test_vit"}}}, "unknown dataset 'digit'"),
        ({"archives": {"one": {"dataset": "digits", "teacher": "test_vti"}}}, "test_vti"),
        ({"archives": {"one": {"dataset": "digits", "teacher": "test_vit", "dump": {"codec": "i15"}}}}, "unknown codec 'i15'"),
        ({"archives": {"one": {"dataset": "digits", "teacher": "test_vit", "train": {"recipe": "crb"}}}}, "unknown recipe"),
        ({"archives": {"one": {"dataset": "digits", "teacher": "test_vit", "train": {"epoch": 1}}}}, "archives.one.train.epoch"),
        ({"archives": {}}, "archives"),
        ({"published": [table(by=["models"])]}, "unknown field of published Table 1 'models'"),
        ({"published": [table(rows=[["rn50", 71.5]])]}, "is not teacher and 2 accuracies in percent"),
        ({"published": [table(rows=[["rn50", 71.5, 715]])]}, "is not teacher and 2 accuracies in percent"),
        ({"published": [table(rows=[["rn50", "many", 71]])]}, "is not teacher and 2 accuracies in percent"),
        ({"students": [students(**{"second-archive": "two"})]}, "unknown second-archive in students.0 'two'"),
        ({"students": [students(**{"second-archive": "one"})]}, "without a method of two views"),
        (two_views({"dataset": "cifar10"}), "second-archive two is 0 archives for students of 3 views of test_vit on digits"),
        (two_views({"dump": {"policy": ["none", "digits"]}}), "second-archive two is 2 archives"),
        (two_views(average="logits"), "second-archive two is 2 archives"),
        (two_views({"size": 16}), "the views of archive test_vit on digits do not go with those of test_vit on digits"),
        (two_views({"dump": {"policy": "none"}}), "archive test_vit on digits, policy none do not go"),
        ({"cost": {"gpu-hours": "many", "archive-bytes": 1}}, "cost.gpu-hours = many"),
        ({"title": None}, "title"),
    ],
)
def test_what_is_wrong_is_named(planned, change: dict[str, Any], said: str) -> None:
    with pytest.raises(KdcacheError) as raised:
        planned(changed(**change))
    assert said in raised.value.what
    assert len(str(raised.value).splitlines()) == 3


def test_a_close_match_is_offered_for_a_field(planned) -> None:
    with pytest.raises(UsageError) as raised:
        planned(changed(students=[students(taus=[1])]))
    assert "close to it: tau" in raised.value.why


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"students": [students(sched="cosin")]}, "use 'cosine' or 'step'"),
        ({"students": [students(epochs=0)]}, "give a number that is at least 1"),
        ({"students": [students(epochs="x")]}, "write for example 1-3"),
        ({"students": [students(amp="perhaps")]}, "give true or false"),
        ({"students": [students(student=[])]}, "give at least 1"),
        ({"students": "x"}, "give a list, such as [a, b]"),
        ({"archives": {"one": "digits"}}, "write fields with their values, such as dataset: ..., teacher: ..., size: ..."),
    ],
)
def test_how_to_write_it_is_said(planned, change: dict[str, Any], fix: str) -> None:
    with pytest.raises(UsageError) as raised:
        planned(changed(**change))
    assert raised.value.fix == fix


def test_a_studys_paper_has_numbers_for_its_report_but_not_for_the_smoke_versions(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(changed(published=[table(), table(by=["student"], rows=[["rn18", None, 70]])])))
    numbers = load_study(file).experiment(smoke=False).published
    found = [(*number.facts, number.table, number.top1) for number in numbers]
    fine = ("dataset", "pets"), ("teacher", "rn50")
    assert found[:2] == [(*fine, ("tau", "1"), "Table 1", 71.5), (*fine, ("tau", "4"), "Table 1", 73.0)]
    assert found[2:] == [(("dataset", "pets"), ("student", "resnet18.a1_in1k"), ("tau", "4"), "Table 1", 70.0)]
    assert load_study(file, smoke=True).experiment(smoke=True).published == ()


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    for number, text in enumerate(("- a\n", "a: [", "{" * 100_000, "\x00")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        with pytest.raises(UsageError, match="is not one"):
            load_study(file)
    with pytest.raises(NotFoundError, match="unknown study 'quickstrat'") as raised:
        find_study("quickstrat")
    assert "quickstart" in raised.value.fix


@pytest.mark.parametrize("name", ["mine.yaml", "studies/mine", "../mine.yml"])
def test_a_file_that_is_not_there_is_not_taken_for_a_name(name: str) -> None:
    with pytest.raises(NotFoundError) as raised:
        find_study(name)
    assert raised.value.what == f"no study at {name}"
    assert "controls" in raised.value.fix


# Options that a study does not have: it sets them itself for each job, or they are the machine's (set in the environment).
OF_A_STUDY = {
    "train-teacher": {"--teacher", "--dataset", "--size", "--canvas", "--parallel", "--force"},
    "dump-teacher": {"--teacher", "--dataset", "--size", "--canvas", "--teacher-folder", "--teacher-epochs", "--checkpoint"}
    | {"--classes", "--finetune", "--output", "--shard", "--start-view", "--force"},
    "distill": {"--dataset", "--strict", "--allow-drift", "--checkpoint-interval", "--memory", "--parallel"},
    "stats": {"--rows", "--fidelity", "--codec", "--plot"},
}
OF_THE_MACHINE = {"--device", "--workers", "--renderer", "--home", "--data-dir", "--config", "--skip-corrupt", "--allow-large"}
OF_THE_MACHINE |= {"--dry-run", "--json", "--help"}


# Commands that no job of a study runs.
BY_HAND = {"kdcache", "quickstart", "finalize", "convert", "plan", "ls", "info", "view", "verify", "diff", "push", "pull", "sign"}
BY_HAND |= {"export", "study", "study run", "study plan", "study job"}
BY_HAND |= {"models", "datasets", "methods", "policy", "doctor", "bench"}


def test_every_command_is_run_by_studies_or_by_hand() -> None:
    from tests.test_architecture import command_line

    lines = command_line()
    assert set(lines) == BY_HAND | {*OF_A_STUDY, "report"}
    flags = {option.split()[0] for option in lines["report"]} - OF_THE_MACHINE
    assert flags == {"runs", "--output", "--study", "--smoke"}, "a study says all of this itself"


@pytest.mark.parametrize(
    ("spec", "command"),
    [(TrainSpec, "train-teacher"), (DumpSpec, "dump-teacher"), (StudentsSpec, "distill"), (StatsSpec, "stats")],
)
def test_every_option_of_a_command_is_in_the_schema_or_set_by_the_study_itself(spec: Any, command: str) -> None:
    from tests.test_architecture import command_line

    flags = {option.split()[0] for option in command_line()[command] if option.startswith("-")}
    fields = {f"--{name.replace('_', '-')}" for name in spec.model_fields}
    assert flags - OF_THE_MACHINE - fields == OF_A_STUDY[command]
    assert fields <= flags


# ---------------------------------------------------------------- the studies that kdcache brings


def test_there_is_a_study_for_every_experiment() -> None:
    assert set(shipped()) == {
        *("kd_approach", "training_configuration", "softmax_shape", "controls", "teacher_origination", "pretraining"),
        *("student_initialization", "granularity", "logit_standardization", "max_logit", "ttm", "quickstart"),
        *(f"logit_standardization_{what}" for what in ("imagenet", "scores", "teachers")),
        *("ttm_regularization", "ttm_entropy", "ttm_imagenet", "ttm_vit"),
    }


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in {"controls", "ttm", "quickstart"} else pytest.mark.exhaustive) for name in shipped()],
)
def test_shipped_studies_can_be_planned(name: str, tmp_path: Path) -> None:
    file = find_study(name)
    study, small = load_study(file), load_study(file, smoke=True)
    assert all((study.title, study.paper, study.question, study.varies, study.expected))
    plan, smoke = (plan_study(one, find_study(name), Workspace(tmp_path)) for one in (study, small))
    assert {job.kind for job in plan.jobs} == {job.kind for job in smoke.jobs}
    assert not smoke.missing
    if plan.archive_bytes is not None:
        assert 0.9 < study.cost.archive_bytes / plan.archive_bytes < 1.2 or name == "quickstart"
    trained = {job.arguments[2] for job in of_kind(smoke, "train")}
    trained |= {one for job in of_kind(smoke, "distill") for one in value_of(job, "--student").split(",")}
    assert all(model.startswith("test_") for model in trained), "the smoke version is tiny"
    assert {job.arguments[4] for job in of_kind(smoke, "train")} == {"digits"}
    assert smoke.images is not None
    assert smoke.images < 500_000


@pytest.mark.parametrize(
    ("name", "weak", "views"), [("logit_standardization", "crd", 480), ("logit_standardization_imagenet", "imagenet-plain", 100)]
)
def test_mlkds_second_view_is_randaugments_of_the_same_teacher(name: str, weak: str, views: int, tmp_path: Path) -> None:
    plan = plan_study(load_study(find_study(name)), find_study(name), Workspace(tmp_path))
    dumps = {job.id: job for job in of_kind(plan, "dump")}
    trained = {job.id: job for job in of_kind(plan, "train")}
    seconds = [job for job in of_kind(plan, "distill") if "mlkd" in " ".join(job.arguments)]
    assert seconds
    assert not [job for job in of_kind(plan, "distill") if "--second-archive" in job.arguments and job not in seconds]
    for job in seconds:
        first, second = (dumps[value_of(job, flag).strip("{}")] for flag in ("--archive", "--second-archive"))
        assert first.after == second.after
        assert value_of(first, "--policy") == weak
        assert value_of(second, "--policy") == f"{weak}:randaugment.n=2,randaugment.m=10"
        assert "--view-seed" not in first.arguments
        assert value_of(second, "--view-seed") == "1", "crops and flips are its own"
        assert value_of(first, "--views") == value_of(second, "--views") == str(views)
        if name.endswith("imagenet"):
            (teacher,) = (trained[one] for one in first.after)
            assert value_of(teacher, "--teacher") in {"tv_rn34", "tv_rn50"}
            assert value_of(teacher, "--epochs") == "0"


OF_S000 = ("kd_approach", "training_configuration", "controls", "softmax_shape", "teacher_origination", "student_initialization")
OF_S000 += ("pretraining",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in {"controls", "softmax_shape"} else pytest.mark.exhaustive) for name in OF_S000],
)
def test_the_temperature_study_is_planned_at_224_px_and_its_hours_are_those_of_its_images(name: str, tmp_path: Path) -> None:
    study = load_study(find_study(name))
    plan = plan_study(study, find_study(name), Workspace(tmp_path))
    for job in of_kind(plan, "train") + of_kind(plan, "dump"):
        size = value_of(job, "--size") if "--size" in job.arguments else "the policy's"
        assert size == ("224" if value_of(job, "--dataset") == "cifar100" else "the policy's")
    assert plan.images is not None
    students = plan.images / 2000 / 3600  # as the study's note has it
    assert students <= study.cost.gpu_hours <= 1.05 * students + 5
    assert not plan.students or "2,000 views of 224 px" in study.cost.note


def test_the_loss_with_and_without_tau_squared_is_trained_where_the_temperature_is_asked_for() -> None:
    both, bare = ("kd", "kd:tau_squared=0"), ("kd:tau_squared=0",)
    for name in ("training_configuration", "teacher_origination", "student_initialization", "granularity", "pretraining"):
        assert {block.method for block in load_study(find_study(name)).students} == {both}
    assert {block.method for block in load_study(find_study("controls")).students} == {bare}
    (block,) = load_study(find_study("kd_approach")).students
    assert "kd" not in block.method
    assert {*bare, "kd:tau_squared=0,student_tau=1"} < set(block.method)


def test_images_that_are_not_there_are_missed_when_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_study(load_study(find_study("granularity")), find_study("granularity"), Workspace(tmp_path))
    with pytest.raises(NotFoundError, match=r"there is no .*/imagenet-birds"):
        running.run_study(plan, Workspace(tmp_path), file=find_study("granularity"))


def test_without_snakemake_it_says_what_to_install(planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError) as raised:
        running.run_study(planned(SMALL), Workspace(tmp_path), file=tmp_path / "study.yaml")
    assert raised.value.fix == "pip install 'kdcache[grid]'"


# ---------------------------------------------------------------- GPUs


def test_jobs_at_once_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(slots, "PATIENCE", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-abc")
    assert slots.gpus() == ["2", "GPU-abc"]
    with slots.gpu_slot(slots.gpus()) as first:
        with slots.gpu_slot(slots.gpus()) as second:
            assert {first.gpu, second.gpu} == {"2", "GPU-abc"}
            third: list[str] = []

            def wait() -> None:
                with slots.gpu_slot(slots.gpus()) as slot:
                    third.append(slot.gpu)

            waiting = threading.Thread(target=wait)
            waiting.start()
            time.sleep(0.1)
            assert third == []
        waiting.join(timeout=10)
        assert third == [second.gpu]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots.gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234,0,MIG-1234,-1,2")
    assert slots.gpus() == ["MIG-1234", "0"], "CUDA sees nothing from the first on that is no GPU"


def test_jobs_at_once_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [running.threads_for(jobs)["KDCACHE_THREADS"] for jobs in (1, 3, 8, 64)] == ["", "2", "1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert [running.threads_for(jobs)["KDCACHE_THREADS"] for jobs in (1, 8)] == ["5", "5"], "the user knows better"


@pytest.mark.parametrize(("threads", "seen"), [("", None), ("3", "3")])
def test_snakemake_does_not_decide_about_threads(monkeypatch: pytest.MonkeyPatch, threads: str, seen: str | None) -> None:
    for name in running.LIBRARIES:
        monkeypatch.setenv(name, "1")  # as Snakemake does
    monkeypatch.setenv("KDCACHE_THREADS", threads)
    found = running._own_environment()
    assert (found.get("OMP_NUM_THREADS"), found.get("MKL_NUM_THREADS")) == (seen, None)
    monkeypatch.delenv("KDCACHE_THREADS")
    assert running._own_environment()["OMP_NUM_THREADS"] == "1", "a job that is started by hand sees what it was given"


def test_costs_are_read_with_their_units() -> None:
    assert Cost.model_validate({"gpu-hours": 1, "archive-bytes": "1.5 GB"}).archive_bytes == 1_500_000_000
