"""Rung 7. Hopper's own form of it: wgmma m64nNk256 (sm_90a), four warps and 64 x 128 x 256 AND-multiply-adds at once.

The convolution of rung 6 with another inner loop. Activations still come by `ldmatrix`, since each pixel's row lies
where its window does, and go into registers; the weights are read by the tensor core itself, straight from shared
memory, which takes a third of rung 6's ldmatrix traffic away and, if the b1 rate follows int8's as fp16's does,
doubles the rate: 32 000 a clock and SM would be 8 times int8. Nobody has published it; `bench` measures it
first.

    shared    weights    [2][K granule][channel] of 16 bytes: 8 channels of one granule are a core matrix, 128 bytes

A matrix descriptor says where they are: bits 0-13 the address, 16-29 the distance of the two granules of a step (the
leading dimension), 32-45 that of the next 8 channels (the stride), all in units of 16 bytes; no swizzle.

A chain of wgmmas is one block of PTX (see ptx.py), of at most 6 steps, since their activations must all be
in registers by then: 64 counters, 64 sums y and 24 activation words a thread. While one of a block's two groups of four
warps loads and scales, the other multiplies.

Layouts in global memory, epilogues and tables are those of rungs 6 and 8, except the order of the weights.
"""

import functools

import numpy as np
from numba import cuda

from .launch import Kernel, float32, int32, int64, uint32, uint64
from .primitives import (
    cp_async16,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_but_one,
    fence_async_proxy,
    ldmatrix_x4,
    make_wgmma_b1_chain,
    shared_address,
    split,
)
from .rung6_tensorcore import (
    ZERO_BITS,
    Tile,
    add_constants,
    add_scaled,
    arguments,
    choose_tile,
    describe_rows,
    float_output,
    pixel_words,
    signature,
    stage_band,
    sum_pixels,
)

TILES = (Tile(128, 128, 8, 1), Tile(64, 128, 4, 1), Tile(64, 64, 4, 1))
LONGEST_CHAIN = 6


