"""What a GPU draws and at which clock it runs while something is measured."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def watched(device: str) -> Iterator[dict[str, float]]:
    """Gets `watts` and `mhz` of what happened inside once it is over: medians of the last third, for the driver tells means.

    Stays empty off a GPU.
    """
    told: dict[str, float] = {}
    if device != "cuda":
        yield told
        return
    seen: list[tuple[float, float]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            seen.append((torch.cuda.power_draw() / 1e3, torch.cuda.clock_rate()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join()
    if late := seen[-(-2 * len(seen) // 3) :]:
        told["watts"], told["mhz"] = (statistics.median(column) for column in zip(*late, strict=True))
