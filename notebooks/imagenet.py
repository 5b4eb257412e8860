"""The paper's own experiment: a pretrained network binarized on ImageNet, or on any folder of images laid out like it.

    python notebooks/imagenet.py PATH                                                  ResNet-18, M = N = 5
    python notebooks/imagenet.py PATH --network resnet34 --weight-bases 3 --activation-bases 3
    accelerate launch --multi_gpu notebooks/imagenet.py PATH --batch-size 512          all GPUs of this machine

PATH holds train/CLASS/*.JPEG and val/CLASS/*.JPEG, a folder per class. Classes are the folders' sorted names, and with
ImageNet's 1000 these are the classes of torchvision's weights. The command evaluates the float network, converts and
calibrates it, fine-tunes it with the float network as its teacher, and evaluates it again: top-1 and top-5 of the
validation images, printed beside what the paper reports and kept as a row in `out/results/imagenet.csv`. Started again
after Ctrl-C or a kill, it goes on after the last complete epoch.

The float network is torchvision's (`--weights DEFAULT`, downloaded once), a state dict of yours (`--weights FILE`) or
freshly initialized (`--weights none`). Where its classes are not as many as the folder's, it gets a new last layer.
A network with something untrained in it is no teacher: fine-tuning then goes by the labels alone.

What to expect: the paper (arXiv:1711.11294) reports 65.0 % top-1 and 85.9 % top-5 for ResNet-18 at M = N = 5, from
69.3 % and 89.2 % float. We have run this command on small folders only, not on ImageNet: its epochs and its learning
rate are a starting point.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where abcnets.py and kernels/ are

import torch
from accelerate import PartialState
from data import hold_out, image_folders, read_image, shuffled_loader
from files import ROOT, DataError, load, save, writable
from networks import import_torchvision
from runs import keep_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from training import (
    best_device,
    check_batch,
    finetune,
    fingerprint,
    is_main_process,
    load_weights,
    own_device,
    predict,
)

import abcnets
from kernels.clock import machine
from kernels.command import COUNT, COUNT_OR_0, POSITIVE, SEED, Parser, present_device

PUBLISHED = {("resnet18", None, None): (69.3, 89.2), ("resnet18", 5, 5): (65.0, 85.9)}  # arXiv:1711.11294: top-1, top-5


class ImageFolders:
    """PATH/train/CLASS/* and PATH/val/CLASS/*, decoded and augmented as they are needed; for `training.train`.

    Training images are a random crop of `size` pixels (8 % to 100 % of the image) and mirrored half of the time, test
    images are brought to 8/7 of `size` and cut in the middle: 224 and 256 pixels, as torchvision trains and tests.
    The test images are those in val/; what curves are drawn with is held out from those in train/, see `hold_out`.
    """

    test_batch_size = 256

    def __init__(self, path: Path, size: int, workers: int, device: torch.device):
        import_torchvision()
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        finish = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        cut = transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *finish])
        vary = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *finish])
        train, self.test = image_folders(path, "val", cut)
        self.name, self.classes, self.size, self.device = path.resolve().name, train.classes, size, device
        kept, held = hold_out(len(train))
        self.train, self.validation = Subset(train, kept.tolist()), Subset(train, held.tolist())
        self.augmented = Augmented(Subset(ImageFolder(str(path / "train"), vary, loader=read_image), kept.tolist()))
        labels = torch.tensor(train.targets)
        self.train_labels, self.validation_labels = labels[kept].to(device), labels[held].to(device)
        self.test_labels = torch.tensor(self.test.targets, device=device)
        self.loading = {"num_workers": workers, "pin_memory": device.type == "cuda", "persistent_workers": workers > 0}

    def train_loader(self, batch_size: int, accumulate: int = 1, seed: int = 0) -> DataLoader:
        return shuffled_loader(self.augmented, self.augmented.draw, batch_size, accumulate, seed, **self.loading)

    def test_loader(self, batch_size: int = test_batch_size) -> DataLoader:
        return self._loader(self.test, batch_size)

    def validation_loader(self, batch_size: int = test_batch_size) -> DataLoader:
        return self._loader(self.validation, batch_size)

    def calibration_batches(self, count: int) -> DataLoader:
        """Training images, not augmented, for `abcnets.calibrate`."""
        picks = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))[:count].tolist()
        return self._loader(Subset(self.train, picks), 64)

    def _loader(self, images: Dataset, batch_size: int) -> DataLoader:
        return DataLoader(images, batch_size, **{**self.loading, "persistent_workers": False})


class Augmented(Dataset):
    """A folder of images whose random transforms follow from a number that comes with each image's place."""

    def __init__(self, folder: Dataset):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2**62, (count, 1), generator=generator)

    def __getitem__(self, row: list[int]):
        place, seed = row
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.folder[place]


def float_network(name: str, weights: str, classes: int) -> tuple[nn.Module, bool]:
    """The float network, and whether all of it is trained.

    Raises: DataError, one sentence with what to do, if there is no such network or its weights can't be had.
    """
    import_torchvision()
    from torchvision.models import get_model, list_models

    known = list_models(sys.modules["torchvision.models"])
    if name not in known:
        raise DataError(f"torchvision has no network {name!r} that classifies images: choose one of {', '.join(known)}")
    if weights == "none":
        return get_model(name, weights=None, num_classes=classes), False
    if weights == "DEFAULT":
        try:
            model = get_model(name, weights=weights)
        except OSError as error:
            raise DataError(f"the weights of {name} could not be downloaded ({error}): connect to a network, or give a"
                            " file of them by --weights FILE, or do without by --weights none") from error  # fmt: skip
    else:
        if not Path(weights).exists():
            raise DataError(f"{weights} is missing: --weights takes DEFAULT, none or a file with a state dict")
        outputs = [len(value) for key, value in load(weights).items()
                   if key.endswith("weight") and getattr(value, "ndim", 0) == 2]  # fmt: skip
        model = load_weights(get_model(name, weights=None, num_classes=outputs[-1] if outputs else classes), weights)
    *_, (last, layer) = [("", None), *model.named_modules()]
    if not isinstance(layer, nn.Linear):
        raise DataError(f"{name} does not end in a linear layer, which could be replaced by one of {classes} classes")
    if layer.out_features == classes:
        return model, True
    model.set_submodule(last, nn.Linear(layer.in_features, classes))
    return model, False


def top_1_and_5(model: nn.Module, data: ImageFolders) -> tuple[float, float]:
    """Percentages of the test images, in val/, whose class is the network's first guess, or among its first five."""
    guesses = predict(model, data).topk(min(5, len(data.classes))).indices
    hits = (guesses == data.test_labels[:, None]).float()
    return 100 * hits[:, 0].mean().item(), 100 * hits.sum(1).mean().item()


def report(stage: str, percent: tuple[float, float], published: tuple[float, float] | None) -> None:
    if is_main_process():
        expected = "   (arXiv:1711.11294: {:.1f} %, {:.1f} %)".format(*published) if published else ""
        print(f"{stage:12} top-1 {percent[0]:.2f} %, top-5 {percent[1]:.2f} %{expected}", flush=True)


def run(options) -> dict:
    """The whole experiment; returns its row."""
    M, N, device = options.weight_bases, options.activation_bases, options.device
    if is_main_process():
        writable(options.out)
        writable(options.results)
    data = ImageFolders(options.path, options.size, options.workers, device)
    check_batch(options.batch_size, options.accumulate, len(data.train_labels))
    torch.manual_seed(options.seed)
    with PartialState().local_main_process_first():  # one process downloads
        network, trained = float_network(options.network, options.weights, len(data.classes))
    network = network.to(device, memory_format=torch.channels_last).eval()
    is_imagenet = len(data.classes) == 1000
    name = f"{data.name}/{options.network}-M{M}-N{N}" + (f"-s{options.seed}" if options.seed else "")
    found = {"float": top_1_and_5(network, data)}
    report("float", found["float"], PUBLISHED.get((options.network, None, None)) if is_imagenet else None)
    model = abcnets.convert(network, M, N)
    if options.calibrate:
        abcnets.calibrate(model, data.calibration_batches(options.calibrate), progress=is_main_process())
        found["calibrated"] = top_1_and_5(model, data)
        report("calibrated", found["calibrated"], None)
    path = options.out / "imagenet" / f"{name}.pt"
    settings = {name: getattr(options, name) for name in ("epochs", "lr", "batch_size", "accumulate", "seed")}
    key = {"run": name, "images": len(data.train_labels), "size": options.size, "calibrate": options.calibrate,
           "start": fingerprint(network), "trained": trained, **settings}  # fmt: skip
    history = finetune(model, data, network if trained else None, checkpoint=path.with_suffix(".checkpoint"), key=key,
                       replace=options.replace, description=name, **settings)  # fmt: skip
    found["fine-tuned"] = top_1_and_5(model, data)
    report("fine-tuned", found["fine-tuned"], PUBLISHED.get((options.network, M, N)) if is_imagenet else None)
    sizes = abcnets.summary(model, next(iter(data.test_loader(1)))[0].to(device)).total()
    row = {
        "run": name, "images": len(data.train_labels), "classes": len(data.classes), "size": options.size,
        "network": options.network, "weights": Path(options.weights).name, "M": M, "N": N,
        "epochs": len(history), "batch_size": options.batch_size, "lr": options.lr, "seed": options.seed,
        **{f"{stage} top-{k}": round(percent, 3)
           for stage, both in found.items() for k, percent in zip((1, 5), both)},
        "packed_bytes": sizes["packed_bytes"], "float_bytes": sizes["float_bytes"],
        "seconds": sum(entry["seconds"] for entry in history), "processes": PartialState().num_processes,
        **machine(device, torch.get_num_threads()),
    }  # fmt: skip
    if is_main_process():
        save(model.state_dict(), path)
        keep_rows(options.results / "imagenet.csv", [row], by=["run"])
        print(f"{name}: kept in {path}")
    return row


def main(arguments: list[str] | None = None) -> dict:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH", help="holds train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    parser.add_argument("--network", default="resnet18", help="of torchvision (default: resnet18)")
    parser.add_argument("--weights", default="DEFAULT", help="DEFAULT (torchvision's), none, or a state dict's file")
    parser.add_argument("--weight-bases", type=COUNT, default=5, metavar="M", help="default: 5")
    parser.add_argument("--activation-bases", type=COUNT, default=5, metavar="N", help="default: 5")
    parser.add_argument("--calibrate", type=COUNT_OR_0, default=256, metavar="IMAGES", help="0: do not (default: 256)")
    parser.add_argument("--epochs", type=COUNT_OR_0, default=10, help="default: 10")
    parser.add_argument("--batch-size", type=COUNT, default=256, help="of all processes together (default: 256)")
    parser.add_argument("--accumulate", type=COUNT, default=1, metavar="PARTS", help="take a batch in so many parts")
    parser.add_argument("--lr", type=POSITIVE, default=1e-3, help="peak learning rate (default: 0.001)")
    parser.add_argument("--size", type=COUNT, default=224, metavar="PIXELS", help="of an image's side (default: 224)")
    parser.add_argument("--workers", type=COUNT_OR_0, default=8, help="processes that decode, per device (default: 8)")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", type=present_device, default=best_device(), help="default: cuda, mps or cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="network and checkpoint (default: out)")
    parser.add_argument("--results", type=Path, default=ROOT / "out/results", help="table (default: out/results)")
    parser.add_argument("--replace", action="store_true", help="a checkpoint of another recipe of the same name too")
    options = parser.parse_args(arguments)
    options.device = own_device(options.device)
    return parser.run(run, options)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
