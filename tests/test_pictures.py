"""Pictures of layers."""

import base64
import copy
import sys
import warnings
from types import SimpleNamespace

import IPython
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from pictures import has_reader, numerals, picture, show, tiles
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


CODES = ["thermometer", "binary", "uniform", ("uniform", "binary"), ("binary", "thermometer")]


@pytest.mark.parametrize("form, zero", [
    ("binarized", True), ("binarized", False), ("packed", True), ("packed", False), ("per layer", None),
    ("shifts learned", None),
])  # fmt: skip
@pytest.mark.parametrize("code", CODES)
def test_picture_is_right_in_every_code(code, form, zero, tmp_path):
    torch.manual_seed(0)
    layer = ABCConv2d(4, 8, 3, weight_bases=3, activation_bases=2, code=code, zero=zero, active=True,
                      per_channel=form != "per layer", learn_us=form == "shifts learned")  # fmt: skip
    nn.init.normal_(layer.weight, 0.03, 0.2)
    packed = form == "packed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = picture(abcnets.pack(layer) if packed else layer, torch.randn(2, 4, 9, 9).relu())
        figure.savefig(tmp_path / "layer.png", dpi=30)
    *weights, kernels, staircase, _ = figure.axes
    check_staircase(staircase, layer)
    W, B = layer.weight.detach(), layer.bases()
    tiles = [torch.as_tensor(image.get_array().data) for image in kernels.images[: 4 if packed else 5]]
    assert all(tile.abs().eq(1).all() for tile in tiles[-4:-1]) and tiles[-1].abs().max() <= 1
    if packed:
        assert weights == [] and all(any(torch.equal(kernel, tile) for kernel in base.flatten(0, 1))
                                     for base, tile in zip(B, tiles))  # fmt: skip
    else:
        check_weights(*weights, layer)
        norms = W.flatten(2).norm(dim=2)
        row, column = divmod(norms.argmax().item(), 4)
        assert all(torch.equal(base[row, column], tile) for base, tile in zip(B, tiles[1:]))
        alphas = [f"× {alpha:.2g}" for alpha in layer.alphas().expand(-1, 8)[:, row].tolist()]
        assert [text.get_text() for text in kernels.texts if "×" in text.get_text()][:3] == alphas


def check_staircase(axis, layer):
    levels = 4 if layer.code[1] == "binary" else 3
    assert axis.get_title(loc="left") == f"activations, {levels} levels, over the layer's input"
    label = "$A_q - A_q(0)$" if layer.zero else "$A_q$"
    (curve,) = (line for line in axis.lines if line.get_label() == label)
    R, Aq = torch.tensor(curve.get_xdata()), torch.tensor(curve.get_ydata())
    torch.testing.assert_close(Aq, layer.quantized_input(R.expand(4, 1, -1))[0, 0])
    dashed = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    assert sorted(dashed) == pytest.approx(sorted((0.5 - layer.vs).tolist()), abs=1e-6)


