"""Notebooks as web pages that need no network: `python notebooks/page.py NOTEBOOK ...` writes NOTEBOOK.html.

A page of `jupyter nbconvert --to html` fetches MathJax, which turns the formulas from LaTeX into what can be read, and
other scripts. Here pandoc writes the formulas in MathML, which browsers draw by themselves, and no script is left.
"""

import argparse
import html
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where abcnets.py and kernels/ are

import nbformat
import pypandoc
from files import replacing
from jinja2 import pass_context
from nbconvert import HTMLExporter

from kernels.command import Parser, Refused

SCRIPTS = "html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets"  # blocks of the template
# Nearly as pandoc has it: no blank within the $, or one at both, and no digit behind them, which would be an amount.
FORMULA = r"\$\$[^<]+?\$\$|\$(?=\S)[^$<]+?(?<=\S)\$(?!\d)|\$\s[^$<]+?\s\$(?!\d)"
CODE_OR_FORMULA = re.compile(rf"(<(code|pre)\b.*?</\2>|<[^>]*>)|{FORMULA}", re.DOTALL)


class PageExporter(HTMLExporter):
    """nbconvert's exporter, without scripts, with MathML and with the words that a picture's metadata has (`alt`)."""

    raw_template = "".join([
        "{% extends 'lab/index.html.j2' %}",
        *(f"{{% block {name} %}}{{% endblock %}}" for name in SCRIPTS),
        "{% block data_png scoped %}{{ super() | replace('<img ', '<img alt=\"' ~ "  # which this template leaves out
        "((output | get_metadata('alt', 'image/png')) or '') | escape_html ~ '\" ') }}{% endblock %}",
    ])  # fmt: skip

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        text = super().markdown2html(context, source)
        matches = [match for match in CODE_OR_FORMULA.finditer(text) if not match[1]]
        if "\\begin{" in CODE_OR_FORMULA.sub("", text):
            raise ValueError("a formula stands between no $, where only MathJax would find it")
        formulas = iter(mathml([html.unescape(match[0]) for match in matches]))
        return CODE_OR_FORMULA.sub(lambda match: match[0] if match[1] else next(formulas), text)


def mathml(formulas: list[str]) -> list[str]:
    """Formulas in LaTeX, each between $ or $$, as MathML.

    Raises: ValueError if one of them is not LaTeX that pandoc knows.
    """
    if not formulas:
        return []
    paragraphs = [re.sub(r"^(\$+)\s*(.*?)\s*(\$+)$", r"\1\2\3", re.sub(r"\n\s*\n", "\n", formula), flags=re.DOTALL)
                  for formula in formulas]  # fmt: skip
    written = pypandoc.convert_text("\n\n".join(paragraphs), "html", format="markdown", extra_args=["--mathml"])
    written = re.sub(r"<annotation\b.*?</annotation>", "", written, flags=re.DOTALL)  # the LaTeX once more
    found = re.findall(r"<math\b.*?</math>", written, flags=re.DOTALL)
    if len(found) != len(formulas):
        raise ValueError(f"pandoc made {len(found)} formulas in MathML of these {len(formulas)}: {formulas}")
    return found


def write_pages(paths: list[Path]) -> None:
    for path in paths:
        try:
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
        except (ValueError, AttributeError, nbformat.ValidationError) as error:
            raise Refused(f"{path} is not a notebook") from error
        try:
            page, _ = PageExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        except ValueError as error:
            raise Refused(f"{path}: {error}") from error
        if "<script" in page:
            raise Refused(f"{path} holds a script, in a cell or in what one put out, which may need a network")
        with replacing(path.with_suffix(".html")) as temporary:
            temporary.write_text(page, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    parser.run(write_pages, parser.parse_args(arguments).notebooks)


if __name__ == "__main__":
    main()
