"""Accurate binary convolution for PyTorch: weights and activations as linear combinations of +1/-1 bases.

After Lin, Zhao, Pan, "Towards Accurate Binary Convolutional Neural Network", NeurIPS 2017, arXiv:1711.11294:

    W ~ Wq = sum_m alpha_m B_m     B_m = sign(W - mean(W) + u_m std(W))        m = 1..M   weight bases
    R ~ Aq = sum_n beta_n  A_n     A_n = +1 where R >= 1/2 - v_n, else -1      n = 1..N   activation bases
    conv(R, W) ~ conv(Aq, Wq) = sum_m sum_n alpha_m beta_n conv(A_n, B_m)

Which sums of bases there are is the choice of a code (`code=`). The paper's bases are nested, so M of them make M + 1
levels, like the segments of a thermometer. As digits of a binary number (LQ-Nets, arXiv:1807.10029) they make 2^M, of
as many bits and binary convolutions. Levels of equal distance, "uniform", are M + 1 again, with one scale in the place
of M; on one side, three of them are counted as fast as two. In the binary and uniform codes a zero that comes into a
layer stays zero (`zero=True`), as those of padding are: the layer convolves Aq - Aq(0).

This one file needs torch and nothing else: copy it into your project, and kernels/ with it if you want speed.

    model = abcnets.convert(resnet18, 2, 2, code="binary")                  # a binarized copy, weights kept
    abcnets.calibrate(model, batches)                                       # no training: a thousand images
    ...                                                                     # fine-tune it like any other model
    packed = abcnets.pack(model)                                            # 1 bit a weight and base, and fast

What is in it, from top to bottom:

    CODES                                              which sums of bases there are: three of them
    even_shifts, gaussian_shifts                       the shifts u of the weight bases
    weight_bases, fit_weight, quantize_weight          B, alpha and Wq of a weight
    quantize_activation                                Aq of what reaches a layer
    ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear         the layers, drop-ins for torch's
    binarize                                           switch them on and off
    separate_thresholds                                while training: bases that meet are lost
    plan, convert                                      which layers become binary, and a copy in which they are
    calibrate                                          fit it to some data, without training
    summary                                            what each layer holds and does (a `Summary`: a table)
    pack_bits, unpack_bits                             signs as bits
    packed_conv, packed_max_pool                       the two operators on bits, in plain torch
    packed_chain                                       several of them in one call
    pack, PackedLayer                                  for inference: 1 bit a weight and base
    save_packed, load_packed                           one file, no pickle
    engines                                            which device runs packed layers how fast
    fuse, fused_for                                    bits from layer to layer
    PackedPool, PackedChain                            what it makes: a max-pool of bits, and steps in one call,
    EightBitConv, ChainSum, ChainRead, ChainAverage    of which these are some
    multiplies_bytes                                   whether the first of these is fast here
    export_onnx                                        one ONNX file, which runs without torch; in int8 too

Packed layers are fast where the package abcnets_kernels is: the folder kernels/ beside this file, or installed. It is
found when it is first needed. Without it they run as float convolutions, and `fuse` and `export_onnx` are missing;
training on a CPU takes longer.

Symbols, used throughout:

    W (O, C, *K)   weights: O output channels, C channels of one group, K the kernel's extent
    us (M,)        fixed shifts of the weight bases, in standard deviations (binary code: 2^M - 1, in rms)
    alphas (M, O)  scales of the weight bases: the least-squares fit of Wq to W, never stored
    R (B, C, *S)   what reaches a layer; in the paper's networks after BatchNorm and ReLU
    vs, betas (N,) learned shifts and scales of the activation bases (binary code: 2^N - 1 shifts; uniform: one scale)

sign(0) = +1 everywhere. std is the sample standard deviation. Zero padding is exactly 0, neither +1 nor -1.

Where this departs from the paper, and why:
- alpha has a closed form (`fit_weight`), so there is no linear solver and no singular matrix when bases coincide.
- Mean, std and alpha are per output channel by default (the paper's extension); `per_channel=False` is its main text.
- The shifts default to `gaussian_shifts`, which fit bell-shaped weights better than `even_shifts`, the paper's choice,
  for M = 2 and from 4 on; at 1 and 3 the two all but agree.
- dL/dW = dL/dWq, the plain straight-through estimator. The paper's formula can be read as that times sum(alpha),
  one scalar a layer (or channel) that only rescales the learning rate.
- Training runs one float convolution of Aq with Wq: the M x N sum above, by linearity. Only packed inference runs
  M x N bitwise convolutions.
"""

import concurrent.futures
import contextlib
import copy
import functools
import html
import importlib
import importlib.util
import json
import math
import operator
import os
import sys
import threading
import types
import warnings
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "1.0.0"

__all__ = [
    "CODES", "even_shifts", "gaussian_shifts", "weight_bases", "fit_weight", "quantize_weight", "quantize_activation",
    "ABCConv1d", "ABCConv2d", "ABCConv3d", "ABCLinear", "binarize", "separate_thresholds", "plan", "convert",
    "calibrate", "summary", "Summary", "pack_bits", "unpack_bits", "packed_conv", "packed_max_pool", "packed_chain",
    "pack", "PackedLayer", "PackedPool", "EightBitConv", "PackedChain", "ChainSum", "ChainRead", "ChainAverage",
    "save_packed", "load_packed", "engines", "multiplies_bytes", "fuse", "fused_for", "export_onnx",
]  # fmt: skip


# --------------------------------------------------------------------------- Shifts and levels


def even_shifts(M: int) -> Tensor:
    """Shifts u_1..u_M evenly spaced in [-1, 1] (arXiv:1711.11294, section 3.1); 0 for M = 1.

    Shape: (M,), float32, on the CPU whatever the default device.
    """
    _check_bases("weight_bases", M)
    like = {"dtype": torch.float32, "device": "cpu"}
    return torch.linspace(-1, 1, M, **like) if M > 1 else torch.zeros(1, **like)


def gaussian_shifts(M: int) -> Tensor:
    """Shifts that lose least on Gaussian weights: the Lloyd-Max thresholds of M + 1 levels (Max 1960, Lloyd 1982).

    Levels are their cell's mean, thresholds are midway between levels. Relative squared error of a unit Gaussian:
    0.363, 0.190, 0.117, 0.058 for M = 1, 2, 3, 5; `even_shifts` gives 0.363, 0.262, 0.118, 0.077.

    Shape: (M,), float32, ascending, on the CPU whatever the default device.
    """
    _check_bases("weight_bases", M)
    return torch.tensor(_gaussian_thresholds(M), dtype=torch.float32, device="cpu")


