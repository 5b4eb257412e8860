"""Residual networks in one call put out what their layers and sums do, and fuse joins what it may."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import abcnets
from abcnets import ChainAverage, ChainRead, ChainSum, PackedChain, PackedLayer

pytest.importorskip("numba")
from networks import import_torchvision, resnet20
from test_chain import KINDS, STOCK, binary, in_one_call, nearly_all_close, one_by_one, random_chain, random_layer
from test_kernels_cpu import HERE, at_once, counting


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
                return PackedChain([*steps, ChainSum(1, relu)]).eval(), y, x
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
    for other in (torch.randn(2, *y.shape), torch.randn_like(y).double()):
        result = chain(x, other)
        assert result.dtype == other.dtype and torch.equal(result, added(y, other, True))
    with pytest.raises(RuntimeError, match="size"):
        chain(x, torch.randn(*y.shape[:-1], y.shape[-1] + 1))
    with pytest.raises(TypeError, match="two tensors"):
        chain(x)
    with pytest.raises(TypeError, match="one tensor"):
        PackedChain([*chain.steps][:-1])(x, y)
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
    sums = [each for each in fused.modules() if any(isinstance(step, ChainSum) for step in getattr(each, "steps", []))]
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
    (chain,) = [each for each in fused.modules() if isinstance(each, PackedChain)]
    assert [type(step).__name__ for step in chain.steps][2:4] == ["ChainRead", "PackedLayer"]
    assert nearly_all_close(fused(x), packed(x))
    assert abcnets.summary(fused, x)


def step_by_step(chain, *given):
    """What the steps put out, by the book: values are what was given, x and `other`, and what each read keeps."""
    values, x = [given[0], given[1] if len(given) > 1 else None], given[0]
    for step in chain.steps:
        if isinstance(step, ChainRead):
            values.append(x)
            x = values[step.value]
        elif isinstance(step, ChainSum):
            x = x + values[step.value]
            x = x.relu() if step.relu else x
        else:
            x = step(x)
    return x


def residual_chain(seed):
    """(a chain of blocks with sums, what it is given): of any dimensions, with 1 or 2 inputs."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dims, C = draw.choice([1, 2, 2, 3]), draw.choice([8, 40, 70])
    size = {1: (33,), 2: (13, 11), 3: (6, 5, 7)}[dims]

    def layers(count):
        kinds = [*(draw.choice(KINDS) for _ in range(count)), None]
        made = []
        while len(made) < count:
            layer = random_layer(draw, g, dims, C, C, *kinds[len(made) : len(made) + 2])
            padding = tuple(p for k in layer.kernel_size for p in [(k - 1) // 2] * 2)
            if set(layer.stride) == {1} and set(layer.kernel_size) <= {1, 3} and tuple(layer.padding) == padding:
                made.append(layer)
        return made

    given = [torch.randn(9, C, *size, generator=g)]
    steps, values = [], [0]
    if draw.random() < 0.5:
        stock = STOCK[dims](draw.choice([1, 3]), C, 3, padding=1)
        for parameter in stock.parameters():  # whose sums are exact
            parameter.data = torch.randint(-4, 5, parameter.shape, generator=g).float()
        given = [torch.randint(-4, 5, (9, stock.in_channels, *size), generator=g).float()]
        steps, values = [stock], []
    if draw.random() < 0.5:
        given.append(torch.randn(9, C, *size, generator=g))
        values.append(1)
    for block in range(draw.choice([2, 3, 4])):
        if steps:
            last = 2 + sum(isinstance(step, ChainRead) for step in steps)
            values.append(last)
            steps.append(ChainRead(draw.choice(values) if block else values[-1]))
        steps += layers(draw.choice([1, 2]))
        if draw.random() < 0.8 and values:
            steps.append(ChainSum(draw.choice(values), draw.random() < 0.5, draw.random() < 0.5))
    if len(given) > 1 and not any(getattr(step, "value", 0) == 1 for step in steps):
        steps.append(ChainRead(1))
        steps += layers(1)
    return PackedChain(steps).eval().requires_grad_(False), given


@pytest.mark.parametrize("seed", range(30))
def test_blocks_in_one_call(seed, threads):
    torch.set_num_threads(1)
    chain, given = residual_chain(seed)
    expected = step_by_step(chain, *given)
    assert torch.equal(one_call_or_steps(chain, given), expected)
    torch.set_num_threads(threads)
    for count in (9, 1, 2):
        assert torch.equal(in_one_call(chain, *(x[:count] for x in given)), expected[:count])
    other_order = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in given]
    assert torch.equal(in_one_call(chain, *other_order), expected)
    for x in given:
        x.view(-1)[5] = float("nan")
    for run in (chain, step_by_step):
        try:
            results = chain(*given) if run is chain else step_by_step(chain, *given)
        except ValueError as error:
            assert "NaN" in str(error)
        else:
            assert results.isnan().any()


@pytest.mark.parametrize("tile", [tile for tile in HERE if tile.endswith("look-up")])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_layers_that_look_up(seed, tile, threads):
    torch.set_num_threads(threads)
    with counting(tile):
        chain, given = residual_chain(seed)
        assert torch.equal(in_one_call(chain, *given), step_by_step(chain, *given))


def one_call_or_steps(chain, given):
    """As a hook on a step makes it."""
    hook = chain.steps[0].register_forward_hook(lambda module, inputs, output: None)
    try:
        return chain(*given)
    finally:
        hook.remove()


def test_several_python_threads():
    torch.set_num_threads(1)
    chain, given = residual_chain(3)
    expected, results = step_by_step(chain, *given), {}

    def work(i):
        for _ in range(20):
            results[i] = chain(*given)

    at_once(work, zip(range(4)))
    assert all(torch.equal(results[i], expected) for i in range(4))


def test_gradients_and_changes_pass_blocks():
    chain, given = residual_chain(0)
    while not any(isinstance(step, ChainSum) and step.value != 1 for step in chain.steps):
        raise AssertionError("this seed has no sum")
    x = given[0].clone().requires_grad_()
    (y, z) = (chain(x, *given[1:]), step_by_step(chain, x, *given[1:]))
    assert torch.equal(y, z) and y.requires_grad == z.requires_grad
    before = chain(*given)
    for step in chain.steps:
        if isinstance(step, PackedLayer):
            step.bits.bitwise_xor_(1)
    assert torch.equal(chain(*given), step_by_step(chain, *given)) and not torch.equal(chain(*given), before)
    assert torch.equal(copy.deepcopy(chain)(*given), chain(*given))
    assert torch.equal(torch.compile(chain, backend="aot_eager")(*given), chain(*given))


ADD = ["sum", [0, False, False]]


@pytest.mark.parametrize("wrong", [
    [["read", [0]]], [["read", [0]], ["read", [0]], "again"], [["relu", []], ["relu", []]], [["read", [3]]],
    [["sum", [2, False, False]]], [["read", [-1]]], [ADD, "again"], [ADD, ADD],
])  # fmt: skip
def test_programs_that_are_none(wrong):
    chain, x = random_chain(2)
    chain(x)
    program = abcnets.json.loads(chain._kept.program)
    steps = [program[-1] if step == "again" else step for step in wrong]
    for wrong_program in (program + steps, [["read", [0]], *program]):
        with pytest.raises(ValueError, match="packed_chain"):
            torch.ops.abcnets.packed_chain(x, chain._kept.constants, abcnets.json.dumps(wrong_program), x)


def chains_of(model):
    return [each for each in model.modules() if isinstance(each, PackedChain)]


def test_a_network_is_one_call():
    torch.manual_seed(0)
    import_torchvision()
    from torchvision.models import resnet18

    model, x = abcnets.convert(resnet18(num_classes=10), 1, 1).eval(), torch.randn(2, 3, 64, 64)
    packed = abcnets.pack(model, engine="bits")
    fused = abcnets.fuse(packed)
    (chain,) = chains_of(fused)
    kinds = [type(step) for step in chain.steps]
    assert kinds[:3] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d] and kinds.count(PackedLayer) == 19
    assert kinds.count(ChainSum) == 8 and kinds.count(ChainRead) == 8 + 3 + 1 and kinds[-1] is nn.Linear
    assert nearly_all_close(fused(x), packed(x))
    macs = [sum(row["binary_macs"] for row in abcnets.summary(each, x)) for each in (packed, fused)]
    assert macs[0] == macs[1] > 0


