"""The commands: of experiment.py, and of make."""

import subprocess
import sys

import experiment
import runs
import torch
from files import ROOT, save
from runs import read_csv, write_csv
from torch import nn


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
    assert "digits/M1-limit=200" in known and "digits/float" not in known
    missing = [*command, "pretrain", "--dataset", "folder:nowhere", *where]
    failed = subprocess.run(missing, capture_output=True, text=True)
    assert failed.returncode != 0 and "Traceback" not in failed.stderr and "nowhere" in failed.stderr


def test_the_command_measures_and_compares(tmp_path, monkeypatch):
    def tiny(data, seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip

    monkeypatch.setattr(runs, "build_network", tiny)
    save(tiny(None).state_dict(), tmp_path / "digits/float.pt")
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


def test_a_second_make_installs_nothing(tmp_path):
    """The stamp is newer than the pins, so make has nothing to do for it."""
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "installed").touch()
    asked = subprocess.run(["make", "-n", "test", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install" not in asked.stdout and "pytest" in asked.stdout
    fresh = subprocess.run(["make", "-n", "test", f"VENV={tmp_path}/no"], cwd=ROOT, capture_output=True, text=True)
    assert "pip install" in fresh.stdout
