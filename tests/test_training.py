"""The training loop: killed, interrupted, in two precisions."""

import dataclasses

import pytest
import torch
import training
from networks import build_network
from torch import nn
from training import finetune, fingerprint, load_checkpoint, pretrain, train

from kernels.command import Refused

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"batch_size": 100, "epochs": 2}


def test_a_killed_run_goes_on_to_the_very_same_weights(few_digits, tmp_path, monkeypatch):
    whole, history = pretrain(few_digits, **SMALL)
    measure, calls = training.accuracy, []

    def killed_in_the_second_epoch(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return measure(*arguments)

    monkeypatch.setattr(training, "accuracy", killed_in_the_second_epoch)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(few_digits, **SMALL, checkpoint=tmp_path / "run.checkpoint")
    monkeypatch.setattr(training, "accuracy", measure)
    resumed, again = pretrain(few_digits, **SMALL, checkpoint=tmp_path / "run.checkpoint")
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(value, other), name
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in history] and len(history) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.checkpoint"]


def test_the_last_steps_and_every_test_compute_in_float32(few_digits, monkeypatch):
    monkeypatch.setattr(training, "fast_bfloat16", lambda device: True)
    split = {name: getattr(few_digits, name)[:80] for name in vars(few_digits) if name.endswith(("images", "labels"))}
    fewer = dataclasses.replace(few_digits, **split)
    model, steps, tests = build_network(fewer), [], []
    *_, last = model.children()
    last.register_forward_hook(lambda layer, _, logits: (steps if layer.training else tests).append(logits.dtype))
    train(model, fewer, torch.optim.SGD(model.parameters(), 0.01), batch_size=10, epochs=1, exact=0.25)
    mixed = len(steps) * 3 // 4
    assert steps == [torch.bfloat16] * mixed + [torch.float32] * (len(steps) - mixed) and 0 < mixed < len(steps)
    assert set(tests) == {torch.float32}


def tiny(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10))


def test_ctrl_c_keeps_the_complete_epochs(few_digits, tmp_path, monkeypatch, capsys):
    path, measure, calls = tmp_path / "run.checkpoint", training.accuracy, iter(range(9))

    def interrupted_in_the_second_epoch(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(training, "accuracy", interrupted_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny(), few_digits, **SMALL, checkpoint=path)
    assert f"interrupted after 1 of 2 epochs; run it again to go on from {path}\n" in capsys.readouterr().out
    assert len(load_checkpoint(path)["history"]) == 1
    assert len(finetune(tiny(), few_digits, **SMALL, checkpoint=path)) == 2
    calls = iter((1,))
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny(), few_digits, **SMALL)
    assert "interrupted after 0 of 2 epochs; nothing is kept\n" in capsys.readouterr().out


def test_a_checkpoint_of_another_recipe_is_neither_resumed_nor_lost(few_digits, tmp_path):
    path = tmp_path / "run.checkpoint"
    given = {**SMALL, "teacher": tiny(1).eval(), "checkpoint": path}
    history = finetune(tiny(), few_digits, **given)
    kept = path.read_bytes()
    others = {"teacher": tiny(2).eval(), "weight_decay": 0.1, "lr": 0.1, "epochs": 1, "batch_size": 50, "accumulate": 2,
              "warmup": 0.2, "exact": 0.2, "seed": 1, "distill": 0.1}  # fmt: skip
    for name, value in others.items():
        with pytest.raises(Refused, match=f"run.checkpoint is of another recipe .*{name} .*, not .*: choose another"):
            finetune(tiny(), few_digits, **given | {name: value})
    with pytest.raises(Refused, match="start .*, not "):
        finetune(tiny(3), few_digits, **given)
    with pytest.raises(Refused, match="teacher .*, not None"):
        finetune(tiny(), few_digits, **given | {"teacher": None})
    assert path.read_bytes() == kept and finetune(tiny(), few_digits, **given) == history
    assert len(finetune(tiny(), few_digits, **given | {"epochs": 1}, replace=True)) == 1
    assert len(load_checkpoint(path)["history"]) == 1


def test_a_fingerprint_is_of_all_that_a_network_remembers():
    model = tiny()
    prints = [fingerprint(model), fingerprint(tiny(1))]
    assert fingerprint(tiny()) == fingerprint(model.state_dict()) == prints[0]
    assert fingerprint(model.to(memory_format=torch.channels_last)) == prints[0]
    model[1].num_batches_tracked += 1
    prints.append(fingerprint(model))
    prints.append(fingerprint(model.bfloat16()))
    assert len({*prints}) == 4
