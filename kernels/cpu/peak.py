"""The bound: how many bit products a second one core can count when nothing but counting is to be done.

Two measurements, neither of which touches memory beyond the first-level cache:

    clock()   a chain of xorshifts, six dependent instructions of one cycle each     -> cycles a second
    peak()    xor + popcount + add on sixteen independent registers, in a loop       -> products a second
              (look-up + add on eight of them where popcounts are looked up)

Their quotient is the cost of one 512-bit step: 1.5 cycles on Zen 4, which starts two vector instructions a cycle and
needs three. `python -m kernels.cpu.peak` prints it for this machine.
"""

import functools
import time

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from .. import layout
from . import system
from .lookup import SHUFFLES
from .primitives import I8, I64, WORDS_8, Emitter, ir

REGISTERS, LOOK_UPS = 16, 8
PRODUCTS = 512  # of one register


@njit
def xorshift_chain(count, x):
    for _ in range(count):
        x ^= x << np.uint64(13)
        x ^= x >> np.uint64(7)
        x ^= x << np.uint64(17)
    return x


@intrinsic
def count_products(typing, words, count):
    """count rounds of REGISTERS x (xor, popcount, add) on two of eight words in memory; returns some of the sum."""

    def emit(context, builder, signature, args):
        words, count = args
        emitter = Emitter(builder)
        weights = [emitter.const(0x9E3779B97F4A7C15 >> i, WORDS_8) for i in range(REGISTERS // 2)]

        def once(i, counts):
            at = emitter.offset(words, emitter.and_(i, emitter.const(3)), 8)
            pair = [emitter.splat(emitter.load(I64, emitter.offset(at, j, 32), 8), WORDS_8) for j in range(2)]
            pairs = [(word, weight) for word in pair for weight in weights]
            return [
                emitter.add(total, emitter.popcount(emitter.xor(word, weight)))
                for total, (word, weight) in zip(counts, pairs)
            ]

        counts = emitter.loop(count, [emitter.const(0, WORDS_8)] * REGISTERS, once)
        total = functools.reduce(emitter.add, counts)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.int64(types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def look_up_products(typing, tables, count, lanes):
    """count rounds of LOOK_UPS x (look-up, add) of `lanes` bytes, in four of eight tables; returns some of the sum.

    Behind the tables lie two registers of weights: of constants LLVM would make another instruction.
    """
    L = lanes.literal_value

    def emit(context, builder, signature, args):
        tables, count, _ = args
        emitter = Emitter(builder)
        BYTES, TABLE = ir.VectorType(I8, L), ir.VectorType(I8, 16)
        weights = [emitter.load(BYTES, emitter.offset(tables, 128 + i * L, 1), 16) for i in range(2)]

        def once(i, counts):
            at = emitter.offset(tables, emitter.and_(i, emitter.const(3)), 16)
            found = [emitter.load(TABLE, emitter.offset(at, j, 16), 16) for j in range(LOOK_UPS // 2)]
            found = [emitter.shuffle(table, table, list(range(16)) * (L // 16)) for table in found]
            pairs = [(table, weight) for table in found for weight in weights]
            return [
                emitter.in_order(emitter.add(total, emitter.call_llvm(SHUFFLES[L], BYTES, *pair)))
                for total, pair in zip(counts, pairs)
            ]

        counts = emitter.loop(count, [emitter.const(0, BYTES)] * LOOK_UPS, once)
        total = functools.reduce(emitter.add, counts)
        return emitter.zext(builder.extract_element(total, ir.Constant(ir.IntType(32), 0)), I64)

    return types.int64(types.int64, types.int64, lanes), emit


@njit
def products_loop(words, count):
    return count_products(words, count)


@functools.cache
def look_ups_loop(lanes):
    @njit
    def loop(tables, count):
        return look_up_products(tables, count, lanes)

    return loop


def _best(function, *arguments) -> float:
    function(*arguments)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def clock() -> float:
    """This core's cycles a second while it is busy."""
    count = 2_000_000
    return 6 * count / _best(xorshift_chain, count, np.uint64(88172645463325252))


@functools.cache
def peak() -> float:
    """The bit products a second that one core counts at best."""
    count = 300_000
    if lanes := system.look_up_lanes():
        tables = layout.aligned_zeros((128 + 2 * lanes,), np.uint8)
        return count * LOOK_UPS * 4 * lanes / _best(look_ups_loop(lanes), tables.ctypes.data, count)
    words = np.arange(8, dtype=np.uint64) * np.uint64(0x0123456789ABCDEF)
    return count * REGISTERS * PRODUCTS / _best(products_loop, words.ctypes.data, count)


if __name__ == "__main__":
    print(f"clock {clock() / 1e9:.2f} GHz, at best {peak() / 1e12:.2f} T bit products/s on one core: "
          f"{clock() * PRODUCTS / peak():.2f} cycles for {PRODUCTS}")  # fmt: skip
