"""Packed inference with stock torch: equal to the float simulation, small on disk, bits from layer to layer."""

import copy
import json
import math
import os
import pickle
import stat
import sys
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch._subclasses import FakeTensorMode

import abcnets
import kernels.fuse
from abcnets import ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear, PackedLayer
from kernels.cpu.engine import BITS_PAY_UP_TO
from kernels.cpu.system import tile


@st.composite
def layers(draw):
    """A random ABC layer and an input, some of whose values lie exactly on thresholds, some infinite."""
    dims = draw(st.integers(0, 3))
    M, N = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    groups = draw(st.sampled_from([1, 1, 2, 3])) if dims else 1
    C, O = groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    bases = {"weight_bases": M, "activation_bases": N, "vs": torch.randn(N), "betas": torch.randn(N)}
    bases |= {"per_channel": draw(st.booleans()), "active": True}
    B = draw(st.integers(0, 3))
    if dims == 0:
        layer, shape = ABCLinear(C, O, bias=draw(st.booleans()), **bases), (B, C)
    else:
        kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
        dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
        padding = draw(st.sampled_from(["same", "valid", "numbers"]))
        stride = 1 if padding == "same" else [draw(st.integers(1, 3)) for _ in range(dims)]
        mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "circular", "replicate"]))
        if padding == "numbers":
            padding = [draw(st.integers(0, 2)) for _ in range(dims)]
        layer = (ABCConv1d, ABCConv2d, ABCConv3d)[dims - 1](
            C, O, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode, **bases
        )
        shape = (B, C, *(draw(st.integers(5, 8)) for _ in range(dims)))
    x = torch.randn(shape)
    special = torch.cat([0.5 - layer.vs.detach(), torch.tensor([math.inf, -math.inf])])
    x = torch.where(torch.rand(shape) < 0.2, special[torch.randint(len(special), shape)], x)
    return layer, x


@settings(max_examples=150, deadline=None)
@given(layers())
def test_packed_equals_the_float_simulation(case):
    layer, x = case
    with torch.no_grad():
        expected = layer(x)
        for engine in ("bits", "float"):
            y = abcnets.pack(layer, engine=engine)(x)
            assert y.shape == expected.shape and y.dtype == expected.dtype
            assert torch.allclose(
                y, expected, rtol=1e-4, atol=1e-4 * max(1, expected.abs().max().item() if y.numel() else 1)
            )


@pytest.mark.parametrize("engine", ["bits", "float"])
def test_nan_spreads_as_in_the_simulation(engine):
    layer = ABCConv2d(3, 4, 3, padding=1, active=True)
    x = torch.randn(2, 3, 6, 6)
    x[0, 1, 2, 3] = math.nan
    assert torch.equal(abcnets.pack(layer, engine=engine)(x).isnan(), layer(x).isnan())


@pytest.mark.parametrize("engine", ["bits", "float"])
def test_layouts_and_dtypes(engine):
    layer = ABCConv2d(5, 4, 3, padding=1, weight_bases=2, activation_bases=2, active=True)
    packed = abcnets.pack(layer, engine=engine)
    x = torch.randn(2, 5, 6, 7)
    y = layer(x)
    assert torch.allclose(packed(x.to(memory_format=torch.channels_last)), y, atol=1e-5)
    assert torch.allclose(packed(x.transpose(2, 3).contiguous().transpose(2, 3)), y, atol=1e-5)
    assert torch.allclose(packed(x[0]), y[0], atol=1e-5)
    moved = copy.deepcopy(packed).to(memory_format=torch.channels_last)
    assert (
        torch.equal(moved.bits, packed.bits) and moved.bits.is_contiguous() and torch.allclose(moved(x), y, atol=1e-5)
    )
    double = packed(x.double())
    assert double.dtype == torch.float64 and torch.allclose(double.float(), y, atol=1e-5)
    half = packed(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), layer(x.bfloat16().float()), atol=0.1)


def test_packing_weights_only_and_leaving_the_rest():
    model = nn.Sequential(
        ABCConv2d(3, 4, 3, weight_bases=2, activation_bases=None, active=True),
        ABCConv2d(4, 4, 3, weight_bases=None, activation_bases=2, active=True),
        ABCConv2d(4, 4, 3),
    )
    packed = abcnets.pack(model)
    assert [type(m) for m in packed] == [PackedLayer, ABCConv2d, ABCConv2d] and not packed[0].runs_bits()
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(packed(x), model(x), atol=1e-5)
    assert not any(p.requires_grad for p in packed.parameters()) and model[1].weight.requires_grad
    with pytest.raises(ValueError, match="at least one active ABC layer"):
        abcnets.pack(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match="got 'fast'"):
        abcnets.pack(model, engine="fast")
    with pytest.raises(ValueError, match="engine must be 'auto', 'bits' or 'float', got 'gpu'"):
        packed[0].engine = "gpu"
    assert packed[0].engine == "auto"


