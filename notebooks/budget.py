"""Bases where they pay: which layers hurt most when binarized, and the best settings within a budget.

    table = budget.sensitivity(model, images)
    binary = abcnets.convert(model, settings=budget.allocate(table, 100_000))
    abcnets.calibrate(binary, images)

Needs abcnets.py and tqdm; SciPy for `allocate`; pictures.py and matplotlib for the table's picture.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

import abcnets


class Sensitivity(abcnets.Summary):
    """What `sensitivity` returns: a list of dicts, one a layer and setting. Prints as a table, and has a picture."""

    def table(self) -> list[list[str]]:
        return abcnets.Summary({**row, "error": f"{row['error']:.3g}"} for row in self).table()[:-1]  # without a total

    def picture(self):
        """A heat map of the errors, layers down, settings across; a matplotlib Figure (needs matplotlib)."""
        from pictures import heat_map

        return heat_map(self)


_REST = "everything else"


@torch.no_grad()
def sensitivity(model, batches, choices=((1, 1), (2, 2), (3, 3), (5, 5)), *, filter_fn=None, code="thermometer",
                progress=True, **bases):  # fmt: skip
    """Which layers hurt most when binarized: one layer and one choice of bases at a time, without labels.

    In a copy of the model this layer alone is binarized and calibrated on one half of the images. On the other half
    the copy's output Y is compared with the float model's y: the part of the variance of y that Y does not explain,

        error = min_{a >= 0} sum (y - a Y)^2 / sum y^2,   y and Y less their means over the images,

    0 where the output only changes its scale and offset, which a decision does not see, and 1 where nothing is left of
    it. The errors of several layers all but add up, which is what `allocate` builds on. A little of it is due to the
    BatchNorm statistics behind the layer, estimated anew on few images: the same for all choices of one layer.

    Args:
        model: a float model, in which `convert` finds layers to binarize; it is not touched. Its output is a
            tensor with the images in dimension 0, or a tuple or dict whose first entry is one.
        batches: as in `calibrate`; a thousand images are plenty.
        choices: pairs (M, N) or triples (M, N, code); None for a count leaves that side float, for both the layer.
        code: that of the pairs.
        filter_fn, **bases: as in `convert`.
        progress: show a bar.

    Returns: a table, one dict a layer and choice: layer, M, N, code (in the words of `abcnets.plan`), error,
        packed_bytes (of the layer's tensors in the file that `save_packed` writes), binary_macs (of bits: M * N for
        each multiply-accumulate on one image, in every code; 0 where a side is float). Other layers that `convert`
        could binarize have one row, as they stay, M, N and code None; a last row is what the file holds besides, so
        that the packed_bytes of one row a layer add up to the whole model.
    Raises: ValueError where no layer is to be binarized, or for fewer than two images, or no or bad choices.
    """
    choices = [tuple(choice) for choice in choices]
    if not choices or any(len(choice) not in (2, 3) for choice in choices):
        raise ValueError("choices must be pairs of weight bases and activation bases (M, N), or triples with a code, "
                         f"got {choices}")  # fmt: skip
    # The same settings in two spellings are measured once: one base has one code.
    choices = list(dict.fromkeys((M, N, _code_word(M, N, *(own or [code]))) for M, N, *own in choices))
    candidates, chosen = _converted(model, lambda layer, name: True), _converted(model, filter_fn)
    if not chosen:
        raise ValueError(f"sensitivity found no layer to binarize: of the model's {sorted(candidates)}, convert takes "
                         "all but the first and the last unless filter_fn says otherwise")  # fmt: skip
    images = _gather(batches).to(candidates[next(iter(chosen))].weight.device)
    fitted, measured = images[::2], images[1::2]
    wanted = _output(model, measured)
    macs = dict.fromkeys(candidates, 0) | {row["layer"]: row["macs"] for row in abcnets.summary(model, images[:1])}

    def row(name, layer, M=None, N=None, code=None, error=0.0):
        return {"layer": name, "M": M, "N": N, "code": code, "error": error, "packed_bytes": _stored_bytes(layer),
                "binary_macs": macs[name] * M * N if M and N else 0}  # fmt: skip

    rows = Sensitivity()
    with tqdm(total=len(chosen) * len(choices), desc="sensitivity", unit="setting", leave=False,
              **({} if progress else {"disable": True})) as bar:  # fmt: skip
        for name, layer in candidates.items():
            for M, N, word in choices if name in chosen else [(None, None, None)]:
                if M is None and N is None:
                    rows.append(row(name, layer))
                else:
                    setting = {name: _setting({"M": M, "N": N, "code": word})}
                    copied = abcnets.convert(model, filter_fn=lambda layer, name: False, settings=setting, **bases)
                    abcnets.calibrate(copied, fitted, progress=False)
                    error = _unexplained(wanted, _output(copied, measured))
                    rows.append(row(name, copied.get_submodule(name), M, N, word, error))
                bar.update(name in chosen)
    held = sum(_stored_bytes(module) for name, module in model.named_modules() if name not in candidates)
    rows.append({"layer": _REST, "M": None, "N": None, "code": None, "error": 0.0, "packed_bytes": held,
                 "binary_macs": 0})  # fmt: skip
    return rows


def _code_word(M: int | None, N: int | None, code) -> str | None:
    """A code as tables have it: "binary", "binary x uniform" where weights and activations differ, None for float."""
    return abcnets.plan(nn.Linear(1, 1, device="meta"), M, N, code=code)[0]["code"]


def _setting(row: dict) -> dict | None:
    """A row of the table as `convert` takes it; None for a layer that stays float."""
    if not row["M"] and not row["N"]:
        return None
    words = (row.get("code") or "thermometer").split(" x ")
    code = {} if words == ["thermometer"] else {"code": words[0] if len(words) == 1 else tuple(words)}
    return {"weight_bases": row["M"], "activation_bases": row["N"], **code}


def _converted(model: nn.Module, filter_fn) -> dict[str, nn.Module]:
    """The layers that `convert` takes, by name."""
    plan = abcnets.plan(model, 1, 1, filter_fn=filter_fn)
    return {row["layer"]: model.get_submodule(row["layer"]) for row in plan if row["why"] == "converted"}


def _stored_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's own tensors, its children's not counted, in the file that `save_packed` writes."""
    if getattr(layer, "weight_bases", None) and getattr(layer, "active", False):
        layer = abcnets.pack(layer)
    own = (tensor for name, tensor in layer.state_dict().items() if "." not in name)
    return sum(tensor.numel() * tensor.element_size() for tensor in own if isinstance(tensor, Tensor))


