"""The command line of the experiments.

    python notebooks/experiment.py pretrain --dataset fashion-mnist
    python notebooks/experiment.py finetune --dataset fashion-mnist --weight-bases 3 --activation-bases 3
    python notebooks/experiment.py evaluate --dataset fashion-mnist --weight-bases 3 --activation-bases 3
    python notebooks/experiment.py table --dataset fashion-mnist
    python notebooks/experiment.py collect --dataset fashion-mnist
    python notebooks/experiment.py sensitivity --dataset fashion-mnist
    python notebooks/experiment.py step
    python notebooks/experiment.py compile

Every run is what its recipe says and is named after it (`fashion-mnist/M3-N3`), keeps its network and its checkpoint in
`out/`, goes on where it was if it is started again after Ctrl-C or a kill, and leaves a row in `out/results/runs.csv`
and its training curve in `out/results/curves/`. What is kept of another recipe under the same name, such as of other
epochs, is replaced on `--replace` only. (The tables in `notebooks/results/` are those of `make results` and its like,
and `collect` brings their networks to `notebooks/trained/`, from where they are taken if `out/` has none.)

The same commands run on many devices, by Hugging Face Accelerate, wherever one of these starts them:

    accelerate launch --multi_gpu notebooks/experiment.py pretrain ...                      all GPUs of this machine
    torchrun --nproc-per-node 2 notebooks/experiment.py pretrain --device cpu ...           two processes on the CPU
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-endpoint HOST:29500 notebooks/...         four machines, on each

`--batch-size` is what one optimizer step sees, on all of them together. See `train`.
"""

import argparse
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where abcnets.py and kernels/ are

import budget
import torch
from accelerate import PartialState
from data import Data, load_data
from files import RESULTS, ROOT, TRAINED, writable
from recipe import Recipe
from runs import (
    BUDGETS,
    binarized,
    collect,
    keep_rows,
    load_float,
    mixed_settings,
    pretrained,
    read_csv,
    recorded,
    table_of,
    write_csv,
)
from step import NETWORKS, measure_compiled, measure_steps, use_threads
from torch import nn
from training import accuracy, best_device, is_main_process, load_weights, own_device

import abcnets
from kernels.clock import machine
from kernels.command import (
    COUNT,
    COUNT_OR_0,
    POSITIVE,
    POSITIVE_OR_0,
    SEED,
    SHARE,
    THREADS,
    Parser,
    Refused,
    checked,
    interrupt_on_sigterm,
    present_device,
)


def run_pretrain(options) -> None:
    pretrained(_load(options), options.out, options.results, replace=options.replace, **_given(options))


def run_finetune(options) -> None:
    _check_bases(options)
    data = _load(options)
    binarized(_load_float(options, data), data, options.out, options.results, replace=options.replace,
              **_given(options))  # fmt: skip


def run_evaluate(options) -> None:
    data = _load(options)
    start = _load_float(options, data) if options.M or options.N or options.start_file else None
    recipe = recipe_of(options, data, start)
    if recipe.mixed:  # as it was trained, whatever was found since
        rows = recorded(options.results / "runs.csv", data.name)
        kept = [row["settings"] for row in rows.to_dict("records") if row["run"] == recipe.name]
        recipe = replace(recipe, settings=kept[0] if kept else recipe.settings)
    path = options.out / f"{recipe.name}.pt"
    if recipe.is_binary:
        model = load_weights(recipe.convert(start), path)
    else:
        model = start or load_float(data, options.out, recipe.seed, path)
    percent = accuracy(model, data)
    if is_main_process():
        print(f"{recipe.name}: {percent:.2f} %")


