"""Models that leave eager PyTorch: ONNX files in ONNX Runtime, torch.export, torch.compile."""

import copy
import math
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import abcnets
from abcnets import ABCConv1d, ABCConv2d, ABCConv3d, ABCLinear


class Everything(nn.Module):
    """Every kind of layer and geometry, side by side on one image."""

    def __init__(self):
        super().__init__()
        bases = {"weight_bases": 2, "activation_bases": 3, "active": True}
        self.grouped = ABCConv2d(6, 9, 3, (2, 1), (0, 2), (1, 2), groups=3, **bases)
        self.lopsided = ABCConv2d(6, 5, (2, 4), padding="same", betas=[0.3, -0.2, 0.5], vs=[0.1, -0.4, 0.6], **bases)
        self.weights_only = ABCConv1d(6, 5, 4, padding=1, weight_bases=3, activation_bases=None, active=True)
        self.volume = ABCConv3d(3, 4, (1, 2, 3), (1, 2, 1), 1, bias=False, **bases)
        self.linear = ABCLinear(9, 17, weight_bases=1, activation_bases=1, active=True)
        self.circular = ABCConv2d(6, 5, 3, padding=1, padding_mode="circular", per_channel=False, **bases)
        self.inactive = ABCConv2d(6, 2, 3, **{**bases, "active": False})

    def forward(self, x):
        outputs = [self.grouped(x), self.lopsided(x), self.circular(x), self.linear(x), self.inactive(x),
                   self.weights_only(x.flatten(2)), self.volume(x.unflatten(1, (3, 2)))]  # fmt: skip
        return torch.cat([y.flatten(1) for y in outputs], 1)

    def special_input(self):
        """Images with values on a threshold (where sign(0) = +1), infinities and a NaN."""
        x = torch.randn(3, 6, 7, 9)
        special = torch.tensor([*(0.5 - self.grouped.vs.detach()), math.inf, -math.inf])
        x[1:] = torch.where(torch.rand(2, 6, 7, 9) < 0.2, special[torch.randint(5, (2, 6, 7, 9))], x[1:])
        x[2, 2, 3, 3] = math.nan
        return x


def chain(N=3, **code):
    """Layers one behind the other, with what `fuse` makes thresholds of; rising and falling channels."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 70, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(70), nn.ReLU(),
        nn.Conv2d(70, 64, 3, 2), nn.Flatten(), nn.Linear(64 * 4, 10),
    ).eval()  # fmt: skip
    nn.init.normal_(network[5].weight)
    images = torch.randn(5, 1, 14, 14)
    return abcnets.calibrate(abcnets.convert(network, 2, N, **code), images, progress=False), images


FORMS = {
    "simulation": lambda model: model,
    "bits": lambda model: abcnets.pack(model, engine="bits"),
    "float": lambda model: abcnets.pack(model, engine="float"),
    "fused": lambda model: abcnets.fuse(abcnets.pack(model, engine="bits")),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


# ONNX


def in_onnxruntime(path, x):
    session = onnxruntime.InferenceSession(path)
    assert [i.shape[1:] for i in session.get_inputs()] == [list(x.shape[1:])]
    return torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])


@pytest.mark.parametrize("form", ["simulation", "bits"])
def test_every_geometry_puts_out_in_onnxruntime_what_it_does_in_torch(form, tmp_path):
    torch.manual_seed(0)
    model = Everything()
    x = model.special_input()
    exported = FORMS[form](model)
    before = copy.deepcopy(exported.state_dict())
    abcnets.export_onnx(exported, torch.randn(1, 6, 7, 9), tmp_path / "model.onnx")
    assert exported.training == (form == "simulation")
    for name, value in exported.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        expected = exported.eval()(x)
    for rows in (slice(0, 3), slice(0, 1)):
        y = in_onnxruntime(tmp_path / "model.onnx", x[rows])
        assert y.shape == expected[rows].shape
        assert torch.allclose(y, expected[rows], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert expected.isnan().any() and not expected.isnan().all()


CODED = [("fused", "binary"), ("float", "binary"), ("simulation", ("uniform", "binary"))]


@pytest.mark.parametrize("form, code", CODED)
def test_codes_put_out_in_onnxruntime_what_they_do_in_torch(form, code, tmp_path):
    """With falling channels, a max-pool of digits and a level of zero."""
    model, images = chain(2, code=code)
    exported = FORMS[form](model)
    abcnets.export_onnx(exported, images, tmp_path / "model.onnx")
    y = in_onnxruntime(tmp_path / "model.onnx", images)
    assert torch.allclose(y, exported(images), atol=1e-4) and torch.allclose(y, model(images), atol=1e-3)


@pytest.mark.parametrize("form", ["float", "fused"])
def test_packed_weights_stay_bits_in_the_file(form, tmp_path):
    model, images = chain()
    exported = FORMS[form](model)
    path = tmp_path / "model.onnx"
    abcnets.export_onnx(exported, images, path)
    assert torch.allclose(in_onnxruntime(path, images), exported(images), atol=1e-4)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    for name, layer in exported.named_modules():
        if isinstance(layer, abcnets.PackedLayer):
            assert np.array_equal(stored[f"{name}.bits"], layer.bits.numpy())
    abcnets.save_packed(abcnets.pack(model), tmp_path / "model.safetensors")
    large = sum(array.nbytes for array in stored.values()) - (tmp_path / "model.safetensors").stat().st_size
    assert large < 2000  # a header's worth; one unpacked layer would be 20 kB and more


def test_linear_layers_of_more_dimensions_are_exported_and_compiled(tmp_path):
    """Every transformer's MLP: Linear, ReLU, Linear on (B, T, C)."""
    torch.manual_seed(0)
    first, second = ABCLinear(70, 66, active=True), ABCLinear(66, 5, active=True)
    exported, x = FORMS["fused"](nn.Sequential(first, nn.ReLU(), second).eval()), torch.randn(2, 3, 70)
    expected = exported(x)
    abcnets.export_onnx(exported, x, tmp_path / "model.onnx")
    assert torch.allclose(in_onnxruntime(tmp_path / "model.onnx", x), expected, atol=1e-4)
    assert torch.allclose(torch.export.export(exported, (x,)).module()(x), expected, atol=1e-4)
    assert torch.allclose(torch.compile(exported, fullgraph=True)(x), expected, atol=1e-4)


