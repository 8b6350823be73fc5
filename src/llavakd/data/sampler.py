"""Which rows make which step: global batches that do not depend on the number of processes or the micro-batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Grouping = Literal["none", "length", "modality_length"]
_LENGTH_POOL = 50  # global batches sorted together by `length`, as transformers' group_by_length


def plan_epoch(
    lengths: np.ndarray, *, global_batch_size: int, grouping: Grouping, seed: int, epoch: int
) -> list[np.ndarray]:
    """Global batches of one epoch, each sorted by length, longest first.

    Every row stands at most once; the len(lengths) % global_batch_size rows of the ragged end are left out, other ones
    in every epoch. `modality_length` keeps rows with and without pictures apart, except in the one batch that their
    ragged ends share; with a single modality it is a plain shuffle.
    """
    size = global_batch_size

    def whole(rows: np.ndarray) -> list[np.ndarray]:
        return [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]

    rng = np.random.default_rng((seed, epoch))
    order, batches = rng.permutation(len(lengths)), []
    if grouping == "length":
        order = order[: len(order) // size * size]  # before sorting: else the shortest rows are never seen
        for pool in np.split(order, range(size * _LENGTH_POOL, len(order), size * _LENGTH_POOL)):
            pool[:] = _longest_first(pool, lengths)  # a view of `order`
    if grouping == "modality_length":
        visual, textual = order[lengths[order] > 0], order[lengths[order] < 0]
        batches = whole(visual) + whole(textual)
        order = rng.permutation(np.concatenate([part[len(part) // size * size :] for part in (visual, textual)]))
    batches += whole(order)
    return [_longest_first(batches[i], lengths) for i in rng.permutation(len(batches))]


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-np.abs(lengths[rows]), kind="stable")]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This process's part of every global batch."""

    rank: int
    world_size: int
    micro_batch_size: int

    def deal(self, batch: np.ndarray) -> list[list[int]]:
        """Micro-batches of this rank: neighbours in length share one, and ranks work on like lengths at a time."""
        parts = batch.reshape(-1, self.world_size, self.micro_batch_size)
        return [part[self.rank].tolist() for part in parts]


def micro_batches(
    lengths: np.ndarray, *, global_batch_size: int, shard: Shard, start: int, steps: int, **order: Any
) -> Iterator[list[int]]:
    """Row indices of this rank's micro-batches from step `start` to the last, across epochs; `order` as plan_epoch."""
    for step in range(start, steps):
        epoch, number = divmod(step, len(lengths) // global_batch_size)
        if number == 0 or step == start:
            batches = plan_epoch(lengths, global_batch_size=global_batch_size, **order, epoch=epoch)
        yield from shard.deal(batches[number])
