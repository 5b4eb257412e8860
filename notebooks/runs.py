"""A run: its name, its network in `out`, its row and its curve in `results`; and what is asked of all rows.

A run is named after what it is (`fashion-mnist/M3-N3`). `results/runs.csv` has a row a run, `results/curves/` its
training curve, `out` its network (`.pt`) and its checkpoint.
"""

import math
from pathlib import Path

import pandas as pd
import torch
from data import Data
from files import DataError, replacing, save, writable
from networks import build_network
from torch import nn
from training import accuracy, finetune, is_main_process, load_weights, pretrain

import abcnets
from kernels.clock import machine

FILL = "python notebooks/experiment.py table --readme"  # as the README's markers name it

# --------------------------------------------------------------------------- Tables as files


def read_csv(path: str | Path, columns: list[str] = (), **how) -> pd.DataFrame:
    """A table of results; an empty cell is NaN, and among a run's options no word.

    Raises: DataError where there is none, or where it has not those columns.
    """
    try:
        rows = pd.read_csv(path, **{"dtype": {"options": str}, **how})
    except FileNotFoundError:
        raise DataError(f"the table {path} is missing: nothing has been recorded in it yet") from None
    except ValueError as error:  # pandas' own are such
        raise DataError(f"{path} can't be read as a table: {' '.join(str(error).split())}") from error
    if missing := [name for name in columns if name not in rows]:
        raise DataError(f"{path} is no table of these results: it lacks the columns {', '.join(missing)}")
    return rows.fillna({"options": ""}) if "options" in rows else rows


def write_csv(path: str | Path, rows: pd.DataFrame | list[dict]) -> None:
    """Write a table whole or not at all; None becomes an empty cell, and every number what Python prints."""
    with replacing(Path(path)) as temporary:
        pd.DataFrame(rows, dtype=object).to_csv(temporary, index=False, lineterminator="\n")


def keep_rows(path: str | Path, rows: list[dict], by: list[str]) -> None:
    """Write rows in place of those that have the same `by`; the others stay to the letter, all sorted by `by`."""
    path, rows = Path(path), pd.DataFrame(rows, dtype=object)
    if path.exists():
        old = read_csv(path, by, dtype=str, keep_default_na=False)
        new = pd.MultiIndex.from_frame(rows[by].astype(str))
        rows = pd.concat([old[~pd.MultiIndex.from_frame(old[by]).isin(new)], rows])
    write_csv(path, rows.sort_values(by, key=lambda column: column.astype(str), kind="stable"))


# --------------------------------------------------------------------------- A run


def run_name(dataset: str, M: int | None = None, N: int | None = None, options: str = "", seed: int = 0) -> str:
    """digits/float, digits/M3-N3, digits/M2 (activations float), digits/M3-N3-per-layer-s1 (an option, seed 1)."""
    bases = "-".join(f"{letter}{count}" for letter, count in (("M", M), ("N", N)) if count)
    parts = [bases or "float", *options.split(), *([f"s{seed}"] if seed else [])]
    return f"{dataset.replace('/', '_').replace(':', '_')}/{'-'.join(parts)}"


def pretrained(data: Data, out: str | Path, results: str | Path, *, options: str = "", seed: int = 0,
               kept: bool = False, **recipe) -> tuple[nn.Module, list[dict]]:  # fmt: skip
    """A float network and its training's history: trained, kept in `out`, recorded in `results`.

    What a checkpoint of the same recipe holds is not trained again. Under a launcher all processes call this alike.

    Args:
        options: the words that the command line would need beyond the data set's name: "limit=200".
        kept: take a network that is in `out` as it is, whatever its recipe; then without a history.
        **recipe: as in `training.pretrain`.
    """
    run = run_name(data.name, options=options, seed=seed)
    path = Path(out) / f"{run}.pt"
    if kept and path.exists():
        return load_float(data, out, seed, path), []
    _check_places(out, results)
    model, history = pretrain(data, seed=seed, checkpoint=path.with_suffix(".checkpoint"), description=run, **recipe)
    percent = accuracy(model, data)
    if is_main_process():
        save(model.state_dict(), path)
        record(results, data, model, history, options=options, seed=seed, accuracy=percent)
        print(f"{run}: {percent:.2f} %, kept in {path}")
    return model, history


