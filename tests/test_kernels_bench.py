"""The kernels' bench and its report: rows, tables, pages; and a rehearsal of the CUDA ladder, which needs a GPU.

Numba's simulator gets a process of its own, as in test_kernels_cuda.py.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import abcnets

pytest.importorskip("numba")
from kernels import bench, check, report
from kernels.check import Shape
from kernels.cpu import assembly, engine, system

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that the bench takes for kernels/."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    blocks = "<!-- {0}: python -m kernels.bench{1} -->\nold\n<!-- /{0} -->\n"
    page = "before\n" + blocks.format("cpu", "") + blocks.format("cuda", " --device cuda") + "after\n"
    (tmp_path / "README.md").write_text(page)
    return tmp_path


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


if SIMULATED:
    from test_kernels_cuda import small_tiles  # noqa: F401  (and threads that meet at a barrier)

    from kernels.cuda import ladder

    def test_rehearsal(elsewhere, monkeypatch):
        """A small layer through the ladder and its report; one rung fails, and the times mean nothing here."""

        def broken(*_):
            raise RuntimeError("launch failed\nand more")

        monkeypatch.setitem(ladder.RUNGS, "bases", broken)
        measured = ladder.Ladder(limit=600, say=lambda text: None)
        measured.right = {"pack", "popcount", "bases", "mma", "fused", "operator"}
        measured.ceilings = {"bmma": (1e15, 1.0), "bandwidth": (1e12, None)}
        measured.add("ceilings", "bmma", operations_per_second=1e15, note="multiply-adds a second")
        for section in ("ladder", "resnet18"):
            measured.layer(section, Shape(64, 8, 1, 3, 0), (1,), ("popcount", "bases", "mma"))
        about = dict(hardware="simulator", versions="numba-cuda 0", capability="9.0", driver="550.10", date="today")
        report.write("cuda", [row | about | {"B": 256, "K": 3} for row in measured.rows])
        text = (elsewhere / "README.md").read_text()
        assert text.startswith("before\n<!-- cpu: python -m kernels.bench -->\nold\n<!-- /cpu -->\n")
        assert text.endswith("after\n") and text.count("\nold\n") == 1
        assert "rung3_popcount.py" in text and "rung5_bases.py" not in text and "nan" not in text
        assert "(compute capability 9.0), driver 550.10, numba-cuda 0, today." in text
        assert "Left out: 2 rows" in text
        assert files(elsewhere) == ["README.md", "cuda.csv", "cuda.svg"]
        rows = report.read("cuda")
        assert list(rows.columns[1:8]) == report.SHAPE
        assert (rows.note == "skipped: RuntimeError: launch failed").sum() == 2

    def test_every_rung_is_tried_and_what_crashed_is_not(monkeypatch):
        monkeypatch.setattr(check, "CASES", ())
        for name in ("problem_in_floats", "problem_in_bits", "problem_in_other_dimensions"):
            monkeypatch.setattr(check, name, lambda operator, device, **codes: None)
        found = ladder.problems({"mma": "crashes"}, say=lambda text: None)
        assert {name for name, problem in found.items() if problem} == {"mma"}
        assert found.keys() >= {"pack", "float", *ladder.RUNGS, *ladder.FUSED, "operator", "max pool"}

else:

    def test_in_the_simulator():
        pytest.importorskip("numba_cuda")
        environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

    def test_cpu_rows_table_and_page(elsewhere):
        threads = torch.get_num_threads()
        shape = Shape(16, 16, 3, 6, 1)
        settings = [bench.Setting(1, 1), bench.Setting(1, 2, "uniform"), bench.Setting(2, 2, "binary")]
        times = bench.time_shape(shape, 1, settings, seconds=0.01)
        torch.set_num_threads(threads)
        floats = {("float32", None), ("float32 channels_last", None)}
        assert floats | {("packed", settings[1]), ("words", settings[2])} <= times.keys()
        about = {"isa": "fast", "hardware": "a machine", "versions": "torch 0", "clock_ghz": 3.0, "bound_tops": 1.0}
        report.write("cpu", [row | about for row in bench.rows_of(shape, 1, times, 1e12)])
        assert files(elsewhere) == ["README.md", "cpu.csv", "cpu.svg"]
        text = (elsewhere / "README.md").read_text()
        assert text.count("\nold\n") == 1 and "**a machine, fast.** torch 0" in text and f"| {shape} | 1 |" in text
        assert "nan" not in text
        rows = report.read("cpu")
        packed = rows[(rows.contender == "packed") & (rows.code == "binary")].iloc[0]
        assert abs(packed.operations_per_second - 4e6 * shape.macs / packed.microseconds) < 0.01 * 4e6 * shape.macs

    def test_one_machine_takes_no_other_ones_rows(elsewhere):
        whole = report.RESULTS / "cpu.csv"
        rows = pd.read_csv(ROOT / "kernels/results/cpu.csv", dtype=str, keep_default_na=False)
        report.write("cpu", rows.to_dict("records"))
        before = whole.read_text()
        report.write("cpu", rows.assign(isa="slow").to_dict("records"))
        assert whole.read_text().startswith(before) and len(report.read("cpu")) == 2 * len(rows)
        report.write("cpu", rows.assign(isa="slow").to_dict("records"))
        assert len(report.read("cpu")) == 2 * len(rows)

    def test_the_crossing_is_before_the_first_loss(elsewhere):
        times = {(1, 1): 3.0, (2, 2): 1.5, (2, 3): 0.9, (3, 3): 1.1}
        rows = pd.DataFrame([
            {"contender": "packed", "K": 3, "threads": threads, "M": M, "N": N, "code": code, "share_of_bound": 0.5,
             "times_float32": best * scale / threads, "times_int8": best / 4}
            for (M, N), best in times.items() for code, scale in (("binary", 1), ("thermometer", 0.9), ("uniform", 9))
            for threads in (1, 2)
        ])  # fmt: skip
        assert report.crossing(rows, "times_float32") == 4 and report.crossing(rows, "times_int8") is None

    def test_the_crossing_is_what_the_engine_goes_by(elsewhere):
        (elsewhere / "cpu").mkdir()
        limits = elsewhere / "cpu/pays.json"
        limits.write_text('{"a tile": 16, "another": 4}')
        common = {"contender": "packed", "K": 3, "threads": 1, "times_int8": 1.0, "share_of_bound": 0.5}
        rows = [common | {"M": M, "N": N, "code": code, "times_float32": 10 / (M * N)}
                for M, N, code in map(dataclasses.astuple, bench.CROSSING)]  # fmt: skip
        report.write_limit("a tile", rows[:-1])  # not all of them
        assert json.loads(limits.read_text()) == {"a tile": 16, "another": 4}
        report.write_limit("a tile", rows)
        assert json.loads(limits.read_text()) == {"a tile": 9, "another": 4}
        report.write_limit("a tile", [row | {"times_float32": 0.9} for row in rows])
        assert json.loads(limits.read_text())["a tile"] == 0
        assert set(engine.BITS_PAY_UP_TO) == set(json.loads((ROOT / "kernels/cpu/pays.json").read_text()))
        assert system.tile() in engine.BITS_PAY_UP_TO

    def test_uniform_levels_have_one_beta():
        betas = bench.Setting(2, 3, "uniform").arguments(Shape(8, 8, 1, 3, 0))[2]
        assert len(betas) == 3 and betas.unique().numel() == 1
        assert str(bench.Setting(2, 3, "uniform")) == "2 x uniform 3"
        assert bench._setting("2 x uniform 3") == bench.Setting(2, 3, "uniform")

    def test_avx2_rows_and_table(elsewhere):
        threads = torch.get_num_threads()
        shape, settings = Shape(16, 16, 3, 6, 1), [bench.Setting(1, 1), bench.Setting(2, 2, "uniform")]
        times = bench.time_shape(shape, 1, settings, seconds=0.01, isa="avx2")
        torch.set_num_threads(threads)
        names = {name for name, _ in times}
        assert {"packed", "float32"} <= names and not any("onnxruntime" in name or "x86" in name for name in names)
        page = "<!-- avx2: python -m kernels.bench --isa avx2 -->\nold\n<!-- /avx2 -->\n"
        (elsewhere / "README.md").write_text(page)
        about = {"isa": "AVX2", "hardware": "a machine", "versions": "torch 0", "clock_ghz": 3.0, "bound_tops": 1.0}
        report.write("avx2", [row | about for row in bench.rows_of(shape, 1, times, 1e12)])
        assert files(elsewhere) == ["README.md", "avx2.csv"]
        text = (elsewhere / "README.md").read_text()
        assert "**a machine, AVX2.** torch 0" in text and "nan" not in text and "\nold\n" not in text

    def test_held_to_avx2_is_a_process_of_its_own(monkeypatch, elsewhere, refused):
        started = []

        def run(command, cwd, env):
            started.append((command, env))
            return subprocess.CompletedProcess(command, 5)

        monkeypatch.setattr(bench.subprocess, "run", run)
        monkeypatch.setattr(bench.platform, "machine", lambda: "x86_64")
        with pytest.raises(SystemExit) as left:
            bench.main(["--isa", "avx2", "--threads", "1"])
        ((command, environment),) = started
        assert left.value.code == 5 and command[1:] == ["-m", "kernels.bench", "--isa", "avx2", "--threads", "1"]
        assert bench.AVX2.items() <= environment.items()
        monkeypatch.setattr(bench.platform, "machine", lambda: "arm64")
        assert "AVX2 is for x86, and this is arm64" in refused(bench.main, "--isa", "avx2")

    def test_peak_of_every_way_to_count(monkeypatch):
        from kernels.cpu import peak, system

        for features in ((), ("avx2",), ("avx2", "avx512bw")):
            if set(features) <= system.features():
                with monkeypatch.context() as patch:
                    patch.setattr(system, "features", lambda features=features: frozenset(features))
                    assert 1e9 < peak.peak.__wrapped__() < 1e14

    def test_the_readme_shows_what_was_counted_for_arm():
        rows = pd.read_csv(ROOT / "kernels/results/arm.csv").to_dict("records")
        text = (ROOT / "kernels/README.md").read_text()
        assert report.fill(text, "python -m kernels.cpu.assembly --write", {"arm": assembly.table(rows)}) == text

    @pytest.mark.parametrize("device", ["cpu", "avx2", "cuda"])
    def test_the_readme_shows_the_results_that_there_are(device):
        text = (ROOT / "kernels/README.md").read_text()
        tables = {"cpu": report.cpu_table, "avx2": report.cpu_table, "cuda": report.cuda_table}
        table = tables[device](report.read(device))
        command = "python -m kernels.bench" + {"cpu": "", "avx2": " --isa avx2", "cuda": " --device cuda"}[device]
        assert report.fill(text, command, {device: table}) == text

    @pytest.mark.parametrize("option", ["threads", "settings", "seconds", "batch", "shape"])
    def test_a_bad_number_is_one_sentence(option, elsewhere, refused):
        for word in ("0", "-1", "x", "nan", "8,8,3,1,0"):  # the last: a kernel larger than the image
            assert f"argument --{option}: " in refused(bench.main, f"--{option}={word}")
        assert files(elsewhere) == ["README.md"]

    def test_without_an_engine_there_is_nothing_to_measure(elsewhere, monkeypatch, refused):
        monkeypatch.setattr(abcnets, "engines", lambda: {"cpu": "float convolutions: no numba"})
        assert "nothing to measure: packed layers run as float convolutions" in refused(bench.main)

    def test_without_a_gpu_the_bench_says_so(elsewhere, refused):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        assert "No GPU here" in refused(bench.main, "--device", "cuda")
        assert files(elsewhere) == ["README.md"] and "old" in (elsewhere / "README.md").read_text()

    def test_what_goes_wrong_on_a_card_becomes_a_row(elsewhere, monkeypatch):
        """Here everything goes wrong: there is no GPU."""
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        pytest.importorskip("numba_cuda")
        from kernels.cuda import ladder

        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        monkeypatch.setattr(ladder, "crash", lambda module: "hangs" if "wgmma" in module else None)
        monkeypatch.setattr(ladder, "problems", lambda crashes, say: {"mma": None, "wgmma": crashes.get("wgmma")})
        ceilings = {"bmma": (1e15, None), "bgmma": (2e15, None)}
        left = lambda say, skip: {name: rate for name, rate in ceilings.items() if name not in skip}  # noqa: E731
        monkeypatch.setattr(ladder.rates, "ceilings", left)
        measured = ladder.Ladder(limit=600, say=lambda text: None)
        measured.run()
        told = {(row["section"], row["contender"]): row["note"] for row in measured.rows}
        assert told["correctness", "mma"] == "right" and told["correctness", "wgmma"] == "wrong: hangs"
        assert ("ceilings", "bmma") in told and ("ceilings", "bgmma") not in told
        assert {section for section, name in told if name == "the rest"} == {"ladder", "resnet18", "original", "tiles"}
        late = ladder.Ladder(limit=-1, say=lambda text: None)
        late.run()
        assert late.rows[-1]["note"] == "skipped: TimeoutError: the time was used up"
        report.write("cuda", measured.rows)
        assert "Not measured yet" in (elsewhere / "README.md").read_text()

    def test_a_kernel_file_that_crashes_is_told_from_one_that_is_wrong(tmp_path, monkeypatch):
        pytest.importorskip("numba_cuda")
        from kernels.cuda import ladder

        folder = tmp_path / "package/cuda"
        folder.mkdir(parents=True)
        monkeypatch.setattr(ladder, "__file__", str(folder / "ladder.py"))
        for name, line in {"fine": "", "wrong": f"exit({check.WRONG})", "broken": "raise OSError('no')"}.items():
            (folder / f"{name}.py").write_text(line)
        assert ladder.crash("fine") is None and ladder.crash("wrong") is None
        assert ladder.crash("broken") == "crashes, in a process of its own: OSError: no"

    def test_checks_accept_the_plain_operator_and_notice_a_wrong_one():
        cases = check.LARGE[:2]

        def one_bit_off(x, bits, *rest):
            bits = bits.clone()
            bits[0, 1, 1, 1, 0] ^= 1
            return abcnets.packed_conv(x, bits, *rest)

        assert check.problem_in_floats(abcnets.packed_conv, cases=cases) is None
        assert check.problem_in_bits(abcnets.packed_conv, cases=cases) is None
        assert check.problem_in_other_dimensions(abcnets.packed_conv) is None
        assert check.problem_in_pool(abcnets.packed_max_pool) is None
        assert "error" in check.problem_in_floats(one_bit_off, cases=cases)
        assert "wrong bits" in check.problem_in_bits(one_bit_off, cases=cases)
        blind = check.problem_in_floats(lambda *a: torch.nan_to_num(abcnets.packed_conv(*a)), cases=cases)
        assert "error inf" in blind

    def test_fill_replaces_the_blocks_of_one_command():
        page = "a <!-- x: run this -->1<!-- /x --> b\n<!-- y: run that -->\n2\n<!-- /y -->\n"
        assert report.fill(page, "run this", {"x": "3"}) == page.replace("1", "3")
        assert report.fill(page, "run that", {"y": "\n4\n"}) == page.replace("2", "4")
        for command, values in (("run this", {}), ("run this", {"x": "", "z": ""}), ("run that", {"x": ""})):
            with pytest.raises(ValueError):
                report.fill(page, command, values)
        with pytest.raises(ValueError, match="does not end"):
            report.fill("<!-- x: run this -->", "run this", {"x": "3"})

    def test_a_page_is_refilled_whole_or_not_at_all(tmp_path, monkeypatch):
        page = tmp_path / "page.md"
        page.write_text("a <!-- x: run this -->1<!-- /x --> b")
        report.refill(page, "run this", {"x": "3"})
        assert page.read_text() == "a <!-- x: run this -->3<!-- /x --> b"

        def interrupted(*paths):
            raise KeyboardInterrupt

        monkeypatch.setattr(report.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            report.refill(page, "run this", {"x": "4"})
        assert page.read_text() == "a <!-- x: run this -->3<!-- /x --> b" and list(tmp_path.iterdir()) == [page]
