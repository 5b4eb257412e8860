"""Build the writeup: numbers, tables and figures from the results, then the PDF; and the README's opening.

    python writeup/build.py             writeup.md and the README's opening (between markers), figures/, writeup.pdf
    python writeup/build.py --check     fails if any of these is not what the results make of it; writes nothing

What is measured comes from notebooks/results, kernels/results and writeup/results, which runs wrote; the few things
that are arithmetic (the worked examples, the Gaussian's quantizers, the estimates) are computed here. A block of
text between <!-- results: NAME --> and <!-- end --> is what the function NAME below returns. A row that was never
run is said to be missing. Each figure's numbers are in figures/data.json, and each figure carries their checksum.
"""

import argparse
import csv
import hashlib
import json
import math
import re
import statistics
import sys
from pathlib import Path
from statistics import NormalDist, median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
README = ROOT / "README.md"
FIGURES = HERE / "figures"
STYLE = ROOT / "notebooks" / "abcnets.mplstyle"
MISSING = "not run"
NOT_MEASURED = "not measured yet"


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def read(path: str) -> list[dict]:
    """A CSV's rows with numbers where there are numbers and None where there is nothing; [] if there is no file."""

    def parse(text):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None

    file = ROOT / path
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [{key: parse(value) for key, value in row.items()} for row in csv.DictReader(lines)]


RUNS = read("notebooks/results/runs.csv")
SPEED = read("notebooks/results/speed.csv")
STEP = read("notebooks/results/step.csv")
MIXED = read("notebooks/results/mixed.csv")
COMPETITORS = read("notebooks/results/competitors.csv")
CALIBRATION = read("writeup/results/calibration.csv")
WEIGHTS = read("writeup/results/weights.csv")
CPU = read("kernels/results/cpu.csv")
CUDA = [row for row in read("kernels/results/cuda.csv") if row.get("us") is not None]

DATASET = "fashion-mnist"
PLANNED = [(1, 1), (2, 2), (3, 3), (5, 5), (1, 3), (3, 1), (1, None), (2, None), (3, None)]  # (M, N) of `make results`


def run_of(M, N, dataset=DATASET) -> dict | None:
    """The recorded run with these bases and no other options, of the lowest seed."""
    found = [r for r in RUNS if (r["dataset"], r["M"], r["N"], r["options"]) == (dataset, M, N, None)]
    return min(found, key=lambda row: row["seed"], default=None)


def percent(value) -> str:
    return MISSING if value is None else f"{value:.2f} %"


def table(head: list[str], rows: list[list[str]], align: str = "") -> str:
    marks = [{"l": ":--", "r": "--:", "c": ":-:"}[a] for a in (align or "l" * len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *rows])


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: the worked examples and the Gaussian
# ---------------------------------------------------------------------------------------------------------------------

A = [+1, -1, +1, +1, -1, -1, +1, -1]
W = [+1, +1, -1, +1, -1, -1, +1, +1]
PADDED = 2  # channels at the end that are padding in the second part of the example

WEIGHTS_EXAMPLE = [-1.3, -0.7, -0.4, -0.1, 0.2, 0.5, 0.8, 1.8]


def to_bits(signs) -> str:
    return "".join("1" if s > 0 else "0" for s in signs)


def bit_example() -> dict:
    """The 8-bit example, computed with integers as a machine would."""
    K = len(A)
    a, w = int(to_bits(A), 2), int(to_bits(W), 2)
    zeroed = a & ~((1 << PADDED) - 1)
    return {
        "K": K, "a": a, "w": w, "xor": a ^ w, "and": a & w,
        "count": (a ^ w).bit_count(), "count_and": (a & w).bit_count(),
        "count_a": a.bit_count(), "count_w": w.bit_count(),
        "dot": K - 2 * (a ^ w).bit_count(),
        "dot_and": 4 * (a & w).bit_count() - 2 * a.bit_count() - 2 * w.bit_count() + K,
        "padded": zeroed, "count_padded": (zeroed ^ w).bit_count(),
        "too_much": PADDED - 2 * (w & ((1 << PADDED) - 1)).bit_count(),
    }  # fmt: skip


def cut(x: list[float], shifts: list[float]) -> tuple[list[list[float]], list[float]]:
    """The bins of x between the thresholds mean - u std, and the least-squares level of each."""
    mean = sum(x) / len(x)
    std = math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1))
    thresholds = sorted(mean - u * std for u in shifts)
    bins = [[] for _ in range(len(shifts) + 1)]
    for v in x:
        bins[sum(v >= t for t in thresholds)].append(v)
    top = (sum(bins[-1]) - sum(bins[0])) / (len(bins[-1]) + len(bins[0]))
    return bins, [-top, *(sum(b) / len(b) for b in bins[1:-1]), top]


def density(x: float) -> float:
    return 0.0 if math.isinf(x) else NormalDist().pdf(x)


def below(x: float) -> float:
    return NormalDist().cdf(x) if math.isfinite(x) else float(x > 0)


def gaussian_levels(thresholds: list[float]) -> tuple[list[float], float]:
    """Cell means of a unit Gaussian between thresholds, and the squared error that is left."""
    edges = [-math.inf, *thresholds, math.inf]
    mass = [below(high) - below(low) for low, high in zip(edges, edges[1:])]
    levels = [(density(low) - density(high)) / m for low, high, m in zip(edges, edges[1:], mass)]
    return levels, 1 - sum(m * c * c for m, c in zip(mass, levels))


def gaussian_thresholds(M: int) -> list[float]:
    """Lloyd's iteration: levels are cell means, thresholds are midway between levels."""
    thresholds = [2 * (m + 0.5) / M - 1 for m in range(M)]
    for _ in range(100_000):
        levels, _ = gaussian_levels(thresholds)
        moved = [(a + b) / 2 for a, b in zip(levels, levels[1:])]
        if max(abs(a - b) for a, b in zip(moved, thresholds)) < 1e-12:
            break
        thresholds = moved
    return moved


def even_thresholds(M: int) -> list[float]:
    return [2 * m / (M - 1) - 1 for m in range(M)] if M > 1 else [0.0]


def gaussian_errors(kind) -> list[float]:
    return [gaussian_levels(kind(M))[1] for M in range(1, 7)]


# ---------------------------------------------------------------------------------------------------------------------
# Estimates
# ---------------------------------------------------------------------------------------------------------------------

# Multiply-adds a cycle of one AVX-512 core that starts two 512-bit operations a cycle (kernels/README.md).
CPU_FLOAT, CPU_INT8, CPU_BITS = 16, 64, 512 / 1.5

# Multiply-adds a clock of one multiprocessor of Hopper (kernels/README.md); the binary rates are reported or guessed.
GPU_UNITS = {
    "float32 units": 128, "popcount": 512, "TF32 tensor core": 1024, "fp16 tensor core": 2048, "int8 tensor core": 4096,
    "binary tensor core, `mma`": 17_700, "binary tensor core, `wgmma`": 32_768,
}  # fmt: skip
GPU_BYTES = 19  # a clock and multiprocessor: 4.3 TB/s at 1.7 GHz, 132 of them
TILE_PIXELS, TILE_CHANNELS, TILE_K = 128, 128, 9 * 128


