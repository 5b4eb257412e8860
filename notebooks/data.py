"""Data sets: every image in memory as one uint8 tensor, augmented and normalized a batch at a time."""

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from files import ROOT, DataError, load, save, tqdm
from networks import import_torchvision
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler


@dataclass
class Data:
    """Images (n, C, H, W) in uint8 and labels (n,) in int64, for training, for choosing and for testing.

    Curves show and choices are made on the validation images, so that the test images tell of a finished network only.

    Attributes:
        validation_images, validation_labels: where none are given, they are taken from the training images, see
            `hold_out`.
        limit: how many of the training images these are, drawn by `load_data`; None for all of them.
        mean, std (C,): of all pixels of the training images that it is made with, by which `normalize` works.

    Raises: DataError where there are fewer than two training images and no validation images.
    """

    name: str
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    validation_images: Tensor | None = None
    validation_labels: Tensor | None = None
    flip: bool = True
    shift: int = 2
    limit: int | None = None
    test_batch_size = 500

    def __post_init__(self):
        if self.validation_images is None:
            images, labels = self.train_images, self.train_labels
            kept, held = hold_out(len(labels))
            self.train_images, self.train_labels = images[kept], labels[kept]
            self.validation_images, self.validation_labels = images[held], labels[held]
        counts = [torch.bincount(channel.flatten(), minlength=256) for channel in self.train_images.unbind(1)]
        share = torch.stack(counts).double() / counts[0].sum()  # (C, 256): exact, and no image becomes floats
        level = torch.arange(256, dtype=share.dtype, device=share.device) / 255
        mean = share @ level
        std = (share * (level - mean[:, None]).square()).sum(1).sqrt()
        self.mean, self.std = mean.float(), torch.where(std > 0, std, 1).float()  # 1 where a channel has one value

    def to(self, device) -> "Data":
        """The same on a device; this one stays where it is."""
        there = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(there, name, value.to(device))
        return there

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
        return self._loader(self.test_images, self.test_labels, batch_size)

    def validation_loader(self, batch_size: int = test_batch_size) -> DataLoader:
        """The validation images likewise."""
        return self._loader(self.validation_images, self.validation_labels, batch_size)

    def _loader(self, images: Tensor, labels: Tensor, batch_size: int) -> DataLoader:
        def pick(places):
            places = places.to(self.device)
            return self.normalize(images[places].permute(0, 2, 3, 1)), labels[places]

        return DataLoader(WholeBatches(len(labels), pick), batch_size, collate_fn=_as_it_is)

    def test_batches(self, batch_size: int = test_batch_size):
        return iter(self.test_loader(batch_size))

    def calibration_batches(self, count: int = 2048, batch_size: int = 128, seed: int = 0):
        """Training images as they are, for `abcnets.calibrate`."""
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randperm(len(self.train_images), generator=generator)[:count].to(self.train_images.device)
        return [self.normalize(self.train_images[part].permute(0, 2, 3, 1)) for part in picks.split(batch_size)]


def hold_out(count: int) -> tuple[Tensor, Tensor]:
    """The places of so many training images in two parts: to train with, and to validate with.

    The latter are the last 5,000 of a seeded draw, or the last tenth where that is less.  Raises: DataError.
    """
    if count < 2:
        raise DataError(f"two training images are the least, one of them to validate with; got {count}")
    places = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held = min(5000, math.ceil(count / 10))
    return places[:-held].sort().values, places[-held:].sort().values


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

    With a limit, only that many training images: for trying things out. Mean and deviation stay those of all of them,
    so that a network trained on all and one trained on few see the same numbers.
    Raises: DataError, one sentence with what to do, if it cannot be had.
    """
    data = _load_data(name, Path(root))
    if limit is not None:
        if not 0 < limit <= len(data.train_images):
            count = len(data.train_images)
            raise DataError(f"limit must be from 1 to the {count} training images of {name}, got {limit}")
        picks = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))[:limit]
        data.train_images, data.train_labels, data.limit = data.train_images[picks], data.train_labels[picks], limit
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
    import_torchvision()
    from torchvision import datasets

    kind = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        train, test = (kind(str(root), train=train, download=True) for train in (True, False))
    except Exception as error:  # torchvision has no exception of its own: a damaged file may raise anything
        raise DataError(
            f"{name} is not in {root}, whole, and could not be downloaded ({type(error).__name__}: {error}): connect to"
            f" a network, or put the files there as torchvision.datasets.{kind.__name__} keeps them, or use --dataset"
            " digits, which needs neither"
        ) from error

    def images(split):
        pixels = torch.as_tensor(split.data)
        return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()

    labels = (torch.as_tensor(split.targets, dtype=torch.int64) for split in (train, test))
    train_labels, test_labels = labels
    shift = 2 if name == "fashion-mnist" else 4
    return Data(name, train.classes, images(train), train_labels, images(test), test_labels, shift=shift)


def read_image(file: str):
    """An image file in RGB, as torchvision reads it.  Raises: DataError where it is none."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(file)
    except Exception as error:  # each format has exceptions of its own
        raise DataError(f"{file} can't be read as an image ({type(error).__name__}): mend or remove it") from error


def image_folders(path: Path, test: str, transform=None) -> list:
    """PATH/train/CLASS/* and PATH/`test`/CLASS/* as torchvision's ImageFolder.

    Raises: DataError where a folder, an image of a class or, on one side, a class is missing.
    """
    splits = [path / "train", path / test]
    for split in splits:
        if not split.is_dir():
            raise DataError(f"{split} is missing: train/CLASS/*.JPEG and {test}/CLASS/*.JPEG must be in {path}")
    import_torchvision()
    from torchvision.datasets import ImageFolder

    try:
        folders = [ImageFolder(str(split), transform, loader=read_image) for split in splits]
    except FileNotFoundError as error:
        raise DataError(f"{path}: every class needs at least one image ({error})") from error
    if differing := sorted(set(folders[0].classes) ^ set(folders[1].classes)):
        raise DataError(f"{path}: train/ and {test}/ must hold the same classes, but {differing[:5]} are in one alone")
    return folders


def _folder(name: str, path: Path, size: int = 32) -> Data:
    """PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg, brought to 32x32 and decoded once into PATH.pt."""
    train, test = image_folders(path, "test")
    from torchvision.transforms import functional as transforms

    def decode(folder):
        images = []
        with tqdm(folder.samples, desc=f"decoding {folder.root}", leave=False) as bar:
            for file, _ in bar:
                image = transforms.center_crop(transforms.resize(folder.loader(file), size), size)
                images.append(transforms.pil_to_tensor(image))
        return torch.stack(images)

    files = [(str(Path(file).relative_to(path)), (about := os.stat(file)).st_size, about.st_mtime_ns)
             for file, _ in train.samples + test.samples]  # fmt: skip
    cache = path.with_name(path.name + ".pt")
    decoded = load(cache) if cache.exists() else {}
    if decoded and decoded.keys() != {"files", "train", "test"}:
        raise DataError(f"{cache} is not what {name} was decoded into: move it, for that is written there")
    if decoded.get("files") != files:
        decoded = {"files": files, "train": decode(train), "test": decode(test)}
        try:
            save(decoded, cache)
        except OSError:
            pass  # A folder that cannot be written to is decoded anew each time.
    labels = (torch.tensor(folder.targets) for folder in (train, test))
    train_labels, test_labels = labels
    return Data(name, train.classes, decoded["train"], train_labels, decoded["test"], test_labels, shift=4)
