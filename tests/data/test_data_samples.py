"""Reading LLaVA JSON and pictures: what is kept, what is refused, and that every refusal names its row."""

from __future__ import annotations

import hashlib
import json

import pytest

from llavakd.config import DataConfig, SubsetConfig
from llavakd.data.files import DataError
from llavakd.data.samples import Sample, Turn, load_samples, parse_row
from llavakd.errors import UserError


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


GOOD = {"id": "cat-1", "image": "a/cat.png", "conversations": [human("<image>\nWhat is it?"), gpt("A cat.")]}


def load(tmp_path, content, **more) -> list[Sample]:
    path = tmp_path / "rows.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_samples(DataConfig(path=str(path), **{"images": "pictures"} | more))


def test_a_row_becomes_a_sample_without_its_tags(tmp_path):
    wanted = Sample(
        id="cat-1",
        images=("a/cat.png",),
        turns=(Turn(role="user", text="What is it?", images=1), Turn(role="assistant", text="A cat.")),
    )
    assert list(load(tmp_path, [GOOD])) == [wanted]


def test_a_text_only_row_needs_no_picture_folder(tmp_path):
    row = {"id": 7, "conversations": [human(" Hi \n"), gpt("\nHo ")], "type": "chat"}
    (sample,) = load(tmp_path, [row], images=None)
    assert (sample.id, sample.images, sample.type) == ("7", (), "chat")
    assert [turn.text for turn in sample.turns] == ["Hi", "Ho"]


def test_tags_anywhere_in_a_human_turn_are_counted_for_that_turn():
    row = {
        "id": "two",
        "image": ["a.png", "b.png", "c.png"],
        "conversations": [human("Compare <image> with\n<image>"), gpt("Same."), human("And now?<image>"), gpt("No.")],
    }
    turns = parse_row(row, "here").turns
    assert [turn.images for turn in turns] == [2, 0, 1, 0]
    assert [turn.text for turn in turns] == ["Compare  with", "Same.", "And now?", "No."]


def test_a_row_may_carry_what_ten_people_answered():
    people = ["cat"] * 9 + ["a dog"]
    assert parse_row(GOOD | {"answers": people}, "here").answers == tuple(people)
    assert parse_row(GOOD, "here").answers == ()


@pytest.mark.parametrize("answers", [["cat"] * 9, "cat", [{"answer": "cat"}] * 10, ["cat"] * 9 + [None]])
def test_anything_but_ten_texts_as_answers_is_refused(answers):
    with pytest.raises(DataError, match=r"here \(id 'cat-1'\): `answers` is .*, expected a list of ten texts"):
        parse_row(GOOD | {"answers": answers}, "here")


def test_a_leading_answer_is_dropped():
    turns = parse_row({**GOOD, "conversations": [gpt("Welcome."), *GOOD["conversations"]]}, "here").turns
    assert [turn.text for turn in turns] == ["What is it?", "A cat."]


def test_a_question_may_be_a_picture_alone():
    (question, _) = parse_row({**GOOD, "conversations": [human("<image>"), gpt("A cat.")]}, "here").turns
    assert (question.text, question.images) == ("", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": None}, "`conversations` is None, expected a list"),
        ({"conversations": []}, r"`conversations` is \[\], expected a list"),
        ({"conversations": "hello"}, "`conversations` is 'hello', expected a list"),
        ({"conversations": [human("<image>"), {"from": "bot", "value": "x"}]}, "turn 1 is .*'bot'.*human.gpt"),
        ({"conversations": [human("<image>"), {"from": ["gpt"], "value": "x"}]}, "turn 1 is .*human.gpt"),
        ({"conversations": [human("<image>"), {"from": "gpt", "value": None}]}, "turn 1 is .*None"),
        ({"conversations": [human("<image>"), "x"]}, "turn 1 is 'x'"),
        ({"conversations": [human("<image>"), human("x"), gpt("y")]}, "turn 1 is from 'human' twice"),
        ({"conversations": [human("<image>"), gpt("y"), gpt("z")]}, "turn 2 is from 'gpt' twice"),
        ({"conversations": [human("<image>"), gpt(" \n ")]}, "turn 1, the answer, is empty"),
        ({"conversations": [human("<image>")]}, "no answer"),
        ({"conversations": [human("<image>"), gpt("y"), human("more?")]}, "no answer"),
        ({"conversations": [gpt("alone")]}, "no answer"),
        ({"conversations": [human("no tag"), gpt("y")]}, r"1 picture\(s\) but 0 <image>"),
        ({"conversations": [human("<image>"), gpt("<image>"), human("<image>"), gpt("y")]}, r"1 picture\(s\) but 2"),
        ({"image": None}, r"0 picture\(s\) but 1"),
        ({"image": ["a.png", "b.png"]}, r"2 picture\(s\) but 1"),
        ({"image": 3}, "`image` is 3"),
        ({"image": ""}, "`image` is ''"),
        ({"image": ["a.png", None]}, "`image` is"),
        ({"image": "../secret.png"}, "leaves the picture folder"),
        ({"image": "a/../../secret.png"}, "leaves the picture folder"),
        ({"image": "/etc/secret.png"}, "leaves the picture folder"),
    ],
)
def test_a_wrong_row_is_refused_by_file_number_and_id(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, [GOOD, {**GOOD, "id": "dog-2", **change}])
    assert str(caught.value).startswith("rows.json row 1 (id 'dog-2'): ")


