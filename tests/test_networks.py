"""Whole networks, packed and fused, on the engines there are, against their float simulation."""

import os

import pytest
import torch
import torch.nn.functional as F
from networks import import_torchvision
from networks import nine_layer as new_nine_layer

import abcnets


def test_the_nine_layer_network_is_the_originals():
    network = new_nine_layer()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    sizes = [(m.in_channels, m.out_channels) for m in convolutions]
    assert sizes == [(1, 16), (16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64), (64, 64), (64, 64)]
    assert all(m.kernel_size == (3, 3) and m.padding == (1, 1) for m in convolutions)
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def thousand(digits):
    batches = digits.calibration_batches(1200, 100)
    return torch.cat(batches)[:1000]


def resnet18():
    import_torchvision()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=10).eval()


def outputs_and_distances(model, images):
    """Outputs, and for each image how near any activation comes to deciding otherwise, relative to its layer's largest.
    """
    nearest = torch.full((len(images),), float("inf"))

    def look(layer, inputs):
        for threshold in (t for t in 0.5 - layer.vs.detach() if t > 0):  # the others are met by all rectified values
            distance = (inputs[0] - threshold).abs().flatten(1).amin(1) / inputs[0].abs().max()
            torch.minimum(nearest, distance, out=nearest)

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, abcnets.ABCConv2d)]
    outputs = model(images)
    for handle in handles:
        handle.remove()
    return outputs, nearest


@pytest.mark.parametrize("network, M, N", [("nine", 1, 1), ("nine", 3, 3), ("resnet18", 2, 2)])
@torch.no_grad()
def test_a_packed_network_agrees_with_its_simulation(network, M, N, digits, nine_layer):
    x = thousand(digits)
    if network == "nine":
        model = nine_layer
    else:
        model, x = resnet18(), F.interpolate(x[:400], (32, 32)).expand(-1, 3, -1, -1).contiguous()
    model = abcnets.calibrate(abcnets.convert(model, M, N), x[:200], compensate=False, progress=False).eval()
    packed = abcnets.pack(model, engine="bits")
    parts = [outputs_and_distances(model, part) for part in x.split(100)]
    expected, distance = (torch.cat(each) for each in zip(*parts))
    for run in (packed, abcnets.fuse(packed)):
        y = torch.cat([run(part) for part in x.split(100)])
        error = (y - expected).abs().amax(1) / expected.abs().amax(1)
        # Sums rounded in another order can put a value on the other side of a threshold it all but lies on: such an
        # image may differ, and no other.
        differs = error > 1e-4
        assert differs.float().mean() < 0.03
        assert (distance[differs] < 1e-5).all()
        assert torch.equal(y.argmax(1)[~differs], expected.argmax(1)[~differs])


def test_resnet18_is_small_on_disk(tmp_path):
    model = resnet18()
    model.fc = torch.nn.Linear(512, 1000)
    torch.save(model.state_dict(), tmp_path / "float.pt")
    last = {"fc": {"weight_bases": 5, "activation_bases": None}}
    packed = abcnets.pack(abcnets.convert(model, 3, 3, settings=last))
    abcnets.save_packed(packed, tmp_path / "packed.safetensors")
    assert os.path.getsize(tmp_path / "float.pt") > 8 * os.path.getsize(tmp_path / "packed.safetensors")
    rows = [row for row in abcnets.summary(packed, torch.rand(1, 3, 64, 64)) if row["M"] == 3]
    packed_bytes, float_bytes = (sum(row[column] for row in rows) for column in ("packed_bytes", "float_bytes"))
    assert len(rows) == 19 and packed_bytes < 1.03 * 3 / 32 * float_bytes
