"""Forward passes of a teacher over rendered views, shard by shard, into an archive."""

import collections
import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kdcache.archive import ArchiveWriter
from kdcache.datasets.canvas import Canvas
from kdcache.models.creation import Normalisation
from kdcache.models.heads import SelectedOutputs
from kdcache.replay.prefetch import Rendered, render_batches
from kdcache.system.interrupts import stopped_between_steps
from kdcache.system.progress import Progress, Silent
from kdcache.teachers.config import Precision
from kdcache.views.policy import RendererChoice
from kdcache.views.probe import grids

__all__ = ["Forward", "batches", "last_linear", "write_shards"]


def write_shards(
    writer: ArchiveWriter,
    forward: "Forward",
    canvas: Canvas,
    *,
    batch_size: int,
    start_view: int = 0,
    share: tuple[int, int] | None = None,
    workers: int = 0,
    renderer: RendererChoice = "auto",
    progress: Progress | None = None,
) -> None:
    """Write the missing shards that no other process has claimed, from `start_view` on and then from the first view.

    A shard is claimed when rendering, which runs ahead across shards, reaches it. No batch crosses a shard's border. With
    `share` (i, n), only shards whose running number modulo n is i are written; other processes leave these alone.
    """
    progress = progress or Silent()
    policy = writer.plan.policy
    assert policy is not None
    number, parts = share or (0, 1)
    mine = set(itertools.islice(writer.shards(), number, None, parts))
    total = sum(len(writer.positions(block)) for _, block in mine)
    done = total - sum(len(writer.positions(block)) for _, block in mine.intersection(writer.missing()))
    started, at_start = time.monotonic(), done
    while missing := mine.intersection(writer.missing()):  # repeat for shards that another process left unwritten
        order = sorted(missing, key=lambda shard: (shard[0] < start_view, shard))
        with stopped_between_steps() as check, contextlib.ExitStack() as claims:
            claimed = _Claimed(writer, order, batch_size, claims, owned=share is not None)
            rows = _ShardRows()
            rendered = render_batches(
                canvas,
                policy,
                claimed,
                workers=workers,
                renderer=renderer,
                device=forward.device,
                probe_version=writer.plan.probe_version,
            )
            for item in rendered:
                check()
                view, block, claim = claimed.shards[0]
                size = len(writer.positions(block))
                rows.add(item, forward(item.images), size)
                if len(rows) < size:
                    continue
                if not writer.finished(view, block):  # another process may finish it where locks do not exclude that
                    writer.write(view, block, *rows.columns)
                claim.close()
                claimed.shards.popleft()
                rows = _ShardRows()
                done += size
                speed = (done - at_start) / max(time.monotonic() - started, 1e-9)
                progress.update("dump", done, total, f"{speed:.0f} views/s")
            check()
        if not claimed.any:
            break


class _Claimed:
    """Batches (view, positions) of all shards that can be claimed. A shard is claimed at its first batch."""

    def __init__(
        self,
        writer: ArchiveWriter,
        order: Sequence[tuple[int, int]],
        batch_size: int,
        claims: contextlib.ExitStack,
        *,
        owned: bool,
    ) -> None:
        self._writer, self._order, self._batch_size, self._claims, self._owned = writer, order, batch_size, claims, owned
        self.shards: collections.deque[tuple[int, int, contextlib.ExitStack]] = collections.deque()  # claimed, not written
        self.any = False

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for view, block in self._order:
            claim = self._claims.enter_context(contextlib.ExitStack())
            if claim.enter_context(self._writer.claim(view, block, owned=self._owned)):
                self.any = True
                self.shards.append((view, block, claim))
                for rows in batches(self._writer.positions(block), self._batch_size):
                    yield view, rows
            else:
                claim.close()


