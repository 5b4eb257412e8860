"""Storing what a tile computed: floats in planes, floats side by side, or the next layer's bits.

A tile leaves float32 rows [part][pixel][16 channels] in a buffer that stays in the first-level cache. Here they become

    PLANAR        float32 [channel][pixel]: 8 x 8 at a time, turned round in registers; perhaps the sum with another
                  tensor, and what is above 0 of that, while the planes are in the first-level cache
    INTERLEAVED   float32 [pixel][channel]
    WORDS         [pixel][word][base]: sixteen channels are compared with their thresholds at once, and the answers are
                  sixteen bits of the word

Bits go to the pixel of the next image that `output_landing` names, in the form that this image has (layout.py): where
a chain of layers runs in one call (chain.py), straight into the padded image that the next layer reads.
"""

import functools

from numba import carray, njit, types
from numba.extending import intrinsic

from .. import layout
from .job import ADDED, PART_BYTES, PIXEL_BLOCK, PLANAR, WORDS
from .pack import JOB, reached_bases
from .primitives import (
    FLOATS_16,
    I16,
    I32,
    I64,
    STAMP,
    Emitter,
    c_function,
    load_float,
    load_word,
    store_float,
    transpose_8x8,
)


def store_kernel(kind, N, T, searched, image, repeats, adds=False, relu=False):
    """Stores a tile's channels at the (at most 64) pixels from `first` on, in the image of `output`.

    searched: where these are bits, whether their thresholds ascend
    image: what it holds where these are bits, layout.BASES or UNIFORM_WORDS;  repeats: how often a word holds them
    adds, relu: of planes, whether to add those of `other`, and whether what is below 0 (then) becomes 0
    """
    if kind == WORDS:
        return bits_kernel(N, T, int(searched), int(image == layout.UNIFORM_WORDS), repeats)
    return planes_kernel(int(adds), int(relu)) if kind == PLANAR else interleaved_kernel()


@functools.cache
def planes_kernel(adds, relu, stamp=STAMP):
    @c_function(types.int64(JOB, *[types.int64] * 4))
    def store_tile(jobs, output, tile, first, rows):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        count, plane = min(PIXEL_BLOCK, job.output_pixels - first), 4 * job.output_pixels
        other = load_word(rows + ADDED)
        for block in range(tile * job.parts, min((tile + 1) * job.parts, job.blocks)):
            channels = min(job.output_channels - 16 * block, 16)
            planes = output + 16 * block * plane + 4 * first
            store_planes(rows, count, channels, planes, plane)
            if adds or relu:
                for c in range(channels):
                    finish_floats(planes + c * plane, other - output, count, adds, relu)
            rows += PART_BYTES
        return 0

    return store_tile


@functools.cache
def interleaved_kernel(stamp=STAMP):
    @c_function(types.int64(JOB, *[types.int64] * 4))
    def store_tile(jobs, output, tile, first, rows):
        job = carray(jobs, 1)[0]
        _ = stamp
        count, pixel_bytes = min(PIXEL_BLOCK, job.output_pixels - first), 4 * job.output_channels
        for block in range(tile * job.parts, min((tile + 1) * job.parts, job.blocks)):
            channels = min(job.output_channels - 16 * block, 16)
            store_interleaved(rows, count, channels, output + 64 * block + first * pixel_bytes, pixel_bytes)
            rows += PART_BYTES
        return 0

    return store_tile


@functools.cache
def bits_kernel(N, T, searched, uniform, repeats, stamp=STAMP):
    word_bytes = 8 * layout.image_words(N, uniform)

    @c_function(types.int64(JOB, *[types.int64] * 4))
    def store_tile(jobs, output, tile, first, rows):
        job = carray(jobs, 1)[0]
        _ = stamp
        count = min(PIXEL_BLOCK, job.output_pixels - first)
        for block in range(tile * job.parts, min((tile + 1) * job.parts, job.blocks)):
            word, part = block // 4, block % 4
            compare_and_store(
                rows, count, job.output_thresholds + 64 * block, 64 * job.blocks,
                load_word(job.output_flips + 8 * word) >> (16 * part), output + word_bytes * word + 2 * part,
                job.output_landing + 8 * first, job.output_pixel_bytes, N, T, searched, uniform, repeats,
            )  # fmt: skip
            rows += PART_BYTES
        return 0

    return store_tile


