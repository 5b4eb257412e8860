"""The layer and its mathematics, against torch.linalg.lstsq and the paper's scalar formulas."""

import copy
import math
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

import abcnets
from abcnets import ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear

LAYERS = [
    (ABCConv1d, (6, 8, 3), (2, 6, 9)),
    (ABCConv2d, (6, 8, 3), (2, 6, 9, 7)),
    (ABCConv3d, (6, 8, 3), (2, 6, 5, 6, 4)),
    (ABCLinear, (6, 8), (2, 6)),
]


# Shifts


def test_even_shifts():
    assert abcnets.even_shifts(1).tolist() == [0]
    assert abcnets.even_shifts(5).tolist() == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize(
    "M, even, gaussian", [(1, 0.363, 0.363), (2, 0.262, 0.190), (3, 0.1175, 0.1175), (5, 0.077, 0.058)]
)
def test_relative_error_on_a_gaussian(M, even, gaussian):
    W = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)[None]
    for shifts, expected in ((abcnets.even_shifts, even), (abcnets.gaussian_shifts, gaussian)):
        error = (W - abcnets.quantize_weight(W, shifts(M))).square().mean() / W.square().mean()
        assert error.item() == pytest.approx(expected, abs=0.0007)


def test_gaussian_shifts_are_symmetric_and_ascending():
    us = abcnets.gaussian_shifts(6)
    assert torch.equal(us, -us.flip(0)) and (us.diff() > 0).all()


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3", 10**9])
def test_counts_must_be_positive_integers(count):
    with pytest.raises(ValueError, match="weight_bases must be a positive integer.*got"):
        abcnets.even_shifts(count)
    with pytest.raises(ValueError, match="got"):
        ABCConv2d(3, 4, 3, weight_bases=count)
    with pytest.raises(ValueError, match="activation_bases must be a positive integer.*got"):
        ABCConv2d(3, 4, 3, activation_bases=count)


# Weights


def weights(draw):
    """Random, tiny, constant and duplicate-valued weights (O, K)."""
    O, K = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["gaussian", "tiny", "constant", "duplicates"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    W = torch.randn(O, K, generator=generator, dtype=torch.float64)
    if kind == "tiny":
        W *= 1e-12
    if kind == "constant":
        W = W[:, :1].expand(O, K)
    if kind == "duplicates":
        W = W.round()
    return W


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_alpha_is_the_least_squares_solution(data):
    W = weights(data.draw)
    M = data.draw(st.integers(1, 6))
    us = torch.tensor(data.draw(st.lists(st.sampled_from([-1.4, -1, -0.5, 0, 0.3, 0.5, 1]), min_size=M, max_size=M)))
    per_channel = data.draw(st.booleans())
    B = abcnets.weight_bases(W, us, per_channel).flatten(2)  # (M, O, K)
    if per_channel:
        systems = [(B[:, o].T, W[o]) for o in range(len(W))]
    else:
        systems = [(B.flatten(1).T, W.flatten())]
    alphas = abcnets.fit_weight(W, us, per_channel)
    assert alphas.shape == (M, len(systems))
    for (A, b), alpha in zip(systems, alphas.T):
        best = A @ torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0] - b
        ours = A @ alpha - b
        scale = b.norm().item()
        assert ours.norm().item() <= best.norm().item() + 1e-7 * scale
        if torch.linalg.matrix_rank(A) == M:  # then the solution is unique
            assert torch.allclose(
                alpha, torch.linalg.lstsq(A, b[:, None]).solution[:, 0], rtol=0, atol=1e-7 * max(scale, 1e-30)
            )


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantized_weight_is_the_sum_of_its_bases(per_channel, dtype):
    W = torch.randn(5, 3, 3, 3, dtype=dtype)
    us = abcnets.gaussian_shifts(4).to(dtype)[torch.tensor([2, 0, 3, 1])]
    B, alphas = abcnets.weight_bases(W, us, per_channel), abcnets.fit_weight(W, us, per_channel)
    assert set(B.unique().tolist()) == {-1.0, 1.0}
    expected = torch.einsum("mo,mo...->o...", alphas.expand(4, 5), B)
    assert torch.allclose(abcnets.quantize_weight(W, us, per_channel), expected, rtol=0, atol=1e-6)