def test_what_can_not_be_exported_is_said_in_a_sentence(tmp_path, monkeypatch):
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    path = tmp_path / "model.onnx"
    path.write_text("what was there before")
    with pytest.raises(ValueError, match="torch.export, which failed"):
        abcnets.export_onnx(Branching(), torch.ones(2, 3), path)
    for example, got in ((torch.ones(0, 3), r"\(0, 3\)"), ([1.0], "list")):
        with pytest.raises(ValueError, match=f"at least one example input, got {got}"):
            abcnets.export_onnx(nn.Identity(), example, path)

    def full_disk(program, path, **_):
        open(path, "w").write("half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        abcnets.export_onnx(nn.Linear(3, 3), torch.ones(2, 3), path)
    monkeypatch.setitem(sys.modules, "onnxscript.optimizer", None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        abcnets.export_onnx(nn.Identity(), torch.ones(2, 3), path)
    assert path.read_text() == "what was there before" and list(tmp_path.iterdir()) == [path]


# torch.export


@pytest.mark.parametrize("form", FORMS)
def test_exported_programs_put_out_the_same_after_a_file_too(form, tmp_path):
    model, images = chain()
    model = FORMS[form](model)
    with torch.no_grad():
        expected = model(images)
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        assert torch.allclose(program.module()(images), expected, atol=1e-6)
        assert torch.allclose(loaded.module()(images[:2]), expected[:2], atol=1e-6)
    if form != "simulation":  # packed: not what the bits unpack to
        stored = [*program.state_dict.values(), *program.constants.values()]
        assert max(t.numel() * t.element_size() for t in stored if isinstance(t, torch.Tensor)) < 15_000


# torch.compile


@pytest.mark.parametrize("form", FORMS)
def test_compiled_inference_is_one_graph(form):
    model, images = chain()
    model = FORMS[form](model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(images)
        for _ in range(2):
            assert torch.allclose(compiled(images), expected, atol=1e-6)


def test_a_compiled_training_step_is_one_graph_with_the_same_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(
        ABCConv2d(3, 6, 3, weight_bases=3, activation_bases=3, learn_us=True), nn.BatchNorm2d(6),
        ABCConv2d(6, 4, 3, weight_bases=2, activation_bases=None), nn.ReLU(),
        ABCConv2d(4, 4, 3, weight_bases=None, activation_bases=2), nn.Flatten(), ABCLinear(36, 5),
    )  # fmt: skip
    abcnets.binarize(model)
    x = torch.randn(7, 3, 9, 9)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        y = forward(inputs)
        y.square().mean().backward()
        results.append([y, inputs.grad, *(p.grad for p in model.parameters())])
    for eager, compiled in zip(*results):
        assert eager.abs().max() > 0 or eager.ndim == 1
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-6)


def test_the_compiled_staircase_at_its_edges():
    vs, betas = torch.tensor([0.2, -0.7, 0.1]), torch.tensor([0.5, -0.3, 0.4])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        R = torch.tensor([*(0.5 - vs), math.inf, -math.inf, math.nan, 0.0, -3.0, 2.0]).to(dtype)
        compiled = torch.compile(abcnets.quantize_activation, fullgraph=True, backend="aot_eager")(R, vs, betas)
        expected = abcnets.quantize_activation(R, vs, betas)
        assert compiled.dtype == dtype and torch.allclose(compiled, expected, equal_nan=True)
