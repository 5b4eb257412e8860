"""The few words that the CPU kernels are written in.

Numba compiles Python through LLVM, but it has no vector types, and a convolution that keeps its accumulators in memory
runs at a tenth of the speed. So the inner loops are spelled in LLVM's vector IR, through `numba.extending.intrinsic`.
LLVM lowers the same IR to whatever the processor has (AVX-512, AVX2, NEON): right everywhere, fastest where there is a
vector popcount.

Two kinds of words live here:

- `Emitter`, the pen that an intrinsic writes IR with: load, store, splat, popcount, a loop that keeps its variables in
  registers. The Python that holds the pen runs at compile time: `for p in range(P)` there is an unrolled loop.
- small intrinsics for Numba code: a load or store at an address, sixteen comparisons at once, an 8 x 8 transpose.

Addresses are plain 64-bit integers and offsets count bytes, everywhere in the CPU kernels. Words are little-endian, as
on every processor that torch supports.
"""

from pathlib import Path
from zlib import crc32

from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
WORDS_8 = ir.VectorType(I64, 8)  # one 512-bit register of channel words
WORDS_16 = ir.VectorType(I64, 16)
FLOATS_8 = ir.VectorType(F32, 8)
FLOATS_16 = ir.VectorType(F32, 16)
INTS_16 = ir.VectorType(I32, 16)
BITS_16 = ir.VectorType(I1, 16)

# Numba's disk cache notices a change in the file that holds a kernel, but not in the files which that one imports.
# Kernels therefore close over this number: an edit of these files gives them a new cache entry.
_NAMES = "primitives", "job", "pack", "store", "vector", "lookup", "pool", "floats", "eight_bits", "chain", "steps"
_FILES = *(Path(__file__).with_name(f"{name}.py") for name in _NAMES), Path(__file__).parents[1] / "layout.py"
STAMP = crc32(b"".join(file.read_bytes() for file in _FILES))


def c_function(signature):
    """Compile a function for C to call; Numba keeps it on disk for later processes, where it may write."""

    def compile(function):
        try:
            return cfunc(signature, cache=True)(function)
        except RuntimeError as error:
            if "locator" not in str(error):  # Numba's word for a place to keep it
                raise
            return cfunc(signature)(function)

    return compile


def entry(record):
    """Compile what each thread of a team runs (team.py), a function of (record, thread, threads, barrier)."""
    return c_function(types.void(record, *[types.int64] * 3))


