"""What both notebooks and the command line share: data sets, networks, the training loop, results.

    python notebooks/experiment.py pretrain --dataset fashion-mnist
    python notebooks/experiment.py finetune --dataset fashion-mnist --weight-bases 3 --activation-bases 3
    python notebooks/experiment.py evaluate --dataset fashion-mnist --weight-bases 3 --activation-bases 3
    python notebooks/experiment.py table --dataset fashion-mnist
    python notebooks/experiment.py sensitivity --dataset fashion-mnist
    python notebooks/experiment.py step
    python notebooks/experiment.py compile

Every run is named after what it is (`fashion-mnist/M3-N3`), keeps its network and its checkpoint in `out/`, goes on
exactly where it was if it is started again after a kill, and leaves a row in `results/runs.csv` and its training curve
in `results/curves/`.

The same commands run on many devices, by Hugging Face Accelerate, wherever one of these starts them:

    accelerate launch --multi_gpu notebooks/experiment.py pretrain ...                      all GPUs of this machine
    torchrun --nproc-per-node 2 notebooks/experiment.py pretrain --device cpu ...           two processes on the CPU
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-endpoint HOST:29500 notebooks/...         four machines, on each

`--batch-size` is what one optimizer step sees, on all of them together. See `train`.
"""

import argparse
import contextlib
import copy
import csv
import functools
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tqdm.auto
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather, patch_environment
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

if os.environ.get("TQDM_DISABLE"):  # which tqdm's bars for notebooks do not look at
    tqdm.auto.tqdm = tqdm.std.tqdm
tqdm = tqdm.auto.tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import abcnets  # noqa: E402

RESULTS = ROOT / "notebooks" / "results"

# ---------------------------------------------------------------------------------------------------------------------
# Data sets: every image in memory as one uint8 tensor, augmented and normalized a batch at a time
# ---------------------------------------------------------------------------------------------------------------------


