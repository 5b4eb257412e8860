"""One way to compile and launch every CUDA kernel here, on torch tensors, on the device or in Numba's simulator.

    kernel = Kernel(function, signature, threads=256)
    kernel(grid, tensor, ..., 5, shared=bytes)

On the device: Numba compiles the function to PTX, the driver to machine code (and keeps it in its own cache on disk),
and the launch goes straight to the driver on torch's current stream. So tensors are not copied, a launch can be
captured in a CUDA graph, more than 48 KB of shared memory is asked for where needed, and it costs a few microseconds
instead of Numba's own 6.6 + 4 an array (read, not measured). The same PTX is what the tests disassemble without a
GPU.

In the simulator (NUMBA_ENABLE_CUDASIM=1) the same call runs the function on CPU tensors, in place.

A signature is a tuple of Numba types: N-dimensional arrays `float32[:, ::1]` where indices should read like the
mathematics, raw pointers `pointer(float32)` where addresses are computed by hand, int32 and float32 scalars.
"""

import ctypes
import re
import struct
import threading

import torch
from numba import cuda
from numba.cuda import types

from .primitives import SIMULATED

uint8, uint32, uint64 = types.uint8, types.uint32, types.uint64
int32, int64, float32 = types.int32, types.int64, types.float32
pointer = types.CPointer

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of the driver's CUfunction_attribute


class Kernel:
    """A kernel for `threads` threads a block (a number or a pair); `blocks_per_sm` bounds its registers."""

    def __init__(self, function, signature, threads, blocks_per_sm=1):
        self.function, self.signature = function, signature
        self.threads = threads if isinstance(threads, tuple) else (threads, 1)
        self.blocks_per_sm = blocks_per_sm
        self._loaded = {}
        self._local = threading.local()
        if SIMULATED:
            self._simulated = cuda.jit(function)

    def ptx(self, capability: tuple) -> str:
        """The kernel in PTX for a compute capability such as (8, 0) or (9, 0, "a"). Needs no GPU."""
        bounds = (self.threads[0] * self.threads[1], self.blocks_per_sm)
        return cuda.compile_ptx(self.function, self.signature, cc=capability, launch_bounds=bounds)[0]

    def __call__(self, grid, *args, shared=0):
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        grid += (1,) * (3 - len(grid))
        if 0 in grid:
            return
        if SIMULATED:
            arrays = [_as_numpy(a, t) for a, t in zip(args, self.signature, strict=True)]
            self._simulated[grid, self.threads, 0, shared](*arrays)
        else:
            self._launch(grid, args, shared)

    def _launch(self, grid, args, shared):
        values = []
        for value, kind in zip(args, self.signature, strict=True):
            if isinstance(kind, types.Array):  # Numba passes an array as these numbers, one after the other
                size = value.element_size()
                strides = [stride * size for stride in value.stride()]
                values += [0, 0, value.numel(), size, value.data_ptr(), *value.shape, *strides]
            else:
                values.append(value.data_ptr() if isinstance(kind, types.CPointer) else value)
        buffer, packer, addresses = self._arguments()
        packer.pack_into(buffer, 0, *values)
        function = self._function(shared)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(_driver().cuLaunchKernel(function, *grid, *self.threads, 1, shared, stream, addresses, None))

    def _arguments(self):
        """This thread's buffer of 8-byte slots for the arguments, and the addresses of the slots."""
        if not hasattr(self._local, "arguments"):
            _use_torchs_context()
            slots = "".join("q" * (5 + 2 * t.ndim) if isinstance(t, types.Array) else _slot(t) for t in self.signature)
            packer = struct.Struct("=" + slots.replace("i", "i4x").replace("f", "f4x"))
            buffer = ctypes.create_string_buffer(packer.size)
            first = ctypes.addressof(buffer)
            addresses = (ctypes.c_void_p * len(slots))(*range(first, first + packer.size, 8))
            self._local.arguments = buffer, packer, addresses
        return self._local.arguments

    def _function(self, shared):
        """The kernel on the current device, allowed to take `shared` bytes of dynamic shared memory."""
        index = torch.cuda.current_device()
        if index not in self._loaded:
            ptx = self.ptx(capability_of(index))
            name = re.search(r"\.entry\s+([\w$]+)", ptx).group(1)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), ptx.encode() + b"\0"))
            _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
            self._loaded[index] = [function, 48 * 1024]
        function, allowed = self._loaded[index]
        if shared > allowed:
            _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
            self._loaded[index][1] = shared
        return function


def capability_of(index: int) -> tuple:
    """A device's compute capability as Numba wants it; "a" for the instructions that Hopper alone has."""
    capability = torch.cuda.get_device_capability(index)
    return (*capability, "a") if capability >= (9, 0) else capability


def shared_memory_limit(device: torch.device) -> int:
    """How many bytes of shared memory one block may have."""
    if SIMULATED:
        return 227 * 1024
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 * 1024)


def _slot(kind) -> str:
    return {float32: "f", int32: "i"}.get(kind, "q")


def _as_numpy(value, kind):
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_contiguous():
        raise ValueError(f"kernels take contiguous tensors, got strides {value.stride()} of shape {tuple(value.shape)}")
    value = value.detach()
    dtype = str(kind.dtype)
    if dtype == "boolean":
        dtype = "bool"
    array = value.numpy().view(dtype) if value.numel() else value.numpy().astype(dtype)
    return array.reshape(-1) if isinstance(kind, types.CPointer) else array


_libcuda = None


def _driver():
    global _libcuda
    if _libcuda is None:
        torch.cuda.init()
        _libcuda = ctypes.CDLL("libcuda.so.1")
    return _libcuda


def _use_torchs_context() -> None:
    """Make the device's primary context, which is torch's, this thread's: a new thread has none until torch sets it."""
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device()))
    _check(_driver().cuCtxSetCurrent(context))


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver error {code}: {(text.value or b'unknown').decode()}")
