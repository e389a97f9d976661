"""Protects tests of models in training: figures are those of all logits together, and a GPU is waited for once."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.archive import EntropyHistogram
from kdcache.datasets.canvas import Canvas
from kdcache.stats import relative_entropy
from kdcache.training import evaluation
from kdcache.training.evaluation import EvalSet, EvalSets
from kdcache.views import ViewPolicy
from tests.stand_ins import launched, stand_in_gpu

POLICY = ViewPolicy.load("none", size=16)


def model(device: torch.device | str, outputs: list[Tensor] | None = None) -> Any:
    """What a test needs of a learner: it answers with `outputs`, one batch after another, or with any logits on its device."""
    answers = iter(outputs or [])

    def predict(views: Tensor, *, averaged: bool = False) -> Tensor:
        return next(answers) if outputs else torch.empty(len(views), 7, device=device)

    unfinished: dict[str, Any] = {"epoch": 0, "config": SimpleNamespace(epochs=2)}
    return SimpleNamespace(device=torch.device(device), average=None, settle=lambda: None, predict=predict, **unfinished)


def test_figures_are_those_of_all_logits(canvas: Canvas) -> None:
    tests = EvalSet(canvas, POLICY, batch_size=5)
    logits, labels = torch.randn(len(canvas), 7, generator=torch.Generator().manual_seed(0)), torch.from_numpy(canvas.labels)
    [row] = tests.tested([model("cpu", list(logits.split(5)))])
    confidence, best = torch.softmax(logits, dim=1).max(dim=1)
    assert row["test_top1"] == 100.0 * (best == labels).float().mean().item()
    assert row["test_top5"] == 100.0 * (logits.topk(5).indices == labels[:, None]).any(dim=1).float().mean().item()
    assert row["test_loss"] == F.cross_entropy(logits, labels).item()
    gaps = np.bincount((confidence * 15).long(), (best == labels).double() - confidence, minlength=15)
    assert row["test_ece"] == pytest.approx(100 * np.abs(gaps).sum() / len(labels), rel=1e-5)
    assert tests.metrics(logits) == row


def test_one_logit_that_is_not_finite_leaves_no_figure(canvas: Canvas) -> None:
    logits = torch.zeros(len(canvas), 7)
    logits[3, 2] = math.inf
    assert all(map(math.isnan, EvalSet(canvas, POLICY).metrics(logits).values()))


@pytest.mark.parametrize("much", [False, True])
def test_a_gpu_is_waited_for_once_for_each_model(canvas: Canvas, much: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches there are; logits of many models and classes wait in the host's memory for the end."""
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 0 if much else 1 << 20)
    tests = EvalSet(canvas, POLICY, batch_size=2)
    assert tests._kept is not None
    with stand_in_gpu() as gpu:
        tests._kept = [views.to(gpu) for views in tests._kept]
        found = launched(lambda: tests.tested([model(gpu), model(gpu)]))
    assert found.waits == ({} if much else {"a copy to the host": 2})


def test_the_canvas_stays_on_a_gpu_between_tests_whose_views_do_not(canvas: Canvas, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    real = evaluation.render_batches

    def noted(*given: Any, resident: Any, **named: Any) -> Any:
        used.append(resident)
        return real(*given, **named)

    monkeypatch.setattr(evaluation, "render_batches", noted)
    kept = EvalSets(canvas)[POLICY]
    kept.tested([model("cpu")])
    assert used == [None], "rendered once, and not kept beside its views"
    monkeypatch.setattr(evaluation, "KEPT_BYTES", 0)
    sets = EvalSets(canvas)
    for policy in (POLICY, POLICY, ViewPolicy.load("none", size=20)):
        sets[policy].tested([model("cpu")])
    assert used[1:] == [sets._resident] * 3


def test_a_test_canvas_that_goes_to_a_gpu_is_taken_from_the_memory_for_models(
    canvas: Canvas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (40 << 30, 80 << 30))
    sets = EvalSets(canvas, device="cuda")
    assert sets.to_come == 0, "its views are kept, and the canvas is not"
    monkeypatch.setattr(evaluation, "KEPT_BYTES", 0)
    assert sets.to_come == canvas.pixels.nbytes
    assert EvalSets(canvas).to_come == 0
    sets._resident.canvas = canvas  # it is there, and no longer part of what is free
    assert sets.to_come == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 80 << 30))
    assert EvalSets(canvas, device="cuda").to_come == 0


@pytest.mark.parametrize("finite", [True, False])
def test_the_last_test_leaves_the_entropies_of_its_outputs(canvas: Canvas, tmp_path: Path, finite: bool) -> None:
    logits = torch.randn(len(canvas), 7, generator=torch.Generator().manual_seed(0)) * 3
    if not finite:
        logits[0, 0] = math.nan
    file = tmp_path / "test_entropies.json"
    for epoch in range(2):
        learner = model("cpu", list(logits.split(256)))
        learner.folder, learner.epoch = tmp_path, epoch
        assert not file.exists(), "written before the end"
        EvalSets(canvas)[POLICY].tested([learner])
    if not finite:
        assert not file.exists()
        return
    found = EntropyHistogram.model_validate_json(file.read_text())
    relative = relative_entropy(logits.numpy())[0]
    assert (found.classes, sum(found.counts)) == (7, len(canvas))
    assert found.mean == pytest.approx(relative.mean(), abs=1e-6)
    assert found.counts == tuple(np.histogram(relative, 32, (0, 1))[0])
