"""The words of primitives.py in plain Python, for NUMBA_ENABLE_CUDASIM=1.

Every simulated thread is a thread of Python. The 32 of a warp (128 of a warpgroup) meet at a barrier, and the last one
to arrive computes the instruction for all of them in NumPy.
"""

import threading
import time

import numpy as np

__all__ = [
    "ballot", "clock", "cp_async8", "cp_async16", "cp_async_commit", "cp_async_wait_all", "cp_async_wait_but_one",
    "device", "fence_async_proxy", "float_bits", "ldmatrix_x4", "make_wgmma_b1_chain", "mma_b1", "popcount",
    "shared_address", "shuffle_xor", "split",
]  # fmt: skip


def device(function):
    """A function for kernels to call. It may not name `cuda`: pass it thread numbers, keep barriers outside."""
    return function


PATIENCE = 300  # seconds until a warp whose other threads failed gives up


class _Warp:
    """Where the simulated threads of one warp meet; whoever comes last computes for all of them."""

    def __init__(self, size):
        self.operands = [None] * size
        self.results = [None] * size
        self.instruction = None
        self.arrived = threading.Barrier(size, action=self._execute)
        self.left = threading.Barrier(size)

    def _execute(self):
        self.results = self.instruction(self.operands)


_lock = threading.Lock()


def _together(instruction, operands, width=32):
    """Run instruction([operands of each thread]) -> [result of each thread] once for `width` threads."""
    thread = threading.current_thread()
    group, lane = divmod(thread.thread_id, width)
    with _lock:
        groups = thread._manager.__dict__.setdefault("_meeting_points", {})
        if (width, group) not in groups:
            rest = int(np.prod(thread._manager._block_dim)) - width * group
            groups[width, group] = _Warp(min(width, rest))
    warp = groups[width, group]
    warp.operands[lane] = operands
    warp.instruction = instruction
    warp.arrived.wait(PATIENCE)
    result = warp.results[lane]
    warp.left.wait(PATIENCE)
    return result


def _mma(operands):
    a, b, c = np.zeros((16, 8), np.uint32), np.zeros((8, 8), np.uint32), np.zeros((16, 8), np.int64)
    for lane, (c4, a4, b2) in enumerate(operands):
        row, k = divmod(lane, 4)
        a[row, k], a[row + 8, k], a[row, k + 4], a[row + 8, k + 4] = a4
        b[row, k], b[row, k + 4] = b2
        c[row, 2 * k], c[row, 2 * k + 1], c[row + 8, 2 * k], c[row + 8, 2 * k + 1] = c4
    d = c + np.bitwise_count(a[:, None] & b[None]).sum(-1, dtype=np.int64)
    where = [divmod(lane, 4) for lane in range(32)]
    return [(d[r, 2 * k], d[r, 2 * k + 1], d[r + 8, 2 * k], d[r + 8, 2 * k + 1]) for r, k in where]


def mma_b1(acc, acc_at, a, a_at, b, b_at):
    operands = tuple(acc[acc_at : acc_at + 4]), tuple(a[a_at : a_at + 4]), tuple(b[b_at : b_at + 2])
    acc[acc_at : acc_at + 4] = _together(_mma, operands)


def shared_address(shared, word):
    return np.uint32(int(word) * 4)


def _ldmatrix(operands):
    rows = [shared[address // 4 : address // 4 + 4].copy() for shared, address in operands]
    return [tuple(rows[8 * tile + lane // 4][lane % 4] for tile in range(4)) for lane in range(32)]


def ldmatrix_x4(destination, at, shared, address):
    if int(address) % 16:
        raise ValueError(f"ldmatrix rows are 16-byte aligned, got address {int(address)}")
    destination[at : at + 4] = _together(_ldmatrix, (shared, int(address)))


def _cp_async(words):
    def copy(shared, shared_at, source, source_at, valid):
        if int(shared_at) % words:
            raise ValueError(f"cp.async of {words} words is aligned to its size, got word {int(shared_at)}")
        for k in range(words):
            shared[shared_at + k] = source[source_at + k] if valid else 0

    return copy


cp_async8, cp_async16 = _cp_async(2), _cp_async(4)


def cp_async_commit():
    pass


cp_async_wait_all = cp_async_wait_but_one = cp_async_commit


def float_bits(bits):
    return np.int32(bits).view(np.float32)


def ballot(flag):
    def instruction(operands):
        word = np.uint32(sum(int(bool(flag)) << lane for lane, flag in enumerate(operands)))
        return [word] * len(operands)

    return _together(instruction, flag)


def shuffle_xor(value, mask):
    return _together(lambda operands: [operands[lane ^ mask] for lane in range(len(operands))], np.uint32(value))


def split(i, n):
    return divmod(int(i), int(n))


def popcount(word):
    return int(word).bit_count()


def fence_async_proxy():
    pass


def clock():
    return np.int64(time.perf_counter_ns())


def make_wgmma_b1_chain(n, steps):
    """The simulator's form is the same sum, by the 128 threads of a warpgroup."""

    def instruction(operands):
        a, c = np.zeros((64, 8 * steps), np.uint32), np.zeros((64, n), np.int64)
        shared, descriptor, step, _ = operands[0][2:]
        base, step = (int(descriptor) & 0x3FFF) * 4, int(step) * 4
        leading = (int(descriptor) >> 16 & 0x3FFF) * 4
        stride = (int(descriptor) >> 32 & 0x3FFF) * 4
        rows = base + np.arange(n)[:, None, None, None] // 8 * stride + np.arange(n)[:, None, None, None] % 8 * 4
        words = rows + np.arange(steps)[:, None, None] * step + np.arange(2)[:, None] * leading + np.arange(4)
        b = shared[words].reshape(n, 8 * steps)
        for thread, (acc, fragments, *_) in enumerate(operands):
            row, k = thread // 32 * 16 + thread % 32 // 4, thread % 4
            for s in range(steps):
                f = fragments[4 * s : 4 * s + 4]
                at = 8 * s + k
                a[row, at], a[row + 8, at], a[row, at + 4], a[row + 8, at + 4] = f
            keep = operands[0][5]
            for j in range(n // 8):
                for q in range(4):
                    c[row + q // 2 * 8, 8 * j + 2 * k + q % 2] = acc[4 * j + q] if keep else 0
        d = c + np.bitwise_count(a[:, None] & b[None]).sum(-1, dtype=np.int64)
        results = []
        for thread in range(128):
            row, k = thread // 32 * 16 + thread % 32 // 4, thread % 4
            results.append([d[row + q // 2 * 8, 8 * j + 2 * k + q % 2] for j in range(n // 8) for q in range(4)])
        return results

    def chain(acc, fragments, shared, descriptor, step, keep):
        operands = (acc.copy(), fragments.copy(), shared, descriptor, step, keep)
        acc[: n // 2] = _together(instruction, operands, width=128)

    return chain
