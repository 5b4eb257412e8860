"""Pooling on the CPU: maxima of packed words, and of floats at the ends of a chain; averages of floats.

The maximum reaches a threshold where any of its window does, so on bits it is an OR, once the channels whose comparison
was turned round (flips) are turned back:

    output = OR over the window of (input ^ flip), ^ flip

In the binary code the bits that are joined so are those of numbers, and the maximum is theirs: of 64 channels at once,
from the highest bit down, the first bit that differs decides.

The plan lists the input pixels of every window. A tap that lies outside the image is replaced by one inside the same
window: a maximum does not mind seeing a pixel twice, so there are no borders to look after.
"""

import functools

import numba
import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from .job import PIXEL_BLOCK, POOL_JOB_DTYPE
from .primitives import (
    FLOATS_16,
    I64,
    STAMP,
    Emitter,
    array_at,
    c_function,
    call_kernel,
    entry,
    load_float,
    load_word,
    store_float,
    store_word,
)
from .store import store_planes

POOL_JOB = types.CPointer(numba.from_dtype(POOL_JOB_DTYPE))


@intrinsic
def pool_job_at(typing, address):
    """The PoolJob at an address, as a pointer."""

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(POOL_JOB))

    return POOL_JOB(types.int64), emit


@functools.cache
def run_kernel(stamp=STAMP):
    """The function that every thread runs: a share of all output pixels."""

    @entry(POOL_JOB)
    def pool(jobs, thread, threads, barrier):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        pool_images(job, thread, 0, job.images, thread, threads, 0)

    return pool


@njit
def pool_images(job, thread, begin, end, part, parts, scratch):
    """A thread's part of `parts` of the output pixels of images begin..end."""
    start, pixels = begin * job.output_pixels, (end - begin) * job.output_pixels
    pixel, last = start + pixels * part // parts, start + pixels * (part + 1) // parts
    while pixel < last:
        image = pixel // job.output_pixels
        before = image * job.output_pixels
        until = min(last, before + job.output_pixels)
        source = job.input + job.input_stride * (thread if job.input_by_thread else image)
        target = job.output + job.output_stride * (thread if job.output_by_thread else image)
        pixels_of_it = (pixel - before) << 32 | (until - before)
        call_kernel(job.kernel, job.address, source, target, pixels_of_it, scratch)
        pixel = until


@functools.cache
def words_kernel(N, binary, stamp=STAMP):
    """Pools words of N bases: the output pixels `pixels >> 32` up to `pixels & (2**32 - 1)` of one image."""

    @c_function(types.int64(POOL_JOB, *[types.int64] * 4))
    def pool_words(jobs, source, target, pixels, scratch):
        job = carray(jobs, 1)[0]
        _ = stamp
        P, taps = job.channel_words, job.taps
        for pixel in range(pixels >> 32, pixels & 0xFFFFFFFF):
            output = target + job.output_pixel_bytes * load_word(job.output_landing + 8 * pixel)
            sources = job.sources + 8 * taps * pixel
            for word in range(P):
                flip = load_word(job.flips + 8 * word)
                if binary:
                    largest_number(source + 8 * N * word, 8 * P * N, sources, taps, flip, output + 8 * N * word, N)
                else:
                    largest_bits(source + 8 * N * word, 8 * P * N, sources, taps, flip, output + 8 * N * word, N)
        return 0

    return pool_words


@intrinsic(prefer_literal=True)
def largest_bits(typing, first, pixel_bytes, sources, taps, flip, output, bases):
    """The N words of what any pixel of a window reaches in each of 64 channels."""
    N = bases.literal_value

    def emit(context, builder, signature, args):
        first, pixel_bytes, sources, taps, flip, output = args[:6]
        emitter = Emitter(builder)

        def tap(t, reached_N):
            source = emitter.load(I64, emitter.offset(sources, t, 8), 8)
            words = [emitter.load(I64, emitter.offset(first, source, pixel_bytes, n, 8), 8) for n in range(N)]
            return [emitter.or_(reached, emitter.xor(word, flip)) for reached, word in zip(reached_N, words)]

        for n, reached in enumerate(emitter.loop(taps, [emitter.const(0)] * N, tap)):
            emitter.store(emitter.xor(reached, flip), emitter.offset(output, n, 8), 8)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, bases), emit


