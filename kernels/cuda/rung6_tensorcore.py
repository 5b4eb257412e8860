"""Rung 6. The binary tensor core: one instruction, mma.sync m16n8k256, is 32 768 AND-multiply-adds.

The convolution becomes a matrix product without ever forming the matrix (no im2col). A block computes 128 neighbouring
output pixels x 128 output channels (smaller tiles where there are few). What the windows of its pixels touch is one
contiguous run of padded pixels, the band. It is loaded into shared memory once, and `ldmatrix`, which takes an address
for each row it loads, finds each pixel's row for each tap in there: any stride, dilation and width.

    y = 4 sum_mn alpha_m beta_n (popc(a_n & w_m) - k) - (sum_m alpha_m) S + constant[class]    see layer.py

    global    words_BHWPN as the operator takes them, poison_BHW, weight rows [M][O'][K bits], constants (classes, O')
    shared    band planes   [N][band pixels][granules]      16 bytes a granule; the zero padding is written here
              weights       [2][channels][K granules]       of one base m; the next arrives meanwhile (cp.async)
              sums          [band pixels]                   sum_n beta_n (2 popc(a_n) - C), plus the pixel's poison
              row tables    [3][pixels of the tile]         where its window begins, its border constants, its sum S
    registers counts, y     a warp: 64 pixels x 32 channels

Rows of shared memory are an odd number of 16-byte units long, so that the 8 rows of an ldmatrix tile fall into
different banks. Integer counters start at the bits of the float 1.5 * 2^23: read as a float they are 1.5 * 2^23 +
count, so that scaling them needs no conversion instruction (16 a clock).

Arithmetic. Reported rate on Hopper: 17 700 binary multiply-adds a clock and SM (a public microbenchmark; `bench`
measures it), 35 times the popcount unit and 8.6 times fp16. A step of a warp, 64 x 32 x 256, is 16 BMMA (119 clocks
of the warp's tensor core at that rate) fed by 6 ldmatrix (24 clocks of the SM's shared memory for each warp, 96 a
step of four): close to balance, the tensor core ahead. Scaling costs 128 float operations a warp, m and n; for 3 x 3
x 128 channels (5 steps) 128 issue slots beside 595 clocks. Bytes: at M = N = 1 writing the float result, 64 KB a
tile, takes three times as long as computing it, at 19 bytes a clock and SM (4.3 TB/s): hence rung 8.
"""

import functools
from typing import NamedTuple

import torch
from numba import cuda

from .launch import Kernel, float32, int32, int64, pointer, shared_memory_limit, uint8, uint32
from .primitives import (
    cp_async8,
    cp_async16,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_but_one,
    device,
    float_bits,
    ldmatrix_x4,
    mma_b1,
    popcount,
    shared_address,
    split,
)

ZERO, ZERO_BITS = 1.5 * 2**23, 0x4B400000  # a float whose last bit is worth 1, with room for +-2^22, and its bits
PADDING = -1.0  # stands where a pixel of the image has its poison, which is 0 or NaN


class Tile(NamedTuple):
    """A block's share of the work, and how its warps share that: pixels x channels, warps_down x warps_across."""

    pixels: int
    channels: int
    warps_down: int
    warps_across: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_down * self.warps_across


TILES = (Tile(128, 128, 2, 4), Tile(128, 64, 2, 2), Tile(64, 128, 1, 4), Tile(64, 64, 1, 2), Tile(64, 32, 4, 1))


# ------------------------------------------------------------------ loading and summing, shared with rungs 7 and 8


@device
def stage_band(
    shared, floats, words, poison, thread, threads, first, band, plane, pixel_words, sums_at,
    B, H, W, P, N, padded_width, padded_image, top, left, pairs,
):  # fmt: skip
    """Start copying the band into its planes, zeros where it is padding, and each pixel's poison.

    A pixel's P N words lie together in memory: as many threads take one pixel. With `pairs` a word is copied twice, to
    its own pixel's granule and to the second half of its left neighbour's.
    """
    abreast = min(P * N, threads)
    group, part = split(thread, abreast)
    groups, _ = split(threads, abreast)
    i = int64(group) if group < groups else int64(band)  # the threads left over, too few for a pixel, are idle
    while i < band:
        b, rest = split(first + i, padded_image)
        row, column = split(rest, padded_width)
        h = int64(row) - top
        w = int64(column) - left
        inside = b < B and 0 <= h < H and 0 <= w < W
        pixel = (int64(b) * H + h) * W + w if inside else int64(0)
        if part == 0:
            floats[sums_at + i] = poison[pixel] if inside else float32(PADDING)
        k = int64(part)
        while k < P * N:
            p, n = split(k, N)
            at = n * plane + i * pixel_words + 2 * p
            cp_async8(shared, at, words, (pixel * P * N + k) * 2, inside)
            if pairs and i > 0:
                cp_async8(shared, at - pixel_words + 2, words, (pixel * P * N + k) * 2, inside)
            k += abreast
        i += groups


