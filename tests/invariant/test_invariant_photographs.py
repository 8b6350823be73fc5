"""Through the command line: real photographs in LLaVA's format go the whole way, from the check to an answer."""

import json
import shutil
from pathlib import Path

import pytest

skimage = pytest.importorskip("skimage", reason="needs the photographs inside scikit-image (dev extra)")
FOLDER = Path(skimage.__file__).parent / "data"
# Colour and grey, JPEG and PNG, from 96 x 96 to 3,000 pixels wide; what they show by the file's name.
SHOWN = {
    "astronaut.png": "an astronaut",
    "camera.png": "a man with a camera",
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "coins.png": "coins",
    "hubble_deep_field.jpg": "galaxies",
    "motorcycle_left.png": "a motorcycle",
    "retina.jpg": "a retina",
    "rocket.jpg": "a rocket",
    "moon.png": "the moon",
}


@pytest.fixture(scope="module")
def photographs(tiny, tmp_path_factory):
    """A folder with captions, conversations and questions about ten photographs, and the recipe that reads them."""
    place = tmp_path_factory.mktemp("photographs")
    for name in SHOWN:
        shutil.copy(FOLDER / name, place / name)
    turns = {
        "captions": lambda shown: [("<image>\nDescribe it.", f"This is {shown}.")],
        "talks": lambda shown: [
            ("What is shown?\n<image>", shown),
            ("Is it a cat?", "yes" if "cat" in shown else "no"),
        ],
        "questions": lambda shown: [("<image>\nIs it a cat?", "yes" if "cat" in shown else "no")],
    }
    for file, ask in turns.items():
        rows = []
        for name, shown in SHOWN.items():
            said = [
                {"from": who, "value": text}
                for pair in ask(shown)
                for who, text in zip(("human", "gpt"), pair, strict=True)
            ]
            rows.append({"id": name, "image": name, "conversations": said})
        (place / f"{file}.json").write_text(json.dumps(rows))
    tree = tiny.tree()
    for name, file in (("pretrain", "captions"), ("instruct", "talks"), ("test", "questions")):
        tree["data"][name] |= {"path": str(place / f"{file}.json"), "images": str(place)}
    tree["evaluation"] = {"data": "test", "metric": "yes_no", "max_new_tokens": 3}
    tree["workers"] = 1
    tiny.recipe(place / "recipe.yaml", tree)
    return place


@pytest.fixture(scope="module")
def trained(photographs, command):
    done = command("train", photographs / "recipe.yaml", "--out", photographs / "run")
    assert done.code == 0, done.err
    return photographs / "run"


def test_the_photographs_pass_the_check(photographs, command):
    done = command("check", photographs / "recipe.yaml", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {name: (source["rows"], source["unusable"]) for name, source in found.items()} == {
        "pretrain": (10, 0),
        "instruct": (10, 0),
        "test": (10, 0),
    }


def test_three_stages_learn_from_them_and_every_question_is_answered(trained):
    ledger = json.loads((trained / "pipeline.json").read_text())["stages"]
    assert [(stage["name"], stage["state"], stage["left_out"]) for stage in ledger] == [
        (name, "done", 0) for name in ("dpt", "sft", "dft")
    ]
    rows = json.loads((trained / "results.json").read_text())["rows"]
    assert [(row["name"], row["n"]) for row in rows] == [("teacher", 10), ("tiny", 10)]
    assert rows[1]["segments"]["visual"]["positions"] == 160
    assert (trained / "report.html").stat().st_size > 10_000


def test_the_student_answers_a_file_of_questions_about_them(photographs, trained, command, tmp_path):
    where = ["--data", photographs / "questions.json", "--images", photographs]
    done = command("eval", trained / "dft" / "model", *where, "--metric", "yes_no", "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    row = json.loads(done.out)
    assert row["n"] == 10
    assert row["majority"] == 0.9
    options = ["--metric", "yes_no", "--out", tmp_path / "again", "--json"]
    again = command("eval", trained / "dft" / "model", *where, "--template", "chatml", *options)
    other = command("eval", trained / "dft" / "model", *where, "--template", "vicuna_v1", *options)
    assert json.loads(again.out) == row  # the folder's own template is what it is asked with
    assert json.loads(other.out)["n"] == 10


def test_the_student_is_exported_and_answers_about_one_photograph(photographs, trained, command, tmp_path):
    done = command("export", trained, tmp_path / "plain")
    assert done.code == 0, done.err
    assert "logits equal bit for bit" in done.out
    said = [
        command("chat", model, photographs / "astronaut.png", "Who is it?", "--max-new-tokens", 5)
        for model in (trained, tmp_path / "plain")
    ]
    assert [one.code for one in said] == [0, 0], said[0].err + said[1].err
    assert said[0].out == said[1].out