def tile(bases: int, bits_out: bool) -> dict:
    """A tile of a packed 3 x 3 convolution on one multiprocessor: clocks to count and to write its result."""
    outputs = TILE_PIXELS * TILE_CHANNELS
    products = outputs * -(-TILE_K // 256) * 256 * bases**2  # an instruction takes 256 at a time
    written = outputs * bases // 8 if bits_out else 4 * outputs
    return {"products": products, "written": written, "counting": products / GPU_UNITS["binary tensor core, `mma`"],
            "writing": written / GPU_BYTES, "intensity": products / written}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of the text
# ---------------------------------------------------------------------------------------------------------------------


def bits_table() -> str:
    e = bit_example()
    products = [a * w for a, w in zip(A, W)]
    rows = [
        [name, *(f"{sign:+d}" for sign in signs), f"`{word:08b}`", note]
        for name, signs, word, note in (
            ("$a$", A, e["a"], ""), ("$w$", W, e["w"], ""), ("product", products, e["xor"], f"XOR: {e['count']} ones"),
        )
    ]  # fmt: skip
    return table(["", *(f"$c={c}$" for c in range(8)), "bits", ""], rows, "l" + "c" * 8 + "ll")


def bits_xor() -> str:
    e = bit_example()
    return f"so that $a \\cdot w = {e['K']} - 2 \\cdot {e['count']} = {e['dot']}$ here"


def bits_and() -> str:
    e = bit_example()
    counted = f"4 \\cdot {e['count_and']} - 2 \\cdot {e['count_a']} - 2 \\cdot {e['count_w']} + {e['K']}"
    return f"again ${counted} = {e['dot_and']}$ in the example"


def bits_padding() -> str:
    e = bit_example()
    return (
        f"`{e['padded']:08b}` XOR `{e['w']:08b}` has {e['count_padded']} ones, which makes "
        f"${e['K']} - 2 \\cdot {e['count_padded']} = {e['K'] - 2 * e['count_padded']}$; the padded pair added "
        f"${e['too_much']}$ of that, and taking it back leaves ${e['K'] - 2 * e['count_padded'] - e['too_much']}$, "
        "the sum over the other six"
    )


def alpha_example() -> str:
    bins, levels = cut(WEIGHTS_EXAMPLE, gaussian_thresholds(2))
    alphas = [(b - a) / 2 for a, b in zip(levels, levels[1:])]
    sources = ("$-c_2$", "mean of the bin", "(sum of bin 2 − sum of bin 0) / their number")
    rows = [
        [str(j), ", ".join(f"{v:g}" for v in values), source, f"{level:.3f}"]
        for j, (values, source, level) in enumerate(zip(bins, sources, levels))
    ]
    lines = table(["bin $j$", "weights in it", "$c_j$ is", "$c_j$"], rows, "clll")
    first, second = (f"{alpha:.3f}" for alpha in alphas)
    return f"{lines}\n\nSo $\\alpha_1 = (c_1 - c_0)/2 = {first}$ and $\\alpha_2 = (c_2 - c_1)/2 = {second}$."


def gaussian_table() -> str:
    rows = []
    for M, even, best in zip(range(1, 7), gaussian_errors(even_thresholds), gaussian_errors(gaussian_thresholds)):
        shifts = ["0"] * (M % 2) + [f"±{t:.3f}" for t in gaussian_thresholds(M) if t > 1e-9]
        real = [_weight_error(M, kind, "channel") for kind in ("even", "gaussian")]
        rows.append([str(M), ", ".join(shifts), f"{even:.3f}", f"{best:.3f}", *real])
    head = ["$M$", "best shifts", "Gaussian, even", "Gaussian, best", "network, even", "network, best"]
    return table(head, rows, "rlrrrr")


def _weight_error(M: int, shifts: str, statistics: str) -> str:
    wanted = {"M": M, "shifts": shifts, "statistics": statistics}
    found = [row["error"] for row in WEIGHTS if all(row[k] == v for k, v in wanted.items())]
    return f"{found[0]:.3f}" if found else MISSING


def per_channel_gain() -> str:
    gains = [
        1 - by["channel"] / by["layer"]
        for M in range(1, 7)
        if len(by := {r["statistics"]: r["error"] for r in WEIGHTS if (r["M"], r["shifts"]) == (M, "gaussian")}) == 2
    ]
    return f"{100 * min(gains):.0f} to {100 * max(gains):.0f} %" if gains else f"({MISSING})"


def calibration_table() -> str:
    rows = []
    for n in (1, 2, 3, 5):
        row = next((r for r in CALIBRATION if r["M"] == r["N"] == n), {})
        ways = ("binarized", "norms", "thresholds", "both", "all")
        rows.append([str(n), *(percent(row.get(way)).removesuffix(" %") for way in ways)])
    head = ["$M = N$", "as it falls", "BatchNorm alone", "thresholds alone", "both", "and weights moved"]
    return table(head, rows, "rrrrrr")


def calibration_about() -> str:
    if not CALIBRATION:
        return f"The measurement was {MISSING}."
    row = CALIBRATION[0]
    return (
        f"Test accuracy in percent, nine-layer network on Fashion-MNIST, {row['images']} training images without their "
        f"labels, no training; float {row['float']:.2f}. Measured with {row['versions']}."
    )


def accuracy_table() -> str:
    rows = []
    for M, N in [(None, None), *PLANNED]:
        run = run_of(M, N) or {}
        bases = ["float" if b is None else str(b) for b in (M, N)]
        trained = percent(run.get("accuracy"))
        if run:
            trained = f"{trained} ({run['epochs']})" if run["epochs"] else "not trained"
        before = [percent(run.get(key)) if M or N else "" for key in ("binarized", "calibrated")]
        size = f"{run['packed_bytes'] / 1000:.0f} kB" if run else MISSING
        rows.append([*bases, *before, trained, size])
    head = ["$M$", "$N$", "binarized", "calibrated", "trained (epochs)", "file"]
    return table(head, rows, "rrrrrr")


def accuracy_words() -> str:
    reference = run_of(None, None)
    done = [(run["accuracy"], M, N, run) for M, N in PLANNED if N and (run := run_of(M, N))]
    if not reference or not done:
        return f"The runs of this comparison were {MISSING} yet."
    best, M, N, run = max(done, key=lambda item: item[:2])
    return (
        f"The float network reaches {reference['accuracy']:.2f} %. The best network with both sides binary, $M = {M}$ "
        f"and $N = {N}$, reaches {best:.2f} % {trained_for(run)}, {reference['accuracy'] - best:.2f} points "
        f"below it, in {run['packed_bytes'] / 1000:.0f} kB instead of {reference['float_bytes'] / 1000:.0f} kB."
    )


def accuracy_of(M, N) -> str:
    run = run_of(M, N)
    return f"{run['accuracy']:.2f} %" if run else f"({MISSING})"


def accuracy_33() -> str:
    return accuracy_of(3, 3)


def accuracy_float() -> str:
    return accuracy_of(None, None)


def weights_only() -> str:
    reference = run_of(None, None)
    runs = {M: run for M, N in PLANNED if not N and (run := run_of(M, N))}
    if not reference or not runs:
        return f"Those rows were {MISSING} yet."
    losses = [
        f"{reference['accuracy'] - run['accuracy']:.2f} points at $M = {M}$ {trained_for(run)}"
        for M, run in runs.items()
    ]
    return f"They lose {', '.join(losses)}."


def trained_for(run: dict) -> str:
    epochs = run["epochs"]
    return f"after {epochs} epoch{'s' * (epochs > 1)}" if epochs else "calibrated, not trained"


def cifar_table() -> str:
    runs = [r for r in RUNS if r["dataset"] == "cifar10-jpeg" and r["seed"] == 0 and not r["options"]]
    if not runs:
        return f"These rows were {MISSING} yet."
    rows = []
    for run in sorted(runs, key=lambda run: (run["M"] or 9, run["N"] or 9)):
        bases = ["float" if run[side] is None else str(run[side]) for side in "MN"]
        before = [percent(run[key]) if run["M"] or run["N"] else "" for key in ("binarized", "calibrated")]
        trained = f"{percent(run['accuracy'])} ({run['epochs']})" if run["epochs"] else "not trained"
        rows.append([*bases, *before, trained, f"{run['packed_bytes'] / 1000:.0f} kB"])
    return table(["$M$", "$N$", "binarized", "calibrated", "trained (epochs)", "file"], rows, "rrrrrr")


KINDS = ("uniform", "mixed")


def mixed_table() -> str:
    if not MIXED:
        return f"These were {MISSING} yet."
    rows = [
        [r["dataset"], f"$M = N = {r['uniform']}$", *(f"{r[f'{kind}_bytes'] / 1000:.0f} kB" for kind in KINDS),
         *(percent(r[f"{kind}_accuracy"]) for kind in KINDS)]
        for r in MIXED
    ]  # fmt: skip
    head = ["data", "budget", "bytes, uniform", "bytes, mixed", "accuracy, uniform", "accuracy, mixed"]
    return table(head, rows, "llrrrr")


ABLATED = {"calibrate=512", "limit=6000", "float-seed=0"}  # what all runs of `make ablation` have in common
CHOICES = {
    frozenset(): "as by default",
    frozenset(["per-layer"]): "one mean, std and $\\alpha$ a layer instead of a channel",
    frozenset(["even-shifts"]): "even shifts instead of Gaussian ones",
    frozenset(["learn-shifts"]): "shifts learned too",
    frozenset(["scale-gradient"]): "$\\partial L/\\partial W$ times $\\sum_m \\alpha_m$",
    frozenset(["distill=0"]): "no float teacher",
    frozenset(["calibrate=0"]): "not calibrated",
}


def ablation_table() -> str:
    accuracies = {}
    for run in RUNS:
        options = set((run["options"] or "").split())
        if "limit=6000" in options and run["M"] == run["N"] == 2:
            accuracies.setdefault(frozenset(options - ABLATED), []).append(run)
    rows = []
    for options, name in CHOICES.items():
        if runs := accuracies.get(options):
            last, start = [run["accuracy"] for run in runs], runs[0]["calibrated"]
            spread = f"{min(last):.2f} to {max(last):.2f}"
            before = percent(runs[0]["binarized"] if start is None else start)
            rows.append([name, before, f"{statistics.mean(last):.2f} %", spread, str(len(runs))])
    if not rows:
        return f"These runs were {MISSING} yet."
    return table(["choice", "before training", "trained, mean", "lowest and highest", "seeds"], rows, "lrrrr")


def competitors() -> list[dict]:
    """Each form of the network once: name, M, N, accuracy, bytes, and ms an image by (batch, threads).

    A form is shown by its most accurate variant; of equally accurate ones, each case by the fastest.
    """
    forms = {}
    for row in COMPETITORS:
        forms.setdefault((row["form"], row["M"], row["N"]), []).append(row)
    shown = []
    for (name, M, N), rows in forms.items():
        best = max(row["accuracy"] for row in rows)
        rows = [row for row in rows if row["accuracy"] == best]
        ms = {}
        for row in rows:
            case = row["batch"], row["threads"]
            ms[case] = min(row["ms_per_image"], ms.get(case, math.inf))
        shown.append({"name": name, "M": M, "N": N, "accuracy": best, "bytes": min(r["bytes"] for r in rows), "ms": ms})
    return shown


def competitors_table() -> str:
    if not COMPETITORS:
        return f"The comparison was {MISSING} yet (`python notebooks/compare.py`)."
    cases = sorted({case for form in competitors() for case in form["ms"]}, key=lambda case: (case[1], case[0]))
    rows = []
    for form in competitors():
        bases = f", $M = {form['M'] or 'float'}$, $N = {form['N'] or 'float'}$" if form["M"] or form["N"] else ""
        bases = re.sub(r"\$(\w) = float\$", r"$\1$ float", bases)
        times = [f"{form['ms'][case]:.3f}" if case in form["ms"] else MISSING for case in cases]
        rows.append([form["name"] + bases, f"{form['accuracy']:.2f} %", f"{form['bytes'] / 1000:.0f} kB", *times])
    head = ["form", "accuracy", "file", *(f"{batch} image{'s' * (batch > 1)}, {n} thr." for batch, n in cases)]
    return table(head, rows, "lrr" + "r" * len(cases))


def competitors_about() -> str:
    if not COMPETITORS:
        return f"Measured on: {MISSING}."
    row = COMPETITORS[0]
    return f"Measured on {row['hardware']}; {row['versions']}."


def competitors_words() -> str:
    """Which of ours are faster than int8 on as many threads or fewer, as it suits int8, and what int8 keeps."""
    forms = competitors()
    int8 = next((form for form in forms if form["name"] == "onnxruntime int8"), None)
    ours = [form for form in forms if form["name"] == "abcnets" and form["N"]]
    if not int8 or not ours:
        return f"A comparison with int8 was {MISSING} yet."
    faster = [
        f"$M = {form['M']}$, $N = {form['N']}$ in batches of {batch} on {threads} thread{'s' * (threads > 1)}"
        for form in ours for (batch, threads), ms in form["ms"].items()
        if ms < min(time for (size, count), time in int8["ms"].items() if size == batch and count <= threads)
    ]  # fmt: skip
    return (
        f"For this network int8 is hard to beat: onnxruntime keeps {int8['accuracy']:.2f} % in "
        f"{int8['bytes'] / 1000:.0f} kB, and of the binary networks "
        + (f"only these are faster: {'; '.join(faster)}." if faster else "none is faster.")
    )


def opening() -> str:
    """The README's claim: the most accurate network of each kind beside float32 and int8, ResNet-18, the figure."""
    forms = competitors()
    by_name = {form["name"]: form for form in forms if form["name"] != "abcnets"}
    ours = [form for form in forms if form["name"] == "abcnets" and form["M"] and form["N"]]
    if not ours or not {"torch float32", "onnxruntime int8"} <= by_name.keys():
        return f"The comparison with float32 and int8 was {MISSING} yet (`python notebooks/compare.py`)."
    reference, int8, best = by_name["torch float32"], by_name["onnxruntime int8"], max(ours, key=_accuracy)
    claim = [
        "Networks whose convolutions are sums of a few ±1 convolutions, in small files. The nine-layer network on "
        f"Fashion-MNIST reaches **{best['accuracy']:.2f} % in {_kB(best)}** with {_bases(best)}, where float32 reaches "
        f"{reference['accuracy']:.2f} % in {_kB(reference)} ([every row](notebooks/results/competitors.csv))."
    ]
    weights = [form for form in forms if form["name"] == "abcnets" and not form["N"]]
    if weights:
        form = max(weights, key=_accuracy)
        claim.append(f"Binary weights alone, M = {form['M']}, reach {form['accuracy']:.2f} % in {_kB(form)}.")
    speeds = resnet_speeds(1)
    if speeds:
        claim.append(
            f"With one base a side ResNet-18 runs {min(speeds):.1f} to {max(speeds):.1f} times as fast as in torch's "
            "best float32 on a CPU ([measured](kernels/README.md#whole-networks))."
        )
    fewest = min(threads for _, threads in int8["ms"])
    words = []
    for batch in sorted(batch for batch, threads in int8["ms"] if threads == fewest):
        faster = [_bases(form) for form in ours if form["ms"][batch, fewest] < int8["ms"][batch, fewest]]
        how = "one image at a time" if batch == 1 else f"in batches of {batch}"
        words.append(f"than all of these but {' and '.join(faster)} {how}" if faster else f"than all of these {how}")
    claim.append(
        f"int8 is the rival to beat: onnxruntime's keeps {int8['accuracy']:.2f} % in {_kB(int8)}, and with this small "
        f"network on {fewest} thread{'s' * (fewest > 1)} it is faster {' and '.join(words)} "
        "([when not to use this](writeup/writeup.md#7-when-not-to-use-this))."
    )
    picture = "![Accuracy against file size and time an image, with float and int8](writeup/figures/competitors.svg)"
    caption = (
        "*Test accuracy against the size of the file, its header included, and the time an image takes "
        f"({COMPETITORS[0]['hardware']}). Labels are M, N; open marks are calibrated, not trained. Measured by "
        "[`compare.py`](notebooks/compare.py), drawn by [`build.py`](writeup/build.py).*"
    )
    return "\n\n".join([" ".join(claim), picture, caption])


def _accuracy(form) -> float:
    return form["accuracy"]


def _kB(form) -> str:
    return f"{form['bytes'] / 1000:.0f} kB"


def _bases(form) -> str:
    M, N = form["M"], form["N"]
    return f"M = N = {M}" if M == N else f"M = {M}, N = {N}"


def resnet_speeds(bases: int) -> list[float]:
    """Times float32's speed of packed ResNet-18, the fastest form of each batch and number of threads."""
    best = {}
    for row in SPEED:
        if row["network"] == "ResNet-18" and row["bases"] == bases and "bits between layers" in row["form"]:
            case = row["batch"], row["threads"]
            best[case] = max(row["times_float32"], best.get(case, 0))
    return list(best.values())


def machine_of_runs() -> str:
    run = run_of(None, None)
    return f"{run['hardware']}, {run['versions']}" if run else MISSING


def step_words() -> str:
    if not STEP:
        return f"What a training step costs is {NOT_MEASURED}."
    parts = [
        f"{row['ratio']:.2f} times the time and {row['memory_ratio']:.2f} times the memory "
        f"in {'mixed precision' if row['precision'] == 'mixed' else row['precision']}"
        for row in STEP
    ]
    row = STEP[0]
    return (
        f"Against the float network's, a training step at $M = {row['M']}$, $N = {row['N']}$ and batch "
        f"{row['batch_size']} takes {' and '.join(parts)} ({row['hardware']})."
    )


def cpu_estimate() -> str:
    rows = [
        ["float32, fused multiply-add", f"{CPU_FLOAT}", "1"],
        ["int8, dot product into int32", f"{CPU_INT8}", f"{CPU_INT8 / CPU_FLOAT:g}"],
        ["bits: XOR, popcount, add", f"512 / 1.5 = {CPU_BITS:.0f}", f"{CPU_BITS / CPU_FLOAT:.1f} / ($M N$)"],
    ]
    return table(["arithmetic", "products a cycle", "against float32"], rows, "lrr")


def cpu_estimate_words() -> str:
    limits = CPU_BITS // CPU_FLOAT, CPU_BITS // CPU_INT8
    return f"bits beat float32 up to $M N = {limits[0]:.0f}$ and int8 up to $M N = {limits[1]:.0f}$."


def cpu_medians(contender: str, column: str, threads: int) -> dict[int, float]:
    """{M = N: median over the 3 x 3 convolutions}"""
    rows = [r for r in CPU if r["contender"] == contender and r["K"] == 3 and r["threads"] == threads]
    return {n: median(r[column] for r in rows if r["bases"] == n) for n in sorted({r["bases"] for r in rows})}


def cpu_threads() -> list[int]:
    return sorted({row["threads"] for row in CPU})


def cpu_table() -> str:
    if not CPU:
        rows = [[what, "1", *[NOT_MEASURED] * 4] for what in ("floats in and out", "bits in and out")]
        return table(["3 × 3 convolutions", "threads", *(f"$M=N={n}$" for n in (1, 2, 3, 5))], rows, "lrrrrr")
    bases = sorted({row["bases"] for row in CPU if row["bases"]})
    rows = []
    for contender, what in (("packed", "floats in and out"), ("words", "bits in and out")):
        for threads in cpu_threads():
            columns = ("times_float32", "times_int8", "share_of_bound")
            times = {column: cpu_medians(contender, column, threads) for column in columns}
            cells = [
                f"{times['times_float32'][n]:.2f} / {times['times_int8'][n]:.2f} ({times['share_of_bound'][n]:.0%})"
                for n in bases
            ]
            rows.append([what, str(threads), *cells])
    return table(["3 × 3 convolutions", "threads", *(f"$M=N={n}$" for n in bases)], rows, "lrrrrr"[: 2 + len(bases)])


def cpu_about() -> str:
    if not CPU:
        return f"The CPU ladder was {MISSING} yet; `python -m kernels.bench` fills this table and Figure 4."
    row = CPU[0]
    count = len({tuple(r[k] for k in ("C", "O", "K", "size", "stride", "B")) for r in CPU if r["K"] == 3})
    return (
        f"Times as fast as the faster float32 layout / as the fastest int8 engine (share of the bound), medians over "
        f"{count} shapes. {row['cpu']}, {row['clock_ghz']:.2f} GHz; one core counts at most {row['bound_tops']:.2f} T "
        f"products a second, measured. torch {row['torch']}, Numba {row['numba']}."
    )


def crossover(column: str) -> int | None:
    """The largest measured M N at which bits, with float input and output, still win on the fewest threads."""
    medians = cpu_medians("packed", column, min(cpu_threads())) if CPU else {}
    return max((n * n for n, times in medians.items() if times >= 1), default=None)


def cpu_crossover() -> str:
    if not CPU:
        return f"Where bits stop winning is {NOT_MEASURED}."
    limits = [crossover(column) for column in ("times_float32", "times_int8")]
    words = [f"up to $M N = {limit}$" if limit else "at none of the measured $M N$" for limit in limits]
    return (
        f"Measured on {min(cpu_threads())} thread with floats in and out, bits win against float32 {words[0]} and "
        f"against int8 {words[1]}, of the $M N$ in the table."
    )


def cpu_int8_advice() -> str:
    if not CPU:
        return f"Whether it comes out so is {NOT_MEASURED}."
    medians = cpu_medians("packed", "times_int8", min(cpu_threads()))
    times = ", ".join(f"{times:.2f} at $M = N = {n}$" for n, times in medians.items())
    return f"Measured, as times the speed of int8: {times}."


def network_table() -> str:
    rows = [row for row in SPEED if row["form"] == "packed, bits between layers"]
    if not rows:
        return f"Whole networks were {MISSING} yet (`python notebooks/speed.py`)."
    counts = sorted({row["bases"] for row in rows})
    keys = list(dict.fromkeys((row["network"], row["batch"], row["threads"]) for row in rows))
    cells = []
    for key in keys:
        same = [row for row in SPEED if (row["network"], row["batch"], row["threads"]) == key]
        best = min(row["milliseconds"] for row in same if row["form"].startswith("float32"))
        times = {row["bases"]: row["times_float32"] for row in same if row["form"] == "packed, bits between layers"}
        speeds = (f"{times[n]:.2f}" if n in times else MISSING for n in counts)
        cells.append([*map(str, key), f"{best:.2f} ms", *speeds])
    head = ["network", "batch", "threads", "float32, best form", *(f"$M=N={n}$" for n in counts)]
    return table(head, cells, "l" + "r" * (3 + len(counts)))


def gpu_estimate() -> str:
    fp16 = GPU_UNITS["fp16 tensor core"]
    bits = GPU_UNITS["binary tensor core, `mma`"]
    status = {"binary tensor core, `mma`": "reported, unconfirmed", "binary tensor core, `wgmma`": "a guess: 8 × int8"}
    rows = [
        [name, f"{rate:,}".replace(",", " "), f"{rate / fp16:.2g}",
         "" if rate >= bits or name == "popcount" else f"{bits / rate:.3g}", status.get(name, "vendor's tables")]
        for name, rate in GPU_UNITS.items()
    ]  # fmt: skip
    head = ["unit", "multiply-adds a clock", "against fp16", "bits win below $M N$", "source"]
    return table(head, rows, "lrrrl")


def gpu_tile() -> str:
    rows = []
    for bases in (1, 2, 3):
        floats, bits = tile(bases, False), tile(bases, True)
        rows.append([str(bases), f"{floats['counting']:.0f}", f"{floats['writing']:.0f}", f"{bits['writing']:.0f}"])
    return table(["$M = N$", "counting", "writing floats", "writing bits"], rows, "rrrr")


def gpu_measured() -> str:
    if not CUDA:
        return (
            "**Not measured yet.** The kernels compile, and pass their tests in Numba's simulator; no claim about "
            "their speed is made here. `python -m kernels.bench --device cuda` checks and measures them."
        )
    first = CUDA[0]
    ladder = [row for row in CUDA if row["section"] == "ladder"]
    rows = [
        [f"`{row['method']}`", str(row["M"] or "float"), f"{row['us']:.1f}",
         f"{row['ops_per_s'] / 1e12:.3g}" if row.get("ops_per_s") else ""]
        for row in ladder
    ]  # fmt: skip
    return (
        f"Measured on {first['device']}: one layer, 3 × 3, 128 to 128 channels, 32 images of 28 × 28. All of it is in "
        "[kernels/README.md](../kernels/README.md#cuda).\n\n" + table(["rung", "$M = N$", "µs", "T op/s"], rows, "lrrr")
    )


def references() -> str:
    """What GitHub shows; the PDF has its own from the same file."""
    lines = []
    for key, entry in bibliography().items():
        where = entry.get("booktitle") or entry.get("journal") or entry.get("institution") or entry.get("howpublished")
        authors = _authors(entry["author"])
        year = f", {entry['year']}" if "year" in entry else ""
        lines.append(f"- **{key}**: {authors}. [{_plain(entry['title'])}]({entry['url']}). {_plain(where)}{year}.")
    return "\n".join(lines)


def bibliography() -> dict[str, dict]:
    entries = {}
    for key, body in re.findall(r"@\w+\{(\w+),\n(.*?)\n\}", (HERE / "references.bib").read_text(), re.S):
        entries[key] = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M))
    return dict(sorted(entries.items(), key=lambda item: (item[1].get("year", "9"), item[0])))


