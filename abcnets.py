"""Accurate binary convolution for PyTorch: weights and activations as linear combinations of +1/-1 bases.

After Lin, Zhao, Pan, "Towards Accurate Binary Convolutional Neural Network", NeurIPS 2017, arXiv:1711.11294:

    W ~ Wq = sum_m alpha_m B_m     B_m = sign(W - mean(W) + u_m std(W))        m = 1..M   weight bases
    R ~ Aq = sum_n beta_n  A_n     A_n = +1 where R >= 1/2 - v_n, else -1      n = 1..N   activation bases
    conv(R, W) ~ conv(Aq, Wq) = sum_m sum_n alpha_m beta_n conv(A_n, B_m)

This one file needs torch and nothing else: copy it into your project. It reads top to bottom: shifts and levels, the
two quantizers, the layers, whole models (`binarize`, `convert`, `calibrate`, `summary`), packed inference (`pack`,
`save_packed`, `load_packed`, `fuse`).

    model = abcnets.convert(resnet18, weight_bases=3, activation_bases=3)   # a binarized copy, weights kept
    abcnets.calibrate(model, batches)                                       # no training: a thousand images
    ...                                                                     # fine-tune it like any other model
    packed = abcnets.pack(model)                                            # 1 bit a weight and base

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
- The shifts default to `gaussian_shifts`, which fit bell-shaped weights better than `even_shifts`, the paper's choice.
- dL/dW = dL/dWq, the plain straight-through estimator. The paper's formula can be read as that times sum(alpha),
  one scalar a layer (or channel) that only rescales the learning rate.
- Training runs one float convolution of Aq with Wq: the M x N sum above, by linearity. Only packed inference runs
  M x N bitwise convolutions.
"""

import copy
import functools
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "1.0.0"


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
    0.363, 0.190, 0.1175, 0.058 for M = 1, 2, 3, 5; `even_shifts` gives 0.363, 0.27, 0.13, 0.09.

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
            (density(low) - density(high)) / (mass_below(high) - mass_below(low))
            for low, high in zip(edges, edges[1:])
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


def _fit_activations(samples: Tensor, N: int) -> tuple[Tensor, Tensor] | None:
    """(vs, betas), float32 on the CPU, with the least squared error on `samples`; None where these are all one value.

    For N > 1 the first base is the constant +1 on the samples: c_0 = -c_N ties the outer levels, and without a base to
    absorb that a non-negative R would be fitted by levels symmetric about zero. A single base has no such freedom; its
    beta is half the distance of the two levels, and the missing constant is left to the BatchNorm or bias that follows.
    """
    thresholds, levels = _lloyd_max(samples, max(N - 1, 1))
    if levels[0] == levels[-1]:
        return None
    betas = levels.diff() / 2
    if N > 1:
        low, high = samples.min().item(), samples.max().item()
        # Far below signed samples, since a stray value under this threshold would fall to -c_N; rectified ones cannot.
        constant = 0.0 if low >= 0 else low - (high - low)
        thresholds = torch.cat([thresholds.new_tensor([constant]), thresholds])
        betas = torch.cat([(levels[:1] + levels[-1:]) / 2, betas])
    return (0.5 - thresholds).float(), betas.float()


