"""What the writeup computes instead of measuring: its worked examples, the Gaussian's quantizers, the estimates."""

import math
from statistics import NormalDist

import numpy as np

# --------------------------------------------------------------------------- The worked examples

A = [+1, -1, +1, +1, -1, -1, +1, -1]
W = [+1, +1, -1, +1, -1, -1, +1, +1]
PADDED = 2  # channels at the end that are padding in the second part of the example

WEIGHTS_EXAMPLE = [-1.3, -0.7, -0.4, -0.1, 0.2, 0.5, 0.8, 1.8]


def to_bits(signs) -> str:
    return "".join("1" if s > 0 else "0" for s in signs)


def bit_example() -> dict:
    """The 8-bit example, computed with integers as a machine would."""
    K = len(A)
    a, w = int(to_bits(A), 2), int(to_bits(W), 2)
    zeroed = a & ~((1 << PADDED) - 1)
    return {
        "K": K, "a": a, "w": w, "xor": a ^ w, "and": a & w,
        "count": (a ^ w).bit_count(), "count_and": (a & w).bit_count(),
        "count_a": a.bit_count(), "count_w": w.bit_count(),
        "dot": K - 2 * (a ^ w).bit_count(),
        "dot_and": 4 * (a & w).bit_count() - 2 * a.bit_count() - 2 * w.bit_count() + K,
        "padded": zeroed, "count_padded": (zeroed ^ w).bit_count(),
        "too_much": PADDED - 2 * (w & ((1 << PADDED) - 1)).bit_count(),
    }  # fmt: skip


def cut(x: list[float], shifts: list[float]) -> tuple[list[list[float]], list[float]]:
    """The bins of x between the thresholds mean - u std, and the least-squares level of each."""
    mean = sum(x) / len(x)
    std = math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1))
    thresholds = sorted(mean - u * std for u in shifts)
    bins = [[] for _ in range(len(shifts) + 1)]
    for v in x:
        bins[sum(v >= t for t in thresholds)].append(v)
    top = (sum(bins[-1]) - sum(bins[0])) / (len(bins[-1]) + len(bins[0]))
    return bins, [-top, *(sum(b) / len(b) for b in bins[1:-1]), top]


# --------------------------------------------------------------------------- The Gaussian


def density(x: float) -> float:
    return 0.0 if math.isinf(x) else NormalDist().pdf(x)


def below(x: float) -> float:
    return NormalDist().cdf(x) if math.isfinite(x) else float(x > 0)


def gaussian_levels(thresholds: list[float]) -> tuple[list[float], float]:
    """Cell means of a unit Gaussian between thresholds, and the squared error that is left."""
    edges = [-math.inf, *thresholds, math.inf]
    mass = [below(high) - below(low) for low, high in zip(edges, edges[1:])]
    levels = [(density(low) - density(high)) / m for low, high, m in zip(edges, edges[1:], mass)]
    return levels, 1 - sum(m * c * c for m, c in zip(mass, levels))


def gaussian_thresholds(M: int) -> list[float]:
    """Lloyd's iteration: levels are cell means, thresholds are midway between levels."""
    thresholds = [2 * (m + 0.5) / M - 1 for m in range(M)]
    for _ in range(100_000):
        levels, _ = gaussian_levels(thresholds)
        moved = [(a + b) / 2 for a, b in zip(levels, levels[1:])]
        if max(abs(a - b) for a, b in zip(moved, thresholds)) < 1e-12:
            break
        thresholds = moved
    return moved


def code_error(code: str, bases: int) -> float:
    """The squared error that the best levels of a code leave of a unit Gaussian: Lloyd's iteration with tied levels."""
    if code == "thermometer":  # whose outer levels are opposite by themselves
        return gaussian_levels(gaussian_thresholds(bases))[1]
    if code == "binary":
        design = np.array([[1 if j >> k & 1 else -1 for k in range(bases)] for j in range(2**bases)])
    else:
        design = np.array([[2 * j - bases] for j in range(bases + 1)])
    thresholds = gaussian_thresholds(len(design) - 1)
    for _ in range(10_000):
        edges = [-math.inf, *thresholds, math.inf]
        mass = np.array([below(high) - below(low) for low, high in zip(edges, edges[1:])])
        means = np.array(gaussian_levels(thresholds)[0])
        weights = np.sqrt(mass)
        levels = design @ np.linalg.lstsq(weights[:, None] * design, weights * means, rcond=None)[0]
        moved = ((levels[1:] + levels[:-1]) / 2).tolist()
        if max(abs(a - b) for a, b in zip(moved, thresholds)) < 1e-12:
            break
        thresholds = moved
    return 1 + float((mass * (levels**2 - 2 * levels * means)).sum())


def even_thresholds(M: int) -> list[float]:
    return [2 * m / (M - 1) - 1 for m in range(M)] if M > 1 else [0.0]


def gaussian_errors(thresholds) -> list[float]:
    """The squared error left by the thresholds of M = 1 ... 6 bases."""
    return [gaussian_levels(thresholds(M))[1] for M in range(1, 7)]


# --------------------------------------------------------------------------- Estimates

# Multiply-adds a cycle of one core in float32, int8 and bits (kernels/README.md). Counting 512 bits takes three
# operations, of which a core starts two a cycle; a look-up and an addition count 128.
CPU_CORES = {
    "Zen 4, AVX-512": (16, 64, 512 / 1.5),
    "Intel's servers since Ice Lake, AVX-512": (32, 128, 512 / 1.5),
    "the same with AMX": (32, 1024, 512 / 1.5),
    "AVX2, three operations a cycle (Zen 3)": (16, 32, 192),
    "AVX2, one look-up a cycle (Skylake)": (16, 32, 128),
}
CPU_RATES = dict(zip(("float32", "int8", "bits"), CPU_CORES["Zen 4, AVX-512"]))  # those that the text explains

# Multiply-adds a clock of one multiprocessor of Hopper (kernels/README.md); the binary rates are reported or guessed.
GPU_UNITS = {
    "float32 units": 128, "popcount": 512, "TF32 tensor core": 1024, "fp16 tensor core": 2048, "int8 tensor core": 4096,
    "binary tensor core, `mma`": 17_700, "binary tensor core, `wgmma`": 32_768,
}  # fmt: skip
GPU_BYTES = 19  # a clock and multiprocessor: 4.3 TB/s at 1.7 GHz, 132 of them
TILE_PIXELS, TILE_CHANNELS, TILE_K = 128, 128, 9 * 128


def tile(bases: int, bits_out: bool) -> dict:
    """A tile of a packed 3 x 3 convolution on one multiprocessor: clocks to count and to write its result."""
    outputs = TILE_PIXELS * TILE_CHANNELS
    products = outputs * -(-TILE_K // 256) * 256 * bases**2  # an instruction takes 256 at a time
    written = outputs * bases // 8 if bits_out else 4 * outputs
    return {"products": products, "written": written, "counting": products / GPU_UNITS["binary tensor core, `mma`"],
            "writing": written / GPU_BYTES, "intensity": products / written}  # fmt: skip
