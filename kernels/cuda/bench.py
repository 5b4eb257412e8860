"""Measure the CUDA ladder on whatever GPU is here:  python -m kernels.bench --device cuda   (or -m kernels.bench)

In this order, and in less than 8 minutes (what does not fit is said, and left out):

    1. ceilings       bandwidth, float and int8 products, popcount, BMMA, BGMMA              rates.py
    2. correctness    every rung and the operators against the reference in float64; a rung that is wrong is not timed
    3. the ladder     every rung on one layer, 3 x 3, 128 -> 128, 32 x 28 x 28
    4. ResNet-18      its layers at batch 256, 32, 1; M = N = 1, 2, 3, 5; against cuDNN and int8
    5. the original   3 x 3, 128 -> 128, batch 32, widths 3 to 50
    6. tiles          each tile of rungs 6 and 7 on two layers, for tuning

Clock. Every time is that of one CUDA graph that runs once over several sets of inputs, together larger than twice the
L2 cache (at most 64 sets), divided by their number: no launch gaps from Python, for us nor for cuDNN. Median of at
least 7 replays after a warm-up, with the 10th and 90th percentile. cuDNN searches its best algorithm (benchmark mode)
and gets the better of both memory orders. int8: torch has no int8 convolution on CUDA; what is timed is
`torch._int_mm` on the matrix product of the same size, which spares it the im2col.

Operations are 2 x multiply-adds (x M N for bits). `bound_us` is the larger of operations over the measured rate of the
unit that does them and bytes (inputs and weights read once, the result written once) over the measured bandwidth.

Writes results/cuda.csv, results/cuda.svg and the table in README.md between its markers. Without a GPU it says so and
returns 2, and changes nothing.
"""

import argparse
import functools
import math
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn import functional

from ..clock import input_sets, microseconds
from . import engine, rates, rung1_pack, rung2_float, rung6_tensorcore, rung7_wgmma, rung8_fused
from .check import DEVICE, NO_GPU, RUNGS, SEED, check, layer_of, random_layer, random_words, wgmma_fused
from .launch import shared_memory_limit
from .primitives import SIMULATED
from .report import report, table

RESNET18 = (  # C, H = W, O, K, stride
    (64, 56, 64, 3, 1), (64, 56, 128, 3, 2), (128, 28, 128, 3, 1), (128, 28, 256, 3, 2), (256, 14, 256, 3, 1),
    (256, 14, 512, 3, 2), (512, 7, 512, 3, 1), (64, 56, 128, 1, 2), (128, 28, 256, 1, 2), (256, 14, 512, 1, 2),
)  # fmt: skip
LADDER = (32, 128, 28, 28, 128, 3, 1)  # B, C, H, W, O, K, stride
TUNED = ((256, 128, 28, 28, 128, 3, 1), (256, 512, 7, 7, 512, 3, 1), (1, 256, 14, 14, 256, 3, 1))
ORIGINAL_BATCH, ORIGINAL_WIDTHS = 32, (3, 8, 16, 24, 32, 40, 50)
BASES = (1, 2, 3, 5)
BATCHES = (256, 32, 1)
UNITS = {  # which ceiling bounds a method, where it is not BMMA
    "float": "float32", "cudnn float32": "float32", "cudnn tf32": "tf32", "cudnn fp16": "fp16", "int8 product": "int8",
    "popcount": "popcount", "shared": "popcount", "bases": "popcount", "wgmma": "bgmma", "wgmma fused": "bgmma",
}  # fmt: skip


# ------------------------------------------------------------------ measuring

COLUMNS = (
    "section", "method", "B", "C", "H", "W", "O", "K", "stride", "M", "N", "us", "us_p10", "us_p90", "ops_per_s",
    "bytes", "bound_us", "note", "device", "capability", "torch", "numba_cuda", "driver", "seed", "date",
)  # fmt: skip


