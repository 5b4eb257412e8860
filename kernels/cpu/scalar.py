"""The first rung: the packed convolution as plain loops, in Numba, one thread, one word at a time.

The mathematics and the layouts are the vector engine's (layout.py), so the two can be read side by side; what is
missing is everything that makes it fast. Already this does 64 products with one xor and one popcount, and still it
reaches only a few percent of the processor's bound: one word at a time instead of eight, each fetched anew for every
output channel, and as much work on addresses as on bits.

    words    uint64 [B][padded pixel][P][N]
    weights  uint64 [M][O][tap][P]

Run this file to check and time it: `python -m kernels.cpu.scalar`.
"""

import numpy as np
import torch
from numba import njit

from .. import layout
from .primitives import popcount


def packed_conv(
    x, bits, alphas, betas, thresholds, flips, bias, zero, channels, stride, padding, dilation, groups,
    out_thresholds=None, out_flips=None, out_bases=0,
):  # fmt: skip
    """abcnets::packed_conv for float32 or words, prepared anew at every call."""
    from_words = x.dtype == torch.int64
    B, *size = (x.shape[0], *(x.shape[1:-2] if from_words else x.shape[2:]))
    O, *kernel = bits.shape[1:-1]
    N, P = len(betas), layout.words_of(channels)
    geometry = layout.Geometry.of(size, kernel, stride, padding, dilation)

    words_BXPN = np.zeros((B, np.prod(geometry.padded), P, N), np.uint64)
    if from_words:
        words_BXPN[:, geometry.input_pixels] = x.numpy().view(np.uint64).reshape(B, -1, P, N)
    else:
        x_BCX = x.reshape(B, channels, -1).contiguous().numpy()
        pack(x_BCX, thresholds.numpy(), flips.numpy(), geometry.input_pixels, words_BXPN)

    weights_MOTP = layout.weight_words(bits.numpy(), groups, channels)
    masks_OP = layout.channel_masks(O, channels, groups)
    outside, class_of_pixel = geometry.border_classes
    numbers = alphas.numpy(), betas.numpy(), *(None if t is None else t.numpy() for t in (bias, zero))
    constants_GO = layout.border_constants(weights_MOTP, *numbers, outside, channels // groups)
    scales_MNO = layout.scales(*numbers[:2])
    start = -(channels // groups * len(geometry.taps) // 2)
    y_BOX = np.empty((B, O, len(class_of_pixel)), np.float32)
    convolve(
        words_BXPN, weights_MOTP, masks_OP, geometry.output_pixels, geometry.taps, class_of_pixel, constants_GO,
        scales_MNO, start, y_BOX,
    )  # fmt: skip

    spatial = geometry.output[3 - len(size) :] if size else ()
    if out_thresholds is None:
        return torch.from_numpy(y_BOX).reshape(B, O, *spatial)
    out_BXPN = np.zeros((B, y_BOX.shape[2], layout.words_of(O), out_bases), np.uint64)
    pack(y_BOX, out_thresholds.numpy(), out_flips.numpy(), np.arange(y_BOX.shape[2]), out_BXPN)
    return torch.from_numpy(out_BXPN.view(np.int64)).reshape(B, *spatial, *out_BXPN.shape[2:])


@njit(cache=True)
def pack(x_BCX, thresholds_TC, flips_C, landing_X, words_BXPN):
    """Set the bits of words that are zero. In the binary code base n goes on from n - 1 (layout.own_thresholds)."""
    B, C, X = x_BCX.shape
    N, T = words_BXPN.shape[3], len(thresholds_TC)
    for b in range(B):
        for c in range(C):
            bit = np.uint64(1) << np.uint64(c % 64)
            for x in range(X):
                reached, step = flips_C[c], 1 << N
                for n in range(N):
                    if T == N:
                        reached = (x_BCX[b, c, x] >= thresholds_TC[n, c]) != flips_C[c]
                    else:
                        for t in range(step // 2 - 1, T, step):
                            reached ^= x_BCX[b, c, x] >= thresholds_TC[t, c]
                        step //= 2
                    if reached:
                        words_BXPN[b, landing_X[x], c // 64, n] |= bit


@njit(cache=True)
def convolve(words_BXPN, weights_MOTP, masks_OP, pixels_Y, taps_T, class_of_Y, constants_GO, scales_MNO, start, y_BOY):
    M, N, O = scales_MNO.shape
    for b in range(len(words_BXPN)):
        for o in range(O):
            for pixel in range(len(pixels_Y)):
                y = constants_GO[class_of_Y[pixel], o]
                for m in range(M):
                    for n in range(N):
                        count = start
                        for tap in range(len(taps_T)):
                            for p in range(masks_OP.shape[1]):
                                word = words_BXPN[b, pixels_Y[pixel] + taps_T[tap], p, n]
                                differ = (word ^ weights_MOTP[m, o, tap, p]) & masks_OP[o, p]
                                count += popcount(np.int64(differ))
                        y += scales_MNO[m, n, o] * np.float32(count)
                y_BOY[b, o, pixel] = y


if __name__ == "__main__":
    from ..check import cpu_rung

    cpu_rung("scalar", packed_conv, nan=False)