def finetuned(model: nn.Module, data: Data, teacher: nn.Module | None, out: str | Path, results: str | Path,
              M: int | None, N: int | None, *, before: dict, options: str = "", seed: int = 0,
              **recipe) -> list[dict]:  # fmt: skip
    """Train a converted network on, in place; keep it in `out`, record it in `results`; returns its history.

    What a checkpoint of the same recipe holds is not trained again.

    Args:
        teacher: as in `training.finetune`, and None for none.
        before: the accuracies that go into the row beside the last one: float, binarized, calibrated.
        **recipe: as in `training.finetune`.
    """
    run = run_name(data.name, M, N, options, seed)
    path = Path(out) / f"{run}.pt"
    _check_places(out, results)
    history = finetune(model, data, teacher, seed=seed, checkpoint=path.with_suffix(".checkpoint"), description=run,
                       **recipe)  # fmt: skip
    percent = accuracy(model, data)
    if is_main_process():
        save(model.state_dict(), path)
        record(results, data, model, history, M, N, options, seed, **before, accuracy=percent)
        print(f"{run}: fine-tuned {percent:.2f} %, kept in {path}")
    return history


def binarized(float_model: nn.Module, data: Data, out: str | Path, results: str | Path, M: int | None, N: int | None, *,
              convert=abcnets.convert, calibrate: int = 2048, distill: float = 0.5, options: str = "", seed: int = 0,
              kept: bool = False, **recipe) -> nn.Module:  # fmt: skip
    """A float network binarized, calibrated on so many images (0: not) and `finetuned`, the float one its teacher.

    Args:
        convert: convert(float_model, M, N) -> the binarized copy.
        kept: take a network that is in `out` as it is, whatever its recipe.
    """
    run = run_name(data.name, M, N, options, seed)
    model = convert(float_model, M, N)
    if kept and (path := Path(out) / f"{run}.pt").exists():
        return load_weights(model, path)
    percent = {"float": accuracy(float_model, data), "binarized": accuracy(model, data)}
    if calibrate:
        abcnets.calibrate(model, data.calibration_batches(calibrate))
        percent["calibrated"] = accuracy(model, data)
    if is_main_process():
        print(f"{run}: " + ", ".join(f"{name} {value:.2f} %" for name, value in percent.items()), flush=True)
    finetuned(model, data, float_model if distill else None, out, results, M, N, options=options, seed=seed,
              before=percent, distill=distill, **recipe)  # fmt: skip
    return model


def _check_places(out: str | Path, results: str | Path) -> None:
    """Before hours of training: whether their results can be written."""
    if is_main_process():
        writable(Path(out))
        writable(Path(results))
        if (table := Path(results) / "runs.csv").exists():
            read_csv(table, ["run"])


def load_float(data: Data, out: str | Path, seed: int = 0, path: str | Path | None = None) -> nn.Module:
    """The pretrained float network of a data set, from `out` or from another file, on the data's device."""
    model = build_network(data, seed).to(data.device, memory_format=torch.channels_last)
    return load_weights(model, path or Path(out) / f"{run_name(data.name, seed=seed)}.pt")


def record(
    results: str | Path,
    data: Data,
    model: nn.Module,
    history: list[dict],
    M: int | None = None,
    N: int | None = None,
    options: str = "",
    seed: int = 0,
    **accuracies: float,
) -> dict:
    """Write a run's row into results/runs.csv, in place of an earlier one of the same name, and its curve beside it.

    Options are the words that the command line would need beyond M and N: "per-layer distill=0".
    Accuracies: float, binarized, calibrated and, the one that every run has, accuracy.
    """
    run = run_name(data.name, M, N, options, seed)
    bases = f" --weight-bases {M or 'none'} --activation-bases {N or 'none'}" if M or N else ""
    flags = "".join(f" --{word.replace('=', ' ')}" for word in [*options.split(), *([f"seed={seed}"] if seed else [])])
    sizes = abcnets.summary(model, next(data.test_batches(1))[0]).total()
    row = {
        "run": run, "dataset": data.name, "M": M, "N": N, "options": options, "seed": seed, "epochs": len(history),
        **{name: accuracies.get(name) for name in ("float", "binarized", "calibrated", "accuracy")},
        "packed_bytes": sizes["packed_bytes"], "float_bytes": sizes["float_bytes"],
        "seconds": sum(entry["seconds"] for entry in history), **machine(data.device, torch.get_num_threads()),
        "command": f"python notebooks/experiment.py {'finetune' if bases else 'pretrain'} --dataset {data.name}"
                   f"{bases}{flags} --epochs {len(history)}",
    }  # fmt: skip
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    keep_rows(Path(results) / "runs.csv", [row], by=["run"])
    if history:
        write_csv(Path(results) / "curves" / f"{run.replace('/', '-')}.csv", history)
    return row