def _plain(text: str) -> str:
    return text.replace("{", "").replace("}", "")


def _authors(text: str) -> str:
    names = [_plain(name).split(", ")[0] for name in text.split(" and ")]
    if len(names) > 3 or "others" in names:
        return f"{names[0]} et al."
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


BLOCKS = (
    bits_table, bits_xor, bits_and, bits_padding, alpha_example, gaussian_table, per_channel_gain, calibration_table,
    calibration_about, accuracy_table, accuracy_words, accuracy_33, accuracy_float, cifar_table, ablation_table,
    mixed_table,
    machine_of_runs,
    step_words, weights_only, cpu_estimate, cpu_estimate_words, cpu_table, cpu_about, cpu_crossover,
    cpu_int8_advice, network_table, gpu_estimate, gpu_tile, gpu_measured, competitors_table, competitors_about,
    competitors_words, references,
)  # fmt: skip


def inject(text: str) -> str:
    """The text with every block made anew. Raises ValueError for a name that no function has."""
    functions = {function.__name__: function for function in (*BLOCKS, opening)}

    def fill(match):
        name, old = match.group(1), match.group(2)
        if name not in functions:
            raise ValueError(f"there is a block {name!r}, which build.py does not know")
        new = functions[name]()
        return f"<!-- results: {name} -->" + (f"\n\n{new}\n\n" if "\n" in old else new) + "<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->(.*?)<!-- end -->", fill, text, flags=re.S)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def figure_data() -> dict:
    """The numbers of each figure, as plain JSON: {figure: data}."""
    M = 5
    thresholds = gaussian_thresholds(M)
    runs = [
        {"M": m, "N": n, "kB": run["packed_bytes"] / 1000, "accuracy": run["accuracy"], "calibrated": run["calibrated"]}
        for m, n in [(None, None), *PLANNED] if (run := run_of(m, n))
    ]  # fmt: skip
    fewest = min((row["threads"] for row in COMPETITORS), default=1)
    forms = [
        {**form, "ms": {str(batch): ms for (batch, threads), ms in form["ms"].items() if threads == fewest},
         "calibrated": (run_of(form["M"], form["N"]) or {}).get("calibrated") if form["name"] == "abcnets" else None}
        for form in competitors()
    ]  # fmt: skip
    measured = {
        str(threads): {contender: cpu_medians(contender, "times_float32", threads) for contender in ("packed", "words")}
        for threads in cpu_threads()
    }
    int8 = {}
    for threads in cpu_threads():
        rows = [r for r in CPU if r["K"] == 3 and r["threads"] == threads and r["contender"].startswith("int8")]
        shapes = {}
        for r in rows:
            shapes.setdefault(tuple(r[k] for k in ("C", "O", "size", "stride", "B")), []).append(r["times_float32"])
        int8[str(threads)] = median(max(times) for times in shapes.values()) if shapes else None
    return _rounded({
        "bits": {"a": A, "w": W},
        "levels": {"M": M, "thresholds": thresholds, "levels": gaussian_levels(thresholds)[0],
                   "even_thresholds": even_thresholds(M), "even_levels": gaussian_levels(even_thresholds(M))[0],
                   "even": gaussian_errors(even_thresholds), "best": gaussian_errors(gaussian_thresholds)},
        "threshold": {"scales": [1.5, -1.2], "shifts": [0.3, 0.5], "mean": 0.2, "std": 1.1, "thresholds": [0.4, 1.2]},
        "accuracy": {"runs": runs},
        "competitors": {"forms": forms, "threads": fewest},
        "speed": {"estimate": CPU_BITS / CPU_FLOAT, "int8_estimate": CPU_INT8 / CPU_FLOAT, "measured": measured,
                  "int8": int8},
        "roofline": {"roof": GPU_UNITS, "bytes": GPU_BYTES,
                     "tiles": {f"{n} {out}": tile(n, out == "bits")["intensity"] for n in (1, 2, 3)
                               for out in ("floats", "bits")}},
    })  # fmt: skip


