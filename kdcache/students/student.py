"""One student in training: made as its place in the grid says, and stepped on the batches that a group shares."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from kdcache.archive import Ensemble
from kdcache.methods import METHODS, Method
from kdcache.models.creation import create_model, described, load_weights, timm_config, weights_digest
from kdcache.models.heads import zero_head
from kdcache.models.names import CONFIG
from kdcache.replay.stream import Batch, CachedTargets, fit_control
from kdcache.students.config import DistillConfig
from kdcache.students.grid import StudentSpec
from kdcache.students.records import record_graph, write_args
from kdcache.system.distributed import Team
from kdcache.system.files import write_atomically
from kdcache.system.progress import Progress
from kdcache.targets import Targets
from kdcache.training.devices import seeded
from kdcache.training.evaluation import EvalSets
from kdcache.training.graphs import Lanes
from kdcache.training.keeping import kept_outputs
from kdcache.training.learner import Learner
from kdcache.training.metrics import agreement, correlation, divergence
from kdcache.training.outputs import TEST_OUTPUTS
from kdcache.training.tested import doubts as test_doubts
from kdcache.training.tested import views_of_tests
from kdcache.views.policy import ViewPolicy
from kdcache.views.resample import resized

__all__ = ["Shown", "Student"]


class Shown:
    """One view of a batch's samples, as its students share it: targets are made once for each temperature and control,
    images once for each size.

    Images are this process's, targets of the whole batch.
    """

    def __init__(self, batch: Batch, team: Team, policy: ViewPolicy) -> None:
        self.targets = cache(replace(batch, second=None).of_all(team).targets)
        self.images = cache(lambda size: resized(batch.images, size, policy.filter))


class Student:
    """One student: its learner, and how it turns a batch into a loss."""

    def __init__(
        self,
        spec: StudentSpec,
        config: DistillConfig,
        archive: Ensemble,
        second: Ensemble,
        evaluations: EvalSets,
        stream: CachedTargets,
        device: torch.device,
        team: Team,
        progress: Progress,
        lanes: Lanes | None = None,
    ) -> None:
        self.spec, self.size = spec, spec.size or stream.policy.size
        views = spec.method.views_per_step
        second = second if views == 2 else archive
        fitted = fit_control(spec.control, archive, spec.tau)
        other = fit_control(spec.control, second, spec.tau) if second is not archive else fitted
        self.controls = (fitted, other)[:views]
        self.method = fit_control(spec.method, archive, spec.tau)
        self.state = spec.method.new_state().to(device)
        optimizer = spec.method.new_optimizer(self.state)
        with seeded(spec.seed):
            start, classes = spec.start, archive.num_classes
            model, normalise = create_model(
                spec.name,
                classes,
                input_size=self.size,
                pretrained=start.pretrained,
                class_names=archive.class_names,
                drop_path=spec.settings.drop_path,
            )
            redrawn = load_weights(model, start.file, replace_head=True) if start.file is not None else []
        zero = start.new_head and spec.settings.head_init == "zero"
        if zero:
            zero_head(model, spec.name)
        if team.size > 1 and device.type != "cuda" and any(isinstance(each, _BatchNorm) for each in model.modules()):
            progress.say(f"{spec.name}: on a {device.type}, batch normalisation sees each process's part of a batch only")
        if redrawn:
            how = "zero" if zero else "random"
            progress.say(f"{start.file} has other classes: {', '.join(redrawn)} of {spec.name} start at {how}")
        tested = views_of_tests(spec.tested, spec.name, self.size, model)
        self.evaluation, self._tested = evaluations[tested.policy], tested.policy
        self.notes = [f"tests: {tested.title}", *test_doubts(spec.tested, tested, spec.name, evaluations.canvas, model)]
        start_digest = weights_digest(model)
        self.description = described(spec.name, model, normalise, start_digest, pretrained=start.pretrained)
        self.learner = Learner(
            spec.folder,
            model,
            normalise,
            spec.settings,
            steps_per_epoch=len(stream),
            seed=spec.seed,
            device=device,
            runtime=config.runtime,
            learned=(self.state, optimizer) if self.state is not None and optimizer is not None else None,
            team=team,
            lanes=lanes if _is_known(spec.method) else None,
        )
        self._no_graph = (
            "" if lanes is None or _is_known(spec.method) else f"off ({METHODS.spec(spec.method)} is not kdcache's own)"
        )
        self._graph = ""  # what was told of it
        self._writes = team.first
        self.notes += self.learner.notes
        if team.first:
            made_as = timm_config(spec.name, model, normalise, tested.timm_fields(), self.size, archive.class_names)
            if made_as is not None and not (spec.folder / CONFIG).is_file():
                write_atomically(spec.folder / CONFIG, made_as)
            about = {
                "student_weights_sha256": start_digest,
                **({"student_size": spec.size} if spec.size else {}),
                "test": tested.title,
                "test_views": tested.model_dump(mode="json"),
            }
            write_args(self.learner, spec, config, archive, second, team.size, about)

    def step(self, shown: Sequence[Shown]) -> None:
        """One step on the views of a batch's samples, as many of them as the method wants."""
        method, tau, shown = self.method, self.spec.tau, shown[: len(self.controls)]
        targets, *second = [each.targets(tau, control) for each, control in zip(shown, self.controls, strict=True)]
        targets = replace(targets, second=second[0]) if second else targets
        teacher = shown[0].targets(tau).logits
        self.state.epoch = self.learner.epoch + 1

        def loss_of(logits: Tensor, targets: Targets, teacher: Tensor) -> Tensor:
            return method(logits, targets, self.state)

        def measure(logits: Tensor, targets: Targets, teacher: Tensor) -> dict[str, Tensor]:
            figures = {"agreement": agreement(logits, teacher), "divergence": divergence(logits, teacher, tau)}
            figures["correlation"] = correlation(logits, teacher)
            return figures | method.figures(self.state)

        images = [each.images(self.size) for each in shown]
        stage = min(self.state.epoch, method.ramp_epochs)  # from when on no loss of kdcache's depends on the epoch
        self.learner.step(images, loss_of, measure, (targets, teacher), stage)

    def keep_outputs(self) -> None:
        """Write what the student says of some test images into its folder, before its last epoch is recorded."""
        if self._writes:
            learner = self.learner
            kept = kept_outputs(learner.model, learner.predict, self.evaluation.canvas, self._tested)
            if np.isfinite(kept.logits).all():  # else it is about to be stopped
                write_atomically(self.spec.folder / TEST_OUTPUTS, kept.as_file())

    def news(self) -> str:
        """What has become known of its CUDA graph and was not told yet; it is recorded in `args.yaml`."""
        state = self._no_graph or self.learner.graph
        if state == self._graph:
            return ""
        self._graph = state
        if self._writes:
            record_graph(self.spec.folder, state)
        return f"steps are not replayed as CUDA graphs: {state[5:-1]}" if state.startswith("off") else ""


def _is_known(method: Method) -> bool:
    """Whether it is one of kdcache's methods, which depend on their targets, their state's parameters and the epoch alone."""
    return type(method).__module__.startswith("kdcache.")
