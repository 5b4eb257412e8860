"""The training loop and its defaults, on one device or many; a run that was stopped goes on from its checkpoint."""

import copy
import hashlib
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather, patch_environment
from data import Data
from files import DataError, load, save, tqdm
from networks import build_network
from torch import Tensor, nn

import abcnets
from kernels.command import Refused

LR = {"float": 0.1, "binary": 1e-3, "one base": 3e-3}  # the last: of inputs, and so calibrated far below its goal
WEIGHT_DECAY = {"float": 5e-4, "binary": 0.0}
LR_ACTIVATION, BATCH_SIZE, WARMUP, EXACT, DISTILL = 1e-3, 128, 0.1, 0.1, 0.5
OTHER_RECIPE = "choose another --out, or say --replace (in Python: out=, replace=True)"


def default_epochs(dataset: str, binary: bool = False) -> int:
    """Of a float network's training from scratch, or of a binary one's from where calibration left it."""
    return {"digits": (12, 12), "fashion-mnist": (20, 10)}.get(dataset, (30, 15))[binary]


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
def predict(model: nn.Module, data: Data, part: str = "test") -> Tensor:
    """Logits (n, classes) of the test images, or of the "validation" images.

    With many processes each computes its share, and all get the whole.
    """
    model.eval()
    processes = PartialState().num_processes
    batch_size = math.ceil(data.test_batch_size / processes) * processes
    loader = getattr(data, f"{part}_loader")(batch_size)
    loader = prepare_data_loader(loader, data.device, split_batches=True, put_on_device=True)
    logits = torch.cat([gather(model(images).float()) for images, _ in loader])
    return logits[: len(getattr(data, f"{part}_labels"))]  # the last batch was filled up to divide evenly


def accuracy(model: nn.Module, data: Data, part: str = "test") -> float:
    """Percentage of the test images, or of the "validation" images, that the network names rightly."""
    return 100 * (predict(model, data, part).argmax(1) == getattr(data, f"{part}_labels")).float().mean().item()


