"""Is it right? Random layers, the plain operators in float64 beside them, and what each kernel file's own main runs.

    problem_in_floats(operator), ...      what is wrong with an implementation of abcnets::packed_conv, or None
    cpu_rung(...), cuda_rung(...), ...    check, then time: `python -m kernels.cpu.scalar`

A CUDA rung convolves words; `as_operator` makes it look like the operator. In Numba's CUDA simulator the layers are
tiny and nothing is timed.
"""

import functools
import itertools
import math
import sys
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

import abcnets

from . import registry
from .clock import SIMULATED, interleaved_medians, microseconds
from .command import Refused

GPU = "cpu" if SIMULATED else "cuda"  # where the CUDA kernels' tensors lie
NO_GPU = "No GPU here, so nothing is measured; with NUMBA_ENABLE_CUDASIM=1 in front a rung is checked in a simulator."
WRONG = 3  # the exit code of a kernel file that computes something, but not the right thing


def need_engine(device: str) -> None:
    """Raise Refused where packed layers do not run bits: there is nothing to measure then."""
    runs = abcnets.engines()[device]
    if runs.startswith("float"):
        raise Refused(f"nothing to measure: packed layers run as {runs}")


# --------------------------------------------------------------------------- convolutions and random layers


@dataclass(frozen=True)
class Shape:
    """A convolution: B images of C channels, `size` x `size`, to O channels by a K x K kernel."""

    C: int
    O: int
    K: int
    size: int
    padding: int
    stride: int = 1
    B: int = 1

    @property
    def output(self) -> int:
        return (self.size + 2 * self.padding - self.K) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds of the float convolution; M * N times as many bit products."""
        return self.B * self.O * self.output**2 * self.C * self.K**2

    def layer(self, M, N, **others) -> tuple:
        """random_layer's arguments for abcnets::packed_conv, for one image, which stands in for a batch."""
        sizes, kernel, stride = (self.size,) * 2, (self.K,) * 2, (self.stride,) * 2
        return random_layer(1, self.C, sizes, self.O, kernel, stride, (self.padding,) * 4, M, N, **others)

    def images(self, seed=0, device="cpu") -> torch.Tensor:
        return torch.randn(self.B, self.C, self.size, self.size, generator=_seeded(seed, device), device=device)

    def words(self, bases, seed=0, device="cpu") -> torch.Tensor:
        """What a layer with N = bases packs images into."""
        shape = self.B, self.size, self.size, -(-self.C // 64), bases
        words = torch.randint(-(2**63), 2**63 - 1, shape, generator=_seeded(seed, device), device=device)
        if self.C % 64:
            words[..., -1, :] &= (1 << self.C % 64) - 1
        return words

    def __str__(self) -> str:
        stride = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.C}→{self.O} {self.K}x{self.K}{stride}, {self.B} x {self.size}x{self.size}"


BASES = (1, 2, 3, 5)
FIRST_AUTHOR = [Shape(128, 128, 3, size, 0, B=32) for size in (8, 16, 32, 50)]
RESNET_18 = [
    Shape(64, 64, 3, 56, 1), Shape(128, 128, 3, 28, 1), Shape(256, 256, 3, 14, 1), Shape(512, 512, 3, 7, 1),
    Shape(64, 128, 3, 56, 1, 2), Shape(64, 128, 1, 56, 0, 2), Shape(128, 256, 3, 28, 1, 2),
    Shape(256, 512, 3, 14, 1, 2), Shape(128, 256, 1, 28, 0, 2), Shape(256, 512, 1, 14, 0, 2),
]  # fmt: skip
RUNG_SHAPE = Shape(128, 128, 3, 28, 1)  # what every rung is timed on: one image on a CPU, 32 on a GPU


def _seeded(seed, device="cpu"):
    return torch.Generator(device=device).manual_seed(seed)


