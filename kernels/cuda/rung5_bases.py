"""Rung 5. All M x N bases in one pass: every word is loaded once, scales come at the end.

As rung 4, but a thread keeps M * N integer counters in registers and its block the words of all bases in shared memory.
A word of activation base n meets the M weight words, a word of weight base m the N activation words:

    a_KNX   uint64 [8][N][32]      words of the 32 windows, all activation bases
    w_MOK   uint64 [M][8][8]       words of the 8 channels, all weight bases

    y = constants[class, o] - 2 sum_m alpha_m sum_n beta_n (count_mn - C T / 2)

M + N loads for M * N popcounts (rung 4: 2 M N), the windows gathered once and not M times, two floating-point
operations an output and base pair instead of one conversion a chunk. The bound is still the popcount unit's 512
multiply-adds a clock and SM; what this rung adds is coming near it for M, N > 1. It is the fallback on GPUs without a
binary tensor core.
"""

import functools

import torch
from numba import cuda

from .launch import Kernel, float32, int32, uint64
from .primitives import popcount, split

PIXELS, CHANNELS, CHUNK = 32, 8, 8


@functools.cache
def conv_kernel(M, N) -> Kernel:
    PAIRS = M * N

    def conv_bases(
        y_BOHW, words_BHWPN, poison_BHW, weights_MOTP, alphas_MO, betas_N, constants_GO, classes,
        center, KW, stride_h, stride_w, top, left, dilation_h, dilation_w,
    ):  # fmt: skip
        B, O, OH, OW = y_BOHW.shape
        _, H, W, P, _ = words_BHWPN.shape
        T = weights_MOTP.shape[2]
        a_KNX = cuda.shared.array((CHUNK, N, PIXELS), uint64)
        w_MOK = cuda.shared.array((M, CHANNELS, CHUNK), uint64)
        poison_X = cuda.shared.array(PIXELS, float32)
        counts = cuda.local.array(PAIRS, int32)
        a = cuda.local.array(N, uint64)
        x = cuda.threadIdx.x
        row = cuda.threadIdx.y
        pixel = min(cuda.blockIdx.x * PIXELS + x, B * OH * OW - 1)
        rest, ow = split(pixel, OW)
        b, oh = split(rest, OH)
        o = cuda.blockIdx.y * CHANNELS + row
        if row == 0:
            poison_X[x] = float32(0)
        for i in range(PAIRS):
            counts[i] = -center
        for start in range(0, T * P, CHUNK):
            cuda.syncthreads()
            t, p = split(start + row, P)  # CHUNK = CHANNELS: a thread gathers one word of its window, for every base
            kh, kw = split(t, KW)
            h = oh * stride_h + kh * dilation_h - top
            w = ow * stride_w + kw * dilation_w - left
            inside = t < T and 0 <= h < H and 0 <= w < W
            for n in range(N):
                word = uint64(0)
                if inside:
                    word = words_BHWPN[b, h, w, p, n]
                a_KNX[row, n, x] = word
            if inside and poison_BHW[b, h, w] != 0:
                poison_X[x] = poison_BHW[b, h, w]
            if x < CHUNK:
                t, p = split(start + x, P)
                for m in range(M):
                    word = uint64(0)
                    if o < O and t < T:
                        word = weights_MOTP[m, o, t, p]
                    w_MOK[m, row, x] = word
            cuda.syncthreads()
            for k in range(CHUNK):
                for n in range(N):
                    a[n] = a_KNX[k, n, x]
                for m in range(M):
                    w_word = w_MOK[m, row, k]
                    for n in range(N):
                        counts[m * N + n] += popcount(a[n] ^ w_word)
        if o < O and cuda.blockIdx.x * PIXELS + x < B * OH * OW:
            y = float32(0)
            for m in range(M):
                for n in range(N):
                    y += alphas_MO[m, o] * betas_N[n] * float32(counts[m * N + n])
            constant = constants_GO[classes[oh * OW + ow], o] + poison_X[x]
            y_BOHW[b, o, oh, ow] = constant - float32(2) * y

    signature = (
        float32[:, :, :, ::1], uint64[:, :, :, :, ::1], float32[:, :, ::1], uint64[:, :, :, ::1], float32[:, ::1],
        float32[::1], float32[:, ::1], int32[::1], *[int32] * 8,
    )  # fmt: skip
    return Kernel(conv_bases, signature, (PIXELS, CHANNELS))


def conv(layer, words_BHWPN, poison_BHW) -> torch.Tensor:
    B, H, W, _, _ = words_BHWPN.shape
    place = layer.place(H, W)
    y = place.output(B)
    grid = -(-B * place.out_height * place.out_width // PIXELS), -(-layer.O // CHANNELS)
    top, _, left, _ = layer.padding
    conv_kernel(layer.M, layer.N)(
        grid, y, words_BHWPN, poison_BHW, layer.weights_MOTP, layer.alphas_MO, layer.betas_N, place.constants_xor,
        place.classes, layer.center_xor, layer.KW, *layer.stride, top, left, *layer.dilation,
    )  # fmt: skip
    return y


def main():
    from ..check import cuda_rung

    cuda_rung("rung5_bases", conv)


if __name__ == "__main__":
    main()
