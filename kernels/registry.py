"""Which engine runs the packed operators on which device: `abcnets.py` asks once, at the first packed call."""


def register(abcnets) -> dict[str, dict]:
    """Give the operators abcnets::packed_conv and abcnets::packed_max_pool their fastest implementation here.

    Args:
        abcnets: the module that asks, whose plain operators run what an engine does not compute.

    Returns: for each device {"engine": name, "pays": a function (M, N, spatial_dims, groups) -> whether bits are faster
        there than one float convolution}, or {"missing": why there is no engine, "install": what would help, or ""}.
        An engine is tried before it is registered, and registering twice is harmless.
    """
    return {"cpu": _register_cpu(abcnets), "cuda": _register_cuda(abcnets)}


def _register_cpu(abcnets) -> dict:
    try:
        from .cpu import engine

        engine.try_it()
    except Exception as error:  # whatever is missing, too old or broken, layers must still compute
        return {"missing": _first_line(error), "install": "pip install --upgrade numba numpy"}
    engine.register(abcnets)
    return {"engine": "numba", "pays": engine.pays}


def _register_cuda(abcnets) -> dict:
    import torch

    if not torch.cuda.is_available():
        return {"missing": "no NVIDIA GPU", "install": ""}
    try:
        from .cuda import engine

        engine.try_it()
    except Exception as error:
        return {"missing": _first_line(error), "install": "pip install --upgrade numba-cuda"}
    engine.register(abcnets)
    return {"engine": "numba-cuda", "pays": engine.pays}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
