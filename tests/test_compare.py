"""notebooks/compare.py measures each form of one network, and only what is there."""

import compare
import pytest
import torch
from files import save
from networks import nine_layer
from runs import read_csv, trained_file, write_csv
from training import accuracy, fast_bfloat16

import abcnets

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def trained(tmp_path, digits, monkeypatch):
    """A float network, M = N = 1 and M = 1 of it, and rows of runs.csv, of which one has no network."""
    torch.manual_seed(0)
    network = nine_layer().eval()
    binary = abcnets.convert(network, 1, 1)
    abcnets.calibrate(binary, digits.calibration_batches(64), compensate=False, progress=False)
    for name, model in (("float", network), ("M1-N1", binary)):
        save(model.state_dict(), tmp_path / "digits" / f"{name}.pt")
    monkeypatch.setattr(compare, "trained_file", lambda run: trained_file(run, tmp_path))
    weights = abcnets.convert(network, 1, None)  # which comes with the repository
    abcnets.save_packed(abcnets.pack(weights), trained_file("digits/M1", tmp_path))
    runs = (("float", "", "", ""), ("M1-N1", 1, 1, ""), ("M2-N2", 2, 2, ""), ("M1-N1-per-layer", 1, 1, "per-layer"),
            ("M1", 1, "", ""))  # fmt: skip
    common = {"dataset": "digits", "seed": 0, "command": "train"}
    rows = [{"run": f"digits/{name}", "M": M, "N": N, "options": words, **common} for name, M, N, words in runs]
    write_csv(tmp_path / "runs.csv", rows)
    return tmp_path, network, binary, weights


@pytest.mark.filterwarnings("ignore")
def test_every_form_of_one_network(trained, digits, threads, capsys):
    folder, network, binary, weights = trained
    options = "--dataset digits --batches 2 --threads 1 --seconds 0 --calibrate 32"
    compare.main([*options.split(), "--out", str(folder), "--results", str(folder)])
    rows = read_csv(folder / "competitors.csv").fillna({"M": 0, "N": 0}).to_dict("records")
    forms = {}
    for row in rows:
        forms.setdefault((row["form"], row["M"], row["N"]), []).append(row)
    halves = {("torch bfloat16", 0, 0)} if fast_bfloat16(torch.device("cpu")) else set()
    assert set(forms) - halves == {("torch float32", 0, 0), ("onnxruntime float32", 0, 0),
                          ("onnxruntime int8", 0, 0), ("abcnets", 1, 1), ("abcnets in int8", 1, 1), ("abcnets", 1, 0),
                          ("abcnets in int8", 1, 0)}  # fmt: skip
    assert "digits/M2-N2 is left out" in capsys.readouterr().out
    assert {row["dataset"] for row in rows} == {"digits"}
    assert all(row["ms_per_image"] > 0 and row["hardware"] and "torch" in row["versions"] for row in rows)
    for (form, M, N), model in {("torch float32", 0, 0): network, ("onnxruntime float32", 0, 0): network,
                                ("abcnets", 1, 1): binary, ("abcnets", 1, 0): weights}.items():  # fmt: skip
        for row in forms[form, M, N]:
            assert row["accuracy"] == pytest.approx(accuracy(model, digits), abs=0.5), row  # of 500, two on a boundary
    assert {row["code"] for row in forms["abcnets", 1, 1]} == {"thermometer"}
    sizes = {key[0]: min(row["bytes"] for row in group) for key, group in forms.items()}
    assert halves <= set(forms) and sizes["torch float32"] > 1.9 * sizes.get("torch bfloat16", 0)
    assert sizes["torch float32"] > 2 * sizes["onnxruntime int8"] > 4 * sizes["abcnets"]
    assert sizes["abcnets in int8"] < 1.1 * sizes["abcnets"]


def test_what_is_missing_or_too_large_is_one_sentence(trained, tmp_path, refused):
    def sentence(*options):
        return refused(compare.main, "--dataset", "digits", "--results", trained[0], *options)

    assert "float.pt is missing" in sentence("--out", tmp_path / "nothing")
    assert "at most the 500 test images, got 501" in sentence("--out", trained[0], "--batches", "1", "501")
    assert "nothing can be written to" in sentence("--results", trained[0] / "runs.csv")
    for option, bad in {"batches": "0", "threads": "0", "calibrate": "-1", "seconds": "nan"}.items():
        assert f"argument --{option}: " in sentence(f"--{option}", bad)