def run_table(options) -> None:
    """Percentages of the test images, as far as they are known."""
    rows = read_csv(options.results / "runs.csv", ["run", "dataset", "M", "N"])
    rows = rows[(rows.M.notna() | rows.N.notna()) & (rows.dataset == (options.dataset or rows.dataset))]
    if rows.empty:
        which = f" of {options.dataset}" if options.dataset else ""
        raise Refused(f"{options.results / 'runs.csv'} has no binarized run{which}: `finetune` records one")
    print(f"{'':32}{'float':>9}{'after binarizing':>18}{'after calibrating':>19}{'after fine-tuning':>19}")
    for _, row in rows.iterrows():
        percent = row[["float", "binarized", "calibrated", "accuracy"]]
        cells = ("-" if value != value else f"{value:.2f} %" for value in percent)  # NaN, where nothing was measured
        print("{:32}{:>9}{:>18}{:>19}{:>19}".format(row["run"], *cells))


def run_collect(options) -> None:
    writable(options.trained)
    for path in collect(load_data(options.dataset, options.data), options.out, options.results, options.trained):
        print(f"{path}: {path.stat().st_size:,} bytes")


def run_sensitivity(options) -> None:
    """Errors by layer and setting; and settings mixed to the bytes and binary macs of uniform ones, against these.

    Everything is calibrated, nothing trained. Another code than the thermometer's has tables of its own.
    """
    writable(options.results)
    data = _load(options)
    model = load_float(data, options.out, options.seed, options.start_file)
    counts = range(1, options.most + 1)
    choices = [(M, N) for M in counts for N in counts if abs(M - N) <= options.apart]
    code = options.code or ("thermometer", "thermometer")
    table = budget.sensitivity(model, data.calibration_batches(options.images), choices, code=code)
    common, where = {"dataset": data.name, "seed": options.seed}, machine(data.device, torch.get_num_threads())
    key = list(common)
    keep_rows(options.results / table_of("sensitivity", code), [{**common, **row, **where} for row in table], key)
    whole, rows = round(accuracy(model, data), 3), []
    for row in budget.against_uniform(model, table, data.calibration_batches(), lambda binary: accuracy(binary, data),
                                      BUDGETS, code):  # fmt: skip
        rows.append({**common, "uniform": row.pop("uniform"), "float": whole, **row, **where})
        print("{dataset}: M = N = {uniform} {uniform_accuracy:.2f} %, mixed {mixed_accuracy:.2f} %: {mixed_settings}"
              .format(**rows[-1]), flush=True)  # fmt: skip
    keep_rows(options.results / table_of("mixed", code), rows, key)


def run_step(options) -> None:
    _check_bases(options)
    writable(options.results)
    key = ["network", "M", "N", "code", "precision", "batch_size", "threads"]
    for row in measure_steps(options.M, options.N, options.rounds, options.threads, batch_size=options.batch_size,
                             device=options.device, code=options.code or ("thermometer", "thermometer"),
                             network=options.network):  # fmt: skip
        keep_rows(options.results / "step.csv", [row], key)
        print("{network}, {precision}: step {float_ms} -> {binarized_ms} ms, {ratio} x; "
              "memory {float_mib} -> {binarized_mib} MiB, {memory_ratio} x".format(**row), flush=True)  # fmt: skip


def run_compile(options) -> None:
    if not options.M:
        raise Refused("compile measures packed networks too, which --weight-bases none can't be")
    writable(options.results)
    rows = []
    for row in measure_compiled(options.M, options.N, options.rounds,
                                batch_size=options.batch_size, device=options.device):  # fmt: skip
        rows.append(row)
        print("{what}, {form}: {eager_ms} -> {compiled_ms} ms, {speedup} x as fast".format(**row), flush=True)
    write_csv(options.results / "compile.csv", rows)


def _load(options) -> Data:
    with PartialState().local_main_process_first():  # one process downloads and decodes
        return load_data(options.dataset, options.data, options.limit).to(options.device)


def _load_float(options, data: Data) -> nn.Module:
    return load_float(data, options.out, _float_seed(options), options.start_file)


