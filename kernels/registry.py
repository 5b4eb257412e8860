"""Which engine runs the packed operators on which device: `abcnets.py` asks once, at the first packed call."""

import importlib

import torch

NAMES = {"cpu": "numba", "cuda": "numba-cuda"}
NEEDS = {"cpu": "pip install --upgrade numba numpy", "cuda": "pip install --upgrade numba-cuda[cu13]"}

_libraries = {}  # an operator's implementation lives as long as its library object


def register(abcnets) -> dict[str, dict]:
    """Give the operators abcnets::packed_conv and abcnets::packed_max_pool their fastest implementation here.

    Args:
        abcnets: the module that asks, whose plain operators run what an engine does not compute.

    Returns: for each device {"engine": name, "pays": a function (M, N, spatial_dims, groups) -> whether bits are faster
        there than one float convolution}, or {"missing": why there is no engine, "install": what would help, or ""}.
        An engine is tried before it is registered, and registering twice is harmless.
    """
    no_gpu = {"missing": "no NVIDIA GPU", "install": ""}
    return {"cpu": _find("cpu", abcnets), "cuda": _find("cuda", abcnets) if torch.cuda.is_available() else no_gpu}


def _find(device: str, abcnets) -> dict:
    try:
        engine = importlib.import_module(f".{device}.engine", __package__)
        engine.try_it()
    except Exception as error:  # whatever is missing, too old or broken, layers must still compute
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return {"missing": reason[0], "install": NEEDS[device]}
    implement(device, engine, abcnets)
    return {"engine": NAMES[device], "pays": engine.pays}


def implement(device: str, engine, abcnets) -> None:
    """Make an engine's packed_conv and packed_max_pool the device's; once, however often it is asked."""
    if device not in _libraries:
        engine.plain = abcnets
        library = torch.library.Library("abcnets", "IMPL")
        for operator in ("packed_conv", "packed_max_pool"):
            library.impl(operator, getattr(engine, operator), device.upper())
        _libraries[device] = library
