"""notebooks/page.py: a page of a notebook reads without a network."""

import re

import nbformat
import page
import pytest
from files import ROOT

pytest.importorskip("pypandoc")
CELLS = [
    nbformat.v4.new_markdown_cell(
        "A sum of $M$ bases, $ \\|W - W_q\\|^2 < 1 $:\n\n"
        "$$W_q = \\sum_{m=1}^{M} \\alpha_m B_m, \\qquad A_n = \\begin{cases} +1 & R \\ge \\tfrac12 - v_n \\\\\n"
        "-1 & \\text{otherwise}\\end{cases}$$\n\n"
        "In code, `$HOME` and `$W_q$` stay:\n\n```bash\necho $A $B\n```\n"
    ),
    nbformat.v4.new_code_cell("print('$', '$')", outputs=[nbformat.v4.new_output("stream", text="$ $\n")]),
]


def written(notebook, folder) -> str:
    nbformat.write(notebook, folder / "a.ipynb")
    page.main([str(folder / "a.ipynb")])
    return (folder / "a.html").read_text(encoding="utf-8")


def fetched(text: str) -> list[str]:
    """What a browser would load or run."""
    return re.findall(r"<script[^>]*>|<iframe[^>]*>|(?:src=|url\(|import\b)\W*http[^>)]*|<link[^>]*>", text)


def test_formulas_are_mathml_and_nothing_is_fetched(tmp_path):
    text = written(nbformat.v4.new_notebook(cells=CELLS), tmp_path)
    first, second, third = re.findall(r"<math.*?</math>", text, re.DOTALL)
    assert 'display="inline"' in first and "<mi>M</mi>" in first
    assert "<msub><mi>W</mi><mi>q</mi></msub><msup>" in second and "&lt;" in second
    assert 'display="block"' in third and "∑" in third and "<mtable>" in third and "α" in third
    assert "\\" not in first + second + third
    assert "<code>$HOME</code>" in text and "<code>$W_q$</code>" in text and "\n<pre>$ $\n</pre>" in text
    assert not fetched(text)


def test_a_picture_has_its_words(tmp_path):
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    output = nbformat.v4.new_output("display_data", {"image/png": dot}, metadata={"image/png": {"alt": "One dot"}})
    cell = nbformat.v4.new_code_cell("dot", outputs=[output])
    assert re.search(r'<img[^>]*alt="One dot"', written(nbformat.v4.new_notebook(cells=[cell]), tmp_path))


def test_amounts_and_links_are_no_formulas(tmp_path):
    text = "It costs $5 today, $6 tomorrow. [A $x$](http://a.b/?x=$y&z=$w), \\$5 and \\$6.\n\n## For $7\n\n$y$"
    page_text = written(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), tmp_path)
    assert page_text.count("<math ") == 2 and "It costs $5 today, $6 tomorrow." in page_text
    assert "$5 and $6" in page_text and "x=$y&amp;z=$w" in page_text and "For $7" in page_text


@pytest.mark.parametrize("name", ["FinalProject", "Eval"])
def test_the_notebooks_of_this_repository(name, tmp_path):
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4)
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    text = written(nbformat.v4.new_notebook(cells=prose), tmp_path)
    plain = re.sub(r"<(code|pre|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert plain.count("<math ") >= 10 and "$" not in plain and "\\" not in plain
    assert not fetched(text)


def test_what_can_not_be_a_page_is_said(tmp_path, refused):
    with pytest.raises(ValueError, match="pandoc made 1 formulas .* of these 2"):
        page.mathml(["$a$", "$\\frac{$"])
    (tmp_path / "a.ipynb").write_text("no notebook")
    assert "a.ipynb is not a notebook" in refused(page.main, tmp_path / "a.ipynb")
    for text in ("{}", "[1]"):
        (tmp_path / "a.ipynb").write_text(text)
        assert "a.ipynb is not a notebook" in refused(page.main, tmp_path / "a.ipynb")
    script = nbformat.v4.new_markdown_cell("<script src='https://a.b/c.js'></script>")
    nbformat.write(nbformat.v4.new_notebook(cells=[script]), tmp_path / "a.ipynb")
    assert "a.ipynb holds a script" in refused(page.main, tmp_path / "a.ipynb")
    lost = nbformat.v4.new_markdown_cell("\\begin{align} a &= b \\end{align}")
    nbformat.write(nbformat.v4.new_notebook(cells=[lost]), tmp_path / "a.ipynb")
    assert "a.ipynb: a formula stands between no $" in refused(page.main, tmp_path / "a.ipynb")
    assert "nothing.ipynb: No such file" in refused(page.main, tmp_path / "nothing.ipynb")
