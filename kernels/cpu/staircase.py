"""The activation quantizer on the CPU: forward and backward in one pass over memory, for training.

    forward     Aq = levels[k] where R has reached k of the T ascending thresholds; NaN stays NaN
    backward    dL/dR = sum_t h_t G [|R - t| <= 1/2],  and the sums of G [|R - t| <= 1/2] and of G [R >= t] for each t

In plain torch each threshold costs half a dozen sweeps, and what they hold between them is written and read again. Here
sixteen elements at a time are read into a register, meet all thresholds there, and are written: memory is read and
written once, whatever T is. So the loops are compiled for each T, with the thresholds unrolled.

    elements    in the order in which they lie in memory, whichever dimension that is: all that is asked of R, G and the
                result is the same order; the last few, fewer than sixteen, go through the thread's scratch
    float32     is read and written as it is; bfloat16 is widened in the register, and rounded at the end
                (the levels before they are chosen from)
    a thread    has its own elements and its own sums: float32 within a block, float64 from block to block

The numbers are those of abcnets.py, and no rounding is left to the compiler, but for the order of the sums. Plain torch
multiplies by 1 or 0 where these loops choose, and 0 times an infinite or undefined gradient or scale is NaN: where
there is one, these loops multiply too (`exact`).

Run this file to check and time it: `python -m kernels.cpu.staircase`.
"""

import functools
from math import isfinite

import numba
from llvmlite import ir
from numba import carray, float32, njit, types, uint8
from numba.extending import intrinsic

from .job import STAIRCASE_BLOCK as BLOCK
from .job import STAIRCASE_JOB_DTYPE, STAIRCASE_SCRATCH_BYTES
from .primitives import F32, FLOATS_16, I16, I32, INTS_16, STAMP, Emitter, array_at, entry

JOB = types.CPointer(numba.from_dtype(STAIRCASE_JOB_DTYPE))
SHORTS_16 = ir.VectorType(I16, 16)
BFLOAT16_NAN = 0x7FC0


# --------------------------------------------------------------------------- sixteen elements


def read(emitter, address, i, bfloat16):
    """The i-th sixteen elements at address, as float32."""
    if not bfloat16:
        return emitter.load(FLOATS_16, emitter.offset(address, i, 64), 4)
    halves = emitter.load(SHORTS_16, emitter.offset(address, i, 32), 2)
    bits = emitter.shl(emitter.zext(halves, INTS_16), emitter.const(16, INTS_16))
    return emitter.bitcast(bits, FLOATS_16)


def write(emitter, floats, address, i, bfloat16):
    """Sixteen float32 to the i-th place; to bfloat16 they are rounded, to nearest and ties to even; NaN stays NaN."""
    if not bfloat16:
        return emitter.store(floats, emitter.offset(address, i, 64), 4)
    bits, half = emitter.bitcast(floats, INTS_16), emitter.const(16, INTS_16)
    odd = emitter.and_(emitter.builder.lshr(bits, half), emitter.const(1, INTS_16))
    rounded = emitter.builder.lshr(emitter.add(bits, emitter.add(odd, emitter.const(0x7FFF, INTS_16))), half)
    is_nan = emitter.builder.fcmp_unordered("uno", floats, floats)
    halves = emitter.select(is_nan, emitter.const(BFLOAT16_NAN, INTS_16), rounded)
    return emitter.store(emitter.trunc(halves, SHORTS_16), emitter.offset(address, i, 32), 2)


def table(emitter, address, count, element, vector):
    """`count` numbers at address, each in all lanes of a register."""
    size = 2 if element is I16 else 4
    scalars = [emitter.load(element, emitter.offset(address, k, size), size) for k in range(count)]
    return [emitter.splat(scalar, vector) for scalar in scalars]


def sum_of(emitter, vector):
    """The sum of a register's lanes, by halves."""
    builder, lanes = emitter.builder, 16
    while lanes > 1:
        lanes //= 2
        low, high = (emitter.shuffle(vector, vector, range(first, first + lanes)) for first in (0, lanes))
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, emitter.const(0, I32))


# --------------------------------------------------------------------------- the two passes


