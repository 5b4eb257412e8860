"""abcnets::packed_chain on the CPU: layers and pools that read one another's bits, in one native call.

Small float layers are steps too (floats.py): a convolution, and perhaps its max-pool, in front of them, and behind them
a linear layer. The convolution may be one in eight bits (eight_bits.py).

    Chain       what depends on the constants alone: a Layer (engine.py) of some kind for each convolution
    ChainPlan   what also depends on the input's size: a Plan for each convolution, the windows of each pool
    Places      what one running call owns: all buffers between the steps, and the records that describe these

A layer compares its sums with the next layer's thresholds and stores the bits in the padded image that this one reads,
in the form in which it reads them. Behind a pool they need to be copied where that form is not the bases themselves;
in front of a layer that looks up (layout.LookUp), whose image holds nibbles, they always are.
"""

import ctypes
from math import prod

import numpy as np
import torch

from .. import layout
from ..cache import Beside, Recent
from . import engine, system
from .engine import EightBitLayer, FloatLayer, Layer, Plan, _address, describe, describe_pool
from .job import CONVOLUTION, INTERLEAVED, LANDED, PLANAR, POOL, SCRATCH_BYTES, WORDS, ChainJob

CHAINS = 4  # of one tensor of constants: it makes one, in one process
FLOATS, POOLED_FLOATS = 0, -1  # in the place of a number of bases: as a layer puts them out, and as a pool does
NOTHING = 0, -2  # can be read
AS_BASES = layout.BASES, 1  # the form of an image: what it holds, and how often a word does


def packed_chain(x, constants, program, other=None):
    """abcnets::packed_chain, as abcnets.py documents it."""
    chain = _chains.get((constants,), program)
    readable, kind = chain.readable(x)
    if kind is not None:
        threads = system.thread_count()
        key = (x.shape, kind, threads)
        plan = chain.plans.get(key, ChainPlan, chain, x.shape, kind, threads)
        output, saw_nan = plan.run(chain, readable, other) if plan.takes(chain, other) else (None, True)
        if not saw_nan:
            return output
    # what is not computed here, or must be complained about
    return engine.plain.packed_chain(x, constants, program, other)


class Pool:
    """A max-pooling: of words, or (without flips) of floats, perhaps behind a ReLU."""

    is_last = False

    def __init__(self, channels, sizes, flips=None, bases=0, binary=False, relu=False):
        self.channels, self.bases, self.binary, self.relu = channels, bases, binary, relu
        self.sizes = tuple(tuple(size) if isinstance(size, list) else size for size in sizes)
        self.flips = None if flips is None else layout.flip_words(flips.numpy())


class Chain:
    """The steps, and the tables that depend on their constants alone."""

    def __init__(self, tensors, program):
        self.steps, self.geometries, self.plans = [], [], Recent(engine.PLANS_PER_LAYER)
        self.adds = self.relu = False  # whether another tensor is added at the end, and a ReLU behind
        (constants,) = tensors
        makers = {"packed_conv": self._layer, "packed_max_pool": self._pool_of_bits, "convolution": self._convolution,
                  "eight_bit_convolution": self._eight_bit_convolution, "max_pool": self._pool_of_floats,
                  "linear": self._linear}  # fmt: skip
        for name, arguments in engine.plain._chain_steps(program):
            before = self.steps[-1] if self.steps else None
            if name == "sum" and type(before) is Layer and before.kernel and not self.adds:
                (self.relu,), self.adds = arguments, True
                continue
            if self.adds or name not in makers:
                raise ValueError(f"packed_chain: step {len(self.steps)}, {name}, is not known there")
            step, reads, *geometry = makers[name](before, *engine.plain._chain_arguments(arguments, constants))
            fits = isinstance(step, Layer) if before is None else reads == _behind(before)
            if not fits:
                raise ValueError(f"packed_chain: step {len(self.steps)}, {name}, does not fit the one before it")
            self.steps.append(step)
            self.geometries.append(tuple(map(tuple, geometry)))
        self.runs = all(not isinstance(step, Layer) or step.runs for step in self.steps)

    # A step, what it reads (`_behind`), and of a layer stride, padding, dilation.

    def _layer(self, before, *arguments):
        *tensors, channels, stride, padding, dilation, groups, out_thresholds, out_flips, out_bases = arguments
        step = Layer((*tensors, out_thresholds, out_flips), channels, groups, out_bases)
        if isinstance(before, FloatLayer) and not before.is_last:
            before.hand_on_to(step)
        packs = isinstance(before, Pool) and not before.bases
        return step, (channels, POOLED_FLOATS if packs else step.N), stride, padding, dilation

    def _convolution(self, before, weight, bias, stride, padding, dilation):
        return FloatLayer(weight, bias), NOTHING, stride, padding, dilation

    def _eight_bit_convolution(self, before, weight, scales, bias, stride, padding, dilation):
        return EightBitLayer(weight, scales, bias), NOTHING, stride, padding, dilation

    def _linear(self, before, weight, bias, relu, flatten):
        step = FloatLayer(weight, bias, is_last=True, relu=relu)
        if flatten and _behind(before)[1] in (FLOATS, POOLED_FLOATS):
            return step, _behind(before), (), (), ()  # how many numbers these are together, the plan finds out
        return step, (step.channels, FLOATS), (), (), ()

    def _pool_of_bits(self, before, flips, channels, *sizes):
        *sizes, binary = sizes
        bases = _behind(before)[1]
        return Pool(channels, sizes, flips, bases, binary), (channels, bases) if bases > 0 else NOTHING

    def _pool_of_floats(self, before, channels, relu, *sizes):
        return Pool(channels, sizes, relu=relu), (channels, FLOATS)

    def readable(self, x) -> tuple:
        first, last = self.steps[0], self.steps[-1]
        if not self.runs or x.dtype is not torch.float32 or _behind(last)[1] > 0:
            return x, None
        return first.readable(x)


