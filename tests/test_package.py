"""How abcnets gets to its users, and how it finds its engines: one file, two folders, inside a package, as a wheel."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]  # the first lines of use

FAST = """
import torch, abcnets
layer = abcnets.ABCConv2d(40, 24, 3, padding=1, weight_bases=2, activation_bases=1, active=True)
packed, x = abcnets.pack(layer), torch.randn(2, 40, 9, 9)
assert torch.allclose(packed(x), layer(x), atol=1e-4)
print("engine:", abcnets.engines()["cpu"])
"""


def run(folder, code, *path, **environment):
    """What a fresh process prints that runs the code in a folder; it sees this repository nowhere."""
    (folder / "program.py").write_text(code)
    environment = {"PATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run([sys.executable, "-W", "always::UserWarning", "program.py"], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def copy_to(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        source = ROOT / name
        if source.is_dir():
            # With what Numba has compiled: times are kept, by which it knows that this is the same code.
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.pyc", "results"))
        else:
            shutil.copy(source, folder / name)
    return folder


# The README's first example, wherever one has copied things to


def test_one_file_alone_says_that_it_runs_floats_and_what_to_do(tmp_path):
    said = run(copy_to(tmp_path, "abcnets.py"), EXAMPLE)
    assert "'cpu': 'float convolutions: abcnets_kernels is neither installed nor" in said
    assert said.count("packed layers run as float convolutions on cpu") == 1 and "copy that folder there" in said


def test_with_the_folder_beside_it_runs_bits(tmp_path):
    said = run(copy_to(tmp_path, "abcnets.py", "kernels"), EXAMPLE)
    assert "'cpu': 'numba (" in said and "Warning" not in said


@pytest.mark.parametrize("names", [["abcnets.py"], ["abcnets.py", "kernels"]])
def test_inside_a_package_of_ones_own(tmp_path, names):
    copy_to(tmp_path / "mine", *names)
    (tmp_path / "mine/__init__.py").write_text("from . import abcnets\n")
    said = run(tmp_path, EXAMPLE.replace("import abcnets", "from mine import abcnets"))
    assert ("'cpu': 'numba (" if len(names) == 2 else "'cpu': 'float convolutions") in said


VENDORED = """
import sys, torch
torch.cuda.is_available = lambda: True  # and Numba simulates it: NUMBA_ENABLE_CUDASIM
from mine import abcnets
layer = abcnets.ABCLinear(5, 2, weight_bases=1, activation_bases=1, active=True)
packed, x = abcnets.pack(layer), torch.randn(2, 5)
thresholds, flips = packed.thresholds[:, None].repeat(1, 5), torch.zeros(5, dtype=torch.bool)
tensors = packed.bits, packed.alphas.requires_grad_(), packed.betas, thresholds, flips, packed.bias, packed.zero
assert packed.runs_bits("cuda"), abcnets.engines()
cuda = sys.modules["abcnets_kernels.cuda.engine"]
for images in (x.requires_grad_(), x.double()):  # the kernels, and what the package hands back to its abcnets
    y = cuda.packed_conv(images, *tensors, 5, [], [], [], 1, None, None, 0)
    assert torch.allclose(y.float(), layer(x), atol=1e-4) and not y.requires_grad
assert not {"abcnets", "kernels"} & set(sys.modules)
"""


def test_a_vendored_copy_runs_on_a_gpu_by_no_name_but_its_own(tmp_path):
    pytest.importorskip("numba_cuda")
    copy_to(tmp_path / "mine", "abcnets.py", "kernels")
    (tmp_path / "mine/__init__.py").touch()
    run(tmp_path, VENDORED, NUMBA_ENABLE_CUDASIM="1")


BARE = """
import importlib.util, torch, types
if how == "executed":
    names = {}
    exec(open(path).read(), names)
    abcnets = types.SimpleNamespace(**names)
else:  # as importlib's documentation does it, but for the line with sys.modules
    spec = importlib.util.spec_from_file_location("loaded", path)
    abcnets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(abcnets)
model = abcnets.convert(torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)]), 2, 2)
packed, x = abcnets.pack(model, engine="bits"), torch.randn(3, 8)
assert torch.allclose(packed(x), model(x), atol=1e-5)
print(abcnets.engines())
try:
    assert torch.allclose(abcnets.fuse(packed)(x), packed(x), atol=1e-5)
except ImportError as error:
    print("fuse:", error)
