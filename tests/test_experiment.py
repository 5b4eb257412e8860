"""Data sets, training and its checkpoints, the rows that runs leave behind, the commands."""

import csv
import subprocess
import sys
from pathlib import Path

import experiment
import numpy as np
import pytest
import torch
from PIL import Image

import abcnets

ROOT = Path(__file__).parent.parent
SMALL = {"batch_size": 100, "epochs": 2}


@pytest.fixture(scope="module")
def digits():
    return experiment.load_data("digits", limit=400)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever else the machine does
    yield
    torch.set_num_threads(threads)


def test_digits_are_real_and_complete():
    data = experiment.load_data("digits")
    assert len(data.train_images) + len(data.test_images) == 1797 and len(data.classes) == 10
    images, labels = next(data.test_batches(50))
    assert images.shape == (50, 1, 28, 28) and images.dtype == torch.float32 and labels.max() < 10


def test_a_folder_of_images_is_a_data_set(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    data = experiment.load_data(f"folder:{tmp_path}")
    assert list(data.classes) == ["cat", "dog"] and len(data.train_images) == len(data.test_images) == 6
    assert experiment.build_network(data)(next(data.test_batches(2))[0]).shape == (2, 2)


@pytest.mark.parametrize("name", ["folder:nowhere", "nonsense", "cifar10-jpeg"])
def test_a_data_set_that_can_not_be_had_gives_one_sentence(name, tmp_path):
    with pytest.raises(experiment.DataError) as error:
        experiment.load_data(name, root=tmp_path)
    assert len(str(error.value)) > 30 and "\n" not in str(error.value).strip()


def test_the_nine_layer_network_is_the_originals():
    network = experiment.nine_layer()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    sizes = [(m.in_channels, m.out_channels) for m in convolutions]
    assert sizes == [(1, 16), (16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64), (64, 64), (64, 64)]
    assert all(m.kernel_size == (3, 3) and m.padding == (1, 1) for m in convolutions)
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_a_killed_run_goes_on_to_the_very_same_weights(digits, tmp_path, monkeypatch):
    whole, history = experiment.pretrain(digits, **SMALL)
    measure, calls = experiment.accuracy, []

    def killed_in_the_second_epoch(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return measure(*arguments)

    monkeypatch.setattr(experiment, "accuracy", killed_in_the_second_epoch)
    with pytest.raises(RuntimeError, match="killed"):
        experiment.pretrain(digits, **SMALL, checkpoint=tmp_path / "run.checkpoint")
    monkeypatch.setattr(experiment, "accuracy", measure)
    resumed, again = experiment.pretrain(digits, **SMALL, checkpoint=tmp_path / "run.checkpoint")
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(value, other), name
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in history] and len(history) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.checkpoint"]


def test_the_last_steps_and_every_test_compute_in_float32(digits, monkeypatch):
    monkeypatch.setattr(experiment, "fast_bfloat16", lambda device: True)
    model, steps, tests = experiment.build_network(digits), [], []
    *_, last = model.children()
    last.register_forward_hook(lambda layer, _, logits: (steps if layer.training else tests).append(logits.dtype))
    experiment.train(model, digits, torch.optim.SGD(model.parameters(), 0.01), **SMALL, exact=0.25)
    mixed = len(steps) * 3 // 4
    assert steps == [torch.bfloat16] * mixed + [torch.float32] * (len(steps) - mixed) and 0 < mixed < len(steps)
    assert set(tests) == {torch.float32}


def test_ctrl_c_keeps_what_was_learned(digits, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "accuracy", interrupted)
    model, history = experiment.pretrain(digits, **SMALL)
    assert history == [] and "stopped after 0 of 2 epochs" in capsys.readouterr().out
    assert not torch.equal(next(model.parameters()), next(experiment.build_network(digits).parameters()))


def test_fine_tuning_recovers_and_leaves_a_row(digits, tmp_path):
    teacher, _ = experiment.pretrain(digits, batch_size=50, epochs=4)
    model = abcnets.convert(teacher, 2, 2)
    binarized = experiment.accuracy(model, digits)
    abcnets.calibrate(model, digits.calibration_batches(200), progress=False)
    calibrated = experiment.accuracy(model, digits)
    history = experiment.finetune(model, digits, teacher, **SMALL)
    tuned, whole = experiment.accuracy(model, digits), experiment.accuracy(teacher, digits)
    assert calibrated > binarized + 10 and tuned > whole - 8, (whole, binarized, calibrated, tuned)
    for _ in range(2):  # the second takes the first one's place
        experiment.record(tmp_path, digits, model, history, 2, 2, binarized=binarized, accuracy=tuned)
    with open(tmp_path / "runs.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["M"], row["N"], row["dataset"], row["epochs"]) == ("2", "2", "digits", "2")
    assert float(row["accuracy"]) == pytest.approx(tuned, abs=1e-3) and "torch" in row["versions"]
    assert "--weight-bases 2 --activation-bases 2" in row["command"]
    assert int(row["packed_bytes"]) < int(row["float_bytes"]) / 5


def test_the_command_line_trains_and_evaluates(tmp_path):
    where = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--threads", "1"]
    command = [sys.executable, str(ROOT / "notebooks/experiment.py")]
    small = ["--dataset", "digits", "--limit", "200", "--epochs", "1"]
    subprocess.run([*command, "pretrain", *small, *where], check=True, capture_output=True)
    bases = ["--weight-bases", "1", "--activation-bases", "none"]
    start = ["--from", str(tmp_path / "out/digits/float-limit=200.pt")]
    tuned = subprocess.run([*command, "finetune", *small, *bases, *start, *where], capture_output=True, text=True)
    assert tuned.returncode == 0 and "fine-tuned" in tuned.stdout, tuned.stderr
    runs = experiment.read_csv(tmp_path / "results" / "runs.csv")
    assert [(row["M"], row["N"]) for row in runs] == [("1", ""), ("", "")]
    missing = [*command, "pretrain", "--dataset", "folder:nowhere", *where]
    failed = subprocess.run(missing, capture_output=True, text=True)
    assert failed.returncode != 0 and "Traceback" not in failed.stderr and "nowhere" in failed.stderr


def test_a_second_make_installs_nothing(tmp_path):
    """The stamp is newer than the pins, so make has nothing to do for it."""
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "installed").touch()
    asked = subprocess.run(["make", "-n", "test", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install" not in asked.stdout and "pytest" in asked.stdout
    fresh = subprocess.run(["make", "-n", "test", f"VENV={tmp_path}/no"], cwd=ROOT, capture_output=True, text=True)
    assert "pip install" in fresh.stdout
