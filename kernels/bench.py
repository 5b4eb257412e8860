"""One clock, one table, one figure for every rung: `python -m kernels.bench`.

    python -m kernels.bench                                     all sizes, 1 thread and all threads; writes the results
    python -m kernels.bench --quick                             a few sizes, nothing written
    python -m kernels.bench --shape 128,128,3,28,1 --batch 8    one convolution (C, O, K, size, padding[, stride])
    python -m kernels.bench --device cuda                       the CUDA ladder (kernels/cuda/bench.py)

What is timed: a whole layer as a network calls it, float32 in and out, thresholds and packing included. Beside it, what
a user would take instead: torch's float32 convolution in both memory layouts, and int8 (float32 in and out as well) by
torch's two engines and by onnxruntime. "words" is the packed layer between two packed layers, bits in and bits out.

How: all contenders of one size run in one process, in turn, round after round, and the median round counts; so a
disturbance hits everyone alike. Before each timed call one that is not timed fills the caches. onnxruntime is timed
after the others, because its threads spin for a while after each call and would slow down whoever comes next.
"""

import argparse
import csv
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import abcnets

from .clock import interleaved_medians, machine

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BASES = (1, 2, 3, 5)


@dataclass(frozen=True)
class Shape:
    """A convolution: B images of C channels, `size` x `size`, to O channels by a K x K kernel."""

    C: int
    O: int
    K: int
    size: int
    padding: int
    stride: int = 1
    B: int = 1

    @property
    def output(self) -> int:
        return (self.size + 2 * self.padding - self.K) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds of the float convolution; M * N times as many bit products."""
        return self.B * self.O * self.output**2 * self.C * self.K**2

    def __str__(self) -> str:
        stride = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.C}→{self.O} {self.K}x{self.K}{stride}, {self.B} x {self.size}x{self.size}"


FIRST_AUTHOR = [Shape(128, 128, 3, size, 0, B=32) for size in (8, 16, 32, 50)]
RESNET_18 = [
    Shape(C, O, K, size, padding, stride, B)
    for B in (1, 8)
    for C, O, K, size, padding, stride in (
        (64, 64, 3, 56, 1, 1),
        (128, 128, 3, 28, 1, 1),
        (256, 256, 3, 14, 1, 1),
        (512, 512, 3, 7, 1, 1),
        (64, 128, 3, 56, 1, 2),
        (64, 128, 1, 56, 0, 2),
    )
]
QUICK = [FIRST_AUTHOR[1], RESNET_18[1], RESNET_18[3]]


# --------------------------------------------------------------------------- contenders


def packed_layer(shape: Shape, bases: int, seed=0) -> tuple:
    """Random arguments of abcnets::packed_conv for M = N = bases, after x and up to `groups`."""
    generator = torch.Generator().manual_seed(seed)
    C, O, K = shape.C, shape.O, shape.K
    bits = abcnets.pack_bits(torch.rand(bases, O, K, K, C, generator=generator) < 0.5, torch.uint8)
    thresholds = torch.linspace(-1, 1, bases + 2)[1:-1, None].expand(-1, C).contiguous()
    return (
        bits, torch.rand(bases, O, generator=generator), torch.rand(bases, generator=generator), thresholds,
        torch.zeros(C, dtype=torch.bool), torch.randn(O, generator=generator), C,
        [shape.stride] * 2, [shape.padding] * 4, [1, 1], 1,
    )  # fmt: skip


def packed_contenders(shape: Shape, x, bases) -> dict:
    operator = torch.ops.abcnets.packed_conv
    contenders = {}
    for n in bases:
        layer = packed_layer(shape, n)
        next_thresholds, next_flips = torch.zeros(n, shape.O), torch.zeros(shape.O, dtype=torch.bool)
        words = torch.randint(-(2**63), 2**63 - 1, (shape.B, shape.size, shape.size, -(-shape.C // 64), n))
        if shape.C % 64:
            words[..., -1, :] &= (1 << shape.C % 64) - 1
        contenders[f"packed {n}"] = lambda layer=layer: operator(x, *layer, None, None)
        contenders[f"words {n}"] = lambda layer=layer, words=words, t=next_thresholds, f=next_flips: operator(
            words, *layer, t, f
        )
    return contenders


def float_contenders(shape: Shape, x, compiled=False) -> dict:
    weight, bias = torch.randn(shape.O, shape.C, shape.K, shape.K) * 0.05, torch.randn(shape.O)
    contenders = {}
    for name, order in (("float32", torch.contiguous_format), ("float32 channels_last", torch.channels_last)):
        arguments = x.to(memory_format=order), weight.to(memory_format=order), bias, shape.stride, shape.padding
        contenders[name] = lambda arguments=arguments: F.conv2d(*arguments)
        if compiled:
            function = torch.compile(F.conv2d, dynamic=False)
            contenders[f"{name} compiled"] = lambda arguments=arguments, function=function: function(*arguments)
    return contenders


INPUT_SCALE, WEIGHT_SCALE, OUTPUT_SCALE = 0.03, 0.002, 0.1  # any will do: values do not change the time


def torch_int8_contenders(shape: Shape, x) -> dict:
    """Float in, float out, through torch's quantized convolution."""
    weight, bias = torch.randn(shape.O, shape.C, shape.K, shape.K) * 0.05, torch.randn(shape.O)
    x = x.to(memory_format=torch.channels_last)
    contenders = {}
    supported = torch.backends.quantized.supported_engines
    for engine in ("x86", "onednn") if "x86" in supported else ("qnnpack",):
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

        contenders[f"int8 torch {engine}"] = run
    return contenders


