"""Codes: which levels M bits make, in weights and activations, from the mathematics to files and fused bits."""

import copy
import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import abcnets
from abcnets import ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear
from kernels.cpu.engine import BITS_PAY_UP_TO
from kernels.cpu.system import tile

OTHERS = ("binary", "uniform")
PAIRS = [*abcnets.CODES, *itertools.permutations(abcnets.CODES, 2)]


def shifts(code, bases):
    return abcnets.gaussian_shifts(2**bases - 1 if code == "binary" else bases)


def signs_of(code, bases):
    """S (L, N), written down once more, from the definition."""
    if code == "binary":
        return torch.tensor([[1.0 if c == "1" else -1 for c in f"{j:0{bases}b}"] for j in range(2**bases)])
    return torch.tensor([[1.0 if j > n else -1 for n in range(bases)] for j in range(bases + 1)])


# Weights


@st.composite
def weights(draw):
    """Random, few-valued, constant and very different weights (O, K), in float64."""
    O, K = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    W = torch.randn(O, K, generator=generator, dtype=torch.float64) + draw(st.sampled_from([0, 0, 0.5]))
    kind = draw(st.sampled_from(["gaussian", "few", "constant", "zeros", "outlier"]))
    if kind == "few":
        W = W.round()
    elif kind == "constant":
        W = torch.full_like(W, 0.3)
    elif kind == "zeros":
        W = torch.zeros_like(W)
    elif kind == "outlier":
        W[0, 0] = 1e4
    return W * draw(st.sampled_from([1, 1e-6, 1e6]))


@settings(max_examples=200, deadline=None)
@given(weights(), st.sampled_from(OTHERS), st.integers(2, 4), st.booleans(), st.booleans())
def test_alphas_are_the_least_squares_fit_to_the_bases(W, code, M, per_channel, nearest):
    us = shifts(code, M).double()
    B = abcnets.weight_bases(W, us, per_channel, code, nearest)
    alphas = abcnets.fit_weight(W, us, per_channel, code, nearest)
    Wq = abcnets.quantize_weight(W, us, per_channel, code, nearest)
    scale = W.abs().max().item()
    assert torch.allclose((alphas[:, :, None] * B).sum(0), Wq, atol=1e-9 * scale)
    for rows in [[o] for o in range(len(W))] if per_channel else [list(range(len(W)))]:
        columns = B[:, rows].reshape(M, -1).t()
        if code == "uniform":  # one scale
            columns = columns.sum(1, keepdim=True)
        target = W[rows].reshape(-1, 1)
        best = torch.linalg.lstsq(columns, target, driver="gelsd").solution
        least = (target - columns @ best).norm()
        assert (W[rows] - Wq[rows]).norm() <= least * (1 + 1e-6) + 1e-7 * target.norm()


@settings(max_examples=200, deadline=None)
@given(weights(), st.sampled_from(OTHERS), st.integers(2, 3))
def test_weights_on_the_levels_stay_there(W, code, M):
    us = shifts(code, M).double()
    for _ in range(200):  # so many rounds of nearest level and least squares that nothing moves any more
        W, before = abcnets.quantize_weight(W, us, True, code), W
        if torch.allclose(W, before, rtol=1e-12, atol=0):
            break
    again = abcnets.quantize_weight(W, us, True, code)
    assert torch.allclose(again, W, rtol=1e-6, atol=1e-9 * max(W.abs().max().item(), 1e-300))


@pytest.mark.parametrize("code, M", [("binary", 2), ("binary", 3), ("uniform", 2), ("uniform", 3), ("uniform", 5)])
def test_each_weight_falls_on_the_nearest_level_once_levels_have_settled(code, M):
    W = torch.randn(3, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    us, unchanged = shifts(code, M).double(), 0
    for row in W:
        # Where levels have settled, cutting midway between them is what `nearest` did.
        levels = abcnets.quantize_weight(row[None], us, True, code).unique()
        for _ in range(300):
            middles = (levels[1:] + levels[:-1]) / 2
            own_us = -middles / row.square().mean().sqrt()
            Wq = abcnets.quantize_weight(row[None], own_us, True, code, nearest=False)
            levels, before = Wq.unique(), levels
            if torch.equal(levels, before):
                break
        assert torch.equal(Wq[0], levels[(row[:, None] - levels).abs().argmin(1)])
        first = abcnets.quantize_weight(row[None], us, True, code)
        assert (row - first[0]).square().mean() <= 1.01 * (row - Wq[0]).square().mean()  # a few rounds are enough
        unchanged += 1
    assert unchanged == 3


@pytest.mark.parametrize(
    "code, M, error", [("binary", 2, 0.1175), ("binary", 3, 0.037), ("uniform", 2, 0.190), ("uniform", 3, 0.1188)]
)
def test_relative_error_on_a_gaussian(code, M, error):
    W = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)[None]
    Wq = abcnets.quantize_weight(W, shifts(code, M), True, code)
    assert ((W - Wq).square().mean() / W.square().mean()).item() == pytest.approx(error, abs=0.0007)
    signs = signs_of(code, M).double()
    alphas = abcnets.fit_weight(W, shifts(code, M), True, code)[:, 0]
    assert torch.allclose(Wq.unique(), signs @ alphas, atol=1e-9) and len(Wq.unique()) == len(signs)