def test_a_row_that_is_no_object_is_refused_by_number(tmp_path):
    with pytest.raises(DataError, match=r"rows\.json row 1: got a list, expected an object"):
        load(tmp_path, [GOOD, [GOOD]])


def test_dots_inside_a_name_do_not_leave_the_folder():
    assert parse_row({**GOOD, "image": "a..b/c...png"}, "here").images == ("a..b/c...png",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": "cat-1", "conv', "is not JSON"),
        ("", "is not JSON"),
        ('{"id": 1}', "is no list of rows: .*; expected a list"),
        ("[]", "holds an empty list; expected a list"),
    ],
)
def test_a_wrong_file_is_refused_by_path(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, content)
    assert str(tmp_path / "rows.json") in str(caught.value)


def test_a_missing_file_is_refused_by_path(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.json: No such file.*`path`"):
        load_samples(DataConfig(path=str(tmp_path / "nowhere.json")))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(DataError, match="is not JSON"):
        load_samples(DataConfig(path=str(tmp_path / "latin.json")))


def test_rows_with_pictures_need_a_picture_folder(tmp_path):
    with pytest.raises(DataError, match="no `images`; set it"):
        load(tmp_path, [GOOD], images=None)


def test_a_data_error_is_the_users_error():
    assert issubclass(DataError, UserError)


def rows_of_groups(groups: int = 60, copies: int = 3) -> list[dict]:
    return [
        {"id": f"g{group}-{copy}", "conversations": [human("q"), gpt("a")]}
        for copy in range(copies)
        for group in range(groups)
    ]


def keep(tmp_path, start: float, stop: float, group: str = r"^g\d+") -> list[str]:
    subset = SubsetConfig(group=group, start=start, stop=stop)
    return [sample.id for sample in load(tmp_path, rows_of_groups(), subset=subset)]


@pytest.mark.parametrize("cut", [0.2, 0.5])
def test_two_sides_of_a_cut_are_disjoint_complete_and_never_split_a_group(tmp_path, cut):
    left, right = keep(tmp_path, 0.0, cut), keep(tmp_path, cut, 1.0)
    assert not set(left) & set(right)
    assert sorted(left + right) == sorted(row["id"] for row in rows_of_groups())
    assert not {name.split("-")[0] for name in left} & {name.split("-")[0] for name in right}
    assert abs(len(left) / 180 - cut) < 0.15


def test_the_side_of_a_group_is_its_sha256_and_the_file_order_stays(tmp_path):
    def place(group: str) -> float:
        return int(hashlib.sha256(group.encode()).hexdigest()[:16], 16) / 16**16

    wanted = [row["id"] for row in rows_of_groups() if 0.25 <= place(row["id"].split("-")[0]) < 0.75]
    assert keep(tmp_path, 0.25, 0.75) == wanted


def test_a_subset_that_keeps_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="keeps none of 180 rows"):
        keep(tmp_path, 0.5, 0.5)


def test_an_id_outside_the_group_expression_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"'g\d+-\d'.*subset\.group.*'\^h'"):
        keep(tmp_path, 0.0, 1.0, group="^h")
