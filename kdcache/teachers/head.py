"""The head first: linear probing before finetuning (LP-FT; Kumar et al., ICLR 2022, arXiv 2202.10054).

The model is in evaluation mode and does not change; its last linear layer is trained on what enters it. A finished head is
kept in the folders of all teachers that start with it, so that an interrupted command repeats no more than this.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdcache.datasets.canvas import Canvas
from kdcache.errors import IncompatibleError, IntegrityError
from kdcache.models.creation import Normalisation
from kdcache.models.heads import zero_head
from kdcache.replay.prefetch import render_batches
from kdcache.replay.stream import ViewStream, epoch_positions
from kdcache.system.distributed import Team, this_rank
from kdcache.system.documents import parse_json
from kdcache.system.energy import Spent, total
from kdcache.system.files import set_aside, write_atomically
from kdcache.system.interrupts import stopped_between_steps
from kdcache.system.progress import Progress
from kdcache.system.seals import require_sealed, sealed_tensors
from kdcache.teachers.forward import Forward, batches, last_linear
from kdcache.teachers.registry import Exam
from kdcache.training.checkpoint import LOCK, own_folder
from kdcache.training.config import TrainConfig
from kdcache.training.devices import computes_in_bf16, metered
from kdcache.training.optimizers import make_optimizer

__all__ = ["HEAD", "Head", "head_settings", "linear_head", "read_head", "train_head"]

HEAD = "head.safetensors"
RATE = 0.002
KEPT_BYTES = 2 << 30  # of features


@dataclass(frozen=True)
class Head:
    """A trained head: its tensors by their names in the model, the model's figures with it, and what training it took."""

    tensors: dict[str, Tensor]
    row: dict[str, float]
    spent: Spent
    amp: bool = False  # whether its features were computed in bf16

    def put_into(self, model: nn.Module) -> None:
        model.load_state_dict(self.tensors, strict=False)

    def write(self, folder: Path) -> None:
        known = {"row": json.dumps(self.row), "spent": json.dumps(self.spent.known()), "amp": json.dumps(self.amp)}
        write_atomically(folder / HEAD, sealed_tensors(save(self.tensors), known))


def read_head(folder: Path) -> Head | None:
    """The head that was kept in a teacher's folder; None if there is none. IntegrityError if it is damaged."""
    file = folder / HEAD
    if not file.is_file():
        return None
    try:
        require_sealed(file)
        with safe_open(file, "pt") as kept:
            known = kept.metadata()
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        spent, amp = Spent.of(parse_json(known["spent"])), bool(parse_json(known.get("amp", "false")))
        return Head(tensors, parse_json(known["row"]), spent, amp)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{file} is damaged",
            why=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix=f"set it aside, and the head is trained again: {set_aside(file)}",
        ) from error


def head_settings(epochs: int, batch_size: int, amp: bool | None) -> TrainConfig:
    """How a head is trained: AdamW at a rate for weights that start from nothing, along a cosine."""
    return TrainConfig(epochs=epochs, batch_size=batch_size, amp=amp, lr=RATE, weight_decay=0.0)


def linear_head(model: nn.Module, name: str, size: int, device: torch.device) -> tuple[str, nn.Linear]:
    """The last linear layer of the model called `name`, and its name in it. IncompatibleError if it does not give the logits."""
    training = model.training
    with torch.no_grad():
        layer = last_linear(model.eval(), torch.zeros(1, 3, size, size, device=device), gives_logits=True)
    model.train(training)
    if layer is None or not any(parameter.requires_grad for parameter in layer.parameters()):
        raise IncompatibleError(
            f"{name} has no head to train first",
            why="the linear layer that gives its logits is frozen"
            if layer
            else "its logits are not the output of a linear layer, as they are",
            fix="finetune all of it from the start: kdcache train-teacher --head-epochs 0",
        )
    return next(key for key, module in model.named_modules() if module is layer), layer


def suitable_start(
    model: nn.Module, name: str, size: int, head_init: str, *, probe: bool
) -> tuple[Literal["zero", "timm"], bool, list[str]]:
    """How the head of the model called `name` can start, where that is left to the recipe: (its initial weights, whether it can
    be trained alone first, notes on what it cannot do).
    """
    notes = []
    try:
        if head_init == "zero":
            zero_head(model, name)
    except IncompatibleError as error:
        head_init = "timm"
        notes.append(f"{error.what} ({error.why}): it starts as timm does")
    try:
        if probe:
            linear_head(model, name, size, torch.device("cpu"))
    except IncompatibleError as error:
        probe = False
        notes.append(f"{error.what} ({error.why}): all of it is finetuned from the start")
    return ("zero" if head_init == "zero" else "timm"), probe, notes


