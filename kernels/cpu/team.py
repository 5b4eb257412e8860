"""A team of threads that run a kernel together: torch's own of OpenMP, or a plain pool's where those can't be had.

Two OpenMP pools in one process spin against each other: with Numba's own beside torch's, two threads ran like one and
torch itself slowed down threefold. So a kernel is a C function that torch's OpenMP runtime calls, through the entry
points that GCC compiles to (`OpenMP`). LLVM's runtime, which torch brings along for macOS, lacks them there. Then
Python's threads do it, which once started never leave compiled code, nor wait for the interpreter's lock (`Pool`).

Both call entry(record, thread, threads, barrier), as primitives.entry compiles it, for every thread of a team.
`barrier` is the address of 64-bit integers, the first of which is that of the function that waits for the others.

**A call of the pool** has a seat for each thread. The caller takes the first and wakes the workers; who is awake takes
one, and who has finished, the caller too, takes another if one is left. A kernel with a barrier leaves none: nobody
finishes it before all have met. Who waits at a barrier, and the caller at the end, looks again and again, and soon
lets other threads run in between. There is one call at a time: another Python thread's runs on that thread alone in
the meantime. All of a call is compiled, so no exception ends it while a worker still writes.

An empty call with a barrier takes 2 us while the worker is awake, as OpenMP's does, and 20 to 50 us when it sleeps,
where OpenMP's takes 15 (two threads with two cores of a Xeon to themselves). A worker stays awake for 0.1 ms: long
enough for layers one after the other.
"""

import contextlib
import ctypes
import functools
import struct
import threading

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from . import system
from .primitives import I64, STAMP, c_function, call, call_int, load_word, store_word

KERNEL, RECORD = 8, 16  # where in a team's record what it runs lies, behind the function that waits

# --------------------------------------------------------------------------- torch's OpenMP

NUMBER, COUNT, BARRIER = range(24, 48, 8)


class OpenMP:
    """The threads that torch's own operations run on. AttributeError if the library has no entry points of GCC's."""

    def __init__(self, library):
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        names = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
        self._addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
        self._member, self._wait = (function.address for function in _openmp_functions())
        self._pack = struct.Struct("6q").pack

    def run(self, kernel, record, threads) -> None:
        self._parallel(self._member, self._pack(self._wait, kernel, record, *self._addresses), threads, 0)


@functools.cache
def _openmp_functions(stamp=STAMP):
    """What each thread runs, and what waits."""

    @c_function(types.void(types.int64))
    def member(team):
        _ = stamp  # makes the edit stamp part of the cache entry's key
        thread, threads = call_int(load_word(team + NUMBER)), call_int(load_word(team + COUNT))
        call(load_word(team + KERNEL), (load_word(team + RECORD), thread, threads, team))

    @c_function(types.void(types.int64))
    def wait(team):
        _ = stamp
        call(load_word(team + BARRIER), ())

    return member, wait


# --------------------------------------------------------------------------- a plain pool

THREADS = 24  # of the team
SEATS, UNFINISHED = 32, 40  # that nobody has taken, and that nobody is done with: all but the caller's first
ARRIVED, MEETINGS = 48, 56  # how many are at the barrier, and how often all have been
LOCK, UNLOCK, SLEEP, WAKE, YIELD = range(64, 104, 8)  # addresses of functions of the system, and what these work on:
MUTEX, CONDITION, BYTES = 128, 256, 384
FUNCTIONS = "pthread_mutex_lock", "pthread_mutex_unlock", "pthread_cond_wait", "pthread_cond_broadcast", "sched_yield"
LOOKS = 1000  # of who waits, before other threads are let run: about a microsecond
AWAKE = 300  # looks of a worker for the next call, other threads being let run in between, before it sleeps: 0.1 ms


