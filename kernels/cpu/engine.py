"""The CPU engine: abcnets' operators on Numba kernels: `packed_conv`, `packed_max_pool`.

Several layers in one call, `packed_chain`, are in chain.py; what training runs, in quantizers.py.

This file is what happens around a kernel: who may use it, what is prepared once and kept, how a call is described.

    Layer       what depends on a layer's tensors: weights in tile order, scales, thresholds. Kept beside them.
    Plan        what also depends on the input's size: offsets, border constants. A bounded number a layer.
    Workspace   what one running call owns: a Job record, padded words, scratch. Calls that run at the same time
                each take one from the plan's list, so threads never share one.

Float64 input, more than eight activation bases (four in the binary code, which then has fifteen thresholds), float
activations (no bases) and NaN go to the plain implementation.
"""

import ctypes
import functools
import json
import logging
import time
from math import prod
from pathlib import Path

import numpy as np
import torch

from .. import layout
from ..cache import Beside, Recent
from . import quantizers, system
from .job import CHUNK, INTERLEAVED, PLANAR, SCRATCH_BYTES, WORDS, Job, PoolJob
from .quantizers import fit_levels, staircase, staircase_backward  # noqa: F401  operators, as the engine's own

logger = logging.getLogger(__name__)  # at level INFO it tells how long kernels took to compile

HALVES = (torch.bfloat16, torch.float16)  # computed in float32
MOST_BASES = 8  # activation bases that the tiles are compiled for
MOST_THRESHOLDS = 15  # that the packing is compiled for
PLANS_PER_LAYER = 16
LAYERS_PER_WEIGHT = 4  # the same bits may serve a packed model and its fused copy
# Binary convolutions M N of a layer, by the tile that counts them: beyond, one float convolution is faster. A whole run
# of bench.py writes its tile's; the others are estimates.
BITS_PAY_UP_TO = json.loads(Path(__file__).with_name("pays.json").read_text())

plain = None  # the abcnets module whose operators run what is not computed here


# --------------------------------------------------------------------------- who may use it


def pays(M, N, thresholds, spatial_dims, groups) -> bool:
    """Whether bits are faster here than one float convolution."""
    return is_compiled_for(N, thresholds) and 0 < M * N <= BITS_PAY_UP_TO[system.tile()]


multiplies_bytes = system.multiplies_bytes


def use(abcnets) -> None:
    """Let the operators of this abcnets module run what is not computed here."""
    global plain
    plain = quantizers.plain = abcnets


def tile() -> str:
    """What counts bits here, by name."""
    return system.tile()


def is_compiled_for(N, thresholds) -> bool:
    return 1 <= N <= MOST_BASES and thresholds <= MOST_THRESHOLDS


def try_it() -> None:
    """Compile and run small kernels of both kinds; raises whatever stands in the way (no Numba, an old NumPy)."""
    if not hasattr(np, "bitwise_count"):
        raise ImportError(f"NumPy {np.__version__} is too old: 2.0 or newer is needed")
    words = torch.tensor([5, 3, 8, 0]).view(1, 4, 1, 1)
    pooled = packed_max_pool(words, torch.zeros(4, dtype=torch.bool), 4, [2], [2], [0], [1], False, False)
    if pooled.flatten().tolist() != [7, 8]:
        raise RuntimeError(f"Numba's kernels compute wrongly here: {pooled.flatten().tolist()} instead of [7, 8]")
    one, zero = torch.ones(1, 1, dtype=torch.float32), torch.zeros(1, 1, dtype=torch.float32)
    weight, flips = torch.ones(1, 1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool)
    layer = weight, 2 * one, one[0], zero, flips, one[0], None, 1, [1, 1], [0] * 4, [1, 1], 1
    outputs = packed_conv(torch.tensor([-1, 0, 3]).float().view(1, 1, 1, 3), *layer).flatten().tolist()
    if outputs != [-1, 3, 3]:
        raise RuntimeError(f"Numba's kernels compute wrongly here: {outputs} instead of [-1, 3, 3]")
    pays(1, 1, 1, 2, 1)
    quantizers.try_it()


# --------------------------------------------------------------------------- the convolution


