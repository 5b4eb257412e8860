"""What the writeup and the README's opening are filled with: tables and single numbers, from the files that runs left.

`for_writeup()` and `for_readme()` give them by the names of their markers. The prose around them is written by hand;
its words that the numbers must bear out are in claims.py. A row that was never run is said to be missing.
"""

import itertools
import json
import math
import re
from pathlib import Path
from statistics import mean

import pandas as pd

from kernels.report import SHOWN, crossing
from writeup import arithmetic, records

BIBLIOGRAPHY = Path(__file__).resolve().parent / "references.bib"
LIMITS = Path(__file__).resolve().parent.parent / "kernels" / "cpu" / "pays.json"
MISSING = "not run"
NOT_MEASURED = "not measured yet"


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
    return table(["", *(f"$c={c}$" for c in range(1, 9)), "bits", ""], rows, "l" + "c" * 8 + "ll")


def alpha_table() -> str:
    bins, levels = arithmetic.cut(arithmetic.WEIGHTS_EXAMPLE, arithmetic.gaussian_thresholds(2))
    sources = ("$-c_2$", "mean of the bin", "(sum of bin 2 − sum of bin 0) / their number")
    rows = [
        [str(j), ", ".join(f"{v:g}" for v in values), source, f"{level:.3f}"]
        for j, (values, source, level) in enumerate(zip(bins, sources, levels))
    ]
    return table(["bin $j$", "weights in it", "$c_j$ is", "$c_j$"], rows, "clll")


def gaussian_table() -> str:
    rows = []
    kinds = arithmetic.even_thresholds, arithmetic.gaussian_thresholds
    for M, even, best in zip(range(1, 7), *map(arithmetic.gaussian_errors, kinds)):
        shifts = ["0"] * (M % 2) + [f"±{t:.3f}" for t in arithmetic.gaussian_thresholds(M) if t > 1e-9]
        real = (records.weight_error(M, kind) for kind in ("even", "gaussian"))
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
    for n in records.BASES:
        row = next((r for r in records.CALIBRATION if r["M"] == r["N"] == n), {})
        ways = ("binarized", "norms", "thresholds", "both", "all")
        rows.append([str(n), *(percent(row.get(way)).removesuffix(" %") for way in ways)])
    head = ["$M = N$", "just binarized", "BatchNorm alone", "thresholds alone", "both", "and weights moved"]
    return table(head, rows, "rrrrrr")


def accuracies(found: list[dict], ms: dict | None = None, epochs: bool = False) -> str:
    """The table of some `results`; ms: {(M, N, code): milliseconds an image} for one more column; epochs: another."""
    rows, whole = [], next((run["accuracy"] for run in found if not run["M"] and not run["N"]), None)
    for run in found:
        case = run["M"], run["N"], run["code"]
        is_float = not run["M"] and not run["N"]
        spread = f"{run['lowest']:.2f} to {run['highest']:.2f} ({run['seeds']})" if run["seeds"] > 1 else "one seed"
        calibrated = "" if is_float else percent(run["calibrated"])
        below = "" if is_float or whole is None else f"{whole - run['accuracy']:.2f}"
        name = "float" if is_float else records.named(*case)
        cells = [name, *[str(run["epochs"])] * epochs, calibrated, percent(run["accuracy"]), spread, below]
        cells.append(kB(run["file_bytes"]))
        rows.append([*cells, *([f"{ms[case]:.3f} ms" if case in ms else MISSING] if ms is not None else [])])
    head = ["weights × activations", *["epochs"] * epochs, "calibrated", "trained, mean", "from, to (seeds)",
            "below float", "file"]  # fmt: skip
    head += ["an image"] if ms is not None else []
    return table(head, rows, "l" + "r" * (len(head) - 1))


def accuracy_table() -> str:
    return accuracies(records.results())


def timed_accuracy_table() -> str:
    """Beside the accuracies, how long an image takes: 32 at once on one thread, float in torch's best form."""
    forms = [form for form in records.competitors() if form["name"] in ("abcnets", "torch float32")]
    ms = {(form["M"], form["N"], form["code"]): form["ms"][32, 1] for form in forms if (32, 1) in form["ms"]}
    return accuracies(records.results(), ms)