class Pool:
    """Workers that sleep until there is a call, on a system with threads of POSIX."""

    def __init__(self):
        library = ctypes.CDLL(None)
        self._words = np.zeros(BYTES // 8, np.int64)
        self._team, self._workers, self._free = self._words.ctypes.data, [], threading.Lock()
        library.pthread_mutex_init(ctypes.c_void_p(self._team + MUTEX), None)
        library.pthread_cond_init(ctypes.c_void_p(self._team + CONDITION), None)
        run, self._work, wait = _pool_functions()
        self._run, self._words[0] = system.function(run.address), wait.address
        for place, name in zip(range(LOCK, MUTEX, 8), FUNCTIONS):
            self._words[place // 8] = ctypes.cast(getattr(library, name), ctypes.c_void_p).value

    def run(self, kernel, record, threads) -> None:
        if not self._free.acquire(blocking=False):
            return system.run(kernel, record, 1)
        try:
            with contextlib.suppress(RuntimeError):  # the system gives no more threads: those do it that there are
                while len(self._workers) < threads - 1:
                    self._hire()
            self._run(self._team, kernel, record, min(threads, 1 + len(self._workers)))
        finally:
            self._free.release()

    def _hire(self) -> None:
        worker = threading.Thread(target=_live, args=(self._work, self._words), name="abcnets", daemon=True)
        worker.start()
        self._workers.append(worker)


def _live(work, words) -> None:
    """A worker's life, in which it never returns, and so keeps the words."""
    work.ctypes(words.ctypes.data)


@functools.cache
def _pool_functions(stamp=STAMP):
    """What the caller runs, what a worker does, and what waits."""

    @c_function(types.void(*[types.int64] * 4))
    def run(team, kernel, record, threads):
        _ = stamp
        call(load_word(team + LOCK), (team + MUTEX,))
        store_word(team + KERNEL, kernel)
        store_word(team + RECORD, record)
        store_word(team + THREADS, threads)
        store_word(team + UNFINISHED, threads - 1)
        store_word(team + SEATS, threads - 1)
        call(load_word(team + UNLOCK), (team + MUTEX,))
        call(load_word(team + WAKE), (team + CONDITION,))
        call(kernel, (record, 0, threads, team))
        while take_seat(team, False):
            pass
        look_for(0, team + UNFINISHED, team)

    @c_function(types.void(types.int64))
    def work(team):
        _ = stamp
        while True:
            for _ in range(AWAKE):
                if load_atomically(team + SEATS) > 0:
                    break
                call(load_word(team + YIELD), ())
            take_seat(team, True)

    @c_function(types.void(types.int64))
    def wait(team):
        _ = stamp
        meetings = load_atomically(team + MEETINGS)
        if add_atomically(team + ARRIVED, 1) == load_word(team + THREADS) - 1:
            store_word(team + ARRIVED, 0)
            add_atomically(team + MEETINGS, 1)
        else:
            look_for(meetings + 1, team + MEETINGS, team)

    return run, work, wait


@njit
def take_seat(team, sleeps):
    """Do one thread's share of a call. If there is none: sleep until there is, or return False."""
    call(load_word(team + LOCK), (team + MUTEX,))
    while sleeps and load_word(team + SEATS) == 0:
        call(load_word(team + SLEEP), (team + CONDITION, team + MUTEX))
    thread = load_word(team + SEATS)
    store_word(team + SEATS, max(thread - 1, 0))
    kernel, record, threads = load_word(team + KERNEL), load_word(team + RECORD), load_word(team + THREADS)
    call(load_word(team + UNLOCK), (team + MUTEX,))
    if thread > 0:
        call(kernel, (record, thread, threads, team))
        add_atomically(team + UNFINISHED, -1)
    return thread > 0


@njit
def look_for(value, address, team):
    """Wait until that is the number at an address."""
    looks = 0
    while load_atomically(address) != value:
        looks += 1
        if looks > LOOKS:
            call(load_word(team + YIELD), ())


@intrinsic
def load_atomically(typing, address):
    """The integer at an address; what was written before it can be read afterwards."""

    def emit(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), emit


@intrinsic
def add_atomically(typing, address, number):
    """Add to the integer at an address; what it was before."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit
