"""What `bench` measured, as a table in README.md and a figure.

It reads rows and needs no GPU: `python -m kernels.cuda.report` renews both from results/cuda.csv.
"""

import csv
import math
import statistics
from pathlib import Path

HERE = Path(__file__).parent

LADDER = (  # method in the CSV, file, idea
    ("pack", "rung1_pack", "compare and pack; a warp's comparison is a word (`ballot`)"),
    ("float", "rung2_float", "naive float convolution, a thread an output: the original's yardstick"),
    ("popcount", "rung3_popcount", "XOR and popcount, a thread an output: the original's kernel"),
    ("shared", "rung4_shared", "what a block's threads have in common, once, in shared memory"),
    ("bases", "rung5_bases", "all M x N bases in one pass, scales at the end"),
    ("mma", "rung6_tensorcore", "the binary tensor core: `mma.sync` b1, `ldmatrix`, `cp.async`, no im2col"),
    ("wgmma", "rung7_wgmma", "Hopper's `wgmma` b1: weights read from shared memory by the tensor core"),
    ("fused", "rung8_fused", "BatchNorm, ReLU and the next thresholds in the epilogue: bits out"),
)
BEGIN, END = "<!-- cuda table: written by bench.py -->", "<!-- end of cuda table -->"


def _number(row, key):
    try:
        return float(row[key])
    except (KeyError, TypeError, ValueError):
        return None


def select(rows, **wanted) -> list:
    """Rows with a time whose fields are these (numbers compared as text)."""
    return [
        row for row in rows
        if _number(row, "us") is not None and all(str(row[k]) == str(v) for k, v in wanted.items())
    ]  # fmt: skip


def fastest(rows, **wanted):
    """The least microseconds among the chosen rows, or None."""
    return min((_number(row, "us") for row in select(rows, **wanted)), default=None)


def _counts(rows) -> list:
    """The values of M = N that were measured."""
    return sorted({int(row["M"]) for row in select(rows, section="resnet18") if row["M"] != ""})


def _ratio(a, b) -> str:
    return "-" if a is None or b is None else f"{a / b:.2f}"


