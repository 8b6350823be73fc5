"""Scores against cases counted by hand."""

import pytest

from llavakd.data.samples import Sample, Turn
from llavakd.evaluate.generate import Answer
from llavakd.evaluate.scoring import is_correct, majority_share, score


def answer(truth: str, prediction: str, kind: str | None = None) -> Answer:
    turns = (Turn(role="user", text="what?"), Turn(role="assistant", text=truth))
    return Answer(sample=Sample(id="x", images=(), turns=turns, type=kind), prediction=prediction)


@pytest.mark.parametrize("prediction", ["red", "Red", " RED ", "red.", "red. ", "red .", "red\n"])
def test_case_white_space_and_a_final_full_stop_do_not_count(prediction):
    assert is_correct(prediction, "Red.")


@pytest.mark.parametrize("prediction", ["", ".", "reds", "red, I think", "is red", "re d", "r.ed", "blue", "red?"])
def test_anything_else_is_wrong(prediction):
    assert not is_correct(prediction, "red")


def test_scores_stand_beside_what_the_most_frequent_answer_would_get():
    answers = [
        answer("red", "red", "color"),
        answer("Red.", "blue", "color"),
        answer("blue", "blue", "color"),
        answer("two", "two", "count"),
        answer("two", "three", "count"),
        answer("red", "RED", "odd"),
        answer("one", "two", "count"),
        answer("two", "", "count"),
    ]
    assert score(answers) == {
        "accuracy": 4 / 8,
        "n": 8,
        "majority": 3 / 8,
        "by_type": {"color": pytest.approx(2 / 3), "count": 1 / 4, "odd": 1.0},
        "n_by_type": {"color": 3, "count": 4, "odd": 1},
        "majority_by_type": {"color": pytest.approx(2 / 3), "count": 3 / 4, "odd": 1.0},
    }
    assert list(score(answers)["by_type"]) == ["color", "count", "odd"]


def test_rows_without_a_type_are_one_group():
    assert score([answer("a", "a"), answer("b", "a")])["by_type"] == {"all": 0.5}


def test_the_majority_is_counted_over_folded_answers():
    assert majority_share([answer("Yes", ""), answer("yes.", ""), answer("no", "")]) == pytest.approx(2 / 3)