def random_layer(
    B, C, sizes, O, kernel, stride, padding, M, N, dilation=None, out_bases=0, dtype=torch.float32, device="cpu",
    binary=False, out_binary=False, zero=False,
):  # fmt: skip
    """abcnets::packed_conv's arguments for a random layer and input.

    Binary are the activations, those that come in and those that go out; zero: one that stays zero.
    """
    g, T, out_T = _seeded(0), 2**N - 1 if binary else N, 2**out_bases - 1 if out_binary else out_bases
    bits = abcnets.pack_bits(torch.rand(M, O, *kernel, C, generator=g) < 0.5, torch.uint8)
    tensors = [
        torch.randn(B, C, *sizes, generator=g).to(dtype), bits, torch.rand(M, O, generator=g) + 0.1,
        torch.rand(N, generator=g) + 0.1, torch.randn(T, C, generator=g),
        torch.rand(C, generator=g) < 0.3, torch.randn(O, generator=g), torch.tensor(0.7) if zero else None,
    ]  # fmt: skip
    out = [None, None]
    if out_bases:
        spread = math.sqrt(C * math.prod(kernel) * M * N) / 2
        out = [torch.randn(out_T, O, generator=g) * spread, torch.rand(O, generator=g) < 0.3]
    if binary:
        tensors[4] = tensors[4].sort(0).values
    if out_binary:
        out[0] = out[0].sort(0).values
    tensors, out = ([None if t is None else t.to(device) for t in ts] for ts in (tensors, out))
    return (*tensors, C, list(stride), list(padding), list(dilation or [1] * len(sizes)), 1, *out, out_bases or 0)


# --------------------------------------------------------------------------- the reference


def reference(arguments) -> torch.Tensor:
    """The operator in float64 on the CPU (words stay words)."""
    cpu = [t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments]
    if cpu[0].dtype != torch.int64:
        cpu[0] = cpu[0].double()
    return abcnets.packed_conv(*cpu)


def error_of(y, expected) -> float:
    """|y - expected| / |expected|; infinite where one is NaN and the other is not."""
    y, expected = y.double().cpu(), expected.double()
    if not torch.equal(y.isnan(), expected.isnan()):
        return math.inf
    return ((y - expected).nan_to_num().norm() / expected.nan_to_num().norm()).item()


def bits_of(x, thresholds, flips, bases) -> torch.Tensor:
    """What x (B, C, *S) is packed to, as booleans (N, B, *S, C): comparisons, or the bits of how many are true."""
    reached = x.movedim(1, -1)[None] >= thresholds.view(len(thresholds), *[1] * (x.ndim - 1), -1)
    if len(thresholds) != bases:
        count = reached.sum(0)
        reached = torch.stack([count >> k & 1 == 1 for k in reversed(range(bases))])
    return reached != flips


def wrong_bits(words, arguments) -> int:
    """How many output bits differ where y is not within rounding of its threshold."""
    y, (thresholds, flips) = reference(without_bits_out(arguments)), (t.cpu() for t in arguments[-3:-1])
    got = abcnets.unpack_bits(words.cpu().movedim(-1, 0), 64 * words.shape[-2])
    got, spare = got[..., : y.shape[1]], got[..., y.shape[1] :]
    rounding = 1e-4 * y.abs().max()
    below, above = (bits_of(y + error, thresholds, flips, arguments[-1]) for error in (-rounding, rounding))
    return int(((got != below) & (got != above)).sum() + spare.sum())


def without_bits_out(arguments) -> tuple:
    return *arguments[:-3], None, None, 0


# --------------------------------------------------------------------------- what is wrong

