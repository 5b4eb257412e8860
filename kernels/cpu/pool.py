"""Max-pooling of packed words on the CPU.

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
from numba import carray, njit, types

from .job import POOL_JOB_DTYPE
from .primitives import STAMP, c_function, call_int, load_word, store_word

POOL_JOB = types.CPointer(numba.from_dtype(POOL_JOB_DTYPE))


@functools.cache
def pool_kernel(stamp=STAMP):
    """The function that every thread runs: a share of all output pixels."""

    @c_function(types.void(POOL_JOB))
    def pool(jobs):
        job = carray(jobs, 1)[0]
        _ = stamp
        thread, threads = 0, 1
        if job.threads > 1:
            thread, threads = call_int(job.thread_number), call_int(job.thread_count)
        P, N, taps = job.channel_words, job.bases, job.taps
        pixels = job.images * job.output_pixels
        for pixel in range(pixels * thread // threads, pixels * (thread + 1) // threads):
            image = job.input + 8 * P * N * job.input_pixels * (pixel // job.output_pixels)
            sources = job.sources + 8 * taps * (pixel % job.output_pixels)
            for word in range(P):
                flip = load_word(job.flips + 8 * word)
                if job.binary:
                    first, output = image + 8 * word * N, job.output + 8 * (pixel * P + word) * N
                    largest_number(first, 8 * P * N, sources, taps, flip, output, N)
                    continue
                for n in range(N):
                    reached = 0
                    for tap in range(taps):
                        source = load_word(sources + 8 * tap)
                        reached |= load_word(image + 8 * ((source * P + word) * N + n)) ^ flip
                    store_word(job.output + 8 * ((pixel * P + word) * N + n), reached ^ flip)

    return pool


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


def main() -> None:
    from ..check import pool_rung
    from . import engine

    pool_rung("pool", engine)


if __name__ == "__main__":
    main()
