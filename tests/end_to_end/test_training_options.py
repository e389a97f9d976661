"""distill's options for longer runs: schedules, averaged weights, bf16, and what students start from."""

import json
import math

import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2

from kdcache.errors import UsageError
from kdcache.models.creation import Normalisation, create_model
from kdcache.report import collect, summarise
from kdcache.training.config import TrainConfig
from kdcache.training.graphs import Lanes
from kdcache.training.learner import Learner
from tests.end_to_end.conftest import FEW, with_images
from tests.end_to_end.test_distill import only, same_run
from tests.end_to_end.test_methods import stop_after
from tests.test_graphs import StandIn
from tests.weights import save_weights

SHORT = ["--student", "test_vit", "--batch-size", "719"]  # two steps an epoch


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def test_a_step_schedule_falls_after_its_epochs(few_home, kdcache):
    how = ["--sched", "step", "--decay-epochs", "1,3", "--decay-rate", "0.5", "--opt", "sgd", "--lr", "0.04", "--epochs", "4"]
    result = kdcache("distill", *FEW, *how, "--home", few_home)
    assert result.status == 0, result.err
    run = only(few_home, "runs/*/test_*--*")
    assert [row["lr"] for row in rows(run)] == pytest.approx([0.04, 0.02, 0.02, 0.01])
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert (args["sched"], args["decay_epochs"], args["decay_rate"], args["momentum"]) == ("step", "1,3", 0.5, 0.9)


def test_the_published_recipe_of_the_cifar_pairs_has_its_rates():
    config = TrainConfig(epochs=240, lr=0.05, sched="step", decay_epochs=(150, 180, 210))
    rates = {epoch: config.rate(epoch * 10, 10) for epoch in (0, 149, 150, 179, 180, 209, 210, 239)}
    expected = [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert list(rates.values()) == pytest.approx(expected)
    cosine = TrainConfig(epochs=4)
    assert [cosine.rate(step, 5) for step in (0, 10, 20)] == pytest.approx([1, 0.5, 0])


def test_settings_added_later_leave_the_identity_of_runs_as_it_was():
    assert TrainConfig(epochs=3).identity() == TrainConfig(epochs=3, head_init="timm").identity() == {"epochs": 3}
    assert TrainConfig(epochs=3, amp=True).identity() == {"epochs": 3, "amp": True}


@pytest.mark.parametrize("warmup", [0, 0.5, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"min_lr": 1e-4}, {"sched": "cosine", "min_lr": 1e-4}),
        ({}, {"sched": "cosine"}),
        ({"sched": "step", "decay_epochs": (4, 8), "decay_rate": 0.3}, {"sched": "step", "decay_epochs": 4, "decay_rate": 0.3}),
    ],
)
def test_rates_are_those_of_timms_schedulers_step_by_step(ours, theirs, warmup):
    config = TrainConfig(epochs=10, lr=0.02, warmup_epochs=warmup, **({"warmup_lr": 1e-3} if warmup else {}), **ours)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups, lr=0.02)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=10, warmup_epochs=warmup, warmup_lr=1e-3, step_on_epochs=False, updates_per_epoch=7, **theirs
    )
    for step in range(70):
        scheduler.step_update(step)
        rate = 0.02 * config.rate(step, 7)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 0.5 * rate], rel=1e-12)


def test_without_warm_up_and_floor_rates_are_the_same_bits_as_before():
    assert all(TrainConfig(epochs=3).rate(step, 7) == 0.5 * (1 + math.cos(math.pi * step / 21)) for step in range(21))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_lr": 0.1, "lr": 0.01}, "--min-lr 0.1 with --lr 0.01"),
        ({"min_lr": 1e-5, "sched": "step", "decay_epochs": (1,)}, "with the schedule step"),
        ({"warmup_epochs": 4}, "--warmup-epochs 4 of 4"),
        ({"warmup_lr": 1e-3}, "without a warm-up"),
        ({"warmup_epochs": 1, "warmup_lr": 0.1, "lr": 0.01}, "--warmup-lr 0.1 with --lr 0.01"),
    ],
)
def test_rates_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(UsageError) as refused:
        TrainConfig(epochs=4, **settings)
    assert words in refused.value.what


