"""The packed convolution on the CPU: a register tile of popcounts, and what feeds it.

    y[b, o, p] = constant[class of p, o] + sum over m, n of scale[m, n, o] * E[m, n]
    E = -(K // 2) + sum over taps and words k of popcount(words[pixel p + tap k][n] ^ weights[m][k][o])

**The tile** (`convolve_tile`). 16 output channels (two registers of eight 64-bit lanes) x P pixels x N bases are
counted at once. A weight word is read once for P * N uses, an activation word is broadcast to the lanes, and all
2 * P * N counters stay in registers:

    xor, popcount, add      for 8 x 64 = 512 products: 1.5 cycles on a Zen 4 core, which is this engine's bound

After the last tap of weight base m the counters become floats, are scaled and added to float registers that live on to
the next m. So nothing but the result is ever written, whatever M and N are.

**Narrow lanes** (layout.Lanes). Of a layer with 16 or 32 channels a 64-bit lane would be mostly empty. There, lanes are
16 or 32 bits wide, and one register holds 32 or 16 output channels. The image stays as it is: a broadcast reads a part
of a word, a unit. Only the order of weights and taps follows.

**ARM** counts the bits of bytes (cnt), in registers of 128 bits. Where it adds the four bytes of a 32-bit lane to a
counter in one instruction (udot), lanes are 32 bits wide; else 8, and after 31 units these counters are added to
16-bit ones in memory, before they overflow:

    eor, cnt, udot  or  eor, cnt, add      for 128 products

**Uniform levels** (layout.py). N = 2 is counted once, N = 3 twice: the image holds other words, a tile has fewer
counters, and their sum, an integer, becomes one float. The window sums that N = 2 takes away are made once an image
and thread (`sum_windows`), for all windows that could begin at any pixel: sixteen at a time, side by side.

**Equal alphas** are a single base, of which each output channel sees some channels only: an AND with a mask, as for
groups, and on x86 a part of the XOR's instruction.

**The loop nest**: image -> a tile's output channels -> 64 pixels -> tiles. One image's words (a 50 x 50 image of
128 channels: 43 KB a base) stay in the second-level cache, one tile's weights (9 x 128 bits x 16: 2.3 KB a base) in
the first. 64 pixels x 16 channels of results are collected in a 4 KB buffer, or 32 in two, then stored as floats or as
the next layer's bits (store.py).

**Threads** form a team (team.py). With several images a thread takes whole images, packs each into a buffer
of its own and convolves it while it is in its cache; with few images all threads pack, meet at a barrier, and share
out the blocks.

Run this file to check and time it: `python -m kernels.cpu.vector`.
"""

import functools

from numba import carray, njit, types
from numba.extending import intrinsic

from .. import layout
from .job import ADDED, COUNTERS, PART_BYTES, PIXEL_BLOCK, SCRATCH_BYTES
from .pack import JOB
from .primitives import (
    FLOATS_16,
    I32,
    I64,
    INTS_16,
    STAMP,
    Emitter,
    c_function,
    call_kernel,
    entry,
    ir,
    load_word,
    meet,
    store_word,
)


def counters_of(N, uniform) -> int:
    """How many counters a pixel and a register of output channels need."""
    return N - 1 if uniform else N


def tile_pixels(N, uniform, lanes) -> int:
    """Pixels in a tile: the counters of all must leave registers (of 32) for weights and temporaries.

    More of those on ARM, where no operand comes from memory, and where several words of a pixel are on their way.
    """
    most = 24 if lanes.register_bits == 512 else 16 if layout.image_words(N, uniform) == 1 else 8
    counters = counters_of(N, uniform) * lanes.registers
    return next(P for P in (8, 4, 2, 1) if P * counters <= most or P == 1)


# --------------------------------------------------------------------------- the tile


