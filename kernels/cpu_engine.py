"""The CPU engine: the operators `abcnets::packed_conv` and `abcnets::packed_max_pool` on Numba kernels.

This file is what happens around a kernel: who may use it, what is prepared once and kept, how a call is described.

    Layer       what depends on a layer's tensors: weights in tile order, scales, thresholds. Kept beside the `bits`
                tensor (weakly) and made anew when one of the tensors was replaced or changed in place.
    Plan        what also depends on the input's size: offsets, border constants. A bounded number a layer.
    Workspace   what one running call owns: a Job record, padded words, scratch. Calls that run at the same time
                each take one from the plan's list, so threads never share one.

Float64 input, more than eight activation bases, float activations (no bases) and NaN go to the plain implementation.
"""

import ctypes
import functools
import threading
from math import prod

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

import abcnets

from . import cpu_system, layout
from .cpu_job import CHUNK, INTERLEAVED, PLANAR, SCRATCH_BYTES, WORDS, Job, PoolJob

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_BASES = 8  # activation bases that the tiles are compiled for
PLANS_PER_LAYER = 16
LAYERS_PER_WEIGHT = 4  # the same bits may serve a packed model and its fused copy


def register() -> None:
    """Make this engine the CPU implementation of the packed operators."""
    library = torch.library.Library("abcnets", "IMPL")
    library.impl("packed_conv", packed_conv, "CPU")
    library.impl("packed_max_pool", packed_max_pool, "CPU")
    _registered.append(library)  # an operator lives as long as its library object


_registered = []


# --------------------------------------------------------------------------- the convolution


def packed_conv(
    x, bits, alphas, betas, thresholds, flips, bias, channels, stride, padding, dilation, groups,
    out_thresholds=None, out_flips=None,
):  # fmt: skip
    """abcnets::packed_conv, as abcnets.py documents it."""
    arguments = (x, bits, alphas, betas, thresholds, flips, bias, channels, stride, padding, dilation, groups)
    if not _runs_here(x, channels, betas, bits.dim() - 3):
        return abcnets._packed_conv_reference(*arguments, out_thresholds, out_flips)
    layer = _find_layer((bits, alphas, betas, thresholds, flips, bias, out_thresholds, out_flips), channels, groups)
    if not layer.finite:
        return abcnets._packed_conv_reference(*arguments, out_thresholds, out_flips)
    dtype = x.dtype
    if dtype is torch.bfloat16 or dtype is torch.float16:
        x = x.float()
    x, kind = _readable(x)
    threads = cpu_system.thread_count()
    key = (x.shape, kind, threads, *stride, *padding, *dilation)
    plan = layer.plans.get(key) or layer.add_plan(key, Plan(layer, x, kind, threads, stride, padding, dilation))
    output, saw_nan = plan.run(x)
    if saw_nan:  # the plain implementation says where it shows, or that bits cannot say it
        return abcnets._packed_conv_reference(*arguments, out_thresholds, out_flips)
    return output if output.dtype is torch.int64 or dtype is torch.int64 else output.to(dtype)


def _runs_here(x, channels, betas, dimensions) -> bool:
    """Whether the kernels compute this call; the plain implementation takes, or complains about, the rest."""
    dtype, N = x.dtype, betas.shape[0]
    if not 1 <= N <= MOST_BASES or x.numel() == 0:
        return False
    if dtype is torch.int64:
        return x.dim() == dimensions + 3 and x.shape[-1] == N and x.shape[-2] == layout.words_of(channels)
    return x.dim() == dimensions + 2 and x.shape[1] == channels and dtype in FLOATS


def _readable(x) -> tuple:
    """(x or a copy of it, the order that its pixels and channels lie in)."""
    if x.dtype is torch.int64:
        return x.contiguous(), WORDS
    if x.dim() == 2:  # a linear layer's rows are the pixels of one image
        return (x if x.stride(1) == 1 else x.contiguous()), INTERLEAVED
    if x.is_contiguous():
        return x, PLANAR
    size, stride = x.shape, x.stride()
    if all(stride[i] == stride[i + 1] * size[i + 1] for i in range(2, x.dim() - 1)):
        if stride[-1] == 1:
            return x, PLANAR
        if stride[1] == 1:
            return x, INTERLEAVED
    return x.contiguous(), PLANAR


# --------------------------------------------------------------------------- what is kept


_layers = WeakTensorKeyDictionary()  # bits -> [Layer]
_lock = threading.Lock()


def _version(tensor):
    return None if tensor is None or tensor.is_inference() else tensor._version


def _find_layer(tensors, channels, groups) -> "Layer":
    bits, *others = tensors
    for layer in _layers.get(bits, ()):
        if layer.made_from(bits, others, channels, groups):
            return layer
    with _lock:
        layer = Layer(*tensors, channels, groups)
        _layers[bits] = [layer, *_layers.get(bits, ())][:LAYERS_PER_WEIGHT]
    return layer


def _numpy(tensor):
    if tensor is None:
        return None
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous().numpy()