def cifar_table() -> str:
    return accuracies(records.results("cifar10-jpeg"), epochs=True)


def mixed_table() -> str:
    kinds = "uniform", "mixed"
    rows = [
        [r["dataset"], records.named(r["uniform"], r["uniform"], r["code"]),
         *(kB(r[f"{kind}_bytes"]) for kind in kinds), *(percent(r[f"{kind}_accuracy"]) for kind in kinds)]
        for r in records.MIXED
    ]  # fmt: skip
    head = ["data", "budget of", "bytes, uniform", "bytes, mixed", "accuracy, uniform", "accuracy, mixed"]
    return table(head, rows, "llrrrr")


def ablation_table() -> str:
    rows = []
    for options, name in records.CHOICES.items():
        if runs := records.ablated(options):
            last, start = [run["accuracy"] for run in runs], runs[0]["calibrated"]
            spread = f"{min(last):.2f} to {max(last):.2f}"
            before = percent(runs[0]["binarized"] if start is None else start)
            rows.append([name, before, percent(mean(last)), spread, str(len(runs))])
    return table(["choice", "before training", "trained, mean", "lowest and highest", "seeds"], rows, "lrrrr")


def codes_table() -> str:
    rows = []
    for M, N, options in records.CODES:
        runs, words = records.coded_runs(M, N, options), options.split()
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
        rows.append([records.named(M, N, code), levels, zero, str(M * N if N else "-"), *measured])
    head = ["weights × activations", "levels", "0 stays 0", "binary conv.", "calibrated", "trained, mean",
            "from, to (seeds)", "file"]  # fmt: skip
    return table(head, rows, "lccrrrrr")


def competitors_table() -> str:
    """In bold what is faster than int8. Of binary weights alone, which run as floats do, the smallest of the best."""
    forms = [form for form in records.competitors() if form["name"] != records.IN_INT8]
    alone = [form for form in forms if form["M"] and not form["N"]]
    best = max((form["accuracy"] for form in alone), default=0)
    alone.sort(key=lambda form: (form["accuracy"] < best - records.ALIKE, form["bytes"]))
    forms = [form for form in forms if form not in alone[1:]]
    cases, rows = _cases(forms), []
    for form in forms:
        setting = f", {records.named(form['M'], form['N'], form['code'])}" if form["M"] or form["N"] else ""
        faster = records.faster_than_int8(form)
        times = [f"**{time}**" if case in faster else time for case, time in zip(cases, _times(form, cases))]
        rows.append([form["name"] + setting, percent(form["accuracy"]), kB(form["bytes"]), *times])
    return table(["form", "accuracy", "file", *map(_in_words, cases)], rows, "lrr" + "r" * len(cases))


def int8_table() -> str:
    """onnxruntime's own int8 network, and ours of binary weights with 8-bit activations; none without ours."""
    ours, rows = [pair for pair in records.ours_in_int8() if not pair[0]["N"]], []
    cases = _cases([form for form, _ in ours])
    theirs = records.rival("onnxruntime int8"), records.rival("onnxruntime float32")
    for form, before in [theirs, *ours] if ours else []:
        is_binary = form["M"] or form["N"]
        name = records.named(form["M"], form["N"], form["code"]) if is_binary else "float, by onnxruntime's quantizer"
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
    for machine, here in records.cpu_machines():
        for contender, what in (("packed", "floats"), ("words", "bits")):
            for threads in records.cpu_threads(here):
                columns = ("times_float32", "times_int8", "share_of_bound")
                found = [records.cpu_medians(here, contender, column, threads) for column in columns]
                cells = []
                for M, N, code in SHOWN:
                    case = (M, N, code) if (M, N, code) in found[0] else (M, N, "thermometer")
                    is_there = case in found[0] and (code != "uniform" or case[2] == code)
                    values = [one.get(case) for one in found]
                    cells.append("{:.2f} / {:.2f} ({:.0%})".format(*values) if is_there else MISSING)
                rows.append([_once(machine, rows), what, str(threads), *cells])
    head = ["machine", "in and out", "threads", *(records.named(*setting) for setting in SHOWN)]
    return table(head, rows, "llr" + "r" * len(SHOWN), NOT_MEASURED)


