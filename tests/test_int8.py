"""ONNX files with 8-bit activations: ONNX Runtime computes in integers what torch simulates, from small files."""

import collections
import subprocess
import sys

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from test_export import Everything
from torch import nn

import abcnets
from abcnets import ABCConv2d
from kernels import export, int8

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter about torch's own code


def exported(model, images, path, calibration=None):
    """(a function: images -> what torch simulates, what ONNX Runtime puts out of the file), and the report."""
    calibration = [images] if calibration is None else calibration
    program, report = export.int8_program(abcnets, model, images[:1], calibration)
    export.write(abcnets, program, path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    simulation = program.module()

    def both(x):
        with torch.no_grad():
            return simulation(x), torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    return both, report


def optimized(path, folder):
    """The operators that ONNX Runtime makes of a file, counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def stored(path):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def distance(y, expected):
    """Root mean square of the difference, in parts of the expected values' deviation."""
    return ((y - expected).square().mean().sqrt() / expected.std()).item()


def randomized(network):
    """With BatchNorms that move what they are given, in both directions."""
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.2, 1.0)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return network.eval()


def weights_only(network, images, M=1, code="thermometer"):
    binary = abcnets.convert(network, M, None, code=code)
    return abcnets.calibrate(binary, images, compensate=False, progress=False).eval()


@pytest.fixture(scope="module")
def trained(digits, nine_layer, tmp_path_factory):
    """The nine-layer network with binary weights and no more, trained as float, on digits; and its file."""
    images = next(iter(digits.calibration_batches(256))).contiguous()
    model = weights_only(nine_layer, images, 2)
    path = tmp_path_factory.mktemp("trained") / "model.onnx"
    report = abcnets.export_onnx(model, images[:1], path, activations="int8", calibration=[images])
    return model, path, report, images


# The whole of it


def test_every_convolution_of_a_network_becomes_an_integer_one(trained, tmp_path, capfd):
    model, path, report, images = trained
    counts = optimized(path, tmp_path)
    assert counts["QLinearConv"] == 9 and counts["QGemm"] == 1
    assert not {"Conv", "Gemm", "BatchNormalization", "DequantizeLinear"} & set(counts)
    assert [row["stored"] for row in report] == ["int8", *["bits"] * 8, "int8"]
    assert {row["runs"] for row in report} == {"int8"} and "bits" in str(report)
    capfd.readouterr()
    onnxruntime.InferenceSession(path)
    assert capfd.readouterr() == ("", "")


def test_the_file_holds_bits_and_no_second_copy_of_them(trained, tmp_path):
    model, path, _, _ = trained
    packed = abcnets.pack(model)
    tensors = stored(path)
    layers = {n: layer for n, layer in packed.named_modules() if isinstance(layer, abcnets.PackedLayer)}
    for name, layer in layers.items():
        assert np.array_equal(tensors[f"{name}.int8.weight.bits"], layer.bits.numpy())
    bits = sum(layer.bits.numel() for layer in layers.values())
    rest = sum(array.nbytes for name, array in tensors.items() if not name.endswith((".bits", ".integers")))
    assert rest < 8_000  # scales, levels and biases of 490 channels; one layer's weights are 36,864 numbers
    others = 16 * 9 + 576 * 10  # weights of the first and the last layer
    assert path.stat().st_size < bits + others + rest + 21_000  # operators
    abcnets.save_packed(packed, tmp_path / "model.safetensors")
    assert path.stat().st_size < (tmp_path / "model.safetensors").stat().st_size


def test_it_is_as_accurate_as_with_float_activations(trained, digits):
    """Of all digits: of the 500 test images alone, some near two classes, a few more or less would say nothing."""
    model, path, _, _ = trained
    images = [digits.test_images, digits.train_images, digits.validation_images]
    labels = torch.cat([digits.test_labels, digits.train_labels, digits.validation_labels])
    x = digits.normalize(torch.cat(images).permute(0, 2, 3, 1)).contiguous()
    with torch.no_grad():
        y = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})[0])
        before, after = (100 * (z.argmax(1) == labels).float().mean().item() for z in (model(x), y))
    assert before > 50 and abs(before - after) <= 0.8


