"""A run: its name, its network in `out`, its row and its curve in `results`; and what is asked of all rows.

A run is what its `Recipe` says, and named after it (`fashion-mnist/M3-N3`). `results/runs.csv` has a row a run,
`results/curves/` its training curve, `out` its network (`.pt`) and its checkpoint, which knows the recipe. The networks
of the rows that the README shows are in `trained/` too, small enough to come with the repository.
"""

import contextlib
import functools
import itertools
import tempfile
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from data import Data
from files import TRAINED, DataError, commit, load, locked, replacing, save, writable
from networks import build_network
from recipe import Recipe, run_name
from torch import Tensor, nn
from training import (
    OTHER_RECIPE,
    accuracy,
    difference,
    finetune,
    fingerprint,
    is_main_process,
    load_checkpoint,
    load_weights,
    pretrain,
)

import abcnets
from kernels.clock import machine
from kernels.command import Refused

begun_at = functools.cache(commit)  # asked as the first run begins: hours later there may be another
BUDGETS = 2, 3  # M = N of the uniform settings that mixed ones are compared with
WORDS = ("options", "commit", "recipe", "settings")  # columns that hold no numbers, though "1e5" may look like one

# --------------------------------------------------------------------------- Tables as files


def read_csv(path: str | Path, columns: list[str] = (), **how) -> pd.DataFrame:
    """A table of results; an empty cell is NaN, and among those of words the empty one.

    Raises: DataError where there is none, or where it has not those columns.
    """
    try:
        rows = pd.read_csv(path, **{"dtype": dict.fromkeys(WORDS, str), **how})
    except FileNotFoundError:
        raise DataError(f"the table {path} is missing: nothing has been recorded in it yet") from None
    except ValueError as error:  # pandas' own are such
        raise DataError(f"{path} can't be read as a table: {' '.join(str(error).split())}") from error
    if missing := [name for name in columns if name not in rows]:
        raise DataError(f"{path} is no table of these results: it lacks the columns {', '.join(missing)}")
    return rows.fillna({name: "" for name in WORDS if name in rows})


def write_csv(path: str | Path, rows: pd.DataFrame | list[dict]) -> None:
    """Write a table whole or not at all; None becomes an empty cell, and every number what Python prints."""
    with replacing(Path(path)) as temporary:
        pd.DataFrame(rows, dtype=object).to_csv(temporary, index=False, lineterminator="\n")


def keep_rows(path: str | Path, rows: list[dict], by: list[str]) -> None:
    """Write rows in place of those that have the same `by`; the others stay to the letter, all sorted by `by`.

    Many processes may do so at once.
    """
    path, rows = Path(path), pd.DataFrame(rows, dtype=object)
    with locked(path):
        if path.exists():
            old = read_csv(path, by, dtype=str, keep_default_na=False)
            new = pd.MultiIndex.from_frame(rows[by].astype(str))
            rows = pd.concat([old[~pd.MultiIndex.from_frame(old[by]).isin(new)], rows])
        write_csv(path, rows.sort_values(by, key=lambda column: column.astype(str), kind="stable"))


# --------------------------------------------------------------------------- A run


def pretrained(data: Data, out: str | Path, results: str | Path, *, kept: bool = False, replace: bool = False,
               **options) -> tuple[nn.Module, list[dict]]:  # fmt: skip
    """A float network and its training's history: trained, kept in `out`, recorded in `results`.

    In the end its weights are rounded to numbers that float16 has too, so that `collect` needs half the bytes for the
    very network that others start from. What a checkpoint of the same recipe holds is not trained again. Under a
    launcher all processes call this alike.

    Args:
        kept: take a network of that name that is in `out`, or else comes with the repository, as it is, whatever its
            epochs; then without a history (see `curve`).
        replace: whether what is kept of another recipe under that name may be lost.
        **options: seed, epochs and other fields of `Recipe`.

    Raises: Refused where something is kept of another recipe, or can't be written; KeyboardInterrupt as `train` does.
    """
    recipe = Recipe.of(data, **options)
    path = Path(out) / f"{recipe.name}.pt"
    for file, whose in ((path, path), (trained_file(recipe.name), "the one that comes with the repository")):
        if kept and file.exists():
            print(f"{recipe.name}: {whose}, as it is")
            return load_float(data, out, recipe.seed, file), []
    _claim(recipe, out, results, replace)
    model, history = pretrain(data, checkpoint=path.with_suffix(".checkpoint"), key=recipe.key(), replace=replace,
                              description=recipe.name, **recipe.training())  # fmt: skip
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(in_float16(value))
    _finish(recipe, model, data, out, results, history, recipe.command(), {})
    return model, history