def _rounded(value):
    """As JSON has it, floats to six digits, so that the last bits of a machine's arithmetic make no difference."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def checksum(data) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw_bits(plt, data):
    a, w = data["a"], data["w"]
    rows = [("a", a), ("w", w), ("product", [x * y for x, y in zip(a, w)])]
    fig, ax = plt.subplots(figsize=(7, 1.9))
    for y, (name, signs) in enumerate(rows):
        height = -1.15 * y - (0.35 if y == 2 else 0)
        ax.text(-0.35, height + 0.45, name, ha="right", va="center", fontsize=11)
        for x, sign in enumerate(signs):
            face, ink = ("#0072B2", "white") if sign > 0 else ("#F3F3F3", "#333333")
            ax.add_patch(plt.Rectangle((x, height), 0.92, 0.92, facecolor=face, edgecolor="#777777", linewidth=0.8))
            ax.text(x + 0.46, height + 0.45, f"{sign:+d}".replace("-", "−"), ha="center", va="center", color=ink)
    flips = sum(s < 0 for s in rows[2][1])
    ax.text(8.25, -2.2, f"{8 - flips} × (+1) + {flips} × (−1) = {8 - 2 * flips}", va="center")
    ax.text(8.25, 0.45, "blue: bit 1", va="center", color="#0072B2")
    ax.text(8.25, -0.7, "grey: bit 0", va="center", color="#555555")
    ax.set(xlim=(-1.6, 12.2), ylim=(-2.8, 1.0), aspect="equal")
    ax.axis("off")
    return fig


def draw_levels(plt, data):
    fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.9), width_ratios=(1.25, 1))
    xs = [-3 + 6 * i / 600 for i in range(601)]
    left.fill_between(xs, [4 * density(x) - 2.2 for x in xs], -2.2, color="#DDDDDD", linewidth=0, label="Gaussian")
    kinds = (("", "Gaussian shifts", "#0072B2", "-"), ("even_", "even shifts", "#E69F00", "--"))
    for prefix, label, color, style in kinds:
        ys = [data[prefix + "levels"][sum(x >= t for t in data[prefix + "thresholds"])] for x in xs]
        left.plot(xs, ys, color=color, linestyle=style, label=label)
    left.plot([-2.2, 2.2], [-2.2, 2.2], color="#333333", linewidth=0.7, linestyle=":")
    left.set(
        xlabel="weight, in standard deviations",
        ylabel="its level",
        ylim=(-2.2, 2.2),
        title=f"M = {data['M']}: {data['M'] + 1} levels",
    )
    left.legend(loc="upper left", fontsize=8)
    counts = list(range(1, len(data["best"]) + 1))
    right.plot(counts, data["even"], "--s", color="#E69F00", label="even shifts")
    right.plot(counts, data["best"], "-o", color="#0072B2", label="Gaussian shifts")
    right.set(xlabel="weight bases M", yscale="log", title="squared error left", xticks=counts)
    right.set_yticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
    right.minorticks_off()
    right.legend(fontsize=8)
    return fig


def draw_threshold(plt, data):
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.7), sharey=True)
    xs = [-3 + 6 * i / 300 for i in range(301)]
    for ax, scale, shift in zip(axes, data["scales"], data["shifts"]):

        def f(x, scale=scale, shift=shift):
            return max(0.0, scale * (x - data["mean"]) / data["std"] + shift)

        ax.plot(xs, [f(x) for x in xs], color="#0072B2")
        for t, style, height in zip(data["thresholds"], ("--", ":"), (2.55, 3.1)):
            at = (t - shift) * data["std"] / scale + data["mean"]
            ax.plot([-3, at] if scale > 0 else [at, 3], [t, t], color="#999999", linewidth=0.9, linestyle=style)
            ax.plot([at, at], [0, height], color="#D55E00", linestyle=style)
            words = f"R ≥ {t:g}: x {'≥' if scale > 0 else '≤'} {at:.2f}".replace("-", "−")
            ax.text(at - 0.08 if scale > 0 else at + 0.08, height, words, fontsize=8, color="#A04000", va="top",
                    ha="right" if scale > 0 else "left")  # fmt: skip
        ax.set(xlabel="x, what the convolution puts out", title=f"BatchNorm's scale {scale:+g}".replace("-", "−"),
               xlim=(-3, 3), ylim=(0, 3.5))  # fmt: skip
    axes[0].set_ylabel("R = ReLU(BatchNorm(x))")
    return fig


def draw_accuracy(plt, data):
    fig, ax = plt.subplots(figsize=(7, 3.2))
    kinds = (("binary weights and activations", "#0072B2", "o"), ("binary weights, float activations", "#E69F00", "s"),
             ("float", "#333333", "D"))  # fmt: skip
    shown = set()
    for run in data["runs"]:
        label, color, marker = kinds[2 if run["M"] is None else 1 if run["N"] is None else 0]
        ax.plot(run["kB"], run["accuracy"], marker, color=color, markersize=6, linestyle="none",
                label=None if label in shown else label)  # fmt: skip
        shown.add(label)
        name = "float" if run["M"] is None else f"{run['M']}, {run['N'] or 'float'}"
        left, below = run["N"] is None and run["M"] is not None, run["N"] not in (None, run["M"])  # of its neighbours
        ax.annotate(name, (run["kB"], run["accuracy"]), (-5 if left else 5, -10 if below else 4), fontsize=8,
                    textcoords="offset points", ha="right" if left else "left")  # fmt: skip
        if run["calibrated"] is not None and run["calibrated"] >= 80:
            ax.plot(run["kB"], run["calibrated"], marker, color=color, markersize=5, fillstyle="none", linestyle="none")
            ax.plot([run["kB"]] * 2, [run["calibrated"], run["accuracy"]], color=color, linewidth=0.7, linestyle=":")
    ax.set(xscale="log", xlabel="size of the packed file, kB", ylabel="test accuracy, %")
    sizes = [20, 50, 100, 200, 500, 1000]
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.set_xlim(20, 1200)
    ax.margins(y=0.12)
    if shown:
        ax.legend(fontsize=8, loc="lower right")
    return fig


def draw_competitors(plt, data):
    forms, threads = data["forms"], data["threads"]
    batches = sorted({int(batch) for form in forms for batch in form["ms"]}) or [1]
    fig, axes = plt.subplots(1, 1 + len(batches), figsize=(3.1 * (1 + len(batches)), 4.6), sharey=True, layout="none")
    fig.subplots_adjust(left=0.065, right=0.975, bottom=0.2, top=0.72, wspace=0.1)
    kinds = {
        "torch": ("#777777", "D", "torch"), "onnxruntime": ("#333333", "s", "onnxruntime"),
        "abcnets": ("#0072B2", "o", "abcnets, both sides binary (M, N)"),
        "weights": ("#D55E00", "^", "abcnets, binary weights alone (M)"),
    }  # fmt: skip
    worlds = [lambda form: form["bytes"] / 1000, *(lambda form, b=b: form["ms"][str(b)] for b in batches)]
    labels = ["size of the file, kB", *(f"ms an image, {b} at a time" if b > 1 else "ms an image, one at a time"
                                        for b in batches)]  # fmt: skip
    axes[0].set_ylabel("test accuracy, %")
    if not forms:
        axes[0].text(0.5, 0.5, "not measured yet", transform=axes[0].transAxes, color="#A04000", ha="center")
        return fig
    low, high = (limit(form["accuracy"] for form in forms) for limit in (min, max))
    axes[0].set_ylim(low - 0.6, high + 0.35)
    for ax, place, label in zip(axes, worlds, labels):
        ax.set(xscale="log", xlabel=label)
        _nice_log_ticks(ax, [place(form) for form in forms])
        points = []
        for form in forms:
            color, marker, _ = kinds[_kind(form)]
            ax.plot(place(form), form["accuracy"], marker, color=color, linestyle="none", markersize=6, zorder=3)
            points.append((place(form), form["accuracy"], _form_label(form), color))
            if form["calibrated"] and form["calibrated"] > low - 0.6:
                ax.plot([place(form)] * 2, [form["calibrated"], form["accuracy"]], ":", color=color, linewidth=0.8)
                ax.plot(place(form), form["calibrated"], marker, color=color, fillstyle="none", markersize=5)
                rise = form["accuracy"] - form["calibrated"]
                points += [(place(form), form["calibrated"] + rise * i / 8, "", color) for i in range(8)]
        _label_points(ax, points)
    used = {_kind(form) for form in forms}
    handles = [plt.Line2D([], [], color=color, marker=marker, linestyle="none", label=name)
               for kind, (color, marker, name) in kinds.items() if kind in used]  # fmt: skip
    fig.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=9, handletextpad=0.2)
    fig.suptitle(f"Nine-layer network on Fashion-MNIST, {threads} CPU thread{'s' * (threads > 1)}", fontsize=11, y=0.99)
    return fig


def _kind(form) -> str:
    return "weights" if form["name"] == "abcnets" and not form["N"] else form["name"].split()[0]


def _form_label(form) -> str:
    if form["name"] != "abcnets":
        return form["name"]
    return f"{form['M'] or 'float'}, {form['N']}" if form["N"] else f"{form['M']}"


def _nice_log_ticks(ax, xs) -> None:
    """Limits that leave room on both sides, and ticks at 1, 2, 5 times powers of ten, written out."""
    if not xs:
        return
    low, high = min(xs), max(xs)
    margin = max(0.12 * math.log(high / low), 0.15)
    low, high = low / math.exp(1.4 * margin), high * math.exp(1.6 * margin)
    ticks = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ax.set_xlim(low, high)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def _label_points(ax, points) -> None:
    """Long names on a slant above the axes, a thin line to each point; short ones beside their points."""
    low, high = (math.log(x) for x in ax.get_xlim())
    named = sorted(point for point in points if len(point[2]) > 8)
    places = _spread([(math.log(x) - low) / (high - low) - 0.04 for x, *_ in named], 0.1, 0.0, 0.76)
    for (x, y, name, color), place in zip(named, places):
        ax.annotate(name, (x, y), (place, 1.04), textcoords="axes fraction", rotation=38, rotation_mode="anchor",
                    ha="left", va="bottom", fontsize=9, color=color,
                    arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 4, "shrinkA": 0,
                                "relpos": (0, 0)})  # fmt: skip
    pixels = 72 / ax.figure.dpi  # in points from here on
    at = [tuple(pixels * ax.transData.transform((x, y))) for x, y, *_ in points]
    (left, _), (right, _) = pixels * ax.transAxes.transform([(0, 0), (1, 1)])
    taken = [(left - 99, 0, left + 2, 999), (right, 0, right + 99, 999)]
    taken += [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    for (x, y), point, (_, _, name, color) in zip(at, points, points):
        width = 5.5 * len(name)
        beside = [(6, -3.5), (-6 - width, -3.5), (-width / 2, 6), (-width / 2, -14), (5, 4), (5, -12)]
        if 0 < len(name) <= 8:
            boxes = [(x + dx, y + dy, x + dx + width, y + dy + 8) for dx, dy in beside]
            best = min(range(len(boxes)), key=lambda i: sum(_overlap(boxes[i], other) for other in taken))
            taken.append(boxes[best])
            ax.annotate(name, point[:2], beside[best], textcoords="offset points", fontsize=9, color=color)


def _overlap(a, b) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Rising positions near the wanted ones, at least `gap` apart, between low and high where they fit."""
    places = []
    for want in wanted:
        places.append(max(want, low, places[-1] + gap if places else low))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else high)
    return places


