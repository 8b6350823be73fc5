"""Through the command line: `check` names every row that cannot be used, and training leaves such rows out, aloud."""

import json
import shutil

import pytest
import yaml
from PIL import Image

PARTS = ("loss", "ce", "response_kl", "visual_kl", "relation", "grad_norm")


@pytest.fixture
def place(tiny, tmp_path):
    """A folder of its own with the tiny world's pictures and its mixed rows."""
    shutil.copytree(tiny.world / "images", tmp_path / "images")
    return tmp_path


def write(place, rows) -> list[str]:
    (place / "rows.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return ["--data", str(place / "rows.json"), "--images", str(place / "images")]


def rows_of(tiny) -> list[dict]:
    return json.loads(tiny.mixed.read_text())


def torn(place, row):
    path = place / "images" / row["image"]
    path.write_bytes(path.read_bytes()[:200])


def spoil(row, **changes):
    row |= changes


ROW_MISTAKES = {
    "missing file": (lambda place, row: spoil(row, image="gone.png"), "no picture 'gone.png'"),
    "torn file": (torn, "cannot read picture"),
    "no picture but text": (
        lambda place, row: (place / "images" / row["image"]).write_text("hello"),
        "cannot read picture",
    ),
    "two tags": (lambda place, row: spoil(row["conversations"][0], value="<image><image> q"), "1 picture(s) but 2"),
    "no answer": (lambda place, row: row["conversations"].pop(), "no answer"),
    "empty answer": (lambda place, row: spoil(row["conversations"][-1], value=" \n"), "the answer, is empty"),
    "no conversations": (lambda place, row: row.pop("conversations"), "`conversations` is None, expected a list"),
    "wrong role": (lambda place, row: spoil(row["conversations"][0], **{"from": "bot"}), "'bot'"),
    "leaving the folder": (lambda place, row: spoil(row, image="../secret.png"), "leaves the picture folder"),
}


@pytest.mark.parametrize("mistake", ROW_MISTAKES)
def test_check_names_the_row_that_cannot_be_used(tiny, command, place, mistake):
    rows = rows_of(tiny)
    change, said = ROW_MISTAKES[mistake]
    change(place, rows[4])
    where = write(place, rows)
    done = command("check", *where, "--report", place / "found.json", "--write-clean", place / "clean.json")
    assert done.code == 1, done.err
    assert "Traceback" not in done.err + done.out
    found = json.loads((place / "found.json").read_text())["rows.json"]
    assert (found["rows"], found["unusable"]) == (len(rows), 1)
    (finding,) = found["findings"]
    assert rows[4]["id"] in finding["row"]
    assert said in finding["message"]
    assert rows[4]["id"] in done.out
    assert json.loads((place / "clean.json").read_text()) == rows[:4] + rows[5:]
    where[1] = str(place / "clean.json")
    assert command("check", *where).code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"id": "a", "conversations": [{"from', "is not JSON"),
        ('{"id": "a"}', "is no list of rows"),
        ("", "is not JSON"),
        ("[]", "an empty list"),
    ],
    ids=["truncated JSON", "no list", "empty file", "empty list"],
)
def test_check_refuses_a_file_that_is_no_list_of_rows(command, place, text, said):
    done = command("check", *write(place, text))
    assert done.code == 1
    assert "Traceback" not in done.err + done.out
    assert said in done.err
    assert "rows.json" in done.err


@pytest.mark.parametrize("workers", [1, 2])
def test_good_rows_pass_whoever_looks_at_them(tiny, command, place, workers):
    tree = tiny.tree()
    tree["stages"][1]["data"] = {"instruct": 1.0, "mixed": 2.0}
    done = command("check", tiny.recipe(place / "recipe.yaml", tree), "--json", "--workers", workers)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert list(found) == ["pretrain", "instruct", "mixed"]
    assert all(source["unusable"] == 0 for source in found.values())
    assert found["mixed"]["text_only"] == pytest.approx(10 / 32)
    rows = rows_of(tiny)
    pictures = [len([row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])) for row in rows]
    assert found["mixed"]["tokens"]["visual"]["mean"] == pytest.approx(16 * sum(pictures) / len(rows))
    assert found["mixed"]["tokens"]["visual"]["largest"] == 32


def test_check_through_both_models_sees_what_the_file_alone_does_not_show(tiny, command, place):
    tree = tiny.tree()
    tree["stages"] = tree["stages"][2:]
    rows = rows_of(tiny)
    rows[0]["conversations"][0]["value"] = "<image>" + "word " * 500  # the answer lies past max_length
    rows[16]["conversations"][1]["value"] = "an <image> in an answer"
    rows[17]["conversations"][-1]["value"] = "word " * 500
    rows.append(rows[20])
    write(place, rows)
    tree["data"]["instruct"] |= {"path": str(place / "rows.json")}
    done = command("check", tiny.recipe(place / "recipe.yaml", tree), "--json", "--fast")
    assert done.code == 1
    found = json.loads(done.out)["instruct"]
    kinds = {(finding["row"], finding["kind"]): finding["message"] for finding in found["findings"]}
    assert found["unusable"] == 2
    assert "no token to learn from within max_length 400" in kinds[rows[0]["id"], "text"]
    assert "inside an answer" in kinds[rows[16]["id"], "text"]
    assert (rows[17]["id"], "truncated") in kinds
    assert (rows[20]["id"], "duplicate") in kinds
    assert len(kinds) == 4


