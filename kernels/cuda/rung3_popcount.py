"""Rung 3. XOR and popcount, one thread an output, M x N convolutions one after the other. The first author's kernel.

    y = constant + sum_m sum_n alpha_m beta_n (C V - 2 popcount(a_n ^ w_m))

over the V taps that lie inside the image; the constant is the bias, less the level of zero if that stays zero; spare
channel bits are 0 in both words and cancel. 64 multiply-adds are one XOR, one popcount and one addition instead of 64
fused multiply-adds.

    words_BHWPN     uint64    activations, as the operator takes them
    weights_MOTP    uint64    T = KH * KW taps
    y_BOHW          float32

What limits it. Hopper counts 16 32-bit words a clock and SM: 16 * 32 = 512 binary multiply-adds, four times the float
units' 128 but half of the TF32 tensor core's 1024. So no kernel built on popcount beats cuDNN with TF32 at any M, N:
that is why the original lost. And this one does not even reach that bound: each of the M * N convolutions loads its
window again, 16 bytes for one 64-bit popcount.
"""

import functools

import torch
from numba import cuda

from .launch import Kernel, float32, int32, uint64
from .primitives import popcount, split

THREADS = 256


@functools.cache
def conv_kernel() -> Kernel:
    def conv_popcount(
        y_BOHW, words_BHWPN, poison_BHW, weights_MOTP, alphas_MO, betas_N, constants_GO, classes,
        C, KH, KW, stride_h, stride_w, top, left, dilation_h, dilation_w,
    ):  # fmt: skip
        B, O, OH, OW = y_BOHW.shape
        _, H, W, P, N = words_BHWPN.shape
        M = weights_MOTP.shape[0]
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i >= B * O * OH * OW:
            return
        rest, ow = split(i, OW)
        rest, oh = split(rest, OH)
        b, o = split(rest, O)
        y = constants_GO[classes[oh * OW + ow], o]
        for m in range(M):
            for n in range(N):
                total = int32(0)
                for kh in range(KH):
                    h = oh * stride_h + kh * dilation_h - top
                    for kw in range(KW):
                        w = ow * stride_w + kw * dilation_w - left
                        if 0 <= h < H and 0 <= w < W:
                            total += C
                            for p in range(P):
                                word = words_BHWPN[b, h, w, p, n] ^ weights_MOTP[m, o, kh * KW + kw, p]
                                total -= 2 * popcount(word)
                y += alphas_MO[m, o] * betas_N[n] * float32(total)
        for kh in range(KH):
            h = oh * stride_h + kh * dilation_h - top
            for kw in range(KW):
                w = ow * stride_w + kw * dilation_w - left
                if 0 <= h < H and 0 <= w < W:
                    y += poison_BHW[b, h, w]
        y_BOHW[b, o, oh, ow] = y

    signature = (
        float32[:, :, :, ::1], uint64[:, :, :, :, ::1], float32[:, :, ::1], uint64[:, :, :, ::1], float32[:, ::1],
        float32[::1], float32[:, ::1], int32[::1], *[int32] * 9,
    )  # fmt: skip
    return Kernel(conv_popcount, signature, THREADS)


def conv(layer, words_BHWPN, poison_BHW) -> torch.Tensor:
    B, H, W, _, _ = words_BHWPN.shape
    place = layer.place(H, W)
    y = place.output(B)
    top, _, left, _ = layer.padding
    conv_kernel()(
        -(-y.numel() // THREADS), y, words_BHWPN, poison_BHW, layer.weights_MOTP, layer.alphas_MO, layer.betas_N,
        place.constants_inside, place.classes, layer.C, layer.KH, layer.KW, *layer.stride, top, left, *layer.dilation,
    )  # fmt: skip
    return y


def main():
    from ..check import cuda_rung

    cuda_rung("rung3_popcount", conv)


if __name__ == "__main__":
    main()