@intrinsic(prefer_literal=True)
def climb(typing, R, Aq, sixteens, thresholds, levels, count_of_thresholds, is_bfloat16):
    """Aq = levels[k] where R has reached k of the ascending thresholds, and the last level, NaN, where R is NaN.

    R, Aq, thresholds, levels are addresses: of 16 elements each in `sixteens`, float32 [T], [T + 2] of Aq's kind.
    """
    T, bfloat16 = count_of_thresholds.literal_value, is_bfloat16.literal_value

    def emit(context, builder, signature, args):
        R, Aq, sixteens, thresholds, levels = args[:5]
        emitter = Emitter(builder)
        limits = table(emitter, thresholds, T, F32, FLOATS_16)
        lowest, *higher, nan = table(emitter, levels, T + 2, *((I16, SHORTS_16) if bfloat16 else (F32, FLOATS_16)))

        def step(i, _):
            r = read(emitter, R, i, bfloat16)
            level = emitter.select(builder.fcmp_ordered("ord", r, r), lowest, nan)
            for limit, above in zip(limits, higher):
                level = emitter.select(builder.fcmp_ordered(">=", r, limit), above, level)
            emitter.store(level, emitter.offset(Aq, i, 32 if bfloat16 else 64), 2 if bfloat16 else 4)
            return []

        emitter.loop(sixteens, [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, count_of_thresholds, is_bfloat16), emit


@intrinsic(prefer_literal=True)
def descend(typing, R, G, G_R, sixteens, thresholds, half_steps, sums, count_of_thresholds, is_bfloat16, zeros_count,
            exact):  # fmt: skip
    """G_R = sum_t h_t G [window_t], and the sums of G [window_t], of G where R has reached t, of G, and of G again.

    All are addresses: of 16 elements each in `sixteens`; float32 [T], [T]; float32 sums [2 T + 2].

    zeros_count     0: where R is 0, G counts as 0, but in the last sum
    exact           1: multiply by 1 and 0, as plain torch does, which matters where G is infinite or NaN
    """
    T, bfloat16, zeros_count_too, exactly = (
        literal.literal_value for literal in (count_of_thresholds, is_bfloat16, zeros_count, exact)
    )

    def emit(context, builder, signature, args):
        R, G, G_R, sixteens, thresholds, half_steps, sums = args[:7]
        emitter = Emitter(builder)
        limits = table(emitter, thresholds, T, F32, FLOATS_16)
        scales = table(emitter, half_steps, T, F32, FLOATS_16)
        zero, one, half = (emitter.const(number, FLOATS_16) for number in (0.0, 1.0, 0.5))

        def only_where(flags, g):
            return builder.fmul(g, emitter.select(flags, one, zero)) if exactly else emitter.select(flags, g, zero)

        def plus(total, g, flags, chosen):
            """total + chosen, which is g where the flags are and 0 elsewhere: one masked addition."""
            return builder.fadd(total, chosen) if exactly else emitter.select(flags, builder.fadd(total, g), total)

        def step(i, carried):
            nears, aboves, (total, everything) = carried[:T], carried[T : 2 * T], carried[2 * T :]
            r, g = read(emitter, R, i, bfloat16), read(emitter, G, i, bfloat16)
            everything = builder.fadd(everything, g)
            if not zeros_count_too:
                g = only_where(builder.fcmp_unordered("!=", r, zero), g)
            slope = zero
            for t in range(T):
                distance = emitter.call_llvm("llvm.fabs.v16f32", FLOATS_16, builder.fsub(r, limits[t]))
                near, above = builder.fcmp_ordered("<=", distance, half), builder.fcmp_ordered(">=", r, limits[t])
                inside = only_where(near, g)
                nears[t] = plus(nears[t], g, near, inside)
                slope = plus(slope, builder.fmul(g, scales[t]), near, builder.fmul(inside, scales[t]))
                aboves[t] = plus(aboves[t], g, above, only_where(above, g))
            write(emitter, slope, G_R, i, bfloat16)
            return [*nears, *aboves, builder.fadd(total, g), everything]

        for k, total in enumerate(emitter.loop(sixteens, [zero] * (2 * T + 2), step)):
            emitter.store(sum_of(emitter, total), emitter.offset(sums, k, 4), 4)
        return context.get_dummy_value()

    literals = count_of_thresholds, is_bfloat16, zeros_count, exact
    return types.void(*[types.int64] * 7, *literals), emit


# --------------------------------------------------------------------------- one thread's share


@njit
def share(job, thread, threads):
    """(this thread's first block, the block behind its last)."""
    blocks = (job.count + BLOCK - 1) // BLOCK
    return blocks * thread // threads, blocks * (thread + 1) // threads


@njit
def copy_bytes(source, target, count):
    array_at(target, count, uint8)[:] = array_at(source, count, uint8)


@functools.cache
def forward_kernel(T, bfloat16, stamp=STAMP):
    """The function that every thread of a team runs for Aq, compiled for T thresholds and one kind of floats."""
    size = 2 if bfloat16 else 4

    @entry(JOB)
    def forward(jobs, thread, threads, barrier):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        begin, end = share(job, thread, threads)
        first, count = begin * BLOCK, min(end * BLOCK, job.count) - begin * BLOCK
        if count <= 0:
            return
        R, Aq, rest = job.input + size * first, job.output + size * first, count % 16
        climb(R, Aq, count // 16, job.thresholds, job.levels, T, bfloat16)
        if rest:
            scratch = job.scratch + thread * STAIRCASE_SCRATCH_BYTES
            copy_bytes(R + size * (count - rest), scratch, size * rest)
            climb(scratch, scratch, 1, job.thresholds, job.levels, T, bfloat16)
            copy_bytes(scratch, Aq + size * (count - rest), size * rest)

    return forward


@functools.cache
def backward_kernel(T, bfloat16, stamp=STAMP):
    """The function that every thread of a team runs for dL/dR and the sums, compiled likewise."""
    size = 2 if bfloat16 else 4

    @njit
    def one_block(job, R, G, G_R, sixteens, sums, scratch):
        h = job.half_steps
        block = array_at(scratch, 2 * T + 2, float32)
        exact = job.exact != 0
        if not exact:
            if job.zero:
                descend(R, G, G_R, sixteens, job.thresholds, h, scratch, T, bfloat16, 0, 0)
            else:
                descend(R, G, G_R, sixteens, job.thresholds, h, scratch, T, bfloat16, 1, 0)
            exact = not isfinite(block[2 * T + 1])
        if exact:
            if job.zero:
                descend(R, G, G_R, sixteens, job.thresholds, h, scratch, T, bfloat16, 0, 1)
            else:
                descend(R, G, G_R, sixteens, job.thresholds, h, scratch, T, bfloat16, 1, 1)
        for k in range(2 * T + 1):
            sums[k] += block[k]

    @entry(JOB)
    def backward(jobs, thread, threads, barrier):
        job = carray(jobs, 1)[0]
        _ = stamp
        begin, end = share(job, thread, threads)
        sums = array_at(job.sums + thread * job.sums_stride, 2 * T + 1, types.float64)
        r = job.scratch + thread * STAIRCASE_SCRATCH_BYTES
        g, g_r, block_sums = r + 64, r + 128, r + 192
        for block in range(begin, end):
            count, at = min(BLOCK, job.count - block * BLOCK), size * block * BLOCK
            R, G, G_R, rest = job.input + at, job.gradient + at, job.output + at, count % 16
            one_block(job, R, G, G_R, count // 16, sums, block_sums)
            if rest:  # with a gradient of 0 beside them
                done = size * (count - rest)
                array_at(r, 128, uint8)[:] = 0
                copy_bytes(R + done, r, size * rest)
                copy_bytes(G + done, g, size * rest)
                one_block(job, r, g, g_r, 1, sums, block_sums)
                copy_bytes(g_r, G_R + done, size * rest)

    return backward


def main() -> None:
    """Beside the plain operators: is it right, and how many of the bytes that a pass must move it moves a second."""
    import torch

    import abcnets

    from ..check import demonstrate

    tables = torch.tensor([0.35, 1.0, 1.64]), torch.tensor([0.32, 0.33, 0.32]), True
    R, G = torch.randn(2, 32, 32, 28, 28, generator=torch.Generator().manual_seed(0)).unbind()
    pairs = {"float32": (R.relu(), G), "bfloat16": (R.relu().bfloat16(), G.bfloat16())}
    forwards = {"numba": torch.ops.abcnets.staircase, "plain torch": abcnets._staircase}
    backwards = {"numba": torch.ops.abcnets.staircase_backward, "plain torch": abcnets._staircase_backward}

    def problem():
        for dtype, (R, G) in pairs.items():
            Aq, wanted = (forward(R, *tables) for forward in forwards.values())
            G_R, wanted_G_R = (backward(R, G, *tables)[0] for backward in backwards.values())
            if not (torch.equal(Aq, wanted) and torch.equal(G_R, wanted_G_R)):
                return f"another result than plain torch's, in {dtype}"

    def calls():
        found = {}
        for dtype, (R, G) in pairs.items():
            for form, call in forwards.items():
                found[f"forward, {dtype}, {form}"] = lambda R, call=call: call(R, *tables), [R], 0, 2 * R.nbytes
            for form, call in backwards.items():
                call = lambda R, G=G, call=call: call(R, G, *tables)  # noqa: E731
                found[f"backward, {dtype}, {form}"] = call, [R], 0, 3 * R.nbytes
        return found

    demonstrate("staircase", problem, calls)


if __name__ == "__main__":
    main()
