"""What the README promises: its example runs, its links lead somewhere, its table is what the results say."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import speed
import torch
from files import RESULTS
from runs import read_csv

import abcnets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def examples():
    return re.findall(r"```python\n(.*?)```", README, re.S)


def run(code, folder):
    (folder / "example.py").write_text(code)
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'notebooks'}", "PATH": "", "HOME": str(folder), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "example.py"], cwd=folder, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_examples_run_as_they_stand_one_after_the_other(tmp_path):
    printed = run("\n".join(examples()[1:5]), tmp_path)
    assert "ABCConv2d" in printed and "int8" in printed
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.safetensors").stat().st_size + 20_000
    alone = "import sys\nassert len(logits) == 8 and not {'torch', 'abcnets', 'onnx'} & set(sys.modules)"
    run(f"{examples()[5]}\n{alone}", tmp_path)


def test_the_very_first_lines_run_on_any_trained_network(tmp_path):
    imports, model = re.search(r"(import torch\n.*?\n\n)(model = .*?)\n\n", examples()[1], re.S).groups()
    printed = run(f"{imports}{model}\n{examples()[0]}print(tuple(logits.shape))", tmp_path)
    assert printed.endswith("(8, 10)\n") and (tmp_path / "model.safetensors").exists()


def test_the_example_of_any_model_runs_without_a_network(tmp_path):
    """As it stands, but for the trained weights: they would be downloaded."""
    code = examples()[6]
    assert code.count('weights="DEFAULT"') == 1
    printed = run("import networks; networks.import_torchvision()\n" + code.replace('"DEFAULT"', "None"), tmp_path)
    assert "last layer" not in printed and "settings say no" in printed and "packed_bytes" in printed


def test_abcnets_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "abcnets.py").write_text((ROOT / "abcnets.py").read_text())
    script = """
import sys, torch, abcnets
assert not {"numba", "safetensors", "pandas", "torch._dynamo"} & set(sys.modules)
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


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md", "writeup/writeup.md"])
def test_local_links_lead_somewhere(page):
    page = ROOT / page
    elsewhere = "http", "../../actions/workflows/test.yml"  # GitHub has a page about this file
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    targets = {target for target in links if not target.startswith(elsewhere)}
    assert (ROOT / ".github/workflows/test.yml").exists()
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT.resolve()), target
        assert not anchor or anchor in anchors(file), target


def test_the_table_of_whole_networks_is_what_the_results_say():
    assert speed.table(read_csv(RESULTS / "speed.csv")) in (ROOT / "kernels/README.md").read_text()


def test_what_the_readme_says_of_them_is_true():
    """Its sentences around the numbers: faster than float32; more accurate, with no more bytes and operations."""
    rows = read_csv(RESULTS / "speed.csv")
    first = rows[(rows.hardware == rows.hardware[0]) & (rows.isa == rows.isa[0])]  # the machine that they are about
    fused = first[(first.network == "ResNet-18") & (first.form == "abcnets") & (first.M == first.N)]
    assert fused.groupby(["M", "batch", "threads"]).times_float32.max().min() > 1
    for row in read_csv(RESULTS / "mixed.csv").itertuples():
        assert row.mixed_accuracy > row.uniform_accuracy and row.mixed_bytes <= row.uniform_bytes
        assert row.mixed_binary_macs <= row.uniform_binary_macs


def test_public_names_are_documented_and_listed():
    for name in abcnets.__all__:
        thing = getattr(abcnets, name)
        is_constant = isinstance(thing, tuple) and name.isupper()
        assert is_constant or (thing.__module__ == "abcnets" and thing.__doc__), name
        assert re.search(rf"\b{name}\b", abcnets.__doc__), name
    own = {
        name for name, thing in vars(abcnets).items()
        if not name.startswith("_") and (getattr(thing, "__module__", "") == "abcnets" or isinstance(thing, tuple))
    }  # fmt: skip
    assert own == set(abcnets.__all__)


def test_examples_in_docstrings_are_right():
    names = {**vars(abcnets), "torch": torch, "nn": torch.nn, "abcnets": abcnets}
    result = doctest.testmod(abcnets, globs=names)
    assert result.failed == 0 and result.attempted >= 12
