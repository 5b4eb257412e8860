"""The writeup says what the results say; its examples are right; its references and links lead somewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import abcnets

ROOT = Path(__file__).parent.parent
WRITEUP = ROOT / "writeup"
TEXT = (WRITEUP / "writeup.md").read_text()


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_writeup", WRITEUP / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_what_the_results_make_of_it():
    done = subprocess.run([sys.executable, WRITEUP / "build.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_change_is_noticed(build):
    assert build.inject(TEXT.replace("<!-- results: bits_xor -->", "<!-- results: bits_xor -->?")) == build.inject(TEXT)
    with pytest.raises(ValueError, match="no_such_block"):
        build.inject("<!-- results: no_such_block --><!-- end -->")


def test_every_block_stands_in_the_text_once(build):
    names = re.findall(r"<!-- results: (\w+) -->", TEXT)
    assert sorted(names) == sorted(function.__name__ for function in build.BLOCKS)


def test_missing_results_are_said_to_be_missing(build, monkeypatch):
    for name in ("RUNS", "SPEED", "STEP", "COMPETITORS", "MIXED", "CALIBRATION", "WEIGHTS", "CPU", "CUDA"):
        monkeypatch.setattr(build, name, [])
    blocks = {function.__name__: function() for function in build.BLOCKS}
    tables = ("accuracy_table", "calibration_table", "network_table", "gaussian_table", "competitors_table")
    for name in (*tables, "weights_only"):
        assert build.MISSING in blocks[name], name
    assert build.NOT_MEASURED in blocks["cpu_table"] and build.NOT_MEASURED in blocks["step_words"]
    assert "Not measured yet" in blocks["gpu_measured"] and build.MISSING in build.opening()
    build.figure_data()


def competitor(form, accuracy, ms, batch=1, M=None, N=None, size=1000, threads=1):
    return {"form": form, "variant": None, "M": M, "N": N, "accuracy": accuracy, "bytes": size, "batch": batch,
            "threads": threads, "ms_per_image": ms, "hardware": "an abacus", "versions": "1"}  # fmt: skip


def test_a_form_is_shown_by_its_most_accurate_variant_and_that_by_its_fastest_layout(build, monkeypatch):
    rows = [competitor("torch float32", 94.0, ms) for ms in (3.0, 2.0)]
    rows += [competitor("onnxruntime int8", *pair, size=300) for pair in ((93.5, 1.0), (92.0, 0.5))]
    rows += [competitor("abcnets", 90.0, 0.9, M=1, N=1, size=90), competitor("abcnets", 93.0, 4.0, M=3, N=3, size=150)]
    monkeypatch.setattr(build, "COMPETITORS", rows)
    shown = {(form["name"], form["M"]): (form["accuracy"], form["ms"][1, 1]) for form in build.competitors()}
    assert shown == {("torch float32", None): (94.0, 2.0), ("onnxruntime int8", None): (93.5, 1.0),
                     ("abcnets", 1): (90.0, 0.9), ("abcnets", 3): (93.0, 4.0)}  # fmt: skip
    assert "than all of these but M = N = 1 one image at a time" in build.opening()
    assert "only these are faster: $M = 1$, $N = 1$ in batches of 1 on 1 thread" in build.competitors_words()
    monkeypatch.setattr(build, "COMPETITORS", [row for row in rows if row["M"] != 1])
    assert "faster than all of these one image" in build.opening() and "none is faster" in build.competitors_words()


def test_int8_is_taken_on_one_thread_where_two_slow_it_down(build, monkeypatch):
    rows = [competitor(form, 94.0, ms, threads=threads, M=M, N=M) for form, M, ms, threads in [
        ("onnxruntime int8", None, 1.0, 1), ("onnxruntime int8", None, 2.0, 2),
        ("abcnets", 3, 3.0, 1), ("abcnets", 3, 1.5, 2), ("abcnets", 1, 1.5, 1), ("abcnets", 1, 0.9, 2),
    ]]  # fmt: skip
    monkeypatch.setattr(build, "COMPETITORS", rows)
    assert "only these are faster: $M = 1$, $N = 1$ in batches of 1 on 2 threads." in build.competitors_words()


def test_labels_keep_their_distance(build):
    assert build._spread([0.1, 0.12, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.1, 0.2, 0.5])
    assert build._spread([0.9, 0.95, 1.0], 0.1, 0.0, 0.9) == pytest.approx([0.7, 0.8, 0.9])


def test_figures_are_drawn_alike_twice(build, tmp_path):
    data = build.figure_data()
    few = {name: build.DRAWINGS[name] for name in ("bits", "accuracy", "competitors")}
    pictures = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        build.DRAWINGS, everything = few, build.DRAWINGS
        build.draw(data, folder)
        build.DRAWINGS = everything
        pictures.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4


def test_the_pdf_builds(build, tmp_path):
    pytest.importorskip("pypandoc")
    pytest.importorskip("typst")
    build.build_pdf(TEXT, build.figure_data(), tmp_path / "writeup.pdf")
    assert (tmp_path / "writeup.pdf").read_bytes().startswith(b"%PDF")


def test_the_bit_example_is_right(build):
    a, w = torch.tensor(build.A), torch.tensor(build.W)
    example = build.bit_example()
    assert example["dot"] == example["dot_and"] == (a * w).sum() == 2
    without_padding = (a * w)[: -build.PADDED].sum()
    assert example["K"] - 2 * example["count_padded"] - example["too_much"] == without_padding
    layer = abcnets.ABCConv1d.from_parameters(w.float().view(1, 8, 1), us=[0.0], vs=[0.5], betas=[1.0])
    assert abcnets.pack(layer)(a.float().view(1, 8, 1)).item() == pytest.approx(example["dot"] * 1.0)


def test_the_alpha_example_is_right(build):
    W, us = torch.tensor([build.WEIGHTS_EXAMPLE]).double(), abcnets.gaussian_shifts(2).double()
    _, levels = build.cut(build.WEIGHTS_EXAMPLE, build.gaussian_thresholds(2))
    alphas = sorted((b - a) / 2 for a, b in zip(levels, levels[1:]))
    assert abcnets.fit_weight(W, us)[:, 0].sort().values.tolist() == pytest.approx(alphas)
    bases = abcnets.weight_bases(W, us).view(2, -1)
    solved = torch.linalg.lstsq(bases.T, W.T).solution[:, 0]
    assert solved.sort().values.tolist() == pytest.approx(alphas)


@pytest.mark.parametrize("M", [1, 2, 3, 5])
def test_the_gaussian_is_right(build, M):
    assert abcnets.gaussian_shifts(M).tolist() == pytest.approx(build.gaussian_thresholds(M), abs=1e-6)
    points = torch.special.ndtri((torch.arange(200_000).double() + 0.5) / 200_000)[None]
    for shifts, thresholds in (
        (abcnets.gaussian_shifts, build.gaussian_thresholds),
        (abcnets.even_shifts, build.even_thresholds),
    ):
        left = (points - abcnets.quantize_weight(points, shifts(M).double())).square().mean().item()
        assert left == pytest.approx(build.gaussian_levels(thresholds(M))[1], abs=1e-3)


def test_references_are_cited_and_cited_ones_are_there(build):
    entries = build.bibliography()
    body = re.sub(r"<!-- results: references -->.*", "", TEXT, flags=re.S)
    assert set(re.findall(r"@(\w+)(?=[;\]])", body)) == set(entries)
    for key, entry in entries.items():
        assert {"author", "title", "url"} <= entry.keys(), key
        assert f"]({entry['url']})" in body, f"{key} is cited without a plain link for GitHub"


def test_local_links_and_sections_lead_somewhere():
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        assert target.startswith("http") or (WRITEUP / target.split("#")[0]).exists(), target
    sections = set(re.findall(r"^#+ (\d(?:\.\d)?)", TEXT, re.M))
    assert set(re.findall(r"[Ss]ection (\d(?:\.\d)?)", TEXT)) <= sections


def test_equations_and_figures_are_counted_in_order(build):
    tags = re.findall(r"\\tag\{(\d+)\}", TEXT)
    assert tags == [str(i + 1) for i in range(len(tags))] and len(tags) == TEXT.count("```math")
    figures = re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.svg\)\n\n\*Figure (\d)\. ", TEXT)
    assert [number for _, number in figures] == [str(i + 1) for i in range(len(figures))]
    assert {name for name, _ in figures} == set(build.DRAWINGS)


def test_github_reads_it_too():
    """A line that begins with a comment is raw HTML to GitHub: nothing else may stand on it."""
    for line in TEXT.splitlines():
        assert not line.startswith("<!--") or re.fullmatch(r"<!-- (results: \w+|end) -->", line), line
    assert "-->$" not in TEXT and "$<!--" not in TEXT, "a formula beside a comment"
    assert "\\," not in "".join(re.findall(r"(?<!\$)\$[^$\n]+\$(?!\$)", TEXT)), (
        "GitHub eats backslash-comma in inline maths"
    )
