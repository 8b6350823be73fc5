"""`Sample` -> token ids, labels and segments, all written in one pass while the text is laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from llavakd.data.samples import IMAGE_TAG, DataError, Sample, Turn

IGNORE_INDEX = -100


class Segment(IntEnum):
    """What a position of a row is."""

    PADDING = 0
    VISUAL = 1
    PROMPT = 2
    RESPONSE = 3


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become text. A row is system, then per round: before + tags + question + after_question, then answer.

    The supervised part of a round is `before_answer` + answer + `end`.
    """

    system: str
    before_question: str
    tag: str
    """Text of one picture in front of the question."""
    keeps_question: bool
    after_question: str
    before_answer: str
    end: str | None
    """Closing text of an answer, supervised; None: the tokenizer's end-of-sequence token."""
    after_answer: str
    jinja: str | None
    """The same layout for stock transformers (`apply_chat_template`)."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One row: `labels[i]` is `ids[i]` where supervised, else -100; `segments[i]` is a Segment."""

    ids: list[int]
    labels: list[int]
    segments: list[int]
    truncated: bool = False


TEMPLATES = {
    name: Template(**fields)
    for name, fields in yaml.safe_load(Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8")).items()
}


class ChatRenderer:
    """Renders samples with one template and tokenizer."""

    def __init__(
        self,
        template: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_token_id: int,
        tokens_per_image: int,
        max_length: int,
    ) -> None:
        self.template = TEMPLATES[template]
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        self.end_token_id = end_token_id(template, tokenizer)
        leading = tokenizer("").input_ids  # a BOS where the family adds one (Llama); nothing for Qwen
        self._prefix = leading if leading == [tokenizer.bos_token_id] else []

    def render(self, sample: Sample) -> Rendered:
        """The whole conversation, cut on the right at `max_length`.

        Raises:
            DataError: nothing to supervise, a cut through a picture, or a picture tag inside an answer.
        """
        return self.render_many([sample])[0]

    def render_many(self, samples: Sequence[Sample]) -> list[Rendered]:
        """`render` for several rows with one call of the tokenizer, which is what costs."""
        pieces = [_merge(list(self._pieces(sample.turns, sample.id))) for sample in samples]
        texts = [text for row in pieces for text, _ in row]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False).input_ids)
        return [
            self._cut(*self._lay_out(row, [next(encoded) for _ in row], sample.id), sample.id)
            for row, sample in zip(pieces, samples, strict=True)
        ]

    def render_prompt(self, sample: Sample) -> list[int]:
        """Ids up to where the last answer would start."""
        *history, _ = sample.turns
        pieces = _merge(list(self._pieces(tuple(history), sample.id)))
        encoded = self.tokenizer([text for text, _ in pieces], add_special_tokens=False).input_ids
        return self._lay_out(pieces, encoded, sample.id)[0]

    def _cut(self, ids: list[int], labels: list[int], segments: list[int], row: str) -> Rendered:
        truncated = len(ids) > self.max_length
        if truncated:
            if Segment.VISUAL in segments[self.max_length :]:
                raise DataError(
                    f"row {row!r}: {len(ids)} tokens, and max_length {self.max_length} cuts through a "
                    "picture; raise max_length or shorten the row"
                )
            ids, labels, segments = (part[: self.max_length] for part in (ids, labels, segments))
        if all(label == IGNORE_INDEX for label in labels):
            raise DataError(
                f"row {row!r}: no token to learn from within max_length {self.max_length}; raise it or remove the row"
            )
        return Rendered(ids=ids, labels=labels, segments=segments, truncated=truncated)

    def _pieces(self, turns: tuple[Turn, ...], row: str) -> Iterator[tuple[str, bool]]:
        """(text, supervised) in order; a picture is the piece IMAGE_TAG."""
        form = self.template
        if not form.keeps_question and (len(turns) > 2 or not turns[0].images):
            raise DataError(
                f"row {row!r}: the pretrain template is for a picture and its caption, got {len(turns)} "
                f"turns and {turns[0].images} picture(s); use vicuna_v1 or chatml for this source"
            )
        yield form.system, False
        for turn in turns:
            if turn.role == "user":
                yield form.before_question, False
                for _ in range(turn.images):
                    yield IMAGE_TAG, False
                    yield form.tag.removeprefix(IMAGE_TAG), False
                yield (turn.text if form.keeps_question else "") + form.after_question, False
            else:
                yield form.before_answer + turn.text, True
                yield self.tokenizer.eos_token if form.end is None else form.end, True
                yield form.after_answer, False

    def _lay_out(
        self, pieces: Sequence[tuple[str, bool]], encoded: Sequence[list[int]], row: str
    ) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels and segments from the merged pieces and what the tokenizer made of each."""
        ids, labels = list(self._prefix), [IGNORE_INDEX] * len(self._prefix)
        segments = [int(Segment.PROMPT)] * len(ids)
        for (text, supervised), piece in zip(pieces, encoded, strict=True):
            if text == IMAGE_TAG and not supervised:
                piece, kind = [self.image_token_id] * self.tokens_per_image, Segment.VISUAL
            elif self.image_token_id in piece:
                raise DataError(f"row {row!r}: {IMAGE_TAG} inside an answer; remove it")
            else:
                kind = Segment.RESPONSE if supervised else Segment.PROMPT
            ids += piece
            labels += piece if supervised else [IGNORE_INDEX] * len(piece)
            segments += [int(kind)] * len(piece)
        return ids, labels, segments


def end_token_id(template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an answer of this template; raises DataError where the tokenizer has no such single token."""
    text = TEMPLATES[template].end
    if text is None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"template {template} ends answers with the end-of-sequence token, and the tokenizer has none"
            )
        return tokenizer.eos_token_id
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise DataError(
            f"template {template} needs {text!r} as one token, the tokenizer makes {len(ids)} of it; "
            "choose another template or tokenizer"
        )
    return ids[0]


def _merge(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Join neighbours of the same kind, so that a tokenizer sees the text whole wherever no label boundary lies."""
    merged: list[tuple[str, bool]] = []
    for text, supervised in pieces:
        if not text:
            continue
        if merged and text != IMAGE_TAG and merged[-1][0] != IMAGE_TAG and merged[-1][1] == supervised:
            merged[-1] = (merged[-1][0] + text, supervised)
        else:
            merged.append((text, supervised))
    return merged