def _float_seed(options) -> int:
    return options.seed if options.float_seed is None else options.float_seed


def _given(options) -> dict:
    """The fields of a `Recipe` that the command line has, but for those that the data know."""
    names = {field.name for field in fields(Recipe)} - {"dataset", "limit"}
    given = {name: value for name, value in vars(options).items() if name in names}
    if given.get("mixed"):
        folders = [options.results or options.out / "results", RESULTS]
        budget_of = options.dataset, options.M, options.N, options.code, _float_seed(options)
        given["settings"] = mixed_settings(*budget_of, *folders)
    return given


def recipe_of(options, data: Data, start: nn.Module | None = None) -> Recipe:
    """What `pretrain` and `finetune` follow: a start network teaches too."""
    return Recipe.of(data, start, start, **_given(options))


def _check_bases(options) -> None:
    if not (options.M or options.N):
        raise Refused("--weight-bases and --activation-bases are both none, which leaves nothing to binarize")


BASES = checked(lambda text: None if text in ("none", "float") else int(text), "a whole number above 0, or none,",
                lambda count: count is None or count > 0)  # fmt: skip
CODE = checked(lambda text: tuple(text.split(",")) if "," in text else (text, text),
               f"one or two of {', '.join(abcnets.CODES)},",
               lambda words: len(words) == 2 and set(words) <= set(abcnets.CODES))  # fmt: skip
