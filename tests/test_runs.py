"""Runs: the row, curve and network that each leaves, and what is asked of all rows."""

import csv
import dataclasses
import shlex
import shutil
import subprocess
import sys
import threading

import pandas as pd
import pytest
import runs
import torch
import training
from experiment import command_line, recipe_of
from files import RESULTS, ROOT, DataError, commit, load, locked, replacing, save
from networks import build_network
from recipe import NAMED, Recipe
from runs import (
    binarized,
    collect,
    counted_levels,
    curve,
    default_runs,
    finetuned,
    keep_rows,
    least_level,
    load_float,
    pretrained,
    read_csv,
    trained_file,
    write_csv,
)
from torch import nn

import abcnets
from kernels.command import Refused

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


def repeated(row: dict, data, start=None) -> Recipe:
    """The recipe of a row's command, read by the command line's own parser."""
    python, script, *words = shlex.split(row["command"])
    assert (python, script) == ("python", "notebooks/experiment.py")
    return recipe_of(command_line().parse_args(words), data, start)


def test_fine_tuning_recovers_and_leaves_a_row(few_digits, tmp_path):
    teacher, history = pretrained(few_digits, tmp_path, tmp_path, batch_size=50, epochs=4)
    model = binarized(teacher, few_digits, tmp_path, tmp_path, 2, 2, calibrate=200, **SMALL)
    tuned = training.accuracy(model, few_digits)
    row, whole = strings(tmp_path / "runs.csv")
    assert row["run"] == "digits/M2-N2-calibrate=200-batch-size=100-limit=400"
    assert (row["M"], row["N"], row["dataset"], row["epochs"]) == ("2", "2", "digits", "2")
    assert row["commit"] == commit() and row["commit"].strip("+").isalnum()
    assert float(row["calibrated"]) > float(row["binarized"]) + 10 and tuned > float(row["float"]) - 8, row
    assert float(row["accuracy"]) == pytest.approx(tuned, abs=1e-3) and "torch" in row["versions"]
    float_file = tmp_path / "digits/float-batch-size=50-limit=400.pt"
    assert f" --from {float_file} " in row["command"]  # these are no usual weights
    assert repeated(row, few_digits, teacher).short == row["recipe"]
    assert repeated(whole, few_digits).short == whole["recipe"]
    assert int(row["packed_bytes"]) < int(row["float_bytes"]) / 5
    assert int(row["packed_bytes"]) < int(row["file_bytes"]) < int(whole["file_bytes"]) / 5
    assert (whole["run"], whole["M"], whole["binarized"]) == ("digits/float-batch-size=50-limit=400", "", "")
    curve = read_csv(tmp_path / "curves/digits-float-batch-size=50-limit=400.csv")
    assert curve.loss.tolist() == [entry["loss"] for entry in history]


def test_what_is_there_is_not_trained_again(few_digits, tmp_path, monkeypatch):
    places = few_digits, tmp_path, tmp_path
    start, history = pretrained(*places, **SMALL)
    model = binarized(start, *places, 1, 1, calibrate=0, **SMALL)
    rows = (tmp_path / "runs.csv").read_text()

    def untrained(*arguments):
        raise AssertionError("a step was trained")

    monkeypatch.setattr(torch.Tensor, "backward", untrained)
    for kept in (False, True):  # by its checkpoint, and whatever its recipe
        recipe = {**SMALL, "epochs": 7} if kept else SMALL
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


def test_default_runs(tmp_path):
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


def test_names_of_runs():
    assert runs.run_name("folder:a/b") == "folder_a_b/float" and runs.run_name("digits", 3, 3) == "digits/M3-N3"
    assert runs.run_name("digits", 3, 3, limit=5, seed=1) == Recipe("digits", 3, 3, 1, limit=5).name
    assert runs.run_name("digits", 2, None, "per-layer lr=0.1", 1) == "digits/M2-per-layer-lr=0.1-s1"
    assert Recipe("fashion-mnist", 3, 3).name == Recipe("fashion-mnist", 3, 3, epochs=6).name == "fashion-mnist/M3-N3"
    assert Recipe("digits", 2, 2, calibrate=2048, distill=0.5, lr=1e-3, code=("thermometer",) * 2).options == ""
    assert Recipe("digits", 1, 1, lr=1e-3).options == "lr=0.001"  # where one base is, 0.003 is the default
    one, same = (Recipe("digits", 2, 2, lr=lr, code=code) for lr, code in ((1, "binary"), (1.0, ("binary", "binary"))))
    assert one.short == same.short and one.options == same.options == "code=binary lr=1"
    odd = Recipe("digits", 2, 2, zero=False, code=("binary", "uniform"), distill=0.0, lr=1 / 3, limit=1234567)
    assert odd.options == f"no-zero code=binary,uniform distill=0 lr={1 / 3!r} limit=1234567"


