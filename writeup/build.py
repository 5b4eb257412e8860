"""Build the writeup: numbers, tables and figures from the results, then the PDF; and the README's opening.

    python writeup/build.py             writeup.md and the README's opening (between markers), figures/, writeup.pdf
    python writeup/build.py --check     fails if any of these is not what the results make of it; writes nothing

What is measured comes from notebooks/results, kernels/results and writeup/results, which runs wrote; arithmetic.py
computes the rest. tables.py makes tables and numbers of it, figures.py the figures, and claims.py says which words of
the prose these must bear out.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]

from kernels.command import Parser
from kernels.report import fill, rewrite
from writeup import claims, figures, tables

COMMAND = "python writeup/build.py"
WRITEUP = HERE / "writeup.md"
README = ROOT / "README.md"
CITATION_FILE = ROOT / "CITATION.cff"
FIGURES = HERE / "figures"
PAGES = {WRITEUP: (tables.for_writeup, claims.of_writeup), README: (tables.for_readme, claims.of_readme)}


# --------------------------------------------------------------------------- Pages


CITATION = r"<!-- (@\w+(?:; @\w+)*) -->"  # <!-- @lin2017 --> behind a link: what GitHub does not show


def without_markers(text: str) -> str:
    return re.sub(r"<!-- .*? -->", "", text)


def contradictions(text: str, said: dict[str, bool]) -> list[str]:
    """The claims that the results do not bear out, and those that the text does not make in these words."""
    plain = " ".join(without_markers(text).split())
    wrong = [f"the results do not bear out: {words}" for words, true in said.items() if not true]
    return wrong + [f"it does not say: {words}" for words in said if words not in plain]


# --------------------------------------------------------------------------- PDF

TEMPLATE = r"""
#set document(title: "TITLE", author: "AUTHOR", date: none, keywords: ("source CHECKSUM",))
#set page(paper: "a4", margin: (x: 2.1cm, y: 1.7cm), numbering: "1")
#set text(font: "Libertinus Serif", size: 10pt, lang: "en", hyphenate: true)
#set par(justify: true, leading: 0.58em, spacing: 0.85em)
#set math.equation(numbering: "(1)")
#show heading.where(level: 1): it => block(above: 1.3em, below: 0.7em, text(size: 12.5pt, it))
#show heading.where(level: 2): it => block(above: 1.1em, below: 0.6em, text(size: 10.5pt, it))
#show link: it => text(fill: rgb("#0B4F7D"), it)
#show raw.where(block: true): it => block(
  fill: luma(246), inset: 7pt, radius: 2pt, width: 100%, breakable: false, text(size: 8.4pt, it))
#show raw.where(block: false): set text(size: 8.8pt)
#set table(stroke: (x, y) => if y == 0 { (top: 0.8pt) }, inset: (x: 5pt, y: 3pt))
#show table: set text(size: 8.6pt)
#show table: set par(justify: false)
#show figure: set block(above: 1.1em, below: 1.2em, breakable: false)
#show figure: set figure(gap: 0.7em)
#show figure.caption: it => block(width: 94%, align(left, text(size: 8.8pt, it)))
#let horizontalrule = line(length: 100%, stroke: 0.5pt + luma(180))

#align(center)[#text(size: 15.5pt, weight: "bold")[TITLE] \ #v(0.1em) AUTHOR, DATE]
#v(0.4em)

BODY

#set text(size: 8pt)
#set par(leading: 0.5em, spacing: 0.55em)
#bibliography("references.bib", title: "References", style: "nature")
"""


def numbered(text: str) -> str:
    """The captions of tables and figures, *Table 3. ...*, counted in their order."""
    count = collections.Counter()

    def number(match):
        count[match[1]] += 1
        return f"*{match[1]} {count[match[1]]}. "

    return re.sub(r"^\*(Table|Figure) \d+\. ", number, text, flags=re.M)


def made(page: Path) -> str:
    """What the results make of a page."""
    values, _ = PAGES[page]
    return numbered(fill(page, COMMAND, values()))


def source_checksum(text: str, data: dict) -> str:
    """Of all that the PDF is made from: the text, the figures' numbers, the bibliography."""
    return figures.checksum([text, data, tables.BIBLIOGRAPHY.read_text(), CITATION_FILE.read_text()])