def test_one_base_is_the_same_in_all_codes():
    W, R = torch.randn(4, 30) + 0.2, torch.randn(50)
    for code in OTHERS:
        for function in (abcnets.weight_bases, abcnets.fit_weight, abcnets.quantize_weight):
            assert torch.equal(function(W, torch.zeros(1), True, code), function(W, torch.zeros(1)))
        one = torch.tensor([0.3]), torch.tensor([0.7])
        assert torch.equal(abcnets.quantize_activation(R, *one, code), abcnets.quantize_activation(R, *one))
        layer = ABCLinear(3, 4, weight_bases=1, activation_bases=1, code=code)
        assert layer.code == ("thermometer", "thermometer") and not layer.zero


def test_nan_weights_make_their_channel_nan():
    W = torch.randn(3, 20)
    W[1, 4] = math.nan
    for code, M in itertools.product(OTHERS, (2, 3)):
        Wq = abcnets.quantize_weight(W, shifts(code, M), True, code)
        assert Wq[1].isnan().all() and not Wq[[0, 2]].isnan().any()


@pytest.mark.parametrize("code, M", [("binary", 2), ("binary", 3), ("uniform", 2)])
def test_learned_shifts_cut_the_bins_and_get_the_documented_gradient(code, M):
    W = torch.randn(3, 40, dtype=torch.float64)
    us = shifts(code, M).double().flip(0) + 0.05 * torch.randn(len(shifts(code, M)), dtype=torch.float64)
    us.requires_grad_()
    G = torch.randn_like(W)
    with pytest.raises(ValueError, match="nearest=False"):
        abcnets.quantize_weight(W, us, True, code)
    Wq = abcnets.quantize_weight(W, us, True, code, nearest=False)
    Wq.backward(G)
    wanted = torch.zeros_like(us)
    for w, g, q in zip(W, G, Wq.detach()):
        rms = w.square().mean().sqrt()
        cuts = (-us.detach() * rms).sort().values
        level = signs_of(code, M).double() @ abcnets.fit_weight(w[None], us.detach(), True, code, False)[:, 0]
        assert torch.allclose(q, level[(w[:, None] >= cuts).sum(1)])
        for j, u in enumerate(us.detach()):
            place = (cuts < -u * rms).sum()
            half_step = (level[place + 1] - level[place]) / 2
            wanted[j] += half_step * g[(w / rms + u).abs() <= 1].sum()
    assert torch.allclose(us.grad, wanted)
    layer = ABCLinear(40, 3, weight_bases=M, code=code, learn_us=True, active=True)
    assert isinstance(layer.us, nn.Parameter) and not layer.nearest
    layer(torch.randn(5, 40)).sum().backward()
    assert layer.us.grad.abs().sum() > 0
    packed = abcnets.pack(layer)
    x = torch.randn(5, 40)
    assert torch.allclose(packed(x), layer(x), atol=1e-4)


# Activations


def staircase(r, vs, betas, code, zero):
    """Aq of one number, from the definition."""
    def level(r):
        thresholds = sorted((0.5 - v) for v in vs.tolist())
        N = len(betas) if code == "binary" else len(vs)
        scales = betas.expand(N) if code == "uniform" else betas
        if code == "thermometer":
            return sum(b if r >= 0.5 - v else -b for v, b in zip(vs.tolist(), scales.tolist()))
        return (signs_of(code, N).to(betas.dtype)[sum(r >= t for t in thresholds)] * scales).sum().item()

    return level(r) - (level(0.0) if zero else 0.0)