def test_a_small_residual_network_is_one_call():
    """Shortcuts that shrink, and the norm, ReLU, mean and linear layer at the end."""
    torch.manual_seed(0)
    model = abcnets.convert(resnet20(3), 1, 1).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_()
    packed, x = abcnets.pack(model, engine="bits"), torch.randn(3, 3, 32, 32)
    fused = abcnets.fuse(packed)
    assert [node.op for node in fused.graph.nodes] == ["placeholder", "call_module", "output"]
    (chain,) = chains_of(fused)
    kinds = [type(step) for step in chain.steps]
    assert kinds.count(ChainSum) == 9 and kinds.count(ChainAverage) == 3 and kinds[-1] is nn.Linear
    assert torch.allclose(fused(x), packed(x), rtol=1e-3, atol=1e-3)
    assert torch.allclose(in_one_call(chain, x[:1]), packed(x[:1]), rtol=1e-3, atol=1e-3)


def test_what_lies_between_other_operations_is_one_call():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(binary(8) for _ in range(6))

        def forward(self, x):
            for a, b in zip(self.layers[::2], self.layers[1::2]):
                x = torch.sigmoid(b(a(x) + x) + x) - 0.5
            return x

    torch.manual_seed(0)
    packed, x = abcnets.pack(Between().eval(), engine="bits"), torch.randn(3, 8, 9, 9)
    fused = abcnets.fuse(packed)
    assert [sum(isinstance(step, ChainSum) for step in chain.steps) for chain in chains_of(fused)] == [2, 2, 2]
    assert nearly_all_close(fused(x), packed(x))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size, kernel", [((9, 11), None), ((9, 11), [2, 3]), ((9, 11), [1, 1]), ((2, 2), [2, 2])])