def packed_conv(
    x, bits, alphas, betas, thresholds, flips, bias, zero, channels, stride, padding, dilation, groups,
    out_thresholds=None, out_flips=None, out_bases=0,
):  # fmt: skip
    """abcnets::packed_conv, as abcnets.py documents it."""
    tensors = (bits, alphas, betas, thresholds, flips, bias, zero, out_thresholds, out_flips)
    if not stride and x.ndim != (3 if x.dtype is torch.int64 else 2):
        geometry = channels, stride, padding, dilation, groups
        return layout.by_rows(packed_conv, x, *tensors[:7], *geometry, *tensors[7:], out_bases)
    layer = _layers.get(tensors, channels, groups, out_bases)
    readable, kind = layer.readable(x)
    if kind is not None:
        threads = system.thread_count()
        key = (x.shape, kind, threads, *stride, *padding, *dilation)
        plan = layer.plans.get(key, Plan, layer, x.shape, kind, threads, stride, padding, dilation)
        output, saw_nan = plan.run(layer, readable)
        if not saw_nan:
            return output.to(x.dtype) if x.dtype in HALVES and not layer.out_bases else output
    # what the kernels do not compute, or must complain about
    return plain.packed_conv(
        x, *tensors[:7], channels, stride, padding, dilation, groups, out_thresholds, out_flips, out_bases
    )


# --------------------------------------------------------------------------- what is kept


def _numpy(tensor):
    """A copy: plans made later must see what the layer's other tables were made from."""
    if tensor is None:
        return None
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous().numpy().copy()


