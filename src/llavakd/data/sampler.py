"""Which rows make which step: global batches that do not depend on the number of processes or the micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

_LENGTH_POOL = 50  # global batches sorted together by `length`, as transformers' group_by_length


def plan_epoch(
    lengths: np.ndarray,
    *,
    global_batch_size: int,
    grouping: Literal["none", "length", "modality_length"],
    seed: int,
    epoch: int,
) -> list[np.ndarray]:
    """Global batches of one epoch, each sorted by length, longest first.

    Every row stands at most once; the len(lengths) % global_batch_size rows of the ragged end are left out, other ones
    in every epoch. `modality_length` keeps rows with and without pictures apart, except in the one batch that their
    ragged ends share; with a single modality it is a plain shuffle.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    size = global_batch_size
    if grouping == "length":
        pool = size * _LENGTH_POOL
        order = order[: len(order) - len(order) % size]  # before sorting: else the shortest rows are never seen
        order = np.concatenate(
            [order[:0], *(_longest_first(order[i : i + pool], lengths) for i in range(0, len(order), pool))]
        )
    if grouping == "modality_length":
        visual, textual = order[lengths[order] > 0], order[lengths[order] < 0]
        whole = [part[i : i + size] for part in (visual, textual) for i in range(0, len(part) - size + 1, size)]
        ends = np.concatenate([part[len(part) - len(part) % size :] for part in (visual, textual)])
        ends = rng.permutation(ends)
    else:
        whole, ends = [], order
    batches = whole + [ends[i : i + size] for i in range(0, len(ends) - size + 1, size)]
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


class MicroBatches(Sampler[list[int]]):
    """Row indices of this rank's micro-batches from step `start` to the last, across epochs."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        global_batch_size: int,
        grouping: Literal["none", "length", "modality_length"],
        seed: int,
        shard: Shard,
        start: int,
        steps: int,
    ) -> None:
        self.lengths, self.size, self.grouping, self.seed = lengths, global_batch_size, grouping, seed
        self.shard, self.start, self.steps = shard, start, steps
        self.per_epoch = len(lengths) // global_batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * (self.size // (self.shard.world_size * self.shard.micro_batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, batches = -1, []
        for step in range(self.start, self.steps):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                batches = plan_epoch(
                    self.lengths, global_batch_size=self.size, grouping=self.grouping, seed=self.seed, epoch=epoch
                )
            yield from self.shard.deal(batches[step % self.per_epoch])
