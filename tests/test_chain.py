"""Packed layers and pools in one call put out what they put out one by one, to the last bit."""

import copy
import gc
import io
import pickle
import random
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import abcnets
from abcnets import PackedChain, PackedLayer, PackedPool

pytest.importorskip("numba")
from test_kernels_cpu import HERE, counting

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


def one_by_one(chain, x):
    for step in chain.steps:
        x = step(x)
    return x


def in_one_call(chain, x):
    """What the chain puts out, where none of its steps is called."""
    called = []
    for step in chain.steps:
        step.forward = called.append  # neither a hook nor a tensor: the chain does not look at it
    try:
        return chain(x)
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


def test_the_operator_anywhere_puts_out_what_the_engine_does():
    chain, x = some_chain()
    y = chain(x)
    constants, program = chain._kept[:2]
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

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_what_is_kept_is_bounded_and_goes_with_the_chain():
    chain, x = some_chain()
    for height in range(8, 8 + 2 * cpu_engine.PLANS_PER_LAYER):
        chain(x[:1].repeat(1, 1, 3, 1)[:, :, :height])
    constants, program = chain._kept[:2]
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
    constants, program = chain._kept[:2]
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
    assert [type(step) for step in chain.steps] == [PackedLayer, PackedPool, PackedLayer, PackedLayer, nn.MaxPool2d]
    assert torch.allclose(fused(x), packed(x), atol=1e-4)
    in_one_call(chain, torch.randn(3, 8, 18, 18))

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
    assert chains == [[PackedLayer] * 2] * 2  # a sum reads what is between them
    assert torch.allclose(fused(x), packed(x), atol=1e-4)
    with pytest.raises(ValueError, match="fused already"):
        abcnets.fuse(fused)
    assert [row["layer"] for row in abcnets.summary(fused, x) if row["kind"] == "PackedLayer"]


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
