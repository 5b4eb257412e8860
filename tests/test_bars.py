"""Progress bars are closed whatever happens: one that is left open is drawn into all that is printed later."""

import argparse
import weakref

import budget
import compare
import data
import pytest
import torch
import training
from PIL import Image
from torch import nn
from tqdm import tqdm

import abcnets


class Stop(Exception):
    pass


def stop(*_, **__):
    assert len(tqdm._instances) == 1, "there is no bar that could be left open"
    raise Stop


def stopping_network(calls: int) -> nn.Sequential:
    """A small network that stops in the middle of that call."""
    middle, counted = nn.Identity(), iter(range(1, calls + 1))
    middle.register_forward_pre_hook(lambda *_: stop() if next(counted) == calls else None)
    return nn.Sequential(nn.Conv2d(1, 4, 3), middle, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(1))


def calibrate(_, __):
    model = abcnets.convert(stopping_network(calls=2))  # the first one finds what is wanted
    abcnets.calibrate(model, torch.randn(4, 1, 8, 8))


def sensitivity(_, __):
    budget.sensitivity(stopping_network(calls=3), torch.randn(4, 1, 8, 8), [(1, 1)])


def train(digits, _):
    model = stopping_network(calls=2)
    training.train(model, digits, torch.optim.SGD(model.parameters(), 0.1), epochs=1, batch_size=20)


def decode(_, folder):
    for split in ("train", "test"):
        (folder / split / "class").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / split / "class/image.png")
    data.load_data(f"folder:{folder}")


def accuracies(digits, folder):
    compare.accuracies([compare.Contender("form", "", folder, stop)], digits)


def timing(_, folder):
    places = {"out": folder, "results": folder, "data": folder}
    compare.compare(argparse.Namespace(dataset="digits", batches=[1], threads=[1], seconds=0, calibrate=1, **places))


@pytest.mark.parametrize("function", [calibrate, sensitivity, train, decode, accuracies, timing])
def test_an_exception_closes_the_bar(function, few_digits, tmp_path, monkeypatch, threads):
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet())  # whatever other tests have left
    monkeypatch.setattr(data, "read_image", stop)
    for name in ("need_engine", "load_float", "kept_runs", "torch_contenders", "abcnets_contenders", "onnx_contenders"):
        monkeypatch.setattr(compare, name, lambda *_: [])
    for name in ("binary_networks", "onnx_files", "int8_files"):
        monkeypatch.setattr(compare, name, lambda *_: {})
    monkeypatch.setattr(compare, "milliseconds", stop)
    with pytest.raises(Stop) as kept:  # and with it the frames that hold the bar
        function(few_digits, tmp_path)
    assert not tqdm._instances, kept
