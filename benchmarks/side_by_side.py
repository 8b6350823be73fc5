"""Tasks that make folders, some at a time: each once what it needs is there, and never two that would make the same first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Task:
    """A call for another process, what has to be there before it, and what it leaves, in the order in which it does."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[Path, ...] = ()
    makes: tuple[Path, ...] = ()

    @property
    def first(self) -> Path | None:
        """What it would make first: two that would make the same must not run at once."""
        return next((path for path in self.makes if not path.exists()), None)


def run(
    tasks: Iterable[Task], pool: Executor, *, slots: int, keep: Callable[[Any], None], minutes: float = float("inf")
) -> list[str]:
    """Run them, `slots` at a time, `keep` each result at once; after `minutes` none is begun.

    Returns why some did not run or failed; the others run all the same.
    """
    waiting, running, failed = list(tasks), dict[Future[Any], tuple[Task, Path | None]](), list[str]()
    end = time.monotonic() + 60 * minutes
    while True:
        for task in list(waiting) if time.monotonic() < end else ():
            made = {path for _, path in running.values() if path}
            if len(running) < slots and task.first not in made and all(path.exists() for path in task.needs):
                try:
                    running[pool.submit(task.call, *task.arguments)] = (task, task.first)
                except BrokenExecutor:  # one of its processes was killed, and the others with it
                    end = time.monotonic()
                    break
                waiting.remove(task)
        if not running:
            late = time.monotonic() >= end
            return failed + [f"{task.name}: {'not begun in time' if late else 'not what it needs'}" for task in waiting]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, _ = running.pop(future)
            if error := future.exception():
                failed.append(f"{task.name}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
            else:
                keep(future.result())
