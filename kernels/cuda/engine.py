"""The CUDA ladder as the operators abcnets::packed_conv and abcnets::packed_max_pool for torch tensors on a GPU.

A call packs (rung 1) unless bits come in, and convolves on the best rung that applies, else on the next lower one:

    bits out     rung 8 on the tensor core            else rung 5, then rung 1 on its result
    floats out   rung 6 on the tensor core            else rung 5

Bits out in the binary code are floats out and then rung 1: rung 8 compares with one threshold a base.

Rung 5 runs on GPUs without a binary tensor core (before Ampere, after Hopper) and for layers too large for shared
memory. Groups, three dimensions, float64, float activations and more than 16 bases go to the plain torch
implementation. Rung 7 is chosen by `prefer("wgmma")`; it becomes the default when it has measured faster.

Weights are laid out at a layer's first call, the tables of an image size at its first, and both kept beside the
layer's tensors (see cache.py and kept.py; a bounded number of sizes, and those that a CUDA graph reads). So run a
layer once, outside, before capturing it in a CUDA graph. After that a call reads nothing back from the device, with
one exception: floats to bits in one call asks whether there was a NaN, as the operator promises a ValueError (not
while capturing).
"""

import functools
from contextlib import nullcontext

import torch

from ..cache import Beside
from ..layout import by_rows, check_thresholds, pool_output
from . import rung1_pack, rung5_bases, rung6_tensorcore, rung7_wgmma, rung8_fused
from .kept import Kept, capturing, hold_for_graph, refuse_while_capturing
from .launch import Kernel, int32
from .layer import Layer
from .pool import max_pool
from .primitives import SIMULATED

BITS_PAY_UP_TO = 16  # binary convolutions M N of a layer; not measured yet, the CPU's number
LAYERS_PER_WEIGHT = 4  # the same bits may serve a packed model and its fused copy

_matrix_rung = "mma"
plain = None  # the abcnets module whose operators run what is not computed here


def use(abcnets) -> None:
    """Let the operators of this abcnets module run what is not computed here."""
    global plain
    plain = abcnets


def pays(M, N, thresholds, spatial_dims, groups) -> bool:
    """Whether bits are faster here than one float convolution."""
    return 0 < M * N <= BITS_PAY_UP_TO and spatial_dims <= 2 and groups == 1


def try_it() -> None:
    """Compile and launch the smallest kernel; raises whatever stands in the way."""

    def nothing(x):
        pass

    if not SIMULATED:
        Kernel(nothing, (int32,), 1)(1, 0)


def prefer(instruction: str) -> None:
    """Choose the tensor-core instruction: "mma" (sm_80 to sm_90) or "wgmma" (sm_90 only)."""
    global _matrix_rung
    if instruction not in ("mma", "wgmma"):
        raise ValueError(f'the instruction is "mma" or "wgmma", got {instruction!r}')
    _matrix_rung = instruction


def packed_conv(
    x, bits, alphas, betas, thresholds, flips, bias, zero, channels, stride, padding, dilation, groups,
    out_thresholds, out_flips, out_bases,
):  # fmt: skip
    """abcnets::packed_conv; the arguments are described at abcnets.packed_conv."""
    arguments = (
        x, bits, alphas, betas, thresholds, flips, bias, zero, channels, stride, padding, dilation, groups,
        out_thresholds, out_flips, out_bases,
    )  # fmt: skip
    N, dims = len(betas), bits.ndim - 3
    if dims == 0 and x.ndim != (3 if x.dtype == torch.int64 else 2):
        return by_rows(packed_conv, *arguments)
    applies = groups == 1 and dims <= 2 and 0 < N <= 16 and len(bits) <= 16 and x.dtype != torch.float64
    if not applies or x.numel() == 0:
        return plain.packed_conv(*arguments)
    with _on(x.device):
        tensors, geometry = (*arguments[1:8], out_thresholds, out_flips), map(tuple, (stride, padding, dilation))
        layer = _layers.get(tensors, out_bases, channels, *geometry)
        if layer is None:
            return plain.packed_conv(*arguments)
        if x.dtype == torch.int64:
            words_BHWPN = x.contiguous().view(x.shape[0], *(1,) * (2 - dims), *x.shape[1:])
            place = layer.place(*words_BHWPN.shape[1:3])
            poison_BHW = place.no_poison(len(x))
            if capturing():
                hold_for_graph(bits, layer, place, poison_BHW)
        else:
            x_BCHW = x.float()
            x_BCHW = x_BCHW if dims == 2 else x_BCHW.reshape(*x.shape[:2], *(1,) * (2 - dims), *x.shape[2:])
            words_BHWPN, poison_BHW = rung1_pack.pack(x_BCHW, *layer.inputs, N)
            if capturing():
                hold_for_graph(bits, layer, layer.place(*words_BHWPN.shape[1:3]))
            elif out_thresholds is not None and bool(poison_BHW.isnan().any()):
                raise ValueError("packed_conv was asked for bits, which can't say NaN, but its input holds a NaN")
        if out_thresholds is None:
            y = _convolve(layer, words_BHWPN, poison_BHW)
            y = y.view(*y.shape[:2], *y.shape[4 - dims :])
            return y if x.dtype == torch.int64 else y.to(x.dtype)
        out = _convolve_to_bits(layer, words_BHWPN, poison_BHW, out_thresholds, out_flips, out_bases)
        return out.view(len(out), *out.shape[3 - dims :])