def test_sign_of_zero_is_plus_one():
    assert abcnets.weight_bases(torch.tensor([[-1.0, 0.0, 1.0]]), torch.zeros(1)).flatten().tolist() == [-1, 1, 1]
    A = abcnets.quantize_activation(torch.tensor([0.5 - 0.25, 0.2]), torch.tensor([0.25]), torch.ones(1))
    assert A.tolist() == [1, -1]


def test_weights_without_variance_stay_what_they_are():
    for W in (torch.full((2, 3, 3, 3), 0.7), torch.zeros(2, 3), torch.randn(4, 1)):
        assert torch.allclose(abcnets.quantize_weight(W, abcnets.gaussian_shifts(3)), W, atol=1e-6)


def test_a_nan_weight_makes_its_channel_nan_and_no_other():
    W = torch.randn(3, 4)
    W[1, 2] = math.nan
    assert abcnets.quantize_weight(W, abcnets.even_shifts(3)).isnan().all(1).tolist() == [False, True, False]


def test_weight_gradient_is_straight_through():
    W, G = torch.randn(4, 3, 3, requires_grad=True), torch.randn(4, 3, 3)
    abcnets.quantize_weight(W, abcnets.gaussian_shifts(3)).backward(G)
    assert torch.equal(W.grad, G)


@pytest.mark.parametrize("per_channel", [True, False])
def test_shift_gradient_element_by_element(per_channel):
    W = torch.randn(3, 7, dtype=torch.float64)
    us = abcnets.gaussian_shifts(2).double().requires_grad_()
    G = torch.randn(3, 7, dtype=torch.float64)
    abcnets.quantize_weight(W, us, per_channel).backward(G)
    alphas = abcnets.fit_weight(W, us, per_channel).expand(2, 3)
    for m in range(2):
        expected = 0.0
        for o in range(3):
            group = W[o] if per_channel else W
            mean, std = group.mean(), group.std()
            for k in range(7):
                z = (W[o, k] - mean) / std + us[m].detach()
                expected += alphas[m, o] * G[o, k] * (abs(z) <= 1)
        assert us.grad[m].item() == pytest.approx(expected.item())


# Activations


def scalar_staircase(r, vs, betas):
    return sum(beta * (1 if min(max(r + v, 0), 1) >= 0.5 else -1) for v, beta in zip(vs, betas))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_activation_and_its_gradients_element_by_element(dtype, N):
    # Dyadic numbers: R + v is exact, and many of them fall right onto thresholds and window edges.
    R = (torch.randint(-16, 17, (4, 5, 3)) / 8).to(dtype).requires_grad_()
    vs = (torch.randint(-8, 9, (N,)) / 8).to(dtype).requires_grad_()
    betas = torch.randn(N, dtype=dtype).requires_grad_()
    G = torch.randn(4, 5, 3, dtype=dtype)
    Aq = abcnets.quantize_activation(R, vs, betas)
    Aq.backward(G)
    G_vs, G_betas = [0.0] * N, [0.0] * N
    for i, (r, g) in enumerate(zip(R.flatten().tolist(), G.flatten().tolist())):
        assert Aq.flatten()[i].item() == pytest.approx(scalar_staircase(r, vs.tolist(), betas.tolist()), abs=1e-5)
        window = [0 <= r + v <= 1 for v in vs.tolist()]
        expected = sum(beta * g * w for beta, w in zip(betas.tolist(), window))
        assert R.grad.flatten()[i].item() == pytest.approx(expected, abs=1e-5)
        for n, (v, beta) in enumerate(zip(vs.tolist(), betas.tolist())):
            G_vs[n] += beta * g * window[n]
            G_betas[n] += g * (1 if r + v >= 0.5 else -1)
    assert vs.grad.tolist() == pytest.approx(G_vs, abs=1e-4)
    assert betas.grad.tolist() == pytest.approx(G_betas, abs=1e-4)


