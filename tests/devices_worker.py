"""What tests/test_devices.py runs in each of two processes, to be killed in the end: checks, a run, and half a run.

    WORLD_SIZE=2 RANK=... LOCAL_RANK=... MASTER_ADDR=... MASTER_PORT=... python tests/devices_worker.py WHOLE KILLED ...
"""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]

import experiment  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from test_devices import places, some_digits, train_small  # noqa: E402

import abcnets  # noqa: E402


def main(whole: Path, killed: Path, arguments: list[str]) -> None:
    training.own_device(torch.device("cpu"))
    data, found = some_digits(), {}
    for norm in (False, True):
        model, history = train_small(data, norm)
        weights = [weight.tolist() for weight in model.parameters()]
        found[f"norm={norm}"] = {"history": history, "weights": weights}
        found[f"norm={norm}"]["predictions"] = training.predict(model, data).tolist()

    binary = abcnets.convert(model, 2, 2, filter_fn=lambda layer, name: True)
    training.finetune(binary, data, model, epochs=1, batch_size=80)
    training.finetune(abcnets.binarize(binary, False), data, epochs=1, batch_size=80)  # vs, betas: no gradient
    states = gather_object([{name: value.tolist() for name, value in binary.state_dict().items()}])
    found["same everywhere"] = states[0] == states[1]
    if training.is_main_process():
        (whole / "found.json").write_text(json.dumps(found))
    experiment.main([*arguments, *places(whole)])

    processes, save = gather_object([os.getpid()]), training.save

    def save_and_die(what, path):
        save(what, path)
        for process in reversed(processes):
            os.kill(process, signal.SIGKILL)

    training.save = save_and_die  # which writes the checkpoints
    experiment.main([*arguments, *places(killed)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