def _convolve(layer, words_BHWPN, poison_BHW):
    y = None
    if _has_wgmma(layer.device):
        y = rung7_wgmma.conv(layer, words_BHWPN, poison_BHW)
    if y is None and _has_mma(layer.device):
        y = rung6_tensorcore.conv(layer, words_BHWPN, poison_BHW)
    return rung5_bases.conv(layer, words_BHWPN, poison_BHW) if y is None else y


def _convolve_to_bits(layer, words_BHWPN, poison_BHW, out_thresholds, out_flips, out_bases):
    out, outputs = None, layer.outputs
    if len(out_thresholds) != out_bases:  # the binary code, which rung 8's epilogue doesn't know
        return rung1_pack.pack(_convolve(layer, words_BHWPN, poison_BHW), *outputs, out_bases)[0]
    if _has_wgmma(layer.device):
        out = rung7_wgmma.conv(layer, words_BHWPN, poison_BHW, None, rung8_fused.bits_output, *outputs)
    if out is None and _has_mma(layer.device):
        out = rung8_fused.conv(layer, words_BHWPN, poison_BHW, *outputs)
    if out is None:
        y = rung5_bases.conv(layer, words_BHWPN, poison_BHW)
        out, _ = rung1_pack.pack(y, out_thresholds.float(), out_flips, out_bases)
    return out


def packed_max_pool(words, flips, channels, kernel_size, stride, padding, dilation, ceil_mode, binary):
    """abcnets::packed_max_pool; the arguments are described at abcnets.packed_max_pool."""
    arguments = words, flips, channels, kernel_size, stride, padding, dilation, ceil_mode, binary
    dims = len(kernel_size)
    size = pool_output(words.shape[1:-2], kernel_size, stride, padding, dilation, ceil_mode)
    out = words.new_empty((len(words), *size, *words.shape[-2:]))
    if dims > 2 or out.numel() == 0:
        return plain.packed_max_pool(*arguments)
    with _on(words.device):
        flips_P, kept = _flip_words.get((flips,))
        kept.read()
        if capturing():
            hold_for_graph(flips, flips_P)
        ones = (1,) * (2 - dims)
        images = [t.view(len(t), *ones, *t.shape[1:]) for t in (out, words.contiguous())]
        pairs = [(*ones, *kernel_size), (*ones, *stride), (*(0,) * len(ones), *padding), (*ones, *dilation)]
        max_pool(*images, flips_P, *pairs, binary)
    return out


# ------------------------------------------------------------------ what is kept, and what the machine can do


def _lay_out(tensors, out_bases, channels, *geometry):
    """A Layer with its thresholds; None where a constant is NaN, which only floats can follow."""
    bits, alphas, betas, thresholds, flips, bias, zero, out_thresholds, out_flips = tensors
    refuse_while_capturing()
    check_thresholds(len(betas), len(thresholds))
    if any(bool(t.isnan().any()) for t in (alphas, betas, bias, zero) if t is not None):
        return None
    layer = Layer(bits, alphas, betas, bias, zero, channels, *geometry)
    thresholds_TC = thresholds.view(len(thresholds), -1).expand(-1, channels)
    flips = thresholds.new_zeros(channels) if flips is None else flips
    layer.inputs = layer.copy(thresholds_TC), layer.copy(flips, torch.bool)
    if out_thresholds is not None:
        check_thresholds(out_bases, len(out_thresholds))
        if len(out_thresholds) == out_bases:
            layer.outputs = tuple(map(layer.kept.add, rung8_fused.pad_outputs(out_thresholds, out_flips)))
        else:
            layer.outputs = layer.copy(out_thresholds), layer.copy(out_flips, torch.bool)
    return layer


def _pack_flips(tensors):
    """The flips of a max-pooling as words."""
    refuse_while_capturing()
    kept = Kept()
    return kept.add(plain.pack_bits(*tensors, torch.int64)), kept


_layers = Beside(_lay_out, LAYERS_PER_WEIGHT)
_flip_words = Beside(_pack_flips, 1)


def _on(device):
    return nullcontext() if SIMULATED else torch.cuda.device(device)


@functools.cache
def _has_mma(device) -> bool:
    """Whether b1 mma.sync is an instruction here: from Ampere to Hopper."""
    return SIMULATED or (8, 0) <= torch.cuda.get_device_capability(device) < (10, 0)


def _has_wgmma(device) -> bool:
    return _matrix_rung == "wgmma" and (SIMULATED or torch.cuda.get_device_capability(device) == (9, 0))