def test_large_tensors_are_treated_slice_by_slice_alike():
    R = torch.randn(7, 40, 40, 40).to(memory_format=torch.channels_last)
    vs, betas = torch.tensor([0.5, -0.2, -1.0]), torch.tensor([1.0, 0.5, -0.25])
    G = torch.randn(7, 40, 40, 40)

    def run(slices):
        inputs = [t.clone().requires_grad_() for t in (R, vs, betas)]
        output = torch.cat([abcnets.quantize_activation(r, *inputs[1:]) for r in inputs[0].split(slices)])
        return [output, *torch.autograd.grad(output, inputs, G)]

    whole, halves = run(7), run(1)
    assert torch.equal(whole[0], halves[0]) and torch.equal(whole[1], halves[1])
    assert torch.allclose(whole[2], halves[2], rtol=1e-4) and torch.allclose(whole[3], halves[3], rtol=1e-4)
    assert abcnets.quantize_activation(R, vs, betas).is_contiguous(memory_format=torch.channels_last)


def test_only_the_input_is_kept_for_backward():
    kept = []
    R = torch.randn(64, 100, requires_grad=True)
    vs, betas = torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        abcnets.quantize_activation(R, vs, betas)
    assert sorted(kept) == [5, 5, 6400]
    kept.clear()
    W = torch.randn(10, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        abcnets.quantize_weight(W, abcnets.gaussian_shifts(5))
    assert kept == []


def test_nan_stays_nan_and_infinities_take_the_outer_levels():
    R = torch.tensor([math.nan, math.inf, -math.inf])
    A = abcnets.quantize_activation(R, torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.25]))
    assert A[0].isnan() and A[1:].tolist() == [1.25, -1.25]


def test_bad_activations():
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(3,\)"):
        abcnets.quantize_activation(torch.rand(3), torch.rand(2), torch.rand(3))
    with pytest.raises(TypeError, match="int64"):
        abcnets.quantize_activation(torch.arange(3), torch.rand(2), torch.rand(2))
    with pytest.raises(TypeError, match="int64"):
        abcnets.quantize_weight(torch.arange(6).view(2, 3), torch.rand(2))
    with pytest.raises(ValueError, match=r"got shape \(2, 2\)"):
        abcnets.quantize_weight(torch.rand(2, 3), torch.rand(2, 2))


# Layers


@pytest.mark.parametrize("cls, arguments, shape", LAYERS)
def test_a_layer_is_the_M_by_N_sum_of_binary_convolutions(cls, arguments, shape):
    layer = cls(*arguments, weight_bases=3, activation_bases=2, active=True)
    x = torch.randn(shape)
    operation = {ABCConv1d: F.conv1d, ABCConv2d: F.conv2d, ABCConv3d: F.conv3d, ABCLinear: F.linear}[cls]
    B, alphas = abcnets.weight_bases(layer.weight, layer.us), layer.alphas()
    y = layer.bias.view(-1, *[1] * layer.spatial_dims).expand_as(layer(x)).clone()
    for m in range(3):
        for v, beta in zip(layer.vs, layer.betas):
            A = torch.where(x + v >= 0.5, 1.0, -1.0)
            y += alphas[m].view(-1, *[1] * layer.spatial_dims) * beta * operation(A, B[m])
    assert torch.allclose(layer(x), y, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"padding": "valid"}, {"groups": 3},
    {"bias": False}, {"padding": (2, 1), "padding_mode": "circular"}, {"padding": 1, "padding_mode": "reflect"},
    {"dtype": torch.float64},
])  # fmt: skip
def test_inactive_is_bit_for_bit_the_stock_layer(options):
    stock = nn.Conv2d(6, 9, 3, **options)
    layer = ABCConv2d(6, 9, 3, **options)  # as it is constructed
    layer.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(2, 6, 8, 9, dtype=options.get("dtype", torch.float32))
    assert torch.equal(layer(x), stock(x))
    active = abcnets.binarize(layer)(x)
    assert active.shape == stock(x).shape and not torch.equal(active, stock(x))
    assert torch.equal(abcnets.binarize(layer, active=False)(x), stock(x))


@pytest.mark.parametrize("cls, arguments, shape", LAYERS)
def test_layers_begin_inactive_and_converted_models_active(cls, arguments, shape):
    layer = cls(*arguments)
    stock = getattr(nn, cls.__name__.removeprefix("ABC"))
    again = cls.from_parameters(layer.weight, layer.bias, layer.us, layer.vs, layer.betas)
    shared = cls.from_float(stock(*arguments))
    assert not (layer.active or again.active or shared.active)
    assert torch.equal(layer(torch.ones(shape)), again(torch.ones(shape)))
    assert abcnets.convert(stock(*arguments)).active and not abcnets.convert(stock(*arguments), active=False).active


