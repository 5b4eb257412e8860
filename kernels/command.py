"""What the command lines of this repository share: arguments that are checked, and one sentence for what can't be done.

    parser = Parser(description=__doc__)
    parser.add_argument("--threads", type=THREADS)
    options = parser.parse_args()
    parser.run(measure, options)
"""

import argparse
import math
import signal
from collections.abc import Callable

import torch


class Refused(ValueError):
    """What was asked for can't be done; the message says in one sentence what was given and what is wanted."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which `interrupt_on_sigterm` turns into what Ctrl-C is."""


def interrupt_on_sigterm() -> None:
    def interrupt(*_):
        raise Terminated

    signal.signal(signal.SIGTERM, interrupt)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends what can't be done by one sentence on stderr and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    def run(self, function: Callable, *arguments):
        """function(*arguments). What it refuses, and what the operating system refuses it, ends the program.

        So does an interrupt, with the exit code that a shell gives to a program which the signal has ended.
        """
        try:
            return function(*arguments)
        except (Refused, OSError) as error:
            self.error(_sentence(error))
        except KeyboardInterrupt as stop:
            self.exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).split("\n")
    if "Original Traceback (most recent call last):" in lines:  # a DataLoader's worker puts it and the type in front
        lines = [lines[-1] or lines[-2]]
    text = " ".join(" ".join(lines).split())
    return text.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ") or type(error).__name__


def checked(convert: Callable, wanted: str, right: Callable = lambda value: True) -> Callable:
    """A type for `add_argument`: convert(text), refused where that fails or the value is not right."""

    def parse(text: str):
        try:
            if right(value := convert(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{wanted} is wanted, got {text!r}")

    return parse


COUNT = checked(int, "a whole number above 0", lambda n: n > 0)
COUNT_OR_0 = checked(int, "a whole number, 0 or more", lambda n: n >= 0)
SEED = checked(int, "a whole number from 0 to 2147483647", lambda n: 0 <= n < 2**31)
THREADS = checked(int, "a whole number from 1 to 1024", lambda n: 1 <= n <= 1024)
POSITIVE = checked(float, "a number above 0", lambda x: 0 < x < math.inf)
POSITIVE_OR_0 = checked(float, "a number, 0 or more", lambda x: 0 <= x < math.inf)
SHARE = checked(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def present_device(text: str) -> torch.device:
    """A type for `add_argument`: a device that this computer has. Nothing is allocated on it."""
    here, accelerator = ["cpu:0"], torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        here += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or f"{found.type}:{found.index or 0}" not in here:
        raise argparse.ArgumentTypeError(f"a device of this computer ({', '.join(here)}) is wanted, got {text!r}")
    return found
