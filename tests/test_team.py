"""Threads that run a kernel together: torch's of OpenMP, and the plain pool where those can't be had.

The pool is what torch for macOS gets. It runs wherever there are threads of POSIX, so it is tested on Linux too.
"""

import ctypes
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import abcnets

pytest.importorskip("numba")
if os.name != "posix":
    pytest.skip("no threads of POSIX", allow_module_level=True)
from numba import njit, types
from test_chain import random_chain, some_chain
from test_kernels_cpu import at_once, small_case, words_of

from kernels.cpu import engine as cpu_engine
from kernels.cpu import system, team
from kernels.cpu.primitives import entry, load_word, meet, store_word

abcnets.engines()  # loads them
OPENMP = system.team() if isinstance(system.team(), team.OpenMP) else None


class Watched(team.Pool):
    """A pool that remembers on how many threads its calls were."""

    def __init__(self):
        super().__init__()
        self.calls, run = [], self._run
        self._run = lambda *call: (self.calls.append(call[-1]), run(*call))


@pytest.fixture
def pool(threads, monkeypatch):
    """Kernels run on a plain pool."""
    pool = Watched()
    monkeypatch.setattr(system, "team", lambda: pool)
    return pool


@pytest.fixture(params=["OpenMP", "Pool"])
def some_team(request):
    if request.param == "Pool":
        return team.Pool()
    return OPENMP or pytest.skip("torch's OpenMP can't be asked here")


def on_each_number_of_threads(pool, compute, counts=(2, 3, 5)):
    """What compute() gives on one thread, as on each of these many: the pool ran it each time on all of them."""
    torch.set_num_threads(1)
    expected = compute()
    assert not pool.calls
    for count in counts:
        torch.set_num_threads(count)
        assert all(map(torch.equal, compute(), expected)), f"{count} threads"
        assert set(pool.calls) == {count}
        pool.calls.clear()
    return expected


# --------------------------------------------------------------------------- which one


def probed(monkeypatch, library):
    """The team where torch's library is that one."""
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: real(name) if name is None else library(name))
    return system.team.__wrapped__()


def test_openmp_where_torch_has_it_by_that_name(monkeypatch):
    has = hasattr(probed(monkeypatch, ctypes.CDLL), "_parallel")
    assert has is (OPENMP is not None)
    assert has or not sys.platform.startswith("linux")


def cannot_be_loaded(name):
    raise OSError(name)


@pytest.mark.parametrize("library", [lambda name: SimpleNamespace(), cannot_be_loaded])
def test_a_plain_pool_otherwise(library, monkeypatch):
    assert isinstance(probed(monkeypatch, library), team.Pool)


def test_one_thread_where_there_is_no_team(threads, monkeypatch):
    monkeypatch.setattr(system, "os", SimpleNamespace(name="nt"))
    nobody = probed(monkeypatch, cannot_be_loaded)
    monkeypatch.setattr(system, "team", lambda: nobody)
    torch.set_num_threads(3)
    assert nobody is None and system.thread_count() == 1


# --------------------------------------------------------------------------- a team by itself


@functools.cache
def rounds():
    """Each thread writes the round's number to its place, and counts in `wrong` who has not when all have met."""

    @entry(types.int64)
    def rounds(record, thread, threads, barrier):
        own = record + 8 + 16 * thread
        for number in range(1, load_word(record) + 1):
            store_word(own, number)
            meet(barrier)
            for other in range(threads):
                if load_word(record + 8 + 16 * other) != number:
                    store_word(own + 8, load_word(own + 8) + 1)
            meet(barrier)

    return rounds.address


def test_all_threads_meet_at_a_barrier(some_team):
    for threads, count in ((2, 500), (3, 200), (7, 20), (2, 500)):
        record = np.array([count, *[0] * 16])
        some_team.run(rounds(), record.ctypes.data, threads)
        assert record[1::2].tolist() == [*[count] * threads, *[0] * (8 - threads)]
        assert not record[2::2].any()


@functools.cache
def counts():
    """Each share adds one to its place, and says how many there are; it does not wait for any other."""

    @entry(types.int64)
    def counts(record, thread, threads, barrier):
        store_word(record + 16 * thread, load_word(record + 16 * thread) + 1)
        store_word(record + 16 * thread + 8, threads)

    return counts.address


