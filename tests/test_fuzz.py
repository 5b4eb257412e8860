"""Packed files that were changed: they load as what they were or are refused by ValueError, and take little memory."""

import functools
import json
import math
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

import abcnets


@functools.cache
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
              nn.ReLU(), nn.Conv2d(12, 8, 3, bias=False), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 6),
              nn.Linear(6, 5)]  # fmt: skip
    return nn.Sequential(*layers).eval()


IMAGES = torch.linspace(-2, 2, 3 * 64).view(3, 1, 8, 8)


@functools.cache
def original():
    """A file of packed layers and two others: its bytes, tensors and metadata, and what its model puts out."""
    settings = {"3": {"code": ("binary", "uniform")}, "6": {"weight_bases": None, "code": "binary"},
                "7": {"weight_bases": 2, "active": False}}  # fmt: skip
    packed = abcnets.pack(abcnets.convert(network(), 3, 2, settings=settings))
    tensors = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    kinds = (abcnets.PackedLayer, abcnets._ABCLayer)
    layers = {name: abcnets._describe(m) for name, m in packed.named_modules() if isinstance(m, kinds)}
    metadata = {"format": "abcnets", "version": "3", "layers": json.dumps(layers), "sha256": abcnets._digest(tensors)}
    return safetensors.torch.save(tensors, metadata), tensors, metadata, output(packed)


@torch.no_grad()
def output(model):
    for layer in model.modules():
        if isinstance(layer, abcnets.PackedLayer):
            layer.engine = "float"
    return model(IMAGES)


# What may happen to a file. Each takes a `pick` of its own from anything that is drawn.

DEEP = functools.reduce(lambda inner, _: [inner], range(500), 0)
NUMBERS = [0, -1, 1, 2, 3, 4, 8, 255, 256, 257, 10**5, 10**9, 2**31, 2**63, 10**30, 10**400]
ODD = [True, False, None, 0.5, 2.0, math.nan, math.inf, "", "three", "packed", "abc", "zeros", "circular", "x" * 10_000,
       [], [1, 1], [3, 3], [True, 1], [1.0, 1], [1, 1, 1, 1], [0] * 10_000, [[1]], {}, {"M": 1}, DEEP]  # fmt: skip
TEXTS = ["", "1", "2", "3", "-1", "null", "[]", "{}", "[1]", '"x"', '{"3": 1}', '{"3": {}}', "[" * 100_000,
         '{"3":' * 100_000, "9" * 5000, "NaN", "\0", "abcnets", "pt"]  # fmt: skip
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32,
          torch.int64, torch.bool, torch.complex64, torch.uint16]  # fmt: skip
IN_HEADER = [*NUMBERS[:-1], None, True, "", "x", "F4", "F8_E8M0", "C64", "BOOL", "U64", "F64", "I8", {}, [], [8],
             [10**9], [2**62, 2**62], [0, 0], [0, 10**12], [5, 3], [-1, 8], [[8]], [0.5]]  # fmt: skip


UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)  # by an earlier change


def describe_otherwise(pick, tensors, metadata):
    try:
        layers = json.loads(metadata["layers"])
        name = pick(sorted(layers))
        key = pick([*sorted(layers[name]), "M", "N", "weight_bases", "engine", "us", "device"])
    except UNREADABLE:
        return
    what = pick(["value", "value", "value", "number", "number", "drop", "rename", "lose", "copy", "exchange"])
    if what == "drop":
        layers[name].pop(key, None)
    elif what == "rename":
        layers[pick(["0", "1", "3.bits", "", "12", "8"])] = layers.pop(name)
    elif what == "lose":
        del layers[name]
    elif what == "copy":
        layers[pick(["0", "10", "6", "7"])] = layers[name]
    elif what == "exchange":
        other = pick(sorted(layers))
        layers[name], layers[other] = layers[other], layers[name]
    else:
        layers[name][key] = pick(NUMBERS if what == "number" else ODD)
    metadata["layers"] = json.dumps(layers)


def retitle(pick, tensors, metadata):
    key = pick(["format", "version", "sha256", "layers", "another"])
    if pick([True, False]):
        metadata.pop(key, None)
    else:
        metadata[key] = pick(TEXTS)


