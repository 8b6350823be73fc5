"""Preflight of a data source: every row through template and picture processor, in parallel, before anything trains."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llavakd.config import DataConfig
from llavakd.data.chat import ChatRenderer, Rendered, Segment
from llavakd.data.files import DataError, is_table
from llavakd.data.pictures import load_pixels, read_image
from llavakd.data.samples import Sample, Samples, load_samples

HARMLESS = ("truncated", "duplicate")  # kinds of finding with which a row still trains
_CHUNK = 256
_SEGMENTS = (Segment.VISUAL, Segment.PROMPT, Segment.RESPONSE)


class Reader(NamedTuple):
    """How one model reads a row: its template and tokenizer, and its picture processor."""

    renderer: ChatRenderer
    image_processor: Any


class Look(NamedTuple):
    """What a worker looks at, and how."""

    samples: Samples
    data: DataConfig
    readers: tuple[Reader, ...]
    fast: bool


def check_source(
    data: DataConfig,
    readers: Sequence[Reader] = (),
    *,
    fast: bool = False,
    workers: int | None = None,
    clean: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Look at every row of one source.

    Args:
        data: the source.
        readers: the models that are to read it; without any only rows and pictures are looked at.
        fast: pictures only have to be there; else they are decoded and go through every reader's processor.
        workers: processes; default one a core.
        clean: where a JSON list of the rows that train, each once, is written.
        progress: called with (rows done, rows in all).

    Returns:
        `rows`; `unusable`, how many of them; `findings` (dicts of row, kind, message; kind is row, text, picture or one of HARMLESS); `text_only`, a
        share of the good rows; `tokens` by segment (mean, median, 95 %, largest; empty without readers).

    Raises:
        DataError: the file as a whole cannot be read, or a clean copy of a table is asked for.
    """
    if clean is not None and is_table(Path(data.path)):
        raise DataError(f"{data.path} is a table, and only JSON can be written clean; filter it with `datasets`")
    samples = load_samples(data, max_bad_rows=1.0, find_pictures=True)
    look = Look(samples, data, tuple(readers), fast)
    starts = range(0, len(samples), _CHUNK)
    workers = min(workers or os.cpu_count() or 1, max(1, len(starts)))
    found: list[tuple[int, str, str]] = []
    digests: list[int] = []
    tokens: list[list[int]] = []
    with _pool(workers, look) if workers > 1 else nullcontext() as pool:
        parts = pool.map(_work, starts, chunksize=4) if pool else (_look_at(look, start) for start in starts)
        for more, more_digests, more_tokens in parts:
            found += more
            digests += more_digests
            tokens += more_tokens
            progress(len(digests), len(samples))
    found = sorted(found + _repeated(samples, digests))
    if clean is not None:
        _write_clean(samples, {index for index, kind, _ in found if kind != "truncated"}, clean)
    rows = (mistake.partition(": ") for mistake in samples.mistakes)
    findings = [{"row": row, "kind": "row", "message": message} for row, _, message in rows]
    findings += [{"row": samples[index].id, "kind": kind, "message": text} for index, kind, text in found]
    return {
        "rows": samples.rows,
        "unusable": len({finding["row"] for finding in findings if finding["kind"] not in HARMLESS}),
        "findings": findings,
        "text_only": float((samples.lengths < 0).mean()) if len(samples) else 0.0,
        "tokens": _histogram(np.array(tokens)) if tokens else {},
    }


def render_each(renderer: ChatRenderer, samples: list[Sample]) -> list[Rendered | DataError]:
    """What becomes of each row; in one call of the tokenizer where none is wrong."""
    try:
        return list(renderer.render_many(samples))
    except DataError as error:
        return [error] if len(samples) == 1 else [one for each in samples for one in render_each(renderer, [each])]


def _pool(workers: int, look: Look) -> ProcessPoolExecutor:
    """Workers that hold `look`; forked where that can be, for then they share it."""
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(look,))


_LOOK: list[Look] = []  # of a worker process


def _prepare(look: Look) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _LOOK.append(look)


def _work(start: int) -> tuple[list[tuple[int, str, str]], list[int], list[list[int]]]:
    return _look_at(_LOOK[0], start)


def _look_at(look: Look, start: int) -> tuple[list[tuple[int, str, str]], list[int], list[list[int]]]:
    """(index, kind, message) of what is wrong, digest of every row, tokens by segment of those that render."""
    chunk: list[Sample] = look.samples[start : start + _CHUNK]
    found: dict[tuple[int, str], str] = {}  # one finding of a kind is enough for a row
    tokens: list[list[int]] = []
    for reader in look.readers:
        for index, text in enumerate(render_each(reader.renderer, chunk), start):
            if isinstance(text, DataError):
                found[index, "text"] = str(text)
            elif reader is look.readers[0]:
                tokens.append([text.segments.count(segment) for segment in _SEGMENTS])
                if text.truncated:
                    found[index, "truncated"] = f"cut at max_length {look.data.max_length}"
    for index, sample in enumerate(chunk, start):
        try:
            if sample.images and not look.fast:
                _decode(look, sample)
        except DataError as error:
            found[index, "picture"] = str(error)
    return [(*place, text) for place, text in found.items()], [_digest(sample) for sample in chunk], tokens


def _decode(look: Look, sample: Sample) -> None:
    for reader in look.readers:
        load_pixels(look.data, sample.images, reader.image_processor)
    for name in sample.images if not look.readers else ():
        read_image(look.data, name)


def _digest(sample: Sample) -> int:
    text = repr((sample.images, [(turn.role, turn.text) for turn in sample.turns]))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _repeated(samples: Samples, digests: list[int]) -> list[tuple[int, str, str]]:
    """All but the first of rows with the same pictures and turns."""
    first: dict[int, int] = {}
    pairs = [(index, first.setdefault(digest, index)) for index, digest in enumerate(digests)]
    return [(index, "duplicate", f"the same as row {samples[one].id!r}") for index, one in pairs if one != index]


def _histogram(tokens: np.ndarray) -> dict[str, dict[str, float]]:
    names = [segment.name.lower() for segment in _SEGMENTS]
    rows = [tokens.mean(0), np.median(tokens, 0), np.percentile(tokens, 95, 0), tokens.max(0)]
    labels = ("mean", "median", "95 %", "largest")
    return {
        name: dict(zip(labels, map(float, values), strict=True)) for name, *values in zip(names, *rows, strict=True)
    }


def _write_clean(samples: Samples, without: set[int], path: Path) -> None:
    """A JSON list of the other rows, as they stand in the file."""
    with path.open("w", encoding="utf-8") as file:
        for number, index in enumerate(index for index in range(len(samples)) if index not in without):
            file.write(",\n" if number else "[\n")
            json.dump(samples.raw(index), file, ensure_ascii=False)
        file.write("\n]\n" if len(samples) > len(without) else "[]\n")
