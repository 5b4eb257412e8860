"""Packed layers and pools in one call put out what they put out one by one, to the last bit."""

import copy
import gc
import io
import pickle
import random
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import abcnets
from abcnets import PackedChain, PackedLayer, PackedPool

pytest.importorskip("numba")
from test_kernels_cpu import HERE, at_once, counting

from kernels.cpu import chain as cpu_chain
from kernels.cpu import engine as cpu_engine

STOCK = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
KINDS = [(1, "thermometer", False), (2, "thermometer", False), (2, "thermometer", True), (2, "binary", False)]


def random_layer(draw, g, dims, C, O, kind, next_kind) -> PackedLayer:
    """A layer of a chain; kind: (N, code, whether its levels are uniform)."""
    geometry = {}
    if dims:
        geometry = dict(kernel_size=draw.choice([1, 2, 3]), stride=draw.choice([1, 1, 2]), padding=draw.choice([0, 1]))
        geometry["groups"] = draw.choice([g for g in (1, 1, 1, 2) if C % g == O % g == 0])
    N, code, uniform = kind
    stock = STOCK[dims](C, O, **geometry)
    layer = PackedLayer(stock, draw.choice([1, 2]), N, "bits", code=("binary", code), zero=draw.random() < 0.3).eval()
    M, kernel, per_group = layer.weight_bases, layer.kernel_size, C // layer.groups
    layer.bits = abcnets.pack_bits(torch.rand(M, O, *kernel, per_group, generator=g) < 0.5, torch.uint8)
    layer.alphas = torch.randn(M, O, generator=g)
    layer.betas = torch.full((N,), 0.5) if uniform else torch.rand(N, generator=g) + 0.1
    layer.thresholds = torch.randn(len(layer.thresholds), generator=g).sort().values
    layer.bias = torch.randn(O, generator=g)
    if layer.zero is not None:
        layer.zero = torch.randn((), generator=g)
    if next_kind is not None:
        layer.out_bases, next_code, _ = next_kind
        T = 2**layer.out_bases - 1 if next_code == "binary" else layer.out_bases
        layer.out_thresholds = torch.randn(T, O, generator=g).mul(3).sort(0).values
        layer.out_flips = torch.rand(O, generator=g) < 0.3
    layer.folded = layer.fused = True
    return layer


