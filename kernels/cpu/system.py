"""What the CPU engine asks of the system: threads, what the processor has, and large pages for large results.

Kernels run on torch's own threads where those can be had, else on a plain pool's (team.py). Looking the names of
OpenMP's runtime up through libtorch_cpu finds exactly the one that torch was linked with, whatever it is called here.

A result of more than 32 MB is fresh memory at every call, and the kernel fills it faster than Linux hands it out in
pages of 4 KB: asking for pages of 2 MB halves the time of writing it.
"""

import contextlib
import ctypes
import functools
import os
import platform
import sys
from pathlib import Path

import torch

_forked = False  # threads do not survive a fork, and waiting for them would never end


def after_fork() -> None:
    """This process is a forked one: from now on kernels run on the calling thread."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


@functools.cache
def team():
    """Who runs kernels on several threads: `OpenMP` or `Pool` of team.py, or None where there is neither."""
    from .team import OpenMP, Pool  # which load Numba

    for path in sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")):
        with contextlib.suppress(OSError, AttributeError):
            return OpenMP(ctypes.CDLL(str(path)))
    return Pool() if os.name == "posix" else None


def thread_count() -> int:
    """How many threads a call may use now: torch's setting, or 1 where there is no team or in a forked child."""
    threads = torch.get_num_threads()
    return threads if threads > 1 and not _forked and team() is not None else 1


function = functools.cache(ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4))  # at an address; c_int64 takes a us more


def run(kernel: int, record: int, threads: int) -> None:
    """Run the entry at address `kernel` (primitives.entry) on at most `threads` threads; returns when all have."""
    if threads > 1:
        team().run(kernel, record, threads)
    else:
        function(kernel)(record, 0, 1, 0)


@functools.cache
def features() -> frozenset:
    """What the processor that Numba compiles for has, as LLVM names it, such as "avx2"; "neon" on ARM."""
    from numba.core import codegen, config

    names = codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    found = {name[1:] for name in names.split(",") if name.startswith("+")}
    if platform.machine() in ("aarch64", "arm64"):
        found.add("neon")
        if config.CPU_FEATURES is None and (sys.platform == "darwin" or "asimddp" in _cpuinfo()):
            found.add("dotprod")  # LLVM does not ask the system for all there is
    return frozenset(found)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def tile() -> str:
    """What counts bits here, by name."""
    if is_arm():
        return "NEON dot product" if 32 in popcount_lanes() else "NEON bytes"
    if 32 in popcount_lanes():
        return "AVX-512 popcount"
    return {64: "AVX-512 look-up", 32: "AVX2 look-up", 0: "64-bit words"}[look_up_lanes()]


def is_arm() -> bool:
    """Whether registers have 128 bits, and an instruction that counts in bytes."""
    return "neon" in features()


def has_long_registers() -> bool:
    """Whether there are 32 registers of 512 bits."""
    return "avx512f" in features()


def multiplies_bytes() -> bool:
    """Whether an instruction adds up products of bytes in the lanes of a 512-bit register."""
    return "avx512vnni" in features()


def popcount_lanes() -> tuple:
    """Widths of lanes whose bits are best counted: 64, and narrower ones where an instruction counts them."""
    if is_arm():
        return (64, 32, 8) if "dotprod" in features() else (64, 8)
    if "avx512vpopcntdq" not in features():
        return (64,)
    return (64, 32, 16) if "avx512bitalg" in features() else (64, 32)


def look_up_lanes() -> int:
    """Bytes of the registers in which popcounts are looked up (lookup.py): 32, 64, or 0 where they are counted."""
    if "avx512vpopcntdq" in features() or "avx2" not in features():
        return 0
    return 64 if "avx512bw" in features() else 32


LARGE = 32 << 20  # bytes; smaller tensors come from memory that malloc keeps, without page faults
_PAGE, _MADV_HUGEPAGE = 4096, 14


@functools.cache
def _madvise():
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; if it is large and not yet touched, in pages of 2 MB where the system allows it."""
    if tensor.nbytes >= LARGE and _madvise() is not None:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        _madvise()(start, (tensor.data_ptr() + tensor.nbytes - start) // _PAGE * _PAGE, _MADV_HUGEPAGE)
    return tensor