def pretrain(
    data: Data,
    *,
    epochs: int | None = None,
    lr: float = LR["float"],
    weight_decay: float = WEIGHT_DECAY["float"],
    seed: int = 0,
    **options,
):
    """A float network trained from scratch: (model, history). Options: those of `train`."""
    model = build_network(data, seed).to(data.train_images.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(_parameter_groups(model, lr, lr, weight_decay), momentum=0.9, nesterov=True)
    epochs = default_epochs(data.name) if epochs is None else epochs
    return model, train(model, data, optimizer, epochs=epochs, seed=seed, **options)


def finetune(
    model: nn.Module,
    data: Data,
    teacher: nn.Module | None = None,
    *,
    epochs: int | None = None,
    lr: float | None = None,
    lr_activation: float = LR_ACTIVATION,
    weight_decay: float = WEIGHT_DECAY["binary"],
    **options,
) -> list[dict]:
    """Train a converted, and best a calibrated, network in place; returns its history. Options: those of `train`.

    The default lr is 1e-3, and 3e-3 where inputs have one base: such a network is calibrated far below its goal.
    """
    single = any(getattr(layer, "activation_bases", None) == 1 for layer in model.modules())
    lr = lr or LR["one base" if single else "binary"]
    optimizer = torch.optim.AdamW(_parameter_groups(model, lr, lr_activation, weight_decay))
    epochs = default_epochs(data.name, binary=True) if epochs is None else epochs
    return train(model, data, optimizer, teacher, epochs=epochs, **options)


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


def check_batch(batch_size: int, accumulate: int, images: int) -> None:
    """Raise Refused, a ValueError, if processes and parts do not divide a batch evenly, or there are fewer images."""
    processes = PartialState().num_processes
    parts = processes * accumulate
    if batch_size % parts or not 0 < batch_size <= images:
        raise Refused(f"batch_size must be a multiple of {parts} ({processes} process(es), each with {accumulate}"
                      f" part(s)) and at most the {images} training images, got {batch_size}; --batch-size is for"
                      " another")  # fmt: skip


def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    teacher: nn.Module | None = None,
    *,
    epochs: int,
    batch_size: int = BATCH_SIZE,
    accumulate: int = 1,
    warmup: float = WARMUP,
    exact: float = EXACT,
    distill: float = DISTILL,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    key: dict | None = None,
    replace: bool = False,
    description: str = "training",
) -> list[dict]:
    """Train in place; returns the history: each epoch's loss, training and validation accuracy in percent, and seconds.

    The learning rates in `optimizer` are peaks: up in a line for a fraction `warmup` of the time, then down a cosine.
    Steps are computed in bfloat16 where that is fast, but the last fraction `exact` of them in float32, as inference
    is: which side of a threshold a value falls on hangs on the rounding, and a network gets used to its own.
    With a teacher, that fraction `distill` of the loss is the cross entropy to the teacher's probabilities.
    With a checkpoint, a run that was killed or interrupted goes on after its last complete epoch: all that is random in
    an epoch follows from the seed and the epoch's number. On a CPU, with as many threads, it ends with the very same
    weights; on a GPU, whose sums come in no fixed order, with as good ones.

    Under `accelerate launch` or `torchrun` every process calls this alike, with the model and the data on its
    `own_device`. An optimizer step sees `batch_size` images in all: each process takes its share, in `accumulate` parts
    one after the other, and the main process alone writes. A stopped run may go on with another number of processes;
    the very same weights it ends with if there are as many as before.
    BatchNorm normalizes by what it sees at once: on several GPUs all their images (torch.nn.SyncBatchNorm, which needs
    GPUs); on several CPU processes each one's own share, and the running statistics are averaged over the processes
    after each epoch; with `accumulate` one part. So there the same seed gives another, no worse network.

    Args:
        data: a Data, or anything with its `device`, `train_labels`, `train_loader`, `validation_labels` and
            `validation_loader`.
        key: what the checkpoint is of, as plain values by name; None: the arguments of this call.
        replace: whether the checkpoint may be one of another key, and is then lost.

    Raises:
        Refused, a ValueError: as `check_batch` does; and where the checkpoint is of another key.
        KeyboardInterrupt: on Ctrl-C, which costs the epoch that was under way.
    """
    device, images = data.device, len(data.train_labels)
    idle = any(not getattr(layer, "active", True) for layer in model.modules())  # its vs and betas get no gradient
    accelerator = accelerator_on(device, accumulate, find_unused_parameters=idle)
    check_batch(batch_size, accumulate, images)
    steps = images // batch_size
    peaks = [group["lr"] for group in optimizer.param_groups]
    if checkpoint and key is None:
        key = {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "warmup": warmup, "exact": exact,
               "seed": seed, "lr": peaks, "weight_decay": [group["weight_decay"] for group in optimizer.param_groups],
               "images": images, "start": fingerprint(model),
               **({} if teacher is None else {"teacher": fingerprint(teacher), "distill": distill})}  # fmt: skip

    def keep(history: list[dict]) -> None:
        if checkpoint and accelerator.is_main_process:
            save({"key": key, "history": history, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
                 checkpoint)  # fmt: skip

    history = _resume(checkpoint, key, replace, model, optimizer) if checkpoint else []
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
                if accelerator.sync_gradients:
                    abcnets.separate_thresholds(model)
                loss_sum += loss.detach()
                hits += (logits.detach().argmax(1) == labels).sum()
                bar.update(accelerator.sync_gradients)
            seconds = time.perf_counter() - started
            _average_statistics(model, accelerator)
            validated = accuracy(model, data, "validation")
            entry = {
                "epoch": epoch + 1,
                "loss": round(accelerator.reduce(loss_sum, "mean").item() / (steps * accumulate), 5),
                "train_accuracy": round(100 * accelerator.reduce(hits, "sum").item() / (steps * batch_size), 3),
                "validation_accuracy": round(validated, 3),
                "seconds": round(seconds, 2),
            }
            keep([*history, entry])
            history.append(entry)  # now that it can't be lost
            if accelerator.is_main_process:
                _show(bar, description, entry, epochs)
    except KeyboardInterrupt:
        bar.close()
        if accelerator.is_main_process:
            how = f"run it again to go on from {checkpoint}" if checkpoint and history else "nothing is kept"
            print(f"{description}: interrupted after {len(history)} of {epochs} epochs; {how}", flush=True)
        raise
    finally:
        bar.close()
    if not history:  # of no epochs: so that the network is known by its key all the same
        keep([])
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


def fingerprint(weights: nn.Module | dict[str, Tensor]) -> str:
    """A network's weights and statistics, or a state dict's, in twelve letters: other numbers, other letters."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    found = hashlib.sha256()
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:12]


def load_checkpoint(path: str | Path) -> dict | None:
    """What `train` kept: key, history, model, optimizer; None where there is nothing.  Raises: DataError."""
    if not Path(path).exists():
        return None
    state = load(path)
    if not {"key", "history", "model", "optimizer"} <= state.keys():
        raise DataError(f"{path} is no checkpoint of a training run, or an older version's: remove it to begin anew")
    return state


def difference(kept: dict, wanted: dict) -> str:
    """Where two keys differ, in words; "" where they don't."""
    differing = [name for name in {**wanted, **kept} if kept.get(name) != wanted.get(name)]
    return ", ".join(f"{name} {kept.get(name)}, not {wanted.get(name)}" for name in differing)


def _resume(checkpoint: str | Path, key: dict, replace: bool, model: nn.Module, optimizer: torch.optim.Optimizer):
    (state,) = broadcast_object_list([load_checkpoint(checkpoint) if is_main_process() else None])
    if state is None:  # the file need not be on every node
        return []
    if differing := difference(state["key"], key):
        if not replace:
            raise Refused(f"{checkpoint} is of another recipe ({differing}): {OTHER_RECIPE}")
        return []
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def _show(bar, description: str, entry: dict, epochs: int) -> None:
    """An epoch's outcome beside the bar, or as a line of its own where bars are switched off (TQDM_DISABLE=1)."""
    if bar.disable:
        print(f"{description}: epoch {entry['epoch']}/{epochs}, loss {entry['loss']:.4f}, "
              f"validation {entry['validation_accuracy']:.2f} %, {entry['seconds']:.1f} s", flush=True)  # fmt: skip
    bar.set_postfix(epoch=entry["epoch"], loss=entry["loss"], validation=f"{entry['validation_accuracy']:.2f} %")


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """The model in eval mode, with the weights of a file.

    Raises: DataError where it is not there, can't be read, or is of another network.
    """
    if not Path(path).exists():
        raise DataError(f"{path} is missing: `python notebooks/experiment.py pretrain` and then `finetune` write it")
    state = load(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # which lists all names there are, on many lines
        reason = " ".join(str(error).split())
        raise DataError(f"{path} does not hold the weights of this network: {reason[:200]}") from error
    return model.eval()