def random_chain(seed: int) -> tuple[PackedChain, torch.Tensor]:
    """A chain, and an input (9, C, *S)."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dims, count = draw.choice([0, 1, 2, 2, 2, 3]), draw.choice([2, 3, 4])
    channels = [draw.choice([3, 16, 16, 40, 64, 70]) for _ in range(count + 1)]
    kinds = [*(draw.choice(KINDS) for _ in range(count)), None]
    steps = []
    for i in range(count):
        steps.append(random_layer(draw, g, dims, *channels[i : i + 2], *kinds[i : i + 2]))
        for _ in range(draw.choice([0, 0, 1, 2]) if dims else 0):
            pool = POOLS[dims - 1](draw.choice([1, 2, 3]), draw.choice([1, 2]), ceil_mode=draw.random() < 0.3)
            if kinds[i + 1] is None:
                steps.append(pool)
                break
            flips = torch.rand(channels[i + 1], generator=g) < 0.3
            steps.append(PackedPool(pool, flips, kinds[i + 1][1] == "binary"))
    size = {0: (), 1: (41,), 2: (23, 21), 3: (11, 10, 9)}[dims]
    return PackedChain(steps).eval(), torch.randn(9, channels[0], *size, generator=g)


def with_floats(seed: int, small=True) -> tuple[PackedChain, torch.Tensor]:
    """A chain between a float convolution, whose sums are exact, and a linear layer; and an input (9, C, *S).

    small: of one size; else as `random_chain` draws them, of any dimensions.
    """
    torch.manual_seed(seed)  # the float layers' weights
    chain, x = some_chain(seed) if small else random_chain(seed)
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    steps, dims = [*chain.steps], x.ndim - 2
    if dims:
        geometry = dict(stride=draw.choice([1, 2]), padding=draw.choice([0, 1, "same"]), bias=draw.random() < 0.5)
        geometry |= {"stride": 1} if geometry["padding"] == "same" else {}
        stock = STOCK[dims](
            draw.choice([1, 3]), x.shape[1], draw.choice([1, 3]), dilation=draw.choice([1, 2]), **geometry
        )
        for parameter in stock.parameters():
            parameter.data = torch.randint(-4, 5, parameter.shape, generator=g).float()
        pool = POOLS[dims - 1](draw.choice([2, 3]), 2, draw.choice([0, 1]), ceil_mode=draw.random() < 0.3)
        steps[:0] = draw.choice([[stock], [stock], [stock, pool], [stock, nn.ReLU(), pool]])
        x = torch.randint(-4, 5, (9, stock.in_channels, *x.shape[2:]), generator=g).float()
    try:
        y = one_by_one(PackedChain(steps), x)
    except (ValueError, RuntimeError):  # an image has become smaller than the next kernel
        return with_floats(seed + 1000, small)
    behind = [nn.Flatten()] * (dims > 0) + [nn.ReLU()] * (draw.random() < 0.7)
    draw.shuffle(behind)
    linear = nn.Linear(y[0].numel(), draw.choice([1, 10, 40]), bias=draw.random() < 0.7)
    return PackedChain([*steps, *behind, linear]).eval().requires_grad_(False), x


def assert_close(y, expected, addends=0.0):
    """To the rounding of the largest sum, or of its addends, of which little may be left."""
    atol = 1e-5 * float(expected.abs().max()) + 1e-6 * float(addends)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=atol)


def one_by_one(chain, x):
    for step in chain.steps:
        x = step(x)
    return x


def in_one_call(chain, *inputs):
    """What the chain puts out, where none of its steps is called."""
    called = []
    for step in chain.steps:
        step.forward = called.append  # neither a hook nor a tensor: the chain does not look at it
    try:
        return chain(*inputs)
    finally:
        for step in chain.steps:
            del step.forward
        assert not called


def some_chain(seed=0, size=(23, 21)):
    """16 -> 40 -> 70 channels, a pool of bits and one of floats."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    first = random_layer(draw, g, 2, 16, 40, KINDS[3], KINDS[2])
    second = random_layer(draw, g, 2, 40, 70, KINDS[2], None)
    pool = PackedPool(nn.MaxPool2d(2), torch.rand(40, generator=g) < 0.3, False)
    return PackedChain([first, pool, second, nn.MaxPool2d(2)]).eval(), torch.randn(9, 16, *size, generator=g)


@pytest.mark.parametrize("seed", range(24))
def test_a_chain_puts_out_what_its_steps_do(seed, threads):
    torch.set_num_threads(1)
    chain, x = random_chain(seed)
    try:
        expected = one_by_one(chain, x)
    except (ValueError, RuntimeError) as error:  # an image has become smaller than the next kernel
        with pytest.raises(type(error)):
            chain(x)
        return
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for images in (x, x[:1], x[:2]) if chain.dimensions > 2 else (x,):
            y = in_one_call(chain, images)
            assert torch.equal(y, expected[: len(images)]), f"{count} threads, batch {len(images)}"
            assert y.is_contiguous() and y.dtype == torch.float32
    if chain.dimensions == 4:
        torch.set_num_threads(1)
        assert torch.equal(in_one_call(chain, x.to(memory_format=torch.channels_last)), expected)
        assert torch.equal(in_one_call(chain, x.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.parametrize("tile", [tile for tile in HERE if tile.endswith("look-up")])
@pytest.mark.parametrize("seed", range(100, 105))
def test_chains_of_layers_that_look_up(seed, tile, threads):
    """Their images hold nibbles, which the step before does not store."""
    torch.set_num_threads(1)
    chain, x = random_chain(seed)
    expected = one_by_one(chain, x)
    with counting(tile):
        for count in (1, 2):
            torch.set_num_threads(count)
            for images in (x, x[:1]) if chain.dimensions > 2 else (x,):
                assert torch.equal(in_one_call(chain, images), expected[: len(images)])


@pytest.mark.parametrize("seed", range(16))
def test_a_chain_between_float_layers(seed, threads):
    torch.set_num_threads(1)
    chain, x = with_floats(seed, small=False)
    expected, bits = one_by_one(chain, x), PackedChain([*chain.steps][:-1])
    addends = F.linear(one_by_one(bits, x).abs(), chain.steps[-1].weight.abs()).max()
    while isinstance(bits.steps[-1], (nn.Flatten, nn.ReLU)):
        bits = PackedChain([*bits.steps][:-1])
    between = one_by_one(bits, x)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for images in (x, x[:1], x[:2]):
            y = in_one_call(chain, images)
            assert_close(y, expected[: len(images)], addends)
            assert y.is_contiguous() and y.dtype == torch.float32
            if len(bits.steps) > 1:  # no sum that ends in bits was rounded
                assert torch.equal(in_one_call(bits, images), between[: len(images)])
    if chain.dimensions == 4:
        assert_close(in_one_call(chain, x.to(memory_format=torch.channels_last)), expected, addends)
        assert_close(in_one_call(chain, x.transpose(2, 3).contiguous().transpose(2, 3)), expected, addends)


@pytest.mark.parametrize("tile", HERE)
def test_any_tile_between_float_layers(tile, threads):
    torch.set_num_threads(1)
    chain, x = with_floats(0)
    expected = one_by_one(chain, x)
    with counting(tile):
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_close(in_one_call(chain, x), expected)
            assert_close(in_one_call(chain, x[:1]), expected[:1])


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "3e38", "2e19"])
def test_numbers_whose_sums_are_none(number):
    """NaN where the steps have it; or their complaint, that bits can't say it."""
    chain, x = with_floats(1)
    in_one_call(chain, x)
    x[3, 0, 5, 6] = float(number)
    try:
        expected = one_by_one(chain, x)
    except ValueError as error:
        with pytest.raises(ValueError, match="NaN"):
            chain(x)
        assert "NaN" in str(error)
    else:
        torch.testing.assert_close(chain(x), expected, equal_nan=True)


