"""Models as training wants them: shown several views, with norms of a whole batch, and with an average of their weights."""

from typing import Any

from torch import Tensor, nn

__all__ = ["EachView", "averaged", "with_synchronised_norms"]


class EachView(nn.Module):
    """A model that is given several views, and sees each by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.model(each) for each in views]


def with_synchronised_norms(model: nn.Module) -> nn.Module:
    import timm.layers  # whose function knows timm's own norms too

    converted: nn.Module = timm.layers.convert_sync_batchnorm(model)  # type: ignore[attr-defined, no-untyped-call]
    return converted


def averaged(model: nn.Module, decay: float) -> Any:
    from timm.utils import ModelEmaV3  # type: ignore[attr-defined]

    return ModelEmaV3(model, decay=decay)
