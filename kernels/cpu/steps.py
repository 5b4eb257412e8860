"""Layers and pools one after the other, in one call: what every thread of a team runs.

With one thread, or several images for each, a thread takes an image through all steps before the next one: what lies
between two layers, at most some kilobytes, stays in its cache. With few images all threads share out each step, and
meet at a barrier before the next.

Each step is described as a call of its own would be (job.py). Only the places differ: a layer stores its bits straight
into the padded image of the next one (store.py).
"""

import functools

import numba
from numba import carray, njit, types

from .job import CHAIN_JOB_DTYPE, CONVOLUTION
from .pack import job_at
from .pool import pool_images, pool_job_at
from .primitives import STAMP, entry, load_word, meet
from .vector import run_images

CHAIN_JOB = types.CPointer(numba.from_dtype(CHAIN_JOB_DTYPE))


@functools.cache
def chain_kernel(stamp=STAMP):
    """The function that every thread of a team runs, once a call."""

    @entry(CHAIN_JOB)
    def run(jobs, thread, threads, barrier):
        chain = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        nan = 0
        if chain.by_thread:
            for image in range(chain.images * thread // threads, chain.images * (thread + 1) // threads):
                nan |= run_steps(chain, thread, image, image + 1, 0, 1, barrier)
        else:
            nan = run_steps(chain, thread, 0, chain.images, thread, threads, barrier)
        if nan:
            chain.saw_nan = 1

    return run


@njit
def run_steps(chain, thread, begin, end, part, parts, barrier):
    """A thread's part of `parts` of all steps for images begin..end; non-zero where a NaN was seen."""
    nan = 0
    for step in range(chain.steps):
        address = load_word(chain.jobs + 8 * step)
        if load_word(chain.kinds + 8 * step) == CONVOLUTION:
            nan |= run_images(carray(job_at(address), 1)[0], thread, begin, end, part, parts, barrier)
        else:
            pool = carray(pool_job_at(address), 1)[0]
            pool_images(pool, thread, begin, end, part, parts, chain.scratch + thread * chain.scratch_stride)
        if parts > 1:
            meet(barrier)
    return nan