def test_weights_whose_sums_are_none():
    chain, x = with_floats(2)
    linear = chain.steps[-1]
    linear.weight[0, 0] = float("nan")
    expected = one_by_one(chain, x)
    assert expected[:, 0].isnan().all()
    torch.testing.assert_close(in_one_call(chain, x), expected, rtol=1e-4, atol=1e-3, equal_nan=True)
    chain.steps[0].weight[:] = 1e30  # sums that overflow are left to the steps
    linear.weight[0, 0] = 0
    assert torch.equal(chain(x), one_by_one(chain, x))


def test_float_layers_that_are_trained_or_under_autocast():
    chain, x = with_floats(3)
    linear = chain.steps[-1].requires_grad_(True)
    chain(x).square().sum().backward()
    assert linear.weight.grad.abs().sum() > 0
    linear.requires_grad_(False)
    in_one_call(chain, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = chain(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, one_by_one(chain, x))


def test_float_layers_in_all_that_a_chain_goes_through():
    chain, x = with_floats(4)
    y = in_one_call(chain, x)
    chain.steps[0].weight.mul_(-1)
    assert not torch.allclose(in_one_call(chain, x), y)
    chain.steps[0].weight = nn.Parameter(-chain.steps[0].weight, requires_grad=False)
    assert torch.equal(in_one_call(chain, x), y)
    for twin in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert torch.equal(in_one_call(twin, x), y)
    assert torch.equal(torch.compile(chain, fullgraph=True, backend="aot_eager")(x), y)
    program = torch.export.export(chain, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_close(program.module()(x[:4]), y[:4])
    double = copy.deepcopy(chain).double()
    assert torch.equal(double(x.double()), one_by_one(double, x.double()))
    constants, program = chain._kept.constants, chain._kept.program
    assert_close(abcnets.packed_chain(x, constants, program), y)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.abcnets.packed_chain.default, (x, constants, program), test_utils=checks)
    steps = abcnets._chain_steps(program)
    for wrong in (steps[1:2] + steps[:1], steps + steps[-1:], steps[:-1], steps[:1] + steps, steps[:2] + steps[3:]):
        try:
            y = abcnets.packed_chain(x, constants, abcnets.json.dumps(wrong))
        except (ValueError, RuntimeError, IndexError, TypeError):
            y = None
        try:
            z = torch.ops.abcnets.packed_chain(x, constants, abcnets.json.dumps(wrong))
        except (ValueError, RuntimeError, IndexError, TypeError):
            z = None
        assert z is None or (y is not None and torch.allclose(y, z, rtol=1e-4, atol=1e-3))


def test_the_operator_anywhere_puts_out_what_the_engine_does():
    chain, x = some_chain()
    y = chain(x)
    constants, program = chain._kept.constants, chain._kept.program
    assert torch.allclose(abcnets.packed_chain(x, constants, program), y, atol=1e-4)
    assert torch.allclose(torch.ops.abcnets.packed_chain(x.double(), constants, program), y, atol=1e-3)
    empty = torch.ops.abcnets.packed_chain(x.to("meta"), constants.to("meta"), program)
    assert empty.shape == y.shape and empty.dtype == y.dtype
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.abcnets.packed_chain.default, (x, constants, program), test_utils=checks)


