"""The quantizers on the CPU engine against plain torch: the same bits, but for sums, which are rounded less; and steps
of training that keep R alone."""

import math
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import abcnets

pytest.importorskip("numba")
from kernels.cpu import quantizers
from kernels.cpu.job import STAIRCASE_BLOCK

abcnets.engines()  # loads them
forward, backward = torch.ops.abcnets.staircase, torch.ops.abcnets.staircase_backward
THRESHOLDS, HALF_STEPS = torch.tensor([0.2, 1.1, 0.6]), torch.tensor([0.4, 0.3, 0.2])


@pytest.fixture(autouse=True)
def same_threads_afterwards(threads):
    pass


@pytest.fixture
def runs(monkeypatch):
    """The directions in which the engine's kernels were run."""
    directions, run = [], quantizers._run_staircase
    monkeypatch.setattr(quantizers, "_run_staircase", lambda way, *a, **k: directions.append(way) or run(way, *a, **k))
    return directions


def same(a, b):
    """The same numbers bit for bit, and NaN in the same places; but a zero may have either sign, which torch's own
    `clamp` leaves to the instructions that it is compiled to."""
    numbers = torch.equal(a.nan_to_num(0, math.inf, -math.inf), b.nan_to_num(0, math.inf, -math.inf))
    return numbers and torch.equal(a.isnan(), b.isnan()) and a.dtype == b.dtype and a.stride() == b.stride()


def ordered(x, order):
    """The same numbers in another order of memory."""
    if order == "channels last" and x.ndim > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "transposed":
        return x.mT.contiguous().mT if x.ndim > 1 else x
    if order == "with gaps":
        return torch.stack([x, x], -1)[..., 1]
    return x.expand(2, *x.shape) if order == "expanded" else x


ORDERS = ("contiguous", "channels last", "transposed", "with gaps", "expanded")
SHAPES = ((), (0,), (1,), (17,), (3, 5), (2, 0, 4), (STAIRCASE_BLOCK,), (2 * STAIRCASE_BLOCK + 1,), (2, 3, 5, 7),
          (3, 70, 9), (2, 3, 4, 3, 5), (2, 33, 25, 25))  # the last is for more than one thread  # fmt: skip


