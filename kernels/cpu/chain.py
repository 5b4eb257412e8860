"""abcnets::packed_chain on the CPU: layers and pools that read one another's bits, in one native call.

Small float layers are steps too (floats.py): a convolution, and perhaps its max-pool, in front of them, and behind them
a linear layer. The convolution may be one in eight bits (eight_bits.py). In a residual network averages are steps
(pool.py); sums with other values, and ReLUs, are a part of a layer's storing (store.py).

    Chain       what depends on the constants alone: a Layer (engine.py) of some kind for each convolution. Its Segments
                lead from a value to the next one
    ChainPlan   what also depends on the input's size: a SegmentPlan each, with a Plan for each convolution and the
                windows of each pool
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
from .job import CONVOLUTION, INTERLEAVED, LANDED, PLANAR, POOL, SCRATCH_BYTES, WORDS, ChainJob, PoolJob

CHAINS = 4  # of one tensor of constants: it makes one, in one process
X, OTHER = 0, 1  # the values that a call is given
FLOATS, POOLED_FLOATS = 0, -1  # in the place of a number of bases: as a layer puts them out, and as a pool does
NOTHING = 0, -2  # can be read
AS_BASES = layout.BASES, 1  # the form of an image: what it holds, and how often a word does


def packed_chain(x, constants, program, other=None):
    """abcnets::packed_chain, as abcnets.py documents it."""
    chain = _chains.get((constants,), program)
    readable, kind = chain.readable(x, other)
    if kind is not None:
        threads = system.thread_count()
        added = None if other is None else other.shape
        key = (x.shape, kind, threads, added)
        plan = chain.plans.get(key, ChainPlan, chain, x.shape, kind, threads, added)
        output, saw_nan = plan.run(chain, readable, other) if plan.runs else (None, True)
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


class Average:
    """Means over windows (kernel None: whole images) of relu(scale x + shift), and channels of zeros behind."""

    is_last, bases, channels = False, 0, None

    def __init__(self, extra, kernel, scale, shift, relu):
        self.extra, self.kernel, self.relu = extra, kernel and tuple(kernel), relu
        self.scales = None if scale is None else np.stack([scale.numpy(), shift.numpy()]).astype(np.float32)


class Chain:
    """The segments of a program, and the tables that depend on its constants alone."""

    def __init__(self, tensors, program):
        (constants,) = tensors
        self.segments, self.plans = [Segment(0, 1)], Recent(engine.PLANS_PER_LAYER)
        for name, arguments in engine.plain._chain_steps(program):
            if name == "read":
                self.segments.append(Segment(*arguments, 1 + len(self.segments)))
            elif name in ("sum", "relu"):
                self.segments[-1].finish(name, *arguments)
            else:
                self.segments[-1].append(name, engine.plain._chain_arguments(arguments, constants))
        if not all(segment.steps for segment in self.segments):
            raise ValueError("packed_chain: a value comes from no step")
        if not isinstance(self.segments[0].steps[0], Layer):
            raise ValueError("packed_chain: the first step is no convolution")
        self.runs = all(segment.runs and _behind(segment.steps[-1])[1] <= 0 for segment in self.segments)
        reads = [segment.reads for segment in self.segments] + [segment.adds for segment in self.segments]
        self.reads_again, self.reads_other = reads.count(X) > 1, OTHER in reads

    def readable(self, x, other) -> tuple:
        """(x as the first step can read it, the order of its pixels and channels); order None: that is not computed."""
        if not self.runs or x.dtype is not torch.float32 or self.reads_other is (other is None):
            return x, None
        if other is not None and other.dtype is not torch.float32:
            return x, None
        return self.segments[0].steps[0].readable(x.contiguous() if self.reads_again else x)


class Segment:
    """Steps that only read one another, from one value to the next: values are x, `other`, what a segment puts out.

    Attributes:
        reads: which value;  adds: which one is added at the end, or None;  relu: whether a ReLU is behind.
    """

    def __init__(self, reads, last_value):
        self.reads, self.adds, self.relu = reads, None, False
        self.steps, self.geometries, self.runs, self.is_finished = [], [], True, False
        self.last_value = last_value  # that there is
        self._check(reads)

    def _check(self, value) -> None:
        if type(value) is not int or not 0 <= value <= self.last_value:
            raise ValueError(f"packed_chain: a segment can't read value {value}")

    def finish(self, name, adds=None, relu=True, in_place=False) -> None:
        """What is done to the last step's sums; in place or not, as shapes are equal and all numbers float32."""
        if adds is not None:
            self._check(adds)
        last = self.steps[-1] if self.steps else None
        if not isinstance(last, Layer) or last.is_last or not last.kernel or self.is_finished:
            raise ValueError(f"packed_chain: step {len(self.steps)}, {name}, does not fit the one before it")
        self.relu, self.adds, self.is_finished = relu, adds, True

    def append(self, name, arguments) -> None:
        makers = {"packed_conv": self._layer, "packed_max_pool": self._pool_of_bits, "convolution": self._convolution,
                  "eight_bit_convolution": self._eight_bit_convolution, "max_pool": self._pool_of_floats,
                  "average": self._average, "linear": self._linear}  # fmt: skip
        before = self.steps[-1] if self.steps else None
        fits = name in makers and not self.is_finished
        if fits:
            step, reads, *geometry = makers[name](before, *arguments)
            fits = isinstance(step, (Layer, Average)) if before is None else reads == _behind(before)
        if not fits:
            raise ValueError(f"packed_chain: step {len(self.steps)}, {name}, does not fit the one before it")
        self.steps.append(step)
        self.geometries.append(tuple(map(tuple, geometry)))
        self.runs &= not isinstance(step, Layer) or step.runs

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

    def _average(self, before, *arguments):
        return Average(*arguments), (NOTHING if before is None else None)

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

    def __init__(self, chain, shape, kind, threads, added):
        self.threads, self.waiting, self.runs = threads, [], True
        self.plans, values = [], [shape, added]  # of each segment; the shapes of values
        uses = [use for segment in chain.segments for use in (segment.reads, segment.adds)].count(OTHER)
        for segment in chain.segments:
            self.runs = values[segment.reads][:1] == shape[:1]
            if self.runs:
                plan = SegmentPlan(segment, values[segment.reads], kind if segment.reads == X else PLANAR, threads)
                self.runs = plan.runs and (len(chain.segments) == 1 or not plan.is_linear)
            if self.runs and segment.adds == OTHER and uses == 1 and _widens(values[OTHER], plan.output_shape):
                values[OTHER] = plan.output_shape
            self.runs = self.runs and (segment.adds is None or values[segment.adds] == plan.output_shape)
            if not self.runs:  # torch says what is wrong
                return
            self.plans.append(plan)
            values.append(plan.output_shape)
        self.values = values
        self.images = self.plans[0].plans[0].images
        self.by_thread = threads == 1 or self.images >= 4 * threads

    def run(self, chain, x, other) -> tuple:
        """(output, whether a NaN was seen)."""
        try:
            places = self.waiting.pop()
        except IndexError:
            places = Places(chain, self)
        output = system.in_large_pages(torch.empty(self.values[-1], dtype=torch.float32, device="cpu"))
        other = None if other is None else other.expand(self.values[OTHER]).contiguous()  # lives until all is done
        places.point(x, other)
        places.jobs[-1].output, places.job.saw_nan = output.data_ptr(), 0
        system.run(places.entry, places.address, self.threads)
        saw_nan = places.job.saw_nan
        self.waiting.append(places)
        return output, saw_nan


