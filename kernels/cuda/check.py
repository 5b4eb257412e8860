"""Is every rung right on this machine?  Random layers, the reference in float64, and what each file's main runs.

    check()             every rung and the operators, in words                   (bench runs it first)
    demonstrate(...)    one rung: check it, then time it on one layer            (python -m kernels.cuda.rung3_popcount)

In the simulator the layers are tiny and nothing is timed.
"""

import functools
import math
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional

import abcnets

from ..clock import microseconds
from . import (
    engine,
    rung1_pack,
    rung2_float,
    rung3_popcount,
    rung4_shared,
    rung5_bases,
    rung6_tensorcore,
    rung7_wgmma,
    rung8_fused,
)
from .layer import Layer
from .primitives import SIMULATED

DEVICE = "cpu" if SIMULATED else "cuda"
SEED = 0
NO_GPU = "No GPU here, so nothing is measured; `python -m pytest tests/test_kernels_cuda.py` simulates the kernels."

HAND_WRITTEN = {"mma": "rung6_tensorcore", "wgmma": "rung7_wgmma"}
ROOT = Path(__file__).parents[2]
RUNGS = {
    "popcount": rung3_popcount.conv,
    "shared": rung4_shared.conv,
    "bases": rung5_bases.conv,
    "mma": rung6_tensorcore.conv,
    "wgmma": rung7_wgmma.conv,
}


# ------------------------------------------------------------------ random layers


def random_layer(
    B, C, sizes, O, kernel, stride, padding, M, N, dilation=None, out_bases=0, dtype=torch.float32
):  # fmt: skip
    """The operator's arguments for a random layer and input."""
    g = torch.Generator().manual_seed(SEED)
    bits = abcnets.pack_bits(torch.rand(M, O, *kernel, C, generator=g) < 0.5, torch.uint8)
    tensors = [
        torch.randn(B, C, *sizes, generator=g).to(dtype), bits, torch.rand(M, O, generator=g) + 0.1,
        torch.rand(N, generator=g) + 0.1, torch.randn(N, C, generator=g), torch.rand(C, generator=g) < 0.3,
        torch.randn(O, generator=g),
    ]  # fmt: skip
    out = [None, None]
    if out_bases:
        spread = math.sqrt(C * math.prod(kernel) * M * N) / 2
        out = [torch.randn(out_bases, O, generator=g) * spread, torch.rand(O, generator=g) < 0.3]
    tensors, out = ([None if t is None else t.to(DEVICE) for t in ts] for ts in (tensors, out))
    return (*tensors, C, list(stride), list(padding), list(dilation or [1] * len(sizes)), 1, *out)


def layer_of(arguments) -> Layer:
    _, bits, alphas, betas, _, _, bias, channels, stride, padding, dilation = arguments[:11]
    return Layer(bits, alphas, betas, bias, channels, stride, padding, dilation)


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


def wrong_bits(words, arguments) -> int:
    """How many output bits differ where y is not within rounding of its threshold."""
    y = reference((*arguments[:-2], None, None)).movedim(1, -1)
    thresholds, flips = (t.cpu() for t in arguments[-2:])
    expected = (y[None] >= thresholds.view(len(thresholds), *[1] * (y.ndim - 1), -1)) != flips
    got = abcnets.unpack_bits(words.cpu().movedim(-1, 0), y.shape[-1])
    near = (y[None] - thresholds.view(len(thresholds), *[1] * (y.ndim - 1), -1)).abs() < 1e-4 * y.abs().max()
    spare = abcnets.unpack_bits(words.cpu().movedim(-1, 0), 64 * words.shape[-2])[..., y.shape[-1] :]
    return int(((got != expected) & ~near).sum() + spare.sum())


def random_words(shape, seed) -> torch.Tensor:
    """Activation words, all 64 channels of each in use."""
    g = torch.Generator(device=DEVICE).manual_seed(SEED + seed)
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=g, device=DEVICE)


# ------------------------------------------------------------------ correctness

SMALL = (
    dict(B=2, C=33, sizes=(4, 5), O=5, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=2, N=1),
    dict(B=1, C=70, sizes=(5, 4), O=40, kernel=(3, 2), stride=(2, 1), padding=(1, 0, 0, 1), M=1, N=2, dilation=(1, 2)),
)
LARGE = (
    dict(B=2, C=33, sizes=(7, 5), O=35, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=2, N=3),
    dict(B=3, C=64, sizes=(9, 6), O=64, kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), M=3, N=1),
    dict(B=1, C=130, sizes=(5, 8), O=200, kernel=(1, 1), stride=(2, 1), padding=(0, 0, 0, 0), M=1, N=2),
    dict(B=2, C=96, sizes=(11, 9), O=70, kernel=(3, 2), stride=(1, 2), padding=(2, 0, 1, 3), M=2, N=2, dilation=(2, 3)),
    dict(B=5, C=256, sizes=(14, 14), O=256, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=1, N=1),
    dict(B=7, C=512, sizes=(7, 7), O=512, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=3, N=3),
)
CHECKS = SMALL if SIMULATED else LARGE


