"""Through the command line: what is wrong with a recipe or its files is said in one message, and nothing is trained."""

import json
import sys

import pytest

from llavakd.cli import evaluate
from llavakd.errors import UserError


def at(tree, path, value):
    """Set a dotted path in a recipe tree; None removes."""
    *parents, last = path.split(".")
    for key in parents:
        tree = tree[int(key)] if key.isdigit() else tree[key]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


REFUSALS = {
    "unknown key": ("save_evry", 3, ["unknown key 'save_evry'", "did you mean 'save_every'?"]),
    "unknown key of a stage": (
        "stages.1.learning_rat",
        1,
        ["'stages.1.learning_rat'", "did you mean 'learning_rate'?"],
    ),
    "unknown loss": ("stages.0.losses.visual_k", 1, ["'stages.0.losses.visual_k'", "did you mean 'visual_kl'?"]),
    "wrong type": ("workers", "two", ["workers: got 'two'", "integer"]),
    "wrong type of a weight": ("stages.0.losses.ce", "one", ["stages.0.losses.ce: got 'one'", "number"]),
    "unknown part": ("stages.0.train", ["projecter"], ["'projecter'", "did you mean 'projector'?"]),
    "missing key": ("stages.2.learning_rate", None, ["'stages.2.learning_rate' is missing"]),
    "a stage that trains nothing": (
        "stages.1.train",
        [],
        ["stages.1.train: got []; tuple should have at least 1 item"],
    ),
    "no loss": ("stages.1.losses", {"ce": 0.0}, ["stages.1 (sft).losses: every weight is 0"]),
    "distillation without a teacher": ("teacher", None, ["stages.0 (dpt).losses.response_kl", "no `teacher`"]),
    "two stages of one name": ("stages.1.name", "dpt", ["two stages are called 'dpt'"]),
    "unknown source": ("stages.1.data", "instruc", ["no source 'instruc'", "did you mean 'instruct'?"]),
    "missing data file": ("data.instruct.path", "nowhere/rows.json", ["nowhere/rows.json", "No such file"]),
    "missing teacher": ("teacher.path", "nowhere/teacher", ["nowhere/teacher"]),
    "missing tower": ("student.vision_tower", "nowhere/tower", ["nowhere/tower"]),
    "missing language model": ("student.language_model", "nowhere/lm", ["nowhere/lm"]),
    "too large a batch": (
        "stages.2.global_batch_size",
        500,
        ["'instruct' has", "rows, fewer than global_batch_size 500"],
    ),
    "a batch that does not divide": ("stages.0.micro_batch_size", 3, ["micro_batch_size: got 3", "divisor"]),
    "unequal visual tokens": ("student.vision_feature_select_strategy", "default", ["student 15, teacher 16"]),
    "rows longer than a picture allows": ("data.pretrain.max_length", 8, ["max_length 8 cuts through a picture"]),
    "another template's data": ("data.instruct.template", "pretrain", ["the pretrain template is for"]),
    "missing pictures": ("data.pretrain.images", "nowhere/pictures", ["no picture", "nowhere/pictures"]),
    "a rate that makes no sense": ("stages.0.learning_rate", 1.0e36, ["stage dpt, step", "lower learning_rate"]),
}


@pytest.mark.parametrize(("path", "value", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_wrong_recipe_ends_with_exit_1_and_one_message(tiny, command, tmp_path, path, value, said):
    tree = tiny.tree() | {"workers": 2}
    at(tree, path, str(tmp_path / value) if str(value).startswith("nowhere") else value)
    refused = command("train", tiny.recipe(tmp_path / "recipe.yaml", tree), "--out", tmp_path / "run")
    assert refused.code == 1, refused.err
    assert refused.err.count("error: ") == 1
    message = refused.err.partition("error: ")[2]
    assert [words for words in said if words not in message] == []
    assert "Traceback" not in refused.err + refused.out
    assert len(message) < 600
    assert not list(tmp_path.glob("run/*/model"))


def test_a_recipe_that_is_not_there_is_named(command, tmp_path):
    refused = command("train", tmp_path / "nothing.yaml")
    assert refused.code == 1
    assert "nothing.yaml" in refused.err
    assert "Traceback" not in refused.err


def test_a_wrong_override_is_named(tiny, command, tmp_path):
    recipe = tiny.recipe(tmp_path / "recipe.yaml")
    for override, said in {
        "stages.sfd.epochs=2": "did you mean 'sft'?",
        "stages.dpt.epoch=2": "did you mean 'epochs'?",
        "nonsense": "not of the form key.key=value",
    }.items():
        refused = command("train", recipe, override, "--out", tmp_path / "run")
        assert refused.code == 1
        assert said in refused.err
        assert "Traceback" not in refused.err


def test_a_wrong_use_of_the_command_exits_2(command):
    assert command("train", "--nonsense").code == 2
    assert command("trian").code == 2
    assert command("eval", "model", "--data", "rows.json", "--template", "chat").code == 2


def test_evaluation_prints_one_json_object_that_agrees_with_its_predictions(tiny, command, tmp_path):
    where = ["--data", tiny.world / "test.json", "--images", tiny.world / "images", "--template", "chatml"]
    done = command("eval", tiny.teacher, *where, "--max-new-tokens", 3, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    row = json.loads(done.out)
    lines = [json.loads(line) for line in (tmp_path / "teacher" / "predictions.jsonl").read_text().splitlines()]
    assert row["n"] == len(lines) == 12
    assert row["accuracy"] == sum(line["correct"] for line in lines) / 12


def test_the_metric_and_the_number_of_questions_are_chosen_by_option(tiny, command, tmp_path):
    rows = json.loads((tiny.world / "test.json").read_text())
    for row in rows:
        row["conversations"][1]["value"] = "yes"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    where = ["--data", tmp_path / "rows.json", "--images", tiny.world / "images", "--template", "chatml"]
    options = ["--metric", "yes_no", "--limit", 2, "--max-new-tokens", 3, "--out", tmp_path, "--json"]
    done = command("eval", tiny.teacher, *where, *options)
    assert done.code == 0, done.err
    row = json.loads(done.out)
    assert (row["n"], row["metric"], row["recall"]) == (2, "yes_no", row["accuracy"])


def test_evaluation_takes_a_file_or_tasks_but_not_both(tiny, command):
    for given in ([], ["--data", "rows.json", "--tasks", "paper10"]):
        refused = command("eval", tiny.teacher, *given)
        assert refused.code == 1
        assert "give a question file or names of benchmarks" in refused.err


@pytest.mark.parametrize("missing", ["lmms_eval.api.model", "openpyxl", "tenacity"])
def test_tasks_without_lmms_eval_say_in_one_line_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "llavakd.evaluate.lmms", raising=False)
    with pytest.raises(UserError, match=r"pip install --no-deps lmms-eval==0\.7\.3") as caught:
        evaluate("model", tasks="paper10")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--data": "nowhere.json"}, "nowhere.json"),
        ({"--images": "nowhere"}, "nowhere"),
        ({"MODEL": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_evaluation_ends_with_exit_1_and_one_message(tiny, command, tmp_path, change, said):
    given = {
        "MODEL": tiny.teacher,
        "--data": tiny.world / "test.json",
        "--images": tiny.world / "images",
        "--template": "chatml",
        "--out": tmp_path,
    } | change
    given = {key: tmp_path / word if word in ("nowhere", "nowhere.json") else word for key, word in given.items()}
    refused = command("eval", given.pop("MODEL"), *(word for option in given.items() for word in option))
    assert refused.code == 1
    assert said in refused.err
    assert "Traceback" not in refused.err
