"""Chains that add another tensor put out what the chain and torch's sum do, and fuse makes them where it may."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import abcnets
from abcnets import PackedChain, PackedLayer

pytest.importorskip("numba")
from test_chain import binary, in_one_call, nearly_all_close, one_by_one, random_chain


def chain_that_adds(seed, relu) -> tuple:
    """(a chain, what it adds to, an input); its last step is a layer."""
    while True:
        chain, x = random_chain(seed)
        steps = [*chain.steps]
        if x.ndim > 2 and isinstance(steps[-1], PackedLayer):
            try:
                y = one_by_one(chain, x)
            except (ValueError, RuntimeError):  # an image has become smaller than the next kernel
                y = None
            if y is not None:
                return PackedChain(steps, adds=True, relu=relu).eval(), y, x
        seed += 1000


def added(y, other, relu):
    return (y + other).relu() if relu else y + other


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_chain_that_adds(seed, relu, threads):
    torch.set_num_threads(threads)
    chain, y, x = chain_that_adds(seed, relu)
    other = torch.randn_like(y)
    wide = torch.cat([other, other], -1)
    others = [other, other.movedim(1, -1).contiguous().movedim(-1, 1), wide[..., : y.shape[-1]]]
    for each in others:
        assert torch.equal(in_one_call(chain, x, each), added(y, each, relu))
    assert torch.equal(in_one_call(chain, x[:1], other[:1]), added(y[:1], other[:1], relu))
    other.view(-1)[3], other.view(-1)[7] = float("nan"), float("inf")
    result = in_one_call(chain, x, other)
    assert torch.equal(result.nan_to_num(), added(y, other, relu).nan_to_num()) and result.view(-1)[3].isnan()


def test_what_it_leaves_to_torch():
    chain, y, x = chain_that_adds(1, True)
    for other in (torch.randn(y.shape[1:]), torch.randn(2, *y.shape), torch.randn_like(y).double()):
        result = chain(x, other)
        assert result.dtype == other.dtype and torch.equal(result, added(y, other, True))
    with pytest.raises(RuntimeError, match="size"):
        chain(x, torch.randn(*y.shape[:-1], y.shape[-1] + 1))
    with pytest.raises(TypeError, match="two tensors"):
        chain(x)
    with pytest.raises(TypeError, match="one tensor"):
        PackedChain([*chain.steps])(x, y)
    other = torch.randn_like(y).requires_grad_()
    chain(x, other).sum().backward()
    assert torch.equal(other.grad, (y + other > 0).float())
    tangents = torch.func.jvp(lambda other: chain(x, other), (other.detach(),), (torch.ones_like(y),))
    assert torch.equal(tangents[1], other.grad)
    assert torch.equal(copy.deepcopy(chain)(x, other), chain(x, other))
    other = other.detach()
    assert torch.equal(torch.compile(chain, backend="aot_eager")(x, other), chain(x, other))


class Block(nn.Module):
    """Two layers and a sum; how it is written is a function of (the layers' output, x, ReLU)."""

    def __init__(self, total, layers=2, norm=True):
        super().__init__()
        self.total, self.relu = total, nn.ReLU(inplace=True)
        self.layers = nn.Sequential(*(binary(8) for _ in range(layers)), *[nn.BatchNorm2d(8)] * norm)
        self.after = binary(8)

    def forward(self, x):
        x = 2 * x
        total = self.total(self.layers(x), x, self.relu)
        return self.after(total) + total


def in_place(y, x, relu):
    y += x
    return relu(y)


def read_twice(y, x, relu):
    return relu(y + x) + y


def over_the_other(y, x, relu):
    x += y
    return x * 2


def written_to_after(y, x, relu):
    x.mul_(-1)
    return relu(y + x)


def written_to_behind(y, x, relu):
    z = y + x
    x.mul_(-1)
    return z + x


WRITTEN = [
    ("module", lambda y, x, relu: relu(y + x), True), ("in place", in_place, True),
    ("the other way", lambda y, x, relu: torch.relu(torch.add(x, y)), True),
    ("no ReLU", lambda y, x, relu: y + x, True), ("leaky", lambda y, x, relu: F.leaky_relu(y + x), True),
    ("a sum read twice", lambda y, x, relu: (lambda z: z * relu(z.clone()))(y + x), True),
    ("times two", lambda y, x, relu: torch.add(y, x, alpha=2), False), ("a number", lambda y, x, relu: y + 1, False),
    ("to itself", lambda y, x, relu: y + y, False), ("broadcast", lambda y, x, relu: y + x[:1], True),
    ("read twice", read_twice, False), ("over the other", over_the_other, False),
    ("written to after", written_to_after, False), ("written to behind", written_to_behind, False),
]  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("total, is_folded", [case[1:] for case in WRITTEN], ids=[case[0] for case in WRITTEN])
def test_fuse_lets_chains_add(total, is_folded, layers):
    torch.manual_seed(0)
    model = Block(total, layers).eval()
    model.layers[-1].running_mean.normal_(), model.layers[-1].weight.data.normal_()
    packed, x = abcnets.pack(model, engine="bits"), torch.randn(5, 8, 9, 9)
    fused = abcnets.fuse(packed)
    sums = [each for each in fused.modules() if isinstance(each, PackedChain) and each.adds]
    first = [each for each in sums if torch.equal(each.steps[0].bits, packed.layers[0].bits)]
    assert bool(first) is is_folded
    assert nearly_all_close(fused(x), packed(x))
    assert nearly_all_close(fused(x[:1]), packed(x[:1]))


def test_a_sum_of_two_chains():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Sequential(binary(8), binary(8)), nn.Sequential(binary(8), binary(8))

        def forward(self, x):
            return torch.relu(self.one(x) + self.two(x))

    torch.manual_seed(0)
    packed, x = abcnets.pack(Two().eval(), engine="bits"), torch.randn(5, 8, 9, 9)
    fused = abcnets.fuse(packed)
    assert sorted(each.adds for each in fused.modules() if isinstance(each, PackedChain)) == [False, True]
    assert nearly_all_close(fused(x), packed(x))
    assert abcnets.summary(fused, x)
