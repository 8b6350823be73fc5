"""Collating: padding, masks, and which picture belongs to which row."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, SiglipImageProcessorPil

import llavakd
from llavakd.data.chat import IGNORE_INDEX, ChatRenderer, Rendered, Segment
from llavakd.data.collate import Row, RowDataset, collate, load_pixels
from llavakd.data.features import FeatureStore, save_features
from llavakd.data.samples import DataError, Sample, Turn

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
        labels=[IGNORE_INDEX] * prompt + ids[prompt:],
        segments=[int(Segment.PROMPT)] * prompt + [int(Segment.RESPONSE)] * (length - prompt),
        truncated=truncated,
    )
    return Row(id=name, text=text, pixels=None if cached else filled, features=filled if cached else None)


ROWS = [("a", 2, 5), ("b", 0, 9), ("c", 1, 3)]


def test_rows_are_padded_on_the_right_with_what_is_ignored():
    batch = collate([row(*r) for r in ROWS], pad_token_id=77)
    assert batch.input_ids.shape == (3, 9)
    assert batch.sample_ids == ("a", "b", "c")
    for index, (name, pictures, length) in enumerate(ROWS):
        text = row(name, pictures, length).text
        assert batch.input_ids[index].tolist() == text.ids + [77] * (9 - length)
        assert batch.labels[index].tolist() == text.labels + [IGNORE_INDEX] * (9 - length)
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


def test_cut_rows_are_counted_and_moving_keeps_everything():
    batch = collate([row("a", 1, 5, truncated=True), row("b", 0, 9), row("c", 1, 3, truncated=True)], pad_token_id=END)
    moved = batch.to(torch.device("meta"))
    assert batch.truncated == moved.truncated == 2
    assert moved.sample_ids == ("a", "b", "c")
    for name in ("input_ids", "attention_mask", "labels", "segments", "image_rows", "pixel_values"):
        assert getattr(moved, name).device.type == "meta", name
    assert moved.features is None


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


SAMPLES = [conversation("one", "red.png"), conversation("none"), conversation("two", "blue.png", "red.png")]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 20), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (8, 8), (0, 0, 255)).save(tmp_path / "blue.png")
    return tmp_path


def test_pixels_go_through_the_towers_own_processor(folder, processor):
    pixels = load_pixels(str(folder), ["red.png", "blue.png"], processor)
    assert pixels.shape == (2, 3, processor.size["height"], processor.size["width"])
    assert pixels.dtype == torch.float32
    want = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])
    assert torch.allclose(pixels.mean((2, 3)), want, atol=1e-5)


def test_a_dataset_row_holds_its_text_and_its_pictures(folder, renderer, processor):
    rows = RowDataset(SAMPLES, renderer, images=str(folder), image_processor=processor)
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


def test_cached_features_stand_in_for_pictures_that_are_then_never_opened(tmp_path, renderer):
    features = torch.arange(2 * 2 * 5, dtype=torch.float32).reshape(2, 2, 5)
    save_features(tmp_path / "store.safetensors", ["red.png", "blue.png"], features)
    rows = RowDataset(
        SAMPLES, renderer, images="nowhere", image_processor=None, store=FeatureStore(tmp_path / "store.safetensors")
    )
    assert rows[1].features is None, "a row of text has no features, not none of them"
    batch = collate([rows[i] for i in range(3)], pad_token_id=END)
    assert batch.pixel_values is None
    assert torch.equal(batch.features, features[[0, 1, 0]])


def test_a_missing_picture_is_named_when_its_row_is_asked_for(folder, renderer, processor):
    rows = RowDataset([conversation("lost", "green.png")], renderer, images=str(folder), image_processor=processor)
    with pytest.raises(DataError, match=r"green\.png"):
        rows[0]
