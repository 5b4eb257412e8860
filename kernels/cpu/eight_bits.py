"""A convolution of few channels in eight bits, for the first layer of a chain, which has no bits.

    y[b, o, p] = s t_o (sum over taps and channels of X W8) + bias[o]
    X = round(x / s), s = the image's largest |x| (at least 1e-30) / 127

where the layer's weights are W8 t_o, W8 in -127..127 (abcnets.EightBitConv). The sums are integers, exact in any order.

A pixel is four bytes, a channel each, and those of channels that are not there meet weights of 0. One instruction
(vpdpbusd) multiplies them with sixteen output channels' weights and adds up the four products:

    broadcast, dot product      for 16 x 4 products, a quarter of what floats take (floats.py)

It takes numbers without a sign on one side: the image holds X + 128 there, and in the padding 128. What that adds is
128 times the sum of a channel's weights, so sums begin that much below 0.

How large an image is has to be known before its first pixel is rounded, so one chunk is a whole image.
"""

import functools

from numba import carray, njit, types
from numba.extending import intrinsic

from .floats import LARGEST
from .job import PART_BYTES, PIXEL_BLOCK
from .pack import JOB
from .primitives import (
    FLOATS_16,
    I32,
    I64,
    INTS_16,
    STAMP,
    Emitter,
    c_function,
    load_float,
    load_int,
    load_word,
    store_float,
    store_int,
)

WHOLE = 12582912.0  # 1.5 * 2^23: a float32 of at most 2^22 plus this is rounded to a whole number, in its low bits
SMALLEST = 1e-30  # an image's largest |x| counts as at least this, as in abcnets.EightBitConv


