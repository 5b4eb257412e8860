"""Accurate binary convolution for PyTorch: weights and activations as linear combinations of +1/-1 bases.

After Lin, Zhao, Pan, "Towards Accurate Binary Convolutional Neural Network", NeurIPS 2017, arXiv:1711.11294:

    W ~ Wq = sum_m alpha_m B_m     B_m = sign(W - mean(W) + u_m std(W))        m = 1..M   weight bases
    R ~ Aq = sum_n beta_n  A_n     A_n = +1 where R >= 1/2 - v_n, else -1      n = 1..N   activation bases
    conv(R, W) ~ conv(Aq, Wq) = sum_m sum_n alpha_m beta_n conv(A_n, B_m)

This one file needs torch and nothing else: copy it into your project.

    model = abcnets.convert(resnet18, weight_bases=3, activation_bases=3)   # a binarized copy, weights kept
    abcnets.calibrate(model, batches)                                       # no training: a thousand images
    ...                                                                     # fine-tune it like any other model
    packed = abcnets.pack(model)                                            # 1 bit a weight and base

What is in it, from top to bottom:

    even_shifts, gaussian_shifts                       the shifts u of the weight bases
    weight_bases, fit_weight, quantize_weight          B, alpha and Wq of a weight
    quantize_activation                                Aq of what reaches a layer
    ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear         the layers, drop-ins for torch's
    binarize                                           switch them on and off
    plan, convert                                      which layers become binary, and a copy in which they are
    calibrate                                          fit it to some data, without training
    summary                                            what each layer holds and does (a `Summary`: a table)
    sensitivity, allocate                              which layers hurt most (a `Sensitivity`), what to spend on each
    picture                                            what one layer does, as a figure
    pack, PackedLayer                                  for inference: 1 bit a weight and base
    save_packed, load_packed                           one file, no pickle
    fuse                                               bits from layer to layer
    export_onnx                                        one ONNX file, which runs without torch

Symbols, used throughout:

    W (O, C, *K)   weights: O output channels, C channels of one group, K the kernel's extent
    us (M,)        fixed shifts of the weight bases, in standard deviations
    alphas (M, O)  scales of the weight bases: the least-squares fit of Wq to W, never stored
    R (B, C, *S)   what reaches a layer; in the paper's networks after BatchNorm and ReLU
    vs, betas (N,) learned shifts and scales of the activation bases

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

import copy
import functools
import html
import json
import math
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "1.0.0"

__all__ = [
    "even_shifts", "gaussian_shifts", "weight_bases", "fit_weight", "quantize_weight", "quantize_activation",
    "ABCConv1d", "ABCConv2d", "ABCConv3d", "ABCLinear", "binarize", "plan", "convert", "calibrate", "summary",
    "Summary", "sensitivity", "Sensitivity", "allocate", "picture", "pack", "PackedLayer", "save_packed", "load_packed",
    "fuse", "export_onnx",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Shifts and levels
# ---------------------------------------------------------------------------------------------------------------------


def even_shifts(M: int) -> Tensor:
    """Shifts u_1..u_M evenly spaced in [-1, 1] (arXiv:1711.11294, section 3.1); 0 for M = 1. Shape: (M,), float32."""
    _check_bases("weight_bases", M)
    return torch.linspace(-1, 1, M) if M > 1 else torch.zeros(1)


def gaussian_shifts(M: int) -> Tensor:
    """Shifts that lose least on Gaussian weights: the Lloyd-Max thresholds of M + 1 levels (Max 1960, Lloyd 1982).

    Levels are their cell's mean, thresholds are midway between levels. Relative squared error of a unit Gaussian:
    0.363, 0.190, 0.118, 0.058 for M = 1, 2, 3, 5; `even_shifts` gives 0.363, 0.262, 0.118, 0.077.

    Shape: (M,), float32, ascending.
    """
    _check_bases("weight_bases", M)
    return torch.tensor(_gaussian_thresholds(M), dtype=torch.float32)


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
    x = samples.detach().flatten().double().cpu().sort().values
    total = torch.cat([x.new_zeros(1), x.cumsum(0)])
    # Rectified activations pile up at their minimum: spread the start over what lies above it.
    above = x[x > x[0]]
    if len(above) == 0:
        return x[:1].expand(count), x[:1].expand(count + 1)
    thresholds = torch.quantile(above[:: max(1, len(above) // 100_000)], (torch.arange(count) + 0.5).double() / count)
    for _ in range(iterations):
        edges = torch.cat([torch.tensor([0]), torch.searchsorted(x, thresholds), torch.tensor([len(x)])])
        counts = edges.diff()
        levels = total[edges].diff() / counts
        # A cell that lost all its samples collapses onto its lower edge, and stays harmless there.
        levels = torch.where(counts > 0, levels, torch.cat([x[:1], thresholds]))
        moved = (levels[1:] + levels[:-1]) / 2
        if torch.equal(moved, thresholds):
            break
        thresholds = moved
    return thresholds, levels


def _fit_activations(samples: Tensor, N: int, constant: bool) -> tuple[Tensor, Tensor] | None:
    """(vs, betas), float32 on the CPU, of the least squared error on `samples`; None where these are all one value.

    N bases have N + 1 levels, but these are tied, c_0 = -c_N: they are fitted up to one constant. That is all one needs
    where something behind the layer takes up constants, a BatchNorm or a bias. Where nothing does, the first of N > 1
    bases can be spent on it (`constant`): +1 on all samples, which leaves N - 1 thresholds.
    """
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


@functools.cache
def _start_activations(N: int) -> tuple[Tensor, Tensor]:
    """(vs, betas) of a new layer: the best fit to a rectified unit Gaussian, as BatchNorm and ReLU put it out."""
    _check_bases("activation_bases", N)
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return _fit_activations(torch.special.ndtri(quantiles).relu(), N, constant=True)


def _check_bases(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be a positive integer, or None to leave that side float; got {count!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def weight_bases(W: Tensor, us: Tensor, per_channel: bool = True) -> Tensor:
    """The binary bases of W (arXiv:1711.11294, eq. 2).

        B_m = sign(W - mean(W) + u_m std(W)),   sign(0) = +1

    Mean and sample std are taken over each W[o], or over all of W where `per_channel` is False.

    Shape: W (O, C, *K); us (M,) -> (M, O, C, *K), +1 and -1 in W's dtype.
    Raises: ValueError if us is empty or not one-dimensional, TypeError if W is not floating point.
    """
    _check_weight(W, us)
    x, thresholds = _standardize(W, us, per_channel)
    return torch.stack([torch.where(x >= t, 1.0, -1.0).to(W.dtype).view_as(W) for t in thresholds.unbind(1)])


def fit_weight(W: Tensor, us: Tensor, per_channel: bool = True) -> Tensor:
    """The scales alpha that minimize |W - sum_m alpha_m B_m|^2 (arXiv:1711.11294, eq. 3-4), in closed form.

    Base m is +1 wherever a base with smaller u is: the bases are nested and cut the weights into M + 1 bins by value.
    On bin j (that many bases are +1) Wq is one constant c_j, with c_j - c_(j-1) = 2 alpha_j and c_0 = -c_M and no other
    constraint. So least squares is a mean over each inner bin, and for the two outer bins together

        c_M = -c_0 = (sum of W in bin M - sum of W in bin 0) / (n_M + n_0).

    An empty inner bin takes its lower neighbour's constant: its alpha is 0. Only the alphas of the largest and the
    smallest shift can be negative, where a channel's mean is large against its deviation. Cost: O(M size(W)).

    Shape: W (O, C, *K); us (M,) -> alphas (M, O), or (M, 1) where `per_channel` is False.
    Raises: as `weight_bases`.
    """
    _check_weight(W, us)
    levels, _ = _levels(W, us, per_channel)
    return (levels.diff(dim=1) / 2)[:, _nesting(us).argsort()].t().to(W.dtype)


def quantize_weight(W: Tensor, us: Tensor, per_channel: bool = True) -> Tensor:
    """Wq = sum_m alpha_m B_m with the alphas of `fit_weight` (arXiv:1711.11294, eq. 2-4 and section 3.2.1).

    Backward: straight-through, dL/dW = dL/dWq. Where us requires grad (the paper's future work),
    dL/du_m = alpha_m sum(dL/dWq [|z_m| <= 1]) with z_m = (W - mean(W)) / std(W) + u_m and alpha held fixed.

    Shape: W (O, C, *K); us (M,) -> like W. A NaN weight makes its channel NaN.
    Raises: as `weight_bases`.
    """
    _check_weight(W, us)
    return _QuantizeWeight.apply(W, us, per_channel)


def _check_weight(W: Tensor, us: Tensor) -> None:
    if not W.is_floating_point():
        raise TypeError(f"weights must be floating point, got {W.dtype}")
    if W.ndim < 1:
        raise ValueError("weights must have at least one dimension (output channels first), got a scalar")
    if us.ndim != 1 or len(us) == 0:
        raise ValueError(f"us must be one-dimensional with one shift per weight base, got shape {tuple(us.shape)}")


def _standardize(W: Tensor, us: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """x (G, K), thresholds (G, M, 1) such that B_m is +1 exactly where x >= threshold m; G groups share statistics.

    In float32 or wider, so that half-precision weights have the bases that their float32 copy has.
    """
    x = _grouped(W, per_channel)
    x = x - x.mean(1, keepdim=True)
    # One value alone has no sample deviation; 0 makes all its bases +1, and Wq the value itself.
    std = x.std(1, keepdim=True) if x.shape[1] > 1 else torch.zeros_like(x)
    return x, -(std * us.to(x.dtype))[:, :, None]


def _grouped(W: Tensor, per_channel: bool) -> Tensor:
    groups = len(W) if per_channel else 1
    return W.reshape(groups, W.numel() // max(groups, 1)).to(torch.promote_types(W.dtype, torch.float32))


def _nesting(us: Tensor) -> Tensor:
    """The order of the bases from the one with most +1 to the one with fewest."""
    return us.argsort(descending=True, stable=True)


def _levels(W: Tensor, us: Tensor, per_channel: bool) -> tuple[Tensor, list[Tensor]]:
    """Least-squares constants c_0..c_M (G, M + 1), and the nested masks (G, K) of what lies at each base's +1."""
    x, thresholds = _standardize(W, us, per_channel)
    above = [x >= t for t in thresholds[:, _nesting(us)].unbind(1)]
    W = _grouped(W, per_channel)
    everything, nothing = torch.ones_like(above[0]), torch.zeros_like(above[0])
    bins = [inner ^ outer for outer, inner in zip([everything, *above], [*above, nothing])]
    sums = [torch.where(bin, W, 0).sum(1) for bin in bins]
    counts = [bin.sum(1) for bin in bins]
    top = (sums[-1] - sums[0]) / (counts[-1] + counts[0]).clamp(min=1)
    levels = [-top]
    for total, count in zip(sums[1:-1], counts[1:-1]):
        levels.append(torch.where(count > 0, total / count.clamp(min=1), levels[-1]))
    return torch.stack([*levels, top], dim=1), above


class _QuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(W, us, per_channel):
        levels, above = _levels(W, us, per_channel)
        lowest, *higher = levels.unsqueeze(2).unbind(1)
        Wq = lowest.expand(above[0].shape)
        for mask, level in zip(above, higher):
            Wq = torch.where(mask, level, Wq)
        return Wq.reshape(W.shape).to(W.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        W, us, ctx.per_channel = inputs
        if us.requires_grad:
            ctx.save_for_backward(W, us)

    @staticmethod
    def backward(ctx, G):
        if not ctx.needs_input_grad[1]:
            return G, None, None
        W, us = ctx.saved_tensors
        x, thresholds = _standardize(W, us, ctx.per_channel)
        std = x.std(1, keepdim=True) if x.shape[1] > 1 else torch.ones_like(x)
        alphas = fit_weight(W, us, ctx.per_channel)
        G_us = [
            (alpha[:, None] * torch.where((x - t).abs() <= std, G.reshape(x.shape), 0)).sum()
            for alpha, t in zip(alphas, thresholds.unbind(1))
        ]
        return G, torch.stack(G_us).to(us.dtype), None


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


def quantize_activation(R: Tensor, vs: Tensor, betas: Tensor) -> Tensor:
    """Aq = sum_n beta_n A_n, a staircase of N + 1 levels (arXiv:1711.11294, eq. 7-11).

        A_n = +1 where clip(R + v_n, 0, 1) >= 1/2, that is R >= 1/2 - v_n, else -1

    Backward, with G = dL/dAq and the window 0 <= R + v_n <= 1, that is |R - (1/2 - v_n)| <= 1/2:

        dL/dR = sum_n beta_n G [window_n]     dL/dv_n = beta_n sum(G [window_n])     dL/dbeta_n = sum(G A_n)

    NaN stays NaN (with no gradient); infinities fall on the outer levels. Only R is kept for the backward pass.

    Shape: R any; vs (N,), betas (N,) -> like R, in R's dtype. Comparisons are made in float32 or wider.
    Raises: ValueError if vs and betas are not of one and the same length, TypeError if R is not floating point.
    """
    if vs.ndim != 1 or len(vs) == 0 or vs.shape != betas.shape:
        shapes = f"{tuple(vs.shape)} and {tuple(betas.shape)}"
        raise ValueError(f"vs and betas must have one entry per activation base, got shapes {shapes}")
    if not R.is_floating_point():
        raise TypeError(f"a binarized layer takes floating-point input, got {R.dtype}")
    return _QuantizeActivation.apply(R, vs, betas)


def _thresholds(vs: Tensor) -> Tensor:
    """t_n = 1/2 - v_n, in float32 or wider: the one place where v becomes a threshold, in training and packing."""
    return 0.5 - vs.to(torch.promote_types(vs.dtype, torch.float32))


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


def _staircase(R: Tensor, thresholds: Tensor, betas: Tensor) -> Tensor:
    """sum_n beta_n A_n for any order of the thresholds (N,) and any sign of the betas (N,)."""
    if torch.compiler.is_compiling():  # in one expression, which a compiler fuses and an exporter translates as it is
        r = R.to(torch.promote_types(R.dtype, torch.float32))
        steps = [torch.where(r >= t, 2 * beta, 0) for t, beta in zip(thresholds, betas.to(r.dtype))]
        return torch.where(r.isnan(), r, sum(steps, -betas.sum())).to(R.dtype)
    thresholds, order = thresholds.sort()
    steps = 2 * betas.to(thresholds.dtype)[order]
    lowest, steps, thresholds = -steps.sum() / 2, _scalars(steps), _scalars(thresholds)
    Aq = torch.empty_like(R)
    for r, a in _in_cache(R, Aq):
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        level = r.clamp(lowest, lowest)  # the lowest level everywhere, but a NaN stays a NaN
        for threshold, step in zip(thresholds, steps):
            level.add_(_is_at_least(r, threshold).mul_(step))
        a.copy_(level)
    return Aq


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(R, vs, betas):
        return _staircase(R, _thresholds(vs), betas)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        R, vs, betas = ctx.saved_tensors
        thresholds, scales = _scalars(_thresholds(vs)), _scalars(betas)
        G_R = torch.empty_like(R)
        near_sums = [0.0] * len(vs)
        above_sums = [0.0] * len(vs)
        total = 0.0
        for r, g, g_r in _in_cache(R, G, G_R):
            r = r.to(torch.promote_types(r.dtype, torch.float32))
            g = g.to(r.dtype)
            slope = torch.zeros_like(g)
            for n, (threshold, beta) in enumerate(zip(thresholds, scales)):
                near = (r - threshold).abs_().le_(0.5).mul_(g)
                near_sums[n] = near_sums[n] + near.sum()
                slope.add_(near.mul_(beta))
                above_sums[n] = above_sums[n] + _is_at_least(r, threshold).mul_(g).sum()
            g_r.copy_(slope)
            total = total + g.sum()
        G_vs = betas * torch.stack(near_sums).to(betas.dtype)
        G_betas = (2 * torch.stack(above_sums) - total).to(betas.dtype)
        return G_R, G_vs, G_betas


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


class _ABCLayer(nn.Module):
    """What the four layers share: the bases, the active flag, loading, and two more ways to construct one."""

    _stock: type[nn.Module]  # torch's layer of that name
    spatial_dims: int  # 0 for a linear layer

    def _set_bases(self, weight_bases, activation_bases, us, vs, betas, active, per_channel, learn_us) -> None:
        """Called once `weight` is there; the bases go to its device and dtype."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        if not self.weight.is_floating_point():
            raise TypeError(f"a binarized layer's weights must be floating point, got {self.weight.dtype}")
        if weight_bases is not None:
            _check_bases("weight_bases", weight_bases)
            us = _start_values("us", gaussian_shifts if us is None else us, weight_bases, like)
        elif us is not None:
            raise ValueError("us were given, but weight_bases=None leaves the weights float")
        if activation_bases is not None:
            start_vs, start_betas = _start_activations(activation_bases)
            vs = _start_values("vs", start_vs if vs is None else vs, activation_bases, like)
            betas = _start_values("betas", start_betas if betas is None else betas, activation_bases, like)
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

    @property
    def weight_bases(self) -> int | None:
        """M, or None where the weights stay float."""
        return None if self.us is None else len(self.us)

    @property
    def activation_bases(self) -> int | None:
        """N, or None where the activations stay float."""
        return None if self.vs is None else len(self.vs)

    def alphas(self) -> Tensor:
        """The scales of the weight bases, (M, O), always those of the present weights; (M, 1) where not per channel."""
        if self.us is None:
            raise ValueError("this layer's weights are float (weight_bases=None): it has no alphas")
        return fit_weight(self.weight, self.us, self.per_channel)

    def quantized_weight(self) -> Tensor:
        """Wq, shaped like `weight`; `weight` itself where weight_bases is None."""
        return self.weight if self.us is None else quantize_weight(self.weight, self.us, self.per_channel)

    def quantized_input(self, input: Tensor) -> Tensor:
        """Aq of a batch, shaped like it; the batch itself where activation_bases is None."""
        if not input.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes floating-point input, got {input.dtype}")
        channels = self.weight.shape[1] * getattr(self, "groups", 1)
        axis = -1 - self.spatial_dims
        if input.ndim < -axis or input.shape[axis] != channels:
            wanted = " x ".join(["batch", str(channels), *["size"] * self.spatial_dims])
            raise ValueError(f"{type(self).__name__} takes input of shape {wanted}, got {tuple(input.shape)}")
        return input if self.vs is None else quantize_activation(input, self.vs, self.betas)

    def extra_repr(self) -> str:
        bases = f"weight_bases={self.weight_bases}, activation_bases={self.activation_bases}"
        return f"{super().extra_repr()}, {bases}, active={self.active}"

    # The flag travels in the state dict, yet stays a Python bool in the layer: a tensor would have to be read back from
    # the device in every forward pass, and would break a compiled graph.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.active)

    def set_extra_state(self, state: Tensor) -> None:
        self.active = bool(state)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = {prefix + name for name in ("us", "vs", "betas", "_extra_state")}
        from_float = own.isdisjoint(state_dict)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if from_float:  # a stock layer's checkpoint: the new entries keep their start values
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
    def from_parameters(cls, weight, bias=None, us=None, vs=None, betas=None, *, active=True, per_channel=True,
                        learn_us=False, **geometry):  # fmt: skip
        """The original's second constructor: a layer around given parameters, dimensions read off the weight.

        Args:
            weight: (O, C / groups, *K) float tensor; (O, C) for a linear layer. A Parameter is shared, not copied.
            bias: (O,) or None for no bias.
            us: M shifts, or None to leave the weights float.
            vs, betas: N shifts and scales (both or neither), or None to leave the activations float.
            **geometry: stride, padding, dilation, groups, padding_mode, as in the constructor.

        Raises: ValueError for a weight of the wrong number of dimensions, a bias of the wrong length, or vs and betas
            of different lengths; TypeError for a weight that is no floating-point tensor.
        """
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"weight must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight))}")
        if weight.ndim != cls.spatial_dims + 2:
            raise ValueError(f"{cls.__name__} needs a weight of {cls.spatial_dims + 2} dimensions, "
                             f"got shape {tuple(weight.shape)}")  # fmt: skip
        if bias is not None and tuple(bias.shape) != (len(weight),):
            raise ValueError(f"bias must have shape ({len(weight)},) to fit the weight, got {tuple(bias.shape)}")
        if (vs is None) != (betas is None) or (vs is not None and len(vs) != len(betas)):
            lengths = [None if values is None else len(values) for values in (vs, betas)]
            raise ValueError(f"vs and betas must have the same length, got {lengths[0]} and {lengths[1]}")
        bases = {
            "weight_bases": None if us is None else len(us), "activation_bases": None if vs is None else len(vs),
            "us": us, "vs": vs, "betas": betas, "active": active, "per_channel": per_channel, "learn_us": learn_us,
        }  # fmt: skip
        return cls._around(weight, bias, cls._geometry(weight, **geometry), bases)

    @classmethod
    def from_float(cls, layer: nn.Module, **bases):
        """A binarized layer that shares the stock layer's weight and bias (the same Parameter objects) and geometry.

        Args:
            layer: the torch layer of the same name (nn.Conv2d for ABCConv2d).
            **bases: weight_bases, activation_bases, us, vs, betas, active, per_channel, learn_us.
        """
        if not isinstance(layer, cls._stock):
            raise TypeError(f"{cls.__name__}.from_float takes an nn.{cls._stock.__name__}, got {type(layer).__name__}")
        names = ("stride", "padding", "dilation", "groups", "padding_mode") if cls.spatial_dims else ()
        geometry = cls._geometry(layer.weight, **{name: getattr(layer, name) for name in names})
        return cls._around(layer.weight, layer.bias, geometry, bases).train(layer.training)


_DEFAULT_BASES = {
    "weight_bases": 3, "activation_bases": 3, "us": None, "vs": None, "betas": None,
    "active": True, "per_channel": True, "learn_us": False,
}  # fmt: skip


def _start_values(name: str, values, count: int, like: dict) -> Tensor:
    """A (count,) tensor from numbers, a tensor, or a function of the count such as `even_shifts`."""
    values = values(count) if callable(values) else values
    values = torch.as_tensor(values).detach().clone().to(**like)
    if values.shape != (count,):
        raise ValueError(f"{name} must be {count} numbers, one per base, got shape {tuple(values.shape)}")
    return values


class _ABCConv(_ABCLayer):
    """The convolutions' constructor and forward pass; its `super()` is torch's own layer."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        weight_bases=3,
        activation_bases=3,
        us=None,
        vs=None,
        betas=None,
        weight_init=None,
        bias_init=None,
        active=True,
        per_channel=True,
        learn_us=False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         device, dtype)  # fmt: skip
        _initialize(self, weight_init, bias_init)
        self._set_bases(weight_bases, activation_bases, us, vs, betas, active, per_channel, learn_us)

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)

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