@functools.cache
def _gaussian_thresholds(M: int) -> tuple[float, ...]:
    def density(x):
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def mass_below(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    thresholds = [2.0 * (m + 0.5) / M - 1 for m in range(M)]
    for _ in range(100_000):
        edges = [-math.inf, *thresholds, math.inf]
        levels = [
            (density(low) - density(high)) / (mass_below(high) - mass_below(low)) for low, high in zip(edges, edges[1:])
        ]
        moved = [(a + b) / 2 for a, b in zip(levels, levels[1:])]
        change = max(abs(a - b) for a, b in zip(moved, thresholds))
        thresholds = moved
        if change < 1e-12:
            break
    # Symmetric to the last bit, so that no rounding noise decides where a weight at the mean falls.
    return tuple((a - b) / 2 for a, b in zip(thresholds, reversed(thresholds)))


def _lloyd_max(samples: Tensor, count: int, iterations: int = 200) -> tuple[Tensor, Tensor]:
    """Thresholds (count,) and levels (count + 1,) of the scalar quantizer with the least squared error on `samples`."""
    x, total = _ordered(samples)
    # Rectified activations pile up at their minimum: spread the start over what lies above it.
    above = x[x > x[0]]
    if len(above) == 0:
        return x[:1].expand(count), x[:1].expand(count + 1)
    places = (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) / count
    thresholds = torch.quantile(above[:: max(1, len(above) // 100_000)], places)
    for _ in range(iterations):
        counts, sums = _cells(x, total, thresholds)
        levels = sums / counts
        # A cell that lost all its samples collapses onto its lower edge, and stays harmless there.
        levels = torch.where(counts > 0, levels, torch.cat([x[:1], thresholds]))
        moved = (levels[1:] + levels[:-1]) / 2
        if torch.equal(moved, thresholds):
            break
        thresholds = moved
    return thresholds, levels


def _ordered(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The samples in ascending order (n,), and the sums (n + 1,) of none of them, the first, the first two, ..."""
    x = samples.detach().flatten().double().cpu().sort().values
    return x, torch.cat([x.new_zeros(1), x.cumsum(0)])


def _cells(x: Tensor, total: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the `_ordered` samples lie between thresholds, and their sums, (T + 1,) each."""
    edges = F.pad(torch.searchsorted(x, thresholds), (1, 1))
    edges[-1] = len(x)
    return edges.diff(), total[edges].diff()


def _fit_activations(samples: Tensor, N: int, constant: bool,
                     code: str = "thermometer") -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """(vs, betas), float32 on the CPU, of the least squared error on `samples`; None where these are all one value.

    Levels are fitted up to one constant, since N bases can't say any: a thermometer's outer levels are tied, c_0 =
    -c_N, and those of the other codes are symmetric as a whole. That is all one needs where something behind the layer
    takes up constants, a BatchNorm or a bias. Where nothing does, the first of a thermometer's N > 1 bases can be spent
    on it (`constant`): +1 on all samples, which leaves N - 1 thresholds.
    """
    if code != "thermometer":
        return _fit_tied_levels(samples, N, code)
    constant = constant and N > 1
    thresholds, levels = _lloyd_max(samples, N - constant)
    if levels[0] == levels[-1]:
        return None
    betas = levels.diff() / 2
    if constant:
        low, high = samples.min().item(), samples.max().item()
        # Below all samples, since a value under this threshold falls to -c_N: far below signed ones, which may stray.
        # Rectified ones stop at 0, where half of them are. There the first step of training could push all of these
        # under it; from where the surrogate's window holds none of them, its v gets no gradient and stays.
        always = low - (1.0 if low >= 0 else max(1.0, high - low))
        thresholds = torch.cat([thresholds.new_tensor([always]), thresholds])
        betas = torch.cat([(levels[:1] + levels[-1:]) / 2, betas])
    return (0.5 - thresholds).float(), betas.float()


def _fit_tied_levels(samples: Tensor, N: int, code: str, iterations: int = 200) -> tuple[Tensor, Tensor] | None:
    """Lloyd-Max for levels that a code ties: thresholds midway between levels, and in turn the code's levels and a
    constant by least squares. Returns (vs, betas) as `_fit_activations` does; the constant is dropped.
    """
    thresholds, levels = _lloyd_max(samples, _count_of_levels(code, N) - 1)
    if levels[0] == levels[-1]:
        return None
    x, total = _ordered(samples)
    design = F.pad(_design(code, N, x), (0, 1), value=1.0)  # the last column is the constant
    for _ in range(iterations):
        counts, sums = _cells(x, total, thresholds)
        inverse = torch.linalg.pinv(design.t() @ (design * counts[:, None]), rtol=1e-9, hermitian=True)
        *scales, constant = inverse @ (design.t() @ sums)
        # A negative scale would turn the code round: levels are to rise with their numbers.
        scales = torch.stack(scales).clamp(min=0)
        levels = (design[:, :-1] @ scales + constant).sort().values
        moved = (levels[1:] + levels[:-1]) / 2
        if torch.equal(moved, thresholds):
            break
        thresholds = moved
    return (0.5 - thresholds).float(), scales.float()


@functools.cache
def _start_activations(N: int, code: str, constant: bool) -> tuple[list[float], list[float]]:
    """(vs, betas) of a new layer: the best fit to a rectified unit Gaussian, as BatchNorm and ReLU put it out.

    Numbers and not tensors, since they are kept: a tensor would be of the first caller's device and mode.
    """

    def fit():
        quantiles = (torch.arange(20_000, dtype=torch.float64, device="cpu") + 0.5) / 20_000
        rectified = torch.special.ndtri(quantiles).relu()
        return [fitted.tolist() for fitted in _fit_activations(rectified, N, constant, code)]

    return tuple(_apart(fit))


def _apart(function, *arguments):
    """function(*arguments) in a thread of its own, where no mode of the caller's reaches: default device, fake tensors,
    inference, autocast."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


_MOST_BASES = 256  # far beyond use, and little enough that a number in a file can't make a machine work or run full
_MOST_BINARY = 8  # whose levels are 2 to that power


def _check_bases(name: str, count: int, code: str = "thermometer") -> None:
    most = _MOST_BINARY if code == "binary" else _MOST_BASES
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        code = " in the binary code" if code == "binary" else ""
        raise ValueError(f"{name} must be a positive integer of at most {most}{code}, or None to leave that side "
                         f"float; got {count!r}")  # fmt: skip


# --------------------------------------------------------------------------- Codes
#
# A code says which sums of N bases there are. With S (L, N) the signs of its levels, the lowest level first,
#
#     thermometer, uniform    L = N + 1    base n is +1 at the levels above n; all scales are one in a uniform code
#     binary                  L = 2^N      the bits of the level's number, the highest bit first
#
# and the bases of a value are the signs of the level that it falls on, found by L - 1 ascending thresholds.

CODES = ("thermometer", "binary", "uniform")


def _codes(code, weight_bases: int | None, activation_bases: int | None) -> tuple[str, str]:
    """The codes of both sides. One base has one code, and a float side none: both count as the thermometer."""
    pair = (code, code) if isinstance(code, str) else code
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(each not in CODES for each in pair):
        raise ValueError(f"code must be one of {CODES}, or a pair of them for weights and activations; got {code!r}")
    sides = ("weight_bases", weight_bases), ("activation_bases", activation_bases)
    for (name, bases), each in zip(sides, pair):
        if bases is not None:
            _check_bases(name, bases, each)
    return tuple("thermometer" if bases in (None, 1) else each for (_, bases), each in zip(sides, pair))


def _count_of_levels(code: str, bases: int) -> int:
    return 2**bases if code == "binary" else bases + 1


def _signs(code: str, bases: int, like: Tensor) -> Tensor:
    """S (L, N) of a code: +1 and -1, the lowest level first."""
    levels = torch.arange(_count_of_levels(code, bases), device=like.device)[:, None]
    order = torch.arange(bases, device=like.device)
    if code == "binary":
        plus = torch.div(levels, 2 ** order.flip(0), rounding_mode="floor") % 2 > 0
    else:
        plus = levels > order
    return torch.where(plus, 1.0, -1.0).to(like.dtype)


def _design(code: str, bases: int, like: Tensor) -> Tensor:
    """What levels are made of, (L, N), or (L, 1) where all scales are one: levels = design @ scales."""
    signs = _signs(code, bases, like)
    return signs.sum(1, keepdim=True) if code == "uniform" else signs


# --------------------------------------------------------------------------- Weights


def weight_bases(W: Tensor, us: Tensor, per_channel: bool = True, code: str = "thermometer",
                 nearest: bool = True) -> Tensor:  # fmt: skip
    """The binary bases of W: in the paper's code, the thermometer's (arXiv:1711.11294, eq. 2),

        B_m = sign(W - mean(W) + u_m std(W)),   sign(0) = +1

    and in the others the signs of the level that a weight falls on, the highest bit first: see `fit_weight`. Statistics
    are taken over each W[o], or over all of W where `per_channel` is False.

    Shape: W (O, C, *K); us (M,), or (2^M - 1,) in the binary code -> (M, O, C, *K), +1 and -1 in W's dtype.
    Raises: ValueError if us is not one-dimensional or has no length that the code has, or for another code; TypeError
        if W is not floating point.
    """
    M, code = _check_weight(W, us, code)
    with torch.no_grad():  # signs have no gradient
        _, centre, _, _, _, thresholds = _fitted(W, us, per_channel, code, nearest)
        above = _above(_grouped(W, per_channel) - centre, thresholds)
    flags = _encoded(above, M) if code != "thermometer" else [above[i] for i in _nesting(us).argsort().tolist()]
    return torch.stack([torch.where(flag, 1.0, -1.0).to(W.dtype).view_as(W) for flag in flags])


def fit_weight(W: Tensor, us: Tensor, per_channel: bool = True, code: str = "thermometer",
               nearest: bool = True) -> Tensor:  # fmt: skip
    """The scales alpha that minimize |W - sum_m alpha_m B_m|^2 (arXiv:1711.11294, eq. 3-4), in closed form.

    Thermometer. Base m is +1 wherever a base with smaller u is: the bases are nested and cut the weights into M + 1
    bins by value. On bin j (that many bases are +1) Wq is one constant c_j, with c_j - c_(j-1) = 2 alpha_j and
    c_0 = -c_M and no other constraint. So least squares is a mean over each inner bin, and for the two outer bins
    together

        c_M = -c_0 = (sum of W in bin M - sum of W in bin 0) / (n_M + n_0).

    An empty inner bin takes its lower neighbour's constant: its alpha is 0. Only the alphas of the largest and the
    smallest shift can be negative, where a channel's mean is large against its deviation.

    Binary (LQ-Nets, Zhang et al. 2018, arXiv:1807.10029). The 2^M levels sum_m +-alpha_m are symmetric about 0. Weights
    are cut at -u_j rms(W), alphas fitted, thresholds put midway between levels, and so on for a few rounds, so that
    each weight falls on the level nearest to it. With a = |W|, n_q and s_q the count and the sum of a on the q-th level
    above 0, and P the signs of these levels,

        (P' n P) alpha = P' s;   M = 2: alpha = ((top + mid) / 2, (top - mid) / 2), the means of a on both levels.

    Uniform. M + 1 levels of equal distance, as one alpha a channel makes them, alpha = sum_q k_q s_q / sum_q k_q^2 n_q
    with k the integers M, M - 2, ..; M = 2 is ternary (TWN, Li et al. 2016, arXiv:1605.04711).

    nearest=False takes the bins as us cut them. Cost: O(L size(W)) for L levels.

    Shape: W (O, C, *K); us as in `weight_bases` -> alphas (M, O), or (M, 1) where `per_channel` is False.
    Raises: as `weight_bases`.
    """
    _, code = _check_weight(W, us, code)
    alphas = _fitted(W, us, per_channel, code, nearest)[3]
    order = _nesting(us).argsort() if code == "thermometer" else slice(None)
    return alphas[:, order].t().to(W.dtype)


def quantize_weight(W: Tensor, us: Tensor, per_channel: bool = True, code: str = "thermometer",
                    nearest: bool = True) -> Tensor:  # fmt: skip
    """Wq = sum_m alpha_m B_m with the alphas of `fit_weight` (arXiv:1711.11294, eq. 2-4 and section 3.2.1).

    Backward: straight-through, dL/dW = dL/dWq. Where us requires grad (the paper's future work), and with h_j half the
    step that Wq takes at threshold j (a thermometer's alpha_j), alphas held fixed,

        dL/du_j = h_j sum(dL/dWq [|z_j| <= 1])     thermometer: z_j = (W - mean(W)) / std(W) + u_j
                                                   binary, uniform: z_j = W / rms(W) + u_j

    Where abcnets_kernels has an engine for the CPU, float32 weights are fitted in one call, and sums rounded less; in
    `fit_weight` and `weight_bases` too, so that packing finds the bases that were trained.

    Shape: as `weight_bases` -> like W. A NaN weight makes its channel NaN.
    Raises: as `weight_bases`; ValueError where us of another code than the thermometer's requires grad, but is only
        where the search for the nearest levels begins.
    """
    _, code = _check_weight(W, us, code)
    if us.requires_grad and nearest and code != "thermometer" and torch.is_grad_enabled():
        raise ValueError("us has no gradient where it only begins the search for the nearest levels: nearest=False")
    return _QuantizeWeight.apply(W, us, per_channel, code, nearest)


def _check_weight(W: Tensor, us: Tensor, code: str) -> tuple[int, str]:
    """M, and the code that counts: with one base all are the thermometer."""
    if not W.is_floating_point():
        raise TypeError(f"weights must be floating point, got {W.dtype}")
    if W.ndim < 1:
        raise ValueError("weights must have at least one dimension (output channels first), got a scalar")
    if code not in CODES:
        raise ValueError(f"code must be one of {CODES}, got {code!r}")
    if us.ndim != 1 or len(us) == 0:
        raise ValueError(f"us must be one-dimensional with one shift per weight base, got shape {tuple(us.shape)}")
    M = _bases_with(len(us), code, "us")
    return M, "thermometer" if M == 1 else code


def _bases_with(thresholds: int, code: str, name: str) -> int:
    """How many bases have so many thresholds."""
    bases = thresholds if code != "binary" else (thresholds + 1).bit_length() - 1
    if _count_of_levels(code, bases) != thresholds + 1:
        raise ValueError(f"in the binary code {name} must be 2^n - 1 numbers for n bases, got {thresholds}")
    return bases


def _grouped(W: Tensor, per_channel: bool) -> Tensor:
    """(G, K): G groups share statistics. In float32 or wider, so that half-precision weights have the bases that their
    float32 copy has."""
    groups = len(W) if per_channel else 1
    return W.reshape(groups, W.numel() // max(groups, 1)).to(torch.promote_types(W.dtype, torch.float32))


def _nesting(us: Tensor) -> Tensor:
    """The order of the bases from the one with most +1 to the one with fewest."""
    return us.argsort(descending=True, stable=True)


def _rounds(code: str, M: int) -> int:
    """How often a code whose levels are the nearest ones cuts midway between them, and fits them again."""
    return 0 if code == "thermometer" else 2 if M == 2 else 5


def _fitted(W: Tensor, us: Tensor, per_channel: bool, code: str, nearest: bool) -> tuple[Tensor, ...]:
    """What `_fit_levels` returns, from an engine where there is one and nobody asks for its derivatives."""
    differentiable = torch.is_grad_enabled() and (W.requires_grad or us.requires_grad)
    through_torch = _has_operator(W, us) and not differentiable
    fit = torch.ops.abcnets.fit_levels.default if through_torch else _fit_levels
    return fit(W, us, per_channel, code, nearest)


def _fit_levels(W: Tensor, us: Tensor, per_channel: bool, code: str, nearest: bool) -> tuple[Tensor, ...]:
    """The operator abcnets::fit_levels, in plain torch: all about a weight's quantization, for G groups, T thresholds.

    Wq, like W; centres (G, 1), which is taken away before weights meet thresholds; spreads (G, 1); least-squares
    alphas (G, M), a thermometer's in the order of nesting; levels (G, T + 1); thresholds (G, T), ascending, at the end
    of the search for the nearest levels.
    """
    w = _grouped(W, per_channel)
    if code == "thermometer":
        centre = w.mean(1, keepdim=True)
        x = w - centre
        # One value alone has no sample deviation; 0 makes all its bases +1, and Wq the value itself.
        spread = x.std(1, keepdim=True) if x.shape[1] > 1 else torch.zeros_like(x)
    else:
        x, spread = w, w.square().mean(1, keepdim=True).sqrt()
        centre = torch.zeros_like(spread)
    thresholds = -(spread * us.to(x.dtype))[:, _nesting(us)]
    M = _bases_with(len(us), code, "us")
    if code == "thermometer":
        above = _above(x, thresholds)
        levels = _nested_levels(*_sums_of_bins(w, above))
        alphas = levels.diff(dim=1) / 2
    else:
        design = _design(code, M, x)
        for rounds_left in reversed(range((_rounds(code, M) if nearest else 0) + 1)):
            above = _above(x, thresholds)
            scales = _tied_scales(*_sums_of_bins(x, above), design)
            levels = _matmul(scales[:, None], design.t())[:, 0]
            if rounds_left:
                sorted_levels = levels.sort(1).values
                thresholds = (sorted_levels[:, 1:] + sorted_levels[:, :-1]) / 2
        alphas = scales.repeat(1, M // scales.shape[1])
    lowest, *higher = levels.unsqueeze(2).unbind(1)
    Wq = lowest.expand(above[0].shape)
    for mask, level in zip(above, higher):
        Wq = torch.where(mask, level, Wq)
    Wq = torch.empty_like(W).copy_(Wq.reshape(W.shape))  # in W's dtype and order of memory
    return Wq, centre, spread, alphas, levels, thresholds


def _above(x: Tensor, thresholds: Tensor) -> list[Tensor]:
    """The nested masks (G, K) of what lies above each threshold."""
    return [x >= t[:, None] for t in thresholds.unbind(1)]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of small matrices, as products and sums, which autocast and TF32 leave as exact as they are."""
    return (a[..., None] * b[..., None, :, :]).sum(-2)


def _sums_of_bins(x: Tensor, above: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The sums of x and the counts, (G,) each, in the bins between nested masks."""
    everything, nothing = torch.ones_like(above[0]), torch.zeros_like(above[0])
    bins = [inner ^ outer for outer, inner in zip([everything, *above], [*above, nothing])]
    return [torch.where(bin, x, 0).sum(1) for bin in bins], [bin.sum(1) for bin in bins]


def _nested_levels(sums: list[Tensor], counts: list[Tensor]) -> Tensor:
    top = (sums[-1] - sums[0]) / (counts[-1] + counts[0]).clamp(min=1)
    levels = [-top]
    for total, count in zip(sums[1:-1], counts[1:-1]):
        levels.append(torch.where(count > 0, total / count.clamp(min=1), levels[-1]))
    return torch.stack([*levels, top], dim=1)


def _tied_scales(sums: list[Tensor], counts: list[Tensor], design: Tensor) -> Tensor:
    """The scales (G, U) of least squares for levels design (L, U) @ scales that are symmetric about 0."""
    half = len(design) // 2
    n = torch.stack(counts, 1).to(design.dtype)
    s = torch.stack(sums, 1)
    n, s = n[:, -half:] + n[:, :half].flip(1), s[:, -half:] - s[:, :half].flip(1)  # of |x|, for the levels above 0
    design = design[-half:]
    if design.shape == (2, 2):
        mid, top = torch.where(n > 0, s / n.clamp(min=1), (s / n.clamp(min=1)).flip(1)).unbind(1)
        return torch.stack([(top + mid) / 2, (top - mid) / 2], 1)
    weighted_GLU, product_GU1 = n[:, :, None] * design, _matmul(s[:, None], design).mT
    gram_GUU = _matmul(design.t(), weighted_GLU)
    if design.shape[1] == 1:
        return (product_GU1 / gram_GUU.clamp(min=1))[..., 0]
    # Bins may be empty and the system singular. So it is damped, and what that does is taken back by refinement, which
    # is many times faster than a pseudo-inverse and as good where there is something to fit.
    damping = 1e-4 * gram_GUU.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(design.dtype).tiny
    damped_GUU = gram_GUU + damping[:, None, None] * torch.eye(design.shape[1]).to(design)
    inverse_GUU = torch.linalg.inv_ex(damped_GUU).inverse
    scales_GU1 = _matmul(inverse_GUU, product_GU1)
    for _ in range(3):
        scales_GU1 = scales_GU1 + _matmul(inverse_GUU, product_GU1 - _matmul(gram_GUU, scales_GU1))
    return scales_GU1[..., 0]


class _QuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(W, us, per_channel, code, nearest):
        return _fitted(W, us, per_channel, code, nearest)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        W, us, *ctx.options = inputs
        if us.requires_grad:
            ctx.save_for_backward(W, us)

    @staticmethod
    def backward(ctx, G):
        if not ctx.needs_input_grad[1]:
            return G, None, None, None, None
        W, us = ctx.saved_tensors
        per_channel, *_ = ctx.options
        _, centre, spread, _, levels, thresholds = _fitted(W, us, *ctx.options)
        x = _grouped(W, per_channel) - centre
        if x.shape[1] == 1 and ctx.options[1] == "thermometer":  # one value has no deviation
            spread = torch.ones_like(x)
        G_us = [
            (h[:, None] * torch.where((x - t[:, None]).abs() <= spread, G.reshape(x.shape), 0)).sum()
            for h, t in zip((levels.diff(dim=1) / 2).unbind(1), thresholds.unbind(1))
        ]
        return G, torch.stack(G_us)[_nesting(us).argsort()].to(us.dtype), None, None, None


# --------------------------------------------------------------------------- Activations


def quantize_activation(R: Tensor, vs: Tensor, betas: Tensor, code: str = "thermometer", zero: bool = False) -> Tensor:
    """Aq = sum_n beta_n A_n, a staircase of N + 1 levels (arXiv:1711.11294, eq. 7-11), or of 2^N in the binary code.

        thermometer   A_n = +1 where clip(R + v_n, 0, 1) >= 1/2, that is R >= 1/2 - v_n, else -1
        uniform       the same with one beta for all bases
        binary        A_n is bit n, the highest first, of how many of the 2^N - 1 thresholds 1/2 - v_t are <= R
                      (LQ-Nets, Zhang et al. 2018, arXiv:1807.10029)

    With the thresholds in ascending order, Aq rises by 2 h_t at the t-th: h = beta in the first two, and h_t =
    sum_k beta_k (S_tk - S_(t-1)k) / 2 in the binary code, S the signs of its levels. Backward, with G = dL/dAq and the
    window 0 <= R + v_t <= 1, that is |R - (1/2 - v_t)| <= 1/2:

        dL/dR = sum_t h_t G [window_t]     dL/dv_t = h_t sum(G [window_t])     dL/dbeta_n = sum(G A_n)

    `zero` gives Aq - Aq(0), so that a value of 0 stays 0, like the zeros of padding, and
    dL/dbeta_n = sum(G (A_n - A_n(0))). An R that is 0 then moves nothing, since its level is 0 wherever the thresholds
    are: windows leave it out.

    NaN stays NaN (with no gradient); infinities fall on the outer levels. Only R is kept for the backward pass.

    Where abcnets_kernels has an engine for the CPU, it makes one pass of each direction: the same Aq and dL/dR to the
    bit, and sums that are rounded less. It is looked for at the first call, and nothing is said where it is missing.

    Shape: R any; vs (N,), or (2^N - 1,) in the binary code; betas (N,), or (1,) in the uniform one -> like R, in R's
        dtype. Comparisons are made in float32 or wider.
    Raises: ValueError if vs and betas are not as many as the code wants, TypeError if R is not floating point.
    """
    _check_activations(R, vs, betas, code)
    if code == "binary":
        vs = vs.sort(descending=True).values
    return _QuantizeActivation.apply(R, vs, _half_steps(betas, len(vs)), bool(zero))


def _check_activations(R: Tensor, vs: Tensor, betas: Tensor, code: str) -> None:
    if code not in CODES:
        raise ValueError(f"code must be one of {CODES}, got {code!r}")
    N = len(betas) if betas.ndim == vs.ndim == 1 else 0
    wanted = len(vs) if code == "uniform" and N == 1 else _count_of_levels(code, min(N, _MOST_BASES)) - 1
    if N == 0 or len(vs) != wanted or wanted == 0:
        shapes = f"{tuple(vs.shape)} and {tuple(betas.shape)}"
        rule = {"thermometer": "one entry per activation base", "uniform": "N entries and one",
                "binary": "2^N - 1 entries and N"}[code]  # fmt: skip
        raise ValueError(f"vs and betas must have {rule}, got shapes {shapes}")
    if not R.is_floating_point():
        raise TypeError(f"a binarized layer takes floating-point input, got {R.dtype}")


def _half_steps(betas: Tensor, thresholds: int) -> Tensor:
    """h (T,): half of what Aq rises by at each threshold; which code it is can be read off the numbers of both.

    Differences of betas, in the binary code, are in float32 or wider.
    """
    if len(betas) == thresholds:
        return betas
    if len(betas) == 1:
        return betas.expand(thresholds)
    wide = betas.to(torch.promote_types(betas.dtype, torch.float32))
    return (_rises(len(betas), wide) * wide).sum(1)  # a product that autocast leaves in float32


def _rises(N: int, like: Tensor) -> Tensor:
    """E (T, N) of the binary code: half of what each base's sign rises by at each threshold."""
    return _signs("binary", N, like).diff(dim=0) / 2


@functools.cache
def _numbers_of_rises(N: int) -> list[list[float]]:
    return _apart(lambda: _rises(N, torch.zeros((), dtype=torch.float32, device="cpu")).tolist())


def _thresholds(vs: Tensor, code: str = "thermometer") -> Tensor:
    """t = 1/2 - v, in float32 or wider: the one place where v becomes a threshold, in training and packing.

    Ascending in the binary code, whose bits are those of how many lie below.
    """
    thresholds = 0.5 - vs.to(torch.promote_types(vs.dtype, torch.float32))
    return thresholds.sort().values if code == "binary" else thresholds


def _level_of_zero(thresholds: Tensor, half_steps: Tensor) -> Tensor:
    """Aq(0), a scalar."""
    return torch.where(thresholds <= 0, half_steps, -half_steps).sum()


def _in_cache(*tensors: Tensor):
    """Yield the tensors in slices of their first dimension that fit into a core's cache.

    Both passes below make a dozen cheap sweeps; on a CPU all but the first should not have to go to memory. Compilers
    and GPUs do better with the whole.
    """
    first = tensors[0]
    if first.device.type != "cpu" or torch.compiler.is_compiling() or first.ndim == 0 or first.numel() == 0:
        yield tensors
    else:
        rows = max(1, 131_072 * len(first) // first.numel())
        yield from zip(*(t.split(rows) for t in tensors))


def _scalars(values: Tensor):
    """The entries of a small vector: Python numbers on the CPU, where they are free, else 0-dimensional tensors."""
    return values.tolist() if values.device.type == "cpu" and not torch.compiler.is_compiling() else values.unbind()


def _is_at_least(r: Tensor, threshold) -> Tensor:
    """1.0 where r >= threshold, else 0.0. Vectorized by torch on the CPU, as `r >= threshold` and `where` are not."""
    return r.clone().ge_(threshold)


def _quantized(R: Tensor, thresholds: Tensor, half_steps: Tensor, zero: bool = False) -> Tensor:
    """A staircase for any order of the thresholds (T,) and any sign of the half steps (T,); less Aq(0) with `zero`."""
    if _has_operator(R, thresholds, half_steps):
        return torch.ops.abcnets.staircase.default(R, thresholds, half_steps, zero)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(R) not in (Tensor, nn.Parameter):
        # in one expression, for any tracer
        r = R.to(torch.promote_types(R.dtype, torch.float32))
        half_steps = half_steps.to(r.dtype)
        below = torch.where(thresholds <= 0, 1.0, 0.0).to(r.dtype) if zero else torch.zeros_like(half_steps)
        steps = [
            torch.where(r >= t, (1 - b) * 2 * h, -b * 2 * h) for t, b, h in zip(thresholds, below, half_steps)
        ]  # fmt: skip
        return torch.where(r.isnan(), r, sum(steps, 0 if zero else -half_steps.sum())).to(R.dtype)
    return _staircase(R, thresholds, half_steps, zero)


def _has_operator(*tensors: Tensor) -> bool:
    """Whether torch is asked for the operators below, as it knows engines for the CPU; tracers see plain torch."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(t.is_cpu and type(t) in (Tensor, nn.Parameter) for t in tensors)


def _climb(thresholds: Tensor, half_steps: Tensor, zero: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a staircase starts, a scalar; its thresholds in ascending order; the step at each; which count from below.

    With zero a threshold up to 0 counts (1) where it is not reached, so that at 0 there is nothing to add: a value adds
    (reached - below) step for each threshold.
    """
    thresholds, order = thresholds.sort()
    steps = 2 * half_steps.to(thresholds.dtype)[order]
    start = torch.zeros_like(steps[0]) if zero else -steps.sum() / 2
    return start, thresholds, steps, torch.where(thresholds <= 0, 1.0, 0.0).to(steps) * zero


def _staircase(R: Tensor, thresholds: Tensor, half_steps: Tensor, zero: bool) -> Tensor:
    """The operator abcnets::staircase, in plain torch: Aq."""
    start, *table = _climb(thresholds, half_steps, zero)
    thresholds, steps, below = map(_scalars, table)
    Aq = torch.empty_like(R)
    for r, a in _in_cache(R, Aq):
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        level = r.clamp(start, start)  # the same level everywhere, but a NaN stays a NaN
        for threshold, step, not_reached in zip(thresholds, steps, below):
            reached = _is_at_least(r, threshold)
            if zero:
                reached.sub_(not_reached)
            level.add_(reached.mul_(step))
        a.copy_(level)
    return Aq


def _staircase_backward(R: Tensor, G: Tensor, thresholds: Tensor, half_steps: Tensor, zero: bool) -> tuple:
    """The operator abcnets::staircase_backward, in plain torch: dL/dR, the sums of G [window] and those of G A, (T,).

    With `zero` the latter are of G (A - A(0)).
    """
    edges, scales = _scalars(thresholds), _scalars(half_steps)
    G_R = torch.empty_like(R)
    near_sums = [0.0] * len(thresholds)
    above_sums = [0.0] * len(thresholds)
    total = 0.0
    for r, g, g_r in _in_cache(R, G, G_R):
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        g = g.to(r.dtype)
        if zero:
            g = g * r.ne(0)
        slope = torch.zeros_like(g)
        for n, (threshold, scale) in enumerate(zip(edges, scales)):
            near = (r - threshold).abs_().le_(0.5).mul_(g)
            near_sums[n] = near_sums[n] + near.sum()
            slope.add_(near.mul_(scale))
            above_sums[n] = above_sums[n] + _is_at_least(r, threshold).mul_(g).sum()
        g_r.copy_(slope)
        total = total + g.sum()
    below = torch.where(thresholds <= 0, 2, 0) if zero else 1  # 1 + A(0), which is taken away; or 1
    return G_R, torch.stack(near_sums), 2 * torch.stack(above_sums) - below * total


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(R, vs, half_steps, zero):
        return _quantized(R, _thresholds(vs), half_steps, zero)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.zero = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        R, vs, half_steps = ctx.saved_tensors
        thresholds = _thresholds(vs)
        through_torch = _has_operator(R, G, thresholds, half_steps)
        run = torch.ops.abcnets.staircase_backward.default if through_torch else _staircase_backward
        G_R, near, signs = run(R, G, thresholds, half_steps, ctx.zero)
        G_vs = half_steps * near.to(half_steps.dtype)
        return G_R, G_vs.to(vs.dtype), signs.to(half_steps.dtype), None


# --------------------------------------------------------------------------- Training: less is kept
#
# A product of Aq and Wq needs both for the gradients. Aq would be one more tensor of R's size, and R is kept in any
# case: by the quantizer, and by the ReLU or BatchNorm that it came from. So where an engine makes Aq at the price of
# reading R, it is made again in the backward pass.


def _product(Aq: Tensor, Wq: Tensor, bias: Tensor | None, geometry: tuple) -> Tensor:
    """A convolution with (stride, padding, dilation, groups), or for () a linear layer's product of matrices."""
    if not geometry:
        return F.linear(Aq, Wq, bias)
    return (F.conv1d, F.conv2d, F.conv3d)[Wq.ndim - 3](Aq, Wq, bias, *geometry)


def _product_gradients(G: Tensor, Aq: Tensor, Wq: Tensor, geometry: tuple, wanted: list[bool]) -> list[Tensor | None]:
    """dL/dAq, dL/dWq, dL/dbias as torch's own backward passes compute them, each where it is wanted, else None."""
    if geometry:
        stride, padding, dilation, groups = geometry
        like = [len(Wq)], stride, padding, dilation, False, [0] * len(stride), groups
        return torch.ops.aten.convolution_backward(G, Aq, Wq, *like, wanted)
    formulas = (lambda: G @ Wq), (lambda: G.t() @ Aq), (lambda: G.sum(0))
    return [formula() if is_wanted else None for formula, is_wanted in zip(formulas, wanted)]


class _QuantizedProduct(torch.autograd.Function):
    """product(Aq, Wq) + bias of a layer, in one step of autograd, which keeps R and Wq.

    The numbers are those of `quantize_activation`, `quantize_weight` and the product one after the other, to the bit.
    """

    @staticmethod
    def forward(ctx, R, vs, betas, W, us, bias, activation_options, weight_options, geometry):
        code, zero = activation_options
        Wq = W if us is None else _fitted(W, us, *weight_options)[0]
        order = rises = None
        if code == "binary":
            vs_in_order, order = vs.sort(descending=True)
            rises = torch.tensor(_numbers_of_rises(len(betas)), dtype=torch.float32, device="cpu")
            thresholds, half_steps = _thresholds(vs_in_order), (rises * betas).sum(1)
        else:
            thresholds, half_steps = _thresholds(vs), _half_steps(betas, len(vs))
        ctx.save_for_backward(R, vs, betas, Wq, thresholds, half_steps, order, rises)
        ctx.parameters = W, us, bias  # which may change before the backward pass: it needs Wq
        ctx.options = activation_options, weight_options, geometry
        return _product(_quantized(R, thresholds, half_steps, zero), Wq, bias, geometry)

    @staticmethod
    def backward(ctx, G):
        if torch.is_grad_enabled():
            return _QuantizedProduct._differentiable_backward(ctx, G)
        R, vs, betas, Wq, thresholds, half_steps, order, rises = ctx.saved_tensors
        (_, zero), _, geometry = ctx.options
        *staircase, W_wanted, _, bias_wanted, _, _, _ = ctx.needs_input_grad
        # G has the type that autocast gave the product, and with it both operands.
        Aq = _quantized(R, thresholds, half_steps, zero).to(G.dtype)
        wanted = [any(staircase), W_wanted, bias_wanted]
        G_Aq, G_Wq, G_bias = _product_gradients(G, Aq, Wq.to(G.dtype), geometry, wanted)
        del Aq
        W, _, bias = ctx.parameters
        G_W = None if G_Wq is None else G_Wq.to(W.dtype)
        G_bias = None if G_bias is None else G_bias.to(bias.dtype)
        if G_Aq is None:
            return None, None, None, G_W, None, G_bias, None, None, None
        backward = torch.ops.abcnets.staircase_backward.default
        G_R, near, G_betas = backward(R, G_Aq.to(R.dtype), thresholds, half_steps, zero)
        G_vs = half_steps * near
        if order is not None:
            G_vs = torch.empty_like(G_vs).scatter_(0, order, G_vs)
            G_betas = (rises * G_betas[:, None]).sum(0)
        elif len(betas) < len(vs):
            G_betas = G_betas.sum(0, keepdim=True)
        return G_R, G_vs, G_betas, G_W, None, G_bias, None, None, None

    @staticmethod
    def _differentiable_backward(ctx, G):
        """Where a gradient of the gradient is wanted: by torch's own rules, from the layer's parts once more."""
        R, vs, betas, kept_Wq, *_ = ctx.saved_tensors
        W, us, bias = ctx.parameters
        (code, zero), weight_options, geometry = ctx.options
        Aq = quantize_activation(R, vs, betas, code, zero)
        Wq = W if us is None else quantize_weight(W, us, *weight_options)
        if not torch.allclose(Wq, kept_Wq, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError("a layer's weight was modified by an inplace operation after the forward pass, and a "
                               "gradient of its gradient needs it as it was")  # fmt: skip
        operands = [None if x is None else x.to(G.dtype) for x in (Aq, Wq, bias)]
        chosen = [x for x, wanted in zip((R, vs, betas, W, us, bias), ctx.needs_input_grad) if wanted]
        found = iter(torch.autograd.grad(_product(*operands, geometry), chosen, G, create_graph=True))
        return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:6]), None, None, None


def _keeps_input(R: Tensor, vs: Tensor, betas: Tensor, W: Tensor, us: Tensor | None) -> bool:
    """Whether this is a step of training that `_QuantizedProduct` is for: an engine makes Aq, and nobody else looks."""
    return (
        torch.is_grad_enabled()
        and (R.requires_grad or vs.requires_grad or betas.requires_grad)  # or the quantizer would not keep R
        and (us is None or not us.requires_grad)
        and R.dtype in (torch.float32, torch.bfloat16)
        and vs.dtype is betas.dtype is torch.float32
        and _has_operator(R, vs, betas, W)
        and not torch._C._are_functorch_transforms_active()
        and "engine" in _engine("cpu")
    )


# --------------------------------------------------------------------------- Layers


class _ABCLayer(nn.Module):
    """What the four layers share: the bases, the active flag, loading, and two more ways to construct one."""

    _is_abcnets = True  # says so to another copy of this file
    _bases_are_empty = False  # a layer of the meta device was given memory, and nothing was loaded into it yet
    _stock: type[nn.Module]  # torch's layer of that name
    spatial_dims: int  # 0 for a linear layer

    def _set_bases(self, weight_bases, activation_bases, us, vs, betas, active, per_channel, learn_us, code,
                   zero) -> None:  # fmt: skip
        """Called once `weight` is there; the bases go to its device and dtype."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        if not self.weight.is_floating_point():
            raise TypeError(f"a binarized layer's weights must be floating point, got {self.weight.dtype}")
        self.code = _codes(code, weight_bases, activation_bases)
        if zero not in (None, True, False):
            raise ValueError(f"zero must be True, False or None for what the code does, got {zero!r}")
        if activation_bases is None:
            self.zero = False
        else:
            self.zero = self.code[1] != "thermometer" if zero is None else bool(zero)
        if weight_bases is not None:
            shifts = _count_of_levels(self.code[0], weight_bases) - 1
            us = _start_values("us", gaussian_shifts if us is None else us, shifts, like)
        elif us is not None:
            raise ValueError("us were given, but weight_bases=None leaves the weights float")
        if activation_bases is not None:
            if vs is None or betas is None:
                constant = not self.zero  # whose level says what a base could be spent on
                start_vs, start_betas = _start_activations(activation_bases, self.code[1], constant)
                vs, betas = start_vs if vs is None else vs, start_betas if betas is None else betas
            vs = _start_values("vs", vs, _count_of_levels(self.code[1], activation_bases) - 1, like)
            betas = _start_values("betas", betas, 1 if self.code[1] == "uniform" else activation_bases, like)
        elif vs is not None or betas is not None:
            raise ValueError("vs or betas were given, but activation_bases=None leaves the activations float")
        if learn_us and us is not None:
            self.us = nn.Parameter(us)
        else:
            self.register_buffer("us", us)
        self.register_parameter("vs", None if vs is None else nn.Parameter(vs))
        self.register_parameter("betas", None if betas is None else nn.Parameter(betas))
        self.active = bool(active)
        self.per_channel = bool(per_channel)
        self.nearest = not learn_us

    @property
    def weight_bases(self) -> int | None:
        """M, or None where the weights stay float."""
        return None if self.us is None else _bases_with(len(self.us), self.code[0], "us")

    @property
    def activation_bases(self) -> int | None:
        """N, or None where the activations stay float."""
        return None if self.vs is None else _bases_with(len(self.vs), self.code[1], "vs")

    def alphas(self) -> Tensor:
        """The scales of the weight bases, (M, O), always those of the present weights; (M, 1) where not per channel."""
        return fit_weight(self.weight, *self._weight_options())

    def bases(self) -> Tensor:
        """The weight bases B (M, O, C, *K), +1 and -1, of the present weights."""
        return weight_bases(self.weight, *self._weight_options())

    def _weight_options(self) -> tuple:
        if self.us is None:
            raise ValueError("this layer's weights are float (weight_bases=None): they have no bases and no alphas")
        return self.us, self.per_channel, self.code[0], self.nearest

    def quantized_weight(self) -> Tensor:
        """Wq, shaped like `weight`; `weight` itself where weight_bases is None."""
        return self.weight if self.us is None else quantize_weight(self.weight, *self._weight_options())

    def quantized_input(self, input: Tensor) -> Tensor:
        """Aq of a batch, shaped like it; the batch itself where activation_bases is None."""
        self._check_input(input)
        return input if self.vs is None else quantize_activation(input, self.vs, self.betas, self.code[1], self.zero)

    def _check_input(self, input: Tensor) -> None:
        if not input.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes floating-point input, got {input.dtype}")
        channels = self.weight.shape[1] * getattr(self, "groups", 1)
        axis = -1 - self.spatial_dims
        if input.ndim < -axis or input.shape[axis] != channels:
            wanted = " x ".join(["batch", str(channels), *["size"] * self.spatial_dims])
            raise ValueError(f"{type(self).__name__} takes input of shape {wanted}, got {tuple(input.shape)}")

    def _forward(self, input: Tensor) -> Tensor:
        """product(Aq, Wq) + bias, by the way of it that keeps less for the backward pass, where there is one."""
        geometry = self._simple_geometry(input)
        if self.vs is None or geometry is None or not _keeps_input(input, self.vs, self.betas, self.weight, self.us):
            return self._multiply(self.quantized_input(input), self.quantized_weight())
        self._check_input(input)
        _check_activations(input, self.vs, self.betas, self.code[1])
        weight_options = None if self.us is None else self._weight_options()[1:]
        rows = input if geometry or input.ndim == 2 else input.flatten(0, -2)
        output = _QuantizedProduct.apply(rows, self.vs, self.betas, self.weight, self.us, self.bias,
                                         (self.code[1], self.zero), weight_options, geometry)  # fmt: skip
        return output if rows is input else output.unflatten(0, input.shape[:-1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe_bases(self)}, active={self.active}"

    # The flag travels in the state dict, yet stays a Python bool in the layer: a tensor would have to be read back from
    # the device in every forward pass, and would break a compiled graph.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.active, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.active = bool(state)

    def __setstate__(self, state):
        before_codes = {"code": ("thermometer", "thermometer"), "zero": False, "nearest": True}  # of an older pickle
        super().__setstate__({**before_codes, **state})

    def _apply(self, fn, recurse=True):
        was_meta = any(values is not None and values.is_meta for values in (self.us, self.vs))
        super()._apply(fn, recurse)
        self._bases_are_empty |= was_meta and not self.weight.is_meta
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = {prefix + name for name in ("us", "vs", "betas", "_extra_state")}
        from_float = own.isdisjoint(state_dict)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if not from_float:
            self._bases_are_empty = False
        elif not self._bases_are_empty:  # a stock layer's checkpoint: the new entries keep their start values
            missing[:] = [key for key in missing if key not in own]

    @classmethod
    def _around(cls, weight: Tensor, bias: Tensor | None, geometry: dict, bases: dict):
        """A layer around existing parameters: nothing is drawn at random, and they are shared, not copied."""
        layer = cls(**geometry, bias=bias is not None, device="meta", dtype=weight.dtype,
                    weight_bases=None, activation_bases=None)  # fmt: skip
        layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        for name in ("us", "vs", "betas"):
            delattr(layer, name)
        layer._set_bases(**{**_DEFAULT_BASES, **bases})
        return layer

    @classmethod
    def _geometry(cls, weight: Tensor, **arguments) -> dict:
        return {"in_features": weight.shape[1], "out_features": weight.shape[0], **arguments}

    @classmethod
    def from_parameters(cls, weight, bias=None, us=None, vs=None, betas=None, *, active=False, per_channel=True,
                        learn_us=False, code="thermometer", zero=None, **geometry):  # fmt: skip
        """The original's second constructor: a layer around given parameters, dimensions read off the weight.

        Args:
            weight: (O, C / groups, *K) float tensor; (O, C) for a linear layer. A Parameter is shared, not copied.
            bias: (O,) or None for no bias.
            us: M shifts, or None to leave the weights float.
            vs, betas: N shifts and scales (both or neither), or None to leave the activations float.
            code, zero: as in the constructor; how many us, vs and betas there are then is said at `ABCConv2d`.
            **geometry: stride, padding, dilation, groups, padding_mode, as in the constructor.

        Raises: ValueError for a weight of the wrong number of dimensions, a bias of the wrong length, or vs and betas
            whose lengths the code does not have; TypeError for a weight that is no floating-point tensor.
        """
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"weight must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight))}")
        if weight.ndim != cls.spatial_dims + 2:
            raise ValueError(f"{cls.__name__} needs a weight of {cls.spatial_dims + 2} dimensions, "
                             f"got shape {tuple(weight.shape)}")  # fmt: skip
        if bias is not None and tuple(bias.shape) != (len(weight),):
            raise ValueError(f"bias must have shape ({len(weight)},) to fit the weight, got {tuple(bias.shape)}")
        lengths = [None if values is None else len(values) for values in (us, vs, betas)]
        of_weights, of_activations = _codes(code, None if us is None else 2, None if vs is betas is None else 2)
        if of_activations == "thermometer" and lengths[1] != lengths[2]:
            raise ValueError(f"vs and betas must have the same length, got {lengths[1]} and {lengths[2]}")
        if (vs is None) != (betas is None):
            raise ValueError(f"vs and betas must be given both or neither, got {lengths[1]} and {lengths[2]} numbers")
        bases = {
            "weight_bases": None if us is None else _bases_with(lengths[0], of_weights, "us"),
            "activation_bases": None if vs is None else _bases_with(lengths[1], of_activations, "vs"),
            "us": us, "vs": vs, "betas": betas, "active": active, "per_channel": per_channel, "learn_us": learn_us,
            "code": code, "zero": zero,
        }  # fmt: skip
        return cls._around(weight, bias, cls._geometry(weight, **geometry), bases)

    @classmethod
    def from_float(cls, layer: nn.Module, **bases):
        """A binarized layer that shares the stock layer's weight and bias (the same Parameter objects) and geometry.

        Args:
            layer: the torch layer of the same name (nn.Conv2d for ABCConv2d).
            **bases: weight_bases, activation_bases, us, vs, betas, active, per_channel, learn_us, code, zero.
        """
        if not isinstance(layer, cls._stock):
            raise TypeError(f"{cls.__name__}.from_float takes an nn.{cls._stock.__name__}, got {type(layer).__name__}")
        names = ("stride", "padding", "dilation", "groups", "padding_mode") if cls.spatial_dims else ()
        geometry = cls._geometry(layer.weight, **{name: getattr(layer, name) for name in names})
        return cls._around(layer.weight, layer.bias, geometry, bases).train(layer.training)


_DEFAULT_BASES = {
    "weight_bases": 3, "activation_bases": 3, "us": None, "vs": None, "betas": None,
    "active": False, "per_channel": True, "learn_us": False, "code": "thermometer", "zero": None,
}  # fmt: skip


def _start_values(name: str, values, count: int, like: dict) -> Tensor:
    """A (count,) tensor from numbers, a tensor, or a function of the count such as `even_shifts`."""
    values = values(count) if callable(values) else values
    values = torch.as_tensor(values, **like).detach().clone()
    if values.shape != (count,):
        numbers = "one number" if count == 1 else f"{count} numbers"
        raise ValueError(f"{name} must be {numbers} for these bases and this code, got shape {tuple(values.shape)}")
    return values


def _describe_bases(layer: nn.Module) -> str:
    """The bases of an ABC layer or a packed one, as its repr shows them."""
    described = f"weight_bases={layer.weight_bases}, activation_bases={layer.activation_bases}"
    if layer.code != ("thermometer", "thermometer"):
        described += f", code={layer.code[0] if layer.code[0] == layer.code[1] else layer.code!r}"
    has_zero = layer.zero is not None if isinstance(layer, PackedLayer) else layer.zero
    return described + (", zero=True" if has_zero else "")


class _ABCConv(_ABCLayer):
    """The convolutions' constructor; its `super()` is torch's own layer."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
                 padding_mode="zeros", device=None, dtype=None, *, weight_bases=3, activation_bases=3, us=None, vs=None,
                 betas=None, weight_init=None, bias_init=None, active=False, per_channel=True, learn_us=False,
                 code="thermometer", zero=None):  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         device, dtype)  # fmt: skip
        _initialize(self, weight_init, bias_init)
        self._set_bases(weight_bases, activation_bases, us, vs, betas, active, per_channel, learn_us, code, zero)

    def _multiply(self, Aq: Tensor, Wq: Tensor) -> Tensor:
        return self._conv_forward(Aq, Wq, self.bias)

    def _simple_geometry(self, input: Tensor) -> tuple | None:
        """What `_product` calls the geometry; None without a batch, and where padding is not zeros alike on both sides.
        """
        padding = self.padding
        if isinstance(padding, str):
            reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size)]
            padding = None if any(pixels % 2 for pixels in reach) else tuple(pixels // 2 for pixels in reach)
        if self.padding_mode != "zeros" or padding is None or input.ndim != self.spatial_dims + 2:
            return None
        return self.stride, padding, self.dilation, self.groups

    @classmethod
    def _geometry(cls, weight: Tensor, groups=1, **arguments) -> dict:
        return {
            "in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0],
            "kernel_size": tuple(weight.shape[2:]), "groups": groups, **arguments,
        }  # fmt: skip


def _initialize(layer: nn.Module, weight_init, bias_init) -> None:
    with torch.no_grad():
        if weight_init is not None:
            weight_init(layer.weight)
        if bias_init is not None and layer.bias is not None:
            bias_init(layer.bias)


class ABCConv2d(_ABCConv, nn.Conv2d):
    """A 2-D convolution whose weights and input are sums of +1/-1 bases: a drop-in for nn.Conv2d (arXiv:1711.11294).

        y = conv2d(Aq, Wq) + bias,   Wq = sum_m alpha_m B_m,   Aq = sum_n beta_n A_n

    Training runs this one float convolution; `pack` turns it into M x N bitwise ones. As in the original, a layer that
    is constructed is inactive: bit for bit an nn.Conv2d, until `binarize` switches it on. A stock layer's checkpoint
    loads into it with strict=True.

    Args:
        in_channels ... dtype: as in nn.Conv2d.
        weight_bases: M, or None to leave the weights float.
        activation_bases: N, or None to leave the input float.
        us: M shifts of the weight bases (2^M - 1 in the binary code), as numbers or as a function of how many they are.
            Default: `gaussian_shifts`.
        vs, betas: N shifts (2^N - 1 in the binary code) and N scales (one in the uniform code) of the activation bases,
            likewise. Default: the best fit to a rectified unit Gaussian, which is what BatchNorm and ReLU put out.
        weight_init, bias_init: functions that fill a tensor in place, such as those of torch.nn.init. Default: torch's.
        active: whether quantization starts switched on; `binarize` switches it.
        per_channel: mean, std and alpha per output channel, or one for the layer.
        learn_us: make us a parameter. In the binary and uniform codes the weights are then cut where us say;
            otherwise us are where the search for the nearest levels begins (`fit_weight`).
        code: "thermometer", the paper's, with N + 1 levels from N bases; "binary", with 2^N; "uniform", with N + 1 of
            equal distance; or a pair of these for weights and activations. With one base all are the same.
        zero: whether a 0 that comes in stays 0, like those of padding: the layer convolves Aq - Aq(0). Default: yes,
            except in the thermometer code, the paper's.

    Training keeps R for the backward pass. With an engine for the CPU that is all it keeps of R's size (and so do 1-D,
    3-D and linear layers; not where padding is other than zeros, or in torch.func's transforms): Aq is made again.

    Shape: input (B, C, H, W) -> (B, O, H', W'), as nn.Conv2d. Under autocast, what torch does with conv2d.

    Attributes:
        weight, bias: the float parameters, as in nn.Conv2d.
        us, vs, betas: the bases' shifts and scales, as many as said above; None on a side that stays float.
        code (pair of str), zero (bool): as above, with "thermometer" for one base and for a side that stays float.
        active (bool): travels in the state dict; code and zero do not, as stride does not.

    Raises: ValueError for a count of bases that is not a positive integer, shifts or scales of another length, or
        input of the wrong shape; TypeError for input that is not floating point.

    Example::

        >>> layer = binarize(ABCConv2d(16, 33, 3, padding=1, weight_bases=3, activation_bases=3))
        >>> layer(torch.rand(2, 16, 32, 32)).shape
        torch.Size([2, 33, 32, 32])
    """

    _stock = nn.Conv2d
    spatial_dims = 2

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        return self._forward(input)


class ABCConv1d(_ABCConv, nn.Conv1d):
    """A 1-D convolution whose weights and input are sums of +1/-1 bases: a drop-in for nn.Conv1d (arXiv:1711.11294).

        y = conv1d(Aq, Wq) + bias,   Wq = sum_m alpha_m B_m,   Aq = sum_n beta_n A_n

    Arguments, attributes and errors are those of `ABCConv2d`, the geometry that of nn.Conv1d.

    Shape: input (B, C, L) -> (B, O, L'), as nn.Conv1d.

    Example::

        >>> layer = binarize(ABCConv1d(16, 33, 3, padding=1, weight_bases=3, activation_bases=3))
        >>> layer(torch.rand(2, 16, 50)).shape
        torch.Size([2, 33, 50])
    """

    _stock = nn.Conv1d
    spatial_dims = 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        return self._forward(input)


class ABCConv3d(_ABCConv, nn.Conv3d):
    """A 3-D convolution whose weights and input are sums of +1/-1 bases: a drop-in for nn.Conv3d (arXiv:1711.11294).

        y = conv3d(Aq, Wq) + bias,   Wq = sum_m alpha_m B_m,   Aq = sum_n beta_n A_n

    Arguments, attributes and errors are those of `ABCConv2d`, the geometry that of nn.Conv3d.

    Shape: input (B, C, D, H, W) -> (B, O, D', H', W'), as nn.Conv3d.

    Example::

        >>> layer = binarize(ABCConv3d(16, 33, 3, padding=1, weight_bases=3, activation_bases=3))
        >>> layer(torch.rand(2, 16, 8, 9, 9)).shape
        torch.Size([2, 33, 8, 9, 9])
    """

    _stock = nn.Conv3d
    spatial_dims = 3

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        return self._forward(input)


class ABCLinear(_ABCLayer, nn.Linear):
    """A linear layer whose weights and input are sums of +1/-1 bases: a drop-in for nn.Linear (arXiv:1711.11294).

        y = linear(Aq, Wq) + bias,   Wq = sum_m alpha_m B_m,   Aq = sum_n beta_n A_n

    Args: in_features, out_features, bias, device, dtype as in nn.Linear; the others, attributes and errors as in
        `ABCConv2d`.

    Shape: input (..., C) -> (..., O), as nn.Linear.

    Example::

        >>> layer = binarize(ABCLinear(20, 30, weight_bases=3, activation_bases=3))
        >>> layer(torch.rand(128, 20)).shape
        torch.Size([128, 30])
    """

    _stock = nn.Linear
    spatial_dims = 0

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, weight_bases=3,
                 activation_bases=3, us=None, vs=None, betas=None, weight_init=None, bias_init=None, active=False,
                 per_channel=True, learn_us=False, code="thermometer", zero=None):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        _initialize(self, weight_init, bias_init)
        self._set_bases(weight_bases, activation_bases, us, vs, betas, active, per_channel, learn_us, code, zero)

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        return self._forward(input)

    def _multiply(self, Aq: Tensor, Wq: Tensor) -> Tensor:
        return F.linear(Aq, Wq, self.bias)

    def _simple_geometry(self, input: Tensor) -> tuple | None:
        return () if input.ndim > 1 else None


_ABC_OF = {cls._stock: cls for cls in (ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear)}


# --------------------------------------------------------------------------- Whole models


def _check_own(model: nn.Module) -> None:
    """Layers of another copy of this file would pass for a stranger's here, and be left out without a word."""
    own = _ABCLayer, PackedLayer, PackedPool, PackedChain, EightBitConv, ChainSum, ChainRead, ChainAverage
    for name, layer in model.named_modules():
        if getattr(layer, "_is_abcnets", False) and not isinstance(layer, own):
            raise ValueError(f"layer {name!r} is of another copy of abcnets ({type(layer).__module__}) than this one "
                             f"({__name__}), or was made before it was reloaded: use one of both")  # fmt: skip


def binarize(module: nn.Module, active: bool = True) -> nn.Module:
    """Switch quantization on (or off again) in a layer, or in every such layer of a model; returns the module."""
    _check_own(module)
    for layer in module.modules():
        if isinstance(layer, _ABCLayer):
            layer.active = bool(active)
    return module


@torch.no_grad()
def separate_thresholds(model: nn.Module) -> nn.Module:
    """Keep the thresholds of each layer's activation bases apart, in place: call it after each step of an optimizer.

    Two thresholds that meet are one, and get the same gradient from then on: a base is lost for good. So they are moved
    as little as it takes to be a gap apart, half of the mean half step |h| of the layer's staircase; where a staircase
    follows its input, thresholds are about 2 h apart. That is the projection onto the set of such thresholds (isotonic
    regression: Barlow et al. 1972), so thresholds that push one another stay where they push, and those that are apart
    are not touched. Thresholds that are no finite numbers are left alone, with all others of their layer.

    Args:
        model: any module; its ABC layers with more than one threshold are looked at, active or not.

    Returns: the model.
    """
    _check_own(model)
    for layer in model.modules():
        if isinstance(layer, _ABCLayer) and layer.vs is not None and len(layer.vs) > 1 and not layer.vs.is_meta:
            thresholds = _thresholds(layer.vs)
            gap = _half_steps(layer.betas, len(thresholds)).abs().mean() / 2
            moved = _separated(thresholds, gap)
            # Those that stay keep their very bits, which 1/2 - (1/2 - v) need not have.
            layer.vs.copy_(torch.where(moved == thresholds, layer.vs, 0.5 - moved))
    return model


def _separated(thresholds: Tensor, gap: Tensor) -> Tensor:
    """The nearest thresholds (T,) with such gaps between neighbours, in the order they have."""
    sorted, order = thresholds.sort(stable=True)
    is_apart = (sorted.diff() >= gap * (1 - 1e-5)).all()  # as what was moved before is, to rounding
    # With the gaps taken out: nondecreasing, and nearest to y. Value i is max over j <= i of min over k >= i of the
    # mean of y_j..y_k.
    steps = torch.arange(len(thresholds), device=thresholds.device)
    spread = gap * steps
    sums = F.pad((sorted - spread).cumsum(0), (1, 0))
    lengths = steps - steps[:, None] + 1
    means = torch.where(lengths > 0, (sums[1:] - sums[:-1, None]) / lengths.clamp(min=1), torch.inf)
    least = means.flip(1).cummin(1).values.flip(1)
    moved = torch.where(lengths > 0, least, -torch.inf).amax(0) + spread
    moved = torch.where((moved - sorted).abs() <= 1e-5 * gap, sorted, moved)
    stays = is_apart | ~moved.isfinite().all()
    return torch.where(stays, thresholds, torch.empty_like(thresholds).scatter_(0, order, moved))


def plan(model, weight_bases=3, activation_bases=3, *, filter_fn=None, settings=None,
         code="thermometer") -> "Summary":  # fmt: skip
    """What `convert` would do with each layer that holds weights, and why: a table, and nothing is changed.

        >>> up = nn.ConvTranspose2d(8, 8, 2)
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), up, nn.Conv2d(8, 2, 1))
        >>> plan(network, weight_bases=2, activation_bases=3, code="binary")
        layer  kind                    weight  parameters  M  N  code    why
        ----------------------------------------------------------------------------------------------
        0      Conv2d           8 x 3 x 3 x 3         224                first layer: float by default
        1      Conv2d           8 x 8 x 3 x 3         584  2  3  binary  converted
        2      ConvTranspose2d  8 x 8 x 2 x 2         264                has no binary form
        3      Conv2d           2 x 8 x 1 x 1          18                last layer: float by default
        ----------------------------------------------------------------------------------------------
        total                                       1,090

    Args: as in `convert`, which decides by this very plan.

    Columns: layer, kind, weight (its shape), parameters (of the layer itself, its children not counted), M, N (None on
    a side that stays float), code (two words where they differ), why. Rows are all layers with a tensor of parameters
    of two or more dimensions.
    Raises: as `convert`.
    """
    converted = _plan(model, weight_bases, activation_bases, filter_fn, settings, code)
    rows = Summary()
    for name, layer in model.named_modules():
        why, bases = converted.get(name) or (_why_not(layer), {})
        if why is None:
            continue
        if isinstance(layer, (_ABCLayer, PackedLayer)):
            M, N, code_word = _bases_of(layer)
        else:
            M, N = bases.get("weight_bases"), bases.get("activation_bases")
            code_word = _code_word(M, N, bases.get("code"))
        sizes = [p.numel() for p in layer.parameters(False) if not nn.parameter.is_lazy(p)]
        rows.append({"layer": name, "kind": type(layer).__name__, "weight": " x ".join(map(str, _weight_shape(layer))),
                     "parameters": sum(sizes), "M": M, "N": N, "code": code_word, "why": why})  # fmt: skip
    return rows


def _plan(model, weight_bases, activation_bases, filter_fn, settings, code) -> dict[str, tuple[str, dict]]:
    """{name: (why, bases)} of the layers that can be binarized; the bases of those that stay float are {}."""
    _check_own(model)
    candidates = {name: layer for name, layer in model.named_modules() if _can_be_binarized(layer)}
    if isinstance(settings, dict):
        unknown = settings.keys() - candidates.keys()
        if unknown:
            raise ValueError(f"settings name layers that can't be converted: {sorted(unknown)}; "
                             f"the model has {sorted(candidates)}")  # fmt: skip
    names = list(candidates)
    ends = {names[0]: "first", names[-1]: "last"} if len(names) > 1 else {}

    def left_out(name, layer):
        if filter_fn is not None:
            return None if filter_fn(layer, name) else "filter_fn says no"
        if name in ends:
            return f"{ends[name]} layer: float by default"
        if ends and layer.weight.shape[1:2] == (1,) and getattr(layer, "groups", 1) > 1:
            return "depthwise: float by default"
        return None

    decisions = {}
    for name, layer in candidates.items():
        why, own = left_out(name, layer), {}
        if isinstance(settings, dict) and name in settings:
            own = settings[name]
            why = None if own is not None else "settings say no"
        elif why is None and callable(settings):
            own = settings(name, layer)
            why = "settings say no" if own is None else None
        if why is None:
            if not isinstance(own, dict) or own.keys() - _DEFAULT_BASES.keys():
                raise ValueError(f"settings for a layer must be None or a dict with some of {sorted(_DEFAULT_BASES)}; "
                                 f"for {name!r} they are {own!r}")  # fmt: skip
            bases = {"weight_bases": weight_bases, "activation_bases": activation_bases, "code": code, **own}
            bases["code"] = _codes(bases["code"], bases["weight_bases"], bases["activation_bases"])
            decisions[name] = ("converted", bases)
        else:
            decisions[name] = (why, {})
    return decisions


def _can_be_binarized(layer: nn.Module) -> bool:
    # weight_norm, spectral_norm and pruning, in their older form, keep the layer's class and compute its weight.
    return type(layer) in _ABC_OF and "weight" in layer._parameters


def _why_not(layer: nn.Module) -> str | None:
    """Why a layer that holds weights is not for `convert`; None for one that holds none."""
    if isinstance(layer, PackedLayer):
        return "packed already"
    if isinstance(layer, _ABCLayer):
        return "binary already" if layer.active else "binary, but switched off: binarize switches it on"
    if nn.parameter.is_lazy(getattr(layer, "weight", None)):
        return "its shape is not known yet: run the model once"
    if type(layer) in _ABC_OF:
        return "its weight is computed: remove weight_norm, spectral_norm or pruning first"
    for stock in _ABC_OF:
        if isinstance(layer, stock):
            return f"a subclass of {stock.__name__}: its forward pass is its own"
    return "has no binary form" if len(_weight_shape(layer)) > 1 else None


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight; where there is none of that name, of its largest tensor of parameters."""
    if isinstance(layer, PackedLayer):
        return (layer.out_channels, layer.channels // layer.groups, *layer.kernel_size)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        weight = max(layer.parameters(False), key=torch.numel, default=None)
    if weight is None or nn.parameter.is_lazy(weight):
        return ()
    flat = max(weight.shape, default=0) == weight.numel()  # the scales and shifts of a norm, however they are shaped
    return () if flat and not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) else tuple(weight.shape)


def _bases_of(layer: nn.Module) -> tuple[int | None, int | None, str | None]:
    """M, N and the code of an ABC layer or a packed one; None on a side that is float."""
    if not isinstance(layer, PackedLayer) and not layer.active:
        return None, None, None
    M, N = layer.weight_bases, layer.activation_bases
    return M, N, _code_word(M, N, layer.code)


def _code_word(M: int | None, N: int | None, code) -> str | None:
    """The code in one word; in two where weights and activations have different ones."""
    words = [each for bases, each in zip((M, N), code or ()) if bases is not None]
    several = [each for bases, each in zip((M, N), code or ()) if bases is not None and bases > 1] or words
    return " x ".join(several if len(set(several)) > 1 else several[:1]) or None


def convert(model, weight_bases=3, activation_bases=3, *, filter_fn=None, settings=None, code="thermometer", **bases):
    """A copy of a model with its convolutions and linear layers binarized, weights kept; the model itself is untouched.

    What stays float by default: the first and the last of these layers, as everywhere in the literature, since they
    hold few of the weights and lose most by binarization; and depthwise convolutions (one input channel a group), which
    bits make hardly smaller and no faster: a byte holds up to eight input channels, and theirs hold one. Subclasses of
    torch's layers are left alone, since their forward pass is theirs. A layer used in two places stays one layer.
    `plan` tells for each layer what is done with it, and why.

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
        >>> binary = convert(network, 2, 2, settings={"1": {"weight_bases": 5}, "3": {"activation_bases": None}})
        >>> [(layer.weight_bases, layer.activation_bases) for layer in binary[1:]]
        [(5, 2), (2, 2), (2, None)]

    Args:
        model: any module, or a single nn.Conv1d/2d/3d or nn.Linear (which is then converted itself).
        weight_bases, activation_bases: M and N of every converted layer; None leaves that side float.
        filter_fn: filter_fn(layer, name) -> bool decides which layers are converted; replaces the default choice.
        settings: exceptions by name or by function, {name: {"weight_bases": 5}} or settings(name, layer): a dict of
            bases for that layer, or None for "leave it float". Names that the model lacks raise ValueError. An
            entry by name also converts a layer that the default choice or filter_fn leaves out.
        code: "thermometer", "binary", "uniform" or a pair of them, of every converted layer: see `ABCConv2d`.
        **bases: us, vs, betas, active (default here: True), per_channel, learn_us, zero, for every converted layer.

    Returns: the converted copy.
    Raises: ValueError for settings of a layer that is not there or can't be converted, or that make no sense.
    """
    decisions = _plan(model, weight_bases, activation_bases, filter_fn, settings, code)
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    replaced = {
        modules[name]: _ABC_OF[type(modules[name])].from_float(modules[name], **{"active": True, **bases, **own})
        for name, (_, own) in decisions.items() if own
    }  # fmt: skip
    return _replace(model, replaced)


def _replace(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, name, replaced[child])
        # torch's fused inference path reads the weights of its linear layers without calling these.
        if isinstance(parent, nn.TransformerEncoderLayer) and replaced:
            parent.activation_relu_or_gelu = 0
        elif isinstance(parent, nn.TransformerEncoder) and replaced:
            parent.use_nested_tensor = False
    return replaced.get(model, model)


@torch.no_grad()
def calibrate(model, batches, float_model=None, *, compensate: bool = True, progress: bool = True) -> nn.Module:
    """Fit a freshly binarized model to some data, without training; in place, returns the model.

    A freshly binarized network falls apart less by its quantizers than because what follows them no longer fits: the
    BatchNorm statistics, the thresholds and, with one or two bases, the weights themselves. In one pass over all the
    images, in the order in which the layers run, each seeing what the layers before it, already calibrated, really
    put out:

    - a BatchNorm behind a binarized layer gets the mean and variance of what now reaches it;
    - a binarized layer gets Lloyd-Max thresholds of its input (vs) and least-squares betas, then weights that make up
      for what binarization loses: least squares for the binarized input, rounded to the bases with error feedback;
    - a binarized layer with a bias has it moved so that each channel's mean is what the float layer puts out.

    What a layer aims at is what the same layer puts out in the float network, so that it also makes up for what the
    layers before it have lost. A freshly converted model still is that network, with its bases switched off. One that
    was calibrated or trained is not: to calibrate it again, give `float_model`.

    Works on any model: modules are met where they run, by hooks, whatever the code between them. A module that runs
    several times is calibrated on its first run, one that never runs stays as it is, with a warning. A layer of more
    than 8,192 weights a channel keeps its weights. All images go through together: a thousand small ones, or as many
    as an evaluation batch may hold.

    Args:
        model: a model with active ABC layers.
        batches: an iterable of input tensors, or of (input, ...) tuples such as a DataLoader yields; or one tensor.
        float_model: the trained float network that the model was converted from; default: the model itself, with its
            bases switched off.
        compensate: move the weights. False leaves them, and spends one of N > 1 activation bases on the constant that
            a symmetric staircase lacks, which moved weights and the bias or BatchNorm behind the layer make up for.
        progress: show a bar, where tqdm is installed.

    Raises: ValueError where the model has no active ABC layer, float_model lacks one of them, or there are no images.
    """
    _check_own(model)
    layers = [m for m in model.modules() if isinstance(m, _ABCLayer) and m.active]
    if not layers:
        raise ValueError("calibrate needs a model with at least one active ABC layer: convert or binarize it first")
    images = _gather(batches, layers[0].weight.device)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    wanted = _float_outputs(model, float_model, layers, images)
    bar = _progress_bar(len(layers) + len(norms)) if progress else None
    done = set()

    def before(module, inputs):
        if module in done:
            return
        if isinstance(module, _ABCLayer):
            moved = compensate and module.weight[0].numel() <= _COMPENSATED_UP_TO
            _calibrate_layer(module, inputs[0], wanted[module][1] if moved else None)
            done.add(module)
        elif done:  # a BatchNorm ahead of every binarized layer fits as it is
            _calibrate_statistics(module, inputs[0])
            done.add(module)
        if bar is not None:
            bar.update()

    def after(module, inputs, output):
        if module in wanted:
            mean, _ = wanted.pop(module)
            if module.bias is not None:
                shift = mean - _channel_means(module, output)
                module.bias += shift
                return output + _along_channels(module, shift)

    try:
        _run_with_hooks(model, images, {m: (before, after) for m in layers} | {m: (before, None) for m in norms})
    finally:
        if bar is not None:
            bar.close()
    unreached = [name for name, module in model.named_modules() if module in layers and module not in done]
    if unreached:
        warnings.warn(f"calibrate: the model never called {unreached}, which stay as they were. If they are in use all "
                      "the same, some other module reads their weights: leave them float", stacklevel=2)  # fmt: skip
    return model


# A layer with K weights a channel takes several K x K matrices to compensate; beyond this they would fill the memory.
_COMPENSATED_UP_TO = 8192


def _gather(batches, device) -> Tensor:
    """All inputs of `calibrate` as one batch."""
    if isinstance(batches, Tensor):
        batches = [batches]
    inputs = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
    if not all(isinstance(input, Tensor) for input in inputs):
        kinds = sorted({type(input).__name__ for input in inputs})
        raise TypeError(f"calibrate takes batches that are tensors, or tuples whose first entry is one, got {kinds}")
    if sum(map(len, inputs)) == 0:
        raise ValueError("calibrate needs at least one image, got none")
    images = torch.cat(inputs).to(device)
    if images.is_meta:
        raise ValueError("calibrate needs a model and images that hold values, and got them on torch's meta device")
    if images.isnan().any():
        raise ValueError("calibrate was given images that hold NaN")
    return images


def _run_with_hooks(model, images, hooks: dict) -> None:
    """One forward pass in eval mode with {module: (before, after)} hooks; afterwards the model is as it was."""
    handles, was_training = [], [module for module in model.modules() if module.training]
    model.eval()
    try:
        for module, (before, after) in hooks.items():
            if before is not None:
                handles.append(module.register_forward_pre_hook(before))
            if after is not None:
                handles.append(module.register_forward_hook(after))
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module in was_training:
            module.training = True


def _float_outputs(model, float_model, layers, images) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """What the layers put out in the float network: {layer: (each channel's mean, the output in some places)}."""
    twins = {layer: layer for layer in layers}
    if float_model is not None:
        modules = dict(float_model.named_modules())
        twins = {modules.get(name): layer for name, layer in model.named_modules() if layer in twins}
        if None in twins:
            name = next(name for name, layer in model.named_modules() if layer is twins[None])
            raise ValueError(f"float_model is not what the model was converted from: it has no layer {name!r}")
    outputs = {}

    def after(module, inputs, output):
        outputs.setdefault(twins[module], _sample(twins[module], output))

    binarize(model, False)
    try:
        _run_with_hooks(float_model or model, images, {twin: (None, after) for twin in twins})
    finally:
        for layer in layers:
            layer.active = True
    return outputs


def _sample(layer: _ABCLayer, output: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean (O,) of a layer's output, and the output in some places (places, O)."""
    y = output.movedim(-1 - layer.spatial_dims, -1)
    return _channel_means(layer, output), y[_places(layer, y.shape[:-1])]


def _channel_means(layer: _ABCLayer, output: Tensor) -> Tensor:
    return output.transpose(0, -1 - layer.spatial_dims).flatten(1).mean(1)


def _along_channels(layer: _ABCLayer, values: Tensor) -> Tensor:
    return values.view(-1, *[1] * layer.spatial_dims)


def _calibrate_layer(layer: _ABCLayer, R: Tensor, wanted: Tensor | None) -> None:
    """Fit vs and betas to the input R and, given a sample of the wanted outputs, the weights to both."""
    compensate = wanted is not None
    values = R.flatten()
    values = values[:: max(1, len(values) // 2_000_000)]
    fits = [None]
    if layer.vs is not None:
        # Without compensation the constant counts; with it, what zero padding (0, not the constant) makes of it at the
        # borders has to be weighed against the threshold it takes: both are tried. The constant must save a good part
        # of the error: a little in each layer does not make the network better, and its base learns nothing more.
        # Where 0 stays 0 there is no constant to make up for, and other codes have no base to spend on one.
        N, code = layer.activation_bases, layer.code[1]
        choices = [True] if not compensate else [False, True][:N]
        if layer.zero or code != "thermometer":
            choices = [False]
        fits = [_fit_activations(values, N, constant, code) for constant in choices]
    best, W, kept = math.inf, layer.weight.clone(), ()
    for fit in fits:
        if fit is not None:  # an input that is one value everywhere says nothing: the start values stay
            vs, betas = (value.to(layer.vs) for value in fit)
            layer.vs.copy_(vs)
            layer.betas.copy_(betas)
        if compensate:
            weight, error = _compensated(layer, W, R, wanted)
            if error < (0.85 if fit is not fits[0] else 1) * best:
                best, kept = error, (weight, layer.vs, layer.betas)
                kept = [None if value is None else value.clone() for value in kept]
    if compensate:
        for parameter, value in zip((layer.weight, layer.vs, layer.betas), kept):
            if parameter is not None:
                parameter.copy_(value)


def _compensated(layer: _ABCLayer, W: Tensor, R: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    """Weights with which the layer puts out what is wanted, as nearly as its bases allow; and the squared error left.

    With y the wanted outputs and a the patches of Aq in the same places, both less their means (which are the
    business of the bias or BatchNorm behind the layer), and H = E[a a'],

        W* = argmin E |y - W* a|^2 = E[y a'] H^-1

    Among weights made of levels those are looked for that are nearest to W* in the metric H: each column in turn is
    rounded to its channel's levels, and what that costs is made up for by the columns not yet rounded (Frantar et al.
    2023, "GPTQ", arXiv:2210.17323); then the levels are fitted anew, by least squares, to the weights that chose
    them; and both once more. Each channel keeps, of all these and its own weights, those with the smallest error.
    """
    us, per_channel = layer.us, layer.per_channel
    quantization = None if us is None else (us.float(), per_channel, layer.code[0], layer.nearest)
    groups = getattr(layer, "groups", 1)
    W_GOK = W.float().reshape(groups, len(W) // groups, -1)
    with torch.autocast(W.device.type, enabled=False):
        a_GPK = _patches(layer, layer.quantized_input(R).float())
        y_GPO = wanted.float().reshape(len(wanted), groups, -1).transpose(0, 1)
        a_GPK, y_GPO = a_GPK - a_GPK.mean(1, keepdim=True), y_GPO - y_GPO.mean(1, keepdim=True)

        H_GKK = a_GPK.mT @ a_GPK
        damping_G11 = 0.01 * H_GKK.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + torch.finfo(torch.float32).tiny
        H_GKK.diagonal(dim1=1, dim2=2).add_(damping_G11[:, 0])
        target_GOK = torch.linalg.solve(H_GKK, (y_GPO.mT @ a_GPK + damping_G11 * W_GOK).mT).mT
        candidates = [W_GOK, target_GOK]
        if us is not None:
            design_LU = _design(layer.code[0], layer.weight_bases, H_GKK)
            levels_GOL = _fitted(target_GOK.reshape(W.shape), *quantization)[4]
            levels_GOL = levels_GOL.expand(len(W), -1).reshape(*W_GOK.shape[:2], -1)
            for _ in range(2):
                rounded_GOK = torch.stack([_round_columns(*each) for each in zip(target_GOK, levels_GOL, H_GKK)])
                levels_GOL, refitted_GOK = _refit_levels(rounded_GOK, levels_GOL, target_GOK, H_GKK, design_LU)
                candidates += [rounded_GOK, refitted_GOK]

        errors = []
        for candidate in candidates:
            Wq = candidate if us is None else quantize_weight(candidate.reshape(W.shape), *quantization)
            errors.append((y_GPO - a_GPK @ Wq.reshape(W_GOK.shape).mT).square().mean(1).flatten())
        errors_CO = torch.stack(errors)
        if not per_channel:  # one mean and std for all: the weights move together or not at all
            errors_CO = errors_CO.sum(1, keepdim=True).expand_as(errors_CO) / len(W)
        best_O, which_O = errors_CO.min(0)
        weights_COK = torch.stack(candidates).flatten(1, 2)
        chosen = weights_COK[which_O, torch.arange(len(W), device=W.device)]
        return chosen.reshape(W.shape).to(layer.weight.dtype), best_O.sum().item()


def _places(layer: _ABCLayer, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Indexes of some places of a layer's output of that shape (B, *S'), the same ones whenever it is asked."""
    count = max(32_768, 4 * layer.weight[0].numel())
    generator = torch.Generator("cpu").manual_seed(0)
    chosen = torch.randint(math.prod(shape), (min(count, math.prod(shape)),), generator=generator, device="cpu")
    return torch.unravel_index(chosen.to(layer.weight.device), shape)


def _patches(layer: _ABCLayer, x: Tensor) -> Tensor:
    """The patches of an input that make the output in those places: (groups, places, C / groups * kernel size)."""
    dims = layer.spatial_dims
    if dims:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, _for_pad(_padding_pairs(layer)), mode)
        for i, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation)):
            x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
        x = x.movedim(1, 1 + dims)  # a view (B, *S', C, *K)
    patches = x[_places(layer, x.shape[: 1 + dims] if dims else x.shape[:-1])]
    return patches.reshape(len(patches), getattr(layer, "groups", 1), -1).transpose(0, 1)


def _round_columns(W: Tensor, levels: Tensor, H: Tensor, block: int = 128) -> Tensor:
    """W (O, K) rounded to each row's levels (O, L), columns of large H_kk first, errors passed on to later columns."""
    order = H.diagonal().argsort(descending=True)
    W = W[:, order].clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order]))
    U = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, len(U), block):
        end = min(start + block, len(U))
        errors = W.new_empty(len(W), end - start)
        for k in range(start, end):
            w = W[:, k : k + 1].clone()
            W[:, k : k + 1] = levels.gather(1, (w - levels).abs().argmin(1, keepdim=True))
            errors[:, k - start : k - start + 1] = error = (w - W[:, k : k + 1]) / U[k, k]
            W[:, k + 1 : end] -= error * U[k, k + 1 : end]
        W[:, end:] -= errors @ U[start:end, end:]
    return W[:, order.argsort()]


def _refit_levels(rounded, levels, target, H, design) -> tuple[Tensor, Tensor]:
    """Levels (G, O, L) and weights (G, O, K) nearest to the target in the metric H, each weight's bin as it is.

    design (L, U) says what levels are made of: U scales.
    """
    bins = (rounded[..., None] - levels[:, :, None]).abs().argmin(-1)
    D_GOUK = design[bins].movedim(-1, 2)
    DH_GOUK = D_GOUK @ H[:, None]
    gram_GOUU, product_GOU1 = DH_GOUK @ D_GOUK.mT, DH_GOUK @ target[..., None]
    scales_GOU1 = torch.linalg.pinv(gram_GOUU, rtol=1e-6, hermitian=True) @ product_GOU1  # bases may coincide
    return (design @ scales_GOU1)[..., 0], (scales_GOU1 * D_GOUK).sum(2)


def _calibrate_statistics(norm: nn.Module, input: Tensor) -> None:
    values = input.transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(values, dim=1, correction=min(1, values.shape[1] - 1))  # as torch keeps it: unbiased
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


def _progress_bar(total: int, description: str = "calibrate", unit: str = "layer"):
    """A tqdm bar, or None: this file needs nothing but torch."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=description, unit=unit, leave=False)


class Summary(list):
    """What `summary`, `plan` and `export_onnx` return: a list of dicts, one a layer. Prints as a table, in Jupyter as
    an HTML one; `pandas.DataFrame(summary)` works."""

    def total(self) -> dict:
        """The sums of the countable columns."""
        countable = ("parameters", "bits", "float_bytes", "packed_bytes", "macs", "binary_macs")
        return {column: sum(row[column] for row in self) for column in countable if not self or column in self[0]}

    def table(self) -> list[list[str]]:
        """What is printed, cell by cell: a head, a row a layer, the totals."""
        columns = list(self[0]) if self else ["layer"]
        rows = [*self, {"layer": "total", **self.total()}]
        return [columns, *([_format(row.get(column, "")) for column in columns] for row in rows)]

    def __str__(self) -> str:
        table = self.table()
        widths = [max(map(len, column)) for column in zip(*table)]
        align = [str.ljust if name in _WORDS else str.rjust for name in table[0]]
        lines = ["  ".join(a(cell, w) for a, cell, w in zip(align, row, widths)).rstrip() for row in table]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body, total = self.table()
        left = [' style="text-align: left"' if name in _WORDS else "" for name in head]

        def row(cells, tag):
            cells = (f"<{tag}{style}>{html.escape(cell)}</{tag}>" for style, cell in zip(left, cells))
            return "<tr>" + "".join(cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in body)
        return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody><tfoot>{row(total, 'th')}</tfoot></table>"


_WORDS = ("layer", "kind", "code", "stored", "runs", "why")  # columns of a Summary that read from the left


def _format(value) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


@torch.no_grad()
def summary(model: nn.Module, example_input: Tensor) -> Summary:
    """What each layer holds and does on an example input, as a table that prints well and becomes a pandas DataFrame.

    Columns: layer, kind, output (shape of its first tensor), M, N (None where that side is float), code (two words
    where that of the weights is another than that of the activations), parameters, bits (stored by binarized weights
    once packed), float_bytes and packed_bytes (of parameters and buffers, before and after `pack`), macs
    (multiply-accumulates of the float layer), binary_macs (M * N times as many, where both sides are binary), engine
    ("bits" or "float": how a packed layer computes where it is now, or how a binarized one would). Where only the
    weights are binary that is "float" here; ONNX Runtime runs them faster, in int8, where the processor has a dot
    product of bytes: see `export_onnx`.
    """
    _check_own(model)
    rows: dict[nn.Module, dict] = {}
    names = {module: name for name, module in model.named_modules()}

    def after(module, inputs, output):
        if module in rows:  # used again: more work, no more parameters
            again = _summary_row(names[module], module, output)
            rows[module]["macs"] += again["macs"]
            rows[module]["binary_macs"] += again["binary_macs"]
        else:
            rows[module] = _summary_row(names[module], module, output)

    holders = [m for m in names if any(True for _ in (*m.parameters(False), *m.buffers(False)))]
    _run_with_hooks(model, example_input, {module: (None, after) for module in holders})
    return Summary(rows.values())


def _summary_row(name: str, layer: nn.Module, output) -> dict:
    tensors = [*layer.parameters(False), *layer.buffers(False)]
    parameters = sum(p.numel() for p in layer.parameters(False))
    float_bytes = packed_bytes = sum(t.numel() * t.element_size() for t in tensors)
    M = N = code = None
    bits = macs = binary_macs = 0
    engine = ""
    if isinstance(layer, (_ABCLayer, PackedLayer, EightBitConv, *_ABC_OF)):
        if isinstance(layer, PackedLayer):
            kernel, O, per_group = math.prod(layer.kernel_size), layer.out_channels, layer.channels // layer.groups
            M, N, code = _bases_of(layer)
            engine = "bits" if layer.runs_bits() else "float"
        else:
            O, per_group, *sizes = layer.weight.shape
            kernel = math.prod(sizes)
            if isinstance(layer, _ABCLayer) and layer.active:
                M, N, code = _bases_of(layer)
                groups = getattr(layer, "groups", 1)
                geometry = layer.spatial_dims, groups
                pays = M and N and _bits_pay(layer.weight.device.type, M, N, len(layer.vs), *geometry)
                engine = "bits" if pays else "float" if M else ""
        biases = 0 if layer.bias is None else O
        # of the activations' bases: before packing, one scale where all are one; after it N, and the level of 0
        vs = 0 if N is None else _count_of_levels(layer.code[1], N) - 1
        betas = 0 if N is None else 1 if layer.code[1] == "uniform" else N
        zeros = 0 if N is None else int(layer.zero is not None if isinstance(layer, PackedLayer) else layer.zero)
        parameters = O * per_group * kernel + biases + vs + betas
        float_bytes = 4 * (O * per_group * kernel + biases)
        places = math.prod(output.shape[:-2]) if output.dtype == torch.int64 else output.numel() // O
        macs = places * O * per_group * kernel
        binary_macs = macs * M * N if M and N else 0
        if M is None:
            packed_bytes = packed_bytes if isinstance(layer, EightBitConv) else float_bytes
        else:
            bits = M * O * kernel * per_group
            packed_bytes = M * O * kernel * -(-per_group // 8) + 4 * (M * O + vs + (N or 0) + zeros + biases)
    tensor = _first_tensor(output)
    shape = "" if tensor is None else " x ".join(map(str, tensor.shape))
    return {
        "layer": name, "kind": type(layer).__name__, "output": shape, "M": M, "N": N, "code": code,
        "parameters": parameters, "bits": bits, "float_bytes": float_bytes, "packed_bytes": packed_bytes,
        "macs": macs, "binary_macs": binary_macs, "engine": engine,
    }  # fmt: skip


def _first_tensor(output) -> Tensor | None:
    """The first tensor of what a module puts out: a tensor, or tuples, lists and dicts of them, however nested."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((tensor for part in parts if (tensor := _first_tensor(part)) is not None), None)


# --------------------------------------------------------------------------- Packed: bits, operators
#
# Weights are stored as uint8 (M, O, *K, ceil(C / 8)): bit c % 8 of byte c // 8 is 1 where B_m = +1 at channel c of the
# group, spare bits are 0. That is the file format, whatever machine wrote it.
#
# Activations travel between layers as int64 words (B, *S, P, N), P = ceil(C / 64): bit c % 64 of word c // 64 is 1
# where A_n = +1 at channel c, spare bits are 0.
#
# The operators below are in plain torch: they unpack and run a float convolution, right everywhere, fast nowhere.
# Engines (abcnets_kernels) implement them for a device, on the same tensors.


def pack_bits(flags: Tensor, dtype: torch.dtype) -> Tensor:
    """Booleans (..., C) -> integers (..., ceil(C / width)) of that dtype's width, the first flag in the lowest bit."""
    width = 8 * dtype.itemsize
    spare = -flags.shape[-1] % width
    groups = F.pad(flags, (0, spare)).unflatten(-1, (-1, width))
    shifts = torch.arange(width, device=flags.device)
    return (groups.to(torch.int64) << shifts).sum(-1).to(dtype)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`: booleans (..., count)."""
    shifts = torch.arange(8 * packed.dtype.itemsize, device=packed.device)
    masks = torch.bitwise_left_shift(torch.ones_like(shifts), shifts).to(packed.dtype)
    return (packed[..., None] & masks).flatten(-2)[..., :count].bool()


def _unpack_bases(bits: Tensor, channels: int) -> Tensor:
    """B (M, O, C, *K), +1.0 and -1.0, from the bits (M, O, *K, bytes)."""
    return (2 * unpack_bits(bits, channels).float() - 1).movedim(-1, 2)


def _unpack_weight(bits: Tensor, alphas: Tensor, channels: int) -> Tensor:
    """Wq (O, C, *K) from its bits (M, O, *K, bytes) and alphas (M, O)."""
    B = _unpack_bases(bits, channels).to(alphas.dtype)
    scales = alphas.view(*alphas.shape, *[1] * (B.ndim - 2))
    return (scales * B).sum(0)  # a product that autocast leaves in float32


_CONVOLUTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@torch.no_grad()
def packed_conv(
    x: Tensor, bits: Tensor, alphas: Tensor, betas: Tensor, thresholds: Tensor, flips: Tensor | None,
    bias: Tensor | None, zero: Tensor | None, channels: int, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, out_thresholds: Tensor | None, out_flips: Tensor | None, out_bases: int,
    *, as_flags: bool = False,
) -> Tensor:  # fmt: skip
    """abcnets::packed_conv: y = bias + sum_m alphas[m] conv(sum_n betas[n] A_n - zero, B_m), to bits if asked.

    With p_t = (x >= thresholds[t, c]) != flips[c], A_n is +1 where bit n is set, which is p_n itself where there are as
    many thresholds as bases (thermometer), and where there are 2^N - 1, ascending (binary code), the XOR of every
    2^(N-1-n)-th p_t, counted from 1: bit n of how many of them are true. A falling channel, one with its flip set,
    complements all of its bits.

    Shape:
        x: (B, C, *S) floating point, or words (B, *S, P, N). S is empty for a linear layer, and B any number of
            dimensions.
        bits (M, O, *K, ceil(C / groups / 8)) uint8; alphas (M, O); betas (N,); thresholds (T, C), or (T,) for all
        channels, T = N or 2^N - 1; flips (C,) bool, or None for no channel; bias (O,), zero () or None. N = 0: x enters
        as it is.
        padding: (low, high) per spatial dimension; padded taps are 0, neither +1 nor -1.
        returns (B, O, *S') in x's dtype (float32 for words), contiguous whatever the order of x; or, given
        out_thresholds (T', O), out_flips (O,) and out_bases N', words (B, *S', ceil(O / 64), N') that a layer of N'
        bases reads, by the same rules.
        as_flags: hand on booleans (N', B, *S', O) in the place of words, in and out, where no format has to be kept.

    A NaN in x gives NaN where the float simulation has it. Words cannot be NaN: then it raises ValueError.
    For inference: no gradient passes, whatever requires it.
    """
    result = x.dtype if x.is_floating_point() else torch.float32
    if x.dtype == torch.int64:
        x = _unpack_words(x, channels)
    y = _packed_sums(x, bits, alphas, betas, thresholds, flips, bias, zero, channels, stride, padding, dilation, groups)
    if out_thresholds is None:
        return y.to(result).contiguous()
    z = y.movedim(1 if stride else -1, -1)
    flags = torch.stack(_encoded([(z >= t) ^ out_flips for t in out_thresholds], out_bases))
    if as_flags:
        return flags
    if y.isnan().any():
        raise ValueError("packed_conv was asked for bits, which can't say NaN, but its input or bias holds a NaN")
    return _pack_words(flags)


# Flags (N, B, *S, C) are what words (B, *S, P, N) hold, as booleans.


def _pack_words(flags: Tensor) -> Tensor:
    return pack_bits(flags, torch.int64).movedim(0, -1).contiguous()


def _unpack_words(words: Tensor, channels: int) -> Tensor:
    return unpack_bits(words.movedim(-1, 0), channels)


def _encoded(above: list[Tensor], bases: int) -> list[Tensor]:
    """The flags of N bases from those of ascending thresholds: as many of them, or 2^N - 1 in the binary code.

    There the bits of how many are true: bit k is the XOR of every 2^k-th, the highest bit first.
    """
    if len(above) == bases:
        return above
    if len(above) != 2**bases - 1:
        raise ValueError(f"{bases} bases have {bases} thresholds or, in the binary code, {2**bases - 1}; "
                         f"got {len(above)}")  # fmt: skip
    return [functools.reduce(operator.xor, above[2**k - 1 :: 2**k]) for k in reversed(range(bases))]


def _packed_sums(x, bits, alphas, betas, thresholds, flips, bias, zero, channels, stride, padding, dilation, groups):
    """y (B, O, *S') of `packed_conv`, in float32 or wider, for x in floats (B, C, *S) or flags."""
    dims = bits.ndim - 3
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype == torch.bool:
        Aq = torch.einsum("n,n...->...", betas.to(compute), 2 * x.to(compute) - 1).movedim(-1, 1 if dims else -1)
    else:
        Aq = x = x.to(compute)
        if len(betas):
            per_channel = (-1, *[1] * dims)
            turn = 1 if flips is None else 1 - 2 * flips.to(compute).view(per_channel)
            flags = _encoded([x >= t.view(per_channel) for t in thresholds], len(betas))
            Aq = turn * sum(
                beta * torch.where(flag, 1.0, -1.0).to(compute) for beta, flag in zip(betas.to(compute), flags)
            )
            Aq = torch.where(x.isnan(), x, Aq)
    if zero is not None:
        Aq = Aq - zero.to(compute)
    Wq = _unpack_weight(bits, alphas.to(compute), channels // groups)
    bias = None if bias is None else bias.to(compute)
    if dims == 0:
        return F.linear(Aq, Wq, bias)
    return _CONVOLUTIONS[dims](F.pad(Aq, _for_pad(padding)), Wq, bias, stride, 0, dilation, groups)


def packed_max_pool(
    words: Tensor, flips: Tensor, channels: int,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool, binary: bool,
    *, as_flags: bool = False,
) -> Tensor:  # fmt: skip
    """abcnets::packed_max_pool: words (B, *S, P, N) of a thresholded tensor -> those of the max-pooled tensor.

    Pooling commutes with a threshold: max(z) >= t where any z is. So words XOR flips, which says z >= t, is pooled by
    OR, and padding is 0. Where the words are in the binary code (`binary`), words XOR flips are the bits of a number,
    and its maximum is taken. Sizes are one int per spatial dimension (padding too, the same on both sides). as_flags:
    booleans (N, B, *S, C) in and out in the place of words.
    """
    flags = words if as_flags else _unpack_words(words, channels)
    pooled = _pooled(flags, flips, kernel_size, stride, padding, dilation, ceil_mode, binary)
    return pooled if as_flags else _pack_words(pooled)


def _pooled(flags: Tensor, flips: Tensor, kernel_size, stride, padding, dilation, ceil_mode, binary) -> Tensor:
    """Flags (N, B, *S', C) of the max-pooled tensor from flags (N, B, *S, C)."""
    raw = (flags ^ flips).float()
    bases = len(raw)
    if binary:  # one number in the place of N flags
        raw = sum(2**k * bit for k, bit in zip(reversed(range(bases)), raw))[None]
    pool, images = _MAX_POOLS[len(kernel_size) - 1], raw.flatten(0, 1).movedim(-1, 1)
    pooled = pool(images, kernel_size, stride, padding, dilation, ceil_mode)
    pooled = pooled.movedim(1, -1).unflatten(0, raw.shape[:2])
    if binary:
        pooled = torch.stack([(pooled[0] / 2**k).floor() % 2 for k in reversed(range(bases))])
    return pooled.bool() ^ flips


@torch.no_grad()
def packed_chain(x: Tensor, constants: Tensor, program: str, other: Tensor | None = None) -> Tensor:
    """abcnets::packed_chain: packed convolutions and max-pools one after the other, x in floats (B, C, *S) first.

    `program` is a list of steps [name, arguments] as JSON, without x: those of `packed_conv` or `packed_max_pool`; or
    of floats, in front of all others "convolution": weight, bias, stride, (low, high) padding, dilation, or
    "eight_bit_convolution": weight, scales, bias and so on; "max_pool": channels, whether behind a ReLU, and then sizes
    as packed_max_pool takes them; "average": the arguments of a `ChainAverage`; "linear" (behind all others): weight,
    bias, whether behind a ReLU and behind flattening. A tensor among them is [where it begins in the bytes of
    `constants`, its dtype, its shape].

    Values are 0, x; 1, `other`; and from 2 on what "read" ends: it has the next step read another value, its argument.
    After the last step that a value comes from, "sum" adds one: which, and the other arguments of a `ChainSum`; "relu"
    makes what is below 0 in it 0. An engine runs all in one call.
    """
    values = [x, other]
    for name, arguments in _chain_steps(program):
        if name == "read":
            values.append(x)
            x = values[arguments[0]]
        elif name == "relu":
            x = x.relu()
        elif name == "sum":
            which, relu, in_place = arguments
            x = ChainSum(which, relu, in_place)(x, values[which])
        else:
            step = _FLOAT_STEPS.get(name) or getattr(torch.ops.abcnets, name)
            x = step(x, *_chain_arguments(arguments, constants))
    return x


def _float_convolution(x, weight, bias, stride, padding, dilation):
    return _CONVOLUTIONS[len(stride)](F.pad(x, _for_pad(padding)), weight, bias, stride, 0, dilation)


def _eight_bit_convolution(x, weight, scales, bias, stride, padding, dilation):
    """Documented by `EightBitConv`; x: a batch. Float32 holds whole numbers that are sums of 1040 products."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    largest = x.abs().flatten(1).amax(1) if x.numel() else x.new_ones(len(x))
    largest = largest.clamp(min=_SMALLEST).view(-1, *[1] * (x.ndim - 1))
    X = (x * (127 / largest)).round()
    exact = X.dtype if weight[0].numel() <= 1040 else torch.float64
    with torch.autocast(x.device.type, enabled=False):  # whose float16 does not hold the sums
        sums = _float_convolution(X.to(exact), weight.to(exact), None, stride, padding, dilation).to(x.dtype)
    y = sums * (largest / 127 * scales.view(-1, *[1] * (x.ndim - 2)))
    return y if bias is None else y + bias.view(-1, *[1] * (x.ndim - 2))


_SMALLEST = 1e-30  # an image's largest |x| counts as at least this, so that 127 over it is a float32 too


def _float_max_pool(x, channels, relu, *sizes):
    return _MAX_POOLS[len(sizes[0]) - 1](x.relu() if relu else x, *sizes)


def _float_average(x, extra, kernel, scale, shift, relu):
    dtype = x.dtype
    if scale is not None:
        x = (x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(dtype)
    x = x.relu() if relu else x
    x = F.adaptive_avg_pool2d(x, 1) if kernel is None else F.avg_pool2d(x, kernel)
    return F.pad(x, (0, 0, 0, 0, 0, extra)) if extra else x


def _float_linear(x, weight, bias, relu, flatten):
    x = x.flatten(1) if flatten else x
    return F.linear(x.relu() if relu else x, weight, bias)


_MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_FLOAT_STEPS = {"convolution": _float_convolution, "eight_bit_convolution": _eight_bit_convolution,
                "max_pool": _float_max_pool, "average": _float_average, "linear": _float_linear}  # fmt: skip


@functools.lru_cache(maxsize=64)
def _chain_steps(program: str) -> list:
    return json.loads(program)


def _chain_arguments(arguments: list, constants: Tensor) -> list:
    """A step's arguments, with tensors where they are described. These are views of `constants`."""

    def find(argument):
        if not isinstance(argument, list) or len(argument) != 3 or not isinstance(argument[1], str):
            return argument
        start, name, shape = argument
        dtype = getattr(torch, name)
        return constants[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    return [find(argument) for argument in arguments]


def _pairs(padding) -> list[tuple[int, int]]:
    return list(zip(padding[::2], padding[1::2]))


def _for_pad(padding) -> list[int]:
    """What F.pad takes: the last dimension first."""
    return [p for pair in reversed(_pairs(padding)) for p in pair]


def _packed_conv_fake(
    x, bits, alphas, betas, thresholds, flips, bias, zero, channels, stride, padding, dilation, groups,
    out_thresholds, out_flips, out_bases,
):  # fmt: skip
    from_words = x.dtype == torch.int64
    O, *kernel = bits.shape[1:-1]
    places = x.shape[:-2] if from_words else x.shape[:1] + x.shape[2:] if kernel else x.shape[:-1]
    B, sizes = places[: len(places) - len(kernel)], places[len(places) - len(kernel) :]
    out = [
        (size + low + high - d * (k - 1) - 1) // s + 1
        for size, (low, high), k, s, d in zip(sizes, _pairs(padding), kernel, stride, dilation)
    ]
    if out_thresholds is not None:
        return x.new_empty((*B, *out, -(-O // 64), out_bases), dtype=torch.int64)
    return x.new_empty((*B, O, *out), dtype=torch.float32 if from_words else x.dtype)


def _packed_max_pool_fake(words, flips, channels, kernel_size, stride, padding, dilation, ceil_mode, binary):
    B, *sizes, P, N = words.shape
    out = []
    for size, k, s, p, d in zip(sizes, kernel_size, stride, padding, dilation):
        room = size + 2 * p - d * (k - 1) - 1
        count = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (count - 1) * s >= size + p:  # torch drops a window that starts beyond the input
            count -= 1
        out.append(count)
    return words.new_empty((B, *out, P, N))


def _staircase_fake(R, thresholds, half_steps, zero):
    return torch.empty_like(R)


def _staircase_backward_fake(R, G, thresholds, half_steps, zero):
    dtype = torch.promote_types(R.dtype, torch.float32)
    return torch.empty_like(R), *(thresholds.new_empty(thresholds.shape, dtype=dtype) for _ in range(2))


def _fit_levels_fake(W, us, per_channel, code, nearest):
    G, M = len(W) if per_channel else 1, _bases_with(len(us), code, "us")
    dtype = torch.promote_types(W.dtype, torch.float32)
    return torch.empty_like(W), *(W.new_empty((G, n), dtype=dtype) for n in (1, 1, M, len(us) + 1, len(us)))


_INTERFACE = 7  # of the operators, and of what this file and abcnets_kernels ask of one another

_library = torch.library.Library("abcnets", "FRAGMENT")


def _define_operators() -> None:
    """Define the operators of namespace abcnets; another copy of this file may have done it in this process."""
    existing = torch.ops.abcnets.interface() if hasattr(torch.ops.abcnets, "interface") else 0
    if hasattr(torch.ops.abcnets, "packed_conv"):
        if existing == _INTERFACE:
            return
        raise ImportError(f"this process has loaded another version of abcnets, whose operators have interface "
                          f"{existing}; those of {__name__} have {_INTERFACE}. Use one of both")  # fmt: skip
    _library.define("interface() -> int")
    _library.impl("interface", lambda: _INTERFACE, "CompositeExplicitAutograd")
    for plain, fake, schema in (
        (packed_conv, _packed_conv_fake,
         "(Tensor x, Tensor bits, Tensor alphas, Tensor betas, Tensor thresholds, Tensor? flips, Tensor? bias, "
         "Tensor? zero, int channels, int[] stride, int[] padding, int[] dilation, int groups, "
         "Tensor? out_thresholds, Tensor? out_flips, int out_bases) -> Tensor"),
        (packed_max_pool, _packed_max_pool_fake,
         "(Tensor words, Tensor flips, int channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
         "bool ceil_mode, bool binary) -> Tensor"),
        (packed_chain, packed_chain, "(Tensor x, Tensor constants, str program, Tensor? other=None) -> Tensor"),
        (_staircase, _staircase_fake,
         "(Tensor R, Tensor thresholds, Tensor half_steps, bool zero) -> Tensor"),
        (_staircase_backward, _staircase_backward_fake,
         "(Tensor R, Tensor G, Tensor thresholds, Tensor half_steps, bool zero) -> (Tensor, Tensor, Tensor)"),
        (_fit_levels, _fit_levels_fake,
         "(Tensor W, Tensor us, bool per_channel, str code, bool nearest) "
         "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"),
    ):  # fmt: skip
        name = plain.__name__.strip("_")
        _library.define(name + schema)
        _library.impl(name, functools.partial(_run_operator, plain), "CompositeExplicitAutograd")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # no gradient, in any engine
        torch.library.register_fake(f"abcnets::{name}", fake, lib=_library)


def _run_operator(plain, x: Tensor, *arguments) -> Tensor | tuple:
    """What runs where no engine is registered: perhaps none was looked for yet, as in a program that was exported."""
    first_look = x.device.type not in _found
    if "engine" in _engine(x.device.type) and first_look:
        return getattr(torch.ops.abcnets, plain.__name__.strip("_"))(x, *arguments)
    if plain in (packed_conv, packed_max_pool, packed_chain):  # where one trains, nobody expects to need an engine
        _warn_without_engine(x.device.type)
    return plain(x, *arguments)


_define_operators()


# --------------------------------------------------------------------------- Packed: engines

_PACKAGE = "abcnets_kernels"
_FILE = globals().get("__file__")  # None where this source was executed without a file
_loading, _looking = threading.Lock(), threading.Lock()
_found: dict[str, dict] = {}  # what `register` of the package returned for a device, once it was asked
_forked = False


def _after_fork() -> None:
    global _forked, _loading, _looking
    _forked, _loading, _looking = True, threading.Lock(), threading.Lock()  # whoever held them is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _kernels(part: str):
    """A module of the package abcnets_kernels: of the folder kernels/ beside this file, or else of the installed one.

    A folder of that name that is not ours is left alone. Raises ImportError, in one sentence.
    """
    with _loading:
        if _PACKAGE not in sys.modules:
            files = (Path(_FILE).absolute(), Path(_FILE).resolve()) if _FILE else ()
            for beside in (file.with_name("kernels") / "__init__.py" for file in files):
                if beside.exists() and f'NAME = "{_PACKAGE}"' in beside.read_text(encoding="utf-8", errors="replace"):
                    spec = importlib.util.spec_from_file_location(_PACKAGE, beside)
                    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
                    try:
                        spec.loader.exec_module(sys.modules[_PACKAGE])
                    except BaseException:
                        del sys.modules[_PACKAGE]
                        raise
                    break
            else:
                if importlib.util.find_spec(_PACKAGE) is None:
                    raise ImportError(f"{_PACKAGE} is neither installed nor the folder kernels/ beside "
                                      f"{_FILE or 'abcnets.py'}: copy that folder there")  # fmt: skip
        package = importlib.import_module(_PACKAGE)
    if package.INTERFACE != _INTERFACE:
        raise ImportError(f"{package.__file__} has interface {package.INTERFACE} and {_FILE} has {_INTERFACE}: "
                          "they are of different versions")  # fmt: skip
    return importlib.import_module(f"{_PACKAGE}.{part}")


def _this_file() -> types.SimpleNamespace:
    """The names of this file, for the package; as a module it need not be in sys.modules, wherever it was loaded."""
    return types.SimpleNamespace(**globals())


def _engine(device: str) -> dict:
    """What there is for a device (see `register` in kernels/registry.py); looked for once."""
    if device not in _found:
        with _looking:
            if device not in _found:
                _apart(_look_for_engine, device)
    return _found[device]


def _look_for_engine(device: str) -> None:
    try:
        if device not in ("cpu", "cuda"):
            raise ImportError(f"there is no engine for {device}")
        _found[device] = _kernels("registry").register(_this_file(), device, _forked)
    except BaseException as error:
        advice = "the folder kernels/ of this abcnets.py's version" if device in ("cpu", "cuda") else ""
        _found[device] = {"missing": str(error), "install": advice}


def engines() -> dict[str, str]:
    """What runs packed layers on each device, and how it counts bits.

    Such as {"cpu": "numba (AVX2 look-up)", "cuda": "float convolutions: no NVIDIA GPU"}.
    """
    found = {device: _engine(device) for device in ("cpu", "cuda")}
    return {device: what.get("engine") or f"float convolutions: {what['missing']}" for device, what in found.items()}


def _bits_pay(device: str, M: int, N: int, thresholds: int, spatial_dims: int, groups: int, warn=False) -> bool:
    """Whether a device's engine runs such a layer's M x N binary convolutions faster than one float convolution."""
    found = _engine(device)
    if warn and "engine" not in found:
        _warn_without_engine(device)
    return "engine" in found and found["pays"](M, N, thresholds, spatial_dims, groups)


_bits_pay._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler


def _runs_chains(device: str) -> bool:
    """Whether a device's engine runs `packed_chain`."""
    return bool(_engine(device).get("chains"))


def multiplies_bytes() -> bool:
    """Whether the CPU's engine runs an `EightBitConv`."""
    return bool(_engine("cpu").get("multiplies_bytes"))


_runs_chains._dynamo_marked_constant = multiplies_bytes._dynamo_marked_constant = True


@functools.cache
def _warn_without_engine(device: str) -> None:
    """Say once that a device has no engine, and what would help, if anything would."""
    found = _engine(device)
    if found["install"]:
        warnings.warn(f"packed layers run as float convolutions on {device}, since {found['missing']}; for speed: "
                      f"{found['install']}", stacklevel=2)  # fmt: skip


# --------------------------------------------------------------------------- Packed: layers, models, files


class PackedLayer(nn.Module):
    """The inference form of an ABC layer, convolution or linear: bits, scales and thresholds. Made by `pack`.

    Attributes (all of its state dict):
        bits: (M, O, *K, ceil(C / groups / 8)) uint8, the weight bases.
        alphas (M, O), bias (O,) or None: float32.
        betas (N,), thresholds (N,), or (2^N - 1,) ascending in the binary code: float32, as `packed_conv` reads them;
            empty where the input stays float.
        zero () float32: the level of an input of 0, which is taken from Aq; None where zero=False.
    And weight_bases M, activation_bases N or None, and their `code`, two words.

    `engine` is "bits", which runs M x N binary convolutions through the operator abcnets::packed_conv; "float", which
    runs one float convolution with the weights unpacked (and kept, outside the state dict); or "auto", whichever is
    faster with the engine of the input's device, decided at each call.

    What an engine makes of the tensors, and the unpacked weights, are kept for as long as they are right: a tensor that
    is replaced or changed in place is seen at the next call. What torch does not count is seen after `refresh`: changes
    through `.data`, through NumPy or another process, to tensors made in inference mode, and, in a model that was
    compiled to run floats, any change in place. A CUDA graph computes with what the tensors held when it was captured.
    And what `fuse` folded, thresholds above all, is of the packed model as it was then: change that one, and fuse it
    anew. A call that is made while another thread writes to a tensor may see a part of both; where that must not be,
    give the layer another tensor.

    Shape: as the ABC layer's. Inference only: no gradient passes. A NaN behaves as in the ABC layer.
    """

    _is_abcnets = True
    # What `fuse` sets: part of a fused model; thresholds were folded in; so was what runs over the channels of a batch.
    fused = folded = batched = False

    def __init__(self, layer: nn.Module, M: int, N: int, engine: str = "auto", device=None, *, code="thermometer",
                 zero: bool = False):  # fmt: skip
        """An empty layer with the geometry of `layer`, a stock or ABC one, to be filled from a state dict.

        Args:
            layer, M, N, engine: as the attributes above; N = 0 where the input stays float.
            device: where the tensors are; default: where the layer's are.
            code, zero: as the ABC layer's.
        """
        super().__init__()
        floats = N == 0 and type(N) is int
        for name, bases in (("weight_bases", M), ("activation_bases", 1 if floats else N)):
            _check_bases(name, bases)
        self.code = _codes(code, M, None if floats else N)
        self.spatial_dims = layer.weight.ndim - 2
        self.out_channels, per_group, *kernel = layer.weight.shape
        self.kernel_size = tuple(kernel)
        self.groups = getattr(layer, "groups", 1)
        self.channels = per_group * self.groups
        self.stride = tuple(getattr(layer, "stride", ()))
        self.dilation = tuple(getattr(layer, "dilation", ()))
        self.padding = _padding_pairs(layer)
        self.padding_mode = getattr(layer, "padding_mode", "zeros")
        self.engine = engine
        self.weight_bases, self.activation_bases = M, N or None
        levels = _count_of_levels(self.code[1], N)
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=device or layer.weight.device)
        bits_shape = (M, self.out_channels, *kernel, -(-per_group // 8))
        self.register_buffer("bits", zeros(bits_shape, dtype=torch.uint8))
        self.register_buffer("alphas", zeros(M, self.out_channels))
        self.register_buffer("thresholds", zeros(levels - 1))
        self.register_buffer("betas", zeros(N))
        self.register_buffer("bias", None if layer.bias is None else zeros(self.out_channels))
        self.register_buffer("zero", zeros(()) if zero and N else None)
        # What `fuse` folds: thresholds and directions for each channel, in the place of `thresholds` and going out.
        for name in ("in_thresholds", "in_flips", "out_thresholds", "out_flips"):
            self.register_buffer(name, None, persistent=False)
        self.out_bases = 0  # of the layer that reads the bits, where this one puts out bits
        self._unpacked = None  # Wq, the tensors that it was made from, their versions, and the CUDA stream that made it

    def __setattr__(self, name, value):
        if name == "engine" and value not in ("auto", "bits", "float"):
            raise ValueError(f"engine must be 'auto', 'bits' or 'float', got {value!r}")
        super().__setattr__(name, value)

    @classmethod
    def from_layer(cls, layer: _ABCLayer, engine: str = "auto"):
        """The packed form of an ABC layer that has weight bases, active or not."""
        M, N = layer.weight_bases, layer.activation_bases or 0
        packed = cls(layer, M, N, engine, code=layer.code, zero=layer.zero)
        with torch.no_grad():
            weight = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))
            options = layer.us.to(weight.dtype), layer.per_channel, layer.code[0], layer.nearest
            flags = weight_bases(weight, *options) > 0
            packed.bits.copy_(pack_bits(flags.movedim(2, -1), torch.uint8))
            packed.alphas.copy_(fit_weight(weight, *options).expand_as(packed.alphas))
            if N:
                packed.thresholds.copy_(_thresholds(layer.vs, layer.code[1]))
                packed.betas.copy_(layer.betas.expand(N))
                if packed.zero is not None:
                    half_steps = _half_steps(packed.betas, len(packed.thresholds))
                    packed.zero.copy_(_level_of_zero(packed.thresholds, half_steps))
            if layer.bias is not None:
                packed.bias.copy_(layer.bias)
        return packed.eval()

    def refresh(self) -> None:
        """See what is in the tensors now, however it came there: nothing that was made of them before is used again.

        Only changes that torch does not count (listed above) need it. Other threads may call the layer meanwhile.
        """
        for own in (self._buffers, self._parameters):
            for name, tensor in own.items():
                if tensor is not None and tensor.is_inference():  # has no version, but its alias is another tensor
                    with torch.inference_mode():
                        alias = tensor.detach()
                        own[name] = alias if own is self._buffers else nn.Parameter(alias, tensor.requires_grad)
                elif tensor is not None:
                    torch.autograd.graph.increment_version(tensor)
        self._unpacked = None

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if self.fused:
            errors.append(f"{prefix[:-1]} is in a fused model, and what was folded by fuse in no state dict: load into "
                          "the packed model, and fuse that")  # fmt: skip
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.refresh()

    def __setstate__(self, state):
        if not {"weight_bases", "code"} <= state.keys():
            raise ValueError("this packed layer was pickled by an older abcnets, which did not say all that is to be "
                             "known of it: pack the model anew, and keep it with save_packed")  # fmt: skip
        super().__setstate__(state)

    def __getstate__(self):
        return {**super().__getstate__(), "_unpacked": None}  # neither copies nor files hold it

    def _apply(self, fn, recurse=True):
        # Flat, since a memory format means nothing to bits: (M, O, kH, kW, bytes) is no 5-dimensional image.
        super()._apply(lambda tensor: fn(tensor.reshape(-1)).view(tensor.shape), recurse)
        self.refresh()  # a parameter stays the same tensor, whatever data torch gives it
        return self

    def unpack(self) -> Tensor:
        """The weight bases B (M, O, C / groups, *K), +1.0 and -1.0; Wq = sum_m alphas[m] B[m]."""
        return _unpack_bases(self.bits, self.channels // self.groups)

    def runs_bits(self, device: str | None = None) -> bool:
        """Whether the layer runs binary convolutions on such a device ("cpu", "cuda"), by default where it is now."""
        return self._runs_bits(device or self.bits.device.type, warn=False)

    def _runs_bits(self, device: str, warn: bool) -> bool:
        if self.folded:  # one float convolution knows no threshold a channel
            return True
        if self.engine != "auto" or self.activation_bases is None:
            return self.engine == "bits"
        if torch.compiler.is_exporting():  # for machines that are not known yet: bits, which an engine may take there
            return True
        bases = self.weight_bases, self.activation_bases, len(self.thresholds)
        return _bits_pay(device, *bases, self.spatial_dims, self.groups, warn)

    def forward(self, input: Tensor) -> Tensor:
        words = input.dtype == torch.int64 and self.folded
        if not words:
            if not input.is_floating_point():
                raise TypeError(f"a packed layer takes floating-point input, got {input.dtype}")
            self._check_shape(input)
        dimensions = self.spatial_dims + (3 if words else 2)
        if input.ndim == dimensions:
            return self._convolve(input)
        if self.batched:
            raise ValueError(f"fuse folded into this layer what runs over the channels of a batch: it takes input of "
                             f"{dimensions} dimensions, got shape {tuple(input.shape)}")  # fmt: skip
        return self._convolve(input) if self.spatial_dims == 0 else self._convolve(input[None])[0]

    def _check_shape(self, input: Tensor) -> None:
        axis = -1 - self.spatial_dims
        if input.ndim < -axis or input.shape[axis] != self.channels:
            raise ValueError(f"this packed layer takes {self.channels} channels in dimension {axis}, "
                             f"got input of shape {tuple(input.shape)}")  # fmt: skip

    def _convolve(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, _for_pad(padding), mode=self.padding_mode)
            padding = (0,) * len(padding)
        as_floats = not self._runs_bits("cpu" if x.is_cpu else x.device.type, warn=True)
        if x.dtype == torch.float64:  # no engine computes in it
            as_floats |= self.engine == "auto" and not self.folded
        if x.requires_grad:
            x = x.detach()
        if as_floats and x.dtype != torch.int64:
            return self._float_convolve(x, padding).to(x.dtype)
        arguments = self._arguments(padding)
        y = torch.ops.abcnets.packed_conv.default(x, *arguments)
        dtype = arguments[1].dtype  # of alphas
        if x.dtype == torch.int64 and y.dtype == torch.float32 != dtype:  # the operator's word for words
            y = y.to(dtype)
        return y

    def _arguments(self, padding) -> tuple:
        """What `packed_conv` takes after x."""
        own = self._buffers  # as attributes they would be looked for in three places: a fifth of a small call's time
        try:
            bits, alphas, betas, thresholds, bias, zero = (
                own["bits"], own["alphas"], own["betas"], own["thresholds"], own["bias"], own["zero"]
            )  # fmt: skip
        except KeyError:  # somebody made a parameter of one
            bits, alphas, betas, thresholds = self.bits, self.alphas, self.betas, self.thresholds
            bias, zero = self.bias, self.zero
        folded = own["in_thresholds"]
        return (
            bits, alphas, betas, thresholds if folded is None else folded, own["in_flips"], bias, zero,
            self.channels, self.stride, padding, self.dilation, self.groups, own["out_thresholds"], own["out_flips"],
            self.out_bases,
        )  # fmt: skip

    @torch.no_grad()
    def _float_convolve(self, x: Tensor, padding) -> Tensor:
        if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):  # which few processors convolve fast
            x = x.float()
        Aq = x
        if self.activation_bases:
            Aq = _quantized(x, self.thresholds, _half_steps(self.betas, len(self.thresholds)))
            if self.zero is not None:
                Aq = Aq - self.zero.to(Aq.dtype)
        Wq, bias = self._float_weight().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if self.spatial_dims == 0:
            return F.linear(Aq, Wq, bias)
        symmetric = padding[::2]
        if symmetric != padding[1::2]:
            Aq, symmetric = F.pad(Aq, _for_pad(padding)), 0
        return _CONVOLUTIONS[self.spatial_dims](Aq, Wq, bias, self.stride, symmetric, self.dilation, self.groups)

    def _float_weight(self) -> Tensor:
        """Wq, unpacked once for as long as the tensors are the same, in whatever mode the first call is made."""
        bits, alphas, channels = self.bits, self.alphas, self.channels // self.groups
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # what is exported holds the bits, not Wq
            return _unpack_weight(bits, alphas, channels)
        compiling = torch.compiler.is_compiling()  # which knows what a tensor is, but not its version
        # Read before the tensors are: what is made while one changes is never taken for what it changed to.
        versions = None if compiling else [None if t.is_inference() else t._version for t in (bits, alphas)]
        stream = torch.cuda.current_stream(bits.device) if not compiling and bits.is_cuda else None
        capturing = stream is not None and torch.cuda.is_current_stream_capturing()
        kept = self._unpacked
        if kept is None or kept[1] is not bits or kept[2] is not alphas or not (compiling or kept[3] == versions):
            with torch.inference_mode(False), torch.no_grad():
                Wq = _unpack_weight(bits, alphas, channels)
            if type(Wq) is not Tensor or capturing:  # fake, for its tracer alone, or empty until a CUDA graph runs
                return Wq
            if stream is not None:
                stream.synchronize()  # before a call on another stream finds it
            kept = self._unpacked = Wq, bits, alphas, versions, stream
        if stream is not None and stream != kept[4]:
            kept[0].record_stream(stream)  # which, once it is dropped, its memory waits for
        if capturing:
            weakref.finalize(bits, id, kept[0])  # holds it: the graph reads it at each replay, whatever bits hold then
        return kept[0]

    def extra_repr(self) -> str:
        size = f"{self.channels}, {self.out_channels}"
        if self.spatial_dims:
            size += f", kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        if self.groups != 1:
            size += f", groups={self.groups}"
        return f"{size}, {_describe_bases(self)}, engine={self.engine!r}"


class PackedPool(nn.Module):
    """A max-pool of bits between two packed layers, in the place of one of floats: `packed_max_pool`. Made by `fuse`.

    Shape: words (B, *S, P, N) -> words (B, *S', P, N).
    """

    _is_abcnets = True

    def __init__(self, pool: nn.Module, flips: Tensor, binary: bool):
        super().__init__()
        self.channels, self.sizes, self.binary = len(flips), _pool_sizes(pool), binary
        self.register_buffer("flips", flips, persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        return torch.ops.abcnets.packed_max_pool.default(words, *self._arguments())

    def _arguments(self) -> tuple:
        return self.flips, self.channels, *self.sizes, self.binary


class EightBitConv(nn.Module):
    """A convolution of few channels in eight bits, in the place of one of floats: the first step of a `PackedChain`.

        y[b, o] = s t_o conv(X, W8)[b, o] + bias[o]
        X = round(x / s), s = max(max |x[b]|, 1e-30) / 127;    W8 = round(W / t), t_o = max(max |W[o]|, 1e-30) / 127

    Each image has a step s of its own, so nothing needs to be calibrated, and no image matters to another one. Weights
    are off by at most half a 127th of a channel's largest, inputs by half a 127th of an image's. Made by `fuse`.

    Shape: (B, C, *S) -> (B, O, *S'), floats; or both without B.  No gradient.
    Raises: ValueError for a convolution with groups, or padded with something else than zeros.
    """

    _is_abcnets = True

    def __init__(self, convolution: nn.Module):
        super().__init__()
        if convolution.groups != 1 or convolution.padding_mode != "zeros":
            raise ValueError(f"EightBitConv takes a convolution without groups that pads with zeros, got {convolution}")
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.stride, self.dilation = convolution.stride, convolution.dilation
        self.padding = _padding_pairs(convolution)
        weight = convolution.weight.detach()
        scales = weight.float().abs().flatten(1).amax(1).clamp(min=_SMALLEST) / 127
        levels = (weight.float() / scales.view(-1, *[1] * (weight.ndim - 1))).round().clamp(-127, 127)
        self.register_buffer("weight", levels.to(torch.int8))
        self.register_buffer("scales", scales.to(weight.dtype))
        self.register_buffer("bias", None if convolution.bias is None else convolution.bias.detach().clone())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach()
        if x.ndim == self.weight.ndim - 1:
            return self.forward(x[None])[0]
        return _eight_bit_convolution(x, *self._arguments()).to(x.dtype)

    def extra_repr(self) -> str:
        size = f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.weight.shape[2:])}"
        return f"{size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"

    def _arguments(self) -> tuple:
        return self.weight, self.scales, self.bias, self.stride, self.padding, self.dilation


class ChainSum(nn.Module):
    """In a `PackedChain`: one of its values is added to what the step before puts out.

    relu: whether a ReLU follows;  in_place: whether the sum keeps the shape and dtype of what the step before puts out.
    """

    _is_abcnets = True

    def __init__(self, value: int, relu: bool = False, in_place: bool = False):
        super().__init__()
        self.value, self.relu, self.in_place = value, relu, in_place

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        total = x.add_(other) if self.in_place else x + other
        return total.relu() if self.relu else total

    def extra_repr(self) -> str:
        return f"{self.value}, relu={self.relu}, in_place={self.in_place}"


class ChainRead(nn.Module):
    """In a `PackedChain`, which does it: what the step before puts out is a value, and the next step reads another."""

    _is_abcnets = True

    def __init__(self, value: int):
        super().__init__()
        self.value = value

    def extra_repr(self) -> str:
        return str(self.value)


class ChainAverage(nn.Module):
    """In a `PackedChain`: means over windows of images, side by side, of what a norm and a ReLU may have changed.

    extra: how many channels of zeros follow;  kernel: of the windows, or None for whole images;  scale, shift: of each
    channel, or None;  relu: whether it is behind these.
    """

    _is_abcnets = True

    def __init__(self, extra: int, kernel: list[int] | None, scale=None, shift=None, relu: bool = False):
        super().__init__()
        self.extra, self.kernel, self.relu = extra, kernel, relu
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return _float_average(x, *self._arguments())

    def _arguments(self) -> tuple:
        return self.extra, self.kernel, self.scale, self.shift, self.relu

    def extra_repr(self) -> str:
        return f"extra={self.extra}, kernel={self.kernel}, scaled={self.scale is not None}, relu={self.relu}"


class PackedChain(nn.Module):
    """Packed layers and pools that only read one another: `steps`, run in one call where an engine can. Made by `fuse`.

    Small float layers are steps too: a convolution, ReLU and max-pool in front of them (or alone), and behind them a
    max-pool, ReLU, flattening and a linear layer. Sums over channels are those of torch in another order: a last bit
    may be another one, and where such a sum lies on a threshold, a bit of the next layer's input.

    A residual network is a chain of several values: 0, the input; 1, `other`, if a step asks for it; and from 2 on
    what each `ChainRead` keeps. A `ChainSum` adds one of them, a `ChainAverage` makes smaller images of one.

    In one call run float32 batches on a CPU, with the engine there. All else runs step by step: steps with a hook,
    float layers that are trained, autocast, programs that are exported, and what a gradient passes: float layers where
    nothing is packed, and chains of several values. Tensors of the steps that are replaced or changed in place are seen
    by the next call, as `PackedLayer` does, and what torch does not count after `refresh`; a model that was compiled
    sees neither.

    Shape: as the first step takes and the last one puts out.
    """

    _is_abcnets = True

    def __init__(self, steps: list[nn.Module]):
        super().__init__()
        self.steps, first = nn.ModuleList(steps), steps[0]
        is_packed = isinstance(first, PackedLayer)
        self.channels = first.channels if is_packed else first.in_channels
        self.dimensions = first.spatial_dims + 2 if is_packed else first.weight.ndim
        values = [step.value for step in steps if isinstance(step, (ChainSum, ChainRead))]
        self.takes_other = 1 in values
        self.reads_other = any(isinstance(step, ChainRead) and step.value == 1 for step in steps)
        has_packed = any(isinstance(step, (PackedLayer, EightBitConv)) for step in steps)
        self.differentiable = not has_packed or any(value != 1 for value in values)
        self._kept = None  # what `_gather` made

    def __getstate__(self):
        return {**super().__getstate__(), "_kept": None}  # its tensors are those of the steps

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._kept = None
        return self

    def refresh(self) -> None:
        """See what is in the tensors now, however it came there, as `PackedLayer.refresh`."""
        for step in self.steps:
            if isinstance(step, PackedLayer):
                step.refresh()
        self._kept = None

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        if self.takes_other is (other is None):
            raise TypeError(f"this chain takes {'two tensors' if self.takes_other else 'one tensor'}")
        kept = None if other is not None and not self._takes(other) else self._as_one(input)
        if kept is not None:
            x = input.detach() if input.requires_grad else input
            return torch.ops.abcnets.packed_chain.default(x, kept.constants, kept.program, other)
        x, values = input, [input, other]
        for step in self.steps:
            if isinstance(step, ChainRead):
                values.append(x)
                x = values[step.value]
            else:
                x = step(x, values[step.value]) if isinstance(step, ChainSum) else step(x)
        return x

    def _takes(self, other: Tensor) -> bool:
        """Whether one call can read what it is given, a tensor of which no gradient is asked."""
        if not isinstance(other, Tensor) or other.dtype != torch.float32 or other.layout != torch.strided:
            return False
        if not other.is_cpu or (other.requires_grad and torch.is_grad_enabled()):
            return False
        if self.reads_other and other.ndim != self.dimensions:
            return False
        return torch.compiler.is_compiling() or (type(other) in (Tensor, nn.Parameter) and not _is_transformed())

    def _as_one(self, x: Tensor) -> "_Kept | None":
        """What is kept, if this input can run in one call."""
        if x.dtype != torch.float32 or not x.is_cpu or x.ndim != self.dimensions or x.shape[1] != self.channels:
            return None
        if torch.compiler.is_exporting() or not _runs_chains("cpu"):
            return None
        if self.differentiable and x.requires_grad and torch.is_grad_enabled():
            return None
        kept = self._kept
        if not torch.compiler.is_compiling():
            if type(x) is not Tensor or torch.jit.is_tracing() or (self.differentiable and _is_transformed()):
                return None
            if kept is None or ((kept.trained or not kept.holds()) and not kept.is_trained()):
                kept = self._kept = self._gather()
        if kept is None or not kept.program:
            return None
        for hooks in kept.hooks:
            if hooks:
                return None
        if kept.floats and (kept.is_trained() or torch.is_autocast_enabled("cpu")):
            return None
        return kept

    def _gather(self) -> "_Kept":
        """The steps as a program, which is empty where the operator does not compute what they do."""
        kept = _Kept(self.steps)
        are_known = all(t.device.type == "cpu" and t.dtype in _CHAINED for t in kept.tensors if t is not None)
        if not are_known or any(step._modules for step in self.steps):  # as a parametrized layer has
            return kept
        if any(isinstance(step, EightBitConv) for step in self.steps) and not multiplies_bytes():
            return kept
        pieces, program, size = [], [], 0
        with torch.inference_mode(False), torch.no_grad():
            for name, arguments in _chain_steps_of(self.steps, self.channels):
                for i, argument in enumerate(arguments):
                    if isinstance(argument, Tensor):
                        flat = argument.detach().contiguous().view(-1).view(torch.uint8)
                        shape, dtype = list(argument.shape), str(argument.dtype).removeprefix("torch.")
                        pieces.append(F.pad(flat, (0, -len(flat) % 64)))
                        arguments[i] = [size, dtype, shape]
                        size += len(pieces[-1])
                program.append([name, arguments])
            kept.constants, kept.program = torch.cat(pieces), json.dumps(program, separators=(",", ":"))
        return kept


_CHAINED = (torch.float32, torch.uint8, torch.int8, torch.bool)  # dtypes that tensors of steps may have


def _is_transformed() -> bool:
    """Whether functions of torch.func, or tangents, may be under way."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class _Kept:
    """A chain's steps as `packed_chain` takes them, and what they were when they were read.

    Attributes:
        constants, program: of the operator; the program is empty where it does not compute what the steps do.
        hooks: the dictionaries of the steps' hooks;  floats: the parameters of float layers.
        tensors: of all steps, None where there is none, which lay in the dictionaries `places` under `names`.
        trained: whether a parameter of a float layer was, which an optimizer may have changed without a count.
    """

    def __init__(self, steps):
        places = [own for step in steps for own in (step._buffers, step._parameters)]
        seen = [(own, name, tensor) for own in places for name, tensor in own.items()]
        self.places, self.names, self.tensors = ([*column] for column in zip(*seen))
        # Read before the tensors are: what is made while one changes is never taken for what it changed to.
        self._counted = [t for t in self.tensors if t is not None and not t.is_inference()]
        self._versions = [t._version for t in self._counted]
        self.floats = [p for m in steps if not isinstance(m, PackedLayer) for p in m.parameters()]
        self._pointers = [p.data_ptr() for p in self.floats]
        self.hooks = [each for m in steps for each in (m._forward_hooks, m._forward_pre_hooks)]
        self.constants, self.program, self.trained = None, "", False

    def is_trained(self) -> bool:
        """Whether a parameter of a float layer is trained now."""
        for parameter in self.floats:
            if parameter.requires_grad:
                self.trained = True
                return True
        return False

    def holds(self) -> bool:
        """Whether tensors lie where they lay, and those whose changes are counted are what they were."""
        found = map(dict.get, self.places, self.names)
        return (
            all(map(operator.is_, found, self.tensors))
            and [*map(operator.attrgetter("_version"), self._counted)] == self._versions
            and [p.data_ptr() for p in self.floats] == self._pointers
        )


def _pool_sizes(pool: nn.Module) -> tuple:
    """What `packed_max_pool` takes of a max-pool of floats: its sizes, one int for each dimension, and ceil_mode."""
    dims = _POOL_DIMENSIONS[type(pool)]
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return *([size] * dims if isinstance(size, int) else list(size) for size in sizes), pool.ceil_mode


_POOL_DIMENSIONS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}


def _chain_steps_of(steps: nn.ModuleList, channels: int):
    """(name, arguments) of the steps that `packed_chain` knows; ReLU and flattening are a part of the next one.

    But for a ReLU at the end of a value.
    """
    relu = flatten = False
    for step in steps:
        if isinstance(step, (nn.ReLU, nn.Flatten)):
            relu, flatten = relu or isinstance(step, nn.ReLU), flatten or isinstance(step, nn.Flatten)
        elif isinstance(step, PackedLayer):
            yield "packed_conv", list(step._arguments(step.padding))
            channels = step.out_channels
        elif isinstance(step, PackedPool):
            yield "packed_max_pool", list(step._arguments())
        elif type(step) in _POOL_DIMENSIONS:
            yield "max_pool", [channels, relu, *_pool_sizes(step)]
            relu = False
        elif isinstance(step, nn.Linear):
            yield "linear", [step.weight, step.bias, relu, flatten]
            relu = flatten = False
        elif isinstance(step, ChainSum):
            yield "sum", [step.value, step.relu, step.in_place]
        elif isinstance(step, ChainRead):
            if relu:
                yield "relu", []
            yield "read", [step.value]
            relu = False
        elif isinstance(step, ChainAverage):
            yield "average", list(step._arguments())
        else:
            name, arguments = "convolution", (step.weight, step.bias, step.stride, _padding_pairs(step), step.dilation)
            if isinstance(step, EightBitConv):
                name, arguments = "eight_bit_convolution", step._arguments()
            *tensors, stride, padding, dilation = arguments
            yield name, [*tensors, *([int(size) for size in sizes] for sizes in (stride, padding, dilation))]
            channels = step.out_channels
    if relu:
        yield "relu", []


def _padding_pairs(layer: nn.Module) -> tuple[int, ...]:
    """(low, high) per spatial dimension, flat, from torch's three ways to say padding."""
    padding = getattr(layer, "padding", ())
    if padding == "valid":
        padding = (0,) * len(layer.kernel_size)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        return tuple(p for total in totals for p in (total // 2, total - total // 2))
    return tuple(p for side in padding for p in (side, side))


def pack(model: nn.Module, *, engine: str = "auto") -> nn.Module:
    """An inference copy in which every active ABC layer is a `PackedLayer`, with 1 bit a weight and base.

    It puts out what the model does in eval mode, to rounding. The model itself is untouched. How fast it is depends on
    the device's engine: see `engines`.

    Args:
        model: a model with ABC layers, or one such layer. Inactive ones and those with float weights stay as they are.
        engine: how the packed layers compute: "auto", whichever is faster where they run, "bits" or "float" (see
            `PackedLayer`). It can be set later too, and no file holds it.

    Raises: ValueError where the model has no layer to pack, or for another engine.
    """
    _check_own(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    layers = [m for m in model.modules() if isinstance(m, _ABCLayer) and m.active and m.us is not None]
    if not layers:
        raise ValueError("pack needs at least one active ABC layer with weight_bases: convert or binarize first")
    return _replace(model, {layer: PackedLayer.from_layer(layer, engine) for layer in layers})


_FORMAT_VERSION = 3
_READABLE = ("1", "2", "3")  # 1 said, for each packed layer, what it was to run as; 1 and 2 knew one code, without zero


def save_packed(model: nn.Module, path) -> None:
    """Write a packed model to one safetensors file (needs the `safetensors` package); replaces the file atomically.

    The file holds the state dict, and in its metadata {"format": "abcnets", "version", "sha256", "layers"}: for each
    packed layer M, N and geometry, for each ABC layer left as it is its bases, as JSON.

    Args:
        model: what `pack` returned (not `fuse`: a fused model is made anew from a packed one after loading).
        path: the file to write.

    Raises: ValueError where the model has no packed layer or is fused, OSError where the file can't be written,
        ImportError without safetensors.
    """
    safetensors = _safetensors()
    _check_own(model)
    layers = {name: _describe(m) for name, m in model.named_modules() if isinstance(m, (PackedLayer, _ABCLayer))}
    if any(isinstance(m, PackedLayer) and m.fused for m in model.modules()):
        raise ValueError("save_packed writes what pack() returned; a fused model is made anew from that after loading")
    if not any(layer["kind"] == "packed" for layer in layers.values()):
        raise ValueError("save_packed writes what pack() returned, but this model has no packed layer")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("save_packed needs a model that holds values, and got one on torch's meta device")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {
        "format": "abcnets",
        "version": str(_FORMAT_VERSION),
        "sha256": _digest(tensors),
        "layers": json.dumps(layers, sort_keys=True),
    }
    with _replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)


@contextlib.contextmanager
def _replacing(path):
    """The name of an empty file beside `path`, which takes its place, its permissions too, if all goes well.

    The name is nobody else's, in whatever thread, process or machine. Where `path` is a link, the file that it leads to
    is replaced, as plain writing would do.
    """
    path = os.path.realpath(os.fsdecode(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is a folder or a device: a file's name is wanted")
    temporary = os.path.join(os.path.dirname(path), f".{os.urandom(8).hex()}.partial")
    open(temporary, "xb").close()  # raises what stands in the way, such as a folder that is not there or not ours
    mode = os.stat(path if os.path.exists(path) else temporary).st_mode
    try:
        yield temporary
        os.chmod(temporary, mode & 0o777)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_packed(path, skeleton: nn.Module) -> nn.Module:
    """Rebuild a packed model from a file of `save_packed`, around a copy of the float network it was made from.

    No pickle is read, and nothing in the file is run. Everything is checked before anything is built: what the file
    says of its layers against its tensors and the skeleton, so that it takes no more memory than both justify. The
    skeleton is never touched.

    The checksum finds damage. It is no signature: whoever changes a file can compute it anew. What is in the tensors is
    data, and taken as it is, NaN and infinity too.

    Args:
        path: the file.
        skeleton: a network of the same architecture, float or converted; its weights do not matter, and it may be on
            torch's meta device.

    Returns: the packed model, in eval mode, on the CPU.
    Raises: FileNotFoundError; ValueError, saying what is wrong, for a file that is truncated, damaged, not one of ours
        or of a later version, or that does not fit the skeleton.
    """
    safetensors = _safetensors()
    _check_own(skeleton)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no packed model at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    layers = _check_metadata(path, metadata, tensors)
    model = copy.deepcopy(skeleton).eval().requires_grad_(False)
    modules = dict(model.named_modules())
    replaced = {}
    for name, description in layers.items():
        if type(modules.get(name)) not in (*_ABC_OF, *_ABC_OF.values()):
            raise ValueError(f"{path} has a binarized layer {name!r}, where the skeleton has no layer to binarize")
        layer = _rebuild(modules[name], description)
        if json.dumps(_describe(layer), sort_keys=True) != json.dumps(description, sort_keys=True):
            raise ValueError(f"{path} was made from another network: its layer {name!r} is {description}, "
                             f"the skeleton's would be {_describe(layer)}")  # fmt: skip
        replaced[modules[name]] = layer
    model = _replace(model, replaced)
    _check_tensors(path, model, tensors)
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu())
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the skeleton: {error}") from None
    return model


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"packed models are kept in safetensors files: pip install safetensors ({error})") from None
    return safetensors


def _describe(layer: nn.Module) -> dict:
    if isinstance(layer, _ABCLayer):
        names = ("weight_bases", "activation_bases", "per_channel", "zero", "nearest")
        return {"kind": "abc", "code": list(layer.code), **{name: getattr(layer, name) for name in names}}
    names = ("channels", "out_channels", "groups", "padding_mode")
    lists = ("kernel_size", "stride", "padding", "dilation")
    return {
        "kind": "packed", "M": layer.weight_bases, "N": layer.activation_bases or 0,
        "code": list(layer.code), "zero": layer.zero is not None,
        **{name: getattr(layer, name) for name in names}, **{name: list(getattr(layer, name)) for name in lists},
    }  # fmt: skip


def _rebuild(layer: nn.Module, description: dict) -> nn.Module:
    try:
        if description["kind"] == "packed":
            # Shapes alone: memory is taken once the file's tensors are known to have them.
            options = {"code": description["code"], "zero": description["zero"]}
            return PackedLayer(layer, description["M"], description["N"], device="meta", **options).eval()
        names = ("weight_bases", "activation_bases", "per_channel", "code", "zero")
        bases = {name: description[name] for name in names}
        # Any start values do, and these cost nothing.
        us, vs = (None if bases[side] is None else even_shifts for side in ("weight_bases", "activation_bases"))
        stock = layer._stock if isinstance(layer, _ABCLayer) else type(layer)
        rebuilt = _ABC_OF[stock].from_float(layer, **bases, us=us, vs=vs, betas=vs).eval()
        rebuilt.nearest = bool(description["nearest"])
        return rebuilt
    except (KeyError, ValueError) as error:
        raise ValueError(f"a layer description in the file makes no sense: {description} ({error})") from None


def _check_tensors(path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Whether the tensors of a file are those of the model, by name, shape and kind; floats of any width are floats."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        in_file, in_model = (_kind(each.get(name)) for each in (tensors, wanted))
        if in_file != in_model:
            raise ValueError(f"{path} does not fit the skeleton: {name} is {in_file} in the file, {in_model} wanted")
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        if buffer.is_meta and name not in wanted and not isinstance(owner, PackedLayer):
            raise ValueError(f"the skeleton's buffer {name} is on the meta device, and no file holds it: build the "
                             "skeleton on the CPU")  # fmt: skip


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{'float' if tensor.is_floating_point() else tensor.dtype} {tuple(tensor.shape)}"


def _check_metadata(path, metadata: dict, tensors: dict) -> dict:
    """The layer descriptions, once the file is known to be ours, of a version we read, and as it was written."""
    if metadata.get("format") != "abcnets":
        raise ValueError(f"{path} is a safetensors file, but no packed model: its format is {metadata.get('format')!r}")
    version = metadata.get("version", "")
    if version not in _READABLE:
        raise ValueError(f"{path} has format version {version!r}; this abcnets reads {' and '.join(_READABLE)}")
    if metadata.get("sha256") != _digest(tensors):
        raise ValueError(f"{path} is damaged: its checksum does not match its contents")
    try:
        layers = json.loads(metadata["layers"])
    except (KeyError, ValueError, RecursionError):
        layers = None
    if not isinstance(layers, dict) or not all(map(_is_description, layers.values())):
        raise ValueError(f"{path} lacks a readable description of its layers")
    if version == "1":
        layers = {name: {k: v for k, v in layer.items() if k != "engine"} for name, layer in layers.items()}
    if version in ("1", "2"):
        layers = {name: _with_code(layer) for name, layer in layers.items()}
    return layers


def _with_code(layer: dict) -> dict:
    """The description of a layer from before there were codes, in today's words."""
    new = {"code": ["thermometer", "thermometer"], "zero": False}
    return {**layer, **new, **({"nearest": True} if layer.get("kind") == "abc" else {})}


def _is_description(layer) -> bool:
    """Whether this is a dict of integers, words and flat lists of them."""
    if not isinstance(layer, dict):
        return False
    items = [item for value in layer.values() for item in (value if isinstance(value, list) else [value])]
    return all(item is None or isinstance(item, (int, str)) for item in items)


def _digest(tensors: dict[str, Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)};".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------- Packed: fused, exported


def fuse(model: nn.Module, *, rest: str = "float") -> "torch.fx.GraphModule":
    """Keep bits between the layers of a packed model: BatchNorm, ReLU and max-pool become thresholds and ORs.

    Between two packed layers, whatever is elementwise and monotone in each channel only moves the next layer's
    thresholds, so the earlier one compares and hands on bits, and no float tensor is written on the way. From then on
    these layers run bits, and those that only read one another are steps of one `PackedChain`, which an engine runs in
    one call; so are small float layers in front of and behind them. Packed layers that run as floats (see
    `PackedLayer.runs_bits`) stay as they are, but for a BatchNorm behind them. So does everything of which it can't be
    shown that the outputs stay the same: layers that are called more than once or have hooks, values with another
    reader, norms over another dimension than the channels. How that is shown, and what is folded where there are no
    bits, is told in kernels/fuse.py.

    Args:
        model: what `pack` or `load_packed` returned, in float32; it is not touched.
        rest: "float", or "int8": where a convolution of at most four channels, that of an image, begins a chain, it
            becomes an `EightBitConv`, whose outputs are not the same. That pays where this layer is large, as in
            ResNet-18. It takes an x86 processor with AVX-512 VNNI. Where nothing becomes one, a warning says so.

    Returns: a torch.fx.GraphModule with the same outputs (but for `rest`), to rounding. NaN in the input raises
        ValueError where it would have to become bits, and so does input without a batch where a norm or a pool was
        folded in, and another value of an argument whose default is None, True or False.
    Raises: ValueError for another `rest`; where the model can't be traced by torch.fx, changes its own tensors, has
        hooks of its own (those of its modules stay), holds no packed layer or is fused already; ImportError without
        abcnets_kernels. A trace knows tensors by what is done with them: what forward decides by isinstance, counts in
        Python numbers or draws at random without its input is as it was when it was traced.
    """
    _check_own(model)
    return _kernels("fuse").fuse(_this_file(), model, rest)


def fused_for(name: str, value, wanted) -> None:
    """What a fused model calls for an argument that its trace holds for one value of alone. Raises ValueError."""
    if value is not wanted:
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"this model was fused for {name}={wanted}, where its forward pass may do something else than "
                         f"for {got}")  # fmt: skip


def export_onnx(model: nn.Module, example_input: Tensor, path, *, activations: str | None = None,
                calibration=None) -> Summary | None:  # fmt: skip
    """Write a model as one ONNX file, which runs without torch; replaces the file atomically.

    Takes a model with ABC layers (its quantized weights become float32 constants), what `pack` or `load_packed`
    returned, or what `fuse` made of that. Packed weights stay bits in the file: uint8 initializers in the order of
    `PackedLayer.bits`, which standard operators unpack; ONNX Runtime does so once, when it loads the file. It then runs
    float convolutions: the file is as small as that of `save_packed`, but no faster than a float network's. Between
    the layers of a fused model it hands on booleans.

    With `activations="int8"` the file is as small, and ONNX Runtime runs its convolutions and linear layers in
    integers (QLinearConv, QGemm), which is a few times as fast where the processor has a dot product of 8-bit
    numbers. It is what binary weights with float activations are for: a value of eight bits is a sum of eight bases,
    R ~ s (q - z), which such an instruction counts at once.

    - Activations are uint8, with one scale s and zero z for a tensor, whose range is that of least squared error on the
      calibration batches (torch.ao's HistogramObserver). Where N bases stand in front of a layer, their levels are
      codes, the nearest multiples of one scale: as they are for N = 1 and for uniform codes, off by at most a 254th of
      their span else.
    - Weights are int8 with one scale a channel. Those of M bases stay bits in the file, whoever packs them, and a
      table of 2^M levels a channel: exact for M = 1, else off by at most half a 64th of the channel's largest. Layers
      with float weights, the first and the last above all, are rounded to 64ths likewise, so that no processor's sums
      of two products overflow (AVX2 has 16 bits for them); so are more than 7 bases,
      as numbers, since bits of them are no smaller. Biases are int32, and off by at most half of s times the scale.
    - BatchNorm becomes a part of the layer before it, through a max-pool too where it rises, or else a convolution of
      its own. ReLU, max-pool, sums, concatenation and average pooling are in integers. The rest stays float.

    Input and output are called "input" and "output", and their first dimension, the batch, may be of any size.

    Args:
        model: the model, which is exported as it is in eval mode; it is not touched.
        example_input: a batch of the right shape and dtype; its values don't matter.
        path: the file to write.
        activations: None, which leaves them float, or "int8".
        calibration: for int8, which is then in float32: an iterable of inputs, or of (input, ...) tuples such as a
            DataLoader yields, or one tensor; some hundred images.

    Returns: for int8 a `Summary`: what became of each layer, and each operator that stays float. Otherwise None.
    Raises: ImportError without the packages abcnets_kernels, onnx and onnxscript; ValueError for an example without a
        batch, where torch.export can't trace the model, and for int8 where a calibration batch is of another shape or
        not finite or there is none, and for a fused model in which bits go from layer to layer. A NaN that would have
        to become bits or a code raises nothing in the file: in a fused model it counts as below every threshold.

    On x86 processors without VNNI, ONNX Runtime adds two products of 8-bit numbers in 16 bits, which overflow: set
    `options.add_session_config_entry("session.x64quantprecision", "1")`. With M = 1 they never do.

    Example::

        abcnets.export_onnx(abcnets.pack(model), images[:1], "model.onnx")
        session = onnxruntime.InferenceSession("model.onnx")
        (logits,) = session.run(None, {"input": images.numpy()})

        print(abcnets.export_onnx(model, images[:1], "int8.onnx", activations="int8", calibration=images))
    """
    _check_own(model)
    return _kernels("export").export_onnx(_this_file(), model, example_input, path, activations, calibration)
