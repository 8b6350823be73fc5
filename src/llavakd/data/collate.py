"""Rows -> a padded `Batch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llavakd.config import DataConfig
from llavakd.data.chat import IGNORE_INDEX, ChatRenderer, Rendered, Segment
from llavakd.data.features import FeatureStore
from llavakd.data.files import DataError
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import Sample, word_lengths


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows padded on the right to T positions, and the P pictures in them, row by row and in order.

    input_ids, attention_mask, labels: int64 [B, T]; labels[b, t] belongs to token t itself (unshifted), -100: none.
    segments: uint8 [B, T], a Segment each.
    pixel_values: float32 [P, 3, H, W], or None without pictures or with cached features.
    features: the frozen tower's output [P, N, D_v], or None.
    teacher_pixel_values: the same pictures through the teacher's own processor, or None where it shares the student's.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    segments: Tensor
    image_rows: Tensor
    pixel_values: Tensor | None = None
    features: Tensor | None = None
    teacher_pixel_values: Tensor | None = None
    sample_ids: tuple[str, ...] = ()
    truncated: int = 0
    mistakes: tuple[str, ...] = ()
    """What is wrong with the rows that could not be used; a single unsupervised token stands for each."""

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Page-locked copy, for the data loader."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            f.name: change(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample, rendered, with its pictures as pixels or features; or what is wrong with it."""

    id: str
    text: Rendered
    pixels: Tensor | None = None
    features: Tensor | None = None
    teacher_pixels: Tensor | None = None
    mistake: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data source and how it is read; a weight of 2.5 gives all of its rows twice and half of them once more."""

    samples: Sequence[Sample]
    renderer: ChatRenderer
    data: DataConfig
    store: FeatureStore | None = None
    weight: float = 1.0


class RowDataset(Dataset[Row]):
    """Rows of one or several sources, rendered and with pictures loaded when asked for; `seed` draws part sources."""

    def __init__(
        self, sources: Sequence[Source], *, image_processor: Any, teacher_processor: Any = None, seed: int = 0
    ) -> None:
        self.sources = sources
        self.image_processor = image_processor
        self.teacher_processor = teacher_processor
        drawn = [_drawn(len(source.samples), source.weight, seed) for source in sources]
        self._places = np.stack([np.repeat(np.arange(len(sources)), [*map(len, drawn)]), np.concatenate(drawn)], axis=1)
        self.lengths = np.concatenate(
            [word_lengths(one.samples)[rows] for one, rows in zip(sources, drawn, strict=True)]
        )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """The rows of one micro-batch together (torch's loader calls this): one tokenizer call for each source."""
        found: dict[int, Row] = {}
        for number, source in enumerate(self.sources):
            mine = [index for index in indices if self._places[index, 0] == number]
            samples = [source.samples[int(self._places[index, 1])] for index in mine]
            try:
                rows = self._rows(source, samples)
            except DataError:
                rows = [self._row_or_mistake(source, sample) for sample in samples]
            found |= zip(mine, rows, strict=True)
        return [found[index] for index in indices]

    def _rows(self, source: Source, samples: Sequence[Sample]) -> list[Row]:
        def pixels(sample: Sample, processor: Any) -> Tensor | None:
            unwanted = processor is None or source.store is not None or not sample.images
            return None if unwanted else load_pixels(source.data, sample.images, processor)

        return [
            Row(
                id=sample.id,
                text=text,
                pixels=pixels(sample, self.image_processor),
                features=source.store.get(sample.images) if source.store and sample.images else None,
                teacher_pixels=pixels(sample, self.teacher_processor),
            )
            for sample, text in zip(samples, source.renderer.render_many(samples), strict=True)
        ]

    def _row_or_mistake(self, source: Source, sample: Sample) -> Row:
        try:
            return self._rows(source, [sample])[0]
        except DataError as error:
            nothing = Rendered(ids=[source.renderer.end_token_id], labels=[IGNORE_INDEX], segments=[Segment.PROMPT])
            return Row(id=sample.id, text=nothing, mistake=f"row {sample.id!r} left out: {error}")


def _drawn(rows: int, weight: float, seed: int) -> np.ndarray:
    """round(weight * rows) row numbers of a source: all of them as often as that allows, the rest by chance."""
    times, rest = divmod(round(weight * rows), max(rows, 1))
    return np.concatenate(
        [np.tile(np.arange(rows), times), np.sort(np.random.default_rng(seed).permutation(rows)[:rest])]
    )


def collate(rows: Sequence[Row], *, pad_token_id: int) -> Batch:
    """Pad on the right; padding is made from lengths, so a pad id equal to the end token loses nothing."""
    length = max(len(row.text.ids) for row in rows)

    def padded(lists: list[list[int]], fill: int, dtype: type) -> Tensor:
        table: np.ndarray = np.full((len(lists), length), fill, dtype)
        for row, values in zip(table, lists, strict=True):
            row[: len(values)] = values
        return torch.from_numpy(table)

    segments = padded([row.text.segments for row in rows], Segment.PADDING, np.uint8)
    pictures = [row.pixels if row.pixels is not None else row.features for row in rows]
    image_rows = [index for index, tensor in enumerate(pictures) if tensor is not None for _ in range(len(tensor))]
    pixels = [row.pixels for row in rows if row.pixels is not None]
    teacher_pixels = [row.teacher_pixels for row in rows if row.teacher_pixels is not None]
    features = [row.features for row in rows if row.features is not None]
    return Batch(
        input_ids=padded([row.text.ids for row in rows], pad_token_id, np.int64),
        attention_mask=(segments != Segment.PADDING).long(),
        labels=padded([row.text.labels for row in rows], IGNORE_INDEX, np.int64),
        segments=segments,
        image_rows=torch.tensor(image_rows, dtype=torch.int64),
        pixel_values=torch.cat(pixels) if pixels else None,
        features=torch.cat(features) if features else None,
        teacher_pixel_values=torch.cat(teacher_pixels) if teacher_pixels else None,
        sample_ids=tuple(row.id for row in rows),
        truncated=sum(row.text.truncated for row in rows),
        mistakes=tuple(row.mistake for row in rows if row.mistake),
    )
