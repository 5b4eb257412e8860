"""Which engine runs the operators on a device: `abcnets.py` asks once for each, at the first call of one."""

import importlib

import torch

NAMES = {"cpu": "numba", "cuda": "numba-cuda"}
NEEDS = {"cpu": "pip install --upgrade numba numpy", "cuda": "pip install --upgrade numba-cuda[cu13]"}

# An engine has some of them, or all.
OPERATORS = ("packed_conv", "packed_max_pool", "packed_chain", "staircase", "staircase_backward", "fit_levels")

_libraries = {}  # an operator's implementation lives as long as its library object


def register(abcnets, device: str, forked: bool = False) -> dict:
    """Give the operators of abcnets (`OPERATORS`) their fastest implementation on a device.

    Args:
        abcnets: the module that asks, whose plain operators run what an engine does not compute.
        device: "cpu" or "cuda".
        forked: whether this process was forked from one that may have used torch's threads.

    Returns: {"engine": its name and how it counts, "pays": a function (M, N, thresholds, spatial_dims, groups) ->
        whether bits are faster there than one float convolution, "chains": whether it has `packed_chain`,
        "multiplies_bytes": whether that runs a layer in eight bits}, or
        {"missing": why there is no engine, "install": what would help, or ""}. An engine is tried before it is
        registered, and registering twice is harmless.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return {"missing": "no NVIDIA GPU", "install": ""}
    try:
        if forked:
            importlib.import_module(".cpu.system", __package__).after_fork()
        engine = importlib.import_module(f".{device}.engine", __package__)
        engine.try_it()
    except Exception as error:  # whatever is missing, too old or broken, layers must still compute
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return {"missing": reason[0], "install": NEEDS[device]}
    implement(device, engine, abcnets)
    tile = f" ({engine.tile()})" if hasattr(engine, "tile") else ""
    return {
        "engine": NAMES[device] + tile, "pays": engine.pays, "chains": hasattr(engine, "packed_chain"),
        "multiplies_bytes": getattr(engine, "multiplies_bytes", bool)(),
    }  # fmt: skip


def implement(device: str, engine, abcnets) -> None:
    """Make an engine's operators the device's; once, however often it is asked."""
    if device not in _libraries:
        engine.use(abcnets)
        library = torch.library.Library("abcnets", "IMPL")
        for operator in OPERATORS:
            if hasattr(engine, operator):
                library.impl(operator, getattr(engine, operator), device.upper())
        _libraries[device] = library
