"""`Sample` -> token ids and segments, both written in one pass while the text is laid out."""

import itertools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from enum import IntEnum
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from llavakd.data.samples import IMAGE_TAG, DataError, Sample, Turn


class Segment(IntEnum):
    """What a position of a row is."""

    PADDING = 0
    VISUAL = 1
    PROMPT = 2
    RESPONSE = 3


Piece = tuple[str, Segment, list[int]]  # of a row: its text, what it is, and the text's ids


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become text: `system`, then in turn `question` and `answer` + `end` (both supervised) + `after_answer`."""

    system: str
    picture: str  # what stands for each of `{pictures}` in `question`
    question: str  # pretrain's has no `{text}`
    answer: str
    end: str | None  # None is the tokenizer's end-of-sequence token
    after_answer: str
    jinja: str | None  # the same layout for stock transformers (`apply_chat_template`)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One row: `segments[i]` is the Segment of `ids[i]`; what is supervised is RESPONSE."""

    ids: list[int]
    segments: list[int]
    truncated: bool = False


_LAYOUTS = yaml.safe_load(Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8"))
TEMPLATES = {name: Template(**fields) for name, fields in _LAYOUTS.items()}


@dataclass(eq=False)
class ChatRenderer:
    """Renders samples with one template and tokenizer."""

    template: str
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    image_token_id: int
    tokens_per_image: int
    max_length: int

    def __post_init__(self) -> None:
        self._form = TEMPLATES[self.template]
        self.end_token_id = end_token_id(self.template, self.tokenizer)
        leading = self.tokenizer("").input_ids  # a BOS where the family adds one (Llama); nothing for Qwen
        self._prefix = leading if leading == [self.tokenizer.bos_token_id] else []

    def render(self, sample: Sample) -> Rendered:
        """The conversation, cut at `max_length`; DataError: nothing to learn, a cut picture, a tag in an answer."""
        (row,) = self.render_each([sample])
        if isinstance(row, DataError):
            raise row
        return row

    def render_each(self, samples: Sequence[Sample]) -> list[Rendered | DataError]:
        """What becomes of each row, with one call of the tokenizer, which is what costs."""
        found: list[Rendered | DataError] = []
        for sample, pieces in zip(samples, self._encode([sample.turns for sample in samples]), strict=True):
            try:
                found.append(self._cut(self._lay_out(sample, pieces), sample.id))
            except DataError as error:
                found.append(error)
        return found

    def render_prompt(self, sample: Sample) -> list[int]:
        """Ids up to where the last answer would start."""
        return self._lay_out(sample, *self._encode([sample.turns[:-1]])).ids

    def _encode(self, talks: Sequence[Sequence[Turn]]) -> list[list[Piece]]:
        """The pieces of each talk with what the tokenizer makes of them."""
        pieces = [self._pieces(turns) for turns in talks]
        texts = [text for row in pieces for text, _ in row]
        options = {"add_special_tokens": False, "return_attention_mask": False}
        encoded = iter(self.tokenizer(texts, **options).input_ids if texts else [])  # it cannot take no text
        return [[(*piece, next(encoded)) for piece in row] for row in pieces]

    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[str, Segment]]:
        """Text in order, whole wherever no label boundary lies; pictures are pieces of IMAGE_TAGs."""
        form, pieces = self._form, [(self._form.system, Segment.PROMPT)]
        for turn in turns:
            if turn.role == "user":
                before, _, after = form.question.partition("{pictures}")
                picture = [(IMAGE_TAG, Segment.VISUAL), (form.picture.removeprefix(IMAGE_TAG), Segment.PROMPT)]
                question = (after.format(text=turn.text), Segment.PROMPT)
                pieces += [(before, Segment.PROMPT), *picture * turn.images, question]
            else:
                end = self.tokenizer.eos_token if form.end is None else form.end
                answer = (form.answer.format(text=turn.text) + end, Segment.RESPONSE)
                pieces += [answer, (form.after_answer, Segment.PROMPT)]
        runs = itertools.groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1])
        return [("".join(text for text, _ in run), kind) for kind, run in runs]

    def _lay_out(self, sample: Sample, pieces: list[Piece]) -> Rendered:
        if "{text}" not in self._form.question and (len(sample.turns) > 2 or not sample.turns[0].images):
            got = f"got {len(sample.turns)} turns and {sample.turns[0].images} picture(s)"
            told = f"row {sample.id!r}: the pretrain template is for a picture and its caption, {got}"
            raise DataError(f"{told}; use vicuna_v1 or chatml for this source")
        ids, segments = list[int](), list[int]()
        for text, kind, piece in [("", Segment.PROMPT, self._prefix), *pieces]:
            if kind == Segment.VISUAL:
                piece = [self.image_token_id] * self.tokens_per_image * text.count(IMAGE_TAG)
            elif self.image_token_id in piece:
                raise DataError(f"row {sample.id!r}: {IMAGE_TAG} inside an answer; remove it")
            ids += piece
            segments += [int(kind)] * len(piece)
        return Rendered(ids=ids, segments=segments)

    def _cut(self, whole: Rendered, row: str) -> Rendered:
        limit, length = self.max_length, len(whole.ids)
        if Segment.VISUAL in whole.segments[limit:]:
            raise DataError(f"row {row!r}: {length} tokens, and max_length {limit} cuts through a picture; raise it")
        if Segment.RESPONSE not in whole.segments[:limit]:
            raise DataError(f"row {row!r}: no token to learn from within max_length {limit}; raise it or drop the row")
        return Rendered(ids=whole.ids[:limit], segments=whole.segments[:limit], truncated=length > limit)


def end_token_id(template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an answer of this template; raises DataError where the tokenizer has no such single token."""
    text = TEMPLATES[template].end
    if text is None and tokenizer.eos_token_id is None:
        raise DataError(f"template {template} ends answers with the end-of-sequence token, and the tokenizer has none")
    ids = [tokenizer.eos_token_id] if text is None else tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise DataError(f"{template} needs {text!r} as one token, the tokenizer makes {len(ids)}; use another template")
    return ids[0]