_LAYER_DOC = """{kind} whose weights and input are sums of +1/-1 bases: a drop-in for nn.{stock} (arXiv:1711.11294).

        y = {operation}(Aq, Wq) + bias,   Wq = sum_m alpha_m B_m,   Aq = sum_n beta_n A_n

    Training runs this one float {what}; `pack` turns it into M x N bitwise ones. Inactive, or with both sides
    None, it is bit for bit the stock layer. A stock layer's checkpoint loads into it with strict=True.

    Args:
        {arguments}: as in nn.{stock}.
        weight_bases: M, or None to leave the weights float.
        activation_bases: N, or None to leave the input float.
        us: M shifts of the weight bases, as numbers or as a function of M. Default: `gaussian_shifts`.
        vs, betas: N shifts and N scales of the activation bases, likewise. Default: the best fit to a rectified unit
            Gaussian, which is what BatchNorm and ReLU put out.
        weight_init, bias_init: functions that fill a tensor in place, such as those of torch.nn.init. Default: torch's.
        active: whether quantization starts switched on; `binarize` switches it.
        per_channel: mean, std and alpha per output channel, or one for the layer.
        learn_us: make us a parameter.

    Shape: input {input_shape} -> {output_shape}, as nn.{stock}. Under autocast, what torch does with {operation}.

    Attributes:
        weight, bias: the float parameters, as in nn.{stock}.
        us (M,), vs (N,), betas (N,): the bases' shifts and scales; None on a side that stays float.
        active (bool): travels in the state dict.

    Raises: ValueError for a count of bases that is not a positive integer, shifts or scales of another length, or
        input of the wrong shape; TypeError for input that is not floating point.

    Example::

        >>> layer = {example}
        >>> layer({example_input}).shape
        torch.Size({example_output})
    """


