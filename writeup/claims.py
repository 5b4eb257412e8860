"""What the prose says of the numbers, and whether they bear it out: {words of the page: true?}.

The words stand in the page exactly so, but for line breaks and markers; where results are missing nothing is borne out.
"""

import math
import re

from writeup import arithmetic, records, tables


def of_writeup() -> dict[str, bool]:
    return _examples() | _estimates() | _weights() | _calibration() | _codes() | _choices() | _results()


def of_readme() -> dict[str, bool]:
    fast = [records.contender("abcnets", *setting) for setting in ((1, 2, "binary"), (2, 3, "uniform,binary"))]
    return {
        "Activations want more bases than weights.": _more_for_activations(),
        "weights of three levels and activations of eight, faster than in int8": _faster_everywhere(fast[1:]),
        "at 0.5 to 1.1 points: weights of two or three levels run faster than int8, above":
            _faster_everywhere(fast) and _lost_to_int8(fast) == [1.1, 0.5],
        "So do two bits on each side in ResNet-20, and one in ResNet-18, whose layers are wide": _residual_networks(),
        "trained on, they are as accurate as int8 and no slower, in a third of its file": _weights_replace_int8(),
        "Two digits on each side come within a quarter of a point of three nested bases": _digits_come_near(),
    }


def _examples() -> dict[str, bool]:
    """The worked examples: whatever the numbers are, the text must have them."""
    e = arithmetic.bit_example()
    left = e["K"] - 2 * e["count_padded"]
    levels = arithmetic.cut(arithmetic.WEIGHTS_EXAMPLE, arithmetic.gaussian_thresholds(2))[1]
    first, second = ((b - a) / 2 for a, b in zip(levels, levels[1:]))
    return dict.fromkeys([
        rf"$a \cdot w = {e['K']} - 2 \cdot {e['count']} = {e['dot']}$ here",
        rf"$4 \cdot {e['count_and']} - 2 \cdot {e['count_a']} - 2 \cdot {e['count_w']} + {e['K']} = {e['dot_and']}$",
        rf"`{e['padded']:08b}` XOR `{e['w']:08b}` has {e['count_padded']} ones, which makes "
        rf"${e['K']} - 2 \cdot {e['count_padded']} = {left}$; the padded pair added ${e['too_much']}$ of that, and "
        rf"taking it back leaves ${left - e['too_much']}$, the sum over the other six",
        rf"$\alpha_1 = (c_1 - c_0)/2 = {first:.3f}$ and $\alpha_2 = (c_2 - c_1)/2 = {second:.3f}$",
        rf"$1 - 2/\pi \approx {arithmetic.gaussian_errors(arithmetic.gaussian_thresholds)[0]:.3f}$",
    ], True)  # fmt: skip


def _estimates() -> dict[str, bool]:
    float32, int8, bits = (arithmetic.CPU_RATES[kind] for kind in ("float32", "int8", "bits"))
    units = arithmetic.GPU_UNITS
    roof = units["binary tensor core, `mma`"]
    floats, words = ({n: arithmetic.tile(n, out) for n in (1, 2, 3)} for out in (False, True))
    measured, limit = records.on_one_thread("times_float32"), tables.pays()["pays_avx512"]
    return {
        f"bits beat float32 up to $M N = {bits // float32:.0f}$ and int8 up to $M N = {bits // int8:.0f}$": True,
        f"up to $M N$ of about {bits // int8:.0f}, which means $M = N = {math.isqrt(int(bits // int8))}$": True,
        f"Somewhere between $M N = 9$ and 25 (at {bits // float32:.0f} by the estimate; we take {limit})":
            {9, 25} <= measured.keys() and measured[9] > 1 > measured[25],
        "On one thread, with floats in and out, the largest $M N$":
            bool(records.CPU) and records.cpu_threads(records.cpu_machines()[0][1])[0] == 1,
        "int8 does four times the products of float32": int8 == 4 * float32,
        "does half of what the TF32 tensor core does": 2 * units["popcount"] == units["TF32 tensor core"],
        "$M = N = 1$ writing a float result takes three times as long as computing it":
            round(floats[1]["writing"] / floats[1]["counting"]) == 3,
        "(open squares) M = N = 1 is bound by memory": floats[1]["writing"] > floats[1]["counting"],
        "(filled) every case reaches that of the binary tensor core":
            all(arithmetic.GPU_BYTES * tile["intensity"] >= roof for tile in words.values()),
    }  # fmt: skip


