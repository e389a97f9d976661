"""TF32 on machines without it: convolutions whose inputs and weights have 10 bits of mantissa, as in tensor cores."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def rounded(values: Tensor) -> Tensor:
    """`values`, float32, to the nearest of those that TF32 has; ties to even."""
    bits = values.contiguous().view(torch.int32)
    return (bits + 0x0FFF + ((bits >> 13) & 1) & ~0x1FFF).view(torch.float32)


class TF32(TorchFunctionMode):
    """Inside, float32 convolutions compute with TF32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.conv2d, F.conv2d) and args[0].dtype == torch.float32:
            args = (rounded(args[0]), rounded(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))
