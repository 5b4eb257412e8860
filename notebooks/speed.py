"""How fast whole networks run, bits beside float32 and int8: `python notebooks/speed.py`.

The nine-layer network on 28x28 images and ResNet-18 on 224x224, with random weights and every layer but the first and
last binarized, in the forms of compare.py: torch in both memory layouts, also with BatchNorm folded into the
convolutions that it follows, and with --compile what torch.compile makes of these; onnxruntime in float32 and int8;
ours packed with bits kept between layers (`abcnets.fuse`), in SETTINGS, with the first layer in float32 and, where the
processor can (`rest="int8"`), in int8; and one-bit weights with int8 activations in onnxruntime. All contenders of a
case run in one process, in turn; the median round counts.

Writes notebooks/results/speed.csv, in which a machine's rows take the place of its earlier ones, and the table of
networks in kernels/README.md. Says how many bytes each form's file has.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where abcnets.py and kernels/ are

import networks
import pandas as pd
import torch
from compare import abcnets_contenders, int8_files, milliseconds, onnx_contenders, onnx_files, torch_contenders
from files import RESULTS, ROOT, writable
from runs import keep_rows, read_csv

import abcnets
from kernels.check import need_engine
from kernels.clock import instruction_set, machine
from kernels.command import POSITIVE_OR_0, THREADS, Parser
from kernels.report import refill


def nine_layer():
    return networks.nine_layer().eval(), (1, 28, 28)


def resnet18():
    networks.import_torchvision()
    from torchvision.models import resnet18

    return resnet18().eval(), (3, 224, 224)


def resnet20():
    return networks.resnet20().eval(), (3, 32, 32)


NETWORKS = {"nine-layer": (nine_layer, (1, 32)), "ResNet-20": (resnet20, (1, 32)), "ResNet-18": (resnet18, (1, 8))}
SETTINGS = {  # M, N, code: what to call it
    (1, 1, "thermometer"): "1 × 1", (2, 2, "binary,uniform"): "binary 2 × uniform 2",
    (2, 2, "uniform,binary"): "uniform 2 × binary 2", (2, 2, "binary"): "binary 2 × 2",
    (3, 3, "binary"): "binary 3 × 3", (1, None, "thermometer"): "1 × int8",
}  # fmt: skip
MACHINE, CASE = ["hardware", "isa"], ["network", "batch", "threads"]


def compiled(contender):
    """A contender of torch's, as torch.compile makes it."""
    model, *rest = contender.run.args
    variant = ", ".join(word for word in (contender.variant, "compiled") if word)
    faster = functools.partial(contender.run.func, torch.compile(copy.deepcopy(model)), *rest)
    return dataclasses.replace(contender, variant=variant, run=faster)


def binarized(network, images, M, N, code):
    """Packed, its thresholds and scales those of some images."""
    model = abcnets.convert(network, M, N, code=tuple(code.split(",")) if "," in code else code)
    return abcnets.pack(abcnets.calibrate(model, images, compensate=False, progress=False))


def measure(name: str, all_threads: list[int], seconds: float, compile_too: bool) -> list[dict]:
    """A row a form, batch and number of threads."""
    make, all_batches = NETWORKS[name]
    torch.manual_seed(0)
    network, shape = make()
    images = torch.randn(16, *shape)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with torch.no_grad():
            bits = {setting: binarized(network, images, *setting) for setting in SETTINGS}
            weights = {setting: bits.pop(setting) for setting in SETTINGS if setting[1] is None}
            theirs = torch_contenders(network, folder, [torch.float32])
            theirs += [compiled(form) for form in theirs] if compile_too else []
            rests = ("float", "int8") if abcnets.multiplies_bytes() else ("float",)
            forms = theirs + abcnets_contenders(bits, network, folder, rests)
            files = onnx_files(network, [images], folder) | int8_files(weights, [images], folder)
        for threads, batch in itertools.product(all_threads, all_batches):
            torch.set_num_threads(threads)
            alone = onnx_contenders(files, threads)
            with torch.inference_mode():
                times = milliseconds(forms, alone, images[:1].expand(batch, *shape).contiguous(), seconds)
            case = [{
                "network": name, "batch": batch, "threads": threads, "form": c.form, "variant": c.variant, "M": c.M,
                "N": c.N, "code": c.code if c.M else None, "bytes": c.file.stat().st_size,
                "ms_per_image": float(f"{times[c.name]:.4g}"),
            } for c in forms + alone]  # fmt: skip
            for row in case:
                row |= {f"times_{kind}": round(fastest(case, kind) / row["ms_per_image"], 3) for kind in RIVALS}
                print("{network}, batch {batch}, {threads} threads: {form} {variant} {M} {N} {code}: {bytes} bytes, "
                      "{ms_per_image} ms an image, {times_float32} x float32, {times_int8} x int8"
                      .format(**row), flush=True)  # fmt: skip
            rows += case
    return rows


RIVALS = {"float32": ("torch float32", "onnxruntime float32"), "int8": ("onnxruntime int8",)}


def fastest(rows: list[dict], kind: str) -> float:
    """Milliseconds an image of the fastest float32, or int8, form."""
    return min(row["ms_per_image"] for row in rows if row["form"] in RIVALS[kind])


def table(rows: pd.DataFrame) -> str:
    """Markdown: times as fast as the fastest float32 / int8 form, machine by machine."""
    lines = ["Milliseconds an image of the fastest float32 and int8 forms; and times as fast as the one / as the "
             "other, in the better memory layout, the first layer in float32 or int8, as is faster:"]  # fmt: skip
    rows = rows.assign(setting=[_setting(*of) for of in zip(rows.M, rows.N, rows.code)])
    for (hardware, isa), here in rows.groupby(MACHINE, sort=False):
        there = set(here.setting) - {""}
        names = [name for name in dict.fromkeys([*SETTINGS.values(), *here.setting]) if name in there]
        head = [*CASE, *RIVALS, *names]
        lines += ["", f"**{hardware}, {isa}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for case, group in here.groupby(CASE, sort=False):
            times = [group[group.form.isin(forms)].ms_per_image.min() for forms in RIVALS.values()]
            best = group.sort_values("ms_per_image").groupby("setting")[["times_float32", "times_int8"]].first()
            cells = [" / ".join(map(_number, best.loc[name])) if name in best.index else "-" for name in names]
            lines.append("| " + " | ".join([*map(str, case), *map(_number, times), *cells]) + " |")
    return "\n".join(lines)


def _setting(M, N, code) -> str:
    """The name of one of SETTINGS, or of another that a row is of; "" for what is not ours."""
    if pd.isna(M):
        return ""
    M, N = int(M), None if pd.isna(N) else int(N)
    return SETTINGS.get((M, N, code)) or f"{code} {M} × {N or 'float'}"


def _number(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.3g}"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=THREADS, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--seconds", type=POSITIVE_OR_0, default=15.0, help="for the rounds of one case")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's forms too (needs a C++ compiler)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: notebooks/results")
    parser.run(run, parser.parse_args(arguments))


def run(options) -> None:
    need_engine("cpu")
    writable(options.results)
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime's quantizer recommends what is done
    for name in options.networks:
        rows = measure(name, options.threads, options.seconds, options.compile)
        about = {"isa": instruction_set(), **machine()}
        keep_rows(options.results / "speed.csv", [row | about for row in rows], [*MACHINE, "network"])
    if options.results.resolve() == RESULTS.resolve():
        page = ROOT / "kernels" / "README.md"
        refill(page, "python notebooks/speed.py", {"networks": table(read_csv(RESULTS / "speed.csv"))})


if __name__ == "__main__":
    main()
