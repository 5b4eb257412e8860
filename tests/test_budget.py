"""Sensitivity of the layers, and settings within a budget."""

import copy
import itertools
import math
import re
import sys
from pathlib import Path

import budget
import matplotlib
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import abcnets

matplotlib.use("agg")
ROOT = Path(__file__).parent.parent


class Scale(nn.Module):
    """Something that holds a parameter and is nothing to binarize."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x


class Network(nn.Module):
    """Convolutions one after the other, one of them in a branch whose result is multiplied with zeros, one unused."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.early = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.late = nn.Conv2d(12, 12, 3, padding=1)
        self.useless = nn.Conv2d(12, 4, 1)
        self.zeros = nn.Conv2d(4, 12, 1, bias=False)
        self.never = nn.Conv2d(9, 7, 3)
        self.last = nn.Linear(12, 10)
        self.scale = Scale()
        nn.init.zeros_(self.zeros.weight)

    def forward(self, x):
        x = self.early(self.norm(self.first(x)).relu()).relu()
        x = self.late(x).relu() + self.zeros(self.useless(x))
        return {"out": self.scale(self.last(x.mean((2, 3)))), "more": x}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network().train()


@pytest.fixture(scope="module")
def images():
    return torch.randn(120, 1, 7, 7, generator=torch.Generator().manual_seed(1))


CHOICES = ((1, 1), (3, 3), (2, None), (None, None))


@pytest.fixture(scope="module")
def table(network, images):
    return budget.sensitivity(network, images.split(50), CHOICES, progress=False)


def errors(table):
    return {(row["layer"], row["M"], row["N"]): row["error"] for row in table}


# sensitivity


def test_one_row_a_layer_and_choice_and_the_rest(table, network):
    converted = ["early", "late", "useless", "zeros", "never"]
    expected = [(name, *choice) for name in converted for choice in CHOICES]
    rows = [(row["layer"], row["M"], row["N"]) for row in table]
    assert rows == [("first", None, None), *expected, ("last", None, None), ("everything else", None, None)]
    assert list(table[0]) == ["layer", "M", "N", "code", "error", "packed_bytes", "binary_macs"]
    assert all(row["code"] == (None if row["M"] is None else "thermometer") for row in table)


def test_errors_say_how_much_a_layer_matters(table):
    error = errors(table)
    assert all(0 <= value <= 1 for value in error.values())
    assert all(error[name, None, None] == 0 for name in ("first", "early", "late", "last"))
    assert all(error[name, 1, 1] > error[name, 3, 3] > 0 for name in ("early", "late"))
    assert all(error[name, 1, 1] == 0 for name in ("useless", "never"))


def test_many_bases_come_close_to_the_float_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(4000, 6)
    error = errors(budget.sensitivity(model, x, ((1, 1), (6, 6), (15, 100)), progress=False))
    assert error["2", 1, 1] > 0.3 > 0.1 > error["2", 6, 6] > 0.005 > error["2", 15, 100]


def test_the_error_is_what_no_scale_and_offset_explain():
    y, noise = torch.randn(2, 2000, 3, generator=torch.Generator().manual_seed(0))
    assert budget._unexplained(y, y) == 0
    assert budget._unexplained(y, 3 * y + torch.tensor([1.0, 2, 3])) == pytest.approx(0, abs=1e-9)
    assert budget._unexplained(y, -y) == 1 and budget._unexplained(y, torch.zeros_like(y)) == 1
    Y = y + noise
    scales = torch.linspace(0, 1, 1001)[:, None, None, None]
    left = ((y - y.mean(0)) - scales * (Y - Y.mean(0))).square().sum((1, 2, 3)) / (y - y.mean(0)).square().sum()
    assert budget._unexplained(y, Y) == pytest.approx(left.min().item(), abs=1e-5)


def test_the_model_is_left_as_it_was(network, images):
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    again = budget.sensitivity(network, images.split(50), CHOICES[:1], progress=False)
    assert [m.training for m in network.modules()] == modes and type(network.late) is nn.Conv2d
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert len(again) == 8


