"""One command line, one CSV, one table and one figure for every rung and its rivals: `python -m kernels.bench`.

    python -m kernels.bench                                     all sizes, 1 thread and all threads; writes the results
    python -m kernels.bench --quick                             a few sizes, nothing written
    python -m kernels.bench --shape 128,128,3,28,1 --batch 8    one convolution (C, O, K, size, padding[, stride])
    python -m kernels.bench --isa avx2                          as on a processor with AVX2 alone; writes its results
    python -m kernels.bench --device cuda                       the CUDA ladder, cuda/ladder.py; writes its results
    python -m kernels.bench --readme                            no times: table and figure from the results there are

What is timed on a CPU: a whole layer as a network calls it, float32 in and out, thresholds and packing included. Beside
it, what a user would take instead: float32 by torch in both memory layouts and by onnxruntime; int8 (float32 in and out
as well) by torch's two engines and by onnxruntime; and the other binary convolution that one can install for this
processor, OpenVINO's, if it is there (`pip install openvino`). "words" is the packed layer between two packed layers,
bits in and out. Libraries with threads of their own are timed after the others, because these spin for a while after
each call and would slow down whoever comes next. How: clock.py.

With --isa avx2 all sides are held to AVX2: Numba, torch's own kernels and oneDNN, in a process of their own. What can't
be held to it is left out: torch's x86 engine for int8, onnxruntime, OpenVINO.

Results: results/cpu.csv, avx2.csv and cuda.csv, a row a contender and size, where an operation is one multiply-add of
the float convolution, or of two bits. A setting of bits is M x N, and "uniform 2" for N of equal betas. report.py makes
README.md's tables and figures of them.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import abcnets

from . import report
from .check import FIRST_AUTHOR, NO_GPU, RESNET_18, Shape, need_engine
from .clock import SIMULATED, instruction_set, interleaved_medians, machine
from .command import COUNT, POSITIVE, THREADS, Parser, Refused, checked

QUICK = [FIRST_AUTHOR[1], RESNET_18[1], RESNET_18[3]]
ON_AVX2 = [
    Shape(128, 128, 3, 28, 1, B=8), Shape(64, 64, 3, 56, 1), Shape(256, 256, 3, 14, 1), Shape(32, 32, 3, 14, 1, B=32),
    Shape(16, 32, 3, 28, 1, B=32),
]  # fmt: skip
AVX2 = {
    "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2,+popcnt,+lzcnt,+f16c",
    "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
}  # fmt: skip
ON_A_CPU = FIRST_AUTHOR + [replace(shape, B=B) for B in (1, 8) for shape in RESNET_18[:6]]


# --------------------------------------------------------------------------- contenders on a CPU


@dataclass(frozen=True)
class Setting:
    """M weight bases and N activation bases; uniform: all betas alike. How many thresholds there are is the code's."""

    M: int
    N: int
    code: str = "thermometer"

    def arguments(self, shape: Shape, **others) -> tuple:
        """A random layer's arguments for the operator, without its input."""
        arguments = list(shape.layer(self.M, self.N, binary=self.code == "binary", **others))
        if self.code == "uniform":
            arguments[3] = torch.full_like(arguments[3], 0.5)
        return tuple(arguments[1:])

    def __str__(self) -> str:
        return f"{self.M} x {self.N}" if self.code == "thermometer" else f"{self.M} x {self.code} {self.N}"


def _setting(text: str) -> Setting:
    M, N = text.split(" x ")
    *code, N = N.split()
    return Setting(int(M), int(N), *code)


MAIN = [Setting(1, 1), Setting(1, 2, "uniform"), Setting(1, 2, "binary"), Setting(2, 2, "uniform"),
        Setting(2, 2, "binary"), Setting(3, 3, "binary")]  # fmt: skip
CROSSING = [Setting(M, N) for M, N in
            [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3), (3, 4), (3, 5), (4, 4), (4, 5), (5, 5)]]  # fmt: skip
SETTINGS = list(dict.fromkeys([*MAIN, *CROSSING]))