class Bench:
    """Rows, a clock that runs out, and what this machine turned out to be able to do."""

    def __init__(self, limit, say=print):
        self.deadline = time.monotonic() + limit
        self.say = say
        self.rows, self.skipped = [], []
        self.machine = {
            "device": "simulator" if SIMULATED else torch.cuda.get_device_name(),
            "capability": "" if SIMULATED else ".".join(map(str, torch.cuda.get_device_capability())),
            "torch": torch.__version__,
            "numba_cuda": _version("numba-cuda"),
            "driver": _driver_version(),
            "seed": SEED,
            "date": time.strftime("%Y-%m-%d"),
        }

    def add(self, **row):
        self.rows.append({**dict.fromkeys(COLUMNS, ""), **self.machine, **row})

    def out_of_time(self, what) -> bool:
        late = time.monotonic() > self.deadline
        if late and what not in self.skipped:
            self.skipped.append(what)
            self.add(section="skipped", method=what, note="skipped: the time was used up")
            self.say(f"  {what}: skipped, the time is used up")
        return late

    def time(self, section, method, shape, call, sets, ops, moved, M="", N="", note=""):
        """One row; an error is a row too, without a time."""
        B, C, H, W, O, K, stride = shape
        row = dict(section=section, method=method, B=B, C=C, H=H, W=W, O=O, K=K, stride=stride, M=M, N=N)
        try:
            us, low, high = microseconds(call, sets)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.say(f"    {method} {shape} M={M} N={N}: skipped, {reason}")
            self.add(**row, note=f"skipped: {reason}")
            return
        bound = self.bound(method, ops, moved)
        self.add(
            **row, us=f"{us:.2f}", us_p10=f"{low:.2f}", us_p90=f"{high:.2f}", ops_per_s=f"{ops / us * 1e6:.4g}",
            bytes=moved, bound_us=f"{bound:.2f}", note=note,
        )  # fmt: skip

    def bound(self, method, ops, moved) -> float:
        """Microseconds that the measured ceilings of this method's unit and of the memory allow."""
        ceiling = {name: value["rate"] for name, value in self.ceilings.items()}
        rate, bandwidth = ceiling.get(UNITS.get(method, "bmma"), math.inf), ceiling.get("bandwidth", math.inf)
        return 1e6 * max(ops / 2 / rate, moved / bandwidth)

    # -------------------------------------------------------------- one layer

    def layer(self, section, shape, bases=BASES, rungs=("mma", "wgmma"), bits=True, original=False):
        """cuDNN, int8 and our rungs on one layer."""
        B, C, H, W, O, K, stride = shape
        self.say(f"  {section}: {B} x {C} x {H} x {W} -> {O}, {K} x {K}, stride {stride}")
        pad = K // 2
        out_h, out_w = ((s + 2 * pad - K) // stride + 1 for s in (H, W))
        pixels, macs = B * out_h * out_w, B * out_h * out_w * O * K * K * C
        floats = input_sets(lambda i: _random((B, C, H, W), i), 4 * B * C * H * W)
        w = _random((O, C, K, K), 1)
        weights_bytes = O * K * K * C
        for method, size in (("float32", 4), ("tf32", 4), ("fp16", 2)):
            dtype = torch.float16 if size == 2 else torch.float32
            for order in (torch.contiguous_format, torch.channels_last):
                sets = [x.to(dtype).contiguous(memory_format=order) for x in floats]
                kernel = w.to(dtype).contiguous(memory_format=order)
                torch.backends.cudnn.allow_tf32 = method == "tf32"
                moved = size * (B * C * H * W + weights_bytes + pixels * O)
                call = functools.partial(functional.conv2d, weight=kernel, stride=stride, padding=pad)
                name = "channels_last" if order == torch.channels_last else "contiguous"
                self.time(section, f"cudnn {method}", shape, call, sets, 2 * macs, moved, note=name)
        rows, k = pixels, K * K * C
        if rows > 16 and k % 8 == 0 and O % 8 == 0:
            b = torch.randint(-128, 127, (O, k), dtype=torch.int8, device=DEVICE).t()
            sets = input_sets(
                lambda i: torch.randint(-128, 127, (rows, k), dtype=torch.int8, device=DEVICE), rows * k
            )  # fmt: skip
            moved = B * C * H * W + weights_bytes + 4 * rows * O
            call = functools.partial(_int_mm, b=b)
            self.time(section, "int8 product", shape, call, sets, 2 * macs, moved, note="torch._int_mm, no im2col")
            del sets
        if original and "float" in self.right:
            layer = layer_of(self._arguments(shape, 1, 1))
            call = functools.partial(_swap(rung2_float.conv), layer, w)
            moved = 4 * (B * C * H * W + weights_bytes + pixels * O)
            self.time(section, "float", shape, call, floats, 2 * macs, moved)
        for count in bases:
            if self.out_of_time(f"{section} {shape} M = N = {count}"):
                return
            self._bits(section, shape, count, macs, pixels, floats, rungs, bits)

    def _bits(self, section, shape, count, macs, pixels, floats, rungs, bits):
        B, C, H, W, O, K, _ = shape
        M = N = count
        arguments = self._arguments(shape, M, N, out_bases=N)
        layer = layer_of(arguments)
        outputs = rung8_fused.pad_outputs(*arguments[-2:])
        place = layer.place(H, W)
        poison = place.no_poison(B)
        P, ops = layer.P, 2 * macs * M * N
        words_bytes = 8 * B * H * W * P * N
        inputs = input_sets(lambda i: random_words((B, H, W, P, N), i), words_bytes)
        weights_bytes = M * O * K * K * 8 * P
        in_bytes = words_bytes + weights_bytes
        common = dict(M=M, N=N)
        if "pack" in self.right:
            call = functools.partial(_swap(rung1_pack.pack), arguments[4], arguments[5])
            moved = 4 * B * C * H * W + words_bytes
            self.time(section, "pack", shape, call, floats, 0, moved, **common)
        for name in rungs:
            if name in self.right:
                call = functools.partial(_with_poison(RUNGS[name]), layer, poison)
                self.time(section, name, shape, call, inputs, ops, in_bytes + 4 * pixels * O, **common)
        if bits:
            moved = in_bytes + 8 * pixels * -(-O // 64) * N
            for name, conv in (("fused", rung8_fused.conv), ("wgmma fused", wgmma_fused)):
                if name in self.right:
                    call = functools.partial(_with_poison(conv), layer, poison, *outputs)
                    self.time(section, name, shape, call, inputs, ops, moved, **common)
        if "operator" in self.right:
            rest = (*arguments[1:-2], None, None)
            moved = 4 * B * C * H * W + weights_bytes + 4 * pixels * O
            call = functools.partial(_swap(engine.packed_conv), *rest)
            self.time(section, "operator", shape, call, floats, ops, moved, **common)

    def _arguments(self, shape, M, N, out_bases=0):
        B, C, H, W, O, K, stride = shape
        # The operator's tensors but for the input, which is made on the device: a batch of 1 stands in for it.
        return random_layer(1, C, (H, W), O, (K, K), (stride,) * 2, (K // 2,) * 4, M, N, out_bases=out_bases)

    def tiles(self):
        """Every tile on two layers, for choosing among them."""
        for shape in TUNED:
            for count in (1, 3):
                layer = layer_of(self._arguments(shape, count, count))
                B, C, H, W, O, K, _ = shape
                place = layer.place(H, W)
                pixels = B * place.out_pixels
                size, limit = 8 * B * H * W * layer.P * count, shared_memory_limit(layer.device)
                inputs = input_sets(functools.partial(random_words, (B, H, W, layer.P, count)), size)
                for name, module in (("mma", rung6_tensorcore), ("wgmma", rung7_wgmma)):
                    for tile in module.TILES if name in self.right else ():
                        if self.out_of_time("tiles"):
                            return
                        if module.shared_bytes(layer, place, B, tile) > limit:
                            continue
                        call = functools.partial(_with_poison(module.conv), layer, place.no_poison(B), tile)
                        note = "tile {} x {}, {} x {} warps".format(*tile)
                        ops = 2 * pixels * O * K * K * C * count * count
                        moved = size + count * O * K * K * C // 8 + 4 * pixels * O
                        self.time("tiles", name, shape, call, inputs, ops, moved, M=count, N=count, note=note)

    def run(self):
        torch.backends.cudnn.benchmark = True
        self.say("Ceilings")
        self.ceilings = rates.ceilings(self.say)
        for name, value in self.ceilings.items():
            clock = f"{value['per_clock_sm']:.0f} a clock and multiprocessor" if value["per_clock_sm"] else ""
            unit = "bytes a second" if name == "bandwidth" else "multiply-adds a second"
            self.add(section="ceilings", method=name, ops_per_s=f"{value['rate']:.4g}", note=f"{unit}; {clock}")
        self.say("Correctness")
        self.right = check(self.say)
        for name in ("pack", "float", *RUNGS, "fused", "wgmma fused", "operator", "max pool", "CUDA graph"):
            self.add(section="correctness", method=name, note="right" if name in self.right else "wrong or missing")
        self.say("Times")
        self.layer("ladder", LADDER, (1, 3), tuple(RUNGS), original=True)
        for batch in BATCHES:
            for C, H, O, K, stride in RESNET18:
                if not self.out_of_time(f"resnet18 batch {batch}"):
                    self.layer("resnet18", (batch, C, H, H, O, K, stride))
            torch.cuda.empty_cache()
        for width in ORIGINAL_WIDTHS:
            if not self.out_of_time("original"):
                self.layer("original", (ORIGINAL_BATCH, 128, width, width, 128, 3, 1))
        self.tiles()


def _random(shape, seed):
    g = torch.Generator(device=DEVICE).manual_seed(SEED + seed)
    return torch.randn(shape, generator=g, device=DEVICE)


def _int_mm(a, b):
    return torch._int_mm(a, b)


def _swap(function):
    """The function with its tensor argument last, for partial application."""
    if function is rung2_float.conv:
        return lambda layer, w, x: function(layer, x, w)
    return lambda *rest_and_x: function(rest_and_x[-1], *rest_and_x[:-1])


def _with_poison(conv):
    """conv(layer, words, poison, ...) with the words last, for partial application."""
    return lambda layer, poison, *rest_and_words: conv(layer, rest_and_words[-1], poison, *rest_and_words[:-1])


def _version(package) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _driver_version() -> str:
    found = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", _read("/proc/driver/nvidia/version"))
    return found.group(1) if found else "unknown"


def _read(path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="kernels.bench", description="Measure the CUDA ladder on this GPU.")
    parser.add_argument("--limit", type=float, default=420, help="seconds after which no new measurement starts")
    options = parser.parse_args(argv)
    if SIMULATED or not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    bench = Bench(options.limit)
    print(f"{bench.machine['device']}, torch {torch.__version__}, Python {platform.python_version()}")
    try:
        bench.run()
    finally:
        if bench.rows:
            report(bench.rows)
    print(table(bench.rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
