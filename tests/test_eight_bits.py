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
    stock = STOCK[dims](C, draw.choice([1, 5, 16, 40, 64]), draw.choice([1, 3]), **geometry, bias=draw.random() < 0.5)
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
    model = Residual().eval()
    model.norm = nn.Identity()
    packed, x = abcnets.pack(model, engine="bits"), torch.rand(5, 3, 12, 12)
    fused = abcnets.fuse(packed, rest="int8")
    chains = [each for each in fused.modules() if isinstance(each, PackedChain)]
    first = next(chain for chain in chains if type(chain.steps[0]) is EightBitConv)
    stem = [PackedChain([*chain.steps][:3]) for chain in (first, PackedChain([packed.first, packed.relu, packed.pool]))]
    assert torch.equal(in_one_call(stem[0], x), one_by_one(stem[0], x))
    in_one_call(first, x)
    reference = stem[1](x)
    assert 0 < (stem[0](x) - reference).abs().max() < 0.02 * reference.abs().max()
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
    with pytest.raises(ValueError, match="rest should be \"float\" or \"int8\", got 'bits'"):
        abcnets.fuse(packed, rest="bits")
    infinite = copy.deepcopy(packed)
    infinite[0].weight.data[0, 0, 0, 0] = float("inf")
    monkeypatch.setattr(abcnets, "multiplies_bytes", lambda: True)
    no_stem = abcnets.pack(nn.Sequential(binary(8), binary(8)).eval(), engine="bits")
    for model in (infinite, no_stem, None):
        if model is None:  # no such instruction here
            monkeypatch.setattr(abcnets, "multiplies_bytes", lambda: False)
        with pytest.warns(UserWarning, match="changes nothing here"):
            fused = abcnets.fuse(model or packed, rest="int8")
        assert not any(isinstance(each, EightBitConv) for each in fused.modules())


def test_where_it_is_not_one_call(monkeypatch):
    """As of a model that was fused where the processor has the instruction, and is used where it has not."""
    chain, x = random_chain(3)
    monkeypatch.setattr(abcnets, "multiplies_bytes", lambda: False)
    with pytest.raises(AssertionError):
        in_one_call(chain, x)
    assert torch.equal(chain(x), one_by_one(chain, x))


@pytest.mark.parametrize("C, O", [(3, 8), (3, 3), (3, 1), (1, 4)])
def test_images_without_a_batch_and_without_pixels(C, O):
    torch.manual_seed(0)
    stock, x = nn.Conv2d(C, O, 3, padding=2), torch.randn(2, C, 9, 9) * torch.tensor([1.0, 40]).view(2, 1, 1, 1)
    conv = EightBitConv(stock)
    assert torch.equal(conv(x[1]), conv(x)[1])
    torch.testing.assert_close(conv(x), stock(x), rtol=0, atol=0.05 * 40)
    assert conv(x[:0]).shape == (0, O, 11, 11) and conv(x[:, :, :0]).shape == (2, O, 2, 11)
    chain = PackedChain([conv, nn.MaxPool2d(2)])
    assert torch.equal(chain(x), one_by_one(chain, x)) and chain(x[:0]).shape == (0, O, 5, 5)


def test_numbers_of_weights():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        stock = nn.Conv2d(3, 64, 3).to(dtype)
        conv = EightBitConv(stock)
        assert (conv.weight.sign() * stock.weight.sign()).min() >= 0 and conv.weight.abs().max() == 127
    stock = nn.Conv2d(3, 1, 1)
    stock.weight.data[:] = torch.tensor([190.0, 1, -190]).view(1, 3, 1, 1) * 1.4e-45
    assert EightBitConv(stock).weight.abs().max() == 0
    with torch.autocast("cpu", torch.float16):
        assert EightBitConv(nn.Conv2d(3, 8, 7))(torch.ones(1, 3, 9, 9)).isfinite().all()
    for wrong in (nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(ValueError, match="without groups"):
            EightBitConv(wrong)


def test_no_gradient():
    chain, x = random_chain(3)
    for run in (chain, lambda x: one_by_one(chain, x)):
        assert not run(x.clone().requires_grad_()).requires_grad
        y, tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))
        assert not tangent.any()


@needs_vnni
def test_tables_of_the_wrong_size_are_refused():
    for name, wrong in (("scales", torch.ones(1)), ("bias", torch.ones(1))):
        conv = EightBitConv(nn.Conv2d(3, 40, 3))
        setattr(conv, name, wrong)
        with pytest.raises(ValueError, match="do(es)? not fit"):
            PackedChain([conv, nn.MaxPool2d(2)])(torch.randn(1, 3, 9, 9))
    wide = EightBitConv(nn.Conv2d(6, 8, 3))  # which fuse would not take
    chain, x = PackedChain([wide, nn.MaxPool2d(2)]), torch.randn(1, 6, 9, 9)
    assert torch.equal(chain(x), one_by_one(chain, x))
    long = EightBitConv(nn.Conv1d(4, 2, 20_000))  # whose sums 32 bits do not hold
    long.weight.fill_(127)
    chain, x = PackedChain([long, nn.MaxPool1d(2)]), torch.ones(1, 4, 20_003)
    assert torch.equal(chain(x), one_by_one(chain, x))


@needs_vnni
def test_what_else_takes_a_model_with_it(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), binary(8)).eval()
    packed, x = abcnets.pack(model, engine="bits"), torch.randn(5, 3, 12, 12)
    fused = abcnets.fuse(packed, rest="int8")
    rows = [{row["layer"].split(".")[-1]: row for row in abcnets.summary(each, x)} for each in (packed, fused)]
    assert rows[1]["0"]["kind"] == "EightBitConv" and rows[1]["0"]["packed_bytes"] == 8 * 27 + 8 * 8
    for what in ("parameters", "float_bytes", "macs"):
        assert rows[1]["0"][what] == rows[0]["0"][what]
    abcnets.export_onnx(fused, x, tmp_path / "model.onnx")
    (y,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), fused(x), atol=1e-4)