def _document(cls, **words):
    cls.__doc__ = _LAYER_DOC.format(stock=cls._stock.__name__, **words)


class ABCConv1d(_ABCConv, nn.Conv1d):
    _stock = nn.Conv1d
    spatial_dims = 1


class ABCConv2d(_ABCConv, nn.Conv2d):
    _stock = nn.Conv2d
    spatial_dims = 2


class ABCConv3d(_ABCConv, nn.Conv3d):
    _stock = nn.Conv3d
    spatial_dims = 3


class ABCLinear(_ABCLayer, nn.Linear):
    _stock = nn.Linear
    spatial_dims = 0

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, weight_bases=3,
                 activation_bases=3, us=None, vs=None, betas=None, weight_init=None, bias_init=None, active=True,
                 per_channel=True, learn_us=False):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        _initialize(self, weight_init, bias_init)
        self._set_bases(weight_bases, activation_bases, us, vs, betas, active, per_channel, learn_us)

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


for _cls, _size, _example in (
    (ABCConv1d, "L", (50,)),
    (ABCConv2d, "H, W", (32, 32)),
    (ABCConv3d, "D, H, W", (8, 9, 9)),
):
    _document(
        _cls, kind=f"A {_cls.spatial_dims}-D convolution", what="convolution", operation=f"conv{_cls.spatial_dims}d",
        arguments="in_channels ... dtype", input_shape=f"(B, C, {_size})", output_shape="(B, O, ...)",
        example=f"{_cls.__name__}(16, 33, 3, padding=1, weight_bases=3, activation_bases=3)",
        example_input="torch.rand(" + ", ".join(map(str, (2, 16, *_example))) + ")",
        example_output=[2, 33, *_example],
    )  # fmt: skip
_document(
    ABCLinear, kind="A linear layer", what="product", operation="linear", arguments="in_features ... dtype",
    input_shape="(..., C)", output_shape="(..., O)", example="ABCLinear(20, 30, weight_bases=3, activation_bases=3)",
    example_input="torch.rand(128, 20)", example_output=[128, 30],
)  # fmt: skip

_ABC_OF = {cls._stock: cls for cls in (ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear)}


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


def binarize(module: nn.Module, active: bool = True) -> nn.Module:
    """Switch quantization on (or off again) in a layer, or in every such layer of a model; returns the module."""
    for layer in module.modules():
        if isinstance(layer, _ABCLayer):
            layer.active = bool(active)
    return module


def plan(model, weight_bases=3, activation_bases=3, *, filter_fn=None, settings=None) -> "Summary":
    """What `convert` would do with each layer that holds weights, and why: a table, and nothing is changed.

        >>> up = nn.ConvTranspose2d(8, 8, 2)
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), up, nn.Conv2d(8, 2, 1))
        >>> plan(network, weight_bases=2, activation_bases=3)
        layer  kind                    weight  parameters  M  N  why
        --------------------------------------------------------------------------------------
        0      Conv2d           8 x 3 x 3 x 3         224        first layer: float by default
        1      Conv2d           8 x 8 x 3 x 3         584  2  3  converted
        2      ConvTranspose2d  8 x 8 x 2 x 2         264        has no binary form
        3      Conv2d           2 x 8 x 1 x 1          18        last layer: float by default
        --------------------------------------------------------------------------------------
        total                                       1,090

    Args: as in `convert`, which decides by this very plan.

    Columns: layer, kind, weight (its shape), parameters (of the layer itself, its children not counted), M, N (None on
    a side that stays float), why. Rows are all layers with a tensor of parameters of two or more dimensions.
    Raises: as `convert`.
    """
    converted = _plan(model, weight_bases, activation_bases, filter_fn, settings)
    rows = Summary()
    for name, layer in model.named_modules():
        why, bases = converted.get(name) or (_why_not(layer), {})
        if why is None:
            continue
        if isinstance(layer, (_ABCLayer, PackedLayer)):
            M, N = _bases_of(layer)
        else:
            M, N = bases.get("weight_bases"), bases.get("activation_bases")
        sizes = [p.numel() for p in layer.parameters(False) if not nn.parameter.is_lazy(p)]
        rows.append({"layer": name, "kind": type(layer).__name__, "weight": " x ".join(map(str, _weight_shape(layer))),
                     "parameters": sum(sizes), "M": M, "N": N, "why": why})  # fmt: skip
    return rows


def _plan(model, weight_bases, activation_bases, filter_fn, settings) -> dict[str, tuple[str, dict]]:
    """{name: (why, bases)} of the layers that can be binarized; the bases of those that stay float are {}."""
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
            bases = {"weight_bases": weight_bases, "activation_bases": activation_bases, **own}
            decisions[name] = ("converted", bases)
            for side in ("weight_bases", "activation_bases"):
                if bases[side] is not None:
                    _check_bases(side, bases[side])
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
        return "binary already"
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


def _bases_of(layer: nn.Module) -> tuple[int | None, int | None]:
    """M and N of an ABC layer or a packed one; None on a side that is float."""
    if isinstance(layer, PackedLayer):
        return len(layer.bits), len(layer.betas) or None
    return (layer.weight_bases, layer.activation_bases) if layer.active else (None, None)


def convert(model, weight_bases=3, activation_bases=3, *, filter_fn=None, settings=None, **bases):
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
        **bases: us, vs, betas, active, per_channel, learn_us, for every converted layer.

    Returns: the converted copy.
    Raises: ValueError for settings of a layer that is not there or can't be converted, or that make no sense.
    """
    decisions = _plan(model, weight_bases, activation_bases, filter_fn, settings)
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    replaced = {
        modules[name]: _ABC_OF[type(modules[name])].from_float(modules[name], **{**bases, **own})
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

    _run_with_hooks(model, images, {m: (before, after) for m in layers} | {m: (before, None) for m in norms})
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
        choices = [True] if not compensate else [False, True][: layer.activation_bases]
        fits = [_fit_activations(values, layer.activation_bases, constant) for constant in choices]
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
            levels_GOL = _levels(target_GOK.reshape(W.shape), us.float(), per_channel)[0]
            levels_GOL = levels_GOL.expand(len(W), -1).reshape(*W_GOK.shape[:2], -1)
            for _ in range(2):
                rounded_GOK = torch.stack([_round_columns(*each) for each in zip(target_GOK, levels_GOL, H_GKK)])
                levels_GOL, refitted_GOK = _refit_levels(rounded_GOK, levels_GOL, target_GOK, H_GKK)
                candidates += [rounded_GOK, refitted_GOK]

        errors = []
        for candidate in candidates:
            Wq = candidate if us is None else quantize_weight(candidate.reshape(W.shape), us.float(), per_channel)
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
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(math.prod(shape), (min(count, math.prod(shape)),), generator=generator)
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


def _refit_levels(rounded: Tensor, levels: Tensor, target: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (G, O, L) and weights (G, O, K) nearest to the target in the metric H, each weight's bin as it is."""
    levels = levels.sort(-1).values
    bins = (rounded[..., None] - levels[:, :, None]).abs().argmin(-1)
    bases = torch.arange(levels.shape[-1] - 1, device=levels.device)
    B_GOMK = torch.where(bins[:, :, None] > bases[:, None], 1.0, -1.0)
    BH_GOMK = B_GOMK @ H[:, None]
    gram_GOMM, product_GOM1 = BH_GOMK @ B_GOMK.mT, BH_GOMK @ target[..., None]
    alphas_GOM1 = torch.linalg.pinv(gram_GOMM, rtol=1e-6, hermitian=True) @ product_GOM1  # bases may coincide
    signs_LM = torch.where(torch.arange(levels.shape[-1], device=levels.device)[:, None] > bases, 1.0, -1.0)
    return (signs_LM @ alphas_GOM1)[..., 0], (alphas_GOM1 * B_GOMK).sum(2)


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
    """What `summary` and `plan` return: a list of dicts, one a layer. Prints as a table, in Jupyter as an HTML one;
    `pandas.DataFrame(summary)` works."""

    def total(self) -> dict:
        """The sums of the countable columns."""
        countable = ("parameters", "bits", "float_bytes", "packed_bytes", "macs", "binary_macs")
        return {column: sum(row[column] for row in self) for column in countable if not self or column in self[0]}

    def _table(self) -> list[list[str]]:
        columns = list(self[0]) if self else ["layer"]
        rows = [*self, {"layer": "total", **self.total()}]
        return [columns, *([_format(row.get(column, "")) for column in columns] for row in rows)]

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table)]
        align = [str.ljust if name in _WORDS else str.rjust for name in table[0]]
        lines = ["  ".join(a(cell, w) for a, cell, w in zip(align, row, widths)).rstrip() for row in table]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body, total = self._table()
        left = [' style="text-align: left"' if name in _WORDS else "" for name in head]

        def row(cells, tag):
            cells = (f"<{tag}{style}>{html.escape(cell)}</{tag}>" for style, cell in zip(left, cells))
            return "<tr>" + "".join(cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in body)
        return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody><tfoot>{row(total, 'th')}</tfoot></table>"