def _widens(shape, wanted) -> bool:
    """Whether a tensor of that shape is broadcast to the wanted one."""
    try:
        return torch.broadcast_shapes(shape, wanted) == wanted
    except RuntimeError:
        return False


class SegmentPlan:
    """A segment at one input size: a Plan of each layer, (input size, output size, sources) of each pool."""

    def __init__(self, segment, shape, kind, threads):
        self.input_shape, self.plans, self.runs, B = shape, [], True, shape[0]
        for step, geometry in zip(segment.steps, segment.geometries):
            if isinstance(step, Layer):
                is_flat = step.is_last and len(shape) > 2
                if kind != WORDS:
                    found, wanted = (len(shape) - 2, shape[1]), (len(step.kernel), step.channels)
                    self.runs = prod(shape[1:]) == step.channels if step.is_last else found == wanted
                if not self.runs:
                    return
                if is_flat:  # its image is one pixel
                    shape, geometry, kind = (B, step.channels, 1), ((1,), (0, 0), (1,)), PLANAR
                self.plans.append(Plan(step, shape, kind, threads, *geometry))
                shape, kind = self.plans[-1].output_shape, WORDS if step.out_bases else INTERLEAVED
                shape = shape[:2] if is_flat else shape
            elif isinstance(step, Average):
                kernel = step.kernel or tuple(shape[2:])
                self.runs = len(shape) == 4 and (step.scales is None or step.scales.shape[1] == shape[1])
                if not self.runs:
                    return
                size, sources = engine.pool_sources(shape[2:], kernel, kernel, (0, 0), (1, 1), False)
                self.plans.append((shape[2:], size, sources))
                shape, kind = (B, shape[1] + step.extra, *size), PLANAR
            else:
                input_size = shape[1:-2] if step.bases else shape[2:]
                size, sources = engine.pool_sources(input_size, *step.sizes)
                self.plans.append((input_size, size, sources))
                kind = WORDS if step.bases else PLANAR
                shape = (B, *size, *shape[-2:]) if step.bases else (B, step.channels, *size)
        self.output_shape = shape
        self.is_linear = any(isinstance(plan, Plan) and plan.linear for plan in self.plans)
        self.runs = all(isinstance(plan, Plan) or plan[2] is not None for plan in self.plans)