def train_head(
    model: nn.Module,
    normalise: Normalisation,
    name: str,
    folders: Sequence[Path],
    stream: ViewStream,
    settings: TrainConfig,
    smoothing: float,
    tests: Exam,
    team: Team,
    progress: Progress,
) -> Head:
    """Train the last linear layer of the model called `name`, in place, and keep it in all `folders`.

    Each process of the `team` computes the features of its part of every batch, and all of them learn from all.

    Each epoch has fresh views of `stream`; where its policy leaves nothing to chance, features are computed once.
    IncompatibleError for a model without such a layer, and for features that are not finite.
    """
    device = stream.device
    model.to(device).eval()
    place, layer = linear_head(model, name, stream.policy.size, device)
    amp = all(team.shared(computes_in_bf16(device))) if settings.amp is None else settings.amp
    features = _Features(model, normalise, layer, device, amp)
    steps = settings.epochs * len(stream)
    own = folders if team.first else ()
    with ExitStack() as owned, metered(device, share=this_rank().share) as meter:
        for folder in own:
            owned.enter_context(own_folder(folder))
        optimizer, started = make_optimizer(layer, settings), time.monotonic()
        with stopped_between_steps() as own_check:
            check = team.checked(own_check)
            for step, (inputs, labels) in enumerate(_inputs(stream, features, settings.epochs, team, check)):
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * settings.rate(step, len(stream))
                loss = F.cross_entropy(layer(inputs).float(), labels, label_smoothing=smoothing)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                check()
                left = (time.monotonic() - started) / (step + 1) * (steps - step - 1)
                progress.update("train head", step + 1, steps, f"{left:.0f} s left")
            forward = Forward(model, normalise, device, "fp32")
            row = tests.of(lambda views: torch.from_numpy(forward(views)))
            check()
        if not all(map(math.isfinite, row.values())):
            raise IncompatibleError(
                f"the head of {name} cannot be trained",
                why="the logits that it gives are not finite: its features are not, or are very large",
                fix="check the weights that it starts from, or finetune all of it from the start: --head-epochs 0",
            )
        tensors = {f"{place}.{key}": value.detach().cpu().contiguous() for key, value in layer.state_dict().items()}
        head = Head(tensors, row, total(team.shared(meter.lap())) * (1 / len(folders)), amp)
        for folder in own:
            head.write(folder)
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: later it may be another process's
    return head


class _Features:
    """Maps uint8 views `[B, 3, S, S]` to what enters the last linear layer, float32 `[B, F]` on the device."""

    def __init__(self, model: nn.Module, normalise: Normalisation, layer: nn.Linear, device: torch.device, amp: bool) -> None:
        self._model, self._normalise, self._layer, self._device, self._amp = model, normalise, layer, device, amp
        self.width = layer.in_features

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = self._layer.register_forward_pre_hook(
            lambda _, inputs, named: seen.append(next(iter((*inputs, *named.values())))), with_kwargs=True
        )
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp):
                self._model(self._normalise(views.to(self._device, non_blocking=True)))
        finally:
            hook.remove()
        return seen[-1].detach().float()


def _inputs(
    stream: ViewStream, features: _Features, epochs: int, team: Team, check: Callable[[], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of every batch of all epochs."""
    canvas = stream.canvas
    if not stream.policy.is_fixed or 4 * len(canvas) * features.width > KEPT_BYTES:
        for epoch in range(epochs):
            for batch in stream.epoch(epoch):
                yield team.gather(features(batch.images)), team.gather(batch.label_a)
        return
    kept, labels = _of_all(stream, features, canvas, team, check)
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_positions(len(canvas), stream.seed, epoch))[: len(stream) * stream.batch_size]
        for part in torch.split(order, stream.batch_size):
            yield kept[part].to(stream.device), labels[part].to(stream.device)


def _of_all(
    stream: ViewStream, features: _Features, canvas: Canvas, team: Team, check: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Features float32 `[N, F]` and labels `[N]` of all samples, on the host."""
    kept = torch.empty(len(canvas), features.width)
    items = [(0, rows) for rows in batches(range(len(canvas)), stream.batch_size)]
    ahead: dict[str, Any] = {"workers": stream.workers, "renderer": stream.renderer, "device": stream.device}
    own: list[tuple[Tensor, Tensor]] = []
    for item in render_batches(canvas, stream.policy, items[team.number :: team.size], **ahead):
        own.append((torch.from_numpy(item.rows.sample), features(item.images).cpu()))
        if team.size == 1:  # processes with fewer batches would not take part in the check
            check()
    for samples, values in itertools.chain(*team.shared(own)):
        kept[samples] = values
    return kept, torch.from_numpy(canvas.labels)