def check_weights(axis, layer):
    """The levels are those of Wq and the cuts lie between its values, channel by channel in the mean."""
    thermometer, count = layer.code[0] == "thermometer", 8 if layer.code[0] == "binary" else 4
    assert axis.get_title(loc="left") == f"288 weights, {count} levels"
    groups = 8 if layer.per_channel else 1
    W, Wq = layer.weight.detach().reshape(groups, -1), layer.quantized_weight().detach().reshape(groups, -1)
    mean = W.mean(1, keepdim=True) if thermometer else 0
    spread = W.std(1, keepdim=True) if thermometer else W.square().mean(1, keepdim=True).sqrt()
    (dots,) = (line for line in axis.lines if line.get_marker() == "o")
    levels = [row.unique() for row in (Wq - mean) / spread]
    if all(len(row) == count for row in levels):  # no channel has an empty bin
        assert list(dots.get_xdata()) == pytest.approx(torch.stack(levels).mean(0).tolist(), abs=1e-5)
    cuts = sorted(line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--")
    assert len(cuts) == count - 1 and len(dots.get_xdata()) == count
    if thermometer or not layer.nearest:
        assert cuts == pytest.approx(sorted((-layer.us).tolist()))
    else:
        between = [(a + b) / 2 for a, b in zip(dots.get_xdata(), dots.get_xdata()[1:])]
        assert cuts == pytest.approx(between, abs=1e-5) and cuts[count // 2 - 1] == pytest.approx(0, abs=1e-6)
    unit = "deviations from the mean" if thermometer else "root mean squares"
    assert unit in axis.get_xlabel() and ("of its channel" in axis.get_xlabel()) == layer.per_channel


@pytest.mark.parametrize("code", CODES)
def test_picture_takes_half_precision(code, tmp_path):
    layer = ABCConv2d(4, 8, 3, code=code, active=True).bfloat16()
    before = copy.deepcopy(layer.state_dict())
    for shown in (layer, abcnets.pack(layer).bfloat16()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture(shown, torch.randn(2, 4, 9, 9, dtype=torch.bfloat16)).savefig(tmp_path / "layer.png")
    assert layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    _, *tiles = (torch.as_tensor(image.get_array().data) for image in picture(layer).axes[1].images[:4])
    for base, tile in zip(copy.deepcopy(layer).float().bases(), tiles):
        assert any(torch.equal(kernel, tile) for kernel in base.flatten(0, 1))


def test_numerals_show_what_a_code_makes_of_bits(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = numerals()
        figure.savefig(tmp_path / "numerals.png")
    lamps, errors = figure.axes
    heads = [text.get_text() for text in lamps.texts]
    assert heads == ["thermometer\n2 bits, 3 levels", "binary\n2 bits, 4 levels", "thermometer\n3 bits, 4 levels",
                     "binary\n3 bits, 8 levels"]  # fmt: skip
    full = [line.get_markerfacecolor() != "white" for line in lamps.lines if line.get_marker() == "o"]
    rows = [tuple(full[i : i + 3]) for i in range(len(full) - 3 * 8, len(full), 3)]  # the numerals from 0 to 7
    assert rows == [tuple(bool(number >> bit & 1) for bit in (2, 1, 0)) for number in range(8)]
    thermometer, uniform, binary = ([*curve.get_ydata()] for curve in errors.lines)
    assert [len(curve) for curve in (thermometer, uniform, binary)] == [7, 7, 4]
    assert thermometer[:3] == pytest.approx([0.363, 0.190, 0.118], abs=1e-3)
    assert uniform[0] == binary[0] == thermometer[0] and binary[1:3] == pytest.approx([0.118, 0.037], abs=1e-3)
    assert all(a <= b for a, b in zip(thermometer, uniform))


def test_picture_says_what_is_missing(monkeypatch):
    with pytest.raises(TypeError, match="got Conv2d"):
        picture(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="both sides"):
        picture(ABCLinear(3, 3, weight_bases=None, activation_bases=None))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        picture(ABCLinear(3, 3))


def test_tiles_show_their_images():
    grey, colour = torch.arange(12.0).view(2, 2, 3), torch.rand(1, 3, 4, 5)
    figure = tiles(("two", grey, ["a", "b"]), ("one\nin colour", colour))
    first, second, third, rest = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["two", "", "one\nin colour", ""]
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "", ""]
    for axis, image in ((first, grey[0]), (second, grey[1]), (third, colour[0].permute(1, 2, 0))):
        assert torch.equal(torch.as_tensor(axis.images[0].get_array().data), image)
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 11)  # those of the row
    assert not rest.images
    assert tiles(("", grey), limits=(-1, 1)).axes[0].images[0].get_clim() == (-1, 1)
    assert [axis.get_ylabel() for axis in tiles(("none", []), ("two", grey)).axes] == ["two", ""]
    with pytest.raises(ValueError, match="at least one image"):
        tiles(("none", []))


def test_a_figure_is_shown_and_kept_with_words(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **how: shown.append((data, how)))
    figure, axis = plt.subplots(figsize=(4, 2))
    axis.plot([1, 2])
    show(figure, tmp_path / "line.png", "A rising line")
    ((data, how),) = shown
    assert data["text/plain"] == how["metadata"]["image/png"]["alt"] == "A rising line" and how["raw"]
    assert base64.b64decode(data["image/png"]) == (tmp_path / "line.png").read_bytes()
    width = plt.imread(tmp_path / "line.png").shape[1]
    assert how["metadata"]["image/png"]["width"] == pytest.approx(0.6 * width, abs=1)
    assert not plt.fignum_exists(figure.number)


def test_a_reader_is_there_where_one_can_be_asked(monkeypatch):
    assert not has_reader()
    for asked in (False, True):
        shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=asked))
        monkeypatch.setattr(IPython, "get_ipython", lambda shell=shell: shell)
        assert has_reader() == asked
