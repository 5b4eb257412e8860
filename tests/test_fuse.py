"""A fused model puts out what the packed one does, or says why it can't: on graphs drawn at random, and on known traps.

All numbers are small multiples of powers of two, so that sums are exact in any order and outputs are compared to the
last bit. All sizes are 4, the batch too: nothing tells a wrong axis from the right one but what comes out.
"""

import collections
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import abcnets
from abcnets import PackedLayer

SIZE = 4
NORMS = nn.modules.batchnorm._BatchNorm


def packed_layer(draw: random.Random, dims: int) -> PackedLayer:
    """A packed layer of that many spatial dimensions, which keeps shapes, with random bits and exact numbers."""
    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    stock = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims]
    geometry = (SIZE, SIZE, *draw.choice([(1,), (3, 1, 1)])) if dims else (SIZE, SIZE)
    M, N = draw.choice([1, 2]), draw.choice([1, 2])
    how = {"code": draw.choice(["thermometer", "binary"]), "zero": draw.choice([False, True])}
    layer = PackedLayer(stock(*geometry), M, N, draw.choice(["bits", "bits", "bits", "float"]), **how).eval()

    def choose(shape, *values):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    layer.bits.copy_(torch.randint(2**SIZE, layer.bits.shape, generator=generator))
    layer.alphas.copy_(choose(layer.alphas.shape, 0.25, 0.5, -0.25, 1.0))
    layer.bias.copy_(choose(layer.bias.shape, -0.5, 0.0, 0.25))
    layer.thresholds.copy_(choose(layer.thresholds.shape, -0.5, 0.0, 0.25, 1.0).sort().values)
    layer.betas.copy_(choose(layer.betas.shape, 0.5, 1.0, -0.5))
    if layer.zero is not None:  # any number does here, whatever the level of 0 is
        layer.zero.copy_(choose((), 0.5, -0.25))
    layer.refresh()
    return layer


def stock_layer(draw, dims):
    layer = (nn.Linear, nn.Conv1d, nn.Conv2d)[dims](*(SIZE, SIZE, 1)[: 3 if dims else 2])
    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    for parameter in layer.parameters():
        parameter.requires_grad_(False).copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
    return layer


def norm_layer(draw, dims):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](SIZE, eps=0).eval().requires_grad_(False)
    for tensor, values in (
        (norm.running_mean, [-0.5, 0.0, 0.5]), (norm.running_var, [0.25, 1.0, 4.0]),
        (norm.weight, [-1.0, 0.5, 1.0, 0.0]), (norm.bias, [-0.25, 0.0, 0.5]),
    ):  # fmt: skip
        tensor.copy_(torch.tensor([draw.choice(values) for _ in range(SIZE)]))
    return norm


def doubled(module, inputs, output):
    return output * 2


def watched(draw):
    """A layer with a hook that changes what it puts out."""
    layer = packed_layer(draw, 0)
    layer.register_forward_hook(doubled)
    return layer


MODULES = {
    **{f"packed{dims}": lambda draw, dims=dims: packed_layer(draw, dims) for dims in range(4)},
    **{f"stock{dims}": lambda draw, dims=dims: stock_layer(draw, dims) for dims in range(3)},
    **{f"norm{dims}": lambda draw, dims=dims: norm_layer(draw, dims) for dims in (1, 2, 3)},
    **{f"pool{dims}": lambda draw, dims=dims: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](3, 1, 1)
       for dims in (1, 2, 3)},
    "relu": lambda draw: nn.ReLU(),
    "relu in place": lambda draw: nn.ReLU(inplace=True),
    "hardtanh in place": lambda draw: nn.Hardtanh(-1, 1, inplace=True),
    "relu6": lambda draw: nn.ReLU6(),
    "identity": lambda draw: nn.Identity(),
    "dropout": lambda draw: nn.Dropout(),
    "dropout in place": lambda draw: nn.Dropout(inplace=True),
    "watched": watched,
}  # fmt: skip


