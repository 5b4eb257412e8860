"""The words of primitives.py for the device, as inline PTX or as a few instructions of LLVM."""

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

__all__ = [
    "ballot", "clock", "cp_async8", "cp_async16", "cp_async_commit", "cp_async_wait_all", "cp_async_wait_but_one",
    "device", "fence_async_proxy", "float_bits", "ldmatrix_x4", "make_wgmma_b1_chain", "mma_b1", "popcount",
    "shared_address", "shuffle_xor", "split",
]  # fmt: skip

device = cuda.jit(device=True, inline="always")

_I32, _I64, _VOID = ir.IntType(32), ir.IntType(64), ir.VoidType()


def _pointer(context, builder, array_type, array, index_type, index):
    index = context.cast(builder, index, index_type, types.int64)
    if not isinstance(array_type, types.CPointer):
        array = context.make_array(array_type)(context, builder, value=array).data
    return builder.gep(array, [index], inbounds=True)


def _pointers(context, builder, array_type, array, index_type, index, count):
    first = _pointer(context, builder, array_type, array, index_type, index)
    return [builder.gep(first, [_I64(k)], inbounds=True) for k in range(count)]


def _shared_address(context, builder, *element):
    pointer = _pointer(context, builder, *element)
    return builder.ptrtoint(builder.addrspacecast(pointer, pointer.type.pointee.as_pointer(3)), _I32)


def _ptx(builder, result, arguments, text, constraints):
    function = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=True), arguments)


def _store_all(builder, struct, pointers):
    for k, pointer in enumerate(pointers):
        builder.store(builder.extract_value(struct, k), pointer)


def _numbered(first, count):
    """The operands $first, $first+1, ... as PTX writes a vector of registers."""
    return "{" + ", ".join(f"${i}" for i in range(first, first + count)) + "}"


@intrinsic
def mma_b1(typing, acc, acc_at, a, a_at, b, b_at):
    """acc[acc_at : +4] += popcounts of a[a_at : +4] & b[b_at : +2], the fragments of a 16 x 8 tile of 256 bits."""

    def codegen(context, builder, signature, args):
        t = signature.args
        accumulators = _pointers(context, builder, t[0], args[0], t[1], args[1], 4)
        left = _pointers(context, builder, t[2], args[2], t[3], args[3], 4)
        right = _pointers(context, builder, t[4], args[4], t[5], args[5], 2)
        text = (
            "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
            f"{_numbered(0, 4)}, {_numbered(4, 4)}, {_numbered(8, 2)}, {_numbered(10, 4)};"
        )
        result = _ptx(
            builder, ir.LiteralStructType([_I32] * 4), [builder.load(p) for p in left + right + accumulators],
            text, "=r,=r,=r,=r,r,r,r,r,r,r,0,1,2,3",
        )  # fmt: skip
        _store_all(builder, result, accumulators)
        return context.get_dummy_value()

    return types.void(acc, acc_at, a, a_at, b, b_at), codegen


@intrinsic
def shared_address(typing, shared, word):
    """The byte address of shared[word] within shared memory."""

    def codegen(context, builder, signature, args):
        return _shared_address(context, builder, signature.args[0], args[0], signature.args[1], args[1])

    return types.uint32(shared, word), codegen


@intrinsic
def ldmatrix_x4(typing, destination, at, shared, address):
    """destination[at : +4] <- four 8 x 16-byte tiles; thread 8 t + r gives the byte address of row r of tile t."""

    def codegen(context, builder, signature, args):
        t = signature.args
        text = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {_numbered(0, 4)}, [$4];"
        result = _ptx(builder, ir.LiteralStructType([_I32] * 4), [args[3]], text, "=r,=r,=r,=r,r,~{memory}")
        _store_all(builder, result, _pointers(context, builder, t[0], args[0], t[1], args[1], 4))
        return context.get_dummy_value()

    return types.void(destination, at, shared, types.uint32), codegen


def _cp_async(size, cache):
    @intrinsic
    def copy(typing, shared, shared_at, source, source_at, valid):
        """Start copying `size` bytes to shared[shared_at]; zeros, and nothing is read, where not valid."""

        def codegen(context, builder, signature, args):
            t = signature.args
            to = _shared_address(context, builder, t[0], args[0], t[1], args[1])
            source = builder.ptrtoint(_pointer(context, builder, t[2], args[2], t[3], args[3]), _I64)
            valid = builder.icmp_unsigned("!=", args[4], args[4].type(0))
            count = builder.select(valid, _I32(size), _I32(0))
            text = f"cp.async.{cache}.shared.global [$0], [$1], {size}, $2;"
            _ptx(builder, _VOID, [to, source, count], text, "r,l,r,~{memory}")
            return context.get_dummy_value()

        return types.void(shared, shared_at, source, source_at, types.boolean), codegen

    return copy


