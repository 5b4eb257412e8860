"""What was measured, as tables and figures; and the one way in which text is filled in by a command.

A block that a command writes stands between two markers, which name it and the command:

    <!-- cpu: python -m kernels.bench -->
    | a table | of numbers |
    <!-- /cpu -->

Within a sentence, the same without line breaks: <!-- accuracy: python writeup/build.py -->94.02 %<!-- /accuracy -->.
"""

import re
from pathlib import Path


def fill(page: Path | str, command: str, values: dict[str, str]) -> str:
    """The text of a page in which each block of this command holds values[its name]; blocks of others stay.

    Args:
        page: a file, or its text. No file is written.
        command: as the markers name it, such as "python -m kernels.bench".
        values: {name of a block: text}.

    Raises: ValueError for a block without a value, a value without a block, or a block that does not end.
    """
    text = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
    filled = set()

    def put(match):
        name, blank = match["name"], "\n" if match["old"].startswith("\n") else ""
        if name not in values:
            raise ValueError(f"nothing to fill the block {name!r} of `{command}` with")
        filled.add(name)
        return f"<!-- {name}: {command} -->{blank}{values[name].strip()}{blank}<!-- /{name} -->"

    block = rf"<!-- (?P<name>[\w-]+): {re.escape(command)} -->(?P<old>.*?)<!-- /(?P=name) -->"
    new = re.sub(block, put, text, flags=re.DOTALL)
    opened = len(re.findall(rf"<!-- [\w-]+: {re.escape(command)} -->", text))
    if opened != len(re.findall(block, text, flags=re.DOTALL)):
        raise ValueError(f"a block of `{command}` does not end")
    if unused := values.keys() - filled:
        raise ValueError(f"no block of `{command}` is called {', '.join(sorted(unused))}")
    return new
