"""The CUDA ladder on whatever GPU is here: what `python -m kernels.bench --device cuda` runs, in less than 8 minutes.

    1. correctness    every rung and the operators against the reference in float64; a rung that is wrong is not timed
    2. ceilings       bandwidth, float and int8 products, popcount, BMMA, BGMMA              rates.py
    3. the ladder     every rung on one layer, 3 x 3, 128 -> 128, 32 x 28 x 28
    4. ResNet-18      its layers at batch 256, 32, 1; M = N = 1, 2, 3, 5; against cuDNN and int8
    5. the original   3 x 3, 128 -> 128, batch 32, widths 3 to 50
    6. tiles          each tile of rungs 6 and 7 on three layers, for tuning

What fails or does not fit into the time becomes a row that says so, and the rest goes on. cuDNN searches its best
algorithm (benchmark mode) and gets the better of both memory orders. int8: torch has no int8 convolution on CUDA; what
is timed is `torch._int_mm` on the matrix product of the same size, which spares it the im2col.

`share_of_bound` is the share of the measured time that is left if only the measured ceilings bound it: products over
the rate of the unit that does them, or bytes (inputs and weights read once, the result written once) over bandwidth.
"""

import functools
import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn import functional

import abcnets

from .. import check, registry
from ..check import BASES, FIRST_AUTHOR, GPU, RESNET_18, RUNG_SHAPE, Shape
from ..clock import SIMULATED, input_sets, microseconds
from . import (
    engine,
    rates,
    rung1_pack,
    rung2_float,
    rung3_popcount,
    rung4_shared,
    rung5_bases,
    rung6_tensorcore,
    rung7_wgmma,
    rung8_fused,
)
from .launch import shared_memory_limit


def wgmma_fused(layer, words, poison, thresholds, flips):
    return rung7_wgmma.conv(layer, words, poison, None, rung8_fused.bits_output, thresholds, flips)


RUNGS = {
    "popcount": rung3_popcount.conv,
    "shared": rung4_shared.conv,
    "bases": rung5_bases.conv,
    "mma": rung6_tensorcore.conv,
    "wgmma": rung7_wgmma.conv,
}
FUSED = {"fused": rung8_fused.conv, "wgmma fused": wgmma_fused}
TILED = {"mma": rung6_tensorcore, "wgmma": rung7_wgmma}
UNITS = {  # which ceiling bounds a contender, where it is not BMMA
    "float": "float32", "cudnn float32": "float32", "cudnn tf32": "tf32", "cudnn fp16": "fp16", "int8 product": "int8",
    "popcount": "popcount", "shared": "popcount", "bases": "popcount", "wgmma": "bgmma", "wgmma fused": "bgmma",
}  # fmt: skip

LADDER = replace(RUNG_SHAPE, B=32)
BATCHES = (256, 32, 1)
ORIGINAL = [replace(FIRST_AUTHOR[0], size=width, padding=1) for width in (3, 8, 16, 24, 32, 40, 50)]
TUNED = [Shape(128, 128, 3, 28, 1, B=256), Shape(512, 512, 3, 7, 1, B=256), Shape(256, 256, 3, 14, 1)]
COLUMNS = (
    "section", "C", "O", "K", "size", "padding", "stride", "B", "contender", "bases", "microseconds",
    "microseconds_p10", "microseconds_p90", "operations_per_second", "share_of_bound", "bytes", "note",
)  # fmt: skip


# --------------------------------------------------------------------------- correctness

# A kernel that faults takes the process's CUDA context with it, and all that would come after: what is written in PTX
# runs in a process of its own first, before what depends on it.
OWN_PROCESS = {
    "rung6_tensorcore": ("mma", "fused", "operator", "CUDA graph", "bmma"),
    "rung7_wgmma": ("wgmma", "wgmma fused", "bgmma"),
}


def crash(module: str) -> str | None:
    """How a kernel file's main ends on this GPU, if it doesn't come to its end."""
    package = Path(__file__).parents[1]
    command = [sys.executable, "-m", f"{package.name}.cuda.{module}"]
    try:
        done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "hangs, in a process of its own"
    if done.returncode not in (0, check.WRONG):
        return f"crashes, in a process of its own: {[done.returncode, *done.stderr.strip().splitlines()][-1]}"


