"""The convolution's tile where no instruction counts the bits of a register: popcounts are looked up.

    y[b, o, p] = constant[class of p, o] + sum over m, n of scale[m, n, o] * E[m, n]          (as in vector.py)

**The step.** A byte lane is an output channel, 32 of them in an AVX2 register, 64 in one of AVX-512. For a nibble a of
the activations, four channels of one pixel, memory holds a table of sixteen bytes: popcount(a ^ w) for each nibble w.
It is broadcast, and a register of weight nibbles is its index:

    vpshufb, vpaddb      for 32 x 4 = 128 products

No xor, no mask, no shift. Weights are stored as a nibble a byte, and packing writes the image as offsets of tables. A
nibble of channels that a lane's group does not see has the index 128, which finds 0.

**Two words in one look-up** (layout.LookUp). For uniform levels an entry is the sum over both words: three and four
levels cost what two do. For N = 2 it holds one count in each half of a byte, and is split after three nibbles, before
the lower one overflows.

**Bytes overflow.** After at most 63 nibbles (fewer where entries are larger) they are added to 16-bit counters, which
wait in the first-level cache. After the last nibble of a weight base these become floats, are scaled and added to the
rows. All else, the loop nest, threads, packing and storing, is the other tile's (vector.py).

Run this file to check and time it: `python -m kernels.cpu.lookup`.
"""

import functools

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import layout
from .job import COUNTERS, PART_BYTES, PIXEL_BLOCK
from .pack import JOB
from .primitives import FLOATS_16, I8, I16, I32, I64, INTS_16, STAMP, Emitter, c_function, load_word

SHUFFLES = {32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}
SPLIT = 3  # nibbles that half a byte can count: 3 x 4 <= 15


def counters_of(N, uniform) -> int:
    """How many byte counters a pixel and a register of output channels need."""
    return 1 if uniform else N


def tile_pixels(N, uniform, lanes, registers) -> int:
    """Pixels in a tile: the counters (for N = 2 half bytes too) leave registers for weights, a table, a temporary."""
    each = registers * (3 if N == 2 and not uniform else counters_of(N, uniform))
    return next(P for P in (8, 4, 2, 1) if P * each <= (24 if lanes == 64 else 12) or P == 1)