# Sizes that fill no tile, channels that fill no word or spill into one more, every kind of border.
SMALL = (
    dict(B=2, C=33, sizes=(4, 5), O=5, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=2, N=1),
    dict(
        B=1, C=70, sizes=(5, 4), O=40, kernel=(3, 2), stride=(2, 1), padding=(1, 0, 0, 1), M=1, N=2, dilation=(1, 2),
        binary=True, zero=True,
    ),
)  # fmt: skip
LARGE = (
    dict(B=2, C=33, sizes=(7, 5), O=35, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=2, N=3),
    dict(B=3, C=64, sizes=(9, 6), O=64, kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), M=3, N=1, zero=True),
    dict(B=1, C=130, sizes=(5, 8), O=200, kernel=(1, 1), stride=(2, 1), padding=(0, 0, 0, 0), M=1, N=2),
    dict(B=2, C=96, sizes=(11, 9), O=70, kernel=(3, 2), stride=(1, 2), padding=(2, 0, 1, 3), M=2, N=2, dilation=(2, 3)),
    dict(
        B=2, C=70, sizes=(9, 11), O=40, kernel=(3, 2), stride=(2, 1), padding=(2, 0, 1, 3), M=2, N=2, dilation=(2, 3),
        binary=True, zero=True,
    ),
    dict(B=3, C=65, sizes=(5, 4), O=20, kernel=(2, 2), stride=(1, 1), padding=(0, 1, 1, 0), M=1, N=3, binary=True),
    dict(B=5, C=256, sizes=(14, 14), O=256, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=1, N=1),
    dict(B=7, C=512, sizes=(7, 7), O=512, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=3, N=3),
)  # fmt: skip
CASES = SMALL if SIMULATED else LARGE


