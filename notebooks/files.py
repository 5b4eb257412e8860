"""What the files of this folder share: where the repository is, progress bars, files written whole or not at all."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
import tqdm.auto

from kernels.command import Refused

if os.environ.get("TQDM_DISABLE"):  # which tqdm's bars for notebooks do not look at
    tqdm.auto.tqdm = tqdm.std.tqdm
tqdm = tqdm.auto.tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"
TRAINED = ROOT / "notebooks" / "trained"


def commit() -> str:
    """The commit that this code is, with a + where a Python file differs from it; "" outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):  # no git; no repository
        return ""


class DataError(Refused):
    """Something to read that is not there, or not what it should be; the message says what to do."""


def writable(folder: Path) -> None:
    """Make a folder where it is missing.

    Raises: DataError where nothing can be written to it: before hours of training, not after them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"nothing can be written to the folder {folder}: {error.strerror}") from error


def load(path: str | Path) -> dict:
    """A dict of tensors and plain Python values that torch.save wrote, or a safetensors file, onto the CPU.

    Raises: DataError where the file can't be read as such.
    """
    if Path(path).suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise DataError(f"{path} can't be read as a safetensors file ({error})") from error
    try:
        what = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own: a damaged file may raise anything
        raise DataError(f"{path} can't be read as a file that torch.save wrote ({type(error).__name__})") from error
    if not isinstance(what, dict):
        raise DataError(f"{path} must hold a dict, got {type(what).__name__}")
    return what


def save(what, path: str | Path) -> None:
    """torch.save that leaves either the old file or the new one, whenever it is interrupted. Raises: DataError."""
    with replacing(Path(path)) as temporary:
        try:
            torch.save(what, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise DataError(f"{path} can't be written: {error}") from error


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


@contextlib.contextmanager
def locked(path: Path, seconds: float = 60):
    """Alone with a file, among all that lock it so, in whatever process or machine; others wait.

    The lock is a file that only one can create, `PATH.lock`: that holds on network drives and on Windows too.
    Raises: DataError where it stays there.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, begun = path.with_name(f"{path.name}.lock"), time.monotonic()
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            if time.monotonic() - begun > seconds:
                raise DataError(f"{lock} says since {seconds:g} s that another run writes {path.name}: remove it if"
                                " none does") from None  # fmt: skip
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
