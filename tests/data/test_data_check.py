"""The check as a function: what a reader finds, and which rows a clean copy keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import llavakd
from llavakd.config import DataConfig
from llavakd.data.chat import ChatRenderer, Segment
from llavakd.data.check import check_source
from llavakd.data.files import DataError
from llavakd.data.samples import load_samples

PARTS = Path(llavakd.__file__).parent / "assets" / "shapes" / "parts"


def conversation(name: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, "extra": {"kept": True}}


ROWS = [
    conversation("fine", "hi", "ho"),
    conversation("long answer", "hi", "word " * 100),
    conversation("long question", "word " * 100, "ho"),
    conversation("again", "hi", "ho"),
    {"id": "nothing"},
]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return DataConfig(path=str(tmp_path / "rows.json"), template="chatml", max_length=40)


@pytest.fixture
def reader():
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "student-lm")
    mark = tokenizer.convert_tokens_to_ids("<image>")
    return ChatRenderer("chatml", tokenizer, image_token_id=mark, tokens_per_image=4, max_length=40), None


def test_a_clean_copy_keeps_every_row_that_trains_once_and_as_it_stood(source, reader, tmp_path):
    found = check_source(source, [reader], clean=tmp_path / "clean.json")
    kinds = {finding["row"]: finding["kind"] for finding in found["findings"]}
    assert kinds == {
        "rows.json row 4 (id 'nothing')": "row",
        "long answer": "truncated",
        "long question": "text",
        "again": "duplicate",
    }
    assert (found["rows"], found["unusable"]) == (5, 2)
    assert json.loads((tmp_path / "clean.json").read_text()) == ROWS[:2]


def test_tokens_are_counted_over_the_rows_that_render(source, reader):
    found = check_source(source, [reader])
    texts = [reader[0].render(sample) for sample in load_samples(source, 1.0) if "question" not in sample.id]
    responses = [text.segments.count(Segment.RESPONSE) for text in texts]
    assert found["tokens"]["response"]["mean"] == pytest.approx(sum(responses) / 3)
    assert found["tokens"]["response"]["largest"] == max(responses)
    assert found["tokens"]["visual"]["largest"] == 0
    assert check_source(source)["tokens"] == {}


def test_a_second_reader_finds_what_only_it_cannot_read(source, reader):
    wide = ChatRenderer("chatml", reader[0].tokenizer, image_token_id=3, tokens_per_image=4, max_length=999)
    assert {f["kind"] for f in check_source(source, [(wide, None)])["findings"]} == {"row", "duplicate"}
    found = check_source(source, [(wide, None), reader])
    assert [(f["row"], f["kind"]) for f in found["findings"] if f["kind"] == "text"] == [("long question", "text")]
    assert found["tokens"] == check_source(source, [(wide, None)])["tokens"], "as the first one sees them"


def test_every_row_is_rendered_though_some_cannot_be(source, reader):
    texts = reader[0].render_each(list(load_samples(source, 1.0)))
    assert [isinstance(text, DataError) for text in texts] == [False, False, True, False]


def test_the_workers_that_look_change_nothing(source, reader):
    assert check_source(source, [reader], workers=1) == check_source(source, [reader], workers=2)


def test_a_table_is_not_written_as_a_list(tmp_path):
    with pytest.raises(DataError, match="only JSON can be written clean"):
        check_source(DataConfig(path=str(tmp_path)), clean=tmp_path / "clean.json")
