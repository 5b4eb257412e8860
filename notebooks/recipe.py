"""The recipe of a run: all that decides what comes out of it, and so the run's name, key, row and command."""

import functools
import hashlib
import json
import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import budget
from data import Data
from files import ROOT
from networks import network_for
from torch import Tensor, nn
from training import (
    BATCH_SIZE,
    DISTILL,
    EXACT,
    LR,
    LR_ACTIVATION,
    WARMUP,
    WEIGHT_DECAY,
    default_epochs,
    fingerprint,
)

import abcnets

SWITCHES = ("per_layer", "even_shifts", "learn_shifts", "scale_gradient", "mixed")
NAMED = (*SWITCHES, "zero", "code", "calibrate", "distill", "lr", "lr_activation", "weight_decay", "batch_size",
         "limit", "float_seed", "accumulate", "warmup", "exact")  # fmt: skip  the options, in the order of their words
TRAINING = ("epochs", "seed", "lr", "lr_activation", "weight_decay", "batch_size", "accumulate", "warmup", "exact",
            "distill")  # fmt: skip  what `training.pretrain` and `training.finetune` take


def run_name(dataset: str, M: int | None = None, N: int | None = None, options: str = "", seed: int = 0,
             limit: int | None = None) -> str:  # fmt: skip
    """digits/float, digits/M3-N3, digits/M2 (activations float), digits/M3-N3-per-layer-s1 (an option, seed 1).

    limit: of the images, where `options` has no word of it.
    """
    bases = "-".join(f"{letter}{count}" for letter, count in (("M", M), ("N", N)) if count)
    few, seeded = [f"limit={limit}"] if limit else [], [f"s{seed}"] if seed else []
    parts = [bases or "float", *options.split(), *few, *seeded]
    return f"{dataset.replace('/', '_').replace(':', '_')}/{'-'.join(parts)}"


