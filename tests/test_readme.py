"""What the README promises: its example runs, its links lead somewhere, its table is what the results say."""

import re
import subprocess
import sys
from pathlib import Path

import experiment

import abcnets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run_as_they_stand_one_after_the_other(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    (tmp_path / "example.py").write_text(code)
    path = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ABCConv2d" in done.stdout
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.safetensors").stat().st_size + 20_000


def test_abcnets_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "abcnets.py").write_text((ROOT / "abcnets.py").read_text())
    script = """
import sys, torch, abcnets
assert not {"numba", "safetensors", "pandas"} & set(sys.modules)
model = torch.nn.Sequential(*[torch.nn.Conv2d(4, 4, 3) for _ in range(3)])
binary = abcnets.calibrate(abcnets.convert(model, 2, 2), torch.randn(8, 4, 9, 9), progress=False)
x = torch.randn(2, 4, 9, 9)
assert torch.allclose(abcnets.pack(binary)(x), binary(x), atol=1e-5)
print(abcnets.__file__)
"""
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{script}"], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve().parent == tmp_path.resolve()


def test_imports_of_abcnets_are_torch_and_the_standard_library():
    imported = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / "abcnets.py").read_text(), re.M))
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_local_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_table_is_what_the_results_say():
    table = experiment.results_table(experiment.read_csv(ROOT / "notebooks/results/runs.csv"), "fashion-mnist")
    assert table in README
    assert experiment.speed_sentence(experiment.read_csv(ROOT / "notebooks/results/speed.csv")) in README


def test_public_functions_are_documented():
    public = [getattr(abcnets, name) for name in dir(abcnets) if not name.startswith("_")]
    own = [thing for thing in public if getattr(thing, "__module__", "") == "abcnets"]
    assert len(own) >= 20 and all(thing.__doc__ for thing in own)