def draw_speed(plt, data):
    fig, ax = plt.subplots(figsize=(7, 3.2))
    products = [1 + 29 * i / 200 for i in range(201)]
    ax.plot(products, [data["estimate"] / p for p in products], color="#333333", linestyle="--", linewidth=1.3,
            label="bits, estimate")  # fmt: skip
    ax.axhline(data["int8_estimate"], color="#009E73", linestyle=":", label="int8, estimate")
    ax.axhline(1, color="#777777", linewidth=0.9)
    ax.text(28, 1.05, "float32", fontsize=8, color="#555555", ha="right")
    marks = iter((("#0072B2", "o", "-"), ("#56B4E9", "s", "-"), ("#D55E00", "^", "-."), ("#E69F00", "v", "-.")))
    names = {"packed": "floats in and out", "words": "bits in and out"}
    for contender, name in names.items():
        for threads, contenders in data["measured"].items():
            color, marker, style = next(marks, ("#333333", "x", ":"))
            medians = contenders[contender]
            ax.plot([int(n) ** 2 for n in medians], list(medians.values()), color=color, marker=marker, linestyle=style,
                    label=f"{name}, {threads} thread{'s' * (threads != '1')}")  # fmt: skip
    for threads, times in data["int8"].items():
        if times:
            ax.plot([29], [times], "<" if threads == "1" else "o", fillstyle="none", color="#009E73",
                    label=f"int8, measured, {threads} thread{'s' * (threads != '1')}", linestyle="none")  # fmt: skip
    if not data["measured"]:
        ax.text(0.5, 0.9, "not measured yet", transform=ax.transAxes, fontsize=11, color="#A04000", ha="center")
    ax.set(xlabel="binary convolutions, M × N", ylabel="times as fast as float32", xscale="log", yscale="log",
           xlim=(0.95, 31), ylim=(0.5, 40))  # fmt: skip
    ax.set_xticks([1, 2, 4, 9, 16, 25], ["1", "2", "4", "9", "16", "25"])
    ax.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="upper right", ncols=2 if data["measured"] else 1)
    return fig


