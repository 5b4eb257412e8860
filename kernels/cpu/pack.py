"""Thresholds and packing on the CPU: floats in, one bit a channel and base out.

    bit A_n of channel c = (x >= thresholds[n][c]) != flips[c],   or in the binary code an XOR of them (layout.py)

Where a channel's pixels lie side by side (PLANAR), sixteen pixels are compared at once with one channel's threshold,
and the sixteen answers set that channel's bit in sixteen words: two instructions a channel and base, and one that
looks for NaN. In the binary code each answer says which threshold is the next one (`reached_bases`), or where these are
in no order, answers are XORed. Where a pixel's channels lie side by side (INTERLEAVED, torch's channels_last), sixteen
channels of one pixel are compared with their sixteen thresholds, and the answers already are sixteen bits of the word.
Each chunk of sixteen pixels lands in the padded image

    words [padded pixel][P][N]

whose border words are 0 and are never written. For uniform levels, and for tiles that look up, it holds something else
than the words of the N bases (layout.py): wherever a pixel's bits come from, `store_bases` turns them into that.

Run this file to check and time it: `python -m kernels.cpu.pack`.
"""

import functools

import numba
from numba import carray, njit, types
from numba.extending import intrinsic

from .. import layout
from .job import CHUNK, INTERLEAVED, JOB_DTYPE, LANDED, PLANE_BYTES, ROWS_BYTES, WORDS
from .primitives import (
    BITS_16,
    F32,
    FLOATS_16,
    I16,
    I64,
    INTS_16,
    STAMP,
    Emitter,
    any_nan_64,
    c_function,
    ir,
    load_float,
    load_word,
    popcount,
    store_float,
    store_int,
    store_nibble_pairs,
    store_nibbles,
    store_word,
    word_at_least,
)

JOB = types.CPointer(numba.from_dtype(JOB_DTYPE))


@intrinsic
def job_at(typing, address):
    """The Job at an address, as a pointer."""

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(JOB))

    return JOB(types.int64), emit


def reached_bases(emitter, values, thresholds_T, N, searched) -> list:
    """Masks [N] that say which of sixteen values have base n's bit: where a threshold of its own is reached.

    In the binary code the XOR over `layout.own_thresholds`. If `searched`, thresholds ascend, and each base halves what
    is left of them: N comparisons, and fewer selections than there are thresholds.
    """

    def reaches(threshold):
        return emitter.builder.fcmp_ordered(">=", values, threshold)

    masks = []
    for n in range(N):
        if searched:
            middle = len(thresholds_T) // 2
            masks.append(reaches(thresholds_T[middle]))
            halves = zip(thresholds_T[:middle], thresholds_T[middle + 1 :])
            thresholds_T = [emitter.select(masks[-1], upper, lower) for lower, upper in halves]
        else:
            own = [reaches(thresholds_T[t]) for t in layout.own_thresholds(n, N, len(thresholds_T))]
            before = masks[-1:] if len(thresholds_T) != N else []
            masks.append(functools.reduce(emitter.xor, before + own))
    return masks


