"""What bench.py measured, as tables and figures; and what all pages and figures of results share.

`python -m kernels.bench --readme` (and with `--device cuda`) makes them anew from results/*.csv, without measuring.

A block that a command writes stands between two markers, which name it and the command:

    <!-- cpu: python -m kernels.bench -->
    | a table | of numbers |
    <!-- /cpu -->

Within a sentence, the same without line breaks: <!-- accuracy: python writeup/build.py -->94.02 %<!-- /accuracy -->.
"""

import json
import math
import os
import re
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHAPE = ["C", "O", "K", "size", "padding", "stride", "B"]
RIVALS = ("cudnn float32", "cudnn tf32", "cudnn fp16", "int8 product")
RUNGS = {  # contender: file in cuda/
    "pack": "rung1_pack", "float": "rung2_float", "popcount": "rung3_popcount", "shared": "rung4_shared",
    "bases": "rung5_bases", "mma": "rung6_tensorcore", "wgmma": "rung7_wgmma", "fused": "rung8_fused",
}  # fmt: skip
FLOATS_OUT, BITS_OUT = ("mma", "wgmma"), ("fused", "wgmma fused")


# --------------------------------------------------------------------------- pages


def fill(page: Path | str, command: str, values: dict[str, str]) -> str:
    """The text of a page in which each block of this command holds values[its name]; blocks of others stay.

    Args:
        page: a file, or its text. No file is written.
        command: as the markers name it, such as "python -m kernels.bench".
        values: {name of a block: text}.

    Raises: ValueError for a block without a value, a value without a block, or a block that does not end.
    """
    text = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
    filled = set()

    def put(match):
        name, blank = match["name"], "\n" if match["old"].startswith("\n") else ""
        if name not in values:
            raise ValueError(f"nothing to fill the block {name!r} of `{command}` with")
        filled.add(name)
        return f"<!-- {name}: {command} -->{blank}{values[name].strip()}{blank}<!-- /{name} -->"

    block = rf"<!-- (?P<name>[\w-]+): {re.escape(command)} -->(?P<old>.*?)<!-- /(?P=name) -->"
    new = re.sub(block, put, text, flags=re.DOTALL)
    opened = len(re.findall(rf"<!-- [\w-]+: {re.escape(command)} -->", text))
    if opened != len(re.findall(block, text, flags=re.DOTALL)):
        raise ValueError(f"a block of `{command}` does not end")
    if unused := values.keys() - filled:
        raise ValueError(f"no block of `{command}` is called {', '.join(sorted(unused))}")
    return new


def refill(page: Path, command: str, values: dict[str, str]) -> None:
    """`fill` a page where it is."""
    rewrite(page, fill(page, command, values))