def test_auto_runs_layers_beyond_the_limit_as_float():
    layers = [ABCLinear(4, 4, weight_bases=M, activation_bases=N, active=True) for M, N in ((4, 4), (5, 5), (1, 8))]
    limit = BITS_PAY_UP_TO[tile()]
    assert [abcnets.pack(layer).runs_bits() for layer in layers] == [limit >= 16, False, limit >= 8]
    few = [ABCLinear(4, 4, weight_bases=M, activation_bases=N, active=True) for M, N in ((1, 1), (2, 2), (1, 4))]
    assert all(abcnets.pack(layer).runs_bits() for layer in few)
    assert [abcnets.pack(layer).runs_bits("mps") for layer in layers] == [False, False, False]


def test_bad_input_to_a_packed_layer():
    packed = abcnets.pack(ABCConv2d(3, 4, 3, active=True))
    with pytest.raises(ValueError, match=r"3 channels in dimension -3, got input of shape \(1, 2, 5, 5\)"):
        packed(torch.rand(1, 2, 5, 5))
    with pytest.raises(TypeError, match="got torch.int32"):
        packed(torch.ones(1, 3, 5, 5, dtype=torch.int32))


def test_documented_bit_order():
    layer = ABCLinear(11, 1, bias=False, weight_bases=1, activation_bases=1, active=True)
    signs = torch.tensor([1, -1, -1, 1, 1, 1, -1, -1, 1, -1, 1.0])
    layer.weight.data.copy_(signs - signs.mean())
    assert abcnets.pack(layer).bits.tolist() == [[[0b00111001, 0b101]]]


# Operators


def operator_arguments(out=False):
    layer = abcnets.pack(ABCConv2d(70, 9, 3, stride=2, padding=1, active=True))
    x = torch.randn(2, 70, 6, 7)
    per_channel = (torch.randn(3, 70), torch.rand(70) > 0.5) if out else (layer.thresholds, None)
    more = (torch.randn(4, 9), torch.rand(9) > 0.5, 4) if out else (None, None, 0)
    return (x, layer.bits, layer.alphas, layer.betas, *per_channel, layer.bias, None, 70,
            [2, 2], [1, 1, 1, 1], [1, 1], 1, *more)  # fmt: skip


def test_operators_pass_opcheck():
    torch.library.opcheck(torch.ops.abcnets.packed_conv.default, operator_arguments())
    arguments = operator_arguments(out=True)
    torch.library.opcheck(torch.ops.abcnets.packed_conv.default, arguments)
    words = torch.ops.abcnets.packed_conv(*arguments)
    assert words.shape == (2, 3, 4, 1, 4)
    pool = (words, arguments[-2], 9, [2, 2], [2, 2], [1, 1], [1, 1], True, False)
    torch.library.opcheck(torch.ops.abcnets.packed_max_pool.default, pool)


def test_words_out_are_the_thresholded_output_and_pool_as_it_does():
    arguments = operator_arguments(out=True)
    y = torch.ops.abcnets.packed_conv(*arguments[:-3], None, None, 0)
    thresholds, flips, _ = arguments[-3:]
    words = torch.ops.abcnets.packed_conv(*arguments)
    bits = abcnets.unpack_bits(words.movedim(-1, 0), 9).movedim(-1, 2)  # (N, B, O, H, W)
    expected = (y >= thresholds[:, None, :, None, None]) != flips[:, None, None]
    assert torch.equal(bits, expected)
    for geometry in ((2, 2, 0, 1, False), (3, 2, 1, 1, True), (2, 1, 0, 2, False)):
        k, s, p, d, ceil = geometry
        pooled = torch.ops.abcnets.packed_max_pool(words, flips, 9, [k, k], [s, s], [p, p], [d, d], ceil, False)
        bits = abcnets.unpack_bits(pooled.movedim(-1, 0), 9).movedim(-1, 2)
        z = F.max_pool2d(y, k, s, p, d, ceil)
        assert torch.equal(bits, (z >= thresholds[:, None, :, None, None]) != flips[:, None, None])


def test_nan_can_not_become_bits():
    arguments = list(operator_arguments(out=True))
    arguments[0][0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        torch.ops.abcnets.packed_conv(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grads", ["input", "scales"])
def test_no_gradient_passes_an_operator_whoever_runs_it(monkeypatch, dtype, grads):
    x, bits, alphas, betas, *more = operator_arguments()
    x, scales = x.to(dtype), [alphas.clone(), betas.clone()]
    expected = torch.ops.abcnets.packed_conv(x, bits, *scales, *more)
    for tensor in [x] if grads == "input" else scales:
        tensor.requires_grad_()
    by_engine = torch.ops.abcnets.packed_conv(x, bits, *scales, *more)
    plain = abcnets.packed_conv(x, bits, *scales, *more)
    monkeypatch.setitem(abcnets._found, "cpu", {"missing": "none here", "install": ""})
    without_engine = abcnets._run_operator(abcnets.packed_conv, x, bits, *scales, *more)
    for y in (by_engine, plain, without_engine):
        assert not y.requires_grad and torch.allclose(y, expected, rtol=1e-2, atol=1e-4)


def test_packed_models_compile_and_export():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), ABCConv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 3))
    abcnets.binarize(model)
    packed, x = abcnets.pack(model), torch.randn(2, 1, 8, 8)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), model(x), atol=1e-5)
    assert torch.allclose(torch.export.export(packed, (x,)).module()(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("engine", ["bits", "float"])
def test_packed_layers_are_traced_by_jit(engine):
    """With check_trace=True, torch's default: a second trace must be the same graph as the first."""
    layer = ABCConv2d(4, 5, 3, padding=1, weight_bases=2, activation_bases=2, active=True)
    packed, x = abcnets.pack(layer, engine=engine), torch.randn(2, 4, 8, 8)
    traced = torch.jit.trace(packed, x)
    for shape in ((2, 4, 8, 8), (5, 4, 6, 9)):
        x = torch.randn(shape)
        assert torch.allclose(traced(x), layer(x), atol=1e-5)


# Files


def small():
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)).eval()


