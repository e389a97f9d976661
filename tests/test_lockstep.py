"""Protects models that are trained beside others: one that fails, or cannot be saved, costs none of the others anything."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.errors import RetryError
from kdcache.system.distributed import ALONE, Team
from kdcache.system.interrupts import Stopped
from kdcache.system.progress import Silent
from kdcache.training import checkpoint, writer
from kdcache.training.lockstep import in_halves_if_needed, raise_unfit, smaller_batches, suspended_at_errors
from tests.test_learner import made, step


def test_members_that_do_not_fit_alone_are_told_after_all_others_are_trained() -> None:
    done: list[int] = []

    def train(group: list[int]) -> None:
        if sum(group) > 4:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {sum(group)} GiB.")
        done.extend(group)

    members = [9, 1, 2, 7, 3, 8]
    unfit = in_halves_if_needed(
        members, train, done.__contains__, lambda member: (f"{member} is too large", "halve it"), "numbers", ALONE, Silent()
    )
    assert sorted(done) == [1, 2, 3]
    assert [error.what for error in unfit] == ["9 is too large", "7 is too large", "8 is too large"]
    with pytest.raises(RetryError, match=r"9 is too large \(nor do 2 more of 6 numbers; all others are trained\)") as caught:
        raise_unfit(unfit, len(members), "numbers")
    assert (caught.value.why, caught.value.fix) == ("CUDA out of memory. Tried to allocate 9 GiB.", "halve it")
    raise_unfit([], len(members), "numbers")


@pytest.mark.parametrize("error", [Stopped(), torch.OutOfMemoryError("CUDA out of memory.")], ids=["stopped", "memory"])
def test_a_learner_that_cannot_be_saved_leaves_the_others_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    learners = [made(tmp_path / name) for name in "abcd"]
    for learner in learners:
        step(learner)
    write = checkpoint.write_checkpoint

    def full(folder: Path, *arguments: Any) -> None:
        if folder.name in "bc":
            raise RetryError(f"no space for {folder.name}", why="the disk is full", fix="make room")
        write(folder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_checkpoint", full)
        with pytest.raises(RetryError, match="no space for b"), suspended_at_errors(lambda: learners, ALONE):
            raise error
    assert [made(tmp_path / name).steps for name in "abcd"] == [1, 0, 0, 1], "and all folders were given back"


@pytest.mark.parametrize(
    ("size", "processes", "advice"),
    [(80, 1, "--batch-size 40"), (36, 8, "--batch-size 16"), (3, 1, "--batch-size 2"), (12, 4, "--batch-size 4")],
)
def test_smaller_batches_can_be_divided_among_the_processes(size: int, processes: int, advice: str) -> None:
    assert smaller_batches(size, Team(0, processes)).endswith(advice)


@pytest.mark.parametrize(("size", "processes"), [(2, 1), (8, 8), (3, 3)])
def test_where_there_are_no_smaller_batches_none_are_advised(size: int, processes: int) -> None:
    assert "a device with more memory" in smaller_batches(size, Team(0, processes))