@pytest.mark.exhaustive
def test_an_interrupted_run_with_all_of_it_ends_as_if_it_had_not_been(few_home, few_archive, kdcache, tmp_path, monkeypatch):
    home = few_home
    how = ["--model-ema-decay", "0.9", "--amp", "--sched", "step", "--decay-epochs", "1", "--opt", "sgd", "--epochs", "2"]
    arguments = ["distill", *FEW, "--student", "test_resnet", *how, "--archive", *with_images(few_archive)]
    whole = tmp_path / "whole"
    assert kdcache(*arguments, "--home", whole).status == 0
    stop_after(monkeypatch, 3)
    assert kdcache(*arguments, "--home", home).status == 130
    assert kdcache(*arguments, "--home", home).status == 0
    runs = [only(place, "runs/*/test_*--*") for place in (home, whole)]
    same_run(*runs)
    assert (runs[0] / "ema.safetensors").read_bytes() == (runs[1] / "ema.safetensors").read_bytes()
    assert (runs[0] / "ema.safetensors").read_bytes() != (runs[0] / "last.safetensors").read_bytes()
    assert all(0 <= row["ema_top1"] <= 100 for row in rows(runs[0]))
    args = yaml.safe_load((runs[0] / "args.yaml").read_text())
    assert (args["amp"], args["model_ema_decay"]) == (True, 0.9)


class _Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("amp", [False, True])
def test_averaged_weights_are_the_moving_average_of_the_steps(tmp_path, amp):
    model = _Tiny()
    config = TrainConfig(epochs=1, model_ema_decay=0.75, amp=amp, opt="sgd", lr=0.5)
    learner = Learner(
        tmp_path,
        model,
        Normalisation((0.5,) * 3, (0.5,) * 3),
        config,
        steps_per_epoch=5,
        seed=0,
        device=torch.device("cpu"),
    )
    expected = model.fc.weight.detach().clone()
    views = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    seen = []

    def loss_of(logits):
        seen.append(logits.dtype)
        return torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3, 0, 1]))

    for _ in range(5):
        learner.step(views, loss_of, lambda logits: {})
        expected = 0.75 * expected + 0.25 * model.fc.weight.detach()
    torch.testing.assert_close(learner.average.module.fc.weight, expected)
    assert not torch.equal(expected, model.fc.weight)
    assert set(seen) == {torch.bfloat16 if amp else torch.float32}
    assert model.fc.weight.dtype == torch.float32
    assert learner.predict(views).dtype == torch.float32
    assert not torch.equal(learner.predict(views), learner.predict(views, averaged=True))


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(tmp_path):
    """It holds the random numbers' state of its only process, not a list of them."""

    def learner():
        model = torch.nn.Sequential(_Tiny(), torch.nn.Dropout())
        half, config = Normalisation((0.5,) * 3, (0.5,) * 3), TrainConfig(epochs=1, opt="sgd")
        return Learner(tmp_path, model, half, config, steps_per_epoch=5, seed=0, device=torch.device("cpu"))

    def step(one):
        one.step(views, lambda logits: logits.square().mean(), lambda logits: {})
        return one.model[0].fc.weight.detach().clone()

    views = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    first = learner()
    step(first)
    first.suspend()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**state, "rng": state["rng"][0]}, tmp_path / "checkpoint.pt")
    expected = step(first)
    again = learner()
    assert again.steps == 1
    assert torch.equal(step(again), expected)


def test_a_graph_wants_a_gpu(few_home, kdcache):
    refused = kdcache("distill", *FEW, "--graph", "--device", "cpu", "--home", few_home)
    assert refused.status == 2
    assert "--graph on a cpu" in refused.err
    assert not list(few_home.glob("runs/*/test_*"))


