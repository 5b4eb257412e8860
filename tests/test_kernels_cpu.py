"""The CPU engine against the plain torch implementation of the same operators."""

import collections
import contextlib
import gc
import math
import re
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import abcnets

pytest.importorskip("numba")
from kernels import layout
from kernels.cpu import assembly
from kernels.cpu import engine as cpu_engine
from kernels.cpu import scalar as cpu_scalar
from kernels.cpu import system as cpu_system
from kernels.cpu import vector as cpu_vector

abcnets.engines()  # loads them


def examples(count):
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )


# --------------------------------------------------------------------------- random layers


@dataclass
class Case:
    """One layer and one input, drawn at random; `arguments` are the operator's after x."""

    x: torch.Tensor
    tensors: tuple
    channels: int
    stride: list
    padding: list
    dilation: list
    groups: int
    out: tuple = field(default=(None, None, 0))

    @property
    def arguments(self):
        return *self.tensors, self.channels, self.stride, self.padding, self.dilation, self.groups, *self.out

    def run(self, x=None):
        return cpu_engine.packed_conv(self.x if x is None else x, *self.arguments)

    def expect(self, x=None):
        """In float64, which leaves no rounding to argue about."""
        x = self.x if x is None else x
        return abcnets.packed_conv(x.double() if x.is_floating_point() else x, *self.arguments)


def thresholds_of(N, C, generator, binary=False):
    T = 2**N - 1 if binary else N
    thresholds = torch.randn(T, C, generator=generator)
    thresholds[torch.rand(T, C, generator=generator) < 0.02] = float("-inf")
    thresholds[torch.rand(T, C, generator=generator) < 0.02] = float("inf")
    return thresholds.sort(0).values if binary else thresholds


def falling(thresholds, flips):
    """Thresholds that fall in the channels that are turned round, as those do that fuse finds."""
    return torch.where(flips, thresholds.flip(0), thresholds)