@st.composite
def cases(draw):
    """R, G, thresholds, half steps, zero: values on thresholds and on the windows' edges, and what is no number."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape, T = draw(st.sampled_from(SHAPES)), draw(st.integers(1, 7))
    thresholds, half_steps = torch.randn(2, T, generator=generator)
    if draw(st.booleans()):
        thresholds[0] = thresholds[-1]  # two that have met
        half_steps[0] = 0
    R, G = torch.randn(2, *shape, generator=generator)
    special = torch.cat([thresholds, thresholds - 0.5, thresholds + 0.5, torch.tensor([0.0, -0.0])])
    if draw(st.booleans()):
        special = torch.cat([special, torch.tensor([math.nan, math.inf, -math.inf])])
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    R = torch.where(torch.rand(shape, generator=generator) < 0.3, chosen, R)
    if draw(st.sampled_from([False, False, True])) and G.numel():
        G.view(-1)[-1] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    R, G = (ordered(x.to(dtype), draw(st.sampled_from(ORDERS[: 5 if x is G else 4]))) for x in (R, G))
    return R.expand(G.shape) if G.ndim > R.ndim else R, G, thresholds, half_steps, draw(st.booleans())


@pytest.mark.filterwarnings("error")
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.integers(1, 2))
def test_the_numbers_of_plain_torch(case, threads):
    torch.set_num_threads(threads)
    R, G, thresholds, half_steps, zero = case
    assert same(forward(R, thresholds, half_steps, zero), abcnets._staircase(R, thresholds, half_steps, zero))
    G_R, near, signs = backward(R, G, thresholds, half_steps, zero)
    wanted_G_R, *wanted = abcnets._staircase_backward(R, G, thresholds, half_steps, zero)
    assert same(G_R, wanted_G_R)
    assert [(x.shape, x.dtype) for x in (near, signs)] == [(x.shape, x.dtype) for x in wanted]

    r, g = R.float(), G.double() * (R != 0 if zero else 1)
    axes = list(range(1, R.ndim + 1))
    t = thresholds.view(-1, *[1] * R.ndim)
    inside = g * ((r - t).abs() <= 0.5)
    sign = torch.where(r >= t, 1, -1) - (torch.where(t <= 0, 1, -1) if zero else 0)
    size = g.abs().sum().nan_to_num(0, 0).item()
    assert torch.allclose(near.double(), inside.sum(axes) if axes else inside, 1e-5, 1e-6 * size, equal_nan=True)
    if g.isfinite().all():  # an infinite sum is one of both infinities, or none
        assert torch.allclose(signs.double(), (g * sign).sum(axes) if axes else g * sign, 1e-5, 1e-6 * size)
    else:
        assert not signs.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_number_of_threads_changes_no_more_than_the_sums_last_bits(dtype, order):
    R, G = (x.to(dtype).contiguous(memory_format=order) for x in torch.randn(2, 4, 20, 40, 40))
    results = []
    for threads in (1, 2, 3, 2, 3):
        torch.set_num_threads(threads)
        outputs = backward(R, G, THRESHOLDS, HALF_STEPS, True)
        results.append([forward(R, THRESHOLDS, HALF_STEPS, True), *outputs])
    for a, *others in zip(*results):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-2) for b in others)
        assert torch.equal(others[0], others[2]) and torch.equal(others[1], others[3])
    assert all(torch.equal(results[0][k], other[k]) for other in results for k in (0, 1))


@pytest.mark.parametrize("half_steps", [[math.inf, 1, 1], [1, math.nan, 1], [3e38, 3e38, 1]])
def test_scales_that_are_no_numbers(half_steps):
    R, half_steps = torch.randn(50), torch.tensor(half_steps)
    for zero in (False, True):
        assert same(forward(R, THRESHOLDS, half_steps, zero), abcnets._staircase(R, THRESHOLDS, half_steps, zero))
        G_R = backward(R, R, THRESHOLDS, half_steps, zero)[0]
        assert same(G_R, abcnets._staircase_backward(R, R, THRESHOLDS, half_steps, zero)[0])


def test_thresholds_that_are_no_numbers():
    for thresholds in (torch.tensor([math.nan, 0.1, math.inf]), torch.tensor([-math.inf, math.nan, 0.1])):
        R = torch.tensor([-math.inf, math.inf, math.nan, 0, 0.1, -5])
        assert same(forward(R, thresholds, HALF_STEPS, False), abcnets._staircase(R, thresholds, HALF_STEPS, False))
        G_R = backward(R, torch.ones(6), thresholds, HALF_STEPS, False)[0]
        assert same(G_R, abcnets._staircase_backward(R, torch.ones(6), thresholds, HALF_STEPS, False)[0])


# What runs where


def gradients(R, vs, betas, code="thermometer", zero=False):
    inputs = [x.detach().clone().requires_grad_() for x in (R, vs, betas)]
    Aq = abcnets.quantize_activation(*inputs, code, zero)
    return [Aq, *torch.autograd.grad(Aq.float().square().sum(), inputs)]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("code, N", [
    ("thermometer", 1), ("thermometer", 3), ("uniform", 3), ("binary", 2), ("binary", 4),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_run_by_the_engine(dtype, code, N, zero, runs, monkeypatch):
    R = torch.randn(6, 8, 9, 9).relu().to(dtype)
    vs = 0.5 - torch.rand(2**N - 1 if code == "binary" else N)
    betas = torch.rand(1 if code == "uniform" else N)
    Aq, *G = gradients(R, vs, betas, code, zero)
    assert runs == ["forward", "backward"]
    monkeypatch.setattr(abcnets, "_has_operator", lambda *tensors: False)
    wanted_Aq, *wanted = gradients(R, vs, betas, code, zero)
    assert len(runs) == 2 and torch.equal(Aq, wanted_Aq) and torch.equal(G[0], wanted[0])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-2) for a, b in zip(G, wanted))


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize("R, parameters", [
    (torch.randn(40, dtype=torch.float64), torch.float32), (torch.randn(40).half(), torch.float32),
    (torch.randn(40), torch.float64), (torch.randn(40).as_subclass(Marked), torch.float32),
])  # fmt: skip
def test_other_tensors_are_left_to_plain_torch(R, parameters, runs):
    vs, betas = torch.tensor([0.2, -0.4], dtype=parameters), torch.tensor([0.5, 0.25], dtype=parameters)
    outputs = gradients(R, vs, betas)
    assert runs == [] and type(outputs[0]) is type(R) and outputs[0].dtype == R.dtype
    wanted = gradients(R.double(), vs, betas)
    assert all(torch.allclose(a.double(), b.double(), rtol=1e-2) for a, b in zip(outputs, wanted))


def test_compilers_see_plain_torch(runs):
    R, vs, betas = torch.randn(50), torch.tensor([0.2, -0.4]), torch.tensor([0.5, 0.25])
    torch._dynamo.reset()
    compiled = torch.compile(gradients, backend="aot_eager")(R, vs, betas)
    assert runs == []
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(compiled, gradients(R, vs, betas)))
    assert "staircase" not in str(torch.jit.trace(lambda x: abcnets.quantize_activation(x, vs, betas), R).graph)


def test_transforms_and_modes_of_torch():
    """What changes what a tensor is sees an operator, whose tensors it handles itself."""
    vs, betas = torch.tensor([0.2, -0.4]), torch.tensor([0.5, 0.25])
    R, other = torch.randn(2, 50)
    f = lambda *tensors: abcnets.quantize_activation(*tensors).square().sum()  # noqa: E731
    by_func = torch.func.grad(f, argnums=(0, 1, 2))(R, vs, betas)
    assert all(torch.equal(a, b) for a, b in zip(by_func, gradients(R, vs, betas)[1:]))
    traced = make_fx(lambda R: abcnets.quantize_activation(R, vs, betas))(R)
    assert torch.equal(traced(other), abcnets.quantize_activation(other, vs, betas))
    negative = torch.complex(R, other).conj().imag  # which lies in memory without its sign
    assert negative.is_neg() and torch.equal(
        abcnets.quantize_activation(negative, vs, betas), abcnets.quantize_activation(-other, vs, betas)
    )
    Aq, *G = gradients(R, vs, betas)
    with torch.device("meta"), torch.autocast("cpu"):
        assert all(torch.equal(a, b) for a, b in zip(gradients(R, vs, betas), [Aq, *G]))
        with torch.inference_mode():
            assert torch.equal(abcnets.quantize_activation(R, vs, betas), Aq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operators_are_what_they_say_to_torch(dtype):
    R, G = (x.to(memory_format=torch.channels_last) for x in torch.randn(2, 4, 5, 6, 3, dtype=dtype))
    for operator, tensors in ((forward, [R]), (backward, [R, G])):
        arguments = *tensors, THRESHOLDS, HALF_STEPS, True
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_gradient_in_another_order_of_memory():
    R = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    G = torch.randn(2, 8, 5, 5)
    for g in (G, G.to(memory_format=torch.channels_last), G.mT.contiguous().mT):
        outputs = backward(R, g, THRESHOLDS, HALF_STEPS, True)
        for a, b in zip(outputs, abcnets._staircase_backward(R, G, THRESHOLDS, HALF_STEPS, True)):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-4) and a.stride() == b.stride()


def test_calls_at_the_same_time():
    inputs = [torch.randn(3, 40, 40, 40) for _ in range(4)]
    wanted = [(forward(R, THRESHOLDS, HALF_STEPS, True), *backward(R, R, THRESHOLDS, HALF_STEPS, True)) for R in inputs]
    wrong = []

    def work(R, expected):
        for _ in range(30):
            results = forward(R, THRESHOLDS, HALF_STEPS, True), *backward(R, R, THRESHOLDS, HALF_STEPS, True)
            if not all(torch.allclose(a, b) for a, b in zip(results, expected)):
                wrong.append(R)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Weights


def shifts(code, M):
    return abcnets.gaussian_shifts(2**M - 1 if code == "binary" else M)


@st.composite
def weights(draw):
    """Gaussian weights of any shape and order of memory, of any size and mean."""
    shape = draw(st.sampled_from([(1, 1), (3, 1), (1, 300), (5, 16), (7, 3, 5), (6, 4, 3, 3), (33, 16, 3, 3),
                                  (8, 2, 2, 3, 2)]))  # fmt: skip
    W = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    W = draw(st.sampled_from([1, 1e-6, 1e6])) * (W + draw(st.sampled_from([0, 0, 0.3])))
    return ordered(W, draw(st.sampled_from(ORDERS[:4])))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(weights(), st.sampled_from(abcnets.CODES), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(1, 2))
def test_levels_are_those_of_plain_torch(W, code, M, per_channel, nearest, threads):
    torch.set_num_threads(threads)
    code = "thermometer" if M == 1 else code
    us = shifts(code, M)[torch.randperm(len(shifts(code, M)), generator=torch.Generator().manual_seed(M))]
    options = us, per_channel, code, nearest
    Wq, centre, _, _, levels, thresholds = tables = torch.ops.abcnets.fit_levels(W, *options)
    wanted = abcnets._fit_levels(W, *options)
    for ours, theirs in zip(tables, wanted):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    exact = abcnets._fit_levels(W.double(), us.double(), per_channel, code, nearest)
    size = W.abs().max().item()
    for ours, best in zip(tables, exact):
        assert torch.allclose(ours.double(), best, rtol=1e-5, atol=2e-6 * size)
    if code == "thermometer" or M == 2:  # or plain torch's own rounding is a matter of how its system is conditioned
        assert all(torch.allclose(a, b, rtol=1e-5, atol=2e-6 * size) for a, b in zip(tables, wanted))
    # From the thresholds follow the bases, and from the levels the weights, to the bit.
    x = W.reshape(len(levels), -1) - centre
    place = (x[:, :, None] >= thresholds[:, None]).sum(2)
    assert torch.equal(Wq.reshape(x.shape), levels.gather(1, place))
    B, alphas = abcnets.weight_bases(W, *options), abcnets.fit_weight(W, *options)
    sum_of_bases = (alphas.view(len(B), -1, *[1] * (W.ndim - 1)) * B).sum(0)
    assert torch.allclose(sum_of_bases, abcnets.quantize_weight(W, *options), rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("code, M", [("thermometer", 2), ("binary", 2), ("binary", 3), ("uniform", 3)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(code, M, value):
    W = torch.randn(3, 40)
    W[1, 4] = value
    ours, plain = (fit(W, shifts(code, M), True, code, True)[0] for fit in (torch.ops.abcnets.fit_levels,
                                                                         abcnets._fit_levels))  # fmt: skip
    assert torch.equal(ours.isnan(), plain.isnan()) and torch.allclose(ours[[0, 2]], plain[[0, 2]], atol=1e-5)


@pytest.mark.parametrize("code, M", [("thermometer", 3), ("binary", 2), ("binary", 3), ("uniform", 2)])
def test_weights_of_few_values(code, M):
    """Empty bins, all weights alike, and zeros."""
    few = torch.randn(6, 50).round()
    for W in (few, torch.full((2, 9), 0.3), torch.zeros(2, 9), torch.ones(4, 1)):
        ours, plain = (fit(W, shifts(code, M), True, code, True) for fit in (torch.ops.abcnets.fit_levels,
                                                                          abcnets._fit_levels))  # fmt: skip
        error, wanted = ((W - fitted[0]).square().sum() for fitted in (ours, plain))
        assert error <= wanted * (1 + 1e-4) + 1e-10 and all(table.isfinite().all() for table in ours)


@pytest.mark.parametrize("code, M", [("thermometer", 3), ("binary", 2)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_learned_shifts_get_the_gradient_of_plain_torch(code, M, per_channel, monkeypatch):
    W, G = torch.randn(2, 8, 4, 3, 3)
    found = []
    for has_operator in (abcnets._has_operator, lambda *tensors: False):
        monkeypatch.setattr(abcnets, "_has_operator", has_operator)
        inputs = W.clone().requires_grad_(), shifts(code, M).flip(0).clone().requires_grad_()
        Wq = abcnets.quantize_weight(*inputs, per_channel, code, False)
        found.append([Wq, *torch.autograd.grad(Wq, inputs, G)])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found)) and found[0][2].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_levels_operator_is_what_it_says_to_torch(dtype):
    for W in (torch.randn(4, 5, 3, 3, dtype=dtype), torch.randn(4, 5, 3, 3, dtype=dtype).mT):
        for code in abcnets.CODES:
            arguments = W.contiguous(memory_format=torch.channels_last), shifts(code, 2).to(dtype), True, code, True
            torch.library.opcheck(
                torch.ops.abcnets.fit_levels.default, arguments, test_utils=("test_schema", "test_faketensor")
            )


# Steps that keep R alone


def layers():
    bases = {"weight_bases": 2, "activation_bases": 2, "active": True}
    yield abcnets.ABCConv2d(4, 6, 3, padding=1, **bases), (3, 4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, (3, 2), 2, dilation=2, groups=2, bias=False, code="binary", **bases), (3, 4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, 3, padding="same", code="uniform", **bases), (3, 4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, 2, padding="same", **bases), (3, 4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, 3, padding=1, padding_mode="circular", **bases), (3, 4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, 3, code="binary", **bases), (4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, 3, **{**bases, "weight_bases": None}), (3, 4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, 3, **{**bases, "activation_bases": None}), (3, 4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, 3, learn_us=True, per_channel=False, **bases), (3, 4, 9, 8)
    yield abcnets.ABCConv2d(4, 6, 3, **bases), (0, 4, 9, 8)
    yield abcnets.ABCConv1d(4, 6, 3, padding=2, **bases), (3, 4, 9)
    yield abcnets.ABCConv3d(4, 6, 3, stride=(1, 2, 1), code="binary", **bases), (2, 4, 5, 7, 6)
    yield abcnets.ABCLinear(8, 6, code="binary", **bases), (5, 8)
    yield abcnets.ABCLinear(8, 6, bias=False, **bases), (2, 5, 8)
    yield abcnets.ABCLinear(8, 6, **bases), (8,)


def forward_and_gradients(layer, x, dtype=None, only=None):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    inputs = [x, *layer.parameters()] if only is None else only
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = layer(x)
    G = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, G)]


@pytest.fixture
def keeping(monkeypatch):
    """keeping(False): Aq is kept, as without an engine."""
    keeps_input = abcnets._keeps_input
    return lambda R: monkeypatch.setattr(abcnets, "_keeps_input", keeps_input if R else lambda *tensors: False)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS[:2])
def test_the_same_step_to_the_bit(order, dtype, keeping):
    for layer, shape in layers():
        x = ordered(torch.randn(shape), order if layer.spatial_dims else "contiguous")
        keeping(True)
        lean = forward_and_gradients(layer, x, dtype)
        keeping(False)
        for a, b in zip(lean, forward_and_gradients(layer, x, dtype)):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride(), (layer, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_is_kept(dtype, keeping):
    """Of what is as large as the input, R alone."""

    def large(R):
        layer, kept = abcnets.ABCConv2d(8, 8, 3, padding=1, active=True), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x}) or x, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                layer(R)
        return [x for x in kept.values() if x.numel() == R.numel()]

    R = torch.randn(4, 8, 10, 10, dtype=dtype, requires_grad=True)
    assert [x.data_ptr() for x in large(R)] == [R.data_ptr()]
    keeping(False)
    assert len(large(R)) == 2


def test_only_what_is_wanted(keeping):
    layer, x = abcnets.ABCConv2d(4, 6, 3, active=True), torch.randn(2, 4, 7, 7)
    for only in ([layer.weight], [layer.vs], [layer.bias, layer.betas]):
        keeping(True)
        lean = forward_and_gradients(layer, x, only=only)
        keeping(False)
        assert all(torch.equal(a, b) for a, b in zip(lean, forward_and_gradients(layer, x, only=only)))
    keeping(True)
    layer.requires_grad_(False)
    (G,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), [x])
    layer.vs.requires_grad_()
    assert torch.autograd.grad(layer(x.detach()).sum(), [layer.vs])[0].abs().sum() > 0 and G.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_gradients(dtype, keeping):
    found = []
    for keeps in (True, False):
        keeping(keeps)
        torch.manual_seed(0)
        layer, x = abcnets.ABCConv2d(4, 6, 3, code="binary", active=True), torch.randn(2, 4, 7, 7).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = layer(x).float()
        G = torch.autograd.grad(y.square().sum(), [layer.weight, layer.bias, x], create_graph=True)
        found.append([*G, *torch.autograd.grad(G[0].square().sum() + G[1].sum(), [layer.weight, layer.bias],
                                               retain_graph=True)])  # fmt: skip
        with pytest.raises(RuntimeError, match="once_differentiable"):
            G[2].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(*found)) and found[0][3].abs().sum() > 0


def test_what_changes_in_place(keeping):
    layer, x = abcnets.ABCConv2d(4, 6, 3, active=True), torch.randn(2, 4, 7, 7)
    R = x.clone().requires_grad_() * 1
    y = layer(R)
    R.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), [layer.weight])
    y = layer(x.requires_grad_())
    wanted = torch.autograd.grad(y.square().sum(), [x], retain_graph=True)[0]
    with torch.no_grad():
        layer.weight.add_(1)
    (G,) = torch.autograd.grad(y.square().sum(), [x], retain_graph=True)  # of the weights that there were
    assert torch.equal(G, wanted)
    with pytest.raises(RuntimeError, match="weight was modified"):
        torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    layer.betas = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="one entry per activation base"):
        layer(x)
    layer = abcnets.ABCConv2d(4, 6, 3, active=True)
    for module, shape in ((layer, (2, 4, 7, 7)), (abcnets.ABCLinear(8, 6, active=True), (2, 5, 8))):
        x = torch.randn(shape, requires_grad=True)
        results = []
        for keeps in (True, False):
            keeping(keeps)
            y = nn.functional.relu(module(x), inplace=True)
            results.append(torch.autograd.grad(y.square().sum(), [x, module.weight]))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_transforms_of_whole_layers(keeping):
    """Checkpoints, functorch and compilers get what they got before."""
    layer, x = abcnets.ABCConv2d(4, 6, 3, code="binary", active=True), torch.randn(2, 4, 7, 7, requires_grad=True)
    parameters = dict(layer.named_parameters())
    loss = lambda p, x: torch.func.functional_call(layer, p, (x,)).square().sum()  # noqa: E731

    def results():
        inputs = [x, *parameters.values()]
        for reentrant in (True, False):
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
            if reentrant:
                for p in inputs:
                    p.grad = None
                y.square().sum().backward()
                yield from [p.grad.clone() for p in inputs]
            else:
                yield from torch.autograd.grad(y.square().sum(), inputs)
        yield from torch.func.grad(loss)(parameters, x).values()
        torch._dynamo.reset()
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        yield from torch.autograd.grad(y.square().sum(), inputs)
        yield torch.jit.trace(layer.eval(), x.detach())(x)

    lean = list(results())
    keeping(False)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(lean, results(), strict=True))


# Whole networks, other processes


@pytest.mark.parametrize("code", ["thermometer", "binary"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_network_learns_the_same_without_it(code, precision, runs, monkeypatch, one_thread):
    images, labels = torch.randn(64, 1, 12, 12), torch.randint(4, (64,))

    def losses():
        torch.manual_seed(0)
        model = abcnets.convert(nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)), 2, 2, code=code)  # fmt: skip
        optimizer, found = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    fast = losses()
    # Aq is made again in the backward pass.
    assert runs.count("forward") == 32 and runs.count("backward") == 16 and fast[-1] < fast[0]
    monkeypatch.setattr(abcnets, "_keeps_input", lambda *tensors: False)
    assert losses() == fast and len(runs) == 80
    monkeypatch.setattr(abcnets, "_has_operator", lambda *tensors: False)
    assert losses() == pytest.approx(fast, rel=1e-2) and len(runs) == 80


def test_without_an_engine_nothing_is_said(monkeypatch):
    monkeypatch.setitem(abcnets._found, "cpu", {"missing": "none here", "install": "something"})
    R = torch.randn(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Aq = abcnets._run_operator(abcnets._staircase, R, THRESHOLDS, HALF_STEPS, False)
        G_R = abcnets._run_operator(abcnets._staircase_backward, R, R, THRESHOLDS, HALF_STEPS, False)[0]
        Wq = abcnets._run_operator(abcnets._fit_levels, R[None], torch.zeros(1), True, "thermometer", False)[0]
    assert torch.equal(Aq, abcnets._staircase(R, THRESHOLDS, HALF_STEPS, False)) and G_R.shape == R.shape
    assert len(Wq.unique()) == 2


TRAINS = """
import sys, warnings
warnings.simplefilter("error")
if {without_numba}:
    sys.modules["numba"] = None
