"""The nine-layer network on Fashion-MNIST in every form that one could deploy: `python notebooks/compare.py`.

Accuracy on the test images, bytes of the file and milliseconds an image of

    torch           float32, and bfloat16 where the processor has it; both memory layouts, BatchNorm folded into the
                    convolution that it follows
    onnxruntime     float32; int8, static and per channel, in either form that onnxruntime's quantizer writes, with
                    weights of 8 bits and of 7
    abcnets         each fine-tuned network of RESULTS/runs.csv, packed, from its file, with bits kept between layers
    abcnets in int8 the same networks in onnxruntime, with activations in 8 bits and weights as bits in the file

All are made from one float network, all run in one process in turn, on the same threads; the median round counts.
Those of onnxruntime are timed one by one between the others, since a session's threads spin for a while after each
call and would slow down whoever comes next.

Needs the rows in runs.csv of the folder of --results, and of their networks what is in out/ or comes with the
repository in trained/, as `python notebooks/compare.py --results notebooks/results` compares them. Writes
competitors.csv there: one row a form, variant, batch and number of threads. The best variant of a form is for the
reader to take.
"""

import argparse
import collections
import contextlib
import copy
import functools
import io
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where abcnets.py and kernels/ are

import pandas as pd
import torch
from data import load_data
from files import ROOT, tqdm, writable
from runs import converted, load_float, main_runs, setting_of, tensors_of, trained_file, write_csv
from torch import nn
from torch.fx.experimental.optimization import fuse as fold_batch_norm
from training import fast_bfloat16, load_weights

import abcnets
from kernels.check import need_engine
from kernels.clock import instruction_set, interleaved_medians, machine
from kernels.command import COUNT, POSITIVE_OR_0, THREADS, Parser, Refused