@functools.cache
def conv_kernel(tile: Tile, chain_steps: int, output=float_output, out_type=float32) -> Kernel:
    PIXELS, CHANNELS, WARPS_DOWN, _ = tile
    THREADS = tile.threads
    ACROSS = CHANNELS // 8
    COUNTS, ALPHAS, A = ACROSS * 4, ACROSS * 2, chain_steps * 4
    # One granule of all channels, and the next 8 channels, in units of 16 bytes.
    DESCRIPTOR = (CHANNELS << 16) | (8 << 32)
    finish = output(1, ACROSS)
    multiply = make_wgmma_b1_chain(CHANNELS, chain_steps)

    def conv_wgmma(
        out, words, poison, weights, granules, alphas, alpha_sums, constants, betas, classes, taps, thresholds, flips,
        B, H, W, C, P, N, M, O, T, top, left, stride_h, stride_w, padded_width, padded_image, out_width, out_image,
        pixels, padded_O, steps, band, pixel_words, chains, zero, pairs, out_bases,
    ):  # fmt: skip
        shared = cuda.shared.array(0, uint32)
        floats = cuda.shared.array(0, float32)
        thread = cuda.threadIdx.x
        lane = thread % 32
        warp = thread // 32
        first_pixel = cuda.blockIdx.x * PIXELS
        first_channel = cuda.blockIdx.y * CHANNELS
        plane = band * pixel_words
        buffer = steps * 8 * CHANNELS
        planes_at = min(M, 2) * buffer  # weights come first: descriptors want their address aligned
        sums_at = planes_at + N * plane
        rows_at = sums_at + band

        b, place = split(first_pixel, out_image)
        oh, ow = split(place, out_width)
        first = int64(b) * padded_image + oh * stride_h * padded_width + ow * stride_w
        stage_band(
            shared[planes_at:], floats[planes_at:], words, poison, thread, THREADS, first, band, plane, pixel_words,
            N * plane, B, H, W, P, N, padded_width, padded_image, top, left, pairs,
        )  # fmt: skip
        cp_async_commit()
        for unit in range(thread, steps * 2 * CHANNELS, THREADS):
            cp_async16(shared, 4 * unit, weights, cuda.blockIdx.y * buffer + 4 * unit, True)
        cp_async_commit()
        cp_async_wait_but_one()
        cuda.syncthreads()
        sum_pixels(
            shared[planes_at:], floats[planes_at:], betas, thread, THREADS, band, plane, pixel_words, N * plane, C, P, N
        )
        cuda.syncthreads()
        describe_rows(
            shared, floats, classes, taps, thread, THREADS, PIXELS, first_pixel, pixels, first, pixel_words, sums_at,
            rows_at, padded_O, T, out_width, out_image, stride_h, stride_w, padded_width, padded_image,
        )  # fmt: skip

        y = cuda.local.array(COUNTS, float32)
        counts = cuda.local.array(COUNTS, int32)
        a = cuda.local.array(A, uint32)
        alpha = cuda.local.array(ALPHAS, float32)
        for i in range(COUNTS):
            y[i] = float32(0)
        channel = first_channel + lane % 4 * 2
        which = lane // 16
        a_row = uint32(0)

        for m in range(M):
            cp_async_wait_all()
            fence_async_proxy()  # what cp.async wrote, the tensor core may read
            cuda.syncthreads()
            if m == 0:
                a_row = shared_address(shared, planes_at + shared[rows_at + warp * 16 + lane % 16])
            if m + 1 < M:
                tile_at = int64((m + 1) * (padded_O // CHANNELS) + cuda.blockIdx.y) * buffer
                for unit in range(thread, steps * 2 * CHANNELS, THREADS):
                    cp_async16(shared, (m + 1) % 2 * buffer + 4 * unit, weights, tile_at + 4 * unit, True)
                cp_async_commit()
            for j in range(ACROSS):
                for q in range(2):
                    alpha[2 * j + q] = alphas[m * padded_O + channel + 8 * j + q]
            for n in range(N):
                for i in range(COUNTS):
                    counts[i] = int32(zero)
                descriptor = uint64(shared_address(shared, m % 2 * buffer) // 16) + uint64(DESCRIPTOR)
                for chain in range(chains):
                    for step in range(chain_steps):
                        tap = granules[2 * (chain * chain_steps + step) + which]
                        ldmatrix_x4(a, 4 * step, shared, uint32(a_row + n * plane * 4 + tap))
                    multiply(counts, a, shared, descriptor, uint64(2 * CHANNELS), int32(1))
                    descriptor = uint64(descriptor + uint64(2 * CHANNELS * chain_steps))
                add_scaled(y, counts, alpha, betas[n], 1, ACROSS)

        add_constants(y, shared, floats, constants, alpha_sums, rows_at + warp * 16, PIXELS, channel, lane, 1, ACROSS)
        warp_pixel = first_pixel + warp * 16
        finish(out, y, warp_pixel, channel, lane, pixels, O, out_image, thresholds, flips, out_bases, padded_O)

    return Kernel(conv_wgmma, signature(out_type), THREADS)


def core_matrices(rows_MGOSg4: np.ndarray) -> np.ndarray:
    """Weight rows (M, tiles, channels, steps, 2 granules, 4 words) in the order of the tensor core's core matrices."""
    return np.ascontiguousarray(rows_MGOSg4.transpose(0, 1, 3, 4, 2, 5))


def chain_length(steps: int) -> int:
    """The most steps, at most LONGEST_CHAIN, that divide a tile's evenly."""
    return max(length for length in range(1, LONGEST_CHAIN + 1) if steps % length == 0)


def shared_bytes(layer, place, batch, tile) -> int:
    band = place.band(batch, tile.pixels)
    weights = min(layer.M, 2) * layer.steps * 8 * tile.channels
    return 4 * (layer.N * band * pixel_words(layer) + weights + band + 3 * tile.pixels)


def conv(layer, words_BHWPN, poison_BHW, tile=None, output=float_output, out_thresholds_NO=None, out_flips_O=None):
    """y, or the next layer's words with `output` = rung8_fused.bits_output; None where no tile fits."""
    B, H, W, _, _ = words_BHWPN.shape
    place = layer.place(H, W)
    tile = tile or choose_tile(layer, place, B, TILES, shared_bytes)
    if tile is None:
        return None
    tensors, numbers = arguments(layer, place, B)
    steps = chain_length(layer.steps)
    if out_thresholds_NO is None:
        out, out_type, bases, channels = place.output(B), float32, 0, layer.O
        out_thresholds_NO, out_flips_O = poison_BHW, layer.no_flips
    else:
        bases, channels = len(out_thresholds_NO), 64 * -(-layer.O // 64)
        out, out_type = place.output_words(B, bases), uint32
    grid = -(-place.out_pixels * B // tile.pixels), -(-channels // tile.channels)
    conv_kernel(tile, steps, output, out_type)(
        grid, out, words_BHWPN, poison_BHW, layer.tiles(tile.channels, core_matrices), *tensors, out_thresholds_NO,
        out_flips_O, *numbers, place.band(B, tile.pixels), pixel_words(layer), layer.steps // steps,
        ZERO_BITS - layer.center_and, int(layer.pairs), bases, shared=shared_bytes(layer, place, B, tile),
    )  # fmt: skip
    return out


def main():
    from ..check import cuda_rung

    cuda_rung("rung7_wgmma", conv)


if __name__ == "__main__":
    main()