def typst_source(text: str, data: dict) -> str:
    """The PDF's source: pandoc's reading of the Markdown that GitHub shows, with figures and citations of its own."""
    import pypandoc
    import yaml

    made_from = source_checksum(text, data)
    title, text = re.match(r"# (.*?)\n(.*)", text, re.S).groups()
    text = re.sub(r"## References\n.*", "", text, flags=re.S)
    # GitHub shows a caption as a paragraph below the picture; pandoc takes it as the picture's text.
    text = re.sub(r"!\[[^\]]*\]\((\S+)\)\n\n\*Figure \d+\. (.*?)\*\n", r"![\2](\1)\n", text, flags=re.S)
    # A table's caption likewise is a paragraph below it; pandoc takes one that begins with a colon.
    text = re.sub(r"^\*Table \d+\. (.*?)\*\n$", r": \1\n", text, flags=re.S | re.M)
    # Links to files of the repository lead nowhere from a PDF: their text stays.
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!http)[^)]*\)", r"\1", text)
    text = re.sub(CITATION, r" [\1]", text)
    text = without_markers(text)
    text = re.sub(r"```math\n(.*?)\n```", r"$$ \1 $$", text, flags=re.S)
    text = re.sub(r" *\\tag\{\d+\}", "", text)  # typst counts them itself, in the same order
    body = pypandoc.convert_text(
        text, "typst", format="markdown+lists_without_preceding_blankline-auto_identifiers-smart",
        extra_args=["--wrap=none", "--columns=1000", "--shift-heading-level-by=-1"],
    )  # fmt: skip
    body = re.sub(r"^#bibliography\(.*\)$", "", body, flags=re.M)
    cited = yaml.safe_load(CITATION_FILE.read_text())
    author, date = cited["authors"][0]["name"], f"{cited['date-released']:%B %Y}"
    parts = {"TITLE": title, "CHECKSUM": made_from, "BODY": body, "AUTHOR": author, "DATE": date}
    return re.sub("TITLE|CHECKSUM|BODY|AUTHOR|DATE", lambda match: parts[match.group()], TEMPLATE)


def build_pdf(text: str, data: dict, path: Path) -> None:
    import typst

    source = HERE / f".{path.stem}.typ"  # beside the figures and the bibliography that it names
    source.write_text(typst_source(text, data))
    try:
        typst.compile(str(source), output=str(path), root=str(HERE))
    finally:
        source.unlink()


# --------------------------------------------------------------------------- The command


def differences() -> list[str]:
    """What in the writeup is not what the results make of it, in words."""
    found = []
    for page in PAGES:
        old, new = page.read_text(), made(page)
        if new != old:
            changed = [b for a, b in zip(old.splitlines(), new.splitlines()) if a != b]
            found.append(f"{page.name} differs from the results, first here: {changed[0][:200]}")
    data = figures.figure_data()
    drawn = FIGURES / "data.json"
    if not drawn.exists() or json.loads(drawn.read_text()) != data:
        found.append("figures/data.json differs from the results")
    for name in figures.DRAWINGS:
        picture = FIGURES / f"{name}.svg"
        if not picture.exists() or f"data {figures.checksum(data[name])}" not in picture.read_text():
            found.append(f"figures/{name}.svg does not show the present results")
    pdf = HERE / "writeup.pdf"
    made_from = source_checksum(made(WRITEUP), data)
    if not pdf.exists() or made_from.encode() not in pdf.read_bytes():
        found.append("writeup.pdf was made from another text or other figures")
    return [*found, f"run: {COMMAND}"] if found else []


def write() -> None:
    for page in PAGES:
        rewrite(page, made(page))
    data = figures.figure_data()
    figures.draw(data, FIGURES)
    build_pdf(WRITEUP.read_text(), data, HERE / "writeup.pdf")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; the exit status says whether all is fresh")
    sys.exit("\n".join(parser.run(build, parser.parse_args())) or 0)


def build(options) -> list[str]:
    """Write, unless it is only to be checked; and what the results contradict or would change, in words."""
    if not options.check:
        write()
    found = [f"{page.name}: {words}" for page, (_, says) in PAGES.items()
             for words in contradictions(page.read_text(), says())]  # fmt: skip
    return [*found, *(differences() if options.check else [])]


if __name__ == "__main__":
    main()