@device
def stage_weights(shared, at, row_words, weights, source, channels, steps, thread, threads):
    """Start copying the rows of one base and tile, `steps` times two granules each."""
    for unit in range(thread, channels * 2 * steps, threads):
        row, k = split(unit, 2 * steps)
        cp_async16(shared, at + row * row_words + 4 * k, weights, source + 4 * unit, True)


@device
def sum_pixels(shared, floats, betas, thread, threads, band, plane, pixel_words, sums_at, C, P, N):
    """sums[i] = poison + sum_n beta_n (2 popc(a_n) - C) of each pixel of the band, 0 where it is padding."""
    for i in range(thread, band, threads):
        total = floats[sums_at + i]
        if total == float32(PADDING):
            total = float32(0)
        else:
            for n in range(N):
                at = n * plane + i * pixel_words
                count = int32(0)
                for k in range(2 * P):
                    count += popcount(shared[at + k])
                total += betas[n] * float32(2 * count - C)
        floats[sums_at + i] = total


@device
def describe_rows(
    shared, floats, classes, taps, thread, threads, rows, first_pixel, pixels, first, pixel_words, sums_at, rows_at,
    padded_O, T, out_width, out_image, stride_h, stride_w, padded_width, padded_image,
):  # fmt: skip
    """For each output pixel of the tile: where its window begins, where its constants begin, its sum S."""
    for row in range(thread, rows, threads):
        b, place = split(min(first_pixel + row, pixels - 1), out_image)
        oh, ow = split(place, out_width)
        start = int64(b) * padded_image + oh * stride_h * padded_width + ow * stride_w - first
        total = float32(0)
        for t in range(T):
            total += floats[sums_at + start + taps[t]]
        shared[rows_at + row] = uint32(start * pixel_words)
        shared[rows_at + rows + row] = uint32(classes[place] * padded_O)
        floats[rows_at + 2 * rows + row] = total


@device
def add_scaled(y, counts, alpha, beta, down, across):
    """y += alpha beta counts, where a counter's bits are those of the float ZERO + count."""
    for i in range(down):
        for j in range(across):
            for q in range(4):
                at = (i * across + j) * 4 + q
                y[at] += alpha[2 * j + q % 2] * beta * (float_bits(counts[at]) - float32(ZERO))


@device
def add_constants(y, shared, floats, constants, alpha_sums, rows_at, rows, channel, lane, down, across):
    """y += constant[class] - (sum_m alpha_m) S, with the row tables of the warp's pixels at rows_at."""
    for i in range(down):
        for half in range(2):
            row = rows_at + i * 16 + half * 8 + lane // 4
            constant = shared[row + rows] + channel
            total = floats[row + 2 * rows]
            for j in range(across):
                for q in range(2):
                    o = 8 * j + q
                    y[(i * across + j) * 4 + half * 2 + q] += constants[constant + o] - alpha_sums[channel + o] * total


@functools.cache
def float_output(down, across):
    """The epilogue of a warp with `down` x `across` tiles of 16 x 8: y to memory, as torch lays it out."""

    @device
    def finish(out, y, first_pixel, channel, lane, pixels, O, image, thresholds, flips, bases, padded_O):
        for i in range(down):
            for half in range(2):
                pixel = first_pixel + i * 16 + half * 8 + lane // 4
                if pixel < pixels:
                    b, place = split(pixel, image)
                    at = int64(b) * O * image + place
                    for j in range(across):
                        for q in range(2):
                            o = channel + j * 8 + q
                            if o < O:
                                out[at + o * image] = y[(i * across + j) * 4 + half * 2 + q]

    return finish


def signature(out):
    """What the kernels of rungs 6, 7 and 8 take; `out` is the type of the result's elements."""
    words, floats, ints = pointer(uint32), pointer(float32), pointer(int32)
    return (
        pointer(out), words, floats, words, ints, floats, floats, floats, floats, ints, ints, floats, pointer(uint8),
        *[int32] * 26,
    )  # fmt: skip


# ------------------------------------------------------------------ the kernel