@st.composite
def activations(draw):
    code, N = draw(st.sampled_from(abcnets.CODES)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    make = lambda n: torch.randn(n, generator=generator, dtype=torch.float64)  # noqa: E731
    vs = make(2**N - 1 if code == "binary" else N) * 0.7
    betas = make(1 if code == "uniform" else N).abs() * draw(st.sampled_from([1, -1, 1]))
    R = make(25)
    R[:3] = torch.cat([0.5 - vs[:1], torch.zeros(2, dtype=torch.float64)])
    return R, vs, betas, code, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(activations())
def test_staircases_and_gradients_are_the_documented_ones(case):
    R, vs, betas, code, zero = case
    R, vs, betas = (x.clone().requires_grad_() for x in (R, vs, betas))
    Aq = abcnets.quantize_activation(R, vs, betas, code, zero)
    wanted = [staircase(r, vs.detach(), betas.detach(), code, zero) for r in R.tolist()]
    assert Aq.tolist() == pytest.approx(wanted, abs=1e-9)
    if zero:
        assert (Aq[R == 0] == 0).all()
    G = torch.randn_like(R)
    Aq.backward(G)

    N = len(vs) if code != "binary" else len(betas)
    order = vs.detach().argsort(descending=True)  # thresholds ascending
    if code == "thermometer":
        half = betas.detach()
        bases = lambda r: torch.stack([torch.where(r >= 0.5 - v, 1.0, -1.0) for v in vs.detach()])  # noqa: E731
    elif code == "uniform":
        half = betas.detach().expand(N)
        bases = lambda r: torch.stack([torch.where(r >= 0.5 - v, 1.0, -1.0) for v in vs.detach()])  # noqa: E731
    else:
        S = signs_of(code, N).double()
        half = ((S[1:] - S[:-1]) / 2 @ betas.detach())[order.argsort()]
        bases = lambda r: S[(r[:, None] >= 0.5 - vs.detach()).sum(1)].t()  # noqa: E731
    r = R.detach()
    moved = G * (r != 0) if zero else G
    near = ((r - (0.5 - vs.detach()[:, None])).abs() <= 0.5).double()
    assert torch.allclose(R.grad, (half[:, None] * near * moved).sum(0))
    assert torch.allclose(vs.grad, half * (near * moved).sum(1))
    A = bases(r) - (bases(torch.zeros(1, dtype=r.dtype)) if zero else 0)
    G_betas = (A.double() * G).sum(1)
    assert torch.allclose(betas.grad, G_betas.sum().view(1) if code == "uniform" else G_betas)


def test_vs_and_betas_must_be_as_many_as_the_code_has():
    R, v = torch.randn(4), torch.zeros
    wrong = ("thermometer", 2, 1), ("uniform", 3, 2), ("binary", 2, 2), ("binary", 3, 3), ("uniform", 0, 1)
    for code, vs, betas in wrong:
        with pytest.raises(ValueError, match=r"vs and betas must have .*, got shapes \("):
            abcnets.quantize_activation(R, v(vs), v(betas), code)
    with pytest.raises(ValueError, match="code must be one of .* got 'ternary'"):
        abcnets.quantize_activation(R, v(1), v(1), "ternary")
    with pytest.raises(ValueError, match="code must be one of"):
        abcnets.quantize_weight(torch.randn(3, 4), v(2), True, "ternary")
    with pytest.raises(ValueError, match=r"us must be 2\^n - 1 numbers for n bases, got 2"):
        abcnets.quantize_weight(torch.randn(3, 4), v(2), True, "binary")
    for code in ("ternary", ("binary",), ("binary", "ternary"), 3, None, (["binary"], "uniform")):
        with pytest.raises(ValueError, match="code must be one of"):
            ABCLinear(3, 4, code=code)
        with pytest.raises(ValueError, match="code must be one of"):
            abcnets.convert(nn.Linear(3, 4), code=code)
    with pytest.raises(ValueError, match="zero must be True, False or None"):
        ABCLinear(3, 4, zero="yes")
    with pytest.raises(ValueError, match="activation_bases must be a positive integer of at most 8 in the binary code"):
        ABCLinear(3, 4, activation_bases=9, code="binary")
    with pytest.raises(ValueError, match="us must be 3 numbers"):
        ABCLinear(3, 4, weight_bases=2, us=[0.0, 1.0], code="binary")
    with pytest.raises(ValueError, match="betas must be one number"):
        ABCLinear(3, 4, activation_bases=2, betas=[0.0, 1.0], code="uniform")


# Layers


def test_constructors_take_codes():
    conv = ABCConv2d(3, 4, 3, weight_bases=2, activation_bases=3, code=("binary", "uniform"))
    assert (conv.code, conv.zero) == (("binary", "uniform"), True)
    assert (conv.weight_bases, conv.activation_bases) == (2, 3)
    assert [len(t) for t in (conv.us, conv.vs, conv.betas)] == [3, 3, 1]
    assert "code=('binary', 'uniform'), zero=True" in repr(conv)
    again = ABCConv2d.from_parameters(conv.weight, None, conv.us, conv.vs, conv.betas, code=conv.code, active=True)
    assert (again.weight_bases, again.activation_bases, again.zero) == (2, 3, True)
    binary = ABCLinear.from_float(nn.Linear(5, 6), weight_bases=2, activation_bases=2, code="binary")
    assert [len(t) for t in (binary.us, binary.vs, binary.betas)] == [3, 3, 2]
    assert "code='binary', zero=True" in repr(binary)
    assert not ABCLinear(5, 6, code="binary", zero=False).zero and ABCLinear(5, 6, zero=True).zero
    assert not ABCLinear(5, 6, activation_bases=None, code="binary", zero=True).zero
    network = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    model = abcnets.convert(network, 2, 2, code="binary", settings={"2": {"code": ("uniform", "binary"), "zero": False},
                                                                      "3": {"weight_bases": None}})  # fmt: skip
    assert [layer.code for layer in model[1:4]] == [("binary",) * 2, ("uniform", "binary"), ("thermometer", "binary")]
    assert [layer.zero for layer in model[1:4]] == [True, False, True]
    words = [row["code"] for row in abcnets.plan(model)]
    assert words == [None, "binary", "uniform x binary", "binary", None]
    assert [row["code"] for row in abcnets.summary(model, torch.rand(2, 6))] == words
    plan = abcnets.plan(network, 2, 1, code=("thermometer", "binary"))
    assert [row["code"] for row in plan] == [None, "thermometer", "thermometer", "thermometer", None]


@pytest.mark.parametrize("code", OTHERS)
def test_zeros_of_padding_are_zeros_of_the_image(code):
    """With zero, a layer can't tell its padding from an image with a border of zeros; without, it can."""
    for zero in (True, False):
        layer = ABCConv2d(4, 5, 3, padding=1, weight_bases=2, activation_bases=2, code=code, zero=zero, active=True)
        start = layer.vs.detach().clone()
        for vs in (start, torch.linspace(1, -0.2, len(layer.vs)), torch.full_like(layer.vs, 0.5)):
            layer.vs.data.copy_(vs)  # behind a ReLU; thresholds on both sides of 0; all at 0
            x = torch.randn(2, 4, 6, 6)
            bare = copy.deepcopy(layer)
            bare.padding = (0, 0)
            same = torch.allclose(layer(x), bare(F.pad(x, (1, 1, 1, 1))), atol=1e-5)
            assert same if zero else not same or vs is not start
            packed = abcnets.pack(layer, engine="bits")
            assert torch.allclose(packed(x), layer(x), atol=1e-5)


def test_a_threshold_that_crosses_zero_changes_the_level_of_zero():
    layer = ABCLinear(3, 2, weight_bases=2, activation_bases=2, code="binary", active=True)
    x = torch.randn(6, 3)
    for first in (0.3, 0.0, -0.3):  # above, on and below 0
        layer.vs.data.copy_(0.5 - torch.tensor([first, 0.8, 1.4]))
        with torch.no_grad():
            assert layer.quantized_input(torch.zeros(1, 3)).abs().max() == 0
        packed = abcnets.pack(layer, engine="bits")
        level = -layer.betas.sum() + (2 * layer.betas[1] if first <= 0 else 0)
        assert packed.zero.item() == pytest.approx(level.item())
        assert torch.allclose(packed(x), layer(x), atol=1e-5)


@st.composite
def layers(draw):
    """A random layer of any code and an input, with values on thresholds, infinities and perhaps a NaN."""
    dims = draw(st.integers(0, 3))
    code = draw(st.sampled_from(PAIRS))
    M, N = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 1, 2, 3])) if dims else 1
    per_group = draw(st.sampled_from([1, 3, 8, 21, 64, 65, 100, 300] if dims < 3 else [1, 5, 21]))
    C, O = groups * (per_group if groups == 1 else min(per_group, 70)), groups * draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    bases = {"weight_bases": M, "activation_bases": N, "code": code, "zero": draw(st.sampled_from([None, True, False]))}
    bases |= {"per_channel": draw(st.booleans()), "active": True}
    B, bias = draw(st.integers(0, 3)), draw(st.booleans())
    if dims == 0:
        layer, shape = ABCLinear(C, O, bias, **bases), (B, C)
    else:
        kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
        dilation, stride = ([draw(st.integers(1, 2)) for _ in range(dims)] for _ in range(2))
        mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "circular", "replicate"]))
        padding = [draw(st.integers(0, 2)) for _ in range(dims)]
        layer = (ABCConv1d, ABCConv2d, ABCConv3d)[dims - 1](
            C, O, kernel, stride, padding, dilation, groups, bias, mode, **bases
        )
        shape = (B, C, *(draw(st.integers(5, 8)) for _ in range(dims)))
    with torch.no_grad():
        layer.vs.copy_(torch.randn_like(layer.vs))
        layer.betas.copy_(torch.randn_like(layer.betas))
    x = torch.randn(shape)
    special = torch.cat([0.5 - layer.vs.detach(), torch.tensor([math.inf, -math.inf, 0.0])])
    if draw(st.booleans()):
        special = torch.cat([special, torch.tensor([math.nan])])
    return layer, torch.where(torch.rand(shape) < 0.1, special[torch.randint(len(special), shape)], x)