def packed_contenders(shape: Shape, x, settings) -> dict:
    """{("packed", setting): function, ("words", setting): function}; bits in and out for the `MAIN` settings only."""
    operator = torch.ops.abcnets.packed_conv
    contenders = {}
    for setting in settings:
        layer = setting.arguments(shape)[:-3]
        contenders["packed", setting] = lambda layer=layer: operator(x, *layer, None, None, 0)
        if setting in MAIN:
            layer, words = setting.arguments(shape, out_bases=setting.N), shape.words(setting.N)
            contenders["words", setting] = lambda layer=layer, words=words: operator(words, *layer)
    return contenders


def float_contenders(shape: Shape, x, compiled=False) -> dict:
    weight, bias = torch.randn(shape.O, shape.C, shape.K, shape.K) * 0.05, torch.randn(shape.O)
    contenders = {}
    for name, order in (("float32", torch.contiguous_format), ("float32 channels_last", torch.channels_last)):
        arguments = x.to(memory_format=order), weight.to(memory_format=order), bias, shape.stride, shape.padding
        contenders[name, None] = lambda arguments=arguments: F.conv2d(*arguments)
        if compiled:
            function = torch.compile(F.conv2d, dynamic=False)
            contenders[f"{name} compiled", None] = lambda arguments=arguments, function=function: function(*arguments)
    return contenders


INPUT_SCALE, WEIGHT_SCALE, OUTPUT_SCALE = 0.03, 0.002, 0.1  # any will do: values do not change the time


def torch_int8_contenders(shape: Shape, x, engines=("x86", "onednn")) -> dict:
    """Float in, float out, through torch's quantized convolution."""
    weight, bias = torch.randn(shape.O, shape.C, shape.K, shape.K) * 0.05, torch.randn(shape.O)
    x = x.to(memory_format=torch.channels_last)
    contenders = {}
    supported = torch.backends.quantized.supported_engines
    for engine in engines if "x86" in supported else ("qnnpack",):
        torch.backends.quantized.engine = engine
        scales, zeros = torch.full((shape.O,), WEIGHT_SCALE), torch.zeros(shape.O, dtype=torch.long)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.conv2d_prepack(
            quantized, bias, [shape.stride] * 2, [shape.padding] * 2, [1, 1], 1
        )

        def run(packed=packed, engine=engine):
            torch.backends.quantized.engine = engine
            inputs = torch.quantize_per_tensor(x, INPUT_SCALE, 64, torch.quint8)
            return torch.ops.quantized.conv2d(inputs, packed, OUTPUT_SCALE, 64).dequantize()

        contenders[f"int8 torch {engine}", None] = run
    return contenders