class Places:
    """What one running call owns: the buffers between the steps, and the record of each step."""

    def __init__(self, chain, plan):
        from . import steps

        self.plan, self.kept, self.jobs = plan, [], []
        sums_bytes = max(each.sums_bytes for part in plan.plans for each in part.plans if isinstance(each, Plan))
        self.scratch = layout.aligned_zeros((plan.threads, SCRATCH_BYTES + sums_bytes), np.uint8)
        self.readers, self.adders = [], []  # (which, record, plan) that read, (which, record) that add x or `other`
        values = [None, None]  # where those lie that are made here
        for segment, part in zip(chain.segments, plan.plans):
            is_last = segment is chain.segments[-1]
            values.append(None if is_last else self._buffer(4 * prod(part.output_shape[1:])))
            self._segment(segment, part, values)
        kinds = [CONVOLUTION if isinstance(step, Layer) else POOL for part in chain.segments for step in part.steps]
        self.tables = np.array([kinds, [job.address for job in self.jobs]], np.int64)
        self.job = ChainJob(
            steps=len(kinds),
            kinds=_address(self.tables[0]),
            jobs=_address(self.tables[1]),
            images=plan.images,
            by_thread=plan.by_thread,
            scratch=_address(self.scratch),
            scratch_stride=self.scratch.strides[0],
        )
        self.address, self.entry = ctypes.addressof(self.job), steps.chain_kernel().address

    def point(self, x, other) -> None:
        """Let the records read these."""
        given = x, other
        for which, job, plan in self.readers:
            if isinstance(plan, Plan):
                plan.point(job, given[which])
            else:
                job.input, job.input_stride = given[which].data_ptr(), 4 * given[which].stride(0)
        for which, job in self.adders:
            job.other, job.other_stride = given[which].data_ptr(), 4 * given[which].stride(0)

    def _segment(self, segment, part, values) -> None:
        """Records for the steps between two values."""
        last, jobs = len(segment.steps) - 1, []
        form = AS_BASES  # of the image that a step writes
        if values[-1] is None:
            into = {"output_stride": 4 * prod(part.output_shape[1:])}
        else:
            into = self._into(values[-1])
        for i in reversed(range(last + 1)):  # the place that a step writes to is the place that the next one reads
            step, its_plan = segment.steps[i], part.plans[i]
            behind_pool = i > 0 and isinstance(segment.steps[i - 1], Pool)
            if isinstance(step, Layer):
                is_pooled = i < last and isinstance(segment.steps[i + 1], Pool)
                writes = WORDS if step.out_bases else INTERLEAVED if is_pooled or its_plan.linear else PLANAR
                sums = (segment.adds is not None, segment.relu) if i == last else ()  # what `finish` asked for
                into["store_kernel"] = engine.store_kernel(
                    writes, step.out_bases, step.out_T, step.out_searched, *form, *sums
                )
                job, into, form = self._layer(step, its_plan, into, i == 0, behind_pool)
            elif isinstance(step, Average):
                job = self._average(step, its_plan, part.input_shape[1], into)
            else:
                job, into = self._pool(step, its_plan, into)
            jobs.insert(0, job)
        self._connect(segment, part, values, jobs)
        self.jobs += jobs

    def _connect(self, segment, part, values, jobs) -> None:
        """Let the first record read, and the last one add, the segment's values."""
        source, added = values[segment.reads], None if segment.adds is None else values[segment.adds]
        if source is None:
            self.readers.append((segment.reads, jobs[0], part.plans[0]))
        else:
            jobs[0].input, jobs[0].input_by_thread = _address(source), self.plan.by_thread
            if isinstance(jobs[0], PoolJob):
                jobs[0].input_stride = source.strides[0]
            else:
                jobs[0].image_stride = source.strides[0]
                jobs[0].channel_stride, jobs[0].pixel_stride = 4 * prod(part.input_shape[2:]), 4
        if added is not None:
            jobs[-1].other, jobs[-1].other_stride = _address(added), added.strides[0]
            jobs[-1].other_by_thread = self.plan.by_thread
        elif segment.adds is not None:
            self.adders.append((segment.adds, jobs[-1]))

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
            self.plan.images, sources, engine.pool_kernel(pool.bases, pool.binary, pool.relu),
            input=_address(source), input_stride=source.strides[0], input_by_thread=self.plan.by_thread,
            channels=pool.channels, **words, **into,
        )  # fmt: skip
        return job, before

    def _average(self, average, plan, channels, into):
        input_size, _, sources = plan
        kernel = engine.average_kernel(average.scales is not None, average.relu)
        scales = 0 if average.scales is None else _address(average.scales)
        return describe_pool(
            self.plan.images, sources, kernel, channels=channels, extra=average.extra,
            input_pixels=prod(input_size), scales=scales, **into,
        )  # fmt: skip
