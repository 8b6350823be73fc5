"""Which rows make which step: once per epoch, modality apart, and the same whatever the machine looks like."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llavakd.data.sampler import micro_batches, plan_epoch
from llavakd.data.samples import Sample, Turn, word_lengths

GROUPINGS = ["none", "length", "modality_length"]
MIXES = ["pictures", "text", "both"]


def lengths_of(n: int, mix: str = "both", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 60, n)
    sign = {"pictures": np.ones(n, int), "text": -np.ones(n, int), "both": np.where(rng.random(n) < 0.6, 1, -1)}[mix]
    return words * sign


def plan(lengths: np.ndarray, size: int, grouping: str, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    batches = plan_epoch(lengths, global_batch_size=size, grouping=grouping, seed=seed, epoch=epoch)
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("n", "size"), [(3, 4), (4, 4), (7, 4), (64, 8), (103, 8), (911, 4), (50, 1)])
def test_every_row_stands_at_most_once_and_only_the_ragged_end_is_left_out(n, size, grouping, mix):
    lengths = lengths_of(n, mix)
    batches = plan(lengths, size, grouping)
    rows = list(itertools.chain(*batches))
    assert len(set(rows)) == len(rows) == n // size * size
    assert set(rows) <= set(range(n))
    assert all(len(batch) == size for batch in batches)
    for batch in batches:
        assert (np.diff(np.abs(lengths[batch])) <= 0).all(), "longest first"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_rows_left_out_are_other_ones_in_other_epochs(grouping, mix):
    lengths = lengths_of(23, mix)
    seen = set()
    for epoch in range(40):
        seen |= set(itertools.chain(*plan(lengths, 8, grouping, epoch=epoch)))
    assert seen == set(range(23))


def test_neither_modality_always_pays_for_the_ragged_end():
    """Six pictures and five texts are over; eight of the eleven share a batch, and which three are lost is chance."""
    lengths = np.concatenate([np.full(14, 5), np.full(13, -5)])
    for side in (lengths > 0, lengths < 0):
        rows = set(np.flatnonzero(side))
        lost = [rows - set(itertools.chain(*plan(lengths, 8, "modality_length", epoch=epoch))) for epoch in range(20)]
        assert any(lost)


@pytest.mark.parametrize("n", [64, 103, 104])
def test_modalities_share_at_most_one_batch(n):
    lengths = lengths_of(n)
    assert (lengths > 0).any()
    assert (lengths < 0).any()
    for epoch in range(5):
        mixed = [
            batch for batch in plan(lengths, 8, "modality_length", epoch=epoch) if len({*(lengths[batch] > 0)}) > 1
        ]
        ragged = sum(int(side.sum()) % 8 for side in (lengths > 0, lengths < 0))
        assert len(mixed) <= (1 if ragged >= 8 else 0)
    plain = [batch for batch in plan(lengths, 8, "none") if len({*(lengths[batch] > 0)}) > 1]
    assert len(plain) > 1, "the data would stay apart by themselves"


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_order_follows_from_seed_and_epoch_and_changes_with_each(grouping):
    lengths = lengths_of(103)
    first = plan(lengths, 8, grouping, seed=5, epoch=2)
    assert plan(lengths, 8, grouping, seed=5, epoch=2) == first
    assert plan(lengths, 8, grouping, seed=5, epoch=3) != first
    assert plan(lengths, 8, grouping, seed=6, epoch=2) != first


def test_grouping_by_length_puts_like_lengths_together_and_still_shuffles_batches():
    lengths = lengths_of(800)

    def spread(grouping: str) -> float:
        return float(np.mean([np.ptp(np.abs(lengths[batch])) for batch in plan(lengths, 8, grouping)]))

    assert spread("length") < 0.1 * spread("none")
    means = [np.abs(lengths[batch]).mean() for batch in plan(lengths, 8, "length")]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def test_word_lengths_count_words_and_carry_the_modality():
    def row(words: list[str], images: int) -> Sample:
        turns = tuple(Turn(role=role, text=text) for role, text in zip(("user", "assistant"), words, strict=True))
        return Sample(id="x", images=("p.png",) * images, turns=turns)

    samples = [row(["how many\nboxes ", "two"], 1), row(["hello", "you there"], 0), row(["", ""], 1), row(["", ""], 0)]
    assert word_lengths(samples).tolist() == [4, -3, 1, -1]


def dealt(lengths, rank, world, micro, *, size=8, start=0, steps=7, grouping="modality_length"):
    batches = list(
        micro_batches(
            lengths,
            global_batch_size=size,
            grouping=grouping,
            seed=3,
            rank=rank,
            world_size=world,
            micro_batch_size=micro,
            start=start,
            steps=steps,
        )
    )
    assert len(batches) == (steps - start) * size // (world * micro)
    assert all(len(batch) == micro for batch in batches)
    return batches


SHAPES = [(1, 8), (1, 2), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)]


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("world", "micro"), SHAPES)
def test_ranks_and_accumulation_together_make_the_global_batch_of_every_step(world, micro, grouping):
    """23 rows of 8 a step: two steps an epoch, seven steps are more than three epochs."""
    lengths = lengths_of(23)
    ranks = [dealt(lengths, rank, world, micro, grouping=grouping) for rank in range(world)]
    accumulation = 8 // (world * micro)
    for step in range(7):
        wanted = plan(lengths, 8, grouping, seed=3, epoch=step // 2)[step % 2]
        own = [rank[step * accumulation : (step + 1) * accumulation] for rank in ranks]
        got = [row for batches in own for batch in batches for row in batch]
        assert sorted(got) == sorted(wanted), f"step {step}"


@pytest.mark.parametrize(("world", "micro"), SHAPES)
@pytest.mark.parametrize("start", [1, 2, 5, 7])
def test_a_resumed_run_goes_on_with_the_tail_of_the_whole_one(start, world, micro):
    lengths = lengths_of(23)
    for rank in range(world):
        whole = dealt(lengths, rank, world, micro)
        assert dealt(lengths, rank, world, micro, start=start) == whole[start * len(whole) // 7 :]


def test_ranks_work_on_like_lengths_at_a_time():
    lengths = lengths_of(64, "pictures")
    ranks = [dealt(lengths, rank, 2, 2, steps=8) for rank in range(2)]
    for step in range(8):
        turns = [[row for rank in ranks for row in rank[2 * step + k]] for k in range(2)]
        assert lengths[turns[0]].min() >= lengths[turns[1]].max()


def test_ranks_get_like_totals():
    """Long tails, as answers have: dealt to and fro, the ranks' sums of a step differ less than dealt from the top."""
    lengths = np.random.default_rng(1).lognormal(5, 0.8, 640).astype(int) + 1
    ranks = [dealt(lengths, rank, 4, 16, size=64, steps=10, grouping="none") for rank in range(4)]
    batches = plan(lengths, 64, "none", seed=3)
    got = [np.ptp([lengths[rank[step]].sum() for rank in ranks]) for step in range(10)]
    straight = [np.ptp([lengths[batch[rank::4]].sum() for rank in range(4)]) for batch in batches]
    assert np.mean(got) < 0.5 * np.mean(straight)