def test_other_inputs_take_the_steps():
    chain, x = some_chain()
    y = chain(x)
    for other in (x.double(), x.bfloat16(), x[:0]):
        assert torch.equal(chain(other), one_by_one(chain, other))
    convolutions = PackedChain([chain.steps[0], chain.steps[2]])
    assert torch.equal(convolutions(x[0]), in_one_call(convolutions, x)[0])  # without a batch
    with pytest.raises(ValueError, match="takes 16 channels"):
        chain(x[:, 1:])
    broken = x.clone()
    broken[3, 4, 5, 6] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        chain(broken)
    assert torch.equal(in_one_call(chain, x), y)  # and nothing lingers
    assert torch.equal(chain(x.clone().requires_grad_()), y)


def test_changed_and_replaced_tensors_and_hooks_are_noticed():
    chain, x = some_chain()
    first, pool, second, _ = chain.steps
    seen = [in_one_call(chain, x)]

    def check():
        seen.append(in_one_call(chain, x))
        assert torch.equal(seen[-1], one_by_one(chain, x)) and not torch.equal(seen[-1], seen[-2])

    second.alphas.mul_(2)
    check()
    first.out_thresholds = first.out_thresholds + 0.5
    check()
    pool.flips.logical_not_()
    check()
    second.bias.data.add_(1)
    second.refresh()
    check()
    second.alphas = nn.Parameter(2 * second.alphas, requires_grad=False)
    check()
    handle = second.register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.equal(chain(x), one_by_one(chain, x)) and not torch.equal(chain(x), seen[-1])
    handle.remove()
    assert torch.equal(in_one_call(chain, x), seen[-1])


