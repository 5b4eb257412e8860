"""The operators of training on the CPU, on Numba kernels: `staircase` and its backward pass, `fit_levels`.

The plain implementation runs the rest: of the staircase all but float32 and bfloat16, and more than fifteen thresholds;
of the levels all but float32.
"""

import ctypes
import functools

import numpy as np
import torch

from .. import layout
from . import system
from .job import STAIRCASE_SCRATCH_BYTES, LevelsJob, StaircaseJob

MOST_THRESHOLDS = 15  # that the staircase is compiled for
STAIRCASE_THREADS_PAY_FROM = 32_768  # elements, as where torch's own element-wise operations begin to use them
LEVELS_THREADS_PAY_FROM = 4096  # weights, at each of which the quantizer looks some ten times

plain = None  # as in engine.py


def try_it() -> None:
    """Compile and run small kernels; raises whatever stands in the way."""
    R, Aq, halves = torch.tensor([-2, 0, 3]).float(), torch.zeros(3, dtype=torch.float32), np.float32([0.5])
    _run_staircase("forward", R, Aq, halves, levels=torch.tensor([-1, 1, torch.nan], dtype=torch.float32))
    if Aq.tolist() != [-1, -1, 1]:
        raise RuntimeError(f"Numba's kernels compute wrongly here: {Aq.tolist()} instead of [-1, -1, 1]")
    _run_staircase("backward", R, Aq, halves, gradient=R, half_steps=halves)
    Wq = _run_levels(torch.tensor([[-2, 0, 4]]).float(), np.float32([0]), True, 1)[0]
    if Wq.tolist() != [[-2, -2, 2]]:
        raise RuntimeError(f"Numba's kernels compute wrongly here: {Wq.tolist()} instead of [[-2, -2, 2]]")


# --------------------------------------------------------------------------- the activation quantizer


def staircase(R, thresholds, half_steps, zero):
    """abcnets::staircase, as abcnets.py documents it, to the bit."""
    if not _is_computed(R, thresholds):
        return plain._staircase(R, thresholds, half_steps, zero)
    ascending, levels = _ladder(_small(thresholds).tobytes(), _small(half_steps).tobytes(), zero, R.dtype)
    Aq = torch.empty_like(R)
    _run_staircase("forward", R, Aq, ascending, levels=levels)
    return Aq


@functools.lru_cache(maxsize=256)  # in a step of training the backward pass asks again
def _ladder(thresholds: bytes, half_steps: bytes, zero: bool, dtype):
    """(thresholds ascending (T,), levels (T + 1,) and NaN in R's type): added up in the order of the plain operator."""
    thresholds, half_steps = np.frombuffer(thresholds, np.float32), np.frombuffer(half_steps, np.float32)
    order = thresholds.argsort(kind="stable")
    ascending, steps = thresholds[order], 2 * half_steps[order]
    T, start = len(steps), 0 if zero else -torch.from_numpy(steps).sum().item() / 2
    reached = np.tri(T + 1, T, -1, np.float32)  # [level][threshold]
    with np.errstate(all="ignore"):  # what scales of infinite size make of the levels
        climbs = (reached - (ascending <= 0) * np.float32(zero)) * steps
        climbs = np.hstack([np.full((T + 1, 1), start, np.float32), climbs])
        levels = np.add.accumulate(climbs, axis=1)[:, -1]
    return ascending, torch.from_numpy(np.append(levels, np.float32(np.nan))).to(dtype)


def staircase_backward(R, G, thresholds, half_steps, zero):
    """abcnets::staircase_backward, as abcnets.py documents it; only the sums are rounded less."""
    if not _is_computed(R, thresholds) or G.dtype is not R.dtype:
        return plain._staircase_backward(R, G, thresholds, half_steps, zero)
    G_R, T, edges = torch.empty_like(R), len(thresholds), _small(thresholds)
    sums = _run_staircase("backward", R, G_R, edges, gradient=G, half_steps=_small(half_steps), zero=zero)
    near, above, total = sums[:T], sums[T : 2 * T], sums[2 * T]
    with np.errstate(all="ignore"):
        signs = 2 * above - (2 * (edges <= 0) if zero else 1) * total
        return G_R, *(torch.from_numpy(each.astype(np.float32)) for each in (near, signs))


def _small(tensor):
    return tensor.detach().float().contiguous().numpy()


