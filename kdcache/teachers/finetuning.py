"""The training of teachers of several durations in lockstep, on one stream of views."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from kdcache.importing import first_line
from kdcache.replay.stream import ViewStream
from kdcache.system.distributed import Team, this_rank
from kdcache.system.documents import parse_json
from kdcache.system.energy import UNKNOWN, Spent, total
from kdcache.system.interrupts import stopped_between_steps
from kdcache.system.progress import Progress
from kdcache.teachers.registry import Exam
from kdcache.training.devices import metered
from kdcache.training.learner import Learner
from kdcache.training.lockstep import Pace, charge, in_lockstep, suspended_at_errors
from kdcache.workspace import damaged_record, read_record

__all__ = ["cost_of", "finetune", "finished_row"]

REPORTS = 20  # times in a training


def finetune(
    learners: Sequence[Learner],
    stream: ViewStream,
    tests: Exam,
    smoothing: float,
    keep_finished: Callable[[], None],
    team: Team,
    progress: Progress,
) -> None:
    """Train all `learners` to their end. `keep_finished` is called after each epoch, in which some may have ended."""
    for note in dict.fromkeys(note for learner in learners for note in learner.notes):
        progress.say(note)
    pace, early, seen = Pace(learners), Pace(learners), 0

    def charged(some: Sequence[Learner]) -> None:
        charge(some, total(team.shared(meter.lap())))

    with (
        metered(learners[0].device, share=this_rank().share) as meter,
        suspended_at_errors(lambda: learners, team, charged),
        stopped_between_steps() as own_check,
    ):
        check = team.checked(own_check)
        for epoch, active, epochs_batches in in_lockstep(learners, lambda learner: learner, stream):
            for batch, due in epochs_batches:
                whole = team.gather(batch.label_a)

                def loss_of(logits: Tensor, labels: Tensor = whole) -> Tensor:
                    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

                for learner in due:
                    learner.step(batch.images, loss_of, lambda logits: {})
                    if team.size == 1:
                        check()
                if team.size > 1:  # which takes an exchange, and so is asked once
                    check()
                seen += 1
                if seen == 2:
                    early = Pace(learners)  # the first batches of all take longer
                elif seen == 12:
                    left = _duration(early.seconds_left)
                    progress.say(f"training takes about {left} more, without the tests after epochs")
                progress.update("train teacher", pace.done, pace.total, f"{pace.seconds_left:.0f} s left")
            testing = [learner for learner in active if learner.tests_next]
            tested = dict(zip(testing, tests.tested(testing, check) if testing else (), strict=True))
            for learner, row in tested.items():
                of = learner.config.epochs
                if epoch + 1 == of or (epoch + 1) % -(-of // REPORTS) == 0:
                    row |= tests.on_views(learner.predict)
                    check()
            charged(active)
            for learner in active:
                learner.end_epoch(tested.get(learner, {}), view=epoch)
            keep_finished()


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{seconds < 10 * size:d}f} {unit}"
    return f"{seconds:.0f} s"


def cost_of(folder: Path) -> Spent:
    """What training took, by its log; nothing is known of weights that were taken as they are."""
    log = folder / "metrics.jsonl"
    try:
        return total(Spent.of(parse_json(line)) for line in log.read_bytes().splitlines()) if log.is_file() else UNKNOWN
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged_record(log, first_line(error)) from None


def finished_row(folder: Path) -> dict[str, float] | None:
    """The last row of metrics of a training that is over; None if it is not."""
    weights = any((folder / name).is_file() for name in ("last.safetensors", "model.safetensors"))
    if not weights or not (folder / "summary.json").is_file() or (folder / "checkpoint.pt").is_file():
        return None
    if read_record(folder / "summary.json").get("status") != "complete":
        return None
    log = folder / "metrics.jsonl"
    try:
        row: dict[str, float] = dict(parse_json(log.read_bytes().splitlines()[-1]))
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise damaged_record(log, first_line(error)) from None
    return row
