"""Rung 4. The same with shared memory: a block loads what its threads have in common once. The original's unfinished
idea.

A block computes 32 pixels x 8 output channels, a thread one output. In shared memory it keeps a chunk of 16 words of
K of the 32 windows (gathered: no index arithmetic is left in the inner loop) and of the 8 channels' weights:

    a_KX    uint64 [16][32]    word k of each pixel's window; 0 where the tap is padded
    w_OK    uint64 [8][16]     the same words of each channel's weights

    words_BHWPN, weights_MOTP, y_BOHW    as in rung 3;    K = T P words a window

Padding. The gathered word of a padded tap is 0 and counts popcount(w): too much, but by a constant of the border
class and the output channel, so `constants` (with the bias in them) take it back and the inner loop knows nothing of
borders.

Traffic of a chunk: (32 + 8) * 16 * 8 bytes from the caches for 256 * 16 popcounts, 1.25 bytes each instead of 16.
From shared memory a warp reads 256 bytes (2 clocks) plus a broadcast (1) for a popcount of 64 bits (4 clocks at 16 a
clock): the popcount unit is the bound now, if the rest overlaps.
"""

import functools

import torch
from numba import cuda

from .launch import Kernel, float32, int32, uint64
from .primitives import popcount, split

PIXELS, CHANNELS, CHUNK = 32, 8, 16


@functools.cache
def conv_kernel() -> Kernel:
    def conv_shared(
        y_BOHW, words_BHWPN, poison_BHW, weights_MOTP, alphas_MO, betas_N, constants_GO, classes,
        center, KW, stride_h, stride_w, top, left, dilation_h, dilation_w,
    ):  # fmt: skip
        B, O, OH, OW = y_BOHW.shape
        _, H, W, P, N = words_BHWPN.shape
        M, _, T, _ = weights_MOTP.shape
        a_KX = cuda.shared.array((CHUNK, PIXELS), uint64)
        w_OK = cuda.shared.array((CHANNELS, CHUNK), uint64)
        poison_X = cuda.shared.array(PIXELS, float32)
        x = cuda.threadIdx.x
        row = cuda.threadIdx.y
        pixel = min(cuda.blockIdx.x * PIXELS + x, B * OH * OW - 1)
        rest, ow = split(pixel, OW)
        b, oh = split(rest, OH)
        o = cuda.blockIdx.y * CHANNELS + row
        if row == 0:
            poison_X[x] = float32(0)
        y = float32(0)
        for m in range(M):
            for n in range(N):
                count = int32(-center)
                for start in range(0, T * P, CHUNK):
                    cuda.syncthreads()
                    for k in range(row, CHUNK, CHANNELS):
                        t, p = split(start + k, P)
                        kh, kw = split(t, KW)
                        h = oh * stride_h + kh * dilation_h - top
                        w = ow * stride_w + kw * dilation_w - left
                        word = uint64(0)
                        if t < T and 0 <= h < H and 0 <= w < W:
                            word = words_BHWPN[b, h, w, p, n]
                            if poison_BHW[b, h, w] != 0:
                                poison_X[x] = poison_BHW[b, h, w]
                        a_KX[k, x] = word
                    if x < CHUNK:
                        word = uint64(0)
                        if o < O and start + x < T * P:
                            t, p = split(start + x, P)
                            word = weights_MOTP[m, o, t, p]
                        w_OK[row, x] = word
                    cuda.syncthreads()
                    for k in range(CHUNK):
                        count += popcount(a_KX[k, x] ^ w_OK[row, k])
                if o < O:
                    y += alphas_MO[m, o] * betas_N[n] * float32(count)
        if o < O and cuda.blockIdx.x * PIXELS + x < B * OH * OW:
            constant = constants_GO[classes[oh * OW + ow], o] + poison_X[x]
            y_BOHW[b, o, oh, ow] = constant - float32(2) * y

    signature = (
        float32[:, :, :, ::1], uint64[:, :, :, :, ::1], float32[:, :, ::1], uint64[:, :, :, ::1], float32[:, ::1],
        float32[::1], float32[:, ::1], int32[::1], *[int32] * 8,
    )  # fmt: skip
    return Kernel(conv_shared, signature, (PIXELS, CHANNELS))


def conv(layer, words_BHWPN, poison_BHW) -> torch.Tensor:
    B, H, W, _, _ = words_BHWPN.shape
    place = layer.place(H, W)
    y = place.output(B)
    grid = -(-B * place.out_height * place.out_width // PIXELS), -(-layer.O // CHANNELS)
    top, _, left, _ = layer.padding
    conv_kernel()(
        grid, y, words_BHWPN, poison_BHW, layer.weights_MOTP, layer.alphas_MO, layer.betas_N, place.constants_xor,
        place.classes, layer.center_xor, layer.KW, *layer.stride, top, left, *layer.dilation,
    )  # fmt: skip
    return y


def main():
    from ..check import cuda_rung

    cuda_rung("rung4_shared", conv)


if __name__ == "__main__":
    main()