@functools.cache
def conv_kernel(tile: Tile, output=float_output, out_type=float32) -> Kernel:
    PIXELS, CHANNELS, WARPS_DOWN, WARPS_ACROSS = tile
    THREADS = tile.threads
    DOWN, ACROSS = PIXELS // WARPS_DOWN // 16, CHANNELS // WARPS_ACROSS // 8  # m16n8 tiles of a warp
    COUNTS, A, B_, HALF_ACROSS, ALPHAS = DOWN * ACROSS * 4, DOWN * 4, ACROSS * 2, ACROSS // 2, ACROSS * 2
    finish = output(DOWN, ACROSS)

    def conv_tensorcore(
        out, words, poison, weights, granules, alphas, alpha_sums, constants, betas, classes, taps, thresholds, flips,
        B, H, W, C, P, N, M, O, T, top, left, stride_h, stride_w, padded_width, padded_image, out_width, out_image,
        pixels, padded_O, steps, band, pixel_words, row_words, zero, pairs, out_bases,
    ):  # fmt: skip
        shared = cuda.shared.array(0, uint32)
        floats = cuda.shared.array(0, float32)
        thread = cuda.threadIdx.x
        lane = thread % 32
        warp_down = thread // 32 % WARPS_DOWN
        warp_across = thread // 32 // WARPS_DOWN
        first_pixel = cuda.blockIdx.x * PIXELS
        first_channel = cuda.blockIdx.y * CHANNELS
        plane = band * pixel_words
        weights_at = N * plane
        buffer = CHANNELS * row_words
        sums_at = weights_at + min(M, 2) * buffer
        rows_at = sums_at + band

        b, place = split(first_pixel, out_image)
        oh, ow = split(place, out_width)
        first = int64(b) * padded_image + oh * stride_h * padded_width + ow * stride_w
        stage_band(
            shared, floats, words, poison, thread, THREADS, first, band, plane, pixel_words, sums_at,
            B, H, W, P, N, padded_width, padded_image, top, left, pairs,
        )  # fmt: skip
        cp_async_commit()
        stage_weights(
            shared, weights_at, row_words, weights, first_channel * steps * 8, CHANNELS, steps, thread, THREADS
        )
        cp_async_commit()
        cp_async_wait_but_one()
        cuda.syncthreads()
        sum_pixels(shared, floats, betas, thread, THREADS, band, plane, pixel_words, sums_at, C, P, N)
        cuda.syncthreads()
        describe_rows(
            shared, floats, classes, taps, thread, THREADS, PIXELS, first_pixel, pixels, first, pixel_words, sums_at,
            rows_at, padded_O, T, out_width, out_image, stride_h, stride_w, padded_width, padded_image,
        )  # fmt: skip

        y = cuda.local.array(COUNTS, float32)
        counts = cuda.local.array(COUNTS, int32)
        a = cuda.local.array(A, uint32)
        w = cuda.local.array(B_, uint32)
        alpha = cuda.local.array(ALPHAS, float32)
        a_rows = cuda.local.array(DOWN, uint32)
        w_rows = cuda.local.array(HALF_ACROSS, uint32)
        for i in range(COUNTS):
            y[i] = float32(0)
        channel = first_channel + warp_across * (ACROSS * 8) + lane % 4 * 2
        # ldmatrix loads tile t from the rows that threads 8 t .. 8 t + 7 point at. Activations: tiles 0 and 1 are the
        # upper and lower 8 pixels of the first granule, 2 and 3 of the second. Weights: two granules of 8 channels,
        # then of 8 more.
        which = lane // 16
        row = warp_across * (ACROSS * 8) + lane // 16 * 8 + lane % 8
        for j in range(HALF_ACROSS):
            at = weights_at + (row + 16 * j) * row_words + lane // 8 % 2 * 4
            w_rows[j] = shared_address(shared, at)

        for m in range(M):
            cp_async_wait_all()
            cuda.syncthreads()
            if m == 0:
                for i in range(DOWN):
                    at = shared[rows_at + (warp_down * DOWN + i) * 16 + lane % 16]
                    a_rows[i] = shared_address(shared, at)
            if m + 1 < M:
                stage_weights(
                    shared, weights_at + (m + 1) % 2 * buffer, row_words, weights,
                    (int64(m + 1) * padded_O + first_channel) * steps * 8, CHANNELS, steps, thread, THREADS,
                )  # fmt: skip
                cp_async_commit()
            for j in range(ACROSS):
                for q in range(2):
                    alpha[2 * j + q] = alphas[m * padded_O + channel + 8 * j + q]
            for n in range(N):
                for i in range(COUNTS):
                    counts[i] = int32(zero)
                a_offset = uint32(n * plane * 4)
                w_offset = uint32(m % 2 * buffer * 4)
                tap = uint32(granules[which])
                for step in range(steps):
                    a_at = uint32(a_offset + tap)
                    tap = uint32(granules[2 * step + 2 + which])  # the next step's, so that nothing waits for it
                    for i in range(DOWN):
                        ldmatrix_x4(a, 4 * i, shared, uint32(a_rows[i] + a_at))
                    for j in range(HALF_ACROSS):
                        ldmatrix_x4(w, 4 * j, shared, uint32(w_rows[j] + w_offset))
                    w_offset = uint32(w_offset + uint32(32))
                    for i in range(DOWN):
                        for j in range(ACROSS):
                            mma_b1(counts, (i * ACROSS + j) * 4, a, 4 * i, w, 2 * j)
                add_scaled(y, counts, alpha, betas[n], DOWN, ACROSS)

        rows_at += warp_down * (DOWN * 16)
        add_constants(y, shared, floats, constants, alpha_sums, rows_at, PIXELS, channel, lane, DOWN, ACROSS)
        warp_pixel = first_pixel + warp_down * (DOWN * 16)
        finish(out, y, warp_pixel, channel, lane, pixels, O, out_image, thresholds, flips, out_bases, padded_O)

    return Kernel(conv_tensorcore, signature(out_type), THREADS)