def added_in_place(x, y):
    x += y
    return x


def forgotten(x):
    """Called for what it does to x, not for what it puts out."""
    x.relu_()
    return x * 1


FUNCTIONS = {
    "F.relu": lambda x, y: F.relu(x),
    "F.relu in place": lambda x, y: F.relu(x, True),
    "torch.relu": lambda x, y: torch.relu(x),
    "relu_": lambda x, y: x.relu_(),
    "sum": lambda x, y: x + y,
    "sum in place": added_in_place,
    "add_": lambda x, y: x.add_(y),
    "forgotten": lambda x, y: forgotten(x),
    "view": lambda x, y: x[:],
    "turned": lambda x, y: x.transpose(1, -1),
    "product": lambda x, y: x * 0.5,
}
OPERATIONS = [*MODULES, *FUNCTIONS]
LINKS = ["relu", "relu in place", "F.relu in place", "dropout", "identity"]
USUAL = [[*[f"packed{dims}", f"norm{max(dims, 1)}"] * 2, f"pool{max(dims, 1)}", *LINKS] for dims in range(4)]


class Network(nn.Module):
    """A program: each step (operation, number of the module, values it takes) appends one value."""

    def __init__(self, steps, outputs: int, seed: int, x):
        """Steps that don't work on what there is when x goes in are left out."""
        super().__init__()
        self.steps, self.outputs, draw = [], outputs, random.Random(seed)
        self.layers = nn.ModuleDict()
        values = [x.clone()]
        for step in steps:
            name, number, _, _ = step
            if name in MODULES and f"{name} {number}" not in self.layers:
                self.layers[f"{name} {number}"] = MODULES[name](draw)
            try:
                self.run(step, values)
                self.steps.append(step)
            except (RuntimeError, ValueError, IndexError):
                pass

    def run(self, step, values):
        name, number, first, second = step
        x, y = values[-1 - first % len(values)], values[-1 - second % len(values)]
        values.append(self.layers[f"{name} {number}"](x) if name in MODULES else FUNCTIONS[name](x, y))

    def forward(self, x):
        values = [x]
        for step in self.steps:
            self.run(step, values)
        return values[-self.outputs :]


def draw_network(seed: int):
    """A network of one kind of layers mostly, one behind the other mostly, with a chance of anything; and its input."""
    draw = random.Random(seed)
    dims = draw.randrange(4)
    rank = dims + draw.choice([2, 2, 2, 1, 3])
    x = torch.randint(-6, 7, (SIZE,) * rank, generator=torch.Generator().manual_seed(seed)) / 4.0
    steps = []
    for _ in range(draw.randint(3, 12)):
        operation = draw.choice(OPERATIONS if draw.random() < 0.2 else USUAL[dims])
        steps.append((operation, draw.randrange(6), draw.choice([0] * 6 + [1, 1, 2, 3]), draw.randrange(5)))
    with torch.no_grad():
        return Network(steps, draw.choice([1, 1, 2]), seed, x).eval(), x


def outputs_of(model, x):
    with torch.no_grad():
        return [y.clone() for y in model(x.clone())]


def test_a_fused_graph_is_equal_or_refused():
    seen = collections.Counter()
    for seed in range(400):
        packed, x = draw_network(seed)
        expected = outputs_of(packed, x)
        is_exact = all(y.abs().amax() < 2**12 for y in expected)
        if not is_exact or not any(isinstance(m, PackedLayer) for m in packed.modules()):
            continue
        try:
            fused = abcnets.fuse(packed)
            outputs = outputs_of(fused, x)
        except ValueError:
            seen["refused"] += 1
            continue
        for y, wanted in zip(outputs + outputs_of(fused, x), expected + expected, strict=True):
            assert torch.equal(y, wanted), f"seed {seed}: {packed.steps}"
        for y, wanted in zip(outputs_of(packed, x), expected):
            assert torch.equal(y, wanted), f"seed {seed}: fuse changed the model it was given"
        norms = [sum(isinstance(m, NORMS) for m in model.modules()) for model in (packed, fused)]
        folded = any(m.folded for m in fused.modules() if isinstance(m, PackedLayer)) or norms[1] < norms[0]
        seen["folded" if folded else "as it was"] += 1
    assert seen["folded"] >= 200
    assert seen["refused"] < 0.1 * seen.total()