"""


def test_the_file_need_not_be_a_module(tmp_path):
    path = str(ROOT / "abcnets.py")
    said = run(tmp_path, f"how, path = 'loaded', {path!r}" + BARE)
    assert "'cpu': 'numba (" in said and "fuse:" not in said
    said = run(tmp_path, f"how, path = 'executed', {path!r}" + BARE)  # a file of no name, beside which nothing lies
    wanted = "abcnets_kernels is neither installed nor the folder kernels/ beside abcnets.py: copy that folder there"
    assert f"'cpu': 'float convolutions: {wanted}'" in said and f"fuse: {wanted}" in said


# Installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An empty folder into which the wheel of the repository was installed."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    copy_to(source, "abcnets.py", "kernels", "pyproject.toml", "README.md", "LICENSE")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    return site


def test_the_wheel_brings_two_packages_and_none_called_kernels(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names - {"__pycache__"} == {"abcnets.py", "abcnets_kernels"}
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    needs = dict(re.findall(r"Requires-Dist: ([\w-]+)[^;\n]*(?:; extra == .(\w+).)?", metadata))
    assert {name for name, extra in needs.items() if not extra} == {"torch", "numpy", "numba"}
    assert set(needs.values()) == {"", "cuda", "export", "files"}


def test_the_wheel_runs_bits_beside_a_foreign_package_called_kernels(installed, tmp_path):
    foreign = tmp_path / "foreign" / "kernels"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("NAME = 'foreign'\n")
    same = "import kernels, abcnets_kernels\nassert kernels.NAME == 'foreign' != abcnets_kernels.NAME\n"
    said = run(tmp_path, EXAMPLE + same + "print(abcnets_kernels.__file__)", foreign.parent, installed)
    assert "'cpu': 'numba (" in said and str(installed) in said
    run(tmp_path, "import kernels\n" + FAST + "assert kernels.NAME == 'foreign'", foreign.parent, installed)


# What the loader refuses


def test_a_foreign_folder_beside_the_file_is_left_alone(tmp_path):
    copy_to(tmp_path, "abcnets.py")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("raise SystemExit('a foreign package was run')\n")
    assert "engine: float convolutions: abcnets_kernels is neither" in run(tmp_path, FAST)


def test_versions_that_do_not_fit_are_said_and_floats_are_run(tmp_path):
    copy_to(tmp_path, "abcnets.py", "kernels")
    init = tmp_path / "kernels/__init__.py"
    init.write_text(init.read_text().replace("INTERFACE = 7 ", "INTERFACE = 99 "))
    said = run(tmp_path, FAST)
    assert "has interface 99" in said and "different versions" in said and "engine: float convolutions" in said


def test_two_copies_in_one_process_share_their_operators_or_say_that_they_differ(tmp_path):
    copy_to(tmp_path, "abcnets.py", "kernels")
    copy_to(tmp_path / "mine", "abcnets.py", "kernels")
    (tmp_path / "mine/__init__.py").touch()
    both = FAST + FAST.replace("import torch, abcnets", "from mine import abcnets")
    assert run(tmp_path, both).count("engine: numba") == 2
    other = tmp_path / "mine/abcnets.py"
    other.write_text(other.read_text().replace("_INTERFACE = 7 ", "_INTERFACE = 8 "))
    code = FAST + "try:\n    import mine.abcnets\nexcept ImportError as error:\n    print('refused:', error)"
    assert "refused: this process has loaded another version of abcnets, whose operators have interface 7" in run(
        tmp_path, code
    )


STRANGERS = """
import torch, abcnets
from mine import abcnets as other
network = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
model, x = other.convert(network, 2, 2), torch.randn(3, 8)
packed = other.pack(model)
assert other.PackedLayer is not abcnets.PackedLayer
calls = [(abcnets.binarize, model), (abcnets.plan, model), (abcnets.convert, model), (abcnets.calibrate, model, x),
         (abcnets.pack, model), (abcnets.load_packed, "file", model)]
for one in (model, packed):
    calls += [(abcnets.summary, one, x), (abcnets.save_packed, one, "file"), (abcnets.fuse, one),
              (abcnets.export_onnx, one, x, "file")]
for function, *arguments in calls:
    try:
        print(function.__name__, function(*arguments))
    except ValueError as error:
        assert "is of another copy of abcnets (mine.abcnets) than this one (abcnets)" in str(error), error
        print("refused:", function.__name__)
"""


def test_layers_of_another_copy_are_refused_in_one_sentence(tmp_path):
    """They are no layers of this copy, which would leave them out as it does strangers'."""
    copy_to(tmp_path, "abcnets.py")
    copy_to(tmp_path / "mine", "abcnets.py")
    (tmp_path / "mine/__init__.py").touch()
    assert run(tmp_path, STRANGERS).count("refused: ") == 14
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("fake, reason", [
    ("raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.9.')", "Numba needs NumPy 2.3 or less"),
    ("raise SystemError('initialization of _internal failed')", "initialization of _internal failed"),
    ("__version__ = '0.1'", "cannot import name"),
])  # fmt: skip
def test_a_numba_that_does_not_work_is_found_and_named(tmp_path, fake, reason):
    copy_to(tmp_path, "abcnets.py", "kernels")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/numba.py").write_text(fake)
    said = run(tmp_path, FAST, tmp_path / "broken")
    assert f"engine: float convolutions: {reason}" in said
    assert said.count("UserWarning: packed layers run as float convolutions on cpu") == 1 and "pip install" in said


