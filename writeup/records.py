"""The rows that runs left, and what tables, figures and claims ask of them."""

import math
from pathlib import Path
from statistics import mean, median

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent


def read(path: str) -> list[dict]:
    """A CSV's rows, with None where there is nothing; [] if there is no file."""
    if not (ROOT / path).exists():
        return []
    columns = pd.read_csv(ROOT / path).convert_dtypes().astype(object)
    return columns.where(columns.notna(), None).to_dict("records")


RUNS = read("notebooks/results/runs.csv")
SPEED = read("notebooks/results/speed.csv")
STEP = read("notebooks/results/step.csv")
STEP_OF_TEXT = {"network": "nine-layer", "code": "thermometer", "M": 3, "N": 3, "batch_size": 128, "threads": 2}
MIXED = [row | {"code": code} for code, file in (("thermometer", "mixed"), ("binary", "mixed-code=binary"))
         for row in read(f"notebooks/results/{file}.csv")]  # fmt: skip
COMPETITORS = read("notebooks/results/competitors.csv")
CALIBRATION = read("writeup/results/calibration.csv")
WEIGHTS = read("writeup/results/weights.csv")
FILTER = read("writeup/results/filter.csv")
CPU = read("kernels/results/cpu.csv")
CUDA = [row for row in read("kernels/results/cuda.csv") if row["microseconds"] is not None]

DATASET = "fashion-mnist"
ALIKE = 0.05  # points of accuracy: five test images
IN_INT8 = "abcnets in int8"  # as compare.py calls our networks with 8-bit activations
SETTINGS = [  # (M, N, code) of `make results`, beside the float network; of a single base the code does not matter
    (1, 1, "thermometer"), (1, 2, "binary"), (1, 3, "binary"), (1, 4, "binary"), (2, 2, "thermometer"),
    (2, 2, "uniform,binary"), (2, 2, "binary"), (2, 2, "mixed binary"), (2, 3, "uniform,binary"), (2, 3, "binary"),
    (3, 3, "thermometer"), (3, 3, "binary"),
    (5, 5, "thermometer"), (1, 3, "thermometer"), (3, 1, "thermometer"),
    (1, None, "thermometer"), (2, None, "thermometer"), (2, None, "binary"), (3, None, "thermometer"),
]  # fmt: skip
BASES = 1, 2, 3, 5  # M = N of the tables
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
CODED = {"limit=20000", "float-seed=0"}  # what all runs of `make codes` have in common
CODES = [  # (M, N, other options) of `make codes`, from the cheapest on
    (1, 1, ""), (1, 2, "code=uniform"), (1, 2, "code=binary"),
    (2, 2, ""), (2, 2, "code=binary,uniform"), (2, 2, "zero code=binary,thermometer"), (2, 2, "no-zero code=binary"),
    (2, 2, "code=binary"),
    (3, 3, ""), (3, 3, "zero"), (3, 3, "code=binary"),
    (2, None, ""), (3, None, ""), (2, None, "code=binary"),
]  # fmt: skip


# --------------------------------------------------------------------------- Of rows


def result(M=None, N=None, code="thermometer", dataset=DATASET) -> dict | None:
    """What the runs with these bases and this code found, and no other options: the row of the first seed, but that

    `accuracy` and `calibrated` are means over the seeds, `least_level` is the least; and `lowest`, `highest`, `seeds`.
    """
    mixed, _, word = code.rpartition(" ")
    options = " ".join(filter(None, [mixed, f"code={word}" * (word != "thermometer")])) or None
    runs = [r for r in RUNS if (r["dataset"], r["M"], r["N"], r["options"]) == (dataset, M, N, options)]
    if not runs:
        return None
    accuracies = [run["accuracy"] for run in runs]
    found = min(runs, key=lambda run: run["seed"]) | {
        "code": code, "accuracy": mean(accuracies), "lowest": min(accuracies), "highest": max(accuracies),
        "seeds": len(runs),
    }  # fmt: skip
    for name, summary in (("calibrated", mean), ("least_level", min)):
        values = [run[name] for run in runs if run.get(name) is not None]
        found[name] = summary(values) if values else None
    return found