@pytest.mark.parametrize("choice", [(1, 1), (3, 3), (2, None)])
def test_bytes_and_macs_are_those_of_the_file_and_of_summary(table, network, images, choice, tmp_path):
    stay = ("first", "last", "everything else")
    rows = [row for row in table if (row["M"], row["N"]) == choice or row["layer"] in stay]
    chosen = budget.allocate(rows, 10**9)
    assert chosen["first"] is None and "everything else" not in chosen
    model = abcnets.convert(network, settings=chosen)
    assert [(m.weight_bases, m.activation_bases) for m in (model.early, model.late, model.never)] == [choice] * 3
    assert type(model.first) is nn.Conv2d and type(model.last) is nn.Linear
    abcnets.save_packed(abcnets.pack(model), tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    total = sum(row["packed_bytes"] for row in rows)
    assert total == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    ran = {row["layer"]: row for row in abcnets.summary(model, images[:1])}
    assert all(row["binary_macs"] == ran[row["layer"]]["binary_macs"] for row in rows if row["layer"] in ran)
    assert total - sum(row["packed_bytes"] for row in ran.values()) == next(
        row["packed_bytes"] for row in rows if row["layer"] == "never")  # fmt: skip


def test_filter_fn_and_what_convert_then_leaves(network, images):
    only = budget.sensitivity(network, images, ((2, 2),), filter_fn=lambda layer, name: name == "last", progress=False)
    chosen = budget.allocate(only, 10**9)
    assert chosen["last"] == {"weight_bases": 2, "activation_bases": 2}
    model = abcnets.convert(network, settings=chosen)
    assert [name for name, m in model.named_modules() if hasattr(m, "active")] == ["last"]


def test_a_single_layer_is_a_model_too():
    table = budget.sensitivity(nn.Linear(5, 4), torch.randn(50, 5), ((1, 1), (2, 2)), progress=False)
    model = abcnets.convert(nn.Linear(5, 4), settings=budget.allocate(table, 10**6))
    assert model.weight_bases == 2


def test_sensitivity_says_what_is_wrong(network, images):
    for choices in ((), ((1,),), ((1, 2, "binary", "binary"),)):
        with pytest.raises(ValueError, match="pairs"):
            budget.sensitivity(network, images, choices, progress=False)
    for choices in (((1, 2, 3),), ((2, 2), (2, 2, "ternary"))):
        with pytest.raises(ValueError, match="code must be one of"):
            budget.sensitivity(network, images, choices, progress=False)
    with pytest.raises(ValueError, match="positive integer"):
        budget.sensitivity(network, images, ((0, 1),), progress=False)
    with pytest.raises(ValueError, match="no layer to binarize"):
        budget.sensitivity(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(4, 2), progress=False)
    with pytest.raises(ValueError, match="at least two images"):
        budget.sensitivity(network, images[:1], progress=False)
    with pytest.raises(ValueError, match="an entry an image"):
        budget.sensitivity(nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), torch.randn(4, 2), progress=False,
                            filter_fn=lambda layer, name: True)  # fmt: skip


def test_the_table_prints_and_has_a_picture(table, tmp_path, monkeypatch):
    assert str(table).splitlines()[0].split() == list(table[0]) and "everything else" in str(table).splitlines()[-1]
    assert "<table>" in table._repr_html_() and len(pd.DataFrame(table)) == len(table)
    figure = table.picture()
    heat = figure.axes[0].images[0].get_array()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert heat.shape == (5, 3) and labels == ["1, 1", "3, 3", "2, float"]
    assert heat[1, 0] == pytest.approx(errors(table)["late", 1, 1])
    figure.savefig(tmp_path / "picture.png")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        table.picture()


# Codes


CODED = ((1, 1), (3, 3), (2, 2, "thermometer"), (2, 2, "binary"), (2, 2, ("binary", "uniform")), (2, None, "binary"),
         (1, 2, ("binary", "uniform")), (1, 1, "binary"))  # fmt: skip  the last is the first once more


@pytest.fixture(scope="module")
def coded(network, images):
    return budget.sensitivity(network, images.split(50), CODED, progress=False)


def test_a_choice_may_have_a_code(coded, network):
    words = [(row["M"], row["N"], row["code"]) for row in coded if row["layer"] == "late"]
    assert words == [(1, 1, "thermometer"), (3, 3, "thermometer"), (2, 2, "thermometer"), (2, 2, "binary"),
                     (2, 2, "binary x uniform"), (2, None, "binary"), (1, 2, "uniform")]  # fmt: skip
    for row in coded:
        if row["layer"] in ("early", "late"):
            layer = budget.allocate([row], 10**9)
            model = abcnets.convert(network, settings=layer)
            of_layer = next(each for each in abcnets.plan(model) if each["layer"] == row["layer"])
            assert all(row[column] == of_layer[column] for column in ("M", "N", "code"))
            assert ("code" in layer[row["layer"]]) == (row["code"] != "thermometer")
            assert row["binary_macs"] % (row["M"] * (row["N"] or 1)) == 0