def finetuned(model: nn.Module, data: Data, teacher: nn.Module | None, out: str | Path, results: str | Path,
              M: int | None, N: int | None, *, before: dict, start: nn.Module | None = None, replace: bool = False,
              **options) -> list[dict]:  # fmt: skip
    """Train a converted network on, in place; keep it in `out`, record it in `results`; returns its history.

    What a checkpoint of the same recipe holds is not trained again.

    Args:
        teacher: as in `training.finetune`, and None for none.
        before: the accuracies that go into the row beside the last one: float, binarized, calibrated.
        start: the float network that was converted; None: the teacher.
        replace, raises: as in `pretrained`.
        **options: seed, epochs and other fields of `Recipe`, those too by which `model` was converted and calibrated.
    """
    start = next((network for network in (start, teacher) if network is not None), model)
    options = {"calibrate": None if "calibrated" in before else 0, **options}
    options |= {"distill": 0.0} if teacher is None else {}
    recipe = Recipe.of(data, start, teacher, M=M, N=N, **options)
    _claim(recipe, out, results, replace)
    return _tune(recipe, model, data, teacher, out, results, before, replace)


def binarized(float_model: nn.Module, data: Data, out: str | Path, results: str | Path, M: int | None, N: int | None, *,
              kept: bool = False, replace: bool = False, **options) -> nn.Module:  # fmt: skip
    """A float network binarized, calibrated and `finetuned`, the float one its teacher.

    Args: kept, replace, **options: as in `pretrained`, and so what it raises.
    """
    recipe = Recipe.of(data, float_model, float_model, M=M, N=N, **options)
    model = recipe.convert(float_model)
    if kept and (path := Path(out) / f"{recipe.name}.pt").exists():
        return load_weights(model, path)
    _claim(recipe, out, results, replace)
    before = {"float": accuracy(float_model, data), "binarized": accuracy(model, data)}
    if recipe.calibrate:
        abcnets.calibrate(model, data.calibration_batches(recipe.calibrate))
        before["calibrated"] = accuracy(model, data)
    if is_main_process():
        print(f"{recipe.name}: " + ", ".join(f"{name} {value:.2f} %" for name, value in before.items()), flush=True)
    _tune(recipe, model, data, float_model if recipe.distill else None, out, results, before, replace)
    return model


def load_float(data: Data, out: str | Path, seed: int = 0, path: str | Path | None = None) -> nn.Module:
    """The pretrained float network of a data set, on the data's device.

    It is that of a file, else the one in `out`, else the one that comes with the repository.
    """
    model = build_network(data, seed).to(data.device, memory_format=torch.channels_last)
    run = run_name(data.name, seed=seed)
    found = path or _usual_file(run, Path(out))
    if path is None and found == trained_file(run):
        print(f"{run} is the one that comes with the repository: {Path(out) / run}.pt is missing")
    return load_weights(model, found)


def _usual_file(run: str, out: Path) -> Path:
    """Where the network of a run is: in `out`, unless only the repository has it."""
    usual = out / f"{run}.pt"
    return usual if usual.exists() or not trained_file(run).exists() else trained_file(run)


def trained_file(run: str, trained: Path = TRAINED) -> Path:
    """Where the network of a run is that comes with the repository: a float one's tensors, another one packed."""
    return trained / f"{run.replace('/', '-')}.safetensors"