def check(say=print) -> set:
    """The names of the rungs and operators that are right on this machine; says what is wrong or missing."""
    right = set()
    torch.full((1 << (10 if SIMULATED else 26),), math.nan, device=DEVICE)  # what memory nobody writes then holds

    def attempt(name, test):
        try:
            problem = test()
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        say(f"  {name}: {'right' if problem is None else problem}")
        if problem is None:
            right.add(name)

    attempt("pack", _check_pack)
    attempt("float", _check_float)
    # A kernel that faults takes the process's CUDA context with it, and all that would come after: what is written in
    # PTX runs in a process of its own first.
    survives = {name: SIMULATED or _survives(module) for name, module in HAND_WRITTEN.items()}
    for name, conv in RUNGS.items():
        if survives.get(name, True):
            attempt(name, functools.partial(_check_rung, conv))
        else:
            say(f"  {name}: fails in a process of its own")
    if survives["mma"]:
        attempt("fused", functools.partial(_check_bits, rung8_fused.conv))
    if survives["wgmma"]:
        attempt("wgmma fused", functools.partial(_check_bits, wgmma_fused))
    attempt("operator", _check_operator)
    attempt("max pool", _check_pool)
    if not SIMULATED:
        attempt("CUDA graph", _check_graph)
    return right


def _survives(module) -> bool:
    """Whether the module's main runs to its end on this GPU."""
    command = [sys.executable, "-m", f"kernels.{module}"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def wgmma_fused(layer, words, poison, thresholds, flips):
    return rung7_wgmma.conv(layer, words, poison, None, rung8_fused.bits_output, thresholds, flips)


def _check_pack():
    for shape in CHECKS[:4]:
        arguments = random_layer(**shape)
        floats, thresholds, flips = arguments[0], arguments[4], arguments[5]
        floats[0, 1, 2, 3] = math.nan
        bits = (floats.movedim(1, -1)[None] >= thresholds[:, None, None, None]) != flips
        expected = abcnets.pack_bits(bits, torch.int64).movedim(0, -1)
        for x in (floats, floats.to(memory_format=torch.channels_last)):
            words, poison = rung1_pack.pack(x, thresholds, flips)
            if not torch.equal(words, expected) or not torch.equal(poison.isnan(), x.isnan().any(1)):
                return f"wrong words for {shape}"


def _check_float():
    for shape in CHECKS[:4]:
        arguments = random_layer(**shape)
        layer = layer_of(arguments)
        x, w = arguments[0], torch.randn(layer.O, layer.C, layer.KH, layer.KW, device=arguments[0].device)
        top, bottom, left, right = layer.padding
        padded = functional.pad(x.double(), (left, right, top, bottom))
        bias = layer.bias_O.double()
        expected = functional.conv2d(padded, w.double(), bias, layer.stride, 0, layer.dilation)
        error = error_of(rung2_float.conv(layer, x, w), expected.cpu())
        if not error < 1e-5:
            return f"error {error:.1e} for {shape}"


def _check_rung(conv):
    for shape in CHECKS:
        arguments = random_layer(**shape)
        arguments[0][0, 2, 3, 1] = math.nan
        words, poison = rung1_pack.pack(arguments[0], arguments[4], arguments[5])
        y = conv(layer_of(arguments), words, poison)
        if y is None:
            return f"no tile fits for {shape}"
        error = error_of(y, reference(arguments))
        if not error < 1e-5:
            return f"error {error:.1e} for {shape}"


def _check_bits(conv):
    for shape in CHECKS:
        arguments = random_layer(**shape, out_bases=2)
        words, poison = rung1_pack.pack(arguments[0], arguments[4], arguments[5])
        out = conv(layer_of(arguments), words, poison, *rung8_fused.pad_outputs(*arguments[-2:]))
        wrong = wrong_bits(out, arguments)
        if wrong:
            return f"{wrong} wrong bits for {shape}"


def _check_operator():
    one = dict(M=2, N=2)
    for shape in (
        dict(B=9, C=70, sizes=(), O=10, kernel=(), stride=(), padding=(), **one),
        dict(B=2, C=40, sizes=(9,), O=33, kernel=(5,), stride=(2,), padding=(2, 1), **one),
        dict(B=2, C=40, sizes=(3, 4, 5), O=6, kernel=(3, 3, 3), stride=(1, 1, 1), padding=(1,) * 6, **one),
        *CHECKS[:1],
    ):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            arguments = random_layer(**shape, dtype=dtype)
            y = engine.packed_conv(*arguments)
            error = error_of(y, reference(arguments))
            if y.dtype != dtype or not error < tolerance:
                return f"{y.dtype}, error {error:.1e} for {shape}"
        arguments = random_layer(**shape, out_bases=3)
        wrong = wrong_bits(engine.packed_conv(*arguments), arguments)
        if wrong:
            return f"{wrong} wrong bits for {shape}"


def _check_pool():
    words = torch.randint(-(2**63), 2**63 - 1, (2, 9, 7, 2, 3), device=DEVICE)
    flips = torch.rand(128, device=DEVICE) < 0.5
    for sizes in (((3, 3), (2, 2), (1, 1), (1, 1), False), ((2, 2), (2, 2), (0, 0), (1, 1), True)):
        expected = abcnets.packed_max_pool(words, flips, 128, *sizes)
        if not torch.equal(engine.packed_max_pool(words, flips, 128, *sizes), expected):
            return f"wrong words for {sizes}"


def _check_graph():
    arguments = random_layer(**CHECKS[1])
    x = arguments[0]
    engine.packed_conv(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = engine.packed_conv(*arguments)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    error = error_of(y, reference(arguments))
    return None if error < 1e-5 else f"error {error:.1e} after a replay on new input"


# ------------------------------------------------------------------ what the rungs' own mains run


def can_run() -> bool:
    """Whether there is a GPU or the simulator; says so where not."""
    if not SIMULATED and not torch.cuda.is_available():
        print(NO_GPU)
        return False
    return True


def demonstrate(name, conv) -> None:
    """Check a rung that takes words and gives floats, then time it on one layer."""
    if can_run():
        print(f"{name}: {_check_rung(conv) or 'right'}")
        _time(name, lambda layer, words, poison, outputs: conv(layer, words, poison))


def demonstrate_fused(name, conv) -> None:
    """The same for bits out."""
    if can_run():
        print(f"{name}: {_check_bits(conv) or 'right'}")
        _time(name, lambda layer, words, poison, outputs: conv(layer, words, poison, *outputs))


def demonstrate_pack(name, pack) -> None:
    if can_run():
        print(f"{name}: {_check_pack() or 'right'}")
    if can_run() and not SIMULATED:
        x = [torch.randn(64, 128, 28, 28, device=DEVICE) for _ in range(8)]
        thresholds, flips = torch.randn(3, 128, device=DEVICE), torch.zeros(128, dtype=torch.bool, device=DEVICE)
        us, _, _ = microseconds(lambda x: pack(x, thresholds, flips), x)
        print(f"{name}: N = 3: {us:.1f} us, {x[0].numel() * (4 + 3 / 8) / us / 1e3:.0f} GB/s")


def demonstrate_float(name, conv) -> None:
    if can_run():
        print(f"{name}: {_check_float() or 'right'}")
    if can_run() and not SIMULATED:
        layer = layer_of(random_layer(1, 128, (28, 28), 128, (3, 3), (1, 1), (1,) * 4, 1, 1))
        w = torch.randn(128, 128, 3, 3, device=DEVICE)
        us, _, _ = microseconds(lambda x: conv(layer, x, w), [torch.randn(32, 128, 28, 28, device=DEVICE)] * 4)
        print(f"{name}: {us:.1f} us, {2 * 32 * 28 * 28 * 128 * 9 * 128 / us / 1e6:.2f} Top/s")


def _time(name, call) -> None:
    for count in () if SIMULATED else (1, 3):
        arguments = random_layer(1, 128, (28, 28), 128, (3, 3), (1, 1), (1,) * 4, count, count, out_bases=count)
        layer, outputs = layer_of(arguments), rung8_fused.pad_outputs(*arguments[-2:])
        poison = layer.place(28, 28).no_poison(32)
        sets = [random_words((32, 28, 28, layer.P, count), i) for i in range(16)]
        us, _, _ = microseconds(lambda words, rest=(layer, poison, outputs): call(rest[0], words, *rest[1:]), sets)
        ops = 2 * 32 * 28 * 28 * 128 * 9 * 128 * count * count
        print(f"{name}: 128 -> 128, 32 x 28 x 28, M = N = {count}: {us:.1f} us, {ops / us / 1e6:.2f} Top/s")