def _behind(step) -> tuple:
    """Of what a step puts out: how many channels, and how many bases of them, or in which way they are floats."""
    if step is None or step.is_last:
        return NOTHING
    if isinstance(step, Layer):
        return step.O, step.out_bases or FLOATS
    return step.channels, step.bases or POOLED_FLOATS


_chains = Beside(Chain, CHAINS)


class ChainPlan:
    """A chain at one input size."""

    def __init__(self, chain, shape, kind, threads):
        self.threads, self.waiting = threads, []
        self.plans, B = [], shape[0]  # a Plan of each layer, (input size, output size, sources) of each pool
        for step, geometry in zip(chain.steps, chain.geometries):
            if isinstance(step, Layer):
                if step.is_last and prod(shape[1:]) != step.channels:
                    self.runs = False  # torch says what is wrong
                    return
                is_flat = step.is_last and len(shape) > 2
                if is_flat:  # its image is one pixel
                    shape, geometry, kind = (B, step.channels, 1), ((1,), (0, 0), (1,)), PLANAR
                self.plans.append(Plan(step, shape, kind, threads, *geometry))
                shape, kind = self.plans[-1].output_shape, WORDS if step.out_bases else INTERLEAVED
                shape = shape[:2] if is_flat else shape
            else:
                input_size = shape[1:-2] if step.bases else shape[2:]
                size, sources = engine.pool_sources(input_size, *step.sizes)
                self.plans.append((input_size, size, sources))
                kind = WORDS if step.bases else PLANAR
                shape = (B, *size, *shape[-2:]) if step.bases else (B, step.channels, *size)
        self.output_shape = shape
        self.runs = all(isinstance(plan, Plan) or plan[2] is not None for plan in self.plans)
        self.images = self.plans[0].images
        self.by_thread = threads == 1 or self.images >= 4 * threads

    def takes(self, chain, other) -> bool:
        """Whether all is computed here, also what is added."""
        if other is None or not chain.adds:
            return self.runs and other is None and not chain.adds
        return self.runs and other.dtype is torch.float32 and other.shape == self.output_shape

    def run(self, chain, x, other) -> tuple:
        """(output, whether a NaN was seen)."""
        try:
            places = self.waiting.pop()
        except IndexError:
            places = Places(chain, self)
        output = system.in_large_pages(torch.empty(self.output_shape, dtype=torch.float32, device="cpu"))
        self.plans[0].point(places.jobs[0], x)
        places.jobs[-1].output, places.job.saw_nan = output.data_ptr(), 0
        if other is not None:
            other = other.contiguous()
            places.jobs[-1].other = other.data_ptr()
        system.run(places.entry, places.address, self.threads)
        saw_nan = places.job.saw_nan
        self.waiting.append(places)
        return output, saw_nan