class Layer:
    """The tables that depend on a layer's tensors alone."""

    def __init__(self, bits, alphas, betas, thresholds, flips, bias, out_thresholds, out_flips, channels, groups):
        self.others = (alphas, betas, thresholds, flips, bias, out_thresholds, out_flips)
        self.versions = tuple(map(_version, (bits, *self.others)))
        self.channels, self.groups, self.kernel = channels, groups, tuple(bits.shape[2:-1])
        self.M, self.O = bits.shape[:2]
        self.N, self.P, self.blocks = betas.shape[0], layout.words_of(channels), layout.blocks_of(self.O)
        self.alphas, self.betas, self.bias = _numpy(alphas), _numpy(betas), _numpy(bias)
        self.finite = all(np.isfinite(v).all() for v in (self.alphas, self.betas, self.bias) if v is not None)
        self.plans = {}

        self.words_MOTP = layout.weight_words(_numpy(bits), groups, channels)
        masks_OP = layout.channel_masks(self.O, channels, groups)
        first, self.width = layout.word_ranges(masks_OP)
        self.block_words = first * self.N * 8
        self.weights = layout.tile_weights(self.words_MOTP, first, self.width)
        self.masks = layout.tile_masks(masks_OP, self.words_MOTP.shape[2], first, self.width) if groups > 1 else None
        self.scales = np.ascontiguousarray(layout.in_blocks(layout.scales(self.alphas, self.betas), 2))
        self.thresholds = layout.threshold_table(_numpy(thresholds), 64)
        self.flips = layout.flip_words(_numpy(flips))
        self.out_bases = 0
        if out_thresholds is not None:
            self.out_bases = out_thresholds.shape[0]
            self.out_thresholds = layout.threshold_table(_numpy(out_thresholds), layout.BLOCK)
            self.out_flips = layout.flip_words(_numpy(out_flips))

    def made_from(self, bits, others, channels, groups) -> bool:
        return (
            all(mine is theirs for mine, theirs in zip(self.others, others))
            and self.versions == (_version(bits), *map(_version, others))
            and self.channels == channels
            and self.groups == groups
        )

    def add_plan(self, key, plan) -> "Plan":
        with _lock:
            while len(self.plans) >= PLANS_PER_LAYER:
                self.plans.pop(next(iter(self.plans)))
            self.plans[key] = plan
        return plan


class Plan:
    """A layer at one input size: the geometry's tables, and the workspaces of calls that ended."""

    def __init__(self, layer, x, kind, threads, stride, padding, dilation):
        self.layer, self.kind, self.threads, self.workspaces = layer, kind, threads, []
        size = tuple(x.shape[1:-2] if kind == WORDS else x.shape[2:])
        self.images = x.shape[0]
        self.linear = not size
        if self.linear:  # rows are the pixels of one image
            size, stride, padding, dilation, self.images = (x.shape[0],), (1,), (0, 0), (1,), 1
        kernel = layer.kernel or (1,)
        self.geometry = geometry = layout.Geometry.of(size, kernel, stride, padding, dilation)
        if min(geometry.output) < 1:
            raise ValueError(f"packed_conv: a kernel of {kernel} does not fit an input of {tuple(size)}")
        self.output_shape = self._output_shape(x, len(size))
        self.in_place = kind == WORDS and not any(padding)
        self.words_by_thread = not self.in_place and (threads == 1 or self.images >= 4 * threads)
        self._make_tables(layer, geometry)

    def _output_shape(self, x, dimensions):
        layer, size = self.layer, () if self.linear else self.geometry.output[3 - dimensions :]
        if layer.out_bases:
            return (x.shape[0], *size, layout.words_of(layer.O), layer.out_bases)
        return (x.shape[0], layer.O, *size)

    def _make_tables(self, layer, geometry):
        pixel_bytes = layer.P * layer.N * 8
        self.landing = geometry.input_pixels * pixel_bytes
        self.chunks = layout.chunk_starts(geometry.read_pixels, prod(geometry.size), CHUNK)
        word_bytes = np.arange(layer.width) * layer.N * 8
        self.tap_offsets = (geometry.taps[:, None] * pixel_bytes + word_bytes).reshape(-1)
        outside, class_of_pixel = geometry.border_classes
        constants = layout.border_constants(
            layer.words_MOTP, layer.alphas, layer.betas, layer.bias, outside, layer.channels // layer.groups
        )
        self.constants = np.ascontiguousarray(layout.in_blocks(constants, 1).swapaxes(0, 1))
        # the last tile may reach past the image: it recomputes the last pixel, and its rows are not stored
        self.pixel_offsets = np.pad(geometry.output_pixels * pixel_bytes, (0, CHUNK), "edge")
        self.pixel_classes = np.pad(class_of_pixel * (layer.blocks * layout.BLOCK * 4), (0, CHUNK), "edge")

    def run(self, x) -> tuple:
        """(output, whether a NaN was seen)."""
        workspace = self.workspaces.pop() if self.workspaces else Workspace(self)
        output = self._empty_output()
        job = workspace.job
        job.input, job.output, job.saw_nan = x.data_ptr(), output.data_ptr(), 0
        if self.kind != WORDS:
            stride = x.stride()
            job.image_stride, job.channel_stride, job.pixel_stride = 4 * stride[0], 4 * stride[1], 4 * stride[-1]
            if self.linear:
                job.pixel_stride = 4 * stride[0]
        elif self.in_place:
            job.words = job.input
        cpu_system.run(workspace.entry, job.address, self.threads)
        saw_nan = job.saw_nan
        self.workspaces.append(workspace)
        return output, saw_nan

    def _empty_output(self):
        layer = self.layer
        if not layer.out_bases:
            return cpu_system.in_large_pages(torch.empty(self.output_shape))
        if layer.blocks * layout.BLOCK % 64:  # the last word's upper blocks are nobody's to write
            return torch.zeros(self.output_shape, dtype=torch.int64)
        return torch.empty(self.output_shape, dtype=torch.int64)