def test_bytes_of_every_code_are_those_of_the_file(coded, network, tmp_path):
    for M, N, code in {(row["M"], row["N"], row["code"]) for row in coded if row["M"]}:
        rows = [row for row in coded if row["M"] is None or (row["M"], row["N"], row["code"]) == (M, N, code)]
        model = abcnets.convert(network, settings=budget.allocate(rows, 10**9))
        abcnets.save_packed(abcnets.pack(model), tmp_path / "model.safetensors")
        stored = load_file(tmp_path / "model.safetensors")
        total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        assert sum(row["packed_bytes"] for row in rows) == total


def test_a_pair_has_the_code_that_is_given_for_all(network, images):
    choices = ((2, 2), (2, 3, "thermometer"))
    table = budget.sensitivity(network, images, choices, code=("binary", "uniform"), progress=False)
    assert [row["code"] for row in table if row["layer"] == "late"] == ["binary x uniform", "thermometer"]


def test_two_binary_bases_where_three_of_a_thermometer_are_too_dear(network, images):
    table = budget.sensitivity(network, images, ((2, 2), (3, 3), (2, 2, "binary")), progress=False)
    late = {(row["M"], row["code"]): row for row in table if row["layer"] == "late"}
    assert late[2, "binary"]["error"] < late[2, "thermometer"]["error"]
    assert late[2, "binary"]["binary_macs"] == late[2, "thermometer"]["binary_macs"]
    macs = sum(row["binary_macs"] for row in table if row["code"] == "binary")
    chosen = budget.allocate(table, 10**9, macs)
    two = {"weight_bases": 2, "activation_bases": 2, "code": "binary"}
    assert chosen["early"] == chosen["late"] == two
    model = abcnets.convert(network, settings=chosen)
    assert model.late.code == ("binary", "binary") and model.late.zero and len(model.late.vs) == 3


def test_a_table_without_codes_is_as_it_was(table):
    old = [{name: value for name, value in row.items() if name != "code"} for row in table]
    spent = sum(row["packed_bytes"] for row in old if row["M"] in (None, 1)) + 200
    chosen = budget.allocate(old, spent)
    assert chosen == budget.allocate(table, spent)
    assert all(setting is None or list(setting) == ["weight_bases", "activation_bases"] for setting in chosen.values())
    axis = budget.Sensitivity(old).picture().axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1, 1", "3, 3", "2, float"]


def test_the_picture_names_the_codes(coded, tmp_path):
    figure = coded.picture()
    labels = [" ".join(label.get_text().split()) for label in figure.axes[0].get_xticklabels()]
    assert labels == ["1, 1", "3, 3", "2, 2", "2, 2 binary", "2, 2 binary x uniform", "2, float binary",
                      "1, 2 uniform"]  # fmt: skip
    assert figure.axes[0].images[0].get_array().shape == (5, 7)
    figure.savefig(tmp_path / "picture.png")


def test_mixed_settings_against_uniform_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(),
                          nn.Linear(16, 4))  # fmt: skip
    x = torch.randn(400, 6)
    table = budget.sensitivity(model, x, ((1, 1), (2, 2), (3, 3), (2, 2, "binary"), (2, 1, "binary")), progress=False)
    of_uniform = []

    def accuracy(binary):
        of_uniform.append((binary[2].code, binary[4].code))
        return 90.0

    for code in ("thermometer", "binary"):
        of_uniform.clear()
        (row,) = budget.against_uniform(model, table, [x], accuracy, counts=(2,), code=code)
        assert of_uniform[0] == ((code, code), (code, code))
        assert row["mixed_summed_error"] <= row["uniform_summed_error"]
        assert row["mixed_binary_macs"] <= row["uniform_binary_macs"] and row["mixed_bytes"] <= row["uniform_bytes"]
    assert row["mixed_settings"] == "2:2,2,binary 4:2,2,binary"
    settings = budget.from_words("2:2,2,binary 4.a:1,3 6:float 7:2,3,binary,uniform")
    assert settings["2"] == {"weight_bases": 2, "activation_bases": 2, "code": "binary"}
    assert settings["4.a"] == {"weight_bases": 1, "activation_bases": 3} and settings["6"] is None
    assert settings["7"]["code"] == ("binary", "uniform")
    for wrong in ("2", "2:2", "2:a,b"):
        with pytest.raises(ValueError, match="settings are written like"):
            budget.from_words(wrong)
    with pytest.raises(ValueError, match="lacks M = N = 5 in the code 'uniform'"):
        next(budget.against_uniform(model, table, [x], accuracy, counts=(5,), code="uniform"))


# allocate


def a_row(layer, choice, error, packed_bytes, binary_macs):
    return {"layer": layer, "M": choice + 1, "N": 1, "error": error, "packed_bytes": packed_bytes,
            "binary_macs": binary_macs}  # fmt: skip