@pytest.fixture
def packed():
    model = abcnets.convert(small(), 3, 2, settings={"6": {"weight_bases": None}})
    return abcnets.pack(abcnets.calibrate(model, torch.randn(20, 1, 8, 8), progress=False))


def test_a_file_rebuilds_the_model(packed, tmp_path):
    path, x = tmp_path / "model.safetensors", torch.randn(3, 1, 8, 8)
    abcnets.save_packed(packed, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    skeleton = small()
    loaded = abcnets.load_packed(path, skeleton)
    assert torch.equal(loaded(x), packed(x)) and not loaded.training
    assert [type(m) for m in loaded] == [type(m) for m in packed] and type(skeleton[3]) is nn.Conv2d
    assert torch.equal(abcnets.load_packed(path, abcnets.convert(small()))(x), packed(x))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata["layers"])["3"]
    assert metadata["version"] == "3" and (described["M"], described["N"], described["kernel_size"]) == (3, 2, [3, 3])


def test_a_file_of_version_1_still_loads():
    """It says what each layer is to run as (here bits and float), which is now for the machine to decide."""
    loaded = abcnets.load_packed(Path(__file__).with_name("version1.safetensors"), small())
    assert [loaded[i].engine for i in (3, 6)] == ["auto", "auto"]
    y = loaded(torch.linspace(-2, 2, 64).view(1, 1, 8, 8))
    assert torch.allclose(y, torch.tensor([-0.2649, 0.0830, 0.0546, 0.1181, -0.2656]), atol=1e-3)


def test_no_file_says_what_a_layer_runs_as(packed, tmp_path):
    path, x = tmp_path / "model.safetensors", torch.randn(3, 1, 8, 8)
    for engine in ("auto", "bits", "float"):
        packed[3].engine = engine
        abcnets.save_packed(packed, path)
        with safe_open(path, framework="pt") as file:
            assert "engine" not in file.metadata()["layers"]
        assert torch.allclose(abcnets.load_packed(path, small())(x), packed(x), atol=1e-5)


def test_state_dicts_load_weights_only_and_as_safetensors(packed, tmp_path):
    state, x = packed.state_dict(), torch.randn(3, 1, 8, 8)
    torch.save(state, tmp_path / "state.pt")
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    for loaded in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "state.safetensors"),
    ):
        empty = copy.deepcopy(packed)
        for buffer in empty.buffers():
            buffer.zero_()
        empty.load_state_dict(loaded)
        assert torch.equal(empty(x), packed(x))


def rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def relabel(metadata, **changes):
    layers = json.loads(metadata["layers"])
    layers["3"].update(changes)
    metadata["layers"] = json.dumps(layers)


