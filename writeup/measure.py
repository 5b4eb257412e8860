"""What the writeup says of quantization without training, measured on the pretrained nine-layer network.

    python notebooks/experiment.py pretrain --dataset fashion-mnist      once; writes out/fashion-mnist/float.pt
    python writeup/measure.py                                            minutes; writes writeup/results/

calibration.csv   test accuracy after each part of `abcnets.calibrate` alone and together, for M = N = 1, 2, 3, 5
weights.csv       squared error of the quantized weights, relative to the weights', by shifts, M and statistics
filter.csv        one filter of the first binarized layer, its two bases and their scales
"""

import argparse
import itertools
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch
from data import load_data
from runs import load_float, write_csv
from training import accuracy

import abcnets
from kernels.clock import machine
from kernels.command import COUNT, THREADS, Parser

RESULTS = HERE / "results"
IMAGES = 2048


def filter_rows(network, output: int = 1) -> list[dict]:
    """A filter (C, 3, 3), weight by weight."""
    layer = next(m for m in abcnets.convert(network, 2, None).modules() if isinstance(m, abcnets.ABCConv2d))
    W, B = layer.weight[output], layer.bases()[:, output].int()
    alphas = {f"alpha_{m + 1}": round(alpha, 5) for m, alpha in enumerate(layer.alphas()[:, output].tolist())}
    return [
        {"channel": c, "row": y, "column": x, "W": round(W[c, y, x].item(), 5),
         **{f"B_{m + 1}": base[c, y, x].item() for m, base in enumerate(B)}, **alphas}
        for c, y, x in itertools.product(*map(range, W.shape))
    ]  # fmt: skip


def weight_errors(network) -> list[dict]:
    """|W - Wq|^2 / |W - mean(W)|^2, summed over the layers that `convert` would binarize."""
    layers = [m for m in abcnets.convert(network).modules() if isinstance(m, (abcnets.ABCConv2d, abcnets.ABCLinear))]
    rows = []
    for M in range(1, 7):
        for name, shifts in (("even", abcnets.even_shifts), ("gaussian", abcnets.gaussian_shifts)):
            for per_channel in (False, True):
                lost = total = 0.0
                for layer in layers:
                    W = layer.weight.detach().double()
                    Wq = abcnets.quantize_weight(W, shifts(M).double(), per_channel)
                    mean = W.flatten(1).mean(1).view(-1, *[1] * (W.ndim - 1)) if per_channel else W.mean()
                    lost += (W - Wq).square().sum().item()
                    total += (W - mean).square().sum().item()
                statistics = "channel" if per_channel else "layer"
                rows.append({"M": M, "shifts": name, "statistics": statistics, "error": round(lost / total, 5)})
    return rows


@torch.no_grad()
def fit_part(model, images, norms: bool, thresholds: bool) -> None:
    """Only one of the two halves of `abcnets.calibrate(compensate=False)`, in the same order of layers."""
    model.eval()
    hooks, done = {}, set()

    def before_layer(layer, inputs):
        done.add(layer)
        if thresholds:
            abcnets._calibrate_layer(layer, inputs[0], wanted=None)

    def before_norm(norm, inputs):
        if norms and done:
            abcnets._calibrate_statistics(norm, inputs[0])

    for module in model.modules():
        if isinstance(module, (abcnets.ABCConv2d, abcnets.ABCLinear)):
            hooks[module] = (before_layer, None)
        elif isinstance(module, torch.nn.BatchNorm2d):
            hooks[module] = (before_norm, None)
    abcnets._run_with_hooks(model, images, hooks)


def calibrations(network, data, n: int) -> dict:
    """Test accuracy in percent with M = N = n, after each way to calibrate."""
    batches = data.calibration_batches(IMAGES)
    images = torch.cat(batches)
    ways = {
        "binarized": lambda model: None,
        "norms": lambda model: fit_part(model, images, norms=True, thresholds=False),
        "thresholds": lambda model: fit_part(model, images, norms=False, thresholds=True),
        "both": lambda model: abcnets.calibrate(model, batches, compensate=False, progress=False),
        "all": lambda model: abcnets.calibrate(model, batches, progress=False),
    }
    row = {"dataset": data.name, "M": n, "N": n, "images": IMAGES}
    for name, calibrate in ways.items():
        model = abcnets.convert(network, n, n)
        calibrate(model)
        row[name] = round(accuracy(model, data), 2)
    return row


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="where the float network is kept")
    parser.add_argument("--bases", type=COUNT, nargs="+", default=[1, 2, 3, 5], help="M = N")
    parser.add_argument("--threads", type=THREADS, help="CPU threads (default: torch's choice)")
    parser.run(measure, parser.parse_args())


def measure(options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    data = load_data("fashion-mnist")
    network = load_float(data, options.out)
    RESULTS.mkdir(exist_ok=True)
    where = machine(threads=torch.get_num_threads())
    write_csv(RESULTS / "filter.csv", filter_rows(network))
    write_csv(RESULTS / "weights.csv", [row | where for row in weight_errors(network)])
    float_accuracy = round(accuracy(network, data), 2)
    rows = []
    for n in options.bases:
        rows.append(calibrations(network, data, n) | {"float": float_accuracy} | where)
        print(rows[-1], flush=True)
        write_csv(RESULTS / "calibration.csv", rows)


if __name__ == "__main__":
    main()