@settings(max_examples=150, deadline=None)
@given(layers())
def test_packed_equals_the_float_simulation(case):
    layer, x = case
    with torch.no_grad():
        expected = layer(x)
        numbers = expected[~expected.isnan()]
        scale = 1e-4 * max(1, numbers.abs().max().item() if len(numbers) else 1)
        for engine in ("bits", "float"):
            y = abcnets.pack(layer, engine=engine)(x)
            assert y.shape == expected.shape and y.dtype == expected.dtype
            assert torch.allclose(y, expected, rtol=1e-4, atol=scale, equal_nan=True)


@pytest.mark.parametrize("code", PAIRS)
def test_half_precision_autocast_and_compiling(code):
    layer = ABCConv2d(6, 5, 3, padding=1, weight_bases=2, activation_bases=2, code=code, active=True)
    x = torch.randn(2, 6, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.quantized_weight(), copy.deepcopy(layer).quantized_weight())
        inside = layer.quantized_weight(), layer.quantized_input(x)
    assert all(torch.equal(a, b) for a, b in zip(inside, (layer.quantized_weight(), layer.quantized_input(x))))
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch._dynamo.reset()  # which counts how often it compiled the same code, in whatever layer
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = layer(x)
    assert torch.allclose(compiled(x), y, atol=1e-5)
    y.sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled(x).sum().backward()
    assert all(torch.allclose(p.grad, g, rtol=1e-3, atol=1e-4) for p, g in zip(layer.parameters(), grads))