WRONG = {
    "version '4'": lambda metadata, tensors: metadata.update(version="4"),
    "version ''": lambda metadata, tensors: metadata.pop("version"),
    "no packed model": lambda metadata, tensors: metadata.update(format="pt"),
    "checksum": lambda metadata, tensors: tensors["3.bits"].bitwise_xor_(1),
    "readable description": lambda metadata, tensors: metadata.update(layers="[1]"),
    "does not fit": lambda metadata, tensors: relabel(metadata, M=2),
    "another network": lambda metadata, tensors: relabel(metadata, stride=[2, 2]),
    "makes no sense": lambda metadata, tensors: relabel(metadata, M="three"),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_gives_one_clear_error_and_touches_nothing(packed, tmp_path, message):
    path, skeleton = tmp_path / "model.safetensors", small()
    abcnets.save_packed(packed, path)
    rewrite(path, WRONG[message])
    before = copy.deepcopy(skeleton.state_dict())
    with pytest.raises(ValueError, match=message):
        abcnets.load_packed(path, skeleton)
    assert all(torch.equal(value, before[key]) for key, value in skeleton.state_dict().items())


def test_a_description_is_compared_with_its_types(tmp_path):
    """true == 1 and 1.0 == 1 in Python, and in no layer."""
    path, network = tmp_path / "model.safetensors", nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    model = abcnets.convert(network, 1, 1, settings={"2": {"weight_bases": None}})
    abcnets.save_packed(abcnets.pack(model), path)
    layers = json.loads(safe_open(path, "pt").metadata()["layers"])
    for name, key, value in (("1", "M", True), ("1", "N", True), ("1", "groups", True), ("2", "activation_bases", True),
                             ("2", "per_channel", 1), ("1", "M", 1.0), ("1", "N", math.nan)):  # fmt: skip
        wrong = copy.deepcopy(layers)
        wrong[name][key] = value
        rewrite(path, lambda metadata, tensors: metadata.update(layers=json.dumps(wrong)))  # noqa: B023
        with pytest.raises(ValueError, match="makes no sense|another network|readable description"):
            abcnets.load_packed(path, network)
    rewrite(path, lambda metadata, tensors: metadata.update(layers=json.dumps(layers)))
    abcnets.load_packed(path, network)


def test_a_skeleton_may_be_without_memory(packed, tmp_path):
    path, x = tmp_path / "model.safetensors", torch.randn(3, 1, 8, 8)
    abcnets.save_packed(packed, path)
    with torch.device("meta"):
        skeletons = [small(), abcnets.convert(small()), small().to("meta")]
    for skeleton in skeletons:
        assert torch.equal(abcnets.load_packed(path, skeleton)(x), packed(x))
        assert all(tensor.is_meta for tensor in skeleton.parameters())
    skeletons[0][0].register_buffer("scale", torch.ones(1, device="meta"), persistent=False)
    with pytest.raises(ValueError, match="0.scale is on the meta device, and no file holds it"):
        abcnets.load_packed(path, skeletons[0])
    with pytest.raises(ValueError, match="save_packed needs a model that holds values"):
        abcnets.save_packed(packed.to("meta"), path)


def test_kinds_of_tensors_are_compared_and_their_values_are_data(packed, tmp_path):
    path, x = tmp_path / "model.safetensors", torch.randn(3, 1, 8, 8)
    abcnets.save_packed(packed, path)
    whole = path.read_bytes()

    def put(name, tensor):
        def change(metadata, tensors):
            tensors[name] = tensor
            metadata["sha256"] = abcnets._digest(tensors)

        rewrite(path, change)
        return abcnets.load_packed(path, small())

    loaded = put("3.alphas", torch.full((3, 8), math.nan))
    assert loaded[3].alphas.isnan().all() and loaded(x).isnan().all()
    assert torch.equal(put("3.alphas", packed[3].alphas.double())(x), packed(x))
    wrong = {"3.bits": packed[3].bits.float(), "3.alphas": torch.ones(3, 8, dtype=torch.int64),
             "3.betas": torch.ones(2, dtype=torch.complex64), "3.thresholds": torch.ones(3)}  # fmt: skip
    for name, tensor in wrong.items():
        path.write_bytes(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=f"does not fit the skeleton: {name} is "):
                put(name, tensor)


def test_threads_that_write_one_file_at_once_both_succeed(packed, tmp_path, monkeypatch):
    path, written, failed = tmp_path / "model.safetensors", threading.Barrier(2, timeout=60), []
    save_file = safetensors.torch.save_file

    def save_and_wait(tensors, name, metadata):
        save_file(tensors, name, metadata)
        written.wait()

    def save():
        try:
            abcnets.save_packed(packed, path)
        except BaseException as error:
            failed.append(error)
            written.abort()

    monkeypatch.setattr(safetensors.torch, "save_file", save_and_wait)
    threads = [threading.Thread(target=save) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and list(tmp_path.iterdir()) == [path]
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(abcnets.load_packed(path, small())(x), packed(x))


@pytest.mark.skipif(os.name == "nt", reason="no such permissions")
def test_a_file_has_the_permissions_and_the_place_that_plain_writing_gives(packed, tmp_path):
    path, plain, link = (tmp_path / name for name in ("model.safetensors", "plain", "link"))
    plain.write_bytes(b"")
    abcnets.save_packed(packed, path)
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    link.symlink_to(path)
    abcnets.save_packed(abcnets.pack(abcnets.convert(small(), 1, 1)), link)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert abcnets.load_packed(path, small())[3].weight_bases == 1
    for wrong in (tmp_path, tmp_path / "no such folder" / "model", plain / "model"):
        with pytest.raises(OSError):
            abcnets.save_packed(packed, wrong)
    with pytest.raises(FileNotFoundError, match="no packed model at"):
        abcnets.load_packed(tmp_path, small())
    assert sorted(tmp_path.iterdir()) == [link, path, plain]


def test_truncated_foreign_missing_and_misfitting_files(packed, tmp_path):
    path = tmp_path / "model.safetensors"
    abcnets.save_packed(packed, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"PK\x03\x04 not ours"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            abcnets.load_packed(path, small())
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="has a binarized layer '3', where the skeleton has no layer to binarize"):
        abcnets.load_packed(path, nn.Sequential(nn.Linear(2, 2)))
    wider = nn.Sequential(*[nn.Conv2d(9, 9, 3) if i == 3 else m for i, m in enumerate(small())])
    with pytest.raises(ValueError, match="another network"):
        abcnets.load_packed(path, wider)
    with pytest.raises(FileNotFoundError, match="no packed model at"):
        abcnets.load_packed(tmp_path / "nothing", small())
    with pytest.raises(ValueError, match="what pack\\(\\) returned"):
        abcnets.save_packed(small(), path)
    assert path.read_bytes() == whole


# Bits from layer to layer


def deep():
    """Falling, constant and rising channels, every order of pool, norm and ReLU, a linear tail."""
    torch.manual_seed(2)
    layers = [
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 70, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(70), nn.ReLU(),
        nn.Conv2d(70, 33, 3, padding="same", bias=False), nn.BatchNorm2d(33),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.ReLU6(),
        nn.Conv2d(33, 20, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(20 * 9, 40), nn.BatchNorm1d(40), nn.Dropout(), nn.ReLU(), nn.Linear(40, 40), nn.Linear(40, 10),
    ]  # fmt: skip
    for norm in layers:
        if hasattr(norm, "running_mean"):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias, std=0.5)
            norm.weight.data[::5] = 0
    return nn.Sequential(*layers).eval()


def test_fused_models_hand_on_bits_and_put_out_the_same():
    x = torch.randn(64, 1, 16, 16)
    model = abcnets.calibrate(abcnets.convert(deep(), 2, 3), x, progress=False)
    packed = abcnets.pack(model, engine="bits")
    fused = abcnets.fuse(packed)
    assert torch.allclose(packed(x), model(x), atol=1e-4)
    difference = (fused(x) - packed(x)).abs().amax(1)
    assert (difference < 1e-4).float().mean() > 0.9  # a float sum, rounded otherwise, may lie on a threshold
    left = [type(m).__name__ for m in fused.children() if not isinstance(m, (PackedLayer, abcnets.PackedChain))]
    assert sorted(left) == ["Flatten", "ReLU"]  # nothing but what separates convolutions and linear layers
    seen = []
    handles = [
        m.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
        for m in fused.modules()
        if isinstance(m, PackedLayer)
    ]
    fused(x)
    assert seen == [torch.int64, torch.int64, torch.float32, torch.int64, torch.float32] and len(handles) == 5
    assert torch.allclose(fused(x[:0]), packed(x[:0]))


@pytest.mark.parametrize("M, N", [(1, 1), (2, 3), (5, 5)])
def test_fused_models_run_what_is_faster_and_put_out_the_same(M, N):
    """Left to "auto", a chain becomes bits only where these are faster; where thresholds were folded, it is bits."""
    x = torch.randn(16, 1, 16, 16)
    packed = abcnets.pack(abcnets.calibrate(abcnets.convert(deep(), M, N), x, progress=False))
    fused = abcnets.fuse(packed)
    difference = (fused(x) - packed(x)).abs().amax(1)
    assert (difference < 1e-3).float().mean() > 0.9  # rounding may put a value on the other side of a threshold
    for layer in fused.modules():
        if isinstance(layer, PackedLayer):
            assert layer.folded or (layer.in_thresholds is None and layer.out_thresholds is None)
    for layer in packed.modules():
        if isinstance(layer, PackedLayer):
            assert not layer.folded and layer.in_thresholds is None and layer.out_thresholds is None


def test_fused_thresholds_decide_as_the_modules_do():
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(40).eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    layer = abcnets.pack(ABCConv2d(40, 3, 3, activation_bases=4, active=True))
    thresholds, flips = kernels.fuse.fold([lambda z: norm(z[:, :, None, None])[:, :, 0, 0], torch.relu], layer)
    for z in (thresholds, thresholds.nextafter(torch.tensor(math.inf)), thresholds.nextafter(torch.tensor(-math.inf))):
        z = z.clamp(-1e30, 1e30)
        bits = (z >= thresholds) != flips
        assert torch.equal(bits, torch.relu(norm(z[:, :, None, None]))[:, :, 0, 0] >= layer.thresholds[:, None])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        x = self.first(x)
        for i in (0, 2):
            h = self.convs[i](F.relu(self.norms[i](x)))
            x = x + self.convs[i + 1](torch.relu(self.norms[i + 1](h)))
        return self.last(x.mean((2, 3)))


def test_sums_stay_float_in_a_fused_residual_network():
    x = torch.randn(16, 1, 8, 8)
    model = abcnets.calibrate(abcnets.convert(Residual().eval(), 2, 2), x, progress=False)
    packed = abcnets.pack(model, engine="bits")
    fused = abcnets.fuse(packed)
    torch.testing.assert_close(fused(x), packed(x), rtol=1e-5, atol=1e-5)  # the mean adds up in another order
    layers = [m for m in fused.modules() if isinstance(m, PackedLayer)]
    assert [layer.out_thresholds is not None for layer in layers] == [True, False, True, False]
    (chain,) = (m for m in fused.modules() if isinstance(m, abcnets.PackedChain))
    assert [step for step in chain.steps if isinstance(step, PackedLayer)] == layers
    assert sum(isinstance(step, abcnets.ChainSum) for step in chain.steps) == 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def test_a_norm_wanted_in_float_folds_into_the_convolution():
    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(c, 16, 3, padding=1, bias=c < 2) for c in (1, 16, 16))
            self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
            self.last = nn.Linear(16, 10)

        def forward(self, x):
            x = F.relu(self.norms[0](self.convs[0](x)))
            for conv, norm in zip(self.convs[1:], self.norms[1:]):
                x = F.relu(x + norm(conv(x)))
            return self.last(x.mean((2, 3)))

    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8)
    network = Post().eval()
    for norm in network.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    packed = abcnets.pack(abcnets.calibrate(abcnets.convert(network, 2, 2), x, progress=False))
    fused = abcnets.fuse(packed)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    close = (fused(x) - packed(x)).abs().amax(1) < 1e-4
    assert close.float().mean() > 0.9  # rounding may put a value on the other side of a threshold