class Places:
    """What one running call owns: the buffers between the steps, and the record of each step."""

    def __init__(self, chain, plan):
        from . import steps

        self.plan, self.kept, self.jobs = plan, [], []
        sums_bytes = max(each.sums_bytes for each in plan.plans if isinstance(each, Plan))
        self.scratch = layout.aligned_zeros((plan.threads, SCRATCH_BYTES + sums_bytes), np.uint8)
        last = len(chain.steps) - 1
        form = AS_BASES  # of the image that a step writes
        into = {"output_stride": 4 * prod(plan.output_shape[1:])}
        for i in reversed(range(last + 1)):  # the place that a step writes to is the place that the next one reads
            step, its_plan = chain.steps[i], plan.plans[i]
            behind_pool = i > 0 and isinstance(chain.steps[i - 1], Pool)
            if isinstance(step, Layer):
                is_pooled = i < last and isinstance(chain.steps[i + 1], Pool)
                writes = WORDS if step.out_bases else INTERLEAVED if is_pooled or its_plan.linear else PLANAR
                sums = (chain.adds, chain.relu) if i == last else ()
                into["store_kernel"] = engine.store_kernel(writes, step.out_bases, step.out_T, *form, *sums)
                job, into, form = self._layer(step, its_plan, into, i == 0, behind_pool)
            else:
                job, into = self._pool(step, its_plan, into)
            self.jobs.insert(0, job)
        kinds = [CONVOLUTION if isinstance(step, Layer) else POOL for step in chain.steps]
        self.tables = np.array([kinds, [job.address for job in self.jobs]], np.int64)
        self.job = ChainJob(
            steps=len(kinds),
            kinds=_address(self.tables[0]),
            jobs=_address(self.tables[1]),
            images=plan.images,
            by_thread=plan.by_thread,
            scratch=_address(self.scratch),
            scratch_stride=self.scratch.strides[0],
            threads=plan.threads,
        )
        if plan.threads > 1:
            pool = system.pool()
            self.job.thread_number, self.job.thread_count = pool.thread_number, pool.thread_count
            self.job.barrier = pool.barrier
        self.address, self.entry = ctypes.addressof(self.job), steps.chain_kernel().address

    def _buffer(self, image_bytes, blank=0) -> np.ndarray:
        """[thread or image][at least so many bytes], all `blank`; a whole register may be read at its end."""
        images = self.plan.threads if self.plan.by_thread else self.plan.images
        self.kept.append(layout.aligned_zeros((images, image_bytes // 64 * 64 + 128), np.uint8))
        if blank:
            self.kept[-1].fill(blank)
        return self.kept[-1]

    def _into(self, buffer, landing=None, pixel_bytes=0) -> dict:
        """Where in its buffer a step writes."""
        into = {"output": _address(buffer), "output_stride": buffer.strides[0], "output_by_thread": self.plan.by_thread}
        if landing is not None:
            self.kept.append(landing)
            into |= {"output_landing": _address(landing), "output_pixel_bytes": pixel_bytes}
        return into

    def _layer(self, layer, plan, into, is_first, behind_pool) -> tuple:
        """(record, where the step before writes, in which form)."""
        words = self._buffer(plan.image_bytes, layer.blank)
        form = layer.lanes.image(layer.uniform), layer.lanes.repeats
        is_copied = isinstance(layer.lanes, layout.LookUp) or (behind_pool and form != AS_BASES)
        pixel_bytes = 8 * layer.P * layer.N
        if is_first:
            source, places = None, {"input_kind": plan.kind, "chunk_count": len(plan.chunks)}
        elif plan.kind != WORDS:  # the step before writes floats
            pixels = prod(plan.geometry.size)
            source = self._buffer(4 * layer.channels * pixels)
            places = {"input_kind": plan.kind, "chunk_count": len(plan.chunks), "input": _address(source),
                      "image_stride": source.strides[0], "input_by_thread": self.plan.by_thread,
                      "channel_stride": 4 * pixels, "pixel_stride": 4}  # fmt: skip
            if plan.linear:
                places |= {"channel_stride": 4, "pixel_stride": 4 * layer.channels}
            before = self._into(source)
        elif is_copied:  # the step before writes the bases
            source, form = self._buffer(prod(plan.geometry.size) * pixel_bytes), AS_BASES
            places = {"input_kind": WORDS, "chunk_count": len(plan.chunks), "input": _address(source),
                      "image_stride": source.strides[0], "input_by_thread": self.plan.by_thread}  # fmt: skip
            before = self._into(source, np.arange(prod(plan.geometry.size)), pixel_bytes)
        else:
            places = {"input_kind": LANDED, "chunk_count": len(plan.chunks) if plan.sums_bytes else 0}
            before = self._into(words, plan.geometry.input_pixels, plan.pixel_bytes)
        job = describe(
            layer, plan, self.plan.images, self.scratch, words=_address(words), words_stride=words.strides[0],
            words_by_thread=self.plan.by_thread, **places, **into,
        )  # fmt: skip
        return job, None if is_first else before, form

    def _pool(self, pool, plan, into) -> tuple:
        """(record, where the step before writes)."""
        input_size, _, sources = plan
        pixels, P = prod(input_size), layout.words_of(pool.channels)
        pixel_bytes = 8 * P * pool.bases or 4 * pool.channels
        source = self._buffer(pixels * pixel_bytes)
        before = self._into(source, np.arange(pixels), pixel_bytes)
        words = {"channel_words": P, "flips": _address(pool.flips)} if pool.bases else {}
        job = describe_pool(
            self.plan.images, sources, self.plan.threads, engine.pool_kernel(pool.bases, pool.binary, pool.relu),
            input=_address(source), input_stride=source.strides[0], input_by_thread=self.plan.by_thread,
            channels=pool.channels, **words, **into,
        )  # fmt: skip
        return job, before
