"""Files of weights, as other people's programs write them."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

__all__ = ["save_weights"]


def save_weights(model: nn.Module, file: Path) -> None:
    """Write the weights of `model` as safetensors, under timm's names."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, file, metadata={"format": "pt"})
