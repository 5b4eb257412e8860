"""The weights' quantizer on the CPU, for training: the levels that fit a channel's weights, and the weights on them.

    thresholds    -u_j spread, with the spread the deviation from the mean (thermometer) or the rms (other codes)
    levels        least squares over the weights that lie between two thresholds (abcnets.py, `fit_weight`)
    again         where a code asks for it: thresholds midway between levels, and levels once more
    Wq            the level that each weight falls on

In plain torch that is some ninety calls a layer with three rounds, each of which is done before it has begun: a layer
has ten thousand weights. Here a channel, which lies in the first-level cache, goes through all of it at once.

Means and spreads come from sums in float64, levels from sums that are float64 from block to block; all are rounded to
float32 where plain torch has float32. So means, spreads, alphas, levels and thresholds differ from plain torch's by its
rounding, and the rest does not: from the same thresholds follow the same bases, and from the same levels the same Wq,
to the bit.

Run this file to check and time it: `python -m kernels.cpu.levels`.
"""

import functools
from math import sqrt

import numba
import numpy as np
from numba import carray, float32, float64, njit, types

from .job import LEVELS_JOB_DTYPE
from .primitives import STAMP, array_at, entry

JOB = types.CPointer(numba.from_dtype(LEVELS_JOB_DTYPE))
NAN, ONE, ZERO = float32(np.nan), float32(1), float32(0)
BLOCK = 2048  # weights that are summed in float32


# --------------------------------------------------------------------------- sums over a channel


@njit(fastmath={"reassoc"})
def plus(a, b):
    """An addition whose order the compiler may choose: what it takes to add up eight sums at once."""
    return a + b


@njit
def mean_of(w):
    total = float64(0)
    for k in range(len(w)):
        total = plus(total, float64(w[k]))
    return total / len(w)


@njit
def mean_square(w, centre, distance):
    """The mean of ((w - centre) - distance)^2, the inner difference in float32."""
    total = float64(0)
    for k in range(len(w)):
        x = float64(w[k] - centre) - distance
        total = plus(total, x * x)
    return total / len(w)


@njit
def sum_between(w, centre, low, high, is_lowest):
    """(sum of w, count) where x = w - centre has reached low but not high; the lowest has all below high, and NaN."""
    total, count = float64(0), float64(0)
    for start in range(0, len(w), BLOCK):
        part = w[start : start + BLOCK]
        some, number = ZERO, ZERO
        for k in range(len(part)):
            x = part[k] - centre
            here = ((x >= low) | is_lowest) & (not (x >= high))
            some = plus(some, part[k] if here else ZERO)
            number = plus(number, ONE if here else ZERO)
        total += some
        count += number
    return total, count


@njit
def sum_bins(w, centre, thresholds, sums, counts):
    T = len(thresholds)
    for j in range(T + 1):
        low = thresholds[j - 1] if j > 0 else NAN
        high = thresholds[j] if j < T else NAN
        sums[j], counts[j] = sum_between(w, centre, low, high, j == 0)


@njit
def climb(w, centre, thresholds, levels, wq):
    """wq = levels[k] where x = w - centre has reached k of the ascending thresholds."""
    for k in range(len(w)):
        wq[k] = levels[1] if w[k] - centre >= thresholds[0] else levels[0]
    for t in range(1, len(thresholds)):
        threshold, level = thresholds[t], levels[t + 1]
        for k in range(len(w)):
            wq[k] = level if w[k] - centre >= threshold else wq[k]


# --------------------------------------------------------------------------- least squares


@njit
def nested_levels(sums, counts, levels, alphas):
    """Means of the inner bins; the outer two are tied, c_0 = -c_T."""
    T = len(alphas)
    top = float32((sums[T] - sums[0]) / max(counts[T] + counts[0], 1))
    levels[0], levels[T] = -top, top
    for j in range(1, T):
        levels[j] = float32(sums[j] / counts[j]) if counts[j] > 0 else levels[j - 1]
    for j in range(T):
        alphas[j] = (levels[j + 1] - levels[j]) / float32(2)


@njit
def solve(matrix, vector):
    """x with matrix x = vector, positive definite, by elimination in place; returns vector, which holds x."""
    n = len(vector)
    for i in range(n):
        for row in range(i + 1, n):
            factor = matrix[row, i] / matrix[i, i]
            for column in range(i, n):
                matrix[row, column] -= factor * matrix[i, column]
            vector[row] -= factor * vector[i]
    for i in range(n - 1, -1, -1):
        for column in range(i + 1, n):
            vector[i] -= matrix[i, column] * vector[column]
        vector[i] /= matrix[i, i]
    return vector


@njit
def damped_solution(gram, product):
    """Least squares that may be singular, where bins are empty: damped, and refined three times, as in abcnets.py."""
    n, trace = len(product), float64(0)
    for i in range(n):
        trace += gram[i, i]
    damped, solution, rest = gram.copy(), np.zeros(n), product.copy()
    for i in range(n):
        damped[i, i] += 1e-4 * trace / n + np.finfo(np.float32).tiny
    for _ in range(4):
        step = solve(damped.copy(), rest.copy())
        for i in range(n):
            solution[i] += step[i]
        for i in range(n):
            rest[i] = product[i]
            for j in range(n):
                rest[i] -= gram[i, j] * solution[j]
    return solution


