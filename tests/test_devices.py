"""Training on many devices: two processes on the CPU, killed and started again; parts of batches."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data import load_data
from runs import read_csv
from torch import nn
from training import predict, train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
COMMAND = ["pretrain", "--dataset", "digits", "--limit", "160", "--batch-size", "80", "--epochs", "2", "--seed", "5"]
RUN = "digits/float-batch-size=80-limit=160-s5"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def some_digits():
    return load_data("digits", limit=320)


def places(folder: Path) -> list[str]:
    return ["--out", str(folder), "--results", str(folder / "results"), "--device", "cpu", "--threads", "1"]


def small(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    first, second = (nn.BatchNorm2d(8) if norm else nn.Identity() for _ in range(2))
    convolutions = nn.Conv2d(1, 8, 3, stride=2), first, nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), second, nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(288, 10))


def train_small(data, norm: bool, **options):
    """In float32 throughout: in bfloat16 another order of the same sums rounds elsewhere."""
    model = small(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, train(model, data, optimizer, epochs=2, batch_size=80, seed=1, exact=1, **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found and wrote (see devices_worker.py), with the variables that a launcher sets."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = [
        subprocess.Popen([sys.executable, ROOT / "tests/devices_worker.py", whole, killed, *COMMAND],
                         env={**world, "RANK": rank, "LOCAL_RANK": rank},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in "01"
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2, "\n".join(outputs)
    return {"whole": whole, "killed": killed, "outputs": outputs, **json.loads((whole / "found.json").read_text())}


def test_two_processes_killed_and_started_again_end_with_the_very_same_weights(two):
    assert len(torch.load(two["killed"] / f"{RUN}.checkpoint")["history"]) == 1
    assert not (two["killed"] / f"{RUN}.pt").exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, ROOT / "notebooks/experiment.py", *COMMAND, *places(two["killed"])],
                          env=ENVIRONMENT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "epoch 1/2" not in done.stdout and done.stdout.count("epoch 2/2") == done.stdout.count("kept in") == 1
    resumed, whole = (torch.load(folder / f"{RUN}.pt") for folder in (two["killed"], two["whole"]))
    assert resumed.keys() == whole.keys()
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name


def test_the_main_process_alone_writes(two):
    main, other = two["outputs"]
    assert main.count("epoch 2/2") == 3 and main.count("kept in") == 1  # two small networks, one command
    assert "epoch" not in other and "kept in" not in other
    assert len(read_csv(two["whole"] / "results/runs.csv")) == 1
    assert not list(two["whole"].glob("**/.*")), "a temporary file was left"


def test_two_processes_do_what_one_does(two):
    """Without BatchNorm all that counts is the batch as a whole: its images, their augmentation, the mean gradient."""
    data = some_digits()
    model, history = train_small(data, norm=False)
    for many, one in zip(two["norm=False"]["history"], history):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert many["train_accuracy"] == pytest.approx(one["train_accuracy"], abs=0.7)
    for many, one in zip(two["norm=False"]["weights"], model.parameters()):
        torch.testing.assert_close(torch.tensor(many), one.detach(), rtol=1e-3, atol=1e-4)
    predictions = torch.tensor(two["norm=False"]["predictions"])
    assert predictions.shape == (500, 10)
    torch.testing.assert_close(predictions, predict(model, data), rtol=1e-2, atol=1e-2)


def test_with_batch_norm_two_processes_do_nearly_what_one_does(two):
    """On the CPU each process normalizes its half of a batch by itself; the running statistics are shared."""
    model, history = train_small(some_digits(), norm=True)
    assert two["norm=True"]["history"][0]["loss"] == pytest.approx(history[0]["loss"], rel=0.05)
    assert two["same everywhere"]


def test_parts_of_a_batch_make_the_whole_step():
    data = some_digits()
    (whole, history), (parts, again) = (train_small(data, norm=False, accumulate=count) for count in (1, 2))
    for one, other in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    assert [entry["loss"] for entry in again] == pytest.approx([entry["loss"] for entry in history], rel=1e-4)
    assert not torch.allclose(whole[0].weight, small(norm=False)[0].weight, atol=1e-2)


def test_batch_norm_sees_a_part_at_a_time():
    """The exception: each part is normalized by itself, so the running statistics move with each part."""
    data = some_digits()
    (whole, _), (parts, _) = (train_small(data, norm=True, accumulate=count) for count in (1, 2))
    assert (int(whole[1].num_batches_tracked), int(parts[1].num_batches_tracked)) == (8, 16)
    assert not torch.allclose(whole[3].weight, parts[3].weight, rtol=1e-3, atol=1e-4)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 3 .* got 80"):
        train_small(some_digits(), norm=False, accumulate=3)


def test_training_leaves_the_model_as_its_owner_knows_it():
    model, _ = train_small(some_digits(), norm=True)
    assert vars(model).keys() == vars(small(norm=True)).keys()