def rewrite(page: Path, text: str) -> None:
    """Put a text in the place of a page, whole or not at all."""
    temporary = page.with_name(f".{page.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, page)
    finally:
        temporary.unlink(missing_ok=True)


def write(device: str, rows: list[dict]) -> None:
    """Rows of "cpu", "avx2" or "cuda" into results/DEVICE.csv, and what the README shows of them.

    A CPU's take the place of those of the same machine, that is of one hardware and instruction set; others stay.
    """
    import pandas as pd

    RESULTS.mkdir(exist_ok=True)
    path, new = RESULTS / f"{device}.csv", pd.DataFrame(rows, dtype=object)
    if device != "cuda" and path.exists():
        old = pd.read_csv(path, dtype=str, keep_default_na=False)  # so that they stay to the letter
        measured = pd.MultiIndex.from_frame(new[MACHINE])
        new = pd.concat([old[~pd.MultiIndex.from_frame(old[MACHINE]).isin(measured)], new])
    new.to_csv(path, index=False, lineterminator="\n")
    write_readme(device)


def write_limit(tile: str, rows: list[dict]) -> None:
    """Up to how many binary convolutions M N a tile is faster than float32, into cpu/pays.json, for the engine.

    rows: of all settings in which the bench looks for the crossing; fewer say nothing.
    """
    import pandas as pd

    from .bench import CROSSING

    rows = pd.DataFrame(rows)
    if {setting.M * setting.N for setting in CROSSING} <= set(rows.M * rows.N):
        path = HERE / "cpu" / "pays.json"
        limits = json.loads(path.read_text()) | {tile: crossing(rows, "times_float32") or 0}
        rewrite(path, json.dumps(limits, indent=1) + "\n")


def write_arm(rows: list[dict], table: str) -> None:
    """What cpu/assembly.py counts, as results/arm.csv and in the README."""
    import pandas as pd

    RESULTS.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(RESULTS / "arm.csv", index=False, lineterminator="\n")
    refill(HERE / "README.md", "python -m kernels.cpu.assembly --write", {"arm": table})


def read(device: str):
    """The rows of results/DEVICE.csv as a table; None where nothing was measured yet."""
    import pandas as pd

    path = RESULTS / f"{device}.csv"
    return pd.read_csv(path, dtype={"capability": str, "driver": str}) if path.exists() else None


def write_readme(device: str) -> None:
    """Table and figure from results/DEVICE.csv, without running anything."""
    rows, page = read(device), HERE / "README.md"
    if device == "cpu":
        command, text, figure = "python -m kernels.bench", cpu_table(rows), cpu_figure
    elif device == "avx2":
        command, text, figure = "python -m kernels.bench --isa avx2", cpu_table(rows), None
    else:
        command, text, figure = "python -m kernels.bench --device cuda", cuda_table(rows), cuda_figure
    if rows is not None and figure is not None:
        figure(rows, RESULTS / f"{device}.svg")
    if page.exists():  # it does not where the package is installed
        refill(page, command, {device: text})


def _pyplot():
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "abcnets"  # the same numbers make the same file
    from matplotlib import pyplot

    return pyplot


def _convolution(key) -> str:
    from .check import Shape

    return str(Shape(*map(int, key)))


# --------------------------------------------------------------------------- figures of trade-offs


def log_axis(axis, values) -> None:
    """A logarithmic x axis with room on both sides of positive values, and its ticks, 1, 2, 5 times ten, written out.

    Without values it stays as it is.
    """
    values = [float(value) for value in values]
    if not values:
        return
    low, high = min(values), max(values)
    margin = max(0.12 * math.log(high / low), 0.15)
    low, high = low / math.exp(1.4 * margin), high * math.exp(1.6 * margin)
    ticks = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set(xscale="log", xlim=(low, high))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def label_points(axis, points, fontsize: float = 8) -> None:
    """Labels beside points, where they lie neither on each other nor on other points. The axis has its limits already.

    Args:
        points: (x, y, label, colour) each.
    """
    axis.figure.draw_without_rendering()  # a layout settles now, before it is measured
    pixel = 72 / axis.figure.dpi  # in points from here on
    at = [tuple(pixel * axis.transData.transform((x, y))) for x, y, *_ in points]
    (left, low), (right, top) = pixel * axis.transAxes.transform([(0, 0), (1, 1)])
    taken = [(left - 999, low, left, top), (right, low, right + 999, top), (left, top, right, top + 999),
             (left, low - 999, right, low), *((x - 4, y - 4, x + 4, y + 4) for x, y in at)]  # fmt: skip
    for (x, y), (*point, label, colour) in zip(at, points):
        width, height = 0.62 * fontsize * len(label), fontsize
        beside = [(6, -height / 2), (-6 - width, -height / 2), (-width / 2, 6), (-width / 2, -6 - height),
                  (5, 4), (5, -4 - height), (-5 - width, 4), (-5 - width, -4 - height),
                  (-width / 2, 17), (-width / 2, -17 - height)]  # fmt: skip
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in beside]
        best = min(range(len(boxes)), key=lambda place: sum(_overlap(boxes[place], other) for other in taken))
        taken.append(boxes[best])
        axis.annotate(label, point, beside[best], textcoords="offset points", fontsize=fontsize, color=colour)


def _overlap(a, b) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


# --------------------------------------------------------------------------- CPU

