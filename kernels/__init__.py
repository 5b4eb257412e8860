"""`import kernels` registers the fastest packed convolution that this machine can run; nothing else.

    import abcnets, kernels
    packed = abcnets.pack(model)        # from here on packed layers run on the engines below

Importing is cheap: Numba is loaded, and kernels are compiled (or read from Numba's cache), at the first packed call.
Where an engine cannot run (no Numba), its operators stay with the plain torch implementation in `abcnets.py`; ask
`kernels.engines()` which device runs what, or `kernels.require("cpu")` to be told instead of slowed down.
"""

from importlib.util import find_spec

import torch

import abcnets  # noqa: F401  (defines the operators that the engines implement)

_engines = {"cpu": "reference", "cuda": "reference"}


def engines() -> dict[str, str]:
    """Which implementation runs the packed operators on each device: {"cpu": "numba", "cuda": "reference"}."""
    return dict(_engines)


def require(device: str) -> None:
    """Raise RuntimeError, in one sentence, unless `device` has a registered engine."""
    if _engines.get(device, "reference") == "reference":
        wanted = "numba" if device == "cpu" else "numba-cuda and an NVIDIA GPU"
        raise RuntimeError(f"no {device} engine: the packed operators run on plain torch; it needs {wanted}")


def _register() -> None:
    if find_spec("numba"):
        from . import cpu_engine

        cpu_engine.register()
        _engines["cpu"] = "numba"
    if torch.cuda.is_available() and find_spec("numba_cuda") and find_spec("kernels.cuda_engine"):
        from . import cuda_engine

        cuda_engine.register()
        _engines["cuda"] = "numba-cuda"


_register()