class Layer:
    """The tables that depend on a layer's tensors alone."""

    is_last = False  # of a chain, which it ends
    searched = out_searched = False  # whether thresholds ascend
    blank, takes_chunks = 0, True  # bytes of the padding; whether an image is packed sixteen pixels at a time, or as
    #                                a whole, behind which its step is kept, a float32

    def __init__(self, tensors, channels, groups, out_bases):
        bits, alphas, betas, thresholds, flips, bias, zero, out_thresholds, out_flips = tensors
        self.channels, self.groups, self.kernel = channels, groups, tuple(bits.shape[2:-1])
        self.M, self.O = bits.shape[:2]
        self.N, self.T = betas.shape[0], thresholds.shape[0]
        self.P, self.blocks = layout.words_of(channels), layout.blocks_of(self.O)
        self.out_bases, self.out_T = (0, 0) if out_thresholds is None else (out_bases, out_thresholds.shape[0])
        self.plans = Recent(PLANS_PER_LAYER)
        self._check_shapes(bits, *tensors[1:])
        self.numbers = tuple(_numpy(tensor) for tensor in (alphas, betas, bias, zero))
        finite = all(array is None or np.isfinite(array).all() for array in self.numbers)
        self.runs = finite and is_compiled_for(self.N, self.T)
        if self.runs:
            self._make_tables(bits, thresholds, flips, out_thresholds, out_flips)

    def _check_shapes(self, bits, *others) -> None:
        """Kernels read by address, so a table that is too small must be found here."""
        C, O, T = self.channels, self.O, self.T
        layout.check_thresholds(self.N, T)
        layout.check_thresholds(self.out_bases, self.out_T)
        thresholds = (T,) if others[2].ndim == 1 else (T, C)
        right = ((self.M, O), (self.N,), thresholds, (C,), (O,), (), (self.out_T, O), (O,))
        names = ("alphas", "betas", "thresholds", "flips", "bias", "zero", "out_thresholds", "out_flips")
        for name, tensor, shape in zip(names, others, right):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"packed_conv: {name} should have the shape {shape}, got {tuple(tensor.shape)}")
        if C % self.groups or O % self.groups or bits.shape[-1] != -(-C // self.groups // 8):
            raise ValueError(f"packed_conv: bits of shape {tuple(bits.shape)} do not fit {C} channels "
                             f"in {self.groups} groups")  # fmt: skip

    def _make_tables(self, bits, thresholds, flips, out_thresholds, out_flips) -> None:
        self.words_MOTP, self.seen_OTP = layout.weight_words(_numpy(bits), self.groups, self.channels), None
        masks_OP = layout.channel_masks(self.O, self.channels, self.groups)
        taps = self.words_MOTP.shape[2]
        self._choose_tile(masks_OP, taps)
        lanes, block = self.lanes, self.lanes.block
        masks_OU = lanes.units(masks_OP)
        first, self.width = layout.word_ranges(masks_OU, block, lanes.step)
        self.word_bytes = lanes.word_bytes(self.N, self.uniform)  # of what the image holds for 64 channels
        self.pixel_bytes = self.P * self.word_bytes
        self.tiles = len(first)
        self.tile_units = lanes.offsets(first, self.word_bytes)
        units_MOTU, self.masks = lanes.units(self.words_MOTP), None
        if isinstance(lanes, layout.LookUp):
            units_MOTU = layout.hide_unseen(units_MOTU, masks_OU[:, None])
        elif self.seen_OTP is not None:
            self.masks = layout.tile_weights(lanes.units(self.seen_OTP)[None], first, self.width, block)
        self.weights = layout.tile_weights(units_MOTU, first, self.width, block)
        self.scales = np.ascontiguousarray(layout.in_blocks(layout.scales(*self.numbers[:2]), 2, block))
        per_channel = np.broadcast_to(_numpy(thresholds).reshape(self.T, -1), (self.T, self.channels))
        flips = np.zeros(self.channels, bool) if flips is None else _numpy(flips)
        self.thresholds, self.flips, self.searched = _threshold_tables(per_channel, flips, self.N, 64)
        if self.out_bases:
            self.out_thresholds, self.out_flips, self.out_searched = _threshold_tables(
                _numpy(out_thresholds), _numpy(out_flips), self.out_bases, layout.BLOCK
            )

    def _choose_tile(self, masks_OP, taps) -> None:
        """`lanes`, how the layer is counted, whether as one of uniform levels, and what outputs see of each tap."""
        alphas, betas, *others = self.numbers
        if width := system.look_up_lanes():
            self.uniform = layout.looks_up_uniform(betas)
            self.lanes = layout.choose_look_up(masks_OP, taps, self.N, self.uniform, width)
            if self.lanes is not None:
                return
        if self.groups > 1:
            self.seen_OTP = np.repeat(masks_OP[:, None], taps, axis=1)
        if one := layout.as_one_base(self.words_MOTP, alphas, masks_OP):
            self.words_MOTP, alphas, self.seen_OTP = one
            self.M, self.numbers = 1, (alphas, betas, *others)
        masked = self.seen_OTP is not None
        self.uniform = layout.counts_as_uniform(betas, masked, self.M * self.O * taps // self.groups)
        lanes = layout.ARM_LANES if system.is_arm() else layout.LANES
        self.lanes = layout.choose_lanes(masks_OP, taps, system.popcount_lanes(), lanes)

    def border_constants(self, outside):
        """What each border class (taps outside the image) adds to the sums: float32 (classes, O)."""
        channels = self.channels // self.groups
        return layout.border_constants(self.words_MOTP, *self.numbers, outside, channels, self.seen_OTP)

    def readable(self, x) -> tuple:
        """(x as the kernels can read it, the order of its pixels and channels); order None: they cannot."""
        shape, dtype, dimensions = x.shape, x.dtype, len(self.kernel)
        if not self.runs or x.numel() == 0:
            return x, None
        if dtype is torch.int64:
            if len(shape) != dimensions + 3 or shape[-2:] != (self.P, self.N):
                raise ValueError(f"packed_conv: words of {self.channels} channels and {self.N} bases should have the "
                                 f"shape (B, *S, {self.P}, {self.N}), got {tuple(shape)}")  # fmt: skip
            return x.contiguous(), WORDS
        if len(shape) != dimensions + 2 or shape[1] != self.channels:
            return x, None
        if dtype is not torch.float32:
            if dtype not in HALVES:
                return x, None
            x = x.float()
        if dimensions == 0:  # rows are the pixels of one image
            return (x if x.stride(1) == 1 else x.contiguous()), INTERLEAVED
        if x.is_contiguous():
            return x, PLANAR
        stride = x.stride()
        if all(stride[i] == stride[i + 1] * shape[i + 1] for i in range(2, len(shape) - 1)):
            if stride[-1] == 1:
                return x, PLANAR
            if stride[1] == 1:
                return x, INTERLEAVED
        return x.contiguous(), PLANAR


_layers = Beside(Layer, LAYERS_PER_WEIGHT)


def _threshold_tables(thresholds_TC, flips_C, N, multiple) -> tuple:
    """(thresholds, flips, whether the kernels may search: where the former ascend, as they then do in all channels)."""
    rising_TC = layout.rising(thresholds_TC, N)
    table = layout.threshold_table(thresholds_TC if rising_TC is None else rising_TC, multiple)
    return table, layout.flip_words(flips_C), rising_TC is not None


class FloatLayer(Layer):
    """The tables of a layer that stays float, the first or last of a chain (chain.py): no bases, no groups."""

    def __init__(self, weight, bias, is_last=False, relu=False):
        self.is_last = is_last
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"packed_chain: a bias of shape {tuple(bias.shape)} does not fit weights of shape "
                             f"{tuple(weight.shape)}")  # fmt: skip
        weight, bias = _numpy(weight), _numpy(bias)
        (self.O, self.channels), self.kernel = weight.shape[:2], weight.shape[2:]
        self.M = self.groups = 1
        self.N = self.T = self.P = self.out_bases = self.out_T = 0
        registers = 2 if self.O > layout.BLOCK and system.has_long_registers() else 1
        self.lanes, self.uniform, self.width = layout.Floats(not is_last, relu, registers), False, self.channels
        self.blocks, self.tiles = layout.blocks_of(self.O), layout.blocks_of(self.O, self.lanes.block)
        self.word_bytes, self.pixel_bytes = 4, 4 * self.channels
        self.bias = np.zeros(self.O, np.float32) if bias is None else bias
        sums = np.abs(weight.astype(np.float64)).reshape(self.O, -1).sum(1) + np.abs(self.bias)
        self.runs = is_last or bool((sums < 2.0**60).all())  # else bits might have to say NaN
        self.weights, self.masks = layout.float_weights(weight, self.lanes.block), None
        self.thresholds = self.flips = self.scales = np.zeros(0, np.float32)
        self.tile_units = np.zeros(self.tiles, np.int64)

    def hand_on_to(self, layer) -> None:
        """Let bits come out, which the layer reads."""
        self.out_bases, self.out_T, self.out_searched = layer.N, layer.T, layer.searched
        if layer.runs:
            self.out_flips = layer.flips
            self.out_thresholds = np.ascontiguousarray(layer.thresholds[:, : layout.BLOCK * self.blocks])

    def border_constants(self, outside):
        """As Layer: the bias, since zeros outside the image add nothing."""
        return np.tile(self.bias, (len(outside), 1))


class EightBitLayer(FloatLayer):
    """The same of a layer in eight bits (eight_bits.py), the first of a chain. weight: int8, times `scales`."""

    blank, takes_chunks = 128, False

    def __init__(self, weight, scales, bias):
        if weight.dtype is not torch.int8 or scales.shape != weight.shape[:1]:
            raise ValueError(f"packed_chain: scales of shape {tuple(scales.shape)} do not fit weights of shape "
                             f"{tuple(weight.shape)}, or these are not int8 but {weight.dtype}")  # fmt: skip
        super().__init__(weight * scales.view(-1, *[1] * (weight.ndim - 1)), bias)
        fits = self.channels <= 4 and weight[0].numel() * 255 * 127 < 2**31
        self.runs &= system.multiplies_bytes() and fits
        if self.runs:
            self.lanes = layout.Bytes(True, False, self.lanes.registers)
            self.width, self.pixel_bytes = 1, 4
            self.weights = layout.byte_weights(weight.numpy(), self.lanes.block)
            self.scales = np.ascontiguousarray(layout.in_blocks(_numpy(scales), 0, self.lanes.block))


class Plan:
    """A layer at one input size: the geometry's tables, and the workspaces of calls that ended.

    It does not hold the layer, which holds it: in a cycle both would stay until Python's collector comes by.
    """

    def __init__(self, layer, shape, kind, threads, stride, padding, dilation):
        self.kind, self.threads, self.workspaces = kind, threads, []
        size = tuple(shape[1:-2] if kind == WORDS else shape[2:])
        self.images = shape[0]
        self.linear = not size
        if self.linear:  # rows are the pixels of one image
            size, stride, padding, dilation, self.images = (shape[0],), (1,), (0, 0), (1,), 1
        kernel = layer.kernel or (1,)
        self.geometry = geometry = layout.Geometry.of(size, kernel, stride, padding, dilation)
        if min(geometry.output) < 1:
            raise ValueError(f"packed_conv: a kernel of {kernel} does not fit an input of {tuple(size)}")
        self.output_shape = self._output_shape(layer, shape[0], len(size))
        lanes, image = layer.lanes, layer.lanes.image(layer.uniform)
        self.in_place = kind == WORDS and not any(padding) and (image, lanes.repeats) == (layout.BASES, 1)
        self.words_by_thread = not self.in_place and (threads == 1 or self.images >= 4 * threads)
        self._make_tables(layer, geometry)
        self.words_bytes, self.sums_bytes = prod(geometry.padded) * self.pixel_bytes, 0
        if image == layout.UNIFORM_WORDS and layer.N == 2:
            self.sums_bytes = -(-(prod(geometry.padded) + 16) // 16) * 64  # sixteen are read and written at a time
            self.words_bytes = -(-self.words_bytes // 64) * 64
        self.image_bytes = self.words_bytes + self.sums_bytes + (0 if layer.takes_chunks else 4)

    def _output_shape(self, layer, B, dimensions):
        size = () if self.linear else self.geometry.output[3 - dimensions :]
        if layer.out_bases:
            return (B, *size, layout.words_of(layer.O), layer.out_bases)
        return (B, layer.O, *size)

    def _make_tables(self, layer, geometry):
        self.pixel_bytes = layer.pixel_bytes
        self.chunks = np.zeros(1, np.int64)
        if layer.takes_chunks:
            self.chunks = layout.chunk_starts(geometry.read_pixels, prod(geometry.size), CHUNK)
        units = layer.lanes.offsets(np.arange(0, layer.width, layer.lanes.step), layer.word_bytes)
        self.tap_offsets = (geometry.taps[:, None] * self.pixel_bytes + units).reshape(-1)
        outside, class_of_pixel = geometry.border_classes
        constants = layer.border_constants(outside)
        self.constants = np.ascontiguousarray(layout.in_blocks(constants, 1, layer.lanes.block).swapaxes(0, 1))
        # the last tile may reach past the image: it recomputes the last pixel, and its rows are not stored
        self.windows = np.pad(geometry.output_pixels, (0, CHUNK), "edge")
        self.pixel_classes = np.pad(class_of_pixel * self.constants[0].nbytes, (0, CHUNK), "edge")
        self.output_pixels = np.arange(prod(geometry.output))

    def run(self, layer, x) -> tuple:
        """(output, whether a NaN was seen)."""
        try:
            workspace = self.workspaces.pop()
        except IndexError:
            workspace = Workspace(layer, self)
        output = self._empty_output(layer)
        job = workspace.job
        self.point(job, x)
        job.output, job.saw_nan = output.data_ptr(), 0
        system.run(workspace.entry, job.address, self.threads)
        saw_nan = job.saw_nan
        self.workspaces.append(workspace)
        return output, saw_nan

    def point(self, job, x) -> None:
        """Let the record's input be x."""
        job.input = x.data_ptr()
        if self.kind != WORDS:
            stride = x.stride()
            job.image_stride, job.channel_stride, job.pixel_stride = 4 * stride[0], 4 * stride[1], 4 * stride[-1]
            if self.kind == PLANAR:  # of an image one pixel wide a stride says nothing
                job.pixel_stride = 4
            if self.linear:
                job.pixel_stride = 4 * stride[0]
        else:
            job.image_stride = 8 * x.stride(0)
            if self.in_place:
                job.words = job.input

    def _empty_output(self, layer):
        if not layer.out_bases:
            return system.in_large_pages(torch.empty(self.output_shape, dtype=torch.float32, device="cpu"))
        if layer.blocks * layout.BLOCK % 64:  # the last word's upper blocks are nobody's to write
            return torch.zeros(self.output_shape, dtype=torch.int64, device="cpu")
        return torch.empty(self.output_shape, dtype=torch.int64, device="cpu")


class Workspace:
    """What one running call owns."""

    def __init__(self, layer, plan):
        images = plan.threads if plan.words_by_thread else plan.images
        self.words = None if plan.in_place else layout.aligned_zeros((images, plan.image_bytes), np.uint8)
        self.scratch = layout.aligned_zeros((plan.threads, SCRATCH_BYTES + plan.sums_bytes), np.uint8)
        out_words = layout.words_of(layer.O)
        pixel_bytes = 8 * out_words * layer.out_bases if layer.out_bases else 4 * layer.O
        self.entry = _run_kernel()
        self.job = describe(
            layer, plan, plan.images, self.scratch,
            input_kind=plan.kind,
            chunk_count=0 if plan.in_place else len(plan.chunks),
            words=0 if plan.in_place else _address(self.words),
            words_stride=plan.image_bytes,
            words_by_thread=plan.words_by_thread,
            output_stride=prod(plan.geometry.output) * pixel_bytes,
            output_landing=_address(plan.output_pixels),
            output_pixel_bytes=pixel_bytes,
            store_kernel=store_kernel(
                WORDS if layer.out_bases else INTERLEAVED if plan.linear else PLANAR,
                layer.out_bases, layer.out_T, layer.out_searched,
            ),
        )  # fmt: skip


def describe(layer, plan, images, scratch, **places) -> Job:
    """The record of a call of a layer; `places` say where its input, words and output are."""
    geometry = plan.geometry
    bases = layer.N, layer.T, layer.searched, layer.uniform
    chunk_kernel, block_kernel = _kernels(*bases, layer.masks is not None, layer.lanes)
    job = Job(
        images=images,
        channels=layer.channels,
        pixels=prod(geometry.size),
        bases=layer.N,
        channel_words=layer.P,
        thresholds=_address(layer.thresholds),
        flips=_address(layer.flips),
        chunks=_address(plan.chunks),
        landing=_address(geometry.input_pixels),
        pixel_bytes=plan.pixel_bytes,
        repeat=sum(1 << 16 * i for i in range(layer.lanes.repeats)),
        counted=0xFFFF if layer.lanes.repeats > 1 else -1,
        differing=plan.words_bytes if plan.sums_bytes else 0,
        image_scale=plan.words_bytes,
        chunk_kernel=chunk_kernel,
        block_kernel=block_kernel,
        parts=layer.lanes.block // layout.BLOCK,
        tiles=layer.tiles,
        weights=_address(layer.weights),
        masks=0 if layer.masks is None else _address(layer.masks),
        tile_units=_address(layer.tile_units),
        tap_offsets=_address(plan.tap_offsets),
        tap_count=len(plan.tap_offsets),
        window_taps=_address(geometry.taps),
        window_tap_count=len(geometry.taps),
        window_count=geometry.output_pixels[-1] + 1,
        start=-(layer.channels // layer.groups * len(geometry.taps) // 2),
        weight_bases=layer.M,
        scales=_address(layer.scales),
        constants=_address(plan.constants),
        windows=_address(plan.windows),
        pixel_classes=_address(plan.pixel_classes),
        blocks=layer.blocks,
        output_pixels=prod(geometry.output),
        output_channels=layer.O,
        scratch=_address(scratch),
        scratch_stride=scratch.strides[0],
        **places,
    )
    if layer.out_bases:
        job.output_thresholds, job.output_flips = _address(layer.out_thresholds), _address(layer.out_flips)
    job.address = ctypes.addressof(job)
    return job


def _run_kernel() -> int:
    from . import vector

    return vector.run_kernel().address


@functools.cache
def store_kernel(
    kind: int, N: int, T: int, searched: bool,
    image: int = layout.BASES, repeats: int = 1, adds: bool = False, relu: bool = False,
) -> int:  # fmt: skip
    from . import store

    return store.store_kernel(kind, N, T, searched, image, repeats, adds, relu).address


@functools.cache
def _kernels(N: int, T: int, searched: bool, uniform: bool, masked: bool, lanes) -> tuple:
    """Addresses of the functions that pack and convolve for a layer of N bases and T thresholds.

    Here Numba is loaded, and compiles or reads its cache.
    """
    start = time.perf_counter()
    from . import eight_bits, floats, lookup, pack, vector

    if isinstance(lanes, layout.Bytes):
        return eight_bits.chunk_kernel().address, eight_bits.block_kernel(8, lanes.registers).address
    if isinstance(lanes, layout.Floats):
        block = floats.block_kernel(8 if system.has_long_registers() else 4, lanes.registers)
        return floats.chunk_kernel(lanes.is_first, lanes.relu).address, block.address
    if isinstance(lanes, layout.LookUp):
        block = lookup.block_kernel(N, int(uniform), lanes)
    else:
        block = vector.block_kernel(N, int(uniform), int(masked), lanes)
    chunk = pack.chunk_kernel(N, T, int(searched), lanes.image(uniform), lanes.word_bytes(N, uniform))
    addresses = chunk.address, block.address
    logger.info("kernels for N = %d (%d thresholds) ready after %.2f s", N, T, time.perf_counter() - start)
    return addresses


def _address(array) -> int:
    return array.ctypes.data


# --------------------------------------------------------------------------- max-pooling


def packed_max_pool(words, flips, channels, kernel_size, stride, padding, dilation, ceil_mode, binary):
    """abcnets::packed_max_pool, as abcnets.py documents it."""
    size = words.shape[1:-2]
    output_size, sources = pool_sources(
        tuple(size), tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
    )
    if sources is None or words.numel() == 0:
        return plain.packed_max_pool(
            words, flips, channels, kernel_size, stride, padding, dilation, ceil_mode, binary
        )
    words = words.contiguous()
    B, P, N = words.shape[0], *words.shape[-2:]
    output = torch.empty((B, *output_size, P, N), dtype=torch.int64, device="cpu")
    flip_words, landing = layout.flip_words(flips.numpy()), np.arange(prod(output_size))
    job = describe_pool(
        B, sources, pool_kernel(N, binary),
        input=words.data_ptr(),
        input_stride=8 * prod(size) * P * N,
        output=output.data_ptr(),
        output_stride=8 * prod(output_size) * P * N,
        output_landing=_address(landing),
        output_pixel_bytes=8 * P * N,
        channel_words=P,
        flips=_address(flip_words),
    )  # fmt: skip
    from . import pool

    system.run(pool.run_kernel().address, job.address, system.thread_count())
    return output


def describe_pool(images, sources, kernel, **places) -> PoolJob:
    """The record of a pooling; `places` say where its input and output are, and what words mean."""
    job = PoolJob(
        images=images, output_pixels=len(sources), sources=_address(sources), taps=sources.shape[1], kernel=kernel,
        **places,
    )  # fmt: skip
    job.address = ctypes.addressof(job)
    return job


@functools.cache
def pool_kernel(N: int, binary: bool, relu: bool = False) -> int:
    """Address of the function that pools words of N bases, or (N = 0) floats, behind a ReLU or not."""
    from . import pool

    if N == 0:
        return pool.floats_kernel(int(relu)).address
    return pool.words_kernel(N, int(binary and N > 1)).address  # one bit's maximum is an OR


@functools.cache
def average_kernel(has_scales: bool, relu: bool) -> int:
    """Address of the function that averages floats."""
    from . import pool

    return pool.average_kernel(int(has_scales), int(relu)).address


pool_sources = functools.lru_cache(maxsize=64)(layout.pool_sources)


# --------------------------------------------------------------------------- several in one call


def packed_chain(x, constants, program, other=None):
    """abcnets::packed_chain, as abcnets.py documents it."""
    return _chains().packed_chain(x, constants, program, other)


@functools.cache
def _chains():
    from . import chain  # which is made of what stands above

    return chain
