"""Whole models: binarize, convert, calibrate, summary."""

import copy

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import abcnets
from abcnets import ABCConv2d, ABCLinear
from kernels.cpu.engine import BITS_PAY_UP_TO
from kernels.cpu.system import tile


def block(channels_in, channels_out):
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]


def network():
    torch.manual_seed(0)
    layers = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


class Residual(nn.Module):
    """A model whose forward is more than a sequence, with one layer used twice and one never."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = x + F.relu(self.norm(self.twice(x)))
        return self.last(F.relu(self.twice(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def scans():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture(scope="module")
def trained(scans):
    """A small float network that reads real digits."""
    images, labels = scans[0][:1400], scans[1][:1400]
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(6):
        for i in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[i]), labels[i]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model, scans):
    with torch.no_grad():
        return (model.eval()(scans[0][1400:]).argmax(1) == scans[1][1400:]).float().mean().item()


# convert and binarize


def test_convert_leaves_the_ends_float_and_the_model_alone(trained):
    before = copy.deepcopy(trained.state_dict())
    model = abcnets.convert(trained, weight_bases=2, activation_bases=4)
    kinds = [type(m) for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert kinds == [nn.Conv2d, ABCConv2d, ABCConv2d, nn.Linear]
    assert model[3].weight_bases == 2 and model[3].activation_bases == 4 and not model[3].training
    assert torch.equal(model[3].weight, trained[3].weight) and model[3].weight is not trained[3].weight
    assert type(trained[3]) is nn.Conv2d
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())


def test_convert_by_filter_and_settings(trained):
    model = abcnets.convert(trained, 1, 1, filter_fn=lambda layer, name: isinstance(layer, nn.Linear))
    assert [name for name, m in model.named_modules() if hasattr(m, "active")] == ["12"]
    settings = {"0": {"weight_bases": 5, "activation_bases": None}, "7": None}
    model = abcnets.convert(trained, 1, 1, settings=settings)
    assert (model[0].weight_bases, model[0].activation_bases) == (5, None)
    assert (model[3].weight_bases, model[3].activation_bases) == (1, 1)
    assert type(model[7]) is nn.Conv2d
    model = abcnets.convert(trained, 2, 2, settings=lambda name, layer: {"weight_bases": 3} if name == "7" else {})
    assert (model[3].weight_bases, model[7].weight_bases, model[7].activation_bases) == (2, 3, 2)
    with pytest.raises(ValueError, match=r"\['nine'\]"):
        abcnets.convert(trained, settings={"nine": None})


def test_convert_a_single_layer_and_shared_layers():
    assert isinstance(abcnets.convert(nn.Linear(3, 4)), ABCLinear)
    model = abcnets.convert(Residual(), 2, 2)
    assert isinstance(model.twice, ABCConv2d) and isinstance(model.never, ABCConv2d) and type(model.first) is nn.Conv2d
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = abcnets.convert(nn.Sequential(nn.Conv2d(4, 4, 1), shared, nn.ReLU(), shared, nn.Conv2d(4, 4, 1)))
    assert isinstance(model[1], ABCConv2d) and model[3] is model[1]


def test_subclasses_are_left_alone():
    class Own(nn.Conv2d):
        pass

    model = abcnets.convert(nn.Sequential(nn.Conv2d(1, 2, 3), Own(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)))
    assert [type(m) for m in model] == [nn.Conv2d, Own, ABCConv2d, nn.Conv2d]


def test_binarize_is_recursive_and_reversible(trained, scans):
    model = abcnets.convert(trained, active=False)
    x = scans[0][:50]
    assert torch.equal(model(x), trained(x))
    assert abcnets.binarize(model) is model and not torch.equal(model(x), trained(x))
    assert torch.equal(abcnets.binarize(model, active=False)(x), trained(x))


# calibrate


def test_calibration_brings_a_binarized_network_back(trained, scans):
    model = abcnets.convert(trained, 2, 2)
    dropped = accuracy(model, scans)
    abcnets.calibrate(model, scans[0][:1000].split(250), progress=False)
    calibrated, whole = accuracy(model, scans), accuracy(trained, scans)
    assert whole > 0.9 and dropped < whole - 0.2 and calibrated > whole - 0.04, (whole, dropped, calibrated)


def test_calibration_fits_what_really_reaches_each_layer(trained, scans):
    images = scans[0][:500]
    model = abcnets.convert(trained, 2, 3)
    abcnets.calibrate(model, [(images, scans[1][:500])], compensate=False, progress=False)
    assert torch.equal(model[3].weight, trained[3].weight)
    assert torch.equal(model[1].running_mean, trained[1].running_mean)  # nothing binarized ahead of it
    with torch.no_grad():
        reaching = model[:7](images)
        assert torch.allclose(model[4].running_mean, model[:4](images).mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(model[4].running_var, model[:4](images).var((0, 2, 3)), rtol=1e-4)
        # Lloyd-Max: a constant base, thresholds midway between the means of their cells, levels at the means
        thresholds = 0.5 - model[7].vs
        assert thresholds[0] == -1 and (thresholds.diff() > 0).all()
        cells = torch.bucketize(reaching, thresholds[1:], right=True)
        means = torch.stack([reaching[cells == j].mean() for j in range(3)])
        assert torch.allclose(thresholds[1:], (means[1:] + means[:-1]) / 2, atol=1e-3)
        assert torch.allclose(model[7].quantized_input(reaching).unique(), means, atol=1e-3)


@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(6, 8, 3, padding=1), (50, 6, 9, 9)),
    (nn.Conv2d(6, 9, (3, 2), stride=2, dilation=2, padding=(2, 1), groups=3), (50, 6, 9, 9)),
    (nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular"), (50, 6, 9, 9)),
    (nn.Conv1d(6, 8, 3), (50, 6, 30)),
    (nn.Conv3d(3, 8, 2), (20, 3, 5, 5, 5)),
    (nn.Linear(30, 8), (2000, 30)),
])  # fmt: skip
@pytest.mark.parametrize("bases", [(1, 1), (2, 3), (2, None), (None, 2)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_compensation_brings_each_layer_nearer_to_its_float_output(layer, shape, bases, per_channel):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    layer.reset_parameters()
    # Correlated, rectified input of unequal channels, as networks have it
    x = torch.randn(shape).cumsum(1 if len(shape) > 2 else -1).relu() / 2
    errors = []
    for compensate in (False, True):
        model = abcnets.convert(layer, *bases, per_channel=per_channel)
        abcnets.calibrate(model, x, compensate=compensate, progress=False)
        with torch.no_grad():
            errors.append((model(x) - layer(x)).square().mean() / layer(x).var())
    assert errors[1] < 0.95 * errors[0]


def test_calibration_corrects_biases_where_no_norm_does(scans):
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(c, 8, 3, padding=1) for c in (1, 8, 8, 8)]
    plain = nn.Sequential(*[m for conv in convolutions for m in (conv, nn.ReLU())])
    model = abcnets.convert(plain, 2, 2)
    x = scans[0][:200]
    abcnets.calibrate(model, x, progress=False)
    with torch.no_grad():
        for end in (3, 5):
            assert torch.allclose(model[:end](x).mean((0, 2, 3)), plain[:end](x).mean((0, 2, 3)), atol=1e-5)


def test_calibration_can_be_done_again_with_the_float_network_to_aim_at(trained, scans):
    images = scans[0][:1000]
    model = abcnets.calibrate(abcnets.convert(trained, 1, 1), images, progress=False)
    once = accuracy(model, scans)
    same = abcnets.calibrate(abcnets.convert(trained, 1, 1), images, trained, progress=False)
    assert accuracy(same, scans) == once and trained.training is False
    again = abcnets.calibrate(model, images, trained, progress=False)
    assert accuracy(again, scans) > once - 0.03, (accuracy(again, scans), once)


def test_calibrate_works_on_any_forward_and_restores_the_mode(scans):
    model = abcnets.convert(Residual(), 2, 2).train()
    vs = model.never.vs.clone()
    with pytest.warns(UserWarning, match=r"never called \['never'\]"):
        assert abcnets.calibrate(model, scans[0][:100], progress=False) is model
    assert model.training and model.norm.training and torch.equal(model.never.vs, vs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_calibrate_says_what_is_missing(trained, scans):
    with pytest.raises(ValueError, match="at least one active ABC layer"):
        abcnets.calibrate(copy.deepcopy(trained), scans[0][:10])
    with pytest.raises(ValueError, match="at least one image"):
        abcnets.calibrate(abcnets.convert(trained), [])
    with pytest.raises(ValueError, match="NaN"):
        abcnets.calibrate(abcnets.convert(trained), torch.full((2, 1, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="has no layer"):
        abcnets.calibrate(abcnets.convert(trained), scans[0][:10], nn.Linear(2, 2))


@pytest.mark.parametrize("N", [2, 3, 5])
def test_steps_of_training_leave_a_constant_base_constant(N):
    """Its threshold at 0, the lowest input, one step would make it -1 on half of a rectified input."""
    layer = abcnets.ABCConv2d(1, 4, 1, activation_bases=N, active=True)
    R = torch.randn(2000, 1, 3, 3).relu()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    vs = layer.vs.detach().clone()
    before = abcnets.quantize_activation(torch.zeros(1), layer.vs, layer.betas).item()
    for sign in (1, -1):
        optimizer.zero_grad()
        (sign * layer(R)).square().sum().backward()
        optimizer.step()
    assert layer.vs[0] == vs[0] and (layer.vs[1:] != vs[1:]).all()
    after = abcnets.quantize_activation(torch.zeros(1), layer.vs, layer.betas).item()
    assert after == pytest.approx(before, abs=0.02 * N)  # as far as two steps move N betas


@pytest.mark.parametrize("size, padding, thresholds", [(9, 0, 4), (9, 1, 3), (1, 1, 4)])
def test_calibration_spends_a_base_on_the_constant_only_where_borders_need_it(size, padding, thresholds):
    """A bias takes up the constant where all places see as much padding: none, or all the same as on a 1x1 image."""
    network = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=padding), nn.Conv2d(8, 2, 1))
    model = abcnets.convert(network, 2, 4)
    R = abcnets.calibrate(model, torch.randn(500, 2, size, size), progress=False)[:2](torch.randn(500, 2, size, size))
    crossed = [(R < 0.5 - v).any() and (R >= 0.5 - v).any() for v in model[2].vs]
    assert sum(crossed) == thresholds


def test_constant_activations_keep_the_start_values():
    model = abcnets.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)), 2, 2)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    betas = model[1].betas.clone()
    abcnets.calibrate(model, torch.rand(2, 1, 9, 9), progress=False)
    assert torch.equal(model[1].betas, betas)


def test_signed_activations_are_fitted_too():
    x = torch.randn(100_000)
    for N, error in ((2, 0.364), (4, 0.118)):  # N levels of a Gaussian: Lloyd-Max
        vs, betas = abcnets._fit_activations(x, N, constant=True)
        assert (x - abcnets.quantize_activation(x, vs, betas)).square().mean().item() == pytest.approx(error, abs=0.01)


# summary


def test_summary_counts(trained):
    model = abcnets.convert(trained, 3, 2)
    table = abcnets.summary(model, torch.rand(2, 1, 8, 8))
    frame = pd.DataFrame(table).set_index("layer")
    row = frame.loc["3"]
    engine = "bits" if BITS_PAY_UP_TO[tile()] >= 6 else "float"  # which of them is faster with six binary convolutions
    assert (row["kind"], row["M"], row["N"], row["engine"]) == ("ABCConv2d", 3, 2, engine)
    assert row["parameters"] == 32 * 16 * 9 + 32 + 4
    assert row["bits"] == 3 * 32 * 16 * 9 and row["packed_bytes"] == 3 * 32 * 9 * 2 + 4 * (3 * 32 + 4 + 32)
    assert row["macs"] == 2 * 64 * 32 * 16 * 9 and row["binary_macs"] == 6 * row["macs"]
    assert frame.loc["0", "binary_macs"] == 0 and frame.loc["0", "packed_bytes"] == frame.loc["0", "float_bytes"] == 640
    assert table.total()["macs"] == frame["macs"].sum()
    assert "total" in str(table) and str(table).count("\n") == len(table) + 3
    assert "<table>" in table._repr_html_()


def test_summary_of_the_packed_model_agrees_with_its_buffers(trained):
    packed = abcnets.pack(abcnets.convert(trained, 3, 2))
    model = abcnets.summary(abcnets.convert(trained, 3, 2), torch.rand(2, 1, 8, 8))
    table = abcnets.summary(packed, torch.rand(2, 1, 8, 8))
    assert [row["packed_bytes"] for row in table] == [row["packed_bytes"] for row in model]
    stored = sum(t.numel() * t.element_size() for t in packed[3].state_dict().values())
    assert table[2]["packed_bytes"] == stored


def test_summary_takes_modules_that_put_out_more_than_a_tensor():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.scale = nn.LSTM(4, 5, batch_first=True), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return {"loss": None, "logits": self.lstm(x)[0] * self.scale}

    rows = abcnets.summary(Model(), torch.randn(2, 3, 4))
    assert {row["layer"]: row["output"] for row in rows} == {"lstm": "2 x 3 x 5", "": "2 x 3 x 5"}
    assert rows.total()["parameters"] == 1 + 4 * 5 * (4 + 5 + 2)


def test_summary_says_where_bits_lose(trained):
    rows = abcnets.summary(abcnets.convert(trained, 5, 5), torch.rand(1, 1, 8, 8))
    assert {row["engine"] for row in rows if row["M"]} == {"float"}


# plan


def test_plan_says_what_convert_does_and_why():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Own(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3),
        nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.LazyConv2d(4, 1), nn.utils.weight_norm(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    table = abcnets.plan(model, 2, 3, settings={"6": {"weight_bases": 5}, "10": None})
    assert {row["layer"]: (row["M"], row["N"], row["why"]) for row in table} == {
        "0": (None, None, "first layer: float by default"),
        "2": (None, None, "a subclass of Conv2d: its forward pass is its own"),
        "3": (None, None, "depthwise: float by default"),
        "4": (2, 3, "converted"),
        "5": (None, None, "has no binary form"),
        "6": (5, 3, "converted"),
        "7": (None, None, "a subclass of Conv2d: its forward pass is its own"),
        "7.parametrizations.weight": (None, None, "has no binary form"),
        "8": (None, None, "its shape is not known yet: run the model once"),
        "9": (None, None, "its weight is computed: remove weight_norm, spectral_norm or pruning first"),
        "10": (None, None, "settings say no"),
        "11": (None, None, "last layer: float by default"),
    }
    whys = {row["layer"]: row["why"] for row in abcnets.plan(model, filter_fn=lambda layer, name: name in ("0", "3"))}
    assert [name for name, why in whys.items() if why == "converted"] == ["0", "3"]
    assert whys["4"] == "filter_fn says no"
    binary = abcnets.convert(nn.Sequential(*[nn.Conv2d(2, 2, 3) for _ in range(3)]), 2, None)
    for converted, why in ((binary, "binary already"), (abcnets.pack(binary), "packed already")):
        row = abcnets.plan(converted)[1]
        assert (row["M"], row["N"], row["weight"], row["why"]) == (2, None, "2 x 2 x 3 x 3", why)


@pytest.mark.parametrize("settings", [None, {"7": {"weight_bases": 1}, "3": None}, lambda name, layer: {"us": None}])
@pytest.mark.parametrize("filter_fn", [None, lambda layer, name: name != "7"])
def test_convert_does_what_plan_says(trained, settings, filter_fn):
    options = {"settings": settings, "filter_fn": filter_fn}
    model = abcnets.convert(trained, 2, None, **options)
    found = {
        name: (layer.weight_bases, layer.activation_bases)
        for name, layer in model.named_modules() if isinstance(layer, (ABCConv2d, ABCLinear))
    }  # fmt: skip
    table = abcnets.plan(trained, 2, None, **options)
    assert found == {row["layer"]: (row["M"], row["N"]) for row in table if row["why"] == "converted"}
    assert table.total() == {"parameters": sum(p.numel() for p in trained.parameters()) - 2 * (16 + 32 + 32)}
    assert "text-align" in table._repr_html_() and "converted" in str(table)


@pytest.mark.parametrize("settings", [{"3": 5}, {"3": {"M": 5}}, {"3": {"weight_bases": 0}}, lambda name, layer: True])
def test_settings_that_make_no_sense(trained, settings):
    for function in (abcnets.plan, abcnets.convert):
        with pytest.raises(ValueError, match="settings for a layer must|weight_bases must be a positive integer"):
            function(trained, settings=settings)


# What other modules do with the layers


def test_transformer_encoders_call_their_binary_layers():
    """torch's fused inference path would read their float weights instead, where no gradient is asked for."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    model = abcnets.convert(encoder, 1, 1, filter_fn=lambda layer, name: True)
    x = torch.randn(4, 5, 16)
    abcnets.calibrate(model, x, progress=False)
    mask = torch.arange(5) >= torch.tensor([[5], [4], [3], [2]])
    for options in ({}, {"src_key_padding_mask": mask}):
        expected = model(x, **options).detach()
        with torch.no_grad():
            assert torch.allclose(model(x, **options), expected, atol=1e-5)
            assert torch.allclose(abcnets.pack(model)(x, **options), expected, atol=1e-5)
            assert not torch.allclose(encoder(x), expected, atol=1e-2)


def test_a_very_wide_layer_keeps_its_weights():
    model = abcnets.convert(nn.Linear(9000, 4), 1, 1)
    weight, vs = model.weight.clone(), model.vs.clone()
    abcnets.calibrate(model, torch.rand(20, 9000), progress=False)
    assert torch.equal(model.weight, weight) and not torch.equal(model.vs, vs)


def test_calibrate_takes_tensors():
    with pytest.raises(TypeError, match=r"\['dict'\]"):
        abcnets.calibrate(abcnets.convert(nn.Linear(4, 4)), [{"x": torch.rand(2, 4)}])