cp_async8, cp_async16 = _cp_async(8, "ca"), _cp_async(16, "cg")


def _statement(text):
    @intrinsic
    def statement(typing):
        def codegen(context, builder, signature, args):
            _ptx(builder, _VOID, [], text, "~{memory}")
            return context.get_dummy_value()

        return types.void(), codegen

    return statement


cp_async_commit = _statement("cp.async.commit_group;")
cp_async_wait_all = _statement("cp.async.wait_group 0;")
cp_async_wait_but_one = _statement("cp.async.wait_group 1;")
fence_async_proxy = _statement("fence.proxy.async.shared::cta;")


@intrinsic
def float_bits(typing, bits):
    """The float32 whose bits these are."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def ballot(typing, flag):
    """Bit i of the result is the flag of thread i of the warp; all 32 threads must take part."""

    def codegen(context, builder, signature, args):
        flag = builder.zext(args[0], _I32) if args[0].type.width < 32 else args[0]
        text = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
        return _ptx(builder, _I32, [flag], text, "=r,r")

    return types.uint32(types.boolean), codegen


@intrinsic
def shuffle_xor(typing, value, mask):
    """The value that the thread lane ^ mask holds."""

    def codegen(context, builder, signature, args):
        return _ptx(builder, _I32, list(args), "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r")

    return types.uint32(types.uint32, types.int32), codegen


@intrinsic
def split(typing, i, n):
    """(i // n, i % n) of numbers below 2^32; Numba would widen to 64 bits, where a division is a call."""

    def codegen(context, builder, signature, args):
        quotient = builder.udiv(*args)
        return cgutils.pack_array(builder, [quotient, builder.sub(args[0], builder.mul(quotient, args[1]))])

    return types.UniTuple(types.uint32, 2)(types.uint32, types.uint32), codegen


@intrinsic
def popcount(typing, word):
    """How many bits of a 32- or 64-bit word are set."""

    def codegen(context, builder, signature, args):
        count = builder.ctpop(args[0])
        return count if count.type.width == 32 else builder.trunc(count, _I32)

    return types.int32(word), codegen


@intrinsic
def clock(typing):
    """The multiprocessor's cycle counter."""

    def codegen(context, builder, signature, args):
        return _ptx(builder, _I64, [], "mov.u64 $0, %clock64;", "=l,~{memory}")

    return types.int64(), codegen


def make_wgmma_b1_chain(n, steps):
    """The word chain(acc, fragments, shared, descriptor, step, keep) for a 64 x n tile and `steps` times 256 bits.

    acc[: n / 2] = (acc if keep else 0) + sum_s popcounts of A_s & B_s. A_s = fragments[4 s : +4] of the 128
    threads, laid out as mma_b1's; B_s lies in shared memory at descriptor + s * step (in units of 16 bytes).

    The chain is one block of PTX with its own fence, commit and wait. In separate statements the compiler has to
    move registers between one wgmma and the next, and runs them one by one (ptxas warning C7515).
    """
    accumulators = n // 2
    first = accumulators + 4 * steps  # operand number of the descriptor

    @intrinsic
    def chain(typing, acc, fragments, shared, descriptor, step, keep):
        def codegen(context, builder, signature, args):
            t = signature.args
            acc_at = _pointers(context, builder, t[0], args[0], types.int64, _I64(0), accumulators)
            a_at = _pointers(context, builder, t[1], args[1], types.int64, _I64(0), 4 * steps)
            text = [
                "{ .reg .pred keep; .reg .b64 b;",
                f"setp.ne.b32 keep, ${first + 2}, 0;",
                f"mov.b64 b, ${first};",
                "wgmma.fence.sync.aligned;",
            ]
            for s in range(steps):
                text.append(
                    f"wgmma.mma_async.sync.aligned.m64n{n}k256.s32.b1.b1.and.popc {_numbered(0, accumulators)}, "
                    f"{_numbered(accumulators + 4 * s, 4)}, b, {'keep' if s == 0 else '1'};"
                )
                text.append(f"add.s64 b, b, ${first + 1};" if s + 1 < steps else "")
            text.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }")
            tied = [str(k) for k in range(accumulators)]
            constraints = ["=r"] * accumulators + ["r"] * (4 * steps) + ["l", "l", "r"] + tied + ["~{memory}"]
            values = [builder.load(p) for p in a_at] + [args[3], args[4], args[5]]
            values += [builder.load(p) for p in acc_at]
            kind = ir.LiteralStructType([_I32] * accumulators)
            _store_all(builder, _ptx(builder, kind, values, " ".join(text), ",".join(constraints)), acc_at)
            return context.get_dummy_value()

        return types.void(acc, fragments, shared, types.uint64, types.uint64, types.int32), codegen

    return chain
