"""Rung 2. The naive float convolution: one thread an output, nothing reused. The first author's yardstick.

    y[b, o, h, w] = bias[o] + sum_{c, kh, kw} x[b, c, h * stride + kh * dilation - top, ...] * w[o, c, kh, kw]

    x_BCHW, w_OCKK, y_BOHW    float32, as torch lays them out

Neighbouring threads own neighbouring pixels of one output channel: loads of x are coalesced, those of w are one
address for the whole warp. Every multiply-add loads both its operands: 8 bytes for 2 operations. The L1 cache
delivers 128 bytes a clock and SM, so at most 32 multiply-adds (w is one broadcast) of the 128 that the float units
could do: a quarter of 67 TFLOP/s, before index arithmetic takes its share.

Quantized operands give what the packed layer computes: conv(Aq, Wq), by linearity (see abcnets.py).
"""

import functools

import torch
from numba import cuda

from .launch import Kernel, float32, int32
from .primitives import split

THREADS = 256


@functools.cache
def conv_kernel() -> Kernel:
    def conv_float(y_BOHW, x_BCHW, w_OCKK, bias_O, stride_h, stride_w, top, left, dilation_h, dilation_w):
        B, O, OH, OW = y_BOHW.shape
        _, C, H, W = x_BCHW.shape
        _, _, KH, KW = w_OCKK.shape
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i >= B * O * OH * OW:
            return
        rest, ow = split(i, OW)
        rest, oh = split(rest, OH)
        b, o = split(rest, O)
        total = bias_O[o]
        for kh in range(KH):
            h = oh * stride_h + kh * dilation_h - top
            for kw in range(KW):
                w = ow * stride_w + kw * dilation_w - left
                if 0 <= h < H and 0 <= w < W:
                    for c in range(C):
                        total += x_BCHW[b, c, h, w] * w_OCKK[o, c, kh, kw]
        y_BOHW[b, o, oh, ow] = total

    array = float32[:, :, :, ::1]
    return Kernel(conv_float, (array, array, array, float32[::1], *[int32] * 6), THREADS)


def conv(layer, Aq_BCHW, Wq_OCKK) -> torch.Tensor:
    """The layer's float simulation: conv(Aq, Wq) + bias."""
    B, _, H, W = Aq_BCHW.shape
    y = layer.place(H, W).output(B)
    top, _, left, _ = layer.padding
    conv_kernel()(
        -(-y.numel() // THREADS), y, Aq_BCHW, Wq_OCKK, layer.bias_O, *layer.stride, top, left, *layer.dilation
    )  # fmt: skip
    return y


def main():
    from ..check import GPU, Shape, demonstrate, layer_of, problem_in_float_conv

    def calls():
        shape = Shape(128, 128, 3, 28, 1, B=32)
        layer, w = layer_of(shape.layer(1, 1, device=GPU)), torch.randn(128, 128, 3, 3, device=GPU)
        images = [shape.images(seed, GPU) for seed in range(4)]
        return {str(shape): (lambda x: conv(layer, x, w), images, shape.macs, 0)}

    demonstrate("rung2_float", lambda: problem_in_float_conv(conv), calls, "cuda")


if __name__ == "__main__":
    main()