def _gather(batches) -> Tensor:
    """All images of `calibrate`'s batches in one."""
    batches = [batches] if isinstance(batches, Tensor) else list(batches)
    images = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
    if sum(map(len, images)) < 2:
        raise ValueError("sensitivity needs at least two images, one to calibrate on and one to measure on")
    images = torch.cat(images)
    if images.isnan().any():
        raise ValueError("sensitivity was given images that hold NaN")
    return images


def _output(model: nn.Module, images: Tensor) -> Tensor:
    """What a model puts out in eval mode; of several outputs the first."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        output = model(images)
    finally:
        for module in was_training:
            module.training = True
    first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if first is None or first.shape[:1] != images.shape[:1]:
        kind = type(output)
        raise ValueError(f"sensitivity compares outputs that are tensors with an entry an image, got {kind}")
    return first


def _unexplained(y: Tensor, Y: Tensor) -> float:
    """min_{a >= 0} |y - a Y|^2 / |y|^2 of outputs less their means over dimension 0: 1 - max(0, correlation)^2."""
    if torch.equal(y, Y):
        return 0.0
    y, Y = (x.double().reshape(len(x), -1) for x in (y, Y))
    y, Y = y - y.mean(0), Y - Y.mean(0)
    power = (y.square().sum() * Y.square().sum()).item()
    # Rounding could make the difference negative. Where one of both does not vary, nothing is explained.
    return max(0.0, 1 - (y * Y).sum().clamp(min=0).square().item() / power) if power != 0 else 1.0


def allocate(table, budget_bytes: int, budget_macs: int | None = None) -> dict[str, dict | None]:
    """The settings of least summed error within a budget, in the form that `convert` takes.

        minimize sum_l error[l, c_l]   over the choices c_l of the layers l
        subject to   sum_l packed_bytes[l, c_l] <= budget_bytes   and   sum_l binary_macs[l, c_l] <= budget_macs

    The solution is that of SciPy's integer programming, exact to a millionth of a budget. The budget in bytes is that
    of the whole packed model: all tensors in the file of `save_packed`, whose header adds some hundred bytes a layer.
    Bytes depend on M, and hardly on N and the code: without a budget of binary_macs, the time on one image, every layer
    gets the N and the code of least error that there are.

        table = budget.sensitivity(model, images)
        binary = abcnets.convert(model, settings=budget.allocate(table, 100_000))
        abcnets.calibrate(binary, images)

    Args:
        table: what `sensitivity` returned, or those of its rows that may be chosen from.
        budget_bytes, budget_macs: what the rows chosen, one a layer, may add up to.

    Returns: {layer: {"weight_bases": M, "activation_bases": N}}, with the "code" of a row that has another than the
        thermometer's, or {layer: None} for a layer that stays float.
    Raises: ValueError where nothing fits the budgets, saying the smallest that is possible, or for an empty table or
        an error that is not a number.
    """
    layers: dict[str, list[dict]] = {}
    for row in table:
        if not math.isfinite(row["error"]):
            raise ValueError(f"allocate can't weigh an error of {row['error']}, that of layer {row['layer']!r}")
        layers.setdefault(row["layer"], []).append(row)
    if not layers:
        raise ValueError("allocate needs a table of at least one layer, as sensitivity returns it")
    budgets = {"packed_bytes": budget_bytes}
    if budget_macs is not None:
        budgets["binary_macs"] = budget_macs
    for name, budget in budgets.items():
        smallest = sum(min(row[name] for row in rows) for rows in layers.values())
        if not budget >= smallest:
            raise ValueError(f"a budget of {budget:,} {name} is too small: the smallest possible is {smallest:,}")
    options = [[(row["error"], *(row[name] for name in budgets)) for row in rows] for rows in layers.values()]
    picks = _least_error(options, list(budgets.values()))
    if picks is None:
        raise ValueError(f"no choice of settings meets both budgets, {budget_bytes:,} bytes and {budget_macs:,} "
                         "binary macs, though each alone can be met")  # fmt: skip
    return {name: _setting(rows[pick]) for (name, rows), pick in zip(layers.items(), picks) if name != _REST}


def _least_error(options: list[list[tuple]], budgets: list[int]) -> list[int] | None:
    """The index of one option (error, cost, ...) a layer, of least summed error with costs within the budgets.

    An integer program: x_lc in {0, 1}, one of each layer's is 1. Costs are integers. Errors are scaled so that the
    largest is a million, since the solver is content within a millionth of the optimum.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ImportError("allocate needs SciPy's solver of integer programs: pip install scipy") from None
    error, *costs = np.array([option for choices in options for option in choices], dtype=float).T
    of_layer = np.repeat(np.arange(len(options)), [len(choices) for choices in options])
    one_each = LinearConstraint(np.arange(len(options))[:, None] == of_layer, 1, 1)
    within = [LinearConstraint(cost[None] / max(budget, 1), ub=min(budget, 1)) for cost, budget in zip(costs, budgets)]
    solution = milp(1e6 * error / (error.max() or 1), integrality=np.ones(len(error)), bounds=Bounds(0, 1),
                    constraints=[one_each, *within], options={"mip_rel_gap": 0})  # fmt: skip
    if solution.x is None:
        return None
    return [int(solution.x[of_layer == layer].argmax()) for layer in range(len(options))]