LAYOUTS = {"": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass
class Contender:
    """A network in one form: what it is called, its file, and `run`: images -> logits, both float32."""

    form: str
    variant: str
    file: Path
    run: Callable[[torch.Tensor], torch.Tensor]
    M: int | None = None
    N: int | None = None
    code: str = "thermometer"

    @property
    def name(self) -> str:
        bases = f" M = {self.M or 'float'}, N = {self.N or 'float'}" if self.M or self.N else ""
        words = bases + (f", {self.code}" if self.code != "thermometer" else "")
        return f"{self.form}{words}" + (f", {self.variant}" if self.variant else "")


def torch_contenders(network: nn.Module, folder: Path, dtypes=(torch.float32, torch.bfloat16)) -> list[Contender]:
    """The float network as torch runs it; its file is a safetensors file of its parameters and buffers."""
    from safetensors.torch import save_file

    contenders = []
    folded = fold_batch_norm(network)
    forms = {torch.float32: {"": network, "BatchNorm folded": folded}, torch.bfloat16: {"BatchNorm folded": folded}}
    for dtype in dtypes:
        form = f"torch {str(dtype).removeprefix('torch.')}"
        if dtype is torch.bfloat16 and not fast_bfloat16(torch.device("cpu")):
            print(f"{form} is left out: this processor does not compute in it")
            continue
        for fold, model in forms[dtype].items():
            for layout, order in LAYOUTS.items():
                there = copy.deepcopy(model).to(dtype=dtype, memory_format=order)
                path = folder / f"{form} {fold}.safetensors"
                save_file(tensors_of(there), path)
                run = functools.partial(_run_torch, there, order, dtype)
                variant = ", ".join(word for word in (layout, fold) if word)
                contenders.append(Contender(form, variant, path, run))
    return contenders


def _run_torch(model, order, dtype, x):
    return model(x.to(dtype=dtype, memory_format=order)).float()


def abcnets_contenders(networks: dict, network: nn.Module, folder: Path, rests=("float",)) -> list[Contender]:
    """Each of the `binary_networks`, written and read again, with bits kept between layers.

    rests: what to give `abcnets.fuse`.
    """
    contenders = []
    for (M, N, code), packed in networks.items():
        path = folder / f"{M}-{N}-{code}.safetensors"
        abcnets.save_packed(packed, path)
        loaded = abcnets.load_packed(path, network)
        for (layout, order), rest in itertools.product(LAYOUTS.items(), rests):
            fused = abcnets.fuse(loaded, rest=rest).to(memory_format=order)
            run = functools.partial(_run_torch, fused, order, torch.float32)
            variant = ", ".join([layout] * bool(layout) + ["first layer in int8"] * (rest == "int8"))
            contenders.append(Contender("abcnets", variant, path, run, M, N, code))
    return contenders


def binary_networks(network: nn.Module, runs: pd.DataFrame, out: Path) -> dict[tuple, nn.Module]:
    """{(M, N, code): the packed network of a run}, from `out`, else the one that comes with the repository."""
    networks = {}
    for row in runs.to_dict("records"):
        path = out / f"{row['run']}.pt"
        if path.exists():
            packed = abcnets.pack(load_weights(converted(network, row), path))
        else:
            packed = abcnets.load_packed(trained_file(row["run"]), network)
        networks[setting_of(row)] = packed
    return networks


def kept_runs(results: Path, dataset: str, out: Path) -> pd.DataFrame:
    """The binarized runs of a data set with the first seed in which nothing but bases and code was chosen.

    Those whose network is neither in `out` nor comes with the repository are named and left out.
    """
    rows = main_runs(results, dataset).query("(M > 0 or N > 0) and seed == 0")
    kept = [(out / f"{run}.pt").exists() or trained_file(run).exists() for run in rows.run]
    for row in rows[[not there for there in kept]].itertuples():
        print(f"{row.run} is left out: {out / row.run}.pt is missing; `{row.command}` writes it")
    return rows[kept]


def onnx_files(network: nn.Module, batches: list[torch.Tensor], folder: Path) -> dict[tuple, Path]:
    """{(form, variant): file} of a float network for onnxruntime: float32, and int8 calibrated on the batches."""
    try:
        import onnxscript  # noqa: F401  what torch.onnx.export needs
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise Refused(f"the comparison needs onnx, onnxscript, onnxruntime: pip install them ({error})") from None

    class Images(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(batches)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    exported, prepared = folder / "float32.onnx", folder / "prepared.onnx"
    example = batches[0][:1].expand(2, *batches[0].shape[1:])
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter's account of its steps
        torch.onnx.export(
            copy.deepcopy(network).to(memory_format=torch.contiguous_format), (example,), exported,
            input_names=["input"], dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False,
        )  # fmt: skip
    quant_pre_process(exported, prepared)  # shapes, and BatchNorm folded where it follows a convolution
    files = {("onnxruntime float32", ""): exported}
    styles = {"QDQ": QuantFormat.QDQ, "QOperator": QuantFormat.QOperator}
    for (name, style), reduced in itertools.product(styles.items(), (False, True)):
        variant = name + ", weights of 7 bits" * reduced  # without which sums of two products overflow on AVX2
        files["onnxruntime int8", variant] = path = folder / f"{variant}.onnx"
        quantize_static(
            prepared, path, Images(), quant_format=style, per_channel=True, reduce_range=reduced,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return files


def int8_files(networks: dict, batches: list[torch.Tensor], folder: Path) -> dict[tuple, Path]:
    """{(form, variant, M, N, code): file} of the `binary_networks`: weights as bits, activations in int8."""
    files = {}
    for case, packed in networks.items():
        path = folder / "-".join(map(str, (*case, "int8.onnx")))
        abcnets.export_onnx(packed, batches[0], path, activations="int8", calibration=batches)
        files[("abcnets in int8", "", *case)] = path
    return files


def onnx_contenders(files: dict, threads: int) -> list[Contender]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    contenders = []
    for (form, variant, *case), path in files.items():
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        contenders.append(Contender(form, variant, path, functools.partial(_run_onnx, session), *case))
    return contenders


def _run_onnx(session, x):
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def accuracies(contenders: list[Contender], data) -> dict[Path, float]:
    """Percentage of the test images named rightly, by file: what shares a file differs in memory layout only."""
    percent = {}
    with tqdm(contenders, desc="accuracy", leave=False) as bar:
        for c in bar:
            if c.file not in percent:
                hits = [(c.run(x.contiguous()).argmax(1) == labels).sum() for x, labels in data.test_batches()]
                percent[c.file] = 100 * torch.stack(hits).sum().item() / len(data.test_labels)
    return percent


def milliseconds(together: list[Contender], alone: list[Contender], x, seconds: float) -> dict[str, float]:
    """Median milliseconds an image of each contender, by name; all take turns.

    alone: those with threads of their own, which spin for a while after each call. They come one by one, with pauses.
    """
    groups = [together, *([contender] for contender in alone)]
    passes, times = 5, collections.defaultdict(list)
    for _ in range(passes):
        for group in groups:
            runs = {contender.name: functools.partial(contender.run, x) for contender in group}
            share = seconds / passes * len(runs) / sum(map(len, groups))
            for name, taken in interleaved_medians(runs, share).items():
                times[name].append(taken)
            time.sleep(0.2)  # threads that wait for more work come to rest
    return {name: 1000 * statistics.median(taken) / len(x) for name, taken in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion-mnist", metavar="NAME")
    parser.add_argument("--batches", type=COUNT, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=THREADS, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=POSITIVE_OR_0, default=20.0, help="for one batch and number of threads")
    parser.add_argument("--calibrate", type=COUNT, default=2048, metavar="IMAGES", help="for int8 (default: 2048)")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="networks (default: out)")
    parser.add_argument("--results", type=Path, default=ROOT / "out/results", help="default: out/results")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="default: data")
    options = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime's quantizer recommends what is done
    parser.run(compare, options)


@torch.inference_mode()
def compare(options) -> None:
    need_engine("cpu")
    writable(options.results)
    data = load_data(options.dataset, options.data)
    if max(options.batches) > len(data.test_labels):
        raise Refused(f"--batches are at most the {len(data.test_labels)} test images, got {max(options.batches)}")
    network = load_float(data, options.out)
    runs = kept_runs(options.results, data.name, options.out)
    where, rows = {"isa": instruction_set(), **machine()}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with torch.inference_mode(False), torch.no_grad():
            torch_forms, networks = torch_contenders(network, folder), binary_networks(network, runs, options.out)
            ours = abcnets_contenders(networks, network, folder)
            batches = [batch.contiguous() for batch in data.calibration_batches(options.calibrate)]
            files = onnx_files(network, batches, folder) | int8_files(networks, batches, folder)
        percent = accuracies([*torch_forms, *ours, *onnx_contenders(files, 1)], data)
        cases = list(itertools.product(options.threads, options.batches))
        with tqdm(cases, desc="timing", unit="case", leave=False) as bar:
            for threads, batch in bar:
                torch.set_num_threads(threads)
                together, alone = torch_forms + ours, onnx_contenders(files, threads)
                x = next(data.test_batches(batch))[0].contiguous()
                times = milliseconds(together, alone, x, options.seconds)
                for c in together + alone:
                    rows.append({
                        "dataset": data.name, "form": c.form, "variant": c.variant, "M": c.M, "N": c.N,
                        "code": c.code if c.M or c.N else None,
                        "accuracy": round(percent[c.file], 2), "bytes": c.file.stat().st_size,
                        "batch": batch, "threads": threads,
                        "ms_per_image": float(f"{times[c.name]:.4g}"), **where,
                    })  # fmt: skip
                    print("batch {batch:2}, {threads} threads: {name:48} {accuracy:6.2f} % {bytes:7} bytes "
                          "{ms_per_image:8.4f} ms an image".format(name=c.name, **rows[-1]), flush=True)  # fmt: skip
    write_csv(options.results / "competitors.csv", rows)


if __name__ == "__main__":
    main()