def test_averages(size, kernel, scaled, threads):
    torch.set_num_threads(threads)
    draw, g, layer = random.Random(0), torch.Generator().manual_seed(0), None
    while layer is None or set(layer.stride) != {1} or set(layer.kernel_size) != {1}:
        layer = random_layer(draw, g, 2, 16, 40, KINDS[0], None)
    scales = (torch.randn(40, generator=g), torch.randn(40, generator=g)) if scaled else (None, None)
    x = torch.randn(9, 16, *size, generator=g)
    for extra, value in ((0, 2), (5, 2), (3, 0)):
        average = ChainAverage(extra, kernel, *(scales if value == 2 else (None, None)), relu=scaled)
        chain = PackedChain([layer, ChainRead(value), average])
        expected = step_by_step(chain, x)
        for count in (9, 1):
            y = in_one_call(chain, x[:count])
            torch.testing.assert_close(y, expected[:count], rtol=1e-5, atol=1e-5)
        linear = nn.Linear(expected[0].numel(), 7).requires_grad_(False)
        chain = PackedChain([*chain.steps, nn.Flatten(), linear])
        torch.testing.assert_close(in_one_call(chain, x), step_by_step(chain, x), rtol=1e-4, atol=1e-4)
    half = average(x.bfloat16())
    assert half.dtype == torch.bfloat16 and average(x[0]).shape == average(x)[0].shape