def problems(crashes: dict, say=print) -> dict:
    """{rung or operator: None, or what is wrong with it on this machine}."""
    registry.implement("cuda", engine, abcnets)
    torch.full((1 << (10 if SIMULATED else 26),), math.nan, device=GPU)  # what memory nobody writes then holds
    operators = {name: check.as_operator(conv) for name, conv in (RUNGS | FUSED).items()}
    tests = {
        "pack": lambda: check.problem_in_pack(rung1_pack.pack),
        "float": lambda: check.problem_in_float_conv(rung2_float.conv),
        **{name: functools.partial(check.problem_in_floats, operators[name], GPU) for name in RUNGS},
        **{name: functools.partial(check.problem_in_bits, operators[name], GPU, codes=(False,)) for name in FUSED},
        "operator": lambda: check.problem_in_other_dimensions(engine.packed_conv, GPU),
        "max pool": lambda: check.problem_in_pool(engine.packed_max_pool, GPU),
    }
    if not SIMULATED:
        tests["CUDA graph"] = lambda: check.problem_in_graph(engine.packed_conv)
    found = {}
    for name, test in tests.items():
        try:
            found[name] = crashes.get(name) or test()
        except Exception as error:
            found[name] = check.sentence(error)
        say(f"  {name}: {found[name] or 'right'}")
    return found


# --------------------------------------------------------------------------- times


def row_of(shape, contender: str, bases, microseconds: float, operations=None) -> dict:
    """What a row says of a contender; `bases` is "" for what is not made of bits."""
    operations = shape.macs * (bases or 1) ** 2 if operations is None else operations
    return asdict(shape) | {
        "contender": contender,
        "bases": bases,
        "microseconds": round(microseconds, 2),
        "operations_per_second": float(f"{operations / microseconds * 1e6:.4g}"),
    }


