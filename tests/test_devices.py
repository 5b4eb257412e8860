"""Training on many devices: two processes on the CPU, parts of batches, ImageNet's folder layout."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import experiment
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
RECIPE = ["--dataset", "digits", "--limit", "320", "--batch-size", "80", "--epochs", "3", "--seed", "5"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def digits():
    return experiment.load_data("digits", limit=320)


def without_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
                         nn.Flatten(), nn.Linear(288, 10))  # fmt: skip


def train_without_norm(data, **options):
    model = without_norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history = experiment.train(model, data, optimizer, epochs=2, batch_size=80, seed=1, **options)
    return model, history


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def places(folder: Path) -> list[str]:
    return ["--out", str(folder), "--results", str(folder / "results"), "--device", "cpu", "--threads", "1"]


def start_two(folder: Path, port: str) -> list[subprocess.Popen]:
    """The command line in two processes, in a session of their own, with the variables that a launcher sets."""
    command = [sys.executable, str(ROOT / "notebooks/experiment.py"), "pretrain", *RECIPE, *places(folder)]
    world = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        subprocess.Popen(command, env={**world, "RANK": rank, "LOCAL_RANK": rank}, start_new_session=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in "01"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The same command line, and some checks before it, under torchrun."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "tests/devices_worker.py"]
    done = subprocess.run([sys.executable, *command, folder / "found.json", "pretrain", *RECIPE, *places(folder)],
                          env=ENVIRONMENT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {"folder": folder, "output": done.stdout, **json.loads((folder / "found.json").read_text())}


def test_two_processes_killed_and_started_again_end_with_the_very_same_weights(uninterrupted, tmp_path, port):
    checkpoint = tmp_path / "digits/float-batch-size=80-limit=320-s5.checkpoint"
    processes = start_two(tmp_path, port)
    while not checkpoint.exists():
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.005)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(torch.load(checkpoint)["history"]) < 3 and not checkpoint.with_suffix(".pt").exists()

    processes = start_two(tmp_path, port)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "epoch 1/3" not in outputs[0] and "epoch 3/3" in outputs[0]
    resumed, whole = (torch.load(folder / "digits/float-batch-size=80-limit=320-s5.pt")
                      for folder in (tmp_path, uninterrupted["folder"]))  # fmt: skip
    assert resumed.keys() == whole.keys()
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name


def test_only_the_main_process_writes(uninterrupted):
    folder = uninterrupted["folder"]
    assert uninterrupted["output"].count("kept in") == 1
    assert uninterrupted["output"].count("epoch 3/3") == 1
    assert len(experiment.read_csv(folder / "results/runs.csv")) == 1
    assert not list(folder.glob("**/.*")), "a temporary file was left"


def test_two_processes_do_what_one_does(uninterrupted):
    """Without BatchNorm the global batch is all that counts: the same images, augmented alike, one mean gradient."""
    data = digits()
    model, history = train_without_norm(data)
    for two, one in zip(uninterrupted["history"], history):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["train_accuracy"] == pytest.approx(one["train_accuracy"], abs=0.5)
    for two, one in zip(uninterrupted["weights"], model.parameters()):
        torch.testing.assert_close(torch.tensor(two), one.detach(), rtol=1e-3, atol=1e-4)
    predictions = torch.tensor(uninterrupted["predictions"])
    assert predictions.shape == (500, 10)
    torch.testing.assert_close(predictions, experiment.predict(model, data), rtol=1e-2, atol=1e-2)


def test_with_batch_norm_two_processes_do_nearly_what_one_does(uninterrupted):
    """On the CPU each process normalizes its half of a batch by itself; the statistics are shared all the same."""
    assert uninterrupted["same everywhere"]
    _, (one, *_) = experiment.pretrain(digits(), epochs=3, batch_size=80, seed=5)
    two = torch.load(uninterrupted["folder"] / "digits/float-batch-size=80-limit=320-s5.checkpoint")["history"][0]
    assert two["loss"] == pytest.approx(one["loss"], rel=0.1)


def test_parts_of_a_batch_make_the_whole_step():
    data = digits()
    whole, history = train_without_norm(data)
    parts, again = train_without_norm(data, accumulate=2)
    for one, two in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    assert [entry["loss"] for entry in again] == pytest.approx([entry["loss"] for entry in history], rel=1e-4)
    assert not torch.allclose(next(whole.parameters()), next(without_norm().parameters()), atol=1e-2)


def test_batch_norm_sees_a_part_at_a_time():
    """The exception: each half is normalized by itself, so the running statistics move twice a step."""
    counts = []
    for accumulate in (1, 2):
        model, _ = experiment.pretrain(digits(), epochs=1, batch_size=160, accumulate=accumulate)
        counts.append({int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)})
    assert counts == [{2}, {4}]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 3 .* got 80"):
        train_without_norm(digits(), accumulate=3)


def test_training_leaves_the_model_as_its_owner_knows_it():
    model, _ = train_without_norm(digits())
    assert set(vars(model)) == set(vars(without_norm())) and type(model) is nn.Sequential
