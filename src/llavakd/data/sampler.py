"""Which rows make which step: global batches that do not depend on the number of processes or the micro-batch."""

from collections.abc import Iterator
from typing import Any

import numpy as np

_LENGTH_POOL = 50  # global batches sorted together by `length`, as transformers' group_by_length


def plan_epoch(
    lengths: np.ndarray, *, global_batch_size: int, grouping: str, seed: int, epoch: int
) -> list[np.ndarray]:
    """Global batches of one epoch, each sorted by length, longest first.

    Every row stands at most once; the len(lengths) % global_batch_size rows of the ragged end are left out, other ones
    in every epoch. `modality_length` keeps rows with and without pictures apart, except in the one batch that their
    ragged ends share; with a single modality it is a plain shuffle.
    """
    size, rng = global_batch_size, np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    if grouping == "length":
        order = order[: len(order) // size * size]  # before sorting: else the shortest rows are never seen
        for pool in np.split(order, range(size * _LENGTH_POOL, len(order), size * _LENGTH_POOL)):
            pool[:] = _longest_first(pool, lengths)  # a view of `order`
    if grouping == "modality_length":
        parts = order[lengths[order] > 0], order[lengths[order] < 0]
        whole, ends = zip(*(np.split(part, [len(part) // size * size]) for part in parts), strict=True)
        order = np.concatenate([*whole, rng.permutation(np.concatenate(ends))])
    batches = order[: len(order) // size * size].reshape(-1, size)
    return [_longest_first(batches[i], lengths) for i in rng.permutation(len(batches))]


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-np.abs(lengths[rows]), kind="stable")]


def micro_batches(
    lengths: np.ndarray, *, micro_batch_size: int, rank: int, world_size: int, start: int, steps: int, **order: Any
) -> Iterator[list[int]]:
    """Row indices of a rank's micro-batches from step `start` to the last, across epochs; `order` as of `plan_epoch`."""
    for step in range(start, steps):
        epoch, number = divmod(step, len(lengths) // order["global_batch_size"])
        if number == 0 or step == start:
            batches = plan_epoch(lengths, **order, epoch=epoch)
        # Dealt to the ranks to and fro, so that at any time and over a step all work on like lengths.
        turns = batches[number].reshape(-1, world_size)
        turns[1::2] = turns[1::2, ::-1]
        yield from turns[:, rank].reshape(-1, micro_batch_size).tolist()
