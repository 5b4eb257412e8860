"""What the writeup and the README's opening are filled with: tables and single numbers, from the files that runs left.

`for_writeup()` and `for_readme()` give them by the names of their markers. The prose around them is written by hand;
its words that the numbers must bear out are in claims.py. A row that was never run is said to be missing.
"""

import itertools
import math
import re
from pathlib import Path
from statistics import mean, median

import pandas as pd

from kernels.report import SHOWN
from writeup import arithmetic

ROOT = Path(__file__).resolve().parent.parent
BIBLIOGRAPHY = ROOT / "writeup" / "references.bib"
MISSING = "not run"
NOT_MEASURED = "not measured yet"


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
MIXED = read("notebooks/results/mixed.csv")
COMPETITORS = read("notebooks/results/competitors.csv")
CALIBRATION = read("writeup/results/calibration.csv")
WEIGHTS = read("writeup/results/weights.csv")
FILTER = read("writeup/results/filter.csv")
CPU = read("kernels/results/cpu.csv")
CUDA = [row for row in read("kernels/results/cuda.csv") if row["microseconds"] is not None]

DATASET = "fashion-mnist"
IN_INT8 = "abcnets in int8"  # as compare.py calls our networks with 8-bit activations
SETTINGS = [  # (M, N, code) of `make results`, beside the float network; of a single base the code does not matter
    (1, 1, "thermometer"), (1, 2, "binary"), (2, 2, "thermometer"), (2, 2, "binary"), (3, 3, "thermometer"),
    (3, 3, "binary"), (5, 5, "thermometer"), (1, 3, "thermometer"), (3, 1, "thermometer"),
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
    options = None if code == "thermometer" else f"code={code}"
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

    A form is shown by its most accurate variant; of equally accurate ones, each case by the fastest.
    """
    forms = {}
    for row in COMPETITORS:
        forms.setdefault((row["form"], row["M"], row["N"], row.get("code") or "thermometer"), []).append(row)
    shown = []
    for (name, M, N, code), rows in forms.items():
        best = max(row["accuracy"] for row in rows)
        rows = [row for row in rows if row["accuracy"] == best]
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


def faster_than_int8(form: dict) -> set[tuple[int, int]]:
    """The (batch, threads) at which a form binary on both sides beats int8, that on as many threads or fewer."""
    int8 = rival("onnxruntime int8")
    if not form["N"] or not int8:
        return set()
    best = {case: min(ms for (batch, threads), ms in int8["ms"].items() if batch == case[0] and threads <= case[1])
            for case in int8["ms"]}  # fmt: skip
    return {case for case, ms in form["ms"].items() if ms < best.get(case, 0)}


def cpu_machines() -> list[tuple[str, list[dict]]]:
    """[(a machine's instruction set, its rows)]; the hardware too where the former does not tell machines apart."""
    machines = {}
    for row in CPU:
        machines.setdefault((row["isa"], row["hardware"]), []).append(row)
    sets = [isa for isa, _ in machines]
    return [(isa if sets.count(isa) == 1 else f"{hardware}, {isa}", rows) for (isa, hardware), rows in machines.items()]


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


def resnet_speeds(bases: int) -> list[float]:
    """Times float32's speed of packed ResNet-18, the fastest form of each batch and number of threads."""
    best = {}
    for row in SPEED:
        if row["network"] == "ResNet-18" and row["bases"] == bases and "bits between layers" in row["form"]:
            case = row["batch"], row["threads"]
            best[case] = max(row["times_float32"], best.get(case, 0))
    return list(best.values())


# --------------------------------------------------------------------------- Tables


def table(head: list[str], rows: list[list[str]], align: str, missing: str = MISSING) -> str:
    marks = [{"l": ":--", "r": "--:", "c": ":-:"}[a] for a in align]
    rows = rows or [[missing, *[""] * (len(head) - 1)]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *rows])


def percent(value) -> str:
    return MISSING if value is None else f"{value:.2f} %"


def kB(size) -> str:
    return f"{size / 1000:.0f} kB"


def bits_table() -> str:
    e, A, W = arithmetic.bit_example(), arithmetic.A, arithmetic.W
    products = [a * w for a, w in zip(A, W)]
    rows = [
        [name, *(f"{sign:+d}" for sign in signs), f"`{word:08b}`", note]
        for name, signs, word, note in (
            ("$a$", A, e["a"], ""), ("$w$", W, e["w"], ""), ("product", products, e["xor"], f"XOR: {e['count']} ones"),
        )
    ]  # fmt: skip
    return table(["", *(f"$c={c}$" for c in range(8)), "bits", ""], rows, "l" + "c" * 8 + "ll")


def alpha_table() -> str:
    bins, levels = arithmetic.cut(arithmetic.WEIGHTS_EXAMPLE, arithmetic.gaussian_thresholds(2))
    sources = ("$-c_2$", "mean of the bin", "(sum of bin 2 − sum of bin 0) / their number")
    rows = [
        [str(j), ", ".join(f"{v:g}" for v in values), source, f"{level:.3f}"]
        for j, (values, source, level) in enumerate(zip(bins, sources, levels))
    ]
    return table(["bin $j$", "weights in it", "$c_j$ is", "$c_j$"], rows, "clll")


def weight_error(M: int, shifts: str, statistics: str = "channel") -> float | None:
    wanted = {"M": M, "shifts": shifts, "statistics": statistics}
    return next((row["error"] for row in WEIGHTS if all(row[k] == v for k, v in wanted.items())), None)


def gaussian_table() -> str:
    rows = []
    kinds = arithmetic.even_thresholds, arithmetic.gaussian_thresholds
    for M, even, best in zip(range(1, 7), *map(arithmetic.gaussian_errors, kinds)):
        shifts = ["0"] * (M % 2) + [f"±{t:.3f}" for t in arithmetic.gaussian_thresholds(M) if t > 1e-9]
        real = (weight_error(M, kind) for kind in ("even", "gaussian"))
        real = (MISSING if error is None else f"{error:.3f}" for error in real)
        rows.append([str(M), ", ".join(shifts), f"{even:.3f}", f"{best:.3f}", *real])
    head = ["$M$", "best shifts", "Gaussian, even", "Gaussian, best", "network, even", "network, best"]
    return table(head, rows, "rlrrrr")


def code_errors() -> str:
    """What quantization leaves of a Gaussian's variance: by code and number of bases."""
    rows = []
    for bases in range(1, 5):
        cells = [arithmetic.code_error(code, bases) for code in ("thermometer", "uniform", "binary")]
        rows.append([str(bases), f"{bases + 1} / {2**bases}", *(f"{error:.3f}" for error in cells)])
    return table(["$M$", "levels", "thermometer", "uniform", "binary"], rows, "rcrrr")


def calibration_table() -> str:
    rows = []
    for n in BASES:
        row = next((r for r in CALIBRATION if r["M"] == r["N"] == n), {})
        ways = ("binarized", "norms", "thresholds", "both", "all")
        rows.append([str(n), *(percent(row.get(way)).removesuffix(" %") for way in ways)])
    head = ["$M = N$", "as it falls", "BatchNorm alone", "thresholds alone", "both", "and weights moved"]
    return table(head, rows, "rrrrrr")


def accuracies(found: list[dict], ms: dict | None = None) -> str:
    """The table of some `results`; ms: {(M, N, code): milliseconds an image} for one more column."""
    rows, whole = [], next((run["accuracy"] for run in found if not run["M"] and not run["N"]), None)
    for run in found:
        case = run["M"], run["N"], run["code"]
        is_float = not run["M"] and not run["N"]
        spread = f"{run['lowest']:.2f} to {run['highest']:.2f} ({run['seeds']})" if run["seeds"] > 1 else "one seed"
        calibrated = "" if is_float else percent(run["calibrated"])
        below = "" if is_float or whole is None else f"{whole - run['accuracy']:.2f}"
        cells = ["float" if is_float else named(*case), calibrated, f"**{percent(run['accuracy'])}**", spread, below,
                 kB(run["file_bytes"])]  # fmt: skip
        rows.append([*cells, *([f"{ms[case]:.2f} ms" if case in ms else MISSING] if ms is not None else [])])
    head = ["weights × activations", "calibrated", "trained, mean", "from, to (seeds)", "below float", "file"]
    head += ["an image"] if ms is not None else []
    return table(head, rows, "l" + "r" * (len(head) - 1))


def accuracy_table() -> str:
    return accuracies(results())


def timed_accuracy_table() -> str:
    """Beside the accuracies, how long an image takes: 32 at once on one thread, float in torch's best form."""
    forms = [form for form in competitors() if form["name"] in ("abcnets", "torch float32")]
    ms = {(form["M"], form["N"], form["code"]): form["ms"][32, 1] for form in forms if (32, 1) in form["ms"]}
    return accuracies(results(), ms)


def cifar_table() -> str:
    return accuracies(results("cifar10-jpeg"))


def mixed_table() -> str:
    kinds = "uniform", "mixed"
    rows = [
        [r["dataset"], f"$M = N = {r['uniform']}$", *(kB(r[f"{kind}_bytes"]) for kind in kinds),
         *(percent(r[f"{kind}_accuracy"]) for kind in kinds)]
        for r in MIXED
    ]  # fmt: skip
    head = ["data", "budget", "bytes, uniform", "bytes, mixed", "accuracy, uniform", "accuracy, mixed"]
    return table(head, rows, "llrrrr")


def ablated(choice: frozenset) -> list[dict]:
    """The runs of `make ablation` that differ from the default in this choice, one a seed."""
    runs = [(set((run["options"] or "").split()), run) for run in RUNS if run["M"] == run["N"] == 2]
    return [run for options, run in runs if "limit=6000" in options and options - ABLATED == choice]


def mean_accuracy(runs: list[dict]) -> float:
    return mean(run["accuracy"] for run in runs)


def ablation_table() -> str:
    rows = []
    for options, name in CHOICES.items():
        if runs := ablated(options):
            last, start = [run["accuracy"] for run in runs], runs[0]["calibrated"]
            spread = f"{min(last):.2f} to {max(last):.2f}"
            before = percent(runs[0]["binarized"] if start is None else start)
            rows.append([name, before, percent(mean(last)), spread, str(len(runs))])
    return table(["choice", "before training", "trained, mean", "lowest and highest", "seeds"], rows, "lrrrr")


def coded_runs(M, N, options: str) -> list[dict]:
    """The runs of `make codes` with these bases and options, one a seed."""
    runs = [r for r in RUNS if (r["dataset"], r["M"], r["N"], r["epochs"]) == (DATASET, M, N, 3)]
    return [r for r in runs if set((r["options"] or "").split()) == CODED | set(options.split())]


def coded_accuracy(M, N, options: str = "") -> float | None:
    """The mean over the seeds."""
    runs = coded_runs(M, N, options)
    return mean_accuracy(runs) if runs else None


def codes_table() -> str:
    rows = []
    for M, N, options in CODES:
        runs, words = coded_runs(M, N, options), options.split()
        code = next((word[5:] for word in words if word.startswith("code=")), "thermometer")
        sides = list(zip((M, N), (code.split(",")[0], code.split(",")[-1])))
        levels = " × ".join("float" if count is None else str(2**count if kind == "binary" else count + 1)
                            for count, kind in sides)  # fmt: skip
        zero = "" if N in (None, 1) else "yes" if "zero" in words or sides[1][1] != "thermometer" else "no"
        zero = "no" if "no-zero" in words else zero
        measured = [MISSING] * 4
        if runs:
            trained = [run["accuracy"] for run in runs]
            spread = f"{min(trained):.2f} to {max(trained):.2f} ({len(runs)})"
            measured = [percent(runs[0]["calibrated"]), percent(mean(trained)), spread, kB(runs[0]["file_bytes"])]
        rows.append([named(M, N, code), levels, zero, str(M * N if N else "-"), *measured])
    head = ["weights × activations", "levels", "0 stays 0", "binary conv.", "calibrated", "trained, mean",
            "from, to (seeds)", "file"]  # fmt: skip
    return table(head, rows, "lccrrrrr")


def competitors_table() -> str:
    """In bold what is faster than int8."""
    forms = [form for form in competitors() if form["name"] != IN_INT8]
    cases, rows = _cases(forms), []
    for form in forms:
        setting = f", {named(form['M'], form['N'], form['code'])}" if form["M"] or form["N"] else ""
        faster = faster_than_int8(form)
        times = [f"**{time}**" if case in faster else time for case, time in zip(cases, _times(form, cases))]
        rows.append([form["name"] + setting, percent(form["accuracy"]), kB(form["bytes"]), *times])
    return table(["form", "accuracy", "file", *map(_in_words, cases)], rows, "lrr" + "r" * len(cases))


def int8_table() -> str:
    """onnxruntime's own int8 network, and ours with 8-bit activations; none without ours."""
    ours, rows = ours_in_int8(), []
    cases = _cases([form for form, _ in ours])
    for form, before in [(rival("onnxruntime int8"), rival("onnxruntime float32")), *ours] if ours else []:
        is_binary = form["M"] or form["N"]
        name = named(form["M"], form["N"], form["code"]) if is_binary else "float, by onnxruntime's quantizer"
        as_before = percent(before and before["accuracy"])
        rows.append([name, as_before, percent(form["accuracy"]), kB(form["bytes"]), *_times(form, cases)])
    head = ["weights × activations", "as trained", "in int8", "file", *map(_in_words, cases)]
    return table(head, rows, "lrrr" + "r" * len(cases))


def _cases(forms: list[dict]) -> list[tuple[int, int]]:
    """The (batch, threads) that forms were timed at."""
    return sorted({case for form in forms for case in form["ms"]}, key=lambda case: (case[1], case[0]))


def _times(form: dict, cases) -> list[str]:
    return [f"{form['ms'][case]:.3f}" if case in form["ms"] else MISSING for case in cases]


def _in_words(case: tuple[int, int]) -> str:
    batch, threads = case
    return f"{batch} image{'s' * (batch > 1)}, {threads} thr."


def cpu_estimate() -> str:
    """Products a cycle, and from which M N on bits lose."""
    rows = [
        [core, str(float32), str(int8), f"{bits:.0f} / ($M N$)", f"{bits / float32:.1f}", f"{bits / int8:.1f}"]
        for core, (float32, int8, bits) in arithmetic.CPU_CORES.items()
    ]
    head = ["core", "float32", "int8", "bits", "faster than float32 below $M N$", "than int8 below $M N$"]
    return table(head, rows, "lrrrrr")


def cpu_table() -> str:
    """Of a setting that a machine did not run, the same bases in the thermometer code, whose counting is the same."""
    rows = []
    for machine, here in cpu_machines():
        for contender, what in (("packed", "floats"), ("words", "bits")):
            for threads in cpu_threads(here):
                columns = ("times_float32", "times_int8", "share_of_bound")
                found = [cpu_medians(here, contender, column, threads) for column in columns]
                cells = []
                for M, N, code in SHOWN:
                    case = (M, N, code) if (M, N, code) in found[0] else (M, N, "thermometer")
                    is_there = case in found[0] and (code != "uniform" or case[2] == code)
                    values = [one.get(case) for one in found]
                    cells.append("{:.2f} / {:.2f} ({:.0%})".format(*values) if is_there else MISSING)
                rows.append([machine, what, str(threads), *cells])
    head = ["machine", "in and out", "threads", *(named(*setting) for setting in SHOWN)]
    return table(head, rows, "llr" + "r" * len(SHOWN), NOT_MEASURED)


def network_table() -> str:
    rows = [row for row in SPEED if row["form"].startswith("packed, bits between layers")]  # in either memory layout
    counts = sorted({row["bases"] for row in rows})
    cells = []
    for key in dict.fromkeys((row["network"], row["batch"], row["threads"]) for row in rows):
        same = [row for row in SPEED if (row["network"], row["batch"], row["threads"]) == key]
        best = min(row["milliseconds"] for row in same if row["form"].startswith("float32"))
        times = {n: [row["times_float32"] for row in rows if row in same and row["bases"] == n] for n in counts}
        speeds = (f"{max(times[n]):.2f}" if times[n] else MISSING for n in counts)
        cells.append([*map(str, key), f"{best:.2f} ms", *speeds])
    head = ["network", "batch", "threads", "float32, best form", *(f"$M=N={n}$" for n in counts)]
    return table(head, cells, "l" + "r" * (3 + len(counts)))


def step_table() -> str:
    """Time and memory of training steps, times the float network's; a line a network, code and number of threads."""
    ratios, cells = {}, []
    for row in STEP:
        key = row["network"], row["code"], bases_of(row), row["threads"]
        ratios.setdefault(key, {})[row["precision"]] = row["ratio"], row["memory_ratio"]
    for (*words, threads), found in ratios.items():
        both = [found.get(precision, (None, None)) for precision in ("float32", "mixed")]
        numbers = [f"{ratio:.2f}" if ratio else MISSING for pair in zip(*both) for ratio in pair]
        cells.append([*words, str(threads), *numbers])
    head = ["network", "code", "bases", "threads", "time, float32", "time, mixed", "memory, float32", "memory, mixed"]
    return table(head, cells, "lll" + "r" * 5)


def gpu_estimate() -> str:
    fp16 = arithmetic.GPU_UNITS["fp16 tensor core"]
    bits = arithmetic.GPU_UNITS["binary tensor core, `mma`"]
    status = {"binary tensor core, `mma`": "reported, unconfirmed", "binary tensor core, `wgmma`": "a guess: 8 × int8"}
    rows = [
        [name, f"{rate:,}".replace(",", " "), f"{rate / fp16:.2g}",
         "" if rate >= bits or name == "popcount" else f"{bits / rate:.3g}", status.get(name, "vendor's tables")]
        for name, rate in arithmetic.GPU_UNITS.items()
    ]  # fmt: skip
    head = ["unit", "multiply-adds a clock", "against fp16", "bits win below $M N$", "source"]
    return table(head, rows, "lrrrl")


def gpu_tile() -> str:
    rows = []
    for bases in (1, 2, 3):
        floats, bits = arithmetic.tile(bases, False), arithmetic.tile(bases, True)
        rows.append([str(bases), f"{floats['counting']:.0f}", f"{floats['writing']:.0f}", f"{bits['writing']:.0f}"])
    return table(["$M = N$", "counting", "writing floats", "writing bits"], rows, "rrrr")


def gpu_found() -> str:
    """The fastest rung of the ladder with one base, in a sentence."""
    ladder = [row for row in CUDA if row["section"] == "ladder" and row["bases"] == 1 and row["operations_per_second"]]
    if not ladder:
        return f"Their speed is {NOT_MEASURED}."
    best = max(ladder, key=lambda row: row["operations_per_second"])
    return ("On {hardware} the fastest at $M = N = 1$ is `{contender}`: {microseconds:.0f} µs for a layer of 3 × 3, "
            "128 to 128 channels, 32 images of 28 × 28.").format(**best)  # fmt: skip


def machines_table() -> str:
    """On what each kind of result was found."""
    sources = {
        "accuracies": RUNS, "calibration (4.3)": CALIBRATION, "training steps (3.3)": STEP, "convolutions (5.1)": CPU,
        "whole networks (5.1)": SPEED, "forms of a network (5.3, 6)": COMPETITORS,
    }  # fmt: skip
    machines = {}
    for what, found in sources.items():
        for row in found:
            hardware = re.sub(r", \d+ threads", "", row["hardware"])
            versions = re.findall(r"(?:torch|numba|onnxruntime) [\d.]+", row["versions"])
            machines.setdefault((hardware, ", ".join(versions)), {})[what] = None
    rows = [[*machine, ", ".join(results)] for machine, results in machines.items()]
    return table(["processor", "versions", "results"], rows, "lll", NOT_MEASURED)


def references() -> str:
    """What GitHub shows; the PDF has its own from the same file."""
    lines = []
    for entry in bibliography().values():
        where = entry.get("booktitle") or entry.get("journal") or entry.get("institution") or entry.get("howpublished")
        year = f", {entry['year']}" if "year" in entry else ""
        authors = _authors(entry["author"])
        lines.append(f"- {authors}. [{_plain(entry['title'])}]({entry['url']}). {_plain(where)}{year}.")
    return "\n".join(lines)


def bibliography() -> dict[str, dict]:
    entries = {}
    for key, body in re.findall(r"@\w+\{(\w+),\n(.*?)\n\}", BIBLIOGRAPHY.read_text(), re.S):
        entries[key] = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M))
    return dict(sorted(entries.items(), key=lambda item: (item[1].get("year", "9"), item[0])))


