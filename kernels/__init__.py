"""The package `abcnets_kernels`: what makes packed layers fast. `abcnets.py` finds it and loads it by itself.

    registry.py             which engine runs on which device
    layout.py               how bits, weights, thresholds and border constants lie in memory; the algebra
    cache.py                what is made once and kept beside a layer's tensors
    cpu/, cuda/             the engines, from naive to fastest, one idea a file
    fuse.py                 bits from layer to layer
    export.py, int8.py      ONNX files; their integer form
    check.py, clock.py      random layers and the reference; one clock
    command.py              what the command lines share
    bench.py, report.py     one CSV, one table, one figure for every rung and rival

It is installed and imported as `abcnets_kernels`. In the repository its folder is called `kernels`, and it answers to
that name too (`python -m kernels.bench`), with the very same modules behind both.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path

NAME = "abcnets_kernels"
INTERFACE = 7  # what `register`, `fuse`, `export` and abcnets.py agree on; each side refuses another number


class _OtherName(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds `kernels.x` for `kernels` this package under its folder's name: the one module `abcnets_kernels.x`."""

    def __init__(self, alias: str):
        self.alias = alias

    def _real(self, name: str) -> str:
        return NAME + name[len(self.alias) :]

    def find_spec(self, name, path=None, target=None):
        real = importlib.util.find_spec(self._real(name)) if name.startswith(self.alias + ".") else None
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        spec = importlib.util.spec_from_loader(name, self, origin=real.origin, is_package=is_package)
        spec.has_location = True
        return spec

    def create_module(self, spec):
        module = importlib.import_module(self._real(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state  # the import system has just put the alias's in its place

    def get_source(self, name):
        real = importlib.util.find_spec(self._real(name))
        return real.loader.get_source(real.name)

    def get_code(self, name):  # for `python -m`
        real = importlib.util.find_spec(self._real(name))
        return real.loader.get_code(real.name)


def _answer_to(alias: str) -> None:
    """Make the alias another name of the one package."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, __file__, submodule_search_locations=[str(_HERE)])
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    there = Path(sys.modules[NAME].__file__).resolve().parent
    if there != _HERE:
        raise ImportError(f"{NAME} is loaded from {there} already; {_HERE} is another copy of it")
    sys.meta_path.insert(0, _OtherName(alias))
    sys.modules[alias] = sys.modules[NAME]


_HERE = Path(__file__).resolve().parent

if __name__ != NAME:
    _answer_to(__name__)
