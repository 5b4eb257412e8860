"""The commands: of experiment.py, and of make."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import experiment
import pandas as pd
import pytest
import runs
import speed
import torch
from data import load_data
from experiment import command_line
from files import ROOT, save
from networks import build_network
from runs import collect, main_runs, read_csv, setting_of, write_csv
from torch import nn
from training import accuracy

import abcnets
from writeup import records

PERCENT = ("float", "binarized", "calibrated", "accuracy")


def test_the_command_line_trains_and_evaluates(tmp_path):
    where = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--threads", "1"]
    command = [sys.executable, str(ROOT / "notebooks/experiment.py")]
    small = ["--dataset", "digits", "--limit", "200", "--epochs", "1"]
    subprocess.run([*command, "pretrain", *small, *where], check=True, capture_output=True)
    bases = ["--weight-bases", "1", "--activation-bases", "none"]
    start = ["--from", str(tmp_path / "out/digits/float-limit=200.pt")]
    tuned = subprocess.run([*command, "finetune", *small, *bases, *start, *where], capture_output=True, text=True)
    assert tuned.returncode == 0 and "fine-tuned" in tuned.stdout, tuned.stderr
    rows = read_csv(tmp_path / "results" / "runs.csv")
    assert rows.M.fillna(0).tolist() == [1, 0] and rows.N.isna().all()
    known = subprocess.run([*command, "table", *where[2:4]], capture_output=True, text=True, check=True).stdout
    assert "digits/M1-limit=200-from=" in known and "digits/float" not in known
    missing = [*command, "pretrain", "--dataset", "folder:nowhere", *where]
    failed = subprocess.run(missing, capture_output=True, text=True)
    assert failed.returncode == 2 and "nowhere" in failed.stderr and len(failed.stderr.splitlines()) == 1


BINARY = ["finetune", "--dataset", "digits", "--weight-bases", "1", "--activation-bases", "1", "--calibrate", "0",
          "--limit", "128", "--batch-size", "64", "--epochs", "3", "--threads", "1", "--device", "cpu"]  # fmt: skip
RUN = "digits/M1-N1-calibrate=0-batch-size=64-limit=128"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits):
    """The folder of a run from an untrained network."""
    out = tmp_path_factory.mktemp("uninterrupted")
    threads = torch.get_num_threads()
    save(build_network(digits).state_dict(), out / "digits/float.pt")
    experiment.main([*BINARY, "--out", str(out)])
    torch.set_num_threads(threads)
    return out


STOPPING = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
sys.path.insert(0, {str(ROOT / "notebooks")!r})
import training
number, sys.argv = int(sys.argv[1]), sys.argv[1:]
show = training._show

def show_and_stop(*what):
    show(*what)
    os.kill(os.getpid(), number)

training._show = show_and_stop
runpy.run_path({str(ROOT / "notebooks/experiment.py")!r}, run_name="__main__")
"""  # the command line in a process that gets a signal as soon as its first epoch is kept and told


def stopped_after_an_epoch(out, signal_number) -> tuple[int, str, str]:
    """Exit code, last line and errors of that run, with no network and no row."""
    save(build_network(load_data("digits")).state_dict(), out / "digits/float.pt")
    command = [sys.executable, "-c", STOPPING, str(int(signal_number)), *BINARY, "--out", str(out)]
    run = subprocess.run(command, env={**os.environ, "TQDM_DISABLE": "1"}, capture_output=True, text=True)
    assert "epoch 1/3" in run.stdout and "epoch 2/3" not in run.stdout, run.stdout + run.stderr
    assert not (out / f"{RUN}.pt").exists() and not (out / "results/runs.csv").exists()
    return run.returncode, run.stdout.splitlines(keepends=True)[-1], run.stderr