def test_copies_and_other_kinds_of_numbers():
    chain, x = some_chain()
    y = chain(x)
    for twin in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert torch.equal(in_one_call(twin, x), y)
        twin.steps[2].alphas.mul_(2)
        assert not torch.equal(twin(x), y) and torch.equal(chain(x), y)
    file = io.BytesIO()
    torch.save(chain, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(chain).to(dtype)
        assert torch.equal(other(x), one_by_one(other, x)) and other(x).dtype == dtype
    with torch.inference_mode():
        assert torch.equal(in_one_call(copy.deepcopy(chain), x), y)


def test_compiled_and_exported():
    chain, x = some_chain()
    y = chain(x)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y) and torch.equal(compiled(x[:2]), y[:2])
    assert torch.equal(torch.compile(copy.deepcopy(chain), fullgraph=True, backend="aot_eager")(x), y)
    program = torch.export.export(chain, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("abcnets.packed_conv.default") == 2 and "abcnets.packed_chain.default" not in called
    assert torch.equal(program.module()(x[:4]), y[:4])


@pytest.mark.parametrize("count", [1, 2])
def test_several_threads_at_once(count, threads):
    torch.set_num_threads(count)
    chain, x = some_chain()
    inputs = [x[: 1 + i].roll(i, 2) for i in range(6)]
    expected = [chain(each) for each in inputs]
    wrong = []

    def work(i):
        torch.set_num_threads(count)
        for _ in range(30):
            if not torch.equal(chain(inputs[i]), expected[i]):
                wrong.append(i)

    at_once(work, zip(range(6)))
    assert not wrong


def test_what_is_kept_is_bounded_and_goes_with_the_chain():
    chain, x = some_chain()
    for height in range(8, 8 + 2 * cpu_engine.PLANS_PER_LAYER):
        chain(x[:1].repeat(1, 1, 3, 1)[:, :, :height])
    constants, program = chain._kept.constants, chain._kept.program
    kept = cpu_chain._chains.get((constants,), program)
    assert len(kept.plans) == cpu_engine.PLANS_PER_LAYER
    kept, count = weakref.ref(kept), len(cpu_chain._chains)
    gc.disable()
    try:
        del constants
        chain._kept = None
        assert len(cpu_chain._chains) == count - 1 and kept() is None
    finally:
        gc.enable()


def test_steps_that_do_not_fit_are_refused():
    chain, x = some_chain()
    chain(x)
    constants, program = chain._kept.constants, chain._kept.program
    steps = abcnets._chain_steps(program)
    for wrong in (steps[::-1], steps[:1] + steps[3:], [steps[1], *steps]):
        with pytest.raises((ValueError, RuntimeError, IndexError, TypeError)):
            torch.ops.abcnets.packed_chain(x, constants, abcnets.json.dumps(wrong))


def test_fuse_makes_chains_of_what_reads_one_another():
    def network():
        torch.manual_seed(0)
        layers = [abcnets.ABCConv2d(8, 8, 3, padding=1, weight_bases=1, activation_bases=1) for _ in range(4)]
        for layer in layers:
            layer.active = True
        norms = [nn.BatchNorm2d(8) for _ in range(3)]
        return layers, norms

    (a, b, c, _), (n, m, _) = network()
    model = [nn.Conv2d(1, 8, 3), a, n, nn.ReLU(), nn.MaxPool2d(2), b, m, nn.ReLU(), c, nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*model)
    packed = abcnets.pack(model.eval())
    fused, x = abcnets.fuse(packed), torch.randn(3, 1, 20, 20)
    (chain,) = [each for each in fused.modules() if isinstance(each, PackedChain)]
    kinds = [nn.Conv2d, PackedLayer, PackedPool, PackedLayer, PackedLayer, nn.MaxPool2d]
    assert [type(step) for step in chain.steps] == kinds
    assert torch.allclose(fused(x), packed(x), atol=1e-4)
    in_one_call(chain, x)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = network()[0]

        def forward(self, x):
            y = self.b(torch.relu(self.a(x)))
            return self.d(self.c(torch.relu(y))) + y

    packed = abcnets.pack(Residual().eval())
    fused, x = abcnets.fuse(packed), torch.randn(2, 8, 9, 9)
    chains = [[type(step) for step in each.steps] for each in fused.modules() if isinstance(each, PackedChain)]
    layers = [PackedLayer] * 2  # a sum reads what is between them
    assert chains == [[*layers, abcnets.ChainRead, *layers, abcnets.ChainSum]]
    assert torch.allclose(fused(x), packed(x), atol=1e-4)
    with pytest.raises(ValueError, match="fused already"):
        abcnets.fuse(fused)
    assert [row["layer"] for row in abcnets.summary(fused, x) if row["kind"] == "PackedLayer"]


def nearly_all_close(y, expected):
    """Where a sum lies on a threshold, rounding decides."""
    return y.shape == expected.shape and (y - expected).abs().gt(1e-4).float().mean() < 0.02


def binary(C, O=8, dims=2):
    layer = (abcnets.ABCLinear, abcnets.ABCConv1d, abcnets.ABCConv2d)[dims]
    geometry = dict(kernel_size=3, padding=1) if dims else {}
    return layer(C, O, weight_bases=1, activation_bases=1, active=True, **geometry)


class Functions(nn.Module):
    """The float layers as functions, with what does nothing between them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.binary = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), binary(8)
        self.drop, self.last = nn.Dropout(), nn.Linear(8 * 36, 5)

    def forward(self, x):
        x = self.binary(torch.relu(self.norm(self.first(x))))
        return self.last(self.drop(torch.flatten(torch.relu(x), 1))).softmax(1)


FLOAT, PACKED = "Conv2d", "PackedLayer"


@pytest.mark.parametrize("model, expected", [
    (Functions(), [FLOAT, PACKED, "ReLU", "Flatten", "Linear"]),
    (nn.Sequential(nn.Conv2d(3, 8, 3), binary(8)), [FLOAT, PACKED]),
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU(), nn.MaxPool2d(2), binary(8)),
     [FLOAT, "ReLU", "MaxPool2d", PACKED]),
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.MaxPool2d(2), binary(8)), []),
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 1), nn.MaxPool2d(2), binary(8)), [FLOAT, "MaxPool2d"]),
    (nn.Sequential(nn.Conv2d(3, 6, 3), binary(6), binary(8)), [FLOAT, PACKED, PACKED]),
    (nn.Sequential(binary(3), nn.Flatten(), nn.ReLU(), nn.Linear(8 * 64, 5)), [PACKED, "Flatten", "ReLU", "Linear"]),
    (nn.Sequential(nn.Flatten(), binary(192, 8, 0), nn.ReLU(), nn.Linear(8, 5)), [PACKED, "ReLU", "Linear"]),
    (nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 8, 3), binary(8)), []),  # of five channels
    (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), binary(6)), []),
    (nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), binary(6)), []),
    (nn.Sequential(binary(3), nn.Flatten(2), nn.Linear(64, 5)), []),
    (nn.Sequential(binary(3), nn.Linear(8, 5)), []),  # of the last dimension alone
    (nn.Sequential(binary(3), nn.Flatten(), nn.Tanh(), nn.Linear(8 * 64, 5)), []),
])  # fmt: skip
def test_fuse_takes_float_layers_at_the_ends(model, expected):
    torch.manual_seed(0)
    packed, x = abcnets.pack(model.eval(), engine="bits"), torch.randn(5, 3, 8, 8)
    fused = abcnets.fuse(packed)
    chains = [[type(step).__name__ for step in each.steps] for each in fused.modules() if isinstance(each, PackedChain)]
    assert chains == [expected] * bool(expected)
    assert nearly_all_close(fused(x), packed(x))
    if not isinstance(model[0] if isinstance(model, nn.Sequential) else model.last, nn.Flatten):
        assert [row["layer"] for row in abcnets.summary(fused, x)]


class Residual(nn.Module):
    """The first convolution and its max-pool are read by two; another pool's input too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.pool, self.binary = nn.MaxPool2d(2), nn.ModuleList([binary(8), binary(8), binary(8)])
        self.second = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        y = self.pool(self.relu(self.norm(self.first(x))))
        y = y + self.binary[1](self.relu(self.binary[0](y)))
        z = self.second(x)
        return y + self.binary[2](self.pool(z)) + z.mean()


def test_the_first_convolution_and_its_pool_are_one_call():
    torch.manual_seed(0)
    model = Residual().eval()
    model.norm.running_mean.normal_(), model.norm.weight.data.normal_()
    packed, x = abcnets.pack(model, engine="bits"), torch.randn(5, 3, 12, 12)
    fused = abcnets.fuse(packed)
    chains = [[type(step).__name__ for step in each.steps] for each in fused.modules() if isinstance(each, PackedChain)]
    pooled = [FLOAT, "ReLU", "MaxPool2d"]
    assert sorted(chains) == [[*pooled, "ChainRead", PACKED, PACKED, "ChainSum"], [PACKED, "ChainSum"]]
    assert nearly_all_close(fused(x), packed(x))
    chain = next(each for each in fused.modules() if isinstance(each, PackedChain) and len(each.steps) == 7)
    chain = PackedChain([*chain.steps][:3])
    expected = one_by_one(chain, x)
    for images in (x, x.to(memory_format=torch.channels_last), x[:1]):
        assert_close(in_one_call(chain, images), expected[: len(images)])
    x[0, 0, 0, 0] = float("nan")
    assert torch.equal(chain(x).isnan(), one_by_one(chain, x).isnan())


def test_fuse_leaves_float_layers_that_others_know():
    def packed():
        torch.manual_seed(0)
        return abcnets.pack(
            nn.Sequential(nn.Conv2d(3, 8, 3), binary(8), binary(8), nn.Flatten(), nn.Linear(288, 5)).eval()
        )

    x = torch.randn(5, 3, 8, 8)
    watched = packed()
    for place in (0, 4):
        watched[place].register_forward_hook(lambda module, inputs, output: output * 2)
    fused = abcnets.fuse(watched)
    (chain,) = [each for each in fused.modules() if isinstance(each, PackedChain)]
    assert [type(step) for step in chain.steps] == [PackedLayer] * 2
    assert torch.allclose(fused(x), watched(x), atol=1e-4)


class Written(nn.Module):
    """What the chain reads is written to while it is under way."""

    def __init__(self, steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x):
        x = 2 * x
        first, *others = self.steps
        y = first(x)
        x.mul_(-1)
        for step in others:
            y = step(y)
        return y, x


@pytest.mark.parametrize("steps", [
    [binary(8), nn.ReLU(), binary(8)], [nn.Conv2d(3, 8, 3), binary(8)], [binary(3), nn.Flatten(), nn.Linear(512, 5)],
])  # fmt: skip
def test_what_a_chain_reads_is_not_written_to_before(steps):
    torch.manual_seed(0)
    packed = abcnets.pack(Written(steps).eval(), engine="bits")
    channels = 8 if len(steps) == 3 and type(steps[1]) is nn.ReLU else 3
    x = torch.randn(5, channels, 8, 8)
    for y, expected in zip(abcnets.fuse(packed)(x), packed(x)):
        assert nearly_all_close(y, expected)


class WrittenBetweenChains(nn.Module):
    """What one chain, or a convolution with a folded norm, puts out is written to while the next one is under way."""

    def __init__(self, norm=False):
        super().__init__()
        first = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)] if norm else [binary(8), nn.ReLU(), binary(8)]
        self.first, self.second, self.third = nn.Sequential(*first), binary(8), binary(8)

    def forward(self, x):
        y = self.first(x)
        z = torch.relu(self.second(y))
        y.mul_(-1)
        return self.third(z), y