def _weights() -> dict[str, bool]:
    kinds = arithmetic.gaussian_thresholds, arithmetic.even_thresholds
    pairs = {M + 1: [errors] for M, errors in enumerate(zip(*map(arithmetic.gaussian_errors, kinds)))}
    for M in pairs if records.WEIGHTS else ():
        pairs[M].append((records.weight_error(M, "gaussian"), records.weight_error(M, "even")))
    alike = all(abs(best / even - 1) < 0.02 for M in (1, 3) for best, even in pairs[M])
    less = all(best < 0.95 * even for M in (2, 4, 5, 6) for best, even in pairs[M])
    return {
        "At $M = 1$ the two are the same, and at $M = 3$ nearly so": alike,
        "At two bases, and from four on, the Gaussian ones leave clearly less, on the trained weights as well":
            less and bool(records.WEIGHTS),
    }  # fmt: skip


def _calibration() -> dict[str, bool]:
    rows = records.CALIBRATION
    by_norms = [row["M"] for row in rows if row["norms"] - row["binarized"] > row["all"] - row["both"]]
    return {
        "Better thresholds alone do not help": bool(rows) and all(r["thresholds"] < r["binarized"] + 0.5 for r in rows),
        "With two bases and more the largest repair is to measure each BatchNorm's mean and variance anew":
            by_norms == [2, 3, 5],
        "With one base it is to move the weights": by_norms == [2, 3, 5],
    }  # fmt: skip


def _codes() -> dict[str, bool]:
    best = arithmetic.code_error
    rows = {case: records.coded_accuracy(*case) for case in records.CODES}
    there = all(accuracy is not None for accuracy in rows.values())
    rows = {case: accuracy or 0 for case, accuracy in rows.items()}
    digits, nested, kept = rows[2, 2, "code=binary"], rows[3, 3, ""], rows[3, 3, "zero"]
    uniform = rows[2, 2, "code=binary,uniform"]
    cheap = rows[1, 2, "code=uniform"], rows[1, 2, "code=binary"]
    size = lambda *case: records.coded_runs(*case)[0]["file_bytes"]  # noqa: E731
    weights = rows[2, None, "code=binary"], rows[2, None, ""], rows[3, None, ""]
    return {
        "Two digits leave what three nested bases leave, since both have four levels":
            abs(best("binary", 2) - best("thermometer", 3)) < 0.001,
        "three digits nearly what seven nested bases do":
            best("thermometer", 6) > best("binary", 3) > best("thermometer", 7),
        "Trained, two digits on each side come within a quarter of a point of three nested bases": _digits_come_near(),
        "three quarters of the bytes": there and 0.7 < size(2, 2, "code=binary") / size(3, 3, "") < 0.8,
        "Keeping zero does not hurt: what it gains is about as much as seeds differ here":
            there and all(0 < more < 0.4 for more in (digits - rows[2, 2, "no-zero code=binary"], kept - nested)),
        "Three digits on each side are ahead of all else in the table that has bits on both sides":
            there and rows[3, 3, "code=binary"] == max(accuracy for (_, N, _), accuracy in rows.items() if N),
        "the network lies between the thermometers of two and of three: about half a point is lost":
            there and rows[2, 2, ""] < uniform < nested and 0.3 < digits - uniform < 0.7,
        "Two free scales for the same three levels do not bring it back":
            there and rows[2, 2, "zero code=binary,thermometer"] < uniform + 0.15,
        "more than anything else in the table, and most of that with uniform levels too":
            there and rows[1, 1, ""] + 2 < cheap[0] < cheap[1],
        "For weights alone the code matters little": there and max(weights) - min(weights) < 0.3,
    }


def _choices() -> dict[str, bool]:
    """What the ablation says of the shifts."""
    default, even = (records.ablated(frozenset(options)) for options in ((), ("even-shifts",)))
    there = bool(default and even)
    spread = [run["accuracy"] for run in default + even]
    return {
        "even shifts calibrate to a little more, and after training the two are alike":
            there and 0 < even[0]["calibrated"] - default[0]["calibrated"] < 1
            and abs(records.mean_accuracy(default) - records.mean_accuracy(even)) < max(spread) - min(spread),
    }  # fmt: skip


def _faster_everywhere(forms: list) -> bool:
    """Whether forms beat int8 in all that was timed."""
    return all(form and form["ms"] and set(form["ms"]) == records.faster_than_int8(form) for form in forms)


def _lost_to_int8(forms: list) -> list[float]:
    """Points of accuracy, to a tenth."""
    int8 = records.rival("onnxruntime int8")
    return [round(int8["accuracy"] - form["accuracy"], 1) for form in forms if form and int8]


def _digits_come_near() -> bool:
    """Two digits to three nested bases, where codes are compared and in the main rows."""
    coded = records.coded_accuracy(2, 2, "code=binary"), records.coded_accuracy(3, 3)
    trained = [found and found["accuracy"] for found in (records.result(2, 2, "binary"), records.result(3, 3))]
    return all(None not in pair and abs(pair[0] - pair[1]) < 0.25 for pair in (coded, trained))