def test_the_recorded_runs_keep_their_names(few_digits):
    """Each by its own command, as the command line reads it today."""
    rows = read_csv(RESULTS / "runs.csv").to_dict("records")
    for row in rows:
        options = command_line().parse_args(shlex.split(row["command"])[2:])
        recipe = recipe_of(options, dataclasses.replace(few_digits, name=row["dataset"], limit=options.limit))
        assert (recipe.name, recipe.options, recipe.epochs) == (row["run"], row["options"], row["epochs"])
        assert recipe.settings == (row["settings"] or None)
        assert recipe.command() == row["command"]


OTHERS = {"per_layer": True, "even_shifts": True, "learn_shifts": True, "scale_gradient": True, "mixed": True,
          "zero": True, "code": ("binary", "binary"), "calibrate": 100, "distill": 0.25, "lr": 0.5,
          "lr_activation": 0.25, "weight_decay": 0.125, "batch_size": 64, "limit": 400, "float_seed": 0,
          "accumulate": 2, "warmup": 0.25,
          "exact": 0.25}  # fmt: skip
KEYED = {"epochs": 1, "images": 5, "network": "another", "start": "another", "teacher": "another"}


def test_what_is_not_the_default_is_in_the_name_and_all_is_in_the_key():
    assert {*OTHERS} == {*NAMED}
    base = Recipe("digits", 2, 2)
    named = {**OTHERS, "dataset": "cifar10", "M": 1, "N": None, "seed": 1}
    recipes = [dataclasses.replace(base, **{name: value}) for name, value in (named | KEYED).items()]
    assert {*(named | KEYED), "start_file", "settings"} == {field.name for field in dataclasses.fields(Recipe)}
    mixed = [dataclasses.replace(base, mixed=True, settings=words) for words in ("2:1,3", "2:3,1")]
    assert Recipe("digits", 2, 2, code="binary").short == "03f41d3a"  # as ever: what is kept by it is found again
    assert mixed[0].short != mixed[1].short and mixed[0].name == mixed[1].name != base.name
    assert len({recipe.short for recipe in [base, *recipes]}) == len(recipes) + 1
    assert len({recipe.name for recipe in recipes}) == len(named) + 1 and recipes[-1].name == base.name


@pytest.mark.parametrize("option", [*(name for name in OTHERS if name != "mixed"), "epochs", "seed", "start_file"])
def test_a_command_repeats_its_recipe(option, few_digits, tmp_path):
    start = build_network(few_digits)
    others = OTHERS | {"epochs": 1, "seed": 3, "start_file": tmp_path / "some file.pt"}
    data = few_digits if option == "limit" else dataclasses.replace(few_digits, limit=None)
    given = {} if option == "limit" else {option: others[option]}
    for bases in ((2, 3), (None, 1), (2, None)):
        recipe = Recipe.of(data, start, start, M=bases[0], N=bases[1], **given)
        again = repeated({"command": recipe.command()}, data, start)
        assert again == recipe and again.name == recipe.name
    if option in ("epochs", "seed", "limit", "lr", "weight_decay", "batch_size", "accumulate", "warmup", "exact"):
        recipe = Recipe.of(data, **given)
        assert repeated({"command": recipe.command()}, data) == recipe


def tiny(data, seed=0) -> nn.Module:
    """A network small enough for tests in the place of all others."""
    torch.manual_seed(seed)
    layers = [layer for channels in (1, 8, 8) for layer in (nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))


