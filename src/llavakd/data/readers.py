"""Processes that read rows for this one: how they end, and what is said where one of them, or of the run, is lost."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch.distributed import DistError
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from llavakd.errors import UserError

LOST = re.compile(r"gloo|DataLoader worker \(pid")  # gloo and torch's loader raise nothing narrower than RuntimeError


@contextmanager
def lost_process(kinds: tuple[type[Exception], ...] = (RuntimeError,)) -> Iterator[None]:
    """Make what is raised where a process of the run, or one that reads its rows, is gone a UserError."""
    try:
        yield
    except kinds as error:
        lost = isinstance(error, DistError) or LOST.search(str(error))
        raised = re.match("Caught .* in DataLoader worker", str(error))  # there, by one that is alive
        if raised or (isinstance(error, RuntimeError) and not lost):
            raise
        told = "a process of this run was lost: " + (re.split(r"\. |\n", str(error))[0] or "one that reads rows")
        raise UserError(f"{told}; the same command goes on from what is saved") from error


@contextmanager
def reading(dataset: Any, **options: Any) -> Iterator[Iterator[Any]]:
    """What a DataLoader with these options gives; UserError where a process is lost meanwhile. None is left afterwards."""
    with lost_process((RuntimeError, ConnectionError, EOFError)):  # each is how the loss of one that reads may show
        batches: Any = iter(DataLoader(dataset, worker_init_fn=_ignore_interrupt, **options))
        try:
            yield batches
        finally:
            if getattr(batches, "_worker_pids_set", False):  # else this process reads itself, or torch has ended them
                signal_handling._remove_worker_pids(id(batches))  # or of a death torch raises wherever this process is
                # And killed, where torch would set an event: one that was killed may hold its lock, and for ever.
                kill = SimpleNamespace(set=lambda: [reader.kill() for reader in batches._workers], is_set=lambda: True)
                batches._worker_pids_set, batches._workers_done_event = False, kill
                batches._shutdown_workers()


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the whole process group; only the main process acts on it, and it still needs its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
