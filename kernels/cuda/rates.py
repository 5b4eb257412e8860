"""What this card can do: the ceilings that every rung is measured against.

    bandwidth      a device-to-device copy, bytes read plus bytes written
    float paths    a matrix product of 8192 x 8192 on random data through cuBLAS: float32, TF32, fp16, int8
    popcount       8 independent chains of XOR + popcount a thread, 2048 threads a multiprocessor
    BMMA           8 independent accumulators a warp, 4 to 16 warps a multiprocessor
    BGMMA          chains of wgmma on constant operands, 1 to 4 groups of four warps a multiprocessor

The last three never touch memory in the loop, so what they measure is the instruction's rate. They also read the cycle
counter, which gives multiply-adds a clock and multiprocessor whatever the clock happened to be.
"""

import functools

import torch
from numba import cuda

from ..check import NO_GPU, sentence
from ..clock import microseconds
from .launch import Kernel, int32, int64, pointer, shared_memory_limit, uint32, uint64
from .primitives import (
    clock,
    fence_async_proxy,
    make_wgmma_b1_chain,
    mma_b1,
    popcount,
    shared_address,
)

CHAINS = 8


@functools.cache
def popcount_kernel(threads: int) -> Kernel:
    def popcount_rate(out, cycles, seed, rounds):
        values = cuda.local.array(CHAINS, uint32)
        for k in range(CHAINS):
            values[k] = uint32(seed + cuda.threadIdx.x + k)
        start = clock()
        for _ in range(rounds):
            for k in range(CHAINS):
                values[k] = uint32(popcount(values[k]) ^ seed)
        cycles[cuda.blockIdx.x] = clock() - start
        total = uint32(0)
        for k in range(CHAINS):
            total ^= values[k]
        out[cuda.blockIdx.x * threads + cuda.threadIdx.x] = total

    return Kernel(popcount_rate, (pointer(uint32), pointer(int64), int32, int32), threads)


@functools.cache
def bmma_kernel(threads: int) -> Kernel:
    COUNTS = CHAINS * 4

    def bmma_rate(out, cycles, seed, rounds):
        counts = cuda.local.array(COUNTS, int32)
        a = cuda.local.array(4, uint32)
        w = cuda.local.array(2, uint32)
        for k in range(COUNTS):
            counts[k] = 0
        for k in range(4):
            a[k] = uint32((seed + cuda.threadIdx.x) * (2 * k + 1))
        for k in range(2):
            w[k] = uint32((seed + cuda.threadIdx.x) * (2 * k + 7))
        start = clock()
        for _ in range(rounds):
            for k in range(CHAINS):
                mma_b1(counts, 4 * k, a, 0, w, 0)
        cycles[cuda.blockIdx.x] = clock() - start
        total = uint32(0)
        for k in range(COUNTS):
            total ^= uint32(counts[k])
        out[cuda.blockIdx.x * threads + cuda.threadIdx.x] = total

    return Kernel(bmma_rate, (pointer(uint32), pointer(int64), int32, int32), threads)