MACHINE = ["hardware", "isa"]
SETTING = ["M", "N", "code"]
SHOWN = [(1, 1, "thermometer"), (1, 2, "uniform"), (2, 2, "uniform"), (2, 2, "binary"), (3, 3, "binary")]


def bits_of(rows):
    """Those of the rows that are made of bits, with whole numbers for M and N."""
    return rows[rows.M.notna()].astype({"M": int, "N": int})


def medians(rows):
    """Medians over the 3 x 3 convolutions of one machine, by (contender, threads, M, N, code)."""
    columns = ["times_float32", "times_int8", "share_of_bound"]
    return bits_of(rows[rows.K == 3]).groupby(["contender", "threads", *SETTING])[columns].median()


def crossing(rows, column: str) -> int | None:
    """The largest measured M N at which bits in any code but uniform levels win, floats in and out, fewest threads."""
    found = medians(rows).loc["packed", rows.threads.min()].reset_index()
    found = found[found.code != "uniform"].assign(products=lambda table: table.M * table.N)
    best = found.groupby("products")[column].max()
    lost = best.index[best < 1]
    won = best.index[best.index < (lost.min() if len(lost) else math.inf)]
    return int(won.max()) if len(won) else None


def setting_name(M, N, code) -> str:
    return f"{M} × {N}" if code == "thermometer" else f"{M} × {code} {N}"


def _shown(rows) -> list[tuple]:
    """The settings of the tables: `SHOWN`, as far as they were measured, or all."""
    there = sorted(set(bits_of(rows)[SETTING].itertuples(index=False, name=None)), key=lambda s: (s[0] * s[1], s))
    return [setting for setting in SHOWN if setting in there] if set(SHOWN) <= set(there) else there


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]]


def cpu_table(rows) -> str:
    """Times as fast as the best float32 (as the best int8, share of the bound), in Markdown, machine by machine."""
    if rows is None:
        return "Not measured yet."
    out = []
    for (hardware, isa), here in rows.groupby(MACHINE, sort=False):
        settings, first, found = _shown(here), here.iloc[0], medians(here)
        names = [setting_name(*setting) for setting in settings]
        limits = [crossing(here, column) or "none" for column in ("times_float32", "times_int8")]
        out += [
            f"**{hardware}, {isa}.** {first.versions}. A core's clock is {first.clock_ghz:.2f} GHz and it counts at "
            f"most {first.bound_tops:.2f} T bit products a second, measured (`cpu/peak.py`). Times as fast as the "
            "fastest float32 / as the fastest int8 (share of the bound), medians over the 3 x 3 convolutions:",
            "",
        ]
        lines = []
        for contender, what in (("packed", "floats in and out"), ("words", "bits in and out")):
            for threads in sorted(here.threads.unique().tolist()):
                cells = [f"**{row.times_float32:.2f}** / {row.times_int8:.2f} ({row.share_of_bound:.0%})"
                         for row in (found.loc[(contender, threads, *setting)] for setting in settings)]  # fmt: skip
                lines.append([f"{what}, {threads} thread{'s' * (threads > 1)}", *cells])
        out += [*_table(["M × N", *names], lines), ""]
        out += [f"The largest measured M N at which bits win, on the fewest threads: {limits[0]} against float32, "
                f"{limits[1]} against int8.", "", *_by_shape(here, settings, names), ""]  # fmt: skip
    return "\n".join(out)


def _by_shape(rows, settings, names) -> list[str]:
    """Every convolution of one machine, folded away."""
    lines = []
    for (*shape, threads), group in rows.groupby([*SHAPE, "threads"], sort=False):
        rivals = [group[group.contender.str.startswith(kind)].microseconds.min() for kind in ("float32", "int8")]
        packed = bits_of(group[group.contender == "packed"]).set_index(SETTING)
        cells = [f"{row.times_float32:.2f} / {row.times_int8:.2f} ({row.share_of_bound:.0%})"
                 for row in (packed.loc[setting] for setting in settings)]  # fmt: skip
        openvino = group[group.contender == "OpenVINO"].microseconds
        lines.append([_convolution(shape), str(threads), *(f"{us:,.0f} us" for us in rivals),
                      f"{openvino.iloc[0]:,.0f} us" if len(openvino) else "-", *cells])  # fmt: skip
    head = ["convolution", "threads", "float32", "int8", "OpenVINO 1 × 1", *names]
    return ["<details><summary>Every convolution, floats in and out</summary>", "", *_table(head, lines), "",
            "</details>"]  # fmt: skip