class Workspace:
    """What one running call owns."""

    def __init__(self, plan):
        from . import cpu_pack, cpu_vector  # here Numba is loaded, at the first packed call

        layer, geometry = plan.layer, plan.geometry
        image_words = prod(geometry.padded) * layer.P * layer.N
        images = plan.threads if plan.words_by_thread else plan.images
        self.words = None if plan.in_place else layout.aligned_zeros((images, image_words), np.uint64)
        self.scratch = layout.aligned_zeros((plan.threads, SCRATCH_BYTES), np.uint8)
        self.entry = cpu_vector.run_kernel().address
        kernel = cpu_vector.block_kernel(layer.N, cpu_vector.TILE_PIXELS[layer.N], int(layer.groups > 1))
        self.job = job = Job(
            input_kind=plan.kind,
            images=plan.images,
            channels=layer.channels,
            pixels=prod(geometry.size),
            bases=layer.N,
            channel_words=layer.P,
            thresholds=_address(layer.thresholds),
            flips=_address(layer.flips),
            chunks=_address(plan.chunks),
            chunk_count=0 if plan.in_place else len(plan.chunks),
            landing=_address(plan.landing),
            words=0 if plan.in_place else _address(self.words),
            words_stride=image_words * 8,
            words_by_thread=plan.words_by_thread,
            chunk_kernel=cpu_pack.chunk_kernel(layer.N).address,
            block_kernel=kernel.address,
            weights=_address(layer.weights),
            masks=0 if layer.masks is None else _address(layer.masks),
            block_words=_address(layer.block_words),
            tap_offsets=_address(plan.tap_offsets),
            tap_count=len(plan.tap_offsets),
            start=-(layer.channels // layer.groups * len(geometry.taps) // 2),
            weight_bases=layer.M,
            scales=_address(layer.scales),
            constants=_address(plan.constants),
            pixel_offsets=_address(plan.pixel_offsets),
            pixel_classes=_address(plan.pixel_classes),
            blocks=layer.blocks,
            output_pixels=prod(geometry.output),
            output_kind=WORDS if layer.out_bases else INTERLEAVED if plan.linear else PLANAR,
            output_channels=layer.O,
            output_words=layout.words_of(layer.O),
            output_bases=layer.out_bases,
            scratch=_address(self.scratch),
            threads=plan.threads,
        )
        if layer.out_bases:
            job.output_thresholds, job.output_flips = _address(layer.out_thresholds), _address(layer.out_flips)
        if plan.threads > 1:
            pool = cpu_system.pool()
            job.thread_number, job.thread_count, job.barrier = pool.thread_number, pool.thread_count, pool.barrier
        job.address = ctypes.addressof(job)


def _address(array) -> int:
    return array.ctypes.data


# --------------------------------------------------------------------------- max-pooling


def packed_max_pool(words, flips, channels, kernel_size, stride, padding, dilation, ceil_mode):
    """abcnets::packed_max_pool, as abcnets.py documents it."""
    size = words.shape[1:-2]
    output_size, sources = _pool_sources(
        tuple(size), tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
    )
    if sources is None or words.numel() == 0:
        return abcnets._packed_max_pool_reference(
            words, flips, channels, kernel_size, stride, padding, dilation, ceil_mode
        )
    from . import cpu_pool

    words = words.contiguous()
    B, P, N = words.shape[0], *words.shape[-2:]
    output = torch.empty((B, *output_size, P, N), dtype=torch.int64)
    flip_words = layout.flip_words(flips.numpy())
    job = PoolJob(
        input=words.data_ptr(),
        output=output.data_ptr(),
        images=B,
        input_pixels=prod(size),
        output_pixels=prod(output_size),
        channel_words=P,
        bases=N,
        flips=_address(flip_words),
        sources=_address(sources),
        taps=sources.shape[1],
        threads=cpu_system.thread_count(),
    )
    if job.threads > 1:
        pool = cpu_system.pool()
        job.thread_number, job.thread_count = pool.thread_number, pool.thread_count
    cpu_system.run(cpu_pool.pool_kernel().address, ctypes.addressof(job), job.threads)
    return output


_pool_sources = functools.lru_cache(maxsize=64)(layout.pool_sources)