# --------------------------------------------------------------------------- All rows


COLUMNS = ["run", "dataset", "M", "N", "options", "seed", "epochs", "float", "binarized", "calibrated", "accuracy",
           "packed_bytes"]  # fmt: skip  those of a run's row that others ask for


def recorded(path: str | Path, dataset: str) -> pd.DataFrame:
    """The rows of a table that are of a data set; none, where there is no table yet."""
    path = Path(path)
    rows = read_csv(path, ["dataset"]) if path.exists() else pd.DataFrame(columns=COLUMNS)
    return rows[rows.dataset == dataset]


def default_runs(results: str | Path, dataset: str, seed: int = 0) -> pd.DataFrame:
    """The rows of a data set's runs with default options; M and N are NaN on a side that is float."""
    rows = recorded(Path(results) / "runs.csv", dataset)
    return rows[(rows.seed == seed) & (rows.options == "")]


def results_table(rows: pd.DataFrame, times: dict | None = None) -> str:
    """Runs as Markdown: accuracies in percent, bytes, epochs.

    times: {(M, N): milliseconds} for one more column, 0 for a side that is float.
    """
    head = ["M", "N", "after binarizing", "calibrated, not trained", "fine-tuned (epochs)", "packed"]
    head += ["an image"] if times else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = rows.fillna({"M": 0, "N": 0}).astype({"M": int, "N": int}).to_dict("records")
    for row in sorted(rows, key=lambda row: (row["M"] == row["N"] == 0, row["M"] != row["N"], row["N"], row["M"])):
        cells = [str(row[name] or "float") for name in ("M", "N")]
        cells += ["" if math.isnan(row[name]) else f"{row[name]:.2f} %" for name in ("binarized", "calibrated")]
        cells.append(f"**{row['accuracy']:.2f} %** ({row['epochs']})" if row["epochs"] else "not trained")
        cells.append(f"{row['packed_bytes'] / 1000:.0f} kB")
        if times:
            cells.append(f"{times[key]:.2f} ms" if (key := (row["M"], row["N"])) in times else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(rows: pd.DataFrame) -> dict[tuple[int, int], float]:
    """{(M, N): milliseconds an image} from notebooks/compare.py: 32 at once on one thread, the faster memory layout.

    Without bases, (0, 0): torch in float32, in its best form.
    """
    rows = rows[rows.form.isin(["abcnets", "torch float32"]) & (rows.batch == 32) & (rows.threads == 1)]
    return rows.fillna({"M": 0, "N": 0}).groupby(["M", "N"]).ms_per_image.min().to_dict()


def readme_blocks(results: str | Path) -> dict[str, str]:
    """What the README says of the results: {name of a block: text}, for `kernels.report.fill`."""
    times, speed, mixed = (read_csv(Path(results) / f"{name}.csv") for name in ("competitors", "speed", "mixed"))
    times = fastest(times[times.dataset == "fashion-mnist"])
    blocks = {
        "results": results_table(default_runs(results, "fashion-mnist"), times),
        "cifar10-jpeg": results_table(default_runs(results, "cifar10-jpeg")),
        "speed-hardware": speed.hardware[0],
    }
    fused = speed[(speed.network == "ResNet-18") & speed.form.str.contains("bits between layers")]
    best = fused.groupby(["bases", "batch", "threads"]).times_float32.max().groupby("bases").agg(["min", "max"])
    for bases, span in best.iterrows():
        blocks[f"speed-{bases:.0f}"] = f"{span['min']:.1f} to {span['max']:.1f} times"
    for _, row in mixed[mixed.dataset == "fashion-mnist"].iterrows():
        for kind in ("uniform", "mixed"):
            blocks[f"{kind}-{row['uniform']}"] = f"{row[f'{kind}_accuracy']:.2f} %"
    return blocks
