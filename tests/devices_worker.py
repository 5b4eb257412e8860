"""What tests/test_devices.py runs in each of two processes: some checks inside, then the command line's own training.

    torchrun --nproc-per-node 2 tests/devices_worker.py OUT pretrain ...
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]

import experiment  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from test_devices import digits, train_without_norm  # noqa: E402

import abcnets  # noqa: E402


def main(out: Path, arguments: list[str]) -> None:
    experiment.own_device(torch.device("cpu"))
    data = digits()
    model, history = train_without_norm(data)
    found = {"history": history, "weights": [weight.tolist() for weight in model.parameters()]}
    found["predictions"] = experiment.predict(model, data).tolist()  # 500 images, in batches that leave a rest

    layered, _ = experiment.pretrain(data, epochs=1, batch_size=100)
    binary = abcnets.convert(layered, 2, 2)
    abcnets.calibrate(binary, data.calibration_batches(100), progress=False)
    experiment.finetune(binary, data, layered, epochs=1, batch_size=100)
    experiment.finetune(abcnets.binarize(binary, False), data, epochs=1, batch_size=100)  # vs, betas: no gradient
    states = gather_object([{name: value.tolist() for name, value in binary.state_dict().items()}])
    found["same everywhere"] = states[0] == states[1]
    if experiment.is_main_process():
        out.write_text(json.dumps(found))
    experiment.main(arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