def make_case(
    seed, B, M, N, O, C, groups, size, kernel, stride, padding, dilation, bias=True, binary=False, zero=False
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(M, O, *kernel, C // groups, generator=generator) > 0.5
    thresholds, flips = thresholds_of(N, C, generator, binary), torch.rand(C, generator=generator) < 0.3
    if seed % 2:
        thresholds = falling(thresholds, flips)
    x = torch.randn(B, C, *size, generator=generator)
    on_threshold = thresholds[0].reshape(-1, *[1] * len(size)).expand_as(x)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.1, on_threshold, x)  # infinities among them
    tensors = (
        abcnets.pack_bits(flags, torch.uint8),
        torch.randn(M, O, generator=generator),
        torch.rand(N, generator=generator) + 0.1,
        thresholds,
        flips,
        torch.randn(O, generator=generator) if bias else None,
        torch.randn((), generator=generator) if zero else None,
    )
    return Case(x, tensors, C, list(stride), list(padding), list(dilation), groups)


def small_case(N=2, M=2, B=2, O=40, C=70, size=(9, 7), groups=1, **changes) -> Case:
    ones = (1,) * len(size)
    given = dict(
        seed=0, B=B, M=M, N=N, O=O, C=C, groups=groups, size=size,
        kernel=(3,) * len(size), stride=ones, padding=(1, 1) * len(size), dilation=ones,
    )  # fmt: skip
    return make_case(**(given | changes))


@st.composite
def cases(draw, least_dimensions=0, binary=False, most_bases=8, most_channels=300):
    dimensions = draw(st.integers(least_dimensions, 3))
    largest = (0, 40, 12, 6)[dimensions]

    def per_dimension(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * dimensions))

    kernel, dilation = per_dimension(1, (0, 9, 4, 3)[dimensions]), per_dimension(1, 3)
    padding = draw(st.tuples(*[st.integers(0, 3)] * (2 * dimensions)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    size = [
        draw(st.integers(max(1, r - low - high), max(largest, r)))
        for r, low, high in zip(reach, padding[::2], padding[1::2])
    ]
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 7])) if dimensions else 1
    filling_words = st.sampled_from([1, 64 // groups or 1, 128 // groups])
    per_group = draw(st.one_of(st.integers(1, most_channels // groups), filling_words))
    return make_case(
        seed=draw(st.integers(0, 2**31)),
        B=draw(st.integers(1, 5)),
        M=draw(st.integers(1, most_bases)),
        N=draw(st.integers(1, most_bases)),
        O=groups * draw(st.integers(1, 80 // groups)),
        C=groups * per_group,
        groups=groups,
        size=size,
        kernel=kernel,
        stride=per_dimension(1, 3),
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        binary=binary,
        zero=draw(st.booleans()),
    )


@st.composite
def in_memory(draw, case):
    """The case's input in one of the orders that a tensor can have in memory."""
    x = case.x
    order = draw(st.sampled_from(["contiguous", "channels last", "slice of channels", "every other", "transposed"]))
    if order == "channels last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "slice of channels":
        return torch.cat([x, x], 1)[:, case.channels // 2 :][:, : case.channels] if case.channels > 1 else x
    if order == "every other":
        return torch.stack([x, x], -1)[..., 0]
    if order == "transposed" and x.dim() > 2:
        return x.transpose(-1, 1).contiguous().transpose(-1, 1)
    return x


def words_of(x, thresholds, flips, bases=None):
    """What a layer with these thresholds packs x into: comparisons, or the bits of how many of them are true."""
    flags = x.movedim(1, -1)[None] >= thresholds.view(len(thresholds), *[1] * (x.dim() - 1), -1)
    if bases not in (None, len(thresholds)):
        flags = torch.stack([flags.sum(0) >> k & 1 == 1 for k in reversed(range(bases))])
    return abcnets.pack_bits(flags != flips, torch.int64).movedim(0, -1).contiguous()


def assert_right(case, x=None, result=None):
    """Equal to float64 up to the rounding of the largest sum that there could be; one wrong bit is far more."""
    result, expected = case.run(x) if result is None else result, case.expect(x)
    bits, alphas, betas, _, _, bias, zero = case.tensors
    products = bits[0, 0, ..., 0].numel() * case.channels / case.groups
    levels = betas.sum() + (0 if zero is None else zero.abs())
    largest = alphas.abs().sum(0).max() * levels * products + (0 if bias is None else bias.abs().max())
    assert result.shape == expected.shape
    torch.testing.assert_close(result.double(), expected.double(), rtol=1e-5, atol=1e-6 * largest.item())


# --------------------------------------------------------------------------- tiles

FEATURES = {  # what a processor has that counts so, of all that decides
    "AVX-512 popcount": {"avx2", "avx512bw", "avx512vpopcntdq", "avx512bitalg"},
    "AVX-512 look-up": {"avx2", "avx512bw"},
    "AVX2 look-up": {"avx2"},
    "64-bit words": set(),
    "NEON dot product": {"neon", "dotprod"},
    "NEON bytes": {"neon"},
}
ANYWHERE = {"64-bit words", "NEON dot product", "NEON bytes"}  # LLVM lowers their IR to whatever there is
HERE = [tile for tile in FEATURES if tile in ANYWHERE or FEATURES[tile] <= cpu_system.features()]


@contextlib.contextmanager
def counting(tile):
    """Layers that are new to the engine are counted as on a processor with this tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_system, "features", lambda: frozenset(FEATURES[tile]))
        assert cpu_system.tile() == tile
        yield


@pytest.fixture(params=HERE)
def tile(request):
    with counting(request.param):
        yield request.param


def at_once(work, arguments):
    """work(*each) for each of the arguments, in a Python thread of its own; returns when all are done."""
    workers = [threading.Thread(target=work, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def layer_of(case):
    return cpu_engine._layers.get((*case.tensors, *case.out[:2]), case.channels, case.groups, case.out[2])


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --------------------------------------------------------------------------- the convolution


@examples(180)
@given(st.data(), cases(), st.integers(1, 2))
def test_float_in_float_out(data, case, threads):
    torch.set_num_threads(threads)
    x = data.draw(in_memory(case))
    assert_right(case, x)


@examples(60)
@given(cases(), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**31))
def test_bits_out_are_the_float_result_compared(case, out_bases, threads, seed):
    torch.set_num_threads(threads)
    y = case.run()
    generator = torch.Generator().manual_seed(seed)
    flips = torch.rand(y.shape[1], generator=generator) < 0.5
    thresholds = torch.randn(out_bases, y.shape[1], generator=generator) * y.std(correction=0)
    thresholds[0] = y.movedim(1, 0).flatten(1)[:, 0]  # exactly reached
    case.out = (thresholds, flips, out_bases)
    assert torch.equal(case.run(), words_of(y, thresholds, flips))


@examples(60)
@given(cases(), st.booleans(), st.integers(1, 2))
def test_words_in(case, bits_out, threads):
    torch.set_num_threads(threads)
    words = words_of(case.x, case.tensors[3], case.tensors[4])
    y = case.run()
    assert torch.equal(case.run(words), y)  # the same sums in the same order
    if bits_out:
        case.out = (torch.zeros(2, y.shape[1]), torch.arange(y.shape[1]) % 3 == 0, 2)
        assert torch.equal(case.run(words), words_of(y, *case.out))


@examples(60)
@given(st.data(), cases(binary=True, most_bases=4, most_channels=130), st.integers(1, 2))
def test_binary_floats_and_words_in(data, case, threads):
    torch.set_num_threads(threads)
    x, bases = data.draw(in_memory(case)), len(case.tensors[2])
    assert_right(case, x)
    words = words_of(x, case.tensors[3], case.tensors[4], bases)
    assert torch.equal(case.run(words), case.run(x))  # the same sums in the same order
    if data.draw(st.booleans()):
        x[tuple(data.draw(st.integers(0, size - 1)) for size in x.shape)] = math.nan
        torch.testing.assert_close(case.run(x), abcnets.packed_conv(x, *case.arguments), equal_nan=True)


@examples(60)
@given(st.data(), cases(most_bases=3, most_channels=130), st.integers(1, 4), st.booleans(), st.integers(1, 2))
def test_binary_bits_out(data, case, out_bases, words_in, threads):
    torch.set_num_threads(threads)
    y, O = case.run(), case.tensors[1].shape[1]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    thresholds = thresholds_of(out_bases, O, generator, binary=True) * y.std(correction=0)
    row = data.draw(st.integers(0, len(thresholds) - 1))
    thresholds[row] = y.movedim(1, 0).flatten(1)[:, 0]  # exactly reached
    thresholds = thresholds.sort(0).values
    case.out = (thresholds, torch.rand(O, generator=generator) < 0.5, out_bases)
    x = words_of(case.x, case.tensors[3], case.tensors[4]) if words_in else case.x
    assert torch.equal(case.run(x), words_of(y, *case.out))


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (9, 7), (13, 13)])
@pytest.mark.parametrize("bases, binary", [(1, False), (3, False), (2, True), (4, True)])
def test_bits_out_fill_their_tensor_and_nothing_beside_it(size, bases, binary, monkeypatch):
    """Compilers have peeled and unrolled the loop over pixels wrongly for odd counts of them."""
    case, buffers = small_case(size=size, O=70), []

    def between_guards(plan, layer):
        count = math.prod(plan.output_shape)
        buffers.append(torch.full((count + 128,), 77, dtype=torch.int64))
        return buffers[-1][64 : 64 + count].zero_().view(plan.output_shape)

    y = case.run()
    monkeypatch.setattr(cpu_engine.Plan, "_empty_output", between_guards)
    thresholds = thresholds_of(bases, 70, torch.Generator().manual_seed(0), binary) * y.std()
    case.out = thresholds, torch.arange(70) % 3 == 0, bases
    assert torch.equal(case.run(), words_of(y, *case.out))
    assert (buffers[0][:64] == 77).all() and (buffers[0][-64:] == 77).all()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_binary_values_on_thresholds_and_beyond(N, order):
    case = small_case(N=N, binary=True, zero=True, C=33, size=(5, 7))
    thresholds = case.tensors[3]
    values = torch.cat([thresholds, thresholds.new_tensor([[math.inf], [-math.inf], [-0.0]]).expand(3, 33)])
    index = torch.randint(len(values), case.x.shape, generator=torch.Generator().manual_seed(N))
    x = values[index, torch.arange(33)[:, None, None]].contiguous(memory_format=order)
    assert_right(case, x)
    words = words_of(x, *case.tensors[3:5], N)
    assert torch.equal(words, abcnets._pack_words(torch.stack(abcnets._encoded(
        [(x >= t[:, None, None]).movedim(1, -1) ^ case.tensors[4] for t in thresholds], N))))  # fmt: skip
    assert torch.equal(case.run(words), case.run(x))


def test_the_level_of_zero_is_taken_inside_the_image_alone():
    """Zeros in, whose level is taken away, give the bias everywhere, whatever the padding."""
    for groups in (1, 5):
        case = small_case(C=70, O=40, groups=groups, N=3, binary=True, zero=True, padding=(2, 1, 0, 3), stride=(2, 1))
        bits, alphas, betas, thresholds, flips, bias, _ = case.tensors
        thresholds[:] = torch.tensor([-2.0, -1, 0, 1, 2, 3, 4])[:, None]  # 0 reaches three of seven: bits 0 1 1
        level = betas @ torch.tensor([-1.0, 1, 1])
        case.tensors = bits, alphas, betas, thresholds, torch.zeros_like(flips), bias, level
        case.x = torch.zeros_like(case.x)
        y = case.run()
        torch.testing.assert_close(y, bias[:, None, None].expand_as(y), rtol=0, atol=1e-3)
        assert_right(case, result=cpu_scalar.packed_conv(case.x, *case.arguments))


def test_thresholds_of_no_code():
    case = small_case(N=3)
    bits, alphas, betas, _, flips, bias, zero = case.tensors
    for T in (1, 2, 4, 6, 8):
        case.tensors = bits, alphas, betas, torch.zeros(T, case.channels), flips, bias, zero
        with pytest.raises(ValueError, match=f"3 bases have 3 thresholds or, in the binary code, 7; got {T}"):
            case.run()
    case = small_case(N=3)
    case.out = torch.zeros(4, 40), torch.zeros(40, dtype=torch.bool), 2
    with pytest.raises(ValueError, match="2 bases have 2 thresholds or, in the binary code, 3; got 4"):
        case.run()
    case.out = None, None, 0
    case.tensors = *case.tensors[:6], torch.zeros(1)
    with pytest.raises(ValueError, match="zero"):
        case.run()


def in_integers(case) -> Case:
    """The case with numbers whose sums float32 holds exactly, and equal betas: one wrong count is a difference."""
    bits, alphas, betas, thresholds, flips, bias, zero = case.tensors
    whole = (None if t is None else (2 * t).round() for t in (bias, zero))
    case.tensors = bits, (2 * alphas).round(), torch.full_like(betas, 0.5), thresholds, flips, *whole
    return case


@examples(100)
@given(st.data(), cases(most_bases=3), st.integers(1, 2))
def test_uniform_levels(data, case, threads):
    torch.set_num_threads(threads)
    in_integers(case)
    x, N = data.draw(in_memory(case)), len(case.tensors[2])
    y = case.run(x)
    assert torch.equal(y.double(), case.expect(x))
    words = words_of(x, *case.tensors[3:5])
    assert torch.equal(case.run(words), y)
    some = torch.Generator().manual_seed(0)  # bases that are not nested, and in no order
    words = abcnets.pack_bits(torch.rand(N, *words.shape[:-2], case.channels, generator=some) < 0.5, torch.int64)
    words = words.movedim(0, -1).contiguous()
    y = case.run(words)
    assert torch.equal(y, case.expect(words))
    bases = data.draw(st.integers(1, 3))
    thresholds = thresholds_of(bases, y.shape[1], some, data.draw(st.booleans())) * y.std(correction=0)
    case.out = thresholds, torch.rand(y.shape[1], generator=some) < 0.5, bases
    assert torch.equal(case.run(words), words_of(y, *case.out))


@examples(40)
@given(st.data(), cases(binary=True, most_bases=3, most_channels=130), st.integers(1, 2))
def test_equal_betas_of_the_binary_code(data, case, threads):
    torch.set_num_threads(threads)
    in_integers(case)
    x = data.draw(in_memory(case))
    assert torch.equal(case.run(x).double(), case.expect(x))
    assert torch.equal(case.run(words_of(x, *case.tensors[3:5], len(case.tensors[2]))), case.run(x))


@pytest.mark.parametrize("N, groups", [(2, 1), (2, 2), (3, 2), (4, 1)])
def test_betas_that_become_equal_and_a_nan(N, groups):
    case = small_case(N=N, groups=groups, B=5, zero=True)
    for betas in (torch.rand(N) + 0.1, torch.full((N,), 0.3), torch.rand(N) + 0.1):
        case.tensors[2].copy_(betas)
        assert_right(case)
    case.tensors[2].fill_(0.3)
    case.x[2, 3, 4, 5] = math.nan
    torch.testing.assert_close(case.run(), abcnets.packed_conv(case.x, *case.arguments), equal_nan=True)


def test_forms_of_uniform_levels():
    """The algebra of layout.py, for every word of one bit."""
    for a, b, c, w in np.ndindex(2, 2, 2, 2):
        assert (a ^ w) + (b ^ w) == 2 * ((b ^ w) | (a ^ b)) - (a ^ b)
        assert (a ^ w) + (b ^ w) + (c ^ w) == 2 * ((a + b + c) // 2 ^ w) + (a ^ b ^ c ^ w)
        assert (a ^ w) + (a ^ c) == 2 * ((a ^ c) & 1 - (w ^ c)) + (w ^ c)
    for betas, masked in (([0.3, 0.3], False), ([1, 1, 1], False), ([1, 1, 1], True)):
        assert layout.counts_as_uniform(np.float32(betas), masked, 64)
        assert not layout.counts_as_uniform(np.float32(betas), masked, 63)  # would not pay
    others = ([0.3], False), ([0.3, 0.4], False), ([0.3, 0.3], True), ([1, 1, 2], False), ([1, 1, 1, 1], False)
    for betas, masked in others:
        assert not layout.counts_as_uniform(np.float32(betas), masked, 999)


@examples(50)
@given(st.data(), cases(most_bases=4), st.integers(1, 2), st.booleans(), st.sampled_from(HERE))
def test_two_weight_bases_of_one_scale_are_counted_once(data, case, threads, uniform, tile):
    torch.set_num_threads(threads)
    if uniform:
        in_integers(case)
    bits, alphas = (torch.cat([t[:1], t[-1:]]) for t in case.tensors[:2])
    bits[1] ^= bits[0].roll(1, 0)  # another one also where there was one; bits behind the last channel stay 0
    alphas[1] = alphas[0]
    case.tensors = bits, alphas, *case.tensors[2:]
    x = data.draw(in_memory(case))
    with counting(tile):
        assert layer_of(case).M == (2 if isinstance(layer_of(case).lanes, layout.LookUp) else 1)
        assert_right(case, x)
        alphas[0, -1] += 0.5
        assert layer_of(case).M == 2
        assert_right(case, x)


@pytest.mark.parametrize("N", [2, 3, 4])
@pytest.mark.parametrize("order", ["ascending", "none"])
def test_a_search_finds_what_comparisons_say(N, order):
    """In thresholds of a layer's own, in those of the next one, and among equal and infinite ones."""
    generator = torch.Generator().manual_seed(N)
    for seed in (1, 3):
        case = small_case(N=N, seed=seed, binary=True)
        thresholds, flips = thresholds_of(N, 40, generator, binary=True), torch.rand(40, generator=generator) < 0.5
        thresholds = falling(thresholds.round(decimals=1) * case.expect().std(), flips)
        if order == "none":
            case.tensors[3][:, 0] = torch.linspace(-1, 1, 2**N - 1).roll(1)
            thresholds[:, 3] = torch.linspace(-1, 1, 2**N - 1).roll(1)
        y = case.run()
        assert_right(case)
        case.out = thresholds.float(), flips, N
        layer = layer_of(case)
        assert layer.searched == layer.out_searched == (order == "ascending")
        reached = y.movedim(1, -1)[None] >= case.out[0].view(2**N - 1, *[1] * (y.dim() - 1), -1)
        bases = [reached[2**k - 1 :: 2**k].sum(0) % 2 == 1 for k in reversed(range(N))]  # the XOR of every 2^k-th
        expected = abcnets.pack_bits(torch.stack(bases) != flips, torch.int64).movedim(0, -1)
        assert torch.equal(case.run(), expected)


@examples(60)
@given(st.data(), cases(), st.integers(1, 2), st.booleans())
def test_lanes_of_any_width_count_the_same(data, case, threads, words_in):
    torch.set_num_threads(threads)
    x = words_of(case.x, *case.tensors[3:5]) if words_in else data.draw(in_memory(case))
    y, results = case.run(x), []
    thresholds, flips = torch.zeros(2, y.shape[1]), torch.arange(y.shape[1]) % 3 == 0
    masks = layout.channel_masks(y.shape[1], case.channels, case.groups)
    for lanes in layout.LANES:
        if lanes.bits in cpu_system.popcount_lanes() and lanes.cost(masks) < math.inf:
            case.tensors = tuple(t if t is None else t.clone() for t in case.tensors)  # no table is found
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(layout, "choose_lanes", lambda *_, lanes=lanes: lanes)
                case.out = (None, None, 0)
                results.append(case.run(x))
                case.out = (thresholds, flips, 2)
                assert torch.equal(case.run(x), words_of(y, *case.out))
    assert results and all(torch.equal(result, y) for result in results)


@examples(90)
@given(st.data(), cases(most_bases=3), st.integers(1, 2), st.booleans(), st.booleans(), st.sampled_from(HERE))
def test_every_tile_counts_the_same(data, case, threads, words_in, uniform, tile):
    """To the bit, and where the scalar engine's sums are exact, as that one."""
    torch.set_num_threads(threads)
    if uniform:
        in_integers(case)
    x = words_of(case.x, *case.tensors[3:5]) if words_in else data.draw(in_memory(case))
    y, O = case.run(x), case.tensors[1].shape[1]
    with counting(tile):
        case.tensors = tuple(t if t is None else t.clone() for t in case.tensors)  # no table is found
        assert torch.equal(case.run(x), y)
        generator = torch.Generator().manual_seed(O)
        thresholds = thresholds_of(2, O, generator, binary=uniform) * y.std(correction=0)
        case.out = thresholds, torch.rand(O, generator=generator) < 0.5, 2
        assert torch.equal(case.run(x), words_of(y, *case.out))
    if uniform and y.numel() < 2000:
        case.out = None, None, 0
        assert torch.equal(cpu_scalar.packed_conv(x, *case.arguments), y)


@pytest.mark.parametrize("tile", [tile for tile in HERE if tile.endswith("look-up")])
@pytest.mark.parametrize("groups, C, O, looks_up", [
    (1, 3, 5, True), (2, 8, 70, True), (3, 36, 33, True), (7, 84, 70, True), (7, 7 * 64, 140, True),
    (16, 256, 32, True), (2, 6, 8, False), (5, 70, 40, False), (72, 72, 72, False),
])  # fmt: skip
def test_look_ups_of_groups_that_begin_with_a_nibble(tile, groups, C, O, looks_up):
    for N, uniform in ((1, False), (2, False), (2, True), (3, True), (3, False)):
        case = small_case(groups=groups, C=C, O=O, N=N, size=(4, 5))
        if uniform:
            in_integers(case)
        y = case.run()
        with counting(tile):
            case.tensors = tuple(t if t is None else t.clone() for t in case.tensors)
            assert torch.equal(case.run(), y)
            lanes = layer_of(case).lanes
            across_words = (C, N, uniform) == (84, 3, False)  # the groups of an AVX2 tile, which is narrower
            assert isinstance(lanes, layout.LookUp) == (looks_up and not (across_words and tile == "AVX2 look-up"))


@pytest.mark.parametrize("tile", [tile for tile in HERE if tile.endswith("look-up")])
@pytest.mark.parametrize("N, uniform", [(1, False), (2, False), (2, True), (3, False), (3, True)])
@pytest.mark.parametrize("longest", [True, False])
def test_counters_of_a_look_up_reach_their_ends(tile, N, uniform, longest):
    """Everything differs, or nothing does, in windows that just fit, and those that do not go elsewhere."""
    taps = ((1 << 16) - 1) // (8 * (N if uniform else 1)) + (0 if longest else 1)
    case = small_case(C=8, O=9, B=1, M=1, N=N, size=(taps + 1,), kernel=(taps,), padding=(0, 0), bias=False)
    bits, alphas, betas, thresholds, flips, *rest = case.tensors
    betas = torch.full((N,), 0.5) if uniform else 2.0 ** torch.arange(N)
    with counting(tile):
        for filling in (0, 255):
            tensors = torch.full_like(bits, filling), torch.ones_like(alphas), betas.clone()
            case.tensors = *tensors, torch.zeros_like(thresholds), torch.zeros_like(flips), *rest
            for sign in (1, -1):
                y = case.run(torch.full_like(case.x, sign))
                assert torch.equal(y, torch.full((1, 9, 2), (1 if filling else -1) * sign * 8.0 * taps * betas.sum()))
        assert isinstance(layer_of(case).lanes, layout.LookUp) == longest


@pytest.mark.parametrize("weights", [(1,), (1, 16), (1, 1), (2, 1)])
def test_tables_of_look_ups(weights):
    assert weights in [layout.table_weights(N, uniform) for N, uniform in ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1))]
    tables = layout.look_up_tables(weights)
    assert tables.shape == (16 ** len(weights), 16) and tables.dtype == np.uint8
    for index, w in np.ndindex(tables.shape):
        expected = sum(weight * (index >> 4 * i & 15 ^ w).bit_count() for i, weight in enumerate(weights))
        assert tables[index, w] == expected


@pytest.mark.parametrize("processor", assembly.PROCESSORS)
@pytest.mark.parametrize("N, uniform", [(1, False), (2, False), (2, True), (3, True)])
def test_on_arm_a_step_is_three_instructions_and_nothing_spills(processor, N, uniform):
    """Compiled for ARM here, not run."""
    for lanes in (assembly.DOTS, assembly.BYTES) if assembly.PROCESSORS[processor] else (assembly.BYTES,):
        text, pixels = assembly.tile_assembly(lanes, N, uniform, processor)
        loop = assembly.inner_loop(text)
        names = collections.Counter(line.split()[0] for line in loop)
        vectors = collections.Counter(line.split()[0] for line in loop if re.search(r"\bv\d+\.", line))
        steps = pixels * cpu_vector.counters_of(N, uniform) * lanes.registers
        assert names["cnt"] == names["eor"] == steps and names["orr"] == steps * (uniform and N == 2)
        assert vectors["udot" if lanes is assembly.DOTS else "add"] == steps
        assert assembly.spills(loop) == 0 and len(loop) < (6 if N == 2 and uniform else 4.5) * steps


def test_without_an_emulator_for_arm_one_sentence_says_what_to_install(monkeypatch, refused):
    monkeypatch.setattr(assembly.shutil, "which", lambda name: None)
    assert "apt install qemu-user" in refused(assembly.main, "--run")
    assert "llvm-mca" in refused(assembly.main, "--write")


@pytest.mark.parametrize("codes", [{}, {"code": "binary"}, {"code": ("binary", "uniform")}, {"zero": True},
                                   {"code": ("uniform", "binary")}])  # fmt: skip
def test_a_whole_network_with_every_tile(codes):
    torch.manual_seed(0)
    bases = dict(weight_bases=2, activation_bases=2, active=True)
    layers = [abcnets.ABCConv2d(*sizes, 3, padding=1, **bases, **codes) for sizes in ((20, 40), (40, 70))]
    norms = [nn.BatchNorm2d(layer.out_channels) for layer in layers]
    parts = [[layer, norm, nn.MaxPool2d(2), nn.ReLU()] for layer, norm in zip(layers, norms)]
    last = abcnets.ABCLinear(70 * 4, 40, **bases, **codes)  # 80 uses of a word: uniform levels pay for every tile
    model = nn.Sequential(*parts[0], *parts[1], nn.Flatten(), last).eval()
    x, results = torch.randn(3, 20, 8, 8), []
    abcnets.calibrate(model, x)
    for tile in HERE:
        with counting(tile):
            packed = abcnets.pack(model, engine="bits")
            results.append((packed(x), abcnets.fuse(packed)(x)))
    assert len(results) == len(HERE)
    for tile, result in zip(HERE, results):
        if codes.get("code") == ("uniform", "binary") and tile.endswith("look-up"):  # rounds two sums, not one
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
        else:
            assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    "C, O, groups, taps, lanes",
    [
        (128, 128, 1, 9, (64, 2)), (128, 128, 1, 1, (32, 1)), (64, 64, 1, 9, (32, 1)), (32, 32, 1, 9, (32, 1)),
        (16, 32, 1, 9, (16, 1, 512, 2)), (16, 16, 1, 9, (32, 1)), (16, 32, 1, 4095, (16, 1, 512, 2)),
        (16, 32, 1, 4096, (32, 1)),
        (256, 256, 16, 9, (32, 1)), (80, 64, 2, 9, (64, 2)),  # 40 channels from the 41st on: over the end of a word
    ],
)  # fmt: skip
def test_lanes_are_as_wide_as_the_layer_is_deep(C, O, groups, taps, lanes):
    masks = layout.channel_masks(O, C, groups)
    assert layout.choose_lanes(masks, taps, (64, 32, 16)) == layout.Lanes(*lanes)
    assert layout.choose_lanes(masks, taps, (64,)) == layout.Lanes(64, 2)


def test_counters_of_16_bits_reach_their_ends():
    case = small_case(C=16, O=32, B=1, M=1, N=1, size=(4095,), kernel=(4095,), padding=(0, 0), bias=False)
    bits, alphas, betas, thresholds, flips, *rest = case.tensors
    for filling in (0, 255):
        case.tensors = torch.full_like(bits, filling), *map(torch.ones_like, (alphas, betas)), thresholds, flips, *rest
        for x in (torch.full_like(case.x, math.inf), torch.full_like(case.x, -math.inf)):
            thresholds[:], flips[:] = 0, False
            product = (1 if filling else -1) * (1 if x[0, 0, 0] > 0 else -1)
            assert torch.equal(case.run(x), torch.full((1, 32, 1), 16.0 * 4095 * product))


@examples(12)
@given(cases())
def test_scalar_rung(case):
    assert_right(case, result=cpu_scalar.packed_conv(case.x, *case.arguments))
    words = words_of(case.x, case.tensors[3], case.tensors[4])
    O = case.tensors[1].shape[1]
    case.out = (torch.full((2, O), 0.123), torch.arange(O) % 3 == 0, 2)  # not 0, the sum of a window of padding
    result, vector = cpu_scalar.packed_conv(words, *case.arguments), case.run(words)
    assert result.shape == vector.shape
    differing = np.bitwise_count((result ^ vector).numpy()).sum()  # sums that rounding put on the other side
    assert differing <= 2


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("groups", [4, 24, 72])
def test_groups_and_depthwise(groups):
    case = small_case(C=72, O=144, groups=groups)
    assert_right(case)
    case.out = (torch.zeros(1, 144), torch.zeros(144, dtype=torch.bool), 1)
    assert torch.equal(case.run(), words_of(small_case(C=72, O=144, groups=groups).run(), *case.out))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats(dtype):
    case = small_case()
    x = case.x.to(dtype)
    result = case.run(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, abcnets.packed_conv(x, *case.arguments))


@pytest.mark.parametrize("N, binary", [(11, False), (5, True)])
def test_more_bases_than_the_tiles_know(N, binary):
    case = small_case(N=N, binary=binary)
    assert_right(case)
    words = words_of(case.x, case.tensors[3], case.tensors[4], N)
    torch.testing.assert_close(case.run(words), case.run(), atol=1e-3, rtol=0)


def test_float_activations():
    case = small_case(N=1)
    bits, alphas, _, _, flips, bias, zero = case.tensors
    case.tensors = (bits, alphas, torch.empty(0), torch.empty(0, case.channels), flips, bias, zero)
    case.x = torch.randn_like(case.x)
    assert torch.equal(case.run(), abcnets.packed_conv(case.x, *case.arguments))


def test_empty_batch():
    case = small_case(B=0)
    assert case.run().shape == (0, 40, 9, 7)
    case.out = (torch.zeros(3, 40), torch.zeros(40, dtype=torch.bool), 3)
    assert case.run().shape == (0, 9, 7, 1, 3)
    case.out = (torch.zeros(3, 40), torch.zeros(40, dtype=torch.bool), 2)
    assert case.run().shape == (0, 9, 7, 1, 2)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(9, 7), (2, 3)])
def test_nan(order, size):
    case = small_case(size=size)
    x = case.x.clone(memory_format=order)
    x[1, -1, -1, 1] = float("nan")
    result, expected = case.run(x), abcnets.packed_conv(x, *case.arguments)
    assert result.isnan().any()
    torch.testing.assert_close(result, expected, equal_nan=True)
    case.out = (torch.zeros(1, 40), torch.zeros(40, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match="NaN"):
        case.run(x)
    assert_right(small_case(size=size))  # and nothing lingers


def test_infinite_scales():
    case = small_case()
    case.tensors[1][0, 3] = float("inf")
    torch.testing.assert_close(
        case.run(), abcnets.packed_conv(case.x, *case.arguments), equal_nan=True
    )


def test_a_kernel_larger_than_its_image():
    case = small_case(size=(2, 2), kernel=(5, 5))
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)kernel"):
        case.run()


def test_wrong_shapes():
    case = small_case()
    with pytest.raises((ValueError, RuntimeError)):
        case.run(case.x[:, 1:])
    with pytest.raises(ValueError, match="words"):
        case.run(torch.zeros(2, 9, 7, 1, 2, dtype=torch.int64))
    bits, alphas, betas, thresholds, *rest = case.tensors
    case.tensors = (bits, alphas, betas, thresholds[:1], *rest)
    with pytest.raises(ValueError, match="thresholds"):
        case.run()


# --------------------------------------------------------------------------- threads, caches, processes


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("B", [1, 2, 3, 9])
def test_the_number_of_threads_changes_nothing(B):
    case = small_case(B=B, size=(23, 17))
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(case.run())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_calls(threads):
    torch.set_num_threads(threads)
    case = small_case(B=4, size=(20, 20))
    inputs = [torch.randn_like(case.x) for _ in range(6)]
    expected = [case.run(x) for x in inputs]
    wrong = []

    def work(x, y):
        torch.set_num_threads(threads)
        for _ in range(60):
            if not torch.equal(case.run(x), y):
                wrong.append(x)

    at_once(work, zip(inputs, expected))
    assert not wrong


@pytest.mark.usefixtures("tile")
def test_changed_tensors_are_noticed():
    case = small_case()
    before = case.run()
    case.tensors[1].mul_(2)
    assert_right(case)
    case.tensors[3].add_(0.25)
    case.tensors[0].bitwise_not_()
    spare = case.channels % 8
    case.tensors[0][..., -1] &= (1 << spare) - 1
    assert_right(case)
    assert not torch.allclose(before, case.run())


def test_caches_are_bounded_and_weak():
    case = small_case()
    for width in range(3, 3 + 2 * cpu_engine.PLANS_PER_LAYER):
        case.run(case.x[:, :, :, :3].repeat(1, 1, 1, 20)[..., :width])
    layer = cpu_engine._layers.get((*case.tensors, None, None), case.channels, case.groups, 0)
    assert len(layer.plans) == cpu_engine.PLANS_PER_LAYER
    count, layer = len(cpu_engine._layers), weakref.ref(layer)
    gc.disable()  # nothing waits for the cyclic collector
    try:
        case.tensors = None
        assert len(cpu_engine._layers) == count - 1 and layer() is None
    finally:
        gc.enable()


FORKS = """
import os, signal, torch
import tests.test_kernels_cpu as t
torch.set_num_threads(2)
case = t.small_case(B=8)
expected = case.run()
if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(case.run(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
"""

WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
import torch, abcnets
from abcnets import ABCLinear
layer = ABCLinear(70, 9, active=True)
packed, x = abcnets.pack(layer), torch.randn(4, 70)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert torch.allclose(packed(x), layer(x), atol=1e-4) and torch.equal(packed(x), packed(x))
(warning,) = caught
assert "float convolutions on cpu" in str(warning.message) and "pip install" in str(warning.message)
assert abcnets.engines()["cpu"].startswith("float convolutions: ") and not packed.runs_bits()
"""

WITHOUT_A_VECTOR_POPCOUNT = """
import os, platform, tempfile
if platform.machine() in ("x86_64", "AMD64"):
    os.environ["NUMBA_CPU_NAME"] = "haswell"
    os.environ["NUMBA_CPU_FEATURES"] = "+avx2,+fma,+bmi,+bmi2,+popcnt,+lzcnt,+f16c"
with tempfile.TemporaryDirectory() as folder:
    os.environ["NUMBA_CACHE_DIR"] = folder
    import torch
    import tests.test_kernels_cpu as t
    from kernels.cpu import lookup
    assert platform.machine() not in ("x86_64", "AMD64") or t.abcnets.engines()["cpu"] == "numba (AVX2 look-up)"
    for C, groups in ((16, 1), (70, 1), (32, 2)):
        case = t.small_case(C=C, groups=groups, N=2)
        t.assert_right(case)
        t.in_integers(case)
        assert torch.equal(case.run().double(), case.expect())
        assert torch.equal(t.cpu_scalar.packed_conv(case.x, *case.arguments), case.run())
    if isinstance(lanes := t.layer_of(case).lanes, t.layout.LookUp):
        assembly = lookup.block_kernel(2, 1, lanes)._library.get_asm_str()
        loop = max(assembly.split(".LBB"), key=lambda block: block.count("vpshufb"))
        pixels = lookup.tile_pixels(2, 1, 32, lanes.registers)
        assert loop.count("vpshufb") == loop.count("vpaddb") == pixels * lanes.registers * lanes.step
        assert not any("ymm" in line and "rsp" in line for line in loop.splitlines()) and "zmm" not in assembly
""" + FORKS

IMPORT_LOADS_NO_NUMBA = """
import sys, abcnets
assert not {"numba", "abcnets_kernels", "kernels"} & set(sys.modules)
assert abcnets.engines()["cpu"].startswith("numba (")
"""


@pytest.mark.parametrize("script", [FORKS, WITHOUT_NUMBA, WITHOUT_A_VECTOR_POPCOUNT, IMPORT_LOADS_NO_NUMBA])
def test_in_a_fresh_process(script, pytestconfig):
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_registered_for_the_cpu():
    assert abcnets.engines()["cpu"] == f"numba ({cpu_system.tile()})"
    case = small_case()
    assert torch.equal(torch.ops.abcnets.packed_conv(case.x, *case.arguments), case.run())
    assert cpu_system.thread_count() >= 1


# --------------------------------------------------------------------------- max-pooling


@examples(50)
@given(st.data(), st.integers(1, 3), st.integers(1, 200), st.integers(1, 4), st.booleans(), st.integers(1, 2))
def test_max_pool(data, dimensions, channels, bases, ceil_mode, threads):
    torch.set_num_threads(threads)

    def per_dimension(low, high):
        return list(data.draw(st.tuples(*[st.integers(low, high)] * dimensions)))

    kernel, stride = per_dimension(1, 3), per_dimension(1, 3)
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    size = per_dimension(3, (0, 30, 9, 5)[dimensions])
    x = torch.randn(2, channels, *size)
    thresholds, flips = torch.randn(bases, channels), torch.rand(channels) < 0.5
    words = words_of(x, thresholds, flips)
    arguments = (flips, channels, kernel, stride, padding, [1] * dimensions, ceil_mode, False)
    pooled = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[dimensions - 1](
        x, kernel, stride, padding, 1, ceil_mode
    )
    result = cpu_engine.packed_max_pool(words, *arguments)
    assert torch.equal(result, words_of(pooled, thresholds, flips))
    assert torch.equal(result, abcnets.packed_max_pool(words, *arguments))
    thresholds, arguments = torch.randn(2**bases - 1, channels), (*arguments[:-1], True)
    words = words_of(x, thresholds, flips, bases)
    result = cpu_engine.packed_max_pool(words, *arguments)
    assert torch.equal(result, words_of(pooled, thresholds, flips, bases))
    assert torch.equal(result, abcnets.packed_max_pool(words, *arguments))


def test_max_pool_of_nothing():
    words, flips = torch.zeros(0, 6, 6, 1, 2, dtype=torch.int64), torch.zeros(5, dtype=torch.bool)
    arguments = (words, flips, 5, [2, 2], [2, 2], [0, 0], [1, 1], False, True)
    assert cpu_engine.packed_max_pool(*arguments).shape == (0, 3, 3, 1, 2)


# --------------------------------------------------------------------------- layouts


@examples(60)
@given(st.lists(st.booleans(), min_size=1, max_size=90))
def test_chunks_cover_what_is_read(read):
    pixels, count = np.flatnonzero(read), len(read)
    starts = layout.chunk_starts(pixels, count, 16)
    covered = np.zeros(max(count, 16), bool)
    for start in starts:
        assert 0 <= start <= max(count - 16, 0)
        covered[start : start + 16] = True
    assert covered[pixels].all()


def test_border_classes_of_a_padded_kernel():
    geometry = layout.Geometry.of((5, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    outside, class_of_pixel = geometry.border_classes
    assert outside.shape == (9, 9) and len(np.unique(class_of_pixel)) == 9
    corner = outside[class_of_pixel[0]].reshape(3, 3)
    assert corner[0].all() and corner[:, 0].all() and not corner[1:, 1:].any()


@examples(100)
@given(st.data(), st.integers(1, 3), st.booleans())
def test_a_pooled_image_has_the_size_that_torch_says(data, dimensions, ceil_mode):
    size, kernel, stride, dilation = (
        data.draw(st.lists(st.integers(1, largest), min_size=dimensions, max_size=dimensions))
        for largest in (12, 4, 4, 2)
    )
    size = [max(s, d * (k - 1) + 1) for s, k, d in zip(size, kernel, dilation)]
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    sizes = kernel, stride, padding, dilation, ceil_mode
    pool = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[dimensions - 1]
    output = layout.pool_output(size, *sizes)
    assert output == pool(torch.zeros(1, 1, *size), *sizes).shape[2:]
    words = torch.zeros(1, *size, 1, 1, dtype=torch.int64, device="meta")
    assert torch.ops.abcnets.packed_max_pool(words, words, 1, *sizes, False).shape == (1, *output, 1, 1)


def test_word_ranges_follow_groups():
    masks = layout.channel_masks(256, 256, 256)  # depthwise
    first, width = layout.word_ranges(masks)
    assert width == 1 and first.tolist() == [block // 4 for block in range(16)]
