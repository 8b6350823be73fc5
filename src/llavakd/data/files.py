"""Data files as rows that are read when asked for: a JSON list, JSON lines, parquet, or a saved `datasets` folder."""

import codecs
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from llavakd.errors import UserError, optional

_BLOCK = 2**22  # bytes read at a time
_MARK = re.compile(r"[ \t\r\n]*([\[,\]]?)[ \t\r\n]*")  # what stands in front of a row
_EXPECTED = "expected a list of rows with id, image, conversations"


class DataError(UserError):
    """A data file or one of its rows is wrong; the message names the row."""


def scan(path: Path) -> Iterator[tuple[tuple[int, int], Any]]:
    """((where, how long), row) of every row in order, a few held at a time; DataError where it is neither JSON nor a table."""
    if is_table(path):
        yield from (((index, 1), row_at(path, (index, 1))) for index in range(len(_table(str(path)))))
        return
    try:
        with path.open("rb") as file:
            yield from _scan_json(file, path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; set `path` to a LLaVA-format JSON file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); {_EXPECTED}") from error


def row_at(path: Path, place: tuple[int, int]) -> Any:
    """The row that `scan` found at this place; pictures inside a table become the names `@ROW/NUMBER`."""
    start, size = place
    if not is_table(path):
        with path.open("rb") as file:
            file.seek(start)
            return json.loads(file.read(size))
    row = _table(str(path))[start].to_pylist()[0]
    names = [f"@{start}/{n}" if held.get("bytes") else held.get("path") for n, held in enumerate(_pictures(row))]
    return row | {"image": names, "images": None}


def stored_picture(path: Path, name: str) -> bytes:
    """The encoded bytes of the picture that `row_at` called `name`."""
    row, number = (int(part) for part in name.removeprefix("@").split("/"))
    return _pictures(_table(str(path))[row].to_pylist()[0])[number]["bytes"]


def _pictures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A table row's pictures, each as its bytes or path."""
    found = row.get("images") if row.get("image") is None else row["image"]
    entries = found if isinstance(found, list) else [] if found is None else [found]
    return [entry if isinstance(entry, dict) else {"path": entry} for entry in entries]


def is_table(path: Path) -> bool:
    """Whether `datasets` reads it: parquet, or a folder that `save_to_disk` wrote."""
    return path.suffix == ".parquet" or path.is_dir()


def _scan_json(file: BinaryIO, path: Path) -> Iterator[tuple[tuple[int, int], Any]]:
    """Rows of a list or, without its marks, of lines; a part stands in memory, a row cut by its end is tried again."""
    decode, read = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8")().decode
    lines, text, position, offset, rows = path.suffix == ".jsonl", "", 0, 0, 0
    while True:
        before = next(_MARK.finditer(text, position))  # perhaps nothing
        first, mark = before.end(), before[1]
        wanted, last = ("", "") if lines else (",", "]") if rows else ("[", None)
        if first < len(text) and mark != wanted:
            reason = f"is no list of rows: {mark!r} instead of {wanted!r} before row {rows}, after byte {offset}"
            raise DataError(f"{path} {reason}; {_EXPECTED}")
        try:
            row, end = decode(text, first)
        except json.JSONDecodeError as error:
            if block := file.read(_BLOCK):
                text, position = text[position:] + read(block, len(block) < _BLOCK), 0
                continue
            if first == len(text) and mark == last:
                return
            empty = not rows and text[first:].strip() == "]"
            reason = "holds an empty list" if empty else f"is not JSON ({error.msg} in row {rows}, after byte {offset})"
            raise DataError(f"{path} {reason}; {_EXPECTED}") from error
        offset += first - position
        size = end - first if text.isascii() else len(text[first:end].encode())
        yield (offset, size), row
        rows, offset, position = rows + 1, offset + size, end


@lru_cache(maxsize=16)
def _table(path: str) -> Any:
    datasets = optional("datasets", f"the table {path}", "tables")
    try:
        read = datasets.Dataset.from_parquet if path.endswith(".parquet") else datasets.load_from_disk
        return read(path).with_format("arrow")  # whose rows are plain values, pictures undecoded
    except Exception as error:  # pyarrow and datasets raise a dozen unrelated types for a damaged table
        raise DataError(f"cannot read {path}: {type(error).__name__}: {error}") from error