@pytest.mark.parametrize("norm", [False, True])
def test_what_the_next_chain_reads_is_not_written_to_before(norm):
    torch.manual_seed(0)
    packed, x = abcnets.pack(WrittenBetweenChains(norm).eval(), engine="bits"), torch.randn(5, 8, 8, 8)
    for layer in packed.modules():
        if isinstance(layer, PackedLayer):
            layer.thresholds.zero_()
    for y, expected in zip(abcnets.fuse(packed)(x), packed(x)):
        assert nearly_all_close(y, expected)


class Misnamed(nn.Module):
    """Its `relu` is none."""

    def __init__(self, relu, C=8):
        super().__init__()
        self.first, self.relu, self.pool = nn.Conv2d(3, C, 3), relu, nn.MaxPool2d(2)
        self.binary, self.flatten, self.last = binary(8), nn.Identity(), nn.Linear(72, 5)

    def forward(self, x):
        x = self.binary(self.pool(self.relu(self.first(x))))
        return self.last(self.flatten(self.relu(x)).flatten(1))


@pytest.mark.parametrize("relu", [nn.LeakyReLU(0.3), nn.GELU(), binary(8), nn.Conv2d(8, 8, 1)])
def test_a_module_is_not_what_it_is_called(relu):
    torch.manual_seed(0)
    packed, x = abcnets.pack(Misnamed(relu).eval(), engine="bits"), torch.randn(5, 3, 8, 8)
    assert nearly_all_close(abcnets.fuse(packed)(x), packed(x))