def test_an_old_numpy_is_found_and_named(tmp_path):
    copy_to(tmp_path, "abcnets.py", "kernels")
    said = run(tmp_path, "import numpy\ndel numpy.bitwise_count\nnumpy.__version__ = '1.26.4'\n" + FAST)
    assert "engine: float convolutions: NumPy 1.26.4 is too old" in said


# Whatever the circumstances of the first call


FORKED = """
import os, signal, torch, abcnets
torch.set_num_threads(2)
layer = abcnets.ABCConv2d(64, 64, 3, weight_bases=1, activation_bases=1, active=True)
packed, x = abcnets.pack(layer), torch.randn(8, 64, 30, 30)
expected = layer(x).detach().numpy()  # torch's threads are there now, and will not be in the child
child = os.fork()
if child == 0:
    signal.alarm(120)
    os._exit(0 if abs(packed(x).numpy() - expected).max() < 1e-3 and packed.runs_bits() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_the_first_packed_call_may_be_in_a_forked_process(tmp_path):
    run(copy_to(tmp_path, "abcnets.py", "kernels"), FORKED)


def test_a_processor_that_is_not_known_runs_floats(tmp_path):
    """With no features but those of every such processor, bits pay for few bases only."""
    copy_to(tmp_path, "abcnets.py", "kernels")
    many = """
import abcnets
layer = abcnets.ABCLinear(9, 9, weight_bases=4, activation_bases=4, active=True)
print("many:", abcnets.pack(layer).runs_bits())
"""
    for name in ({"NUMBA_CPU_NAME": "generic"}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}):
        assert "many: False" in run(tmp_path, many, **name)


def test_the_first_look_for_engines_may_be_in_any_mode(tmp_path):
    copy_to(tmp_path, "abcnets.py", "kernels")
    modes = """
import torch, abcnets
from torch._subclasses import FakeTensorMode
torch.set_default_dtype(torch.float64)
with torch.device("meta"), FakeTensorMode(), torch.autocast("cpu"), torch.inference_mode():
    abcnets.engines()
torch.set_default_dtype(torch.float32)
"""
    assert "engine: numba" in run(tmp_path, modes + FAST)


def test_a_link_to_the_file_finds_the_folder_beside_either(tmp_path):
    copy_to(tmp_path / "there", "abcnets.py", "kernels")
    copy_to(tmp_path / "elsewhere", "abcnets.py")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/abcnets.py").symlink_to(tmp_path / "there/abcnets.py")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/abcnets.py").symlink_to(tmp_path / "elsewhere/abcnets.py")
    (tmp_path / "b/kernels").symlink_to(tmp_path / "there/kernels")
    for folder in ("a", "b"):
        assert "engine: numba" in run(tmp_path / folder, FAST)


# In the repository


def test_nothing_is_checked_by_an_assert_which_python_leaves_out_with_O():
    for path in (ROOT / "abcnets.py", *ROOT.glob("kernels/**/*.py"), *ROOT.glob("notebooks/*.py")):
        lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert lines == [], path


def test_no_module_exists_twice_under_two_names():
    code = FAST + """
import importlib, pkgutil, sys
import kernels, abcnets_kernels
assert kernels is abcnets_kernels and kernels.__name__ == "abcnets_kernels"
import kernels.cpu.vector, kernels.cpu.engine
from kernels.cpu import vector
assert vector is sys.modules["abcnets_kernels.cpu.vector"] is importlib.import_module("kernels.cpu.vector")
assert vector.__spec__.name == "abcnets_kernels.cpu.vector" and vector.__package__ == "abcnets_kernels.cpu"
for name, module in list(sys.modules.items()):
    if name.startswith("kernels."):
        assert module is sys.modules["abcnets_kernels" + name.removeprefix("kernels")], name
"""  # fmt: skip
    for first in ("", "import kernels, kernels.layout\n", "import kernels.cpu.engine\n"):
        done = subprocess.run([sys.executable, "-c", first + code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "engine: numba" in done.stdout


def test_a_module_runs_by_its_folders_name():
    done = subprocess.run([sys.executable, "-m", "kernels.layout"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_foreign_kernels_loaded_first_is_not_disturbed(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("NAME = 'foreign'\n")
    code = f"import kernels, sys\nsys.path.append({str(ROOT)!r})\n{FAST}\nassert kernels.NAME == 'foreign'"
    assert "engine: numba" in run(tmp_path, code, tmp_path)