@pytest.mark.parametrize("code", PAIRS)
def test_state_dicts_copies_and_pickles(code):
    layer = ABCLinear(6, 5, weight_bases=2, activation_bases=3, code=code, active=True)
    x = torch.randn(4, 6)
    other = ABCLinear(6, 5, weight_bases=2, activation_bases=3, code=code)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x)) and same.code == layer.code
    packed = abcnets.pack(layer, engine="bits")
    for same in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(same(x), packed(x)) and same.code == layer.code
    if code in OTHERS:
        with pytest.raises(RuntimeError, match="size mismatch"):
            ABCLinear(6, 5, weight_bases=2, activation_bases=3, code="thermometer" if code == "binary" else "binary"
                      ).load_state_dict(layer.state_dict())  # fmt: skip


# Thresholds that stay apart


def projected(t, gap):
    """The nearest thresholds with such gaps, by pooling adjacent violators."""
    t, order = t.double().sort(stable=True)
    y = (t - gap * torch.arange(len(t))).tolist()
    blocks = []
    for value in y:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks.pop(), blocks.pop()
            blocks.append([(a * m + b * n) / (m + n), m + n])
    x = torch.tensor([m for m, n in blocks for _ in range(n)]) + gap * torch.arange(len(t))
    return torch.empty_like(x).scatter_(0, order, x)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -0.3, 0.0, 0.0, 0.01, 0.4, 0.41, 0.42, 1.0, 3.0]), min_size=2, max_size=15))
def test_thresholds_are_moved_as_little_as_it_takes(values):
    t = torch.tensor(values)
    layer = ABCLinear(3, 2, activation_bases=len(t), vs=0.5 - t)
    before = layer.vs.detach().clone()
    t = 0.5 - before
    abcnets.separate_thresholds(layer)
    gap = layer.betas.abs().mean().item() / 2
    assert torch.allclose((0.5 - layer.vs).double(), projected(t, gap).double(), atol=1e-5)
    assert ((0.5 - layer.vs).sort().values.diff() >= 0.999 * gap - 1e-6).all()
    once = layer.vs.detach().clone()
    assert torch.equal(abcnets.separate_thresholds(layer).vs, once)
    apart = ABCLinear(3, 2, activation_bases=3, code="binary")
    before = apart.vs.detach().clone()
    assert torch.equal(abcnets.separate_thresholds(apart).vs, before)