def results(dataset=DATASET) -> list[dict]:
    """Those of the float network and of all settings that were run."""
    return [found for case in [(), *SETTINGS] if (found := result(*case, dataset=dataset))]


def best_result() -> dict | None:
    """The most accurate setting with both sides binary."""
    return max((found for found in results() if found["N"]), key=lambda found: found["accuracy"], default=None)


def named(M, N, code="thermometer") -> str:
    """Bases and codes in words: "1 × binary 2", "thermometer 3 × 3", "binary 2 × float"; code: of both, or two."""
    codes = code.split(",")
    sides = list(zip((M, N), (codes[0], codes[-1])))
    names = ["float" if n is None else str(n) if n == 1 else f"{kind} {n}" for n, kind in sides]
    if (M or 0) > 1:
        names[1] = names[1].removeprefix(f"{codes[0]} ")  # once is enough
    return " × ".join(names)


def competitors() -> list[dict]:
    """Each form of the network once: name, M, N, code, accuracy, bytes, and ms an image by (batch, threads).

    A form is shown by its most accurate variant; of those as accurate, to ALIKE points, each case by the fastest.
    """
    forms = {}
    for row in COMPETITORS:
        forms.setdefault((row["form"], row["M"], row["N"], row.get("code") or "thermometer"), []).append(row)
    shown = []
    for (name, M, N, code), rows in forms.items():
        best = max(row["accuracy"] for row in rows)
        rows = [row for row in rows if row["accuracy"] >= best - ALIKE]
        ms = {}
        for row in rows:
            case = row["batch"], row["threads"]
            ms[case] = min(row["ms_per_image"], ms.get(case, math.inf))
        size = min(row["bytes"] for row in rows)
        shown.append({"name": name, "M": M, "N": N, "code": code, "accuracy": best, "bytes": size, "ms": ms})
    return shown


def ours() -> list[dict]:
    return [form for form in competitors() if form["name"] == "abcnets"]


def ours_in_int8() -> list[tuple[dict, dict | None]]:
    """Our networks with 8-bit activations, each with the same one as it was."""
    before = {(form["M"], form["N"], form["code"]): form for form in ours()}
    forms = (form for form in competitors() if form["name"] == IN_INT8)
    return [(form, before.get((form["M"], form["N"], form["code"]))) for form in forms]


def rival(name: str) -> dict | None:
    return next((form for form in competitors() if form["name"] == name), None)


def int8_accuracy(seven_bits: bool) -> float | None:
    """Of onnxruntime's int8 network, with weights of 7 bits or of 8: its best variant's."""
    rows = [row for row in COMPETITORS if row["form"] == "onnxruntime int8"]
    found = (row["accuracy"] for row in rows if ("7 bits" in (row["variant"] or "")) == seven_bits)
    return max(found, default=None)


def faster_than_int8(form: dict) -> set[tuple[int, int]]:
    """The (batch, threads) at which a form binary on both sides beats int8, that on as many threads or fewer."""
    int8 = rival("onnxruntime int8")
    if not form["N"] or not int8:
        return set()
    best = {case: min(ms for (batch, threads), ms in int8["ms"].items() if batch == case[0] and threads <= case[1])
            for case in int8["ms"]}  # fmt: skip
    return {case for case, ms in form["ms"].items() if ms < best.get(case, 0)}


def cpu_machines() -> list[tuple[str, list[dict]]]:
    """[(a machine's processor and instruction set, its rows)]"""
    return _machines(CPU)