@intrinsic(prefer_literal=True)
def look_up_tile(
    typing, image, pixel_bytes, step_offsets, step_count, start, weights, M, scales, constants,
    windows, pixel_classes, counters, rows, bases, is_uniform, lanes, registers, step, pixels,
):  # fmt: skip
    """P pixels x 16 R output channels, complete: float32 rows[R][P][16], PART_BYTES from one R to the next.

    image, pixel_bytes  at the tile's first nibble, and from one pixel to the next
    step_offsets        [step_count] from a window's beginning to each (tap, step)
    weights             uint8 [M][step_count][step][Q][lanes]
    scales, constants   [M][N][16 R], [class][tile][16 R] at the tile
    windows             [P] the pixels that the windows begin at;  pixel_classes [P] from `constants` to their classes
    counters            16-bit, scratch for 2 P Q of each counter's registers
    bases, pixels       N and P, literal ints as all that follow: loops over them are unrolled here, while compiling
    is_uniform          0 or 1: all bases are one count
    lanes, registers    of a register, which are bytes; Q of them
    step                nibbles in one
    """
    literals = bases, is_uniform, lanes, registers, step, pixels
    N, uniform, L, Q, U, P = (literal.literal_value for literal in literals)
    C, R, entry = counters_of(N, uniform), L * Q // 16, layout.table_weights(N, uniform)
    pairs, split = len(entry) == 2, len(entry) == 2 and not uniform
    BYTES, TABLE, WORDS = ir.VectorType(I8, L), ir.VectorType(I8, 16), ir.VectorType(I16, L // 2)
    most = 4 if split else 4 * sum(entry)  # that a nibble adds to a counter

    def emit(context, builder, signature, args):
        image, pixel_bytes, step_offsets, step_count, start, weights, M, scales, constants = args[:9]
        first_windows, pixel_classes, counters, rows = args[9:13]
        emitter = Emitter(builder)
        pixels_P = [emitter.load(I64, emitter.offset(first_windows, p, 8), 8) for p in range(P)]
        windows = [emitter.offset(image, pixel, pixel_bytes) for pixel in pixels_P]
        tables = _constant(context, builder, layout.look_up_tables(entry))
        start = emitter.splat(emitter.mul(emitter.trunc(start, I32), emitter.const(N if uniform else 1, I32)), INTS_16)

        def row(p, r):
            return emitter.offset(rows, r, PART_BYTES, p, 64)

        for p in range(P):
            at = emitter.add(constants, emitter.load(I64, emitter.offset(pixel_classes, p, 8), 8))
            for r in range(R):
                emitter.store(emitter.load(FLOATS_16, emitter.offset(at, r, 64), 4), row(p, r), 4)

        def found(at, position, weight_Q):
            """The entries of a pixel's table at the weights."""
            wide = I16 if pairs else I8
            offset = emitter.zext(emitter.load(wide, emitter.offset(at, position, 1), wide.width // 8), I64)
            table = emitter.load(TABLE, emitter.add(tables, offset), 16)
            table = emitter.shuffle(table, table, list(range(16)) * (L // 16))
            return [emitter.call_llvm(SHUFFLES[L], BYTES, table, weight) for weight in weight_Q]

        def added(total, entry):
            return entry if total is None else emitter.in_order(emitter.add(total, entry))

        def count_nibbles(at_weights, at_P, counts_PCQ):
            """Those of one step."""
            counts_PCQ = list(counts_PCQ)
            halves_PQ = [None] * (P * Q)
            for u in range(U):
                weight_Q = [emitter.load(BYTES, emitter.offset(at_weights, u * Q + q, L), L) for q in range(Q)]
                for p, at in enumerate(at_P):
                    if split:
                        for q, entry in enumerate(found(at, 2 * u, weight_Q)):
                            halves_PQ[p * Q + q] = added(halves_PQ[p * Q + q], entry)
                        continue
                    for c in range(C):
                        for q, entry in enumerate(found(at, 2 * u if pairs else 16 * c + u, weight_Q)):
                            i = (p * C + c) * Q + q
                            counts_PCQ[i] = added(counts_PCQ[i], entry)
                if split and (u % SPLIT == SPLIT - 1 or u == U - 1):
                    for i, both in enumerate(halves_PQ):
                        upper = emitter.lshr(emitter.bitcast(both, WORDS), emitter.const(4, WORDS))
                        for c, count in enumerate((both, emitter.bitcast(upper, BYTES))):
                            j = (i // Q * C + c) * Q + i % Q
                            counts_PCQ[j] = added(counts_PCQ[j], emitter.and_(count, emitter.const(15, BYTES)))
                    halves_PQ = [None] * (P * Q)
            return counts_PCQ

        def weight_base(m, _):
            base = emitter.offset(weights, emitter.mul(m, step_count), U * Q * L)

            def count_step(k, counts_PCQ):
                to_step = emitter.load(I64, emitter.offset(step_offsets, k, 8), 8)
                at_P = [emitter.add(window, to_step) for window in windows]
                return count_nibbles(emitter.offset(base, k, U * Q * L), at_P, counts_PCQ)

            zeros = [emitter.const(0, BYTES)] * (P * C * Q)
            emitter.count_in_bytes(step_count, 255 // (most * U), zeros, count_step, counters)
            for c in range(C):
                for r in range(R):
                    scale = emitter.load(FLOATS_16, emitter.offset(scales, m, N * R * 64, c * R + r, 64), 4)
                    for p in range(P):
                        count = emitter.add(emitter.byte_counts(counters, (p * C + c) * R + r), start)
                        total = emitter.load(FLOATS_16, row(p, r), 4)
                        total = emitter.multiply_add(builder.sitofp(count, FLOATS_16), scale, total)
                        emitter.store(total, row(p, r), 4)
            return []

        emitter.loop(M, [], weight_base)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 13, *literals), emit


def _constant(context, builder, table):
    """The address of a table of bytes that lies beside the code."""
    value = ir.Constant(ir.ArrayType(I8, table.size), bytearray(table.tobytes()))
    variable = cgutils.global_constant(builder.module, "look_up_tables", value)
    variable.align = 64
    return builder.ptrtoint(variable, I64)


@functools.cache
def block_kernel(N, uniform, look_up, stamp=STAMP):
    """The tiles of `look_up.block` output channels and at most 64 pixels, for N bases; as vector.block_kernel."""
    lanes, registers, step = look_up.lanes, look_up.registers, look_up.step
    P, step_bytes, channel_bytes = tile_pixels(N, uniform, lanes, registers), step * look_up.block, 4 * look_up.block

    @c_function(types.int64(JOB, *[types.int64] * 4))
    def convolve_block(jobs, words, tile, first, rows):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        M, steps = job.weight_bases, job.tap_count
        weights = job.weights + tile * M * steps * step_bytes
        scales = job.scales + tile * M * N * channel_bytes
        constants = job.constants + tile * channel_bytes
        words += load_word(job.tile_units + 8 * tile)
        last = min(first + PIXEL_BLOCK, job.output_pixels)
        for pixel in range(first, last, P):
            look_up_tile(
                words, job.pixel_bytes, job.tap_offsets, steps, job.start, weights, M, scales, constants,
                job.windows + 8 * pixel, job.pixel_classes + 8 * pixel, rows + COUNTERS,
                rows + 64 * (pixel - first), N, uniform, lanes, registers, step, P,
            )  # fmt: skip
        return last

    return convolve_block


if __name__ == "__main__":
    from ..check import cpu_rung
    from .engine import packed_conv

    cpu_rung("lookup", packed_conv, (1, 2, 3))
