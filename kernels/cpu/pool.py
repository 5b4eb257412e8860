"""Max-pooling of packed words on the CPU.

The maximum reaches a threshold where any of its window does, so on bits it is an OR, once the channels whose comparison
was turned round (flips) are turned back:

    output = OR over the window of (input ^ flip), ^ flip

The plan lists the input pixels of every window. A tap that lies outside the image is replaced by one inside the same
window: an OR does not mind seeing a pixel twice, so there are no borders to look after.
"""

import functools

import numba
from numba import carray, types

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
                for n in range(N):
                    reached = 0
                    for tap in range(taps):
                        source = load_word(sources + 8 * tap)
                        reached |= load_word(image + 8 * ((source * P + word) * N + n)) ^ flip
                    store_word(job.output + 8 * ((pixel * P + word) * N + n), reached ^ flip)

    return pool


def main() -> None:
    import torch

    import abcnets

    from ..clock import interleaved_medians
    from .engine import packed_max_pool

    torch.set_num_threads(1)
    words, flips = torch.randint(-(2**62), 2**62, (8, 112, 112, 1, 2)), torch.arange(64) % 2 == 0
    arguments = (words, flips, 64, [3, 3], [2, 2], [1, 1], [1, 1], False)
    assert torch.equal(packed_max_pool(*arguments), abcnets.packed_max_pool(*arguments))
    floats = torch.randn(8, 64, 112, 112)
    contenders = {
        "float32": lambda: torch.nn.functional.max_pool2d(floats, 3, 2, 1),
        "two bases of bits": lambda: packed_max_pool(*arguments),
    }
    for name, seconds in interleaved_medians(contenders, 1.0).items():
        print(f"max-pool 3x3 / 2, 64 channels, 8 x 112x112, {name}: {seconds * 1e6:8.1f} us")


if __name__ == "__main__":
    main()