def onnxruntime_int8(shape: Shape, x, threads: int):
    """A function that runs the quantized convolution in onnxruntime, or None without it."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    import numpy as np

    weight = np.random.default_rng(0).integers(-60, 60, (shape.O, shape.C, shape.K, shape.K)).astype(np.int8)
    constants = {
        "xs": np.float32(INPUT_SCALE), "xz": np.uint8(64), "ws": np.float32(WEIGHT_SCALE), "wz": np.int8(0),
        "ys": np.float32(OUTPUT_SCALE), "yz": np.uint8(64), "w": weight, "b": np.zeros(shape.O, np.int32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node(
            "QLinearConv", ["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["yq"],
            strides=[shape.stride] * 2, pads=[shape.padding] * 4, kernel_shape=[shape.K] * 2,
        ),  # fmt: skip
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy()}
    return lambda: session.run(None, inputs)


# --------------------------------------------------------------------------- times


def time_shape(shape: Shape, threads: int, bases=BASES, seconds=6.0, compiled=False) -> dict:
    """Seconds of every contender at one size."""
    torch.set_num_threads(threads)
    x = torch.randn(shape.B, shape.C, shape.size, shape.size)
    contenders = packed_contenders(shape, x, bases) | float_contenders(shape, x, compiled)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantized tensors announce their successor
        contenders |= torch_int8_contenders(shape, x)
        times = interleaved_medians(contenders, seconds)
        onnx = onnxruntime_int8(shape, x, threads)
        if onnx is not None:
            time.sleep(0.05)  # torch's threads come to rest
            times |= interleaved_medians({"int8 onnxruntime": onnx}, seconds / 6)
            del onnx
            time.sleep(0.05)
    return times


# --------------------------------------------------------------------------- a rung by itself


def check_rung(name: str, packed_conv, shapes) -> None:
    """Compare an implementation of abcnets::packed_conv with the plain one; what each kernel file does first."""
    for shape in shapes:
        for n in (1, 2, 3):
            x, layer = torch.randn(shape.B, shape.C, shape.size, shape.size), packed_layer(shape, n)
            expected = abcnets.packed_conv(x.double(), *layer, None, None)
            error = (packed_conv(x, *layer, None, None) - expected).abs().max() / expected.abs().max()
            print(f"{name}: {shape}, M = N = {n}: off by {error:.1e} of the largest output")
            assert error < 1e-5


def time_rung(name: str, packed_conv, shape: Shape, bases=(1, 2, 3)) -> None:
    """Print an implementation's speed on one thread; what each kernel file does second."""
    from .cpu import peak as cpu_peak

    torch.set_num_threads(1)
    x = torch.randn(shape.B, shape.C, shape.size, shape.size)
    layers = {n: packed_layer(shape, n) for n in bases}
    contenders = {n: lambda layer=layer: packed_conv(x, *layer, None, None) for n, layer in layers.items()}
    for n, seconds in interleaved_medians(contenders, 2.0).items():
        speed = shape.macs * n * n / seconds
        print(f"{name}: {shape}, M = N = {n}: {seconds * 1e6:9.1f} us, {speed / 1e9:7.1f} Gop/s, "
              f"{speed / cpu_peak.peak():.0%} of the bound")  # fmt: skip


RUNG_SHAPES = [Shape(70, 40, 3, 9, 1, B=2), Shape(64, 64, 1, 12, 0, 2), Shape(130, 33, 5, 7, 2)]


# --------------------------------------------------------------------------- rows