def sentence(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def problem_in_floats(operator, device="cpu", cases=CASES, nan=True, dtype=torch.float32, tolerance=1e-5) -> str | None:
    for case in cases:
        arguments = random_layer(**case, dtype=dtype, device=device)
        if nan:
            arguments[0][0, case["C"] // 2, case["sizes"][0] // 2, case["sizes"][1] // 2] = math.nan
        y = operator(*arguments)
        if y is None:
            return f"no tile fits for {case}"
        error = error_of(y, reference(arguments))
        if y.dtype != dtype or not error < tolerance:
            return f"{y.dtype}, error {error:.1e} for {case}"


def problem_in_bits(operator, device="cpu", cases=CASES, codes=(False, True)) -> str | None:
    """In the codes that may go out: thermometer (False) and binary (True)."""
    for case, binary in itertools.product(cases, codes):
        arguments = random_layer(**case, out_bases=2, out_binary=binary, device=device)
        words = operator(*arguments)
        if words is None:
            return f"no tile fits for {case}"
        if wrong := wrong_bits(words, arguments):
            return f"{wrong} wrong bits for {case}" + " in the binary code" * binary


def problem_in_other_dimensions(operator, device="cpu") -> str | None:
    """Linear layers, one and three dimensions, bfloat16."""
    cases = (
        dict(B=9, C=70, sizes=(), O=10, kernel=(), stride=(), padding=(), M=2, N=2),
        dict(B=2, C=40, sizes=(9,), O=33, kernel=(5,), stride=(2,), padding=(2, 1), M=2, N=2),
        dict(B=2, C=40, sizes=(3, 4, 5), O=6, kernel=(3, 3, 3), stride=(1, 1, 1), padding=(1,) * 6, M=2, N=2),
        CASES[0],
    )
    return (
        problem_in_floats(operator, device, cases, nan=False)
        or problem_in_floats(operator, device, cases, nan=False, dtype=torch.bfloat16, tolerance=1e-2)
        or problem_in_bits(operator, device, cases)
    )


def problem_in_graph(operator) -> str | None:
    """A CUDA graph must compute anew when it is replayed on another input."""
    arguments = random_layer(**CASES[1], device=GPU)
    operator(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = operator(*arguments)
    arguments[0].copy_(torch.randn_like(arguments[0]))
    graph.replay()
    torch.cuda.synchronize()
    error = error_of(y, reference(arguments))
    return None if error < 1e-5 else f"error {error:.1e} after a replay on new input"


def problem_in_pool(packed_max_pool, device="cpu") -> str | None:
    words = torch.randint(-(2**63), 2**63 - 1, (2, 9, 7, 2, 3), generator=_seeded(0)).to(device)
    flips = (torch.rand(128, generator=_seeded(1)) < 0.5).to(device)
    windows = ([3, 3], [2, 2], [1, 1], [1, 1], False), ([2, 2], [2, 2], [0, 0], [1, 1], True)
    for sizes in ((*window, binary) for window in windows for binary in (False, True)):
        expected = abcnets.packed_max_pool(words, flips, 128, *sizes)
        if not torch.equal(packed_max_pool(words, flips, 128, *sizes), expected):
            return f"wrong words for {sizes}"


def problem_in_pack(pack) -> str | None:
    """CUDA's rung 1, (words, poison) of both memory orders."""
    for case in CASES[:5]:
        floats, _, _, betas, thresholds, flips, *_ = random_layer(**case, device=GPU)
        floats[0, 1, 2, 3] = math.nan
        bits = bits_of(floats, thresholds, flips, len(betas))
        expected = abcnets.pack_bits(bits, torch.int64).movedim(0, -1)
        for x in (floats, floats.to(memory_format=torch.channels_last)):
            words, poison = pack(x, thresholds, flips, len(betas))
            if not torch.equal(words, expected) or not torch.equal(poison.isnan(), x.isnan().any(1)):
                return f"wrong words for {case}"


def problem_in_float_conv(conv) -> str | None:
    """CUDA's rung 2, conv(layer, x, w) in floats."""
    for case in CASES[:4]:
        arguments = random_layer(**case, device=GPU)
        layer, x = layer_of(arguments), arguments[0]
        w = torch.randn(layer.O, layer.C, layer.KH, layer.KW, device=x.device)
        top, bottom, left, right = layer.padding
        padded = functional.pad(x.double(), (left, right, top, bottom))
        expected = functional.conv2d(padded, w.double(), layer.bias_O.double(), layer.stride, 0, layer.dilation)
        error = error_of(conv(layer, x, w), expected.cpu())
        if not error < 1e-5:
            return f"error {error:.1e} for {case}"


# --------------------------------------------------------------------------- CUDA's rungs as operators


def layer_of(arguments):
    """The operator's arguments as what the CUDA rungs take."""
    from .cuda.layer import Layer

    _, bits, alphas, betas, _, _, bias, zero, channels, stride, padding, dilation = arguments[:12]
    return Layer(bits, alphas, betas, bias, zero, channels, stride, padding, dilation)


def as_operator(conv):
    """A rung, conv(layer, words, poison) to floats or conv(layer, words, poison, thresholds, flips) to bits in the
    thermometer code, as the operator abcnets::packed_conv for float32 images."""
    from .cuda import rung1_pack, rung8_fused

    def operator(*arguments):
        words, poison = rung1_pack.pack(arguments[0], *arguments[4:6], len(arguments[3]))
        outputs = rung8_fused.pad_outputs(*arguments[-3:-1]) if arguments[-1] else ()
        return conv(layer_of(arguments), words, poison, *outputs)

    return operator


def cuda_layer(shape: Shape, bases: int) -> tuple:
    """(operator's arguments, layer, poison, (thresholds, flips)) of a random layer with M = N = bases, bits out too."""
    from .cuda import rung8_fused

    arguments = shape.layer(bases, bases, out_bases=bases, device=GPU)
    layer = layer_of(arguments)
    poison = layer.place(shape.size, shape.size).no_poison(shape.B)
    return arguments, layer, poison, rung8_fused.pad_outputs(*arguments[-3:-1])


# --------------------------------------------------------------------------- what a kernel file's main runs


def demonstrate(name: str, check, calls, device="cpu") -> None:
    """Say whether a kernel is right, then how fast it is: on one thread, or on the GPU.

    Args:
        check: check() says what is wrong, or None.
        calls: calls() returns {label: (function of one input, inputs, products, bytes)}, 0 for what doesn't matter.
    """
    if device == "cuda" and not (SIMULATED or torch.cuda.is_available()):
        return print(NO_GPU)
    abcnets.engines()  # loads them
    torch.set_num_threads(1)
    problem = check()
    print(f"{name}: {problem or 'right'}")
    if problem:
        sys.exit(WRONG)
    if device == "cuda" and SIMULATED:
        return
    calls, peak = calls(), math.inf
    if device == "cuda":
        times = {label: microseconds(call, inputs)[0] for label, (call, inputs, *_) in calls.items()}
    else:
        from .cpu.peak import peak as bound

        peak = bound()
        contenders = {label: functools.partial(call, inputs[0]) for label, (call, inputs, *_) in calls.items()}
        times = {label: 1e6 * seconds for label, seconds in interleaved_medians(contenders, 2.0).items()}
    for label, us in times.items():
        _, _, products, size = calls[label]
        speed = f", {products / us / 1e3:.1f} G products/s" if products else ""
        share = f", {1e6 * products / us / peak:.0%} of the bound" if products and peak < math.inf else ""
        print(f"{name}: {label}: {us:9.1f} us{speed}{share}" + (f", {size / us / 1e3:.1f} GB/s" if size else ""))


def cpu_rung(name: str, packed_conv, bases=(1, 2, 3), nan=True) -> None:
    """An implementation of abcnets::packed_conv on the CPU; timed from floats to floats."""

    def calls():
        x, found = RUNG_SHAPE.images(), {}
        for n in bases:
            layer = RUNG_SHAPE.layer(n, n)[1:]
            call = lambda x, layer=layer: packed_conv(x, *layer)  # noqa: E731
            found[f"{RUNG_SHAPE}, M = N = {n}"] = call, [x], RUNG_SHAPE.macs * n * n, 0
        return found

    demonstrate(name, lambda: problem_in_floats(packed_conv, nan=nan) or problem_in_bits(packed_conv), calls)


def cuda_rung(name: str, conv, bits=False) -> None:
    """A CUDA rung from words to floats, or to bits."""

    def calls():
        shape, found = replace(RUNG_SHAPE, B=32), {}
        for n in (1, 3):
            _, layer, poison, outputs = cuda_layer(shape, n)
            rest = poison, *(outputs if bits else ())
            words = [shape.words(n, seed, GPU) for seed in range(16)]
            call = lambda words, layer=layer, rest=rest: conv(layer, words, *rest)  # noqa: E731
            found[f"{shape}, M = N = {n}"] = call, words, shape.macs * n * n, 0
        return found

    problem = functools.partial(problem_in_bits, codes=(False,)) if bits else problem_in_floats
    demonstrate(name, lambda: problem(as_operator(conv), GPU), calls, "cuda")


def pool_rung(name: str, engine, device="cpu") -> None:
    """An engine's abcnets::packed_max_pool, beside the max-pooling of floats."""
    registry.implement(device, engine, abcnets)
    there = GPU if device == "cuda" else "cpu"

    def calls():
        shape, flips = Shape(64, 64, 3, 112, 1, stride=2, B=8), torch.arange(64, device=there) % 2 == 0
        images, words = zip(*((shape.images(i, there), shape.words(2, i, there)) for i in range(4)))
        sizes = [3, 3], [2, 2], [1, 1], [1, 1], False
        found = {f"float32, {shape}": (lambda x: functional.max_pool2d(x, 3, 2, 1), images, 0, 0)}
        for binary, code in enumerate(("thermometer", "binary")):
            call = lambda x, binary=bool(binary): engine.packed_max_pool(x, flips, 64, *sizes, binary)  # noqa: E731
            found[f"two bases of bits, {code}, {shape}"] = call, words, 0, 0
        return found

    demonstrate(name, lambda: problem_in_pool(engine.packed_max_pool, there), calls, device)
