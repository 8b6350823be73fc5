"""LLaVA-format files -> `Sample`: what a row says, before any tokenizer or picture is touched."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from llavakd.config import DataConfig, SubsetConfig
from llavakd.errors import UserError

IMAGE_TAG = "<image>"
_ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}


class DataError(UserError):
    """A data file or one of its rows is wrong; the message names the row."""


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
    answers: tuple[str, ...] = ()
    """What ten people answered to the last question, for `vqa_accuracy`; none: only the last turn is known."""


def load_samples(data: DataConfig) -> list[Sample]:
    """Read a LLaVA JSON list (fields id, image, conversations, optional type and answers).

    Raises:
        DataError: unreadable or malformed file; names the first wrong row.
    """
    path = Path(data.path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; set the source's `path` to a LLaVA-format JSON file"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not JSON ({error}); expected a list of rows with id, image, conversations"
        ) from error
    if not isinstance(rows, list) or not rows:
        got = "an empty list" if isinstance(rows, list) else f"a {type(rows).__name__}"
        raise DataError(f"{path} holds {got}; expected a list of rows with id, image, conversations")
    samples = [parse_row(row, f"{path.name} row {index}") for index, row in enumerate(rows)]
    kept = _subset(samples, data.subset) if data.subset else samples
    if not kept:
        raise DataError(f"{path}: subset {data.subset} keeps none of {len(samples)} rows; widen start and stop")
    if data.images is None and any(sample.images for sample in kept):
        raise DataError(f"{path} has rows with pictures, but the source has no `images`; set it to their folder")
    return kept


def parse_row(row: Any, place: str) -> Sample:
    """One JSON row -> Sample; raises DataError naming `place` and the row's id."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: got a {type(row).__name__}, expected an object with id, image, conversations")
    place = f"{place} (id {row.get('id')!r})"
    image = row.get("image")
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{place}: `image` is {image!r}, expected a file name or a list of them")
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{place}: `image` {name!r} leaves the picture folder; use a path inside it")
    turns = _parse_turns(row.get("conversations"), place)
    tags = sum(turn.images for turn in turns)
    if tags != len(names):
        raise DataError(
            f"{place}: {len(names)} picture(s) but {tags} {IMAGE_TAG} tag(s) in the human turns; make them equal"
        )
    answers = row.get("answers", ())
    if answers and not (isinstance(answers, list) and [type(text) for text in answers] == [str] * 10):
        raise DataError(f"{place}: `answers` is {answers!r}, expected a list of ten texts, one a person")
    kind = row.get("type")
    return Sample(id=str(row.get("id", place)), images=tuple(names), turns=turns, type=kind, answers=tuple(answers))


def _parse_turns(conversations: Any, place: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{place}: no `conversations`; expected a list of {{from: human|gpt, value: text}}")
    turns: list[Turn] = []
    for number, entry in enumerate(conversations):
        source = entry.get("from") if isinstance(entry, dict) else None
        text = entry.get("value") if isinstance(entry, dict) else None
        if not isinstance(source, str) or source not in _ROLES or not isinstance(text, str):
            raise DataError(f"{place}: turn {number} is {entry!r}; expected {{from: human|gpt, value: text}}")
        role = _ROLES[source]
        if not turns and role == "assistant":
            continue  # LLaVA drops a leading answer that has no question
        if role != ("user", "assistant")[len(turns) % 2]:
            raise DataError(f"{place}: turn {number} is from {source!r} twice in a row; human and gpt must alternate")
        # Tags move to the front of their turn, as in LLaVA's preprocessing.
        count = text.count(IMAGE_TAG) if role == "user" else 0
        text = text.replace(IMAGE_TAG, "").strip() if role == "user" else text.strip()
        if role == "assistant" and not text:
            raise DataError(f"{place}: turn {number}, the answer, is empty; write one or remove the row")
        turns.append(Turn(role=role, text=text, images=count))
    if len(turns) < 2 or len(turns) % 2:
        raise DataError(f"{place}: the last human turn has no answer; every human turn needs a gpt turn after it")
    return tuple(turns)


def _subset(samples: Sequence[Sample], subset: SubsetConfig) -> list[Sample]:
    pattern = re.compile(subset.group)
    kept = []
    for sample in samples:
        match = pattern.search(sample.id)
        if match is None:
            raise DataError(f"row id {sample.id!r} does not match subset.group {subset.group!r}; mend the expression")
        digest = hashlib.sha256(match.group().encode()).digest()
        if subset.start <= int.from_bytes(digest[:8], "big") / 2**64 < subset.stop:
            kept.append(sample)
    return kept


def read_image(images: str, name: str) -> Image.Image:
    """The picture `name` of a folder or zip archive, as RGB; or of `name` itself, where it is an opened picture.

    Raises:
        DataError: missing or unreadable picture, named.
    """
    if isinstance(name, Image.Image):
        return to_rgb(name)
    try:
        source: io.BytesIO | Path = Path(images) / name
        if images.endswith(".zip"):  # one handle per process: forked workers must not share a file position
            source = io.BytesIO(_archive(images, os.getpid()).read(name))
        with Image.open(source) as picture:
            return to_rgb(picture)
    except Exception as error:  # a damaged picture or archive makes PIL and zipfile raise a dozen unrelated types
        raise DataError(f"cannot read picture {name!r} of {images}: {type(error).__name__}: {error}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as a model sees it: turned upright as its EXIF data say, RGB."""
    return ImageOps.exif_transpose(picture).convert("RGB")


@lru_cache(maxsize=4)
def _archive(path: str, pid: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
