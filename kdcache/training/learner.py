"""What teachers and students in training share: optimiser, schedule, clipping, evaluation, log, checkpoint, exact resume."""

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcache.archive import MAX_ROWS, moment_histogram
from kdcache.errors import IncompatibleError
from kdcache.models.creation import Normalisation
from kdcache.system.distributed import ALONE, Team
from kdcache.system.energy import UNKNOWN, Spent
from kdcache.system.files import write_atomically
from kdcache.system.precision import ieee_float32, repeatable
from kdcache.system.seals import WEIGHTS_SEALS, require_sealed, sealed_record
from kdcache.training.checkpoint import (
    CHECKPOINT,
    LOCK,
    copied,
    own_folder,
    read_checkpoint,
    summary_of,
    unusable_checkpoint,
    weights_seals,
    write_log,
)
from kdcache.training.clipping import Clipping
from kdcache.training.config import StudentRuntime, TrainConfig
from kdcache.training.devices import (
    computes_in_bf16,
    out_of_memory,
    rng_states,
    rng_states_from,
    seed_of_process,
    seeded,
    set_rng_states,
)
from kdcache.training.graphs import GraphedStep, Lanes, Parts
from kdcache.training.metrics import mean_relative_entropy, moments
from kdcache.training.optimizers import Rates, capturable, load_state, make_optimizer, portable_state
from kdcache.training.timing import Timer, timer_of
from kdcache.training.wrapping import EachView, averaged, with_synchronised_norms
from kdcache.training.writer import Writer

__all__ = ["Learner"]

GRAPHS_SINCE = "2.15"  # of torch
LOGIT_MOMENTS = "logit_moments.json"
USUAL = StudentRuntime()