ALONE = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(None, {"input": np.load("images.npy")})
np.save("logits.npy", logits)
assert not {"torch", "abcnets", "onnx"} & set(sys.modules)
"""


def test_the_file_runs_where_there_is_no_torch(trained, tmp_path):
    model, path, _, images = trained
    np.save(tmp_path / "images.npy", images[:7].numpy())
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    done = subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    with torch.no_grad():
        assert distance(logits, model(images[:7])) < 0.1


# Weights


@pytest.mark.parametrize("M, code", [(1, "thermometer"), (2, "thermometer"), (7, "thermometer"), (8, "thermometer"),
                                     (2, "binary"), (3, "binary"), (3, "uniform")])  # fmt: skip
def test_rounded_weights_are_as_near_as_promised(M, code):
    """Exact for one base; off by half a 64th of a channel's largest for more."""
    torch.manual_seed(M)
    layer = ABCConv2d(5, 6, (3, 2), groups=1, weight_bases=M, activation_bases=None, code=code, active=True)
    nn.init.constant_(layer.weight[4], 0.0)
    packed = abcnets.pack(layer)
    Wq = abcnets._unpack_weight(packed.bits, packed.alphas, 5)
    taken = int8._Layer(abcnets, Wq, packed.bias, ([1, 1], [0, 0], [1, 1], 1), packed.bits, packed.alphas)
    made = taken.quantized(0.02)
    integers, top = made.weight(), Wq.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    assert integers.dtype == torch.int8 and integers.shape == Wq.shape
    W = integers * made.scale.view(-1, 1, 1, 1)
    assert ((W - Wq).abs() <= top * (1e-6 if M == 1 else 0.5001 / 64)).all()
    assert hasattr(made.weight, "bits") == (M < 8)
    bias = made.bias.double() * made.bias_scale
    assert ((bias - packed.bias).abs() <= 0.5001 * made.bias_scale).all()
    assert integers.abs().max() <= 64  # two products with codes up to 255 fit into 16 bits


def test_no_sum_of_two_products_exceeds_16_bits(trained):
    """Which is where AVX2 adds them, and saturates: a code of at most 255 times a weight, twice."""
    weights = [values.astype(int) for values in stored(trained[1]).values() if values.dtype == np.int8]
    assert len(weights) >= 10 and 2 * 255 * max(np.abs(values).max() for values in weights) < 2**15


def test_a_large_bias_beside_weights_of_nothing_fits_into_its_integer():
    made = int8._Layer(abcnets, torch.full((1, 4), 1e-9), torch.tensor([1e3]), ()).quantized(1e-3)
    assert made.bias.dtype == torch.int32 and abs(made.bias * made.bias_scale - 1e3).item() < 1e-2


# Activations


@pytest.mark.parametrize("N, code", [(1, "thermometer"), (2, "uniform"), (3, "thermometer"), (2, "binary")])
def test_codes_of_activations_are_rounded_levels(N, code):
    torch.manual_seed(N)
    layer = abcnets.ABCLinear(3, 3, weight_bases=1, activation_bases=N, code=code, active=True)
    packed = abcnets.pack(layer)
    steps = abcnets._half_steps(packed.betas, len(packed.thresholds))
    staircase = int8._Staircase(packed.thresholds, steps, packed.zero)
    x = torch.cat([torch.linspace(-3, 3, 1001), packed.thresholds, torch.tensor([0.0, torch.inf, -torch.inf])])
    expected = layer.quantized_input(x[:, None].expand(-1, 3))[:, 0].detach()
    span = expected.max() - expected.min()
    exact = N == 1 or code == "uniform"
    assert (staircase(x) - expected).abs().max() <= span * (1e-6 if exact else 0.51 / 127)
    on_codes = staircase.on_codes(0.01, 100)
    q = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(on_codes(q), staircase(0.01 * (q.float() - 100)))


@pytest.mark.parametrize("N, code", [(1, "thermometer"), (2, "binary")])
def test_codes_on_both_sides(N, code, tmp_path, digits, nine_layer):
    images = next(iter(digits.calibration_batches(256))).contiguous()
    model = abcnets.calibrate(abcnets.convert(nine_layer, 2, N, code=code), images, compensate=False, progress=False)
    both, _ = exported(model, images, tmp_path / "model.onnx")
    counts = optimized(tmp_path / "model.onnx", tmp_path)
    assert counts["QLinearConv"] == 9 and counts["QGemm"] == 1 and "DequantizeLinear" not in counts
    simulated, y = both(images[:64])
    with torch.no_grad():
        expected = model(images[:64])
    assert distance(y, simulated) < 0.1
    if N > 1:  # with one base and no training a value beside a threshold decides about the image
        assert (y.argmax(1) == expected.argmax(1)).float().mean() > 0.8