def rows_of(shape: Shape, threads: int, times: dict, peak: float) -> list[dict]:
    """One row a contender: its time, and what that makes against the best float32, the best int8 and the bound."""
    best_float = min(t for name, t in times.items() if name.startswith("float32"))
    best_int8 = min((t for name, t in times.items() if name.startswith("int8")), default=None)
    rows = []
    for name, seconds in times.items():
        bases = int(name.split()[-1]) if name.startswith(("packed", "words")) else ""
        operations = shape.macs * (bases or 1) ** 2
        rows.append(
            asdict(shape)
            | {
                "threads": threads,
                "contender": name.rsplit(" ", 1)[0] if bases else name,
                "bases": bases,
                "microseconds": round(seconds * 1e6, 2),
                "operations_per_second": float(f"{operations / seconds:.4g}"),
                "times_float32": round(best_float / seconds, 3),
                "times_int8": round(best_int8 / seconds, 3) if best_int8 else "",
                "share_of_bound": round(operations / seconds / (peak * threads), 3) if bases else "",
            }
        )
    return rows


def print_rows(shape, threads, rows) -> None:
    print(f"\n{shape}, {threads} thread{'s' * (threads > 1)}: {shape.macs / 1e6:.0f} M multiply-adds")
    for row in rows:
        line = f"  {row['contender']} {row['bases']}".ljust(28) + f"{row['microseconds']:10.1f} us"
        line += f"  {row['operations_per_second'] / 1e9:8.1f} Gop/s  {row['times_float32']:6.2f} x float32"
        if row["times_int8"]:
            line += f"  {row['times_int8']:5.2f} x int8"
        if row["share_of_bound"]:
            line += f"  {row['share_of_bound']:4.0%} of the bound"
        print(line, flush=True)


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict]:
    """write_csv's rows, with numbers where there are numbers."""

    def parse(text):
        try:
            return int(text)
        except ValueError:
            pass
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{key: parse(value) for key, value in row.items()} for row in csv.DictReader(file)]


# --------------------------------------------------------------------------- table and figure


def shape_of(row: dict) -> Shape:
    return Shape(*(row[key] for key in ("C", "O", "K", "size", "padding", "stride", "B")))


def grouped(rows: list[dict]) -> dict:
    """{(shape, threads): {(contender, bases): row}}"""
    groups = {}
    for row in rows:
        groups.setdefault((shape_of(row), row["threads"]), {})[row["contender"], row["bases"]] = row
    return groups


def goal_medians(rows: list[dict], contender: str, column: str) -> dict:
    """{(threads, bases): median of a column over the 3 x 3 convolutions}"""
    values = {}
    for row in rows:
        if row["contender"] == contender and row["K"] == 3:
            values.setdefault((row["threads"], row["bases"]), []).append(row[column])
    return {key: median(numbers) for key, numbers in values.items()}


def table(rows: list[dict]) -> str:
    """The README's table: times as fast as the best float32 (as the best int8, share of the bound)."""
    bases = sorted({row["bases"] for row in rows if row["bases"]})
    first = rows[0]
    out = [
        f"{first['cpu']}, {first['cores']} cores; torch {first['torch']}, Numba {first['numba']}, "
        f"onnxruntime {first['onnxruntime']}. A core's clock is {first['clock_ghz']:.2f} GHz and it counts at most "
        f"{first['bound_tops']:.2f} T bit products a second, measured (`cpu_peak.py`).",
        "",
        "Times as fast as the faster float32 layout / as the fastest int8 (share of the bound); float in, float out:",
        "",
        "| convolution | threads | float32 | int8 | " + " | ".join(f"M = N = {n}" for n in bases) + " |",
        "|---|---|---|---|" + "---|" * len(bases),
    ]
    for (shape, threads), group in grouped(rows).items():
        best = {
            kind: min((r["microseconds"] for (name, _), r in group.items() if name.startswith(kind)), default=0)
            for kind in ("float32", "int8")
        }
        cells = [
            f"{row['times_float32']:.2f} / {row['times_int8']:.2f} ({row['share_of_bound']:.0%})"
            for row in (group["packed", n] for n in bases)
        ]
        times = [f"{best[kind]:,.0f} us" for kind in ("float32", "int8")]
        out.append("| " + " | ".join([str(shape), str(threads), *times, *cells]) + " |")
    for contender, what in (("packed", "float in and out"), ("words", "bits in and out")):
        floats = goal_medians(rows, contender, "times_float32")
        int8s = goal_medians(rows, contender, "times_int8")
        for threads in sorted({threads for threads, _ in floats}):
            cells = [f"**{floats[threads, n]:.2f}** / {int8s[threads, n]:.2f}" for n in bases]
            out.append(f"| median of 3x3, {what} | {threads} | | | " + " | ".join(cells) + " |")
    return "\n".join(out)