def table(rows) -> str:
    """The README's tables, as Markdown."""
    if not any(_number(row, "us") is not None for row in rows):
        return (
            "Not measured yet. On a machine with an NVIDIA GPU, `python -m kernels.bench --device cuda` measures and "
            "checks everything in less than 8 minutes, and fills this table and the figure."
        )
    first = rows[0]
    lines = [
        f"{first['device']} (compute capability {first['capability']}), driver {first['driver']}, "
        f"torch {first['torch']}, numba-cuda {first['numba_cuda']}, {first['date']}.",
        "",
        "![the ladder, and bits against cuDNN](results/cuda.svg)",
        "",
        "One layer, 3 x 3, 128 -> 128, 32 x 28 x 28. Times over ours: above 1 the bits are faster.",
        "",
        "| rung | idea | M = N | us | Top/s | of its bound | cuDNN float32 | TF32 | fp16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cudnn = {m: fastest(rows, section="ladder", method=f"cudnn {m}") for m in ("float32", "tf32", "fp16")}
    for number, (method, file, idea) in enumerate(LADDER, 1):
        for row in select(rows, section="ladder", method=method):
            us = _number(row, "us")
            against = "| - | - | -" if method == "pack" else "".join(f"| {_ratio(cudnn[m], us)} " for m in cudnn)
            rate = "-" if method == "pack" else f"{_number(row, 'ops_per_s') / 1e12:.3g}"
            share = f"{100 * _number(row, 'bound_us') / us:.0f} %"
            rung, bases = f"{number} [{file}.py]({file}.py)", row["M"] or "float"
            lines.append(f"| {rung} | {idea} | {bases} | {us:.1f} | {rate} | {share} {against}|")
    lines += [
        "",
        "ResNet-18's 3 x 3 layers at batch 256, geometric mean of cuDNN's time over ours, bits in:",
        "",
        "| M = N | out | float32 | TF32 | fp16 | int8 product |",
        "|---|---|---|---|---|---|",
    ]
    rivals = ("cudnn float32", "cudnn tf32", "cudnn fp16", "int8 product")
    counts = _counts(rows)
    for count in counts:
        for out, methods in (("floats", ("mma", "wgmma")), ("bits", ("fused", "wgmma fused"))):
            means = [_mean_speedup(rows, rival, methods, count) for rival in rivals]
            lines.append(f"| {count} | {out} | " + " | ".join("-" if m is None else f"{m:.2f}" for m in means) + " |")
    lines += ["", "Crossover, the largest measured M N at which bits are still faster (same layers, bits in and out): "]
    limits = []
    for rival in rivals:
        wins = [n * n for n in counts if (_mean_speedup(rows, rival, ("fused", "wgmma fused"), n) or 0) > 1]
        limits.append(f"{rival} {max(wins, default='none')}")
    lines[-1] += ", ".join(limits) + "."
    ceilings = [row for row in rows if row["section"] == "ceilings"]
    lines += ["", "Measured ceilings: " + "; ".join(_ceiling(row) for row in ceilings) + "."]
    left_out = [row for row in rows if str(row["note"]).startswith(("skipped", "wrong"))]
    if left_out:
        lines += ["", f"Left out: {len(left_out)} rows, with their reasons in [results/cuda.csv](results/cuda.csv)."]
    return "\n".join(lines)


def _ceiling(row) -> str:
    return f"{row['method']} {float(row['ops_per_s']):.3g} {row['note'].rstrip('; ')}"


def _mean_speedup(rows, rival, methods, count, B=256, K=3):
    """Geometric mean of their time over ours, over ResNet-18's layers where both were timed; None where none was."""
    rows = select(rows, section="resnet18", B=B, K=K)
    logs = []
    for C, H, O, stride in {(row["C"], row["H"], row["O"], row["stride"]) for row in rows}:
        layer = select(rows, C=C, H=H, O=O, stride=stride)
        theirs = fastest(layer, method=rival)
        ours = min((fastest(layer, method=m, M=count, N=count) or math.inf for m in methods), default=math.inf)
        if theirs and ours < math.inf:
            logs.append(math.log(theirs / ours))
    return math.exp(statistics.mean(logs)) if logs else None


def figure(rows, path) -> None:
    """Speed of bits over cuDNN against M N, for ResNet-18's 3 x 3 layers, and the ladder's rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "abcnets"
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names, rates, counts = [], [], _counts(rows)
    for method, _, _ in LADDER[1:]:
        for row in select(rows, section="ladder", method=method):
            names.append(f"{method}" + (f"  M = N = {row['M']}" if row["M"] != "" else ""))
            rates.append(_number(row, "ops_per_s") / 1e12)
    left.barh(names[::-1], rates[::-1], color="#4c72b0")
    left.set(xscale="log", xlabel="10¹² operations a second", title="The ladder, 3 x 3, 128 -> 128, 32 x 28 x 28")
    for rival, colour in (("cudnn float32", "#888888"), ("cudnn tf32", "#dd8452"), ("cudnn fp16", "#c44e52")):
        for out, methods, style in (("bits", ("fused", "wgmma fused"), "o-"), ("floats", ("mma", "wgmma"), "s--")):
            points = [(n * n, _mean_speedup(rows, rival, methods, n)) for n in counts]
            points = [(x, y) for x, y in points if y]
            if points:
                right.plot(*zip(*points), style, color=colour, label=f"{rival}, {out} out")
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xscale="log", yscale="log", xlabel="M N", ylabel="times faster than cuDNN")
    right.set_title("ResNet-18's 3 x 3 layers, batch 256")
    if right.lines[1:]:
        right.legend(fontsize=8)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def report(rows, folder=HERE) -> None:
    """results/cuda.csv, results/cuda.svg, and the table in README.md."""
    (folder / "results").mkdir(exist_ok=True)
    with open(folder / "results" / "cuda.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure(rows, folder / "results" / "cuda.svg")
    fill_readme(rows, folder / "README.md")


def fill_readme(rows, path) -> None:
    """Replace what stands between the markers."""
    text = path.read_text() if path.exists() else ""
    if BEGIN not in text:
        text += f"\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    path.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.split(END, 1)[1]}")


def main() -> None:
    with open(HERE / "results" / "cuda.csv", newline="") as file:
        report(list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