@intrinsic(prefer_literal=True)
def pack_planar_16(
    typing, x, channel_stride, channels, thresholds, row_stride, columns, bases, threshold_count, searched
):  # fmt: skip
    """16 pixels x at most 64 channels -> words columns[N][16]; returns bits of the pixels that have a NaN.

        for c in range(channels): for n in range(N): for i in range(16):
            columns[n][i] |= (x[c][i] >= thresholds[n][c]) << c         (or what else `reached_bases` says)

    The words are built as two halves of 32 bits, so that sixteen pixels fill one register and not two.
    """
    N, T = bases.literal_value, threshold_count.literal_value

    def emit(context, builder, signature, args):
        x, channel_stride, channels, thresholds, row_stride, columns = args[:6]
        emitter = Emitter(builder)
        low = builder.select(builder.icmp_signed("<", channels, emitter.const(32)), channels, emitter.const(32))
        high = emitter.sub(channels, low)

        def channel(c, carried):
            words_N, (bit, nan, x, thresholds) = list(carried[:N]), carried[N:]
            value = emitter.load(FLOATS_16, x, 4)
            emitter.prefetch(emitter.offset(x, 64, 1))
            at_T = [emitter.offset(thresholds, t, row_stride) for t in range(T)]
            thresholds_T = [emitter.splat(emitter.load(F32, at, 4), FLOATS_16) for at in at_T]
            for n, reached in enumerate(reached_bases(emitter, value, thresholds_T, N, searched.literal_value)):
                words_N[n] = emitter.select(reached, emitter.or_(words_N[n], bit), words_N[n])
            nan = emitter.or_(nan, builder.fcmp_unordered("uno", value, value))
            next_channel = [emitter.add(x, channel_stride), emitter.offset(thresholds, 4, 1)]
            return [*words_N, emitter.add(bit, bit), nan, *next_channel]

        zeros, ones = emitter.const(0, INTS_16), emitter.const(1, INTS_16)
        start = [*[zeros] * N, ones, emitter.const(0, BITS_16), x, thresholds]
        *low_N, _, nan, x, thresholds = emitter.loop(low, start, channel)
        *high_N, _, nan, _, _ = emitter.loop(high, [*[zeros] * N, ones, nan, x, thresholds], channel)
        wide = ir.VectorType(I64, CHUNK)
        for n in range(N):
            shifted = emitter.shl(emitter.zext(high_N[n], wide), emitter.const(32, wide))
            emitter.store(emitter.or_(emitter.zext(low_N[n], wide), shifted), emitter.offset(columns, n, 8 * CHUNK), 8)
        return emitter.zext(emitter.bitcast(nan, I16), I64)

    return types.int64(*[types.int64] * 6, bases, threshold_count, searched), emit


@functools.cache
def chunk_kernel(N, T, searched, image, word_bytes, stamp=STAMP):
    """Packs the pixels from `first` on into the padded image at `words`; non-zero where a NaN was seen.

    searched: 1 where thresholds ascend;  image: what it holds, one of layout's four kinds;  word_bytes: of 64 channels
    of a pixel
    """

    @c_function(types.int64(JOB, *[types.int64] * 4))
    def pack_chunk(jobs, number, first, words, scratch):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        plane, columns = scratch + ROWS_BYTES, scratch + ROWS_BYTES + PLANE_BYTES
        P, stride, count = job.channel_words, job.channel_stride, min(CHUNK, job.pixels)
        nan = 0
        if job.input_kind == LANDED:
            pass
        elif job.input_kind == WORDS:
            copy_words(job, number, first, words, word_bytes, N, image)
        elif job.input_kind == INTERLEAVED:
            nan = pack_interleaved(job, number, first, words, columns, word_bytes, N, T, image)
        else:
            for word in range(P):
                channels = min(job.channels - 64 * word, 64)
                x = job.input + number * job.image_stride + 64 * word * job.channel_stride + 4 * first
                if count < CHUNK:  # too small to be read sixteen at a time
                    copy_plane(x, job.channel_stride, channels, count, plane)
                    x, stride = plane, 4 * CHUNK
                table = job.thresholds + 256 * word
                nan |= pack_planar_16(x, stride, channels, table, 256 * P, columns, N, T, searched)
                send_words(job, first, columns, load_word(job.flips + 8 * word), words + word * word_bytes, N, image)
        if job.differing != 0:
            count_differing(job, first, words)
        return nan

    return pack_chunk


@njit
def send_words(job, first, columns, flip, words, N, image):
    """columns [N][16] -> each pixel's place in the padded image."""
    for i in range(min(CHUNK, job.pixels)):
        target = words + load_word(job.landing + 8 * (first + i)) * job.pixel_bytes
        store_bases(columns + 8 * i, 8 * CHUNK, flip, job.repeat, target, N, image)


@njit
def store_bases(source, stride, flip, repeat, target, N, image):
    """One pixel's words of N bases, `stride` bytes apart at source, XOR flip -> what the image holds of them."""
    if image == layout.BASES:
        for n in range(N):
            store_word(target + 8 * n, (load_word(source + n * stride) ^ flip) * repeat)
        return
    if image == layout.NIBBLES and N != 2:
        for n in range(N):
            store_nibbles(target + 16 * n, load_word(source + n * stride) ^ flip)
        return
    a, b = load_word(source) ^ flip, load_word(source + stride) ^ flip
    if N == 3:
        c = load_word(source + 2 * stride) ^ flip
        a, b = (a & b) | (c & (a | b)), a ^ b ^ c
    if image != layout.UNIFORM_WORDS:
        store_nibble_pairs(target, a, b)
        return
    if N == 2:
        a ^= b
    store_word(target, a * repeat)
    store_word(target + 8, b * repeat)