def _plain(text: str) -> str:
    return text.replace("{", "").replace("}", "")


def _authors(text: str) -> str:
    """All of them, first names first."""
    names = [" ".join(reversed(_plain(name).split(", "))) for name in text.split(" and ")]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# --------------------------------------------------------------------------- What fills the pages


TABLES = (
    bits_table, alpha_table, gaussian_table, calibration_table, cpu_estimate, cpu_table, network_table, gpu_found,
    gpu_estimate, gpu_tile, accuracy_table, competitors_table, int8_table, cifar_table, ablation_table, codes_table,
    code_errors, mixed_table, step_table, machines_table, references,
)  # fmt: skip


def say(words: str, row: dict | None, missing: str = MISSING) -> str:
    """The words with the row's numbers in them; or that there is no such row."""
    return words.format(**row, kB=kB(row.get("file_bytes") or row.get("bytes") or 0)) if row else missing


def bases_of(row: dict | None) -> str:
    if not row:
        return MISSING
    M, N = row["M"], row["N"]
    code = f", {row['code']}" if row.get("code", "thermometer") != "thermometer" else ""
    return (f"M = {M}" if not N else f"M = N = {M}" if M == N else f"M = {M}, N = {N}") + code


def for_writeup() -> dict[str, str]:
    """{marker: text} of writeup.md."""
    reference, best, gains = result(), best_result(), per_channel_gains()
    calibration = CALIBRATION[0] if CALIBRATION else None
    steps = {row["precision"]: row for row in STEP if STEP_OF_TEXT.items() <= row.items()}
    int8, binary = rival("onnxruntime int8"), [form for form in ours() if form["N"]]
    beaten, cases = (sum(map(len, sets)) for sets in (map(faster_than_int8, binary), (f["ms"] for f in binary)))
    values = {function.__name__: function() for function in TABLES} | {
        "per_channel_gain": f"{100 * min(gains):.0f} to {100 * max(gains):.0f} %" if gains else MISSING,
        "calibration_images": say("{images}", calibration),
        "calibration_float": say("{float:.2f}", calibration),
        "coded_float": say("{float:.2f} %", next((run for case in CODES for run in coded_runs(*case)), None)),
        "float_accuracy": say("{accuracy:.2f} %", reference),
        "float_size": kB(reference["file_bytes"]) if reference else MISSING,
        "digits_calibrated": say("{calibrated:.2f} %", result(2, 2, "binary")),
        "digits_accuracy": say("{accuracy:.2f} %", result(2, 2, "binary")),
        "digits_size": say("{kB}", result(2, 2, "binary")),
        "cifar_epochs": span([found["epochs"] for found in results("cifar10-jpeg")]),
        "best_setting": named(best["M"], best["N"], best["code"]) if best else MISSING,
        "best_accuracy": say("{accuracy:.2f} %", best),
        "best_size": say("{kB}", best),
        "best_loss": points_lost(best),
        "epochs": say("{epochs}", reference),
        "tuned_epochs": say("{epochs}", next((found for found in results() if found["M"] or found["N"]), None)),
        "calibrated_33": say("{all:.2f} %", next((r for r in CALIBRATION if r["M"] == r["N"] == 3), None)),
        "weights_only": weights_only(),
        "wins_against_float32": crossover("times_float32"),
        "wins_against_int8": crossover("times_int8"),
        "int8_accuracy": say("{accuracy:.2f} %", int8),
        "int8_size": say("{kB}", int8),
        "int8_beaten": f"{beaten} of the {cases}" if int8 else MISSING,
    }
    for n in BASES:
        speed = on_one_thread("times_int8").get(n * n)
        values[f"times_int8_{n}"] = f"{speed:.2f}" if speed else NOT_MEASURED
    for precision in ("float32", "mixed"):
        for what, column in (("time", "ratio"), ("memory", "memory_ratio")):
            values[f"step_{what}_{precision}"] = say(f"{{{column}:.2f}}", steps.get(precision), f"({NOT_MEASURED})")
    return values