@functools.cache
def bgmma_kernel(threads: int, channels: int) -> Kernel:
    STEPS = 4
    COUNTS, A, WORDS = channels // 2, 4 * STEPS, STEPS * channels * 8
    multiply = make_wgmma_b1_chain(channels, STEPS)

    def bgmma_rate(out, cycles, seed, rounds):
        shared = cuda.shared.array(0, uint32)
        thread = cuda.threadIdx.x
        for k in range(thread, WORDS, threads):
            shared[k] = uint32((seed + k) * 2654435761)
        fence_async_proxy()
        cuda.syncthreads()
        counts = cuda.local.array(COUNTS, int32)
        a = cuda.local.array(A, uint32)
        for k in range(COUNTS):
            counts[k] = 0
        for k in range(A):
            a[k] = uint32((seed + thread) * (2 * k + 1))
        descriptor = uint64(shared_address(shared, 0) // 16) + uint64((channels << 16) | (8 << 32))
        start = clock()
        for _ in range(rounds):
            multiply(counts, a, shared, descriptor, uint64(2 * channels), int32(1))
        cycles[cuda.blockIdx.x] = clock() - start
        total = uint32(0)
        for k in range(COUNTS):
            total ^= uint32(counts[k])
        out[cuda.blockIdx.x * threads + thread] = total

    return Kernel(bgmma_rate, (pointer(uint32), pointer(int64), int32, int32), threads)


def rate_of(kernel, operations_a_thread, rounds=20_000, blocks_per_sm=1, shared=0) -> tuple:
    """(multiply-adds a second, multiply-adds a clock and multiprocessor) of a kernel above."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    threads = kernel.threads[0]
    blocks = processors * blocks_per_sm
    out = torch.empty(blocks * threads, dtype=torch.int32, device="cuda")
    cycles = torch.empty(blocks, dtype=torch.int64, device="cuda")
    _, best, _ = microseconds(lambda _: kernel(blocks, out, cycles, 12345, rounds, shared=shared), [None])
    operations = operations_a_thread * threads * rounds
    return 1e6 * operations * blocks / best, operations * blocks_per_sm / cycles.double().median().item()


def ceilings(say=print, skip=()) -> dict:
    """{name: (a second, a clock and multiprocessor or None)}; what can't be measured here is left out, and said."""
    found = {}

    def attempt(name, measure):
        if name in skip:
            return say(f"  {name}: skipped, what it measures crashes here")
        try:
            rate, per_clock = measure()
        except Exception as error:
            return say(f"  {name}: skipped, {sentence(error)}")
        found[name] = max(found.get(name, (0, None)), (rate, per_clock), key=lambda pair: pair[0])
        say(f"  {name}: {rate:.3e} a second" + (f", {per_clock:.0f} a clock and multiprocessor" if per_clock else ""))

    attempt("bandwidth", _bandwidth)
    for name in ("float32", "tf32", "fp16", "int8"):
        attempt(name, functools.partial(_product, name))
    attempt("popcount", lambda: rate_of(popcount_kernel(1024), 32 * CHAINS, blocks_per_sm=2))
    capability = torch.cuda.get_device_capability()
    if (8, 0) <= capability < (10, 0):
        for warps in (4, 8, 16):
            attempt("bmma", lambda warps=warps: rate_of(bmma_kernel(32 * warps), CHAINS * 16 * 8 * 256 // 32))
    else:
        say(f"  bmma: skipped, capability {capability} has no binary tensor core")
    for channels, blocks in [(c, b) for c in (128, 256) for b in (1, 2, 4)] if capability == (9, 0) else ():
        shared = 4 * 4 * channels * 8
        if blocks * channels <= 512 and blocks * shared <= shared_memory_limit(torch.device("cuda")):
            products = 4 * 64 * channels * 256 // 128
            attempt("bgmma", lambda c=channels, n=products, b=blocks, s=shared: rate_of(
                bgmma_kernel(128, c), n, blocks_per_sm=b, shared=s))  # fmt: skip
    return found


def _bandwidth() -> tuple:
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us, _, _ = microseconds(lambda _: target.copy_(source), [None])
    return 2e6 * source.numel() / us, None


def _product(name, size=8192) -> tuple:
    dtype = {"fp16": torch.float16, "int8": torch.int8}.get(name, torch.float32)
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        if dtype == torch.int8:
            a, b = (torch.randint(-128, 127, (size, size), dtype=dtype, device="cuda") for _ in range(2))
            us, _, _ = microseconds(lambda _: torch._int_mm(a, b.t()), [None])
        else:
            a, b = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
            us, _, _ = microseconds(lambda _: a @ b, [None])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 1e6 * size**3 / us, None


def main():
    if not torch.cuda.is_available():
        return print(NO_GPU)
    print(torch.cuda.get_device_name())
    ceilings()


if __name__ == "__main__":
    main()