def figure(rows: list[dict], path: Path) -> None:
    """Speed against float32 by M = N, one panel a thread count, one line a size, int8 for comparison."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "abcnets"  # the same numbers make the same file
    from matplotlib import pyplot as plt

    groups = grouped(rows)
    counts = sorted({threads for _, threads in groups})
    fig, axes = plt.subplots(1, len(counts), figsize=(5.2 * len(counts), 4), sharey=True, squeeze=False)
    for ax, threads in zip(axes[0], counts):
        for (shape, count), group in groups.items():
            if count != threads:
                continue
            line = [(n, row["times_float32"]) for (name, n), row in group.items() if name == "packed"]
            color = "tab:blue" if shape.K == 3 else "tab:gray"
            ax.plot(*zip(*line), "o-", color=color, alpha=0.35, linewidth=1, markersize=3)
        bases = sorted({row["bases"] for row in rows if row["bases"]})
        for contender, style, label in (("packed", "o-", "median of 3x3"), ("words", "s--", "the same, bits to bits")):
            medians = goal_medians(rows, contender, "times_float32")
            ax.plot(bases, [medians[threads, n] for n in bases], style, color="tab:red", label=label)
        int8 = [
            max(r["times_float32"] for (name, _), r in group.items() if name.startswith("int8"))
            for (shape, count), group in groups.items()
            if count == threads and shape.K == 3
        ]
        ax.axhline(median(int8), color="tab:green", linestyle=":", label="int8, median of 3x3")
        ax.axhline(1, color="black", linewidth=0.8, label="float32")
        ax.set(xlabel="M = N", yscale="log", title=f"{threads} thread{'s' * (threads > 1)}", xticks=bases)
        ax.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("times as fast as float32")
    axes[0][0].legend(frameon=False)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands in the file between <!-- marker --> and <!-- /marker -->."""
    content = path.read_text()
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, rest = content.split(opening)
    after = rest.split(closing)[1]
    path.write_text(f"{before}{opening}\n{text}\n{closing}{after}")


def write_readme() -> None:
    """Table and figure from kernels/results/cpu.csv, without running anything."""
    rows = read_csv(RESULTS / "cpu.csv")
    figure(rows, RESULTS / "cpu.svg")
    write_between(HERE / "README.md", "cpu results", table(rows))


# --------------------------------------------------------------------------- command line


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda has options of its own")
    parser.add_argument("--shape", help="C,O,K,size,padding[,stride]: one convolution instead of all")
    parser.add_argument("--batch", type=int, default=1, help="images, with --shape")
    parser.add_argument("--bases", type=int, nargs="+", default=list(BASES), help="M = N to time")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of one size")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's float32 convolution too")
    parser.add_argument("--quick", action="store_true", help="three sizes, two seconds each, nothing written")
    parser.add_argument("--readme", action="store_true", help="only write table and figure from the results")
    return parser.parse_args(arguments)


def main() -> None:
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="cpu")
    chosen, others = device.parse_known_args()
    if chosen.device == "cuda":
        from .cuda import bench as cuda_bench

        sys.exit(cuda_bench.main(others))
    options = parse_arguments()
    if options.readme:
        return write_readme()
    from .cpu import peak as cpu_peak

    print(abcnets.engines())
    shapes = QUICK if options.quick else FIRST_AUTHOR + RESNET_18
    if options.shape:
        C, O, K, size, padding, *stride = map(int, options.shape.split(","))
        shapes = [Shape(C, O, K, size, padding, *stride, B=options.batch)]
    seconds = min(options.seconds, 2.0) if options.quick or options.shape else options.seconds
    about = machine() | {"clock_ghz": round(cpu_peak.clock() / 1e9, 3), "bound_tops": round(cpu_peak.peak() / 1e12, 3)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    for shape in shapes:  # a whole network is one more set of contenders for interleaved_medians
        for threads in options.threads:
            times = time_shape(shape, threads, options.bases, seconds, options.compile)
            new = rows_of(shape, threads, times, cpu_peak.peak())
            print_rows(shape, threads, new)
            rows += [row | about for row in new]
    if not (options.quick or options.shape):
        write_csv(RESULTS / "cpu.csv", rows)
        write_readme()


if __name__ == "__main__":
    main()