def onnxruntime_contenders(shape: Shape, x, threads: int) -> dict:
    """The float convolution and the quantized one in onnxruntime; none without it."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return {}
    import numpy as np

    random, size = np.random.default_rng(0), (shape.O, shape.C, shape.K, shape.K)
    attributes = {"strides": [shape.stride] * 2, "pads": [shape.padding] * 4, "kernel_shape": [shape.K] * 2}
    scales = {
        "xs": np.float32(INPUT_SCALE), "xz": np.uint8(64), "ws": np.float32(WEIGHT_SCALE), "wz": np.int8(0),
        "ys": np.float32(OUTPUT_SCALE), "yz": np.uint8(64), "b": np.zeros(shape.O, np.int32),
    }  # fmt: skip
    graphs = {
        "float32 onnxruntime": (
            {"w": random.standard_normal(size, np.float32) * 0.05, "b": np.zeros(shape.O, np.float32)},
            [helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)],
        ),
        "int8 onnxruntime": (
            scales | {"w": random.integers(-60, 60, size).astype(np.int8)},
            [
                helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
                helper.make_node(
                    "QLinearConv", ["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["yq"], **attributes
                ),
                helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
            ],
        ),
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    inputs, contenders = {"x": x.numpy()}, {}
    for name, (constants, nodes) in graphs.items():
        ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))], [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        ]
        initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
        graph = helper.make_graph(nodes, "convolution", *ends, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        contenders[name, None] = lambda session=session: session.run(None, inputs)
    return contenders


def openvino_contenders(shape: Shape, x, threads: int) -> dict:
    """OpenVINO's convolution of one bit a side, its threshold included; none without it. Its zeros are -1, borders too.

    https://docs.openvino.ai/latest/openvino_docs_ops_convolution_BinaryConvolution_1.html
    """
    try:
        import openvino
        from openvino import opset1
    except ImportError:
        return {}
    import numpy as np

    def one_for_all(value):
        return opset1.constant(np.full((1, shape.C, 1, 1), value, np.float32))

    size, window = [shape.O, shape.C, shape.K, shape.K], ([shape.stride] * 2, *[[shape.padding] * 2] * 2, [1, 1])
    bits = np.random.default_rng(0).integers(0, 2, int(np.prod(size))).astype(np.uint8)
    weight = openvino.Tensor(np.packbits(bits, bitorder="little"), openvino.Shape(size), openvino.Type.u1)
    inputs = opset1.parameter(list(x.shape), np.float32, name="x")
    signs = opset1.fake_quantize(inputs, *map(one_for_all, (0, 0, 0, 1)), 2)
    y = opset1.binary_convolution(signs, openvino.op.Constant(weight), *window, "xnor-popcount", -1.0)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(openvino.Model([y], [inputs], "binary"), "CPU", settings)
    request, image = compiled.create_infer_request(), x.numpy()
    return {("OpenVINO", Setting(1, 1)): lambda: request.infer([image], share_inputs=True)}


# --------------------------------------------------------------------------- times and rows


def time_shape(shape: Shape, threads: int, settings=SETTINGS, seconds=6.0, compiled=False, isa=None) -> dict:
    """Seconds of every contender at one size, by (name, setting); what isn't made of bits has the setting None.

    isa: with "avx2" only those that can be held to it.
    """
    torch.set_num_threads(threads)
    x = shape.images()
    contenders = packed_contenders(shape, x, settings) | float_contenders(shape, x, compiled)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantized tensors announce their successor
        contenders |= torch_int8_contenders(shape, x, ("onednn",) if isa else ("x86", "onednn"))
        times = interleaved_medians(contenders, seconds)
        for others in () if isa else (onnxruntime_contenders, openvino_contenders):
            if found := others(shape, x, threads):
                time.sleep(0.05)  # the threads before them come to rest
                times |= interleaved_medians(found, seconds / 6)
                del found
        time.sleep(0.05)
    return times


def rows_of(shape: Shape, threads: int, times: dict, peak: float) -> list[dict]:
    """One row a contender: its time, and what that makes against the best float32, the best int8 and the bound."""
    best_float = min(t for (name, _), t in times.items() if name.startswith("float32"))
    best_int8 = min((t for (name, _), t in times.items() if name.startswith("int8")), default=None)
    rows = []
    for (name, setting), seconds in times.items():
        products = shape.macs * (setting.M * setting.N if setting else 1)
        of_bits = asdict(setting) if setting else dict.fromkeys(report.SETTING)
        rows.append(asdict(shape) | {
            "threads": threads, "contender": name, **of_bits,
            "microseconds": round(seconds * 1e6, 2), "operations_per_second": float(f"{products / seconds:.4g}"),
            "times_float32": round(best_float / seconds, 3),
            "times_int8": round(best_int8 / seconds, 3) if best_int8 else None,
            "share_of_bound": round(products / seconds / (peak * threads), 3) if setting else None,
        })  # fmt: skip
    return rows


def print_rows(shape, threads, rows) -> None:
    print(f"\n{shape}, {threads} thread{'s' * (threads > 1)}: {shape.macs / 1e6:.0f} M multiply-adds")
    for row in rows:
        setting = f" {Setting(row['M'], row['N'], row['code'])}" if row["M"] else ""
        line = f"  {row['contender']}{setting}".ljust(28) + f"{row['microseconds']:10.1f} us"
        line += f"  {row['operations_per_second'] / 1e9:8.1f} Gop/s  {row['times_float32']:6.2f} x float32"
        if row["times_int8"]:
            line += f"  {row['times_int8']:5.2f} x int8"
        if row["share_of_bound"]:
            line += f"  {row['share_of_bound']:4.0%} of the bound"
        print(line, flush=True)


# --------------------------------------------------------------------------- command line


def _shape(text: str) -> Shape:
    C, O, K, size, padding, *rest = map(int, text.split(","))
    (stride,) = rest or [1]
    return Shape(C, O, K, size, padding, stride)


def _is_a_convolution(shape: Shape) -> bool:
    if min(shape.C, shape.O, shape.K, shape.size, shape.stride) <= 0 or shape.padding < 0 or shape.output <= 0:
        return False
    return max(shape.C * (shape.size + 2 * shape.padding) ** 2, shape.O * shape.C * shape.K**2) < 2**28


SETTING = checked(_setting, 'M x N, as in "2 x 2", "1 x uniform 2", "3 x binary 3",',
                  lambda setting: min(setting.M, setting.N) > 0 and setting.code in abcnets.CODES)  # fmt: skip
SHAPE = checked(_shape, "a convolution as C,O,K,size,padding[,stride], of less than a gigabyte,", _is_a_convolution)


def measure_cpu(options) -> None:
    need_engine("cpu")
    from .cpu import peak, system

    shapes = QUICK if options.quick else ON_AVX2 if options.isa else ON_A_CPU
    if options.shape:
        shapes = [replace(options.shape, B=options.batch)]
    seconds = min(options.seconds, 2.0) if options.quick or options.shape else options.seconds
    bound = {"clock_ghz": round(peak.clock() / 1e9, 3), "bound_tops": round(peak.peak() / 1e12, 3)}
    about = {"isa": instruction_set(), **machine(), **bound}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    for shape in shapes:
        for threads in options.threads:
            times = time_shape(shape, threads, options.settings, seconds, options.compile, options.isa)
            new = rows_of(shape, threads, times, peak.peak())
            print_rows(shape, threads, new)
            rows += [row | about for row in new]
    if not (options.quick or options.shape):
        report.write(options.isa or "cpu", rows)
        if 1 in options.threads and not options.compile:  # as the engine's own choice is
            report.write_limit(system.tile(), rows)


def measure_avx2(options, arguments) -> None:
    """`measure_cpu` where all libraries are held to AVX2, which they ask the environment for when they are loaded."""
    if AVX2.items() <= os.environ.items():
        return measure_cpu(options)
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Refused(f"AVX2 is for x86, and this is {platform.machine()}")
    folder = Path(__file__).resolve().parent
    command = [sys.executable, "-m", f"{folder.name}.bench", *(sys.argv[1:] if arguments is None else arguments)]
    done = subprocess.run(command, cwd=folder.parent, env=os.environ | AVX2)
    sys.exit(done.returncode)


def measure_cuda(options) -> None:
    if SIMULATED or not torch.cuda.is_available():
        raise Refused(NO_GPU)
    from .cuda import ladder

    about = machine("cuda") | ladder.about()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    measured = ladder.Ladder(options.limit)
    try:
        measured.run()
    finally:  # whatever happens, what there is is kept
        if measured.rows:
            report.write("cuda", [row | about for row in measured.rows])
    print(report.cuda_table(report.read("cuda")))


def main(arguments=None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--readme", action="store_true", help="only write table and figure from the results")
    on_cpu = parser.add_argument_group("on a CPU")
    on_cpu.add_argument("--shape", type=SHAPE, help="C,O,K,size,padding[,stride]: one convolution instead of all")
    on_cpu.add_argument("--batch", type=COUNT, default=1, help="images, with --shape")
    on_cpu.add_argument("--settings", type=SETTING, nargs="+", default=SETTINGS, metavar='"M x N"', help="to time")
    on_cpu.add_argument("--threads", type=THREADS, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    on_cpu.add_argument("--isa", choices=["avx2"], help="hold all sides to these instructions")
    on_cpu.add_argument("--seconds", type=POSITIVE, default=6.0, help="for the rounds of one size")
    on_cpu.add_argument("--compile", action="store_true", help="time torch.compile's float32 convolution too")
    on_cpu.add_argument("--quick", action="store_true", help="three sizes, two seconds each, nothing written")
    on_cuda = parser.add_argument_group("with --device cuda")
    on_cuda.add_argument("--limit", type=POSITIVE, default=420, help="seconds after which no new measurement starts")
    options = parser.parse_args(arguments)
    if options.readme:
        parser.run(report.write_readme, options.isa or options.device)
    elif options.isa:
        parser.run(measure_avx2, options, arguments)
    else:
        parser.run(measure_cpu if options.device == "cpu" else measure_cuda, options)


if __name__ == "__main__":
    main()
