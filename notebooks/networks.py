"""The networks of the experiments, and torchvision beside any torch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nine_layer(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """The network of ABCNets.jl for 28x28 images: nine convolutions, each but the first after BatchNorm and ReLU."""

    def conv(inputs, outputs):
        return [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1)]

    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        *conv(16, 32), *conv(32, 32), nn.MaxPool2d(2),
        *conv(32, 32), *conv(32, 64), *conv(64, 64), nn.MaxPool2d(2),
        *conv(64, 64), *conv(64, 64), *conv(64, 64), nn.MaxPool2d(2),
        nn.Flatten(), nn.ReLU(), nn.Linear(576, classes),
    )  # fmt: skip


class Block(nn.Module):
    """Two convolutions around a shortcut, BatchNorm and ReLU first (He et al. 2016, arXiv:1603.05027).

    Where the image shrinks, the shortcut averages pixels and appends channels of zeros: nothing there to binarize.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.stride, self.more_channels = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        return y + (F.pad(x, (0, 0, 0, 0, 0, self.more_channels)) if self.more_channels else x)


def resnet20(channels: int = 3, classes: int = 10) -> nn.Sequential:
    """ResNet-20 for 32x32 images: three stages of three blocks with 16, 32 and 64 channels (arXiv:1512.03385)."""
    widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        *[Block(*width) for width in widths],
        nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


def network_for(data) -> Callable:
    """The nine-layer network for 28x28 images, ResNet-20 for any other size."""
    return nine_layer if data.train_images.shape[-1] == 28 else resnet20


def build_network(data, seed: int = 0) -> nn.Module:
    """The `network_for` a `Data`, freshly initialized."""
    torch.manual_seed(seed)
    return network_for(data)(data.train_images.shape[1], len(data.classes))


def import_torchvision() -> None:
    """Import torchvision, beside a CPU-only torch as well.

    PyPI's torchvision is built for CUDA. Its C++ operators cannot load into a CPU-only torch, and its Python side fails
    on the first of them that it misses. Nothing here uses these operators: declaring them is enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.operators_declared_by_us = library  # The declaration lives as long as its library object.
