"""The training loop: killed, interrupted, in two precisions."""

import dataclasses

import pytest
import torch
import training
from networks import build_network
from training import pretrain, train

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


def test_ctrl_c_keeps_what_was_learned(few_digits, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "accuracy", interrupted)
    model, history = pretrain(few_digits, **SMALL)
    assert history == [] and "stopped after 0 of 2 epochs" in capsys.readouterr().out
    assert not torch.equal(next(model.parameters()), next(build_network(few_digits).parameters()))