def test_fuse_says_what_it_can_not_trace():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ABCConv2d(1, 2, 3, active=True)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="torch.fx"):
        abcnets.fuse(abcnets.pack(Branching()))


def test_a_fused_model_says_what_it_is_not_for(packed, tmp_path):
    packed[3].engine = "bits"
    x = torch.randn(3, 1, 8, 8)
    fused = abcnets.fuse(packed)
    y = fused(x)
    for layer in fused.modules():
        if isinstance(layer, PackedLayer):
            layer.engine = "float"  # which knows no folded thresholds: they stay bits
    assert torch.equal(fused(x), y)
    with pytest.raises(RuntimeError, match="was folded by fuse"):
        fused.load_state_dict(fused.state_dict())
    assert torch.equal(fused(x), y)
    with pytest.raises(ValueError, match="is fused already"):
        abcnets.fuse(fused)
    with pytest.raises(ValueError, match="made anew"):
        abcnets.save_packed(fused, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


# What is kept between calls


@pytest.fixture(params=["bits", "float"])
def pair(request):
    """An ABC layer, its packed form on either engine, and an input."""
    torch.manual_seed(0)
    layer = ABCConv2d(40, 24, 3, padding=1, weight_bases=2, activation_bases=2, active=True)
    return layer.requires_grad_(False), abcnets.pack(layer, engine=request.param), torch.randn(2, 40, 6, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_is_no_matter(pair, dtype):
    layer, packed, x = pair
    expected = packed(x)
    torch.set_default_dtype(dtype)
    try:
        for _ in range(20):
            assert torch.equal(packed(x), expected)
        with torch.device("meta"):
            assert torch.equal(packed(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


class Surroundings:
    """A default device or dtype, for as long as the with statement lasts."""

    def __init__(self, default):
        self.default = default

    def __enter__(self):
        set = torch.set_default_device if self.default == "meta" else torch.set_default_dtype
        set(self.default)

    def __exit__(self, *_):
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16])
def test_default_devices_and_dtypes_are_no_matter_to_whole_models(default, tmp_path):
    """What is computed or kept for ever names its device and dtype."""
    network, x, path = small(), torch.randn(20, 1, 8, 8), tmp_path / "model.safetensors"

    def everything():
        model = abcnets.calibrate(abcnets.convert(network, 3, 2, us=[-0.7, 0.1, 0.6]), x, progress=False)
        packed = abcnets.pack(model, engine="bits")
        abcnets.save_packed(packed, path)
        outputs = [each(x) for each in (model, packed, abcnets.load_packed(path, network), abcnets.fuse(packed))]
        tables = str(abcnets.summary(packed, x)), str(abcnets.plan(network))
        return model.state_dict(), packed.state_dict(), dict(enumerate(outputs)), tables

    expected = everything()
    abcnets._start_activations.cache_clear()
    with Surroundings(default):
        found = everything()
    again = everything()
    for results in (found, again):
        assert results[3] == expected[3]
        for some, others in zip(results[:3], expected[:3]):
            for name, tensor in some.items():
                assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def test_the_mode_of_the_first_call_is_no_matter(pair):
    layer, packed, x = pair
    first = copy.deepcopy(packed)
    with torch.autocast("cpu", torch.bfloat16):
        first(x)
    assert torch.allclose(first(x), layer(x), atol=1e-5)
    first = copy.deepcopy(packed)
    with torch.inference_mode():
        first(x)
    trainable = nn.Conv2d(40, 40, 1)
    assert torch.allclose(nn.Sequential(trainable, first)(x), layer(trainable(x)), atol=1e-5)
    first = copy.deepcopy(packed)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert first(mode.from_tensor(x)).shape == (2, 24, 6, 6)
    assert torch.allclose(first(x), layer(x), atol=1e-5)


CHANGES = {
    "bits": torch.bitwise_not,
    "alphas": lambda t: 2 * t,
    "betas": lambda t: 3 * t,
    "thresholds": lambda t: t + 0.3,
    "bias": lambda t: t - 1,
}  # fmt: skip


def in_place(packed, name, value):
    getattr(packed, name).copy_(value)


def replaced(packed, name, value):
    setattr(packed, name, value)


def by_data(packed, name, value):
    getattr(packed, name).data.copy_(value)
    packed.refresh()


def by_numpy(packed, name, value):
    getattr(packed, name).numpy()[...] = value
    packed.refresh()


@pytest.mark.parametrize("change", [in_place, replaced, by_data, by_numpy])
@pytest.mark.parametrize("parameters", [False, True], ids=["buffers", "parameters"])
def test_changed_tensors_are_seen(pair, change, parameters):
    _, packed, x = pair
    if parameters:
        for name in CHANGES:
            setattr(packed, name, nn.Parameter(getattr(packed, name), requires_grad=False))
    before = packed(x)
    for name in CHANGES:
        value = CHANGES[name](getattr(packed, name).detach())
        change(packed, name, nn.Parameter(value, requires_grad=False) if parameters else value)
        y = packed(x)
        assert not torch.equal(y, before) and torch.equal(y, copy.deepcopy(packed)(x)), name
        before = y


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_stand_in_for_a_call_count_for_that_call(pair, name):
    _, packed, x = pair
    before, state = packed(x), packed.state_dict()
    changed = copy.deepcopy(packed)
    in_place(changed, name, CHANGES[name](getattr(packed, name)))
    state[name] = getattr(changed, name).clone()
    y = torch.func.functional_call(packed, state, x)
    assert torch.equal(y, changed(x)) and not torch.equal(y, before)
    assert torch.equal(packed(x), before)


@pytest.mark.parametrize("parameters", [False, True], ids=["buffers", "parameters"])
def test_tensors_made_in_inference_mode_count_no_changes_but_are_refreshed(pair, parameters):
    _, packed, x = pair
    with torch.inference_mode():
        packed = copy.deepcopy(packed)
        if parameters:
            packed.alphas = nn.Parameter(packed.alphas)
    assert packed.bits.is_inference() and packed.alphas.is_inference()
    packed(x)
    for name in CHANGES:
        with torch.inference_mode():
            in_place(packed, name, CHANGES[name](getattr(packed, name)))
        address = getattr(packed, name).data_ptr()
        packed.refresh()
        assert getattr(packed, name).data_ptr() == address  # whoever else has that memory still sees the layer
        assert torch.equal(packed(x), copy.deepcopy(packed)(x)), name
    with torch.inference_mode():  # as does load_state_dict, which copies
        packed.load_state_dict({name: 2 * value for name, value in packed.state_dict().items()})
    assert torch.equal(packed(x), copy.deepcopy(packed)(x))
    assert isinstance(packed.alphas, nn.Parameter) == parameters


def test_layers_that_share_a_tensor_are_refreshed_by_either(pair):
    _, packed, x = pair
    twin = copy.deepcopy(packed)
    twin.bits, twin.alphas = packed.bits, packed.alphas
    before = packed(x), twin(x)
    by_data(packed, "alphas", 2 * packed.alphas)
    assert torch.equal(packed(x), twin(x)) and not torch.equal(packed(x), before[0])
    assert twin.alphas is packed.alphas


@pytest.mark.parametrize("engine", ["bits", "float"])
def test_compiled_layers_see_what_is_replaced_or_refreshed(engine):
    torch._dynamo.reset()
    layer = ABCConv2d(12, 8, 3, weight_bases=2, activation_bases=2, active=True).requires_grad_(False)
    packed, x = abcnets.pack(layer, engine=engine), torch.randn(2, 12, 5, 5)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    compiled(x)
    for change in (replaced, by_data, in_place):
        if change is in_place and engine == "float":
            continue  # as documented: a compiled model does not look at a tensor's version
        for name in ("bits", "alphas", "thresholds"):
            change(packed, name, CHANGES[name](getattr(packed, name)))
            assert torch.allclose(compiled(x), copy.deepcopy(packed)(x), rtol=1e-4, atol=1e-4), (change, name)


def test_fused_layers_see_changes_of_all_that_is_not_folded():
    x = torch.randn(8, 1, 16, 16)
    packed = abcnets.pack(abcnets.calibrate(abcnets.convert(deep(), 2, 2), x, progress=False), engine="bits")
    fused = abcnets.fuse(packed)
    before = fused(x)
    for change in (in_place, by_data):
        for layer in [m for m in fused.modules() if isinstance(m, PackedLayer)]:
            for name, tensor in list(layer.named_buffers()):
                if name != "thresholds" and tensor.is_floating_point():  # of which other ones were made
                    change(layer, name, tensor * 1.1 + 0.1)
            y = fused(x)
            assert not torch.equal(y, before) and torch.equal(y, copy.deepcopy(fused)(x))
            before = y


@pytest.mark.parametrize("name", ["bits", "alphas", "thresholds"])
def test_threads_call_while_tensors_change(pair, one_thread, name):
    """One number goes back and forth, in every way there is: each call computes with the one or the other."""
    _, packed, x = pair
    values = [getattr(packed, name).clone() for _ in range(2)]
    values[1].view(-1)[0] = values[1].view(-1)[0] + 1
    right = []
    for value in values:
        twin = copy.deepcopy(packed)
        in_place(twin, name, value)
        right.append(twin(x))
    assert not torch.equal(*right)
    wrong, done = [], threading.Event()

    def call():
        try:
            while not done.is_set():
                y = packed(x)
                if not any(torch.equal(y, answer) for answer in right):
                    wrong.append(y)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=call) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for worker in workers:
            worker.start()
        for step in range(32):
            change = (in_place, by_data, replaced, by_numpy)[step // 2 % 4]
            change(packed, name, values[step % 2].clone())
            if not torch.equal(packed(x), right[step % 2]):
                wrong.append((step, change))
    finally:
        done.set()
        for worker in workers:
            worker.join()
        sys.setswitchinterval(interval)
    assert not wrong
    assert torch.equal(packed(x), right[1])


def test_unpacked_weights_on_cuda_streams(monkeypatch):
    """As kernels/cuda/kept.py has it for tables; there is no GPU here, so torch's part is played by stand-ins."""
    told, streams = [], [SimpleNamespace(synchronize=lambda: told.append("finished")), "another"]
    capturing = [False]
    packed = abcnets.pack(ABCLinear(8, 4, active=True), engine="float")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: told.append(stream), raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    Wq = packed._float_weight()
    assert packed._float_weight() is Wq and told == ["finished"]
    streams.reverse()
    assert packed._float_weight() is Wq and told == ["finished", "another"]
    capturing[0] = True
    assert packed._float_weight() is Wq
    packed.alphas.mul_(2)
    assert packed._float_weight() is not packed._float_weight()  # made in a graph, and kept for none
    held, Wq, streams[0], capturing[0] = weakref.ref(Wq), None, streams[1], False
    packed._float_weight()
    assert held() is not None
    packed.bits = packed.bits.clone()
    packed._float_weight()
    assert held() is None


def test_what_is_moved_or_loaded_is_seen(pair):
    _, packed, x = pair
    packed(x)
    empty = copy.deepcopy(packed).to_empty(device="cpu")
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(empty(x), packed(x))
    for name in CHANGES:  # parameters stay the same tensors when a model is moved or cast
        setattr(packed, name, nn.Parameter(getattr(packed, name), requires_grad=False))
    y = packed(x)
    packed.bfloat16().float()
    assert not torch.equal(packed(x), y) and torch.equal(packed(x), copy.deepcopy(packed)(x))


def test_copies_and_pickles_hold_no_unpacked_weights(pair):
    _, packed, x = pair
    before = len(pickle.dumps(packed))
    y = packed(x)
    assert len(pickle.dumps(packed)) == before
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), y)