@pytest.mark.parametrize("code", abcnets.CODES)
def test_thresholds_that_fit_their_inputs_are_apart_wherever_these_lie(code):
    for scale, offset in ((1, 0), (1, 10), (0.01, 0), (5, -100)):
        layer = ABCLinear(8, 2, activation_bases=3, weight_bases=None, code=code, active=True)
        abcnets.calibrate(layer, scale * torch.randn(5000, 8) + offset, progress=False)
        before = layer.vs.detach().clone()
        assert torch.equal(abcnets.separate_thresholds(layer).vs, before), (scale, offset)


def test_thresholds_that_are_no_numbers_are_left_alone():
    for value in (math.inf, -math.inf, math.nan):
        layer = ABCLinear(3, 2, activation_bases=3, vs=[0.2, 0.2, value])
        before = layer.vs.detach().clone()
        assert torch.allclose(abcnets.separate_thresholds(layer).vs, before, equal_nan=True)


def test_thresholds_that_meet_come_apart_in_training():
    """Equal thresholds get equal gradients, so without the projection they stay equal for ever."""
    def trained(separate):
        torch.manual_seed(0)
        R = torch.randn(512, 8).relu()
        layer = ABCLinear(8, 8, activation_bases=2, weight_bases=None, code="binary", active=True)
        layer.vs.data.copy_(0.5 - torch.tensor([0.8, 0.8, 0.8]))
        optimizer = torch.optim.SGD([layer.vs, layer.betas], 0.05)
        for _ in range(100):
            optimizer.zero_grad()
            (layer.quantized_input(R) - R).square().mean().backward()
            optimizer.step()
            if separate:
                abcnets.separate_thresholds(layer)
        t = 0.5 - layer.vs.detach()
        error = (layer.quantized_input(R) - R).square().mean().item()
        return t.sort().values.diff().min().item(), error

    (together, worse), (apart, better) = trained(False), trained(True)
    assert together < 0.05 < apart and better < worse


def test_a_zero_moves_no_threshold():
    """Behind a ReLU half of all values are 0. Their level is 0 wherever the thresholds are, so they have no say."""
    layer = ABCLinear(4, 3, activation_bases=2, code="binary", active=True)
    layer(torch.zeros(5, 4)).sum().backward()
    assert layer.vs.grad.abs().sum() == 0 and layer.betas.grad.abs().sum() == 0


# Calibration


@pytest.mark.parametrize("N", [1, 2, 3])
def test_calibrated_levels_are_the_best_that_the_code_has(N):
    """No threshold and no scale can be moved by a little without making the error larger."""
    R = torch.randn(20_000).relu() * 1.3
    errors = {}
    for code in abcnets.CODES:
        layer = ABCLinear(1, 1, weight_bases=None, activation_bases=N, code=code, zero=True, active=True)
        abcnets.calibrate(nn.Sequential(layer), R[:, None], progress=False)

        def error(layer=layer):
            Aq = layer.quantized_input(R[:, None])[:, 0]
            return (R - Aq).var().item()  # up to a constant, which is the business of what follows

        best = errors[code] = error()
        for parameter in (layer.vs, layer.betas):
            for i, step in itertools.product(range(len(parameter)), (-0.03, 0.03)):
                with torch.no_grad():
                    parameter[i] += step
                    assert error() > best - 1e-4 * R.var().item()
                    parameter[i] -= step
    assert errors["binary"] <= errors["thermometer"] * 1.0001 <= errors["uniform"] * 1.0002
    if N > 1:
        assert errors["binary"] < 0.9 * errors["thermometer"]


@pytest.mark.parametrize("code", [("thermometer", "thermometer"), ("binary", "binary"), ("binary", "uniform")])
def test_calibration_knows_the_codes(digits, code):
    torch.manual_seed(0)
    middle = [layer for _ in range(3) for layer in (nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))]
    network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *middle, nn.Flatten(), nn.LazyLinear(10)).eval()
    network(next(digits.test_batches(1))[0])
    model = abcnets.convert(network, 2, 2, code=code)
    images = torch.cat([images for images, _ in digits.test_batches(500)])
    with torch.no_grad():
        wanted = network(images)

        def error():
            Y = model.eval()(images)
            return 1 - torch.corrcoef(torch.stack([wanted.flatten(), Y.flatten()]))[0, 1].item() ** 2

        before = error()
        abcnets.calibrate(model, digits.calibration_batches(256), progress=False)
        after = error()
    assert after < 0.5 * before
    for layer in model.modules():
        if isinstance(layer, abcnets.ABCConv2d):
            W = layer.quantized_weight().flatten(1)
            levels = 4 if code[0] == "binary" else 3
            assert all(len(row.unique()) <= levels for row in W)
            assert layer.zero == (code[1] != "thermometer")


# Packed: operators, files, fused


