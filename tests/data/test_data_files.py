"""Rows of every kind of file: the same samples, found again by their place, and never all in memory."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from llavakd.config import DataConfig
from llavakd.data import files
from llavakd.data.files import DataError, row_at, scan
from llavakd.data.pictures import read_image
from llavakd.data.samples import load_samples

ROWS = [
    {"id": "plain", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    {"id": "wide é 漢字 🙂", "image": "ü.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "ß"}]},
    {"id": "brackets ],[ and \"quotes\" \\", "conversations": [{"from": "human", "value": "]"}, {"from": "gpt", "value": "{,}"}]},
]  # fmt: skip


def write(path, *, indent=None, ascii_only=False, ends=""):
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in ROWS)
    else:
        text = json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only)
    path.write_text(ends + text + ends, encoding="utf-8")
    return path


@pytest.mark.parametrize("block", [1, 2, 3, 7, 40, 2**22])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"ascii_only": True, "ends": "\n \t"}])
def test_rows_of_a_list_are_found_whole_wherever_a_block_ends(tmp_path, monkeypatch, block, form):
    monkeypatch.setattr(files, "_BLOCK", block)
    path = write(tmp_path / "rows.json", **form)
    places, rows = zip(*scan(path), strict=True)
    assert list(rows) == ROWS
    assert [row_at(path, place) for place in places] == ROWS


def test_rows_of_json_lines_are_found_again(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\n\n", 1), encoding="utf-8")  # an empty line
    places, rows = zip(*scan(path), strict=True)
    assert list(rows) == ROWS
    assert [row_at(path, place) for place in reversed(places)] == ROWS[::-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("  ", "is not JSON"),
        ("{}", r"is no list of rows: '' instead of '\['"),
        ("3", "is no list of rows"),
        ("[]", "an empty list"),
        ("[1, 2", "is not JSON .* in row 2, after byte"),
        ("[1, 2, ", "is not JSON .* in row 2"),
        ("[1] 2", r"'\]' instead of ',' before row 1"),
        ("[1] x", r"'\]' instead of ',' before row 1"),
        ("]", "is not JSON"),
        ("[1 2]", "'' instead of ',' before row 1"),
        ("[1, ]", "in row 1"),
        ('[{"id": 1}, {"id"', "in row 1"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_refused(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(scan(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}\n{"id": ', "is not JSON .* in row 1, after byte 9"),
        ('{"id": 1},\n{"id": 2}', "',' instead of '' before row 1"),
        ('{"id": 1}\n]', "is not JSON"),
        ('[{"id": 1}]', r"'\[' instead of '' before row 0"),
    ],
)
def test_lines_that_are_no_rows_are_refused(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(scan(path))


def png(colour) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(params=["parquet", "saved"])
def table(request, tmp_path):
    """Two pictures in the first row, one (by its path) in the second, none in the third."""
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (4, 3), (0, 0, 255)).save(tmp_path / "blue.png")
    parts = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "which?"}]
    rows = {
        "id": ["two", "one", "none"],
        "images": [
            [{"bytes": png((255, 0, 0)), "path": None}, {"bytes": png((0, 255, 0)), "path": None}],
            [{"bytes": None, "path": "blue.png"}],
            [],
        ],
        "messages": [
            [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "both"}]}],
            [
                {"role": "user", "content": [parts[0], {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
            ],
            [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "ho"}]},
            ],
        ],
    }
    made = datasets.Dataset.from_dict(rows)
    path = tmp_path / ("rows.parquet" if request.param == "parquet" else "rows")
    made.to_parquet(str(path)) if request.param == "parquet" else made.save_to_disk(str(path))
    return DataConfig(path=str(path), images=str(tmp_path))


def test_a_table_of_messages_and_pictures_is_read_like_a_list(table):
    two, one, none = load_samples(table, find_pictures=True)
    assert [sample.id for sample in (two, one, none)] == ["two", "one", "none"]
    assert [turn.text for turn in two.turns] == ["which?", "both"]
    assert (two.turns[0].images, one.turns[0].images, none.images) == (2, 1, ())
    assert one.images == ("blue.png",)
    shown = [read_image(table, name).getpixel((0, 0)) for sample in (two, one) for name in sample.images]
    assert shown == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_damaged_table_is_named(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "rows.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"cannot read .*rows\.parquet"):
        list(scan(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "`messages` is 'hello'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "content part .*video"),
        ([{"role": "system", "content": "be nice"}], "turn 0 is .*system"),
        ([{"role": "user", "content": "q"}], "no answer"),
    ],
)
def test_wrong_messages_are_refused_by_row(tmp_path, messages, said):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": "m", "messages": messages}]))
    with pytest.raises(DataError, match=said) as caught:
        load_samples(DataConfig(path=str(path)))
    assert "rows.json row 0 (id 'm')" in str(caught.value)


def test_a_share_of_wrong_rows_may_be_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": str(n), "conversations": ROWS[0]["conversations"] if n % 5 else []} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(path))
    samples = load_samples(data, max_bad_rows=0.2)
    assert [sample.id for sample in samples] == [str(n) for n in range(20) if n % 5]
    assert (samples.rows, len(samples.mistakes)) == (20, 4)
    assert "row 10 (id '10')" in samples.mistakes[2]
    with pytest.raises(DataError, match=r"(?s)row 0 .*\.\.\.\n4 of 20 rows cannot be used and max_bad_rows"):
        load_samples(data, max_bad_rows=0.19)