@njit
def largest_number(first, pixel_bytes, sources, taps, flip, output, N):
    """The N words of a window's largest number in each of 64 channels; `output` holds the largest so far."""
    for n in range(N):
        store_word(output + 8 * n, flip)  # 0, as all is stored XOR flip
    for tap in range(taps):
        other = first + pixel_bytes * load_word(sources + 8 * tap)
        undecided, greater = -1, 0
        for n in range(N):
            word = load_word(other + 8 * n)
            differ = word ^ load_word(output + 8 * n)
            greater |= undecided & differ & (word ^ flip)
            undecided &= ~differ
        for n in range(N):
            largest = load_word(output + 8 * n)
            store_word(output + 8 * n, largest ^ ((largest ^ load_word(other + 8 * n)) & greater))


@functools.cache
def floats_kernel(relu, stamp=STAMP):
    """Pools floats, of which those below 0 are 0 if `relu`: pixels as `words_kernel`. Sixteen channels at once."""

    @c_function(types.int64(POOL_JOB, *[types.int64] * 4))
    def pool_floats(jobs, source, target, pixels, rows):
        job = carray(jobs, 1)[0]
        _ = stamp
        plane, pixel_bytes, taps = 4 * job.output_pixels, 4 * job.channels, job.taps
        for first in range(pixels >> 32, pixels & 0xFFFFFFFF, PIXEL_BLOCK):
            count = min(PIXEL_BLOCK, (pixels & 0xFFFFFFFF) - first)
            for c in range(0, job.channels, 16):
                for i in range(count):
                    sources = job.sources + 8 * taps * (first + i)
                    largest_floats_16(source + 4 * c, pixel_bytes, sources, taps, rows + 64 * i, relu)
                channels = min(job.channels - c, 16)
                store_planes(rows, count, channels, target + c * plane + 4 * first, plane)
        return 0

    return pool_floats


@intrinsic(prefer_literal=True)
def largest_floats_16(typing, first, pixel_bytes, sources, taps, output, is_relu):
    """Sixteen channels' largest float32 of a window (relu: or 0), NaN where there is one; the first of equal ones."""
    least = 0.0 if is_relu.literal_value else float("-inf")

    def emit(context, builder, signature, args):
        first, pixel_bytes, sources, taps, output = args[:5]
        emitter = Emitter(builder)

        def tap(t, carried):
            source = emitter.load(I64, emitter.offset(sources, t, 8), 8)
            value = emitter.load(FLOATS_16, emitter.offset(first, source, pixel_bytes), 4)
            greater = builder.fcmp_ordered(">", value, carried[0])
            greater = emitter.or_(greater, builder.fcmp_unordered("uno", value, value))
            return [emitter.select(greater, value, carried[0])]

        (largest,) = emitter.loop(taps, [emitter.const(least, FLOATS_16)], tap)
        emitter.store(largest, output, 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, is_relu), emit


@functools.cache
def average_kernel(has_scales, relu, stamp=STAMP):
    """Averages floats, perhaps scaled and shifted, of which those below 0 are perhaps 0: pixels as `words_kernel`."""

    @c_function(types.int64(POOL_JOB, *[types.int64] * 4))
    def average(jobs, source, target, pixels, scratch):
        job = carray(jobs, 1)[0]
        _ = stamp
        begin, end, taps = pixels >> 32, pixels & 0xFFFFFFFF, job.taps
        for c in range(job.channels + job.extra):
            plane, averages = source + 4 * job.input_pixels * c, target + 4 * job.output_pixels * c
            if c >= job.channels:
                for pixel in range(begin, end):
                    store_float(averages + 4 * pixel, 0.0)
                continue
            scale, shift = np.float32(1), np.float32(0)
            if has_scales:
                scale, shift = load_float(job.scales + 4 * c), load_float(job.scales + 4 * (job.channels + c))
            for pixel in range(begin, end):
                if taps == job.input_pixels:
                    total = sum_plane(array_at(plane, taps, types.float32), scale, shift, has_scales, relu)
                else:
                    total = np.float32(0)
                    for tap in range(taps):
                        at = plane + 4 * load_word(job.sources + 8 * (taps * pixel + tap))
                        total += transformed(load_float(at), scale, shift, has_scales, relu)
                store_float(averages + 4 * pixel, total / np.float32(taps))
        return 0

    return average


@njit
def transformed(value, scale, shift, has_scales, relu):
    """relu(scale * value + shift), as far as it is asked for."""
    if has_scales:
        value = value * scale + shift
    if relu and value < 0:  # NaN stays
        value = np.float32(0)
    return value


@njit(fastmath={"reassoc", "nsz", "contract"})
def sum_plane(values, scale, shift, has_scales, relu):
    """The sum of transformed float32, in any order."""
    total = np.float32(0)
    for value in values:
        total += transformed(value, scale, shift, has_scales, relu)
    return total


def main() -> None:
    from ..check import pool_rung
    from . import engine

    pool_rung("pool", engine)


if __name__ == "__main__":
    main()