class Learner:
    """One model in training, with its own optimiser, schedule, random numbers and folder.

    The folder gets `metrics.jsonl`, `summary.csv`, `last.safetensors`, `best.safetensors` and, when over, `summary.json` and
    `logit_moments.json` (a histogram of training views of the last epoch, at most 65,536 and a batch);
    `checkpoint.pt` holds what an exact resume needs (tensors and numbers only). A learner made again in the same folder
    goes on at its last checkpoint: the end of an epoch, or the step after which it was suspended. `learned` is what the loss
    itself learns, by an optimiser of its own whose rate follows the same schedule.

    In a `team`, every process has the same model, steps on its part of each batch, and learns what one process would learn from
    the whole; the first one writes. `runtime` says how often it writes, and what makes its steps faster; `timer` measures its
    steps, by default where they are done; with `lanes`, they are captured as a graph where that changes no bit of them.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        normalise: Normalisation,
        config: TrainConfig,
        *,
        steps_per_epoch: int,
        seed: int,
        device: torch.device,
        runtime: StudentRuntime = USUAL,
        learned: tuple[nn.Module, torch.optim.Optimizer] | None = None,
        team: Team = ALONE,
        timer: Timer | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self.folder, self.config, self.normalise, self.device = folder, config, normalise, device
        self._team, self._compiled = team, runtime.compile
        self._timer = timer or timer_of(device)
        self._format = torch.channels_last if runtime.channels_last else torch.contiguous_format
        if team.size > 1 and device.type == "cuda":
            model = with_synchronised_norms(model)
        self.model = model.to(device, memory_format=self._format)  # type: ignore[call-overload]
        forward: Any = torch.compile(self.model) if runtime.compile else self.model
        self._trained = team.wrap(EachView(forward), device)
        self.optimizer = make_optimizer(self.model, config)
        self._rates = Rates(self.optimizer)
        self.average = averaged(self.model, config.model_ema_decay) if config.model_ema_decay is not None else None
        self._learned = learned
        self._learned_rates = None if learned is None else Rates(learned[1])
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._clip = Clipping(self.parameters, config.clip_grad)
        self._steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.epochs
        self.steps = 0
        self.epoch = 0  # epochs finished
        self.rows: list[dict[str, float]] = []
        self.status: Literal["training", "complete", "diverged"] = "training"
        self._best: dict[str, Tensor] | None = None
        self._best_top1 = -1.0
        self._interval = runtime.checkpoint_interval
        self._saved_at = time.monotonic()
        self._whole = True  # not in the midst of a step
        with seeded(seed if team.first else seed_of_process(seed, team.number)):
            self._rng = rng_states(device)
        self._graphed, self._no_graph = self._graphed_in(lanes) if lanes is not None else (None, "")
        self.moved_from: str | None = None  # the kind of device that its checkpoint was written on, if it is another one
        self.notes: list[str] = []  # on how it goes on, for whoever trains it
        self._moments: list[Tensor] = []  # of views of the last epoch, [2, B] of each batch
        self._sums: dict[str, Tensor] = {}
        self.amp = all(team.shared(computes_in_bf16(device))) if config.amp is None else config.amp
        self._start_epoch()
        self._lock = own_folder(folder) if team.first else None
        self._writer = Writer(folder, device)
        try:
            self._restore()
            team.wait()  # before the first one writes what others still read
        except BaseException:
            self._release()
            raise

    @property
    def last(self) -> dict[str, float]:
        """The latest epoch's row of metrics."""
        return self.rows[-1]

    @property
    def tests_next(self) -> bool:
        """Whether the epoch that is being trained is one that ends with a test."""
        number = self.epoch + 1
        return number % self.config.val_interval == 0 or number == self.config.epochs

    @property
    def steps_in_epoch(self) -> int:
        """Steps done since the end of the last epoch."""
        return self._count

    def _start_epoch(self) -> None:
        if self._graphed is None:
            self._sums = {}
        elif self._sums:  # a graph adds to these very tensors
            torch._foreach_zero_(list(self._sums.values()))
        self._count = 0
        self._seconds = 0.0
        self._spent: Spent | None = None
        self._uncharged = 0.0  # seconds

    def charge(self, spent: Spent) -> None:
        """Count its part of what was spent since it was last charged into the epoch's costs."""
        self._count_seconds()
        if spent.device_seconds is not None:  # steps that overlap with others' count as much as they made work last
            self._seconds -= max(0.0, self._uncharged - spent.device_seconds)
        self._spent = spent if self._spent is None else self._spent + spent
        self._uncharged = 0.0

    @property
    def uncharged(self) -> float:
        """Seconds in its own steps since it was last charged; waits for steps that its device has not done yet."""
        self._count_seconds()
        return self._uncharged

    def _count_seconds(self) -> None:
        taken = self._timer.read()
        self._seconds += taken
        self._uncharged += taken

    def step(
        self,
        views: Tensor | Sequence[Tensor],
        loss_of: Callable[..., Tensor],
        measure: Callable[..., dict[str, Tensor]],
        given: tuple[Any, ...] = (),
        stage: Hashable = None,
    ) -> None:
        """One optimiser step on uint8 `views [B, 3, S, S]`; `measure` adds figures of the logits to the epoch's means.

        Of several such views, each goes through the model by itself (batch normalisation sees one at a time), `loss_of` gets
        their logits one below the other, and figures are those of the first. In a team, views are this process's part of the
        batch, and both functions get the logits of the whole.

        Both functions are called with what is `given` after the logits. A learner with lanes wants all tensors that change from
        step to step there, and a `stage` that changes when anything else does that they depend on.
        """
        self._whole = False

        def work(inputs: tuple[list[Tensor], tuple[Any, ...]]) -> Tensor:
            return self._work(inputs[0], lambda z: loss_of(z, *inputs[1]), lambda z: measure(z, *inputs[1]))

        inputs = [views] if isinstance(views, Tensor) else list(views), given
        with self._own_rng(), ieee_float32(), nullcontext() if self._graphed is None else repeatable():
            if self._graphed is None:
                with self._timer.running():
                    self._before_work()
                    self._after_work(work(inputs))
            else:
                self._graphed(inputs, work, stage)
        self._count += 1
        self.steps += 1
        self._whole = True

    def _before_work(self) -> None:
        share = self.config.rate(self.steps, self._steps_per_epoch)
        for rates in (self._rates, self._learned_rates):
            if rates is not None:
                rates.set(share)
        if not self.model.training:
            self.model.train()

    def _work(
        self, each: list[Tensor], loss_of: Callable[[Tensor], Tensor], measure: Callable[[Tensor], dict[str, Tensor]]
    ) -> Tensor:
        """What the device does in a step; returns the logits' moments, `[2, B]`."""
        inputs = [self.normalise(views).contiguous(memory_format=self._format) for views in each]
        with self._precision():
            outputs = self._outputs(inputs)
        outputs = [self._team.gather(logits) for logits in outputs]
        loss = loss_of(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self._clip()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # now: models in training side by side would each keep theirs
        if self.average is not None:
            self.average.update(self.model)
        with torch.no_grad():
            logits = outputs[0].detach()
            each_row = moments(logits)
            mean, std = each_row.mean(dim=1)
            figures = {"train_loss": loss.detach(), "grad_norm": norm, "student_entropy": mean_relative_entropy(logits)}
            figures |= {"logit_mean": mean, "logit_std": std} | measure(logits)
            if self._sums.keys() == figures.keys():
                torch._foreach_add_(list(self._sums.values()), [figures[name] for name in self._sums])
            else:  # the first step of an epoch; or one after a checkpoint of before, whose epoch has no mean of what it lacks
                for name in self._sums.keys() & figures.keys() or figures:
                    self._sums[name] = self._sums[name] + figures[name] if name in self._sums else figures[name].clone()
        return each_row

    def _after_work(self, each_row: Tensor) -> None:
        if self.epoch + 1 == self.config.epochs and sum(part.shape[1] for part in self._moments) < MAX_ROWS:
            self._moments.append(each_row if self._graphed is None else each_row.clone())

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self._learned is None else [self.optimizer, self._learned[1]]

    @property
    def graph(self) -> str:
        """Whether steps are replayed as a graph: "on", "off (reason)", or "" where that is not known yet, or not wanted."""
        return self._no_graph if self._graphed is None else self._graphed.state

    def _graphed_in(self, lanes: Lanes) -> tuple[GraphedStep | None, str]:
        """What captures the steps, or the reason why none can be captured."""
        on_device = all(rates is None or rates.on_device for rates in (self._rates, self._learned_rates))
        if self._team.size > 1:
            return None, "off (several processes have a part of each batch)"
        if self._compiled:
            return None, "off (--compile makes graphs of its own)"
        if torch.torch_version.TorchVersion(torch.__version__) < GRAPHS_SINCE:
            return None, f"off (before torch {GRAPHS_SINCE} a capture that fails spoils what comes after it)"
        if not on_device:
            return None, f"off (--opt {self.config.opt} takes its learning rate from the host)"
        parts = Parts(
            tensors=self._changing,
            random=lambda: rng_states(self.device),
            set_random=lambda states: set_rng_states(states, self.device),
            forget=self._forget,
            capturable=lambda: capturable(*self._optimizers),
            timed=self._timer.running,
            before=self._before_work,
            after=self._after_work,
        )
        return GraphedStep(lanes, parts), ""

    def _changing(self) -> list[Tensor]:
        """All tensors that a step changes and leaves."""
        modules = [
            self.model,
            *([] if self.average is None else [self.average]),
            *([] if self._learned is None else self._learned[:1]),
        ]
        weights = [tensor.detach() for module in modules for tensor in (*module.parameters(), *module.buffers())]
        states = [value for optimizer in self._optimizers for state in optimizer.state.values() for value in state.values()]
        return [*weights, *(value for value in states if isinstance(value, Tensor)), *self._sums.values()]

    def _forget(self) -> None:
        """Gradients, which a step leaves only where it fails."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _join(self) -> None:
        """The current stream waits for the steps so far."""
        if self._graphed is not None:
            self._graphed.join()

    def _outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        """Logits of this process's part of each view."""
        try:
            outputs: list[Tensor] = self._trained(*inputs)
        except Exception as error:  # compilers have their own errors
            if not self._compiled or self._count:
                raise
            raise IncompatibleError(
                f"the model of {self.folder.name} cannot be compiled",
                why=(str(error).splitlines() or [type(error).__name__])[0][:200],
                fix="leave --compile out",
            ) from error
        return outputs

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    @torch.no_grad()
    def predict(self, views: Tensor, *, averaged: bool = False) -> Tensor:
        """Logits float32 `[B, C]` of uint8 `views [B, 3, S, S]` in evaluation mode, of the weights or their mean."""
        self._join()
        model = self.average.module if averaged and self.average is not None else self.model
        model.eval()
        with self._precision(), ieee_float32():
            logits: Tensor = model(self.normalise(views.to(self.device)).contiguous(memory_format=self._format))
        return logits.float()

    def settle(self) -> None:
        """Before the epoch's test: what the processes of a team have each found of their parts becomes the same everywhere."""
        self._join()
        self._team.average_buffers(self.model)
        if self.average is not None:
            self._team.average_buffers(self.average.module)

    def end_epoch(self, tested: dict[str, float], **figures: float) -> None:
        """Log the epoch, with test figures if there are any; write a checkpoint if the last one is old or training over."""
        self._whole = False
        self._join()
        means = {name: (value / self._count).item() for name, value in self._sums.items()}
        rate = max(self._rates.values)  # of the head, if layers have their own
        row: dict[str, float] = {"epoch": self.epoch, **figures, "lr": rate, **means}
        row |= tested
        self._count_seconds()
        row["seconds"] = self._seconds
        row |= (self._spent or UNKNOWN).known()
        self.rows.append(row)
        self.epoch += 1
        self._start_epoch()
        if not all(math.isfinite(value) for value in row.values()):
            # The weights are of no use any more: what the last checkpoint holds stays.
            self._finish("diverged", reason=f"training loss {means['train_loss']}, test loss {row.get('test_loss')}")
            return
        if row.get("test_top1", -1.0) > self._best_top1:
            self._best_top1 = row["test_top1"]
            self._best = copied(self.model)
        self._whole = True
        over = self.epoch == self.config.epochs
        if over or self._team.any(time.monotonic() - self._saved_at >= self._interval):
            self._save()
        if over:
            self._finish("complete")

    def suspend(self) -> None:
        """Write a checkpoint of where it is now, and give the folder back. A step that was cut in two cannot be kept:
        then the last checkpoint stays."""
        try:
            if self.status == "training" and self._whole and self.steps:
                self._save()
        finally:
            self._release()

    def abandon(self) -> None:
        """Give the folder back with its last checkpoint."""
        self._release()

    def _release(self) -> None:
        try:
            self._writer.wait()
        finally:
            if self._lock is not None:
                self._lock.close()

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        self._join()
        self._count_seconds()
        rng = self._team.shared(self._rng)
        if not self._team.first:
            return
        weights = {"last": self.model.state_dict()}
        if self.average is not None:
            weights["ema"] = self.average.module.state_dict()
        state = {
            "optimizer": portable_state(self.optimizer, self._rates),
            "rng": rng,  # of every process
            "device": self.device.type,
            "amp": self.amp,
            "epoch": self.epoch,
            "steps": self.steps,
            "best_top1": self._best_top1,
            "rows": self.rows,
            "sums": self._sums,
            "count": self._count,
            "seconds": self._seconds,
            "moments": self._moments,
            "spent": None if self._spent is None else self._spent.known(),
            "learned": self._learned_state(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        self._writer.write(state, weights, self._best, self.rows)

    def _learned_state(self) -> list[Any] | None:
        if self._learned is None or self._learned_rates is None:
            return None
        module, optimizer = self._learned
        return [module.state_dict(), portable_state(optimizer, self._learned_rates)]

    def _restore(self) -> None:
        state = read_checkpoint(self.folder)
        if state is None:
            return
        try:
            self.model.load_state_dict(state["weights"])
            load_state(self.optimizer, state["optimizer"], self._rates)
            if self._learned is not None and self._learned_rates is not None:
                module, optimizer = self._learned
                module.load_state_dict(state["learned"][0])
                load_state(optimizer, state["learned"][1], self._learned_rates)
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            best = self.folder / "best.safetensors"
            if best.is_file():
                require_sealed(best)
                self._best = load_file(best)
        except Exception as error:  # what does not fit shows in many ways
            if out_of_memory(error):
                raise
            raise unusable_checkpoint(self.folder, error) from error
        rng = state["rng"] if isinstance(state["rng"][0], list) else [state["rng"]]  # earlier versions knew of one process
        if self._team.number < len(rng):  # one that has joined since draws from its start
            self._rng = rng_states_from(rng[self._team.number], self._rng)
        written_on = state.get("device", "cpu" if len(rng[0]) == 1 else "cuda")
        if written_on != self.device.type:
            self.moved_from = written_on
            self.notes.append(
                f"a checkpoint written on a {written_on} goes on on a {self.device.type}: from here on, bits may differ from "
                "those of a run on one of them"
            )
        recorded = state.get("amp", bool(self.config.amp))  # earlier versions used it only where it was asked for
        if recorded != self.amp:
            names = {True: "bf16", False: "float32"}
            self.notes.append(
                f"it was begun in {names[recorded]} and goes on so; a new run on this device is in {names[self.amp]}"
            )
        self.amp = recorded
        self.epoch, self.steps = state["epoch"], state["steps"]
        self._best_top1, self.rows = state["best_top1"], state["rows"]
        self._count, self._seconds = state.get("count", 0), state.get("seconds", 0.0)
        self._sums = {name: value.to(self.device) for name, value in state.get("sums", {}).items() if self._count}
        self._moments = [part.to(self.device) for part in state.get("moments", [])]
        if self._count:  # what it took until here is unknown, unless the checkpoint says it
            self._spent = Spent.of(state.get("spent"))
        if self.epoch == self.config.epochs:
            self._finish("complete")

    def _finish(self, status: Literal["complete", "diverged"], **extra: str) -> None:
        self.status = status
        self._writer.wait()
        if not self._team.first:
            return
        write_log(self.folder, self.rows)
        if status == "complete" and self._moments:
            found = moment_histogram(*torch.cat(self._moments, dim=1).double().cpu().numpy())
            write_atomically(self.folder / LOGIT_MOMENTS, found.model_dump_json().encode())
        summary = {"status": status, **extra, **summary_of(self.rows), "amp": self.amp, WEIGHTS_SEALS: weights_seals(self.folder)}
        write_atomically(self.folder / "summary.json", sealed_record(summary))
        (self.folder / CHECKPOINT).unlink(missing_ok=True)  # twice the model's size, and of no further use
        (self.folder / LOCK).unlink(missing_ok=True)  # while it is held: later it may be another process's
        self._release()

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Random numbers inside (dropout, stochastic depth) are this learner's, whoever else trains beside it."""
        others = rng_states(self.device)
        set_rng_states(self._rng, self.device)
        try:
            yield
        finally:
            self._rng = rng_states(self.device)
            set_rng_states(others, self.device)
