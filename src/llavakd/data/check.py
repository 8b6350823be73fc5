"""Preflight of a data source: every row through template and picture processor, in parallel, before anything trains."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from llavakd.config import DataConfig
from llavakd.data.chat import ChatRenderer, Segment
from llavakd.data.files import DataError, is_table
from llavakd.data.pictures import read_image
from llavakd.data.readers import reading
from llavakd.data.samples import Sample, load_samples
from llavakd.progress import bar

HARMLESS = ("truncated", "duplicate")  # kinds of finding with which a row still trains
_CHUNK = 256
_SEGMENTS = (Segment.VISUAL, Segment.PROMPT, Segment.RESPONSE)
Models = Sequence[tuple[ChatRenderer, Any]]  # how each reads a row: template and tokenizer, and picture processor
# What is seen of a row: a digest of what it says, its tokens by segment once if it renders, what is wrong by kind.
Look = tuple[bytes, list[list[int]], dict[str, str]]


def check_source(
    data: DataConfig, readers: Models = (), *, fast: bool = False, workers: int | None = None, clean: Path | None = None
) -> dict[str, Any]:
    """Look at every row of one source, with a bar, as all `readers` would read it; without any only at rows and pictures.

    `fast`: pictures only have to be there; else they are decoded, and each size goes through every processor once.
    `workers`: processes, default one a core; `clean`: where a JSON list of the rows that train, each once, is written.
    Returns `rows`; `unusable`, how many of them; `findings` (dicts of row, kind, message; kind is row, text, picture or
    one of HARMLESS); `text_only`, a share of the good rows; `tokens` by segment (mean, median, 95 %, largest). Raises
    DataError where the file as a whole cannot be read, or a clean copy of a table is asked for.
    """
    if clean is not None and is_table(Path(data.path)):
        raise DataError(f"{data.path} is a table, and only JSON can be written clean; filter it with `datasets`")
    samples = load_samples(data, max_bad_rows=1.0, find_pictures=True)
    rows = (mistake.partition(": ") for mistake in samples.mistakes)
    findings = [{"row": row, "kind": "row", "message": message} for row, _, message in rows]
    first: dict[bytes, int] = {}  # the first row of each digest
    tokens, good, done = list[list[int]](), list[int](), 0
    workers = min(workers or os.cpu_count() or 1, len(samples) // _CHUNK + 1)
    options: dict[str, Any] = {"num_workers": workers if workers > 1 else 0, "batch_size": _CHUNK}
    read = reading(samples, collate_fn=partial(_look_at, data, readers, fast, set()), **options)
    with bar(f"check {Path(data.path).name}", len(samples)) as advance, read as chunks:
        for looks in chunks:
            for index, (digest, counts, wrong) in enumerate(looks, done):
                if (same := first.setdefault(digest, index)) != index:
                    wrong["duplicate"] = f"the same as row {samples[same].id!r}"
                findings += [{"row": samples[index].id, "kind": kind, "message": wrong[kind]} for kind in sorted(wrong)]
                tokens += counts
                good += [index] if wrong.keys() <= {"truncated"} else []
            advance(done := done + len(looks))
    if clean is not None:
        with clean.open("w", encoding="utf-8") as file:
            lines = (json.dumps(samples.raw(index), ensure_ascii=False) for index in good)
            file.writelines(f"{',' if number else '['}\n{line}" for number, line in enumerate(lines))
            file.write("\n]\n" if good else "[]\n")
    return {
        "rows": samples.rows,
        "unusable": len({finding["row"] for finding in findings if finding["kind"] not in HARMLESS}),
        "findings": findings,
        "text_only": float((samples.lengths < 0).mean()) if len(samples) else 0.0,
        "tokens": _histogram(np.array(tokens)) if tokens else {},
    }


def _look_at(
    data: DataConfig, readers: Models, fast: bool, sizes: set[tuple[int, int]], chunk: Sequence[Sample]
) -> list[Look]:
    """What is seen of some rows; `sizes`, those of the pictures that the processors took, grows from call to call."""
    if get_worker_info():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by other workers
    said = [repr((sample.images, [(turn.role, turn.text) for turn in sample.turns])) for sample in chunk]
    looks: list[Look] = [(hashlib.blake2b(text.encode(), digest_size=8).digest(), [], {}) for text in said]
    for number, (renderer, _) in enumerate(readers):
        for (_, tokens, wrong), text in zip(looks, renderer.render_each(chunk), strict=True):
            if isinstance(text, DataError):
                wrong["text"] = str(text)
            elif number == 0:
                tokens.append([text.segments.count(segment) for segment in _SEGMENTS])
                if text.truncated:
                    wrong["truncated"] = f"cut at max_length {data.max_length}"
    for (*_, wrong), sample in zip(looks, chunk, strict=True) if not fast else ():
        try:
            pictures = [read_image(data, name) for name in sample.images]
        except DataError as error:
            wrong["picture"] = str(error)
            continue
        new = {picture.size: picture for picture in pictures if picture.size not in sizes}
        for _, processor in readers if new else ():  # whether it can take a picture depends on nothing else
            processor(images=[*new.values()], return_tensors="pt")
        sizes.update(new)
    return looks


def _histogram(tokens: np.ndarray) -> dict[str, dict[str, float]]:
    labels = ("mean", "median", "95 %", "largest")
    columns = np.stack([tokens.mean(0), *np.percentile(tokens, [50, 95, 100], axis=0)], axis=1).tolist()
    named = zip([segment.name.lower() for segment in _SEGMENTS], columns, strict=True)
    return {name: dict(zip(labels, column, strict=True)) for name, column in named}