def test_what_is_kept_of_another_recipe_is_not_lost_unasked(few_digits, tmp_path, monkeypatch, capsys):
    for module in (runs, training):
        monkeypatch.setattr(module, "build_network", tiny)
    places = few_digits, tmp_path, tmp_path / "results"
    start, _ = pretrained(*places, **SMALL)
    binarized(start, *places, 2, 2, calibrate=0, **SMALL)
    name = "digits/M2-N2-calibrate=0-batch-size=100-limit=400"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = tiny(few_digits, seed=1)
    for call, said in (
        (lambda **how: pretrained(*places, **SMALL | {"epochs": 1}, **how), "epochs 2, not 1"),
        (lambda **how: binarized(start, *places, 2, 2, calibrate=0, **SMALL | {"epochs": 1}, **how), "epochs 2, not 1"),
        (lambda **how: binarized(other, *places, 2, 2, calibrate=0, **SMALL, **how), "start .*, not .*, teacher"),
    ):
        with pytest.raises(Refused, match=f"checkpoint is of another recipe .{said}.*: choose another --out, or"):
            call()
    model = abcnets.convert(start, 2, 2)
    with pytest.raises(Refused, match="recipe .teacher .*, not "):
        finetuned(model, few_digits, other, *places[1:], 2, 2, before={}, start=start, **SMALL)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with pytest.raises(Refused, match="runs.csv has a row of .* by another recipe .*, 2 epochs; not .*, 1"):
        binarized(start, few_digits, tmp_path / "else", places[2], 2, 2, calibrate=0, **SMALL | {"epochs": 1})
    (tmp_path / f"{name}.checkpoint").unlink()
    with pytest.raises(Refused, match="is there, without a checkpoint"):
        binarized(start, *places, 2, 2, calibrate=0, **SMALL)
    capsys.readouterr()
    binarized(start, *places, 2, 2, calibrate=0, **SMALL | {"epochs": 1}, replace=True)
    printed = capsys.readouterr().out
    assert f"{name}.pt is there, without" in printed and printed.count("will be replaced") == 2
    assert [row["epochs"] for row in strings(places[2] / "runs.csv")] == ["1", "2"]


def test_a_trial_on_few_images_has_a_name_of_its_own(few_digits, tmp_path, monkeypatch):
    """As the notebooks call it: the data alone know that they are few."""
    for module in (runs, training):
        monkeypatch.setattr(module, "build_network", tiny)
    for data in (few_digits, dataclasses.replace(few_digits, limit=None)):
        start, _ = pretrained(data, tmp_path, tmp_path, epochs=1)
        tuned = abcnets.convert(start, 2, 2)
        before = {"float": 1.0, "binarized": 2.0, "calibrated": 3.0}
        finetuned(tuned, data, start, tmp_path, tmp_path, 2, 2, before=before, epochs=1, seed=0)
    rows = strings(tmp_path / "runs.csv")
    names = ["digits/M2-N2", "digits/M2-N2-limit=400", "digits/float", "digits/float-limit=400"]
    assert [row["run"] for row in rows] == names and all((tmp_path / f"{name}.pt").exists() for name in names)
    assert [row["run"] for row in default_runs(tmp_path, "digits").to_dict("records")] == [names[0], names[2]]
    assert [row["options"] for row in rows] == ["", "limit=400"] * 2
    assert rows[0]["command"].endswith(" --weight-bases 2 --activation-bases 2 --epochs 1")


def test_two_processes_that_record_at_once_lose_nothing(tmp_path):
    code = ("import sys; sys.path[:0] = sys.argv[3:]; from runs import keep_rows\n"
            "for i in range(20): keep_rows(sys.argv[1], [{'run': f'{sys.argv[2]}{i:02}', 'x': i}], by=['run'])")
    folders = [str(ROOT), str(ROOT / "notebooks")]
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "runs.csv", letter, *folders]) for letter in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert [row["run"] for row in strings(tmp_path / "runs.csv")] == [f"{c}{i:02}" for c in "ab" for i in range(20)]
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_a_lock_that_nobody_holds_is_said(tmp_path):
    with locked(tmp_path / "runs.csv"), pytest.raises(DataError, match="runs.csv.lock says since 0.1 s .* remove it"):
        with locked(tmp_path / "runs.csv", seconds=0.1):
            pass
    with locked(tmp_path / "runs.csv", seconds=0.1):
        pass


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("files.ROOT", tmp_path)
    assert commit() == ""
    monkeypatch.setenv("PATH", "")
    assert commit() == ""


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