def test_an_old_pickle_is_refused_in_one_sentence(pair):
    _, packed, _ = pair
    old = copy.deepcopy(packed)
    del old.weight_bases, old.activation_bases  # of which it made tensors' lengths
    content = pickle.dumps(old)
    with pytest.raises(ValueError, match="pickled by an older abcnets"):
        pickle.loads(content)


def test_a_model_of_which_only_norms_were_folded_is_fused_too(tmp_path):
    x = torch.randn(8, 1, 16, 16)
    packed = abcnets.pack(abcnets.calibrate(abcnets.convert(deep(), 2, 2), x, progress=False), engine="float")
    fused = abcnets.fuse(packed)
    assert torch.allclose(fused(x), packed(x), atol=1e-3)
    with pytest.raises(RuntimeError, match="was folded by fuse"):
        fused.load_state_dict(packed.state_dict(), strict=False)
    for refuse in (abcnets.fuse, lambda model: abcnets.save_packed(model, tmp_path / "model.safetensors")):
        with pytest.raises(ValueError, match="fused"):
            refuse(fused)


def test_no_gradient_passes_and_a_buffer_may_be_a_parameter(pair):
    _, packed, x = pair
    expected = packed(x)
    y = packed(x.clone().requires_grad_())
    assert not y.requires_grad and torch.equal(y, expected)
    for name in ("alphas", "betas", "thresholds", "bias"):
        for requires_grad in (False, True):
            twin = copy.deepcopy(packed)
            setattr(twin, name, nn.Parameter(getattr(packed, name).clone(), requires_grad=requires_grad))
            y = twin(x)
            assert not y.requires_grad and torch.equal(y, expected)


def test_a_module_of_the_users_may_be_called_fused(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fused = nn.Conv2d(1, 4, 1), ABCConv2d(4, 4, 3, active=True)

        def forward(self, x):
            return self.fused(self.first(x))

    packed, x = abcnets.pack(Named().eval()), torch.randn(2, 1, 6, 6)
    abcnets.save_packed(packed, tmp_path / "model.safetensors")
    assert torch.allclose(abcnets.fuse(packed)(x), packed(x), atol=1e-4)