# --------------------------------------------------------------------------- the traps, one by one


class Written(nn.Module):
    """A network of what `forward` says, a function of the module and its input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.write, self.modules_by_name = forward, nn.ModuleDict(modules)

    def __getattr__(self, name):
        modules = self.__dict__["_modules"].get("modules_by_name", {})
        return modules[name] if name in modules else super().__getattr__(name)

    def forward(self, x):
        return self.write(self, x)


def check_network(forward, x, **modules):
    """The fused network, which puts out what the packed one does."""
    packed = Written(forward, **modules).eval()
    wanted = packed(x.clone())
    fused = abcnets.fuse(packed)
    assert torch.equal(fused(x.clone()), wanted)
    return fused


def layers(dims: int, count: int) -> list[PackedLayer]:
    draw = random.Random(1)
    made = [packed_layer(draw, dims) for _ in range(count)]
    for layer in made:
        layer.engine = "bits"
    return made


def numbers(*shape):
    return torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(0)) / 4.0


def test_a_packed_layer_called_twice_stays_as_it_is():
    a, b = layers(2, 2)
    norm = norm_layer(random.Random(0), 2)
    fused = check_network(lambda m, x: m.b(m.norm(m.a(m.a(x)))) + m.b(x), numbers(4, 4, 6, 6), a=a, b=b, norm=norm)
    assert not any(m.folded for m in fused.modules() if isinstance(m, PackedLayer))


def test_a_norm_called_twice_folds_into_each_of_its_readers():
    a, b, c = layers(2, 3)
    norm = norm_layer(random.Random(0), 2)
    fused = check_network(lambda m, x: m.c(m.norm(m.b(m.norm(m.a(x))))), numbers(4, 4, 6, 6), a=a, b=b, c=c, norm=norm)
    assert not any(isinstance(m, NORMS) for m in fused.modules())


def test_a_relu_in_place_whose_input_is_read_elsewhere_stays():
    a, b = layers(2, 2)
    relu = nn.ReLU(inplace=True)

    def residual(m, x):
        y = m.a(x)
        return m.b(m.relu(y)) + y

    def in_the_end(m, x):
        y = m.a(x)
        m.relu(y)
        return m.b(y)

    for forward in (residual, in_the_end, lambda m, x: m.b(m.relu(x)) + x):
        check_network(forward, numbers(4, 4, 6, 6), a=a, b=b, relu=relu)


def test_a_sum_in_place_stays_in_place():
    def forward(m, x):
        y = z = m.a(x)
        y += x
        return m.b(z)

    def counted(m, x):
        n = old = x.shape[0]
        n += 1
        return m.b(m.a(x)) * old + n

    a, b = layers(2, 2)
    check_network(forward, numbers(4, 4, 6, 6), a=a, b=b)
    with pytest.raises(ValueError, match="fuse can't tell what .* gets"):
        abcnets.fuse(Written(counted, a=a, b=b))


def test_a_norm_over_another_axis_than_the_channels_is_not_folded():
    """On (B, T, C) BatchNorm1d normalizes each T; with as many as there are channels only the input tells."""
    a, b = layers(0, 2)
    norm = norm_layer(random.Random(2), 1)
    fused = check_network(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), numbers(5, 4), a=a, b=b, norm=norm)
    with pytest.raises(ValueError, match=r"takes input of 2 dimensions, got shape \(5, 4, 4\)"):
        fused(numbers(5, 4, 4))
    sequence = nn.BatchNorm1d(7).eval()
    fused = check_network(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), numbers(5, 7, 4), a=a, b=b, norm=sequence)
    assert any(isinstance(m, NORMS) for m in fused.modules())


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 5, 4), (2, 3, 5, 4), (0, 5, 4)])
def test_linear_layers_hand_on_bits_in_any_number_of_dimensions(shape):
    a, b = layers(0, 2)
    fused = check_network(lambda m, x: m.b(torch.relu(m.a(x))), numbers(*shape), a=a, b=b)
    assert all(m.folded for m in fused.modules() if isinstance(m, PackedLayer))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_hand_on_bits_without_a_batch(dims):
    a, b = layers(dims, 2)
    fused = check_network(lambda m, x: m.b(torch.relu(m.a(x))), numbers(4, *[5] * dims), a=a, b=b)
    assert all(m.folded for m in fused.modules() if isinstance(m, PackedLayer))


def test_pools_over_another_axis_than_the_pixels_are_not_folded():
    a, b = layers(1, 2)
    check_network(lambda m, x: m.b(m.pool(m.a(x))), numbers(3, 4, 4), a=a, b=b, pool=nn.MaxPool2d(3, 1, 1))
    a, b = layers(2, 2)
    fused = check_network(lambda m, x: m.b(m.pool(m.a(x))), numbers(3, 4, 6, 6), a=a, b=b, pool=nn.MaxPool2d(3, 1, 1))
    with pytest.raises(ValueError, match=r"takes input of 4 dimensions, got shape \(4, 6, 6\)"):
        fused(numbers(4, 6, 6))


def test_a_layer_with_a_hook_or_whose_tensors_the_model_reads_stays():
    a, b = layers(2, 2)
    check_network(lambda m, x: m.b(torch.relu(m.a(x))) * m.a.alphas[0, 0], numbers(4, 4, 6, 6), a=a, b=b)
    a.register_forward_hook(doubled)
    check_network(lambda m, x: m.b(torch.relu(m.a(x))), numbers(4, 4, 6, 6), a=a, b=b)


def test_a_norm_that_makes_nan_stays():
    a, b = layers(2, 2)
    norm = norm_layer(random.Random(0), 2)
    norm.running_var[1] = -1
    packed = nn.Sequential(a, norm, b).eval()
    assert torch.equal(abcnets.fuse(packed)(numbers(4, 4, 6, 6)).isnan(), packed(numbers(4, 4, 6, 6)).isnan())
    assert packed(numbers(4, 4, 6, 6)).isnan().any()


def test_what_can_not_be_fused_is_said_in_one_sentence():
    a, b = layers(2, 2)
    with pytest.raises(ValueError, match="numbers in float32, but those of a layer are torch.float16 on cpu"):
        abcnets.fuse(nn.Sequential(a, b).half())
    a, b = layers(2, 2)
    with pytest.raises(ValueError, match="torch.float32 on meta"):
        abcnets.fuse(nn.Sequential(a, b).to("meta"))
    with pytest.raises(ValueError, match="this model has no packed layer"):
        abcnets.fuse(nn.Sequential(nn.ReLU()))
    a, b = layers(2, 2)
    watched = nn.Sequential(a, b)
    watched.register_forward_hook(doubled)
    with pytest.raises(ValueError, match="would lose the hooks"):
        abcnets.fuse(watched)

    def counting(m, x):
        m.calls.add_(1)
        return m.b(m.a(x))

    network = Written(counting, a=a, b=b)
    network.register_buffer("calls", torch.zeros(1))
    with pytest.raises(ValueError, match="leaves its own tensors as they are"):
        abcnets.fuse(network)


def test_only_a_layer_into_which_thresholds_were_folded_takes_words():
    a, b = layers(2, 2)
    words = torch.zeros(1, 6, 6, 1, a.activation_bases, dtype=torch.int64)
    with pytest.raises(TypeError, match="takes floating-point input, got torch.int64"):
        a(words)


def test_sizes_of_pools_that_torch_alone_understands_stay_with_torch():
    a, b = layers(2, 2)
    for pool in (nn.MaxPool2d((2,)), nn.MaxPool2d(3, 2, padding=(1,)), nn.MaxPool2d((2, 1), (1, 2))):
        check_network(lambda m, x: m.b(m.pool(m.a(x))), numbers(2, 4, 8, 8), a=a, b=b, pool=pool)


def accumulated(m, x):
    total = torch.zeros(2, 4, 6, 6)
    total += m.a(x)
    return m.b(total)


def written_to(m, x):
    result = torch.zeros(2, 4, 6, 6)
    result[:] = m.b(m.a(x))
    return result


def counted_in_a_buffer(m, x):
    m.calls.add_(x.mean())
    return m.b(m.a(x)) * m.calls.sqrt()


def handed_out(m, x):
    return m.b(m.a(x)), torch.zeros(2)


@pytest.mark.parametrize("forward", [accumulated, written_to, counted_in_a_buffer, handed_out])
def test_tensors_that_all_calls_would_share_are_refused(forward):
    a, b = layers(2, 2)
    network = Written(forward, a=a, b=b)
    network.register_buffer("calls", torch.zeros(1))
    with pytest.raises(ValueError, match="make it of that, as torch.zeros_like"):
        abcnets.fuse(network)


def test_attributes_of_tensors_are_followed_or_refused():
    def through_data(m, x):
        y = m.a(x)
        data = y.data
        data *= 0.5
        return m.b(y)

    def set_data(m, x):
        y = m.a(x)
        y.data = y.data * 0.5
        return m.b(y)

    def asked(m, x):
        y = m.a(x)
        return m.b(y * 2 if hasattr(y, "of_some_subclass") else y)

    a, b = layers(2, 2)
    for forward in (through_data, asked):
        check_network(forward, numbers(2, 4, 6, 6), a=a, b=b)
    with pytest.raises(ValueError, match="can't follow the setting of a tensor's attribute 'data'"):
        abcnets.fuse(Written(set_data, a=a, b=b))


def test_a_fused_model_is_for_the_defaults_that_it_was_traced_with():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers(2, 2)

        def forward(self, x, mask=None, *, double=False):
            y = self.a(x)
            y = y if mask is None else y * mask
            return self.b(y * 2 if double else y)

    packed, x = Optional().eval(), numbers(2, 4, 6, 6)
    fused = abcnets.fuse(packed)
    for call in (lambda m: m(x), lambda m: m(x, None), lambda m: m(x, mask=None, double=False)):
        assert torch.equal(call(fused), call(packed))
    with pytest.raises(ValueError, match="fused for mask=None, .* for a tensor"):
        fused(x, x)
    with pytest.raises(ValueError, match="fused for double=False, .* for True"):
        fused(x, double=True)


def test_names_of_the_user_stay_the_users():
    a, b = layers(2, 2)
    packed = nn.Sequential()
    packed.a, packed.pool, packed.b = a, nn.MaxPool2d(2), b
    packed.register_buffer("pool_flips", torch.ones(1))
    fused = abcnets.fuse(packed.eval())
    assert torch.equal(fused(numbers(2, 4, 6, 6)), packed(numbers(2, 4, 6, 6)))


def test_models_that_can_not_be_copied_and_hooks_on_all_modules_are_refused():
    a, b = layers(2, 2)
    packed = nn.Sequential(a, b)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with pytest.raises(ValueError, match="hooks that are registered for all modules"):
            abcnets.fuse(packed)
    finally:
        handle.remove()
    packed.lock = threading.Lock()
    with pytest.raises(ValueError, match="a copy of the model, which can't be made"):
        abcnets.fuse(packed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fused_model_in_another_dtype_puts_that_out(dtype):
    a, b = layers(2, 2)
    fused = abcnets.fuse(nn.Sequential(a, nn.ReLU(), b, nn.Conv2d(4, 2, 1))).to(dtype)
    assert fused(numbers(2, 4, 6, 6).to(dtype)).dtype == dtype
