"""Rung 8. Bits in, bits out: BatchNorm, ReLU and the next layer's thresholds in the epilogue. The original's future
work.

What a packed layer hands on is not y but which of N' thresholds y reaches, and BatchNorm and ReLU in between only move
those thresholds (abcnets.fuse folds them, a threshold a channel and a direction):

    bit = (y[o] >= out_thresholds[n, o]) != out_flips[o]

So the main loop is that of rung 6 (or 7), and only the epilogue differs: a thread holds two neighbouring channels of
each 8 x 16 tile, so four threads hold 8 bits and four tiles 32. They are shifted into place and joined by two
shuffles.

    out_BHWPN    uint64    the contract's words, P = ceil(O / 64): what the next layer takes. Spare bits are 0: their
                           thresholds are +infinity.

Traffic. The float result of a 128 x 128 tile is 65 536 bytes to write, as many for the next layer to read, and an
unfused BatchNorm and ReLU read and write it again; the bits are 2048 N'. At 19 bytes a clock and SM, writing floats
takes 3400 clocks, and the arithmetic, for 3 x 3 x 128 at M = N = 1, 1185 (at the reported rate): fused it is the
arithmetic that counts.
"""

import functools

import torch
from torch.nn import functional

from .launch import uint32
from .layer import PADDED_TO
from .primitives import device, shuffle_xor, split
from .rung6_tensorcore import (
    ZERO_BITS,
    arguments,
    choose_tile,
    conv_kernel,
    pixel_words,
    row_words,
    shared_bytes,
)


@functools.cache
def bits_output(down, across):
    """The epilogue of a warp with `down` x `across` tiles of 16 x 8: y against thresholds, as words."""
    words = across // 4

    @device
    def finish(out, y, first_pixel, channel, lane, pixels, O, image, thresholds, flips, bases, padded_O):
        quarter = lane % 4 * 2
        P, _ = split(O + 63, 64)
        for n in range(bases):
            for i in range(down):
                for half in range(2):
                    pixel = first_pixel + i * 16 + half * 8 + lane // 4
                    for word in range(words):
                        bits = uint32(0)
                        for j in range(4):
                            for q in range(2):
                                o = channel + word * 32 + j * 8 + q
                                at = (i * across + word * 4 + j) * 4 + half * 2 + q
                                above = y[at] >= thresholds[n * padded_O + o]
                                if above != (flips[o] != 0):
                                    bits = uint32(bits | uint32(1 << (8 * j + q)))
                        bits = uint32(bits << uint32(quarter))
                        bits = uint32(bits | shuffle_xor(bits, 1))
                        bits = uint32(bits | shuffle_xor(bits, 2))
                        first = channel - quarter + word * 32
                        if quarter == 0 and pixel < pixels and first < 64 * P:
                            out[((pixel * P + first // 64) * bases + n) * 2 + first // 32 % 2] = bits

    return finish


def conv(layer, words_BHWPN, poison_BHW, out_thresholds_NO, out_flips_O, tile=None):
    """The next layer's words, or None where no tile fits into shared memory.

    Thresholds and flips are those that `pad_outputs` returns.
    """
    B, H, W, _, _ = words_BHWPN.shape
    place = layer.place(H, W)
    tile = tile or choose_tile(layer, place, B)
    if tile is None:
        return None
    bases = len(out_thresholds_NO)
    out = place.output_words(B, bases)
    tensors, numbers = arguments(layer, place, B)
    grid = -(-place.out_pixels * B // tile.pixels), -(-64 * out.shape[3] // tile.channels)
    conv_kernel(tile, bits_output, uint32)(
        grid, out, words_BHWPN, poison_BHW, layer.rows, *tensors, out_thresholds_NO, out_flips_O, *numbers,
        place.band(B, tile.pixels), pixel_words(layer), row_words(layer), ZERO_BITS - layer.center_and,
        int(layer.pairs), bases, shared=shared_bytes(layer, place, B, tile),
    )  # fmt: skip
    return out


def pad_outputs(out_thresholds, out_flips) -> tuple:
    """Thresholds (N', O') and flips (O',) as the kernel reads them; the added channels are never set."""
    spare = -out_thresholds.shape[1] % PADDED_TO
    thresholds = functional.pad(out_thresholds.to(torch.float32, copy=True), (0, spare), value=float("inf"))
    return thresholds.contiguous(), functional.pad(out_flips.to(torch.uint8), (0, spare)).contiguous()


def main():
    from ..check import cuda_rung

    cuda_rung("rung8_fused", conv, bits=True)


if __name__ == "__main__":
    main()