def test_an_interrupted_run_leaves_no_result_and_goes_on_to_the_very_same(uninterrupted, tmp_path, digits, threads,
                                                                          refused):  # fmt: skip
    checkpoint, there = tmp_path / f"{RUN}.checkpoint", [*BINARY, "--out", str(tmp_path)]
    how = f"{RUN}: interrupted after 1 of 3 epochs; run it again to go on from {checkpoint}\n"
    assert stopped_after_an_epoch(tmp_path, signal.SIGINT) == (130, how, "")
    kept = checkpoint.read_bytes()
    first = torch.load(checkpoint)["history"]

    other = tmp_path / "other.pt"
    save(build_network(digits, seed=1).state_dict(), other)
    for words in (["--from", other], ["--weight-decay", "0.1"], ["--calibrate", "64"], ["--distill", "0.25"]):
        options = experiment.command_line().parse_args([*there, *map(str, words)])
        assert experiment.recipe_of(options, digits, experiment._load_float(options, digits)).name != RUN
    assert "epochs 3, not 2" in refused(experiment.main, *there, "--epochs", "2")
    save(build_network(digits, seed=1).state_dict(), tmp_path / "digits/float.pt")
    said = refused(experiment.main, *there)
    assert f"{checkpoint} is of another recipe (start " in said and ", teacher " in said and "--replace" in said
    assert checkpoint.read_bytes() == kept

    save(build_network(digits).state_dict(), tmp_path / "digits/float.pt")
    experiment.main(there)
    resumed, whole = (torch.load(out / f"{RUN}.pt") for out in (tmp_path, uninterrupted))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert len(first) == 1 and torch.load(checkpoint)["history"][:1] == first
    row, expected = (read_csv(out / "results/runs.csv").drop(columns="seconds") for out in (tmp_path, uninterrupted))
    assert len(row) == 1 and row.equals(expected)


def test_a_terminated_run_is_an_interrupted_one(tmp_path):
    code, said, errors = stopped_after_an_epoch(tmp_path, signal.SIGTERM)
    assert code == 143 and "interrupted after 1 of 3 epochs; run it again to go on from" in said and errors == ""


ARGUMENTS = {
    "pretrain": {"device": ["nonsense", "meta", "cuda:99"], "threads": ["0", "-1", "x", "99999"], "limit": ["0", "-5"],
                 "epochs": ["0", "-1", "1.5"], "batch-size": ["0"], "accumulate": ["0"], "lr": ["0", "nan", "inf"],
                 "warmup": ["-1", "1"], "exact": ["2"], "seed": ["-1"]},
    "finetune": {"weight-bases": ["0", "-1", "many"], "activation-bases": ["0"], "epochs": ["-1"], "distill": ["1.5"],
                 "calibrate": ["-1"], "float-seed": ["-1"], "lr-activation": ["0"], "weight-decay": ["-1"],
                 "code": ["", "ternary", "binary,", "binary,uniform,uniform"]},
    "sensitivity": {"images": ["1"], "apart": ["-1"], "code": ["none"]},
    "step": {"rounds": ["0"], "batch-size": ["0"]},
}  # fmt: skip


@pytest.mark.parametrize("command", ARGUMENTS)
def test_a_bad_argument_is_one_sentence(command, refused):
    for option, words in ARGUMENTS[command].items():
        for word in words:
            said = refused(experiment.main, command, f"--{option}={word}")
            assert f"argument --{option}: " in said and f"is wanted, got '{word}'" in said


def test_the_speed_of_networks_takes_no_bad_argument(refused):
    for word in ("--threads=0", "--seconds=nan", "--networks=none", "--nonsense"):
        assert word.split("=")[0] in refused(speed.main, word)


