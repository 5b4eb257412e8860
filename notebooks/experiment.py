"""What both notebooks and the command line share: data sets, networks, the training loop, results.

    python notebooks/experiment.py pretrain --dataset fashion-mnist
    python notebooks/experiment.py finetune --dataset fashion-mnist --weight-bases 3 --activation-bases 3
    python notebooks/experiment.py evaluate --dataset fashion-mnist --weight-bases 3 --activation-bases 3
    python notebooks/experiment.py step

Every run is named after what it is (`fashion-mnist/3-3`), keeps its network and its checkpoint in `out/`, goes on
exactly where it was if it is started again after a kill, and leaves a row in `results/runs.csv` and its training curve
in `results/curves/`.
"""

import argparse
import csv
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "notebooks" / "results"

# ---------------------------------------------------------------------------------------------------------------------
# Data sets: every image in memory as one uint8 tensor, augmented and normalized a batch at a time
# ---------------------------------------------------------------------------------------------------------------------


class DataError(RuntimeError):
    """A data set that cannot be had; the message says what to do."""


@dataclass
class Data:
    """Images (n, C, H, W) in uint8 and labels (n,) in int64, for training and for testing."""

    name: str
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    flip: bool = True
    shift: int = 2

    def __post_init__(self):
        pixels = self.train_images[:10_000].float() / 255
        self.mean, self.std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))

    def to(self, device) -> "Data":
        for name in ("train_images", "train_labels", "test_images", "test_labels", "mean", "std"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def normalize(self, images_BHWC: Tensor) -> Tensor:
        """Pixels of mean 0 and deviation 1 as (B, C, H, W) in the channels_last layout, the fastest to convolve."""
        return ((images_BHWC.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Each image moved by up to `shift` pixels in both directions and, where it makes sense, mirrored."""
        (B, _, H, W), s, device = images.shape, self.shift, images.device
        down, right = torch.randint(2 * s + 1, (2, B, 1), generator=generator).to(device)
        mirrored = (torch.rand(B, 1, generator=generator) < 0.5 * self.flip).to(device)
        columns = torch.arange(W, device=device)
        rows_BH = torch.arange(H, device=device) + down
        columns_BW = torch.where(mirrored, W - 1 - columns, columns) + right
        which = torch.arange(B, device=device)[:, None, None]
        return self.normalize(F.pad(images, (s, s, s, s))[which, :, rows_BH[:, :, None], columns_BW[:, None, :]])

    def train_batches(self, batch_size: int, generator: torch.Generator, augment: bool = True):
        """One pass over the training images in random order; an incomplete last batch is left out."""
        order = torch.randperm(len(self.train_images), generator=generator).to(self.train_images.device)
        for picks in order.split(min(batch_size, len(order))):
            if len(picks) == min(batch_size, len(order)):
                images = self.train_images[picks]
                plain = self.normalize(images.permute(0, 2, 3, 1)) if not augment else None
                yield self.augment(images, generator) if augment else plain, self.train_labels[picks]

    def test_batches(self, batch_size: int = 500):
        for images, labels in zip(self.test_images.split(batch_size), self.test_labels.split(batch_size)):
            yield self.normalize(images.permute(0, 2, 3, 1)), labels

    def calibration_batches(self, count: int = 1024, batch_size: int = 128, seed: int = 0):
        """Training images as they are, for `abcnets.calibrate`."""
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randperm(len(self.train_images), generator=generator)[:count].to(self.train_images.device)
        return [self.normalize(self.train_images[part].permute(0, 2, 3, 1)) for part in picks.split(batch_size)]


def load_data(name: str, root: str | Path = ROOT / "data") -> Data:
    """The data set of that name: digits, fashion-mnist, cifar10, cifar10-jpeg or folder:PATH.

    Raises: DataError, one sentence with what to do, if it cannot be had.
    """
    if name == "digits":
        return _digits()
    if name in ("fashion-mnist", "cifar10"):
        return _torchvision(name, Path(root))
    if name == "cifar10-jpeg":
        return _folder(name, Path(root) / "cifar10-jpeg")
    if name.startswith("folder:"):
        return _folder(name, Path(name.removeprefix("folder:")).expanduser())
    raise DataError(f"unknown data set {name!r}: choose digits, fashion-mnist, cifar10, cifar10-jpeg or folder:PATH")


def _digits() -> Data:
    """1 797 scans of handwritten digits that come with scikit-learn, 8x8 enlarged to 28x28; 500 of them for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    labels = torch.tensor(scans.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=500, random_state=0, stratify=labels)
    classes = [str(digit) for digit in range(10)]
    return Data("digits", classes, images[train], labels[train], images[test], labels[test], flip=False)


def _torchvision(name: str, root: Path) -> Data:
    _import_torchvision()
    from torchvision import datasets

    kind = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        train, test = (kind(str(root), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} is not in {root} and could not be downloaded ({error}): connect to a network, or put the files"
            f" there as torchvision.datasets.{kind.__name__} keeps them, or use --dataset digits, which needs neither"
        ) from error

    def images(split):
        pixels = torch.as_tensor(split.data)
        return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()

    labels = (torch.as_tensor(split.targets, dtype=torch.int64) for split in (train, test))
    train_labels, test_labels = labels
    shift = 2 if name == "fashion-mnist" else 4
    return Data(name, train.classes, images(train), train_labels, images(test), test_labels, shift=shift)


def _folder(name: str, path: Path, size: int = 32) -> Data:
    """PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg, brought to 32x32 and decoded once into PATH.pt."""
    if not (path / "train").is_dir() or not (path / "test").is_dir():
        raise DataError(f"{name} needs the folders {path}/train and {path}/test with one folder of images per class")
    _import_torchvision()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import functional as transforms

    def decode(folder):
        images = []
        for file, _ in tqdm(folder.samples, desc=f"decoding {folder.root}", leave=False):
            image = transforms.center_crop(transforms.resize(folder.loader(file), size), size)
            images.append(transforms.pil_to_tensor(image))
        return torch.stack(images)

    train, test = ImageFolder(str(path / "train")), ImageFolder(str(path / "test"))
    if train.classes != test.classes:
        raise DataError(f"{name}: train/ and test/ must hold the same classes, got {train.classes} and {test.classes}")
    files = [(str(Path(file).relative_to(path)), os.path.getsize(file)) for file, _ in train.samples + test.samples]
    cache = path.with_name(path.name + ".pt")
    decoded = torch.load(cache) if cache.exists() else {}
    if decoded.get("files") != files:
        decoded = {"files": files, "train": decode(train), "test": decode(test)}
        try:
            save(decoded, cache)
        except OSError:
            pass  # A folder that cannot be written to is decoded anew each time.
    labels = (torch.tensor(folder.targets) for folder in (train, test))
    train_labels, test_labels = labels
    return Data(name, train.classes, decoded["train"], train_labels, decoded["test"], test_labels, shift=4)


def _import_torchvision() -> None:
    """Import torchvision, beside a CPU-only torch as well.

    PyPI's torchvision is built for CUDA. Its C++ operators cannot load into a CPU-only torch, and its Python side fails
    on the first of them that it misses. Nothing here uses these operators: declaring them is enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.operators_declared_by_us = library  # The declaration lives as long as its library object.


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def nine_layer(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """The network of ABCNets.jl for 28x28 images: nine convolutions, each but the first after BatchNorm and ReLU."""

    def conv(inputs, outputs):
        return [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1)]

    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        *conv(16, 32), *conv(32, 32), nn.MaxPool2d(2),
        *conv(32, 32), *conv(32, 64), *conv(64, 64), nn.MaxPool2d(2),
        *conv(64, 64), *conv(64, 64), *conv(64, 64), nn.MaxPool2d(2),
        nn.Flatten(), nn.ReLU(), nn.Linear(576, classes),
    )  # fmt: skip


class Block(nn.Module):
    """Two convolutions around a shortcut, BatchNorm and ReLU first (He et al. 2016, arXiv:1603.05027).

    Where the image shrinks, the shortcut averages pixels and appends channels of zeros: nothing there to binarize.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.stride, self.more_channels = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        return y + F.pad(x, (0, 0, 0, 0, 0, self.more_channels))


def resnet20(channels: int = 3, classes: int = 10) -> nn.Sequential:
    """ResNet-20 for 32x32 images: three stages of three blocks with 16, 32 and 64 channels (arXiv:1512.03385)."""
    widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        *[Block(*width) for width in widths],
        nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


def build_network(data: Data, seed: int = 0) -> nn.Module:
    """The nine-layer network for 28x28 images, ResNet-20 for any other size; freshly initialized."""
    torch.manual_seed(seed)
    network = nine_layer if data.train_images.shape[-1] == 28 else resnet20
    return network(data.train_images.shape[1], len(data.classes))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def mixed_precision(device: torch.device):
    """A bfloat16 autocast where the machine computes in bfloat16 faster than in float32, else one that does nothing."""
    if device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported()
    else:
        enabled = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def predict(model: nn.Module, data: Data) -> Tensor:
    """Logits (n, classes) of the test images, in float32."""
    model.eval()
    return torch.cat([model(images).float() for images, _ in data.test_batches()])


def accuracy(model: nn.Module, data: Data) -> float:
    """Percentage of the test images that the network names rightly."""
    return 100 * (predict(model, data).argmax(1) == data.test_labels).float().mean().item()


def save(what, path: str | Path) -> None:
    """torch.save that leaves either the old file or the new one, whenever it is interrupted."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        torch.save(what, file)
    os.replace(file.name, path)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, lr_activation: float) -> list[dict]:
    """Weights with decay; biases and BatchNorm without; vs and betas (and us) at their own learning rate."""
    groups = [
        {"params": [], "lr": lr, "weight_decay": weight_decay},
        {"params": [], "lr": lr, "weight_decay": 0.0},
        {"params": [], "lr": lr_activation, "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            quantizer = name.rsplit(".")[-1] in ("us", "vs", "betas")
            groups[2 if quantizer else int(parameter.ndim < 2)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    batch_size: int = 128,
    warmup: float = 0.1,
    seed: int = 0,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    checkpoint: str | Path | None = None,
    description: str = "training",
) -> list[dict]:
    """Train in place with a cosine schedule; returns one dict an epoch: loss, training and test accuracy, seconds.

    With a teacher the loss is (1 - distill) x cross entropy + distill x cross entropy to the teacher's probabilities.
    With a checkpoint, a run that was killed goes on after its last complete epoch and ends with the very same weights:
    all that is random in an epoch follows from the seed and the epoch's number. Ctrl-C ends early, keeping the model.
    """
    device = data.train_images.device
    steps = max(1, len(data.train_images) // batch_size)
    full_rates = [group["lr"] for group in optimizer.param_groups]
    history, checkpoint = [], checkpoint and Path(checkpoint)
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    bar = tqdm(total=epochs * steps, initial=len(history) * steps, desc=description, unit="batch", mininterval=1)
    try:
        for epoch in range(len(history), epochs):
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(1_000_000 * (seed + 1) + epoch)
            torch.manual_seed(1_000_000 * (seed + 1) + epoch)
            model.train()
            loss_sum = torch.zeros((), device=device)
            hits = torch.zeros((), device=device)
            for step, (images, labels) in enumerate(data.train_batches(batch_size, generator)):
                scale = schedule((epoch + step / steps) / epochs, warmup)
                for group, rate in zip(optimizer.param_groups, full_rates):
                    group["lr"] = rate * scale
                with mixed_precision(device):
                    logits = model(images).float()
                    target = None
                    if teacher is not None:
                        with torch.no_grad():
                            target = teacher(images).float().softmax(1)
                loss = F.cross_entropy(logits, labels)
                if target is not None:
                    loss = (1 - distill) * loss + distill * F.cross_entropy(logits, target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()
                hits += (logits.detach().argmax(1) == labels).sum()
                bar.update()
            seconds = time.perf_counter() - started
            with mixed_precision(device):
                test_accuracy = accuracy(model, data)
            history.append(
                {
                    "epoch": epoch + 1,
                    "loss": round(loss_sum.item() / steps, 5),
                    "train_accuracy": round(100 * hits.item() / (steps * min(batch_size, len(data.train_images))), 3),
                    "test_accuracy": round(test_accuracy, 3),
                    "seconds": round(seconds, 2),
                }
            )
            bar.set_postfix(loss=history[-1]["loss"], test=f"{test_accuracy:.2f} %")
            if checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
                save(state, checkpoint)
    except KeyboardInterrupt:
        bar.write(f"stopped early, after {len(history)} of {epochs} epochs: what was learned is kept")
    bar.close()
    model.eval()
    return history


def schedule(progress: float, warmup: float) -> float:
    """A factor for the learning rate: up in a line to 1, then down along half a cosine to 0."""
    import math

    if progress < warmup:
        return max(progress / warmup, 0.01)
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def pretrain(data: Data, *, epochs: int = 20, lr: float = 0.1, weight_decay: float = 5e-4, seed: int = 0, **options):
    """A float network trained from scratch, and its curve."""
    model = build_network(data, seed).to(data.train_images.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(parameter_groups(model, lr, weight_decay, lr), momentum=0.9, nesterov=True)
    return model, train(model, data, epochs=epochs, optimizer=optimizer, seed=seed, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with tempfile.NamedTemporaryFile("w", newline="", dir=path.parent, delete=False) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def record(row: dict, path: Path = RESULTS / "runs.csv") -> None:
    """Add a run to the table, in place of an earlier run of the same name."""
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = [old for old in csv.DictReader(file) if old["run"] != row["run"]]
    write_csv(path, [*rows, row])


def machine() -> dict:
    """Where a number was measured: hardware and versions."""
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "hardware": f"{name}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def run_pretrain(options) -> None:
    data = load_data(options.dataset, options.data).to(options.device)
    started = time.perf_counter()
    folder = options.out / options.dataset.replace("/", "_").replace(":", "_")
    run = f"{folder.name}/float" + (f"-s{options.seed}" if options.seed else "")
    path = options.out / f"{run}.pt"
    recipe = {"epochs": options.epochs, "lr": options.lr}
    model, history = pretrain(
        data,
        seed=options.seed,
        checkpoint=path.with_suffix(".checkpoint"),
        description=run,
        **{key: value for key, value in recipe.items() if value is not None},
    )
    save(model.state_dict(), path)
    row = {
        "run": run,
        "dataset": data.name,
        "M": "",
        "N": "",
        "options": "",
        "seed": options.seed,
        "epochs": len(history),
        "accuracy": round(accuracy(model, data), 3),
        "bytes": sum(p.numel() * 4 for p in model.parameters()),
        "seconds": round(sum(entry["seconds"] for entry in history), 1),
        **machine(),
    }
    write_csv(options.results / "curves" / f"{run.replace('/', '-')}.csv", history)
    record(row, options.results / "runs.csv")
    print(f"{run}: {row['accuracy']:.2f} % in {time.perf_counter() - started:.0f} s, kept in {path}")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("pretrain", help="train a float network")
    command.add_argument("--dataset", default="digits")
    command.add_argument("--data", type=Path, default=ROOT / "data")
    command.add_argument("--out", type=Path, default=ROOT / "out")
    command.add_argument("--results", type=Path, default=RESULTS)
    command.add_argument("--epochs", type=int)
    command.add_argument("--lr", type=float)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--threads", type=int)
    command.add_argument("--device", type=torch.device, default=best_device())
    command.set_defaults(run=run_pretrain)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.run(options)
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