def collect(data: Data, out: Path, results: Path, trained: Path = TRAINED) -> list[Path]:
    """Bring the networks of a data set's main rows from `out` to where they come with the repository.

    Of a float network all seeds, since others start from it, each tensor in float16 where that loses nothing; of the
    binarized ones the first, packed. Those that are not in `out` are named and stay as they are.
    """
    rows = main_runs(results, data.name)
    kept = []
    for row in rows[rows.N.isna() & rows.M.isna() | (rows.seed == 0)].to_dict("records"):
        source, path = out / f"{row['run']}.pt", trained_file(row["run"], trained)
        if not source.exists():
            print(f"{row['run']} stays as it is: {source} is missing; `{row['command']}` writes it")
            continue
        is_binary = row["M"] > 0 or row["N"] > 0
        model = load_weights(converted(build_network(data), row) if is_binary else build_network(data), source)
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_binary:
            abcnets.save_packed(abcnets.pack(model), path)
        else:
            tensors = tensors_of(model)
            halves = {name: in_float16(value) for name, value in tensors.items()}
            exact = {name: half for name, half in halves.items() if torch.equal(half.float(), tensors[name])}
            with replacing(path) as temporary:
                safetensors.torch.save_file(tensors | exact, temporary)
        kept.append(path)
    return kept


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers as a safetensors file takes them."""
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def file_bytes(model: nn.Module, is_binary: bool) -> int:
    """The bytes of a network's file: packed, or a float one's in float32."""
    if not is_binary:
        return len(safetensors.torch.save(tensors_of(model)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        abcnets.save_packed(abcnets.pack(model), path)
        return path.stat().st_size


def in_float16(value: Tensor) -> Tensor:
    """A tensor rounded to float16; as it is where that would not be finite, or where it holds no floats."""
    half = value.half() if value.is_floating_point() else value
    return half if half.isfinite().all() else value


def _claim(recipe: Recipe, out: str | Path, results: str | Path, replace: bool) -> None:
    """Before hours of training: whether its results can be written, and in place of nothing else.  Raises: Refused."""
    if not is_main_process():
        return
    begun_at()
    writable(Path(out))
    writable(Path(results))
    if (others := _others(recipe, Path(out) / f"{recipe.name}.pt", Path(results) / "runs.csv")) and not replace:
        raise Refused(f"{others[0]}: {OTHER_RECIPE}")
    for other in others:
        print(f"{other}: it will be replaced", flush=True)


def _others(recipe: Recipe, path: Path, table: Path) -> list[str]:
    """What is kept of another recipe under this name, in words."""
    others, checkpoint = [], path.with_suffix(".checkpoint")
    state = load_checkpoint(checkpoint)
    if state and (differing := difference(state["key"], recipe.key())):
        others.append(f"{checkpoint} is of another recipe ({differing})")
    elif state is None and path.exists():
        others.append(f"{path} is there, without a checkpoint to say by which recipe")
    rows = read_csv(table, ["run"]) if table.exists() else pd.DataFrame(columns=["run"])
    for row in rows[rows.run == recipe.name].to_dict("records"):
        if (known := row.get("recipe")) != recipe.short:
            others.append(f"{table} has a row of {recipe.name} by another recipe ({known or 'unknown'}, "
                          f"{row.get('epochs')} epochs; not {recipe.short}, {recipe.epochs})")  # fmt: skip
    return others


def _tune(recipe: Recipe, model: nn.Module, data: Data, teacher: nn.Module | None, out: str | Path,
          results: str | Path, before: dict, replace: bool) -> list[dict]:  # fmt: skip
    checkpoint, command = Path(out) / f"{recipe.name}.checkpoint", _command(recipe, data, Path(out))
    history = finetune(model, data, teacher, checkpoint=checkpoint, key=recipe.key(), replace=replace,
                       description=recipe.name, **recipe.training())  # fmt: skip
    _finish(recipe, model, data, out, results, history, command, before)
    return history


def _finish(recipe: Recipe, model: nn.Module, data: Data, out: str | Path, results: str | Path, history: list[dict],
            command: str, before: dict) -> None:  # fmt: skip
    """Keep a trained network; write its row, in place of an earlier one of the same name, and its curve."""
    with counted_levels(model) as counts:
        validation = accuracy(model, data, "validation")
    percent = {**dict.fromkeys(("float", "binarized", "calibrated")), **before, "validation": validation,
               "accuracy": accuracy(model, data)}  # fmt: skip
    if not is_main_process():
        return
    path = Path(out) / f"{recipe.name}.pt"
    save(model.state_dict(), path)
    sizes = abcnets.summary(model, next(data.test_batches(1))[0]).total()
    row = {
        **recipe.row(), **percent, "least_level": least_level(counts),
        "packed_bytes": sizes["packed_bytes"], "float_bytes": sizes["float_bytes"],
        "file_bytes": file_bytes(model, recipe.is_binary),
        "seconds": sum(entry["seconds"] for entry in history), **machine(data.device, torch.get_num_threads()),
        "command": command, "commit": begun_at(), "recipe": recipe.short,
    }  # fmt: skip
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    keep_rows(Path(results) / "runs.csv", [row], by=["run"])
    if history:
        write_csv(_curve_file(recipe.name, results), history)
    print(f"{recipe.name}: {'fine-tuned ' * recipe.is_binary}{percent['accuracy']:.2f} %, kept in {path}")


@contextlib.contextmanager
def counted_levels(model: nn.Module):
    """{layer: how many values fell on each level} of all that reaches the layers of binarized activations meanwhile."""
    counts = {}

    @torch.no_grad()
    def count(layer, inputs):
        thresholds = (0.5 - layer.vs.detach()).sort().values  # R >= 1/2 - v is the comparison, in every code
        levels = torch.bucketize(inputs[0].float().flatten(), thresholds, right=True)
        counts[layer] = counts.get(layer, 0) + torch.bincount(levels, minlength=len(thresholds) + 1)

    handles = [layer.register_forward_pre_hook(count) for layer in model.modules()
               if getattr(layer, "activation_bases", None) and getattr(layer, "active", False)]  # fmt: skip
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def least_level(counts: dict) -> float | None:
    """The least share, in percent, that any level of any layer has; None where all activations were float.

    At 0 there is a threshold that decides nothing, and bits and binary convolutions that are computed for nothing.
    """
    return min((100 * (found.min() / found.sum()).item() for found in counts.values()), default=None)


def _command(recipe: Recipe, data: Data, out: Path) -> str:
    """What repeats a fine-tuning, from wherever its start network is: in `out`, or with the repository.

    Empty where it is nowhere: no command has it.
    """
    if recipe.start_file:
        return recipe.command()
    seed = recipe.seed if recipe.float_seed is None else recipe.float_seed
    usual = _usual_file(run_name(recipe.dataset, seed=seed), out)
    with contextlib.suppress(DataError), torch.random.fork_rng(devices=[]):  # a new network seeds torch
        if fingerprint(load_weights(build_network(data), usual)) == recipe.start:
            return recipe.command()
    for path in sorted((out / recipe.name).parent.glob("float*.pt")):
        if fingerprint(load(path)) == recipe.start:
            return recipe.command(path)
    return ""


def _curve_file(run: str, results: str | Path) -> Path:
    return Path(results) / "curves" / f"{run.replace('/', '-')}.csv"


def curve(run: str, *results: str | Path) -> pd.DataFrame:
    """The training curve of a run, from the first of these folders of tables that has it; else an empty one."""
    columns = ["epoch", "loss", "train_accuracy", "validation_accuracy", "seconds"]
    for path in (_curve_file(run, folder) for folder in results):
        if path.exists():
            return read_csv(path).reindex(columns=columns)  # what was tested and not validated is empty
    return pd.DataFrame(columns=columns, dtype=float)


# --------------------------------------------------------------------------- All rows


COLUMNS = ["run", "dataset", "M", "N", "options", "seed", "epochs", "float", "binarized", "calibrated", "validation",
           "accuracy", "file_bytes"]  # fmt: skip  those of a run's row that others ask for


def recorded(path: str | Path, dataset: str) -> pd.DataFrame:
    """The rows of a table that are of a data set; none, where there is no table yet."""
    path = Path(path)
    rows = read_csv(path, ["dataset"]) if path.exists() else pd.DataFrame(columns=COLUMNS)
    return rows[rows.dataset == dataset]


def main_runs(results: str | Path, dataset: str) -> pd.DataFrame:
    """The rows of a data set's runs in which bases (or mixed ones), code and seed alone were chosen; NaN is float."""
    rows = recorded(Path(results) / "runs.csv", dataset)
    pairs = itertools.product(abcnets.CODES, abcnets.CODES)
    codes = [f"code={','.join(dict.fromkeys(pair))}" for pair in pairs]
    return rows[rows.options.isin(["", *codes, "mixed", *(f"mixed {word}" for word in codes)])]


