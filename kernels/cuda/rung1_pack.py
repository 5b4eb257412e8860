"""Rung 1. Compare and pack: floats in, one bit a channel and base out.

    bit c % 64 of word c // 64 is 1 where (x[b, c, h, w] >= thresholds[n, c]) != flips[c]

or, in the binary code, where an XOR of such comparisons is (layout.py): base n goes on from base n - 1, so that each
threshold is compared once.

    x_BCHW          float32   as torch lays it out, or channels_last: x_BHWC
    words_BHWPN     uint64    written as uint32 halves; spare bits 0
    poison_BHW      float32   0, or NaN where a pixel has a NaN in any channel

Two ways, one for each memory order, so that neighbouring threads always read neighbouring floats:

- `pack`: a thread owns a pixel and 32 channels and shifts one comparison after the other into a register per base.
- `pack_channels_last`: a warp owns a pixel, a thread a channel; the bits of 32 threads are one word at once: `ballot`.

NaN. Bits can't say it, and asking the host would cost a synchronization a layer. So it travels as `poison`: the
convolutions add the poison of all pixels under a window to its output, which is what the float simulation gives.

Traffic: 4 bytes read and N / 8 written a value. At 4.3 TB/s that is 0.9 ps + 0.03 N ps each: memory-bound up to N of
about 5, and as much traffic as one elementwise float operation. Fusion (rung 8) leaves out both the write and this
read.
"""

import functools

import torch
from numba import cuda

from ..layout import check_thresholds, words_of
from .launch import Kernel, float32, int32, pointer, uint8, uint32
from .primitives import ballot, split

THREADS = 256

_SIGNATURE = (
    pointer(uint32), pointer(float32), pointer(float32), pointer(float32), pointer(uint8), int32, int32, int32, int32
)  # fmt: skip


@functools.cache
def pack_kernel(N, T) -> Kernel:
    def pack(words, poison, x, thresholds, flips, pixels, C, image, P):
        pixel = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        half = cuda.blockIdx.y
        if pixel >= pixels:
            return
        b, place = split(pixel, image)
        at = (b * C + half * 32) * image + place
        bits = cuda.local.array(N, uint32)
        for n in range(N):
            bits[n] = 0
        for k in range(32):
            c = half * 32 + k
            if c < C:
                value = x[at + k * image]
                flip = flips[c] != 0
                bit = flip
                for n in range(N):
                    if T == N:
                        bit = (value >= thresholds[n * C + c]) != flip
                    else:
                        for t in range((1 << (N - 1 - n)) - 1, T, 1 << (N - n)):  # layout.own_thresholds
                            bit = bit != (value >= thresholds[t * C + c])
                    if bit:
                        bits[n] = uint32(bits[n] | uint32(1 << k))
                if value != value:
                    poison[pixel] = value
        for n in range(N):
            words[((pixel * P + half // 2) * N + n) * 2 + half % 2] = bits[n]

    return Kernel(pack, _SIGNATURE, THREADS)


@functools.cache
def pack_channels_last_kernel(N, T) -> Kernel:
    def pack_channels_last(words, poison, x, thresholds, flips, pixels, C, image, P):
        lane = cuda.threadIdx.x % 32
        pixel = (cuda.blockIdx.x * THREADS + cuda.threadIdx.x) // 32
        if pixel >= pixels:  # a whole warp leaves or none of it: ballot needs all 32 threads
            return
        for half in range(2 * P):
            c = half * 32 + lane
            value = float32(0)
            flip = False
            if c < C:
                value = x[pixel * C + c]
                flip = flips[c] != 0
            bit = flip
            for n in range(N):
                if c < C:
                    if T == N:
                        bit = (value >= thresholds[n * C + c]) != flip
                    else:
                        for t in range((1 << (N - 1 - n)) - 1, T, 1 << (N - n)):
                            bit = bit != (value >= thresholds[t * C + c])
                word = ballot(bit)
                if lane == n % 32:
                    words[((pixel * P + half // 2) * N + n) * 2 + half % 2] = word
            if value != value:
                poison[pixel] = value

    return Kernel(pack_channels_last, _SIGNATURE, THREADS)


def pack(x_BCHW, thresholds_TC, flips_C, bases) -> tuple:
    """(words_BHWPN, poison_BHW) of a float32 tensor in either memory order, in the code that has T thresholds.

    Raises: ValueError unless T is N = `bases` or 2^N - 1.
    """
    B, C, H, W = x_BCHW.shape
    N, T, P = bases, len(thresholds_TC), words_of(C)
    check_thresholds(N, T)
    words = torch.empty(B, H, W, P, N, dtype=torch.int64, device=x_BCHW.device)
    poison = torch.zeros(B, H, W, dtype=torch.float32, device=x_BCHW.device)
    pixels = B * H * W
    constants = thresholds_TC.float().contiguous(), flips_C.contiguous().view(torch.uint8)
    if not x_BCHW.is_contiguous() and x_BCHW.is_contiguous(memory_format=torch.channels_last):
        kernel, grid, x = pack_channels_last_kernel(N, T), -(-pixels // (THREADS // 32)), x_BCHW.permute(0, 2, 3, 1)
    else:
        kernel, grid, x = pack_kernel(N, T), (-(-pixels // THREADS), 2 * P), x_BCHW.contiguous()
    kernel(grid, words, poison, x, *constants, pixels, C, H * W, P)
    return words, poison


def main():
    """Check both orders against the words' definition, then time one."""
    from ..check import GPU, Shape, demonstrate, problem_in_pack

    def calls():
        shape = Shape(128, 128, 3, 28, 1, B=64)
        thresholds, flips = torch.randn(3, shape.C, device=GPU), torch.zeros(shape.C, dtype=torch.bool, device=GPU)
        images = [shape.images(seed, GPU) for seed in range(8)]
        size = images[0].numel() * (4 + 3 / 8)
        return {f"{shape.B} x {shape.C} x 28x28, N = 3": (lambda x: pack(x, thresholds, flips, 3), images, 0, size)}

    demonstrate("rung1_pack", lambda: problem_in_pack(pack), calls, "cuda")


if __name__ == "__main__":
    main()