def test_words_are_the_digits_of_how_many_thresholds_are_reached():
    thresholds = torch.linspace(-1, 1, 7)
    x = torch.randn(1, 70, 3, 3)
    flips = torch.rand(70) > 0.5
    eye = torch.eye(70)[:, :, None, None]
    layer = abcnets.pack(ABCConv2d.from_parameters(eye, us=torch.zeros(1), active=True))
    words = abcnets.packed_conv(
        x, layer.bits, layer.alphas, torch.empty(0), torch.empty(0), None, None, None, 70, [1, 1], [0] * 4, [1, 1], 1,
        thresholds[:, None].expand(7, 70), flips, 3,
    )  # fmt: skip
    y = abcnets.packed_conv(x, layer.bits, layer.alphas, torch.empty(0), torch.empty(0), None, None, None, 70,
                            [1, 1], [0] * 4, [1, 1], 1, None, None, 0)  # fmt: skip
    numbers = (y[None] >= thresholds.view(-1, 1, 1, 1, 1)).sum(0)
    numbers = torch.where(flips.view(-1, 1, 1), 7 - numbers, numbers)
    bits = abcnets.unpack_bits(words.movedim(-1, 0), 70).movedim(-1, 2).long()
    assert words.shape == (1, 3, 3, 2, 3) and torch.equal(4 * bits[0] + 2 * bits[1] + bits[2], numbers)
    with pytest.raises(ValueError, match="3 bases have 3 thresholds or, in the binary code, 7; got 4"):
        abcnets.packed_conv(x, layer.bits, layer.alphas, torch.empty(0), torch.empty(0), None, None, None, 70,
                            [1, 1], [0] * 4, [1, 1], 1, thresholds[:4, None].expand(4, 70), flips, 3)  # fmt: skip


def test_operators_pass_opcheck():
    layer = abcnets.pack(ABCConv2d(70, 9, 3, padding=1, weight_bases=2, activation_bases=2, code="binary", active=True))
    x = torch.randn(2, 70, 6, 7)
    arguments = (x, layer.bits, layer.alphas, layer.betas, layer.thresholds, None, layer.bias, layer.zero, 70,
                 [1, 1], [1] * 4, [1, 1], 1, torch.randn(7, 9).sort(0).values, torch.rand(9) > 0.5, 3)  # fmt: skip
    torch.library.opcheck(torch.ops.abcnets.packed_conv.default, arguments)
    words = torch.ops.abcnets.packed_conv(*arguments)
    assert words.shape == (2, 6, 7, 1, 3)
    pool = (words, arguments[-2], 9, [2, 2], [2, 2], [1, 1], [1, 1], True, True)
    torch.library.opcheck(torch.ops.abcnets.packed_max_pool.default, pool)


VERSION_2 = [[0.013568412, -0.070114866], [-0.062499981, 0.000298925]]


class Chain(nn.Module):
    """Two convolutions with everything between them that folds into thresholds."""

    def __init__(self, code, N, pool):
        super().__init__()
        bases = {"weight_bases": 2, "activation_bases": N, "code": code, "active": True}
        self.first = ABCConv2d(5, 70, 3, padding=1, **bases)
        self.norm, self.relu = nn.BatchNorm2d(70), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True) if pool else nn.Identity()
        self.second = ABCConv2d(70, 4, 3, padding=1, **bases)

    def forward(self, x):
        return self.second(self.pool(self.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("N", [2, 3])
@pytest.mark.parametrize("code", PAIRS)
def test_fused_equals_packed(code, N, pool):
    torch.manual_seed(N)
    model = Chain(code, N, pool).eval()
    with torch.no_grad():  # rising, falling and constant channels
        model.norm.weight.copy_(torch.randn(70).round(decimals=1) * torch.tensor([1.0, -1] * 35))
        model.norm.weight[:6] = 0
        model.norm.bias.copy_(torch.randn(70))
        model.norm.running_mean.copy_(torch.randn(70))
    packed = abcnets.pack(model, engine="bits")
    fused = abcnets.fuse(packed)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)) for m in fused.modules())
    for x in (torch.randn(2, 5, 9, 10), torch.randn(1, 5, 7, 7).to(memory_format=torch.channels_last)):
        assert torch.allclose(fused(x), packed(x), atol=1e-4)
        assert torch.allclose(packed(x), model(x), atol=1e-3)


@pytest.mark.parametrize("code", PAIRS)
def test_files(code, tmp_path):
    network = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 9), nn.Linear(9, 2))
    model = abcnets.convert(network, 2, 2, code=code, settings={"3": {"weight_bases": None, "code": "binary"}})
    packed = abcnets.pack(model)
    abcnets.save_packed(packed, tmp_path / "model.safetensors")
    loaded = abcnets.load_packed(tmp_path / "model.safetensors", network)
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x), packed(x)) and repr(loaded) == repr(packed)
    assert torch.allclose(packed(x), model(x), atol=1e-5)