def test_what_can_not_be_done_is_one_sentence(tmp_path, refused, threads):
    nothing, file, places = tmp_path / "nothing", tmp_path / "file", ["--out", tmp_path, "--results", tmp_path]
    file.write_text("no tensors")

    def sentence(command, *options):
        return refused(experiment.main, command, *places, *options)

    assert "runs.csv is missing" in sentence("table")
    write_csv(tmp_path / "runs.csv", [{"run": "digits/float", "dataset": "digits", "M": None, "N": None}])
    assert "has no binarized run:" in sentence("table") and "of mnist" in sentence("table", "--dataset", "mnist")
    (tmp_path / "runs.csv").write_text("")
    assert "can't be read as a table" in sentence("table")
    (tmp_path / "runs.csv").unlink()
    assert "digits/float.pt is missing" in sentence("evaluate")
    save(build_network(load_data("digits")).state_dict(), tmp_path / "digits/float.pt")
    assert "digits/M3-N3.pt is missing" in sentence("evaluate")
    assert "both none" in sentence("finetune", "--weight-bases", "none", "--activation-bases", "none")
    assert "packed networks" in sentence("compile", "--weight-bases", "none")
    assert "nothing is missing" in sentence("finetune", "--from", nothing)
    assert f"{file} can't be read" in sentence("finetune", "--from", file)
    save({"0.weight": torch.zeros(16, 1, 3, 3)}, file)
    assert f"{file} does not hold the weights of this network: " in sentence("finetune", "--from", file)
    for option in ("--out", "--results"):
        assert f"nothing can be written to the folder {file}/out: " in sentence("pretrain", option, file / "out")
    assert "multiple of 3 " in sentence("pretrain", "--batch-size", "128", "--accumulate", "3")
    assert "at most the 100 training images, got 128" in sentence("pretrain", "--limit", "100")
    assert "from 1 to the 1167 training images" in sentence("pretrain", "--limit", "1168")
    assert f"{file}/train is missing" in sentence("pretrain", "--dataset", f"folder:{file}")
    assert "not in" in sentence("pretrain", "--dataset", "fashion-mnist", "--data", file)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A network small enough for tests in the place of all others, its weights where those of the digits' are kept."""

    def build(data, seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip

    monkeypatch.setattr(runs, "build_network", build)
    save(build(None).state_dict(), tmp_path / "digits/float.pt")


def test_a_run_is_named_after_its_code_and_zero(tmp_path, tiny, capsys):
    places = ["--dataset", "digits", "--out", str(tmp_path), "--results", str(tmp_path)]
    two = ["--weight-bases", "2", "--activation-bases", "2"]
    runs_of = {
        "digits/M2-N2-code=binary-calibrate=100": ["--code", "binary"],
        "digits/M2-N2-zero-calibrate=100": ["--zero"],
        "digits/M2-N2-no-zero-code=binary,uniform-calibrate=100": ["--code", "binary,uniform", "--no-zero"],
    }
    for words in runs_of.values():
        experiment.main(["finetune", *places, *two, *words, "--calibrate", "100", "--epochs", "0"])
    rows = read_csv(tmp_path / "runs.csv").set_index("run")
    assert sorted(rows.index) == sorted(runs_of)
    digits, start = load_data("digits"), runs.load_float(load_data("digits"), tmp_path)
    for run, words in runs_of.items():
        repeated = experiment.command_line().parse_args(rows.command[run].split()[2:])
        assert experiment.recipe_of(repeated, digits, start).short == rows.recipe[run]
        assert all(word in rows.command[run].split() for word in words)
        capsys.readouterr()
        experiment.main(["evaluate", *places, *two, *words, "--calibrate", "100"])
        assert capsys.readouterr().out == f"{run}: {rows.accuracy[run]:.2f} %\n"
    of_zero = torch.load(tmp_path / "digits/M2-N2-zero-calibrate=100.pt", weights_only=True)
    of_binary = torch.load(tmp_path / "digits/M2-N2-code=binary-calibrate=100.pt", weights_only=True)
    of_pair = torch.load(tmp_path / "digits/M2-N2-no-zero-code=binary,uniform-calibrate=100.pt", weights_only=True)
    lengths = [[len(state[f"2.{name}"]) for name in ("us", "vs", "betas")] for state in (of_zero, of_binary, of_pair)]
    assert lengths == [[2, 2, 2], [3, 3, 2], [3, 2, 1]]


def test_the_command_measures_and_compares(tmp_path, tiny):
    another = {"dataset": "another", "seed": 0, "uniform": 2, "uniform_accuracy": 90, "mixed_accuracy": 91}
    write_csv(tmp_path / "mixed.csv", [another])
    experiment.main(["sensitivity", "--dataset", "digits", "--out", str(tmp_path), "--results", str(tmp_path),
                     "--images", "100", "--limit", "200", "--apart", "0"])  # fmt: skip
    mixed = read_csv(tmp_path / "mixed.csv")
    assert list(zip(mixed.dataset, mixed.uniform)) == [("another", 2), ("digits", 2), ("digits", 3)]
    for row in mixed[1:].itertuples():
        assert 0 < row.mixed_bytes <= row.uniform_bytes
        assert 0 < row.mixed_binary_macs <= row.uniform_binary_macs
        assert row.mixed_summed_error <= row.uniform_summed_error
    measured = read_csv(tmp_path / "sensitivity.csv")
    assert len(measured) == 2 * 5 + 3 and set(measured.dataset) == {"digits"}
    assert set(measured.code.dropna()) == {"thermometer"} and measured.code.isna().sum() == 3
    known = [(tmp_path / f"{name}.csv").read_text() for name in ("sensitivity", "mixed")]
    experiment.main(["sensitivity", "--dataset", "digits", "--out", str(tmp_path), "--results", str(tmp_path),
                     "--images", "100", "--limit", "200", "--apart", "0", "--code", "binary"])  # fmt: skip
    assert known == [(tmp_path / f"{name}.csv").read_text() for name in ("sensitivity", "mixed")]
    measured, mixed = (read_csv(tmp_path / f"{name}-code=binary.csv") for name in ("sensitivity", "mixed"))
    assert set(measured[measured.M > 1].code) == {"binary"} and len(mixed) == 2
    assert mixed.mixed_settings.str.contains(",binary").all()


def test_runs_of_two_codes_are_main_runs(tmp_path):
    row = {"run": "digits/M2-N2-code=uniform,binary", "dataset": "digits", "M": 2, "N": 2, "seed": 0}
    others = ["", "code=binary", "code=binary,uniform", "code=binary zero", "code=uniform,binary limit=2000"]
    write_csv(tmp_path / "runs.csv", [row | {"options": words} for words in ("code=uniform,binary", *others)])
    found = main_runs(tmp_path, "digits").to_dict("records")
    assert [setting_of(each)[2] for each in found] == ["uniform,binary", "thermometer", "binary", "binary,uniform"]
    layers = runs.converted(nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(3))), found[0])
    assert layers[1].code == ("uniform", "binary")