_WORDS = ("layer", "kind", "why")  # columns of a Summary that read from the left


def _format(value) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


@torch.no_grad()
def summary(model: nn.Module, example_input: Tensor) -> Summary:
    """What each layer holds and does on an example input, as a table that prints well and becomes a pandas DataFrame.

    Columns: layer, kind, output (shape of its first tensor), M, N (None where that side is float), parameters, bits
    (stored by binarized weights once packed), float_bytes and packed_bytes (of parameters and buffers, before and after
    `pack`), macs (multiply-accumulates of the float layer), binary_macs (M * N times as many, where both sides are
    binary), engine (how a packed layer computes; with engine="auto", "float" says that M * N is beyond what bits can
    win).
    """
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
    M = N = None
    bits = macs = binary_macs = 0
    engine = ""
    if isinstance(layer, (_ABCLayer, PackedLayer, *_ABC_OF)):
        if isinstance(layer, PackedLayer):
            kernel, O, per_group = math.prod(layer.kernel_size), layer.out_channels, layer.channels // layer.groups
            M, N, engine = *_bases_of(layer), layer.engine
        else:
            O, per_group, *sizes = layer.weight.shape
            kernel = math.prod(sizes)
            if isinstance(layer, _ABCLayer) and layer.active:
                M, N = _bases_of(layer)
                engine = "" if M is None else _choose_engine("auto", M, N or 0)
        biases = 0 if layer.bias is None else O
        parameters = O * per_group * kernel + biases + 2 * (N or 0)
        float_bytes = 4 * (O * per_group * kernel + biases)
        places = math.prod(output.shape[:-2]) if output.dtype == torch.int64 else output.numel() // O
        macs = places * O * per_group * kernel
        binary_macs = macs * M * N if M and N else 0
        if M is None:
            packed_bytes = float_bytes
        else:
            bits = M * O * kernel * per_group
            packed_bytes = M * O * kernel * -(-per_group // 8) + 4 * (M * O + 2 * (N or 0) + biases)
    tensor = _first_tensor(output)
    shape = "" if tensor is None else " x ".join(map(str, tensor.shape))
    return {
        "layer": name, "kind": type(layer).__name__, "output": shape, "M": M, "N": N, "parameters": parameters,
        "bits": bits, "float_bytes": float_bytes, "packed_bytes": packed_bytes,
        "macs": macs, "binary_macs": binary_macs, "engine": engine,
    }  # fmt: skip


class Sensitivity(Summary):
    """What `sensitivity` returns: a list of dicts, one a layer and setting. Prints as a table, and has a picture."""

    def _table(self) -> list[list[str]]:
        columns = list(self[0]) if self else ["layer"]
        cells = [{**row, "error": f"{row['error']:.3g}"} for row in self]
        return [columns, *([_format(row[column]) for column in columns] for row in cells)]

    def picture(self):
        """A heat map of the errors, layers down, settings across; a matplotlib Figure (needs matplotlib)."""
        try:
            import matplotlib.pyplot as plt
            from matplotlib.colors import LogNorm
        except ImportError:
            raise ImportError("the picture of a sensitivity table needs matplotlib: pip install matplotlib") from None
        errors = {(row["layer"], row["M"], row["N"]): row["error"] for row in self if row["M"] or row["N"]}
        layers, settings = (list(dict.fromkeys(keys)) for keys in ([k[0] for k in errors], [k[1:] for k in errors]))
        # Logarithmic, since errors span decades; what is 0 takes the colour of the least that is not.
        least = min((error for error in errors.values() if error > 0), default=1e-6)
        norm = LogNorm(least, max(*errors.values(), 10 * least))
        values = [[errors.get((layer, *setting), math.nan) for setting in settings] for layer in layers]
        figure, axes = plt.subplots(figsize=(2.2 + 0.62 * len(settings), 1.3 + 0.3 * len(layers)), layout="constrained")
        image = axes.imshow([[max(value, least) for value in row] for row in values], cmap="cividis_r", norm=norm,
                            aspect="auto")  # fmt: skip
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    colour = "white" if norm(max(value, least)) > 0.5 else "black"
                    axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=8, color=colour)
        names = [", ".join("float" if count is None else str(count) for count in setting) for setting in settings]
        axes.set_xticks(range(len(settings)), names)
        axes.set_yticks(range(len(layers)), [layer or "(the model)" for layer in layers])
        axes.set(xlabel="M, N", ylabel="layer", title="Error, one layer binarized")
        axes.grid(False)
        figure.colorbar(image, label="error")
        plt.close(figure)  # it is shown where it is returned to, once
        return figure


_REST = "everything else"


@torch.no_grad()
def sensitivity(model, batches, choices=((1, 1), (2, 2), (3, 3), (5, 5)), *, filter_fn=None, progress=True, **bases):
    """Which layers hurt most when binarized: one layer and one choice of (M, N) at a time, without labels.

    In a copy of the model this layer alone is binarized and calibrated on one half of the images. On the other half
    the copy's output Y is compared with the float model's y: the part of the variance of y that Y does not explain,

        error = min_{a >= 0} sum (y - a Y)^2 / sum y^2,   y and Y less their means over the images,

    0 where the output only changes its scale and offset, which a decision does not see, and 1 where nothing is left of
    it. The errors of several layers all but add up, which is what `allocate` builds on. A little of it is due to the
    BatchNorm statistics behind the layer, estimated anew on few images: the same for all choices of one layer.

    Args:
        model: a float model, in which `convert` finds layers to binarize; it is not touched. Its output is a
            tensor with the images in dimension 0, or a tuple or dict whose first entry is one.
        batches: as in `calibrate`; a thousand images are plenty.
        choices: pairs (M, N); None in a pair leaves that side float, (None, None) the layer.
        filter_fn, **bases: as in `convert`.
        progress: show a bar, where tqdm is installed.

    Returns: a table, one dict a layer and choice: layer, M, N, error, packed_bytes (of the layer's tensors in the file
        that `save_packed` writes), binary_macs (M * N times the multiply-accumulates on one image, 0 where a side is
        float). Other layers that `convert` could binarize have one row, as they stay, M and N None; a last row is what
        the file holds besides, so that the packed_bytes of one row a layer add up to the whole model.
    Raises: ValueError where no layer is to be binarized, or for fewer than two images, or no or bad choices.
    """
    choices = list(dict.fromkeys(tuple(choice) for choice in choices))
    if not choices or any(len(choice) != 2 for choice in choices):
        raise ValueError(f"choices must be pairs of weight bases and activation bases (M, N), got {choices}")
    whole = convert(model, 1, 1, filter_fn=filter_fn)
    candidates = {name: layer for name, layer in model.named_modules() if type(layer) in _ABC_OF}
    chosen = [name for name in candidates if isinstance(whole.get_submodule(name), _ABCLayer)]
    if not chosen:
        raise ValueError(f"sensitivity found no layer to binarize: of the model's {sorted(candidates)}, convert takes "
                         "all but the first and the last unless filter_fn says otherwise")  # fmt: skip
    images = _gather(batches, candidates[chosen[0]].weight.device)
    if len(images) < 2:
        raise ValueError("sensitivity needs at least two images, one to calibrate on and one to measure on; got 1")
    fitted, measured = images[::2], images[1::2]
    wanted = _output(model, measured)
    macs = dict.fromkeys(candidates, 0)

    def counting(name):
        def after(module, inputs, output):
            macs[name] += _summary_row(name, module, output)["macs"]

        return after

    _run_with_hooks(model, images[:1], {layer: (None, counting(name)) for name, layer in candidates.items()})

    def row(name, layer, M=None, N=None, error=0.0):
        stored = _summary_row(name, layer, layer.weight.new_empty(0))["packed_bytes"]
        return {"layer": name, "M": M, "N": N, "error": error, "packed_bytes": stored,
                "binary_macs": macs[name] * M * N if M and N else 0}  # fmt: skip

    rows = Sensitivity()
    bar = _progress_bar(len(chosen) * len(choices), "sensitivity", "setting") if progress else None
    for name, layer in candidates.items():
        for M, N in choices if name in chosen else [(None, None)]:
            if M is None and N is None:
                rows.append(row(name, layer))
            else:
                setting = {name: {"weight_bases": M, "activation_bases": N}}
                copied = convert(model, filter_fn=lambda layer, name: False, settings=setting, **bases)
                calibrate(copied, fitted, progress=False)
                error = _unexplained(wanted, _output(copied, measured))
                rows.append(row(name, copied.get_submodule(name), M, N, error))
            if bar is not None and name in chosen:
                bar.update()
    if bar is not None:
        bar.close()
    others = [module for name, module in model.named_modules() if name not in candidates]
    held = sum(_summary_row("", module, images)["packed_bytes"] for module in others)
    return Sensitivity([*rows, {"layer": _REST, "M": None, "N": None, "error": 0.0, "packed_bytes": held,
                                "binary_macs": 0}])  # fmt: skip


def _output(model: nn.Module, images: Tensor) -> Tensor:
    """What a model puts out in eval mode; of several outputs the first."""
    outputs = []
    _run_with_hooks(model, images, {model: (None, lambda module, inputs, output: outputs.append(output))})
    output = _first_tensor(outputs[0])
    if output is None or output.shape[:1] != images.shape[:1]:
        kind = type(outputs[0])
        raise ValueError(f"sensitivity compares outputs that are tensors with an entry an image, got {kind}")
    return output


