"""Which rows make which step: global batches that do not depend on the number of processes or the micro-batch."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

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


@dataclass(eq=False)
class MicroBatches(Sampler[list[int]]):
    """Row indices of this rank's micro-batches from step `start` to the last, across epochs."""

    lengths: np.ndarray
    _: KW_ONLY
    global_batch_size: int
    grouping: Grouping
    seed: int
    shard: Shard
    start: int
    steps: int

    def __len__(self) -> int:
        at_once = self.shard.world_size * self.shard.micro_batch_size
        return (self.steps - self.start) * (self.global_batch_size // at_once)

    def __iter__(self) -> Iterator[list[int]]:
        order: dict[str, Any] = {
            "global_batch_size": self.global_batch_size,
            "grouping": self.grouping,
            "seed": self.seed,
        }
        for step in range(self.start, self.steps):
            epoch, number = divmod(step, len(self.lengths) // self.global_batch_size)
            if number == 0 or step == self.start:
                batches = plan_epoch(self.lengths, **order, epoch=epoch)
            yield from self.shard.deal(batches[number])
