"""Forward passes of a teacher over rendered views: in the wanted precision, on the wanted device."""

import contextlib
import copy
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kdcache.archive import MemoryFormat
from kdcache.models.creation import Normalisation
from kdcache.models.heads import SelectedOutputs
from kdcache.system.precision import ieee_float32
from kdcache.system.transfer import to_device
from kdcache.teachers.config import Precision

__all__ = ["Forward", "batches", "last_linear", "suited_memory_format", "with_half_weights"]

_CASTING = frozenset({"cuda"})  # devices for which weights are cast to half precision once, not in every pass
_TRIED = 8  # views from which is seen whether half-precision weights change a bit
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Their `forward` gives the weights to one operation, to which autocast casts them. Subclasses may compute with them before.
_CAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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


@torch.inference_mode()
def suited_memory_format(model: nn.Module, size: int, device: torch.device, precision: Precision) -> MemoryFormat:
    """How the pixels of a batch had best lie in memory: for convolutions in half precision on a GPU with channels last.

    Tensor cores compute convolutions so; otherwise each of them transposes its input first. Models that cannot run so, since
    they `view` what only lies so without it, keep the usual format.
    """
    convolves = any(weight.ndim == 4 for weight in model.parameters())
    if device.type != "cuda" or precision == "fp32" or not convolves:
        return "contiguous"
    return "channels_last" if _runs_with_channels_last(model, size, device, precision) else "contiguous"


@torch.inference_mode()
def _runs_with_channels_last(model: nn.Module, size: int, device: torch.device, precision: Precision) -> bool:
    x = torch.zeros(2, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    try:
        with torch.autocast(device.type, dtype=_HALF[precision]):
            model(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    finally:
        model.to(memory_format=torch.contiguous_format)
    return True


def with_half_weights(model: nn.Module, dtype: torch.dtype, but: nn.Module | None = None) -> nn.Module:
    """A copy of `model` whose convolutions and linear layers, all `but` one, have weights of `dtype`. The rest is shared.

    Under autocast it gives the model's outputs bit for bit, as autocast casts the same weights, but in every pass. A model
    that computes with a layer's weights itself may differ.
    """
    usual = {"weight", "bias"}  # others, and hooks, make the weights of each pass from something else
    layers = [
        layer
        for layer in model.modules()
        if type(layer) in _CAST_LAYERS and layer is not but and not layer._forward_pre_hooks and set(layer._parameters) <= usual
    ]
    cast = {id(tensor) for layer in layers for tensor in layer.parameters(recurse=False)}
    others = set(model.modules()).difference(layers)
    cast -= {id(tensor) for layer in others for tensor in layer.parameters(recurse=False)}  # one weight of two layers
    kept = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    memo = {
        key: nn.Parameter(tensor.detach().to(dtype), requires_grad=False) if key in cast else tensor
        for key, tensor in kept.items()
    }
    return copy.deepcopy(model, memo)


class Forward:
    """Maps uint8 views to float32 logits on the device, in the wanted precision, with the classifier head in float32.

    The head is timm's `forward_head`. In a model without one it is the last linear layer that runs, if it has one output
    per class. Without such a layer, the whole model runs in the wanted precision. Wherever float32 is meant it is IEEE's.
    """

    def __init__(
        self,
        model: nn.Module,
        normalise: Normalisation,
        device: torch.device,
        precision: Precision,
        memory_format: MemoryFormat = "contiguous",
    ) -> None:
        self.model: nn.Module = model.to(memory_format=_FORMATS[memory_format])
        self.normalise, self.device = normalise, device
        self.precision: Precision = precision
        self.memory_format: MemoryFormat = memory_format
        self._in_two_parts = all(callable(getattr(model, part, None)) for part in ("forward_features", "forward_head"))
        self._half: nn.Module | None = None  # what runs in half precision
        self._head: nn.Linear | None = None  # the layer in it that stays in float32, of a model in one part

    def __call__(self, views: Tensor) -> NDArray[np.float32]:
        """Logits float32 `[B, C]`, waited for. A batch with non-finite logits in half precision is repeated in float32."""
        logits = self.launch(views)
        if not self.finite(logits):
            logits = self.in_float32(views)
        array: NDArray[np.float32] = logits.cpu().numpy()
        return array

    @torch.inference_mode()
    def launch(self, views: Tensor) -> Tensor:
        """Logits float32 `[B, C]` on the device, which may still compute them. In half precision, some may not be finite."""
        if self.precision == "fp32":
            return self.in_float32(views)
        x = self._inputs(views)
        if self._half is None:
            self._prepare_half(x[:_TRIED])
        assert self._half is not None
        return self._in_half(self._half, self._head, x)

    @torch.inference_mode()
    def in_float32(self, views: Tensor) -> Tensor:
        """Logits float32 `[B, C]` on the device, by the whole model in IEEE float32."""
        with ieee_float32():
            logits: Tensor = self.model(self._inputs(views)).float()
        return logits

    @torch.inference_mode()
    def finite(self, logits: Tensor) -> Tensor:
        """Whether logits need no repetition in float32: a bool on the device. What float32 gives is never repeated."""
        return torch.isfinite(logits).all() if self.precision != "fp32" else torch.ones((), dtype=torch.bool)

    def _inputs(self, views: Tensor) -> Tensor:
        return self.normalise(to_device(views, self.device)).contiguous(memory_format=_FORMATS[self.memory_format])

    def _in_half(self, model: nn.Module, head: nn.Linear | None, x: Tensor) -> Tensor:
        """Logits of normalised images. `model` is the teacher, or its copy with half-precision weights."""
        autocast = torch.autocast(self.device.type, dtype=_HALF[self.precision])
        if not self._in_two_parts:
            with ieee_float32(), self._float32(head), autocast:
                logits: Tensor = model(x)
            return logits.float()
        with autocast:
            features = model.forward_features(x)  # type: ignore[operator]
        with ieee_float32():
            # Models that look at several scales at once (crossvit, coat) have a list of tensors as features.
            logits = self.model.forward_head(tree_map_only(Tensor, _in_float32, features))  # type: ignore[operator]
        return logits.float()

    def _prepare_half(self, x: Tensor) -> None:
        """Find the head, and cast weights for good where that changes no logit of the normalised images `x`.

        A GPU reads the weights of a small batch for longer than it computes with them.
        """
        self._half, self._head = self.model, None if self._in_two_parts else last_linear(self.model, x[:1])
        if self.device.type not in _CASTING:
            return
        try:
            copied, head = self._with_half_weights()
            same = torch.equal(self._in_half(copied, head, x), self._in_half(self.model, self._head, x))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model may refuse to be copied, or do more with its weights than layers do
            same = False
        if same:
            self._half, self._head = copied, head

    def _with_half_weights(self) -> tuple[nn.Module, nn.Linear | None]:
        """The copy with half-precision weights, and the layer in it that stays in float32."""
        copied = with_half_weights(self.model, _HALF[self.precision], but=self._head)
        place = next((name for name, layer in self.model.named_modules() if layer is self._head), None)
        head = None if place is None else copied.get_submodule(place)
        assert head is None or isinstance(head, nn.Linear)
        return copied, head

    @contextlib.contextmanager
    def _float32(self, head: nn.Linear | None) -> Iterator[None]:
        """Run this layer in float32 meanwhile, also under autocast."""
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