def draw_roofline(plt, data):
    fig, ax = plt.subplots(figsize=(7, 3.4))
    roof = data["roof"]
    xs = [10 ** (1 + 4 * i / 200) for i in range(201)]
    lines = (
        ("binary tensor core, `mma`", "#0072B2", "-", "binary tensor core"),
        ("int8 tensor core", "#009E73", ":", "int8"),
        ("fp16 tensor core", "#E69F00", "--", "fp16"), ("TF32 tensor core", "#CC79A7", "-.", "TF32"),
        ("popcount", "#333333", ":", "popcount"),
    )  # fmt: skip
    for unit, color, style, label in lines:
        ax.plot(xs, [min(roof[unit], data["bytes"] * x) for x in xs], color=color, linestyle=style)
        ax.text(1.05e5, roof[unit], label, color=color, fontsize=8, va="center")
    for name, intensity in data["tiles"].items():
        bases, out = name.split()
        height = min(roof["binary tensor core, `mma`"], data["bytes"] * intensity)
        marker = "o" if out == "bits" else "s"
        ax.plot(intensity, height, marker, color="#0072B2", fillstyle="full" if out == "bits" else "none", markersize=7)
        place = (0, 7) if out == "bits" else (2, -14)
        ax.annotate(bases, (intensity, height), place, textcoords="offset points", fontsize=9, ha="center")
    ax.plot([], [], "s", color="#0072B2", fillstyle="none", label="tile of a 3 × 3 convolution, floats out")
    ax.plot([], [], "o", color="#0072B2", label="the same, bits out")
    ax.set(xscale="log", yscale="log", xlim=(10, 1e5), ylim=(100, 60_000), xlabel="multiply-adds a byte written",
           ylabel="multiply-adds a clock and SM")  # fmt: skip
    ax.legend(fontsize=8, loc="lower right")
    ax.text(0.02, 0.93, "an estimate: nothing here is measured", transform=ax.transAxes, fontsize=9, color="#A04000")
    return fig