@pytest.mark.parametrize("kernel, pool", [((3, 1), (2, 1)), ((1, 1), (1, 1))])
def test_images_one_pixel_wide(kernel, pool):
    """Whose last stride says nothing."""
    torch.manual_seed(0)
    packed = abcnets.pack(nn.Sequential(nn.Conv2d(3, 8, kernel), nn.MaxPool2d(pool), binary(8)).eval(), engine="bits")
    x = torch.randn(4 * 3 * 40 + 10_000)[: 4 * 3 * 40].view(4, 3, 1, 40).transpose(2, 3)
    assert x.is_contiguous() and x.stride()[-1] == 40
    assert nearly_all_close(abcnets.fuse(packed)(x), packed(x))


def test_large_float_layers_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 384, 8, 8), binary(384, 64), nn.Flatten(), nn.Linear(64 * 16, 64)).eval()
    fused, x = abcnets.fuse(abcnets.pack(model, engine="bits")), torch.randn(2, 3, 32, 32)
    assert not any(isinstance(each, PackedChain) for each in fused.modules())
    assert fused(x).shape == (2, 64)


def test_a_linear_layer_of_another_size_is_refused_as_torch_does():
    packed = abcnets.pack(nn.Sequential(binary(6, 8, 0), nn.Flatten(), nn.Linear(16, 3)).eval(), engine="bits")
    fused, x = abcnets.fuse(packed), torch.randn(4, 2, 6)
    assert any(isinstance(each, PackedChain) for each in fused.modules())
    assert nearly_all_close(fused(x), packed(x))
    for model in (packed, fused):
        with pytest.raises(RuntimeError, match="shapes"):
            model(x[:, 0])
    for wrong in (nn.Linear(4, 3), nn.Linear(6, 3)):
        chain = PackedChain([fused.get_submodule(name).steps[0] for name in dict(fused.named_children())][:1]
                            + [nn.Flatten(), wrong])  # fmt: skip
        with pytest.raises(RuntimeError, match="shapes"):
            chain.requires_grad_(False)(x[:, 0])


