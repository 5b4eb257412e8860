"""The activation quantizer on the CPU: forward and backward in one pass over memory, for training.

    forward     Aq = levels[k] where R has reached k of the T ascending thresholds; NaN stays NaN
    backward    dL/dR = sum_t h_t G [|R - t| <= 1/2],  and the sums of G [|R - t| <= 1/2] and of G [R >= t] for each t

In plain torch each threshold costs half a dozen sweeps, and what they hold between them is written and read again. Here
the elements come in blocks that stay in the first-level cache while one loop a threshold runs over them, sixteen at a
time; so memory is read and written once, whatever T is.

    elements    in the order in which they lie in memory, whichever dimension that is: all that is asked of R, G and the
                result is the same order
    float32     is read and written where it lies; bfloat16 is widened into the thread's scratch, and rounded at the end
                (the levels before they are chosen from)
    a thread    has its own blocks and its own sums: float32 within a block, float64 from block to block

The numbers are those of abcnets.py. A product with 1 or 0 stands where a choice would do, since 0 times an infinite or
undefined gradient is NaN there too; and no rounding is left to the compiler, but for the order of the sums (`plus`).

Run this file to check and time it: `python -m kernels.cpu.staircase`.
"""

import functools

import numba
from numba import carray, float32, njit, types, uint16, uint32

from .job import STAIRCASE_BLOCK as BLOCK
from .job import STAIRCASE_JOB_DTYPE, STAIRCASE_SCRATCH_BYTES
from .primitives import STAMP, array_at, c_function, call_int

JOB = types.CPointer(numba.from_dtype(STAIRCASE_JOB_DTYPE))
ONE, ZERO, HALF = float32(1), float32(0), float32(0.5)


# --------------------------------------------------------------------------- one block


@njit
def climb(r, a, thresholds, levels):
    """a = levels[k] where r has reached k of the ascending thresholds, and the last entry, NaN, where r is NaN."""
    lowest, level, nan, threshold = levels[0], levels[1], levels[-1], thresholds[0]
    for i in range(len(r)):
        below = lowest if r[i] == r[i] else nan
        a[i] = level if r[i] >= threshold else below
    for t in range(1, len(thresholds)):
        threshold, level = thresholds[t], levels[t + 1]
        for i in range(len(r)):
            a[i] = level if r[i] >= threshold else a[i]


@njit(fastmath={"reassoc"})
def plus(a, b):
    """An addition whose order the compiler may choose: what it takes to add up sixteen sums at once."""
    return a + b


@njit
def descend(r, g, slope, threshold, half_step):
    """slope += half_step g [window]; returns the sums of g [window] and of g where r has reached the threshold."""
    near = above = ZERO
    for i in range(len(r)):
        inside = g[i] * (ONE if abs(r[i] - threshold) <= HALF else ZERO)
        near = plus(near, inside)
        above = plus(above, g[i] * (ONE if r[i] >= threshold else ZERO))
        slope[i] += inside * half_step
    return near, above


@njit
def total_of(g):
    total = ZERO
    for i in range(len(g)):
        total = plus(total, g[i])
    return total


@njit
def where_not_zero(r, g, masked):
    """masked = g, but 0 where r is."""
    for i in range(len(r)):
        masked[i] = g[i] * (ONE if r[i] != ZERO else ZERO)
    return masked


# --------------------------------------------------------------------------- two kinds of floats


@njit
def read(job, address, first, count, scratch):
    """`count` elements from `first` on, as an array of float32."""
    if not job.bfloat16:
        return array_at(address + 4 * first, count, float32)
    halves, floats = array_at(address + 2 * first, count, uint16), array_at(scratch, count, uint32)
    for i in range(count):
        floats[i] = uint32(halves[i]) << uint32(16)
    return array_at(scratch, count, float32)


@njit
def round_to_bfloat16(job, first, count, scratch):
    """float32 results in the scratch -> the output, to nearest and ties to even; NaN stays NaN."""
    floats, halves = array_at(scratch, count, uint32), array_at(job.output + 2 * first, count, uint16)
    for i in range(count):
        bits = floats[i]
        rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
        is_nan = (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000)
        halves[i] = uint16(0x7FC0) if is_nan else uint16(rounded)


# --------------------------------------------------------------------------- one thread's share


@njit
def share(job):
    """(this thread's number, its first block, the block behind its last)."""
    thread, threads = 0, 1
    if job.threads > 1:
        thread, threads = call_int(job.thread_number), call_int(job.thread_count)
    blocks = (job.count + BLOCK - 1) // BLOCK
    return thread, blocks * thread // threads, blocks * (thread + 1) // threads


@functools.cache
def forward_kernel(stamp=STAMP):
    """The function that every thread of the pool runs for Aq."""

    @c_function(types.void(JOB))
    def forward(jobs):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        T = job.threshold_count
        thresholds = array_at(job.thresholds, T, float32)
        thread, begin, end = share(job)
        for block in range(begin, end):
            first = block * BLOCK
            count = min(BLOCK, job.count - first)
            r = read(job, job.input, first, count, job.scratch + thread * STAIRCASE_SCRATCH_BYTES)
            if job.bfloat16:
                halves = array_at(job.output + 2 * first, count, uint16)
                climb(r, halves, thresholds, array_at(job.levels, T + 2, uint16))
            else:
                floats = array_at(job.output + 4 * first, count, float32)
                climb(r, floats, thresholds, array_at(job.levels, T + 2, float32))

    return forward


@functools.cache
def backward_kernel(stamp=STAMP):
    """The function that every thread of the pool runs for dL/dR and the sums."""

    @c_function(types.void(JOB))
    def backward(jobs):
        job = carray(jobs, 1)[0]
        _ = stamp
        T = job.threshold_count
        thresholds, half_steps = array_at(job.thresholds, T, float32), array_at(job.half_steps, T, float32)
        thread, begin, end = share(job)
        sums = array_at(job.sums + thread * job.sums_stride, 2 * T + 1, types.float64)
        r_scratch = job.scratch + thread * STAIRCASE_SCRATCH_BYTES
        g_scratch, masked_scratch = r_scratch + 4 * BLOCK, r_scratch + 8 * BLOCK
        slope_scratch = r_scratch + 12 * BLOCK
        for block in range(begin, end):
            first = block * BLOCK
            count = min(BLOCK, job.count - first)
            r = read(job, job.input, first, count, r_scratch)
            g = read(job, job.gradient, first, count, g_scratch)
            if job.zero:
                g = where_not_zero(r, g, array_at(masked_scratch, count, float32))
            slope = array_at(slope_scratch if job.bfloat16 else job.output + 4 * first, count, float32)
            slope[:] = ZERO
            for t in range(T):
                near, above = descend(r, g, slope, thresholds[t], half_steps[t])
                sums[t] += near
                sums[T + t] += above
            sums[2 * T] += total_of(g)
            if job.bfloat16:
                round_to_bfloat16(job, first, count, slope_scratch)

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