@njit
def store_planes(rows, count, channels, output, plane):
    """rows [count pixels][16] -> float32 [channel][pixel], `plane` bytes from one channel to the next.

    8 x 8 at a time where there are as many.
    """
    whole = count // 8 * 8
    for half in range(0, channels, 8):
        done = whole if channels >= half + 8 else 0
        for pixel in range(0, done, 8):
            transpose_8x8(rows + 64 * pixel + 4 * half, 64, output + half * plane + 4 * pixel, plane)
        for c in range(half, min(half + 8, channels)):
            for pixel in range(done, count):
                store_float(output + c * plane + 4 * pixel, load_float(rows + 64 * pixel + 4 * c))


@intrinsic(prefer_literal=True)
def finish_floats(typing, target, to_other, count, adds, is_relu):
    """target[i] += other[i], `to_other` bytes further on, and if is_relu 0 where that is below; float32, i < count."""
    has_other, relu = adds.literal_value, is_relu.literal_value

    def emit(context, builder, signature, args):
        target, to_other, count = args[:3]
        emitter = Emitter(builder)
        zeros = emitter.const(0.0, FLOATS_16)

        def sixteen(i, _):
            at, left = emitter.offset(target, i, 64), emitter.sub(count, emitter.mul(i, emitter.const(16)))
            total = emitter.load_floats_16(at, left)
            if has_other:
                total = builder.fadd(total, emitter.load_floats_16(emitter.add(at, to_other), left))
            if relu:
                total = emitter.select(builder.fcmp_ordered("<", total, zeros), zeros, total)  # NaN stays
            emitter.store_floats_16(total, at, left)
            return []

        emitter.loop(builder.sdiv(emitter.add(count, emitter.const(15)), emitter.const(16)), [], sixteen)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, adds, is_relu), emit


@njit
def store_interleaved(rows, count, channels, output, pixel_bytes):
    """rows [count pixels][16] -> float32 [pixel][channel]."""
    for pixel in range(count):
        if channels == 16:
            copy_floats_16(rows + 64 * pixel, output + pixel * pixel_bytes)
        else:
            for c in range(channels):
                store_float(output + pixel * pixel_bytes + 4 * c, load_float(rows + 64 * pixel + 4 * c))


@intrinsic
def copy_floats_16(typing, source, target):
    """Sixteen float32 from one address to another."""

    def emit(context, builder, signature, args):
        emitter = Emitter(builder)
        emitter.store(emitter.load(FLOATS_16, args[0], 4), args[1], 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def compare_and_store(
    typing, rows, count, thresholds, row_stride, flips, target, landing, pixel_bytes,
    bases, threshold_count, is_searched, is_uniform, repeats,
):  # fmt: skip
    """For each of `count` pixels: 16 bits a base at target + landing[pixel] * pixel_bytes.

    bits_n = flips ^ what `reached_bases` says of the float32 at rows[pixel], in the form of the next image.
    """
    literals = bases, threshold_count, is_searched, is_uniform, repeats
    N, T, searched, uniform, repeat = (literal.literal_value for literal in literals)

    def emit(context, builder, signature, args):
        rows, count, thresholds, row_stride, flips, target, landing, pixel_bytes = args[:8]
        emitter = Emitter(builder)
        tables = [emitter.load(FLOATS_16, emitter.offset(thresholds, t, row_stride), 4) for t in range(T)]
        flip = emitter.trunc(flips, I16)

        def pixel(i, _):
            values = emitter.load(FLOATS_16, emitter.offset(rows, i, 64), 4)
            masks = reached_bases(emitter, values, tables, N, searched)
            bases = [emitter.xor(flip, emitter.bitcast(mask, I16)) for mask in masks]
            at = emitter.offset(target, emitter.load(I64, emitter.offset(landing, i, 8), 8), pixel_bytes)
            for i, bits in enumerate(in_image(emitter, bases, uniform)):
                if repeat == 2:
                    bits = emitter.mul(emitter.zext(bits, I32), emitter.const(0x10001, I32))
                emitter.store(bits, emitter.offset(at, i, 8), 2)
            return []

        emitter.loop(count, [], pixel)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, *literals), emit


def in_image(emitter, bases, uniform):
    """What the image holds of the bits of N bases, as pack.store_bases."""
    if not uniform:
        return bases
    a, b, *more = bases
    if not more:
        return [emitter.xor(a, b), b]
    (c,) = more
    carry = emitter.or_(emitter.and_(a, b), emitter.and_(c, emitter.or_(a, b)))
    return [carry, emitter.xor(emitter.xor(a, b), c)]
