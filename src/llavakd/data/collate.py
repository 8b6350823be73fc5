"""Rows -> a padded `Batch`; pictures -> pixel values through the vision tower's own processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llavakd.data.chat import IGNORE_INDEX, ChatRenderer, Rendered, Segment
from llavakd.data.features import FeatureStore
from llavakd.data.samples import Sample, read_image


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
    """One sample, rendered, with its pictures as pixels or features."""

    id: str
    text: Rendered
    pixels: Tensor | None
    features: Tensor | None
    teacher_pixels: Tensor | None = None


class RowDataset(Dataset[Row]):
    """Samples, rendered and with pictures loaded when asked for."""

    def __init__(
        self,
        samples: Sequence[Sample],
        renderer: ChatRenderer,
        *,
        images: str | None,
        image_processor: Any,
        teacher_processor: Any = None,
        store: FeatureStore | None = None,
    ) -> None:
        self.samples = samples
        self.renderer = renderer
        self.images = images or ""
        self.image_processor = image_processor
        self.teacher_processor = teacher_processor
        self.store = store

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """The rows of one micro-batch together (torch's loader calls this): one tokenizer call for all."""
        samples = [self.samples[index] for index in indices]
        return [
            Row(
                id=sample.id,
                text=text,
                pixels=self._pixels(sample, self.image_processor),
                features=self._features(sample),
                teacher_pixels=self._pixels(sample, self.teacher_processor),
            )
            for sample, text in zip(samples, self.renderer.render_many(samples), strict=True)
        ]

    def _pixels(self, sample: Sample, processor: Any) -> Tensor | None:
        if processor is None or self.store is not None or not sample.images:
            return None
        return load_pixels(self.images, sample.images, processor)

    def _features(self, sample: Sample) -> Tensor | None:
        return self.store.get(sample.images) if self.store is not None and sample.images else None


def load_pixels(images: str, names: Sequence[str], image_processor: Any) -> Tensor:
    """Pictures of one folder -> float32 [len(names), 3, H, W]."""
    pictures = [read_image(images, name) for name in names]
    return image_processor(images=pictures, return_tensors="pt").pixel_values


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
    )
