"""The CIFAR models of the distillation papers, in timm's registry under names that begin with `cifar_`.

They are the teachers and students of CRD (contrastive representation distillation, ICLR 2020, arXiv 1910.10699). Most later
methods are compared on CRD's pairs. The networks come from the papers named below, adapted to 32 x 32 pixels as in CRD's code
(RepDistiller; mdistiller has the same). Importing this module registers them, and timm then creates them by name.

All of them map images `[B, 3, S, S]` through `stem`, `stages` and `tail` to maps `[B, F, s, s]`. One linear layer classifies
the mean over the pixels, so S may differ from 32. The shapes below are for S = 32.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["ELSEWHERE", "TOP1", "VGG", "ZOO", "CifarNet", "MobileNetV2", "ResNet", "ShuffleNetV1", "ShuffleNetV2", "WideResNet"]

# Published test accuracy on CIFAR-100 in %, without a teacher (CRD, tables 1 and 2; or as `ELSEWHERE` says).
TOP1: dict[str, float] = {
    "cifar_resnet20": 69.06,
    "cifar_resnet32": 71.14,
    "cifar_resnet56": 72.34,
    "cifar_resnet110": 74.31,
    "cifar_resnet8x4": 72.50,
    "cifar_resnet32x4": 79.42,
    "cifar_resnet50": 79.34,
    "cifar_wrn_16_2": 73.26,
    "cifar_wrn_40_1": 71.98,
    "cifar_wrn_40_2": 75.61,
    "cifar_wrn_28_2": 75.45,
    "cifar_wrn_16_4": 77.51,
    "cifar_wrn_28_4": 78.60,
    "cifar_vgg8": 70.36,
    "cifar_vgg13": 74.64,
    "cifar_mobilenetv2": 64.60,
    "cifar_shufflenetv1": 70.50,
    "cifar_shufflenetv2": 71.82,
}
ELSEWHERE: dict[str, str] = dict.fromkeys(
    ("cifar_wrn_28_2", "cifar_wrn_16_4", "cifar_wrn_28_4"), "logit standardization, table 5"
)


# ---------------------------------------------------------------- what they have in common


class CifarNet(nn.Module):
    """A network of `stem`, `stages`, `tail`, mean over all pixels and classifier `fc`, with timm's interface."""

    # Initialisation as in CRD's code. Convolutions: Kaiming normal by fan-out, or PyTorch's default. Classifier: PyTorch's
    # default, or normal with this standard deviation and zero bias.
    kaiming: ClassVar[bool] = True
    classifier_std: ClassVar[float | None] = None

    # Prefixes of tensor names in the checkpoints of CRD and mdistiller -> ours, for the families with published teachers.
    published: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        stem: nn.Sequential,
        stages: Iterable[nn.Sequential],
        tail: nn.Module,
        num_features: int,
        *,
        num_classes: int = 100,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = self.head_hidden_size = num_features
        self.stem, self.stages, self.tail = stem, nn.Sequential(*stages), tail
        self.fc = classifier(num_features, num_classes)
        self.apply(self.draw)

    def draw(self, layer: nn.Module) -> None:
        """Initialise a layer."""
        if isinstance(layer, nn.Conv2d) and self.kaiming:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(layer, nn.Linear) and self.classifier_std is not None:
            nn.init.normal_(layer.weight, std=self.classifier_std)
            nn.init.zeros_(layer.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tail(self.stages(self.stem(x)))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; with 0 classes the model returns the features."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool {global_pool!r}: these models average over the pixels")
        self.num_classes, self.fc = num_classes, classifier(self.num_features, num_classes)
        self.draw(self.fc)

    def rename_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's state with tensor names of CRD or mdistiller changed to ours. Our own names stay."""
        renamed = {}
        for name, value in state.items():
            theirs, ours = next((pair for pair in self.published.items() if name.startswith(pair[0])), ("", ""))
            name = ours + name.removeprefix(theirs)
            renamed[name.replace(".downsample.", ".shortcut.").replace(".convShortcut.", ".shortcut.")] = value
        # PyTorch 0.4.0, which CRD used, did not store batch norm's count of batches.
        if not any(name.endswith("num_batches_tracked") for name in renamed):
            renamed |= {name: value for name, value in self.state_dict().items() if name.endswith("num_batches_tracked")}
        return renamed


def classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()


def conv(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=bias)


def depthwise(width: int, stride: int) -> nn.Conv2d:
    return conv(width, width, 3, stride, groups=width)


def conv_norm_relu(width_in: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(width_in, width, kernel, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def stages_of(
    block: Callable[[int, int, int], nn.Module], width_in: int, layers: Iterable[tuple[int, int, int]]
) -> list[nn.Sequential]:
    """One stage of `block(width_in, width, stride)` per (width, blocks, stride). The first block has the stride."""
    stages = []
    for width, blocks, stride in layers:
        stages.append(nn.Sequential(block(width_in, width, stride), *(block(width, width, 1) for _ in range(blocks - 1))))
        width_in = width
    return stages


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels `[B, groups * n, H, W]` interleaved from the groups (ShuffleNet, section 3.1)."""
    rows, channels, *pixels = x.shape
    return x.reshape(rows, groups, channels // groups, *pixels).transpose(1, 2).reshape(x.shape)


# ---------------------------------------------------------------- residual networks


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions plus the shortcut, then ReLU (He et al. 2016, figure 2).

    Where shapes change, the shortcut is a 1 x 1 convolution with batch norm. This is the paper's option B; the paper itself
    pads on CIFAR.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = projection(width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions; the inner width is a quarter (He et al. 2016, figure 5)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.conv1, self.bn1 = conv(width_in, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, width, 1), nn.BatchNorm2d(width)
        self.shortcut = projection(width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def projection(width_in: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and width_in == width:
        return nn.Identity()
    return nn.Sequential(conv(width_in, width, 1, stride), nn.BatchNorm2d(width))


class ResNet(CifarNet):
    """ResNet (He et al. 2016, arXiv 1512.03385). Stages from the second on halve the maps.

    Section 4.2 for CIFAR: a 3 x 3 stem and three stages of n `BasicBlock`s, 6n + 2 layers; 64 (x4: 256) maps of 8 x 8. CRD's
    x4 networks have stages four times as wide behind a stem twice as wide. ResNet50 is table 1's with a 3 x 3 stem of stride 1
    and no pooling before its four stages of `Bottleneck`s: 2048 maps of 4 x 4.
    """

    published: ClassVar[dict[str, str]] = {
        "conv1.": "stem.0.",
        "bn1.": "stem.1.",
        **{f"layer{i + 1}.": f"stages.{i}." for i in range(4)},
        "linear.": "fc.",
    }

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        stem: int,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        *,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        strides = (1, *[2] * (len(widths) - 1))
        stages = stages_of(block, stem, zip(widths, blocks, strides, strict=True))
        super().__init__(conv_norm_relu(in_chans, stem, 3), stages, nn.Identity(), widths[-1], **head)


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3 x 3 convolutions; no ReLU after the sum (wide ResNets, figure 1a).

    Where widths change, the shortcut is a 1 x 1 convolution of the input after batch norm and ReLU.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv(width_in, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.shortcut = conv(width_in, width, 1, stride) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        rectified = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(rectified))))
        return out + (x if self.shortcut is None else self.shortcut(rectified))  # type: ignore[no-any-return]


class WideResNet(CifarNet):
    """Wide ResNet WRN-d-k (Zagoruyko & Komodakis 2016, arXiv 1605.07146, table 1).

    The depth is d = 6n + 4. There is no dropout. The last stage gives 64k maps of 8 x 8.
    """

    published: ClassVar[dict[str, str]] = {
        "conv1.": "stem.0.",
        **{f"block{i + 1}.layer.": f"stages.{i}." for i in range(3)},
        "bn1.": "tail.0.",
    }

    def __init__(self, n: int, k: int, *, in_chans: int = 3, **head: Any) -> None:
        stages = stages_of(PreActivationBlock, 16, [(16 * k, n, 1), (32 * k, n, 2), (64 * k, n, 2)])
        tail = nn.Sequential(nn.BatchNorm2d(64 * k), nn.ReLU(inplace=True))
        super().__init__(nn.Sequential(conv(in_chans, 16, 3)), stages, tail, 64 * k, **head)

    def draw(self, layer: nn.Module) -> None:
        super().draw(layer)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------- VGG


class PoolFrom8(nn.MaxPool2d):
    """Max pooling of maps of at least 8 x 8. Smaller ones stay unchanged."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.shape[-1] >= 8 else input


class VGG(CifarNet):
    """VGG (Simonyan & Zisserman 2015, arXiv 1409.1556, table 1) with batch norm and one linear layer; 512 maps of 4 x 4.

    `counts` holds the number of 3 x 3 convolutions of each of the five stages; the first stage is the stem. There are three
    poolings for 32 px, and a fourth from 64 px on. Names still count the paper's three linear layers. vgg8 is from CRD.
    """

    widths: ClassVar[tuple[int, ...]] = (64, 128, 256, 512, 512)
    classifier_std: ClassVar[float | None] = 0.01
    published: ClassVar[dict[str, str]] = {
        "block0.": "stem.",
        **{f"block{i + 1}.": f"stages.{i}." for i in range(4)},
        "classifier.": "fc.",
    }

    def __init__(self, counts: tuple[int, ...], *, in_chans: int = 3, **head: Any) -> None:
        stages: list[nn.Sequential] = []
        width_in = in_chans
        for width, count in zip(self.widths, counts, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += conv(width_in, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
                width_in = width
            stages.append(nn.Sequential(*layers))
        for stage, pool in zip(stages[:4], (nn.MaxPool2d, nn.MaxPool2d, nn.MaxPool2d, PoolFrom8), strict=True):
            stage.append(pool(2))
        super().__init__(stages[0], stages[1:], nn.Identity(), width_in, **head)


# ---------------------------------------------------------------- mobile networks


class InvertedResidual(nn.Module):
    """1 x 1 (to `expansion` times the width), 3 x 3 depthwise and linear 1 x 1 convolutions (MobileNetV2, section 3.3)."""

    def __init__(self, width_in: int, width: int, stride: int, *, expansion: int) -> None:
        super().__init__()
        inner = expansion * width_in
        self.conv = nn.Sequential(
            *conv_norm_relu(width_in, inner, 1),
            *(depthwise(inner, stride), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
            *(conv(inner, width, 1), nn.BatchNorm2d(width)),
        )
        self.residual = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(CifarNet):
    """MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381, table 2) at width 0.5, with ReLU for ReLU6; 1280 maps of 2 x 2.

    Differences to the paper: the second stage has stride 1, not 2. The first stage has a 1 x 1 convolution, although its
    expansion is 1. Widths are not rounded to multiples of 8.
    """

    classifier_std: ClassVar[float | None] = 0.01

    def __init__(self, width: float = 0.5, *, in_chans: int = 3, **head: Any) -> None:
        stem, first, *others = (int(c * width) for c in (32, 16, 24, 32, 64, 96, 160, 320))
        layers = zip(others, (2, 3, 4, 3, 3, 1), (1, 2, 2, 1, 2, 1), strict=True)
        stages = [
            *stages_of(partial(InvertedResidual, expansion=1), stem, [(first, 1, 1)]),
            *stages_of(partial(InvertedResidual, expansion=6), first, layers),
        ]
        super().__init__(conv_norm_relu(in_chans, stem, 3, 2), stages, conv_norm_relu(others[-1], 1280, 1), 1280, **head)


class ShuffleV1Block(nn.Module):
    """Grouped 1 x 1, shuffle, 3 x 3 depthwise, grouped 1 x 1 convolution; inner width a quarter (ShuffleNet, figure 2).

    With stride 2 the averaged input is concatenated, not added. Unlike in the paper, a ReLU follows the depthwise
    convolution.
    """

    def __init__(self, width_in: int, width: int, stride: int, *, groups: int, stem: int) -> None:
        super().__init__()
        own = width - width_in if stride == 2 else width  # the rest are the input's channels
        inner = own // 4
        self.stride, self.groups = stride, 1 if width_in == stem else groups  # the stem is too narrow for groups
        self.conv1, self.bn1 = conv(width_in, inner, 1, groups=self.groups), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = depthwise(inner, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, own, 1, groups=groups), nn.BatchNorm2d(own)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffled(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + x if self.stride == 1 else torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], dim=1))


class ShuffleNetV1(CifarNet):
    """ShuffleNet (Zhang et al. 2018, arXiv 1707.01083, table 1, 3 groups), 1 x 1 stem of stride 1; 960 maps of 4 x 4."""

    kaiming: ClassVar[bool] = False

    def __init__(self, *, in_chans: int = 3, **head: Any) -> None:
        stages = stages_of(partial(ShuffleV1Block, groups=3, stem=24), 24, [(240, 4, 2), (480, 8, 2), (960, 4, 2)])
        super().__init__(conv_norm_relu(in_chans, 24, 1), stages, nn.Identity(), 960, **head)


class ShuffleV2Block(nn.Module):
    """1 x 1, 3 x 3 depthwise and 1 x 1 convolutions on half of the channels, then a shuffle (ShuffleNetV2, figure 3c).

    With stride 2 both branches take all channels; the left one is a depthwise and a 1 x 1 convolution (figure 3d).
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        half, self.down = width // 2, stride == 2
        self.left = (
            nn.Sequential(depthwise(width_in, stride), nn.BatchNorm2d(width_in), *conv_norm_relu(width_in, half, 1))
            if self.down
            else nn.Identity()
        )
        self.right = nn.Sequential(
            *conv_norm_relu(width_in if self.down else half, half, 1),
            *(depthwise(half, stride), nn.BatchNorm2d(half)),
            *conv_norm_relu(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.down else x.chunk(2, dim=1)
        return shuffled(torch.cat([self.left(left), self.right(right)], dim=1), 2)


class ShuffleNetV2(CifarNet):
    """ShuffleNetV2 (Ma et al. 2018, arXiv 1807.11164, table 5, width 1), 1 x 1 stem of stride 1; 1024 maps of 4 x 4."""

    kaiming: ClassVar[bool] = False

    def __init__(self, *, in_chans: int = 3, **head: Any) -> None:
        stages = stages_of(ShuffleV2Block, 24, [(116, 4, 2), (232, 8, 2), (464, 4, 2)])
        super().__init__(conv_norm_relu(in_chans, 24, 1), stages, conv_norm_relu(464, 1024, 1), 1024, **head)


# ---------------------------------------------------------------- the zoo

ZOO: dict[str, Callable[..., CifarNet]] = {
    **{f"cifar_resnet{6 * n + 2}": partial(ResNet, BasicBlock, 16, (16, 32, 64), (n, n, n)) for n in (1, 2, 3, 5, 7, 9, 18)},
    **{f"cifar_resnet{6 * n + 2}x4": partial(ResNet, BasicBlock, 32, (64, 128, 256), (n, n, n)) for n in (1, 5)},
    "cifar_resnet50": partial(ResNet, Bottleneck, 64, (256, 512, 1024, 2048), (3, 4, 6, 3)),
    **{f"cifar_wrn_{6 * n + 4}_{k}": partial(WideResNet, n, k) for n in (2, 6) for k in (1, 2)},
    **{f"cifar_wrn_{6 * n + 4}_{k}": partial(WideResNet, n, k) for n, k in ((4, 2), (2, 4), (4, 4))},
    "cifar_vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "cifar_vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "cifar_vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "cifar_vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "cifar_vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "cifar_mobilenetv2": MobileNetV2,
    "cifar_shufflenetv1": ShuffleNetV1,
    "cifar_shufflenetv2": ShuffleNetV2,
}

# No source of weights, so timm refuses `pretrained=True`. The normalisation is CRD's for CIFAR-100.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 32, 32),
            "num_classes": 100,
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
            "crop_pct": 1.0,
            "first_conv": "stem.0",
            "classifier": "fc",
        }
        for name in ZOO
    }
)


def _register(name: str) -> None:
    def make(pretrained: bool = False, **options: Any) -> CifarNet:
        return build_model_with_cfg(ZOO[name], name, pretrained, **options)

    make.__name__ = name  # timm registers it by this name, and adds it to __all__
    globals()[name] = register_model(make)


for _name in ZOO:
    _register(_name)
