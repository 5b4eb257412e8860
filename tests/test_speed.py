"""notebooks/speed.py: whole networks, a machine's rows in the place of its earlier ones, and the table of all."""

import speed
from runs import read_csv


def row(form, ms, M=None, N=None, code=None, **others):
    times = {f"times_{kind}": round(ms_of / ms, 3) for kind, ms_of in (("float32", 4.0), ("int8", 2.0))}
    return {"network": "nine-layer", "batch": 1, "threads": 1, "form": form, "variant": "", "M": M, "N": N,
            "code": code, "ms_per_image": ms, **times, **others}  # fmt: skip


MEASURED = [
    row("torch float32", 4.0), row("onnxruntime float32", 8.0), row("onnxruntime int8", 2.0),
    row("abcnets", 1.0, 1, 1, "thermometer"), row("abcnets", 0.5, 1, 1, "thermometer", variant="channels last"),
    row("abcnets", 2.0, 2, 2, "binary,uniform"), row("abcnets in int8", 1.6, 1, None, "thermometer"),
]  # fmt: skip


def test_the_table_takes_the_better_layout_and_machine_by_machine():
    rows = speed.pd.DataFrame([{**each, "isa": isa, "hardware": "a mill"} for isa in ("A", "B") for each in MEASURED])
    rows.loc[rows.isa == "B", "ms_per_image"] *= 10
    lines = speed.table(rows.iloc[:-2]).splitlines()
    assert lines[2] == "**a mill, A**" and lines[8] == "**a mill, B**"
    assert lines[4] == "| network | batch | threads | float32 | int8 | 1 × 1 | binary 2 × uniform 2 | 1 × int8 |"
    assert lines[6] == "| nine-layer | 1 | 1 | 4 | 2 | 8 / 4 | 2 / 1 | 2.5 / 1.25 |"
    assert lines[12] == "| nine-layer | 1 | 1 | 40 | 20 | 8 / 4 |"


def test_a_machines_rows_take_the_place_of_its_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "need_engine", lambda device: None)
    monkeypatch.setattr(speed, "machine", lambda: {"hardware": "a mill", "versions": "1"})
    for isa, rows in (("A", MEASURED), ("B", MEASURED), ("A", MEASURED[:3])):
        monkeypatch.setattr(speed, "instruction_set", lambda isa=isa: isa)
        monkeypatch.setattr(speed, "measure", lambda *_, rows=rows: rows)
        speed.main(["--networks", "nine-layer", "--results", str(tmp_path)])
    assert read_csv(tmp_path / "speed.csv").groupby("isa").size().to_dict() == {"A": 3, "B": 7}


def test_the_nine_layer_network_is_measured_in_every_form(threads, capsys):
    rows = speed.measure("nine-layer", [1], 0, False)
    assert {row["batch"] for row in rows} == {1, 32} and all(row["ms_per_image"] > 0 for row in rows)
    forms = {(row["form"], row["M"], row["N"], row["code"]) for row in rows}
    assert forms == {
        ("torch float32", None, None, None), ("onnxruntime float32", None, None, None),
        ("onnxruntime int8", None, None, None),
        *(("abcnets" if N else "abcnets in int8", M, N, code) for M, N, code in speed.SETTINGS),
    }  # fmt: skip
    sizes = {(row["M"], row["N"]): row["bytes"] for row in rows if row["M"]}
    assert sizes[1, None] < sizes[1, 1] < sizes[2, 2] < sizes[3, 3]
    for batch in (1, 32):
        best = max(row["times_float32"] for row in rows if row["batch"] == batch and row["form"].endswith("float32"))
        assert best == 1