@dataclass(frozen=True)
class Recipe:
    """What makes a network: a float one where M and N are None, else a binary one of a float one.

    What is None becomes the default (see `usual`), so that a recipe says all by itself.

    **Name**: what was asked for, so that a name can be told before anything is computed: data set, M, N, a word for
    each option that is not the default (`limit` is one), `from=` where the start network is a file of one's own, and
    the seed.
    **Key**: every field, and so the number of epochs and the weights of start network and teacher too. These are in no
    name: a run of more epochs, or from a float network trained anew, is to take the place of the other one. But never
    unasked: what is kept under a name is resumed, and replaced, by a run of the very same key or where `replace` says
    so. In neither is what should make no difference: device, threads, processes, folders.

    Args:
        mixed: whether M, N and code are a budget alone, of bytes and binary multiplications, within which each layer
            has bases of its own: `settings`, in the words of `budget.from_words`.
        zero: whether a 0 stays 0; None: as the code has it.
        code: of weights and of activations, or one word for both; in a text a comma is between two.
        float_seed: of the start network, where it is not `seed`.
        images: how many there are to train with; network: the function that builds it.
        start, teacher: fingerprints of their weights; None for none.
        start_file: where the start network is, if not at its usual place. No part of the key: its weights are.
    """

    dataset: str
    M: int | None = None
    N: int | None = None
    seed: int = 0
    per_layer: bool | None = None
    even_shifts: bool | None = None
    learn_shifts: bool | None = None
    scale_gradient: bool | None = None
    mixed: bool | None = None
    zero: bool | None = None
    code: tuple[str, str] | None = None
    calibrate: int | None = None
    distill: float | None = None
    epochs: int | None = None
    lr: float | None = None
    lr_activation: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    warmup: float | None = None
    exact: float | None = None
    limit: int | None = None
    float_seed: int | None = None
    settings: str | None = None
    images: int | None = None
    network: str | None = None
    start: str | None = None
    teacher: str | None = None
    start_file: Path | None = field(default=None, compare=False)

    def __post_init__(self):
        usual = self.usual()
        for each in fields(self):
            value = getattr(self, each.name)
            value = usual.get(each.name) if value is None else value
            if each.name == "code" and isinstance(value, str):
                value = tuple(value.split(",")) if "," in value else (value, value)
            elif each.type == float | None and value is not None:
                value = float(value)  # one number, one key: 1 is 1.0
            object.__setattr__(self, each.name, value)  # as a frozen dataclass does it itself

    @classmethod
    def of(cls, data: Data, start: nn.Module | None = None, teacher: nn.Module | None = None, **options) -> "Recipe":
        """The recipe of a run on these data. Options: fields of `Recipe`."""
        start, teacher = (None if model is None else fingerprint(model) for model in (start, teacher))
        recipe = cls(data.name, limit=data.limit, images=len(data.train_labels), network=network_for(data).__name__,
                     start=start, teacher=teacher, **options)  # fmt: skip
        return recipe if recipe.distill else replace(recipe, teacher=None)

    @property
    def is_binary(self) -> bool:
        return bool(self.M or self.N)

    def usual(self) -> dict:
        """The default of each option."""
        both = {**dict.fromkeys(NAMED), **dict.fromkeys(SWITCHES, False),
                "epochs": default_epochs(self.dataset, self.is_binary),
                "batch_size": BATCH_SIZE, "accumulate": 1, "warmup": WARMUP, "exact": EXACT}  # fmt: skip
        if not self.is_binary:
            return {**both, "lr": LR["float"], "weight_decay": WEIGHT_DECAY["float"]}
        return {**both, "code": ("thermometer", "thermometer"), "calibrate": 2048, "distill": DISTILL,
                "lr": LR["one base" if self.N == 1 else "binary"], "lr_activation": LR_ACTIVATION,
                "weight_decay": WEIGHT_DECAY["binary"]}  # fmt: skip

    def words(self) -> list[str]:
        """What is not the default, but for the start network: "per-layer", "no-zero", "distill=0"."""
        words, usual = [], self.usual()
        for name in NAMED:
            value, word = getattr(self, name), name.replace("_", "-")
            if value == usual[name]:
                continue
            if isinstance(value, bool):
                words.append(word if value else f"no-{word}")
            else:
                words.append(f"{word}={_text(value)}")
        return words

    @property
    def options(self) -> str:
        return " ".join(self.words() + ([f"from={self.start}"] if self.start_file else []))

    @property
    def name(self) -> str:
        return run_name(self.dataset, self.M, self.N, self.options, self.seed)

    def key(self) -> dict:
        """All that decides what comes out, as plain values; of a run that is not mixed, nothing of mixing."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.compare}
        return values if self.mixed else {name: values[name] for name in values if name not in ("mixed", "settings")}

    @property
    def short(self) -> str:
        """The key in eight letters."""
        return hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()[:8]

    def command(self, start_file: Path | None = None) -> str:
        """What repeats the run in the usual folders; start_file: where the start network is, if not at its place."""
        words = [f"--{word.replace('=', ' ')}" for word in self.words()]
        command = ["python notebooks/experiment.py", "finetune" if self.is_binary else "pretrain"]
        command += ["--dataset", shlex.quote(self.dataset)]
        if self.is_binary:
            command += [f"--weight-bases {self.M or 'none'} --activation-bases {self.N or 'none'}"]
        command += words
        if file := start_file or self.start_file:
            file = file.resolve()
            command += ["--from", shlex.quote(str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file))]
        command += [f"--seed {self.seed}"] if self.seed else []
        return " ".join([*command, f"--epochs {self.epochs}"])

    def row(self) -> dict:
        """The cells of a run's row that its recipe knows."""
        return {"run": self.name, "dataset": self.dataset, "M": self.M, "N": self.N, "options": self.options,
                "settings": self.settings, "seed": self.seed, "epochs": self.epochs}  # fmt: skip

    def training(self) -> dict:
        """The arguments for `training.pretrain` or `training.finetune`."""
        return {name: value for name in TRAINING if (value := getattr(self, name)) is not None}

    def convert(self, model: nn.Module) -> nn.Module:
        """The float network binarized, not yet calibrated."""
        us = abcnets.even_shifts if self.even_shifts and self.M else None
        bases = {"code": self.code}
        if self.mixed:
            if not self.settings:
                raise ValueError(f"{self.name} has mixed settings, but it is not said which")
            bases = {"settings": budget.from_words(self.settings), "filter_fn": lambda layer, name: False}
        model = abcnets.convert(model, self.M, self.N, us=us, per_channel=not self.per_layer, **bases,
                                learn_us=self.learn_shifts, zero=self.zero)  # fmt: skip
        if self.scale_gradient and self.M:
            for layer in model.modules():
                if isinstance(layer, (abcnets.ABCConv2d, abcnets.ABCLinear)):
                    layer.weight.register_hook(functools.partial(_times_alphas, layer))
        return model


def _text(value) -> str:
    """A value as the command line reads it, exactly."""
    if isinstance(value, tuple):
        return ",".join(dict.fromkeys(value))
    return repr(value).removesuffix(".0")


def _times_alphas(layer: nn.Module, G: Tensor) -> Tensor:
    """The other reading of the paper's straight-through estimator: dL/dW = dL/dWq sum_m alpha_m."""
    return G * layer.alphas().sum(0).view(-1, *[1] * (G.ndim - 1))