@pytest.mark.parametrize("wrong", [[], ["RECIPE", "--data", "x.json"], ["RECIPE", "--write-clean", "x.json"]])
def test_check_of_nothing_or_of_two_things_is_refused(tiny, command, tmp_path, wrong):
    recipe = tiny.recipe(tmp_path / "recipe.yaml")
    done = command("check", *[recipe if word == "RECIPE" else word for word in wrong])
    assert done.code == 1
    assert "either a recipe or --data" in done.err


def trained(command, place, tree, name):
    (place / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    done = command("train", place / f"{name}.yaml", "--out", place / name)
    metrics = place / name / "dft" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    return done, lines


@pytest.fixture
def spoiled(tiny, place):
    """A stage on mixed rows of which two have a picture that is there and cannot be read."""
    rows = rows_of(tiny)
    for number in (3, 12):
        Image.new("RGB", (9, 9)).save(place / "images" / f"bad{number}.png")
        rows[number]["image"] = f"bad{number}.png"
        torn_file = place / "images" / f"bad{number}.png"
        torn_file.write_bytes(torn_file.read_bytes()[:40])
    write(place, rows)
    tree = tiny.tree()
    (stage,) = tree["stages"] = tree["stages"][2:]
    stage |= {"data": "mixed", "grouping": "none", "epochs": 2}
    tree["data"]["mixed"] |= {"path": str(place / "rows.json"), "images": str(place / "images")}
    return tree, [rows[3]["id"], rows[12]["id"]]


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_training_leaves_a_bad_row_out_counts_it_and_divides_by_the_rest(command, place, spoiled, reduction):
    tree, names = spoiled
    tree["max_bad_rows"] = 0.1
    tree["stages"][0]["reduction"] = reduction
    done, whole = trained(command, place, tree, "whole")
    assert done.code == 0, done.err
    for name in names:
        assert done.err.count(f"row {name!r} left out: cannot read picture") == 2, "once in each epoch"
    assert whole[-1]["left_out"] == 4
    (stage,) = json.loads((place / "whole" / "pipeline.json").read_text())["stages"]
    assert stage["left_out"] == 4
    tree["stages"][0]["micro_batch_size"] = 1
    done, split = trained(command, place, tree, "split")
    assert done.code == 0, done.err
    for one, other in zip(whole, split, strict=True):
        assert [one[part] for part in PARTS] == pytest.approx([other[part] for part in PARTS], rel=2e-5, abs=1e-7)


def test_too_many_bad_rows_stop_the_run_and_leave_the_last_checkpoint(command, place, spoiled):
    tree, names = spoiled
    tree |= {"max_bad_rows": 0.02, "save_every": 1}  # of 64 rows one may be bad
    done, lines = trained(command, place, tree, "run")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert any(f"row {name!r} left out" in done.err for name in names)
    assert "2 of 64 rows cannot be used and max_bad_rows allows a share of 0.02" in done.err
    checkpoints = list((place / "run" / "dft" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == min(2, len(lines))


def test_a_few_rows_that_a_glance_finds_wrong_are_left_out_from_the_start(tiny, command, place):
    rows = rows_of(tiny)
    del rows[5]["conversations"]
    rows[7]["image"] = "gone.png"
    write(place, rows)
    tree = tiny.tree()
    (stage,) = tree["stages"] = tree["stages"][2:]
    stage["data"] = "mixed"
    tree["data"]["mixed"] |= {"path": str(place / "rows.json"), "images": str(place / "images")}
    done, _ = trained(command, place, tree, "strict")
    assert done.code == 1
    assert "2 of 32 rows cannot be used" in done.err
    assert not (place / "strict" / "dft").exists()
    done, lines = trained(command, place, tree | {"max_bad_rows": 0.07}, "lenient")
    assert done.code == 0, done.err
    assert "left out: rows.json row 5" in done.err
    assert "no picture 'gone.png'" in done.err
    assert "30 rows, 6 left out of each epoch" in done.err
    assert lines[-1]["left_out"] == 0


def test_a_pair_that_is_none_is_refused_before_the_first_stage(tiny, command, place):
    """The plain stage comes first; only the last one would meet the teacher."""
    tree = tiny.tree()
    tree["stages"] = tree["stages"][1:]
    tree["student"]["vision_feature_select_strategy"] = "default"
    done, _ = trained(command, place, tree, "run")
    assert done.code == 1
    assert "student 15, teacher 16" in done.err
    assert not (place / "run" / "sft").exists()