DRAWINGS = {
    "bits": draw_bits, "levels": draw_levels, "threshold": draw_threshold, "accuracy": draw_accuracy,
    "competitors": draw_competitors,
    "speed": draw_speed, "roofline": draw_roofline,
}  # fmt: skip


def draw(data: dict, folder: Path) -> None:
    """figures/NAME.svg for every figure; each says in its metadata which numbers it shows."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.style.use(STYLE)
    plt.rcParams["svg.hashsalt"] = "abcnets"
    folder.mkdir(exist_ok=True)
    for name, function in DRAWINGS.items():
        fig = function(plt, data[name])
        fig.savefig(folder / f"{name}.svg", metadata={"Date": None, "Description": f"data {checksum(data[name])}"})
        plt.close(fig)
    (folder / "data.json").write_text(json.dumps(data, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# PDF
# ---------------------------------------------------------------------------------------------------------------------

TEMPLATE = r"""
#set document(title: "TITLE", date: none, keywords: ("source CHECKSUM",))
#set page(paper: "a4", margin: (x: 2.3cm, y: 2cm), numbering: "1")
#set text(font: "Libertinus Serif", size: 10pt, lang: "en", hyphenate: true)
#set par(justify: true, leading: 0.58em, spacing: 0.85em)
#set math.equation(numbering: "(1)")
#show heading.where(level: 1): it => block(above: 1.3em, below: 0.7em, text(size: 12.5pt, it))
#show heading.where(level: 2): it => block(above: 1.1em, below: 0.6em, text(size: 10.5pt, it))
#show link: it => text(fill: rgb("#0B4F7D"), it)
#show raw.where(block: true): it => block(fill: luma(246), inset: 7pt, radius: 2pt, width: 100%, text(size: 8.4pt, it))
#show raw.where(block: false): set text(size: 8.8pt)
#set table(stroke: (x, y) => if y == 0 { (top: 0.8pt) }, inset: (x: 5pt, y: 3pt))
#show table: set text(size: 8.6pt)
#show table: set par(justify: false)
#show figure: set block(breakable: false)
#show figure.where(kind: table): set block(above: 1em, below: 1em, breakable: true)
#show figure.where(kind: image): set figure(gap: 0.6em, placement: auto)
#show figure.caption: it => block(width: 94%, align(left, text(size: 8.8pt, it)))
#let horizontalrule = line(length: 100%, stroke: 0.5pt + luma(180))