def test_float_weights_behind_a_code(tmp_path):
    torch.manual_seed(0)
    options = {"weight_bases": None, "activation_bases": 2, "code": "binary", "active": True}
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), ABCConv2d(8, 8, 3, padding=1, **options)))
    x = torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last)
    both, report = exported(model, x, tmp_path / "model.onnx")
    simulated, y = both(x)
    with torch.no_grad():
        assert distance(y, simulated) < 0.01 and distance(y, model(x)) < 0.1
    assert [(row["stored"], row["runs"]) for row in report] == [("int8", "int8")] * 2
    assert model[2].active and optimized(tmp_path / "model.onnx", tmp_path)["QLinearConv"] == 2


# Models


def test_every_geometry(tmp_path):
    """Groups, strides, dilation, lopsided padding, circular padding, 1-D, 3-D, linear in the last dimension."""
    torch.manual_seed(0)
    model = Everything().eval()
    x = torch.randn(8, 6, 7, 9)
    both, report = exported(model, x, tmp_path / "model.onnx")
    simulated, y = both(x)
    assert y.shape == simulated.shape and distance(y, simulated) < 0.01
    with torch.no_grad():
        assert distance(y, model(x)) < 0.15
    counts = optimized(tmp_path / "model.onnx", tmp_path)
    assert counts["QLinearConv"] == 6 and counts["QGemm"] == 1 and not {"Conv", "Gemm", "MatMul"} & set(counts)
    assert {row["layer"]: row["stored"] for row in report}["volume"] == "bits"
    simulated, y = both(x[:1])
    assert distance(y, simulated) < 0.01