def span(counts: list[int]) -> str:
    """3, 10, 4 in words: "3 to 10"."""
    return (f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])) if counts else MISSING


def weights_only() -> str:
    """What binary weights with float activations lose, in words, by those that were run."""
    settings = [(M, code) for M, N, code in SETTINGS if M and not N]
    lost = [(M, code, points_lost(found)) for M, code in settings if (found := result(M, None, code))]
    several = [M for M, *_ in lost]
    words = [f"{points} at M = {M}" + f" ({code})" * (several.count(M) > 1) for M, code, points in lost]
    return ", ".join(words) or MISSING


def points_lost(found: dict | None) -> str:
    """What a setting of the nine-layer network loses against the float network."""
    return f"{result()['accuracy'] - found['accuracy']:.2f}" if found and result() else MISSING


def per_channel_gains() -> list[float]:
    """The part of the weights' error that statistics per channel, instead of per layer, take away; for each M."""
    errors = [(weight_error(M, "gaussian"), weight_error(M, "gaussian", "layer")) for M in range(1, 7)]
    return [1 - channel / layer for channel, layer in errors if channel and layer]


def crossover(column: str) -> str:
    """The largest measured M N at which bits still win."""
    speeds = on_one_thread(column)
    winning = [products for products, times in speeds.items() if times >= 1]
    return (str(max(winning)) if winning else "none") if speeds else NOT_MEASURED