def test_each_share_is_done_once_in_thousands_of_calls(some_team):
    record = np.zeros(16, np.int64)
    for i in range(3000):
        some_team.run(counts(), record.ctypes.data, 8)
        assert (record[::2] == i + 1).all() and (record[1::2] == 8).all()


def test_workers_are_hired_once_and_woken_when_asleep():
    pool, before = team.Pool(), threading.active_count()
    for threads in (2, 4, 3, 4):
        record = np.array([50, *[0] * 16])
        pool.run(rounds(), record.ctypes.data, threads)
        assert record[1::2].sum() == 50 * threads
        time.sleep(0.02)  # far longer than they stay awake
    assert threading.active_count() == before + 3


def test_idle_workers_do_not_compute():
    pool, record = team.Pool(), np.array([50, *[0] * 16])
    pool.run(rounds(), record.ctypes.data, 4)
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_where_there_are_no_more_threads_fewer_do_it(monkeypatch):
    pool, record, start = team.Pool(), np.zeros(16, np.int64), threading.Thread.start
    started = itertools.count()

    def start_one(thread):
        if next(started):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    pool.run(counts(), record.ctypes.data, 8)
    assert record[:4].tolist() == [1, 2, 1, 2] and not record[4:].any()


@functools.cache
def waits():
    """Wait for a one, then leave a two."""

    @njit
    def look(address):
        return team.load_atomically(address)

    @entry(types.int64)
    def waits(record, thread, threads, barrier):
        while look(record) != 1:
            pass
        store_word(record + 8 * (1 + thread), 2)

    return waits.address


def test_an_exception_waits_until_all_threads_are_done():
    def complain(*_):
        raise InterruptedError

    pool, kernel, record = team.Pool(), waits(), np.zeros(4, np.int64)
    before = signal.signal(signal.SIGUSR1, complain)

    def interrupt():
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        assert not record.any()
        record[0] = 1

    other = threading.Thread(target=interrupt)
    try:
        with pytest.raises(InterruptedError):
            other.start()
            pool.run(kernel, record.ctypes.data, 3)
        assert record.tolist() == [1, 2, 2, 2]
    finally:
        other.join()
        signal.signal(signal.SIGUSR1, before)
    record[1:] = 0
    pool.run(kernel, record.ctypes.data, 3)  # and it can be called again
    assert record.tolist() == [1, 2, 2, 2]


# --------------------------------------------------------------------------- kernels on the pool


@pytest.mark.parametrize("B", [1, 2, 9, 40])
def test_a_layer(B, pool):
    case = small_case(B=B, size=(23, 17))
    on_each_number_of_threads(pool, lambda: (case.run(),))
    words = words_of(case.x, *case.tensors[3:5])
    case.out = torch.zeros(2, 40), torch.arange(40) % 3 == 0, 2
    on_each_number_of_threads(pool, lambda: (case.run(words),))