# ------------------------------------------------------------------ the launcher


def pixel_words(layer) -> int:
    """Words of shared memory a pixel of a plane: an odd number of 16-byte granules."""
    return (layer.granules_per_pixel | 1) * 4


def row_words(layer) -> int:
    """Words of shared memory a weight row: an odd number of 16-byte granules."""
    return (2 * layer.steps + 1) * 4


def shared_bytes(layer, place, batch, tile) -> int:
    band = place.band(batch, tile.pixels)
    weights = min(layer.M, 2) * tile.channels * row_words(layer)
    return 4 * (layer.N * band * pixel_words(layer) + weights + band + 3 * tile.pixels)


def choose_tile(layer, place, batch, tiles=TILES, bytes_needed=shared_bytes):
    """The tile whose blocks, dealt out to the multiprocessors, take the least work each; None where none fits."""
    limit = shared_memory_limit(layer.device)
    processors = 132
    if layer.device.type == "cuda":
        processors = torch.cuda.get_device_properties(layer.device).multi_processor_count
    pixels = batch * place.out_pixels

    def work(tile):
        blocks = -(-pixels // tile.pixels) * -(-layer.O // tile.channels)
        warp_area = tile.pixels * tile.channels * 32 // tile.threads
        clumsy = 1.0 if warp_area >= 2048 else 1.5  # a small warp tile loads more than it computes
        return -(-blocks // processors) * tile.pixels * tile.channels * clumsy

    fitting = [tile for tile in tiles if bytes_needed(layer, place, batch, tile) <= limit]
    return min(fitting, key=work, default=None)


def arguments(layer, place, batch):
    """What the kernels take after `words, poison, weights`, less the tile's own: two lists, tensors and numbers.

    Every call asks for the tensors, so they are never the oldest that is kept, which goes: a CUDA graph may read them.
    """
    return place.keep("tensors", _tensors, layer, place), place.keep(("numbers", batch), _numbers, layer, place, batch)


def _tensors(layer, place) -> list:
    alphas, alpha_sums = layer.scales
    tensors = [place.granule_offsets(pixel_words(layer)), alphas, alpha_sums, place.constants_and]
    return tensors + [layer.betas_N, place.classes, place.taps]


def _numbers(layer, place, batch) -> list:
    top, _, left, _ = layer.padding
    return [
        batch, place.height, place.width, layer.C, layer.P, layer.N, layer.M, layer.O, layer.KH * layer.KW, top, left,
        *layer.stride, place.padded_width, place.padded_height * place.padded_width, place.out_width,
        place.out_pixels, batch * place.out_pixels, layer.padded_O, layer.steps,
    ]  # fmt: skip


def conv(layer, words_BHWPN, poison_BHW, tile=None):
    """y, or None where no tile fits into shared memory."""
    B, H, W, _, _ = words_BHWPN.shape
    place = layer.place(H, W)
    tile = tile or choose_tile(layer, place, B)
    if tile is None:
        return None
    y = place.output(B)
    tensors, numbers = arguments(layer, place, B)
    grid = -(-place.out_pixels * B // tile.pixels), -(-layer.O // tile.channels)
    conv_kernel(tile)(
        grid, y, words_BHWPN, poison_BHW, layer.rows, *tensors, poison_BHW, layer.no_flips, *numbers,
        place.band(B, tile.pixels), pixel_words(layer), row_words(layer), ZERO_BITS - layer.center_and,
        int(layer.pairs), 0, shared=shared_bytes(layer, place, B, tile),
    )  # fmt: skip
    return y


def main():
    from ..check import cuda_rung

    cuda_rung("rung6_tensorcore", conv)


if __name__ == "__main__":
    main()