FIRST_SCREEN = [  # (form, M, N, code) of the README's first table
    ("float32", None, None, "thermometer"), ("onnxruntime int8", None, None, "thermometer"),
    ("abcnets", 1, 2, "binary"), ("abcnets", 2, 2, "binary"), ("abcnets", 3, 3, "binary"),
    (IN_INT8, 1, None, "thermometer"),
]  # fmt: skip


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


def first_table() -> str:
    """What one would choose from, as far as it was run: accuracy of all seeds, file, time on one thread."""
    whats = {"float32": "float32", "onnxruntime int8": "int8", "abcnets": "", IN_INT8: ", in ONNX Runtime"}
    rows = []
    for name, M, N, code in FIRST_SCREEN:
        form, found = contender(name, M, N, code), result(M, N, code)
        what = whats[name] if name in ("float32", "onnxruntime int8") else f"**{named(M, N, code)}**{whats[name]}"
        if form is None or (name == "abcnets" and found is None):
            continue
        accuracy = found["accuracy"] if found and name in ("float32", "abcnets") else form["accuracy"]
        times = [f"{form['ms'][batch, 1]:.2f} ms" if (batch, 1) in form["ms"] else MISSING for batch in (1, 32)]
        rows.append([what, percent(accuracy), kB(form["bytes"]), *times])
    head = ["weights × activations", "accuracy", "file", "1 image", "of 32, each"]
    return table(head, rows, "lrrrr")