def cpu_figure(rows, path: Path) -> None:
    """Speed against float32 by M N, on the fewest threads: a panel a machine, a line a size, int8 for comparison."""
    plt = _pyplot()
    machines = list(rows.groupby(MACHINE, sort=False))
    fig, axes = plt.subplots(1, len(machines), figsize=(5.2 * len(machines), 4), sharey=True, squeeze=False)
    for ax, ((hardware, isa), here) in zip(axes[0], machines):
        here = here[here.threads == here.threads.min()]
        bits = bits_of(here).assign(products=lambda table: table.M * table.N)
        packed = bits[(bits.contender == "packed") & (bits.code != "uniform")]
        for (_, _, K, *_), group in packed.groupby(SHAPE, sort=False):
            line = group.groupby("products").times_float32.max()
            color = "tab:blue" if K == 3 else "tab:gray"
            ax.plot(line.index, line, "o-", color=color, alpha=0.3, linewidth=1, markersize=2.5)
        line = packed[packed.K == 3].groupby("products").times_float32.median()
        ax.plot(line.index, line, "o-", color="tab:red", label="bits, median of 3 x 3")
        uniform = bits[(bits.contender == "packed") & (bits.code == "uniform") & (bits.K == 3)]
        line = uniform.groupby("products").times_float32.median()
        if len(line):
            ax.plot(line.index, line, "^", color="tab:orange", label="uniform levels")
        int8 = here[here.contender.str.startswith("int8") & (here.K == 3)].groupby(SHAPE).times_float32.max().median()
        ax.axhline(int8, color="tab:green", linestyle=":", label="int8, median of 3 x 3")
        ax.axhline(1, color="black", linewidth=0.8, label="float32")
        ax.set(xlabel="binary convolutions, M N", xscale="log", yscale="log", title=f"{hardware}\n{isa}")
        ax.set_xticks([1, 2, 4, 9, 16, 25], ["1", "2", "4", "9", "16", "25"])
        ax.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)  # not every machine has run the same
    axes[0][0].set_ylabel("times as fast as float32")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


# --------------------------------------------------------------------------- CUDA


def _bases(rows) -> list[int]:
    return sorted(rows.bases.dropna().astype(int).unique().tolist())


def _mean_speedup(rows, rival: str, ours, bases: int) -> float:
    """Geometric mean of a rival's time over ours, over ResNet-18's 3 x 3 layers at batch 256 where both were timed."""
    rows = rows[(rows.section == "resnet18") & (rows.B == 256) & (rows.K == 3)]
    theirs, ours = rows[rows.contender == rival], rows[rows.contender.isin(ours) & (rows.bases == bases)]
    ratios = (theirs.groupby(SHAPE).microseconds.min() / ours.groupby(SHAPE).microseconds.min()).dropna()
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if len(ratios) else math.nan


def _cell(number: float, form=".2f") -> str:
    return "-" if math.isnan(number) else f"{number:{form}}"