def against_uniform(model: nn.Module, table, images: list[Tensor], accuracy, counts=(2, 3), code="thermometer"):
    """Settings mixed to the bytes and binary macs of uniform ones, M = N = each count, against these; calibrated only.

    Args:
        model, table: a float model and what `sensitivity` returned for it.
        images: batches to calibrate on.
        accuracy: accuracy(model) -> percent.
        code: that of the uniform settings, as `convert` takes it.

    Yields: a row a count: uniform, then accuracy, summed_error, bytes and binary_macs of either, and the settings.
    Raises: ValueError where the table has no row of a uniform setting.
    """
    errors = {(row["layer"], *setting.values()): row["error"] for row in table if (setting := _setting(row))}
    layers = list(dict.fromkeys(row["layer"] for row in table if row["M"]))

    def measured(kind, settings):
        binary = abcnets.convert(model, settings=settings)
        sizes = abcnets.summary(binary, images[0][:1]).total()
        abcnets.calibrate(binary, images)
        error = sum(errors[(name, *setting.values())] for name, setting in settings.items() if setting)
        outcome = {"accuracy": round(accuracy(binary), 3), "summed_error": round(error, 5),
                   "bytes": sizes["packed_bytes"], "binary_macs": sizes["binary_macs"]}  # fmt: skip
        return {f"{kind}_{name}": value for name, value in outcome.items()}

    for count in counts:
        setting = _setting({"M": count, "N": count, "code": _code_word(count, count, code)})
        if any((name, *setting.values()) not in errors for name in layers):
            raise ValueError(f"the table lacks M = N = {count} in the code {code!r} for some of its layers")
        uniform = measured("uniform", dict.fromkeys(layers, setting))
        settings = allocate(table, uniform["uniform_bytes"], uniform["uniform_binary_macs"])
        words = " ".join(f"{name}:{_in_words(settings[name])}" for name in layers)
        yield {"uniform": count, **uniform, **measured("mixed", settings), "mixed_settings": words}


def from_words(words: str) -> dict[str, dict | None]:
    """Settings as `convert` takes them from a table's words: "3:1,3,binary 6:2,3 10:float".  Raises: ValueError."""

    def setting(text):
        if text == "float":
            return None
        M, N, *code = text.split(",")
        M, N = (None if count == "None" else int(count) for count in (M, N))
        return _setting({"M": M, "N": N, "code": " x ".join(code) or None})

    try:
        return {name: setting(text) for name, text in (each.rsplit(":", 1) for each in words.split())}
    except ValueError:
        raise ValueError(f'settings are written like "3:1,3,binary 6:2,3 10:float", got {words!r}') from None


def _in_words(setting: dict | None) -> str:
    """2,3 or, in another code than the thermometer's, 2,3,binary or 2,3,binary,uniform; or float."""
    if setting is None:
        return "float"
    code = setting.get("code", ())
    words = (code,) if isinstance(code, str) else code
    return ",".join(map(str, (setting["weight_bases"], setting["activation_bases"], *words)))