@functools.cache
def _start_activations(N: int) -> tuple[Tensor, Tensor]:
    """(vs, betas) of a new layer: the best fit to a rectified unit Gaussian, which is what BatchNorm and ReLU put out."""
    _check_bases("activation_bases", N)
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return _fit_activations(torch.special.ndtri(quantiles).relu(), N)


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

    An empty inner bin takes its lower neighbour's constant: its alpha is 0. Alphas are non-negative but possibly for
    the base that adds the constant. Cost: O(M size(W)).

    Shape: W (O, C, *K); us (M,) -> alphas (M, O), or (M, 1) where `per_channel` is False.
    Raises: as `weight_bases`.
    """
    _check_weight(W, us)
    x, thresholds = _standardize(W, us, per_channel)
    order = us.argsort(descending=True, stable=True)
    levels = _levels(W.reshape(x.shape), [x >= t for t in thresholds[:, order].unbind(1)])
    return (levels.diff(dim=1) / 2)[:, order.argsort()].t()


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
    """x (G, K), thresholds (G, M, 1) such that B_m is +1 exactly where x >= threshold m; G groups share statistics."""
    x = W.reshape(len(W), -1) if per_channel else W.reshape(1, -1)
    x = x - x.mean(1, keepdim=True)
    # One value alone has no sample deviation; 0 makes all its bases +1, and Wq the value itself.
    std = x.std(1, keepdim=True) if x.shape[1] > 1 else torch.zeros_like(x)
    return x, -(std * us.to(x.dtype))[:, :, None]


def _levels(W: Tensor, above: list[Tensor]) -> Tensor:
    """Least-squares constants c_0..c_M (G, M + 1) of W (G, K) cut by nested masks, the largest set first."""
    everything, nothing = torch.ones_like(above[0]), torch.zeros_like(above[0])
    bins = [inner ^ outer for outer, inner in zip([everything, *above], [*above, nothing])]
    sums = [torch.where(bin, W, 0).sum(1) for bin in bins]
    counts = [bin.sum(1) for bin in bins]
    top = (sums[-1] - sums[0]) / (counts[-1] + counts[0]).clamp(min=1)
    levels = [-top]
    for total, count in zip(sums[1:-1], counts[1:-1]):
        levels.append(torch.where(count > 0, total / count.clamp(min=1), levels[-1]))
    return torch.stack([*levels, top], dim=1)


class _QuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(W, us, per_channel):
        x, thresholds = _standardize(W, us, per_channel)
        thresholds = thresholds[:, us.argsort(descending=True, stable=True)]
        above = [x >= t for t in thresholds.unbind(1)]
        levels = _levels(W.reshape(x.shape), above).unsqueeze(2).unbind(1)
        Wq = levels[0].expand(x.shape)
        for mask, level in zip(above, levels[1:]):
            Wq = torch.where(mask, level, Wq)
        return Wq.reshape(W.shape)

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
        raise ValueError(f"vs and betas must be one-dimensional with one entry per activation base, got shapes {shapes}")
    if not R.is_floating_point():
        raise TypeError(f"a binarized layer takes floating-point input, got {R.dtype}")
    return _QuantizeActivation.apply(R, vs, betas)


def _thresholds(vs: Tensor) -> Tensor:
    """t_n = 1/2 - v_n, in float32 or wider: the one place where v becomes a threshold, for training and packing alike."""
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
        rows = max(1, 65_536 * len(first) // first.numel())
        yield from zip(*(t.split(rows) for t in tensors))


def _scalars(values: Tensor):
    """The entries of a small vector: Python numbers on the CPU, where they are free, else 0-dimensional tensors."""
    return values.tolist() if values.device.type == "cpu" and not torch.compiler.is_compiling() else values.unbind()


def _is_at_least(r: Tensor, threshold) -> Tensor:
    """1.0 where r >= threshold, else 0.0. torch vectorizes this on the CPU; `r >= threshold` and `where` it does not."""
    return r.clone().ge_(threshold)


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(R, vs, betas):
        thresholds, order = _thresholds(vs).sort()
        steps = 2 * betas.to(thresholds.dtype)[order]
        lowest, steps, thresholds = -steps.sum() / 2, _scalars(steps), _scalars(thresholds)

        def staircase(r):
            r = r.to(torch.promote_types(r.dtype, torch.float32))
            a = r.clamp(lowest, lowest)  # the lowest level everywhere, but a NaN stays a NaN
            for threshold, step in zip(thresholds, steps):
                a.add_(_is_at_least(r, threshold).mul_(step))
            return a

        Aq = torch.empty_like(R)
        for r, a in _in_cache(R, Aq):
            a.copy_(staircase(r))
        return Aq

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
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

    stock: type[nn.Module]  # torch's layer of that name
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
        if not isinstance(layer, cls.stock):
            raise TypeError(f"{cls.__name__}.from_float takes an nn.{cls.stock.__name__}, got {type(layer).__name__}")
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

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
                 padding_mode="zeros", device=None, dtype=None, *, weight_bases=3, activation_bases=3, us=None, vs=None,
                 betas=None, weight_init=None, bias_init=None, active=True, per_channel=True, learn_us=False):
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
    cls.__doc__ = _LAYER_DOC.format(stock=cls.stock.__name__, **words)


class ABCConv1d(_ABCConv, nn.Conv1d):
    stock = nn.Conv1d
    spatial_dims = 1


class ABCConv2d(_ABCConv, nn.Conv2d):
    stock = nn.Conv2d
    spatial_dims = 2


class ABCConv3d(_ABCConv, nn.Conv3d):
    stock = nn.Conv3d
    spatial_dims = 3


class ABCLinear(_ABCLayer, nn.Linear):
    stock = nn.Linear
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


for _cls, _size, _example in ((ABCConv1d, "L", (50,)), (ABCConv2d, "H, W", (32, 32)), (ABCConv3d, "D, H, W", (8, 9, 9))):
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

_ABC_OF = {cls.stock: cls for cls in (ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear)}


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


def binarize(module: nn.Module, active: bool = True) -> nn.Module:
    """Switch quantization on (or off again) in a layer, or in every such layer of a model; returns the module."""
    for layer in module.modules():
        if isinstance(layer, _ABCLayer):
            layer.active = bool(active)
    return module


def convert(model, weight_bases=3, activation_bases=3, *, filter_fn=None, settings=None, **bases):
    """A copy of a model with its convolutions and linear layers binarized, weights kept; the model itself is untouched.

    The first and the last of these layers stay float by default, as everywhere in the literature: they hold few of
    the weights and lose most by binarization. Subclasses of torch's layers are left alone, since their forward pass is
    theirs. A layer used in two places stays one layer.

    Args:
        model: any module, or a single nn.Conv1d/2d/3d or nn.Linear (which is then converted itself).
        weight_bases, activation_bases: M and N of every converted layer; None leaves that side float.
        filter_fn: filter_fn(layer, name) -> bool decides which layers are converted; replaces the default choice.
        settings: exceptions by name or by function, {name: {"weight_bases": 5}} or settings(name, layer): a dict of
            bases for that layer, or None for "leave it float". Names that the model lacks raise ValueError. An
            entry also converts a layer that the default choice or filter_fn leaves out.
        **bases: us, vs, betas, active, per_channel, learn_us, for every converted layer.

    Returns: the converted copy.
    """
    candidates = {name: layer for name, layer in model.named_modules() if type(layer) in _ABC_OF}
    if isinstance(settings, dict):
        unknown = settings.keys() - candidates.keys()
        if unknown:
            raise ValueError(f"settings name layers that can't be converted: {sorted(unknown)}; "
                             f"the model has {sorted(candidates)}")  # fmt: skip
    ends = [next(iter(candidates)), next(reversed(candidates))] if len(candidates) > 1 else []

    def choice(name, layer):
        if isinstance(settings, dict) and name in settings:
            return settings[name]
        chosen = name not in ends if filter_fn is None else filter_fn(layer, name)
        extra = settings(name, layer) if callable(settings) else {}
        return extra if chosen and extra is not None else None

    common = {"weight_bases": weight_bases, "activation_bases": activation_bases, **bases}
    choices = {name: choice(name, layer) for name, layer in candidates.items()}
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    replaced = {
        modules[name]: _ABC_OF[type(modules[name])].from_float(modules[name], **{**common, **own})
        for name, own in choices.items() if own is not None
    }  # fmt: skip
    return _replace(model, replaced)


def _replace(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(model, model)


@torch.no_grad()
def calibrate(model: nn.Module, batches, *, progress: bool = True) -> nn.Module:
    """Fit a freshly binarized model to some data, without training; in place, returns the model.

    What makes a freshly binarized network fall apart is not so much the quantizers as the BatchNorm statistics, which no
    longer fit. In one pass over all the images, in the order in which the layers run, each seeing what the layers
    before it, already calibrated, really put out:

    - a BatchNorm behind a binarized layer gets the mean and variance of what now reaches it;
    - a binarized layer gets Lloyd-Max thresholds of its input (vs), one base constant for N > 1, and least-squares betas;
    - a binarized layer with a bias has it moved so that each channel's mean is what the float layer put out.

    Works on any model: modules are met where they run, by hooks, whatever the code between them. A module that runs
    several times is calibrated on its first run. All images go through together: a thousand small ones, or as many
    as an evaluation batch may hold.

    Args:
        model: a model with active ABC layers.
        batches: an iterable of input tensors, or of (input, ...) tuples such as a DataLoader yields; or one tensor.
        progress: show a bar, where tqdm is installed.

    Raises: ValueError where the model has no active ABC layer or there are no images.
    """
    layers = [m for m in model.modules() if isinstance(m, _ABCLayer) and m.active]
    if not layers:
        raise ValueError("calibrate needs a model with at least one active ABC layer: convert or binarize it first")
    images = _gather(batches, layers[0].weight.device)
    statistics = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    was_training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        float_means = _float_means(model, [m for m in layers if m.bias is not None], images)
        bar = _progress_bar(len(layers) + len(statistics)) if progress else None
        done = set()

        def before(module, inputs):
            if module in done:
                return
            if isinstance(module, _ABCLayer):
                _calibrate_thresholds(module, inputs[0])
                done.add(module)
            elif done:  # a BatchNorm ahead of every binarized layer fits as it is
                _calibrate_statistics(module, inputs[0])
                done.add(module)
            if bar is not None:
                bar.update()

        def after(module, inputs, output):
            if module in float_means:
                shift = float_means.pop(module) - _channel_means(module, output)
                module.bias += shift
                return output + _along_channels(module, shift)

        _run_with_hooks(model, images, {m: (before, after) for m in layers} | {m: (before, None) for m in statistics})
        if bar is not None:
            bar.close()
    finally:
        for module in was_training:
            module.training = True
    return model


def _gather(batches, device) -> Tensor:
    """All inputs of `calibrate` as one batch."""
    if isinstance(batches, Tensor):
        batches = [batches]
    inputs = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
    if sum(map(len, inputs)) == 0:
        raise ValueError("calibrate needs at least one image, got none")
    return torch.cat(inputs).to(device)


def _run_with_hooks(model, images, hooks: dict) -> None:
    """One forward pass with {module: (before, after)} hooks, which are gone afterwards whatever happens."""
    handles = []
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


def _float_means(model, layers, images) -> dict[nn.Module, Tensor]:
    """The mean of each output channel of these layers while the whole model runs float, {layer: (O,)}."""
    means = {}
    if not layers:
        return means

    def after(module, inputs, output):
        means.setdefault(module, _channel_means(module, output))

    active = [m for m in model.modules() if isinstance(m, _ABCLayer) and m.active]
    binarize(model, False)
    try:
        _run_with_hooks(model, images, {layer: (None, after) for layer in layers})
    finally:
        for layer in active:
            layer.active = True
    return means


def _channel_means(layer: _ABCLayer, output: Tensor) -> Tensor:
    return output.transpose(0, -1 - layer.spatial_dims).flatten(1).mean(1)


def _along_channels(layer: _ABCLayer, values: Tensor) -> Tensor:
    return values.view(-1, *[1] * layer.spatial_dims)


def _calibrate_thresholds(layer: _ABCLayer, input: Tensor) -> None:
    if layer.vs is None:
        return
    values = input.flatten()
    fit = _fit_activations(values[:: max(1, len(values) // 2_000_000)], layer.activation_bases)
    if fit is not None:  # an input that is one value everywhere says nothing: the start values stay
        layer.vs.copy_(fit[0])
        layer.betas.copy_(fit[1])


def _calibrate_statistics(norm: nn.Module, input: Tensor) -> None:
    values = input.transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(values, dim=1, correction=min(1, values.shape[1] - 1))  # as torch keeps it: unbiased
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


def _progress_bar(total: int):
    """A tqdm bar, or None: this file needs nothing but torch."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="calibrate", unit="layer", leave=False)
