"""One clock for everything that is timed in this repository, and the machine that it was timed on.

On a CPU: all contenders of one case run in one process, in turn, round after round, and the median round counts; so a
disturbance hits everyone alike. On a GPU: replays of a CUDA graph over inputs that do not fit into the L2 cache.
"""

import math
import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path

import torch

import abcnets

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"  # Numba runs CUDA kernels on the CPU: nothing is timed
PACKAGES = ("torch", "numba", "llvmlite", "numba-cuda", "onnxruntime")


def machine(device="cpu", threads: int | None = None) -> dict:
    """What a number was measured on: {"hardware": ..., "versions": ...}.

    Args:
        device: the GPU is named for "cuda", else the processor with its cores.
        threads: how many of them were used, where no column of its own says so.
    """
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    counts = [f"{os.cpu_count()} cores", *([f"{threads} threads"] if threads else [])]
    versions = [f"python {platform.python_version()}, abcnets {abcnets.__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    return {"hardware": ", ".join([name, *counts]), "versions": ", ".join(versions)}


def instruction_set() -> str:
    """The widest vectors that convolutions may use here, and Intel's matrix unit where there is one."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return torch.backends.cpu.get_cpu_capability()
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    has_amx = torch.cpu._is_amx_tile_supported() and (held in ("ALL", "DEFAULT") or "AMX" in held)
    return "AVX-512 and AMX" if has_amx else "AVX-512"


def interleaved_medians(contenders: dict, seconds: float = math.inf, rounds: int = 60) -> dict:
    """Median seconds a call of each contender {name: function}, called in turns.

    Rounds go on for about `seconds`, at least five and at most `rounds` of them. Before each timed call one that is not
    timed fills the caches.
    """
    for function in contenders.values():
        function()
    times = {name: [] for name in contenders}
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begun > seconds:
            break
        for name, function in contenders.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def input_sets(make, size_bytes) -> list:
    """As many inputs from make(i) as twice the L2 cache holds, at least 2 and at most 64."""
    if SIMULATED:
        return [make(0)]
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
    return [make(i) for i in range(min(64, max(2, -(-2 * cache // max(size_bytes, 1)))))]


def microseconds(call, sets, seconds=0.08) -> tuple:
    """(median, 10th, 90th percentile) of call(inputs), from replays of a CUDA graph over all sets.

    In the simulator one call, by the wall clock: a rehearsal, not a measurement.
    """
    if SIMULATED:
        start = time.perf_counter()
        call(sets[0])
        return (1e6 * (time.perf_counter() - start),) * 3
    for _ in range(2):
        for inputs in sets[:2]:
            call(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            call(inputs)

    def replay():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        return begin, end

    def elapsed(events):
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 / len(sets) for begin, end in events]

    first = min(elapsed([replay(), replay(), replay()]))
    repeats = max(7, min(100, int(seconds * 1e6 / (first * len(sets)))))
    times = sorted(elapsed([replay() for _ in range(repeats)]))
    return statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10]
