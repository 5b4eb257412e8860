"""The one clock of the CUDA ladder: replays of a CUDA graph over inputs that do not fit into the L2 cache."""

import statistics
import time

import torch

from .cuda_primitives import SIMULATED


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