def _first_tensor(output) -> Tensor | None:
    """The first tensor of what a module puts out: a tensor, or tuples, lists and dicts of them, however nested."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((tensor for part in parts if (tensor := _first_tensor(part)) is not None), None)


def _unexplained(y: Tensor, Y: Tensor) -> float:
    """min_{a >= 0} |y - a Y|^2 / |y|^2 of outputs less their means over dimension 0: 1 - max(0, correlation)^2."""
    if torch.equal(y, Y):
        return 0.0
    y, Y = (x.double().reshape(len(x), -1) for x in (y, Y))
    y, Y = y - y.mean(0), Y - Y.mean(0)
    power = (y.square().sum() * Y.square().sum()).item()
    # Rounding could make the difference negative. Where one of both does not vary, nothing is explained.
    return max(0.0, 1 - (y * Y).sum().clamp(min=0).square().item() / power) if power != 0 else 1.0


def allocate(table, budget_bytes: int, budget_macs: int | None = None) -> dict[str, dict | None]:
    """The settings of least summed error within a budget, in the form that `convert` takes.

        minimize sum_l error[l, c_l]   over the choices c_l of the layers l
        subject to   sum_l packed_bytes[l, c_l] <= budget_bytes   and   sum_l binary_macs[l, c_l] <= budget_macs

    The solution is that of SciPy's integer programming, exact to a millionth of a budget. The budget in bytes is that
    of the whole packed model: all tensors in the file of `save_packed`, whose header adds some hundred bytes a layer.
    Bytes depend on M alone: without a budget of binary_macs, the time on one image, every layer gets the N of least
    error that there is.

        table = abcnets.sensitivity(model, images)
        binary = abcnets.convert(model, settings=abcnets.allocate(table, 100_000))
        abcnets.calibrate(binary, images)

    Args:
        table: what `sensitivity` returned, or those of its rows that may be chosen from.
        budget_bytes, budget_macs: what the rows chosen, one a layer, may add up to.

    Returns: {layer: {"weight_bases": M, "activation_bases": N}}, or {layer: None} for a layer that stays float.
    Raises: ValueError where nothing fits the budgets, saying the smallest that is possible, or for an empty table or
        an error that is not a number.
    """
    layers: dict[str, list[dict]] = {}
    for row in table:
        if not math.isfinite(row["error"]):
            raise ValueError(f"allocate can't weigh an error of {row['error']}, that of layer {row['layer']!r}")
        layers.setdefault(row["layer"], []).append(row)
    if not layers:
        raise ValueError("allocate needs a table of at least one layer, as sensitivity returns it")
    budgets = {"packed_bytes": budget_bytes}
    if budget_macs is not None:
        budgets["binary_macs"] = budget_macs
    for name, budget in budgets.items():
        smallest = sum(min(row[name] for row in rows) for rows in layers.values())
        if not budget >= smallest:
            raise ValueError(f"a budget of {budget:,} {name} is too small: the smallest possible is {smallest:,}")
    options = [[(row["error"], *(row[name] for name in budgets)) for row in rows] for rows in layers.values()]
    picks = _least_error(options, list(budgets.values()))
    if picks is None:
        raise ValueError(f"no choice of settings meets both budgets, {budget_bytes:,} bytes and {budget_macs:,} "
                         "binary macs, though each alone can be met")  # fmt: skip
    chosen = {name: rows[pick] for (name, rows), pick in zip(layers.items(), picks) if name != _REST}
    return {
        name: {"weight_bases": row["M"], "activation_bases": row["N"]} if row["M"] or row["N"] else None
        for name, row in chosen.items()
    }


def _least_error(options: list[list[tuple]], budgets: list[int]) -> list[int] | None:
    """The index of one option (error, cost, ...) a layer, of least summed error with costs within the budgets.

    An integer program: x_lc in {0, 1}, one of each layer's is 1. Costs are integers, errors scaled to the largest.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ImportError("allocate needs SciPy's solver of integer programs: pip install scipy") from None
    error, *costs = np.array([option for choices in options for option in choices], dtype=float).T
    of_layer = np.repeat(np.arange(len(options)), [len(choices) for choices in options])
    one_each = LinearConstraint(np.arange(len(options))[:, None] == of_layer, 1, 1)
    within = [LinearConstraint(cost[None] / max(budget, 1), ub=min(budget, 1)) for cost, budget in zip(costs, budgets)]
    solution = milp(error / (error.max() or 1), integrality=np.ones(len(error)), bounds=Bounds(0, 1),
                    constraints=[one_each, *within], options={"mip_rel_gap": 0})  # fmt: skip
    if solution.x is None:
        return None
    return [int(solution.x[of_layer == layer].argmax()) for layer in range(len(options))]


# ---------------------------------------------------------------------------------------------------------------------
# A picture of a layer
# ---------------------------------------------------------------------------------------------------------------------

_BLUE, _PALE, _RED, _DARK, _GREY = "#0072B2", "#B8D4E8", "#D55E00", "#333333", "#BBBBBB"  # Okabe and Ito's, and greys


@torch.no_grad()
def picture(layer: nn.Module, input: Tensor | None = None):
    """What a layer does, as a matplotlib Figure: `picture(model[3], R)` in a cell of a notebook shows it.

    - Its weights, each channel in standard deviations from its mean; where they are cut into bins (at -u_m, dashed) and
      the M + 1 levels of Wq (dots: the channels' mean, bars: from the 10th to the 90th percentile of the channels).
    - A few kernels W, their bases B_1..B_M with the scales alpha_m, and their sum Wq. Kernels of one tap and linear
      layers are shown as a corner of the matrix outputs x inputs, 1-D kernels as inputs x taps, 3-D ones by slices.
    - The staircase of its activations, Aq against R, with the thresholds 1/2 - v_n (dashed), over the histogram of the
      input if one is given.

    A side that stays float is left out. A packed layer has no W, and none of the first panel.

    Args:
        layer: an ABC layer, active or not, or a `PackedLayer`.
        input: values that reach the layer, of any shape.

    Returns: the Figure; `.savefig(path)` writes it.
    Raises: TypeError for another module, ValueError for a layer with both sides float, ImportError without matplotlib.
    """
    if not isinstance(layer, (_ABCLayer, PackedLayer)):
        raise TypeError(f"picture takes one ABC layer or packed layer, got {type(layer).__name__}; "
                        "a layer of a model is model.get_submodule(name)")  # fmt: skip
    packed = isinstance(layer, PackedLayer)
    thresholds = layer.thresholds if packed else None if layer.vs is None else _thresholds(layer.vs)
    has_weights, has_activations = packed or layer.us is not None, thresholds is not None and len(thresholds) > 0
    if not has_weights and not has_activations:
        raise ValueError("picture has nothing to show: both sides of this layer are float")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("picture needs matplotlib: pip install matplotlib") from None

    tiles = _tiles(layer) if has_weights else [[]]
    widths = [3.4] * (has_weights and not packed) + [0.85 * len(tiles[0]) + 0.2] * has_weights + [3.8] * has_activations
    look = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
            "axes.spines.right": False, "axes.grid": False, "legend.frameon": False}  # fmt: skip
    with plt.rc_context(look):
        figure, axes = plt.subplots(1, len(widths), figsize=(sum(widths), 2.9), width_ratios=widths,
                                    squeeze=False, layout="constrained")  # fmt: skip
        axes = list(axes[0])
        if has_weights and not packed:
            _draw_weights(axes.pop(0), layer)
        if has_weights:
            _draw_tiles(axes.pop(0), tiles)
        if has_activations:
            _draw_staircase(axes.pop(0), thresholds.cpu(), layer.betas.cpu(), input)
        plt.close(figure)  # a notebook shows what is returned, once
    return figure


def _draw_weights(axis, layer: _ABCLayer) -> None:
    W, us = _grouped(layer.weight, layer.per_channel).cpu(), layer.us.float().cpu()
    std = W.std(1, keepdim=True) if W.shape[1] > 1 else torch.zeros_like(W)
    z = (W - W.mean(1, keepdim=True)) / std.clamp(min=torch.finfo(W.dtype).tiny)
    levels = (_levels(W, us, True)[0] - W.mean(1, keepdim=True)) / std.clamp(min=torch.finfo(W.dtype).tiny)
    reach = min(4.0, z.abs().max().item()) or 1.0
    axis.hist(z.flatten().double().numpy(), bins=60, range=(-reach, reach), color=_PALE)
    for u in us.tolist():
        axis.axvline(-u, color=_DARK, linestyle="--", linewidth=1)
    low, high = (levels.quantile(q, dim=0).tolist() for q in (0.1, 0.9))
    height = -0.06 * axis.get_ylim()[1]
    axis.hlines([height] * len(low), low, high, color=_RED, linewidth=3, alpha=0.4)
    axis.plot(levels.mean(0).tolist(), [height] * len(low), "o", color=_RED, markersize=6)
    axis.set_ylim(bottom=2 * height)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_title(f"{W.numel():,} weights, {len(low)} levels")
    axis.set_xlabel("$W$, in deviations from the mean" + (" of its channel" if layer.per_channel else ""))


def _tiles(layer: nn.Module, count: int = 3) -> list[list[tuple[Tensor, str, str]]]:
    """Rows of (2-D image in [-1, 1], name, scale): of a few kernels W, B_1..B_M, Wq."""
    if isinstance(layer, PackedLayer):
        B = _unpack_bits(layer.bits, layer.channels // layer.groups).float().mul(2).sub(1).movedim(-1, 2)
        alphas, W = layer.alphas, None
        Wq = torch.einsum("mo,mo...->o...", alphas, B)
    else:
        W, us = layer.weight.float(), layer.us.float()
        B, Wq = weight_bases(W, us, layer.per_channel), quantize_weight(W, us, layer.per_channel)
        alphas = fit_weight(W, us, layer.per_channel).expand(-1, len(W))
    shown = Wq if W is None else W
    dims = [size for size in shown.shape[2:] if size > 1]
    if not dims:  # a matrix
        rows, scaled = [(slice(12), slice(12))], False
    elif shown.ndim == 3:  # inputs x taps
        rows, scaled = [(o, slice(8)) for o in shown.flatten(1).norm(dim=1).topk(min(2, len(shown))).indices], True
    else:  # of the channels with the largest weights, the largest kernel
        norms, inputs = shown.flatten(2).norm(dim=2).max(1)
        rows, scaled = [(o, inputs[o]) for o in norms.topk(min(count, len(norms))).indices], True

    def image(x):
        x = x.reshape(len(x), -1) if not dims else x
        if x.ndim == 3:  # slices side by side, NaN between them
            x = torch.cat([F.pad(piece, (0, 1), value=math.nan) for piece in x], 1)[:, :-1]
        return x.cpu()

    tiles = []
    for row in rows:
        largest = max(x[row].abs().max().item() for x in (shown, Wq)) or 1.0
        scales = [f"{alpha:.2g}" for alpha in alphas[:, row[0]].tolist()] if scaled else [""] * len(B)
        tiles.append([
            *([(image(W[row]) / largest, "$W$", "")] if W is not None else []),
            *((image(base[row]), f"$B_{m + 1}$", f"× {scale}" if scaled else "")
              for m, (base, scale) in enumerate(zip(B, scales))),
            (image(Wq[row]) / largest, "$W_q$", ""),
        ])  # fmt: skip
    return tiles


def _draw_tiles(axis, tiles) -> None:
    """Each image into a cell of its own; black is negative, white is positive."""
    from matplotlib import colormaps

    grey, step = colormaps["gray"].with_extremes(bad=_PALE), 1.25  # of a row, in cell widths: room for the scales
    for y, row in enumerate(tiles):
        for x, (values, name, scale) in enumerate(row):
            height, width = values.shape
            half_width, half_height = 0.44 * width / max(height, width), 0.44 * height / max(height, width)
            left, right, top, bottom = x - half_width, x + half_width, step * y - half_height, step * y + half_height
            axis.imshow(values.numpy(), cmap=grey, vmin=-1, vmax=1, extent=(left, right, bottom, top))
            axis.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], "-", color=_GREY, lw=0.8)
            if y == 0:
                axis.text(x, top - 0.08, name, ha="center", va="bottom", fontsize=10)
            axis.text(x, bottom + 0.03, scale, ha="center", va="top", fontsize=7, color=_RED)
    axis.set_xlim(-0.5, len(tiles[0]) - 0.5)
    axis.set_ylim(step * (len(tiles) - 1) + 0.75, -0.8)
    axis.set_aspect("equal")
    axis.axis("off")