small = st.integers(0, 30)
error = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5]))  # with ties
tables = st.lists(st.lists(st.tuples(error, small, small), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@example([  # an error that is small beside another
    [(0.0, 0, 0)], [(0.0, 0, 1), (0.0, 1, 0), (2**-23, 0, 0)], [(0.0, 0, 7)], [(0.0, 0, 8), (0.0, 1, 0), (1.0, 0, 0)],
], 1, 15)  # fmt: skip
@given(tables, st.integers(0, 160), st.one_of(st.none(), st.integers(0, 160), st.just(math.inf)))
def test_allocation_is_the_best_of_all(costs, budget_bytes, budget_macs):
    table = [a_row(str(l), c, *option) for l, options in enumerate(costs) for c, option in enumerate(options)]
    within = [
        sum(option[0] for option in picks) for picks in itertools.product(*costs)
        if sum(o[1] for o in picks) <= budget_bytes and (budget_macs is None or sum(o[2] for o in picks) <= budget_macs)
    ]  # fmt: skip
    if not within:
        with pytest.raises(ValueError, match="smallest possible|meets both"):
            budget.allocate(table, budget_bytes, budget_macs)
        return
    chosen = budget.allocate(table, budget_bytes, budget_macs)
    picks = [options[chosen[str(l)]["weight_bases"] - 1] for l, options in enumerate(costs)]
    assert sum(o[0] for o in picks) == pytest.approx(min(within), rel=1e-8, abs=1e-8)
    assert sum(o[1] for o in picks) <= budget_bytes
    assert budget_macs is None or sum(o[2] for o in picks) <= budget_macs


def test_allocation_of_many_layers_keeps_its_budgets_and_beats_uniform():
    torch.manual_seed(0)
    table = []
    for layer in range(40):
        size, weight = 1000 * 2 ** int(torch.randint(5, ())), torch.rand(()).item() ** 3
        for M, N in itertools.product((1, 2, 3, 5), repeat=2):
            table.append({"layer": str(layer), "M": M, "N": N, "error": weight * (0.4**M + 0.3 / N),
                          "packed_bytes": M * size + layer, "binary_macs": M * N * 700_000})  # fmt: skip
    uniform = [row for row in table if row["M"] == row["N"] == 2]
    budgets = [sum(row[name] for row in uniform) for name in ("packed_bytes", "binary_macs")]
    chosen = budget.allocate(table, *budgets)
    rows = [row for row in table if (row["M"], row["N"]) == tuple(chosen[row["layer"]].values())]
    assert len(rows) == 40 and sum(row["error"] for row in rows) < 0.8 * sum(row["error"] for row in uniform)
    assert [sum(row[name] for row in rows) for name in ("packed_bytes", "binary_macs")] <= budgets
    assert sum(row["binary_macs"] for row in rows) <= budgets[1]


def test_a_budget_too_small_says_the_smallest(table):
    rows = [row for row in table if row["M"] is None or row["M"] == row["N"]]
    layers = {row["layer"] for row in rows}
    smallest = sum(min(row["packed_bytes"] for row in rows if row["layer"] == layer) for layer in layers)
    chosen = budget.allocate(rows, smallest)
    assert chosen["late"] == {"weight_bases": 1, "activation_bases": 1}
    with pytest.raises(ValueError, match=rf"{smallest - 1:,} packed_bytes .* smallest possible is {smallest:,}"):
        budget.allocate(rows, smallest - 1)
    with pytest.raises(ValueError, match="binary_macs is too small"):
        budget.allocate(rows, smallest, -1)
    crossed = [a_row("a", 0, 0.1, 1, 9), a_row("a", 1, 0.1, 9, 1)]
    with pytest.raises(ValueError, match="meets both"):
        budget.allocate(crossed, 5, 5)


def test_allocate_refuses_what_it_can_not_weigh(table):
    with pytest.raises(ValueError, match="at least one layer"):
        budget.allocate([], 100)
    with pytest.raises(ValueError, match="nan, that of layer 'a'"):
        budget.allocate([a_row("a", 0, math.nan, 1, 1)], 100)


# The README


def test_the_example_of_the_readme_runs():
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme.split("## A budget in bytes")[1].split("\n## ")[0], re.S)
    model = nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 1600), nn.ReLU(), nn.Linear(1600, 10))
    names = {"abcnets": abcnets, "budget": budget, "model": model, "images": torch.randn(100, 9)}
    assert code.count("6_000_000") == 1
    exec(code.replace("6_000_000", "100_000"), names)  # this model is smaller than the README's
    size = abcnets.summary(names["small"], names["images"]).total()["packed_bytes"]
    assert names["small"][2].weight_bases == 2 and 90_000 < size <= 100_000