@pytest.mark.parametrize("cls, arguments, shape", LAYERS)
def test_one_side_may_stay_float(cls, arguments, shape):
    x = torch.randn(shape)
    only_weights = cls(*arguments, weight_bases=2, activation_bases=None)
    assert only_weights.vs is None and torch.equal(only_weights.quantized_input(x), x)
    only_input = cls(*arguments, weight_bases=None, activation_bases=2)
    assert only_input.us is None and only_input.quantized_weight() is only_input.weight
    neither = cls(*arguments, weight_bases=None, activation_bases=None, active=True)
    assert torch.equal(neither(x), abcnets.binarize(neither, False)(x))


def test_zero_padding_is_neither_plus_nor_minus_one():
    layer = ABCConv2d(1, 1, 3, padding=1, bias=False, weight_init=nn.init.ones_, weight_bases=1, activation_bases=1)
    abcnets.binarize(layer)
    layer.betas.data.fill_(1.0)
    y = layer(torch.full((1, 1, 3, 3), 9.0))[0, 0]
    assert y.tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_constructor_with_initializers():
    layer = ABCConv2d(
        2, 3, 3, weight_bases=3, activation_bases=2, us=abcnets.even_shifts, vs=[0.0, 0.5], active=False,
        betas=lambda N: torch.full((N,), 1 / N), weight_init=nn.init.ones_, bias_init=nn.init.zeros_,
    )  # fmt: skip
    assert (layer.weight == 1).all() and (layer.bias == 0).all() and not layer.active
    assert layer.us.tolist() == [-1, 0, 1] and layer.vs.tolist() == [0, 0.5] and layer.betas.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"betas must be 2 numbers.*\(3,\)"):
        ABCConv2d(2, 3, 3, activation_bases=2, betas=[1, 2, 3])
    with pytest.raises(ValueError, match="weight_bases=None"):
        ABCConv2d(2, 3, 3, weight_bases=None, us=[0])


@pytest.mark.parametrize("cls, arguments, shape", LAYERS)
def test_from_parameters_reads_dimensions_off_the_weight(cls, arguments, shape):
    first = cls(*arguments, weight_bases=2, activation_bases=3)
    second = cls.from_parameters(first.weight, first.bias, first.us, first.vs, first.betas)
    assert second.weight is first.weight and repr(second) == repr(first)
    x = torch.randn(shape)
    assert torch.equal(first(x), second(x))


