"""The writeup's figures: their numbers, and how each is drawn from them.

Each figure's numbers are in figures/data.json, and each figure carries their checksum.
"""

import hashlib
import json
import math
from pathlib import Path
from statistics import median

from kernels.report import label_points, log_axis
from writeup import arithmetic, records

REPAIRS = {  # a column of calibration.csv: its name in the figure
    "binarized": "just binarized", "norms": "BatchNorm alone", "thresholds": "thresholds alone", "both": "both",
    "all": "and weights moved",
}  # fmt: skip
STYLE = Path(__file__).resolve().parent.parent / "notebooks" / "abcnets.mplstyle"


NEAR = 1.5  # points behind the most accurate form, of those that are drawn


def figure_data() -> dict:
    """The numbers of each figure, as plain JSON: {figure: data}."""
    M = 5
    best, even = arithmetic.gaussian_thresholds, arithmetic.even_thresholds
    rates = arithmetic.CPU_RATES
    fewest = min((row["threads"] for row in records.COMPETITORS), default=1)
    forms = [
        form | {"ms": {str(batch): ms for (batch, threads), ms in form["ms"].items() if threads == fewest}}
        for form in records.competitors()
        if form["name"] != records.IN_INT8 or not form["N"]  # those with bits on both sides gain nothing there
    ]
    most = max((form["accuracy"] for form in forms), default=0)
    forms = [form for form in forms if form["accuracy"] > most - NEAR]  # one far below would press the others together
    measured = {}
    for machine, rows in records.cpu_machines():
        fewest_of_it = min(records.cpu_threads(rows))
        speeds = {form: records.by_products(rows, form, "times_float32", fewest_of_it) for form in ("packed", "words")}
        shapes = {}
        for r in rows:
            if (r["K"], r["threads"]) == (3, fewest_of_it) and r["contender"].startswith("int8"):
                shapes.setdefault(tuple(r[k] for k in ("C", "O", "size", "stride", "B")), []).append(r["times_float32"])
        speeds["int8"] = median(max(times) for times in shapes.values()) if shapes else None
        measured[machine] = speeds
    return _rounded({
        "bits": {"a": arithmetic.A, "w": arithmetic.W},
        "idea": {"rows": records.FILTER},
        "levels": {"M": M, "thresholds": best(M), "levels": arithmetic.gaussian_levels(best(M))[0],
                   "even_thresholds": even(M), "even_levels": arithmetic.gaussian_levels(even(M))[0],
                   "even": arithmetic.gaussian_errors(even), "best": arithmetic.gaussian_errors(best)},
        "calibration": {"rows": [{key: row[key] for key in ("M", *REPAIRS, "float")} for row in records.CALIBRATION]},
        "threshold": {"scales": [1.5, -1.2], "shifts": [0.3, 0.5], "mean": 0.2, "std": 1.1, "thresholds": [0.4, 1.2]},
        "competitors": {"forms": forms, "threads": fewest},
        "speed": {"estimate": rates["bits"] / rates["float32"], "int8_estimate": rates["int8"] / rates["float32"],
                  "measured": measured},
        "roofline": {"roof": arithmetic.GPU_UNITS, "bytes": arithmetic.GPU_BYTES,
                     "tiles": {f"{n} {out}": arithmetic.tile(n, out == "bits")["intensity"] for n in (1, 2, 3)
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
    fig, ax = plt.subplots(figsize=(7, 1.6))
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


def draw_idea(plt, data):
    fig, axes = plt.subplots(1, 4, figsize=(7, 1.9), layout="none")
    fig.subplots_adjust(left=0.01, right=0.965, bottom=0.02, top=0.86, wspace=0.3)
    rows = data["rows"]
    side = math.isqrt(len(rows) // 9) if rows else 1  # of a square of channels, each 3 x 3

    def show(ax, values, title, limit, colors):
        image = [[math.nan] * (4 * side - 1) for _ in range(4 * side - 1)]
        for row, value in zip(rows, values):
            down, right = divmod(row["channel"], side)
            image[4 * down + row["row"]][4 * right + row["column"]] = value
        ax.imshow(image, cmap=colors, vmin=-limit, vmax=limit)
        ax.set_title(title, fontsize=11, loc="center")
        ax.axis("off")

    if not rows:
        axes[0].text(0, 0, "not measured yet", color="#A04000")
        return fig
    a, b = rows[0]["alpha_1"], rows[0]["alpha_2"]
    quantized = [a * row["B_1"] + b * row["B_2"] for row in rows]
    largest = 1.3 * max(map(abs, quantized))
    show(axes[0], [row["W"] for row in rows], "W, a trained filter", largest, "RdBu")
    show(axes[1], [row["B_1"] for row in rows], f"≈   {a:.2f} · B₁", 1.6, "RdBu")
    show(axes[2], [row["B_2"] for row in rows], f"+   {b:.2f} · B₂", 1.6, "RdBu")
    show(axes[3], quantized, f"=   Wq, in {len({round(value, 6) for value in quantized})} levels", largest, "RdBu")
    return fig


def draw_levels(plt, data):
    fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.4), width_ratios=(1.25, 1))
    xs = [-3 + 6 * i / 600 for i in range(601)]
    bell = [4 * arithmetic.density(x) - 2.2 for x in xs]
    left.fill_between(xs, bell, -2.2, color="#DDDDDD", linewidth=0, label="Gaussian")
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


def draw_calibration(plt, data):
    fig, ax = plt.subplots(figsize=(7, 2.4))
    colors = ("#BBBBBB", "#E69F00", "#56B4E9", "#0072B2", "#D55E00")
    for i, ((key, name), color) in enumerate(zip(REPAIRS.items(), colors)):
        places = [place + (i - 2) * 0.16 for place in range(len(data["rows"]))]
        bars = ax.bar(places, [row[key] for row in data["rows"]], 0.15, color=color, label=name)
        ax.bar_label(bars, fmt="%.0f", fontsize=7, padding=1, bbox={"color": "white", "pad": 0.5})
    if data["rows"]:
        ax.axhline(data["rows"][0]["float"], color="#333333", linestyle=":", linewidth=1, label="float", zorder=0)
    ax.set_xticks(range(len(data["rows"])), [f"M = N = {row['M']}" for row in data["rows"]])
    ax.set(ylabel="test accuracy, %", ylim=(0, 106))
    ax.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return fig


def draw_threshold(plt, data):
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.3), sharey=True)
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


def draw_competitors(plt, data):
    forms = data["forms"]
    batches = sorted({int(batch) for form in forms for batch in form["ms"]}) or [1]
    fig, axes = plt.subplots(1, 1 + len(batches), figsize=(3.1 * (1 + len(batches)), 3.4), sharey=True, layout="none")
    fig.subplots_adjust(left=0.075, right=0.985, bottom=0.28, top=0.97, wspace=0.08)
    kinds = {
        "torch": ("#777777", "D", "torch"), "onnxruntime": ("#333333", "s", "onnxruntime"),
        "abcnets": ("#0072B2", "o", "abcnets, both sides binary (M, N)"),
        "weights": ("#D55E00", "^", "abcnets, binary weights alone (M)"),
        records.IN_INT8: ("#009E73", "v", "abcnets in ONNX, activations in int8 (M)"),
    }  # fmt: skip
    worlds = [lambda form: form["bytes"] / 1000, *(lambda form, b=b: form["ms"][str(b)] for b in batches)]
    labels = ["size of the file, kB", *(f"ms an image, {b} at a time" if b > 1 else "ms an image, one at a time"
                                        for b in batches)]  # fmt: skip
    axes[0].set_ylabel("test accuracy, %")
    if not forms:
        axes[0].text(0.5, 0.5, "not measured yet", transform=axes[0].transAxes, color="#A04000", ha="center")
        return fig
    low, high = (limit(form["accuracy"] for form in forms) for limit in (min, max))
    axes[0].set_ylim(low - 0.3, high + 0.25)
    for ax, place, label in zip(axes, worlds, labels):
        ax.set_xlabel(label)
        log_axis(ax, [place(form) for form in forms])
        points = []
        for form in forms:
            color, marker, _ = kinds[_kind(form)]
            ax.plot(place(form), form["accuracy"], marker, color=color, linestyle="none", markersize=6, zorder=3)
            points.append((place(form), form["accuracy"], _form_label(form), color))
        label_points(ax, points)
    used = {_kind(form) for form in forms}
    handles = [plt.Line2D([], [], color=color, marker=marker, linestyle="none", label=name)
               for kind, (color, marker, name) in kinds.items() if kind in used]  # fmt: skip
    fig.legend(handles=handles, loc="lower center", ncols=3, fontsize=9, handletextpad=0.2)
    return fig


def _kind(form) -> str:
    if form["name"] == "abcnets":
        return "abcnets" if form["N"] else "weights"
    return form["name"] if form["name"].startswith("abcnets") else form["name"].split()[0]


def _form_label(form) -> str:
    """1 x b2: one base for the weights, two digits for the activations; 1: binary weights alone;
    t: thermometer, u: uniform, m2 x m2: mixed settings within the budget of 2 x 2.

    int8: what a library, which the mark tells, makes of the float network.
    """
    if not form["M"] and not form["N"]:
        return form["name"].split()[-1]
    codes = form["code"].split(",")
    counts = (form["M"], codes[0]), (form["N"], codes[-1])
    sides = [f"{code[0] if count > 1 else ''}{count}" if count else "float" for count, code in counts]
    return " × ".join(sides) if form["N"] else sides[0]


def draw_speed(plt, data):
    fig, ax = plt.subplots(figsize=(7, 2.9), layout="constrained")
    products = [1 + 29 * i / 200 for i in range(201)]
    ax.plot(products, [data["estimate"] / p for p in products], color="#333333", linestyle="--", linewidth=1.3,
            label="bits, estimate")  # fmt: skip
    ax.axhline(data["int8_estimate"], color="#009E73", linestyle=":", label="int8, estimate")
    ax.axhline(1, color="#777777", linewidth=0.9)
    ax.text(28, 1.05, "float32", fontsize=8, color="#555555", ha="right")
    colors = iter(("#0072B2", "#D55E00", "#009E73", "#CC79A7"))
    forms = {"packed": ("o", "-", "floats in and out"), "words": ("s", "--", "bits in and out")}
    for machine, speeds in data["measured"].items():
        color = next(colors, "#333333")
        for form, (marker, style, name) in forms.items():
            line = {int(products): times for products, times in speeds[form].items()}
            ax.plot(line.keys(), line.values(), color=color, marker=marker, markersize=4, linestyle=style,
                    label=f"{machine}: {name}")  # fmt: skip
        if speeds["int8"]:
            ax.axhline(speeds["int8"], color=color, linestyle=":", linewidth=1, label=f"{machine}: int8")
    if not data["measured"]:
        ax.text(0.5, 0.9, "not measured yet", transform=ax.transAxes, fontsize=11, color="#A04000", ha="center")
    ax.set(xlabel="binary convolutions, M × N", ylabel="times as fast as float32", xscale="log", yscale="log",
           xlim=(0.95, 31), ylim=(0.5, 40))  # fmt: skip
    ax.set_xticks([1, 2, 4, 9, 16, 25], ["1", "2", "4", "9", "16", "25"])
    ax.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
    ax.minorticks_off()
    fig.legend(fontsize=8, loc="outside lower center", ncols=2)
    return fig


def draw_roofline(plt, data):
    fig, ax = plt.subplots(figsize=(7, 2.7))
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
    "bits": draw_bits, "idea": draw_idea, "levels": draw_levels, "calibration": draw_calibration,
    "threshold": draw_threshold, "competitors": draw_competitors, "speed": draw_speed, "roofline": draw_roofline,
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
