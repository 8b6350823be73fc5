"""What a person sees of long work, a bar on a terminal and plain lines elsewhere, and how they stop it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

_console = Console(stderr=True)


class Interrupted(Exception):  # noqa: N818 - not an error: the run can go on
    """The person stopped a run; the message says how far it is saved and how to go on."""


def say(text: str) -> None:
    """One line for the person who waits."""
    _console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Yield `advance(done, note="")`, which moves a bar of `total` steps to `done` with a note; silent unless shown."""
    if shown and sys.stderr.isatty():
        counts = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress("{task.description}", *counts, "{task.fields[note]}", console=_console) as progress:
            task = progress.add_task(label, total=total, note="")
            yield lambda done, note="": progress.update(task, completed=done, note=note)
    else:
        last = time.monotonic()

        def line(done: int, note: str = "") -> None:
            nonlocal last
            if shown and (done == total or time.monotonic() - last > 15):  # seconds
                last = time.monotonic()
                say(f"{label} {done}/{total} {note}")

        yield line