class Ladder:
    """Rows, a clock that runs out, and what this machine turned out to be able to do."""

    def __init__(self, limit: float, say=print):
        self.deadline = time.monotonic() + limit
        self.say = say
        self.rows, self.right, self.ceilings = [], set(), {}

    def add(self, section, contender, **row):
        self.rows.append(dict.fromkeys(COLUMNS, "") | dict(section=section, contender=contender) | row)

    def run(self):
        torch.backends.cudnn.benchmark = True
        self.say("Correctness")
        crashes = {}
        for module, names in OWN_PROCESS.items():
            if problem := crash(module):
                crashes |= dict.fromkeys(names, problem)
        found = problems(crashes, self.say)
        self.right = {name for name, problem in found.items() if problem is None}
        for name, problem in found.items():
            self.add("correctness", name, note=f"wrong: {problem}" if problem else "right")
        self.say("Ceilings")
        self.ceilings = rates.ceilings(self.say, skip=crashes)
        for name, (rate, per_clock) in self.ceilings.items():
            unit = "bytes a second" if name == "bandwidth" else "multiply-adds a second"
            clock = f"; {per_clock:.0f} a clock and multiprocessor" if per_clock else ""
            self.add("ceilings", name, operations_per_second=float(f"{rate:.4g}"), note=unit + clock)
        self.say("Times")
        for section, shape, step in self.steps():
            try:
                if time.monotonic() > self.deadline:
                    raise TimeoutError("the time was used up")
                self.say(f"  {section}: {shape}")
                step()
                torch.cuda.empty_cache()
            except Exception as error:
                self.skip(section, "the rest", shape, error)

    def steps(self):
        """(section, shape, function that measures it), the most important ones first."""
        yield "ladder", LADDER, functools.partial(self.layer, "ladder", LADDER, (1, 3), tuple(RUNGS), original=True)
        shapes = [("resnet18", replace(shape, B=batch)) for batch in BATCHES for shape in RESNET_18]
        for section, shape in shapes + [("original", shape) for shape in ORIGINAL]:
            yield section, shape, functools.partial(self.layer, section, shape)
        for shape in TUNED:
            yield "tiles", shape, functools.partial(self.tiles, shape)

    def skip(self, section, contender, shape, error, bases=""):
        reason = check.sentence(error)
        self.say(f"    {contender} {bases} of {shape}: skipped, {reason}")
        self.add(section, contender, **asdict(shape), bases=bases, note=f"skipped: {reason}")

    def time(self, section, contender, shape, call, inputs, moved, bases="", note="", products=None):
        """One row; an error is a row too, without a time."""
        try:
            if call(inputs[0]) is None:
                raise ValueError("no tile fits")
            us, low, high = microseconds(call, inputs)
        except Exception as error:
            return self.skip(section, contender, shape, error, bases)
        products = shape.macs * (bases or 1) ** 2 if products is None else products
        rate, _ = self.ceilings.get(UNITS.get(contender, "bmma"), (math.inf, None))
        bandwidth, _ = self.ceilings.get("bandwidth", (math.inf, None))
        share = 1e6 * max(products / rate, moved / bandwidth) / us
        self.add(
            section, **row_of(shape, contender, bases, us, products), microseconds_p10=round(low, 2),
            microseconds_p90=round(high, 2), share_of_bound=round(share, 3), bytes=moved, note=note,
        )  # fmt: skip

    def layer(self, section, shape: Shape, bases=BASES, rungs=("mma", "wgmma"), original=False):
        """cuDNN, int8 and our rungs on one layer."""
        C, O, K = shape.C, shape.O, shape.K
        pixels, values = shape.B * shape.output**2, shape.B * C * shape.size**2
        images = input_sets(lambda i: shape.images(i, GPU), 4 * values)
        w = torch.randn(O, C, K, K, generator=torch.Generator(GPU).manual_seed(1), device=GPU)
        for unit, size in (("float32", 4), ("tf32", 4), ("fp16", 2)):
            dtype = torch.float16 if size == 2 else torch.float32
            for order in (torch.contiguous_format, torch.channels_last):
                inputs = [x.to(dtype).contiguous(memory_format=order) for x in images]
                kernel = w.to(dtype).contiguous(memory_format=order)
                torch.backends.cudnn.allow_tf32 = unit == "tf32"
                call = functools.partial(functional.conv2d, weight=kernel, stride=shape.stride, padding=shape.padding)
                moved = size * (values + w.numel() + pixels * O)
                self.time(section, f"cudnn {unit}", shape, call, inputs, moved, note=str(order).removeprefix("torch."))
        length = K * K * C
        if pixels > 16 and length % 8 == 0 and O % 8 == 0:
            matrix = torch.randint(-128, 127, (O, length), dtype=torch.int8, device=GPU).t()
            inputs = input_sets(
                lambda i: torch.randint(-128, 127, (pixels, length), dtype=torch.int8, device=GPU), pixels * length
            )
            moved = values + w.numel() + 4 * pixels * O
            call, note = (lambda a: torch._int_mm(a, matrix)), "torch._int_mm, no im2col"
            self.time(section, "int8 product", shape, call, inputs, moved, note=note)
            del inputs
        if original and "float" in self.right:
            layer = check.layer_of(shape.layer(1, 1, device=GPU))
            moved = 4 * (values + w.numel() + pixels * O)
            self.time(section, "float", shape, lambda x: rung2_float.conv(layer, x, w), images, moved)
        for count in bases:
            self.bits(section, shape, count, images, rungs)

    def bits(self, section, shape: Shape, count: int, images, rungs):
        """Our rungs on one layer with M = N = count."""
        arguments, layer, poison, outputs = check.cuda_layer(shape, count)
        pixels, values = shape.B * shape.output**2, shape.B * shape.C * shape.size**2
        words_bytes = 8 * shape.B * shape.size**2 * layer.P * count
        weights_bytes = count * shape.O * shape.K**2 * 8 * layer.P
        words = input_sets(lambda i: shape.words(count, i, GPU), words_bytes)

        def run(contender, call, inputs, moved, products=None):
            if contender in self.right:
                self.time(section, contender, shape, call, inputs, moved, count, products=products)

        thresholds, flips = arguments[4:6]
        moved = 4 * values + words_bytes
        run("pack", lambda x: rung1_pack.pack(x, thresholds, flips, count), images, moved, products=0)
        for name in rungs:
            moved = words_bytes + weights_bytes + 4 * pixels * shape.O
            run(name, lambda x, conv=RUNGS[name]: conv(layer, x, poison), words, moved)
        for name, conv in FUSED.items():
            moved = words_bytes + weights_bytes + 8 * pixels * -(-shape.O // 64) * count
            run(name, lambda x, conv=conv: conv(layer, x, poison, *outputs), words, moved)
        rest = check.without_bits_out(arguments)[1:]
        moved = 4 * values + weights_bytes + 4 * pixels * shape.O
        run("operator", lambda x: engine.packed_conv(x, *rest), images, moved)

    def tiles(self, shape: Shape):
        """Every tile of rungs 6 and 7, for choosing among them."""
        for count in (1, 3):
            _, layer, poison, _ = check.cuda_layer(shape, count)
            place, limit = layer.place(shape.size, shape.size), shared_memory_limit(layer.device)
            size = 8 * shape.B * shape.size**2 * layer.P * count
            words = input_sets(lambda i, count=count: shape.words(count, i, GPU), size)
            moved = size + count * shape.O * shape.K**2 * shape.C // 8 + 4 * shape.B * shape.output**2 * shape.O
            for name, module in TILED.items():
                for tile in module.TILES if name in self.right else ():
                    if module.shared_bytes(layer, place, shape.B, tile) <= limit:
                        call = functools.partial(module.conv, layer, poison_BHW=poison, tile=tile)
                        note = "tile {} x {}, {} x {} warps".format(*tile)
                        self.time("tiles", name, shape, call, words, moved, count, note)


def about() -> dict:
    """What to know of the card beside clock.machine()."""
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", driver.read_text() if driver.exists() else "")
    return {
        "device": torch.cuda.get_device_name(), "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": found.group(1) if found else "unknown", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