def test_from_parameters_with_geometry_and_without_bases():
    weight = torch.randn(6, 2, 3, 3)
    layer = ABCConv2d.from_parameters(weight, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular")
    stock = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular", bias=False)
    stock.weight.data.copy_(weight)
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(layer(x), stock(x)) and layer.weight_bases is None and layer.activation_bases is None


def test_from_parameters_names_what_is_wrong():
    weight = torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"4 dimensions, got shape \(4, 3\)"):
        ABCConv2d.from_parameters(weight[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\).*\(3,\)"):
        ABCConv2d.from_parameters(weight, torch.zeros(3))
    with pytest.raises(ValueError, match="same length, got 2 and 1"):
        ABCConv2d.from_parameters(weight, vs=[0, 1], betas=[1])
    with pytest.raises(ValueError, match="same length, got 2 and None"):
        ABCConv2d.from_parameters(weight, vs=[0, 1])
    with pytest.raises(TypeError, match="int64"):
        ABCConv2d.from_parameters(torch.ones(4, 3, 3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="takes an nn.Conv2d, got Linear"):
        ABCConv2d.from_float(nn.Linear(2, 3))


@pytest.mark.parametrize("cls, arguments, shape", LAYERS)
def test_bad_input_names_what_is_wanted(cls, arguments, shape):
    layer = cls(*arguments, active=True)
    with pytest.raises(TypeError, match="floating-point input, got torch.int64"):
        layer(torch.ones(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch x 6.*got"):
        layer(torch.rand(2, 5, *shape[2:]))
    with pytest.raises(ValueError, match="batch x 6.*got"):
        layer(torch.rand(()))


@pytest.mark.parametrize("cls, arguments, shape", LAYERS)
def test_empty_batch_unbatched_input_and_nan(cls, arguments, shape):
    layer = cls(*arguments, active=True)
    x = torch.randn(shape)
    assert layer(x[:0]).shape == layer(x)[:0].shape
    layer(x[:0]).sum().backward()
    assert torch.allclose(layer(x[0]), layer(x)[0], atol=1e-6)
    x[1].view(-1)[0] = math.nan
    y = layer(x)
    assert not y[0].isnan().any() and y[1].isnan().any()


def test_forward_mutates_nothing_and_follows_the_weights():
    layer = ABCConv2d(3, 4, 3, active=True)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 3, 6, 6)
    layer(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    layer.weight.data.mul_(3)
    assert torch.allclose(
        layer(x) - layer.bias.view(-1, 1, 1),
        3 * (torch.func.functional_call(layer, before, x) - layer.bias.view(-1, 1, 1)),
        atol=1e-5,
    )


def test_active_flag_and_bases_survive_a_file_and_a_fresh_process(tmp_path):
    model = nn.Sequential(
        ABCConv2d(3, 4, 3), ABCConv2d(4, 5, 3, active=True), nn.Flatten(), ABCLinear(45, 2)
    )
    with torch.no_grad():
        model[1].vs.copy_(torch.tensor([0.1, 0.2, 0.3]))
    x = torch.randn(2, 3, 7, 7)
    torch.save({"state": model.state_dict(), "x": x, "y": model(x)}, tmp_path / "model.pt")
    script = """
        import sys, torch
        from torch import nn
        from abcnets import ABCConv2d, ABCLinear
        saved = torch.load(sys.argv[1], weights_only=True)
        model = nn.Sequential(ABCConv2d(3, 4, 3, active=True), ABCConv2d(4, 5, 3), nn.Flatten(), ABCLinear(45, 2))
        model.load_state_dict(saved["state"])
        assert [layer.active for layer in (model[0], model[1], model[3])] == [False, True, False]
        assert torch.equal(model(saved["x"]), saved["y"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path / "model.pt"], check=True)


def test_a_float_checkpoint_loads_strictly_but_a_torn_one_does_not():
    stock, layer = nn.Conv2d(3, 4, 3), ABCConv2d(3, 4, 3, vs=[0.1, 0.2, 0.3], active=False)
    assert layer.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(layer.weight, stock.weight) and layer.vs.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert not layer.active
    torn = layer.state_dict()
    del torn["vs"]
    with pytest.raises(RuntimeError, match="vs"):
        layer.load_state_dict(torn)


def test_copies_pickles_and_functional_call():
    layer, x = ABCConv2d(3, 4, 3, padding=1, learn_us=True, active=True), torch.randn(2, 3, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and twin.active
    parameters = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert (torch.func.functional_call(layer, parameters, (x,)) == 0).all()
    gradients = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(
        dict(layer.named_parameters())
    )
    layer(x).sum().backward()
    assert all(torch.allclose(gradients[name], p.grad, atol=1e-4) for name, p in layer.named_parameters())


def test_bfloat16_autocast_stays_close_to_float32():
    layer, x = ABCConv2d(8, 8, 3, padding=1, active=True), torch.randn(2, 8, 9, 9)
    exact = layer(x)
    exact.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), exact, atol=0.1)
    assert all(torch.allclose(p.grad, g, rtol=0.05, atol=0.5) for p, g in zip(layer.parameters(), gradients))
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_half_precision_weights_have_the_bases_of_their_float32_copy():
    layer = ABCConv2d(8, 8, 3, dtype=torch.bfloat16, active=True)
    assert torch.equal(
        abcnets.weight_bases(layer.weight, layer.us),
        abcnets.weight_bases(layer.weight.float(), layer.us.float()).bfloat16(),
    )
    assert layer(torch.randn(1, 8, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_channels_last():
    layer, x = ABCConv2d(8, 8, 3, padding=1, active=True), torch.randn(2, 8, 9, 9)
    y = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.allclose(y, layer(x), atol=1e-5)


@pytest.mark.parametrize("cls, arguments, shape", LAYERS)
def test_compiles_without_a_graph_break(cls, arguments, shape):
    layer, x = cls(*arguments, learn_us=True, active=True), torch.randn(shape)
    y = layer(x)
    y.sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compiled.sum().backward()
    assert torch.allclose(compiled, y, atol=1e-6)
    assert all(torch.allclose(p.grad, gradients[name], atol=1e-4) for name, p in layer.named_parameters())


def test_distributed_data_parallel_on_two_processes(tmp_path):
    script = """
        import sys, torch
        import torch.distributed as dist
        from torch import nn
        from abcnets import ABCConv2d
        rank, store = int(sys.argv[1]), sys.argv[2]
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
        torch.manual_seed(0)
        layer = ABCConv2d(2, 3, 3, active=True)
        model = nn.parallel.DistributedDataParallel(layer)
        x = torch.randn(4, 2, 5, 5)
        model(x[2 * rank : 2 * rank + 2]).mean().backward()
        torch.save({name: p.grad for name, p in layer.named_parameters()}, f"{store}.{rank}")
        layer.zero_grad()
        layer(x).mean().backward()
        torch.save({name: p.grad for name, p in layer.named_parameters()}, f"{store}.whole")
    """
    store = str(tmp_path / "store")
    processes = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(rank), store]) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second, whole = (torch.load(f"{store}.{name}") for name in ("0", "1", "whole"))
    for name in whole:
        assert torch.equal(first[name], second[name]) and torch.allclose(first[name], whole[name], atol=1e-6)


def test_docstring_examples_run():
    import doctest

    for cls in (ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear):
        test = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__, globs={**vars(abcnets)})[0]
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0

# Where and in what they are built


@pytest.mark.parametrize("layer, args, shape", LAYERS)
@pytest.mark.parametrize("default", [False, True])
def test_layers_on_the_meta_device_become_real_by_loading(layer, args, shape, default):
    abcnets._start_activations.cache_clear()  # as if these were the first layers
    if default:
        torch.set_default_device("meta")
    try:
        with torch.device("meta"):
            empty = nn.Sequential(layer(*args, active=True), layer(*args, us=[-1, 0, 1], vs=[1, 2, 3], betas=[3, 2, 1]))
            on_cpu = layer(*args, device="cpu")
            assert abcnets.even_shifts(3).device == abcnets.gaussian_shifts(3).device == torch.device("cpu")
    finally:
        torch.set_default_device(None)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    real = nn.Sequential(layer(*args, active=True), layer(*args))
    for name in ("us", "vs", "betas"):
        assert torch.equal(getattr(on_cpu, name), getattr(real[1], name))
    x = torch.randn(shape)
    empty[:1].to_empty(device="cpu").load_state_dict(real[:1].state_dict())
    assert torch.equal(empty[0](x), real[0](x))
    assert real[0].to("meta")(x.to("meta")).is_meta


def test_an_emptied_layer_wants_more_than_a_stock_checkpoint():
    """Its bases hold whatever was in that memory: they are not the start values that such a checkpoint leaves."""
    stock = nn.Conv2d(3, 4, 3).state_dict()
    layer = ABCConv2d(3, 4, 3, device="meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match='Missing key.*"vs", "betas", "us"'):
        layer.load_state_dict(stock)
    layer.load_state_dict(ABCConv2d(3, 4, 3).state_dict())
    layer.load_state_dict(stock)
    assert torch.equal(layer.vs, ABCConv2d(3, 4, 3).vs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_start_values_do_not_depend_on_the_default_dtype(dtype):
    numbers = {"us": [-0.7, 0.1, 0.6], "vs": [0.3, 0.1, -0.2], "betas": [0.3, 0.2, 0.1]}
    expected = [ABCLinear(4, 4), ABCLinear(4, 4, **numbers)]
    abcnets._start_activations.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        found = [ABCLinear(4, 4, dtype=torch.float32), ABCLinear(4, 4, dtype=torch.float32, **numbers)]
        assert abcnets.even_shifts(4).dtype == abcnets.even_shifts(1).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in numbers)


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_mode_in_which_the_first_layer_is_built_is_no_matter(mode):
    expected = ABCLinear(4, 4, activation_bases=5)
    abcnets._start_activations.cache_clear()
    with mode():
        ABCLinear(4, 4, activation_bases=5)
    layer = ABCLinear(4, 4, activation_bases=5, active=True)
    assert torch.equal(layer.vs, expected.vs) and type(layer.vs.data) is torch.Tensor
    layer(torch.randn(2, 4)).sum().backward()


def test_calibration_wants_values():
    model = abcnets.convert(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])).to("meta")
    with pytest.raises(ValueError, match="calibrate needs a model and images that hold values"):
        abcnets.calibrate(model, torch.randn(2, 4), progress=False)