def _machines(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """By processor and instruction set, those with AVX-512 first: the text is about the first one."""
    machines = {}
    for row in sorted(rows, key=lambda row: not row["isa"].startswith("AVX-512")):
        machines.setdefault((row["hardware"], row["isa"]), []).append(row)
    return [(f"{_short(hardware)}, {isa}", found) for (hardware, isa), found in machines.items()]


def _short(hardware: str) -> str:
    """A processor's name without what tells it from no other."""
    return hardware.split(", ")[0].replace("(R)", "").replace(" Processor", "")


def cpu_medians(rows: list[dict], contender: str, column: str, threads: int) -> dict[tuple, float]:
    """{(M, N, code): median over the 3 x 3 convolutions}, the cheapest first."""
    values = {}
    for row in rows:
        if (row["contender"], row["K"], row["threads"]) == (contender, 3, threads):
            values.setdefault((row["M"], row["N"], row["code"]), []).append(row[column])
    return {case: median(values[case]) for case in sorted(values, key=lambda case: (case[0] * case[1], case))}


def cpu_threads(rows: list[dict]) -> list[int]:
    return sorted({row["threads"] for row in rows})


def by_products(rows: list[dict], contender: str, column: str, threads: int) -> dict[int, float]:
    """{M N: median of the fastest setting with free scales}, which is every code but uniform levels."""
    found = {}
    for (M, N, code), value in cpu_medians(rows, contender, column, threads).items():
        if code != "uniform":
            found[M * N] = max(value, found.get(M * N, 0))
    return found


def on_one_thread(column: str) -> dict[int, float]:
    """What the sentences are about: the first machine, floats in and out, the fewest threads. {M N: times as fast}"""
    rows = cpu_machines()[0][1] if CPU else []
    return by_products(rows, "packed", column, min(cpu_threads(rows))) if rows else {}


def speed_machines() -> list[tuple[str, list[dict]]]:
    """[(a machine's processor and instruction set, its rows of whole networks)]"""
    return _machines(SPEED)


def network_speeds(rows: list[dict], M: int, N: int, code: str, column: str) -> dict[tuple, float]:
    """{(network, batch, threads): times as fast as float32, or int8}, in the better memory layout and form of
    the first layer.

    Where the binary code was not run, that of the thermometer, which takes as long to count.
    """
    best = {}
    for row in rows:
        if (row["form"], row["M"], row["N"], row["code"]) == ("abcnets", M, N, code) and row[column]:
            case = row["network"], row["batch"], row["threads"]
            best[case] = max(row[column], best.get(case, 0))
    return best if best or code != "binary" else network_speeds(rows, M, N, "thermometer", column)


def weight_error(M: int, shifts: str, statistics: str = "channel") -> float | None:
    wanted = {"M": M, "shifts": shifts, "statistics": statistics}
    return next((row["error"] for row in WEIGHTS if all(row[k] == v for k, v in wanted.items())), None)


def ablated(choice: frozenset) -> list[dict]:
    """The runs of `make ablation` that differ from the default in this choice, one a seed."""
    runs = [(set((run["options"] or "").split()), run) for run in RUNS if run["M"] == run["N"] == 2]
    return [run for options, run in runs if "limit=6000" in options and options - ABLATED == choice]


def mean_accuracy(runs: list[dict]) -> float:
    return mean(run["accuracy"] for run in runs)


def coded_runs(M, N, options: str) -> list[dict]:
    """The runs of `make codes` with these bases and options, one a seed."""
    runs = [r for r in RUNS if (r["dataset"], r["M"], r["N"], r["epochs"]) == (DATASET, M, N, 3)]
    return [r for r in runs if set((r["options"] or "").split()) == CODED | set(options.split())]


def coded_accuracy(M, N, options: str = "") -> float | None:
    """The mean over the seeds."""
    runs = coded_runs(M, N, options)
    return mean_accuracy(runs) if runs else None


def per_channel_gains() -> list[float]:
    """The part of the weights' error that statistics per channel, instead of per layer, take away; for each M."""
    errors = [(weight_error(M, "gaussian"), weight_error(M, "gaussian", "layer")) for M in range(1, 7)]
    return [1 - channel / layer for channel, layer in errors if channel and layer]


def fastest_float32() -> dict | None:
    """The faster of torch and onnxruntime, case by case, as one of `competitors`."""
    forms = [form for form in competitors() if form["name"].endswith("float32")]
    if not forms:
        return None
    cases = set().union(*(form["ms"] for form in forms))
    ms = {case: min(form["ms"].get(case, math.inf) for form in forms) for case in cases}
    return min(forms, key=lambda form: form["bytes"]) | {"name": "float32", "ms": ms}


def contender(name: str, M=None, N=None, code="thermometer") -> dict | None:
    if name == "float32":
        return fastest_float32()
    case = name, M, N, code
    return next((f for f in competitors() if (f["name"], f["M"], f["N"], f["code"]) == case), None)
