"""The writeup says what the results say; its examples are right; its references and links lead somewhere."""

import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import abcnets
from kernels.report import fill, label_points, log_axis
from writeup import arithmetic, build, claims, figures, records, tables

ROOT = Path(__file__).parent.parent
WRITEUP = ROOT / "writeup"
TEXT = (WRITEUP / "writeup.md").read_text()


def test_it_is_what_the_results_make_of_it():
    done = subprocess.run([sys.executable, WRITEUP / "build.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def filled(text: str) -> str:
    return fill(text, build.COMMAND, tables.for_writeup())


def test_a_change_is_noticed():
    marker = "<!-- bits_table: python writeup/build.py -->"
    assert filled(TEXT.replace(marker, marker + "\n?")) == filled(TEXT)
    with pytest.raises(ValueError, match="no_such_block"):
        filled("<!-- no_such_block: python writeup/build.py --><!-- /no_such_block -->")


def test_words_that_the_numbers_contradict_are_noticed(monkeypatch):
    assert not build.contradictions(TEXT, claims.of_writeup())
    (wrong,) = build.contradictions(TEXT.replace("8 - 2 \\cdot 3 = 2", "3"), claims.of_writeup())
    assert wrong.startswith("it does not say") and "= 2$ here" in wrong
    worse = [row | {"thresholds": 99.0} for row in records.CALIBRATION]
    monkeypatch.setattr(records, "CALIBRATION", worse)
    (wrong,) = build.contradictions(TEXT, claims.of_writeup())
    assert wrong == "the results do not bear out: Better thresholds alone do not help"


def test_missing_results_are_said_to_be_missing(monkeypatch):
    for name in ("RUNS", "SPEED", "STEP", "COMPETITORS", "MIXED", "CALIBRATION", "WEIGHTS", "FILTER", "CPU", "CUDA"):
        monkeypatch.setattr(records, name, [])
    values, opening = tables.for_writeup(), tables.for_readme()
    opening = {name: text for name, text in opening.items() if name not in tables.pays()}  # the engine's, always there
    for name in ("accuracy", "calibration", "gaussian", "competitors", "cifar", "mixed", "ablation"):
        assert tables.MISSING in values[f"{name}_table"], name
    for name in ("weights_only", "best_accuracy", "int8_beaten", "calibration_images"):
        assert tables.MISSING in values[name], name
    for name in ("cpu_table", "network_table", "machines_table", "gpu_found", "step_time_mixed", "wins_against_int8",
                 "times_int8_2"):  # fmt: skip
        assert tables.NOT_MEASURED in values[name], name
    assert all(tables.MISSING in text or tables.NOT_MEASURED in text for text in opening.values()), opening
    figures.figure_data()
    assert not all(claims.of_writeup().values()) and not any(claims.of_readme().values())


def competitor(form, accuracy, ms, batch=1, M=None, N=None, size=1000, threads=1):
    return {"form": form, "variant": None, "M": M, "N": N, "accuracy": accuracy, "bytes": size, "batch": batch,
            "threads": threads, "ms_per_image": ms, "isa": "", "hardware": "an abacus", "versions": "1"}  # fmt: skip


def test_a_form_is_shown_by_its_most_accurate_variant_and_that_by_its_fastest_layout(monkeypatch):
    rows = [competitor("torch float32", 94.0, ms) for ms in (3.0, 2.0)]
    rows += [competitor("onnxruntime int8", *pair, size=300) for pair in ((93.5, 1.1), (93.46, 1.0), (92.0, 0.5))]
    rows += [competitor("abcnets", 90.0, 0.9, M=1, N=1, size=90), competitor("abcnets", 93.0, 4.0, M=3, N=3, size=150)]
    monkeypatch.setattr(records, "COMPETITORS", rows)
    shown = {(form["name"], form["M"]): (form["accuracy"], form["ms"][1, 1]) for form in records.competitors()}
    assert shown == {("torch float32", None): (94.0, 2.0), ("onnxruntime int8", None): (93.5, 1.0),
                     ("abcnets", 1): (90.0, 0.9), ("abcnets", 3): (93.0, 4.0)}  # fmt: skip
    assert tables.for_writeup()["int8_beaten"] == "1 of the 2" and "**0.900** |" in tables.competitors_table()
    assert tables.for_readme()["smaller"] == "not run"  # none of the settings of its first screen
    monkeypatch.setattr(records, "COMPETITORS", [row for row in rows if row["M"] != 1])
    assert tables.for_writeup()["int8_beaten"] == "0 of the 1" and "**" not in tables.competitors_table()


def test_networks_in_int8_have_a_table_of_their_own(monkeypatch):
    floats = [competitor("onnxruntime float32", 94.0, 3.0), competitor("onnxruntime int8", 93.9, 1.0, size=238_000)]
    trained, int8 = (competitor(form, percent, ms, M=2, size=size) | {"code": "binary"} for form, percent, ms, size in (
        ("abcnets", 93.5, 2.0, 90_000), (records.IN_INT8, 93.4, 0.9, 80_000)))  # fmt: skip
    monkeypatch.setattr(records, "COMPETITORS", [*floats, trained])
    assert tables.MISSING in tables.int8_table()
    slow = int8 | {"N": 2, "ms_per_image": 5.0}  # with bits on both sides
    monkeypatch.setattr(records, "COMPETITORS", [*floats, trained, int8, slow])
    assert tables.int8_table().splitlines()[2:] == [
        "| float, by onnxruntime's quantizer | 94.00 % | 93.90 % | 238 kB | 1.000 |",
        "| binary 2 × float | 93.50 % | 93.40 % | 80 kB | 0.900 |",
    ]
    assert "0.900" not in tables.competitors_table() and "abcnets, binary 2 × float" in tables.competitors_table()
    shown = {figures._kind(form): figures._form_label(form) for form in figures.figure_data()["competitors"]["forms"]}
    assert shown["weights"] == shown[records.IN_INT8] == "b2"


def test_the_first_screen_has_the_faster_float32_and_the_mean_of_the_seeds(monkeypatch):
    rows = [competitor(form, 94.0, ms, batch, size=size) for form, size, times in (
        ("torch float32", 800, (3.0, 1.0)), ("onnxruntime float32", 900, (2.0, 1.5)), ("onnxruntime int8", 250, (1, 1)),
    ) for batch, ms in zip((1, 32), times)]  # fmt: skip
    rows += [competitor("abcnets", 92.0, ms, batch, 2, 3, size=100) | {"code": "uniform,binary"}
             for batch, ms in ((1, 1.5), (32, 0.5))]  # fmt: skip
    monkeypatch.setattr(records, "COMPETITORS", rows)
    common = {"dataset": records.DATASET, "M": 2, "N": 3, "options": "code=uniform,binary", "float": 94.0,
              "binarized": 20.0, "calibrated": 90.0, "epochs": 10, "file_bytes": 90}  # fmt: skip
    monkeypatch.setattr(records, "RUNS", [common | {"seed": seed, "accuracy": 92.0 + seed} for seed in (0, 1)])
    opening = tables.for_readme()
    assert "| float32 | 94.00 % | 1 kB | 2.000 ms | 1.000 ms |" in opening["first_table"]
    assert "| **uniform 2 × binary 3** | 92.50 % | 0 kB | 1.500 ms | 0.500 ms |" in opening["first_table"]
    assert len(opening["first_table"].splitlines()) == 2 + 3 and opening["smaller"] == "8 to 8"
    for words in ("94.00 % becomes 20.00 %", ": 90.00 %", ": 92.50 %", "0.500 ms an image, float32 1.000, int8 1.000"):
        assert words in opening["five_lines"]


def test_int8_is_taken_on_one_thread_where_two_slow_it_down(monkeypatch):
    rows = [competitor(form, 94.0, ms, threads=threads, M=M, N=M) for form, M, ms, threads in [
        ("onnxruntime int8", None, 1.0, 1), ("onnxruntime int8", None, 2.0, 2),
        ("abcnets", 3, 3.0, 1), ("abcnets", 3, 1.5, 2), ("abcnets", 1, 1.5, 1), ("abcnets", 1, 0.9, 2),
    ]]  # fmt: skip
    monkeypatch.setattr(records, "COMPETITORS", rows)
    beaten = {form["M"]: records.faster_than_int8(form) for form in records.ours()}
    assert beaten == {3: set(), 1: {(1, 2)}}


def test_figures_are_drawn_alike_twice(tmp_path):
    data = figures.figure_data()
    few = {name: figures.DRAWINGS[name] for name in ("bits", "speed", "competitors")}
    pictures = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        figures.DRAWINGS, everything = few, figures.DRAWINGS
        figures.draw(data, folder)
        figures.DRAWINGS = everything
        pictures.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4


@pytest.mark.parametrize("seed", range(4))
def test_labels_lie_apart_and_inside(seed):
    """A crowd of points, some nearly in one place: no label lies on another, or leaves the axis."""
    draw = random.Random(seed)
    settings = itertools.product((1, 2, 3), (1, 2))
    points = [(10 ** draw.uniform(1, 3), draw.uniform(91, 94), f"{M} × {N}", "#0072B2") for M, N in settings]
    points += [(points[0][0] * 1.03, points[0][1] + 0.02, "onnxruntime int8", "#555555")]
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(*zip(*((x, y) for x, y, *_ in points)), "o")
    axis.set_ylim(90.5, 94.5)
    log_axis(axis, [x for x, *_ in points])
    label_points(axis, points)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == [label for *_, label, _ in points]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = axis.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    plt.close(figure)


def test_a_logarithmic_axis_has_round_ticks_written_out():
    figure, axis = plt.subplots()
    log_axis(axis, [60, 800])
    low, high = axis.get_xlim()
    assert axis.get_xscale() == "log" and low < 60 and high > 800
    assert [text.get_text() for text in axis.get_xticklabels()] == ["50", "100", "200", "500", "1000"]
    log_axis(axis, [])  # nothing was measured
    assert axis.get_xlim() == (low, high)
    plt.close(figure)


def test_the_pdf_builds(tmp_path):
    pytest.importorskip("pypandoc")
    pytest.importorskip("typst")
    build.build_pdf(TEXT, figures.figure_data(), tmp_path / "writeup.pdf")
    assert (tmp_path / "writeup.pdf").read_bytes().startswith(b"%PDF")


def test_the_bit_example_is_right():
    a, w = torch.tensor(arithmetic.A), torch.tensor(arithmetic.W)
    example = arithmetic.bit_example()
    assert example["dot"] == example["dot_and"] == (a * w).sum() == 2
    without_padding = (a * w)[: -arithmetic.PADDED].sum()
    assert example["K"] - 2 * example["count_padded"] - example["too_much"] == without_padding
    layer = abcnets.ABCConv1d.from_parameters(w.float().view(1, 8, 1), us=[0.0], vs=[0.5], betas=[1.0])
    assert abcnets.pack(abcnets.binarize(layer))(a.float().view(1, 8, 1)).item() == pytest.approx(example["dot"] * 1.0)


def test_the_alpha_example_is_right():
    W, us = torch.tensor([arithmetic.WEIGHTS_EXAMPLE]).double(), abcnets.gaussian_shifts(2).double()
    _, levels = arithmetic.cut(arithmetic.WEIGHTS_EXAMPLE, arithmetic.gaussian_thresholds(2))
    alphas = sorted((b - a) / 2 for a, b in zip(levels, levels[1:]))
    assert abcnets.fit_weight(W, us)[:, 0].sort().values.tolist() == pytest.approx(alphas)
    bases = abcnets.weight_bases(W, us).view(2, -1)
    solved = torch.linalg.lstsq(bases.T, W.T).solution[:, 0]
    assert solved.sort().values.tolist() == pytest.approx(alphas)


@pytest.mark.parametrize("M", [1, 2, 3, 5])
def test_the_gaussian_is_right(M):
    assert abcnets.gaussian_shifts(M).tolist() == pytest.approx(arithmetic.gaussian_thresholds(M), abs=1e-6)
    points = torch.special.ndtri((torch.arange(200_000).double() + 0.5) / 200_000)[None]
    for shifts, thresholds in (
        (abcnets.gaussian_shifts, arithmetic.gaussian_thresholds),
        (abcnets.even_shifts, arithmetic.even_thresholds),
    ):
        left = (points - abcnets.quantize_weight(points, shifts(M).double())).square().mean().item()
        assert left == pytest.approx(arithmetic.gaussian_levels(thresholds(M))[1], abs=1e-3)


def test_references_are_cited_and_cited_ones_are_there():
    entries = tables.bibliography()
    body = re.sub(r"<!-- references: .*", "", TEXT, flags=re.S)
    cited = " ".join(re.findall(build.CITATION, body))
    assert set(re.findall(r"@(\w+)", cited)) == set(entries) and body.count("@") == cited.count("@")
    for key, entry in entries.items():
        assert {"author", "title", "url"} <= entry.keys(), key
        assert f"]({entry['url']})" in body, f"{key} is cited without a plain link for GitHub"


def test_local_links_and_sections_lead_somewhere():
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        assert target.startswith("http") or (WRITEUP / target.split("#")[0]).exists(), target
    sections = set(re.findall(r"^#+ (\d(?:\.\d)?)", TEXT, re.M))
    assert set(re.findall(r"[Ss]ection (\d(?:\.\d)?)", TEXT)) <= sections


def test_equations_tables_and_figures_are_counted_in_order():
    tags = re.findall(r"\\tag\{(\d+)\}", TEXT)
    assert tags == [str(i + 1) for i in range(len(tags))] and len(tags) == TEXT.count("```math")
    captions = re.findall(r"^\*Table (\d+)\. ", TEXT, re.M)
    assert captions == [str(i + 1) for i in range(len(captions))]
    assert len(captions) == len(re.findall(r"^\|[ :-]+\|[ :|-]+$", TEXT, re.M))
    shown = re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.svg\)\n\n\*Figure (\d+)\. ", TEXT)
    assert [number for _, number in shown] == [str(i + 1) for i in range(len(shown))]
    assert {name for name, _ in shown} == set(figures.DRAWINGS)


def test_github_reads_it_too():
    """A line that begins with a comment is raw HTML to GitHub: nothing else may stand on it."""
    opening = build.README.read_text().split("\n## ")[0]
    for line in (TEXT + opening).splitlines():
        assert not line.startswith("<!--") or re.fullmatch(r"<!-- ([\w-]+: [^<>]+|/[\w-]+) -->", line), line
    assert "-->$" not in TEXT and "$<!--" not in TEXT, "a formula beside a comment"
    assert "\\," not in "".join(re.findall(r"(?<!\$)\$[^$\n]+\$(?!\$)", TEXT)), (
        "GitHub eats backslash-comma in inline maths"
    )