def test_gradients_pass_float_layers_alone():
    torch.manual_seed(0)
    packed, x = abcnets.pack(Residual().eval(), engine="bits"), torch.randn(5, 3, 12, 12)
    fused, gradients = abcnets.fuse(packed), []
    for model in (packed, fused):
        image = x.clone().requires_grad_()
        model(image).sum().backward()
        gradients.append(image.grad)
        gradients.append(torch.func.grad(lambda x, model=model: model(x).sum())(x))
        gradients.append(torch.func.jvp(model, (x,), (torch.ones_like(x),))[1])
    assert gradients[0].abs().sum() > 0
    for one, other in zip(gradients[:3], gradients[3:]):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_layers_that_the_engine_does_not_run_behind_a_float_layer():
    """Nine bases: the steps are run one by one, as the packed model is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)).eval()
    settings = {"1": {"weight_bases": 2, "activation_bases": 9}}
    packed, x = abcnets.pack(abcnets.convert(model, settings=settings), engine="bits"), torch.randn(2, 3, 8, 8)
    assert nearly_all_close(abcnets.fuse(packed)(x), packed(x))


def test_a_compiled_chain_of_floats_keeps_gradients():
    g = torch.Generator().manual_seed(0)
    chain = PackedChain([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)]).requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, generator=g)
    chain(x)
    image = x.clone().requires_grad_()
    torch.compile(chain, backend="aot_eager")(image).sum().backward()
    assert image.grad.abs().sum() > 0


def test_float_layers_whose_changes_nobody_counts():
    chain, x = with_floats(5)
    linear = chain.steps[-1]
    y = in_one_call(chain, x)

    def is_seen():
        nonlocal y
        before, y = y, chain(x)
        return torch.allclose(y, one_by_one(chain, x), rtol=1e-4, atol=1e-3) and not torch.allclose(y, before)

    linear.requires_grad_(True)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, fused=True)
    chain(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert is_seen()
    linear.requires_grad_(False)
    assert is_seen() is False and torch.allclose(in_one_call(chain, x), y, rtol=1e-4, atol=1e-3)
    y = chain(x)
    linear.weight.data = 2 * linear.weight.data
    assert is_seen()
    linear.weight.data.mul_(2)
    chain.refresh()
    assert is_seen()
    linear.bias = None
    chain(x)
    linear.bias = nn.Parameter(torch.ones(2 * linear.out_features)[::2], requires_grad=False)
    assert is_seen()
    torch.nn.utils.parametrizations.weight_norm(linear)
    linear.requires_grad_(False)
    chain(x)
    linear.parametrizations.weight.original0.mul_(2)
    assert is_seen()


def test_sizes_in_numpy_integers():
    import numpy as np

    layer = nn.Conv2d(3, 8, 3, padding=np.int64(1), stride=np.int64(2))
    packed = abcnets.pack(nn.Sequential(layer, binary(8)).eval(), engine="bits")
    assert nearly_all_close(abcnets.fuse(packed)(torch.ones(1, 3, 8, 8)), packed(torch.ones(1, 3, 8, 8)))


IN_A_FORKED_CHILD = """
import os, signal, sys, torch
sys.path.insert(0, "tests")
import test_chain as t
torch.set_num_threads(2)
chain, x = t.some_chain()
expected = chain(x)
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(t.in_one_call(chain, x), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""

WITHOUT_NUMBA = """
import sys, warnings
import pytest
pytest.importorskip = lambda name: None
sys.modules["numba"] = None
import torch, abcnets
from torch import nn
layers = [abcnets.ABCConv2d(8, 8, 3, weight_bases=1, activation_bases=1, active=True) for _ in range(2)]
packed = abcnets.pack(nn.Sequential(*layers).eval(), engine="bits")
fused, x = abcnets.fuse(packed), torch.randn(2, 8, 9, 9)
assert any(isinstance(m, abcnets.PackedChain) for m in fused.modules())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    assert torch.allclose(fused(x), packed(x), atol=1e-4)
"""


@pytest.mark.parametrize("script", [IN_A_FORKED_CHILD, WITHOUT_NUMBA])
def test_in_a_fresh_process(script, pytestconfig):
    if script is IN_A_FORKED_CHILD and sys.platform == "win32":
        pytest.skip("no fork")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
