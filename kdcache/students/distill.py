"""distill: train many students in lockstep from one stream of cached targets.

Every combination of student, method, control and tau that shares an archive, a batch size and a seed sees the very same
batches, fetched, rendered and checked once. What each of them becomes is what it would have become alone.
"""

import contextlib
import itertools
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.archive import Ensemble
from kdcache.datasets.canvas import Canvas, require_intact
from kdcache.datasets.classes import how_classes_differ
from kdcache.errors import IncompatibleError, RetryError, UsageError
from kdcache.replay.chunks import rendering_memory
from kdcache.replay.contact_sheet import contact_sheet
from kdcache.replay.stream import CachedTargets
from kdcache.replay.subject import Subject
from kdcache.report.records import SHEET
from kdcache.students.config import DistillConfig
from kdcache.students.grid import StudentSpec, doubts, open_archives, plan_students
from kdcache.students.records import require_own
from kdcache.students.student import Shown, Student
from kdcache.system.distributed import ALONE, Team, joined, this_rank
from kdcache.system.energy import Meter, total
from kdcache.system.files import write_atomically
from kdcache.system.interrupts import stopped_between_steps
from kdcache.system.progress import Progress, Silent
from kdcache.system.remote import is_url
from kdcache.system.room import sizes
from kdcache.training.checkpoint import tidy
from kdcache.training.devices import enough_memory, metered, resolve_device
from kdcache.training.evaluation import EvalSets, evaluated
from kdcache.training.graphs import Lanes
from kdcache.training.learner import Learner
from kdcache.training.lockstep import (
    Pace,
    charge,
    in_halves_if_needed,
    in_lockstep,
    raise_unfit,
    smaller_batches,
    suspended_at_errors,
)
from kdcache.training.memory import Footprint, footprint, groups_that_fit, room
from kdcache.training.outputs import TEACHER_OUTPUTS, TEST_OUTPUTS
from kdcache.workspace import Workspace, archive_source, dataset_label, read_record, require_writable

__all__ = ["StudentResult", "StudentSpec", "distill"]


MUCH_TESTING = 0.02  # of the time of an epoch
MOST_LANES = 8  # streams of a GPU in which students step side by side
OTHER_FILES = 256  # that a process may have open at most: libraries, GPUs, shards, workers, what is being written
FEWEST_FILES = 64  # of which a process on a CPU makes do, with a few workers


@dataclass(frozen=True)
class StudentResult:
    """Where a student is and how it did; `summary` is its `summary.json`."""

    spec: StudentSpec
    summary: dict[str, Any]


def distill(config: DistillConfig, workspace: Workspace, progress: Progress | None = None) -> list[StudentResult]:
    """Train every student of the grid that is not trained yet; returns all of them, in the order of the grid.

    Of several processes that torchrun started, each trains some of the students, or all of them train every student together.
    """
    progress = progress or Silent()
    device = resolve_device(config.runtime.device)  # better refused before anything is decoded
    if config.runtime.graph and device.type != "cuda":
        raise UsageError(
            f"--graph on a {device.type}",
            why="CUDA graphs are replayed by NVIDIA's and AMD's GPUs",
            fix="leave --graph out; or name a GPU, if there is one: --device cuda",
        )
    beforehand = enough_memory(  # what comes before training, or beside it
        f"no memory is left on {device} or its host",
        fix=f"end what else uses it, or train fewer students at once (--memory {max(1, room(device) >> 31)}GB)",
    )
    with joined(this_rank(), device) as team, beforehand:
        return _distill(config, workspace, progress if team.first else Silent(), device, team)