@intrinsic(prefer_literal=True)
def convolve_tile(
    typing, words, pixel_bytes, tap_offsets, tap_count, start, weights, masks, M, scales, constants,
    windows, pixel_classes, differing, counters, rows, bases, is_uniform, masked, lane_bits, registers, register_bits,
    repeats, pixels,
):  # fmt: skip
    """P pixels x 16 R output channels, complete: float32 rows[R][P][16], PART_BYTES from one R to the next.

    words, pixel_bytes  the image, at the tile's first unit, and from one of its pixels to the next
    tap_offsets         [tap_count] from a window's beginning to each (tap, unit)
    weights, masks      [M][tap_count][16 R], [tap_count][16 R] of lanes
    scales, constants   [M][N][16 R], [class][tile][16 R] at the tile
    windows             [P] the pixels that the windows begin at;  pixel_classes [P] from `constants` to their classes
    differing           int32 [pixel] the popcount of d in the window that begins there (uniform levels, N = 2)
    counters            scratch for lanes of 8 bits: two registers for each counter
    bases, pixels       N and P, literal ints as all that follow: loops over them are unrolled here, while compiling
    is_uniform          0 or 1: the image holds words for uniform levels
    masked              0 or 1: some lanes see only some of the unit's channels
    lane_bits           of a lane, which holds an output channel's counter, and of a unit
    registers           Q of them, of register_bits each
    repeats             of a unit in a word
    """
    literals = bases, is_uniform, masked, lane_bits, registers, register_bits, repeats, pixels
    N, uniform, masked_value, L, Q, W, repeat, P = (literal.literal_value for literal in literals)
    S, C = layout.image_words(N, uniform), counters_of(N, uniform)
    LANE, REGISTER = ir.IntType(L), ir.VectorType(ir.IntType(L), W // L)
    UNITS, REPEATED = ir.IntType(L * repeat), ir.VectorType(ir.IntType(L * repeat), W // (L * repeat))
    R, size = W // L * Q // 16, W // 8

    def emit(context, builder, signature, args):
        words, pixel_bytes, tap_offsets, tap_count, start, weights, masks, M, scales, constants = args[:10]
        first_windows, pixel_classes, differing, counters, rows = args[10:15]
        emitter = Emitter(builder)
        pixels_P = [emitter.load(I64, emitter.offset(first_windows, p, 8), 8) for p in range(P)]
        windows = [emitter.offset(words, pixel, pixel_bytes) for pixel in pixels_P]
        classes = [emitter.add(constants, emitter.load(I64, emitter.offset(pixel_classes, p, 8), 8)) for p in range(P)]
        sums_PR = [emitter.load(FLOATS_16, emitter.offset(at, r, 64), 4) for at in classes for r in range(R)]

        def differences(words_S, weight):
            """What is to be counted."""
            if uniform and N == 2:
                d, a = words_S
                return [emitter.or_(emitter.xor(a, weight), d)]
            return [emitter.xor(word, weight) for word in words_S]

        def sums_of_bases(counts_C, p):
            """Counts that have scales of their own: E[n], or for uniform levels the sum of all."""
            if not uniform:
                return counts_C
            twice = emitter.add(counts_C[0], counts_C[0])
            if N == 3:
                return [emitter.add(twice, counts_C[1])]
            window = emitter.load(I32, emitter.offset(differing, pixels_P[p], 4), 4)
            return [emitter.sub(twice, emitter.splat(window, INTS_16))]

        def weight_base(m, sums_PR):
            base = emitter.offset(weights, emitter.mul(m, tap_count), size * Q)

            def tap(k, counts_PCQ):
                new_counts = []
                to_tap = emitter.load(I64, emitter.offset(tap_offsets, k, 8), 8)
                weight_Q = [emitter.load(REGISTER, emitter.offset(base, k, size * Q, q, size), size) for q in range(Q)]
                mask_Q = [None] * Q
                if masked_value:
                    at_Q = [emitter.offset(masks, k, size * Q, q, size) for q in range(Q)]
                    mask_Q = [emitter.load(REGISTER, at, size) for at in at_Q]
                for p in range(P):
                    at = emitter.add(windows[p], to_tap)
                    units_S = [emitter.load(UNITS, emitter.offset(at, i, 8), L * repeat // 8) for i in range(S)]
                    words_S = [emitter.bitcast(emitter.splat(unit, REPEATED), REGISTER) for unit in units_S]
                    differ_QC = [differences(words_S, weight) for weight in weight_Q]
                    for c in range(C):
                        for differ_C, mask in zip(differ_QC, mask_Q):
                            differ = differ_C[c] if mask is None else emitter.and_(differ_C[c], mask)
                            count = counts_PCQ[len(new_counts)]
                            new_counts.append(emitter.add(count, emitter.popcount(differ)))
                return new_counts

            if L == 8:
                emitter.count_in_bytes(tap_count, 255 // 8, [emitter.const(0, REGISTER)] * (P * C * Q), tap, counters)
                less = emitter.splat(emitter.trunc(start, I32), INTS_16)
                counts = [emitter.add(emitter.byte_counts(counters, i), less) for i in range(P * C * R)]
                ints_PCR = [counts[i : i + R] for i in range(0, P * C * R, R)]
            else:
                first = emitter.splat(start if L == 64 else emitter.trunc(start, LANE), REGISTER)
                counts_PCQ = emitter.loop(tap_count, [first] * (P * C * Q), tap)
                ints_PCR = [emitter.to_ints(counts_PCQ[i : i + Q]) for i in range(0, P * C * Q, Q)]
            sums_PR = list(sums_PR)
            for p in range(P):
                for r in range(R):
                    ints_C = [ints_R[r] for ints_R in ints_PCR[p * C : (p + 1) * C]]
                    for n, count in enumerate(sums_of_bases(ints_C, p)):
                        scale = emitter.load(FLOATS_16, emitter.offset(scales, m, N * R * 64, n * R + r, 64), 4)
                        total = builder.sitofp(count, FLOATS_16)
                        sums_PR[p * R + r] = emitter.multiply_add(total, scale, sums_PR[p * R + r])
            return sums_PR

        for i, total in enumerate(emitter.loop(M, sums_PR, weight_base)):
            emitter.store(total, emitter.offset(rows, i % R, PART_BYTES, i // R, 64), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 15, *literals), emit


@functools.cache
def block_kernel(N, uniform, masked, lanes, stamp=STAMP):
    """The tiles of `lanes.block` output channels and at most 64 pixels, compiled for N bases.

    rows receives float32 [part][pixel - first][16]; a part may be written a little past its pixels, up to a whole tile.
    Returns the end of the pixels.
    """
    lane_bits, registers, register_bits, repeats = lanes.bits, lanes.registers, lanes.register_bits, lanes.repeats
    P, channel_bytes = tile_pixels(N, uniform, lanes), 4 * lanes.block
    tile_bytes = registers * register_bits // 8

    @c_function(types.int64(JOB, *[types.int64] * 4))
    def convolve_block(jobs, words, tile, first, rows):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        M, taps = job.weight_bases, job.tap_count
        weights = job.weights + tile * M * taps * tile_bytes
        masks = job.masks + tile * taps * tile_bytes
        scales = job.scales + tile * M * N * channel_bytes
        constants = job.constants + tile * channel_bytes
        words += load_word(job.tile_units + 8 * tile)
        last = min(first + PIXEL_BLOCK, job.output_pixels)
        for pixel in range(first, last, P):
            convolve_tile(
                words, job.pixel_bytes, job.tap_offsets, taps, job.start, weights, masks, M, scales, constants,
                job.windows + 8 * pixel, job.pixel_classes + 8 * pixel, rows + SCRATCH_BYTES, rows + COUNTERS,
                rows + 64 * (pixel - first), N, uniform, masked, lane_bits, registers, register_bits, repeats, P,
            )  # fmt: skip
        return last

    return convolve_block


@intrinsic
def sum_windows(typing, differing, window_taps, tap_count, count, sums):
    """(int32 at sums)[i] = sum over taps t of (int32 at differing)[i + window_taps[t]], i < count; 16 at a time."""

    def emit(context, builder, signature, args):
        differing, window_taps, tap_count, count, sums = args
        emitter = Emitter(builder)
        chunks = builder.sdiv(emitter.add(count, emitter.const(15)), emitter.const(16))

        def chunk(i, _):
            def tap(t, carried):
                pixels = emitter.load(I64, emitter.offset(window_taps, t, 8), 8)
                values = emitter.load(INTS_16, emitter.offset(differing, i, 64, pixels, 4), 4)
                return [emitter.add(carried[0], values)]

            (total,) = emitter.loop(tap_count, [emitter.const(0, INTS_16)], tap)
            emitter.store(total, emitter.offset(sums, i, 64), 4)
            return []

        emitter.loop(chunks, [], chunk)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


# --------------------------------------------------------------------------- one thread's share


@njit
def image_words(job, image, thread):
    """Where the padded words of an image are (or will be)."""
    return job.words + job.words_stride * (thread if job.words_by_thread else image)


@njit
def pack_share(job, thread, begin, end):
    """Pack chunks begin..end, counted through all images; non-zero where a NaN was seen."""
    scratch = job.scratch + thread * job.scratch_stride
    nan = 0
    for task in range(begin, end):
        image = task // job.chunk_count
        first = load_word(job.chunks + 8 * (task % job.chunk_count))
        source = thread if job.input_by_thread else image
        nan |= call_kernel(job.chunk_kernel, job.address, source, first, image_words(job, image, thread), scratch)
    return nan


@njit
def convolve_share(job, thread, begin, end):
    """Compute tasks begin..end; a task is a tile's channels at 64 pixels of one image."""
    rows = job.scratch + thread * job.scratch_stride
    output_pixels, tiles = job.output_pixels, job.tiles
    pixel_blocks = (output_pixels + PIXEL_BLOCK - 1) // PIXEL_BLOCK
    image = begin // (tiles * pixel_blocks)
    tile = begin // pixel_blocks % tiles
    first = begin % pixel_blocks * PIXEL_BLOCK
    summed = -1  # the image whose windows are
    for _ in range(begin, end):
        words = image_words(job, image, thread)
        if job.differing != 0 and summed != image:
            sum_windows(
                words + job.differing, job.window_taps, job.window_tap_count, job.window_count, rows + SCRATCH_BYTES
            )
            summed = image
        last = call_kernel(job.block_kernel, job.address, words, tile, first, rows)
        output = job.output + job.output_stride * (thread if job.output_by_thread else image)
        if job.other != 0:
            store_word(rows + ADDED, job.other + job.other_stride * (thread if job.other_by_thread else image))
        call_kernel(job.store_kernel, job.address, output, tile, first, rows)
        first = last
        if first == output_pixels:
            first, tile = 0, tile + 1
        if tile == tiles:
            tile, image = 0, image + 1


@njit
def run_images(job, thread, begin, end, part, parts, barrier):
    """A thread's part of `parts` of all that is to be done for images begin..end; non-zero where a NaN was seen."""
    nan, chunks = 0, (end - begin) * job.chunk_count
    if chunks > 0:
        start = begin * job.chunk_count
        nan = pack_share(job, thread, start + chunks * part // parts, start + chunks * (part + 1) // parts)
        if parts > 1:
            meet(barrier)
    tasks = job.tiles * ((job.output_pixels + PIXEL_BLOCK - 1) // PIXEL_BLOCK)  # of one image
    start, tasks = begin * tasks, (end - begin) * tasks
    convolve_share(job, thread, start + tasks * part // parts, start + tasks * (part + 1) // parts)
    return nan


@functools.cache
def run_kernel(stamp=STAMP):
    """The function that every thread of a team runs, once a call."""

    @entry(JOB)
    def run(jobs, thread, threads, barrier):
        job = carray(jobs, 1)[0]
        _ = stamp
        nan = 0
        if job.words_by_thread:
            for image in range(job.images * thread // threads, job.images * (thread + 1) // threads):
                nan |= run_images(job, thread, image, image + 1, 0, 1, barrier)
        else:
            nan = run_images(job, thread, 0, job.images, thread, threads, barrier)
        if nan:
            job.saw_nan = 1

    return run


if __name__ == "__main__":
    from ..check import cpu_rung
    from .engine import packed_conv

    cpu_rung("vector", packed_conv, (1, 2, 3, 5))