class DataError(RuntimeError):
    """Something to read that is not there; the message says what to do."""


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
    test_batch_size = 500

    def __post_init__(self):
        pixels = self.train_images[:10_000].float() / 255
        self.mean, self.std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))

    def to(self, device) -> "Data":
        for name in ("train_images", "train_labels", "test_images", "test_labels", "mean", "std"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    def normalize(self, images_BHWC: Tensor) -> Tensor:
        """Pixels of mean 0 and deviation 1 as (B, C, H, W) in the channels_last layout, the fastest to convolve."""
        return ((images_BHWC.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """What is random in the augmentation of so many images: (count, 3), pixels down and right, mirrored or not."""
        down, right = torch.randint(2 * self.shift + 1, (2, count, 1), generator=generator)
        return torch.cat([down, right, torch.rand(count, 1, generator=generator) < 0.5 * self.flip], dim=1)

    def augment(self, images: Tensor, draws: Tensor) -> Tensor:
        """Each image moved by up to `shift` pixels in both directions and, where it makes sense, mirrored."""
        (B, _, H, W), s, device = images.shape, self.shift, images.device
        down, right, mirrored = draws.to(device).split(1, dim=1)
        columns = torch.arange(W, device=device)
        rows_BH = torch.arange(H, device=device) + down
        columns_BW = torch.where(mirrored.bool(), W - 1 - columns, columns) + right
        which = torch.arange(B, device=device)[:, None, None]
        return self.normalize(F.pad(images, (s, s, s, s))[which, :, rows_BH[:, :, None], columns_BW[:, None, :]])

    def train_loader(self, batch_size: int, accumulate: int = 1, seed: int = 0) -> DataLoader:
        """The training images, augmented, in random order."""

        def pick(rows):
            places = rows[:, 0].to(self.device)
            return self.augment(self.train_images[places], rows[:, 1:]), self.train_labels[places]

        dataset = WholeBatches(len(self.train_images), pick)
        return shuffled_loader(dataset, self.draw, batch_size, accumulate, seed, collate_fn=_as_it_is)

    def test_loader(self, batch_size: int = test_batch_size) -> DataLoader:
        """The test images as they are, in their order."""

        def pick(places):
            places = places.to(self.device)
            return self.normalize(self.test_images[places].permute(0, 2, 3, 1)), self.test_labels[places]

        return DataLoader(WholeBatches(len(self.test_images), pick), batch_size, collate_fn=_as_it_is)

    def test_batches(self, batch_size: int = test_batch_size):
        return iter(self.test_loader(batch_size))

    def calibration_batches(self, count: int = 2048, batch_size: int = 128, seed: int = 0):
        """Training images as they are, for `abcnets.calibrate`."""
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randperm(len(self.train_images), generator=generator)[:count].to(self.train_images.device)
        return [self.normalize(self.train_images[part].permute(0, 2, 3, 1)) for part in picks.split(batch_size)]


class WholeBatches(Dataset):
    """A data set in memory, for a DataLoader: `pick` makes a whole batch at once of a tensor of places."""

    def __init__(self, count: int, pick):
        self.count, self.pick = count, pick

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, places: list):
        return self.pick(torch.tensor(places))


def _as_it_is(batch):
    return batch


class Shuffled(Sampler):
    """The places of a training set in random order, each as a list with the random numbers of its augmentation.

    All of it follows from the seed and the epoch (Accelerate calls `set_epoch`) and is drawn for a whole batch before
    that is divided: the same happens to an image whichever process, worker or part of a batch it falls to. An
    incomplete last batch is left out.
    """

    def __init__(self, count: int, draw, batch_size: int, seed: int):
        self.count, self.draw, self.batch_size, self.seed, self.epoch = count, draw, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.batch_size * self.batch_size

    def __iter__(self):
        generator = torch.Generator().manual_seed(1_000_000 * self.seed + self.epoch)
        for places in torch.randperm(self.count, generator=generator)[: len(self)].split(self.batch_size):
            yield from torch.cat([places[:, None], self.draw(len(places), generator)], dim=1).tolist()


def shuffled_loader(dataset: Dataset, draw, batch_size: int, accumulate: int, seed: int, **options) -> DataLoader:
    """A training set in random order, each batch in `accumulate` parts; draw: what `Shuffled` adds to a place."""
    shuffled = Shuffled(len(dataset), draw, batch_size, seed)
    parts = BatchSampler(shuffled, batch_size // accumulate, drop_last=True)
    return DataLoader(dataset, batch_sampler=parts, **options)


def load_data(name: str, root: str | Path = ROOT / "data", limit: int | None = None) -> Data:
    """The data set of that name: digits, fashion-mnist, cifar10, cifar10-jpeg or folder:PATH.

    With a limit, only that many training images: for trying things out.
    Raises: DataError, one sentence with what to do, if it cannot be had.
    """
    data = _load_data(name, Path(root))
    if limit:
        picks = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))[:limit]
        data.train_images, data.train_labels = data.train_images[picks], data.train_labels[picks]
    return data


def _load_data(name: str, root: Path) -> Data:
    if name == "digits":
        return _digits()
    if name in ("fashion-mnist", "cifar10"):
        return _torchvision(name, root)
    if name == "cifar10-jpeg":
        return _folder(name, root / "cifar10-jpeg")
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


def own_device(device: torch.device) -> torch.device:
    """The device of this process: its own GPU where a launcher started many processes, else the given device."""
    state = PartialState(cpu=device.type == "cpu")
    return state.device if state.num_processes > 1 else device


def is_main_process() -> bool:
    """Whether this process is the one, of perhaps many, that prints and writes files."""
    return PartialState().is_main_process


def accelerator_on(device: torch.device, accumulate: int = 1, **parallel) -> Accelerator:
    """Accelerate set up for `train`: batches divided among the processes, gradients of `accumulate` parts added up.

    parallel: options of torch.nn.parallel.DistributedDataParallel.
    """
    options = {
        "cpu": device.type == "cpu",
        "mixed_precision": "no",  # `train` decides that itself, step by step
        "gradient_accumulation_steps": accumulate,
        "dataloader_config": DataLoaderConfiguration(split_batches=True),
        "kwargs_handlers": [DistributedDataParallelKwargs(**parallel)],
    }
    if PartialState(cpu=options["cpu"]).num_processes > 1:
        return Accelerator(**options)
    # Accelerate settles on one device for the life of a process; a notebook may use the GPU now and the CPU later.
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(accelerate_torch_device=device):
        return Accelerator(**options)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the machine computes in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def mixed_precision(device: torch.device, enabled: bool = True):
    """A bfloat16 autocast where that is fast, else one that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and fast_bfloat16(device))


@torch.no_grad()
def predict(model: nn.Module, data: Data) -> Tensor:
    """Logits (n, classes) of the test images; with many processes each computes its share, and all get the whole."""
    model.eval()
    processes = PartialState().num_processes
    batch_size = math.ceil(data.test_batch_size / processes) * processes
    loader = prepare_data_loader(data.test_loader(batch_size), data.device, split_batches=True, put_on_device=True)
    logits = torch.cat([gather(model(images).float()) for images, _ in loader])
    return logits[: len(data.test_labels)]  # the last batch was filled up to divide evenly


def accuracy(model: nn.Module, data: Data) -> float:
    """Percentage of the test images that the network names rightly."""
    return 100 * (predict(model, data).argmax(1) == data.test_labels).float().mean().item()


def pretrain(data: Data, *, epochs: int | None = None, lr: float = 0.1, seed: int = 0, **options):
    """A float network trained from scratch: (model, history). Options: those of `train`."""
    model = build_network(data, seed).to(data.train_images.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(_parameter_groups(model, lr, lr, 5e-4), momentum=0.9, nesterov=True)
    epochs = default_epochs(data) if epochs is None else epochs
    return model, train(model, data, optimizer, epochs=epochs, seed=seed, **options)


def finetune(
    model: nn.Module,
    data: Data,
    teacher: nn.Module | None = None,
    *,
    epochs: int | None = None,
    lr: float | None = None,
    lr_activation: float = 1e-3,
    weight_decay: float = 0.0,
    **options,
) -> list[dict]:
    """Train a converted, and best a calibrated, network in place; returns its history. Options: those of `train`.

    The default lr is 1e-3, and 3e-3 where inputs have one base: such a network is calibrated far below its goal.
    """
    single = any(getattr(layer, "activation_bases", None) == 1 for layer in model.modules())
    lr = lr or (3e-3 if single else 1e-3)
    optimizer = torch.optim.AdamW(_parameter_groups(model, lr, lr_activation, weight_decay))
    epochs = default_epochs(data) if epochs is None else epochs
    return train(model, data, optimizer, teacher, epochs=epochs, **options)


def default_epochs(data: Data) -> int:
    return {"digits": 12, "fashion-mnist": 20}.get(data.name, 60)


def _parameter_groups(model: nn.Module, lr: float, lr_activation: float, weight_decay: float) -> list[dict]:
    """Weights with decay; biases and BatchNorm without; shifts and scales of the bases at their own learning rate."""
    weights, vectors, bases = [], [], []
    for name, parameter in model.named_parameters():
        own = name.split(".")[-1] in ("us", "vs", "betas")
        (bases if own else vectors if parameter.ndim < 2 else weights).append(parameter)
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
        {"params": bases, "lr": lr_activation, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    teacher: nn.Module | None = None,
    *,
    epochs: int,
    batch_size: int = 128,
    accumulate: int = 1,
    warmup: float = 0.1,
    exact: float = 0.1,
    distill: float = 0.5,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    description: str = "training",
) -> list[dict]:
    """Train in place; returns the history: for each epoch loss, training and test accuracy in percent, and seconds.

    The learning rates in `optimizer` are peaks: up in a line for a fraction `warmup` of the time, then down a cosine.
    Steps are computed in bfloat16 where that is fast, but the last fraction `exact` of them in float32, as inference
    is: which side of a threshold a value falls on hangs on the rounding, and a network gets used to its own.
    With a teacher, that fraction `distill` of the loss is the cross entropy to the teacher's probabilities.
    With a checkpoint, a run that was killed goes on after its last complete epoch and ends with the very same weights:
    all that is random in an epoch follows from the seed and the epoch's number. A checkpoint of another recipe is
    overwritten. Ctrl-C ends early, and what was learned is kept.

    Under `accelerate launch` or `torchrun` every process calls this alike, with the model and the data on its
    `own_device`. An optimizer step sees `batch_size` images in all: each process takes its share, in `accumulate` parts
    one after the other, and the main process alone writes. With as many processes as before, a killed run ends with
    the very same weights; with another number it goes on all the same. Ctrl-C ends it like a kill.
    BatchNorm normalizes by what it sees at once: on several GPUs all their images (torch.nn.SyncBatchNorm, which needs
    GPUs); on several CPU processes each one's own share, and the running statistics are averaged over the processes
    after each epoch; with `accumulate` one part. So there the same seed gives another, no worse network.

    Args:
        data: a Data, or anything with its `device`, `train_labels`, `test_labels`, `train_loader` and `test_loader`.

    Raises: ValueError if `batch_size` can't be divided evenly among processes and parts.
    """
    device, images = data.device, len(data.train_labels)
    idle = any(not getattr(layer, "active", True) for layer in model.modules())  # its vs and betas get no gradient
    accelerator = accelerator_on(device, accumulate, find_unused_parameters=idle)
    parts = accelerator.num_processes * accumulate
    batch_size = min(batch_size, images // parts * parts)
    if batch_size % parts or not batch_size:
        raise ValueError(f"batch_size must be a multiple of {parts} ({accelerator.num_processes} processes, each with"
                         f" {accumulate} part(s)), got {batch_size} for {images} training images")  # fmt: skip
    steps = images // batch_size
    peaks = [group["lr"] for group in optimizer.param_groups]
    recipe = {"epochs": epochs, "batch_size": batch_size, "warmup": warmup, "exact": exact, "seed": seed,
              "peaks": peaks, "distill": distill if teacher else None, "images": images}  # fmt: skip
    history = _resume(checkpoint, recipe, model, optimizer) if checkpoint else []
    optimizer.zero_grad()
    loader = accelerator.prepare_data_loader(data.train_loader(batch_size, accumulate, seed))
    prepared = accelerator.prepare_model(_twin(model.to(device), synchronized=accelerator.use_distributed))
    prepared.broadcast_buffers = False  # in every step, from the main process: `_average_statistics` takes them all
    prepared_optimizer = accelerator.prepare_optimizer(optimizer)
    if teacher is not None:
        teacher.to(device)
    bar = tqdm(total=epochs * steps, initial=len(history) * steps, desc=description, unit="batch", leave=False,
               **({} if accelerator.is_main_process else {"disable": True}))  # fmt: skip
    try:
        for epoch in range(len(history), epochs):
            started, loss_sum, hits = time.perf_counter(), 0, 0
            torch.manual_seed(1_000_000 * seed + 1_000 * accelerator.process_index + epoch)  # for dropout and the like
            loader.set_epoch(epoch)
            prepared.train()
            for part, (images, labels) in enumerate(loader):
                progress = (epoch * steps + part // accumulate + 1) / (epochs * steps)
                for group, peak in zip(optimizer.param_groups, peaks):
                    group["lr"] = peak * _schedule(progress, warmup)
                with accelerator.accumulate(prepared):
                    with mixed_precision(device, progress <= 1 - exact):
                        logits = prepared(images).float()
                        loss = F.cross_entropy(logits, labels)
                        if teacher is not None:
                            with torch.no_grad():
                                target = teacher(images).float().softmax(1)
                            loss = torch.lerp(loss, F.cross_entropy(logits, target), distill)
                    accelerator.backward(loss)
                    prepared_optimizer.step()
                    prepared_optimizer.zero_grad()
                loss_sum += loss.detach()
                hits += (logits.detach().argmax(1) == labels).sum()
                bar.update(accelerator.sync_gradients)
            seconds = time.perf_counter() - started
            _average_statistics(model, accelerator)
            tested = accuracy(model, data)
            history.append({
                "epoch": epoch + 1,
                "loss": round(accelerator.reduce(loss_sum, "mean").item() / (steps * accumulate), 5),
                "train_accuracy": round(100 * accelerator.reduce(hits, "sum").item() / (steps * batch_size), 3),
                "test_accuracy": round(tested, 3),
                "seconds": round(seconds, 2),
            })  # fmt: skip
            if accelerator.is_main_process:
                _show(bar, description, history[-1], epochs)
                if checkpoint:
                    save({"recipe": recipe, "history": history, "model": model.state_dict(),
                          "optimizer": optimizer.state_dict()}, checkpoint)  # fmt: skip
    except KeyboardInterrupt:
        if accelerator.use_distributed:  # the processes are no longer at one place
            raise
        print(f"{description}: stopped after {len(history)} of {epochs} epochs; what was learned is kept")
    bar.close()
    model.eval()
    return history


def _twin(model: nn.Module, synchronized: bool) -> nn.Module:
    """A copy of the model that shares its parameters and buffers.

    Accelerate wraps and changes the twin it is given; the model itself stays as its owner knows it.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    on_gpu = all(tensor.is_cuda for tensor in shared.values())
    return nn.SyncBatchNorm.convert_sync_batchnorm(twin) if synchronized and on_gpu else twin


@torch.no_grad()
def _average_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Give BatchNorm the same running statistics in all processes: those of all their images."""
    if accelerator.use_distributed:
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                for statistics in (norm.running_mean, norm.running_var):
                    statistics.copy_(accelerator.reduce(statistics, "mean"))


def _schedule(progress: float, warmup: float) -> float:
    """A factor for the learning rate: up in a line to 1, then down along half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def _resume(checkpoint: str | Path, recipe: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    state = None
    if is_main_process() and Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location="cpu")
    (state,) = broadcast_object_list([state])  # the file need not be on every node
    if state is None or state["recipe"] != recipe:
        return []
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def _show(bar, description: str, entry: dict, epochs: int) -> None:
    """An epoch's outcome beside the bar, or as a line of its own where bars are switched off (TQDM_DISABLE=1)."""
    if bar.disable:
        print(f"{description}: epoch {entry['epoch']}/{epochs}, loss {entry['loss']:.4f}, "
              f"test {entry['test_accuracy']:.2f} %, {entry['seconds']:.1f} s", flush=True)  # fmt: skip
    bar.set_postfix(epoch=entry["epoch"], loss=entry["loss"], test=f"{entry['test_accuracy']:.2f} %")


def load_float(data: Data, out: str | Path, seed: int = 0, path: str | Path | None = None) -> nn.Module:
    """The pretrained float network of a data set, from `out` or from another file, on the data's device."""
    model = build_network(data, seed).to(data.train_images.device, memory_format=torch.channels_last)
    return load_weights(model, path or Path(out) / f"{run_name(data.name, seed=seed)}.pt")


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    if not Path(path).exists():
        raise DataError(f"{path} is missing: `python notebooks/experiment.py pretrain` and then `finetune` write it")
    model.load_state_dict(torch.load(path, map_location="cpu"))
    return model.eval()


def save(what, path: str | Path) -> None:
    """torch.save that leaves either the old file or the new one, whenever it is interrupted."""
    with _replacing(Path(path)) as temporary:
        torch.save(what, temporary)


@contextlib.contextmanager
def _replacing(path: Path):
    """A temporary file's name beside `path`, which takes its place if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def run_name(dataset: str, M: int | None = None, N: int | None = None, options: str = "", seed: int = 0) -> str:
    """digits/float, digits/M3-N3, digits/M2 (activations float), digits/M3-N3-per-layer-s1 (an option, seed 1)."""
    bases = "-".join(f"{letter}{count}" for letter, count in (("M", M), ("N", N)) if count)
    parts = [bases or "float", *options.split(), *([f"s{seed}"] if seed else [])]
    return f"{dataset.replace('/', '_').replace(':', '_')}/{'-'.join(parts)}"


def record(
    results: str | Path,
    data: Data,
    model: nn.Module,
    history: list[dict],
    M: int | None = None,
    N: int | None = None,
    options: str = "",
    seed: int = 0,
    **accuracies: float,
) -> dict:
    """Write a run's row into results/runs.csv, in place of an earlier one of the same name, and its curve beside it.

    Options are the words that the command line would need beyond M and N: "per-layer distill=0".
    Accuracies: float, binarized, calibrated and, the one that every run has, accuracy.
    """
    run = run_name(data.name, M, N, options, seed)
    bases = f" --weight-bases {M or 'none'} --activation-bases {N or 'none'}" if M or N else ""
    flags = "".join(f" --{word.replace('=', ' ')}" for word in [*options.split(), *([f"seed={seed}"] if seed else [])])
    sizes = abcnets.summary(model, next(data.test_batches(1))[0]).total()
    row = {
        "run": run, "dataset": data.name, "M": M, "N": N, "options": options, "seed": seed, "epochs": len(history),
        **{name: accuracies.get(name) for name in ("float", "binarized", "calibrated", "accuracy")},
        "packed_bytes": sizes["packed_bytes"], "float_bytes": sizes["float_bytes"],
        "seconds": sum(entry["seconds"] for entry in history), **machine(),
        "command": f"python notebooks/experiment.py {'finetune' if bases else 'pretrain'} --dataset {data.name}"
                   f"{bases}{flags} --epochs {len(history)}",
    }  # fmt: skip
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    table = Path(results) / "runs.csv"
    others = [old for old in (read_csv(table) if table.exists() else []) if old["run"] != run]
    write_csv(table, sorted([*others, row], key=lambda row: row["run"]))
    if history:
        write_csv(Path(results) / "curves" / f"{run.replace('/', '-')}.csv", history)
    return row


def read_csv(path: str | Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: str | Path, rows: list[dict]) -> None:
    with _replacing(Path(path)) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, abcnets {abcnets.__version__}",
    }


def median_times(functions, rounds: int) -> list[float]:
    """Median milliseconds of each function, called in turns, so that a busy machine is busy for all of them alike."""
    for function in functions:
        function()
        function()
    times = [[] for _ in functions]
    for _ in tqdm(range(rounds), desc="timing", leave=False):
        for function, taken in zip(functions, times):
            started = time.perf_counter()
            function()
            taken.append(1000 * (time.perf_counter() - started))
    return [statistics.median(taken) for taken in times]


# ---------------------------------------------------------------------------------------------------------------------
# Cost of a training step
# ---------------------------------------------------------------------------------------------------------------------


def training_step(M: int | None, N: int | None, batch_size: int, device: torch.device, mixed: bool,
                  compiled: bool = False):  # fmt: skip
    """A function that makes one full step (forward, backward, optimizer) of the nine-layer network."""
    torch.manual_seed(0)
    model = nine_layer()
    if M or N:
        model = abcnets.convert(model, M, N)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch_size, 1, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def step():
        with mixed_precision(device, mixed):
            loss = F.cross_entropy(forward(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def inference(form: str, M: int, N: int, batch_size: int, device: torch.device, compiled: bool):
    """A function that runs the nine-layer network once: "float", "binarized" or "packed" (with one convolution)."""
    torch.manual_seed(0)
    model = nine_layer().eval()
    images = torch.randn(batch_size, 1, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    if form != "float":
        model = abcnets.convert(model, M, N)
    if form == "packed":
        model = abcnets.pack(model, engine="float")
    model = model.to(device, memory_format=torch.channels_last)
    forward = torch.compile(model, fullgraph=True) if compiled else model

    @torch.inference_mode()
    def run():
        forward(images)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def step_memory(kind: tuple, **options) -> float:
    """MiB that three steps need at their peak beyond what a step on one image does; call it in a fresh process."""
    peak = torch.cuda.max_memory_allocated if options["device"].type == "cuda" else _peak_resident
    training_step(*kind, **{**options, "batch_size": 1})()
    before = peak()
    step = training_step(*kind, **options)
    for _ in range(3):
        step()
    return (peak() - before) / 2**20


def _peak_resident() -> int:
    """Bytes of memory that this process held at its peak."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands getrusage's peak down from parent to child: it can't be used there
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def run_pretrain(options) -> None:
    data = _load(options)
    run = run_name(data.name, options=_words(options), seed=options.seed)
    path = options.out / f"{run}.pt"
    recipe = _given(options, "epochs", "lr", "batch_size", "accumulate")
    model, history = pretrain(data, seed=options.seed, checkpoint=path.with_suffix(".checkpoint"), description=run,
                              **recipe)  # fmt: skip
    percent = accuracy(model, data)
    if is_main_process():
        save(model.state_dict(), path)
        record(options.results, data, model, history, options=_words(options), seed=options.seed, accuracy=percent)
        print(f"{run}: {percent:.2f} %, kept in {path}")


def run_finetune(options) -> None:
    data = _load(options)
    M, N = options.weight_bases, options.activation_bases
    run = run_name(data.name, M, N, _words(options), options.seed)
    path = options.out / f"{run}.pt"
    teacher = _load_float(options, data)
    model = _convert(options, teacher)
    percent = {"float": accuracy(teacher, data), "binarized": accuracy(model, data)}
    if options.calibrate != 0:
        abcnets.calibrate(model, data.calibration_batches(options.calibrate or 2048))
        percent["calibrated"] = accuracy(model, data)
    if is_main_process():
        print(f"{run}: " + ", ".join(f"{name} {value:.2f} %" for name, value in percent.items()), flush=True)
    recipe = _given(options, "epochs", "lr", "lr_activation", "weight_decay", "distill", "batch_size", "accumulate")
    history = finetune(model, data, None if options.distill == 0 else teacher, seed=options.seed,
                       checkpoint=path.with_suffix(".checkpoint"), description=run, **recipe)  # fmt: skip
    percent["accuracy"] = accuracy(model, data)
    if is_main_process():
        save(model.state_dict(), path)
        record(options.results, data, model, history, M, N, _words(options), options.seed, **percent)
        print(f"{run}: fine-tuned {percent['accuracy']:.2f} %, kept in {path}")


def run_evaluate(options) -> None:
    data = _load(options)
    model = _load_float(options, data)
    run = run_name(data.name, options.weight_bases, options.activation_bases, _words(options), options.seed)
    if options.weight_bases or options.activation_bases:
        model = _convert(options, model)
        load_weights(model, options.out / f"{run}.pt")
    percent = accuracy(model, data)
    if is_main_process():
        print(f"{run}: {percent:.2f} %")


def run_table(options) -> None:
    """Percentages of the test images, as far as they are known."""
    columns = ("float", "binarized", "calibrated", "accuracy")
    print(f"{'':32}{'float':>9}{'after binarizing':>18}{'after calibrating':>19}{'after fine-tuning':>19}")
    for row in read_csv(options.results / "runs.csv"):
        if row["M"] + row["N"] and options.dataset in (None, row["dataset"]):
            cells = (f"{float(row[key]):.2f} %" if row[key] else "-" for key in columns)
            print("{:32}{:>9}{:>18}{:>19}{:>19}".format(row["run"], *cells))

    if options.readme:
        runs = read_csv(options.results / "runs.csv")
        table = results_table(runs, "fashion-mnist", fastest(read_csv(options.results / "competitors.csv")))
        _write_readme("results", table + "\n\n" + speed_sentence(read_csv(options.results / "speed.csv")))
        _write_readme("cifar10-jpeg", results_table(runs, "cifar10-jpeg"))
        if (options.results / "mixed.csv").exists():
            _write_readme("mixed", mixed_sentence(read_csv(options.results / "mixed.csv")))


def _write_readme(part: str, text: str) -> None:
    """Put a text between the README's markers of that name."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(f"<!-- {part} -->")
    path.write_text(f"{before}<!-- {part} -->\n{text}\n<!-- /{part} -->{rest.split(f'<!-- /{part} -->')[1]}")


def results_table(rows: list[dict], dataset: str, times: dict | None = None) -> str:
    """The recorded runs of a data set with default options, as Markdown: accuracies in percent, bytes, epochs.

    times: {(M, N): milliseconds} for one more column.
    """
    head = ["M", "N", "after binarizing", "calibrated, not trained", "fine-tuned (epochs)", "packed"]
    head += ["an image"] if times else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = [row for row in rows if row["dataset"] == dataset and not row["options"] and row["seed"] == "0"]
    for row in sorted(rows, key=lambda row: (row["M"] == row["N"] == "", row["M"] != row["N"], row["N"], row["M"])):
        cells = [row[name] or "float" for name in ("M", "N")]
        cells += [f"{float(row[name]):.2f} %" if row[name] else "" for name in ("binarized", "calibrated")]
        trained = f"**{float(row['accuracy']):.2f} %** ({row['epochs']})" if row["epochs"] != "0" else "not trained"
        cells += [trained, f"{int(row['packed_bytes']) / 1000:.0f} kB"]
        if times:
            cells.append(f"{times[key]:.2f} ms" if (key := (row["M"], row["N"])) in times else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(rows: list[dict]) -> dict[tuple[str, str], float]:
    """{(M, N): milliseconds an image} from notebooks/compare.py: 32 at once on one thread, the faster memory layout.

    Without bases: torch in float32, in its best form.
    """
    times = {}
    for row in rows:
        if row["form"] in ("abcnets", "torch float32") and row["batch"] == "32" and row["threads"] == "1":
            key = row["M"], row["N"]
            times[key] = min(float(row["ms_per_image"]), times.get(key, math.inf))
    return times


def speed_sentence(rows: list[dict]) -> str:
    """What notebooks/speed.py measured of ResNet-18, in a sentence: the fastest fused form of each case."""
    best = {}
    for row in rows:
        if row["network"] == "ResNet-18" and "bits between layers" in row["form"]:
            case = (float(row["bases"]), row["batch"], row["threads"])
            best[case] = max(best.get(case, 0), float(row["times_float32"]))
    spans = []
    for bases in sorted({case[0] for case in best}):
        speeds = [speed for case, speed in best.items() if case[0] == bases]
        spans.append(f"{min(speeds):.1f} to {max(speeds):.1f} times at M = N = {bases:.0f}")
    measured = f"[measured](kernels/README.md#whole-networks) on {rows[0]['cpu']}, {rows[0]['cores']} cores"
    return f"Packed, ResNet-18 runs faster than the best float32 form of it: {', '.join(spans)} ({measured})."


def run_sensitivity(options) -> None:
    """Errors by layer and setting; and settings mixed to the bytes and binary macs of uniform ones, against these.

    Everything is calibrated, nothing trained.
    """
    data = _load(options)
    model = load_float(data, options.out, options.seed, options.start)
    choices = [(M, N) for M in range(1, 6) for N in range(1, 6) if abs(M - N) <= options.apart]
    table = abcnets.sensitivity(model, data.calibration_batches(options.images), choices)
    common = {"dataset": data.name, "seed": options.seed}
    _keep_rows(options.results / "sensitivity.csv", [{**common, **row, **machine()} for row in table])
    images = data.calibration_batches()
    errors = {(row["layer"], row["M"], row["N"]): row["error"] for row in table}
    layers = list(dict.fromkeys(row["layer"] for row in table if row["M"]))

    def measured(kind, settings):
        binary = abcnets.convert(model, settings=settings)
        sizes = abcnets.summary(binary, images[0][:1]).total()
        abcnets.calibrate(binary, images)
        error = sum(errors[(name, *bases.values())] for name, bases in settings.items() if bases)
        outcome = {"accuracy": round(accuracy(binary, data), 3), "summed_error": round(error, 5),
                   "bytes": sizes["packed_bytes"], "binary_macs": sizes["binary_macs"]}  # fmt: skip
        return {f"{kind}_{name}": value for name, value in outcome.items()}

    rows = []
    for bases in (2, 3):
        uniform = measured("uniform", {name: {"weight_bases": bases, "activation_bases": bases} for name in layers})
        settings = abcnets.allocate(table, uniform["uniform_bytes"], uniform["uniform_binary_macs"])
        words = " ".join(f"{name}:{','.join(map(str, settings[name].values()))}" for name in layers)
        rows.append({**common, "uniform": bases, "float": round(accuracy(model, data), 3), **uniform,
                     **measured("mixed", settings), "mixed_settings": words, **machine()})  # fmt: skip
        print("{dataset}: M = N = {uniform} {uniform_accuracy:.2f} %, mixed {mixed_accuracy:.2f} %: {mixed_settings}"
              .format(**rows[-1]), flush=True)  # fmt: skip
    _keep_rows(options.results / "mixed.csv", rows)


def mixed_sentence(rows: list[dict]) -> str:
    """What run_sensitivity measured, in a sentence for the README."""
    spans = []
    for name in dict.fromkeys(row["dataset"] for row in rows):
        cases = [f"{float(row['mixed_accuracy']):.2f} % instead of {float(row['uniform_accuracy']):.2f} % at the bytes "
                 f"of M = N = {row['uniform']}" for row in rows if row["dataset"] == name]  # fmt: skip
        spans.append(f"{' and '.join(cases)} on {name}")
    return (f"Calibrated, not trained, mixed settings gave {'; '.join(spans)}, with no more binary operations "
            "([by layer](notebooks/results/sensitivity.csv), [settings](notebooks/results/mixed.csv)).")  # fmt: skip


def _keep_rows(path: Path, rows: list[dict]) -> None:
    """Write a data set's rows in place of its earlier ones; those of other data sets and seeds stay."""
    key = ("dataset", "seed")
    new = {tuple(str(row[name]) for name in key) for row in rows}
    others = [row for row in (read_csv(path) if path.exists() else []) if tuple(row[name] for name in key) not in new]
    write_csv(path, sorted([*others, *rows], key=lambda row: tuple(str(row[name]) for name in key)))


def run_step(options) -> None:
    kinds = [(None, None), (options.weight_bases, options.activation_bases)]
    common = {"batch_size": options.batch_size or 128, "device": options.device}
    rows = []
    for mixed in (False, True):
        times = median_times([training_step(*kind, mixed=mixed, **common) for kind in kinds], options.rounds)
        memory = []
        for kind in kinds:
            with torch.multiprocessing.get_context("spawn").Pool(1, _use_threads, (options.threads,)) as pool:
                memory.append(pool.apply(step_memory, (kind,), {"mixed": mixed, **common}))
        rows.append({
            "network": "nine-layer", "M": kinds[1][0], "N": kinds[1][1],
            "precision": "mixed" if mixed else "float32", "batch_size": common["batch_size"],
            "float_ms": round(times[0], 1), "binarized_ms": round(times[1], 1), "ratio": round(times[1] / times[0], 3),
            "float_mib": round(memory[0]), "binarized_mib": round(memory[1]),
            "memory_ratio": round(memory[1] / memory[0], 3), **machine(),
        })  # fmt: skip
        print("{precision}: step {float_ms} -> {binarized_ms} ms, {ratio} x; "
              "memory {float_mib} -> {binarized_mib} MiB, {memory_ratio} x".format(**rows[-1]), flush=True)  # fmt: skip
    write_csv(options.results / "step.csv", rows)


def run_compile(options) -> None:
    """torch.compile (Inductor, one graph) against eager, in turns: training steps in both precisions, and inference."""
    M, N = options.weight_bases, options.activation_bases
    common = {"batch_size": options.batch_size, "device": options.device}
    cases = []
    for mixed in (False, True):
        for form, kind in (("float", (None, None)), ("binarized", (M, N))):
            step = functools.partial(training_step, *kind, mixed=mixed, **common)
            cases.append(("training step, " + ("mixed" if mixed else "float32"), form, step))
    for form in ("float", "binarized", "packed"):
        cases.append(("inference, float32", form, functools.partial(inference, form, M, N, **common)))
    rows = []
    for what, form, make in cases:
        eager, compiled = median_times([make(compiled=False), make(compiled=True)], options.rounds)
        bases = {"M": "", "N": ""} if form == "float" else {"M": M, "N": N}
        rows.append({
            "network": "nine-layer", "what": what, "form": form, **bases, "batch_size": options.batch_size,
            "eager_ms": round(eager, 2), "compiled_ms": round(compiled, 2), "speedup": round(eager / compiled, 3),
            **machine(),
        })  # fmt: skip
        print("{what}, {form}: {eager_ms} -> {compiled_ms} ms, {speedup} x as fast".format(**rows[-1]), flush=True)
    write_csv(options.results / "compile.csv", rows)


def _use_threads(count: int | None) -> None:
    if count:
        torch.set_num_threads(count)


def _load(options) -> Data:
    with PartialState().local_main_process_first():  # one process downloads and decodes
        return load_data(options.dataset, options.data, options.limit).to(options.device)


def _load_float(options, data: Data) -> nn.Module:
    seed = options.seed if options.float_seed is None else options.float_seed
    return load_float(data, options.out, seed, options.start)


def _convert(options, model: nn.Module) -> nn.Module:
    us = abcnets.even_shifts if options.even_shifts and options.weight_bases else None
    model = abcnets.convert(model, options.weight_bases, options.activation_bases, us=us,
                            per_channel=not options.per_layer, learn_us=options.learn_shifts)  # fmt: skip
    if options.scale_gradient and options.weight_bases:
        for layer in model.modules():
            if isinstance(layer, (abcnets.ABCConv2d, abcnets.ABCLinear)):
                layer.weight.register_hook(functools.partial(_times_alphas, layer))
    return model


def _times_alphas(layer: nn.Module, G: Tensor) -> Tensor:
    """The other reading of the paper's straight-through estimator: dL/dW = dL/dWq sum_m alpha_m."""
    return G * layer.alphas().sum(0).view(-1, *[1] * (G.ndim - 1))


def _given(options, *names) -> dict:
    """Those of the options that were given; the others keep the defaults of the function that takes them."""
    return {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}


def _words(options) -> str:
    """What was asked for beyond the defaults, as it goes into a run's name: "per-layer distill=0"."""
    switches = ("per_layer", "even_shifts", "learn_shifts", "scale_gradient")
    switches = [name for name in switches if getattr(options, name, False)]
    numbers = _given(options, "calibrate", "distill", "lr", "lr_activation", "weight_decay", "batch_size", "limit",
                     "float_seed")  # fmt: skip
    numbers |= _given(options, "accumulate")
    return " ".join([*switches, *(f"{name}={value:g}" for name, value in numbers.items())]).replace("_", "-")


def _bases(text: str) -> int | None:
    return None if text in ("none", "float") else int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--out", type=Path, default=ROOT / "out", help="networks and checkpoints (default: out)")
    places.add_argument("--results", type=Path, default=RESULTS, help="tables (default: notebooks/results)")
    places.add_argument("--data", type=Path, default=ROOT / "data", help="where data sets are kept (default: data)")
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--device", type=torch.device, default=best_device(), help="default: cuda, else mps, else cpu")
    where.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    dataset = argparse.ArgumentParser(add_help=False)
    dataset.add_argument("--dataset", default="digits", metavar="NAME",
                         help="digits (default), fashion-mnist, cifar10, cifar10-jpeg, folder:PATH")  # fmt: skip
    dataset.add_argument("--limit", type=int, metavar="IMAGES", help="train on so many images only")
    dataset.add_argument("--seed", type=int, default=0)
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--epochs", type=int, help="default: 12 for digits, 20 for fashion-mnist, else 60")
    training.add_argument("--batch-size", type=int, help="default: 128")
    training.add_argument("--accumulate", type=int, metavar="PARTS", help="take a batch in so many parts")
    training.add_argument("--lr", type=float, help="peak learning rate")
    bases = argparse.ArgumentParser(add_help=False)
    bases.add_argument("--weight-bases", type=_bases, default=3, metavar="M", help="3, or none: float")
    bases.add_argument("--activation-bases", type=_bases, default=3, metavar="N", help="3, or none: float")
    variations = argparse.ArgumentParser(add_help=False)
    variations.add_argument("--from", dest="start", type=Path, metavar="PATH", help="default: the pretrained network")
    variations.add_argument("--per-layer", action="store_true", help="alphas per layer, not per output channel")
    variations.add_argument("--even-shifts", action="store_true", help="the paper's shifts of the weight bases")
    variations.add_argument("--learn-shifts", action="store_true", help="train them too")
    variations.add_argument("--scale-gradient", action="store_true", help="dL/dW times the sum of the alphas")
    variations.add_argument("--float-seed", type=int, metavar="SEED", help="of the float network (default: --seed)")
    variations.add_argument("--calibrate", type=int, metavar="IMAGES", help="0: do not (default: 2048)")
    variations.add_argument("--distill", type=float, help="the teacher's part of the loss; 0: none (default: 0.5)")

    commands = parser.add_subparsers(title="commands", required=True)

    def command(name, run, text, *parents):
        added = commands.add_parser(name, help=text, description=text, parents=[*parents, places])
        added.set_defaults(run=run)
        return added

    command("pretrain", run_pretrain, "train a float network", dataset, training, where)
    tune = command("finetune", run_finetune, "binarize a float network, calibrate it, train it on", dataset, bases,
                   variations, training, where)  # fmt: skip
    tune.add_argument("--lr-activation", type=float, help="peak learning rate of vs and betas")
    tune.add_argument("--weight-decay", type=float)
    command("evaluate", run_evaluate, "test accuracy of a kept network", dataset, bases, variations, where)
    table = command("table", run_table, "float, binarized, calibrated, fine-tuned accuracy of all recorded runs")
    table.add_argument("--dataset", help="only this one")
    table.add_argument("--readme", action="store_true", help="write the README's tables too")
    layers = command("sensitivity", run_sensitivity, "which layers hurt most; what mixing gains", dataset, where)
    layers.add_argument("--from", dest="start", type=Path, metavar="PATH", help="default: the pretrained network")
    layers.add_argument("--images", type=int, default=1024, help="training images to measure on (default: 1024)")
    layers.add_argument("--apart", type=int, default=1, help="M and N of a layer differ by that at most (default: 1)")
    step = command("step", run_step, "time and memory of a training step, binarized against float", bases, where)
    step.add_argument("--batch-size", type=int, default=128)
    step.add_argument("--rounds", type=int, default=25)
    compiling = command("compile", run_compile, "time of torch.compile against eager", bases, where)
    compiling.add_argument("--batch-size", type=int, default=128)
    compiling.add_argument("--rounds", type=int, default=25)

    options = parser.parse_args(arguments)
    if "device" in options:
        options.device = own_device(options.device)
        _use_threads(options.threads)
    try:
        options.run(options)
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
