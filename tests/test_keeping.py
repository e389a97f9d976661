"""What is kept of a model: its logits of the chosen test images, and the features that its classifier sees."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.datasets.canvas import Canvas
from kdcache.models.creation import create_model
from kdcache.models.heads import SelectedOutputs
from kdcache.training import outputs as limits
from kdcache.training.keeping import kept_outputs
from kdcache.training.outputs import KeptOutputs, chosen_images
from kdcache.views import ViewPolicy, render_positions

POLICY = ViewPolicy.load("none", size=32)


def kept(model: nn.Module, canvas: Canvas) -> KeptOutputs:
    return kept_outputs(model, lambda views: model.eval()(views.float() / 255), canvas, POLICY, "w" * 64)


def shown(canvas: Canvas) -> Tensor:
    """The kept test images, in their order, as models see them here."""
    table = POLICY.parameters(0, len(canvas), canvas.sizes)
    places = np.argsort(table.sample)[chosen_images(canvas.labels, 2)]
    return render_positions(canvas.pixels, table, places).float() / 255


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cifar_resnet8", "dla46_c"])
def test_features_are_what_timm_has_before_its_classifier(name: str, canvas: Canvas) -> None:
    made, _ = create_model(name, 7, input_size=32)
    model: Any = made.eval()
    found = kept(model, canvas)
    images = shown(canvas)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)
        logits = model(images)
    assert found.features is not None
    np.testing.assert_allclose(found.features, features.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.sample, chosen_images(canvas.labels, 2))
    np.testing.assert_array_equal(found.label, canvas.labels[found.sample])
    assert (found.images, found.weights) == (canvas.card.digest, "w" * 64)
    assert not any(layer._forward_pre_hooks for layer in model.modules()), "later passes are as they were"


class Own(nn.Module):
    """A model of which nobody says where its classifier is: the last linear layer to run."""

    def __init__(self, *, wide: bool = False) -> None:
        super().__init__()
        self.fc, self.body = nn.Linear(12, 7), nn.Linear(3, 12)
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        if self.wide:  # a row for each pixel, averaged afterwards
            mean: Tensor = self.fc(self.body(x.flatten(2).mT)).mean(dim=1)
            return mean
        logits: Tensor = self.fc(self.body(x.mean(dim=(2, 3))))
        return logits


def test_of_other_models_it_is_the_last_linear_layer(canvas: Canvas) -> None:
    model = Own()
    expected = model.body(shown(canvas).mean(dim=(2, 3))).detach().numpy()
    for each in (model, SelectedOutputs(model, [2, 0, 1, 3, 4, 5, 6], 7)):
        found = kept(each, canvas)
        assert found.features is not None
        np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-6)


def test_models_without_features_keep_their_logits(canvas: Canvas) -> None:
    for model in (Own(wide=True), nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Unflatten(1, (12,)))):
        found = kept(model, canvas)
        assert found.features is None
        assert len(found) == len(chosen_images(canvas.labels, 2))
    broken = Own()
    with torch.no_grad():
        broken.body.bias[3] = torch.inf
    assert kept(broken, canvas).features is None


def test_wide_features_leave_fewer_images(canvas: Canvas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_BYTES", 3 * 4 * (7 + 12) + 8)
    found = kept(Own(), canvas)
    assert len(found) == 3
    assert found.features is not None
    assert found.features.shape == (3, 12)
    np.testing.assert_array_equal(found.sample, chosen_images(canvas.labels, 2)[:3])