class Residual(nn.Module):
    """A sum of two convolutions, one of a convolution and what came in, and what has no int8 form."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(8, 16, 1, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        self.same = nn.Conv2d(16, 16, 3, padding="same")
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.up, self.last = nn.ConvTranspose2d(16, 4, 2, 2), nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.relu_(self.norms[0](self.left(x)) + self.norms[1](self.right(x)))
        x = F.relu6(x + self.norms[2](self.same(x)))
        x = F.relu(self.norms[3](F.max_pool2d(self.depthwise(x), 2, 1)))
        return self.last(F.silu(self.up(x)).movedim(1, -1))


def test_sums_norms_and_what_stays_float(tmp_path):
    torch.manual_seed(0)
    network, x = randomized(Residual()), torch.randn(16, 3, 10, 10)
    model = abcnets.convert(network, 1, None)
    both, report = exported(model.eval(), x, tmp_path / "model.onnx", [x[:7], (x[7:], "labels")])
    simulated, y = both(x)
    assert y.shape == (16, 8, 8, 5) and distance(y, simulated) < 0.02
    with torch.no_grad():
        assert distance(y, model(x)) < 0.05
    counts = optimized(tmp_path / "model.onnx", tmp_path)
    assert counts["QLinearConv"] == 6 and counts["QLinearAdd"] == 2 and counts["QGemm"] == 1  # one norm is a layer
    assert "BatchNormalization" not in counts
    assert "conv_transpose2d" in str(report) and "no int8 form here" in str(report)
    floats = {row["layer"]: row["kind"] for row in report if row["runs"] == "float"}
    assert floats == {"up": "conv_transpose2d", "silu": "silu"}
    kept = {row["layer"]: row["stored"] for row in report if row["runs"] == "int8"}
    assert kept == dict.fromkeys(["left", "right", "same"], "bits") | dict.fromkeys(
        ["first", "depthwise", "norms.3", "last"], "int8")  # fmt: skip


def test_norms_first_as_in_the_network_for_cifar(tmp_path):
    """What comes before a norm is a sum, which others read too: the norm becomes a depthwise convolution."""
    torch.manual_seed(0)
    network, x = randomized(networks.resnet20()[:6]), torch.randn(8, 3, 16, 16)
    model = abcnets.convert(network, 1, None)
    both, _ = exported(model, x, tmp_path / "model.onnx")
    simulated, y = both(x)
    counts = optimized(tmp_path / "model.onnx", tmp_path)
    assert "BatchNormalization" not in counts and "Conv" not in counts and counts["QLinearAdd"] == 5
    assert distance(y, simulated) < 0.03
    with torch.no_grad():
        assert distance(y, model(x)) < 0.1


def test_resnet_18(tmp_path):
    """Of torchvision. Its thousand classes have half a million weights: in int8 too, but kept as bits of four bases."""
    networks.import_torchvision()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network, x = randomized(resnet18()), torch.randn(8, 3, 64, 64)
    settings = {"fc": {"weight_bases": 4, "activation_bases": None}}
    model, path = abcnets.convert(network, 1, None, settings=settings).eval(), tmp_path / "model.onnx"
    both, report = exported(model, x, path)
    simulated, y = both(x)
    with torch.no_grad():
        assert distance(y, simulated) < 0.05 and distance(y, model(x)) < 0.15
    counts = optimized(path, tmp_path)
    assert (counts["QLinearConv"], counts["QLinearAdd"], counts["QGemm"]) == (20, 8, 1) and "Conv" not in counts
    assert [row["stored"] for row in report if row["runs"] == "int8"] == ["int8", *["bits"] * 20]
    assert path.stat().st_size < 4 * sum(p.numel() for p in network.parameters()) / 25


def test_a_layer_that_is_called_twice_takes_in_two_norms(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ABCConv2d(4, 4, 3, weight_bases=2, activation_bases=None, active=True)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, x):
            return self.norms[1](self.conv(torch.relu(self.norms[0](self.conv(x)))))

    torch.manual_seed(0)
    model, x = randomized(Twice()), torch.randn(8, 4, 9, 9)
    both, report = exported(model, x, tmp_path / "model.onnx")
    simulated, y = both(x)
    with torch.no_grad():
        assert distance(y, simulated) < 0.02 and distance(y, model(x)) < 0.05
    assert [row["layer"] for row in report] == ["conv", "conv"]


def test_forms_that_have_been_packed_or_fused(tmp_path):
    """Packed is the same; fused is, where no bits go between layers, with scales that a norm has made negative."""
    torch.manual_seed(0)
    network = randomized(nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 3),
    ))  # fmt: skip
    x = torch.randn(16, 1, 8, 8)
    packed = abcnets.pack(weights_only(network, x, 2, "binary"))
    results = []
    for model in (packed, abcnets.fuse(packed)):
        both, _ = exported(model, x, tmp_path / "model.onnx")
        simulated, y = both(x)
        assert distance(y, simulated) < 0.02 and distance(y, packed(x)) < 0.05
        results.append(y)
    assert distance(*results) < 0.02
    binary = abcnets.convert(nn.Sequential(*[nn.Linear(70, 70) for _ in range(4)]), 1, 1)
    bits, x = abcnets.fuse(abcnets.pack(binary, engine="bits")), torch.ones(2, 70)
    with pytest.raises(ValueError, match="the packed model itself"):
        abcnets.export_onnx(bits, x, tmp_path / "bits.onnx", activations="int8", calibration=x)


# Refusals


def test_what_can_not_be_is_said_in_a_sentence(tmp_path):
    path, layer, x = tmp_path / "model.onnx", nn.Linear(3, 3), torch.ones(2, 3)

    def sentence(model=layer, example=x, activations="int8", calibration=x):
        with pytest.raises(ValueError) as refused:
            abcnets.export_onnx(model, example, path, activations=activations, calibration=calibration)
        assert not path.exists() and len(str(refused.value).splitlines()) == 1
        return str(refused.value)

    nan = torch.tensor([[1.0, torch.nan, 0.0]])
    assert "holds NaN" in sentence(calibration=[torch.ones(2, 3), nan])
    assert "at least one input to calibrate on" in sentence(calibration=[])
    assert "at least one input to calibrate on" in sentence(calibration=torch.ones(0, 3))
    assert "float32 (batch, 3); got torch.float32 (2, 4)" in sentence(calibration=[torch.ones(2, 4)])
    assert "got torch.float64 (2, 3)" in sentence(calibration=torch.ones(2, 3).double())
    assert "got float" in sentence(calibration=[[1.0, 2.0, 3.0]])
    assert "got 'int4'" in sentence(activations="int4")
    assert "calibration batches belong to" in sentence(calibration=None)
    assert "calibration batches belong to" in sentence(activations=None)
    assert "a model in float32, got torch.bfloat16" in sentence(model=nn.Linear(3, 3).bfloat16())
    assert "at least one example input, got (0, 3)" in sentence(example=torch.ones(0, 3))

    class Endless(nn.Module):
        def forward(self, x):
            return layer(1 / (x - 1))

    assert "not finite" in sentence(model=Endless())
    broken = nn.Linear(3, 3)
    nn.init.constant_(broken.weight[1], torch.inf)
    assert "weights that are not finite" in sentence(model=broken)