import torch, abcnets
assert "numba" not in sys.modules or {without_numba}
layer, R = abcnets.ABCLinear(70, 9, active=True), torch.randn(40, 70, requires_grad=True)
with torch.no_grad() if {evaluates_first} else torch.enable_grad():
    layer(R)
layer(R).square().sum().backward()
assert all(p.grad.abs().sum() > 0 for p in (R, *layer.parameters()))
assert ("engine" in abcnets._found["cpu"]) is not {without_numba}
"""

IN_A_FORKED_CHILD = """
import os, signal, torch, abcnets
torch.set_num_threads(2)
R, G = torch.randn(2, 8, 64, 30, 30)
thresholds, half_steps = torch.rand(2, 3)
def run():
    outputs = torch.ops.abcnets.staircase_backward(R, G, thresholds, half_steps, False)
    return [x.numpy() for x in (torch.ops.abcnets.staircase(R, thresholds, half_steps, False), *outputs)]
expected = run() if {used_before} else [x.numpy() for x in (
    abcnets._staircase(R, thresholds, half_steps, False),
    *abcnets._staircase_backward(R, G, thresholds, half_steps, False))]
child = os.fork()
if child == 0:
    signal.alarm(120)  # torch's threads, for which a kernel would wait, are not here
    os._exit(0 if all(abs(a - b).max() < 0.1 for a, b in zip(run(), expected)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("script", [
    TRAINS.format(without_numba=False, evaluates_first=True), TRAINS.format(without_numba=True, evaluates_first=False),
    IN_A_FORKED_CHILD.format(used_before=True), IN_A_FORKED_CHILD.format(used_before=False),
])  # fmt: skip
def test_in_a_fresh_process(script, pytestconfig):
    if "fork" in script and sys.platform == "win32":
        pytest.skip("no fork")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
