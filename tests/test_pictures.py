"""Pictures of layers."""

import sys

import matplotlib
import pytest
import torch
from pictures import picture
from torch import nn

import abcnets
from abcnets import ABCConv2d, ABCLinear

matplotlib.use("agg")


@pytest.mark.parametrize("layer, shape, panels, images", [
    (ABCConv2d(4, 8, 3), (2, 4, 9, 9), 4, 3 * 5),  # weights, kernels, staircase, and the input's histogram behind it
    (ABCConv2d(4, 8, 3, activation_bases=None, weight_bases=2, per_channel=False), None, 2, 3 * 4),
    (ABCConv2d(4, 8, 1, weight_bases=None), (2, 4, 9, 9), 2, 0),
    (abcnets.ABCConv1d(4, 8, 5, weight_bases=1, activation_bases=1), None, 3, 2 * 3),
    (abcnets.ABCConv3d(4, 2, (1, 3, 3), us=[0, 0, 0]), None, 3, 2 * 5),
    (ABCLinear(20, 8, weight_bases=5), (7, 20), 4, 7),
    (abcnets.pack(ABCConv2d(20, 8, 3, active=True)), (2, 20, 9, 9), 3, 3 * 4),
    (abcnets.pack(ABCLinear(20, 8, activation_bases=None, active=True)), None, 1, 4),
])  # fmt: skip
def test_picture(layer, shape, panels, images, tmp_path):
    figure = picture(layer, None if shape is None else torch.randn(shape).relu())
    figure.savefig(tmp_path / "layer.png")
    assert len(figure.axes) == panels and sum(len(axis.images) for axis in figure.axes) == images


def test_picture_draws_the_layers_own_numbers():
    layer = ABCConv2d(4, 8, 3, weight_bases=3, activation_bases=2)
    weights, kernels, staircase = picture(layer).axes
    cuts = sorted(line.get_xdata()[0] for line in weights.lines if line.get_linestyle() == "--")
    assert cuts == pytest.approx(sorted((-layer.us).tolist()))
    W, *B, Wq = (torch.as_tensor(image.get_array().data) for image in kernels.images[:5])
    assert all(base.abs().eq(1).all() for base in B) and len(Wq.unique()) <= 4 and W.unique().numel() == 9
    (curve,) = (line for line in staircase.lines if line.get_label() == "$A_q$")
    R, Aq = torch.tensor(curve.get_xdata()), torch.tensor(curve.get_ydata())
    assert torch.allclose(abcnets.quantize_activation(R, layer.vs, layer.betas), Aq)


def test_picture_says_what_is_missing(monkeypatch):
    with pytest.raises(TypeError, match="got Conv2d"):
        picture(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="both sides"):
        picture(ABCLinear(3, 3, weight_bases=None, activation_bases=None))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        picture(ABCLinear(3, 3))
