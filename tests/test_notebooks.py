"""Both notebooks, top to bottom, on few digits with little training: their numbers, pictures, tables and form."""

import nbformat
import papermill
import pytest
from files import ROOT
from networks import build_network
from runs import read_csv
from training import accuracy

import abcnets

NOTEBOOKS = [ROOT / "notebooks" / "FinalProject.ipynb", ROOT / "notebooks" / "Eval.ipynb"]
FIGURES = {
    "FinalProject": {"bases", "staircase", "data", "weights", "curves", "thresholds", "stages"},
    "Eval": {"weight_error", "activation_training", "calibrated", "runs", "ablation", "accuracy_and_time", "confusion",
             "learned_staircases", "learned_weights", "weight_levels"},
}  # fmt: skip


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The folder into which both notebooks were executed, one after the other as `make run` does it."""
    out = tmp_path_factory.mktemp("notebooks")
    common = {"dataset": "digits", "limit": 640, "epochs": 8, "finetune_epochs": 8}
    common |= {"out": str(out), "results": str(out / "results")}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TQDM_DISABLE", "1")
        for notebook, more in zip(NOTEBOOKS, ({}, {"bases": [1]})):
            papermill.execute_notebook(
                notebook, out / notebook.name, {**common, **more}, cwd=notebook.parent, progress_bar=False
            )
    return out


def run(out):
    return read_csv(out / "results" / "runs.csv").set_index("run").loc["digits/M3-N3"]


def test_accuracy_falls_and_comes_back(executed):
    row = run(executed)
    assert row["float"] > 75
    assert row["binarized"] < row["float"] - 20
    assert row["calibrated"] > row["binarized"] + 20
    assert row["calibrated"] > row["float"] - 15
    assert row["accuracy"] > row["float"] - 10


def test_the_packed_file_is_small_and_as_accurate(executed, digits):
    folder = executed / "digits"
    assert (folder / "float.pt").stat().st_size > 5 * (folder / "M3-N3.safetensors").stat().st_size
    packed = abcnets.load_packed(folder / "M3-N3.safetensors", build_network(digits))
    # Sums in another order may move an activation across a threshold: one image in 500.
    assert accuracy(packed, digits) == pytest.approx(run(executed)["accuracy"], abs=0.21)


def test_calibration_alone_in_eval(executed):
    (row,) = read_csv(executed / "results" / "eval" / "digits-calibrated.csv").itertuples()
    assert row.calibrated > row.binarized + 20


def test_more_bases_lose_less(executed):
    rows = read_csv(executed / "results" / "eval" / "digits-weight-error.csv")
    gaussian = rows[rows.weights == "Gaussian weights"].set_index(["shifts", "M"]).error
    for M, error in {1: 0.363, 2: 0.190, 3: 0.1175, 5: 0.058}.items():
        assert gaussian["Gaussian", M] == pytest.approx(error, rel=0.03)
        assert gaussian["Gaussian", M] <= gaussian["even", M] + 1e-3


@pytest.mark.parametrize("name", FIGURES)
def test_figures(executed, name):
    assert FIGURES[name] <= {path.stem for path in (executed / "figures").glob("*.png")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_as_committed(path):
    """Executed from top to bottom without an error, and tidy."""
    assert path.stat().st_size < 1_000_000
    assert "/home/" not in path.read_text() and str(ROOT) not in path.read_text()
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) - len(code) >= len(code)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 7
    lines = sorted(len(cell.source.splitlines()) for cell in code)
    assert lines[-1] <= 20 and lines[len(lines) // 2] < 10
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