class _ShardRows:
    """The rows of one shard, collected batch by batch. Each row is copied once; pixels are not kept."""

    def __init__(self) -> None:
        self.columns: tuple[NDArray, ...] = ()  # logits, sample numbers, digests, grids
        self._filled = 0

    def __len__(self) -> int:
        """Number of rows so far."""
        return self._filled

    def add(self, item: Rendered, logits: NDArray[np.float32], size: int) -> None:
        """Add the next batch of a shard of `size` rows."""
        batch = (logits, item.rows.sample, item.digest, grids(item.images))
        if not self.columns:
            self.columns = tuple(np.empty((size, *part.shape[1:]), part.dtype) for part in batch)
        rows = slice(self._filled, self._filled + len(logits))
        for column, part in zip(self.columns, batch, strict=True):
            column[rows] = part
        self._filled = rows.stop


def _in_float32(features: Tensor) -> Tensor:
    return features.float() if features.is_floating_point() else features


def batches(positions: range, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Positions of a shard in batches from its start, so that restarts and other processes do not move the borders."""
    for start in range(positions.start, positions.stop, batch_size):
        yield np.arange(start, min(start + batch_size, positions.stop))


def last_linear(model: nn.Module, x: Tensor, *, gives_logits: bool = False) -> nn.Linear | None:
    """The last linear layer that runs on the normalised images `x [B, 3, S, S]`, if it has one output per class; else None.

    With `gives_logits`, also None unless its output is the model's, as it is: not averaged, scaled or added to.
    """
    ran: list[tuple[nn.Linear, Tensor, int]] = []

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        ran.append((layer, output, 0 if output.is_inference() else output._version))

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = model.num_outputs if isinstance(model, SelectedOutputs) else logits.shape[-1]
    if not ran or ran[-1][1].shape[-1] != outputs:
        return None
    layer, output, version = ran[-1]
    unchanged = output.data_ptr() == logits.data_ptr() and (output.is_inference() or output._version == version)
    return layer if not gives_logits or (output.shape == logits.shape and unchanged) else None


class Forward:
    """Maps uint8 views to float32 logits on the device, in the wanted precision, with the classifier head in float32.

    The head is timm's `forward_head`. In a model without one it is the last linear layer that runs, if it has one output
    per class. Without such a layer, the whole model runs in the wanted precision.
    """

    def __init__(self, model: nn.Module, normalise: Normalisation, device: torch.device, precision: Precision) -> None:
        self.model, self.normalise, self.device = model, normalise, device
        self.precision: Precision = precision
        self._in_two_parts = all(callable(getattr(model, part, None)) for part in ("forward_features", "forward_head"))
        self._head: nn.Linear | None = None
        self._searched = False

    @torch.inference_mode()
    def __call__(self, views: Tensor) -> NDArray[np.float32]:
        """Logits float32 `[B, C]`. A batch with non-finite logits in half precision is repeated in float32."""
        x = self.normalise(views.to(self.device, non_blocking=True))
        if self.precision == "fp32":
            return self._numpy(self.model(x))
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        if self._in_two_parts:
            with torch.autocast(self.device.type, dtype=dtype):
                features = self.model.forward_features(x)  # type: ignore[operator]
            # Of models that look at several scales at once (crossvit, coat), features are a list of tensors.
            logits = self.model.forward_head(tree_map_only(Tensor, _in_float32, features))  # type: ignore[operator]
        else:
            with self._float32_head(x), torch.autocast(self.device.type, dtype=dtype):
                logits = self.model(x)
        if not torch.isfinite(logits).all():
            logits = self.model(x)
        return self._numpy(logits)

    @contextlib.contextmanager
    def _float32_head(self, x: Tensor) -> Iterator[None]:
        """Run the last linear layer in float32 meanwhile, also under autocast."""
        if not self._searched:
            self._head, self._searched = last_linear(self.model, x[:1]), True
        head = self._head
        if head is None:
            yield
            return
        forward = head.forward

        def in_float32(input: Tensor) -> Tensor:
            with torch.autocast(self.device.type, enabled=False):
                return forward(input.float())

        head.forward = in_float32  # type: ignore[method-assign]
        try:
            yield
        finally:
            del head.forward  # restores the class's own method

    @staticmethod
    def _numpy(logits: Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = logits.float().cpu().numpy()
        return array