@njit
def tied_levels(sums, counts, design, levels, alphas):
    """levels = design @ scales, symmetric about 0, of least squares; one scale stands for all M alphas."""
    L, U = design.shape
    H = L // 2
    n, s = np.zeros(H), np.zeros(H)  # of |x|, for the levels above 0
    for i in range(H):
        n[i] = counts[L - H + i] + counts[H - 1 - i]
        s[i] = sums[L - H + i] - sums[H - 1 - i]
    scales = np.zeros(U)
    if H == 2 and U == 2:
        mid, top = s[0] / max(n[0], 1), s[1] / max(n[1], 1)
        mid, top = mid if n[0] > 0 else top, top if n[1] > 0 else mid
        scales[0], scales[1] = (top + mid) / 2, (top - mid) / 2
    else:
        gram, product = np.zeros((U, U)), np.zeros(U)
        for i in range(H):
            row = design[L - H + i]
            for u in range(U):
                product[u] += row[u] * s[i]
                for v in range(U):
                    gram[u, v] += row[u] * n[i] * row[v]
        if U == 1:
            scales[0] = product[0] / max(gram[0, 0], 1)
        else:
            scales = damped_solution(gram, product)
    for m in range(len(alphas)):
        alphas[m] = float32(scales[m if U > 1 else 0])
    for j in range(L):
        levels[j] = float32(0)
        for u in range(U):
            levels[j] += alphas[u] * design[j, u]


@njit
def put_midway(levels, thresholds):
    ordered = np.sort(levels)
    for t in range(len(thresholds)):
        thresholds[t] = (ordered[t + 1] + ordered[t]) / float32(2)


# --------------------------------------------------------------------------- a channel, a thread's share of them


@njit
def quantize(job, g, sums, counts):
    K, T, M, U = job.size, job.threshold_count, job.bases, job.scale_count
    w, wq = array_at(job.W + 4 * K * g, K, float32), array_at(job.Wq + 4 * K * g, K, float32)
    us = array_at(job.us, T, float32)
    alphas, thresholds = array_at(job.alphas + 4 * M * g, M, float32), array_at(job.thresholds + 4 * T * g, T, float32)
    levels = array_at(job.levels + 4 * (T + 1) * g, T + 1, float32)
    centre = spread = float32(0)
    if U > 0:
        spread = float32(sqrt(mean_square(w, float32(0), 0.0)))
    else:
        mean = mean_of(w)
        centre = float32(mean)
        if K > 1:
            distance = mean - float64(centre)
            spread = float32(sqrt(mean_square(w, centre, distance) * (K / (K - 1))))
    array_at(job.centres, g + 1, float32)[g] = centre
    array_at(job.spreads, g + 1, float32)[g] = spread
    for t in range(T):
        thresholds[t] = -(spread * us[t])
    sum_bins(w, centre, thresholds, sums, counts)
    if U > 0:
        design = array_at(job.design, (T + 1) * U, float32).reshape((T + 1, U))
        tied_levels(sums, counts, design, levels, alphas)
        for _ in range(job.rounds):
            put_midway(levels, thresholds)
            sum_bins(w, centre, thresholds, sums, counts)
            tied_levels(sums, counts, design, levels, alphas)
    else:
        nested_levels(sums, counts, levels, alphas)
    climb(w, centre, thresholds, levels, wq)


@functools.cache
def levels_kernel(stamp=STAMP):
    """The function that every thread of a team runs: whole channels."""

    @entry(JOB)
    def run(jobs, thread, threads, barrier):
        job = carray(jobs, 1)[0]
        _ = stamp  # makes the edit stamp part of the cache entry's key
        sums, counts = np.zeros(job.threshold_count + 1), np.zeros(job.threshold_count + 1, np.int64)
        for g in range(job.groups * thread // threads, job.groups * (thread + 1) // threads):
            quantize(job, g, sums, counts)

    return run


def main() -> None:
    """Beside plain torch: is it right, and how long does a layer of 64 x 64 x 3 x 3 weights take."""
    import torch

    import abcnets

    from ..check import demonstrate

    W = 0.1 * torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    cases = {
        (code, M): abcnets.gaussian_shifts(abcnets._count_of_levels(code, M) - 1)
        for code in abcnets.CODES for M in (2, 3)
    }  # fmt: skip
    forms = {"numba": torch.ops.abcnets.fit_levels, "plain torch": abcnets._fit_levels}

    def problem():
        for (code, M), us in cases.items():
            ours, plain = (form(W, us, True, code, True) for form in forms.values())
            if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours[1:], plain[1:])):
                return f"other levels than plain torch's: {code} code, M = {M}"

    def calls():
        return {
            f"{code} code, M = {M}, {name}": (lambda W, f=form, us=us, c=code: f(W, us, True, c, True), [W], 0, 0)
            for (code, M), us in cases.items() for name, form in forms.items()
        }  # fmt: skip

    demonstrate("levels", problem, calls)


if __name__ == "__main__":
    main()