def _once(machine: str, rows: list[list[str]]) -> str:
    """A machine's name; "" where the rows so far are of it already."""
    return "" if machine in (row[0] for row in rows) else machine


def network_table() -> str:
    """Whole networks on one thread: milliseconds of the fastest float32 and int8, and times as fast as these."""
    codes = "binary,uniform", "uniform,binary", "binary"
    settings = [(1, 1, "thermometer"), *((2, 2, code) for code in codes), (3, 3, "binary")]
    cells = []
    for machine, here in records.speed_machines():
        speeds = [[records.network_speeds(here, *setting, column) for column in ("times_float32", "times_int8")]
                  for setting in settings]  # fmt: skip
        for case in dict.fromkeys((row["network"], row["batch"], 1) for row in here):
            same = [row for row in here if (row["network"], row["batch"], row["threads"]) == case]
            best = [min((row["ms_per_image"] for row in same if row["form"].endswith(kind)), default=None)
                    for kind in ("float32", "onnxruntime int8")]  # fmt: skip
            times = [" / ".join(f"{by[case]:.2f}" if case in by else "–" for by in both) for both in speeds]
            best = ("–" if ms is None else f"{ms:.3g}" for ms in best)
            cells.append([_once(machine, cells), *map(str, case[:2]), *best, *times])
    head = ["machine", "network", "batch", "float32", "int8", *(records.named(*case) for case in settings)]
    return table(head, cells, "ll" + "r" * (len(head) - 2), NOT_MEASURED)


def step_table() -> str:
    """Time and memory of training steps, times the float network's; a line a network, code and number of threads."""
    ratios, cells = {}, []
    for row in records.STEP:
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
    ladder = [row for row in records.CUDA
              if row["section"] == "ladder" and row["bases"] == 1 and row["operations_per_second"]]  # fmt: skip
    if not ladder:
        return f"Their speed is {NOT_MEASURED}."
    best = max(ladder, key=lambda row: row["operations_per_second"])
    return ("On {hardware} the fastest at $M = N = 1$ is `{contender}`: {microseconds:.0f} µs for a layer of 3 × 3, "
            "128 to 128 channels, 32 images of 28 × 28.").format(**best)  # fmt: skip


