"""Runs: the row, curve and network that each leaves, and what is asked of all rows."""

import csv
import shutil
import threading

import pandas as pd
import pytest
import runs
import torch
import training
from files import RESULTS, DataError, replacing, save
from runs import binarized, default_runs, keep_rows, pretrained, read_csv, results_table, write_csv

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"batch_size": 100, "epochs": 2}


def strings(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_threads_that_write_one_file_at_once_both_succeed(tmp_path):
    path, written, failed = tmp_path / "rows.csv", threading.Barrier(2, timeout=60), []
    path.touch(mode=0o640)

    def write(text):
        try:
            with replacing(path) as temporary:
                temporary.write_text(text)
                written.wait()
        except BaseException as error:
            failed.append(error)
            written.abort()

    threads = [threading.Thread(target=write, args=(letter * 1000,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and list(tmp_path.iterdir()) == [path]
    assert path.read_text() in ("a" * 1000, "b" * 1000) and path.stat().st_mode & 0o777 == 0o640


def test_fine_tuning_recovers_and_leaves_a_row(few_digits, tmp_path):
    teacher, history = pretrained(few_digits, tmp_path, tmp_path, batch_size=50, epochs=4)
    model = binarized(teacher, few_digits, tmp_path, tmp_path, 2, 2, calibrate=200, **SMALL)
    tuned = training.accuracy(model, few_digits)
    row, whole = strings(tmp_path / "runs.csv")
    assert (row["run"], row["M"], row["N"], row["dataset"], row["epochs"]) == ("digits/M2-N2", "2", "2", "digits", "2")
    assert float(row["calibrated"]) > float(row["binarized"]) + 10 and tuned > float(row["float"]) - 8, row
    assert float(row["accuracy"]) == pytest.approx(tuned, abs=1e-3) and "torch" in row["versions"]
    assert "--weight-bases 2 --activation-bases 2" in row["command"]
    assert int(row["packed_bytes"]) < int(row["float_bytes"]) / 5
    assert (whole["run"], whole["M"], whole["binarized"]) == ("digits/float", "", "")
    assert read_csv(tmp_path / "curves/digits-float.csv").loss.tolist() == [entry["loss"] for entry in history]


def test_what_is_there_is_not_trained_again(few_digits, tmp_path, monkeypatch):
    places = few_digits, tmp_path, tmp_path
    start, history = pretrained(*places, **SMALL)
    model = binarized(start, *places, 1, 1, calibrate=0, **SMALL)
    rows = (tmp_path / "runs.csv").read_text()

    def untrained(*arguments):
        raise AssertionError("a step was trained")

    monkeypatch.setattr(torch.Tensor, "backward", untrained)
    for kept in (False, True):  # by its checkpoint, and whatever its recipe
        recipe = {"epochs": 7} if kept else SMALL
        again, seen = pretrained(*places, kept=kept, **recipe)
        assert seen == ([] if kept else history)
        binary = binarized(again, *places, 1, 1, calibrate=0, kept=kept, **recipe)
        for one, other in ((start, again), (model, binary)):
            for name, value in one.state_dict().items():
                assert torch.equal(value, other.state_dict()[name]), name
        assert (tmp_path / "runs.csv").read_text() == rows


def test_a_row_takes_the_place_of_its_like_and_others_stay_to_the_letter(tmp_path):
    """The tracked table, written again row by row as a run would, is the very same file."""
    table = RESULTS / "runs.csv"
    shutil.copy(table, tmp_path)
    for row in read_csv(table).to_dict("records"):
        row |= {name: None if pd.isna(row[name]) else int(row[name]) for name in "MN"}
        row["seconds"] = row["seconds"] or 0  # the sum of no epochs
        keep_rows(tmp_path / "runs.csv", [row], by=["run"])
    assert (tmp_path / "runs.csv").read_bytes() == table.read_bytes()
    keep_rows(tmp_path / "runs.csv", [{**row, "accuracy": 12.5, "new": 1}], by=["run"])
    assert [(row["accuracy"], row["new"]) for row in strings(tmp_path / "runs.csv") if row["new"]] == [("12.5", "1")]


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.glob("*.csv")))
def test_numbers_are_read_as_they_were_written(name, tmp_path):
    rows = read_csv(RESULTS / name)
    write_csv(tmp_path / name, rows)
    pd.testing.assert_frame_equal(read_csv(tmp_path / name), rows)
    # An int among empty cells is read as a float: 3.0.
    whole = [column for column in rows if column not in ("M", "N", "bases", "seconds")]
    first, second = (strings(folder / name) for folder in (RESULTS, tmp_path))
    assert all(one[column] == other[column] for one, other in zip(first, second, strict=True) for column in whole)


def test_default_runs_and_their_table(tmp_path):
    assert default_runs(tmp_path, "digits").empty  # nothing was recorded yet
    common = {"dataset": "digits", "options": "", "seed": 0, "binarized": 10, "calibrated": 20, "epochs": 3,
              "packed_bytes": 5000}  # fmt: skip
    settings = ((None, None), (1, 3), (2, None), (2, 2), (None, 1))
    rows = [{**common, "run": f"{M}{N}", "M": M, "N": N, "accuracy": 90.0} for M, N in settings]
    others = [{"seed": 1}, {"dataset": "cifar10"}, {"options": "per-layer"}]
    rows += [{**rows[1], **other, "run": str(other)} for other in others]
    write_csv(tmp_path / "runs.csv", rows)
    found = default_runs(tmp_path, "digits")
    assert len(found) == 5 and default_runs(tmp_path, "digits", seed=1).run.tolist() == ["{'seed': 1}"]
    lines = [line.split(" | ")[:2] for line in results_table(found).splitlines()[2:]]
    order = [["2", "2"], ["2", "float"], ["float", "1"], ["1", "3"], ["float", "float"]]
    assert lines == [[f"| {M}", N] for M, N in order]
    assert "**90.00 %** (3) | 5 kB | 0.50 ms |" in results_table(found, {(2, 2): 0.5})


def test_names_of_runs():
    assert runs.run_name("folder:a/b") == "folder_a_b/float" and runs.run_name("digits", 3, 3) == "digits/M3-N3"
    assert runs.run_name("digits", 2, None, "per-layer lr=0.1", 1) == "digits/M2-per-layer-lr=0.1-s1"


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00"])
def test_a_table_that_is_none_is_refused_before_the_training(content, few_digits, tmp_path, monkeypatch):
    (tmp_path / "runs.csv").write_bytes(content)
    monkeypatch.setattr(runs, "pretrain", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(DataError, match="runs.csv (is no table of these results: it lacks|can't be read as a table)"):
        pretrained(few_digits, tmp_path, tmp_path)
    with pytest.raises(DataError, match="runs.csv"):
        keep_rows(tmp_path / "runs.csv", [{"run": "x"}], by=["run"])
    assert (tmp_path / "runs.csv").read_bytes() == content


@pytest.mark.parametrize("content", [b"x", [1], {"a": 1}])
def test_a_damaged_checkpoint_is_said(content, few_digits, tmp_path):
    path = tmp_path / "run.checkpoint"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(DataError, match="run.checkpoint (can't be read|must hold a dict|is no checkpoint)"):
        training.pretrain(few_digits, **SMALL, checkpoint=path)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(what, path):
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match="a.pt can't be written: no space left"):
        save({}, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []
