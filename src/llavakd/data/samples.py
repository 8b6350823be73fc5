"""LLaVA-format files -> `Sample`: what a row says, before any tokenizer or picture is touched."""

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llavakd.config import DataConfig, SubsetConfig
from llavakd.data.files import DataError, row_at, scan
from llavakd.data.pictures import has_picture

IMAGE_TAG = "<image>"
_ROLES: tuple[Literal["user"], Literal["assistant"]] = ("user", "assistant")
# How a row's turns name their speaker and text, and who speaks, in the order of _ROLES.
_FORMS = {"conversations": ("from", "value", ("human", "gpt")), "messages": ("role", "content", _ROLES)}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One utterance; `images` counts the pictures shown with it, whose tags are no longer in `text`."""

    role: Literal["user", "assistant"]
    text: str
    images: int = 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation: turns alternate user, assistant; `images` are names inside the picture folder, in order."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    type: str | None = None
    # What ten people answered to the last question, for `vqa_accuracy`; none: only the last turn is known.
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples(Sequence[Sample]):
    """The good rows of a data file, read from it when asked for."""

    path: Path
    rows: int  # how many the file has, good and bad
    mistakes: tuple[str, ...]  # what is wrong with each bad one
    places: np.ndarray  # uint64 [n, 3], where a good row starts in the file, how long it is, and which it is
    lengths: np.ndarray  # int32 [n], their `word_lengths`

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return parse_row(self.raw(index), f"{self.path.name} row {self.places[index, 2]}")

    def raw(self, index: int) -> Any:
        """The row as the file has it."""
        start, size, _ = self.places[index].tolist()
        return row_at(self.path, (start, size))


def load_samples(data: DataConfig, max_bad_rows: float = 0.0, *, find_pictures: bool = False) -> Samples:
    """Look every row of a data file over, holding none of them; with `find_pictures` also whether its pictures are there.

    A row is LLaVA's (id, image, conversations, optional type and answers) or has `messages` and `images`.

    Raises DataError: an unreadable or malformed file; more than this share of wrong rows (the first are named).
    """
    path, rows, mistakes = Path(data.path), 0, []
    places, lengths = array("Q"), array("i")
    for rows, (place, row) in enumerate(scan(path), start=1):
        try:
            sample = parse_row(row, place_of_row := f"{path.name} row {rows - 1}")
            lost = [name for name in sample.images if find_pictures and not has_picture(data, name)]
            if lost and data.images:
                raise DataError(f"{place_of_row} (id {sample.id!r}): no picture {lost[0]!r} in {data.images}")
        except DataError as error:
            mistakes.append(str(error))
            continue
        if data.subset and not _in_subset(sample.id, data.subset):
            continue
        if data.images is None and any(not name.startswith("@") for name in sample.images):
            raise DataError(f"{path} has rows with pictures, but the source has no `images`; set it to their folder")
        places.extend((*place, rows - 1))
        lengths.extend(word_lengths([sample]).tolist())
    if len(mistakes) > max_bad_rows * rows:
        raise too_many(mistakes, len(mistakes), rows, max_bad_rows)
    if not lengths and not mistakes:
        raise DataError(f"{path}: subset {data.subset} keeps none of {rows} rows; widen start and stop")
    table, words = np.array(places, np.uint64).reshape(-1, 3), np.array(lengths, np.int32)
    return Samples(path=path, rows=rows, mistakes=tuple(mistakes), places=table, lengths=words)


def too_many(mistakes: Sequence[str], count: int, rows: int, allowed: float) -> DataError:
    """The error that says so: the first few mistakes, and how many there are of how many rows."""
    if count == 1 and not allowed:
        return DataError(mistakes[0])
    share = f"{count} of {rows} rows cannot be used and max_bad_rows allows a share of {allowed:g}"
    return DataError("\n".join([*mistakes[:3], *["..."][: count - 3], f"{share}; `llava-kd check` names them all"]))


def word_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """Whitespace word count of each row, int32, negative without a picture (LLaVA's modality length)."""
    if isinstance(samples, Samples):
        return samples.lengths
    words = [max(1, sum(len(turn.text.split()) for turn in sample.turns)) for sample in samples]
    return np.array([n if sample.images else -n for n, sample in zip(words, samples, strict=True)], np.int32)


def parse_row(row: Any, place: str) -> Sample:
    """One JSON row -> Sample; raises DataError naming `place` and the row's id."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: got a {type(row).__name__}, expected an object with id, image, conversations")
    place = f"{place} (id {row.get('id')!r})"
    image = row.get("images") if row.get("image") is None else row["image"]
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{place}: `image` is {image!r}, expected a file name or a list of them")
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise DataError(f"{place}: `image` {outside[0]!r} leaves the picture folder; use a path inside it")
    turns = _parse_turns(row, place)
    tags = sum(turn.images for turn in turns)
    if tags != len(names):
        raise DataError(f"{place}: {len(names)} picture(s) but {tags} {IMAGE_TAG} tag(s) in human turns; pair them up")
    answers = row.get("answers", ())
    if answers and not (isinstance(answers, list) and [type(text) for text in answers] == [str] * 10):
        raise DataError(f"{place}: `answers` is {answers!r}, expected a list of ten texts, one a person")
    kind = row.get("type")
    return Sample(id=str(row.get("id", place)), images=tuple(names), turns=turns, type=kind, answers=tuple(answers))


def _parse_turns(row: dict[str, Any], place: str) -> tuple[Turn, ...]:
    form = "conversations" if row.get("messages") is None else "messages"
    who, what, speakers = _FORMS[form]
    entries, expected = row.get(form), f"{{{who}: {'|'.join(speakers)}, {what}: text}}"
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{place}: `{form}` is {entries!r}, expected a list of {expected}")
    turns: list[Turn] = []
    for number, entry in enumerate(entries):
        speaker, text = (entry.get(who), entry.get(what)) if isinstance(entry, dict) else (None, None)
        if form == "messages" and isinstance(text, list):
            text = "".join(_part_text(part, place) for part in text)
        if speaker not in speakers or not isinstance(text, str):
            raise DataError(f"{place}: turn {number} is {entry!r}; expected {expected}")
        role = _ROLES[speakers.index(speaker)]
        if not turns and role == "assistant":
            continue  # LLaVA drops a leading answer that has no question
        if role != _ROLES[len(turns) % 2]:
            raise DataError(f"{place}: turn {number} is from {speaker!r} twice in a row; speakers must alternate")
        # Tags move to the front of their turn, as in LLaVA's preprocessing.
        count = text.count(IMAGE_TAG) if role == "user" else 0
        text = text.replace(IMAGE_TAG, "").strip() if role == "user" else text.strip()
        if role == "assistant" and not text:
            raise DataError(f"{place}: turn {number}, the answer, is empty; write one or remove the row")
        turns.append(Turn(role=role, text=text, images=count))
    if len(turns) < 2 or len(turns) % 2:
        raise DataError(f"{place}: the last question has no answer; a turn of {speakers[1]} must follow it")
    return tuple(turns)


def _part_text(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE_TAG
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{place}: content part {part!r}, expected {{type: text, text}} or {{type: image}}")
    return part["text"]


def _in_subset(name: str, subset: SubsetConfig) -> bool:
    match = re.search(subset.group, name)
    if match is None:
        raise DataError(f"row id {name!r} does not match subset.group {subset.group!r}; mend the expression")
    digest = hashlib.sha256(match.group().encode()).digest()
    return subset.start <= int.from_bytes(digest[:8], "big") / 2**64 < subset.stop