def five_lines() -> str:
    """The README's first lines of use, and what each step makes of the nine-layer network."""
    found, form, floats = result(2, 2, "binary"), contender("abcnets", 2, 2, "binary"), fastest_float32()
    times = [one["ms"].get((32, 1), math.nan) if one else math.nan for one in (form, floats, rival("onnxruntime int8"))]
    sizes = [kB(one["bytes"]) if one else MISSING for one in (form, floats)]
    lines = [
        ('binary = abcnets.convert(model, 2, 2, code="binary")',
         "M = N = 2: " + say("{float:.2f} % becomes {binarized:.2f} %", found)),
        ("abcnets.calibrate(binary, images)", "no training, no labels: " + say("{calibrated:.2f} %", found)),
        ("...", "or train it on, like any other network: " + say("{accuracy:.2f} %", found)),
        ("packed = abcnets.pack(binary)", "a bit for each weight and base; the same outputs"),
        ('abcnets.save_packed(packed, "model.safetensors")', "{}, in float32 {}".format(*sizes)),
        ("logits = abcnets.fuse(packed)(images)", "{:.2f} ms an image, float32 {:.2f}, int8 {:.2f}".format(*times)),
    ]  # fmt: skip
    return "\n".join(["```python", *(f"{code:<53} # {comment}" for code, comment in lines), "```"])