def cuda_table(rows) -> str:
    """The ladder against cuDNN, ResNet-18, the crossover and the card's ceilings, in Markdown."""
    timed = None if rows is None else rows[rows.microseconds.notna()]
    if rows is None or timed.empty:
        return (
            "Not measured yet. On a machine with an NVIDIA GPU, `python -m kernels.bench --device cuda` measures and "
            "checks everything in less than 8 minutes, and fills this table and the figure."
        )
    first = rows.iloc[0]
    lines = [
        f"{first.hardware} (compute capability {first.capability}), driver {first.driver}, {first.versions}, "
        f"{first.date}.",
        "",
        "![the ladder, and bits against cuDNN](results/cuda.svg)",
        "",
        "One layer, 3 x 3, 128 -> 128, 32 x 28 x 28. Times over ours: above 1 the bits are faster.",
        "",
        "| rung | M = N | us | T multiply-adds/s | of its bound | cuDNN float32 | TF32 | fp16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ladder = timed[timed.section == "ladder"]
    cudnn = [ladder[ladder.contender == rival].microseconds.min() for rival in RIVALS[:3]]
    for contender, file in RUNGS.items():
        for row in ladder[ladder.contender == contender].itertuples():
            computes = contender != "pack"
            against = [_cell(us / row.microseconds if computes else math.nan) for us in cudnn]
            rate = _cell(row.operations_per_second / 1e12 if computes else math.nan, ".3g")
            bases = "float" if math.isnan(row.bases) else int(row.bases)
            cells = [f"[{file}](cuda/{file}.py)", bases, f"{row.microseconds:.1f}", rate,
                     f"{row.share_of_bound:.0%}", *against]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "ResNet-18's 3 x 3 layers at batch 256, geometric mean of cuDNN's time over ours, bits in:",
        "",
        "| M = N | out | float32 | TF32 | fp16 | int8 product |",
        "|---|---|---|---|---|---|",
    ]
    counts = _bases(timed[timed.section == "resnet18"])
    for n in counts:
        for out, ours in (("floats", FLOATS_OUT), ("bits", BITS_OUT)):
            means = [_cell(_mean_speedup(timed, rival, ours, n)) for rival in RIVALS]
            lines.append(f"| {n} | {out} | " + " | ".join(means) + " |")
    limits = []
    for rival in RIVALS:
        wins = [n * n for n in counts if _mean_speedup(timed, rival, BITS_OUT, n) > 1]
        limits.append(f"{rival} {max(wins, default='none')}")
    lines += ["", "Crossover, the largest measured M N at which bits are still faster (same layers, bits in and out): "
              + ", ".join(limits) + "."]  # fmt: skip
    ceilings = rows[rows.section == "ceilings"].itertuples()
    told = [f"{row.contender} {row.operations_per_second:.3g} {row.note}" for row in ceilings]
    lines += ["", "Measured ceilings: " + "; ".join(told) + "."]
    if left_out := int(rows.note.fillna("").str.startswith(("skipped", "wrong")).sum()):
        lines += ["", f"Left out: {left_out} rows, with their reasons in [results/cuda.csv](results/cuda.csv)."]
    return "\n".join(lines)


def cuda_figure(rows, path: Path) -> None:
    """The ladder's rates, and the speed of bits over cuDNN against M N for ResNet-18's 3 x 3 layers."""
    plt = _pyplot()
    rows = rows[rows.microseconds.notna()]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    ladder = rows[rows.section == "ladder"]
    bars = [row for name in list(RUNGS)[1:] for row in ladder[ladder.contender == name].itertuples()][::-1]
    names = [row.contender + ("" if math.isnan(row.bases) else f"  M = N = {row.bases:.0f}") for row in bars]
    left.barh(names, [row.operations_per_second / 1e12 for row in bars], color="#4c72b0")
    left.set(xscale="log", xlabel="10¹² multiply-adds a second", title="The ladder, 3 x 3, 128 -> 128, 32 x 28 x 28")
    for rival, colour in zip(RIVALS, ("#888888", "#dd8452", "#c44e52")):
        for out, ours, style in (("bits", BITS_OUT, "o-"), ("floats", FLOATS_OUT, "s--")):
            points = [(n * n, _mean_speedup(rows, rival, ours, n)) for n in _bases(rows)]
            points = [point for point in points if not math.isnan(point[1])]
            if points:
                right.plot(*zip(*points), style, color=colour, label=f"{rival}, {out} out")
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xscale="log", yscale="log", xlabel="M N", ylabel="times faster than cuDNN")
    right.set_title("ResNet-18's 3 x 3 layers, batch 256")
    if right.lines[1:]:
        right.legend(fontsize=8)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
