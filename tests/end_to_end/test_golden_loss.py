"""Five steps of distillation give the losses they always gave: a change of targets, views or training shows here."""

import itertools
import json

import numpy as np
import pytest
import torch

from kdcache.bench.pipeline import open_writer
from kdcache.datasets import DATASETS
from kdcache.models.creation import create_model
from kdcache.students.config import DistillConfig
from kdcache.students.distill import distill
from kdcache.teachers.forward import Forward
from kdcache.teachers.shards import write_shards
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace

# Mean training loss of five steps of test_resnet (torch 2.15, timm 1.0.31), by tau and control.
LOSSES: dict[tuple[float, str], float] = {
    (1.0, "none"): 0.62619,
    (20.0, "none"): 0.98361,
    (1.0, "ls-global"): 0.55142,
    (20.0, "ls-global"): 0.84811,
    (1.0, "ls-instance"): 0.64883,
    (20.0, "ls-instance"): 1.03522,
    (1.0, "bottom-3"): 0.63545,
    (20.0, "bottom-3"): 1.01827,
}


class _Brightness(Forward):
    """A teacher whose logits are a fixed function of the view: how bright each of ten horizontal bands is."""

    def launch(self, views):
        bands = np.linspace(0, views.shape[2], 11).astype(int)
        grey = views.double().mean(dim=1).numpy()
        means = [grey[:, a:b].mean(axis=(1, 2)) / 16 for a, b in itertools.pairwise(bands)]
        return torch.from_numpy(np.stack(means, axis=1).astype("f4"))


@pytest.mark.parametrize("taus", [(20.0,), pytest.param((1.0, 20.0), marks=pytest.mark.exhaustive)], ids=str)
def test_five_steps_give_the_golden_losses(tmp_path, taus):
    place = Workspace(tmp_path)
    canvas = place.canvas(DATASETS.build("digits"), "train", 32)
    writer = open_writer(tmp_path / "archive", canvas, ViewPolicy.load("digits:version=1"), views=1)
    teacher = _Brightness(*create_model("test_resnet", 10, input_size=32), torch.device("cpu"), "fp32")
    write_shards(writer, teacher, canvas, batch_size=64)
    writer.finalize()
    config = DistillConfig(
        archive=(str(tmp_path / "archive"),), tau=taus, control=("none", "ls-global", "ls-instance", "bottom:3"),
        student=("test_resnet",), epochs=1, batch_size=256, dataset="digits",
    )  # fmt: skip
    results = distill(config, place)
    found = {
        (r.spec.tau, r.spec.folder.name.split("--")[3]): json.loads((r.spec.folder / "metrics.jsonl").read_text())["train_loss"]
        for r in results
    }
    expected = {key: loss for key, loss in LOSSES.items() if key[0] in taus}
    assert found == pytest.approx(expected, rel=1e-3), json.dumps({str(key): value for key, value in found.items()})