@intrinsic(prefer_literal=True)
def convolve_bytes(
    typing, words, tap_offsets, tap_count, weights, scales, scale, bias, windows, rows, registers, pixels,
):  # fmt: skip
    """float32 rows[Q][P][16] = bias + scale * scales * (weights[0] + sum over k of dot products with weights[1 + k]).

    PART_BYTES from one Q to the next. weights: [1 + tap_count][Q] registers of sixteen int32, which are sums for k = 0
    and four int8 for the others.  registers, pixels: Q and P, literal ints.
    """
    Q, P = registers.literal_value, pixels.literal_value

    def emit(context, builder, signature, args):
        words, tap_offsets, tap_count, weights, scales, scale, bias, windows, rows = args[:9]
        emitter = Emitter(builder)
        starts = [emitter.load(I64, emitter.offset(windows, p, 8), 8) for p in range(P)]
        starts = [emitter.offset(words, start, 4) for start in starts]
        begin_Q = [emitter.load(INTS_16, emitter.offset(weights, q, 64), 64) for q in range(Q)]
        weights = emitter.offset(weights, Q, 64)

        def tap(k, sums_PQ):
            to_tap = emitter.load(I64, emitter.offset(tap_offsets, k, 8), 8)
            weight_Q = [emitter.load(INTS_16, emitter.offset(weights, k, 64 * Q, q, 64), 64) for q in range(Q)]
            values = [emitter.load(I32, emitter.add(start, to_tap), 4) for start in starts]
            values = [emitter.splat(value, INTS_16) for value in values]
            pairs = [(value, weight) for value in values for weight in weight_Q]
            return [emitter.add_products_of_bytes(total, *pair) for pair, total in zip(pairs, sums_PQ)]

        scale = emitter.splat(scale, FLOATS_16)
        scale_Q = [builder.fmul(scale, emitter.load(FLOATS_16, emitter.offset(scales, q, 64), 4)) for q in range(Q)]
        bias_Q = [emitter.load(FLOATS_16, emitter.offset(bias, q, 64), 4) for q in range(Q)]
        for i, total in enumerate(emitter.loop(tap_count, begin_Q * P, tap)):
            product = builder.fmul(builder.sitofp(total, FLOATS_16), scale_Q[i % Q])  # rounded, as torch does
            emitter.store(builder.fadd(product, bias_Q[i % Q]), emitter.offset(rows, i % Q, PART_BYTES, i // Q, 64), 4)
        return context.get_dummy_value()

    ints = types.int64
    return types.void(*[ints] * 5, types.float32, *[ints] * 3, registers, pixels), emit


@functools.cache
def block_kernel(P, Q, stamp=STAMP):
    """As vector.block_kernel, in tiles of P pixels and Q registers of output channels."""

    @c_function(types.int64(JOB, *[types.int64] * 4))
    def convolve_block(jobs, words, tile, first, rows):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        taps = job.tap_count
        weights = job.weights + 64 * Q * (1 + taps) * tile
        scales, bias = job.scales + 64 * Q * tile, job.constants + 64 * Q * tile
        scale = load_float(words + job.image_scale)
        last = min(first + PIXEL_BLOCK, job.output_pixels)
        for pixel in range(first, last, P):
            convolve_bytes(
                words, job.tap_offsets, taps, weights, scales, scale, bias, job.windows + 8 * pixel,
                rows + 64 * (pixel - first), Q, P,
            )  # fmt: skip
        return last

    return convolve_block


@functools.cache
def chunk_kernel(stamp=STAMP):
    """Rounds an image, whatever `first` is, into the padded one at `words`; non-zero where a number is NaN or large."""

    @c_function(types.int64(JOB, *[types.int64] * 4))
    def round_image(jobs, number, first, words, scratch):
        job = carray(jobs, 1)[0]
        _ = stamp
        source, largest = job.input + number * job.image_stride, 0
        for c in range(job.channels):
            x = source + c * job.channel_stride
            if job.pixel_stride == 4:
                largest = max(largest, largest_magnitude(x, job.pixel_stride, job.pixels, 1))
            else:
                largest = max(largest, largest_magnitude(x, job.pixel_stride, job.pixels, 0))
        store_int(scratch, largest)
        magnitude = load_float(scratch)
        if not magnitude < LARGEST:
            return 1
        magnitude = max(magnitude, SMALLEST)
        store_float(words + job.image_scale, magnitude / 127)
        store_float(scratch, 127 / magnitude)
        steps = load_float(scratch)  # of the image's step, in 1
        for pixel in range(0, job.pixels, 16):
            x, count = source + pixel * job.pixel_stride, min(16, job.pixels - pixel)
            if job.pixel_stride == 4:
                round_16(x, job.channel_stride, job.pixel_stride, count, job.channels, steps, scratch, 1)
            else:
                round_16(x, job.channel_stride, job.pixel_stride, count, job.channels, steps, scratch, 0)
            send_16(scratch, count, words, job.landing + 8 * pixel)
        return 0

    return round_image


@intrinsic(prefer_literal=True)
def largest_magnitude(typing, source, stride, count, is_dense):
    """The largest |x| of `count` float32, `stride` (is_dense: four) bytes apart, as its bits. NaN is the largest."""
    dense = is_dense.literal_value

    def emit(context, builder, signature, args):
        source, stride, count, _ = args
        emitter = Emitter(builder)

        def sixteen(i, carried):
            first = emitter.mul(i, emitter.const(16))
            at, left = emitter.offset(source, first, stride), emitter.sub(count, first)
            bits = emitter.bitcast(emitter.load_floats_16(at, left, None if dense else stride), INTS_16)
            bits = emitter.and_(bits, emitter.const(0x7FFFFFFF, INTS_16))
            return [emitter.select(builder.icmp_signed(">", bits, carried[0]), bits, carried[0])]

        rounds = builder.sdiv(emitter.add(count, emitter.const(15)), emitter.const(16))
        (largest,) = emitter.loop(rounds, [emitter.const(0, INTS_16)], sixteen)
        return emitter.zext(emitter.call_llvm("llvm.vector.reduce.smax.v16i32", I32, largest), I64)

    return types.int64(types.int64, types.int64, types.int64, is_dense), emit


@intrinsic(prefer_literal=True)
def round_16(typing, source, channel_stride, pixel_stride, count, channels, steps, target, is_dense):
    """int32 target[16] = the bytes round(steps * x) + 128 of a pixel's channels, the first one lowest."""
    dense = is_dense.literal_value

    def emit(context, builder, signature, args):
        source, channel_stride, pixel_stride, count, channels, steps, target, _ = args
        emitter = Emitter(builder)
        steps, whole = emitter.splat(steps, FLOATS_16), emitter.const(WHOLE, FLOATS_16)

        def channel(c, carried):
            at = emitter.offset(source, c, channel_stride)
            x = emitter.load_floats_16(at, count, None if dense else pixel_stride)
            rounded = emitter.bitcast(builder.fadd(builder.fmul(x, steps), whole), INTS_16)
            byte = emitter.and_(rounded, emitter.const(255, INTS_16))
            place = emitter.splat(emitter.trunc(emitter.mul(c, emitter.const(8)), I32), INTS_16)
            return [emitter.or_(carried[0], emitter.shl(byte, place))]

        (pixels,) = emitter.loop(channels, [emitter.const(0, INTS_16)], channel)
        turned = emitter.const(-0x7F7F7F80, INTS_16)  # the upper bit of each byte: adds 128
        emitter.store(emitter.xor(pixels, turned), target, 4)
        return context.get_dummy_value()

    ints = types.int64
    return types.void(*[ints] * 5, types.float32, ints, is_dense), emit


@njit
def send_16(source, count, words, landing):
    """The first `count` int32 at source, each to its pixel."""
    for i in range(count):
        store_int(words + 4 * load_word(landing + 8 * i), load_int(source + 4 * i))
