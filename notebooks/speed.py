"""How fast whole networks run, packed against float: `python notebooks/speed.py`.

The nine-layer network on 28x28 images and ResNet-18 on 224x224, every layer but the first and last binarized, with bits
kept between layers where they can be (`abcnets.fuse`). Beside them the float network in the best form that torch has:
both memory layouts, each also with BatchNorm folded into the convolutions where it follows one, and with --compile
what torch.compile makes of it. All contenders run in one process, in turn; the median round counts.

Writes notebooks/results/speed.csv and the table of networks in kernels/README.md. With --int8 nothing is written: it
times the nine-layer network on one thread, in three settings and in onnxruntime's int8, in turn, and prints ratios.
"""

import argparse
import copy
import functools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where abcnets.py and kernels/ are

import networks
import pandas as pd
import torch
from files import RESULTS, ROOT
from runs import write_csv
from torch.fx.experimental.optimization import fuse as fold_batch_norm

import abcnets
from kernels.check import need_engine
from kernels.clock import interleaved_medians, machine
from kernels.command import COUNT, POSITIVE_OR_0, THREADS, Parser
from kernels.report import refill


def nine_layer():
    return networks.nine_layer().eval(), (1, 28, 28)


def resnet18():
    networks.import_torchvision()
    from torchvision.models import resnet18

    return resnet18().eval(), (3, 224, 224)


NETWORKS = {"nine-layer": nine_layer, "ResNet-18": resnet18}
LAYOUTS = {"": torch.contiguous_format, ", channels last": torch.channels_last}
CASES = [("nine-layer", 1), ("nine-layer", 32), ("ResNet-18", 1), ("ResNet-18", 8)]


def contenders(name: str, batch: int, bases, compiled: bool) -> dict:
    """{(form, M = N or 0): a function that runs the network once}"""
    torch.manual_seed(0)
    network, shape = NETWORKS[name]()
    x = torch.randn(batch, *shape)
    forms = {"float32": network, "float32, BatchNorm folded": fold_batch_norm(network)}
    runs = {}
    for form, model in forms.items():
        for layout, order in LAYOUTS.items():
            there, inputs = copy.deepcopy(model).to(memory_format=order), x.to(memory_format=order)
            runs[form + layout, 0] = lambda there=there, inputs=inputs: there(inputs)
            if compiled:
                faster = torch.compile(there)
                runs[f"{form}{layout}, compiled", 0] = lambda faster=faster, inputs=inputs: faster(inputs)
    for n in bases:
        binarized = abcnets.convert(network, n, n)
        abcnets.calibrate(binarized, x[:4] if batch > 4 else x, compensate=False, progress=False)
        packed = abcnets.pack(binarized)
        runs["packed", n] = lambda packed=packed: packed(x)
        for layout, order in LAYOUTS.items():  # of what stays float around the packed layers, a stem and its pooling
            fused, inputs = abcnets.fuse(packed).to(memory_format=order), x.to(memory_format=order)
            runs["packed, bits between layers" + layout, n] = lambda fused=fused, inputs=inputs: fused(inputs)
    return runs


def measure(name: str, batch: int, threads: int, bases, seconds: float, compiled: bool) -> pd.DataFrame:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        times = interleaved_medians(contenders(name, batch, bases, compiled), seconds)
    best = min(t for (_, n), t in times.items() if n == 0)
    rows = [
        {"network": name, "batch": batch, "threads": threads, "form": form, "bases": n or "",
         "milliseconds": round(1e3 * t, 4), "times_float32": round(best / t, 3)}
        for (form, n), t in times.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> str:
    """Markdown: milliseconds of the best float form, and how many times as fast each packed network is."""
    fused = rows[rows["form"].str.startswith("packed, bits")]
    counts = sorted(fused["bases"].unique())
    lines = [
        "Times as fast as the fastest float32 form; the better memory layout of either, bits kept between layers:",
        "",
        "| network | batch | threads | float32, best form | " + " | ".join(f"M = N = {n:.0f}" for n in counts) + " |",
        "|---|---|---|---|" + "---|" * len(counts),
    ]
    keys = ["network", "batch", "threads"]
    floats = rows[rows["form"].str.startswith("float32")].set_index(keys).sort_index()
    for key, group in fused.groupby(keys, sort=False):
        best = floats.loc[[key]].nsmallest(1, "milliseconds").iloc[0]
        form = best["form"].removeprefix("float32").strip(", ") or "as it is"
        speeds = group.groupby("bases")["times_float32"].max()
        cells = [*map(str, key), f"{best['milliseconds']:.2f} ms ({form})", *(f"**{speeds[n]:.2f}**" for n in counts)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class RandomImages:
    """What compare.py's onnx_files takes to calibrate and export on, where values don't matter."""

    def __init__(self, *shape: int):
        self.shape = shape

    def calibration_batches(self, images: int):
        yield torch.randn(images, *self.shape)

    def test_batches(self, batch: int):
        yield torch.randn(batch, *self.shape), None


SETTINGS = {
    "M = N = 1": (1, 1, "thermometer"), "M = 2, N = 2 uniform": (2, 2, ("binary", "uniform")),
    "M = N = 2": (2, 2, "binary"),
}  # fmt: skip


def beside_int8(seconds: float) -> None:
    """Print how fast the nine-layer network is on one thread, in each of SETTINGS and in onnxruntime's int8."""
    from compare import onnx_contenders, onnx_files

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, shape = nine_layer()
    images, fused = torch.randn(64, *shape), {}
    for name, (M, N, code) in SETTINGS.items():
        binarized = abcnets.convert(network, M, N, code=code)
        fused[name] = abcnets.fuse(abcnets.pack(abcnets.calibrate(binarized, images, compensate=False, progress=False)))
    with tempfile.TemporaryDirectory() as folder:
        with torch.no_grad():
            files = onnx_files(network, RandomImages(*shape), Path(folder), 64)
        int8 = [c for c in onnx_contenders(files, 1) if "int8" in c.form]
        for batch in (1, 32):
            x = images[:batch]
            runs = {name: functools.partial(model, x) for name, model in fused.items()}
            runs |= {c.name: functools.partial(c.run, x) for c in int8}
            with torch.inference_mode():
                times = interleaved_medians(runs, seconds, rounds=1000)
            best = min(times[c.name] for c in int8)
            for name, taken in times.items():
                speed = f"{1e6 * taken / batch:8.1f} us an image, {best / taken:5.2f} times int8's speed"
                print(f"nine-layer, batch {batch:2}: {name:30} {speed}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--bases", type=COUNT, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=THREADS, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--seconds", type=POSITIVE_OR_0, default=15.0, help="for the rounds of one case")
    parser.add_argument("--int8", action="store_true", help="the nine-layer network beside onnxruntime's int8, alone")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's forms too (needs a C++ compiler)")
    parser.run(run, parser.parse_args(arguments))


def run(options) -> None:
    need_engine("cpu")
    if options.int8:
        return beside_int8(options.seconds)
    tables = []
    for name, batch in CASES:
        for threads in options.threads if name in options.networks else []:
            tables.append(measure(name, batch, threads, options.bases, options.seconds, options.compile))
            print(tables[-1].to_string(index=False), "\n", flush=True)
    if options.networks == list(NETWORKS):
        rows, page = pd.concat(tables).assign(**machine()), ROOT / "kernels" / "README.md"
        write_csv(RESULTS / "speed.csv", rows)
        refill(page, "python notebooks/speed.py", {"networks": table(rows)})


if __name__ == "__main__":
    main()