def test_a_network_of_mixed_settings(tmp_path, tiny, capsys):
    """Each layer has the bases that the table says, in training, in evaluation, and where the network is collected."""
    digits = load_data("digits", tmp_path, 200)
    uniform = {"dataset": "digits", "seed": 0, "uniform": 2, "mixed_settings": "2:1,3,binary"}
    write_csv(tmp_path / "mixed-code=binary.csv", [uniform])
    places = ["--dataset", "digits", "--out", str(tmp_path), "--results", str(tmp_path), "--limit", "200"]
    words = ["--weight-bases", "2", "--activation-bases", "2", "--code", "binary", "--mixed", *places]
    experiment.main(["finetune", *words, "--epochs", "1", "--calibrate", "100"])
    (row,) = read_csv(tmp_path / "runs.csv").to_dict("records")
    assert row["options"] == "mixed code=binary calibrate=100 limit=200" and row["settings"] == "2:1,3,binary"
    assert "--mixed --code binary" in row["command"]
    capsys.readouterr()
    experiment.main(["evaluate", *words, "--calibrate", "100"])
    assert capsys.readouterr().out == f"{row['run']}: {row['accuracy']:.2f} %\n"

    row |= {"options": "mixed code=binary"}
    write_csv(tmp_path / "runs.csv", [row])
    (found,) = main_runs(tmp_path, "digits").to_dict("records")
    assert setting_of(found) == (2, 2, "mixed binary")
    (path,) = collect(digits, tmp_path, tmp_path, tmp_path / "trained")
    packed = abcnets.load_packed(path, runs.build_network(digits))
    layers = [layer for layer in packed.modules() if isinstance(layer, abcnets.PackedLayer)]
    assert [(layer.weight_bases, layer.activation_bases, layer.code[1]) for layer in layers] == [(1, 3, "binary")]
    assert accuracy(packed, digits) == pytest.approx(row["accuracy"], abs=0.5)

    for wrong, said in ((["--activation-bases", "3"], "as many weight bases as activation bases"),
                        (["--code", "uniform"], "no mixed settings are recorded for digits")):  # fmt: skip
        with pytest.raises(SystemExit):
            experiment.main(["finetune", *words, *wrong])
        assert said in capsys.readouterr().err


