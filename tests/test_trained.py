"""notebooks/trained/: each network that comes with the repository is that of a row, and as accurate as the row says."""

import budget
import pytest
from data import load_data
from files import RESULTS, ROOT, TRAINED
from networks import nine_layer, resnet20
from runs import main_runs, setting_of, trained_file
from training import accuracy, load_weights

import abcnets

NETWORKS = {"fashion-mnist": (nine_layer, ROOT / "data/FashionMNIST"),
            "cifar10-jpeg": (lambda: resnet20(3), ROOT / "data/cifar10-jpeg")}  # fmt: skip
ROWS = {trained_file(row["run"]): row for dataset in NETWORKS for row in main_runs(RESULTS, dataset).to_dict("records")}
FILES = sorted(TRAINED.iterdir())


def load(path):
    network, _ = NETWORKS[ROWS[path]["dataset"]]
    M, N, _ = setting_of(ROWS[path])
    return abcnets.load_packed(path, network()) if M or N else load_weights(network(), path)


@pytest.mark.skipif(not abcnets.multiplies_bytes(), reason="no AVX-512 VNNI")
@pytest.mark.parametrize("path", [path for path in FILES if "-N" in path.stem], ids=lambda path: path.stem)
@pytest.mark.usefixtures("one_thread")
def test_the_first_layer_in_int8_costs_next_to_nothing(path):
    _, folder = NETWORKS[ROWS[path]["dataset"]]
    if not folder.exists():
        pytest.skip(f"{folder.relative_to(ROOT)} is missing")
    model, data = load(path), load_data(ROWS[path]["dataset"])
    whole, eight_bits = (abcnets.fuse(model, rest=rest) for rest in ("float", "int8"))
    assert any(isinstance(module, abcnets.EightBitConv) for module in eight_bits.modules())
    percent = [accuracy(each, data) for each in (whole, eight_bits)]
    assert round(abs(percent[1] - percent[0]), 2) <= 0.2  # 20 of 10,000 images


def test_every_file_is_small_and_has_a_row():
    assert FILES and set(FILES) <= set(ROWS)
    assert all(path.stat().st_size < 1_000_000 for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_the_setting_that_its_name_says(path):
    M, N, code = setting_of(ROWS[path])
    layers = [layer for layer in load(path).modules() if isinstance(layer, abcnets.PackedLayer)]
    assert bool(layers) == bool(M or N)
    wanted = {(M, N)}
    if code.startswith("mixed "):
        settings = budget.from_words(ROWS[path]["settings"]).values()
        wanted = {(found["weight_bases"], found["activation_bases"]) for found in settings}
    assert {(layer.weight_bases, layer.activation_bases or None) for layer in layers} <= wanted
    assert not layers or path.stat().st_size == ROWS[path]["file_bytes"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("one_thread")
def test_a_file_is_as_accurate_as_its_row(path):
    """Bits may fall on the other side of a threshold than in the simulation: a few images in 10,000."""
    _, folder = NETWORKS[ROWS[path]["dataset"]]
    if not folder.exists():
        pytest.skip(f"{folder.relative_to(ROOT)} is missing")
    assert accuracy(load(path), load_data(ROWS[path]["dataset"])) == pytest.approx(ROWS[path]["accuracy"], abs=0.05)
