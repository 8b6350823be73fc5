"""Collating: padding, masks, and which picture belongs to which row."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, SiglipImageProcessorPil

import llavakd
from llavakd.config import DataConfig
from llavakd.data.chat import ChatRenderer, Rendered, Segment
from llavakd.data.collate import Row, RowDataset, Source, collate, collate_step
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import Sample, Turn
from llavakd.losses.rows import IGNORE_INDEX

PARTS = Path(llavakd.__file__).parent / "assets" / "shapes" / "parts"
END = 0  # the padding id of these tests too, as with Qwen's base models


def row(name: str, pictures: int, length: int, *, cached: bool = False, truncated: bool = False) -> Row:
    """A row of `length` tokens whose last is the end token, with pictures filled with 10 x length + their number."""
    shape = (2, 5) if cached else (3, 4, 4)
    filled = torch.stack([torch.full(shape, 10.0 * length + i) for i in range(pictures)]) if pictures else None
    ids = [*range(100, 100 + length - 1), END]
    prompt = length // 2
    text = Rendered(
        ids=ids,
        segments=[int(Segment.PROMPT)] * prompt + [int(Segment.RESPONSE)] * (length - prompt),
        truncated=truncated,
    )
    part = "features" if cached else "pixel_values"
    return Row(id=name, text=text, pictures={} if filled is None else {part: filled})


def labels_of(text: Rendered) -> list[int]:
    """The second half of such a row is its answer."""
    prompt = len(text.ids) // 2
    return [IGNORE_INDEX] * prompt + text.ids[prompt:]


ROWS = [("a", 2, 5), ("b", 0, 9), ("c", 1, 3)]


def test_rows_are_padded_on_the_right_with_what_is_ignored():
    batch = collate([row(*r) for r in ROWS], pad_token_id=77)
    assert batch.input_ids.shape == (3, 9)
    assert batch.sample_ids == ("a", "b", "c")
    for index, (name, pictures, length) in enumerate(ROWS):
        text = row(name, pictures, length).text
        assert batch.input_ids[index].tolist() == text.ids + [77] * (9 - length)
        assert batch.labels[index].tolist() == labels_of(text) + [IGNORE_INDEX] * (9 - length)
        assert batch.segments[index].tolist() == text.segments + [Segment.PADDING] * (9 - length)
        assert batch.attention_mask[index].tolist() == [1] * length + [0] * (9 - length)
    dtypes = {name: getattr(batch, name).dtype for name in ("input_ids", "attention_mask", "labels", "segments")}
    assert dtypes == dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.int64) | {"segments": torch.uint8}


def test_a_padding_id_equal_to_the_end_token_loses_no_end_token():
    batch = collate([row(*r) for r in ROWS], pad_token_id=END)
    assert batch.attention_mask.sum(1).tolist() == [5, 9, 3]
    for index, (_, _, length) in enumerate(ROWS):
        assert batch.labels[index, length - 1] == END
        assert batch.attention_mask[index, length - 1] == 1


@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "features"])
def test_pictures_stay_in_order_and_know_their_row(cached):
    batch = collate([row(*r, cached=cached) for r in ROWS], pad_token_id=END)
    held, other = (batch.features, batch.pixel_values) if cached else (batch.pixel_values, batch.features)
    assert other is None
    assert batch.image_rows.tolist() == [0, 0, 2]
    assert held.flatten(1)[:, 0].tolist() == [50.0, 51.0, 30.0]
    assert held.shape == ((3, 2, 5) if cached else (3, 3, 4, 4))


def test_a_batch_of_text_has_no_pictures():
    batch = collate([row("b", 0, 9), row("d", 0, 4)], pad_token_id=END)
    assert batch.pixel_values is None
    assert batch.features is None
    assert batch.image_rows.shape == (0,)
    assert batch.image_rows.dtype == torch.int64


def test_cut_rows_are_counted_and_no_wrapper_moves_a_batch():
    batch = collate([row("a", 1, 5, truncated=True), row("b", 0, 9), row("c", 1, 3, truncated=True)], pad_token_id=END)
    assert batch.truncated == 2
    assert batch.sample_ids == ("a", "b", "c")
    moved = send_to_device(batch, torch.device("meta"))  # what accelerate and DDP do with tuples, lists and dicts
    for name in ("input_ids", "attention_mask", "labels", "segments", "image_rows", "pixel_values"):
        assert getattr(moved, name).device.type == "cpu", name


@pytest.fixture(scope="module")
def renderer():
    tokenizer = AutoTokenizer.from_pretrained(str(PARTS / "student-lm"))
    return ChatRenderer("chatml", tokenizer, image_token_id=3, tokens_per_image=2, max_length=200)


@pytest.fixture(scope="module")
def processor():
    return SiglipImageProcessorPil.from_pretrained(str(PARTS / "tower"))


def conversation(name: str, *images: str) -> Sample:
    turns = (Turn(role="user", text="What?", images=len(images)), Turn(role="assistant", text="a box"))
    return Sample(id=name, images=images, turns=turns)


def among(folder) -> DataConfig:
    return DataConfig(path="rows.json", images=str(folder))


def dataset(samples, renderer, folder, processor, **more) -> RowDataset:
    source = Source(samples=samples, renderer=renderer, data=among(folder), **more)
    return RowDataset([source], image_processor=processor)


SAMPLES = [conversation("one", "red.png"), conversation("none"), conversation("two", "blue.png", "red.png")]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 20), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (8, 8), (0, 0, 255)).save(tmp_path / "blue.png")
    return tmp_path


def test_pixels_go_through_the_towers_own_processor(folder, processor):
    pixels = load_pixels(among(folder), ["red.png", "blue.png"], processor)
    assert pixels.shape == (2, 3, processor.size["height"], processor.size["width"])
    assert pixels.dtype == torch.float32
    want = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])
    assert torch.allclose(pixels.mean((2, 3)), want, atol=1e-5)


def test_a_dataset_row_holds_its_text_and_its_pictures(folder, renderer, processor):
    rows = dataset(SAMPLES, renderer, folder, processor)
    assert len(rows) == 3
    loader = DataLoader(rows, batch_sampler=[[0, 1, 2], [2]], collate_fn=partial(collate, pad_token_id=END))
    batch, last = loader
    assert last.sample_ids == ("two",)
    assert last.input_ids.tolist() == [rows[2].text.ids]
    assert batch.sample_ids == ("one", "none", "two")
    assert batch.image_rows.tolist() == [0, 2, 2]
    assert (batch.segments == Segment.VISUAL).sum(1).tolist() == [2, 0, 4]
    reds, blues = batch.pixel_values.mean((2, 3))[:, 0].tolist(), batch.pixel_values.mean((2, 3))[:, 2].tolist()
    assert reds == pytest.approx([1, -1, 1], abs=1e-5)
    assert blues == pytest.approx([-1, 1, -1], abs=1e-5)


def test_cached_features_stand_in_for_pictures_that_are_then_never_opened(renderer):
    features = torch.arange(2 * 2 * 5, dtype=torch.float32).reshape(2, 2, 5)
    rows = dataset(SAMPLES, renderer, "nowhere", None, store=dict(zip(["red.png", "blue.png"], features, strict=True)))
    assert rows[1].pictures == {}, "a row of text has no features, not none of them"
    batch = collate([rows[i] for i in range(3)], pad_token_id=END)
    assert batch.pixel_values is None
    assert torch.equal(batch.features, features[[0, 1, 0]])


def test_a_missing_picture_is_named_when_its_row_is_asked_for(folder, renderer, processor):
    rows = dataset([conversation("lost", "green.png")], renderer, folder, processor)
    assert re.search(r"row 'lost' left out: .*green\.png", rows[0].mistake)


def numbered(prefix: str, count: int) -> list[Sample]:
    return [conversation(f"{prefix}{number}") for number in range(count)]


@pytest.mark.parametrize(("weight", "often"), [(1.0, {1}), (3.0, {3}), (2.5, {2, 3}), (0.3, {0, 1})])
def test_a_weight_says_how_often_a_row_of_a_source_is_seen(renderer, weight, often):
    sources = [
        Source(samples=numbered("a", 10), renderer=renderer, data=among("nowhere"), weight=weight),
        Source(samples=numbered("b", 4), renderer=renderer, data=among("nowhere")),
    ]
    rows = RowDataset(sources, image_processor=None, seed=1)
    assert len(rows) == round(10 * weight) + 4
    seen = Counter(row.id for row in rows.__getitems__(range(len(rows))))
    assert {seen[f"a{number}"] for number in range(10)} == often
    assert [seen[f"b{number}"] for number in range(4)] == [1] * 4
    assert len(rows.lengths) == len(rows)


def test_the_part_of_a_source_is_drawn_by_the_seed(renderer):
    def drawn(seed):
        source = Source(samples=numbered("a", 40), renderer=renderer, data=among("nowhere"), weight=0.5)
        return [row.id for row in RowDataset([source], image_processor=None, seed=seed).__getitems__(range(20))]

    assert drawn(0) == drawn(0) != drawn(1)


def test_rows_of_several_sources_come_in_the_order_asked_each_in_its_own_form(renderer, folder, processor):
    other = ChatRenderer("vicuna_v1", renderer.tokenizer, image_token_id=renderer.image_token_id, tokens_per_image=2,
                         max_length=500)  # fmt: skip
    sources = [
        Source(samples=SAMPLES, renderer=renderer, data=among(folder)),
        Source(samples=SAMPLES, renderer=other, data=among(folder)),
    ]
    rows = RowDataset(sources, image_processor=processor)
    got = rows.__getitems__([5, 0, 4, 2])
    assert [row.id for row in got] == ["two", "one", "none", "two"]
    wanted = [other.render(SAMPLES[2]), renderer.render(SAMPLES[0]), other.render(SAMPLES[1])]
    assert [row.text for row in got[:3]] == wanted


def test_a_micro_batch_may_lack_rows_of_a_source(renderer):
    sources = [Source(samples=numbered(name, 2), renderer=renderer, data=among("nowhere")) for name in "ab"]
    rows = RowDataset(sources, image_processor=None)
    assert [row.id for row in rows.__getitems__([3, 2])] == ["b1", "b0"]


def test_a_bad_row_is_told_apart_from_its_neighbours(renderer, folder, processor):
    samples = [SAMPLES[0], conversation("lost", "green.png"), SAMPLES[2]]
    batch = collate(dataset(samples, renderer, folder, processor).__getitems__([0, 1, 2]), pad_token_id=END)
    assert len(batch.mistakes) == 1
    assert "'lost' left out" in batch.mistakes[0]
    assert batch.sample_ids == ("one", "lost", "two")
    assert batch.image_rows.tolist() == [0, 2, 2]
    assert (batch.labels[1] == IGNORE_INDEX).all()
    assert batch.attention_mask[1].sum() == 1


def test_without_a_limit_of_tokens_rows_are_one_padded_batch():
    rows = [row(*r) for r in ROWS]
    (batch,) = collate_step(rows, pad_token_id=END, max_tokens=None)
    alone = collate(rows, pad_token_id=END)
    for name, value in vars(alone).items():
        assert torch.equal(getattr(batch, name), value) if isinstance(value, torch.Tensor) else True, name
    assert batch.position_ids is None


LENGTHS = [(2, 5), (0, 9), (1, 3), (0, 1), (3, 20), (0, 2), (1, 11), (0, 7), (2, 4), (0, 13)]  # pictures, tokens
MANY = [(f"r{index}", *shape) for index, shape in enumerate(LENGTHS)]


@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "features"])
@pytest.mark.parametrize("limit", [20, 24, 40, 75, 1000])
def test_packs_hold_every_row_whole_once_one_behind_the_other(limit, cached):
    """Row for row what the padded batch holds: its tokens, labels, segments and pictures, positions from 0 again."""
    whole = {r[0]: row(*r, cached=cached, truncated=r[0] == "r4") for r in MANY}
    packs = collate_step([*whole.values()], pad_token_id=77, max_tokens=limit)
    assert sorted(name for pack in packs for name in pack.sample_ids) == sorted(whole)
    assert sum(pack.truncated for pack in packs) == 1
    for pack in packs:
        rows = [whole[name] for name in pack.sample_ids]
        length = sum(len(one.text.ids) for one in rows)
        assert length <= limit
        assert pack.input_ids.tolist() == [[token for one in rows for token in one.text.ids]]
        assert pack.labels.tolist() == [[label for one in rows for label in labels_of(one.text)]]
        assert pack.segments.tolist() == [[segment for one in rows for segment in one.text.segments]]
        assert pack.attention_mask.tolist() == [[1] * length]
        assert pack.position_ids.tolist() == [[place for one in rows for place in range(len(one.text.ids))]]
        dtypes = [pack.input_ids.dtype, pack.labels.dtype, pack.segments.dtype, pack.position_ids.dtype]
        assert dtypes == [torch.int64, torch.int64, torch.uint8, torch.int64]
        held = [one.pictures.get("features" if cached else "pixel_values") for one in rows]
        assert pack.image_rows.tolist() == [number for number, one in enumerate(held) if one is not None for _ in one]
        got = pack.features if cached else pack.pixel_values
        assert (got is None) == all(one is None for one in held)
        assert got is None or torch.equal(got, torch.cat([one for one in held if one is not None]))


@pytest.mark.parametrize("limit", [20, 24, 40, 60])
def test_no_row_of_a_later_pack_would_have_fitted_into_an_earlier_one(limit):
    packs = collate_step([row(*r) for r in MANY], pad_token_id=END, max_tokens=limit)
    lengths = [torch.bincount((pack.position_ids[0] == 0).cumsum(0) - 1).tolist() for pack in packs]
    for number, later in enumerate(lengths):
        assert all(sum(earlier) + min(later) > limit for earlier in lengths[:number])
    assert len(packs) > 1


def test_a_row_that_was_left_out_stands_in_its_pack_as_one_token(folder, renderer, processor):
    samples = [SAMPLES[0], conversation("lost", "green.png"), SAMPLES[2]]
    rows = dataset(samples, renderer, folder, processor).__getitems__([0, 1, 2])
    (pack,) = collate_step(rows, pad_token_id=END, max_tokens=200)
    assert "'lost' left out" in "".join(pack.mistakes)
    assert pack.sample_ids == ("two", "one", "lost")  # longest first
    assert pack.image_rows.tolist() == [0, 0, 1]
    assert pack.labels[0, -1] == IGNORE_INDEX
    assert pack.position_ids[0, -1] == 0