def test_a_second_make_installs_nothing(tmp_path):
    """The stamp is newer than the pins, so make has nothing to do for it."""
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "installed").touch()
    asked = subprocess.run(["make", "-n", "test", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install" not in asked.stdout and "pytest" in asked.stdout
    fresh = subprocess.run(["make", "-n", "test", f"VENV={tmp_path}/no"], cwd=ROOT, capture_output=True, text=True)
    assert "pip install" in fresh.stdout


def test_make_alone_writes_the_tracked_tables(monkeypatch):
    read = []
    monkeypatch.setattr(experiment, "read_csv", lambda path, columns: read.append(path.parent) or pd.DataFrame(
        {"run": ["x"], "dataset": ["x"], "M": [1], "N": [1], **dict.fromkeys(PERCENT, [1.0])}))  # fmt: skip
    experiment.main(["table"])
    experiment.main(["table", "--out", "/there"])
    assert read == [ROOT / "out/results", Path("/there/results")]
    for target in ("results", "ablation", "codes"):
        asked = subprocess.run(["make", "-n", target, "BIN=echo", "INSTALLED="], cwd=ROOT, capture_output=True,
                               text=True, check=True).stdout  # fmt: skip
        commands = asked.replace("\\\n", "").split("experiment.py ")[1:]
        trains = [words for words in commands if words.startswith(("pretrain", "finetune"))]
        assert trains and all("--results notebooks/results --replace" in words for words in trains)


def run_by_make(target: str) -> list[str]:
    make = ["make", "--no-print-directory", "-n", target, "VENV=/nowhere", "BIN=echo", "INSTALLED="]
    asked = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    done = subprocess.run(["sh", "-c", asked.stdout.replace("echo/python", "echo")], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(set(lines)), done.stderr
    return lines


def test_make_results_runs_the_settings_of_the_tables():
    lines = run_by_make("results")
    tuned = [line for line in lines if line.startswith("notebooks/experiment.py finetune")]
    floats = [line for line in lines if line.startswith("notebooks/experiment.py pretrain")]
    assert len(floats) == 5  # of four networks: one is asked for again, before the settings with one seed
    for dataset, seeds in ((records.DATASET, 3), ("cifar10-jpeg", 1)):
        ran = [line.removeprefix(f"notebooks/experiment.py finetune --dataset {dataset} ") for line in tuned
               if f"--dataset {dataset} " in line]  # fmt: skip
        options = command_line()
        parsed = [options.parse_args(["finetune", *line.split()]) for line in ran]
        codes = [",".join(dict.fromkeys(found.code or ["thermometer"])) for found in parsed]
        settings = {(found.M, found.N, "mixed " * found.mixed + code) for found, code in zip(parsed, codes)}
        assert settings <= {*records.SETTINGS} and all(found.replace for found in parsed)
        assert dataset != records.DATASET or settings == {*records.SETTINGS}
        assert {found.seed for found in parsed} == set(range(seeds))


def test_make_codes_runs_each_choice_with_three_seeds():
    lines = run_by_make("codes")
    assert len(lines) == 3 * 14
    for line in lines:
        assert line.startswith("notebooks/experiment.py finetune --dataset fashion-mnist --weight-bases ")
        assert " --limit 20000 --epochs 3 --float-seed 0 --seed " in line
    assert sum("--weight-bases 2 --activation-bases 2 --code binary --no-zero --limit" in line for line in lines) == 3
    assert sum("--weight-bases 2 --activation-bases none --code binary --limit" in line for line in lines) == 3


def test_a_sentence_keeps_its_cause():
    from kernels.command import _sentence

    assert _sentence(ValueError("not there (no\nroute): connect")) == "not there (no route): connect"
    worker = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    assert _sentence(ValueError(worker + "builtins.ValueError: a.jpg is no image\n")) == "a.jpg is no image"
