"""A convolution of floats, for the first and last layer of a chain, which stay float.

    y[b, o, p] = bias[o] + sum over taps and channels k of image[pixel p + tap k] * weights[k][o]

Such a layer is small: the first one has few input channels, the last one a single pixel. What it costs beside bits is
to be called and its floats to be written and read again. So it is a step of the chain like the others: its padded image
holds floats in the place of words, its tile leaves rows as theirs does, and these are stored as any layer's (store.py),
the first one's as the next layer's bits.

The tile is 16 Q output channels x P pixels: a register of weights is read once for P uses, a float of the image is
broadcast for Q, and all P Q sums stay in registers. They are added up tap by tap, channel by channel, each product
rounded with its sum: another order than oneDNN's, and so perhaps another last bit.
"""

import functools

from numba import carray, njit, types
from numba.extending import intrinsic

from .job import CHUNK, PART_BYTES, PIXEL_BLOCK
from .pack import JOB
from .primitives import F32, FLOATS_16, I64, STAMP, Emitter, c_function, load_float, load_word, store_float

LARGEST = 2.0**64  # inputs below it and weights that add up to less than 2^60 have sums that float32 holds


@intrinsic(prefer_literal=True)
def convolve_floats(
    typing, words, pixel_bytes, tap_offsets, tap_count, weights, bias, windows, rows, registers, pixels,
):  # fmt: skip
    """float32 rows[Q][P][16] = bias + sum over k of (float32 at windows[p] * pixel_bytes + tap_offsets[k]) weights[k].

    PART_BYTES from one Q to the next. registers, pixels: Q and P, literal ints.
    """
    Q, P = registers.literal_value, pixels.literal_value

    def emit(context, builder, signature, args):
        words, pixel_bytes, tap_offsets, tap_count, weights, bias, windows, rows = args[:8]
        emitter = Emitter(builder)
        starts = [emitter.load(I64, emitter.offset(windows, p, 8), 8) for p in range(P)]
        starts = [emitter.offset(words, start, pixel_bytes) for start in starts]

        def tap(k, sums_PQ):
            to_tap = emitter.load(I64, emitter.offset(tap_offsets, k, 8), 8)
            weight_Q = [emitter.load(FLOATS_16, emitter.offset(weights, k, 64 * Q, q, 64), 64) for q in range(Q)]
            values = [emitter.load(F32, emitter.add(start, to_tap), 4) for start in starts]
            values = [emitter.splat(value, FLOATS_16) for value in values]
            pairs = [(value, weight) for value in values for weight in weight_Q]
            return [emitter.multiply_add(*pair, total) for pair, total in zip(pairs, sums_PQ)]

        bias_Q = [emitter.load(FLOATS_16, emitter.offset(bias, q, 64), 4) for q in range(Q)]
        for i, total in enumerate(emitter.loop(tap_count, bias_Q * P, tap)):
            emitter.store(total, emitter.offset(rows, i % Q, PART_BYTES, i // Q, 64), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, registers, pixels), emit


@functools.cache
def block_kernel(P, Q, stamp=STAMP):
    """As vector.block_kernel, in tiles of P pixels and Q registers of output channels."""

    @c_function(types.int64(JOB, *[types.int64] * 4))
    def convolve_block(jobs, words, tile, first, rows):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        taps = job.tap_count
        weights, bias = job.weights + 64 * Q * taps * tile, job.constants + 64 * Q * tile
        last = min(first + PIXEL_BLOCK, job.output_pixels)
        for pixel in range(first, last, P):
            convolve_floats(
                words, job.pixel_bytes, job.tap_offsets, taps, weights, bias, job.windows + 8 * pixel,
                rows + 64 * (pixel - first), Q, P,
            )  # fmt: skip
        return last

    return convolve_block


@functools.cache
def chunk_kernel(is_first, relu, stamp=STAMP):
    """Copies the pixels from `first` on into the padded image at `words`.

    is_first: whether they come from outside. Then it returns non-zero where one is NaN or so large that sums might
    overflow, which bits can't say.  relu: whether what is below 0 becomes 0
    """

    @c_function(types.int64(JOB, *[types.int64] * 4))
    def copy_chunk(jobs, number, first, words, scratch):
        job = carray(jobs, 1)[0]
        _ = stamp
        source = job.input + number * job.image_stride + first * job.pixel_stride
        strange = 0
        for i in range(min(CHUNK, job.pixels)):
            target = words + load_word(job.landing + 8 * (first + i)) * job.pixel_bytes
            strange |= copy_pixel(source + i * job.pixel_stride, job.channel_stride, job.channels, target, relu)
        return strange if is_first else 0

    return copy_chunk


@njit
def copy_pixel(source, stride, channels, target, relu):
    """Channels `stride` bytes apart -> side by side; non-zero where one is NaN or large."""
    strange = 0
    for c in range(channels):
        value = load_float(source + c * stride)
        if not abs(value) < LARGEST:
            strange = 1
        store_float(target + 4 * c, 0.0 if relu and value < 0 else value)
    return strange