class Emitter:
    """Writes vector IR at the end of `builder`'s block. Values are SSA values, so they live in registers."""

    def __init__(self, builder):
        self.builder = builder
        for word in ("add", "sub", "mul", "and_", "or_", "xor", "shl", "lshr", "zext", "trunc", "bitcast", "select"):
            setattr(self, word, getattr(builder, word))

    def const(self, number, type=I64):
        """The constant `number`, in every lane if `type` is a vector."""
        return ir.Constant(type, [number] * type.count if isinstance(type, ir.VectorType) else number)

    def offset(self, address, *counts_and_sizes):
        """address + count_0 * size_0 + count_1 * size_1 + ...; each a value or a Python int."""
        for count, size in zip(counts_and_sizes[::2], counts_and_sizes[1::2]):
            if isinstance(count, int) and isinstance(size, int):
                step = self.const(count * size)
            else:
                count, size = (self.const(v) if isinstance(v, int) else v for v in (count, size))
                step = self.mul(count, size)
            address = self.add(address, step)
        return address

    def load(self, type, address, align):
        value = self.builder.load(self.builder.inttoptr(address, type.as_pointer()))
        value.align = align
        return value

    def store(self, value, address, align):
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = align

    def splat(self, scalar, type):
        """The vector whose every lane is `scalar`."""
        undefined = ir.Constant(type, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, self.const(0, I32))
        return self.shuffle(first, undefined, [0] * type.count)

    def shuffle(self, a, b, lanes):
        """Lanes of a (0, 1, ...) and of b (counted on from a's last), in the order given."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def popcount(self, vector):
        lanes, bits = vector.type.count, vector.type.element.width
        return self.call_llvm(f"llvm.ctpop.v{lanes}i{bits}", vector.type, vector)

    def in_order(self, value):
        """The value. LLVM sums nothing across it in another order, which would take more registers than there are."""
        same = ir.FunctionType(value.type, [value.type])
        return self.builder.asm(same, "", "=v,0", [value], False)  # no instruction; v: any vector register of x86

    def count_in_bytes(self, count, at_once, zeros, body, counters):
        """for i in range(count): carried = body(i, carried), from zeros, registers of byte lanes.

        After every `at_once` rounds, before a byte can overflow, they are added to 16-bit counters in memory and begin
        anew. `byte_counts` reads what was counted, lane by lane of one register after the other.
        """
        lanes, at_once = zeros[0].type.count, self.const(at_once)
        wide = ir.VectorType(I16, lanes // 2)
        places = [self.offset(counters, i, lanes) for i in range(2 * len(zeros))]
        for place in places:
            self.store(self.const(0, wide), place, 16)

        def some(s, _):
            first = self.mul(s, at_once)
            left = self.sub(count, first)
            now = self.select(self.builder.icmp_signed("<", left, at_once), left, at_once)
            carried = self.loop(now, zeros, lambda i, carried: body(self.add(first, i), carried))
            halves = [(value, start) for value in carried for start in (0, lanes // 2)]
            for place, (value, start) in zip(places, halves):
                part = self.zext(self.shuffle(value, value, range(start, start + lanes // 2)), wide)
                self.store(self.add(self.load(wide, place, 16), part), place, 16)
            return []

        self.loop(self.builder.sdiv(self.add(count, self.sub(at_once, self.const(1))), at_once), [], some)

    def byte_counts(self, counters, i):
        """The i-th sixteen of the counters that `count_in_bytes` leaves, as INTS_16."""
        return self.zext(self.load(ir.VectorType(I16, 16), self.offset(counters, i, 32), 16), INTS_16)

    def multiply_add(self, a, b, c):
        return self.call_llvm("llvm.fma.v16f32", c.type, a, b, c)

    def to_ints(self, counts):
        """The lanes of registers, which may be 16, 32 or 64 bits wide, as one INTS_16 for every sixteen."""
        lanes, bits = counts[0].type.count, counts[0].type.element.width
        if bits == 16:
            halves = [self.shuffle(count, count, range(i, i + 16)) for count in counts for i in (0, 16)]
            return [self.builder.sext(half, INTS_16) for half in halves]
        ints = counts if bits == 32 else [self.trunc(count, ir.VectorType(I32, lanes)) for count in counts]
        while lanes < 16:
            lanes *= 2
            ints = [self.shuffle(*pair, range(lanes)) for pair in zip(ints[::2], ints[1::2])]
        return ints

    def add_products_of_bytes(self, sums, unsigned, signed):
        """The lanes of `sums`, to each of which the products of four uint8 and four int8 are added (VNNI)."""
        return self.call_llvm("llvm.x86.avx512.vpdpbusd.512", INTS_16, sums, unsigned, signed)

    def first_lanes(self, count):
        """Which of sixteen lanes are among the first `count` (any number)."""
        lanes = ir.Constant(INTS_16, list(range(16)))
        return self.builder.icmp_signed("<", lanes, self.splat(self.trunc(count, I32), INTS_16))

    def store_floats_16(self, values, address, count):
        """Write the first `count` (any number) of sixteen floats."""
        pointer = self.builder.inttoptr(address, FLOATS_16.as_pointer())
        arguments = values, pointer, self.const(4, I32), self.first_lanes(count)
        self.call_llvm("llvm.masked.store.v16f32.p0", ir.VoidType(), *arguments)

    def load_floats_16(self, address, count, stride=None):
        """Sixteen floats of which only the first `count` (any number) are read; 0 in the other lanes.

        Side by side, or `stride` bytes apart.
        """
        wanted = self.first_lanes(count)
        zeros = self.const(0.0, FLOATS_16)
        if stride is not None:
            steps = self.mul(self.splat(stride, WORDS_16), ir.Constant(WORDS_16, list(range(16))))
            pointers = ir.VectorType(F32.as_pointer(), 16)
            places = self.builder.inttoptr(self.add(self.splat(address, WORDS_16), steps), pointers)
            arguments = places, self.const(4, I32), wanted, zeros
            return self.call_llvm("llvm.masked.gather.v16f32.v16p0", FLOATS_16, *arguments)
        pointer = self.builder.inttoptr(address, FLOATS_16.as_pointer())
        return self.call_llvm("llvm.masked.load.v16f32.p0", FLOATS_16, pointer, self.const(4, I32), wanted, zeros)

    def prefetch(self, address):
        """Ask for a cache line that will be read soon, into the second-level cache."""
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        read, nearness, data = self.const(0, I32), self.const(2, I32), self.const(1, I32)
        self.call_llvm("llvm.prefetch.p0", ir.VoidType(), pointer, read, nearness, data)

    def call_llvm(self, name, result, *arguments):
        signature = ir.FunctionType(result, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, signature, name), arguments)

    def loop(self, count, carried, body):
        """for i in range(count): carried = body(i, carried); returns the last carried.

        `carried` is a list of values: they become phi nodes, that is registers, never memory.
        """
        builder = self.builder
        before = builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        i = builder.phi(I64)
        i.add_incoming(self.const(0), before)
        now = [builder.phi(value.type) for value in carried]
        for phi, value in zip(now, carried):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", i, count), inside, after)
        builder.position_at_end(inside)
        then = body(i, now)
        for phi, value in zip([i, *now], [builder.add(i, self.const(1)), *then]):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return now


@intrinsic
def _pointer(typing, address, dtype):
    """The address as a pointer, which carray takes."""

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), emit


@njit
def array_at(address, count, dtype):
    """The `count` numbers of a Numba type at address, as an array."""
    return carray(_pointer(address, dtype), count)


@intrinsic
def load_word(typing, address):
    """The 64-bit integer at address."""
    return types.int64(types.int64), lambda context, builder, signature, args: Emitter(builder).load(I64, args[0], 8)


@intrinsic
def load_float(typing, address):
    """The float32 at address."""
    return types.float32(types.int64), lambda context, builder, signature, args: Emitter(builder).load(F32, args[0], 4)


@intrinsic
def load_int(typing, address):
    """The 32 bits at address."""

    def emit(context, builder, signature, args):
        emitter = Emitter(builder)
        return emitter.zext(emitter.load(I32, args[0], 4), I64)

    return types.int64(types.int64), emit


@intrinsic
def store_word(typing, address, word):
    """Write a 64-bit integer at address."""
    return types.void(types.int64, types.int64), _store


@intrinsic
def store_float(typing, address, value):
    """Write a float32 at address."""
    return types.void(types.int64, types.float32), _store


@intrinsic
def store_int(typing, address, number):
    """Write the low 32 bits of `number` at address."""

    def emit(context, builder, signature, args):
        emitter = Emitter(builder)
        emitter.store(emitter.trunc(args[1], I32), args[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


def _nibbles(emitter, word):
    """64 bits as sixteen bytes, a nibble each, the lowest first."""
    both = emitter.bitcast(emitter.splat(word, ir.VectorType(I64, 1)), ir.VectorType(I8, 8))
    low, high = emitter.and_(both, emitter.const(15, both.type)), emitter.lshr(both, emitter.const(4, both.type))
    return emitter.shuffle(low, high, [i for byte in range(8) for i in (byte, 8 + byte)])


@intrinsic
def store_nibbles(typing, address, word):
    """Write 16 times each of the word's sixteen nibbles at address, as bytes."""

    def emit(context, builder, signature, args):
        emitter = Emitter(builder)
        nibbles = _nibbles(emitter, args[1])
        emitter.store(emitter.shl(nibbles, emitter.const(4, nibbles.type)), args[0], 16)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def store_nibble_pairs(typing, address, a, b):
    """Write 16 (a + 16 b) at address for each of the two words' sixteen nibbles, as 16 bits each."""

    def emit(context, builder, signature, args):
        emitter = Emitter(builder)
        a, b = _nibbles(emitter, args[1]), _nibbles(emitter, args[2])
        pairs = emitter.or_(a, emitter.shl(b, emitter.const(4, b.type)))
        wide = emitter.zext(pairs, ir.VectorType(I16, 16))
        emitter.store(emitter.shl(wide, emitter.const(4, wide.type)), args[0], 16)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), emit