def change_a_tensor(pick, tensors, metadata):
    if not tensors:
        return
    name, other = pick(sorted(tensors)), pick(sorted(tensors))
    tensor = tensors[name]
    what = pick(["dtype", "dtype", "shape", "shorter", "longer", "rename", "lose", "swap", "add", "noise", "nan"])
    if what == "dtype":
        tensors[name] = tensor.to(pick(DTYPES))
    elif what == "shape":
        tensors[name] = tensor.reshape(pick([(-1,), (1, *tensor.shape), (*tensor.shape, 1), tensor.shape[::-1]]))
    elif what == "shorter":
        tensors[name] = tensor.reshape(-1)[1:].clone() if tensor.ndim < 2 else tensor[1:].clone()
    elif what == "longer":
        tensors[name] = torch.cat([tensor.reshape(-1)] * 3) if tensor.ndim < 2 else torch.cat([tensor, tensor])
    elif what == "rename":
        tensors[pick(["x", "3.us", "6.us", "7.alphas", other])] = tensors.pop(name)
    elif what == "lose":
        del tensors[name]
    elif what == "swap":
        tensors[name], tensors[other] = tensors[other], tensor
    elif what == "add":
        tensors[pick(["x", "", "3.Wq", "3.in_thresholds", "6.us"])] = tensor.clone()
    elif what == "noise":
        if tensor.numel() and tensor.dtype != torch.bool:
            tensors[name] = tensor.reshape(-1).view(torch.uint8).bitwise_xor(pick([1, 7, 255])).view(tensor.dtype)
            tensors[name] = tensors[name].view(tensor.shape)
    elif tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, pick([math.nan, math.inf, -math.inf, 1e30, 0.0]))


def change_the_bases(pick, tensors, metadata):
    """Another number of bases, or of thresholds, in metadata and tensors alike."""
    try:
        layers = json.loads(metadata["layers"])
        name = pick(["3", "9"])
        if pick([True, False]):
            keep = torch.tensor(pick([[], [0], [0, 2], [0, 1, 2, 2, 1]]), dtype=torch.int64)
            layers[name]["M"] = len(keep)
            names = ["bits", "alphas"]
        else:
            keep = torch.tensor(pick([[], [0], [1, 0], [0] * 300, [0] * 5]), dtype=torch.int64)
            layers[name]["N"] = len(keep)
            names = ["thresholds", "betas"]
        tensors.update({f"{name}.{each}": tensors[f"{name}.{each}"][keep] for each in names})
        metadata["layers"] = json.dumps(layers)
    except UNREADABLE:
        pass


def change_the_header(pick, content):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header[pick(sorted(header))]
    if pick([True, False]):
        entry[pick(sorted(entry))] = pick(IN_HEADER)
    else:
        header[pick([*sorted(header), "y"])] = pick([*IN_HEADER, entry])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def change_bytes(pick, content):
    what = pick(["cut", "cut", "append", "flip", "length"])
    at = pick([0, 1, 7, 8, 9, 40, len(content) // 3, len(content) - 1])
    if what == "cut":
        return content[:at]
    if what == "append":
        return content + content[:at]
    if what == "length":
        return pick([0, 1, 2**31, 2**63, 2**64 - 1, len(content)]).to_bytes(8, "little") + content[8:]
    return content[:at] + bytes([content[at] ^ pick([1, 128, 255])]) + content[at + 1 :]


def change(pick):
    """The original file's bytes with something changed in one to four ways."""
    content, tensors, metadata, _ = original()
    tensors, metadata = dict(tensors), dict(metadata)
    if pick([True] * 7 + [False]):
        changes = [describe_otherwise, describe_otherwise, change_a_tensor, change_the_bases, retitle]
        for _ in range(pick([1, 1, 2, 3])):
            pick(changes)(pick, tensors, metadata)
        if pick([True, True, True, False]):
            metadata["sha256"] = abcnets._digest(tensors)
        content = safetensors.torch.save(tensors, metadata)
    if pick([True] + [False] * 5):
        content = pick([change_the_header, change_bytes])(pick, content)
    return content


class Allocated(TorchFunctionMode):
    """The most bytes that a tensor has which torch makes."""

    bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if type(result) is torch.Tensor and not result.is_meta:
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(original()[0])
    abcnets.load_packed(path, network())  # what is imported when it is first needed is none of a file's doing
    return path.parent


def load(folder, content):
    """The loaded model, or the ValueError that refuses it; and the bytes of its largest tensor, or of Python's."""
    path, skeleton = folder / "model.safetensors", network()
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with Allocated() as allocated:
            loaded = abcnets.load_packed(path, skeleton)
    except ValueError as error:
        loaded = error
    taken = max(allocated.bytes, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    return loaded, taken


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_changed_file_is_refused_or_puts_out_the_same(folder, data):
    _, _, metadata, expected = original()
    content = change(lambda options: options[data.draw(st.integers(0, len(options) - 1))])
    loaded, taken = load(folder, content)
    assert taken <= 10 * len(content) + 2**20
    if not isinstance(loaded, ValueError):
        y = output(loaded)
        same = abcnets._digest(safetensors.torch.load(content)) == metadata["sha256"]
        assert torch.equal(y, expected) if same else y.shape == expected.shape