#align(center)[#text(size: 15.5pt, weight: "bold")[TITLE]]
#v(0.4em)

BODY

#set text(size: 8.4pt)
#set par(leading: 0.5em, spacing: 0.55em)
#bibliography("references.bib", title: "References", style: "ieee")
"""


def source_checksum(text: str, data: dict) -> str:
    """Of all that the PDF is made from: the text, the figures' numbers, the bibliography."""
    return checksum([text, data, (HERE / "references.bib").read_text()])


def typst_source(text: str, data: dict) -> str:
    """The PDF's source: pandoc's reading of the Markdown that GitHub shows, with figures and citations of its own."""
    import pypandoc

    made_from = source_checksum(text, data)
    title, text = re.match(r"# (.*?)\n(.*)", text, re.S).groups()
    text = re.sub(r"## References\n.*", "", text, flags=re.S)
    # GitHub shows a caption as a paragraph below the picture; pandoc takes it as the picture's text.
    text = re.sub(r"!\[[^\]]*\]\((\S+)\)\n\n\*Figure \d+\. (.*?)\*\n", r"![\2](\1)\n", text, flags=re.S)
    # Links to files of the repository lead nowhere from a PDF: their text stays.
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!http)[^)]*\)", r"\1", text)
    text = re.sub(r"<!-- (results: \w+|end) -->", "", text)
    text = re.sub(r"```math\n(.*?)\n```", r"$$ \1 $$", text, flags=re.S)
    text = re.sub(r" *\\tag\{\d+\}", "", text)  # typst counts them itself, in the same order
    body = pypandoc.convert_text(
        text, "typst", format="markdown+lists_without_preceding_blankline-auto_identifiers-smart",
        extra_args=["--wrap=none", "--columns=1000", "--shift-heading-level-by=-1"],
    )  # fmt: skip
    body = re.sub(r"^#bibliography\(.*\)$", "", body, flags=re.M)
    parts = {"TITLE": title, "CHECKSUM": made_from, "BODY": body}
    return re.sub("TITLE|CHECKSUM|BODY", lambda match: parts[match.group()], TEMPLATE)


def build_pdf(text: str, data: dict, path: Path) -> None:
    import typst

    source = HERE / f".{path.stem}.typ"  # beside the figures and the bibliography that it names
    source.write_text(typst_source(text, data))
    try:
        typst.compile(str(source), output=str(path), root=str(HERE))
    finally:
        source.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Check
# ---------------------------------------------------------------------------------------------------------------------


def differences() -> list[str]:
    """What in the writeup is not what the results make of it, in words."""
    found = []
    old = (HERE / "writeup.md").read_text()
    new = inject(old)
    if new != old:
        changed = [b for a, b in zip(old.splitlines(), new.splitlines()) if a != b]
        found.append("writeup.md differs from the results" + (f", first here: {changed[0][:200]}" if changed else ""))
    readme = README.read_text()
    if inject(readme) != readme:
        found.append("README.md's opening differs from the results")
    data = figure_data()
    drawn = FIGURES / "data.json"
    if not drawn.exists() or json.loads(drawn.read_text()) != data:
        found.append("figures/data.json differs from the results")
    for name in DRAWINGS:
        picture = FIGURES / f"{name}.svg"
        if not picture.exists() or f"data {checksum(data[name])}" not in picture.read_text():
            found.append(f"figures/{name}.svg does not show the present results")
    pdf = HERE / "writeup.pdf"
    if not pdf.exists() or source_checksum(new, data).encode() not in pdf.read_bytes():
        found.append("writeup.pdf was made from another text or other figures")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; the exit status says whether all is fresh")
    options = parser.parse_args()
    if options.check:
        found = differences()
        sys.exit("\n".join([*found, "run: python writeup/build.py"]) if found else 0)
    page = HERE / "writeup.md"
    text, data = inject(page.read_text()), figure_data()
    page.write_text(text)
    README.write_text(inject(README.read_text()))
    draw(data, FIGURES)
    build_pdf(text, data, HERE / "writeup.pdf")


if __name__ == "__main__":
    main()