def _distill(
    config: DistillConfig, workspace: Workspace, progress: Progress, device: torch.device, team: Team
) -> list[StudentResult]:
    archive, second = open_archives(config, workspace, progress)
    specs = planned(config, archive, second, workspace)
    epochs = specs[0].settings.epochs
    if not all(map(_is_trained, specs)):
        require_writable(workspace.runs)
    for spec in specs:
        require_own(spec, archive)
    with team.first_alone():
        train, test = _canvases(config, archive, workspace, progress)
    size = archive.manifest.policy.size if archive.manifest.policy else train.size
    for doubt in doubts(specs, config.grid, size):
        progress.say(doubt)
    if epochs > archive.num_views:
        progress.say(f"{epochs} epochs over {archive.num_views} views: the views are shown again, each cycle in a new order")
    fresh = team.shared([not _is_trained(spec) for spec in specs])[0]  # one opinion for all
    todo = [spec for spec, is_fresh in zip(specs, fresh, strict=True) if is_fresh]
    if len(todo) < len(specs):
        progress.say(f"{len(specs) - len(todo)} of {len(specs)} students are trained already")
        if team.first:
            for spec, is_fresh in zip(specs, fresh, strict=True):
                if not is_fresh:
                    tidy(spec.folder)
    if todo:
        todo.sort(key=lambda spec: spec.order_seed)
        together = team
        if team.size > 1 and _by_students(config, len(todo), team.size):
            progress.say(f"{team.size} processes: each trains {len(todo) / team.size:.3g} of {len(todo)} students")
            share = [len(todo) * number // team.size for number in (team.number, team.number + 1)]
            todo, together = todo[slice(*share)], ALONE
        elif team.size > 1:
            progress.say(f"{team.size} processes: each has {specs[0].settings.batch_size // team.size} views of every batch")
        runtime = config.runtime
        evaluations = EvalSets(test, workers=runtime.workers, renderer=runtime.renderer, device=device, team=together)
        if team.first:
            _write_sheet(archive, train, workspace.runs / archive.name / SHEET, config.allow_drift)
            _keep_teachers_outputs(archive, workspace)
        rendering = rendering_memory(len(train), train.size, size, device) + evaluations.to_come
        available = room(device, runtime.memory, rendering)
        if device.type == "cpu":
            available //= team.size  # of a host, for all of them
        groups = _groups(todo, archive.num_classes, size, device, min(together.shared(available)), progress)
        unfit: list[RetryError] = []
        with team.apart() if together is ALONE else contextlib.nullcontext():
            for number, group in enumerate(groups, 1):
                task = f"distill {number}/{len(groups)}" if len(groups) > 1 else "distill"

                def trained(part: list[StudentSpec], task: str = task) -> None:
                    _Lockstep(task, part, config, archive, second, train, evaluations, device, together, progress).run()

                def too_large(spec: StudentSpec) -> tuple[str, str]:
                    return _too_large(spec, device, together)

                unfit += in_halves_if_needed(group, trained, _is_trained, too_large, "students", together, progress)
        team.wait()  # for a process that fails before, torchrun would end all others
        if together is ALONE:
            unfit = list(itertools.chain.from_iterable(team.shared(unfit)))
        raise_unfit(unfit, fresh.count(True), "students")
    return [StudentResult(spec, read_record(spec.folder / "summary.json")) for spec in specs]


def _is_trained(spec: StudentSpec) -> bool:
    return (spec.folder / "summary.json").is_file()


def _too_large(spec: StudentSpec, device: torch.device, team: Team) -> tuple[str, str]:
    """What happened to a student that does not fit into memory by itself, and how to mend it."""
    size = spec.settings.batch_size
    return (
        f"student {spec.title} does not fit into the memory of {device}, with batches of {size}",
        f"end what else uses it, or train it on {smaller_batches(size, team)}; --memory would only limit how many train at once",
    )


def planned(config: DistillConfig, archive: Ensemble, second: Ensemble, workspace: Workspace) -> list[StudentSpec]:
    """The students of a configuration, whose archives are open."""
    other = None if config.second_archive is None else Subject.of(second)
    return plan_students(config.grid, Subject.of(archive), workspace, second=other, dataset=config.dataset)


def _by_students(config: DistillConfig, students: int, processes: int) -> bool:
    """Whether processes divide the students among them, which needs no exchange and changes no result; or else every batch."""
    return config.runtime.parallel == "students" or (config.runtime.parallel == "auto" and students >= processes)


def _groups(
    specs: Sequence[StudentSpec], num_classes: int, size: int, device: torch.device, available: int, progress: Progress
) -> list[list[StudentSpec]]:
    """Students that are trained at once: those that see the same batches, as many as fit into `available` bytes."""
    groups = []
    for seed, students in itertools.groupby(specs, key=lambda spec: spec.order_seed):
        together = list(students)
        if len(together) == 1:
            groups.append(together)
            continue
        needed = _needed(together, num_classes, size, device)
        total = sum(each.kept for each in needed) + max(each.passing for each in needed)
        if total > available:
            wanted, there = sizes(total, available)
            progress.say(
                f"{len(together)} students on the stream of seed {seed} would take about {wanted}, "
                f"of {there} that there are: they are trained in groups, one after another"
            )
        groups += [together[part] for part in groups_that_fit(needed, available)]
    return groups


def _needed(specs: Sequence[StudentSpec], num_classes: int, size: int, device: torch.device) -> list[Footprint]:
    return [
        footprint(spec.name, num_classes, spec.size or size, spec.settings, views=spec.method.views_per_step, device=device)
        for spec in specs
    ]


class _Lockstep:
    """Students that see the same batches. Each keeps its own epoch, so that one added later catches up with views of its own."""

    def __init__(
        self,
        task: str,
        specs: list[StudentSpec],
        config: DistillConfig,
        archive: Ensemble,
        second: Ensemble,
        train: Canvas,
        evaluations: EvalSets,
        device: torch.device,
        team: Team,
        progress: Progress,
    ) -> None:
        self.archive, self.second, self.device, self.team = archive, second, device, team
        self.progress = progress
        self._told = False
        self.task, self.epochs = task, specs[0].settings.epochs
        self.stream = CachedTargets(
            archive,
            train,
            specs[0].settings.batch_size,
            specs[0].order_seed,
            str(device),
            workers=config.runtime.workers,
            renderer=config.runtime.renderer,
            allow_drift=config.allow_drift,
            progress=progress,
            second=second if any(spec.method.views_per_step == 2 for spec in specs) else None,
            part=(team.number, team.size),
        )
        _allow_open_files(len(specs))
        lanes = self._lanes(specs, config, train, evaluations.to_come)
        self.students: list[Student] = []
        with suspended_at_errors(lambda: [student.learner for student in self.students], team):
            for spec in specs:
                shared = (archive, second, evaluations, self.stream, device, team, progress, lanes)
                self.students.append(Student(spec, config, *shared))
        for note in dict.fromkeys(note for student in self.students for note in student.notes):
            progress.say(note)
        for description in dict.fromkeys(student.description for student in self.students):
            progress.say(f"student {description}")

    def _lanes(self, specs: Sequence[StudentSpec], config: DistillConfig, train: Canvas, tests: int) -> Lanes | None:
        """Streams for students whose steps are graphs: as many as there is memory for, as steps in each need their own.

        Tests are going to take `tests` bytes of it.
        """
        if self.device.type != "cuda" or config.runtime.graph is False:
            return None
        count, size = 1, self.stream.policy.size
        if len(specs) > 1:
            needed = _needed(specs, self.archive.num_classes, size, self.device)
            rendering = rendering_memory(len(train), train.size, size, self.device) + tests
            spare = room(self.device, config.runtime.memory, rendering) - sum(each.kept for each in needed)
            # One more step's memory is for proofs, which do a step both ways.
            count = max(1, min(MOST_LANES, len(specs), spare // max(each.passing for each in needed) - 1))
        return Lanes.of(self.device, count)

    def run(self) -> None:
        """Train all students to their end. Ctrl-C and SIGTERM are obeyed between two steps, after a checkpoint of each.

        After an error that memory does not suffice, students are where they were before the step that failed, or have
        their last checkpoint.
        """
        with (
            metered(self.device, share=this_rank().share) as meter,
            suspended_at_errors(
                lambda: [student.learner for student in self.students],
                self.team,
                lambda learners: self._charge(learners, meter),
            ),
            stopped_between_steps() as check,
        ):
            self._train(self.team.checked(check), meter)
        if self.stream.drifted:
            self.progress.say(f"{self.stream.drifted} views had drifted within the allowed levels")

    def _charge(self, learners: Sequence[Learner], meter: Meter) -> None:
        """Count what all processes of the team have spent since the last time."""
        charge(learners, total(self.team.shared(meter.lap())))

    def _train(self, check: Callable[[], None], meter: Meter) -> None:
        pace = Pace([student.learner for student in self.students])
        for epoch, active, batches in in_lockstep(self.students, lambda student: student.learner, self.stream):
            begun = time.monotonic()
            for batch, due in batches:
                shown = [Shown(each, self.team, self.stream.policy) for each in (batch, batch.second) if each is not None]
                for student in due:
                    student.step(shown)
                    if self.team.size == 1:
                        check()
                for news in dict.fromkeys(filter(None, [student.news() for student in due])):
                    self.progress.say(news)
                if self.team.size > 1:  # which takes an exchange, and so is asked once
                    check()
                note = f"epoch {epoch + 1}/{self.epochs}, {pace.seconds_left:.0f} s left"
                self.progress.update(self.task, pace.done, pace.total, note)
            learners = [student.learner for student in active]
            trained = time.monotonic()
            evaluations = [student.evaluation for student in active]
            tests = evaluated(evaluations, learners, check) if learners[0].tests_next else [{} for _ in learners]
            self._say_what_tests_take(time.monotonic() - trained, time.monotonic() - begun, learners[0])
            self._charge(learners, meter)
            figures: dict[str, float] = {"view": self.stream.view(epoch), "batch_order": self.stream.order_digest(epoch)}
            if self.stream.allow_drift:
                figures["drifted_views"] = sum(self.team.shared(self.stream.drifted))
            for student, row in zip(active, tests, strict=True):
                two = student.spec.method.views_per_step == 2
                other = {"second_view": self.stream.second_view(epoch)} if two else {}
                if student.learner.epoch + 1 == self.epochs:
                    student.keep_outputs()
                student.learner.end_epoch(row, **figures, **other)
                if student.learner.status == "diverged":
                    self.progress.say(f"stopped, its loss is not finite: {student.spec.title}")
            self.progress.table(*self._standing())
        self.progress.table((), ())

    def _say_what_tests_take(self, tested: float, epoch: float, learner: Learner) -> None:
        """Say once what testing costs, in seconds of an epoch, where that is much and will take long."""
        share, often = tested / epoch, learner.config.val_interval == 1
        left = (self.epochs - learner.epoch) * tested
        if often and not self._told and share > MUCH_TESTING and left > 60:
            seldom = math.ceil(share / MUCH_TESTING)
            cost = f"tests take {share:.0%} of the time, {left / 60:.0f} min to come"
            self.progress.say(f"{cost}; --val-interval {seldom} makes that {share / seldom:.0%}")
            self._told = True

    def _standing(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Every student's latest figures."""
        rows = []
        for student in self.students:
            learner = student.learner
            tests = [row["test_top1"] for row in learner.rows if "test_top1" in row]
            figures = [f"{learner.last['train_loss']:.4g}", f"{learner.last['agreement']:.1f}"] if learner.rows else ["", ""]
            tops = [f"{tests[-1]:.2f}", f"{max(tests):.2f}"] if tests else ["", ""]
            rows.append([student.spec.title, str(learner.epoch), *figures, *tops, learner.status])
        return ("student", "epoch", "loss", "agreement", "top-1", "best", "state"), rows


def _allow_open_files(students: int) -> None:
    """Raise this process's limit of open files where students, each of which keeps its folder locked, need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, fewest = students + OTHER_FILES, students + FEWEST_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY:
            needed = min(needed, hard)
        if needed < fewest:
            raise UsageError(
                f"{students} students of one seed",
                why=f"they need {fewest} open files, and this system allows {hard}",
                fix="train fewer at once (give --tau, --method, --control or --student fewer values), or raise ulimit -n",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))


def _canvases(config: DistillConfig, archive: Ensemble, workspace: Workspace, progress: Progress) -> tuple[Canvas, Canvas]:
    source = archive_source(archive, workspace, config.dataset)
    recorded = archive.manifest.canvas
    size = recorded.size if recorded else None
    train, test = (workspace.canvas(source, split, size, progress) for split in ("train", "test"))
    require_intact(test)  # views of the training images are compared one by one; those of the test images have only this
    for canvas in (train, test):
        if not (difference := how_classes_differ(archive.class_names, canvas.card.class_names)):
            continue
        raise IncompatibleError(
            f"archive {archive.location} has other classes than {dataset_label(source)}",
            why=difference,
            fix="name the dataset that was dumped with --dataset, or dump this one",
        )
    if recorded and recorded.digest != train.digest:
        progress.say("the decoded images differ from those of the dump; every view will be compared with what the teacher saw")
    return train, test


def _keep_teachers_outputs(archive: Ensemble, workspace: Workspace) -> None:
    """Beside the archive's runs, what its teacher says of some test images, where that teacher is here; for the report."""
    file = workspace.runs / archive.name / TEACHER_OUTPUTS
    card = archive.manifest.teacher
    if file.is_file() or card is None or len(archive.members) > 1:  # an average has no features
        return
    for folder, record in workspace.teacher_records(Silent()):
        same = (record["weights_sha256"], tuple(record["class_names"])) == (card.weights_sha256, archive.class_names)
        if same and (folder / TEST_OUTPUTS).is_file():
            write_atomically(file, (folder / TEST_OUTPUTS).read_bytes())
            return


def _write_sheet(archive: Ensemble, canvas: Canvas, file: Path, allow_drift: int) -> None:
    """A contact sheet of the archive's views, for the report."""
    if file.is_file() or archive.manifest.policy is None:
        return
    samples = np.linspace(0, archive.num_samples - 1, num=min(6, archive.num_samples), dtype=np.int64)
    elsewhere = any(is_url(member.location) for member in archive.members)
    views = archive.views[: 1 if elsewhere else 8]  # a view may be gigabytes to fetch
    write_atomically(file, contact_sheet(archive, canvas, samples, views, allow_drift=allow_drift))
