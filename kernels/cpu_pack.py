"""Thresholds and packing on the CPU: floats in, one bit a channel and base out.

    bit A_n of channel c = (x >= thresholds[n][c]) != flips[c]

Where a channel's pixels lie side by side (PLANAR), sixteen pixels are compared at once with one channel's threshold,
and the sixteen answers set that channel's bit in sixteen words: two instructions a channel, and one that looks for
NaN. Where a pixel's channels lie side by side (INTERLEAVED, torch's channels_last), sixteen channels of one pixel are
compared with their sixteen thresholds, and the answers already are sixteen bits of the word. Each chunk of sixteen
pixels lands in the padded image

    words [padded pixel][P][N]

whose border words are 0 and are never written. Run this file to check and time it: `python -m kernels.cpu_pack`.
"""

from numba import njit, types
from numba.extending import intrinsic

from .cpu_job import CHUNK, INTERLEAVED, PLANAR, PLANE_BYTES, ROWS_BYTES
from .cpu_primitives import (
    BITS_16,
    F32,
    FLOATS_16,
    I16,
    I64,
    INTS_16,
    Emitter,
    any_nan_64,
    ir,
    load_float,
    load_word,
    store_float,
    store_word,
    word_at_least,
)


@intrinsic
def pack_planar_16(typing, x, channel_stride, channels, thresholds, column):
    """16 pixels x at most 64 channels -> 16 words at `column`; returns bits of the pixels that have a NaN.

        for c in range(channels): for i in range(16): column[i] |= (x[c][i] >= thresholds[c]) << c

    The words are built as two halves of 32 bits, so that sixteen pixels fill one register and not two.
    """

    def emit(context, builder, signature, args):
        x, channel_stride, channels, thresholds, column = args
        emitter = Emitter(builder)
        low = builder.select(builder.icmp_signed("<", channels, emitter.const(32)), channels, emitter.const(32))
        high = emitter.sub(channels, low)

        def channel(c, carried):
            word, bit, nan, x, thresholds = carried
            value = emitter.load(FLOATS_16, x, 4)
            emitter.prefetch(emitter.offset(x, 64, 1))
            threshold = emitter.splat(emitter.load(F32, thresholds, 4), FLOATS_16)
            reached = builder.fcmp_ordered(">=", value, threshold)
            word = emitter.select(reached, emitter.or_(word, bit), word)
            nan = emitter.or_(nan, builder.fcmp_unordered("uno", value, value))
            return [word, emitter.add(bit, bit), nan, emitter.add(x, channel_stride), emitter.offset(thresholds, 4, 1)]

        zeros, ones = emitter.const(0, INTS_16), emitter.const(1, INTS_16)
        low_half, _, nan, x, thresholds = emitter.loop(
            low, [zeros, ones, emitter.const(0, BITS_16), x, thresholds], channel
        )
        high_half, _, nan, _, _ = emitter.loop(high, [zeros, ones, nan, x, thresholds], channel)
        wide = ir.VectorType(I64, 16)
        shifted = emitter.shl(emitter.zext(high_half, wide), emitter.const(32, wide))
        emitter.store(emitter.or_(emitter.zext(low_half, wide), shifted), column, 8)
        return emitter.zext(emitter.bitcast(nan, I16), I64)

    return types.int64(*[types.int64] * 5), emit


@njit
def pack_chunk(job, image, first, words, scratch):
    """Pack the pixels from `first` on into the padded image at `words`; non-zero where a NaN was seen."""
    if job.input_kind == PLANAR:
        return pack_planar(job, image, first, words, scratch)
    if job.input_kind == INTERLEAVED:
        return pack_interleaved(job, image, first, words)
    copy_words(job, image, first, words)
    return 0


@njit
def pack_planar(job, image, first, words, scratch):
    N, P, stride = job.bases, job.channel_words, job.channel_stride
    plane, column = scratch + ROWS_BYTES, scratch + ROWS_BYTES + PLANE_BYTES
    landing = job.landing + 8 * first
    count = min(CHUNK, job.pixels)
    nan = 0
    for word in range(P):
        channels = min(job.channels - 64 * word, 64)
        x = job.input + image * job.image_stride + 64 * word * job.channel_stride + 4 * first
        if count < CHUNK:  # too small to be read sixteen at a time
            copy_plane(x, job.channel_stride, channels, count, plane)
            x, stride = plane, 4 * CHUNK
        flip = load_word(job.flips + 8 * word)
        for n in range(N):
            nan |= pack_planar_16(x, stride, channels, job.thresholds + 256 * (n * P + word), column)
            target = words + 8 * (word * N + n)
            for i in range(count):
                store_word(target + load_word(landing + 8 * i), load_word(column + 8 * i) ^ flip)
    return nan


@njit
def copy_plane(x, channel_stride, channels, pixels, plane):
    """[channel][pixels < 16] -> [channel][16], zeros behind."""
    for c in range(channels):
        for i in range(CHUNK):
            value = load_float(x + c * channel_stride + 4 * i) if i < pixels else 0.0
            store_float(plane + 4 * (c * CHUNK + i), value)


@njit
def pack_interleaved(job, image, first, words):
    N, P, pixel_stride = job.bases, job.channel_words, job.pixel_stride
    table, flips, landing = job.thresholds, job.flips, job.landing
    x = job.input + image * job.image_stride + first * pixel_stride
    nan = 0
    for pixel in range(first, first + min(CHUNK, job.pixels)):
        target = words + load_word(landing + 8 * pixel)
        for word in range(P):
            channels = job.channels - 64 * word
            nan |= any_nan_64(x + 256 * word, channels)
            flip = load_word(flips + 8 * word)
            for n in range(N):
                bits = word_at_least(x + 256 * word, table + 256 * (n * P + word), channels)
                store_word(target + 8 * (word * N + n), bits ^ flip)
        x += pixel_stride
    return nan


@njit
def copy_words(job, image, first, words):
    """Words came in: they only need borders."""
    count = job.channel_words * job.bases
    for pixel in range(first, first + min(CHUNK, job.pixels)):
        source = job.input + 8 * count * (image * job.pixels + pixel)
        target = words + load_word(job.landing + 8 * pixel)
        for i in range(count):
            store_word(target + 8 * i, load_word(source + 8 * i))
