"""notebooks/compare.py measures each form of one network, and only what is there."""

import compare
import experiment
import pytest
import torch

import abcnets

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def trained(tmp_path):
    """A float network, one with M = N = 1, and the rows of runs.csv that such runs leave; one row has no network."""
    data = experiment.load_data("digits")
    torch.manual_seed(0)
    network = experiment.nine_layer().eval()
    binary = abcnets.convert(network, 1, 1)
    abcnets.calibrate(binary, data.calibration_batches(64), compensate=False, progress=False)
    for name, model in (("float", network), ("M1-N1", binary)):
        experiment.save(model.state_dict(), tmp_path / "digits" / f"{name}.pt")
    runs = (("float", "", ""), ("M1-N1", 1, ""), ("M2-N2", 2, ""), ("M1-N1-per-layer", 1, "per-layer"))
    common = {"dataset": "digits", "seed": 0, "command": "train"}
    rows = [{"run": f"digits/{name}", "M": M, "N": M, "options": words, **common} for name, M, words in runs]
    experiment.write_csv(tmp_path / "runs.csv", rows)
    return tmp_path, data, network, binary


@pytest.mark.filterwarnings("ignore")
def test_every_form_of_one_network(trained, capsys):
    folder, data, network, binary = trained
    threads = torch.get_num_threads()
    options = "--dataset digits --batches 2 --threads 1 --seconds 0 --calibrate 32"
    compare.main([*options.split(), "--out", str(folder), "--results", str(folder)])
    torch.set_num_threads(threads)
    rows = experiment.read_csv(folder / "competitors.csv")
    forms = {}
    for row in rows:
        forms.setdefault((row["form"], row["M"], row["N"]), []).append(row)
    assert set(forms) == {("torch float32", "", ""), ("torch bfloat16", "", ""), ("onnxruntime float32", "", ""),
                          ("onnxruntime int8", "", ""), ("abcnets", "1", "1")}  # fmt: skip
    assert "digits/M2-N2 is left out" in capsys.readouterr().out
    assert all(float(row["ms_per_image"]) > 0 and row["hardware"] and "torch" in row["versions"] for row in rows)
    expected = experiment.accuracy(network, data), experiment.accuracy(binary, data)
    for form, which in {"torch float32": 0, "onnxruntime float32": 0, "abcnets": 1}.items():
        for row in (row for row in rows if row["form"] == form):
            assert float(row["accuracy"]) == pytest.approx(expected[which], abs=0.5), row  # of 500, two on a boundary
    sizes = {key[0]: min(int(row["bytes"]) for row in group) for key, group in forms.items()}
    assert sizes["torch float32"] > 1.9 * sizes["torch bfloat16"] > sizes["onnxruntime int8"] > 2 * sizes["abcnets"]


def test_a_missing_float_network_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="float.pt is missing"):
        compare.main(["--dataset", "digits", "--out", str(tmp_path), "--results", str(tmp_path)])
