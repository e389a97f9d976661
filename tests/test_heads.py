"""New classifiers, stochastic depth, and rates that depend on the layer."""

import re

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from kdcache.errors import IncompatibleError, UsageError
from kdcache.models.creation import create_model, has_new_head
from kdcache.models.heads import zero_head
from kdcache.models.names import resolve
from kdcache.teachers.head import linear_head, suitable_start
from kdcache.training.config import TrainConfig
from kdcache.training.optimizers import make_optimizer
from tests.weights import save_weights

CPU = torch.device("cpu")


class Scaled(torch.nn.Module):
    """Its logits are not what its linear layer gives."""

    def __init__(self, num_classes, in_place):
        super().__init__()
        self.fc, self.in_place = torch.nn.Linear(3, num_classes), in_place

    def forward(self, x):
        logits = self.fc(x.mean(dim=(2, 3)))
        return logits.mul_(2) if self.in_place else logits * 2


@pytest.mark.parametrize(("name", "probe", "noted"), [("repvit_m0_9", False, 1), ("test_resnet", True, 0)])
def test_a_recipe_leaves_out_a_probe_that_a_model_cannot_have(name, probe, noted):
    model, _ = create_model(name, 5, input_size=64)
    head_init, can_probe, notes = suitable_start(model, name, 64, "zero", probe=True)
    assert (head_init, can_probe, len(notes)) == ("zero", probe, noted)
    assert all("finetuned from the start" in note for note in notes)


def test_a_head_at_zero_finds_every_class_equally_likely():
    for name in ("test_vit", "test_resnet", "cifar_resnet8", "deit_tiny_distilled_patch16_224", "dla46_c"):
        size = 224 if name.startswith("deit") else 32
        model, _ = create_model(name, 5, input_size=size)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        zero_head(model, name)
        with torch.no_grad():
            assert not model.eval()(torch.rand(2, 3, size, size)).any()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed <= {f"{head}.{part}" for head in ("head", "head_dist", "fc") for part in ("weight", "bias")}


def test_a_model_that_does_not_say_where_its_head_is_keeps_it():
    with pytest.raises(IncompatibleError, match="the new classifier of mine") as refused:
        zero_head(Scaled(4, False), "mine")
    assert "--head-init timm" in refused.value.fix


def test_a_head_is_new_where_the_weights_are_of_other_classes(tmp_path):
    save_weights(create_model("cifar_resnet8", 7, input_size=32)[0], tmp_path / "seven.safetensors")
    assert not has_new_head("cifar_resnet8", 7, tmp_path / "seven.safetensors")
    assert has_new_head("cifar_resnet8", 8, tmp_path / "seven.safetensors")
    assert not has_new_head("test_vit", 1000)
    assert has_new_head("test_vit", 10)
    assert not has_new_head("tests.miniatures:anything", 10)


@pytest.mark.parametrize(("outputs", "like"), [(0, "DINO"), (512, "CLIP"), (21841, "ImageNet-21K")])
@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext"])
def test_weights_of_other_pretraining_get_a_head_of_the_datasets_classes(architecture, outputs, like, tmp_path):
    published = timm.create_model(architecture, num_classes=outputs)
    save_for_hf(published, str(tmp_path / like), safe_serialization=True)
    name = resolve(f"local-dir:{tmp_path / like}")
    assert has_new_head(name, 37)
    model, _ = create_model(name, 37, input_size=160, pretrained=True)
    place, layer = linear_head(model, name, 160, CPU)
    assert layer.out_features == 37
    own = model.state_dict()
    kept = {key for key, value in published.state_dict().items() if torch.equal(own.get(key, value[:0]), value)}
    assert {key for key in own if not key.startswith(f"{place}.")} <= kept


@pytest.mark.parametrize("alias", ["rn50_in21k", "rn50_clip", "vit_s_in21k", "vit_s_dino", "vit_b_clip"])
def test_the_names_of_other_pretraining_are_weights_with_another_head(alias):
    name = resolve(alias)
    assert timm.get_pretrained_cfg(name).num_classes in {0, 512, 1024, 21843}
    assert has_new_head(name, 37)
    assert has_new_head(name, 1000)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "cifar_resnet8"])
def test_the_head_of_timms_models_has_what_timm_calls_features(name):
    model, _ = create_model(name, 5, input_size=32)
    place, layer = linear_head(model, name, 32, CPU)
    assert layer is model.get_classifier()
    assert model.get_submodule(place) is layer
    assert model.training


def test_a_model_whose_logits_are_no_linear_layers_has_no_head_to_train():
    distilled, _ = create_model("deit_tiny_distilled_patch16_224", 5, input_size=224)  # the mean of two
    zero_head(distilled, "deit")
    frozen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)).requires_grad_(False)
    for model, size in ((distilled, 224), (Scaled(5, False), 8), (Scaled(5, True), 8), (torch.nn.Flatten(), 8), (frozen, 8)):
        with pytest.raises(IncompatibleError, match="mine has no head to train first") as refused:
            linear_head(model, "mine", size, CPU)
        assert "--head-epochs 0" in refused.value.fix


@pytest.mark.parametrize("name", ["repghostnet_050", "cifar_resnet8"])
def test_stochastic_depth_is_refused_by_models_without_blocks_to_drop(name):
    with pytest.raises(UsageError, match=re.escape(f"--drop-path 0.2 with {name}")):
        create_model(name, 5, input_size=32, drop_path=0.2)


def test_stochastic_depth_is_timms():
    ours, _ = create_model("test_vit", 5, input_size=32, drop_path=0.3)
    theirs = timm.create_model("test_vit", drop_path_rate=0.3)
    drawn = [[getattr(layer, "drop_prob", None) for layer in model.modules()] for model in (ours, theirs)]
    assert drawn[0] == drawn[1]
    assert max(filter(None, drawn[0])) == pytest.approx(0.3)


def test_rates_fall_from_the_head_down_and_betas_are_those_asked_for():
    model, _ = create_model("test_vit", 5, input_size=32)
    config = TrainConfig(epochs=1, layer_decay=0.5, opt_betas=(0.8, 0.7))
    groups = make_optimizer(model, config).param_groups
    assert {group["betas"] for group in groups} == {(0.8, 0.7)}
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    by_layer = [scale[id(each)] for each in (model.head.weight, model.blocks[-1].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)]
    assert by_layer == sorted(by_layer, reverse=True)
    assert by_layer[0] == 1 > by_layer[1]


def test_layers_are_asked_of_models_that_have_them():
    with pytest.raises(UsageError, match="with a Scaled"):
        make_optimizer(Scaled(4, False), TrainConfig(epochs=1, layer_decay=0.5))


@pytest.mark.parametrize(("opt", "betas", "why"), [("sgd", (0.9, 0.9), "sgd has no betas"), ("adan", (0.9, 0.9), "adan takes 3")])
def test_betas_are_not_left_out_without_a_word(opt, betas, why):
    with pytest.raises(UsageError) as refused:
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], TrainConfig(epochs=1, opt=opt, opt_betas=betas))
    assert why in refused.value.why