def _is_computed(R, thresholds) -> bool:
    known = R.dtype in (torch.float32, torch.bfloat16) and thresholds.dtype is torch.float32
    return known and len(thresholds) <= MOST_THRESHOLDS


def _run_staircase(direction, R, output, thresholds, gradient=None, levels=None, half_steps=None, zero=False):
    """Run a kernel; returns the sums of all threads, float64 (2 T + 1,), or None forward."""
    R, count, T = _laid_out_like(output, R), R.numel(), len(thresholds)
    threads = system.thread_count() if count >= STAIRCASE_THREADS_PAY_FROM else 1
    job = StaircaseJob(input=R.data_ptr(), output=system.in_large_pages(output).data_ptr(), count=count)
    job.thresholds, sums = thresholds.ctypes.data, None
    scratch = np.empty(threads * STAIRCASE_SCRATCH_BYTES, np.uint8)
    job.scratch = scratch.ctypes.data
    if direction == "forward":
        job.levels = levels.data_ptr()
    else:
        gradient = _laid_out_like(output, gradient)
        sums = layout.aligned_zeros((threads, -(-(2 * T + 1) // 8) * 8), np.float64)  # no cache line of two threads
        job.gradient, job.half_steps = gradient.data_ptr(), half_steps.ctypes.data
        job.zero, job.exact = zero, not np.isfinite(half_steps).all()
        job.sums, job.sums_stride = sums.ctypes.data, sums.strides[0]
    system.run(_staircase_kernel(direction, T, R.dtype is torch.bfloat16), ctypes.addressof(job), threads)
    return None if sums is None else sums.sum(0)[: 2 * T + 1]


def _laid_out_like(output, tensor):
    """The tensor, or a copy whose elements lie in memory in the order of the output's.

    The output came from `empty_like(R)`, which has no gaps and keeps R's strides exactly where R has none.
    """
    return tensor if tensor.stride() == output.stride() else torch.empty_like(output).copy_(tensor)


@functools.cache
def _staircase_kernel(direction: str, T: int, bfloat16: bool) -> int:
    """The address of a kernel for T thresholds."""
    from . import staircase

    make = staircase.forward_kernel if direction == "forward" else staircase.backward_kernel
    return make(T, int(bfloat16)).address


# --------------------------------------------------------------------------- the weights' quantizer


def fit_levels(W, us, per_channel, code, nearest):
    """abcnets::fit_levels, as abcnets.py documents it; means, spreads and levels are rounded less."""
    if not (W.dtype is us.dtype is torch.float32 and W.numel()):
        return plain._fit_levels(W, us, per_channel, code, nearest)
    M = plain._bases_with(len(us), code, "us")
    design = None if code == "thermometer" else _design(code, M)
    return _run_levels(W, -np.sort(-_small(us)), per_channel, M, design, plain._rounds(code, M) if nearest else 0)


def _run_levels(W, us, per_channel, M, design=None, rounds=0):
    """Run the kernel, with us descending, and a design (T + 1, scales) where the code is no thermometer."""
    G, T = len(W) if per_channel else 1, len(us)
    Wq, size, like = torch.empty_like(W), W.numel() // G, W
    # A channel's weights may lie in memory in any order, if only they lie there together.
    if Wq.stride() != W.stride() or (G > 1 and W.stride(0) != size):
        W, Wq = W.contiguous(), torch.empty(W.shape, dtype=W.dtype, device="cpu")
    tables = [torch.empty(G, n, dtype=torch.float32, device="cpu") for n in (1, 1, M, T + 1, T)]
    threads = system.thread_count() if W.numel() >= LEVELS_THREADS_PAY_FROM else 1
    job = LevelsJob(
        W=W.data_ptr(),
        Wq=Wq.data_ptr(),
        groups=G,
        size=size,
        us=us.ctypes.data,
        threshold_count=T,
        bases=M,
        design=0 if design is None else design.ctypes.data,
        scale_count=0 if design is None else design.shape[1],
        rounds=rounds,
        **dict(zip(("centres", "spreads", "alphas", "levels", "thresholds"), (t.data_ptr() for t in tables))),
    )
    system.run(_levels_kernel(), ctypes.addressof(job), threads)
    return Wq if W is like else torch.empty_like(like).copy_(Wq), *tables


@functools.cache
def _design(code: str, M: int):
    return _small(plain._design(code, M, torch.zeros((), dtype=torch.float32, device="cpu")))


@functools.cache
def _levels_kernel() -> int:
    from .levels import levels_kernel

    return levels_kernel().address