def _draw_staircase(axis, thresholds: Tensor, betas: Tensor, input: Tensor | None) -> None:
    low, high = thresholds.min().item(), thresholds.max().item()
    low, high = min(low, 0.0) - 0.5, high + max(0.5, 0.6 * (high - low))
    if input is not None:
        values = input.detach().flatten()
        values = values[:: max(1, len(values) // 1_000_000)].double().cpu()
        low, high = min(low + 0.3, values.quantile(0.001).item()), max(high - 0.3, values.quantile(0.995).item())
        behind = axis.twinx()
        counts, _, _ = behind.hist(values.numpy(), bins=60, range=(low, high), color=_PALE)
        # The pile of a rectified input at 0 is cut off where it would flatten all the rest.
        behind.set_ylim(0, max(1, min(1.1 * max(counts), 2 * sorted(counts)[-2])))
        behind.set_yticks([])
        behind.spines[:].set_visible(False)
        behind.set_zorder(-1)
        axis.patch.set_visible(False)
    R = torch.cat([torch.linspace(low, high, 400), thresholds.float()]).sort().values
    Aq = _staircase(R, thresholds.float(), betas.float())
    axis.plot(R.tolist(), R.tolist(), color=_GREY, linestyle="-", linewidth=1.2, label="$R$")
    axis.step(R.tolist(), Aq.tolist(), where="post", color=_BLUE, linestyle="-", label="$A_q$")
    for t in thresholds.tolist():
        axis.axvline(t, color=_DARK, linestyle="--", linewidth=1)
    room = 0.15 * (Aq.max() - Aq.min()).abs().item() + 0.1
    axis.set_xlim(low, high)
    axis.set_ylim(Aq.min().item() - room, Aq.max().item() + room)
    axis.set_title("activations" + (", over what reaches the layer" if input is not None else ""))
    axis.set_xlabel("$R$")
    axis.legend(loc="lower right")


# ---------------------------------------------------------------------------------------------------------------------
# Packed inference: bits and the operators on them
# ---------------------------------------------------------------------------------------------------------------------
#
# Weights are stored as uint8 (M, O, *K, ceil(C / 8)): bit c % 8 of byte c // 8 is 1 where B_m = +1 at channel c of the
# group, spare bits are 0. That is the file format, whatever machine wrote it.
#
# Activations travel between layers as int64 words (B, *S, P, N), P = ceil(C / 64): bit c % 64 of word c // 64 is 1
# where A_n = +1 at channel c, spare bits are 0.
#
# The two operators below have a plain torch implementation, which unpacks and runs a float convolution: right
# everywhere, fast nowhere. Engines override them for a device (`import kernels`), on the same tensors.


def _pack_bits(flags: Tensor, dtype: torch.dtype) -> Tensor:
    """Booleans (..., C) -> integers (..., ceil(C / width)) of that width, the first flag in the lowest bit."""
    width = 8 * dtype.itemsize
    spare = -flags.shape[-1] % width
    groups = F.pad(flags, (0, spare)).unflatten(-1, (-1, width))
    shifts = torch.arange(width, device=flags.device)
    return (groups.to(torch.int64) << shifts).sum(-1).to(dtype)


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of `_pack_bits`: booleans (..., count)."""
    shifts = torch.arange(8 * packed.dtype.itemsize, device=packed.device)
    masks = torch.bitwise_left_shift(torch.ones_like(shifts), shifts).to(packed.dtype)
    return (packed[..., None] & masks).flatten(-2)[..., :count].bool()


def _unpack_weight(bits: Tensor, alphas: Tensor, channels: int) -> Tensor:
    """Wq (O, C, *K) from its bits (M, O, *K, bytes) and alphas (M, O)."""
    signs = 2 * _unpack_bits(bits, channels).to(alphas.dtype) - 1
    Wq = torch.einsum("mo,mo...->o...", alphas, signs)
    return Wq.movedim(-1, 1).contiguous()


_CONVOLUTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def _packed_conv_reference(
    x: Tensor, bits: Tensor, alphas: Tensor, betas: Tensor, thresholds: Tensor, flips: Tensor, bias: Tensor | None,
    channels: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    out_thresholds: Tensor | None, out_flips: Tensor | None,
) -> Tensor:  # fmt: skip
    """abcnets::packed_conv: y = bias + sum_m sum_n alphas[m] betas[n] conv(A_n, B_m), thresholded to bits if asked.

    Shape:
        x: (B, C, *S) floating point, with A_n = +1 where (x >= thresholds[n, c]) != flips[c]; or words (B, *S, P, N).
            S is empty for a linear layer.
        bits (M, O, *K, ceil(C / groups / 8)) uint8; alphas (M, O); betas (N,); thresholds (N, C); flips (C,) bool;
        bias (O,) or None. N = 0: x enters as it is.
        padding: (low, high) per spatial dimension; padded taps are 0, neither +1 nor -1.
        returns (B, O, *S') in x's dtype (float32 for words), contiguous whatever the order of x; or, given
        out_thresholds (N', O) and out_flips (O,), words (B, *S', ceil(O / 64), N') with bit
        (y >= out_thresholds[n]) != out_flips.

    A NaN in x gives NaN where the float simulation has it. Bits cannot be NaN: then it raises ValueError.
    """
    result = x.dtype if x.is_floating_point() else torch.float32
    if x.dtype == torch.int64:
        x = _unpack_words(x, channels)
    y = _packed_sums(x, bits, alphas, betas, thresholds, flips, bias, channels, stride, padding, dilation, groups)
    if out_thresholds is None:
        return y.to(result).contiguous()
    if y.isnan().any():
        raise ValueError("packed_conv was asked for bits, which can't say NaN, but its input or bias holds a NaN")
    return _pack_words(_compared(y, out_thresholds, out_flips))


# Flags (N, B, *S, C) are what words (B, *S, P, N) hold, as booleans.


def _pack_words(flags: Tensor) -> Tensor:
    return _pack_bits(flags, torch.int64).movedim(0, -1).contiguous()


def _unpack_words(words: Tensor, channels: int) -> Tensor:
    return _unpack_bits(words.movedim(-1, 0), channels)


def _compared(y: Tensor, thresholds: Tensor, flips: Tensor) -> Tensor:
    """Flags (N, B, *S, C) of floats y (B, C, *S)."""
    return (y.movedim(1, -1)[None] >= thresholds.view(-1, *[1] * (y.ndim - 1), y.shape[1])) ^ flips


def _packed_sums(x, bits, alphas, betas, thresholds, flips, bias, channels, stride, padding, dilation, groups):
    """y (B, O, *S') of `packed_conv`, in float32 or wider, for x in floats (B, C, *S) or flags."""
    dims = bits.ndim - 3
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype == torch.bool:
        Aq = torch.einsum("n,n...->...", betas.to(compute), 2 * x.to(compute) - 1).movedim(-1, 1)
    else:
        Aq = x = x.to(compute)
        if len(betas):
            per_channel = (-1, *[1] * dims)
            Aq = sum(
                beta * torch.where((x >= t.view(per_channel)) ^ flips.view(per_channel), 1.0, -1.0).to(compute)
                for beta, t in zip(betas.to(compute), thresholds)
            )
            Aq = torch.where(x.isnan(), x, Aq)
    Wq = _unpack_weight(bits, alphas.to(compute), channels // groups)
    bias = None if bias is None else bias.to(compute)
    if dims == 0:
        return F.linear(Aq, Wq, bias)
    return _CONVOLUTIONS[dims](F.pad(Aq, _for_pad(padding)), Wq, bias, stride, 0, dilation, groups)


def _packed_max_pool_reference(
    words: Tensor, flips: Tensor, channels: int,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool,
) -> Tensor:  # fmt: skip
    """abcnets::packed_max_pool: words (B, *S, P, N) of a thresholded tensor -> those of the max-pooled tensor.

    Pooling commutes with a threshold: max(z) >= t where any z is. So words XOR flips, which says z >= t, is pooled by
    OR, and padding is 0. Sizes are one int per spatial dimension (padding too, the same on both sides).
    """
    flags = _unpack_words(words, channels)
    return _pack_words(_pooled(flags, flips, kernel_size, stride, padding, dilation, ceil_mode))


def _pooled(flags: Tensor, flips: Tensor, kernel_size, stride, padding, dilation, ceil_mode) -> Tensor:
    """Flags (N, B, *S', C) of the max-pooled tensor from flags (N, B, *S, C)."""
    raw = flags ^ flips
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel_size) - 1]
    pooled = pool(raw.flatten(0, 1).movedim(-1, 1).float(), kernel_size, stride, padding, dilation, ceil_mode)
    return pooled.movedim(1, -1).unflatten(0, raw.shape[:2]).bool() ^ flips


def _pairs(padding) -> list[tuple[int, int]]:
    return list(zip(padding[::2], padding[1::2]))


def _for_pad(padding) -> list[int]:
    """What F.pad takes: the last dimension first."""
    return [p for pair in reversed(_pairs(padding)) for p in pair]


def _packed_conv_fake(
    x, bits, alphas, betas, thresholds, flips, bias, channels, stride, padding, dilation, groups,
    out_thresholds, out_flips,
):  # fmt: skip
    from_words = x.dtype == torch.int64
    B, *sizes = x.shape[:-2] if from_words else (x.shape[0], *x.shape[2:])
    O, *kernel = bits.shape[1:-1]
    out = [
        (size + low + high - d * (k - 1) - 1) // s + 1
        for size, (low, high), k, s, d in zip(sizes, _pairs(padding), kernel, stride, dilation)
    ]
    if out_thresholds is not None:
        return x.new_empty((B, *out, -(-O // 64), len(out_thresholds)), dtype=torch.int64)
    return x.new_empty((B, O, *out), dtype=torch.float32 if from_words else x.dtype)


def _packed_max_pool_fake(words, flips, channels, kernel_size, stride, padding, dilation, ceil_mode):
    B, *sizes, P, N = words.shape
    out = []
    for size, k, s, p, d in zip(sizes, kernel_size, stride, padding, dilation):
        room = size + 2 * p - d * (k - 1) - 1
        count = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (count - 1) * s >= size + p:  # torch drops a window that starts beyond the input
            count -= 1
        out.append(count)
    return words.new_empty((B, *out, P, N))


_library = torch.library.Library("abcnets", "FRAGMENT")

for _name, _schema, _reference, _fake in (
    (
        "packed_conv",
        "(Tensor x, Tensor bits, Tensor alphas, Tensor betas, Tensor thresholds, Tensor flips, Tensor? bias, "
        "int channels, int[] stride, int[] padding, int[] dilation, int groups, "
        "Tensor? out_thresholds, Tensor? out_flips) -> Tensor",
        _packed_conv_reference,
        _packed_conv_fake,
    ),
    (
        "packed_max_pool",
        "(Tensor words, Tensor flips, int channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
        "bool ceil_mode) -> Tensor",
        _packed_max_pool_reference,
        _packed_max_pool_fake,
    ),
):
    if not hasattr(torch.ops.abcnets, _name):  # a second copy of this file in one process shares the first one's
        _library.define(_name + _schema)
        _library.impl(_name, _reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"abcnets::{_name}", _fake, lib=_library)


# ---------------------------------------------------------------------------------------------------------------------
# Packed inference: layers and models
# ---------------------------------------------------------------------------------------------------------------------

# On CPUs with a vector popcount bits beat oneDNN's float32 up to about this many binary convolutions a layer.
_BITS_PAY_UP_TO = 16


class PackedLayer(nn.Module):
    """The inference form of an ABC layer, convolution or linear: bits, scales and thresholds. Made by `pack`.

    Attributes (all of its state dict):
        bits: (M, O, *K, ceil(C / groups / 8)) uint8, the weight bases.
        alphas (M, O), bias (O,) or None: float32.
        thresholds (N,), betas (N,): float32, A_n = +1 where input >= thresholds[n]; empty where the input stays float.

    `engine` is "bits", which runs M x N binary convolutions through the operator abcnets::packed_conv, or "float",
    which runs one float convolution with the weights unpacked (and kept, outside the state dict).

    Shape: as the ABC layer's. Inference only: no gradient passes. A NaN behaves as in the ABC layer.
    """

    def __init__(self, layer: nn.Module, M: int, N: int, engine: str):
        """An empty layer with the geometry of `layer`, a stock or ABC one, to be filled from a state dict."""
        super().__init__()
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
        device = layer.weight.device
        bits_shape = (M, self.out_channels, *kernel, -(-per_group // 8))
        self.register_buffer("bits", torch.zeros(bits_shape, dtype=torch.uint8, device=device))
        self.register_buffer("alphas", torch.zeros(M, self.out_channels, device=device))
        self.register_buffer("thresholds", torch.zeros(N, device=device))
        self.register_buffer("betas", torch.zeros(N, device=device))
        self.register_buffer("bias", None if layer.bias is None else torch.zeros(self.out_channels, device=device))
        # What the operator takes: thresholds and directions for each channel, coming in and (for `fuse`) going out.
        self.register_buffer("in_thresholds", torch.zeros(N, self.channels, device=device), persistent=False)
        self.register_buffer("in_flips", torch.zeros(self.channels, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("out_thresholds", None, persistent=False)
        self.register_buffer("out_flips", None, persistent=False)
        self._Wq = None

    @classmethod
    def from_layer(cls, layer: _ABCLayer, engine: str):
        M, N = layer.weight_bases, layer.activation_bases or 0
        packed = cls(layer, M, N, _choose_engine(engine, M, N))
        with torch.no_grad():
            weight = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))
            us = layer.us.to(weight.dtype)
            flags = weight_bases(weight, us, layer.per_channel) > 0
            packed.bits.copy_(_pack_bits(flags.movedim(2, -1), torch.uint8))
            packed.alphas.copy_(fit_weight(weight, us, layer.per_channel).expand_as(packed.alphas))
            if N:
                packed.thresholds.copy_(_thresholds(layer.vs))
                packed.betas.copy_(layer.betas)
            if layer.bias is not None:
                packed.bias.copy_(layer.bias)
        packed._refresh()
        return packed.eval()

    def _refresh(self):
        self._Wq = None
        self.in_thresholds.copy_(self.thresholds[:, None].expand_as(self.in_thresholds))

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self._refresh()

    def _apply(self, fn, recurse=True):
        self._Wq = None
        # Flat, since a memory format means nothing to bits: (M, O, kH, kW, bytes) is no 5-dimensional image.
        return super()._apply(lambda tensor: fn(tensor.reshape(-1)).view(tensor.shape), recurse)

    def forward(self, input: Tensor) -> Tensor:
        words = input.dtype == torch.int64
        if not words and not input.is_floating_point():
            raise TypeError(f"a packed layer takes floating-point input, or another one's words, got {input.dtype}")
        if not words:
            self._check_shape(input)
        if words or input.ndim == self.spatial_dims + 2:
            return self._convolve(input)
        if self.spatial_dims == 0:  # any number of leading dimensions
            return self._convolve(input.reshape(-1, self.channels)).reshape(*input.shape[:-1], self.out_channels)
        return self._convolve(input[None])[0]

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
        if self.engine == "float":
            return self._float_convolve(x, padding)
        return torch.ops.abcnets.packed_conv(
            x, self.bits, self.alphas, self.betas, self.in_thresholds, self.in_flips, self.bias, self.channels,
            self.stride, padding, self.dilation, self.groups, self.out_thresholds, self.out_flips,
        )  # fmt: skip

    def _float_convolve(self, x: Tensor, padding) -> Tensor:
        if torch.compiler.is_exporting():  # what is exported holds the bits, not what they unpack to
            Wq = _unpack_weight(self.bits, self.alphas, self.channels // self.groups)
        else:
            if self._Wq is None:
                self._Wq = _unpack_weight(self.bits, self.alphas, self.channels // self.groups)
            Wq = self._Wq
        Aq = _staircase(x, self.thresholds, self.betas) if len(self.betas) else x
        Wq, bias = Wq.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if self.spatial_dims == 0:
            return F.linear(Aq, Wq, bias)
        symmetric = padding[::2]
        if symmetric != padding[1::2]:
            Aq, symmetric = F.pad(Aq, _for_pad(padding)), 0
        return _CONVOLUTIONS[self.spatial_dims](Aq, Wq, bias, self.stride, symmetric, self.dilation, self.groups)

    def extra_repr(self) -> str:
        size = f"{self.channels}, {self.out_channels}"
        if self.spatial_dims:
            size += f", kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        if self.groups != 1:
            size += f", groups={self.groups}"
        bases = f"weight_bases={len(self.bits)}, activation_bases={len(self.betas) or None}"
        return f"{size}, {bases}, engine={self.engine!r}"


def _padding_pairs(layer: nn.Module) -> tuple[int, ...]:
    """(low, high) per spatial dimension, flat, from torch's three ways to say padding."""
    padding = getattr(layer, "padding", ())
    if padding == "valid":
        padding = (0,) * len(layer.kernel_size)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        return tuple(p for total in totals for p in (total // 2, total - total // 2))
    return tuple(p for side in padding for p in (side, side))


def _choose_engine(engine: str, M: int, N: int) -> str:
    if engine not in ("auto", "bits", "float"):
        raise ValueError(f"engine must be 'auto', 'bits' or 'float', got {engine!r}")
    if engine == "auto":
        return "bits" if 0 < M * N <= _BITS_PAY_UP_TO else "float"
    return engine


def pack(model: nn.Module, *, engine: str = "auto") -> nn.Module:
    """An inference copy in which every active ABC layer is a `PackedLayer`, with 1 bit a weight and base.

    It puts out what the model does in eval mode, to rounding. The model itself is untouched. With stock torch the
    packed layers are right but slow; `import kernels` (this project's CPU and CUDA engines) makes them fast.

    Args:
        model: a model with ABC layers, or one such layer. Inactive ones and those with float weights stay as they are.
        engine: how the packed layers compute: "bits", "float" (see `PackedLayer`), or "auto": bits where M * N is at
            most 16, beyond which one float convolution is faster, and float where the activations are.

    Raises: ValueError where the model has no layer to pack, or for another engine.
    """
    _choose_engine(engine, 1, 1)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    layers = [m for m in model.modules() if isinstance(m, _ABCLayer) and m.active and m.us is not None]
    if not layers:
        raise ValueError("pack needs at least one active ABC layer with weight_bases: convert or binarize first")
    return _replace(model, {layer: PackedLayer.from_layer(layer, engine) for layer in layers})


_FORMAT_VERSION = 1


def save_packed(model: nn.Module, path) -> None:
    """Write a packed model to one safetensors file (needs the `safetensors` package); replaces the file atomically.

    The file holds the state dict, and in its metadata {"format": "abcnets", "version", "sha256", "layers"}: for each
    packed layer M, N, engine and geometry, for each ABC layer left as it is its bases, as JSON.

    Args:
        model: what `pack` returned (not `fuse`: a fused model is made anew from a packed one after loading).
        path: the file to write.

    Raises: ValueError where the model has no packed layer.
    """
    import safetensors.torch

    layers = {name: _describe(m) for name, m in model.named_modules() if isinstance(m, (PackedLayer, _ABCLayer))}
    if not any(layer["kind"] == "packed" for layer in layers.values()):
        raise ValueError("save_packed writes what pack() returned, but this model has no packed layer")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {
        "format": "abcnets",
        "version": str(_FORMAT_VERSION),
        "sha256": _digest(tensors),
        "layers": json.dumps(layers, sort_keys=True),
    }
    temporary = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
        safetensors.torch.save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_packed(path, skeleton: nn.Module) -> nn.Module:
    """Rebuild a packed model from a file of `save_packed`, around a copy of the float network it was made from.

    No pickle is read. Everything is checked before anything is built, and the skeleton is never touched.

    Args:
        path: the file.
        skeleton: a network of the same architecture, float or converted; its weights do not matter.

    Returns: the packed model, in eval mode, on the CPU.
    Raises: FileNotFoundError; ValueError, saying what is wrong, for a file that is truncated, tampered with, not one of
        ours or of a later version, or that does not fit the skeleton.
    """
    import safetensors

    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no packed model at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    layers = _check_metadata(path, metadata, tensors)
    model = copy.deepcopy(skeleton).cpu().eval().requires_grad_(False)
    modules = dict(model.named_modules())
    replaced = {}
    for name, description in layers.items():
        if type(modules.get(name)) not in (*_ABC_OF, *_ABC_OF.values()):
            raise ValueError(f"{path} has a binarized layer {name!r}, where the skeleton has no layer to binarize")
        replaced[modules[name]] = _rebuild(modules[name], description)
        if _describe(replaced[modules[name]]) != description:
            raise ValueError(f"{path} was made from another network: its layer {name!r} is {description}, "
                             f"the skeleton's would be {_describe(replaced[modules[name]])}")  # fmt: skip
    model = _replace(model, replaced)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the skeleton: {error}") from None
    return model


def _describe(layer: nn.Module) -> dict:
    if isinstance(layer, _ABCLayer):
        bases = {"weight_bases": layer.weight_bases, "activation_bases": layer.activation_bases}
        return {"kind": "abc", **bases, "per_channel": layer.per_channel}
    names = ("channels", "out_channels", "groups", "padding_mode", "engine")
    lists = ("kernel_size", "stride", "padding", "dilation")
    return {
        "kind": "packed", "M": len(layer.bits), "N": len(layer.betas),
        **{name: getattr(layer, name) for name in names}, **{name: list(getattr(layer, name)) for name in lists},
    }  # fmt: skip


def _rebuild(layer: nn.Module, description: dict) -> nn.Module:
    try:
        if description["kind"] == "packed":
            return PackedLayer(layer, description["M"], description["N"], description["engine"]).eval()
        bases = {key: value for key, value in description.items() if key != "kind"}
        stock = layer._stock if isinstance(layer, _ABCLayer) else type(layer)
        return _ABC_OF[stock].from_float(layer, **bases).eval()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a layer description in the file makes no sense: {description} ({error})") from None


def _check_metadata(path, metadata: dict, tensors: dict) -> dict:
    """The layer descriptions, once the file is known to be ours, of a version we read, and as it was written."""
    if metadata.get("format") != "abcnets":
        raise ValueError(f"{path} is a safetensors file, but no packed model: its format is {metadata.get('format')!r}")
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) != _FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}; this abcnets reads version {_FORMAT_VERSION}")
    if metadata.get("sha256") != _digest(tensors):
        raise ValueError(f"{path} was changed after it was written: its checksum does not match its contents")
    try:
        layers = json.loads(metadata["layers"])
        assert isinstance(layers, dict) and all(isinstance(layer, dict) for layer in layers.values())
    except (KeyError, ValueError, AssertionError):
        raise ValueError(f"{path} lacks a readable description of its layers") from None
    return layers


def _digest(tensors: dict[str, Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)};".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Packed inference: bits from layer to layer
# ---------------------------------------------------------------------------------------------------------------------


def fuse(model: nn.Module) -> "torch.fx.GraphModule":
    """Keep bits between the layers of a packed model: BatchNorm, ReLU and max-pool become thresholds and ORs.

    Between two packed layers, whatever is elementwise and monotone in each channel (BatchNorm, ReLU and its kin, the
    identity of Dropout) is followed by a comparison with the next layer's thresholds, so it only moves these: each
    channel of the earlier layer's output is compared once a base, with a constant that folds all of it in, and max-pool
    commutes with the comparison. No float tensor is written on the way. Behind any other producer (the first, float
    convolution; a residual sum) the same modules fold into the packed layer's own thresholds, if nobody else uses them.
    A BatchNorm whose result is needed in float folds into the scales and bias of the convolution in front of it.

    The folded thresholds are found by bisection over the floats with the very modules they replace, so that they decide
    as those do, to the last bit.

    Args:
        model: what `pack` or `load_packed` returned; it is not touched.

    Returns: a torch.fx.GraphModule with the same outputs, to rounding. NaN in the input raises ValueError where it
        would have to become bits.
    Raises: ValueError where the model can't be traced by torch.fx.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = _PackedTracer().trace(model)
    except Exception as error:
        raise ValueError(f"fuse traces the model with torch.fx, which failed: {error}") from error
    fused = torch.fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        layer = _module_of(fused, node)
        if isinstance(layer, PackedLayer) and _reads_bits(layer):
            _fuse_input(fused, node, layer)
    for node in list(graph.nodes):
        if type(_module_of(fused, node)) in _BATCH_NORMS:
            _fold_norm(fused, node)
    graph.eliminate_dead_code()
    fused.delete_all_unused_submodules()
    fused.recompile()
    return fused


class _PackedTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, (PackedLayer, _ABCLayer)) or super().is_leaf_module(module, name)


def _reads_bits(layer: PackedLayer) -> bool:
    return layer.engine == "bits" and len(layer.betas) > 0 and layer.padding_mode == "zeros" and layer.groups == 1


def _fuse_input(fused, node, layer: PackedLayer) -> None:
    """Fold what lies between a packed layer and its producer into thresholds: the producer's, or else its own."""
    chain, producer = _monotone_chain(fused, node)
    producing = _module_of(fused, producer)
    pools = [i for i, link in enumerate(chain) if _pool_of(fused, link)]
    if isinstance(producing, PackedLayer) and producing.engine == "bits" and len(producer.users) == 1:
        functions = [_function_of(fused, link) for link in chain]
        producing.out_thresholds, producing.out_flips = _fold(functions, layer)
        source = producer
        for i in pools:
            after = _fold(functions[i + 1 :], layer)[1]  # the direction of what follows the pool
            source = _insert_pool(fused, chain[i], source, after, layer.channels)
    else:
        rest = chain[pools[-1] + 1 :] if pools else chain
        layer.in_thresholds, layer.in_flips = _fold([_function_of(fused, link) for link in rest], layer)
        source = chain[pools[-1]] if pools else producer
    node.replace_input_with(node.args[0], source)


def _fold_norm(fused, node) -> None:
    """Fold a BatchNorm whose float output is wanted into the convolution that feeds it alone, packed or stock."""
    norm, producer = _module_of(fused, node), node.args[0]
    layer = _module_of(fused, producer)
    if len(producer.users) > 1 or not norm.track_running_stats:
        return
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        fused.set_submodule(producer.target, torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm))
    elif isinstance(layer, PackedLayer) and layer.engine == "bits" and layer.spatial_dims > 0:
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
        layer.alphas = layer.alphas * scale
        layer.bias = shift if layer.bias is None else layer.bias * scale + shift
    else:
        return
    node.replace_all_uses_with(producer)


def _monotone_chain(fused, node) -> tuple[list, "torch.fx.Node"]:
    """The single-use links in front of a node that only move its thresholds, first to last, and what feeds them."""
    chain = []
    link = node.args[0]
    while len(link.users) == 1 and (_function_of(fused, link) or _pool_of(fused, link)):
        chain.insert(0, link)
        link = link.args[0]
    return chain, link


def _module_of(fused, node):
    return fused.get_submodule(node.target) if node.op == "call_module" else None


# Non-decreasing, elementwise. BatchNorm is monotone in each channel, in either direction.
_MONOTONE_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}


def _function_of(fused, node):
    """What a graph node does to a tensor with channels in dimension 1, where that is monotone; else None."""
    module = _module_of(fused, node)
    if type(module) in _MONOTONE_MODULES:
        return module
    if type(module) in _BATCH_NORMS and module.track_running_stats:
        statistics = (module.running_mean, module.running_var, module.weight, module.bias)
        return lambda z: F.batch_norm(z, *statistics, eps=module.eps)
    if node.op in ("call_function", "call_method") and node.target in _RELUS:
        return torch.relu
    return None


def _pool_of(fused, node):
    module = _module_of(fused, node)
    return module if type(module) in _POOLS and not module.return_indices else None


def _insert_pool(fused, link, source, flips: Tensor, channels: int):
    pool = _pool_of(fused, link)
    dims = _POOLS[type(pool)]
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    sizes = [[size] * dims if isinstance(size, int) else list(size) for size in sizes]
    name = f"{link.name}_flips"
    fused.register_buffer(name, flips, persistent=False)
    with fused.graph.inserting_after(source):
        flips_node = fused.graph.get_attr(name)
    with fused.graph.inserting_after(flips_node):
        arguments = (source, flips_node, channels, *sizes, pool.ceil_mode)
        return fused.graph.call_function(torch.ops.abcnets.packed_max_pool.default, arguments)


def _fold(functions: list, layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """Thresholds (N, C) and flips (C,) on z with (z >= thresholds) != flips where f(z) >= the layer's own thresholds.

    f, the composition, is monotone in each channel, so each threshold is the smallest float32 for which a comparison
    comes true (or, in a falling channel, ceases to be true). Floats are ordered like their bits, which makes bisection
    32 evaluations. Max-pools have no entry: they commute.
    """
    N, C = layer.in_thresholds.shape
    wanted = layer.thresholds[:, None]

    def f(z):
        for function in functions:
            z = z if function is None else function(z)
        return z

    extreme = torch.finfo(torch.float32).max
    low, high = (f(wanted.new_full((1, C), value))[0] for value in (-extreme, extreme))
    flips = high < low

    def passed(key):  # monotone in the key: False, then True
        return (f(_float_of_key(key)) >= wanted) != flips

    infinity = _key_of_float(wanted.new_tensor(math.inf))
    below = wanted.new_zeros((N, C), dtype=torch.int64) - infinity - 1  # one step below -inf: never passed
    above = torch.zeros_like(below) + infinity  # if nothing smaller passes, +inf is the threshold
    below_all = passed(-infinity.expand(N, C))
    while (above - below > 1).any():
        middle = torch.div(below + above, 2, rounding_mode="floor")
        is_true = passed(middle.clamp(min=-infinity))
        above, below = torch.where(is_true, middle, above), torch.where(is_true, below, middle)
    return torch.where(below_all, -math.inf, _float_of_key(above.clamp(min=-infinity))), flips


def _key_of_float(x: Tensor) -> Tensor:
    """An integer that is ordered as the float32 is: its bits, the magnitude negated below zero."""
    bits = x.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _float_of_key(key: Tensor) -> Tensor:
    bits = torch.where(key < 0, -key | -0x80000000, key)
    return bits.to(torch.int32).view(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def export_onnx(model: nn.Module, example_input: Tensor, path) -> None:
    """Write a model as one ONNX file, which runs without torch; replaces the file atomically.

    Takes a model with ABC layers (its quantized weights become float32 constants), what `pack` or `load_packed`
    returned, or what `fuse` made of that. Packed weights stay bits in the file: uint8 initializers in the order of
    `PackedLayer.bits`, which standard operators unpack; ONNX Runtime does so once, when it loads the file. It then runs
    float convolutions: the file is as small as that of `save_packed`, but no faster than a float network's. Between
    the layers of a fused model it hands on booleans.

    Input and output are called "input" and "output", and their first dimension, the batch, may be of any size.

    Args:
        model: the model, which is exported as it is in eval mode; it is not touched.
        example_input: a batch of the right shape and dtype; its values don't matter.
        path: the file to write.

    Raises: ImportError without the packages onnx and onnxscript; ValueError for an example without a batch, and where
        torch.export can't trace the model. A NaN that would have to become bits in a fused model raises nothing in the
        file: it counts as below every threshold.

    Example::

        abcnets.export_onnx(abcnets.pack(model), images[:1], "model.onnx")
        session = onnxruntime.InferenceSession("model.onnx")
        (logits,) = session.run(None, {"input": images.numpy()})
    """
    try:
        import onnx_ir
        import onnx_ir.passes.common
        from onnxscript.optimizer import optimize_ir
    except ImportError as error:
        raise ImportError(f"export_onnx needs two more packages, `pip install onnx onnxscript`: {error}") from None

    def from_bits(node) -> bool | None:  # folded into a constant, they would be 32 times as large
        bits = any(value is not None and value.dtype == onnx_ir.DataType.UINT8 for value in node.inputs)
        return False if bits else None

    names = {"input_names": ["input"], "output_names": ["output"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter about torch's own code
        program = torch.onnx.export(_plain_program(model, example_input), **names, optimize=False, verbose=False)
    optimize_ir(program.model, should_fold=from_bits)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # stack traces, longer than a small network
    temporary = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
        program.save(temporary, external_data=False)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@torch.no_grad()
def _plain_program(model: nn.Module, example: Tensor) -> "torch.export.ExportedProgram":
    """The model in eval mode as operations that every exporter knows, for batches of any size."""
    if not isinstance(example, Tensor) or example.ndim == 0 or len(example) == 0:
        got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"export_onnx needs a batch of at least one example input, got {got}")
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, _ABCLayer) and layer.active:
            layer.weight = nn.Parameter(layer.quantized_weight(), requires_grad=False)
            layer.us = None
    # torch.export takes sizes 0 and 1 for constants: the example must be a batch of two or more.
    example = example.detach().cpu().expand(max(2, len(example)), *example.shape[1:])
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:
        raise ValueError(f"export_onnx traces the model with torch.export, which failed: {error}") from error

    # With flags in the place of words: no format has to be kept, and ONNX Runtime adds int64 only up to 53 bits.
    def packed_conv(x, *arguments):
        *arguments, out_thresholds, out_flips = arguments
        y = _packed_sums(x, *arguments)
        if out_thresholds is not None:
            return _compared(y, out_thresholds, out_flips)
        return y.to(x.dtype) if x.is_floating_point() else y

    def packed_max_pool(flags, flips, channels, *sizes):
        return _pooled(flags, flips, *sizes)

    operators = torch.ops.abcnets
    return program.run_decompositions(
        {operators.packed_conv.default: packed_conv, operators.packed_max_pool.default: packed_max_pool}
    )