@pytest.mark.parametrize("B", [1, 2, 9])
def test_a_nan_is_seen_whichever_thread_meets_it(B, pool):
    torch.set_num_threads(3)
    for position in range(3):
        case = small_case(B=B)
        case.x[position * (B - 1) // 2, 5, 4 * position, 3] = float("nan")
        expected = abcnets.packed_conv(case.x, *case.arguments)
        assert expected.isnan().any()
        torch.testing.assert_close(case.run(), expected, equal_nan=True)
    assert set(pool.calls) == {3}


def test_chains(pool):
    seeds = random.Random(0).sample(range(1000), 12)
    for chain, x in (some_chain(), *map(random_chain, seeds)):
        for images in (x, x[:1], x[:2]) if x.dim() > 2 else (x,):
            try:
                chain(images)
            except (ValueError, RuntimeError):  # an image has become smaller than the next kernel
                continue
            finally:
                pool.calls.clear()
            on_each_number_of_threads(pool, lambda chain=chain, images=images: (chain(images),))


@pytest.mark.parametrize("binary", [False, True])
def test_pools(binary, pool):
    generator = torch.Generator().manual_seed(0)
    x, flips = torch.randn(3, 70, 9, 8, generator=generator), torch.rand(70, generator=generator) < 0.5
    words = words_of(x, torch.randn(3, 70, generator=generator), flips, 2 if binary else 3)
    arguments = flips, 70, [2, 3], [2, 1], [1, 1], [1, 1], False, binary
    on_each_number_of_threads(pool, lambda: (cpu_engine.packed_max_pool(words, *arguments),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_quantizer(dtype, pool):
    R, G = torch.randn(2, 100_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    tables = torch.tensor([0.35, 1.0, 1.64]), torch.tensor([0.32, 0.33, 0.32]), True
    on_each_number_of_threads(pool, lambda: (torch.ops.abcnets.staircase(R, *tables),))
    backward = functools.partial(torch.ops.abcnets.staircase_backward, R, G, *tables)
    on_each_number_of_threads(pool, lambda: backward()[:1])
    expected, *others = ([torch.set_num_threads(n), backward()][1][1:] for n in (1, 2, 3, 5))
    for sums in others:  # which threads add up in another order
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("code", abcnets.CODES)
def test_the_weights_quantizer(code, pool):
    W = torch.randn(40, 20, 3, 3, generator=torch.Generator().manual_seed(0))
    us = abcnets.gaussian_shifts(abcnets._count_of_levels(code, 2) - 1)
    on_each_number_of_threads(pool, lambda: torch.ops.abcnets.fit_levels(W, us, True, code, True))


def test_another_number_of_threads_between_calls(pool):
    case = small_case(B=1, size=(23, 17))
    expected = case.run()
    pool.calls.clear()
    for count in (1, 3, 2, 5, 2, 1, 4):
        torch.set_num_threads(count)
        for _ in range(20):
            assert torch.equal(case.run(), expected)
    assert pool.calls == [count for count in (3, 2, 5, 2, 4) for _ in range(20)]
    assert len(pool._workers) == 4


def test_a_call_beside_another_runs_alone(pool):
    """With plans that were made for more threads."""
    torch.set_num_threads(3)
    case, (chain, x) = small_case(B=1, size=(23, 17)), some_chain()
    expected = case.run(), chain(x[:1])
    pool.calls.clear()
    with pool._free:
        assert torch.equal(case.run(), expected[0]) and torch.equal(chain(x[:1]), expected[1])
    assert not pool.calls
    assert torch.equal(case.run(), expected[0]) and pool.calls == [3]


def test_several_threads_of_python_at_once(pool):
    torch.set_num_threads(3)
    case, (chain, x) = small_case(B=1, size=(20, 20)), some_chain()
    inputs = [torch.randn_like(case.x) for _ in range(6)]
    expected = [(case.run(each), chain(x[i : i + 1])) for i, each in enumerate(inputs)]
    pool.calls.clear()
    wrong = []

    def work(i):
        torch.set_num_threads(3)
        for _ in range(60):
            found = case.run(inputs[i]), chain(x[i : i + 1])
            if not all(map(torch.equal, found, expected[i])):
                wrong.append(i)

    at_once(work, zip(range(6)))
    assert not wrong and 0 < len(pool.calls) <= 720 and set(pool.calls) == {3}


# --------------------------------------------------------------------------- processes

ON_THE_POOL = """
import os, signal, sys, threading
sys.path.insert(0, "tests")
import torch
from test_kernels_cpu import small_case
from kernels.cpu import system, team
pool = team.Pool()
system.team = lambda: pool
torch.set_num_threads(3)
case = small_case(B=1)
expected = case.run()
assert len(pool._workers) == 2
"""

FORKS = """
for _ in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(case.run(), expected) and system.thread_count() == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(case.run(), expected) and system.thread_count() == 3
"""

LEAVES_WHILE_A_THREAD_CALLS = """
def work():
    torch.set_num_threads(3)
    while True:
        case.run()
        called.set()
called = threading.Event()
threading.Thread(target=work, daemon=True).start()
assert called.wait(60)
"""


@pytest.mark.parametrize("script", [FORKS, "", LEAVES_WHILE_A_THREAD_CALLS], ids=["forks", "ends", "ends amid calls"])
def test_in_a_fresh_process(script, pytestconfig):
    command = [sys.executable, "-c", ON_THE_POOL + script]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