@njit
def count_differing(job, first, words):
    """In how many channels a pixel's two bases differ, for each of a chunk's pixels."""
    for i in range(first, first + min(CHUNK, job.pixels)):
        pixel = load_word(job.landing + 8 * i)
        at, total = words + pixel * job.pixel_bytes, 0
        for word in range(job.channel_words):
            total += popcount(load_word(at + 16 * word) & job.counted)
        store_int(words + job.differing + 4 * pixel, total)


@njit
def copy_plane(x, channel_stride, channels, pixels, plane):
    """[channel][pixels < 16] -> [channel][16], zeros behind."""
    for c in range(channels):
        for i in range(CHUNK):
            value = load_float(x + c * channel_stride + 4 * i) if i < pixels else 0.0
            store_float(plane + 4 * (c * CHUNK + i), value)


@njit
def pack_interleaved(job, number, first, words, bases, word_bytes, N, T, image):
    P, pixel_stride = job.channel_words, job.pixel_stride
    table, flips, landing = job.thresholds, job.flips, job.landing
    x = job.input + number * job.image_stride + first * pixel_stride
    nan = 0
    for pixel in range(first, first + min(CHUNK, job.pixels)):
        target = words + load_word(landing + 8 * pixel) * job.pixel_bytes
        for word in range(P):
            channels = job.channels - 64 * word
            nan |= any_nan_64(x + 256 * word, channels)
            bits, step = 0, 1 << N
            for n in range(N):
                if T == N:
                    bits = word_at_least(x + 256 * word, table + 256 * (n * P + word), channels)
                else:  # the binary code: base n goes on from n - 1 (layout.own_thresholds)
                    t = step // 2 - 1
                    while t < T:
                        bits ^= word_at_least(x + 256 * word, table + 256 * (t * P + word), channels)
                        t += step
                    step //= 2
                store_word(bases + 8 * n, bits)
            flip = load_word(flips + 8 * word)
            store_bases(bases, 8, flip, job.repeat, target + word * word_bytes, N, image)
        x += pixel_stride
    return nan


@njit
def copy_words(job, number, first, words, word_bytes, N, image):
    """Words came in: they only need borders, or to become what the image holds."""
    P = job.channel_words
    for pixel in range(first, first + min(CHUNK, job.pixels)):
        source = job.input + number * job.image_stride + 8 * N * P * pixel
        target = words + load_word(job.landing + 8 * pixel) * job.pixel_bytes
        for word in range(P):
            store_bases(source + 8 * N * word, 8, 0, job.repeat, target + word * word_bytes, N, image)


def main() -> None:
    """A 1 x 1 kernel of one output channel is little but packing: check it, and print the bytes it reads a second."""
    import torch

    from ..check import Shape, demonstrate, problem_in_floats
    from .engine import packed_conv

    one = dict(kernel=(1, 1), stride=(1, 1), padding=(0,) * 4)
    cases = [
        dict(B=2, C=C, sizes=(6, 6), O=1, M=1, N=N, binary=binary, **one)
        for C in (1, 31, 33, 64, 200) for N in (1, 2, 3, 4) for binary in (False, True)
    ]  # fmt: skip

    def calls():
        shape, found = Shape(64, 1, 1, 56, 0, B=8), {}
        for order in (torch.contiguous_format, torch.channels_last):
            x = shape.images().to(memory_format=order)
            for n, binary in ((1, False), (2, False), (3, False), (5, False), (2, True), (3, True)):
                layer = shape.layer(1, n, binary=binary)[1:]  # one weight base: as little convolution as there can be
                call = lambda x, layer=layer: packed_conv(x, *layer)  # noqa: E731
                found[f"{order}, N = {n}" + ", binary" * binary] = call, [x], 0, x.nbytes
        return found

    demonstrate("pack", lambda: problem_in_floats(packed_conv, cases=cases), calls)


if __name__ == "__main__":
    main()
