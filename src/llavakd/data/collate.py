"""Rows -> a `Batch`, padded or packed."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llavakd.config import DataConfig
from llavakd.data.chat import ChatRenderer, Rendered, Segment
from llavakd.data.files import DataError
from llavakd.data.pictures import load_pixels
from llavakd.data.samples import Sample, word_lengths
from llavakd.losses.offline import Taught
from llavakd.losses.rows import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows padded on the right to T positions, or one pack of rows behind each other (B = 1), and their P pictures."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], each of the token at its own position (unshifted); -100: none
    segments: Tensor  # uint8 [B, T], a Segment each
    visual: Tensor  # bool [B, T], picture positions that a loss sees: all, or those that a teacher's cache tells of
    image_rows: Tensor  # int64 [P], the row of each picture, in order
    pixel_values: Tensor | None = None  # float32 [P, 3, H, W]; None without pictures or with cached features
    features: Tensor | None = None  # [P, N, D_v], the frozen tower's output, if it was cached
    teacher_pixel_values: Tensor | None = None  # through the teacher's own processor, where it does not share one
    position_ids: Tensor | None = None  # int64 [1, T] of a pack, from 0 in each of its rows; None where rows are padded
    taught: Taught | None = None  # what the teacher's cache tells
    sample_ids: Sequence[str] = ()
    truncated: int = 0
    mistakes: Sequence[str] = ()  # what is wrong with rows that cannot be used: an unsupervised token stands for each

    def pin_memory(self) -> Self:
        """Page-locked copy, for the data loader; no tuple, which wrappers of the student would move to the device."""
        held: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **{name: value.pin_memory() for name, value in held.items()})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample, rendered, with its pictures as a `Batch` names them; or what is wrong with it."""

    id: str
    text: Rendered
    pictures: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    mistake: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data source and how it is read; a weight of 2.5 gives all of its rows twice and half of them once more."""

    samples: Sequence[Sample]
    renderer: ChatRenderer
    data: DataConfig
    store: dict[str, Tensor] | None = None  # features [N, D_v] of its pictures by name
    weight: float = 1.0


class RowDataset(Dataset[Row]):
    """Rows of one or several sources, rendered and with pictures loaded when asked for; `seed` draws part sources."""

    def __init__(
        self, sources: Sequence[Source], *, image_processor: Any, teacher_processor: Any = None, seed: int = 0
    ) -> None:
        processors = {"pixel_values": image_processor, "teacher_pixel_values": teacher_processor}
        self.sources, self.processors = sources, {name: one for name, one in processors.items() if one is not None}
        drawn = [_drawn(len(source.samples), source.weight, seed) for source in sources]
        self._places = np.stack([np.repeat(np.arange(len(sources)), [*map(len, drawn)]), np.concatenate(drawn)], axis=1)
        lengths = [word_lengths(source.samples)[rows] for source, rows in zip(sources, drawn, strict=True)]
        self.lengths = np.concatenate(lengths)

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
            rows = map(functools.partial(self._row, source), samples, source.renderer.render_each(samples))
            found |= zip(mine, rows, strict=True)
        return [found[index] for index in indices]

    def _row(self, source: Source, sample: Sample, text: Rendered | DataError) -> Row:
        """A row with its pictures, or one that stands for it and says what is wrong."""
        pictures: dict[str, Tensor] = {}
        try:
            if isinstance(text, DataError):
                raise text
            if sample.images and source.store is not None:
                pictures["features"] = torch.stack([source.store[name] for name in sample.images])
            elif sample.images:
                for name, processor in self.processors.items():
                    pictures[name] = load_pixels(source.data, sample.images, processor)
            return Row(id=sample.id, text=text, pictures=pictures)
        except DataError as error:
            nothing = Rendered(ids=[source.renderer.end_token_id], segments=[Segment.PROMPT])
            return Row(id=sample.id, text=nothing, mistake=f"row {sample.id!r} left out: {error}")


def _drawn(rows: int, weight: float, seed: int) -> np.ndarray:
    """round(weight * rows) row numbers of a source: all of them as often as that allows, the rest by chance."""
    times, rest = divmod(round(weight * rows), max(rows, 1))
    part = np.sort(np.random.default_rng(seed).permutation(rows)[:rest])
    return np.concatenate([np.tile(np.arange(rows), times), part])


def collate_step(rows: Sequence[Row], *, pad_token_id: int, max_tokens: int | None) -> list[Batch]:
    """One padded batch, or packs of at most `max_tokens`: the longest row first, each to the first that has room."""
    if max_tokens is None:
        return [collate(rows, pad_token_id=pad_token_id)]
    packs: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.text.ids)):
        fitting = (pack for pack in packs if sum(len(one.text.ids) for one in [*pack, row]) <= max_tokens)
        if (pack := next(fitting, None)) is None:
            packs.append(pack := [])
        pack.append(row)
    return [collate(pack, pad_token_id=pad_token_id, packed=True) for pack in packs]


def collate(rows: Sequence[Row], *, pad_token_id: int, packed: bool = False) -> Batch:
    """Pad on the right; padding is made from lengths, so a pad id equal to the end token loses nothing. Or pack."""

    def laid(lists: Sequence[Sequence[int]], fill: int, dtype: torch.dtype = torch.int64) -> Tensor:
        lines = [torch.tensor(values, dtype=dtype) for values in lists]
        return torch.cat(lines)[None] if packed else pad_sequence(lines, batch_first=True, padding_value=fill)

    input_ids = laid([row.text.ids for row in rows], pad_token_id)
    segments = laid([row.text.segments for row in rows], Segment.PADDING, torch.uint8)
    pictured = [row.pictures for row in rows if row.pictures]  # all in the same parts
    pictures: dict[str, Any] = {part: torch.cat([one[part] for one in pictured]) for part in next(iter(pictured), ())}
    owners = [number for number, row in enumerate(rows) for _ in next(iter(row.pictures.values()), ())]
    return Batch(
        input_ids=input_ids,
        attention_mask=(segments != Segment.PADDING).long(),
        labels=input_ids.where(segments == Segment.RESPONSE, IGNORE_INDEX),
        segments=segments,
        visual=segments == Segment.VISUAL,
        image_rows=torch.tensor(owners, dtype=torch.int64),
        position_ids=laid([range(len(row.text.ids)) for row in rows], 0) if packed else None,
        sample_ids=tuple(row.id for row in rows),
        truncated=sum(row.text.truncated for row in rows),
        mistakes=tuple(row.mistake for row in rows if row.mistake),
        **pictures,
    )