def test_a_file_of_version_2_loads():
    """tests/version2.safetensors was written before there were codes: layers of 2 x 3 bases, one with float weights."""
    network = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 9), nn.Linear(9, 2))
    loaded = abcnets.load_packed(Path(__file__).with_name("version2.safetensors"), network)
    assert loaded[1].code == loaded[3].code == ("thermometer", "thermometer")
    assert loaded[1].zero is None and loaded[3].zero is False and loaded[3].weight_bases is None
    y = loaded(torch.linspace(-1, 1, 12).view(2, 6))
    assert torch.allclose(y, torch.tensor(VERSION_2), atol=1e-5)


def test_exported_programs_keep_the_code():
    model = Chain("binary", 2, True).eval()
    packed = abcnets.pack(model, engine="bits")
    x = torch.randn(2, 5, 9, 10)
    for network in (packed, abcnets.fuse(packed)):
        program = torch.export.export(network, (x,))
        assert torch.allclose(program.module()(x), packed(x), atol=1e-4)
        compiled = torch.compile(network, backend="aot_eager")
        assert torch.allclose(compiled(x), packed(x), atol=1e-4)


def test_both_engines_take_the_level_of_zero_from_the_same_tensor():
    layer = abcnets.pack(ABCLinear(6, 4, weight_bases=2, activation_bases=2, code="binary", active=True), engine="bits")
    x = torch.randn(3, 6)
    layer.zero.add_(0.5)
    by_bits = layer(x)
    layer.engine = "float"
    assert torch.allclose(layer(x), by_bits, atol=1e-5)


def test_auto_runs_floats_where_the_engine_has_no_kernel_for_the_code():
    """Five digits have 31 thresholds, which no packing is compiled for; five thermometer bases have five."""
    binary = abcnets.pack(ABCLinear(4, 4, weight_bases=1, activation_bases=5, code="binary", active=True))
    nested = abcnets.pack(ABCLinear(4, 4, weight_bases=1, activation_bases=5, active=True))
    assert not binary.runs_bits() and nested.runs_bits() == (BITS_PAY_UP_TO[tile()] >= 5)


# What a review found


@pytest.mark.parametrize("code, M", [("binary", 2), ("binary", 3), ("uniform", 3)])
def test_weights_in_other_default_dtypes_and_on_the_meta_device(code, M):
    W, us = torch.randn(4, 40), shifts(code, M)
    Wq = abcnets.quantize_weight(W, us, True, code)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(abcnets.quantize_weight(W, us, True, code), Wq)
    finally:
        torch.set_default_dtype(torch.float32)
    layer = ABCConv2d(8, 8, 3, weight_bases=M, activation_bases=2, code=code, active=True, device="meta")
    assert layer(torch.empty(2, 8, 5, 5, device="meta")).shape == (2, 8, 3, 3)
    assert abcnets.pack(layer).bits.is_meta


@pytest.mark.parametrize("M, N", [(None, 2), (2, None), (True, 2), (2, True)])
def test_packed_layers_want_numbers_of_bases(M, N):
    with pytest.raises(ValueError, match="must be a positive integer"):
        abcnets.PackedLayer(nn.Linear(3, 4), M, N)


def test_pickles_from_before_there_were_codes():
    layer = ABCLinear(6, 5, active=True)
    packed, x = abcnets.pack(layer), torch.randn(2, 6)
    for name in ("code", "zero", "nearest"):
        vars(layer).pop(name)
    assert torch.equal(copy.deepcopy(layer)(x), ABCLinear.from_parameters(
        layer.weight, layer.bias, layer.us, layer.vs, layer.betas, active=True)(x))  # fmt: skip
    vars(packed).pop("code")
    with pytest.raises(ValueError, match="pickled by an older abcnets"):
        pickle.loads(pickle.dumps(packed))


def test_one_weight_a_channel_has_the_documented_gradient_too():
    W, us = torch.tensor([[2.0], [0.1]]), abcnets.gaussian_shifts(3).requires_grad_()
    abcnets.quantize_weight(W, us, True, "binary", nearest=False).sum().backward()
    levels = [signs_of("binary", 2) @ abcnets.fit_weight(w[None], us.detach(), True, "binary", False)[:, 0] for w in W]
    near = (1 + us.detach()).abs() <= 1  # W / rms(W) is 1
    half_steps = sum(level.diff() for level in levels).flip(0) / 2  # us ascend, thresholds fall
    assert torch.allclose(us.grad, torch.where(near, half_steps, 0))