PART = checked(float, "a number from 0 to below 1", lambda part: 0 <= part < 1)
SEVERAL = checked(int, "a whole number above 1", lambda count: count > 1)


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = Parser(add_help=False)
    places.add_argument("--out", type=Path, default=ROOT / "out", help="networks and checkpoints (default: out)")
    places.add_argument("--results", type=Path, help="tables (default: results/ in OUT)")
    places.add_argument("--data", type=Path, default=ROOT / "data", help="where data sets are kept (default: data)")
    where = Parser(add_help=False)
    where.add_argument("--device", type=present_device, default=best_device(), help="default: cuda, else mps, else cpu")
    where.add_argument("--threads", type=THREADS, help="CPU threads (default: torch's choice)")
    dataset = Parser(add_help=False)
    dataset.add_argument("--dataset", default="digits", metavar="NAME",
                         help="digits (default), fashion-mnist, cifar10, cifar10-jpeg, folder:PATH")  # fmt: skip
    dataset.add_argument("--limit", type=COUNT, metavar="IMAGES", help="train on so many images only")
    dataset.add_argument("--seed", type=SEED, default=0)
    training = Parser(add_help=False)
    training.add_argument("--batch-size", type=COUNT, help="default: 128")
    training.add_argument("--accumulate", type=COUNT, metavar="PARTS", help="take a batch in so many parts")
    training.add_argument("--lr", type=POSITIVE, help="peak learning rate")
    training.add_argument("--weight-decay", type=POSITIVE_OR_0)
    training.add_argument("--warmup", type=PART, help="of the time, while the rate goes up (default: 0.1)")
    training.add_argument("--exact", type=SHARE, help="of the time, in float32 at the end (default: 0.1)")
    bases = Parser(add_help=False)
    bases.add_argument("--weight-bases", dest="M", type=BASES, default=3, metavar="M", help="3, or none: float")
    bases.add_argument("--activation-bases", dest="N", type=BASES, default=3, metavar="N", help="3, or none: float")
    variations = Parser(add_help=False)
    start = {"dest": "start_file", "type": Path, "metavar": "PATH", "help": "default: the pretrained network"}
    variations.add_argument("--from", **start)
    variations.add_argument("--per-layer", action="store_true", help="alphas per layer, not per output channel")
    variations.add_argument("--even-shifts", action="store_true", help="the paper's shifts of the weight bases")
    variations.add_argument("--learn-shifts", action="store_true", help="train them too")
    variations.add_argument("--scale-gradient", action="store_true", help="dL/dW times the sum of the alphas")
    code = {"type": CODE, "metavar": "CODE", "help": f"{', '.join(abcnets.CODES)}; or two, weights,activations"}
    variations.add_argument("--code", **code)
    variations.add_argument("--mixed", action="store_true",
                            help="bases of each layer, within M x N of all, as `sensitivity` found them")  # fmt: skip
    variations.add_argument("--zero", action=argparse.BooleanOptionalAction,
                            help="whether a 0 stays 0 (default: not in the thermometer code)")  # fmt: skip
    variations.add_argument("--float-seed", type=SEED, metavar="SEED", help="of the float network (default: --seed)")
    variations.add_argument("--calibrate", type=COUNT_OR_0, metavar="IMAGES", help="0: do not (default: 2048)")
    variations.add_argument("--distill", type=SHARE, help="the teacher's part of the loss; 0: none (default: 0.5)")
    variations.add_argument("--lr-activation", type=POSITIVE, help="peak learning rate of vs and betas")

    commands = parser.add_subparsers(title="commands", required=True)

    def command(name, run, text, *parents):
        added = commands.add_parser(name, help=text, description=text, parents=[*parents, places])
        added.set_defaults(run=run)
        return added

    epochs = "default: 12 for digits, 20 (fine-tuning 10) for fashion-mnist, else 30 (15)"
    train = command("pretrain", run_pretrain, "train a float network", dataset, training, where)
    train.add_argument("--epochs", type=COUNT, help=epochs)
    tune = command("finetune", run_finetune, "binarize a float network, calibrate it, train it on", dataset, bases,
                   variations, training, where)  # fmt: skip
    tune.add_argument("--epochs", type=COUNT_OR_0, help=f"{epochs}; 0: calibrate only")
    for trains in (train, tune):
        trains.add_argument("--replace", action="store_true",
                            help="also what is kept of another recipe under the same name")  # fmt: skip
    command("evaluate", run_evaluate, "test accuracy of a kept network", dataset, bases, variations, training, where)
    table = command("table", run_table, "float, binarized, calibrated, fine-tuned accuracy of all recorded runs")
    table.add_argument("--dataset", help="only this one")
    kept = command("collect", run_collect, "the networks of the main rows, from OUT to where the repository has them")
    kept.add_argument("--dataset", default="digits", metavar="NAME", help="default: digits")
    kept.add_argument("--trained", type=Path, default=TRAINED, help="default: notebooks/trained")
    layers = command("sensitivity", run_sensitivity, "which layers hurt most; what mixing gains", dataset, where)
    layers.add_argument("--from", **start)
    layers.add_argument("--code", **code)
    layers.add_argument("--images", type=SEVERAL, default=1024, help="training images to measure on (default: 1024)")
    layers.add_argument("--most", type=COUNT, default=5, help="largest M and N of a layer (default: 5)")
    layers.add_argument("--apart", type=COUNT_OR_0, default=1, help="largest |M - N| of a layer (default: 1)")
    step = command("step", run_step, "time and memory of a training step, binarized against float", bases, where)
    step.add_argument("--code", **code)
    step.add_argument("--network", choices=NETWORKS, default="nine-layer", help="default: nine-layer")
    step.add_argument("--batch-size", type=COUNT, default=128)
    step.add_argument("--rounds", type=COUNT, default=25)
    compiling = command("compile", run_compile, "time of torch.compile against eager", bases, where)
    compiling.add_argument("--batch-size", type=COUNT, default=128)
    compiling.add_argument("--rounds", type=COUNT, default=25)
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.results is None:
        options.results = options.out / "results"
    if "device" in options:
        options.device = own_device(options.device)
        use_threads(options.threads)
    parser.run(options.run, options)


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE", "1") == "1":  # a launcher that ends many processes waits for none to tidy up
        interrupt_on_sigterm()
    main()
    PartialState().destroy_process_group()