HEADS = [
    ("all", lambda m, x: m.linear(m.pool(torch.relu(m.norm(x))).flatten(1)), "Linear"),
    ("modules", lambda m, x: m.linear(m.flatten(m.pool(m.relu(m.norm(x))))), "Linear"),
    ("no norm", lambda m, x: m.linear(m.pool(m.relu(x)).flatten(1)), "Linear"),
    ("no ReLU", lambda m, x: m.linear(m.pool(m.norm(x)).flatten(1)), None),
    ("no linear", lambda m, x: m.pool(m.relu(m.norm(x))), "ChainAverage"),
    ("read between", lambda m, x: (lambda y: m.linear(m.pool(y).flatten(1)) + y.mean())(m.relu(m.norm(x))), None),
    ("from 2", lambda m, x: m.linear(m.pool(m.relu(m.norm(x))).flatten(2).mean(2)), "ChainAverage"),
    ("shortcut", lambda m, x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 8)), "ChainAverage"),
    ("shortcut as module", lambda m, x: F.pad(m.average(x), (0, 0, 0, 0, 0, 8)), "ChainAverage"),
    ("padded pixels", lambda m, x: F.pad(F.avg_pool2d(x, 2), (0, 1, 0, 0, 0, 8)), None),
    ("padded with ones", lambda m, x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 8), value=1.0), None),
    ("overlapping", lambda m, x: F.pad(F.avg_pool2d(x, 3, 2), (0, 0, 0, 0, 0, 8)), None),
    ("a stride that is None", lambda m, x: F.pad(F.avg_pool2d(x, 2, None), (0, 0, 0, 0, 0, 8)), "ChainAverage"),
    ("windows of a third", lambda m, x: F.pad(F.avg_pool2d(x, x.size(2) // 4), (0, 0, 0, 0, 0, 8)), None),
    ("by name", lambda m, x: m.linear(m.flatten(input=m.pool(x))), "ChainAverage"),
    ("windows in two sizes", lambda m, x: F.pad(F.avg_pool2d(x, (2, 3), (2, 3)), (0, 0, 0, 0, 0, 8)), "ChainAverage"),
]


@pytest.mark.parametrize("head, last", [case[1:] for case in HEADS], ids=[case[0] for case in HEADS])
def test_fuse_takes_averages(head, last):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.norm, self.relu = nn.ModuleList([binary(8), binary(8)]), nn.BatchNorm2d(8), nn.ReLU()
            self.pool, self.flatten, self.linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
            self.average = nn.AvgPool2d(2)

        def forward(self, x):
            y = self.layers[0](x) + x
            return head(self, self.layers[1](y) + y)

    torch.manual_seed(0)
    model = Model().eval()
    model.norm.running_mean.normal_(), model.norm.running_var.uniform_(0.5, 2), model.norm.weight.data.normal_()
    packed, x = abcnets.pack(model, engine="bits"), torch.randn(5, 8, 8, 9)
    fused = abcnets.fuse(packed)
    (chain,) = chains_of(fused)
    assert (type(chain.steps[-1]).__name__ == last) if last else (type(chain.steps[-1]) is ChainSum)
    torch.testing.assert_close(fused(x), packed(x), rtol=1e-4, atol=1e-4)
    in_one_call(chain, x)
    rows = [sum(row["macs"] for row in abcnets.summary(each, x)) for each in (packed, fused)]
    assert rows[0] == rows[1]


class Read(nn.Module):
    """A value within is read by somebody else, or there are three that come from outside."""

    def __init__(self, read):
        super().__init__()
        self.read, self.layers = read, nn.ModuleList(binary(8) for _ in range(4))

    def forward(self, x):
        a = self.layers[0](x) + x
        b = self.layers[1](a) + a
        return self.read(self.layers, x, a, b)


READ = [
    ("two values are returned", lambda layers, x, a, b: (layers[2](b) + b, a), 2),
    ("one is changed", lambda layers, x, a, b: (layers[2](b) + b.mul_(2),), 1),
    ("three from outside", lambda layers, x, a, b: layers[2](b) + x.sin() + (layers[3](a) + x.cos()), 3),
    ("both branches", lambda layers, x, a, b: layers[2](b) + layers[3](a), 1),
    ("read by torch", lambda layers, x, a, b: layers[2](b) + a.tanh(), 2),
    ("a view is changed", lambda layers, x, a, b: (a.view(-1).mul_(2), layers[2](b) + a)[1], 1),
]


@pytest.mark.parametrize("read, count", [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_values_that_others_read(read, count):
    torch.manual_seed(0)
    packed, x = abcnets.pack(Read(read).eval(), engine="bits"), torch.randn(5, 8, 9, 9)
    fused = abcnets.fuse(packed)
    outputs = [model(x.clone()) for model in (packed, fused)]
    outputs = [output if isinstance(output, tuple) else (output,) for output in outputs]
    for one, other in zip(*outputs):
        assert nearly_all_close(one, other)
    assert len(chains_of(fused)) == count


def test_one_tensor_as_two_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = binary(8)

        def forward(self, x, z):
            y = self.layer(x)
            z.mul_(-1)
            return y + x

    torch.manual_seed(0)
    packed, x = abcnets.pack(Two().eval(), engine="bits"), torch.randn(5, 8, 9, 9)
    one, other = x.clone(), x.clone()
    assert nearly_all_close(abcnets.fuse(packed)(one, one), packed(other, other))


@pytest.mark.parametrize("other", [1.5, torch.tensor(2.0), torch.randn(8, 1, 1), nn.Parameter(torch.randn(8, 9, 9))])
def test_what_is_added_may_be_anything(other):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(binary(8), binary(8))

        def forward(self, x, other):
            return self.layers(x) + other + x.size(0)

    torch.manual_seed(0)
    packed, x = abcnets.pack(Added().eval(), engine="bits"), torch.randn(5, 8, 9, 9)
    assert nearly_all_close(abcnets.fuse(packed)(x, other), packed(x, other))


def test_a_sum_in_place_keeps_its_kind():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = binary(8)

        def forward(self, x, other):
            y = self.layer(x)
            y += other
            return y

    torch.manual_seed(0)
    packed, x = abcnets.pack(InPlace().eval(), engine="bits"), torch.randn(5, 8, 9, 9)
    fused = abcnets.fuse(packed)
    assert fused(x, x.double()).dtype == packed(x, x.double()).dtype == torch.float32
    for model in (packed, fused):
        with pytest.raises(RuntimeError, match="shape"):
            model(x, torch.randn(2, 5, 8, 9, 9))


def test_what_is_broadcast_is_one_call():
    chain, y, x = chain_that_adds(1, False)
    for shape in ((y.shape[1], *[1] * (y.ndim - 2)), (1, *y.shape[1:]), y.shape[1:], ()):
        other = torch.randn(shape)
        assert torch.equal(in_one_call(chain, x, other), y + other)


def both(model, *given):
    """(what the packed model puts out, what the fused one does)."""
    torch.manual_seed(0)
    packed = abcnets.pack(model.eval(), engine="bits")
    return packed(*(x.clone() for x in given)), abcnets.fuse(packed)(*(x.clone() for x in given))


@pytest.mark.parametrize("tail", [
    [binary(16, 16, 0), nn.Linear(16, 4)], [nn.ReLU(), binary(16, 16, 0), nn.Linear(16, 4)],
    [binary(16, 16, 0), binary(16, 16, 0)],
])  # fmt: skip
def test_rows_are_the_pixels_of_one_image(tail):
    """Layers of rows are in no chain of several values."""
    for front in ([], [nn.ReLU()], [nn.AdaptiveAvgPool2d(1)]):
        flat = nn.Linear(8 if front and type(front[0]) is nn.AdaptiveAvgPool2d else 288, 16)
        model = nn.Sequential(binary(8), *front, nn.Flatten(), flat, *copy.deepcopy(tail))
        y, fused = both(model, torch.randn(5, 8, 6, 6))
        assert nearly_all_close(fused, y)


def test_one_tensor_broadcast_to_two_shapes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (
                abcnets.ABCConv2d(8, 8, k, padding=p, weight_bases=1, activation_bases=1, active=True)
                for k, p in ((6, 0), (3, 1), (6, 0))
            )

        def forward(self, x, z):
            v = self.a(x) + z
            return self.c(self.b(x) + z) + v

    y, fused = both(Model(), torch.randn(5, 8, 6, 6), torch.randn(5, 8, 1, 1))
    assert nearly_all_close(fused, y)


def test_a_relu_that_writes_over_what_another_reads():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.d, self.relu = binary(8), binary(8), binary(8), nn.ReLU(inplace=True)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.d.vs.data[:] = 1.5

        def forward(self, x):
            h = self.a(x) + x
            q = self.pool(self.relu(h))
            return self.c(q) + self.d(h)

    y, fused = both(Model(), torch.randn(5, 8, 6, 6))
    assert nearly_all_close(fused, y)


class Cifar(nn.Module):
    """As ResNets for small images begin: a convolution, BatchNorm and a ReLU that two read; and no batch, perhaps."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.a, self.b, self.pool, self.linear = binary(8), binary(8), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        x = self.relu(self.b(self.relu(self.a(x))) + x)
        return self.linear(self.pool(x).flatten(1))


@pytest.mark.parametrize("rest", ["float", "int8"])
def test_a_first_convolution_whose_relu_two_read(rest):
    if rest == "int8" and not abcnets.multiplies_bytes():
        pytest.skip("no AVX-512 VNNI")
    torch.manual_seed(0)
    packed, x = abcnets.pack(Cifar().eval(), engine="bits"), torch.randn(5, 3, 9, 9)
    fused = abcnets.fuse(packed, rest=rest)
    (chain,) = chains_of(fused)
    first = abcnets.EightBitConv if rest == "int8" else nn.Conv2d
    assert [type(step) for step in chain.steps][:3] == [first, nn.ReLU, ChainRead]
    assert [node.op for node in fused.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(in_one_call(chain, x), step_by_step(chain, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused(x), packed(x), rtol=0.05, atol=0.05)


def test_averages_of_images_without_a_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.pool = binary(8), binary(8, 12), nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            h = self.a(x) + x
            return self.pool(self.c(h) + F.pad(F.avg_pool2d(h, 1), (0, 0, 0, 0, 0, 4)))

    for x in (torch.randn(8, 6, 6), torch.randn(5, 8, 6, 6)):
        y, fused = both(Model(), x)
        assert fused.shape == y.shape and torch.allclose(fused, y, atol=1e-3)