def _store(context, builder, signature, args):
    address, value = args
    Emitter(builder).store(value, address, value.type.get_abi_alignment(context.target_data))
    return context.get_dummy_value()


@intrinsic
def popcount(typing, word):
    """How many bits of one 64-bit integer are 1 (Numba has no name for it)."""

    def emit(context, builder, signature, args):
        return Emitter(builder).call_llvm("llvm.ctpop.i64", I64, args[0])

    return types.int64(types.int64), emit


@intrinsic
def word_at_least(typing, values, thresholds, count):
    """64 comparisons: bit i is (float32 at values)[i] >= (float32 at thresholds)[i]; 0 for i >= count.

    Thresholds are read sixteen at a time whatever `count` is: tables of them are padded.
    """

    def emit(context, builder, signature, args):
        values, thresholds, count = args
        emitter = Emitter(builder)
        word = emitter.const(0)
        for i in range(0, 64, 16):
            value = emitter.load_floats_16(emitter.offset(values, i, 4), emitter.sub(count, emitter.const(i)))
            threshold = emitter.load(FLOATS_16, emitter.offset(thresholds, i, 4), 4)
            bits = emitter.zext(emitter.bitcast(builder.fcmp_ordered(">=", value, threshold), I16), I64)
            word = emitter.or_(word, emitter.shl(bits, emitter.const(i)))
        return word

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def any_nan_64(typing, values, count):
    """Non-zero where one of the first min(count, 64) float32 at `values` is NaN."""

    def emit(context, builder, signature, args):
        values, count = args
        emitter = Emitter(builder)
        quarter = [
            emitter.load_floats_16(emitter.offset(values, i, 4), emitter.sub(count, emitter.const(i)))
            for i in range(0, 64, 16)
        ]
        # one "unordered" comparison looks at both its operands
        left, right = (builder.fcmp_unordered("uno", a, b) for a, b in zip(quarter[::2], quarter[1::2]))
        return emitter.zext(emitter.bitcast(emitter.or_(left, right), I16), I64)

    return types.int64(types.int64, types.int64), emit