def machines_table() -> str:
    """On what each kind of result was found."""
    sources = {
        "accuracies": records.RUNS, "calibration (4.3)": records.CALIBRATION, "training steps (3.3)": records.STEP,
        "convolutions (5.1)": records.CPU, "whole networks (5.1)": records.SPEED,
        "forms of a network (5.3, 6)": records.COMPETITORS,
    }  # fmt: skip
    machines = {}
    for what, found in sources.items():
        for row in found:
            hardware = re.sub(r", \d+ threads", "", row["hardware"])
            versions = re.findall(r"(?:torch|numba|onnxruntime) [\d.]+", row["versions"])
            name = ", ".join([hardware, *([row["isa"]] if row.get("isa") else [])])
            machines.setdefault((name, ", ".join(versions)), {})[what] = None
    rows = [[*machine, ", ".join(whats)] for machine, whats in machines.items()]
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
    reference, best, gains = records.result(), records.best_result(), records.per_channel_gains()
    calibration = records.CALIBRATION[0] if records.CALIBRATION else None
    digits, weights = records.result(2, 2, "binary"), records.contender(records.IN_INT8, 1)
    one_bit, two_bits = records.coded_accuracy(1, 1), records.coded_accuracy(1, 2, "code=binary")
    second_bit = two_bits - one_bit if one_bit and two_bits else None
    coded = next((run for case in records.CODES for run in records.coded_runs(*case)), None)
    steps = {row["precision"]: row for row in records.STEP if records.STEP_OF_TEXT.items() <= row.items()}
    int8, binary = records.rival("onnxruntime int8"), [form for form in records.ours() if form["N"]]
    beaten, cases = (sum(map(len, sets)) for sets in (map(records.faster_than_int8, binary), (f["ms"] for f in binary)))
    values = {function.__name__: function() for function in TABLES} | {
        "per_channel_gain": f"{100 * min(gains):.0f} to {100 * max(gains):.0f} %" if gains else MISSING,
        "calibration_images": say("{images}", calibration),
        "calibration_float": say("{float:.2f}", calibration),
        "coded_float": say("{float:.2f} %", coded),
        "float_accuracy": say("{accuracy:.2f} %", reference),
        "float_size": kB(reference["file_bytes"]) if reference else MISSING,
        "digits_calibrated": say("{calibrated:.2f} %", digits),
        "digits_accuracy": say("{accuracy:.2f} %", digits),
        "digits_size": say("{kB}", digits),
        "second_bit": f"{second_bit:.1f}" if second_bit else MISSING,
        "weights_int8": say("{accuracy:.2f} %", weights),
        "weights_int8_size": say("{kB}", weights),
        "competitors_hardware": say("{hardware}, {isa}", next(iter(records.COMPETITORS), None)),
        "cifar_epochs": span([found["epochs"] for found in records.results("cifar10-jpeg")]),
        "best_setting": records.named(best["M"], best["N"], best["code"]) if best else MISSING,
        "best_accuracy": say("{accuracy:.2f} %", best),
        "best_size": say("{kB}", best),
        "best_loss": points_lost(best),
        "epochs": say("{epochs}", reference),
        "tuned_epochs": say("{epochs}", next((found for found in records.results() if found["M"] or found["N"]), None)),
        "calibrated_33": percent((records.result(3, 3) or {}).get("calibrated")),
        "weights_only": weights_only(),
        "wins_against_float32": crossover("times_float32"),
        "wins_against_int8": crossover("times_int8"),
        "int8_accuracy": say("{accuracy:.2f} %", int8),
        "int8_size": say("{kB}", int8),
        "int8_full_range": percent(records.int8_accuracy(seven_bits=False)),
        "int8_seven_bits": percent(records.int8_accuracy(seven_bits=True)),
        "int8_beaten": f"{beaten} of the {cases}" if int8 else MISSING,
    }
    for n in records.BASES:
        speed = records.on_one_thread("times_int8").get(n * n)
        values[f"times_int8_{n}"] = f"{speed:.2f}" if speed else NOT_MEASURED
    for precision in ("float32", "mixed"):
        for what, column in (("time", "ratio"), ("memory", "memory_ratio")):
            values[f"step_{what}_{precision}"] = say(f"{{{column}:.2f}}", steps.get(precision), f"({NOT_MEASURED})")
    return values | pays()


def span(counts: list[int]) -> str:
    """3, 10, 4 in words: "3 to 10"."""
    return (f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])) if counts else MISSING


def weights_only() -> str:
    """What binary weights with float activations lose, in words, by those that were run."""
    settings = [(M, code) for M, N, code in records.SETTINGS if M and not N]
    lost = [(M, code, points_lost(found)) for M, code in settings if (found := records.result(M, None, code))]
    several = [M for M, *_ in lost]
    words = [f"{points} at M = {M}" + f" ({code})" * (several.count(M) > 1) for M, code, points in lost]
    return ", ".join(words) or MISSING


def points_lost(found: dict | None) -> str:
    """What a setting of the nine-layer network loses against the float network."""
    return f"{records.result()['accuracy'] - found['accuracy']:.2f}" if found and records.result() else MISSING


def crossover(column: str) -> str:
    """The largest measured M N up to which bits win, on the machine that the sentences are about."""
    if not records.CPU:
        return NOT_MEASURED
    return str(crossing(pd.DataFrame(records.cpu_machines()[0][1]), column) or "none")


FIRST_SCREEN = [  # (form, M, N, code) of the README's first table
    ("float32", None, None, "thermometer"), ("torch bfloat16", None, None, "thermometer"),
    ("onnxruntime int8", None, None, "thermometer"),
    ("abcnets", 1, 2, "binary"), ("abcnets", 2, 3, "uniform,binary"), ("abcnets", 2, 3, "binary"),
    (records.IN_INT8, 2, None, "binary"),
]  # fmt: skip