def for_readme() -> dict[str, str]:
    """{marker: text} of the README."""
    values = {"first_table": first_table(), "five_lines": five_lines(), "smaller": MISSING}
    forms = [form for case in FIRST_SCREEN if case[0].startswith("abcnets") and (form := contender(*case))]
    if forms and (floats := fastest_float32()):
        smaller = [round(floats["bytes"] / form["bytes"]) for form in forms]
        values["smaller"] = f"{min(smaller)} to {max(smaller)}"
    for bases in (1, 2, 3):
        speeds = resnet_speeds(bases)
        values[f"speed_{bases}"] = f"{min(speeds):.1f} to {max(speeds):.1f}" if speeds else f"({NOT_MEASURED})"
    mixed = {row["uniform"]: row for row in MIXED if row["dataset"] == DATASET}
    for bases, kind in itertools.product((2, 3), ("uniform", "mixed")):
        values[f"{kind}_{bases}"] = say(f"{{{kind}_accuracy:.2f}} %", mixed.get(bases))
    return values | {
        "timed_accuracy_table": timed_accuracy_table(),
        "int8_table": int8_table(),
        "speed_hardware": say("{hardware}", next(iter(SPEED), None), NOT_MEASURED),
        "competitors_hardware": say("{hardware}", next(iter(COMPETITORS), None)),
    }
