"""Scores against cases counted by hand."""

from pathlib import Path

import pytest
import yaml

from llavakd.data.samples import Sample, Turn
from llavakd.errors import UserError
from llavakd.evaluate.scoring import METRICS, Answer, column_scores, majority_share, normalize, score


def answer(truth: str, prediction: str, kind: str | None = None, people: tuple[str, ...] = ()) -> Answer:
    turns = (Turn(role="user", text="what?"), Turn(role="assistant", text=truth))
    return Answer(sample=Sample(id="x", images=(), turns=turns, type=kind, answers=people), prediction=prediction)


@pytest.mark.parametrize("prediction", ["red", "Red", " RED ", "red.", "red. ", "red .", "red\n"])
def test_case_white_space_and_a_final_full_stop_do_not_count(prediction):
    assert METRICS["exact_match"](answer("Red.", prediction))


@pytest.mark.parametrize("prediction", ["", ".", "reds", "red, I think", "is red", "re d", "r.ed", "blue", "red?"])
def test_anything_else_is_wrong(prediction):
    assert not METRICS["exact_match"](answer("red", prediction))


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


@pytest.mark.parametrize(
    ("people", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # nine people see one who agrees with the model: 9 * 1/3 / 10; the one sees none
        (2, 0.6),  # eight see two, two see one: (8 * 2/3 + 2 * 1/3) / 10
        (3, 0.9),  # seven see three, three see two: (7 + 3 * 2/3) / 10
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_soft_accuracy_asks_each_person_how_many_of_the_others_agree_with_the_model(people, expected):
    said = ("two dogs",) * people + tuple("bcdefghijk"[people:])
    assert METRICS["vqa_accuracy"](answer("b", "Two dogs.", people=said)) == pytest.approx(expected)


def test_without_ten_people_the_files_answer_counts_for_all():
    assert METRICS["vqa_accuracy"](answer("The cat", "cat")) == 1.0
    assert METRICS["vqa_accuracy"](answer("cat", "dog")) == 0.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes, it is.", "yes it is"),
        ("The red, an apple and a pear", "red apple and pear"),
        ("none", "0"),
        ("Two of ten", "2 of 10"),
        ("the dog's bowl", "dog 's bowl"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("5.30 p.m.", "5.30 pm"),  # a full stop goes unless a digit follows
        (".5", ".5"),
        ("1,000", "1000"),
        ("red-white", "red white"),  # a mark between letters is a space,
        ("red -white", "red white"),  # beside a space it goes,
        ("t-shirt - red", "tshirt red"),  # and then everywhere
        ("t-shirt -red", "tshirt red"),
        ("what?", "what"),
        ("new\nyork\tcity ", "new york city"),
        ("(left)", "left"),
    ],
)
def test_answers_are_normalised_by_the_official_rule(text, normal):
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("B", True),
        ("B. the moon", True),
        ("B. ", True),
        ("B.", False),
        ("b", False),
        ("(B)", False),
        ("B the moon", False),
        ("I think it is The answer is B.", True),
        ("The answer is B, not A", True),
        ("The answer is B", False),
        ("The answer is B. The answer is A.", False),
        ("A. The answer is B.", False),
        ("A", False),
        ("", False),
    ],
)
def test_an_options_letter_is_read_by_the_rule_of_science_qa(said, right):
    assert METRICS["option_letter"](answer("B", said)) is right


@pytest.mark.parametrize(
    ("said", "yes"),
    [
        ("Yes", True),
        ("yes, there is no doubt", False),
        ("Yes. There is no doubt", True),
        ("No", False),
        ("no", False),
        ("NO", True),
        ("No, there is a dog", False),
        ("There is not", False),
        ("There isn't", True),
        ("None", True),
        ("", True),
    ],
)
def test_yes_and_no_are_read_by_the_rule_of_pope(said, yes):
    assert METRICS["yes_no"](answer("Yes", said)) is yes
    assert METRICS["yes_no"](answer("no.", said)) is not yes


def test_precision_recall_and_f1_are_those_of_yes():
    """Truth yes: yes yes no; truth no: yes no no no; so TP 2, FP 1, FN 1, TN 3."""
    said = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("no", "no"), ("no", "no")]
    found = score([answer(truth, text) for truth, text in said], "yes_no")
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["yes_share"] == pytest.approx(3 / 7)
    assert found["majority"] == pytest.approx(4 / 7)
    never = score([answer("yes", "no"), answer("no", "no"), answer("yes", "no")], "yes_no")
    assert (never["precision"], never["recall"], never["f1"], never["yes_share"]) == (0, 0, 0, 0)
    lopsided = score([answer("yes", "yes"), answer("no", "yes"), answer("no", "yes"), answer("no", "yes")], "yes_no")
    assert (lopsided["precision"], lopsided["recall"], lopsided["f1"]) == (0.25, 1, pytest.approx(0.4))


def test_the_mean_of_a_metric_stands_beside_what_the_majority_answer_would_get():
    people = ("red",) * 7 + ("blue",) * 3
    found = score([answer("red", "blue", people=people), answer("red", "red"), answer("green", "x")], "vqa_accuracy")
    assert found["accuracy"] == pytest.approx((0.9 + 1 + 0) / 3)
    assert found["majority"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("metric", "truth", "form"),
    [("option_letter", "the moon", r"\[A-Z\]"), ("option_letter", "b", "A-Z"), ("yes_no", "maybe", r"\[Yy\]es")],
)
def test_a_truth_that_the_metric_cannot_read_is_refused(metric, truth, form):
    with pytest.raises(UserError, match=f"row 'x': its answer is '{truth}', but the metric takes .*{form}"):
        METRICS[metric](answer(truth, "B"))


TABLE = yaml.safe_load((Path(__file__).parent / "paper_table.yaml").read_text(encoding="utf-8"))
ROWS = {name: dict(zip(TABLE["columns"], values, strict=True)) for name, values in TABLE["rows"].items()}


@pytest.mark.parametrize("name", ROWS)
def test_the_papers_averages_follow_from_its_columns(name):
    printed = {column: value for column, value in ROWS[name].items() if value is not None}
    means = {average: printed.pop(average) for average in ("avg7", "avg10") if average in printed}
    found = column_scores(printed)
    assert {average for average in ("avg7", "avg10") if average in found} == set(means)
    for average, value in means.items():
        assert found[average] == pytest.approx(value, abs=0.05 + 1e-9)


def test_the_table_has_complete_and_incomplete_rows():
    assert len(ROWS) == 14
    assert sum(None not in row.values() for row in ROWS.values()) == 11


def test_mme_is_a_twentieth_of_its_perception_score():
    assert column_scores({"mme.mme_perception_score": 1510.7}) == {"mme": pytest.approx(75.535)}
    assert column_scores({"mme.mme_perception_score": 2000, "mme.mme_cognition_score": 800})["mme"] == 100


def test_pope_is_the_mean_of_three_splits_and_needs_them_all():
    parts = {"pope_random.pope_f1_score": 0.88, "pope_pop.pope_f1_score": 0.866, "pope_adv.pope_f1_score": 0.85}
    assert column_scores(parts) == {"pope": pytest.approx(86.5333, abs=1e-4)}
    assert column_scores(dict(list(parts.items())[:2])) == {}