def test_the_networks_of_the_main_rows_come_with_the_repository(few_digits, tmp_path, monkeypatch, capsys):
    for module in (runs, training):
        monkeypatch.setattr(module, "build_network", tiny)
    data, out, results, trained = dataclasses.replace(few_digits, limit=None), *map(tmp_path.joinpath, "abc")
    start, _ = pretrained(data, out, results, epochs=1)
    pretrained(data, out, results, epochs=1, seed=1)
    kept = {"code": "binary"}
    settings = (1, None, {}), (2, 2, kept), (2, 2, kept | {"seed": 1}), (2, 2, {"lr": 0.5})
    models = [binarized(start, data, out, results, M, N, epochs=0, **options) for M, N, options in settings]
    (out / "digits/M1.pt").unlink()
    names = [f"digits-{run}.safetensors" for run in ("M2-N2-code=binary", "float", "float-s1")]
    assert [path.name for path in collect(data, out, results, trained)] == names
    assert f"digits/M1 stays as it is: {out}/digits/M1.pt is missing; `python" in capsys.readouterr().out
    sizes = {row["run"]: int(row["file_bytes"]) for row in strings(results / "runs.csv")}
    assert sizes["digits/M2-N2-code=binary"] == (trained / names[0]).stat().st_size
    assert sizes["digits/float"] > 1.5 * (trained / names[1]).stat().st_size  # float32, and float16
    packed = abcnets.load_packed(trained / names[0], start)
    images, _ = next(data.test_batches(100))
    torch.testing.assert_close(packed(images), models[1](images), rtol=1e-3, atol=1e-3)

    monkeypatch.setattr(runs, "trained_file", lambda run: trained_file(run, trained))
    (out / "digits/float.pt").unlink()
    assert training.fingerprint(load_float(data, out)) == training.fingerprint(start)
    assert {str(value.dtype) for value in load(trained / names[1]).values()} == {"torch.float16"}  # half the bytes
    assert "digits/float is the one that comes with the repository" in capsys.readouterr().out
    binarized(load_float(data, out), data, out, results, 1, 1, epochs=0)
    command = next(row["command"] for row in strings(results / "runs.csv") if row["run"] == "digits/M1-N1")
    assert command.endswith("finetune --dataset digits --weight-bases 1 --activation-bases 1 --epochs 0")
    capsys.readouterr()
    model, history = pretrained(data, out, results, kept=True)
    assert training.fingerprint(model) == training.fingerprint(start) and history == []
    assert "digits/float: the one that comes with the repository, as it is" in capsys.readouterr().out
    with pytest.raises(DataError, match="float-s2.pt is missing"):
        load_float(data, out, seed=2)
    (trained / names[1]).write_bytes(b"no tensors")
    with pytest.raises(DataError, match="can't be read as a safetensors file"):
        load_float(data, out)


def test_what_float16_does_not_have_stays_as_it_is(few_digits, tmp_path, monkeypatch):
    for module in (runs, training):
        monkeypatch.setattr(module, "build_network", tiny)
    large, count, third = torch.tensor([1e30, 0.1]), torch.tensor(70000), torch.tensor([1 / 3])
    assert runs.in_float16(large) is large and runs.in_float16(count) is count
    assert runs.in_float16(third).dtype == torch.float16 and runs.in_float16(third) == third.half()
    data = dataclasses.replace(few_digits, limit=None)
    pretrained(data, tmp_path, tmp_path, epochs=0)
    model = tiny(data)  # not rounded: a file of one's own, or an older one
    save(model.state_dict(), tmp_path / "digits/float.pt")
    (path,) = collect(data, tmp_path, tmp_path, tmp_path)
    assert training.fingerprint(load_float(data, tmp_path, path=path)) == training.fingerprint(model)


def test_a_curve_is_the_first_that_is_found(tmp_path):
    folders = [tmp_path / name for name in ("own", "recorded")]
    assert curve("digits/float", *folders).empty
    table = pd.DataFrame({"epoch": [1, 2], "loss": [0.5, 0.25], "test_accuracy": [90.0, 91.0]})
    write_csv(folders[1] / "curves/digits-float.csv", table)
    found = curve("digits/float", *folders)
    assert found.loss.tolist() == [0.5, 0.25] and found.validation_accuracy.isna().all()
    write_csv(folders[0] / "curves/digits-float.csv", table.assign(loss=1.0, validation_accuracy=80.0))
    found = curve("digits/float", *folders)
    assert found.loss.tolist() == [1, 1] and found.validation_accuracy.tolist() == [80, 80]


def test_a_level_that_nothing_falls_on_is_found(few_digits):
    torch.manual_seed(0)
    layer = abcnets.ABCConv2d(1, 2, 3, activation_bases=2, active=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(10))
    images = next(iter(few_digits.validation_loader(1000)))[0]
    for thresholds in ((images.median().item(), 100.0), (images.median().item(), images.mean().item())):
        layer.vs.data = 0.5 - torch.tensor(thresholds)
        below = [(images < threshold).float().mean().item() for threshold in sorted(thresholds)]
        shares = below[0], below[1] - below[0], 1 - below[1]
        with counted_levels(model) as counts:
            training.accuracy(model, few_digits, "validation")
        assert least_level(counts) == pytest.approx(100 * min(shares), abs=1e-3)
    with counted_levels(abcnets.binarize(model, False)) as counts:
        training.accuracy(model, few_digits, "validation")
    assert least_level(counts) is None and not any(layer._forward_pre_hooks for layer in model.modules())
