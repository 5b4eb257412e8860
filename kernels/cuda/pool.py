"""Max-pooling of bits is an OR: what thresholding after max-pooling gives, without any float.

max(z) >= t where any z >= t is true. A word says (z >= t) != flip, so with the flips taken out, words are joined by OR,
and padding is 0; then the flips go back in. One thread a word, 64 channels at a time.

In the binary code the N words of 64 channels are the bits of 64 numbers, and one thread finds their maximum: from the
highest bit down, the first one that differs decides. Padding is the number 0.

    words_BHWPN, out_BHWPN    uint64        flips_P    uint64, bit c % 64 of word c // 64

Traffic: 8 bytes written a word, and each input word read about once (neighbouring windows share the cache).
"""

import functools

import torch
from numba import cuda

from .launch import Kernel, int32, uint64
from .primitives import split

THREADS = 256

_WORDS = uint64[:, :, :, :, ::1]
_SIGNATURE = (_WORDS, _WORDS, uint64[::1], *[int32] * 8)


@functools.cache
def pool_kernel() -> Kernel:
    def pool(
        out_BHWPN, words_BHWPN, flips_P, KH, KW, stride_h, stride_w, top, left, dilation_h, dilation_w
    ):  # fmt: skip
        B, OH, OW, P, N = out_BHWPN.shape
        _, H, W, _, _ = words_BHWPN.shape
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i >= B * OH * OW * P * N:
            return
        rest, n = split(i, N)
        rest, p = split(rest, P)
        rest, ow = split(rest, OW)
        b, oh = split(rest, OH)
        word = uint64(0)
        for kh in range(KH):
            h = oh * stride_h + kh * dilation_h - top
            for kw in range(KW):
                w = ow * stride_w + kw * dilation_w - left
                if 0 <= h < H and 0 <= w < W:
                    word |= words_BHWPN[b, h, w, p, n] ^ flips_P[p]
        out_BHWPN[b, oh, ow, p, n] = word ^ flips_P[p]

    return Kernel(pool, _SIGNATURE, THREADS)


@functools.cache
def binary_pool_kernel(N) -> Kernel:
    def binary_pool(
        out_BHWPN, words_BHWPN, flips_P, KH, KW, stride_h, stride_w, top, left, dilation_h, dilation_w
    ):  # fmt: skip
        B, OH, OW, P, _ = out_BHWPN.shape
        _, H, W, _, _ = words_BHWPN.shape
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i >= B * OH * OW * P:
            return
        rest, p = split(i, P)
        rest, ow = split(rest, OW)
        b, oh = split(rest, OH)
        largest = cuda.local.array(N, uint64)
        for n in range(N):
            largest[n] = 0
        for kh in range(KH):
            h = oh * stride_h + kh * dilation_h - top
            for kw in range(KW):
                w = ow * stride_w + kw * dilation_w - left
                if 0 <= h < H and 0 <= w < W:
                    greater = uint64(0)
                    decided = uint64(0)
                    for n in range(N):
                        word = words_BHWPN[b, h, w, p, n] ^ flips_P[p]
                        differ = word ^ largest[n]
                        greater |= differ & word & ~decided
                        decided |= differ
                    for n in range(N):
                        word = words_BHWPN[b, h, w, p, n] ^ flips_P[p]
                        largest[n] ^= (word ^ largest[n]) & greater
        for n in range(N):
            out_BHWPN[b, oh, ow, p, n] = largest[n] ^ flips_P[p]

    return Kernel(binary_pool, _SIGNATURE, THREADS)


def max_pool(out_BHWPN, words_BHWPN, flips_P, kernel_size, stride, padding, dilation, binary) -> torch.Tensor:
    """Fill `out`, whose shape says how many windows there are; all sizes are (height, width) pairs."""
    N = out_BHWPN.shape[-1]
    count, kernel = (out_BHWPN.numel() // N, binary_pool_kernel(N)) if binary else (out_BHWPN.numel(), pool_kernel())
    grid = -(-count // THREADS)
    kernel(grid, out_BHWPN, words_BHWPN, flips_P, *kernel_size, *stride, *padding, *dilation)
    return out_BHWPN


def main():
    from ..check import pool_rung
    from . import engine

    pool_rung("pool", engine, "cuda")


if __name__ == "__main__":
    main()