def test_students_whose_steps_are_replayed_become_what_they_are_without(few_home, few_archive, kdcache, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcache.training.optimizers.FUSED_ON", {"cpu"})
    how = ["--method", "kd,ctkd", "--tau", "4", "--student", "test_vit", "--epochs", "2", "--batch-size", "32"]
    arguments = ["distill", *how, "--archive", *with_images(few_archive)]
    whole = tmp_path / "whole"
    assert kdcache(*arguments, "--home", whole).status == 0
    monkeypatch.setattr("kdcache.students.distill._Lockstep._lanes", lambda self, *arguments: Lanes([StandIn()]))
    monkeypatch.setattr("kdcache.training.graphs.WARM_UP", 1)
    said = kdcache(*arguments, "--home", few_home)
    assert said.status == 0, said.err
    for run in few_home.glob("runs/*/test_vit--*"):
        same_run(run, whole / run.relative_to(few_home))
        assert yaml.safe_load((run / "args.yaml").read_text())["graph"] == "on"
    assert "not replayed" not in said.err


@pytest.mark.exhaustive
def test_students_start_from_trained_models_and_files(home, archive, kdcache):
    teacher = ["train-teacher", "--teacher", "test_resnet", "--dataset", "digits", "--epochs", "2", "--home", home]
    common = ["distill", *SHORT, "--student", "test_resnet", "--epochs", "1", "--lr", "1e-5", "--home", home]
    missing = kdcache(*common, "--init", "random,target")
    assert missing.status == 3
    assert "kdcache train-teacher --teacher test_resnet --dataset digits --from-scratch" in missing.err
    assert kdcache(*teacher, "--from-scratch").status == 0
    weights = only(home, "teachers/digits--test_resnet--*") / "model.safetensors"
    result = kdcache(*common, "--init", f"random,target,{weights}", "--seed", "0,1")
    assert result.status == 0, result.err
    recorded = {run: yaml.safe_load((run / "args.yaml").read_text()) for run in home.glob("runs/*/test_*")}
    runs = {args.get("init", "random"): run for run, args in recorded.items() if args["seed"] == 0}
    top = {init: rows(run)[0]["test_top1"] for init, run in runs.items()}
    assert top["target"] > 60 > 30 > top["random"]
    assert set(top) == {"random", "target", str(weights)}
    own = json.loads((weights.parent / "teacher.json").read_text())["top1_clean"]
    assert {init: recorded[run]["init_top1"] for init, run in runs.items()} == {"random": None, "target": own, str(weights): None}
    same = [(runs[init] / "last.safetensors").read_bytes() for init in ("target", str(weights))]
    assert same[0] == same[1]  # of the same weights
    assert {cell.n for cell in summarise(collect([home / "runs"])).cells.values()} == {2}  # seeds of three rows
    again = kdcache(*common, "--init", "target", "--dry-run")
    assert "1 of them trained already" in again.err
    assert "test_resnet from target kd" in again.out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--init", "finetuned"], 3, "--pretrained"),
        (["--init", "nowhere.safetensors"], 3, "nowhere.safetensors"),
        (["--init", ""], 2, "names nothing"),
        (["--sched", "step"], 2, "--decay-epochs 150"),
        (["--sched", "steps"], 2, "'step'"),
        (["--model-ema-decay", "1.5"], 2, "less than 1"),
        (["--momentum", "1"], 2, "less than 1"),
        (["--decay-rate", "0"], 2, "greater than 0"),
        (["--decay-epochs", "3-1", "--sched", "step"], 2, "--decay-epochs"),
        (["--lr", "0.1,0.001", "--min-lr", "0.01"], 2, "--min-lr 0.01 with --lr 0.001"),
        (["--opt", "adamw,sgd", "--opt-betas", "0.9,0.95"], 2, "sgd has no betas"),
        (["--opt-betas", "0.9"], 2, "adamw takes 2 betas"),
        (["--opt-betas", "0.9,1"], 2, "--opt-betas 0.9,0.95"),
        (["--epochs", "5", "--warmup-epochs", "5"], 2, "--warmup-epochs 5 of 5 epochs"),
    ],
)
def test_options_that_make_no_sense_are_refused(home, archive, kdcache, arguments, status, words):
    result = kdcache("distill", *SHORT, *arguments, "--dry-run", "--home", home)
    assert result.status == status, result.err
    assert words in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]


def test_a_classifier_of_other_classes_is_a_new_one_and_that_is_said(home, archive, kdcache, tmp_path):
    model, _ = create_model("test_vit", 7, input_size=32)
    save_weights(model, tmp_path / "seven.safetensors")
    common = ["distill", *SHORT, "--epochs", "1", "--init", tmp_path / "seven.safetensors", "--home", home]
    starts = {}
    for how, said in (("zero", "zero"), ("timm", "random")):
        result = kdcache(*common, "--head-init", how)
        assert result.status == 0, result.err
        assert f"has other classes: head.bias, head.weight of test_vit start at {said}" in result.err
        args = [yaml.safe_load(file.read_text()) for file in home.glob("runs/*/test_*/args.yaml")]
        starts |= {each["head_init"]: each["student_weights_sha256"] for each in args}
    assert len(set(starts.values())) == 2
    assert "1 of 1 students are trained already" in kdcache(*common).err
    model, _ = create_model("test_resnet", 10, input_size=32)
    save_weights(model, tmp_path / "resnet.safetensors")
    other = kdcache("distill", *SHORT, "--epochs", "1", "--init", tmp_path / "resnet.safetensors", "--home", home)
    assert other.status == 5
    assert "does not fit the model" in other.err
