"""The first convolution in eight bits puts out what its equation says, in torch and in the engine."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn

import abcnets
from abcnets import EightBitConv, PackedChain

pytest.importorskip("numba")
from test_chain import POOLS, STOCK, Residual, binary, in_one_call, one_by_one

from kernels.cpu import system

needs_vnni = pytest.mark.skipif(not system.multiplies_bytes(), reason="no AVX-512 VNNI")


def test_the_equation():
    torch.manual_seed(0)
    stock = nn.Conv2d(3, 2, 3, padding=1, stride=2)
    conv, x = EightBitConv(stock), torch.randn(2, 3, 5, 5) * torch.tensor([1.0, 9]).view(2, 1, 1, 1)
    y = conv(x)
    for b, o in itertools.product(range(2), range(2)):
        weight = stock.weight[o].detach()
        s, t = x[b].abs().max() / 127, weight.abs().max() / 127
        X, W8 = (x[b] / s).round(), (weight / t).round()
        assert X.abs().max() == W8.abs().max() == 127 and torch.equal(W8, conv.weight[o].float())
        for i, j in itertools.product(range(3), range(3)):
            total = 0.0
            for c, k, m in itertools.product(range(3), range(3), range(3)):
                row, column = 2 * i + k - 1, 2 * j + m - 1
                if 0 <= row < 5 and 0 <= column < 5:
                    total += (X[c, row, column] * W8[c, k, m]).item()
            expected = s * t * total + stock.bias[o]
            torch.testing.assert_close(y[b, o, i, j], expected, rtol=1e-5, atol=1e-5)


def random_chain(seed):
    """An image's convolution, perhaps a ReLU and a max-pool or two; and images (9, C, *S), one of zeros."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    dims, C = draw.choice([1, 2, 2, 3]), draw.choice([1, 2, 3, 4])
    geometry = dict(stride=draw.choice([1, 2]), padding=draw.choice([0, 1, 3]), dilation=draw.choice([1, 2]))
    stock = STOCK[dims](C, draw.choice([5, 16, 40, 64]), draw.choice([1, 3]), **geometry, bias=draw.random() < 0.5)
    if draw.random() < 0.3:
        stock.weight.data[0] = 0
    pools = [POOLS[dims - 1](draw.choice([2, 3]), 2, 1) for _ in range(draw.choice([0, 1]))]
    relu = [nn.ReLU()] * (bool(pools) and draw.random() < 0.5)
    size = {1: (41,), 2: (23, 21), 3: (11, 10, 9)}[dims]
    x = torch.randn(9, C, *size, generator=g) * torch.logspace(-20, 8, 9).view(-1, *[1] * (dims + 1))
    x[4] = 0
    return PackedChain([EightBitConv(stock), *relu, *pools]).eval(), x


@needs_vnni
@pytest.mark.parametrize("seed", range(16))
def test_the_engine_puts_out_what_torch_does(seed, threads):
    torch.set_num_threads(1)
    chain, x = random_chain(seed)
    expected = one_by_one(chain, x)
    torch.set_num_threads(threads)
    forms = [x, x[:1], x.flip(0), x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 3 else x]
    forms.append(x.movedim(1, -1).contiguous().movedim(-1, 1))  # channels last,
    wide = torch.randn(9, x.shape[1] + 2, *x.shape[2:]).movedim(1, -1).contiguous().movedim(-1, 1)
    wide[:, 1:-1] = x
    forms.append(wide[:, 1:-1])  # and between others
    for images in forms:
        y = in_one_call(chain, images)
        assert torch.equal(y, expected.flip(0) if images is forms[2] else expected[: len(images)])
    for i in range(9):  # no image matters to another one
        assert torch.equal(in_one_call(chain, x[i : i + 1]), expected[i : i + 1])


@needs_vnni
def test_sums_of_many_products(threads):
    """Which float32 no longer holds, and torch computes in float64."""
    torch.manual_seed(0)
    stock = nn.Conv2d(4, 3, 31)
    stock.weight.data.abs_()
    chain, x = PackedChain([EightBitConv(stock), nn.MaxPool2d(2)]), torch.rand(2, 4, 40, 40) + 0.5
    expected = one_by_one(chain, x)
    assert torch.equal(in_one_call(chain, x), expected)
    exact = nn.functional.conv2d(x.double(), stock.weight.double(), stock.bias.double())
    torch.testing.assert_close(expected.double(), nn.functional.max_pool2d(exact, 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1e30])
def test_numbers_that_are_none(number):
    chain, x = random_chain(2)
    x[3].view(-1)[5] = number
    y, expected = chain(x), one_by_one(chain, x)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())
    if number != number:
        assert y[3].isnan().all() and not y[[0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_kinds_of_numbers(dtype):
    torch.manual_seed(0)
    conv, x = EightBitConv(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 9, 9)
    y = copy.deepcopy(conv).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), conv(x), rtol=0.05, atol=0.05)


@needs_vnni
def test_fuse_makes_one_of_the_first_convolution():
    torch.manual_seed(0)
    packed, x = abcnets.pack(Residual().eval(), engine="bits"), torch.rand(5, 3, 12, 12)
    fused = abcnets.fuse(packed, rest="int8")
    chains = [each for each in fused.modules() if isinstance(each, PackedChain)]
    kinds = sorted([type(step).__name__ for step in chain.steps] for chain in chains)
    assert kinds == [["EightBitConv", "ReLU", "MaxPool2d"], ["PackedLayer"], ["PackedLayer", "PackedLayer"]]
    first = next(chain for chain in chains if len(chain.steps) == 3)
    assert torch.equal(in_one_call(first, x), one_by_one(first, x))
    reference = abcnets.fuse(packed).get_submodule(next(n for n, each in fused.named_modules() if each is first))(x)
    assert 0 < (first(x) - reference).abs().max() < 0.02 * reference.abs().max()
    assert not fused(x.requires_grad_()).isnan().any()


@needs_vnni
def test_bits_behind_it(threads):
    torch.manual_seed(0)
    packed = abcnets.pack(nn.Sequential(nn.Conv2d(3, 8, 3), binary(8), binary(8)).eval(), engine="bits")
    fused, x = abcnets.fuse(packed, rest="int8"), torch.randn(9, 3, 12, 12)
    (chain,) = [each for each in fused.modules() if isinstance(each, PackedChain)]
    assert torch.equal(in_one_call(chain, x), one_by_one(chain, x))
    assert torch.allclose(torch.compile(fused, backend="aot_eager")(x), fused(x))
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        fused(x)


def test_fuse_leaves_what_it_can_not_make(monkeypatch):
    packed = abcnets.pack(nn.Sequential(nn.Conv2d(3, 8, 3), binary(8)).eval(), engine="bits")
    with pytest.raises(ValueError, match='rest should be "float" or "int8", got "bits"'.replace('"bits"', "'bits'")):
        abcnets.fuse(packed, rest="bits")
    monkeypatch.setattr(system, "multiplies_bytes", lambda: False)
    with pytest.warns(UserWarning, match="changes nothing here"):
        fused = abcnets.fuse(packed, rest="int8")
    assert not any(isinstance(each, EightBitConv) for each in fused.modules())
    monkeypatch.setattr(system, "multiplies_bytes", lambda: True)
    packed[0].weight.data[0, 0, 0, 0] = float("inf")
    assert not any(isinstance(each, EightBitConv) for each in abcnets.fuse(packed, rest="int8").modules())