def _residual_networks() -> bool:
    """ResNets against int8, in all that was timed on the machine that the sentence is about."""
    here = next((rows for _, rows in records.speed_machines()), [])

    def slowest(network, *setting):
        speeds = records.network_speeds(here, *setting, "times_int8")
        return min((speed for case, speed in speeds.items() if case[0] == network), default=0)

    return slowest("ResNet-20", 2, 2, "binary") > 1 and slowest("ResNet-18", 1, 1, "thermometer") > 1


def _weights_replace_int8() -> bool:
    """Two digits for the weights, activations in int8, against int8's own network."""
    ours, int8 = records.contender(records.IN_INT8, 2, None, "binary"), records.rival("onnxruntime int8")
    return (
        bool(ours and int8)
        and ours["accuracy"] > int8["accuracy"] - records.ALIKE
        and all(ms <= int8["ms"].get(case, 0) for case, ms in ours["ms"].items())
        and ours["bytes"] < 0.36 * int8["bytes"]
    )


def _more_for_activations() -> bool:
    """Of all layers together, in each budget."""
    bases = [re.findall(r":(\d+),(\d+)", row["mixed_settings"]) for row in records.MIXED]
    return bool(bases) and all(sum(int(N) - int(M) for M, N in layers) > 0 for layers in bases)


def _mixed_takes_longer() -> bool:
    mixed, uniform = (records.contender("abcnets", 2, 2, code) for code in ("mixed binary", "binary"))
    return bool(mixed and uniform) and all(
        1 < mixed["ms"].get(case, 0) / ms < 1.2 for case, ms in uniform["ms"].items())


def _three_levels(one_bit) -> bool:
    """Weights of three levels against those of one bit, with three digits an activation."""
    three = records.contender("abcnets", 2, 3, "uniform,binary")
    calibrated = [found and found["calibrated"] for found in
                  (records.result(1, 3, "binary"), records.result(2, 3, "uniform,binary"))]  # fmt: skip
    return (
        bool(one_bit and three)
        and all(ms < 1.05 * one_bit["ms"].get(case, 0) for case, ms in three["ms"].items())
        and _lost_to_int8([three]) == [0.5]
        and None not in calibrated and calibrated[1] > calibrated[0] + 1
    )


def _results() -> dict[str, bool]:
    step = records.STEP_OF_TEXT
    int8, three = records.rival("onnxruntime int8"), records.contender("abcnets", 3, 3, "binary")
    six, nine = (records.result(M, 3, "binary") for M in (2, 3))
    trained = records.result(3, 3, "binary")
    mixed = records.MIXED
    kinds = "bytes", "binary_macs"
    light, fine, digits = (records.contender("abcnets", *bases, "binary") for bases in ((1, 3), (1, 4), (2, 2)))
    return {
        "as accurate as int8's own network and no slower, in a third of its bytes": _weights_replace_int8(),
        "are as accurate as three for both, with six binary convolutions in the place of nine":
            bool(six and nine) and six["accuracy"] > nine["accuracy"] - 0.1,
        "the bit costs nothing":
            (records.int8_accuracy(True) or 0) >= (records.int8_accuracy(False) or math.inf) - records.ALIKE,
        "They are counted no more often, but take a little longer": _mixed_takes_longer(),
        "three digits on both sides are slower than int8":
            bool(int8 and three) and not records.faster_than_int8(three),
        "With three digits on both sides training adds nothing to what calibration found":
            bool(trained) and trained["accuracy"] < trained["calibrated"] + 0.1,
        "one bit a weight and three digits an activation run faster than int8, one image at a time and in batches, "
        "and lose 0.7 points to it":
            bool(int8 and light) and _faster_everywhere([light]) and _lost_to_int8([light]) == [0.7],
        "Weights of three levels (*uniform 2*) take no longer than those of a bit and lose 0.5 points; calibrated, not "
        "trained, they are more than a point ahead of it": _three_levels(light),
        "One bit and four digits are as accurate as two digits on both sides or more so":
            bool(fine and digits) and fine["accuracy"] > digits["accuracy"] - records.ALIKE
            and fine["bytes"] < digits["bytes"] and any(fine["ms"][case] > ms for case, ms in digits["ms"].items()),
        f"a training step at $M = {step['M']}$, $N = {step['N']}$ and batch {step['batch_size']}":
            any(step.items() <= row.items() for row in records.STEP),
        "within the bytes, and the binary multiplications, of a uniform setting":
            bool(mixed) and all(row[f"mixed_{kind}"] <= row[f"uniform_{kind}"] for row in mixed for kind in kinds),
        "on the nine-layer network activations get more bases than weights":
            _more_for_activations(),
    }  # fmt: skip