@intrinsic
def transpose_8x8(typing, source, source_stride, target, target_stride):
    """(float32 at target)[c][p] = (float32 at source)[p][c] for c, p < 8; strides are in bytes between rows.

    Three rounds of shuffles exchange ever larger blocks: neighbours, then pairs, then halves.
    """

    def emit(context, builder, signature, args):
        source, source_stride, target, target_stride = args
        emitter = Emitter(builder)
        rows = [emitter.load(FLOATS_8, emitter.offset(source, i, source_stride), 4) for i in range(8)]
        ones = []
        for even, odd in zip(rows[::2], rows[1::2]):
            ones.append(emitter.shuffle(even, odd, [0, 8, 1, 9, 4, 12, 5, 13]))
            ones.append(emitter.shuffle(even, odd, [2, 10, 3, 11, 6, 14, 7, 15]))
        twos = []
        for a, b in ((0, 2), (1, 3), (4, 6), (5, 7)):
            twos.append(emitter.shuffle(ones[a], ones[b], [0, 1, 8, 9, 4, 5, 12, 13]))
            twos.append(emitter.shuffle(ones[a], ones[b], [2, 3, 10, 11, 6, 7, 14, 15]))
        halves = [emitter.shuffle(a, b, [0, 1, 2, 3, 8, 9, 10, 11]) for a, b in zip(twos[:4], twos[4:])]
        halves += [emitter.shuffle(a, b, [4, 5, 6, 7, 12, 13, 14, 15]) for a, b in zip(twos[:4], twos[4:])]
        for i, column in enumerate(halves):
            emitter.store(column, emitter.offset(target, i, target_stride), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic
def call(typing, address, arguments):
    """Call the C function `void f(int64, ...)` at address, with a tuple of integers."""

    def emit(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        function = ir.FunctionType(ir.VoidType(), [I64] * len(values)).as_pointer()
        builder.call(builder.inttoptr(args[0], function), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), emit


@njit
def meet(barrier):
    """Wait until all threads of the team have come here: the record at this address begins with what waits."""
    call(load_word(barrier), (barrier,))


@intrinsic
def call_int(typing, address):
    """The result of the C function `int f(void)` at address (omp_get_thread_num)."""

    def emit(context, builder, signature, args):
        function = builder.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer())
        return builder.sext(builder.call(function, []), I64)

    return types.int64(types.int64), emit


@intrinsic
def call_kernel(typing, address, a, b, c, d, e):
    """The result of the C function `int64 f(int64 a, b, c, d, e)` at address."""

    def emit(context, builder, signature, args):
        function = ir.FunctionType(I64, [I64] * 5).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), args[1:])

    return types.int64(*[types.int64] * 6), emit
