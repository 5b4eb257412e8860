"""What the files of this folder share: where the repository is, progress bars, files written whole or not at all."""

import contextlib
import os
import shutil
from pathlib import Path

import torch
import tqdm.auto

if os.environ.get("TQDM_DISABLE"):  # which tqdm's bars for notebooks do not look at
    tqdm.auto.tqdm = tqdm.std.tqdm
tqdm = tqdm.auto.tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"


def save(what, path: str | Path) -> None:
    """torch.save that leaves either the old file or the new one, whenever it is interrupted."""
    with replacing(Path(path)) as temporary:
        torch.save(what, temporary)


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary file's name beside `path`, which takes its place, its permissions too, if all goes well.

    The name is nobody else's, in whatever thread, process or machine; where `path` is a link, its target is replaced.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.urandom(8).hex()}.partial")
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