def setting_of(row: dict) -> tuple[int | None, int | None, str]:
    """M, N and code of one of the `main_runs`, such as "binary" or "mixed binary"; None on a side that is float."""
    M, N = (int(count) if count > 0 else None for count in (row["M"], row["N"]))
    words = row["options"].split()
    code = next((word.removeprefix("code=") for word in words if word.startswith("code=")), "thermometer")
    return M, N, f"mixed {code}" if "mixed" in words else code


def converted(network: nn.Module, row: dict) -> nn.Module:
    """A float network in the form of one of the `main_runs` that is binarized, not trained."""
    M, N, code = setting_of(row)
    mixed, code = code.startswith("mixed "), code.removeprefix("mixed ")
    return Recipe(row["dataset"], M, N, code=code, mixed=mixed, settings=row.get("settings")).convert(network)


def table_of(kind: str, code: tuple[str, str] | None) -> str:
    """The name of the table "sensitivity" or "mixed" of a code; the thermometer's has no suffix."""
    word = ",".join(dict.fromkeys(code or ("thermometer",)))
    return f"{kind}.csv" if word == "thermometer" else f"{kind}-code={word}.csv"


def mixed_settings(dataset: str, M: int | None, N: int | None, code: tuple[str, str] | None, seed: int,
                   *results: Path) -> str:  # fmt: skip
    """The settings that `experiment.py sensitivity` found within the budget of M x N, from the first folder with them.

    Those of the float network with that seed, or else of another one.
    Raises: Refused where M and N are no budget that it looks for, DataError where nothing is recorded.
    """
    if M != N or M not in BUDGETS:
        counts = " or ".join(map(str, BUDGETS))
        raise Refused(f"--mixed takes as many weight bases as activation bases, a budget: {counts}, got {M} and {N}")
    for path in (Path(folder) / table_of("mixed", code) for folder in results):
        rows = recorded(path, dataset)
        rows = rows[rows.uniform == M] if len(rows) else rows
        if len(rows):
            return rows.sort_values("seed", key=lambda seeds: seeds != seed, kind="stable").mixed_settings.iloc[0]
    command = f"sensitivity --dataset {dataset}" + (f" --code {','.join(dict.fromkeys(code))}" if code else "")
    raise DataError(f"no mixed settings are recorded for {dataset} in the bytes of M = N = {M}: "
                    f"`python notebooks/experiment.py {command}` finds them")  # fmt: skip


def default_runs(results: str | Path, dataset: str, seed: int = 0) -> pd.DataFrame:
    """The rows of a data set's runs with default options; M and N are NaN on a side that is float."""
    rows = recorded(Path(results) / "runs.csv", dataset)
    return rows[(rows.seed == seed) & (rows.options == "")]