def first_table() -> str:
    """What one would choose from, as far as it was run: accuracy of all seeds, file, time on one thread."""
    whats = {"float32": "float32", "torch bfloat16": "bfloat16", "onnxruntime int8": "int8", "abcnets": ""}
    rows = []
    for name, M, N, code in FIRST_SCREEN:
        form, found = records.contender(name, M, N, code), records.result(M, N, code)
        what = f"**{records.named(M, N, code)}**" if M else whats[name]
        if name == records.IN_INT8:
            what = f"**{records.named(M, N, code).replace('float', 'int8')}**, in ONNX Runtime"
        if form is None or (name == "abcnets" and found is None):
            continue
        accuracy = found["accuracy"] if found and name in ("float32", "abcnets") else form["accuracy"]
        times = [f"{form['ms'][batch, 1]:.3f} ms" if (batch, 1) in form["ms"] else MISSING for batch in (1, 32)]
        rows.append([what, percent(accuracy), kB(form["bytes"]), *times])
    head = ["weights × activations", "accuracy", "file", "1 image", "of 32, each"]
    return table(head, rows, "lrrrr")


def five_lines() -> str:
    """The README's first lines of use, and what each step makes of the nine-layer network."""
    setting = 2, 3, "uniform,binary"
    found, form = records.result(*setting), records.contender("abcnets", *setting)
    floats, int8 = records.fastest_float32(), records.rival("onnxruntime int8")
    times = [one["ms"].get((32, 1), math.nan) if one else math.nan for one in (form, floats, int8)]
    sizes = [kB(one["bytes"]) if one else MISSING for one in (form, floats)]
    lines = [
        ('binary = abcnets.convert(model, 2, 3, code=("uniform", "binary"))',
         "M = 2, N = 3: " + say("{float:.2f} % becomes {binarized:.2f} %", found)),
        ("abcnets.calibrate(binary, images)", "no training, no labels: " + say("{calibrated:.2f} %", found)),
        ("...", "or train it on, as any network: " + say("{accuracy:.2f} %", found)),
        ("packed = abcnets.pack(binary)", "a bit a weight and base; outputs as before"),
        ('abcnets.save_packed(packed, "model.safetensors")', "{}, in float32 {}".format(*sizes)),
        ("logits = abcnets.fuse(packed)(images)", "{:.3f} ms an image, float32 {:.3f}, int8 {:.3f}".format(*times)),
    ]  # fmt: skip
    return "\n".join(["```python", *(f"{code:<66} # {comment}" for code, comment in lines), "```"])


def pays() -> dict[str, str]:
    """Up to which M N a packed layer runs bits, by what counts them."""
    limits = json.loads(LIMITS.read_text())
    kinds = {"avx512": "AVX-512 popcount", "avx2": "AVX2 look-up", "arm": "NEON dot product"}
    return {f"pays_{kind}": str(limits[tile]) for kind, tile in kinds.items()}


def for_readme() -> dict[str, str]:
    """{marker: text} of the README."""
    values = pays() | {"first_table": first_table(), "five_lines": five_lines(), "smaller": MISSING}
    forms = [form for case in FIRST_SCREEN if case[0].startswith("abcnets") and (form := records.contender(*case))]
    if forms and (floats := records.fastest_float32()):
        smaller = [round(floats["bytes"] / form["bytes"]) for form in forms]
        values["smaller"] = f"{min(smaller)} to {max(smaller)}"
    timed = next((rows for _, rows in records.speed_machines()), [])
    for bases in (1, 2, 3):
        found = records.network_speeds(timed, bases, bases, "binary" if bases > 1 else "thermometer", "times_float32")
        speeds = [times for (network, *_), times in found.items() if network == "ResNet-18"]
        values[f"speed_{bases}"] = f"{min(speeds):.1f} to {max(speeds):.1f}" if speeds else f"({NOT_MEASURED})"
    twos = [row for row in records.MIXED if (row["dataset"], row["uniform"]) == (records.DATASET, 2)]
    mixed = {row["code"]: row for row in twos}
    for code, kind in itertools.product(("thermometer", "binary"), ("uniform", "mixed")):
        values[f"{kind}_{code}_2"] = say(f"{{{kind}_accuracy:.2f}} %", mixed.get(code))
    values["mixed_trained"] = say("{accuracy:.2f} %", records.result(2, 2, "mixed binary"))
    return values | {
        "timed_accuracy_table": timed_accuracy_table(),
        "int8_table": int8_table(),
        "speed_hardware": say("{hardware}, {isa}", next(iter(timed), None), NOT_MEASURED),
        "competitors_hardware": say("{hardware}, {isa}", next(iter(records.COMPETITORS), None)),
    }
